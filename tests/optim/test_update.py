"""How parameters move along their directions."""

import pytest
import torch
from torch import nn

from mfac_hf import MFAC
from mfac_hf.fisher.columns import SparseRows
from mfac_hf.optim.update import apply_directions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by_rows", [False, True])
def test_16_bits_round_the_result_alone(dtype, by_rows):
    """A direction of 1e7 is infinite in float16; the step of 3e-8 times as much is not."""
    p = nn.Parameter(torch.linspace(-1, 1, 12, dtype=dtype).view(4, 3))
    u = torch.linspace(-1e7, 1e7, 12).view(4, 3)
    rows = torch.tensor([0, 2, 3])
    if by_rows:
        u[1] = 0
    expected = (p.detach().double() - 3e-8 * u.double()).to(dtype)
    group = {"params": [p], "lr": 3e-8, "momentum": 0.0, "weight_decay": 0.0, "decoupled_weight_decay": False}
    direction = SparseRows(rows, u[rows]) if by_rows else u
    with torch.no_grad():
        apply_directions([group], {p: {}}, {p: direction})
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=0)


def test_float16_parameters_do_not_overflow():
    p = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = MFAC([p], metric="identity", lr=1e-6, num_grads=4, damping=1e-12)
    for _ in range(3):
        p.grad = torch.full((3,), 1e-5, dtype=torch.float16)
        optimizer.step()
    assert bool(p.isfinite().all()) and bool((p < 1).all())
