"""Sums, inverses and solutions of positive definite blocks, native and by PyTorch, against NumPy in float64.

Not against torch.linalg: its LU of several matrices at once was seen never to end with two threads (one OpenMP region
inside another, 200 rows).
"""

import numpy as np
import pytest
import torch

from mfac_hf.ops import blocks
from mfac_hf.ops.build import load_native

# One row, below, at and above a panel (4 or 8 rows) and a tile (8 or 16 columns), usual block sizes.
SIZES = [1, 2, 7, 8, 9, 16, 17, 50, 64, 128, 200]


@pytest.fixture(params=["dispatched", "pytorch"])
def implementation(request):
    """(spd_inverse, spd_solve): what callers get, native where there is a compiler, and the PyTorch fallback."""
    if request.param == "dispatched":
        return blocks.spd_inverse, blocks.spd_solve
    return blocks._spd_inverse, blocks._spd_solve


def draw(blocks, size, seed=0):
    """Matrices with condition numbers around a thousand, and vectors."""
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(blocks, size, size, generator=generator, dtype=torch.float64)
    matrices = roots.mT @ roots / size + 4e-3 * torch.eye(size, dtype=torch.float64)
    return (matrices + matrices.mT) / 2, torch.randn(blocks, size, generator=generator, dtype=torch.float64)


@pytest.fixture(params=["dispatched", "pytorch"])
def add_gram(request):
    return blocks.add_gram if request.param == "dispatched" else blocks._add_gram


@pytest.fixture(params=["dispatched", "pytorch"])
def unpack_gram(request):
    return blocks.unpack_gram if request.param == "dispatched" else blocks._unpack_gram


