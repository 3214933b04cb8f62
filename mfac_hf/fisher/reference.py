r"""What the fast algorithms are checked against: the dense oracle, and the paper's own recursions.

None of this is used in training or pruning. The oracle is float64 and forms the matrix. The recursions follow the
paper (Frantar, Kurtic and Alistarh, NeurIPS 2021, sections 3.1 and 3.2) in the working precision of their input, so
that tests and benchmarks show what that costs.

Shape suffixes: M stored gradients, D parameters.
"""

import torch
from torch import Tensor

__all__ = ["PaperDynamicInverse", "dense_fisher", "paper_static_solve"]


def dense_fisher(grads_MD: Tensor, damping: float, divisor: int | None = None) -> Tensor:
    r""":math:`F = \lambda I + G^\top G / n` as a dense (d, d) float64 matrix; n is the number of rows unless given."""
    grads_MD = grads_MD.double()
    fisher_DD = grads_MD.T @ grads_MD / (divisor or len(grads_MD))
    fisher_DD.diagonal().add_(damping)
    return fisher_DD


def paper_static_solve(grads_MD: Tensor, x_D: Tensor, damping: float) -> Tensor:
    r"""`F⁻¹ x` by m Sherman-Morrison updates (section 3.1), in the dtype of the gradients.

    With :math:`v_i = F_{i-1}^{-1} g_i` and :math:`F_0 = \lambda I`:
    :math:`F_i^{-1} x = F_{i-1}^{-1} x - v_i\, (v_i^\top x) / (m + g_i^\top v_i)`. O(d m²) to set up, O(d m) per
    product.
    """
    num_grads = len(grads_MD)
    vectors_MD = torch.empty_like(grads_MD)
    scales_M = grads_MD.new_empty(num_grads)
    for i, grad_D in enumerate(grads_MD):
        earlier = vectors_MD[:i]
        vectors_MD[i] = grad_D / damping - ((earlier @ grad_D) / scales_M[:i]) @ earlier
        scales_M[i] = num_grads + grad_D @ vectors_MD[i]
    return x_D / damping - ((vectors_MD @ x_D) / scales_M) @ vectors_MD


class PaperDynamicInverse:
    r"""The paper's dynamic algorithm (section 3.2) in the dtype of its window.

    With :math:`M = G G^\top / \lambda + m I = L U` (no pivoting), :math:`U_{ij} = g_i^\top F_{i-1}^{-1} g_j` right of
    the diagonal and :math:`U_{ii} = m + g_i^\top F_{i-1}^{-1} g_i`; the rows of :math:`B = L^{-1} / \lambda` are the
    coefficients of
    :math:`F_{i-1}^{-1} g_i` over the stored gradients. Then :math:`F^{-1} x = x / \lambda - G^\top B^\top
    \mathrm{diag}(U)^{-1} B G x`.

    M is symmetric, so the factors are read off a Cholesky factorisation: the same numbers as LU without pivoting, also
    on a CPU.

    Args:
        num_grads: length of the window, m.
        dim: number of parameters, d.
        damping: :math:`\lambda`.
        dtype: of everything held and computed.
    """

    def __init__(self, num_grads: int, dim: int, *, damping: float, dtype: torch.dtype = torch.float32) -> None:
        self.damping = damping
        self.grads_MD = torch.zeros(num_grads, dim, dtype=dtype)
        self.gram_MM = torch.zeros(num_grads, num_grads, dtype=dtype)
        self.pushed = 0

    def step(self, grad_D: Tensor) -> Tensor:
        """Store a gradient in place of the oldest one and return `F⁻¹ g` for it; shape (d,)."""
        num_grads = len(self.grads_MD)
        row = self.pushed % num_grads
        self.pushed += 1
        self.grads_MD[row] = grad_D
        dots_M = self.grads_MD @ grad_D.to(self.grads_MD.dtype)
        self.gram_MM[row] = dots_M
        self.gram_MM[:, row] = dots_M
        system_MM = self.gram_MM / self.damping
        system_MM.diagonal().add_(num_grads)
        factor_MM, _ = torch.linalg.cholesky_ex(system_MM)
        pivots_M = factor_MM.diagonal()
        identity_MM = torch.eye(num_grads, dtype=system_MM.dtype)
        coefficients_MM = torch.linalg.solve_triangular(factor_MM / pivots_M, identity_MM, upper=False) / self.damping
        weights_M = coefficients_MM.T @ ((coefficients_MM @ dots_M) / pivots_M.square())
        return grad_D / self.damping - weights_M @ self.grads_MD
