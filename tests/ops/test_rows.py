"""Products with row-sparse gradients against dense float64, by the native kernels and by PyTorch."""

import pytest
import torch

from mfac_hf.ops import build
from mfac_hf.ops import rows as sparse_rows

DTYPES = (torch.float32, torch.float64)
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14}  # as in test_window.py
HEIGHT = 40


@pytest.fixture(params=["dispatched", "pytorch"])
def implementation(request):
    """(sparse_dots, sparse_combine): what callers get, native where there is a compiler, and the PyTorch fallback."""
    if request.param == "dispatched":
        return sparse_rows.sparse_dots, sparse_rows.sparse_combine
    return sparse_rows._sparse_dots, sparse_rows._sparse_combine


def draw(m, width, dtype, seed=0):
    """Gradients with 0 to 9 rows in 9 slots (what is in an empty slot must not matter), rows of a vector, weights."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full((m, 9), HEIGHT)
    for i in range(m):
        used = int(torch.randint(10, (), generator=generator))
        rows[i, :used] = torch.randperm(HEIGHT, generator=generator)[:used].sort()[0]
    values = torch.randn(m, 9, width, generator=generator, dtype=torch.float64).to(dtype)
    rows_u = torch.randperm(HEIGHT, generator=generator)[:17].sort()[0]
    x = torch.randn(17, width, generator=generator, dtype=torch.float64)
    return rows, values, rows_u, x, torch.randn(m, generator=generator, dtype=torch.float64)


def as_dense(rows, values):
    dense = torch.zeros(len(rows), HEIGHT + 1, values.shape[2], dtype=torch.float64)
    for gradient, row, value in zip(dense, rows, values, strict=True):
        gradient[row] = value.double()
    return dense[:, :HEIGHT]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 8, 15, 16, 17, 33, 128])
def test_products_match_float64(implementation, dtype, other, width):
    sparse_dots, sparse_combine = implementation
    rows, values, rows_u, x, weights = draw(6, width, dtype)
    place, dense = sparse_rows.places(rows_u, HEIGHT), as_dense(rows, values)
    rounding = ROUNDING[torch.promote_types(dtype, other)]

    found = sparse_dots(rows, values, place, x.to(other))
    exact = (dense[:, rows_u] * x.to(other).double()).sum(dim=(1, 2))
    scale = dense.flatten(1).norm(dim=1) * x.norm()
    assert found.dtype == torch.float64
    assert ((found - exact).abs() <= rounding * scale).all()

    found = sparse_combine(rows, values, place, weights.to(other), len(rows_u))
    exact = torch.einsum("m,muh->uh", weights.to(other).double(), dense[:, rows_u])
    scale = torch.einsum("m,muh->uh", weights.abs(), dense[:, rows_u].abs())
    assert found.dtype == torch.promote_types(dtype, other) and found.shape == exact.shape
    assert ((found - exact).abs() <= rounding * scale).all()


def test_nothing_in_common(implementation):
    sparse_dots, sparse_combine = implementation
    rows, values = torch.tensor([[0, 3], [HEIGHT, HEIGHT]]), torch.ones(2, 2, 4)
    place = sparse_rows.places(torch.tensor([7]), HEIGHT)
    assert sparse_dots(rows, values, place, torch.ones(1, 4)).tolist() == [0, 0]
    assert sparse_combine(rows, values, place, torch.ones(2), 1).tolist() == [[0] * 4]
    nowhere = sparse_rows.places(torch.zeros(0, dtype=torch.int64), HEIGHT)
    assert sparse_dots(rows, values, nowhere, torch.ones(0, 4)).tolist() == [0, 0]
    assert sparse_combine(rows, values, nowhere, torch.ones(2), 0).shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_repeats_give_the_same_bits(implementation, dtype):
    sparse_dots, sparse_combine = implementation
    rows, values, rows_u, x, weights = draw(200, 48, dtype)
    place = sparse_rows.places(rows_u, HEIGHT)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            found.append(sparse_dots(rows, values, place, x.to(dtype)))
            found.append(sparse_combine(rows, values, place, weights.to(dtype), len(rows_u)))
    finally:
        torch.set_num_threads(threads)
    for i in range(2, len(found)):
        assert torch.equal(found[i], found[i % 2])


ROWS, VALUES, PLACE = torch.tensor([[0, 2], [1, 3]]), torch.ones(2, 2, 4), torch.tensor([0, 1, -1, -1])
X, WEIGHTS = torch.ones(2, 4), torch.ones(2)


@pytest.mark.cpu("PyTorch's own operators end the process's use of a GPU that is asked for a row outside")
def test_row_numbers_outside_are_refused(implementation):
    sparse_dots, sparse_combine = implementation
    assert sparse_dots(ROWS, VALUES, PLACE, X).tolist() == [4, 4]
    with pytest.raises((IndexError, RuntimeError)):
        sparse_dots(ROWS + 1, VALUES, PLACE, X)
    with pytest.raises((IndexError, RuntimeError)):
        sparse_combine(ROWS + 1, VALUES, PLACE, WEIGHTS, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROWS + 1, VALUES, PLACE, X), "row numbers go from 0 to 4; expected 0 to 3"),
        ((ROWS, VALUES, PLACE - 1, X), "places go from -2 to 0; expected -1 to 1"),
        ((ROWS, VALUES, PLACE + 1, X), "places go from -1 to 2; expected -1 to 1"),
        ((ROWS[:1], VALUES, PLACE, X), "row numbers for 1 x 2 slots; there are values for 2 x 2"),
        ((ROWS.int(), VALUES, PLACE, X), "row numbers and places are int64"),
        ((ROWS, VALUES, PLACE, X[:, :3]), "whose rows are as wide as the values"),
        ((ROWS, VALUES.half(), PLACE, X), "values are float32 or float64"),
        ((ROWS, VALUES, PLACE, X.half()), "the numbers of x are float32 or float64"),
        ((ROWS.t(), VALUES, PLACE, X), "expected contiguous tensors"),
    ],
)
def test_native_kernels_name_what_is_wrong(arguments, message):
    if not build.load_native("cpu"):
        pytest.skip(f"no native kernels: {build.native_status('cpu')}")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mfac.sparse_dots(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_operators_are_registered_soundly(dtype, other):
    rows, values, rows_u, x, weights = draw(4, 17, dtype)
    place = sparse_rows.places(rows_u, HEIGHT)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.mfac.sparse_dots.default, (rows, values, place, x.to(other)), test_utils=tests)
    arguments = (rows, values, place, weights.to(other), len(rows_u))
    torch.library.opcheck(torch.ops.mfac.sparse_combine.default, arguments, test_utils=tests)