def pack(matrices):
    """What is on and below the diagonal, row after row."""
    rows, columns = torch.tril_indices(matrices.shape[1], matrices.shape[1])
    return matrices[:, rows, columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("size", "dim"),
    [
        (1, 3),
        (2, 5),
        (3, 10),
        (4, 9),
        (5, 12),
        (7, 7),
        (9, 100),
        (12, 30),
        (50, 612),
        (64, 64),
        (128, 700),
        (200, 450),
    ],
)
@pytest.mark.parametrize("rows", [0, 1, 63, 130])
def test_sums_of_outer_products_match_numpy(add_gram, rows, size, dim, dtype):
    generator = torch.Generator().manual_seed(rows)
    wide = torch.randn(rows, dim + 3, generator=generator).to(dtype)
    wide[:, dim:] = torch.nan  # beside the gradients, and never read
    grads = wide[:, :dim]
    blocks = -(-dim // size)
    columns = np.zeros((rows, blocks * size))
    columns[:, :dim] = grads.double().numpy()
    columns = columns.reshape(rows, blocks, size)
    expected = torch.as_tensor(np.einsum("nki,nkj->kij", columns, columns))
    before = torch.randn(blocks, size * (size + 1) // 2, generator=generator, dtype=torch.float64)
    sums = before.clone()
    assert add_gram(sums, grads, size) is None
    torch.testing.assert_close(sums - before, pack(expected), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("size", [7, 50, 128])
def test_sums_have_the_same_bits_for_any_number_of_threads(size):
    grads = torch.randn(70, 1_000, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            sums = torch.zeros(-(-1_000 // size), blocks.triangle(size), dtype=torch.float64)
            blocks.add_gram(sums, grads, size)
            found.append(sums)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(sums, found[0]) for sums in found)


@pytest.mark.parametrize("shape", [(3, 15), (2, 14), (2, 16)])
def test_sums_of_another_shape_are_refused(add_gram, unpack_gram, shape):
    sums = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        add_gram(sums, torch.ones(4, 8), 5)
    assert not sums.any()
    if shape[1] != 15:
        with pytest.raises(RuntimeError, match="triangle"):
            unpack_gram(sums, 5, 1.0, 1.0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("masked", [False, True])
def test_unpacked_sums_are_damped_matrices(unpack_gram, size, masked):
    matrices, x = draw(5, size)
    keep = x > 0 if masked else None
    expected = matrices / 7
    if masked:
        expected *= keep[:, :, None] & keep[:, None, :]
    for matrix, mask in zip(expected, keep if masked else torch.ones(5, size, dtype=torch.bool), strict=True):
        matrix += torch.diag(torch.where(mask, 0.25, 1.0))
    torch.testing.assert_close(unpack_gram(pack(matrices), size, 7, 0.25, keep), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_inverse_and_solution_match_linear_algebra(implementation, size):
    spd_inverse, spd_solve = implementation
    matrices, x = draw(5, size)
    before = matrices.clone(), x.clone()
    inverse, info = spd_inverse(matrices)
    assert info.dtype == torch.int32 and info.tolist() == [0] * 5
    # Condition numbers of 1e3 leave twelve of sixteen digits, and two are for the additions.
    torch.testing.assert_close(inverse, torch.as_tensor(np.linalg.inv(matrices.numpy())), rtol=1e-10, atol=1e-10)
    # Products of the same numbers, possibly in another order.
    torch.testing.assert_close(inverse, inverse.mT, rtol=0, atol=1e-12 * float(inverse.abs().max()))
    solution, info = spd_solve(matrices, x)
    assert info.dtype == torch.int32 and info.tolist() == [0] * 5
    expected = torch.as_tensor(np.linalg.solve(matrices.numpy(), x.unsqueeze(2).numpy())).squeeze(2)
    torch.testing.assert_close(solution, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(matrices, before[0]) and torch.equal(x, before[1])


def test_solution_along_strong_directions_keeps_its_digits(implementation):
    """A solution far smaller than the inverse: substitution keeps it, a product with the inverse does not."""
    basis = torch.linalg.qr(draw(1, 20, seed=3)[0][0])[0]
    values = torch.logspace(0, -12, 20, dtype=torch.float64)
    matrix = (basis * values) @ basis.T
    solution, _ = implementation[1]((matrix + matrix.T)[None] / 2, basis[:, 0][None].contiguous())
    # Backward stable: the error is that of a matrix that is off by a few units of its last place.
    residual = matrix @ solution[0] - basis[:, 0]
    assert float(residual.norm()) <= 1e-12


@pytest.fixture(params=["dispatched", "pytorch"])
def dual_inverse(request):
    return blocks.dual_inverse if request.param == "dispatched" else blocks._dual_inverse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "dim"), [(1, 3), (5, 12), (9, 9), (20, 50), (50, 130), (128, 200)])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 17, 64])
def test_dual_form_matches_numpy(dual_inverse, rows, size, dim, dtype):
    generator = torch.Generator().manual_seed(rows)
    wide = torch.randn(rows, dim + 3, generator=generator).to(dtype)
    wide[:, dim:] = torch.nan  # beside the gradients, and never read
    grads, x = wide[:, :dim], torch.randn(dim, generator=generator, dtype=torch.float64)
    parts = []
    for first in range(0, dim, size):
        block = grads[:, first : first + size].double().numpy()
        system = 0.1 * np.eye(rows) + block @ block.T
        parts.append(torch.from_numpy(np.eye(block.shape[1]) - block.T @ np.linalg.solve(system, block)))
    exact = torch.block_diag(*parts)
    diagonal, info = dual_inverse(grads, size, 0.1)
    assert info.dtype == torch.int32 and info.tolist() == [0] * -(-dim // size)
    torch.testing.assert_close(diagonal, exact.diagonal(), rtol=1e-9, atol=1e-11)
    product, info = dual_inverse(grads, size, 0.1, x)
    assert info.dtype == torch.int32 and not info.any()
    torch.testing.assert_close(product, exact @ x, rtol=1e-9, atol=1e-11)


def test_dual_form_marks_what_is_not_positive_definite(dual_inverse):
    """A negative shift makes every system indefinite whose gradients are smaller."""
    grads = torch.ones(3, 10)
    grads[:, 4:8] = 1e-3
    for x in (None, torch.ones(10, dtype=torch.float64)):
        found, info = dual_inverse(grads, 4, -1e-2, x)
        assert info.tolist() == [2, 1, 2]  # 4 - 0.01, 4e-6 - 0.01 and 2 - 0.01 are the first pivots
        assert bool(found.isnan().all())
    spoilt = grads.clone()
    spoilt[1, 9] = torch.nan
    found, info = dual_inverse(spoilt, 4, 1.0)
    assert info.tolist()[:2] == [0, 0] and info[2] > 0
    assert bool(found[:8].isfinite().all()) and bool(found[8:].isnan().all())


def test_dual_form_refuses_a_vector_of_another_length(dual_inverse):
    with pytest.raises(RuntimeError):
        dual_inverse(torch.ones(2, 6), 3, 1.0, torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 9, 50])
def test_no_matrices(implementation, size):
    matrices, x = draw(0, size)
    inverse, info = implementation[0](matrices)
    assert inverse.shape == (0, size, size) and info.shape == (0,)
    solution, info = implementation[1](matrices, x)
    assert solution.shape == (0, size) and info.shape == (0,)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_not_positive_definite_is_marked(implementation, size):
    matrices, x = draw(4, size)
    expected = [torch.as_tensor(np.linalg.inv(matrices[i].numpy())) for i in (0, 3)]
    last = size - 1
    matrices[1, last, last] = -1.0
    matrices[2, last // 2, last // 2] = torch.nan
    for function, arguments in zip(implementation, ((matrices,), (matrices, x)), strict=True):
        found, info = function(*arguments)
        assert info[0] == 0 and info[1] == size and info[3] == 0
        assert 1 <= info[2] <= size
        assert bool(found[1:3].isnan().all())
        assert bool(found[::3].isfinite().all())
    found, _ = implementation[0](matrices)
    torch.testing.assert_close(found[::3], torch.stack(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [7, 50, 128])
def test_threads_and_repeats_give_the_same_bits(size):
    matrices, x = draw(9, size)
    threads = torch.get_num_threads()
    found = []
    try:
        # PyTorch promises repeats, and nothing about other thread counts or about a batch of another size.
        for number in (1, 2, 3, 1) if load_native("cpu") else (1, 1):
            torch.set_num_threads(number)
            duals = [blocks.dual_inverse(matrices[0], 3, 1.0, vector)[0] for vector in (None, x[0])]
            found.append((blocks.spd_inverse(matrices)[0], blocks.spd_solve(matrices, x)[0], *duals))
    finally:
        torch.set_num_threads(threads)
    for results in found[1:]:
        assert all(map(torch.equal, results, found[0]))
    if load_native("cpu") and matrices.device.type == "cpu":  # Nor on the matrices beside it.
        assert torch.equal(blocks.spd_inverse(matrices[4:5])[0], found[0][0][4:5])


def test_wrong_shapes_are_refused(implementation):
    matrices, x = draw(3, 5)
    for call in (
        lambda: implementation[0](matrices[:, :4]),
        lambda: implementation[1](matrices, x[:, :4].contiguous()),
        lambda: implementation[1](matrices, x[:2]),
    ):
        with pytest.raises(RuntimeError):
            call()


@pytest.mark.parametrize("size", [1, 17])
def test_operators_are_registered_soundly(size):
    matrices, x = draw(3, size)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    sums = torch.zeros(3, blocks.triangle(size), dtype=torch.float64)
    torch.library.opcheck(torch.ops.mfac.add_gram.default, (sums, torch.ones(2, 3 * size), size), test_utils=tests)
    for keep in (None, x > 0):
        torch.library.opcheck(torch.ops.mfac.unpack_gram.default, (sums, size, 2.0, 1e-3, keep), test_utils=tests)
    for vector in (None, x[0]):
        arguments = (matrices[0], max(1, size // 2), 1.0, vector)
        torch.library.opcheck(torch.ops.mfac.dual_inverse.default, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.mfac.spd_inverse.default, (matrices,), test_utils=tests)
    torch.library.opcheck(torch.ops.mfac.spd_solve.default, (matrices, x), test_utils=tests)
