"""The greedy trace of single weights: the native kernel against PyTorch's; brute force is in test_obs.py."""

import pytest
import torch

from mfac_hf.pruning import trace
from mfac_hf.pruning.patterns import Pattern

INF = float("inf")


def draw(blocks, size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(blocks, size, size, generator=generator, dtype=torch.float64)
    inverse = roots.mT @ roots / size + 0.1 * torch.eye(size, dtype=torch.float64)
    weights = torch.randn(blocks, size, generator=generator, dtype=torch.float64)
    keep = torch.rand(blocks, size, generator=generator) > 0.2
    if blocks > 1:
        keep[0], keep[1] = True, False
    return inverse.to(dtype), weights.to(dtype), keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 7, 16, 17, 33, 50, 64, 128])
def test_dispatched_and_pytorch_traces_agree(size, dtype):
    inverse, weights, keep = draw(5, size, dtype)
    before = inverse.clone(), weights.clone()
    expected = trace._greedy_trace(inverse.double(), weights.double(), keep)
    found = trace.trace_blocks(inverse, weights, keep, Pattern.parse("unstructured"))
    assert torch.equal(inverse, before[0]) and torch.equal(weights, before[1])
    assert found.dtype == torch.float32 and torch.equal(found.isfinite(), keep)
    # Rounding of the arithmetic times what downdating shrinks; costs are stored as float32.
    torch.testing.assert_close(found, expected, rtol=1e-3 if dtype == torch.float32 else 1e-6, atol=0)
    order = found.argsort(dim=1)
    assert bool((found.gather(1, order).diff(dim=1)[keep.sort(1, descending=True).values[:, 1:]] > 0).all())


def test_equal_costs_go_in_order_and_stay_apart():
    found = trace.trace_blocks(
        torch.eye(20)[None], torch.ones(1, 20), torch.ones(1, 20).bool(), Pattern.parse("unstructured")
    )
    assert bool((found[0].diff() > 0).all())
    torch.testing.assert_close(found, torch.full((1, 20), 0.5))


def test_threads_repeats_and_neighbours_give_the_same_bits():
    inverse, weights, keep = draw(9, 50, torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            found.append(trace.trace_blocks(inverse.clone(), weights.clone(), keep, Pattern.parse("unstructured")))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_no_blocks():
    found = trace.trace_blocks(*draw(0, 9, torch.float64), Pattern.parse("unstructured"))
    assert found.shape == (0, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operator_is_registered_soundly(dtype):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.mfac.greedy_trace.default, draw(3, 17, dtype), test_utils=tests)
