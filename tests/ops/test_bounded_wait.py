"""Waiting ends: for programs that do nothing, for programs that go on forever, and for locks that nobody lets go."""

import fcntl
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from mfac_hf.ops import bounded_wait
from mfac_hf.ops.bounded_wait import HungError


@pytest.fixture
def messages(tmp_path):
    with open(tmp_path / "messages", "wb") as file:
        yield file


def ended(pid):
    """Whether a process is no more, or waits only for its parent to take notice."""
    for _ in range(100):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_a_program_that_ends_gives_its_status_and_output(tmp_path, messages):
    command = ["sh", "-c", "pwd; echo problem >&2; read line; exit 3"]
    assert bounded_wait.run(command, folder=tmp_path, messages=messages) == 3
    assert (tmp_path / "messages").read_text() == f"{tmp_path}\nproblem\n"
    with pytest.raises(FileNotFoundError):
        bounded_wait.run(["no-such-program"], messages=messages)


def test_a_program_that_does_nothing_is_ended_with_all_that_it_started(tmp_path, messages, monkeypatch):
    monkeypatch.setattr(bounded_wait, "IDLE_SECONDS", 2.0)
    # As below ninja, the one that hangs is in a process group of its own, and heeds no polite request.
    code = """if True:
        import os, signal, time
        if os.fork():
            os.wait()
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(os.getpid(), flush=True)
        time.sleep(600)
    """
    with pytest.raises(HungError, match="did nothing for 2 seconds"):
        bounded_wait.run([sys.executable, "-I", "-S", "-c", code], messages=messages)
    assert ended(int((tmp_path / "messages").read_text()))


def test_a_program_that_works_is_waited_for(tmp_path, messages, monkeypatch):
    monkeypatch.setattr(bounded_wait, "IDLE_SECONDS", 0.2)
    monkeypatch.setattr(bounded_wait, "WORK_SECONDS", 0.02)
    clock = iter(range(10**6))
    monkeypatch.setattr(bounded_wait.time, "monotonic", lambda: next(clock) / 10)  # 0.1 seconds from look to look
    used = iter([0.5, 1.0, 1.01, 1.5, 2.0, 2.5, 3.0])
    monkeypatch.setattr(bounded_wait, "_processor_seconds", lambda pid: next(used, 3.0))
    seen = []
    with pytest.raises(HungError):
        bounded_wait.run(["sleep", "600"], folder=tmp_path, messages=messages, working=lambda: seen.append(1))
    assert len(seen) == 6, "one look found next to no work"


def test_a_program_that_works_forever_is_ended(tmp_path, messages, monkeypatch):
    monkeypatch.setattr(bounded_wait, "LONGEST_SECONDS", 0.5)
    command = ["sh", "-c", "while :; do :; done"]
    with pytest.raises(HungError, match="was not done after 0 seconds"):
        bounded_wait.run(command, messages=messages)


def test_work_is_that_of_the_whole_family(tmp_path):
    burn = "x = [i for i in range(10**6)]; import os; os.times().user > 0.2 and exit()"
    code = f"import subprocess as s, sys; s.run([sys.executable, '-c', {burn!r}]); print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.readline()
        own = sum(psutil.Process(process.pid).cpu_times()[:2])
        if sys.platform == "linux":
            assert bounded_wait._processor_seconds(process.pid) > own
        process.stdin.close()
    assert bounded_wait._processor_seconds(process.pid) == 0, "it is gone"


def test_a_lock_is_had_when_its_holder_lets_it_go(tmp_path):
    first, second = (os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    bounded_wait.lock(first)
    waiter = threading.Thread(target=bounded_wait.lock, args=(second,), daemon=True)
    waiter.start()
    waiter.join(timeout=0.3)
    assert waiter.is_alive()
    os.close(first)
    waiter.join(timeout=60)
    assert not waiter.is_alive()
    os.close(second)


def test_a_holder_is_waited_for_while_it_touches_the_lock_and_no_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded_wait, "LOCK_SECONDS", 1.0)
    holder, waiting = (os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    fcntl.flock(holder, fcntl.LOCK_EX)
    now, touches = [0.0], [5]
    monkeypatch.setattr(bounded_wait.time, "monotonic", lambda: now[0])

    def sleep(seconds):
        now[0] += 0.9
        if touches[0]:
            touches[0] -= 1
            os.utime(holder, ns=(touches[0], touches[0]))

    monkeypatch.setattr(bounded_wait.time, "sleep", sleep)
    with pytest.raises(HungError, match="did nothing for 1 seconds"):
        bounded_wait.lock(waiting)
    assert touches == [0] and now[0] > 5 * 0.9
