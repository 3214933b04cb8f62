r"""The static algorithm without blocks: the inverse of the full Fisher matrix from stored gradients, in column pages.

With the m gradients as rows of G (m x d), :math:`F = \lambda I + G^\top G / m` is never formed. Every result follows
from :math:`K = m\lambda I + G G^\top = L L^\top` (m x m) and from pages of columns; a pass visits each page once and
needs no other page beside it:

- :math:`F^{-1} x = (x - G^\top K^{-1} G x) / \lambda`;
- :math:`[F^{-1}]_{ii} = (1 - |L^{-1} G e_i|^2) / \lambda`;
- removing the coordinates Q and keeping S: :math:`\delta_S = G_S^\top (m\lambda I + G_S G_S^\top)^{-1} G_Q w_Q`.

So G may lie in host memory, or in a memory-mapped file, while a smaller device computes. All arithmetic is float64.
Columns are worked on in the same portions whatever the page size, so results do not depend on it, to the last bit.

Source: Frantar, Kurtic and Alistarh, "Efficient Matrix-Free Approximations of Second-Order Information", NeurIPS 2021,
section 3.1; their page-swapping recursion is in `mfac_hf.fisher.reference`.

Shape suffixes: M stored gradients, D parameters, P columns of a portion.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mfac_hf.fisher.definite import check_damping, factor_blocks

__all__ = ["FullFisher"]

# Columns that are widened to float64 and multiplied at once: 32 MiB at m = 1024.
PORTION = 4096

# Rows of the Gram matrix computed together.
STRIP = 256


class FullFisher:
    r"""Inverse of the damped empirical Fisher :math:`F = \lambda I + G^\top G / m` of all parameters together.

    >>> fisher = FullFisher(torch.tensor([[1.0, 1.0]]), damping=1.0)  # F = ((2, 1), (1, 2))
    >>> fisher.solve(torch.tensor([1.0, 0.0]))
    tensor([ 0.6667, -0.3333])
    >>> fisher.inverse_diagonal()
    tensor([0.6667, 0.6667])

    Args:
        grads_MD: the gradients, shape (m, d), float32 or float64; any tensor, also one over a memory-mapped file
            (`torch.from_file`, or `torch.from_numpy` of a `numpy.memmap`). It is not copied and must not change.
        damping: :math:`\lambda > 0`.
        page_size: columns of G that are moved to ``device`` at once, in whole portions of 4,096; all of them by
            default.
        device: does the work; that of ``grads_MD`` by default.

    Raises:
        ValueError: for a wrong shape or dtype, or an option out of range.
    """

    def __init__(
        self,
        grads_MD: Tensor,
        *,
        damping: float,
        page_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if grads_MD.ndim != 2 or grads_MD.numel() == 0:
            raise ValueError(f"gradients of shape {tuple(grads_MD.shape)}; expected (m, d) with m and d at least 1")
        if grads_MD.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"gradients are {grads_MD.dtype}; expected torch.float32 or torch.float64")
        if page_size is not None and page_size < 1:
            raise ValueError(f"page_size is {page_size}; expected at least 1 column, or None for all at once")
        self.damping = check_damping(damping)
        self.grads_MD = grads_MD.detach()
        self.device = torch.device(grads_MD.device if device is None else device)
        self.page_size = self.dim if page_size is None else -(-page_size // PORTION) * PORTION
        self._gram_MM = self._gram()
        if not bool(self._gram_MM.isfinite().all()):
            raise ValueError("a gradient has entries that are not finite: look for the NaN in the loss")
        self._factor_MM = self._factor(self._gram_MM)

    @property
    def num_grads(self) -> int:
        """Number of gradients, m."""
        return len(self.grads_MD)

    @property
    def dim(self) -> int:
        """Number of parameters, d."""
        return self.grads_MD.shape[1]

    def _portions(self, keep_D: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Columns of G in portions: (their place, (m, p) in float64 on the device), zero where not kept."""
        for start in range(0, self.dim, self.page_size):
            page_MP = self.grads_MD[:, start : start + self.page_size].to(self.device)
            for first in range(0, page_MP.shape[1], PORTION):
                place = slice(start + first, min(start + first + PORTION, self.dim))
                portion_MP = page_MP[:, first : first + PORTION].to(torch.float64, copy=True)
                if keep_D is not None:
                    portion_MP *= keep_D[place].to(self.device)
                yield place, portion_MP

    def _gram(self, keep_D: Tensor | None = None) -> Tensor:
        gram_MM = torch.zeros(self.num_grads, self.num_grads, dtype=torch.float64, device=self.device)
        # The lower half in strips: half of the products.
        strips = range(0, self.num_grads, STRIP)
        for _, portion_MP in self._portions(keep_D):
            for top in strips:
                gram_MM[top : top + STRIP, : top + STRIP].addmm_(
                    portion_MP[top : top + STRIP], portion_MP[: top + STRIP].T
                )
        return gram_MM.tril() + gram_MM.tril(-1).T

    def _factor(self, gram_MM: Tensor) -> Tensor:
        system_MM = gram_MM.clone()
        system_MM.diagonal().add_(self.num_grads * self.damping)
        return factor_blocks(system_MM.unsqueeze(0)).squeeze(0)

    def _project(self, x_D: Tensor, keep_D: Tensor | None = None) -> Tensor:
        """`G x`, float64."""
        dots_M = torch.zeros(self.num_grads, dtype=torch.float64, device=self.device)
        for place, portion_MP in self._portions(keep_D):
            dots_M += portion_MP @ x_D[place].to(portion_MP)
        return dots_M

    def _combine(self, weights_M: Tensor) -> Tensor:
        """`Gᵀ w`, float64, on the device."""
        return torch.cat([portion_MP.T @ weights_M for _, portion_MP in self._portions()])

    def inverse_diagonal(self) -> Tensor:
        r""":math:`[F^{-1}]_{ii}` for every parameter: shape (d,), in the gradients' dtype and on their device."""
        parts = []
        for _, portion_MP in self._portions():
            whitened_MP = torch.linalg.solve_triangular(self._factor_MM, portion_MP, upper=False)
            parts.append((1 - whitened_MP.square().sum(dim=0)) / self.damping)
        return torch.cat(parts).to(self.grads_MD)

    def solve(self, x_D: Tensor) -> Tensor:
        r""":math:`F^{-1} x`: shape (d,), in the gradients' dtype and on their device.

        Raises:
            ValueError: for a wrong shape.
        """
        self._check(x_D)
        weights_M = self._solve_gram(self._factor_MM, self._project(x_D))
        return ((x_D.to(self.device, torch.float64) - self._combine(weights_M)) / self.damping).to(self.grads_MD)

    def joint_update(self, weights_D: Tensor, keep_D: Tensor, new_keep_D: Tensor) -> Tensor:
        r"""Weights after removing all of Q = keep & ~new_keep at once, the exact minimum over the survivors S.

        .. math:: \delta_S = F_{SS}^{-1} F_{SQ} w_Q = G_S^\top (m\lambda I + G_S G_S^\top)^{-1} G_Q w_Q,

        by the push-through identity: three passes over the pages and no d x d matrix.

        Returns:
            Shape (d,), in the dtype and on the device of ``weights_D``; exactly zero where ``new_keep_D`` is False.

        Raises:
            ValueError: for a wrong shape.
        """
        for vector_D in (weights_D, keep_D, new_keep_D):
            self._check(vector_D)
        weights_D = weights_D.detach()
        pull_M = self._project(weights_D, keep_D & ~new_keep_D)
        change_D = self._combine(self._solve_gram(self._factor(self._gram(new_keep_D)), pull_M))
        moved_D = weights_D.double() + change_D.to(weights_D.device)
        return moved_D.masked_fill_(~new_keep_D, 0).to(weights_D.dtype)

    @staticmethod
    def _solve_gram(factor_MM: Tensor, rhs_M: Tensor) -> Tensor:
        return torch.cholesky_solve(rhs_M.unsqueeze(1), factor_MM).squeeze(1)

    def _check(self, vector_D: Tensor) -> None:
        if vector_D.shape != (self.dim,):
            raise ValueError(f"vector of shape {tuple(vector_D.shape)}; expected ({self.dim},)")
