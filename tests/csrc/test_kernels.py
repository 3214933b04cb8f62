"""The CUDA kernels without a GPU: compiled by nvcc, and run on the processor through `emulation/cuda_runtime.h`.

The emulation has a thread for each thread of a block and a barrier for `__syncthreads`, so that wrong results, races
and accesses out of bounds show. What it cannot show (speed, limits of a real device) `scripts/benchmark.py --kernels`
does.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mfac_hf.ops import build, cuda_toolkit

ARCHITECTURES = ("80", "90", "100", "120")
EMULATION = Path(__file__).parent / "emulation"
KERNELS = build.CSRC / "mfac_kernels.cu"
# 16 threads a block instead of 256, and so two for each of its 8 rows: threads of an operating system are slow.
EMULATED = ["-std=c++20", "-g", "-pthread", "-DMFAC_THREADS=16", f"-I{EMULATION}", f"-I{build.CSRC}"]
STRICT = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def run(*command, **options):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500, **options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.fixture
def nvcc():
    nvcc = cuda_toolkit.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)")
    return nvcc


@pytest.fixture
def cxx():
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ was not found")
    return compiler


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(what nvcc said, the shared library): for every architecture, with warnings as errors."""
    nvcc = cuda_toolkit.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)")
    library = tmp_path_factory.mktemp("compiled") / "libmfac_kernels.so"
    command = [nvcc, *build.NVCC_FLAGS, "-Werror", "all-warnings", "-Xptxas", "-v", "--threads", "2"]
    for arch in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    return run(*command, "-shared", "-cudart", "static", KERNELS, "-o", library), library


@pytest.mark.slow
def test_compiles_for_every_architecture_without_warnings_and_spills(compiled):
    said, _ = compiled
    entries = re.findall(r"Compiling entry function .* for 'sm_(\d+)'", said)
    assert set(entries) == set(ARCHITECTURES)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) >= len(entries) and set(spills) == {("0", "0")}
    note = os.environ.get("MFAC_CUDA_CHECK")  # .ci/run wants to know that this ran
    if note:
        Path(note).write_text(" ".join(sorted(set(entries))) + "\n")


@pytest.mark.slow
def test_reads_16_bytes_at_a_time(nvcc, tmp_path):
    run(nvcc, *build.NVCC_FLAGS, "-arch=sm_80", "-ptx", KERNELS, "-o", tmp_path / "kernels.ptx")
    entries = re.split(r"\.entry ", (tmp_path / "kernels.ptx").read_text())[1:]
    # Packs of four floats and of eight bfloat16 numbers, by the template arguments in the mangled names.
    for name in (
        r"dot_chunksIffLi4E",
        r"dot_chunksI\w*BFloat16EfLi8E",
        r"columnsIffLi4E\w*AddVectorIfE",
        r"columnsI\w*BFloat16EfLi8E\w*AddVectorIfE",
        r"columnsIffLi4E\w*RescaleIffE",
        r"columnsI\w*BFloat16EfLi8E\w*RescaleIffE",
    ):
        (body,) = [entry for entry in entries if re.search(name, entry[:250])]
        wide = re.findall(r"ld\.global(?:\.nc)?\.v4\.[fub](?:32|16)", body)
        assert len(wide) >= 8, f"{name}: 8 rows are read by {len(wide)} loads of 16 bytes"


@pytest.mark.slow
def test_library_without_driver_says_so(compiled):
    """Loads anywhere, for nothing but the driver is missing; a launch comes back with the error and its words."""
    _, library = compiled
    kernels = ctypes.CDLL(str(library))
    kernels.mfac_error_text.restype = ctypes.c_char_p
    kernels.mfac_row_dots_scratch.restype = ctypes.c_int64
    assert kernels.mfac_row_dots_scratch(ctypes.c_int64(3), ctypes.c_int64(8193)) == 6
    assert kernels.mfac_error_text(0) == b"no error"
    if torch.cuda.is_available():
        pytest.skip("there is a driver here")
    null, one = ctypes.c_void_p(), ctypes.c_int64(1)
    error = kernels.mfac_row_dots(null, 0, one, one, one, null, False, null, null, null)
    assert error != 0
    assert b"driver" in kernels.mfac_error_text(error) or b"device" in kernels.mfac_error_text(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimize", "sanitizer", "which"), [("-O1", "thread", ["few"]), ("-O0", "address,undefined", [])]
)
def test_emulated_kernels_match_float64_without_races_and_stray_accesses(cxx, tmp_path, optimize, sanitizer, which):
    program = tmp_path / "check"
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}\n")
    if subprocess.run(
        [cxx, f"-fsanitize={sanitizer}", str(probe), "-o", str(program)], capture_output=True
    ).returncode:
        pytest.skip(f"{cxx} has no -fsanitize={sanitizer}")
    flags = [*EMULATED, *STRICT, optimize, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    run(cxx, *flags, "-x", "c++", KERNELS, EMULATION / "check_kernels.cu", "-o", program)
    said = run(program, *which, env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"})
    assert re.search(r"^0 failures$", said, re.MULTILINE)
    assert len(re.findall("error / allowed", said)) > 50


# Loads the emulated library, whose kernels are registered for the CPU, and runs the tests of the operators on it.
PROCESS = """
import sys, torch, pytest
from mfac_hf.ops import build, coefficients, window
torch.ops.load_library(sys.argv[1])
build._outcome["cpu"] = None
assert torch._C._dispatch_has_kernel_for_dispatch_key("mfac::lower_product", "CPU")
sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.slow
def test_emulated_operators_pass_the_tests_of_the_operators(cxx, tmp_path):
    if build.missing_tools("cpu"):
        pytest.skip("; ".join(build.missing_tools("cpu")))
    from torch.utils.cpp_extension import include_paths, library_paths

    common = [cxx, *EMULATED, "-O1", "-fPIC", "-DMFAC_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    run(*common, *STRICT, "-x", "c++", "-c", KERNELS, "-o", tmp_path / "kernels.o")
    includes = [part for path in include_paths() for part in ("-isystem", path)]
    run(*common, "-Wall", "-Werror", *includes, "-c", build.CSRC / "mfac_binding.cpp", "-o", tmp_path / "binding.o")
    library = tmp_path / "emulated.so"
    objects = [tmp_path / "kernels.o", tmp_path / "binding.o"]
    run(cxx, "-shared", "-pthread", *objects, *(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-o", library)
    operators = Path(__file__).parents[1] / "ops"
    # Those that need few launches: each starts threads anew.
    chosen = (
        "not pytorch and not 4097 and not 9001 and "
        "(strided or stay_as or float64_vector or refused or soundly or equal_rows or coefficients or scaled or "
        "always_zero)"
    )
    files = [operators / f"test_{name}.py" for name in ("window", "metric", "coefficients")]
    said = run(
        sys.executable, "-c", PROCESS, library, *files, "-k", chosen, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert re.search(r"\d\d passed", said)


@pytest.mark.slow
def test_binding_compiles_for_cuda(cxx, tmp_path):
    """Its headers need no CUDA toolkit; linking needs a torch that is built with CUDA."""
    if build.missing_tools("cpu"):
        pytest.skip("; ".join(build.missing_tools("cpu")))
    from torch.utils.cpp_extension import include_paths

    includes = [part for path in include_paths() for part in ("-isystem", path)]
    flags = [flag for flag in build.FLAGS if flag != "-O3"]
    run(cxx, *flags, *STRICT, "-DUSE_CUDA", *includes, "-fsyntax-only", build.CSRC / "mfac_binding.cpp")
