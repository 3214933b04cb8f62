"""Row-sparse columns hold what dense ones hold: the same dots, projections and combinations, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_hf.fisher.columns import DenseColumns, RowSparseColumns, SparseRows

# Both stores sum in another order; float32 products keep seven digits of sums of this size.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
DTYPES = tuple(TOLERANCE)


def sparse_grad(rows, width, generator, dtype=torch.float32):
    """A gradient that is zero outside ``rows``."""
    rows = torch.tensor(sorted(rows), dtype=torch.int64)
    return SparseRows(rows, torch.randn(len(rows), width, generator=generator, dtype=torch.float64).to(dtype))


def as_dense(grad, shape):
    dense = torch.zeros(shape, dtype=grad.values.dtype)
    dense[grad.rows] = grad.values
    return dense.flatten()


def stores(num_grads, shape, dtype):
    """An empty row-sparse store and an empty dense one for the same table."""
    return (
        RowSparseColumns(num_grads, shape, dtype=dtype),
        DenseColumns(num_grads, shape[0] * shape[1], dtype=dtype),
    )


def check_equal(sparse, dense, row, count, generator):
    """Every product of the row-sparse store is that of the dense one."""
    tolerance = {"rtol": 0.0, "atol": TOLERANCE[sparse.values_MNH.dtype]}
    for newest in {row, 0, count - 1}:
        torch.testing.assert_close(sparse.dots(newest, count), dense.dots(newest, count), **tolerance)
    x = torch.randn(sparse.dim, generator=generator, dtype=torch.float64)
    for vector in (x, x.float()):
        torch.testing.assert_close(sparse.project(vector, count), dense.project(vector, count), **tolerance)
    weights = torch.randn(count, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(sparse.combine(weights), dense.combine(weights), **tolerance)
    wide = sparse.combine(weights, dtype=torch.float64), dense.combine(weights, dtype=torch.float64)
    torch.testing.assert_close(*wide, rtol=0.0, atol=1e-12)
    part = sparse.combine_part(weights)
    assert (part.rows.diff() > 0).all()
    assert torch.equal(as_dense(part, sparse.shape), sparse.combine(weights))


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    num_grads=st.integers(1, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    patterns=st.lists(st.sets(st.integers(0, 8)), min_size=1, max_size=9),
    seed=st.integers(0, 1000),
)
def test_equals_dense_columns(num_grads, height, width, dtype, patterns, seed):
    """While the window fills and after it wrapped; rows may be absent, shared, all there, or none."""
    generator = torch.Generator().manual_seed(seed)
    sparse, dense = stores(num_grads, (height, width), dtype)
    for step, pattern in enumerate(patterns):
        grad = sparse_grad({row for row in pattern if row < height}, width, generator, dtype)
        sparse.write(step % num_grads, grad)
        dense.write(step % num_grads, as_dense(grad, sparse.shape))
        check_equal(sparse, dense, step % num_grads, min(step + 1, num_grads), generator)


def test_fewer_rows_than_before():
    """The order of the entries is kept between calls, but not for another number of rows."""
    generator = torch.Generator().manual_seed(0)
    sparse, dense = stores(4, (6, 3), torch.float32)
    for row in range(4):
        grad = sparse_grad({row, 5}, 3, generator)
        sparse.write(row, grad)
        dense.write(row, as_dense(grad, sparse.shape))
    for count in (4, 2, 3, 1, 4):
        check_equal(sparse, dense, count - 1, count, generator)


def test_slots_grow_and_keep_what_they_hold():
    generator = torch.Generator().manual_seed(0)
    sparse, dense = stores(3, (50, 4), torch.float32)
    slots = []
    for step, needed in enumerate((1, 2, 40, 41, 3, 50)):
        grad = sparse_grad(torch.randperm(50, generator=generator)[:needed].tolist(), 4, generator)
        sparse.write(step % 3, grad)
        dense.write(step % 3, as_dense(grad, sparse.shape))
        check_equal(sparse, dense, step % 3, min(step + 1, 3), generator)
        slots.append(sparse.rows_MN.shape[1])
    assert slots == [
        1,
        2,
        40,
        50,
        50,
        50,
    ]  # a quarter more than before where that is enough, so that not every step grows
    assert sparse.nbytes == 3 * 50 * (4 * 4 + 8)


def test_a_smaller_gradient_leaves_nothing_of_the_one_it_replaces():
    sparse = RowSparseColumns(1, (5, 2))
    sparse.write(0, SparseRows(torch.tensor([0, 2, 4]), torch.ones(3, 2)))
    sparse.write(0, SparseRows(torch.tensor([3]), torch.full((1, 2), 2.0)))
    assert sparse.combine(torch.ones(1)).tolist() == [0.0] * 6 + [2.0, 2.0] + [0.0] * 2
    assert sparse.dots(0, 1).item() == 8.0


def test_empty_gradients():
    """A batch whose table got no gradient at all, in a window with and without others."""
    sparse = RowSparseColumns(2, (5, 3))
    nothing = SparseRows(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3))
    sparse.write(0, nothing)
    assert sparse.dots(0, 1).tolist() == [0.0]
    assert sparse.project(torch.ones(15), 1).tolist() == [0.0]
    assert sparse.combine(torch.ones(1)).tolist() == [0.0] * 15
    rows, values = sparse.combine_part(torch.ones(1), dtype=torch.float64)
    assert rows.shape == (0,) and values.shape == (0, 3) and values.dtype == torch.float64
    sparse.write(1, SparseRows(torch.tensor([4]), torch.ones(1, 3)))
    assert sparse.dots(1, 2).tolist() == [0.0, 3.0]
    assert sparse.dots(0, 2).tolist() == [0.0, 0.0]


def test_cleared_rows_are_zero_gradients():
    """Some rows in the middle, and all from one on; the others stay."""
    generator = torch.Generator().manual_seed(0)
    sparse, dense = stores(5, (6, 3), torch.float32)
    for row in range(5):
        grad = sparse_grad({row, 5}, 3, generator)
        sparse.write(row, grad)
        dense.write(row, as_dense(grad, sparse.shape))
    kept = sparse.gram(5)
    for rows in (slice(1, 3), slice(4, None)):
        sparse.clear(rows)
        dense.clear(rows)
        kept[rows] = kept[:, rows] = 0.0
        check_equal(sparse, dense, 0, 5, generator)
        torch.testing.assert_close(sparse.gram(5), kept, rtol=0.0, atol=1e-12)


def test_parts_of_parameters_that_share_a_store():
    """Vectors side by side, also none; a table has its store alone."""
    dense, sparse = DenseColumns(2, 5), RowSparseColumns(2, (4, 3))
    assert dense.join([torch.ones(2), torch.zeros(3)]).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert dense.join([]).shape == (0,)
    part = SparseRows(torch.tensor([1]), torch.ones(1, 3))
    assert sparse.join([part]) is part
    with pytest.raises(ValueError, match="unpack"):
        sparse.join([part, part])


def test_existing_buffers_are_used():
    rows, values = torch.tensor([[1, 3], [3, 4]]), torch.ones(2, 2, 2)
    sparse = RowSparseColumns(2, (4, 2), buffers=(rows, values))
    assert sparse.rows_MN is rows and sparse.values_MNH is values and sparse.dim == 8
    assert sparse.dots(0, 2).tolist() == [4.0, 2.0] and sparse.row(1).tolist() == [0.0] * 6 + [1.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_repeatable(dtype):
    """Sums never depend on the order in which threads or hash tables come to them."""
    generator = torch.Generator().manual_seed(0)
    shape, num_grads = (3000, 32), 24
    grads = [
        sparse_grad(torch.randperm(3000, generator=generator)[:200].tolist(), 32, generator, dtype) for _ in range(30)
    ]
    weights = torch.randn(num_grads, generator=generator, dtype=torch.float64)

    def run():
        store = RowSparseColumns(num_grads, shape, dtype=dtype)
        dots = []
        for step, grad in enumerate(grads):
            store.write(step % num_grads, grad)
            dots.append(store.dots(step % num_grads, min(step + 1, num_grads)))
        return torch.cat(dots), store.combine(weights), store.project(store.combine(weights), num_grads)

    first = run()
    for again in (run(), run()):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dense_columns_round_once(dtype):
    """What is stored is the gradient rounded to the storage type, and every product uses that."""
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(3, 11, generator=generator, dtype=torch.float64)
    store = DenseColumns(3, 11, dtype=dtype)
    for row, grad in enumerate(grads):
        store.write(row, grad)
    rounded = grads.to(dtype).double()
    assert torch.equal(store.buffer_MD.double(), rounded)
    tolerance = {"rtol": 0.0, "atol": TOLERANCE.get(dtype, 2e-5)}
    torch.testing.assert_close(store.dots(1, 3), rounded @ rounded[1], **tolerance)
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(store.combine(weights).double(), weights @ rounded[:2], **tolerance)
    torch.testing.assert_close(
        store.combine(weights, dtype=torch.float64), weights @ rounded[:2], rtol=0.0, atol=1e-12
    )


def test_dense_columns_never_read_rows_that_were_not_written():
    """The buffer starts uninitialised; NaN stands for whatever is in it."""
    store = DenseColumns(4, 5, buffer=torch.full((4, 5), torch.nan))
    store.write(0, torch.arange(5.0))
    assert store.dots(0, 1).tolist() == [30.0]
    assert store.combine(torch.ones(1)).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert store.nbytes == 80 and store.dim == 5
