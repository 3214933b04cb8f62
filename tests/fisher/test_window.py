"""Products by the inverse Fisher against a dense float64 oracle, and what must not break them."""

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_hf.fisher import GradientWindow
from mfac_hf.fisher.columns import DenseColumns, RowSparseColumns, SparseRows
from mfac_hf.fisher.options import MAX_NORM
from mfac_hf.fisher.reference import PaperDynamicInverse, dense_fisher
from mfac_hf.ops.build import load_native
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tensors import draw, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# The error of the Gram matrix (float32 products, or float64 ones) over the damping that the tests below use.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-4, torch.float64: 1e-9}


def stored(window):
    """The gradients as the window holds them, after rounding, oldest row number first."""
    return torch.cat([columns.buffer_MD[: window.count] for columns in window.columns], dim=1).double()


def oracle(window, x=None):
    """F⁻¹ x from the dense Fisher of the stored rows; x is the newest row unless given."""
    rows = stored(window)
    divisor = window.options.num_grads if window.options.normalize == "num_grads" else window.count
    x = rows[window.gram.newest] if x is None else x.double()
    return torch.linalg.solve(dense_fisher(rows, window.options.damping, divisor), x)


def oracle_in_span(window):
    """F⁻¹ of the newest row by the push-through identity in float64, where a dense matrix would be too large."""
    rows = stored(window)
    system = rows @ rows.T
    system.diagonal().add_(window.options.num_grads * window.options.damping)
    unit = torch.zeros(window.count, dtype=torch.float64)
    unit[window.gram.newest] = 1.0
    return window.options.num_grads * (torch.linalg.solve(system, unit) @ rows)


def cosine(found, exact):
    return float(torch.nn.functional.cosine_similarity(found.double(), exact, dim=0))


