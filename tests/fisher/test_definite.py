"""Factors, inverses and solutions of definite matrices against torch.linalg; indefinite ones are named."""

import pytest
import torch

from mfac_hf.fisher.definite import check_damping, factor_blocks, inverse_blocks, solve_blocks
from tests.helpers.tensors import draw


def matrices(count=4, size=7):
    rows = draw(count * size, size).view(count, size, size)
    return rows @ rows.mT + 0.1 * torch.eye(size, dtype=torch.float64)


def test_against_torch():
    given, x = matrices(), draw(4, 7, seed=1)
    factor = factor_blocks(given)
    torch.testing.assert_close(factor @ factor.mT, given)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(inverse_blocks(given), torch.linalg.inv(given))
    torch.testing.assert_close(solve_blocks(given, x), torch.linalg.solve(given, x))


def test_an_indefinite_matrix_is_named():
    given, x = matrices(), draw(4, 7)
    given[2, 0, 0] = -1000.0
    message = f"trace {float(given[2].trace()):g} is not positive definite in float64: raise the damping"
    for call in (factor_blocks, inverse_blocks, lambda given: solve_blocks(given, x)):
        with pytest.raises(FloatingPointError, match=message):
            call(given.clone())


@pytest.mark.parametrize("value", [0.0, -1e-6, float("nan"), float("inf")])
def test_bad_damping(value):
    assert check_damping(1) == 1.0 and type(check_damping(1)) is float
    with pytest.raises(ValueError, match=f"damping is {value!r}; expected a finite number above 0"):
        check_damping(value)
