"""Gradients that must leave window and parameters alone."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mfac_hf import MFAC
from tests.helpers.parameters import all_equal, feed, make_grads, make_params, values
from tests.helpers.ranks import run_on_ranks


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_spoiled_gradient_is_skipped_counted_and_warned_of_once(spoiled, dtype):
    params, twins = make_params(dtype=dtype), make_params(dtype=dtype)
    options = {"lr": 0.01, "num_grads": 4, "damping": 1e-2, "momentum": 0.9, "weight_decay": 0.1}
    optimizer, undisturbed = MFAC(params, metric="identity", **options), MFAC(twins, metric="identity", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, grads in enumerate(make_grads(params, 10)):
            if step in (0, 4, 5):
                bad = [grad.clone() for grad in grads]
                bad[step % 4].view(-1)[-1] = spoiled
                before = values(params)
                feed(optimizer, params, bad)
                assert all_equal(before, values(params))
            feed(optimizer, params, grads)
            feed(undisturbed, twins, grads)
    assert all_equal(params, twins)  # window, momentum and counters of steps too, or later steps would differ
    messages = [str(warning.message) for warning in caught if "skipped" in str(warning.message)]
    assert len(messages) == 1 and "MFAC.skipped_steps" in messages[0]
    assert optimizer.skipped_steps == 3 and optimizer.window_stats()["skipped_steps"] == 3.0
    assert undisturbed.skipped_steps == 0


def test_spoiled_sparse_gradient_is_skipped():
    table = nn.Embedding(10, 3, sparse=True)
    optimizer = MFAC(table.parameters(), metric="identity", num_grads=3)
    before = values(table.parameters())
    table(torch.tensor([1, 1])).mul(torch.tensor([[1.0], [float("nan")]])).sum().backward()
    assert table.weight.grad.is_sparse
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    assert all_equal(before, table.parameters()) and optimizer.skipped_steps == 1


def test_sparse_gradient_of_another_kind_is_refused():
    p = nn.Parameter(torch.zeros(4, 3))
    p.grad = torch.eye(4, 3).to_sparse()
    optimizer = MFAC([p], metric="identity", num_grads=3)
    with pytest.raises(ValueError, match="2 sparse dimensions"):
        optimizer.step()
    assert not p.any() and not optimizer.state


def step_with_other_gradients(rank, case):
    params = make_params(dtype=torch.float32)
    named = [(f"layer{i}", p) for i, p in enumerate(params)]
    optimizer = MFAC(named, metric="identity", lr=0.01, num_grads=3, damping=1e-2, process_group=dist.group.WORLD)
    grads = make_grads(params, 4)
    feed(optimizer, params, grads[0])
    before, other = values(params), list(grads[1])
    messages = {
        "one less": (1, r"parameter layer2 of shape \(\) has a gradient on ranks \[0\] alone"),
        "none": (1, r"parameter layer0 of shape \(4, 3\) has a gradient on ranks \[0\] alone"),
        "other ones": (0, r"parameter layer0 of shape \(4, 3\) has a gradient on ranks \[1\] alone"),
        "other values": (1, "other norms: that of parameter layer0 .*DistributedDataParallel"),
    }
    spoiled, message = messages[case]
    if rank == spoiled:
        if case == "one less":
            other[2] = None
        elif case == "none":
            other = [None] * 4
        elif case == "other ones":
            other[0] = None
        else:
            other = [1.1 * grad for grad in other]
    elif case == "other ones":
        other[3] = None
    with pytest.raises(ValueError, match=message):
        feed(optimizer, params, other)
    assert all_equal(before, params) and optimizer._window.count == 1
    feed(optimizer, params, [None] * 4)  # on both: nothing to do
    feed(optimizer, params, grads[2])
    assert optimizer._window.count == 2
    both = [torch.empty(4, 3) for _ in range(2)]
    dist.all_gather(both, params[0].detach())
    assert torch.equal(*both)


def step_with_each(rank):
    for case in ("one less", "none", "other ones", "other values"):
        step_with_other_gradients(rank, case)


@pytest.mark.slow
def test_ranks_with_other_gradients_stop_together(tmp_path):
    run_on_ranks(step_with_each, tmp_path)


def test_gradients_on_several_devices():
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, device="meta"), requires_grad=False)]
    optimizer = MFAC(params, metric="identity", num_grads=2)
    params[1].requires_grad_(True)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="gradients on several devices .(cpu|cuda:0), meta."):
        optimizer.step()
    assert not params[0].any()
