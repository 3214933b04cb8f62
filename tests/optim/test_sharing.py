"""One window shared by two ranks: the same steps as in one process, on every rank the same bits."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from mfac_hf import MFAC
from mfac_hf.optim import placement
from tests.helpers.ranks import run_on_ranks


class Net(nn.Module):
    """A table whose gradients have few rows, matrices of different sizes, and a layer that gets gradients late."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 4)
        self.hidden = nn.Linear(4, 6)
        self.late = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)
        self.to(dtype)

    def backward(self, step):
        ids = torch.randint(50, (6,), generator=torch.Generator().manual_seed(step))
        hidden = self.hidden(self.words(ids).mean(0)).tanh()
        self.head(self.late(hidden) if step >= 5 else hidden).square().sum().backward()


def train(model, optimizer, steps, spoil=()):
    for step in steps:
        optimizer.zero_grad()
        model.backward(step)
        if step in spoil:
            model.head.bias.grad.fill_(torch.nan)
        optimizer.step()


def mask_of(model):
    return {model.hidden.weight: torch.rand(6, 4, generator=torch.Generator().manual_seed(3)) < 0.5}


def assert_same(model, twin, tolerance):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def assert_ranks_agree(model):
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    assert torch.equal(*both)


def check_shared_window(rank):
    placement.ROW_SPARSE_MIN_NUMEL = 1
    for dtype, options in (
        (torch.float64, {"window_dtype": torch.float64, "momentum": 0.9}),
        (torch.float64, {"window_dtype": torch.float64, "weight_decay": 0.1, "normalize": "count"}),
        (torch.float32, {"momentum": 0.5, "grad_decay": 0.5, "masks": True}),
        (torch.bfloat16, {"window_dtype": torch.bfloat16, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ):
        model, masked = Net(dtype), options.pop("masks", False)
        twin = copy.deepcopy(model)
        common = {"lr": 0.05, "num_grads": 6, "damping": 1e-2, **options}
        shared = MFAC(
            model.parameters(),
            metric="identity",
            process_group=dist.group.WORLD,
            masks=mask_of(model) if masked else None,
            **common,
        )
        alone = MFAC(twin.parameters(), metric="identity", masks=mask_of(twin) if masked else None, **common)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a gradient is not finite")
            train(model, shared, range(15), spoil=(2, 9))
            train(twin, alone, range(15), spoil=(2, 9))
        assert_same(model, twin, {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype])
        assert_ranks_agree(model)
        assert shared.skipped_steps == 2
        # Split, not copied: the two parts make up the whole, and neither is most of it.
        held = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        dist.all_gather(held, torch.tensor([shared._window.nbytes]))
        assert sum(held) == alone._window.nbytes and max(held) <= 0.7 * alone._window.nbytes


def check_checkpoints(rank):
    placement.ROW_SPARSE_MIN_NUMEL = 1
    model = Net(torch.float32)
    optimizer = MFAC(
        model.parameters(), metric="identity", lr=0.05, num_grads=4, momentum=0.9, process_group=dist.group.WORLD
    )
    train(model, optimizer, range(7))
    if rank == 0:  # as Trainer does under DistributedDataParallel: no collective may hide in it
        saved = [optimizer.state_dict()]
        assert all(state.keys() == {"step", "momentum_buffer"} for state in saved[0]["state"].values())
        with pytest.raises(TypeError, match="shared by several ranks"):
            copy.deepcopy(optimizer)
        with pytest.raises(TypeError, match="shared by several ranks"):
            pickle.dumps(optimizer)
    else:
        saved = [None]
    dist.broadcast_object_list(saved, src=0)
    twin = copy.deepcopy(model)
    loaded = MFAC(twin.parameters(), metric="identity", lr=1.0, num_grads=4, process_group=dist.group.WORLD)
    loaded.load_state_dict(saved[0])
    assert loaded.param_groups[0]["lr"] == 0.05 and loaded.window_stats()["window_fill"] == 0.0
    train(twin, loaded, range(7, 12))
    assert_ranks_agree(twin)
    assert loaded._window.gram.process_group is dist.group.WORLD, "loading must not end the sharing"

    # A window saved by one process cannot be shared out; it refills, and says so.
    single_model = Net(torch.float32)
    single = MFAC(single_model.parameters(), metric="identity", num_grads=4)
    train(single_model, single, range(3))
    again = MFAC(twin.parameters(), metric="identity", num_grads=4, process_group=dist.group.WORLD)
    with pytest.warns(UserWarning, match="refills"):
        again.load_state_dict(copy.deepcopy(single.state_dict()))
    assert again.window_stats()["window_fill"] == 0.0
    train(twin, again, range(3))
    assert_ranks_agree(twin)


def check_accelerate(rank):
    """What Trainer does with the optimizer: wrapping it reloads its state, which must not end the sharing."""
    model = Net(torch.float32)
    twin = copy.deepcopy(model)
    accelerator = Accelerator(cpu=True)
    wrapped = accelerator.prepare(
        MFAC(model.parameters(), metric="identity", lr=0.05, num_grads=4, process_group=dist.group.WORLD)
    )
    alone = MFAC(twin.parameters(), metric="identity", lr=0.05, num_grads=4)
    train(model, wrapped, range(8))
    train(twin, alone, range(8))
    assert wrapped.optimizer._window.gram.process_group is dist.group.WORLD
    assert wrapped.optimizer._window.nbytes < alone._window.nbytes
    assert_same(model, twin, 1e-4)
    assert_ranks_agree(model)


def check_all(rank):
    for check in (check_shared_window, check_checkpoints, check_accelerate):
        check(rank)


def test_two_ranks(tmp_path):
    """All in one start of the processes, which takes longer than what they do."""
    run_on_ranks(check_all, tmp_path)
