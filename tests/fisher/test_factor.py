"""The factor of K that outlives a step is the factor of K, to rounding and to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_hf.fisher.factor import RUN, CachedFactor
from mfac_hf.fisher.window import GradientWindow


def windows(num_grads, pushes, *, normalize="num_grads", dim=None):
    """A window after each push."""
    window = GradientWindow(num_grads, dim or num_grads + 7, damping=1e-3, dtype=torch.float64, normalize=normalize)
    generator = torch.Generator().manual_seed(num_grads)
    for _ in range(pushes):
        window.push(torch.randn(window.dim, dtype=torch.float64, generator=generator))
        yield window


def system(window):
    """K and a right-hand side."""
    gram_MM = window.gram.gram_MM[: window.count, : window.count]
    divisor = window.options.num_grads if window.options.normalize == "num_grads" else window.count
    shift = divisor * window.options.damping
    rhs_M = torch.randn(window.count, dtype=torch.float64, generator=torch.Generator().manual_seed(window.gram.pushed))
    return gram_MM, shift, gram_MM + shift * torch.eye(window.count, dtype=torch.float64), rhs_M


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3 * RUN), st.integers(1, 8 * RUN), st.integers(1, RUN + 3), st.booleans())
def test_solves_what_a_whole_factorization_solves(num_grads, pushes, every, by_count):
    """Any window length, while it fills and after, asked at every step or now and then."""
    cached = CachedFactor(num_grads)
    for window in windows(num_grads, pushes, normalize="count" if by_count else "num_grads"):
        if window.gram.pushed % every == 0:
            gram_MM, shift, matrix_MM, rhs_M = system(window)
            solution_M = cached.factor(gram_MM, window.gram.pushed, shift).solve(rhs_M)
            torch.testing.assert_close(solution_M, torch.linalg.solve(matrix_MM, rhs_M), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("num_grads", [5, RUN, 2 * RUN + 3, 4 * RUN])
def test_goes_on_to_the_bit_from_nothing(num_grads):
    """A window that was loaded has no factor yet."""
    cached = CachedFactor(num_grads)
    for window in windows(num_grads, 6 * RUN):
        gram_MM, shift, _, rhs_M = system(window)
        kept = cached.factor(gram_MM, window.gram.pushed, shift).solve(rhs_M)
        anew = CachedFactor(num_grads).factor(gram_MM, window.gram.pushed, shift).solve(rhs_M)
        assert torch.equal(kept, anew)


def test_factors_most_of_the_matrix_once_a_run(monkeypatch):
    sizes = []
    cholesky_ex = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: sizes.append(len(a)) or cholesky_ex(a))
    num_grads = 4 * RUN
    for window in windows(num_grads, 6 * RUN):
        if window.gram.pushed > num_grads:
            window.gram.direction_weights()
    assert sizes == 2 * ([num_grads - RUN] + RUN * [RUN])


def test_another_shift_or_matrix_is_factored_anew():
    *_, window = windows(3 * RUN, 4 * RUN + 5)
    gram_MM, shift, matrix_MM, rhs_M = system(window)
    cached = CachedFactor(window.options.num_grads)
    cached.factor(gram_MM, window.gram.pushed, shift)
    shifted_MM = matrix_MM + shift * torch.eye(window.count, dtype=torch.float64)
    solution_M = cached.factor(gram_MM, window.gram.pushed, 2 * shift).solve(rhs_M)
    torch.testing.assert_close(solution_M, torch.linalg.solve(shifted_MM, rhs_M), rtol=1e-8, atol=1e-10)
    window.gram.direction_weights()
    window.gram.set(gram_MM / 4)  # smaller: with the kept part of the old one it has a factor, a wrong one
    *_, matrix_MM, _ = system(window)
    newest_M = torch.eye(window.count, dtype=torch.float64)[window.gram.newest]
    expected_M = window.options.num_grads * torch.linalg.solve(matrix_MM, newest_M)
    torch.testing.assert_close(window.gram.direction_weights(), expected_M, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("row", [0, RUN, -1], ids=["kept", "kept too", "written"])
def test_an_indefinite_matrix_has_no_factor(row):
    *_, window = windows(3 * RUN, 6 * RUN)
    gram_MM, shift, _, rhs_M = system(window)
    broken_MM = gram_MM.clone()
    broken_MM[row, row] = -1.0
    cached = CachedFactor(window.options.num_grads)
    assert cached.factor(broken_MM, window.gram.pushed, shift) is None
    cached.clear()
    assert cached.factor(gram_MM, window.gram.pushed, shift).solve(rhs_M).isfinite().all()
