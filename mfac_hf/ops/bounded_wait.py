"""Waiting for a compiler, or for the process that holds a lock, which ends also where these hang.

A time limit alone would be too short for a busy machine, or too long for a user who waits. So what counts is whether
anything happens: a compiler that works uses the processor, and whoever waits for its end hears of that through the
time stamp of the lock.
"""

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

__all__ = ["HungError", "lock", "run"]

# A compiler that has not used the processor for this long hangs (a license server, a file system that is away) ...
IDLE_SECONDS = 20.0
# ... where less than this is as good as nothing: a busy machine gives a compiler far more.
WORK_SECONDS = 0.5
# A holder whose compiler hangs gives up before those that wait for it do.
LOCK_SECONDS = 30.0
# Ends what works forever. Kernels are built in seconds, on an overloaded machine in minutes.
LONGEST_SECONDS = 1800.0


class HungError(RuntimeError):
    """What was waited for does nothing; says for how long."""


def run(
    command: list[str],
    *,
    messages: IO[bytes],
    errors: int = subprocess.STDOUT,
    folder: Path | None = None,
    working: Callable[[], None] = lambda: None,
) -> int:
    """Run a program; end it, and all that it started, where it hangs.

    Args:
        command: the program and its arguments; it reads nothing.
        messages: where its output goes.
        errors: where its error messages go: ``subprocess.STDOUT`` (the same file) or ``subprocess.DEVNULL``.
        folder: its working directory; that of this process if None.
        working: called each time it was seen to work.

    Returns:
        Its exit status.

    Raises:
        HungError: it did nothing for `IDLE_SECONDS`, or went on for `LONGEST_SECONDS`.
        OSError: it does not run.
    """
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=messages, stderr=errors)
    started = last = time.monotonic()
    used = 0.0
    try:
        while True:
            try:
                return process.wait(timeout=min(1.0, IDLE_SECONDS))
            except subprocess.TimeoutExpired:
                now, before = time.monotonic(), used
            used = _processor_seconds(process.pid)
            if abs(used - before) >= WORK_SECONDS:
                last = now
                working()
            else:
                used = before
            if now - last > IDLE_SECONDS:
                raise HungError(f"did nothing for {IDLE_SECONDS:.0f} seconds")
            if now - started > LONGEST_SECONDS:
                raise HungError(f"was not done after {LONGEST_SECONDS:.0f} seconds")
    except BaseException:
        _kill_tree(process)
        raise


def lock(descriptor: int) -> None:
    """Lock an open file, which lasts until it is closed; give up if its holder seems to hang.

    A holder that works says so by touching the file.

    Raises:
        HungError: the file was not touched for `LOCK_SECONDS`.
        OSError: this file system has no locks.
    """
    import fcntl  # here: Windows has none

    seen, last = os.fstat(descriptor).st_mtime_ns, time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            now, touched = time.monotonic(), os.fstat(descriptor).st_mtime_ns
        if touched != seen:
            seen, last = touched, now
        elif now - last > LOCK_SECONDS:
            raise HungError(f"did nothing for {LOCK_SECONDS:.0f} seconds")
        time.sleep(0.1)


def _processor_seconds(pid: int) -> float:
    """Processor time of a process and of all that it started, those that ended included where the system tells."""
    seconds = 0.0
    for process in _tree(pid):
        with suppress(psutil.Error):  # it has ended meanwhile
            seconds += sum(process.cpu_times()[:4])
    return seconds


def _tree(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process, then its descendants; ninja puts each compiler into a process group of its own."""
    for member in _tree(process.pid):
        with suppress(psutil.Error):
            member.kill()
    process.wait()
