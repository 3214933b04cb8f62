"""Importing mfac_hf is cheap and leaves the process as it was."""

import json
import subprocess
import sys

import pytest

# Runs in a fresh process: a picture of everything global that an import could change, before and after the statement.
PROBE = """
import json, os, random, sys, warnings
import numpy, torch

def picture():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "matmul precision": [torch.get_float32_matmul_precision(), matmul.allow_tf32],
        "cuDNN": [cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, cudnn.enabled],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "CUDA initialized": torch.cuda.is_initialized(),
        "torch RNG": torch.get_rng_state().tolist(),
        "numpy RNG": [part.tolist() if hasattr(part, "tolist") else part for part in numpy.random.get_state()],
        "random RNG": random.getstate(),
        "environment": dict(os.environ),
        "warning filters": list(warnings.filters),
    }

outside = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
events = []
sys.addaudithook(lambda event, arguments: events.append(event) if event in outside else None)

before, loaded = picture(), set(sys.modules)
STATEMENT
after, new = picture(), set(sys.modules) - loaded
roots = {name.partition(".")[0] for name in new}
print(json.dumps({
    "changed": [key for key in before if before[key] != after[key]],
    "events": events,
    "loaded": sorted(roots - set(sys.stdlib_module_names) - {"mfac_hf"}),
}))
"""


def probe(statement: str) -> dict[str, list[str]]:
    """Run a statement after `import torch` in a fresh process; list what it changed, called and loaded."""
    code = PROBE.replace("STATEMENT", statement)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("statement", ["import mfac_hf", "from mfac_hf import MFAC, memory_estimate"])
def test_import_changes_nothing_and_loads_little(statement):
    seen = probe(statement)
    assert seen["changed"] == []
    assert seen["events"] == [], "an import uses no network and starts no program"
    # Above all neither transformers nor datasets: each takes seconds to import.
    assert set(seen["loaded"]) <= {"psutil"}


@pytest.mark.slow
def test_probe_sees_side_effects():
    """Guards the test above: a probe that is blind would let everything pass."""
    effects = {
        "threads": "torch.set_num_threads(torch.get_num_threads() + 1)",
        "matmul precision": "torch.set_float32_matmul_precision('high')",
        "cuDNN": "torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark",
        "deterministic": "torch.use_deterministic_algorithms(True)",
        "default dtype": "torch.set_default_dtype(torch.float64)",
        "default device": "torch.set_default_device('meta')",
        "gradients": "torch.set_grad_enabled(False)",
        "torch RNG": "torch.manual_seed(0)",
        "numpy RNG": "numpy.random.rand()",
        "random RNG": "random.random()",
        "environment": "os.environ['MFAC_PROBE'] = '1'",
        "warning filters": "warnings.simplefilter('ignore')",
    }
    others = ["import subprocess", "subprocess.run(['true'])", "import rich"]
    seen = probe("; ".join([*effects.values(), *others]))
    assert set(seen["changed"]) == set(effects)
    assert "subprocess.Popen" in seen["events"]
    assert "rich" in seen["loaded"]


STEP = """
import sys
import torch
from mfac_hf import MFAC

parameter = torch.nn.Parameter(torch.ones(3))
optimizer = MFAC([parameter], num_grads=2)
parameter.square().sum().backward()
optimizer.step()
print(sorted({name.partition(".")[0] for name in sys.modules} & {"transformers", "huggingface_hub", "accelerate"}))
print([name for name in sys.modules if name.startswith(("mfac_hf.hub", "mfac_hf.callbacks"))])
"""


@pytest.mark.slow
def test_an_optimizer_step_knows_no_hugging_face():
    result = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[]", "[]"]
