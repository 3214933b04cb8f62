"""The two passes over the window against float64, in every storage type, shape and layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mfac_hf.ops import window
from mfac_hf.ops.build import load_native
from tests.helpers.device import DEVICE

RUN = min(window.RUN_LENGTH, 1 << 14)  # one run of columns, which some shapes below exceed
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
X_DTYPES = (torch.float32, torch.float64)
# Unit roundoff of the arithmetic, with room for the few additions that follow one another in a blocked sum.
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14}


def draw(m, d, dtype, x_dtype, seed=0):
    """A window, a vector and weights that share no structure."""
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(m, d, generator=generator, dtype=torch.float64).to(dtype)
    x = torch.randn(d, generator=generator, dtype=torch.float64).to(x_dtype)
    return grads, x, torch.randn(m, generator=generator, dtype=torch.float64)


@pytest.fixture(params=["dispatched", "pytorch"])
def implementation(request):
    """(row_dots, combine): what callers get, native where there is a compiler, and the PyTorch fallback underneath."""
    return (window.row_dots, window.combine) if request.param == "dispatched" else (window._row_dots, window._combine)


def arithmetic(dtype, x_dtype):
    return torch.float64 if torch.float64 in (dtype, x_dtype) else torch.float32


def check_row_dots(row_dots, grads, x):
    found, exact = row_dots(grads, x), grads.double() @ x.double()
    assert found.dtype == torch.float64 and found.shape == (len(grads),)
    scale = (grads.double().norm(dim=1) * x.double().norm()).clamp(min=1e-30)
    assert ((found - exact).abs() / scale).max() <= ROUNDING[arithmetic(grads.dtype, x.dtype)]


def check_combine(combine, grads, weights, x, alpha, beta):
    found = combine(grads, weights, x, alpha, beta)
    exact = beta * (grads.double().T @ weights) + (0.0 if x is None else alpha * x.double())
    dtype = arithmetic(grads.dtype, None if x is None else x.dtype)
    assert found.dtype == dtype and found.shape == (grads.shape[1],)
    scale = abs(beta) * (grads.double().abs().T @ weights.abs()) + (
        0.0 if x is None else abs(alpha) * x.double().abs()
    )
    assert ((found - exact).abs() <= ROUNDING[dtype] * scale + 1e-30).all()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    m=st.integers(1, 40),
    d=st.one_of(st.integers(1, 70), st.integers(RUN - 3, RUN + 3)),
    dtype=st.sampled_from(DTYPES),
    x_dtype=st.sampled_from(X_DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shape_matches_float64(m, d, dtype, x_dtype, seed):
    grads, x, weights = draw(m, d, dtype, x_dtype, seed)
    for row_dots, combine in ((window.row_dots, window.combine), (window._row_dots, window._combine)):
        check_row_dots(row_dots, grads, x)
        check_combine(combine, grads, weights, None, 1.0, 1.0)
        check_combine(combine, grads, weights, x, -0.3, 1.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "d"), [(1, 1), (1, 3 * RUN + 1), (7, 2 * RUN), (4099, 259)])
def test_several_runs_match_float64(implementation, dtype, m, d):
    """More columns than one run, also where a tall bfloat16 window makes the runs short."""
    row_dots, combine = implementation
    grads, x, weights = draw(m, d, dtype, torch.float32)
    check_row_dots(row_dots, grads, x)
    check_combine(combine, grads, weights, x, 2.0, -1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(implementation, dtype):
    """Slices of rows and of columns, as a filling window and parameters that share a buffer give them."""
    row_dots, combine = implementation
    d = RUN + 13
    whole, x, weights = draw(12, d + 9, dtype, torch.float32)
    for view in (whole[:5, :d], whole[2:7, 9:], whole[::2, 4 : 4 + d][:5]):
        assert not view.is_contiguous()
        check_row_dots(row_dots, view, x[:d])
        check_combine(combine, view, weights[:5], x[:d], 1.0, 1.0)


@pytest.mark.parametrize("d", [500, 512, 515])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_have_equal_products(dtype, d):
    """To the bit, however many rows stand beside them: else repeated gradients look unlike in a Gram matrix."""
    if not load_native(DEVICE.type):
        pytest.skip("needs the native kernels: a BLAS rounds by the position of a row")
    grads, x, _ = draw(1, d, dtype, torch.float32)
    rows = grads.repeat(20, 1)
    found = torch.cat([window.row_dots(rows[:count], x) for count in (1, 2, 8, 9, 20)])
    assert len(set(found.tolist())) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_stay_as_they_were(implementation, dtype):
    row_dots, combine = implementation
    inputs = draw(3, 50, dtype, torch.float64)
    copies = [part.clone() for part in inputs]
    grads, x, weights = inputs
    row_dots(grads, x)
    combine(grads, weights, x, 0.5, 2.0)
    assert all(torch.equal(part, copy) for part, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-7), (torch.bfloat16, 4e-7)])
def test_long_positive_sums_keep_seven_digits(implementation, dtype, tolerance):
    """The Gram diagonal is a sum of squares; an error of 1e-6 of it hides what a nearly repeated gradient adds.

    Squares of 8-bit numbers end in few low bits (k * k is 0, 1 or 4 modulo 8), so float32 sums of them lose more by
    rounding down than they gain by rounding up: over runs of 8,192 columns 1e-5 of the sum, always in one direction.
    """
    generator = torch.Generator().manual_seed(0)
    grads = (0.5 + torch.rand(5, 1_000_003, generator=generator)).to(dtype)
    found = implementation[0](grads, grads[0].float())
    exact = grads.double() @ grads[0].double()
    assert ((found - exact).abs() / exact).max() <= tolerance


def test_float64_vector_asks_for_float64_arithmetic(implementation):
    row_dots, combine = implementation
    grads, x, weights = draw(6, 1000, torch.float32, torch.float64)
    exact = grads.double() @ x
    assert (row_dots(grads, x) - exact).abs().max() <= 1e-12
    assert (row_dots(grads, x.float()) - exact).abs().max() > 1e-9
    assert (combine(grads, weights, x) - (x + grads.double().T @ weights)).abs().max() <= 1e-12


def test_wrong_shapes_are_refused(implementation):
    """Above all those that arithmetic would accept: one number for all columns, a rest behind whole runs."""
    row_dots, combine = implementation
    grads, x, weights = draw(3, 5, torch.float32, torch.float32)
    long = torch.ones(2, RUN)
    for call in (
        lambda: row_dots(grads, x[:4]),
        lambda: row_dots(grads, x[:, None]),
        lambda: row_dots(long, torch.ones(RUN + 1)),
        lambda: row_dots(long.double(), torch.ones(RUN + 1)),
        lambda: combine(grads, weights[:2]),
        lambda: combine(grads, weights, x[:1]),
        lambda: combine(grads, weights, x.expand(5, 5)),
    ):
        with pytest.raises((ValueError, RuntimeError), match="(x|weights) has .*(the window has|expected a vector)"):
            call()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", X_DTYPES)
def test_operators_are_registered_soundly(dtype, x_dtype):
    """Schema, fake implementation and autograd registration agree with what the operators do."""
    grads, x, weights = draw(4, 33, dtype, x_dtype)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.mfac.row_dots.default, (grads, x), test_utils=tests)
    torch.library.opcheck(torch.ops.mfac.combine.default, (grads, weights), test_utils=tests)
    torch.library.opcheck(torch.ops.mfac.combine.default, (grads, weights, x, 0.5, 2.0), test_utils=tests)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_gives_the_same(dtype):
    def both(grads, x, weights):
        dots = window.row_dots(grads, x)
        return dots, window.combine(grads, dots + weights, x, 0.5, 2.0)

    inputs = draw(5, 77, dtype, torch.float32)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(*inputs), both(*inputs), strict=True):
        assert torch.equal(found, expected)


class LargestResult(TorchDispatchMode):
    """Notes the most elements that any operation returned in new memory."""

    def __init__(self, inputs):
        super().__init__()
        self.known = {part.untyped_storage().data_ptr() for part in inputs}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.known:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "d"), [(300, 40_000), (5000, 2000)])
def test_the_whole_window_is_never_widened_or_copied(dtype, m, d):
    """Seen from below the dispatcher: what the PyTorch implementations allocate on their way."""
    grads, x, weights = draw(m, d, torch.float32, torch.float32)
    grads = grads.to(dtype)
    limit = max(2 * window.WIDEN_ELEMENTS, d)
    assert grads.numel() > 4 * limit
    for call in (lambda: window._row_dots(grads, x), lambda: window._combine(grads, weights, x)):
        with LargestResult([grads]) as largest:
            call()
        assert 0 < largest.elements <= limit
