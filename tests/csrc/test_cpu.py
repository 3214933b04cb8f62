"""The native CPU kernels against float64: shapes around every block length, layouts, special numbers, threads."""

import importlib

import pytest
import torch

from mfac_hf.ops import build

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
X_DTYPES = (torch.float32, torch.float64)
# Unit roundoff of the arithmetic, with room for the few dozen additions that follow one another in a lane.
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14}
# One below, at and one above what the kernels take at once: registers of 4 or 8 numbers and pairs of them, runs of
# 2,048 columns, tiles of 4,096 (combine) and of 16,384 columns (row_dots); rows two or four at a time.
COLUMNS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 2047, 2048, 2049, 4095, 4096, 4097, 16383, 16384, 16385)
ROWS = (1, 2, 3, 4, 5, 9)

importlib.import_module("mfac_hf.ops.window")  # defines the operators
row_dots, combine = torch.ops.mfac.row_dots, torch.ops.mfac.combine


@pytest.fixture(autouse=True)
def native():
    """Every test here is about the library; without it PyTorch's implementation would be tested twice."""
    if not build.load_native("cpu"):
        pytest.skip(f"no native kernels: {build.native_status('cpu')}")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("mfac::row_dots", "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("mfac::combine", "CPU")


def draw(m, d, dtype, x_dtype, seed=0):
    """A window, a vector and weights that share no structure."""
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(m, d, generator=generator, dtype=torch.float64).to(dtype)
    x = torch.randn(d, generator=generator, dtype=torch.float64).to(x_dtype)
    return grads, x, torch.randn(m, generator=generator, dtype=torch.float64)


def arithmetic(dtype, x_dtype):
    return torch.float64 if torch.float64 in (dtype, x_dtype) else torch.float32


def check_row_dots(grads, x):
    found, exact = row_dots(grads, x), grads.double() @ x.double()
    assert found.dtype == torch.float64 and found.shape == (len(grads),)
    scale = grads.double().norm(dim=1) * x.double().norm()
    assert ((found - exact).abs() <= ROUNDING[arithmetic(grads.dtype, x.dtype)] * scale).all()


def check_combine(grads, weights, x, alpha, beta):
    found = combine(grads, weights, x, alpha, beta)
    exact = beta * (grads.double().T @ weights.double())
    scale = abs(beta) * (grads.double().abs().T @ weights.double().abs())
    if x is not None:
        exact, scale = exact + alpha * x.double(), scale + abs(alpha) * x.double().abs()
    dtype = arithmetic(grads.dtype, None if x is None else x.dtype)
    assert found.dtype == dtype and found.shape == (grads.shape[1],) and found.is_contiguous()
    assert ((found - exact).abs() <= ROUNDING[dtype] * scale).all()


@pytest.mark.parametrize("d", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", X_DTYPES)
def test_every_shape_matches_float64(d, dtype, x_dtype):
    for m in ROWS:
        grads, x, weights = draw(m, d, dtype, x_dtype, seed=m)
        check_row_dots(grads, x)
        check_combine(grads, weights, None, 1.0, 1.0)
        check_combine(grads, weights, x, -0.3, 1.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", X_DTYPES)
def test_strides(dtype, x_dtype):
    """Rows from slices, vectors that are a column, every third number, or one number repeated."""
    whole, x, weights = draw(12, 2100, dtype, x_dtype)
    for grads in (whole[:5, :2049], whole[2:7, 51:], whole[::2, 4:2053][:5], whole[:1, :2049].expand(5, -1)):
        assert not grads.is_contiguous()
        for vector in (torch.stack([x[:2049], x[-2049:]], 1)[:, 1], x.repeat(3)[: 3 * 2049 : 3], x[:1].expand(2049)):
            check_row_dots(grads, vector)
            check_combine(grads, weights[:10:2], vector, 0.7, 1.0)
    column = whole[:, 3:4]
    assert column.stride() == (2100, 1)
    check_row_dots(column, x[:1])
    check_combine(column, weights, x[:1], 1.0, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vector_from_the_window_itself(dtype):
    """As the optimizer calls it: the newest row against all rows, read where it is stored."""
    grads, _, _ = draw(6, 4100, dtype, torch.float32)
    row = grads[2].float() if dtype == torch.bfloat16 else grads[2]
    check_row_dots(grads, row)
    assert (row_dots(grads, row)[2] - grads[2].double().square().sum()).abs() <= 1e-6 * 4100


def test_float32_weights():
    grads, x, weights = draw(5, 100, torch.float32, torch.float32)
    check_combine(grads, weights.float(), x, 1.0, -2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_without_rows_or_columns(dtype):
    grads, x, weights = draw(3, 5, dtype, torch.float32)
    assert row_dots(grads[:0], x).shape == (0,)
    assert torch.equal(row_dots(grads[:, :0], x[:0]), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(combine(grads[:0], weights[:0], x, 2.0), (2 * x).to(arithmetic(dtype, None)))
    assert combine(grads[:, :0], weights).shape == (0,)


def test_every_bfloat16_number_is_widened_right():
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)
    one = torch.ones(1)
    torch.testing.assert_close(combine(patterns[None], one), patterns.float(), rtol=0, atol=0, equal_nan=True)
    dots = row_dots(patterns[:, None], one)
    torch.testing.assert_close(dots, patterns.double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 31, 2048, 4099], ids=["first", "lane", "run", "rest"])
def test_what_is_not_finite_goes_where_it_belongs(dtype, value, column):
    grads, x, weights = draw(6, 4100, dtype, torch.float32)
    x, weights = x.abs() + 0.1, weights.abs() + 0.1
    clean_dots, clean_sum = row_dots(grads, x), combine(grads, weights, x)

    spoilt = grads.clone()
    spoilt[4, column] = value
    clean_dots[4] = clean_sum[column] = value
    torch.testing.assert_close(row_dots(spoilt, x), clean_dots, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(combine(spoilt, weights, x), clean_sum, rtol=0, atol=0, equal_nan=True)

    spoilt_x = x.clone()
    spoilt_x[column] = value
    torch.testing.assert_close(combine(grads, weights, spoilt_x), clean_sum, rtol=0, atol=0, equal_nan=True)
    expected = value * grads[:, column].double().sign()
    torch.testing.assert_close(row_dots(grads, spoilt_x), expected, rtol=0, atol=0, equal_nan=True)
    assert combine(spoilt, 0 * weights)[column].isnan(), "zero times infinity is no number"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", X_DTYPES)
def test_threads_and_repeats_give_the_same_bits(dtype, x_dtype):
    grads, x, weights = draw(37, 2 * 16384 + 777, dtype, x_dtype)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            found += [(row_dots(grads, x), combine(grads, weights, x, 0.5, 2.0)) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    for dots, total in found[1:]:
        assert torch.equal(dots, found[0][0])
        assert torch.equal(total, found[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", X_DTYPES)
def test_equal_rows_have_equal_dots(dtype, x_dtype):
    """To the bit, also those that remain behind whole groups: else copies of one gradient look like different ones."""
    grads, x, _ = draw(1, 5003, dtype, x_dtype)
    dots = row_dots(grads.repeat(7, 1), x)
    assert torch.equal(dots, dots[:1].expand(7))


WINDOW, VECTOR, WEIGHTS = torch.ones(3, 5), torch.ones(5), torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: row_dots(WINDOW, VECTOR[:4]), "x has 4 numbers; the window has 5 columns"),
        (lambda: row_dots(WINDOW, torch.ones(6)), "x has 6 numbers; the window has 5 columns"),
        (lambda: row_dots(WINDOW, torch.ones(1)), "x has 1 numbers; the window has 5 columns"),
        (lambda: row_dots(WINDOW, torch.ones(5, 1)), "x has 2 dimensions; expected a vector"),
        (lambda: row_dots(WINDOW, torch.tensor(1.0)), "x has 0 dimensions; expected a vector"),
        (lambda: row_dots(VECTOR, VECTOR), r"the window has 1 dimensions; expected a matrix \(m, d\)"),
        (lambda: row_dots(WINDOW.t(), WEIGHTS), "columns of the window are 5 numbers apart; expected contiguous rows"),
        (lambda: row_dots(WINDOW.half(), VECTOR), "the window is float32, bfloat16 or float64"),
        (lambda: row_dots(WINDOW.int(), VECTOR), "the window is float32, bfloat16 or float64"),
        (lambda: row_dots(WINDOW, VECTOR.bfloat16()), "a vector is float32 or float64"),
        (lambda: combine(WINDOW, WEIGHTS[:2]), "weights has 2 numbers; the window has 3 rows"),
        (lambda: combine(WINDOW, WINDOW), "weights has 2 dimensions; expected a vector"),
        (lambda: combine(WINDOW, WEIGHTS.long()), "a vector is float32 or float64"),
        (lambda: combine(WINDOW, WEIGHTS, VECTOR[:1]), "x has 1 numbers; the window has 5 columns"),
        (lambda: combine(WINDOW, WEIGHTS, torch.ones(5, 5)), "x has 2 dimensions; expected a vector"),
        (lambda: combine(WINDOW[0], WEIGHTS), "the window has 1 dimensions; expected a matrix"),
        (lambda: combine(WINDOW.t(), VECTOR), "columns of the window are 5 numbers apart; expected contiguous rows"),
        (lambda: combine(WINDOW.half(), WEIGHTS), "the window is float32, bfloat16 or float64"),
    ],
)
def test_wrong_shapes_and_types_are_refused(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", X_DTYPES)
def test_operators_are_registered_soundly(dtype, x_dtype):
    """Schema (nothing is written or aliased), fake implementation and tracing agree with what the kernels do."""
    grads, x, weights = draw(4, 33, dtype, x_dtype)
    torch.library.opcheck(row_dots.default, (grads, x))
    torch.library.opcheck(combine.default, (grads, weights))
    torch.library.opcheck(combine.default, (grads, weights, x, 0.5, 2.0))
