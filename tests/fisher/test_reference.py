"""The paper's two recursions against the dense matrix, and the dense matrix against its definition."""

import pytest
import torch

from mfac_hf.fisher.reference import (
    PaperBlockedInverse,
    PaperDynamicInverse,
    PaperSwapInverse,
    dense_fisher,
    paper_static_solve,
)
from tests.helpers.tensors import draw, relative_error


def test_dense_fisher_is_the_definition():
    grads = draw(3, 4)
    expected = 0.1 * torch.eye(4, dtype=torch.float64)
    for grad in grads:
        expected += torch.outer(grad, grad) / 3
    torch.testing.assert_close(dense_fisher(grads.float(), 0.1), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(dense_fisher(grads, 0.1), expected)
    by_five = 3 / 5 * (expected - 0.1 * torch.eye(4)) + 0.1 * torch.eye(4)
    torch.testing.assert_close(dense_fisher(grads, 0.1, divisor=5), by_five)


@pytest.mark.parametrize(("m", "d"), [(1, 1), (1, 7), (5, 7), (12, 7), (33, 40)])
@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-5])
def test_static_recursion(m, d, damping):
    grads, x = draw(m, d), draw(1, d, seed=1)[0]
    exact = torch.linalg.solve(dense_fisher(grads, damping), x)
    assert relative_error(paper_static_solve(grads, x, damping), exact) <= 1e-9


@pytest.mark.parametrize("block_size", [1, 3, 5, 16, 20])
@pytest.mark.parametrize("blocks_at_once", [1, 2, None])
@pytest.mark.parametrize("grads_at_once", [1, 3, 7, 9])
def test_blocked_recursion(block_size, blocks_at_once, grads_at_once):
    grads, x = draw(7, 16), draw(1, 16, seed=1)[0]
    blocks = [torch.linalg.inv(dense_fisher(part, 1e-3)) for part in grads.split(block_size, dim=1)]
    inverse = torch.block_diag(*blocks)
    before = grads.clone()
    paper = PaperBlockedInverse(
        grads, block_size, damping=1e-3, grads_at_once=grads_at_once, blocks_at_once=blocks_at_once
    )
    assert torch.equal(grads, before)
    assert relative_error(paper.solve(x), inverse @ x) <= 1e-9
    assert relative_error(paper.inverse_diagonal(), inverse.diagonal()) <= 1e-9


@pytest.mark.parametrize(("m", "pages"), [(1, 1), (7, 1), (7, 2), (8, 4), (7, 7), (7, 9)])
def test_swap_recursion(m, pages):
    grads, x = draw(m, 12), draw(1, 12, seed=1)[0]
    inverse = torch.linalg.inv(dense_fisher(grads, 1e-3))
    before = grads.clone()
    paper = PaperSwapInverse(grads, damping=1e-3, pages=pages)
    assert relative_error(paper.solve(x), inverse @ x) <= 1e-9
    assert relative_error(paper.inverse_diagonal(), inverse.diagonal()) <= 1e-9
    assert torch.equal(grads, before)


@pytest.mark.parametrize(("m", "d"), [(1, 1), (1, 7), (5, 7), (12, 7), (33, 40)])
@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-4])
def test_dynamic_recursion_through_a_wrap_of_the_ring(m, d, damping):
    """Every step, from the empty window (zero rows, divided by m) until each row was replaced twice."""
    paper = PaperDynamicInverse(m, d, damping=damping, dtype=torch.float64)
    pushed = draw(2 * m + 3, d)
    for step, grad in enumerate(pushed, start=1):
        exact = torch.linalg.solve(dense_fisher(pushed[max(0, step - m) : step], damping, divisor=m), grad)
        assert relative_error(paper.step(grad), exact) <= 1e-8


def test_recursions_work_in_the_precision_of_their_input():
    """They show what float32 costs, so they must not widen in silence."""
    grads = draw(6, 9)
    assert paper_static_solve(grads.float(), grads[0].float(), 1e-2).dtype == torch.float32
    assert PaperBlockedInverse(grads.float(), 4, damping=1e-2).inverse_diagonal().dtype == torch.float32
    assert PaperSwapInverse(grads.float(), damping=1e-2, pages=2).inverse_diagonal().dtype == torch.float32
    paper = PaperDynamicInverse(6, 9, damping=1e-2)
    assert paper.step(grads[0].float()).dtype == torch.float32
    assert paper.gram_MM.dtype == torch.float32
