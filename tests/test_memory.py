"""What the window costs is said right, before it is allocated, and refused where it does not fit."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mfac_hf import MFAC, memory, memory_estimate
from mfac_hf.fisher.columns import DenseColumns
from mfac_hf.memory import GRAM_MATRICES, adamw_bytes, require_memory

GIB = 1 << 30
MOMENTS = ("second_moment", "moment_steps")  # names in the state


class Tiny(nn.Module):
    """An embedding large enough for row-sparse storage, a small one, and a frozen layer."""

    def __init__(self, tied=False):
        super().__init__()
        self.words = nn.Embedding(4096, 16)
        self.types = nn.Embedding(2, 16)
        self.hidden = nn.Linear(16, 8)
        self.frozen = nn.Linear(100, 100).requires_grad_(False)
        if tied:
            self.head = nn.Linear(16, 4096)
            self.head.weight = self.words.weight


def test_a_number_of_parameters():
    """By default 8 gradients in bfloat16 and a second moment, beside AdamW's two."""
    estimate = memory_estimate(4_400_000)
    assert estimate.bytes == 4_400_000 * (8 * 2 + 4) + matrices(8)
    assert "8 x 4,400,000 x 2 bytes" in estimate.breakdown and "second moment: 4,400,000 x 4" in estimate.breakdown
    last = "total: 0.08 GiB, 20.0 bytes a parameter (AdamW: 0.03 GiB, 8 bytes)"
    assert estimate.breakdown.splitlines()[-1] == last
    assert adamw_bytes(4_400_000) == 8 * 4_400_000
    assert memory_estimate(4_400_000, 4, torch.bfloat16).bytes == 4_400_000 * (4 * 2 + 4) + matrices(4)
    assert memory_estimate(10, 1, torch.float64).bytes == 160 + matrices(1)


def test_a_number_of_parameters_in_the_identity_metric():
    estimate = memory_estimate(4_400_000, metric="identity")
    assert estimate.bytes == 1024 * 4_400_000 * 4 + matrices(1024)
    assert "1024 x 4,400,000 x 4 bytes" in estimate.breakdown and "total: 16.82 GiB" in estimate.breakdown
    assert "4 x 1024 x 1024 x 8 bytes = 0.03 GiB" in estimate.breakdown
    half = memory_estimate(4_400_000, 1024, torch.bfloat16, metric="identity")
    assert half.bytes == 1024 * 4_400_000 * 2 + matrices(1024)
    assert memory_estimate(10, 1, torch.float64, metric="identity").bytes == 80 + matrices(1)


def matrices(m):
    """Gram matrix, factor, the next factor and what it is made of."""
    return 4 * m * m * 8


