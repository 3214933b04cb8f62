"""One window shared by one to four ranks: the same steps as in one process, on every rank the same bits."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from mfac_hf import MFAC
from mfac_hf.optim import placement, ranked
from tests.helpers.ranks import counted_bytes, run_on_ranks
from tests.helpers.shared_net import ADAM, DOUBLE, IDENTITY, Net, assert_same, mask_of, train

RANKS = 4


def assert_ranks_agree(model, group=None):
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    every = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, flat, group=group)
    assert all(torch.equal(every[0], other) for other in every)


def held_by(optimizer, group=None):
    """Bytes of the stored gradients on each rank."""
    held = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(held, torch.tensor([optimizer._window.nbytes]), group=group)
    return [int(each) for each in held]


def check_shared_window(group):
    """Whatever the number of ranks, the weights of one process: to rounding, and on all ranks to the bit."""
    for dtype, options in (
        (torch.float64, ADAM | DOUBLE),
        (torch.float64, IDENTITY | DOUBLE | {"momentum": 0.9}),
        (torch.float64, IDENTITY | DOUBLE | {"weight_decay": 0.1, "normalize": "count"}),
        (torch.float32, ADAM | {"masks": True}),
        (torch.float32, IDENTITY | {"momentum": 0.5, "grad_decay": 0.5, "masks": True}),
        (torch.bfloat16, IDENTITY | {"window_dtype": torch.bfloat16, "weight_decay": 0.1}),
    ):
        model, masked = Net(dtype), options.get("masks", False)
        twin = copy.deepcopy(model)
        shared, alone = (
            MFAC(net.parameters(), **{**options, "masks": mask_of(net) if masked else None, "process_group": ranks})
            for net, ranks in ((model, group), (twin, None))
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a gradient is not finite")
            train(model, shared, range(15), spoil=(2, 9))
            train(twin, alone, range(15), spoil=(2, 9))
        # Sums over ranks are in another order; in float32 the Cholesky factor magnifies what that makes of the dots.
        assert_same(model, twin, {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype])
        assert_ranks_agree(model, group)
        assert shared.skipped_steps == 2
        # Split, not copied; a part of so small a table may be dense where the whole is not.
        ranks = dist.get_world_size(group)
        assert max(held_by(shared, group)) <= (1.0 if ranks == 1 else 1.6 / ranks) * alone._window.nbytes


def check_parts_are_even(group, ranks):
    """Parameters of BERT-tiny's encoder: a rank keeps its share of the window, and sends what it should."""
    width = 32
    shapes = [(width, width)] * 8 + [(4 * width, width)] * 4 + [(width,)] * 18 + [(4 * width,)] * 2
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = MFAC(params, num_grads=4, process_group=group)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        with counted_bytes() as sent:
            optimizer.step()
    whole = 4 * 2 * sum(p.numel() for p in params)
    held = held_by(optimizer, group)
    assert sum(held) == whole and max(held) <= 1.05 * whole / ranks
    # Every direction once in float32; two dot products so far, and three norms with four numbers that ranks compare.
    assert sent == {"broadcast": 4 * sum(p.numel() for p in params), "all_reduce": 8 * (2 + 7)}


def check_tables_are_divided(group):
    """A table as large as those of small BERTs: its rows are divided, and with them its second moment."""
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((4000, 8), *[(32, 32)] * 12)]
    optimizer = MFAC(params, num_grads=4, process_group=group)
    for p in params:
        p.grad = torch.ones(p.shape)
    params[0].grad[8:] = 0.0
    optimizer.step()
    moments = sum(s["second_moment"].nbytes for s in optimizer.state.values() if "second_moment" in s)
    held = [torch.zeros(1, dtype=torch.int64) for _ in range(RANKS)]
    dist.all_gather(held, torch.tensor([moments + optimizer._window.nbytes]), group=group)
    rows = {state["second_moment"].shape for state in optimizer.state.values() if "window_rows" in state}
    assert rows == {(1000, 8)} and max(held) <= 1.1 * sum(held) / RANKS
    assert params[0].detach()[:8].all() and not params[0].detach()[8:].any()
    with pytest.raises(ValueError, match="another rank keeps its columns"):
        optimizer.stored_gradients(params[0])


def check_that_trainer_shares(group):
    """Batches that Trainer announces make the ranks share what is large, and nothing else does."""
    ranked.SHARE_MIN_BYTES = 1
    for announced, options, shares in (
        (True, {}, True),
        (True, {"process_group": None}, False),
        (True, {"process_group": group}, True),
        (False, {}, False),
    ):
        model = Net(torch.float64)
        twin = copy.deepcopy(model)
        optimizer = MFAC(model.parameters(), **ADAM, **DOUBLE, **options)
        alone = MFAC(twin.parameters(), **ADAM, **DOUBLE, process_group=None)
        for step in range(8):
            if announced:
                optimizer.train()
            train(model, optimizer, [step])
            train(twin, alone, [step])
        assert optimizer.shares_window == shares
        assert_same(model, twin, 1e-10)
        assert_ranks_agree(model)
    # A window that every rank has loaded whole is shared out, and goes on as if it had been shared before; it is as
    # large as one that begins.
    moments = sum(state["second_moment"].nbytes for state in alone.state.values())
    ranked.SHARE_MIN_BYTES = alone._window.nbytes + moments
    for options in ({}, {"process_group": group}):
        again = copy.deepcopy(twin)
        loaded = MFAC(again.parameters(), **ADAM, **DOUBLE, **options)
        loaded.load_state_dict(copy.deepcopy(alone.state_dict()))
        loaded.train()
        other = copy.deepcopy(twin)
        expected = MFAC(other.parameters(), **ADAM, **DOUBLE, process_group=None)
        expected.load_state_dict(copy.deepcopy(alone.state_dict()))
        train(again, loaded, range(8, 12))
        train(other, expected, range(8, 12))
        assert_same(again, other, 1e-10)
        assert max(held_by(loaded)) <= 1.6 / RANKS * expected._window.nbytes
        places = {p for p, state in loaded.state.items() if "window" in state or "window_rows" in state}
        assert places == {p for p in loaded.state if "second_moment" in loaded.state[p]} != set(loaded.state)
    ranked.SHARE_MIN_BYTES = 16 << 20
    small = Net(torch.float64)
    kept = MFAC(small.parameters(), **ADAM)
    kept.train()
    train(small, kept, [0])
    assert not kept.shares_window, "a small window does not pay"
    with pytest.raises(ValueError, match="process_group=None"):
        loaded.keep_window_whole()


def check_checkpoints(rank):
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
    placement.ROW_SPARSE_MIN_NUMEL = 1
    for ranks in range(1, RANKS + 1):
        group = dist.new_group(range(ranks))
        if rank < ranks:
            check_shared_window(group)
            check_parts_are_even(group, ranks)
    check_tables_are_divided(dist.group.WORLD)
    check_that_trainer_shares(dist.group.WORLD)
    check_checkpoints(rank)
    check_accelerate(rank)


@pytest.mark.slow
def test_one_to_four_ranks(tmp_path):
    """All in one start of the processes, which takes longer than what they do."""
    run_on_ranks(check_all, tmp_path, ranks=RANKS)
