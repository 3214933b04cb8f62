r"""Cholesky factor of the window's matrix K, most of which serves many steps.

A push replaces one row and column of :math:`K = s I + G G^\top`. So pushes are grouped into runs of `RUN`. The rows
that a run does not write are put first: their part of K and its factor stay the same throughout the run. Each step
factors only the border that the run's own rows add,

.. math::
    \begin{pmatrix} K_{SS} & K_{SR} \\ K_{RS} & K_{RR} \end{pmatrix} =
    \begin{pmatrix} L_S & \\ Y^\top & L_R \end{pmatrix} \begin{pmatrix} L_S^\top & Y \\ & L_R^\top \end{pmatrix},
    \quad Y = L_S^{-1} K_{SR}, \quad L_R L_R^\top = K_{RR} - Y^\top Y .

This is block Cholesky with the rows in another order, not an update formula, so nothing drifts. The kept part follows
from K and the number of pushes alone, so a window that was saved and loaded goes on to the bit.

Shape suffixes: M stored gradients, S rows that the current run keeps, R rows that it writes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mfac_hf.ops.blocks import cholesky

__all__ = ["RUN", "CachedFactor", "Factor"]

# Pushes in a run, which costs one factorization and RUN borders: on a CPU at m = 1024 about 30 ms, and 2 ms each.
RUN = 16


class Factor(NamedTuple):
    """Factor of K by blocks; `solve` applies the inverse."""

    stable_S: Tensor
    written_R: Tensor
    stable_SS: Tensor
    border_SR: Tensor
    written_RR: Tensor

    def solve(self, rhs_M: Tensor) -> Tensor:
        r""":math:`K^{-1}` times a vector; float64."""
        forward_S = _solve(self.stable_SS, rhs_M[self.stable_S])
        forward_R = _solve(self.written_RR, rhs_M[self.written_R] - self.border_SR.mT @ forward_S)
        solution_R = _solve(self.written_RR, forward_R, transposed=True)
        solution_M = torch.empty_like(rhs_M)
        solution_M[self.written_R] = solution_R
        solution_M[self.stable_S] = _solve(self.stable_SS, forward_S - self.border_SR @ solution_R, transposed=True)
        return solution_M


class CachedFactor:
    """Factors K at each step, and keeps the part that later steps can use.

    Args:
        num_grads: length of the window.
    """

    def __init__(self, num_grads: int) -> None:
        self.num_grads = num_grads
        self._kept: tuple[tuple[int, float], Tensor, Tensor] | None = None  # (run, shift), the rows S and L_S

    def clear(self) -> None:
        """Forget the kept part: needed after any change of the Gram matrix that is not a push."""
        self._kept = None

    def factor(self, gram_MM: Tensor, pushed: int, shift: float) -> Factor | None:
        """Factor of ``gram_MM + shift * I``, or None where that is not positive definite.

        Args:
            gram_MM: dot products of the gradients held, (count, count), float64.
            pushed: gradients ever pushed; row ``(pushed - 1) % num_grads`` is the newest.
            shift: s > 0.
        """
        count = len(gram_MM)
        start = (pushed - 1) // RUN * RUN
        written = sorted({push % self.num_grads for push in range(start, start + RUN)} & set(range(count)))
        written_R = torch.tensor(written, device=gram_MM.device)
        if self._kept is None or self._kept[0] != (start, shift):
            keep_M = torch.ones(count, dtype=torch.bool)
            keep_M[written] = False
            stable_S = keep_M.nonzero().squeeze(1).to(gram_MM.device)
            stable_SS, info = _cholesky(gram_MM[stable_S][:, stable_S], shift)
            if info:
                return None
            self._kept = (start, shift), stable_S, stable_SS
        _, stable_S, stable_SS = self._kept
        border_SR = torch.linalg.solve_triangular(stable_SS, gram_MM[stable_S[:, None], written_R], upper=False)
        complement_RR = torch.addmm(gram_MM[written_R[:, None], written_R], border_SR.mT, border_SR, alpha=-1.0)
        written_RR, info = _cholesky(complement_RR, shift)
        return None if info else Factor(stable_S, written_R, stable_SS, border_SR, written_RR)


def _cholesky(matrix: Tensor, shift: float) -> tuple[Tensor, int]:
    matrix.diagonal().add_(shift)
    factor, info = cholesky(matrix)
    return factor, int(info)


def _solve(lower: Tensor, rhs: Tensor, *, transposed: bool = False) -> Tensor:
    matrix = lower.mT if transposed else lower
    return torch.linalg.solve_triangular(matrix, rhs.unsqueeze(1), upper=transposed).squeeze(1)
