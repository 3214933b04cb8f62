"""Trainer announces its batches by optimizer.train(): several for one step are warned of, once."""

import copy
import warnings

import pytest
import torch

from mfac_hf import MFAC
from tests.helpers.parameters import feed, make_grads, make_params


def make():
    params = make_params(dtype=torch.float32)
    return params, MFAC(params, metric="identity", lr=0.01, num_grads=3, damping=1e-2)


def warned(params, optimizer, batches, steps=3):
    """Words of the warnings of some steps, each of so many batches."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for grads in make_grads(params, steps):
            for _ in range(batches):
                optimizer.train()
            feed(optimizer, params, grads)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("batches", [0, 1])
def test_nothing_to_say(batches):
    """No batch is announced outside Trainer, and one for each step is no accumulation."""
    assert warned(*make(), batches) == []


def test_said_once():
    params, optimizer = make()
    said = warned(params, optimizer, 4)
    assert len(said) == 1 and "accumulates the gradients of 4 batches" in said[0]
    assert "model_accepts_loss_kwargs = False" in said[0] and "attach_card" in said[0]
    assert warned(params, optimizer, 4) == []
    copied_params, copied = copy.deepcopy((params, optimizer))
    assert len(warned(copied_params, copied, 4)) == 1


def test_trust_outlives_a_loaded_state():
    """As when accelerate wraps the optimizer, after somebody has looked at the loss."""
    params, optimizer = make()
    optimizer.trust_loss_scale()
    optimizer.load_state_dict(optimizer.state_dict())
    assert warned(params, optimizer, 2) == []


def test_ranks_count_too(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 2)
    assert "1 batches on 2 ranks" in warned(*make(), 1)[0]
    assert warned(*make(), 0) == []