@pytest.mark.slow
def test_the_matrices_of_a_step_are_what_it_holds_at_once():
    """A long window of few numbers: what a step takes beyond it are the m x m matrices."""
    code = """if True:
        import torch
        from pathlib import Path
        from mfac_hf.fisher.gram import GramMatrix
        from mfac_hf.fisher.options import WindowOptions
        from mfac_hf.machine import peak_memory

        m = 2048
        torch.linalg.cholesky_ex(torch.eye(64, dtype=torch.float64))  # its library takes memory of its own
        before = peak_memory()
        gram = GramMatrix(WindowOptions(num_grads=m, damping=1.0))
        gram.gram_MM.fill_diagonal_(1.0)
        for pushed in (m, m + 16):  # factored anew in each run of pushes
            gram.pushed = pushed
            gram.direction_weights()
        gram.gram_MM.add_(0.0)  # every page of it was touched
        print((peak_memory() - before) / (8 * m * m))
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 3.5 < float(result.stdout) < GRAM_MATRICES + 0.5


@pytest.mark.parametrize("metric", ["adam", "identity"])
def test_a_model_is_what_the_optimizer_allocates(metric):
    """Frozen parameters cost nothing, the large table its rows, the rest is dense; a second moment of everything."""
    model = Tiny()
    dense = 2 * 16 + 16 * 8 + 8
    table = 64 * 512 * (16 * 4 + 8)
    moment = (dense + 4096 * 16) * 4 if metric == "adam" else 0
    steps = 4096 * 8 if metric == "adam" else 0
    estimate = memory_estimate(model, 64, torch.float32, metric=metric)
    assert estimate.bytes == 64 * dense * 4 + table + moment + steps + matrices(64)
    assert "words: 64 x 512 of 4,096 rows x 16" in estimate.breakdown
    in_full = memory_estimate(model, 64, torch.float32, metric=metric, embedding_rows=None).bytes
    assert in_full == 64 * (dense + 4096 * 16) * 4 + moment + matrices(64)
    whole = memory_estimate(model, 64, torch.float32, metric=metric, embedding_rows=10**9).bytes
    assert whole == 64 * dense * 4 + 64 * 4096 * (16 * 4 + 8) + moment + steps + matrices(64)
    assert adamw_bytes(model) == 8 * (dense + 4096 * 16)

    optimizer = MFAC(model.parameters(), metric=metric, num_grads=64, window_dtype=torch.float32)
    model.hidden(model.words(torch.arange(512)) + model.types(torch.zeros(512, dtype=torch.int64))).sum().backward()
    optimizer.step()
    held = optimizer._window.nbytes
    # Room for a quarter more rows than the first batch has.
    assert estimate.bytes - matrices(64) - moment - steps <= held <= 64 * dense * 4 + table * 5 // 4
    assert optimizer.window_stats()["window_gib"] == held / GIB
    tensors = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith(MOMENTS)]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
    assert sum(t.nbytes for t in tensors) == moment + steps


def test_a_table_that_two_modules_share_counts_once():
    model = Tiny()
    once = memory_estimate(model, 8).bytes
    model.again = nn.Embedding(4096, 16)
    model.again.weight = model.words.weight
    assert memory_estimate(model, 8).bytes == once


def test_a_table_shared_with_an_output_layer_is_dense():
    model = Tiny(tied=True)
    numel = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory_estimate(model, 8).bytes == 8 * numel * 2 + 4 * numel + matrices(8)
    assert "of 4,096 rows" not in memory_estimate(model, 8).breakdown


def test_an_unknown_metric():
    with pytest.raises(ValueError, match="metric is 'adamw'; expected one of 'adam', 'identity'"):
        memory_estimate(10, 4, metric="adamw")


@pytest.mark.parametrize("call", [lambda: memory_estimate(10, 0), lambda: memory_estimate(0, 10)])
def test_bad_sizes(call):
    with pytest.raises(ValueError, match="expected at least 1"):
        call()


def test_nothing_to_optimize():
    with pytest.raises(ValueError, match="0 parameters"):
        memory_estimate(nn.Linear(2, 2).requires_grad_(False), 4)


def test_refusal_names_the_numbers_and_the_ways_out(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 3 * GIB)
    require_memory(3 * GIB, torch.device("cpu"), "just fits")
    with pytest.raises(MemoryError) as refusal:
        require_memory(3 * GIB + (GIB >> 1), torch.device("cpu"), "1024 gradients")
    for part in (
        "3.50 GiB on cpu (1024 gradients)",
        "3.00 GiB are free",
        "num_grads",
        "bfloat16",
        "freezing",
        "process_group",
    ):
        assert part in str(refusal.value)
    require_memory(1 << 60, torch.device("meta"), "a device that cannot be asked")


@pytest.mark.parametrize("sparse", [False, True])
def test_a_step_that_does_not_fit_changes_nothing_and_a_later_one_works(monkeypatch, sparse):
    table = nn.Embedding(100, 8, sparse=sparse)
    model = nn.Sequential(table, nn.Linear(8, 3))
    optimizer = MFAC(model.parameters(), metric="identity", lr=0.1, num_grads=5, momentum=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.tensor([1, 2])).sum().backward()
    monkeypatch.setattr(memory, "available_bytes", lambda device: 100)
    for _ in range(2):
        with pytest.raises(MemoryError, match="5 gradients x"):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert not optimizer.state and optimizer._window is None
    monkeypatch.undo()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer._window.count == 1


@pytest.mark.parametrize("metric", ["adam", "identity"])
def test_the_first_step_needs_room_for_all_of_it(monkeypatch, metric):
    """The Gram matrix and, in Adam's metric, the second moment too."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = MFAC([parameter], metric=metric, lr=1e-3, num_grads=1000, window_dtype=torch.float32)
    parameter.grad = torch.ones(3)
    needed = memory_estimate(3, 1000, torch.float32, metric=metric).bytes
    assert needed == 3 * 1000 * 4 + matrices(1000) + (12 if metric == "adam" else 0)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed - 1)
    words = "30 MiB for the Gram matrix" + (".* and their second moment" if metric == "adam" else "")
    with pytest.raises(MemoryError, match=f"1000 gradients x 3 parameters .*and {words}"):
        optimizer.step()
    assert not parameter.any() and not optimizer.state
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed)
    optimizer.step()
    assert parameter.all()


def test_the_first_step_needs_room_for_the_second_moment_of_a_table(monkeypatch):
    """Of all its rows, however few a batch touches."""
    table = nn.Embedding(4096, 16)
    optimizer = MFAC(table.parameters(), lr=1e-3, num_grads=4)
    table(torch.arange(8)).sum().backward()
    needed = 4 * 10 * (16 * 4 + 8) + 4096 * (16 * 4 + 8) + matrices(4)  # room for a quarter more rows
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed - 1)
    with pytest.raises(MemoryError, match="embedding rows"):
        optimizer.step()
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed)
    optimizer.step()


@pytest.mark.parametrize("metric", ["adam", "identity"])
def test_a_late_parameter_that_does_not_fit_changes_nothing(monkeypatch, metric):
    first, late = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(6))
    optimizer = MFAC([first, late], metric=metric, lr=1e-3, num_grads=5, window_dtype=torch.float32)
    first.grad = torch.ones(4)
    optimizer.step()
    late.grad = torch.ones(6)
    before, needed = first.detach().clone(), 6 * 4 * (6 if metric == "adam" else 5)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed - 1)
    with pytest.raises(MemoryError, match="5 gradients x 6 parameters"):
        optimizer.step()
    assert torch.equal(before, first) and not late.any() and optimizer._window.gram.pushed == 1
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed)
    optimizer.step()
    assert late.any() and optimizer._window.gram.pushed == 2


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or not Path("/proc/self/smaps").exists(),
    reason="this system has no transparent huge pages, or does not say which mappings want them",
)
@pytest.mark.parametrize(("rows", "wanted"), [(2, False), (32, True)])
def test_a_large_window_asks_for_huge_pages(rows, wanted):
    buffer = DenseColumns(rows, 1 << 18).buffer_MD
    assert ("hg" in mapping_flags(buffer.data_ptr() + buffer.nbytes // 2)) == wanted
    buffer.fill_(1.0)
    assert buffer.sum() == buffer.numel()


def mapping_flags(address):
    """What the system was told about the mapping of an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if bounds := re.fullmatch(r"([0-9a-f]+)-([0-9a-f]+)", words[0]):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and words[0] == "VmFlags:":
            return words[1:]
    raise AssertionError(f"no mapping holds {address:#x}")