def check(window, x):
    """Direction and solve agree with the oracle now."""
    dtype = window.columns[0].buffer_MD.dtype
    direction = window.direction()
    assert direction.shape == (window.dim,)
    assert direction.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(direction, oracle(window)) <= TOLERANCE[dtype]
    solved = window.solve(x)
    assert solved.dtype == x.dtype
    # All in float64, so the result is exact up to the rounding of the answer.
    assert relative_error(solved, oracle(window, x)) <= (1e-6 if x.dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", ["num_grads", "count"])
@pytest.mark.parametrize(("m", "d"), list(itertools.product([1, 2, 3, 7, 33], [1, 5, 40])))
def test_matches_the_oracle_while_filling_and_after_wrapping(m, d, normalize, dtype):
    window = GradientWindow(m, d, damping=1e-2, normalize=normalize, dtype=dtype)
    x = draw(1, d, seed=1)[0]
    for step, grad in enumerate(draw(2 * m + 2, d, dtype=torch.float32)):
        window.push(grad)
        assert window.count == min(step + 1, m) and window.gram.newest == step % m
        if step < 4 or step % 5 == 0 or step >= 2 * m:
            check(window, x if step % 2 else x.float())


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    m=st.integers(1, 12),
    d=st.integers(1, 30),
    steps=st.integers(1, 30),
    dtype=st.sampled_from(DTYPES),
    normalize=st.sampled_from(["num_grads", "count"]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_matches_the_oracle_for_any_shape(m, d, steps, dtype, normalize, scale):
    window = GradientWindow(m, d, damping=1e-2 * scale**2, normalize=normalize, dtype=dtype)
    for grad in draw(steps, d, seed=steps, dtype=torch.float32):
        window.push(scale * grad)
    check(window, scale * draw(1, d, seed=1)[0])


@pytest.mark.cpu("the devices are parts of the CPU")
@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"], ["cpu"] * 3, ["cpu"] * 9, [torch.device("cpu"), "cpu"]])
def test_columns_split_over_several_devices(devices):
    """Also with fewer columns than devices."""
    one, several = (
        GradientWindow(4, 7, damping=1e-3, dtype=torch.float64),
        GradientWindow(4, 7, damping=1e-3, dtype=torch.float64, device=devices),
    )
    assert len(several.columns) == len(devices) and several.dim == 7 and several.nbytes == one.nbytes
    for grad in draw(6, 7):
        one.push(grad)
        several.push(grad)
        torch.testing.assert_close(several.direction(), one.direction(), rtol=1e-10, atol=0)
        torch.testing.assert_close(several.solve(grad.flip(0)), one.solve(grad.flip(0)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decay", [0.5, 0.99])
@pytest.mark.parametrize("normalize", ["num_grads", "count"])
def test_grad_decay_preconditions_the_averaged_gradient(decay, normalize):
    window = GradientWindow(5, 9, damping=1e-2, normalize=normalize, dtype=torch.float64)
    pushed = []
    for grad in draw(13, 9):
        window.push(grad)
        pushed = [*pushed, grad][-5:]
        weights = torch.tensor([decay**age for age in range(len(pushed))], dtype=torch.float64).flip(0)
        average = (weights / weights.sum()) @ torch.stack(pushed)
        assert relative_error(window.direction(decay), oracle(window, average)) <= 1e-9
    assert torch.equal(window.direction(0.0), window.direction())


def hard_gradients(m, d, norm, seed=0):
    """Low rank plus noise, the sum of which has the given norm: what makes small damping hard."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(8, d, generator=generator)
    grads = torch.randn(m, 8, generator=generator) @ basis + 0.3 * torch.randn(m, d, generator=generator)
    return norm * grads / grads.norm(dim=1, keepdim=True)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("damping", [1e-5, 1e-6, 1e-8])
def test_error_where_published_runs_are(norm, damping):
    """At most 1e-3 in float32 where the paper's recursion loses everything; direction kept in bfloat16."""
    m, d = 256, 4000
    narrow = GradientWindow(m, d, damping=damping)
    half = GradientWindow(m, d, damping=damping, dtype=torch.bfloat16)
    paper = PaperDynamicInverse(m, d, damping=damping)
    grads = hard_gradients(m + 20, d, norm)
    for grad in grads:
        narrow.push(grad)
        half.push(grad)
        direction = paper.step(grad)
    exact = oracle_in_span(narrow)
    error = relative_error(narrow.direction(), exact)
    assert error <= 1e-3
    assert cosine(half.direction(), oracle_in_span(half)) >= 0.999
    assert narrow.gram.jitter_escalations == half.gram.jitter_escalations == 0
    if damping <= 1.1e-7 * norm**2:
        assert not relative_error(direction, exact) <= max(100 * error, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1e-2, 1e-3])
def test_nearly_repeated_gradients(dtype, spread):
    """Large batches or slow training: gradients differ by less than bfloat16 resolves, and only that matters."""
    m, d = 16, 100_000
    window = GradientWindow(m, d, damping=1e-8, dtype=dtype)
    common, *noise = draw(m + 5, d, dtype=torch.float32)
    for part in noise:
        window.push(common / common.norm() + spread * part / part.norm())
        direction = window.direction()
    exact = oracle_in_span(window)
    assert cosine(direction, exact) >= 0.99
    assert relative_error(direction, exact) <= 0.15


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damping", [1e-6, 1e-12])
@pytest.mark.parametrize("normalize", ["num_grads", "count"])
def test_degenerate_gradients_never_give_nan(dtype, damping, normalize):
    """Duplicates, zeros, multiples, 1e6 beside 1e-6, and more gradients than parameters."""
    window = GradientWindow(12, 6, damping=damping, normalize=normalize, dtype=dtype)
    base = draw(4, 6, dtype=torch.float32)
    zero = torch.zeros(6)
    sequence = [zero, base[0], base[0], base[0], -base[0], zero, 1e6 * base[1], base[1], 1e-6 * base[2], zero]
    for grad in [*sequence, *(1e6 * base), *base, *([base[3]] * 13), zero]:
        window.push(grad)
        assert window.direction().isfinite().all()
        assert window.solve(base[0]).isfinite().all()
        assert window.solve(base[0].double()).isfinite().all()
        assert np.isfinite(window.condition())
    assert torch.equal(window.direction(), zero.to(window.direction().dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damping", [1e-3, 1e-6, 1e-8])
def test_repeated_gradient_has_a_known_direction(dtype, damping):
    """With k copies of g in the window, F⁻¹g = g / (λ + k|g|²/m).

    The coefficients of the copies cancel to one part in k|g|²/(mλ), which their rounding to float32 does not survive.
    Nor would it survive a Gram matrix in which equal gradients have unequal products, as a BLAS gives them that rounds
    by the position of a row.
    """
    if damping < 1e-3 and dtype != torch.float64 and not load_native("cpu"):
        pytest.skip("needs the native kernels, which treat every row alike")
    grad = draw(1, 500, dtype=dtype)[0].double()
    grad = (grad / grad.norm()).to(dtype)
    square = float(grad.double().square().sum())
    window = GradientWindow(64, 500, damping=damping, dtype=dtype)
    for copies in range(1, 80):
        window.push(grad)
        direction = window.direction()
        assert direction.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = grad.double() / (damping + min(copies, 64) * square / 64)
        assert relative_error(direction, expected) <= 1e-3


def test_float64_arithmetic_only_where_it_is_needed():
    """It costs a second reading of the window's worth of time, and ordinary gradients do not cancel."""
    ordinary = GradientWindow(64, 3000, damping=1e-8)
    for grad in hard_gradients(70, 3000, 1.0):
        ordinary.push(grad)
        assert ordinary.gram.combine_dtype(ordinary.gram.direction_weights()) is None
    ordinary.push(torch.zeros(3000))
    assert ordinary.gram.combine_dtype(ordinary.gram.direction_weights()) is None
    for _ in range(3):
        ordinary.push(grad)
    assert ordinary.gram.combine_dtype(ordinary.gram.direction_weights()) == torch.float64


def snapshot(window):
    return [columns.buffer_MD.clone() for columns in window.columns], window.gram.gram_MM.clone(), window.gram.pushed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), -float("inf"), 2e19, 1e200])
def test_a_spoiled_gradient_is_refused(dtype, spoiled):
    """Also a finite one whose square is infinite: an infinite Gram matrix has no factor."""
    window = GradientWindow(3, 4, damping=1e-3, dtype=dtype)
    for grad in draw(4, 4):
        window.push(grad)
    before, direction = snapshot(window), window.direction()
    grad = torch.ones(4, dtype=torch.float64)
    grad[2] = spoiled
    with pytest.raises(ValueError, match="norm of the gradient is (nan|inf|2e\\+19|1e\\+200)"):
        window.push(grad)
    for saved, now in zip(before[0], snapshot(window)[0], strict=True):
        assert torch.equal(saved, now)
    assert torch.equal(before[1], window.gram.gram_MM) and before[2] == window.gram.pushed
    assert torch.equal(direction, window.direction())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_gradients_still_work(dtype):
    window = GradientWindow(3, 4, damping=1e-3, dtype=dtype)
    for _ in range(4):
        window.push(torch.full((4,), 0.49 * MAX_NORM))
        assert window.direction().isfinite().all() and window.gram.gram_MM.isfinite().all()


def test_a_gradient_of_another_shape_is_refused():
    window = GradientWindow(3, 4, damping=1e-3)
    window.push(torch.ones(4))
    for shape in ((5,), (3,), (1, 4), ()):
        with pytest.raises(ValueError, match=r"this window takes \(4,\)"):
            window.push(torch.ones(shape))
        with pytest.raises(ValueError, match=r"this window takes \(4,\)"):
            window.solve(torch.ones(shape))
    assert window.gram.pushed == 1


def test_empty_window():
    window = GradientWindow(3, 4, damping=0.5)
    with pytest.raises(RuntimeError, match="push a gradient"):
        window.direction()
    assert window.solve(torch.ones(4)).tolist() == [2.0] * 4
    assert window.condition() == 1.0 and window.count == 0


def test_a_gram_matrix_that_cannot_be_mended_is_an_error():
    """Parts are taken as they are; jitter without end would be a hang."""
    window = GradientWindow(3, [DenseColumns(3, 2), DenseColumns(3, 1)], damping=1e-3)
    window.push([torch.ones(2), torch.tensor([torch.nan])])
    with pytest.raises(FloatingPointError, match="NaN or infinite entries"):
        window.direction()


def test_no_jitter_where_none_is_needed():
    """Escalation perturbs the matrix, so a positive definite one must be left alone."""
    window = GradientWindow(8, 50, damping=1e-8)
    for grad in draw(20, 50, dtype=torch.float32):
        window.push(grad)
        window.direction()
    assert window.gram.jitter_escalations == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_sparse_and_dense_stores_side_by_side(dtype):
    """A window over mixed stores equals a dense one: pushes, direction, solve."""
    sparse = RowSparseColumns(4, (6, 3), dtype=dtype)
    mixed = GradientWindow(4, [DenseColumns(4, 5, dtype=dtype), sparse], damping=1e-2, dtype=dtype)
    plain = GradientWindow(4, 23, damping=1e-2, dtype=dtype)
    for step, grad in enumerate(draw(9, 23, dtype=dtype)):
        rows = torch.tensor([step % 6, 5] if step % 6 != 5 else [5])
        table = torch.zeros(6, 3, dtype=dtype)
        table[rows] = grad[5:].view(6, 3)[rows]
        mixed.push([grad[:5], SparseRows(rows, table[rows])])
        plain.push(torch.cat([grad[:5], table.flatten()]))
        tolerance = TOLERANCE[dtype]
        assert relative_error(mixed.direction(), plain.direction().double()) <= tolerance
        assert relative_error(mixed.solve(grad), plain.solve(grad).double()) <= (
            1e-6 if dtype == torch.float32 else 1e-9
        )
    assert mixed.dim == 23


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_grads": 0}, "num_grads is 0"),
        ({"num_grads": 2.5}, "num_grads is 2.5"),
        ({"num_grads": True}, "num_grads is True"),
        ({"dim": 0}, "dim is 0"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"damping": -1e-6}, "damping is -1e-06"),
        ({"damping": float("nan")}, "damping is nan"),
        ({"damping": float("inf")}, "damping is inf"),
        ({"normalize": "rows"}, "normalize is 'rows'"),
        ({"dtype": torch.float16}, "float16"),
        ({"device": []}, "device is an empty list"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GradientWindow(**{"num_grads": 3, "dim": 4, "damping": 1e-3, **options})


def shard_columns(rank):
    """Ranks that hold 7 and 4 of 11 columns, beside one that holds all."""
    grads, x = draw(14, 11), draw(1, 11, seed=1)[0]
    columns = slice(0, 7) if rank == 0 else slice(7, 11)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        alone = GradientWindow(5, 11, damping=1e-2, dtype=dtype)
        shared = GradientWindow(5, 4 if rank else 7, damping=1e-2, dtype=dtype, process_group=dist.group.WORLD)
        for grad in grads:
            alone.push(grad)
            shared.push(grad[columns])
            for found, expected in (
                (shared.gram.gram_MM, alone.gram.gram_MM),
                (shared.direction(), alone.direction()[columns]),
                (shared.direction(0.9), alone.direction(0.9)[columns]),
                (shared.solve(x[columns]), alone.solve(x)[columns]),
            ):
                assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
        both = [torch.zeros(5, 5, dtype=torch.float64) for _ in range(2)]
        dist.all_gather(both, shared.gram.gram_MM)
        assert torch.equal(*both), "ranks that disagree in the last bit drift apart"


def test_columns_sharded_over_two_ranks_equal_one(tmp_path):
    run_on_ranks(shard_columns, tmp_path)
