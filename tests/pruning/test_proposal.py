"""Weights of a proposal go into the model, all or none."""

import pytest
import torch
from torch import nn

from mfac_hf.pruning.proposal import write_weights


def test_flat_weights_take_their_shape_and_dtype():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    values = torch.arange(6.0)
    with torch.no_grad():
        write_weights(dict(model.named_parameters()), {"weight": values})
    assert torch.equal(model.weight.detach(), values.view(2, 3).bfloat16())


def test_nothing_is_written_where_one_is_not_finite():
    model = nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    new = {"weight": torch.zeros(6), "bias": torch.tensor([0.0, torch.nan])}
    with torch.no_grad(), pytest.raises(FloatingPointError, match="new weights of bias are not finite"):
        write_weights(dict(model.named_parameters()), new)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
