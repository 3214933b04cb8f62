"""Building the native kernels just in time: once, whole or not at all, and with a true word where it fails.

Most tests compile with a shell script and note what would be loaded. The last ones use the real compiler, in processes
of their own, because a library that was loaded once stays.
"""

import fcntl
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import pytest
import torch

from mfac_hf.ops import bounded_wait, build, build_tools
from tests.helpers.operators import use_operators

# Answers --version, logs its arguments, and writes the word "whole" where -o says. LOG and ACTION are filled in.
COMPILER = """#!/bin/sh
case "$*" in *--version*) echo "compiler 1.0"; exit;; esac
echo "$*" >> 'LOG'
while [ "$1" != "-o" ]; do shift; done
out="$2"
ACTION
"""
WHOLE = 'echo whole > "$out"'

FILES = ["build.lock", "build.log", "mfac_cpu.so", "mfac_cpu.so.sha256"]

REAL_LOAD = torch.ops.load_library


class Machine:
    """A place to build in that knows nothing yet: PATH holds ninja, a shell script as compiler, and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.log = folder / "compiler.log"
        self.loaded: list[str] = []
        (self.bin / "ninja").symlink_to(build_tools.find_ninja())
        self.compiler(WHOLE)

    def program(self, name: str, text: str) -> Path:
        """Write an executable file into PATH."""
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def compiler(self, action: str, name: str = "c++") -> Path:
        """Make the compiler do this."""
        return self.program(name, COMPILER.replace("LOG", str(self.log)).replace("ACTION", action))

    @property
    def compilations(self) -> list[str]:
        """The arguments of each library's last command so far, which links what was compiled."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if "-shared" in line]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    if build_tools.find_ninja() is None:
        pytest.skip("needs ninja: pip install ninja")
    machine = Machine(tmp_path)
    monkeypatch.setattr(build, "_outcome", {})
    monkeypatch.setattr(build_tools.sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    monkeypatch.setattr(torch.ops, "load_library", machine.loaded.append)
    monkeypatch.setenv("PATH", str(machine.bin))
    monkeypatch.setenv("MFAC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MFAC_NATIVE", raising=False)
    for name in ("CXX", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return machine


def test_first_use_builds_and_says_so_and_every_later_one_loads(machine, caplog):
    directory = build.build_directory("cpu")
    library = directory / "mfac_cpu.so"
    assert build.native_status("cpu") == f"built at first use, in {directory}"
    assert machine.compilations == [], "asking builds nothing"
    use_operators()
    use_operators()
    assert machine.loaded == [str(library)]
    assert len(machine.compilations) == 1
    assert caplog.messages == [f"building native cpu kernels, once, in {directory}: the first step waits"]
    assert library.read_text() == "whole\n"
    assert sorted(path.name for path in directory.iterdir()) == FILES
    assert build.native_status("cpu") == "in use"

    build._outcome.clear()  # as in the next process
    (directory / "build.lock").unlink()
    assert build.native_status("cpu") == f"built, in {directory}"
    use_operators()
    assert machine.loaded == [str(library)] * 2
    assert len(machine.compilations) == len(caplog.messages) == 1
    assert not (directory / "build.lock").exists(), "nothing is written where a library is there: it may be read-only"


@pytest.mark.parametrize("mode", ["", "auto", "force"])
def test_modes_that_build(machine, monkeypatch, mode):
    monkeypatch.setenv("MFAC_NATIVE", mode)
    assert build.load_native("cpu")
    assert len(machine.loaded) == 1


def test_off_never_builds_nor_loads(machine, monkeypatch, recwarn):
    monkeypatch.setenv("MFAC_NATIVE", "off")
    assert build.native_status("cpu") == "switched off by MFAC_NATIVE=off"
    use_operators()
    assert not build.load_native("cpu")
    assert machine.loaded == machine.compilations == list(recwarn) == []
    assert build.native_status("cpu") == "switched off by MFAC_NATIVE=off"


def test_other_modes_are_refused(machine, monkeypatch):
    monkeypatch.setenv("MFAC_NATIVE", "yes")
    for call in (lambda: build.load_native("cpu"), lambda: build.native_status("cpu"), use_operators):
        with pytest.raises(ValueError, match="MFAC_NATIVE is 'yes'; expected auto, force or off"):
            call()
    assert machine.compilations == []


def test_device_without_kernels(machine, monkeypatch, recwarn):
    assert not build.load_native("abacus")
    assert build.native_status("abacus") == "there are no native kernels for abacus"
    assert list(recwarn) == []
    build._outcome.clear()
    monkeypatch.setenv("MFAC_NATIVE", "force")
    for call in (build.load_native, build.build_native, build.build_directory):
        with pytest.raises(build.NativeBuildError, match="there are no native kernels for abacus"):
            call("abacus")


def no_ninja(machine, monkeypatch):
    (machine.bin / "ninja").unlink()
    return "ninja was not found: pip install ninja"


def ninja_that_does_not_run(machine, monkeypatch):
    machine.program("ninja", "\0")
    return r"ninja does not run \(.+\): pip install --force-reinstall ninja"


def no_compiler(machine, monkeypatch):
    (machine.bin / "c++").unlink()
    return r"no C\+\+ compiler was found \(c\+\+, g\+\+ or clang\+\+\): install one, or name it in CXX"


def compiler_that_is_not_there(machine, monkeypatch):
    monkeypatch.setenv("CXX", "new++ -O3")
    return r"no C\+\+ compiler was found \(CXX is 'new\+\+ -O3'\)"


def compiler_that_fails(machine, monkeypatch):
    machine.compiler('echo whole > "$out"; echo "unknown flag" >&2; exit 1')
    return r"the compiler failed; its messages are in .*/cache/cpu-\w{16}/build\.log"


def compiler_that_does_not_run(machine, monkeypatch):
    machine.program("c++", "\0")
    return r"the compiler failed; its messages are in .*build\.log"


def compiler_that_writes_nothing(machine, monkeypatch):
    machine.compiler(":")
    return r"the compiler failed; its messages are in .*build\.log"


def compiler_that_writes_no_library(machine, monkeypatch):
    monkeypatch.setattr(torch.ops, "load_library", REAL_LOAD)
    return r"mfac_cpu\.so does not load \(.*mfac_cpu\.so: .+\); delete .*/cache/cpu-\w{16} to have it built anew"


def file_in_place_of_the_cache(machine, monkeypatch):
    (machine.folder / "cache").touch()
    return r"the build directory .* cannot be written \(.*\); name another in the environment variable MFAC_CACHE"


def file_in_place_of_the_build_directory(machine, monkeypatch):
    (machine.folder / "cache").mkdir()
    build.build_directory("cpu").touch()
    return r"the build directory .* cannot be written \(.*\); name another in the environment variable MFAC_CACHE"


def no_home(machine, monkeypatch):
    monkeypatch.delenv("MFAC_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", dict[int, str]().__getitem__)  # a user that the system does not list
    return r"no directory to build in \(.*home directory.*\); name one in the environment variable MFAC_CACHE"


def other_system(machine, monkeypatch):
    monkeypatch.setattr(build.platform, "system", lambda: "Windows")
    monkeypatch.setattr(build, "os", types.SimpleNamespace(name="nt", environ=os.environ, path=os.path))
    return "native kernels are built on Linux and macOS, not on Windows"


@pytest.mark.parametrize(
    "sabotage",
    [
        no_ninja,
        ninja_that_does_not_run,
        no_compiler,
        compiler_that_is_not_there,
        compiler_that_fails,
        compiler_that_does_not_run,
        compiler_that_writes_nothing,
        compiler_that_writes_no_library,
        file_in_place_of_the_cache,
        file_in_place_of_the_build_directory,
        no_home,
        other_system,
    ],
)
def test_failure_is_named_once_and_operators_work(machine, monkeypatch, sabotage):
    message = sabotage(machine, monkeypatch)
    monkeypatch.setenv("MFAC_NATIVE", "force")
    for _ in range(2):
        with pytest.raises(build.NativeBuildError, match=message):
            use_operators()

    monkeypatch.setenv("MFAC_NATIVE", "auto")
    assert build.native_status("cpu"), "a report says what it can and fails at nothing"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use_operators()
        use_operators()
    (warning,) = caught
    opening = re.escape("mfac_hf goes on without native cpu kernels (same results, slower): ")
    assert re.match(opening + ".*" + message, str(warning.message))
    assert str(warning.message).endswith(". MFAC_NATIVE=off silences this")
    assert re.search(message, build.native_status("cpu"))
    assert machine.loaded == []


def test_log_holds_what_the_compiler_said(machine):
    machine.compiler('echo "unknown flag é" >&2; exit 1')
    with pytest.raises(build.NativeBuildError) as failure:
        build.build_native("cpu")
    assert "unknown flag é" in Path(str(failure.value).rpartition(" ")[2]).read_text(encoding="utf-8")


def test_failed_build_leaves_no_library_and_can_be_repeated(machine):
    machine.compiler('echo half > "$out"; exit 1')
    with pytest.raises(build.NativeBuildError):
        build.build_native("cpu")
    directory = build.build_directory("cpu")
    assert sorted(path.name for path in directory.iterdir()) == ["build.lock", "build.log"]
    machine.compiler(WHOLE)
    assert build.build_native("cpu").read_text() == "whole\n"


def test_lock_orders_builds_and_goes_with_the_process_that_holds_it(machine):
    directory = build.build_directory("cpu")
    directory.mkdir(parents=True)
    (directory / "lock").touch()  # as torch's own builder leaves behind
    code = (
        "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(directory / "build.lock")], **pipes) as holder:
        assert holder.stdout.readline() == b"held\n"
        builder = threading.Thread(target=build.build_native, args=("cpu",), daemon=True)
        builder.start()
        builder.join(timeout=0.5)
        assert builder.is_alive() and machine.compilations == []
        holder.kill()
        builder.join(timeout=60)
    assert not builder.is_alive()
    assert (directory / "mfac_cpu.so").read_text() == "whole\n"


def test_a_holder_of_the_lock_that_hangs_is_named_and_not_waited_for(machine, monkeypatch):
    monkeypatch.setattr(bounded_wait, "LOCK_SECONDS", 0.3)
    directory = build.build_directory("cpu")
    directory.mkdir(parents=True)
    with open(directory / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.warns(UserWarning, match=r"another process holds .*build\.lock and did nothing for .*MFAC_CACHE"):
            assert not build.load_native("cpu")
        build._outcome.clear()
        monkeypatch.setenv("MFAC_NATIVE", "force")
        with pytest.raises(build.NativeBuildError, match="another process holds"):
            build.load_native("cpu")
    assert build.load_native("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["compiler", "version"])
def test_a_compiler_that_hangs_is_ended_and_named(machine, monkeypatch, what):
    monkeypatch.setattr(bounded_wait, "IDLE_SECONDS", 1.0)
    if what == "version":
        machine.program("c++", "#!/bin/sh\nexec /bin/sleep 600\n")
        message = r"c\+\+ --version did nothing for 1 seconds; name another compiler in CXX"
    else:
        machine.compiler("echo license? ; exec /bin/sleep 600")
        message = r"the compiler did nothing for 1 seconds and was ended; its messages are in .*build\.log"
    with pytest.warns(UserWarning, match=message):
        assert not build.load_native("cpu")
    build._outcome.clear()
    monkeypatch.setenv("MFAC_NATIVE", "force")
    with pytest.raises(build.NativeBuildError, match=message):
        build.load_native("cpu")
    if what == "compiler":
        directory = build.build_directory("cpu")
        assert sorted(path.name for path in directory.iterdir()) == ["build.lock", "build.log"]
        machine.compiler(WHOLE)
        assert build.load_native("cpu"), "the lock is free again"


def test_a_build_that_works_touches_the_lock_for_those_that_wait(machine, monkeypatch):
    monkeypatch.setattr(build, "compiler_version", lambda command: "1.0")
    directory, touched = build.build_directory("cpu"), []

    def run(command, *, working, **places):
        os.utime(directory / "build.lock", ns=(0, 0))
        working()
        touched.append((directory / "build.lock").stat().st_mtime_ns)
        return 1

    monkeypatch.setattr(bounded_wait, "run", run)
    with pytest.raises(build.NativeBuildError, match="the compiler failed"):
        build.build_native("cpu")
    assert touched[0] > 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "no checksum", "other checksum", "link", "writable"])
def test_a_library_that_is_not_the_one_that_was_built_is_built_anew(machine, damage):
    library = build.build_native("cpu")
    checksum = library.with_name("mfac_cpu.so.sha256")
    content = library.read_bytes()
    if damage == "cut":
        library.write_bytes(content[:3])
    elif damage == "flipped":
        library.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "empty":
        library.write_bytes(b"")
    elif damage == "no checksum":  # as an earlier version leaves it
        checksum.unlink()
    elif damage == "other checksum":
        checksum.write_text("é")
    elif damage == "link":
        library.rename(machine.folder / "elsewhere")
        library.symlink_to(machine.folder / "elsewhere")
    else:
        library.chmod(0o666)
    assert build.native_status("cpu") == f"built at first use, in {library.parent}"
    assert build.load_native("cpu")
    assert machine.loaded == [str(library)] and len(machine.compilations) == 2
    assert library.read_bytes() == content and not library.is_symlink()
    assert sorted(path.name for path in library.parent.iterdir()) == FILES


@pytest.mark.parametrize("where", ["cache", "build directory", "parent"])
def test_a_library_that_others_may_have_planted_is_not_loaded(machine, monkeypatch, where):
    monkeypatch.setenv("MFAC_CACHE", str(machine.folder / "parent" / "cache"))
    library = build.build_native("cpu")
    folder = {"cache": library.parents[1], "build directory": library.parent, "parent": library.parents[2]}[where]
    folder.chmod(0o777)
    message = rf"the build directory .* is refused: others can write {folder} \(mode 777\).*MFAC_CACHE"
    assert re.match(message, build.native_status("cpu"))
    with pytest.warns(UserWarning, match=message):
        assert not build.load_native("cpu")
    build._outcome.clear()
    monkeypatch.setenv("MFAC_NATIVE", "force")
    with pytest.raises(build.NativeBuildError, match=message):
        build.load_native("cpu")
    assert machine.loaded == [] and len(machine.compilations) == 1
    folder.chmod(0o755)
    assert build.load_native("cpu")


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_files_behind_links_in_the_cache_keep_their_content(machine, kind):
    directory = build.build_directory("cpu")
    directory.mkdir(parents=True)
    precious = {name: machine.folder / f"precious {name}" for name in FILES}
    for name, file in precious.items():
        file.write_text("years of work")
        if kind == "hard" or name != "build.lock":
            (os.symlink if kind == "soft" else os.link)(file, directory / name)
    assert build.load_native("cpu")
    assert {file.read_text() for file in precious.values()} == {"years of work"}
    assert (directory / "mfac_cpu.so").read_text() == "whole\n"


def test_a_link_in_place_of_the_lock_is_refused(machine):
    directory = build.build_directory("cpu")
    directory.mkdir(parents=True)
    (directory / "build.lock").symlink_to(machine.folder / "nowhere")
    with pytest.raises(build.NativeBuildError, match=r"cannot be written \(.*links.*build\.lock"):
        build.build_native("cpu")
    assert not (machine.folder / "nowhere").exists() and machine.compilations == []


def test_the_library_is_on_the_disk_before_it_has_its_name(machine, monkeypatch):
    synced, replace, fsync = set(), os.replace, os.fsync

    def note(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(made, target):
        assert os.stat(made).st_ino in synced, f"{target} gets its name too early"
        replace(made, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", check)
    library = build.build_native("cpu")
    assert {library.stat().st_ino, library.parent.stat().st_ino} <= synced


def test_compiler_of_a_killed_build_cannot_spoil_the_next(machine):
    """Such a compiler goes on while the lock is free: both write at the same time, the slower one first and last."""
    fifo = machine.folder / "fifo"
    os.mkfifo(fifo)
    machine.compiler(
        f"""echo begin > "$out"
        if /bin/mkdir '{machine.folder}/slower' 2> {os.devnull}; then
            : > '{machine.folder}/begun'
            read go < '{fifo}'
        fi
        echo end >> "$out"
        """
    )
    library = build.build_directory("cpu") / "mfac_cpu.so"
    library.parent.mkdir(parents=True)
    slower = threading.Thread(target=build._build, args=("cpu", library), daemon=True)
    slower.start()
    for _ in range(600):
        if (machine.folder / "begun").exists():
            break
        slower.join(timeout=0.1)
    assert (machine.folder / "begun").exists()
    assert not library.exists(), "half a library must not have its name"
    build._build("cpu", library)
    assert library.read_text() == "begin\nend\n"
    fifo.write_text("go\n")
    slower.join(timeout=60)
    assert not slower.is_alive()
    assert library.read_text() == "begin\nend\n"


def other_sources(machine, monkeypatch):
    shutil.copytree(build.CSRC, machine.folder / "csrc")
    with open(machine.folder / "csrc" / "mfac_cpu.cpp", "a") as source:
        source.write("// changed\n")
    monkeypatch.setattr(build, "CSRC", machine.folder / "csrc")


def other_flags(machine, monkeypatch):
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))


def other_torch(machine, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "99.0.0+cpu")


def other_compiler(machine, monkeypatch):
    monkeypatch.setenv("CXX", str(machine.compiler(WHOLE, name="g++")))


def other_arguments_of_the_compiler(machine, monkeypatch):
    monkeypatch.setenv("CXX", "c++ -O1")


def other_version_of_the_compiler(machine, monkeypatch):
    text = (machine.bin / "c++").read_text()
    machine.program("c++", text.replace("compiler 1.0", "compiler 1.1"))


def other_processor(machine, monkeypatch):
    monkeypatch.setattr(build, "processor_features", lambda: "flags: abacus")


def other_machine(machine, monkeypatch):
    monkeypatch.setattr(build.platform, "machine", lambda: "pdp11")


@pytest.mark.parametrize(
    "change",
    [
        other_sources,
        other_flags,
        other_torch,
        other_compiler,
        other_arguments_of_the_compiler,
        other_version_of_the_compiler,
        other_processor,
        other_machine,
    ],
)
def test_directory_depends_on_all_that_a_library_depends_on(machine, monkeypatch, change):
    before = build.build_directory("cpu")
    assert build.build_directory("cpu") == before
    change(machine, monkeypatch)
    after = build.build_directory("cpu")
    assert after != before
    assert after.parent == before.parent == machine.folder / "cache"


def test_processor_is_told_by_its_features():
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("this system has no /proc/cpuinfo")
    assert build_tools.processor_features() in cpuinfo.read_text()
    assert len(build_tools.processor_features().split()) > 10


def test_cache_directory(machine, monkeypatch):
    monkeypatch.setenv("HOME", str(machine.folder))
    for value, expected in [("", ".cache/mfac_hf"), ("~/x", "x")]:
        monkeypatch.setenv("MFAC_CACHE", value)
        assert build.build_directory("cpu").parent == machine.folder / expected
    monkeypatch.setenv("MFAC_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine.folder / "xdg"))
    assert build.build_directory("cpu").parent == machine.folder / "xdg" / "mfac_hf"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert build.build_directory("cpu").parent == machine.folder / ".cache/mfac_hf"
    monkeypatch.chdir(machine.folder)
    monkeypatch.setenv("MFAC_CACHE", "here")
    assert build.load_native("cpu")
    assert (machine.folder / machine.loaded[0]).read_text() == "whole\n"
    assert Path(machine.loaded[0]).resolve().is_relative_to(machine.folder / "here")


def test_compiler_is_the_one_that_cxx_names(machine, monkeypatch):
    assert build_tools.find_compiler() == str(machine.bin / "c++")
    folder = machine.bin / "my tools"
    folder.mkdir()
    spaced = machine.compiler(WHOLE, name="my tools/c++")
    for value, path in [("ccache c++ -O1", "ccache"), (str(spaced), "my tools/c++"), ("", "c++")]:
        monkeypatch.setenv("CXX", value)
        machine.compiler(WHOLE, name=path)
        assert build_tools.find_compiler() == str(machine.bin / path)
        build.build_native("cpu")
    with_words, *others = machine.compilations
    assert with_words.startswith("c++ -O1 -shared")
    assert all(arguments.startswith("-shared") for arguments in others) and len(others) == 2


def test_ninja_of_an_environment_that_is_not_activated(machine, monkeypatch):
    scripts = machine.folder / "scripts"
    scripts.mkdir()
    (machine.bin / "ninja").rename(scripts / "ninja")
    assert build_tools.find_ninja() is None
    monkeypatch.setattr(build_tools.sysconfig, "get_path", lambda name: str(scripts))
    assert build_tools.find_ninja() == str(scripts / "ninja")
    build.build_native("cpu")


# Uses the operators, then prints whether CPU kernels are registered, the libraries loaded and the warnings.
PROCESS = """
import json, pathlib, sys, warnings
sys.path.insert(0, sys.argv[1])
import torch
from mfac_hf.ops import bounded_wait, build, build_tools
from tests.helpers.operators import use_operators
build.CSRC = pathlib.Path(sys.argv[2])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    use_operators()
    use_operators()
print(json.dumps({
    "registered": torch._C._dispatch_has_kernel_for_dispatch_key("mfac::row_dots", "CPU"),
    "loaded": sorted(torch.ops.loaded_libraries),
    "warnings": [str(warning.message) for warning in caught],
}))
"""


def start(csrc: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that uses the operators."""
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(Path(__file__).parents[2]), str(csrc)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed, in JSON."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.mark.slow
def test_processes_that_start_together_share_one_build(tmp_path):
    """In directories whose names hold all that a shell or ninja would take for something else."""
    if build.missing_tools("cpu"):
        pytest.skip("; ".join(build.missing_tools("cpu")))
    odd = tmp_path / "a b$c:d'e(f)|&g\"é"
    shutil.copytree(build.CSRC, odd / "csrc")
    log = tmp_path / "compiler.log"
    wrapper = odd / "my c++"
    wrapper.write_text(f"#!/bin/sh\necho \"$*\" >> '{log}'\nexec '{build_tools.find_compiler()}' \"$@\"\n")
    wrapper.chmod(0o755)
    environment = {"MFAC_NATIVE": "force", "MFAC_CACHE": str(odd / "cache"), "CXX": str(wrapper)}
    processes = [start(odd / "csrc", **environment) for _ in range(4)]
    reports = {finish(process) for process in processes}
    (library,) = odd.glob("cache/cpu-*/mfac_cpu.so")
    (report,) = reports
    assert json.loads(report) == {"registered": True, "loaded": [str(library)], "warnings": []}
    assert len([line for line in log.read_text().splitlines() if "-shared" in line]) == 1
    assert sorted(path.name for path in library.parent.iterdir()) == FILES


@pytest.mark.slow
def test_process_without_compiler_computes_the_same(tmp_path):
    environment = {"MFAC_NATIVE": "auto", "MFAC_CACHE": str(tmp_path), "CXX": "nothing++"}
    report = json.loads(finish(start(build.CSRC, **environment)))
    assert report["registered"] is False
    assert report["loaded"] == []
    (message,) = report["warnings"]
    assert "no C++ compiler was found (CXX is 'nothing++')" in message
