"""The paper's coefficients against float64, for any number of gradients."""

import pytest
import torch

from mfac_hf.ops import coefficients


@pytest.fixture(params=["dispatched", "pytorch"])
def implementation(request):
    if request.param == "dispatched":
        return coefficients.unit_lower_inverse, torch.ops.mfac.lower_product
    return coefficients._unit_lower_inverse, coefficients._lower_product


def draw(m, dtype):
    """A unit lower triangular matrix with something else above the diagonal, and a vector."""
    generator = torch.Generator().manual_seed(m)
    lower = torch.randn(m, m, generator=generator, dtype=torch.float64) / (2 * m**0.5)
    return lower.fill_diagonal_(1.0).to(dtype), torch.randn(m, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("m", [1, 2, 31, 33, 70])
def test_coefficients_match_float64(implementation, m, dtype, tolerance):
    """Forward substitution of a well-conditioned matrix of this size loses about one digit."""
    unit_lower_inverse, lower_product = implementation
    lower, x = draw(m, dtype)
    exact = torch.linalg.inv(lower.double().tril())
    inverse = unit_lower_inverse(lower)
    assert inverse.dtype == dtype
    torch.testing.assert_close(inverse.double(), exact, rtol=0, atol=tolerance)
    for transposed in (False, True):
        matrix = lower.double().tril().T if transposed else lower.double().tril()
        product = lower_product(lower, x, transposed)
        torch.testing.assert_close(product.double(), matrix @ x.double(), rtol=0, atol=10 * tolerance)


def test_coefficients_are_registered_soundly():
    lower, x = draw(5, torch.float32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.mfac.unit_lower_inverse.default, (lower,), test_utils=tests)
    torch.library.opcheck(torch.ops.mfac.lower_product.default, (lower, x, True), test_utils=tests)
