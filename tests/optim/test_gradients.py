"""Gradients that must leave window and parameters alone."""

import warnings

import pytest
import torch
from torch import nn

from mfac_hf import MFAC
from tests.helpers.parameters import all_equal, feed, make_grads, make_params, values


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_spoiled_gradient_is_skipped_counted_and_warned_of_once(spoiled, dtype):
    params, twins = make_params(dtype=dtype), make_params(dtype=dtype)
    options = {"lr": 0.01, "num_grads": 4, "damping": 1e-2, "momentum": 0.9, "weight_decay": 0.1}
    optimizer, undisturbed = MFAC(params, **options), MFAC(twins, **options)
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
    optimizer = MFAC(table.parameters(), num_grads=3)
    before = values(table.parameters())
    table(torch.tensor([1, 1])).mul(torch.tensor([[1.0], [float("nan")]])).sum().backward()
    assert table.weight.grad.is_sparse
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    assert all_equal(before, table.parameters()) and optimizer.skipped_steps == 1


def test_sparse_gradient_of_another_kind_is_refused():
    p = nn.Parameter(torch.zeros(4, 3))
    p.grad = torch.eye(4, 3).to_sparse()
    optimizer = MFAC([p], num_grads=3)
    with pytest.raises(ValueError, match="2 sparse dimensions"):
        optimizer.step()
    assert not p.any() and not optimizer.state
