"""What is missing for CUDA kernels, on made-up machines: scripts for nvcc, and a torch that says it has CUDA."""

import pytest
import torch

from mfac_hf.ops import build, cuda_toolkit

NVCC = """#!/bin/sh
case "$*" in
    *--version*) echo 'nvcc: NVIDIA (R) Cuda compiler driver'; echo 'Cuda compilation tools, release 13.0, V13.0.88';;
    *--dryrun*) echo '#$ _SPACE_= ' >&2; echo '#$ _HERE_=HOME/bin' >&2;;
esac
"""


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A folder with a whole toolkit, which CUDA_HOME names, for a torch with CUDA 13 and two kinds of devices."""
    home = tmp_path / "tool kit"
    for name in ("bin", "include", "lib64"):
        (home / name).mkdir(parents=True)
    (home / "include" / "cuda_runtime.h").touch()
    (home / "lib64" / "libcudart_static.a").touch()
    (home / "bin" / "nvcc").write_text(NVCC.replace("HOME", str(home)))
    (home / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (8, 0), (9, 0)][i])
    return home


def test_nothing_is_missing(toolkit):
    assert cuda_toolkit.missing_cuda() == []
    assert cuda_toolkit.architectures() == ["80", "90"]
    assert cuda_toolkit.toolkit_version(str(toolkit / "bin" / "nvcc")) == "13.0"


def test_home_is_that_of_the_program_behind_a_wrapper(toolkit, tmp_path, monkeypatch):
    """As where nvcc on PATH is a script somewhere else."""
    wrapper = tmp_path / "wrapper" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec "{toolkit}/bin/nvcc" "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=":")
    assert cuda_toolkit.find_nvcc() == str(wrapper)
    assert cuda_toolkit.toolkit_home(str(wrapper)) == toolkit
    assert cuda_toolkit.missing_cuda() == []


def no_cuda_in_torch(toolkit, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    return "this torch is built without CUDA: install a build with it"


def no_device(toolkit, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return "torch sees no CUDA device: check the driver and CUDA_VISIBLE_DEVICES"


def no_nvcc(toolkit, monkeypatch):
    (toolkit / "bin" / "nvcc").unlink()
    return "nvcc was not found: install the CUDA toolkit 13, or name its folder in CUDA_HOME"


def nvcc_that_does_not_run(toolkit, monkeypatch):
    (toolkit / "bin" / "nvcc").write_text("\0")
    return "does not run, or does not tell its version"


def other_major_version(toolkit, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    return "is of CUDA 13.0, torch of CUDA 12.8: install the CUDA toolkit 12, or name its folder in CUDA_HOME"


def no_headers(toolkit, monkeypatch):
    (toolkit / "include" / "cuda_runtime.h").unlink()
    return "has no headers in .*tool kit"


def no_libraries(toolkit, monkeypatch):
    (toolkit / "lib64" / "libcudart_static.a").unlink()
    return "has no libraries in .*tool kit"


@pytest.mark.parametrize(
    "sabotage",
    [
        no_cuda_in_torch,
        no_device,
        no_nvcc,
        nvcc_that_does_not_run,
        other_major_version,
        no_headers,
        no_libraries,
    ],
)
def test_what_is_missing_is_named(toolkit, monkeypatch, sabotage):
    monkeypatch.setattr(build, "_outcome", {})
    monkeypatch.setenv("MFAC_NATIVE", "force")
    message = sabotage(toolkit, monkeypatch)
    with pytest.raises(build.NativeBuildError, match=message):
        build.build_native("cuda")
    with pytest.raises(build.NativeBuildError, match=message):
        build.load_native("cuda")
    monkeypatch.setenv("MFAC_NATIVE", "auto")
    with pytest.warns(UserWarning, match=f"goes on without native cuda kernels .*{message}"):
        assert not build.load_native("cuda")


def test_directory_depends_on_devices_and_toolkit(toolkit, monkeypatch):
    before = build.build_directory("cuda")
    assert build.build_directory("cuda") == before != build.build_directory("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (12, 0))
    devices = build.build_directory("cuda")
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("13.0", "13.1"))
    assert len({before, devices, build.build_directory("cuda")}) == 3


def test_commands_of_a_build(toolkit, tmp_path, monkeypatch):
    """Kernels by nvcc for each kind of device, the binding by the C++ compiler, and one library of both."""
    if build.missing_tools("cpu"):
        pytest.skip("; ".join(build.missing_tools("cpu")))
    nvcc, log, cxx = toolkit / "bin" / "nvcc", tmp_path / "log", tmp_path / "cxx"
    record = f"""echo "$0 $*" >> '{log}'
while [ $# -gt 1 ] && [ "$1" != "-o" ]; do shift; done
echo made > "$2"
"""
    nvcc.write_text(nvcc.read_text().replace("esac", f"    *)\n{record};;\nesac").replace("\n;;", ";;"))
    cxx.write_text("#!/bin/sh\n" + record)
    cxx.chmod(0o755)
    monkeypatch.setenv("CXX", str(cxx))
    monkeypatch.setenv("MFAC_CACHE", str(tmp_path / "cache"))
    assert build.build_native("cuda").read_text() == "made\n"
    commands = [line for line in log.read_text().splitlines() if " -o " in line]
    (kernels,) = [line for line in commands if "mfac_kernels.cu" in line]
    (binding,) = [line for line in commands if "mfac_binding.cpp" in line]
    (link,) = [line for line in commands if "-shared" in line]
    assert kernels.startswith(str(nvcc)) and link.startswith(str(nvcc)) and binding.startswith(str(cxx))
    for arch in ("80", "90"):
        assert f"-gencode arch=compute_{arch},code=sm_{arch}" in kernels
    assert "-DUSE_CUDA" in binding
    assert "-cudart static" in link and "mfac_kernels.o mfac_binding.o" in link and "-ltorch_cuda" in link
