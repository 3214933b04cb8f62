r"""References for the fast algorithms: the dense matrix, and the paper's own recursions.

Training and pruning use none of this. The dense matrix is float64. The recursions follow the paper (Frantar, Kurtic
and Alistarh, NeurIPS 2021, sections 3.1 and 3.2) in the precision of their input, so that tests and benchmarks show
what that costs.

Shape suffixes: M stored gradients, D parameters, K blocks, B block size, R rows of a page or so far, N rows at once.
"""

import torch
from torch import Tensor

from mfac_hf.ops.coefficients import lower_product, unit_lower_inverse

__all__ = [
    "PaperBlockedInverse",
    "PaperDynamicInverse",
    "PaperSwapInverse",
    "dense_fisher",
    "paper_static_solve",
]

# Bytes of vectors that the blocked recursion works on at once: 4 to 8 MiB were the fastest at m = 1024.
CACHE_BYTES = 1 << 22


def dense_fisher(grads_MD: Tensor, damping: float, divisor: int | None = None) -> Tensor:
    r""":math:`F = \lambda I + G^\top G / n` as a dense (d, d) float64 matrix; n is the number of rows unless given.

    >>> dense_fisher(torch.tensor([[1.0, 1.0]]), damping=1.0).tolist()
    [[2.0, 1.0], [1.0, 2.0]]
    """
    grads_MD = grads_MD.double()
    fisher_DD = grads_MD.T @ grads_MD / (divisor or len(grads_MD))
    fisher_DD.diagonal().add_(damping)
    return fisher_DD


def paper_static_solve(grads_MD: Tensor, x_D: Tensor, damping: float) -> Tensor:
    """`F⁻¹ x` by m Sherman-Morrison updates (section 3.1), in the dtype of the gradients: one block."""
    return PaperBlockedInverse(grads_MD, grads_MD.shape[1], damping=damping).solve(x_D)


class PaperBlockedInverse:
    r"""The paper's static algorithm (section 3.1) on blocks of consecutive parameters, in the dtype of the gradients.

    In each block, with :math:`v_i = F_{i-1}^{-1} g_i`, :math:`s_i = m + g_i^\top v_i` and :math:`F_0 = \lambda I`:
    :math:`F_i^{-1} x = F_{i-1}^{-1} x - v_i\, (v_i^\top x) / s_i`. O(d m²) to set up, O(d m) for a product or the
    diagonal, m d numbers of memory.

    Written to be fast, since speed is compared with it: many blocks at once, as the published code does, but no more
    than a processor's cache holds, and products of a row with a matrix, which are several times as fast as those of a
    matrix with a column. With ``grads_at_once`` above 1, which the published code has not, several gradients meet all
    earlier vectors in one matrix product, and then each other.

    Args:
        grads_MD: shape (m, d).
        block_size: B; the last block may be shorter.
        damping: :math:`\lambda`.
        grads_at_once: gradients that meet the earlier vectors together; the same numbers but for rounding.
        blocks_at_once: full blocks that the operations work on together; by default as `CACHE_BYTES` allow.
    """

    def __init__(
        self,
        grads_MD: Tensor,
        block_size: int,
        *,
        damping: float,
        grads_at_once: int = 1,
        blocks_at_once: int | None = None,
    ) -> None:
        self.damping = damping
        num_grads, dim = grads_MD.shape
        whole = dim // block_size * block_size
        if blocks_at_once is None:
            blocks_at_once = max(1, CACHE_BYTES // (num_grads * block_size * grads_MD.itemsize))
        widths = [block_size * blocks_at_once] * (whole // (block_size * blocks_at_once))
        widths += [width for width in (whole - sum(widths), dim - whole) if width]
        self.widths = widths
        self.factors = [
            _static_factors(
                part_MD.reshape(num_grads, -1, min(block_size, width)).transpose(0, 1).contiguous(),
                damping,
                grads_at_once,
            )
            for part_MD, width in zip(grads_MD.split(widths, dim=1), widths, strict=True)
        ]

    def solve(self, x_D: Tensor) -> Tensor:
        """`F⁻¹ x`, shape (d,)."""
        parts = []
        for x_part, (vectors_KMB, scales_KM) in zip(x_D.split(self.widths), self.factors, strict=True):
            x_K1B = x_part.reshape(len(vectors_KMB), 1, -1)
            out_K1B = x_K1B / self.damping
            _subtract(out_K1B, x_K1B, vectors_KMB, scales_KM)
            parts.append(out_K1B.flatten())
        return torch.cat(parts)

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of `F⁻¹`, shape (d,)."""
        parts = [
            (1 / self.damping - vectors_KMB.square().div_(scales_KM.unsqueeze(2)).sum(dim=1)).flatten()
            for vectors_KMB, scales_KM in self.factors
        ]
        return torch.cat(parts)


def _static_factors(grads_KMB: Tensor, damping: float, at_once: int) -> tuple[Tensor, Tensor]:
    """The vectors v (k, m, B) and scales s (k, m) of the recursion, for a batch of blocks."""
    num_grads = grads_KMB.shape[1]
    vectors_KMB, scales_KM = grads_KMB / damping, torch.empty_like(grads_KMB[:, :, 0])
    for top in range(0, num_grads, at_once):
        rows = slice(top, top + at_once)
        _subtract(vectors_KMB[:, rows], grads_KMB[:, rows], vectors_KMB[:, :top], scales_KM[:, :top])
        for i in range(top, min(top + at_once, num_grads)):
            grad_K1B, vector_K1B = grads_KMB[:, i : i + 1], vectors_KMB[:, i : i + 1]
            _subtract(vector_K1B, grad_K1B, vectors_KMB[:, top:i], scales_KM[:, top:i])
            scales_KM[:, i] = num_grads + (grad_K1B * vector_K1B).sum(dim=(1, 2))
    return vectors_KMB, scales_KM


def _subtract(out_KNB: Tensor, x_KNB: Tensor, vectors_KRB: Tensor, scales_KR: Tensor) -> None:
    """Subtract from ``out_KNB`` what these vectors contribute to `F⁻¹ x`."""
    if vectors_KRB.shape[1]:
        weights_KNR = torch.bmm(x_KNB, vectors_KRB.mT).div_(scales_KR.unsqueeze(1))
        out_KNB -= torch.bmm(weights_KNR, vectors_KRB)


class PaperSwapInverse:
    r"""The paper's static algorithm without blocks, in pages of rows, in the dtype of the gradients.

    The recursion of `PaperBlockedInverse` with one block, where only two pages are in memory: each page of gradients
    meets every earlier page of vectors, row by row, and is then completed within itself. The number of page loads
    grows with the square of the number of pages.

    Args:
        grads_MD: shape (m, d).
        damping: :math:`\lambda`.
        pages: number of pages; the last may be shorter.
    """

    def __init__(self, grads_MD: Tensor, *, damping: float, pages: int) -> None:
        self.damping = damping
        self.vectors_MD = torch.empty_like(grads_MD)
        self.scales_M = grads_MD.new_empty(len(grads_MD))
        self.rows = -(-len(grads_MD) // pages)
        for top in range(0, len(grads_MD), self.rows):
            page = slice(top, min(top + self.rows, len(grads_MD)))
            vectors_RD = grads_MD[page] / damping
            for earlier in range(0, top, self.rows):
                for i, grad_D in enumerate(grads_MD[page]):
                    self._subtract(vectors_RD[i], grad_D, slice(earlier, earlier + self.rows))
            for i, grad_D in enumerate(grads_MD[page]):
                self.vectors_MD[top + i] = vectors_RD[i]
                self._subtract(self.vectors_MD[top + i], grad_D, slice(top, top + i))
                self.scales_M[top + i] = len(grads_MD) + grad_D @ self.vectors_MD[top + i]

    def _subtract(self, out_D: Tensor, x_D: Tensor, rows: slice) -> None:
        """Subtract from ``out_D`` what the vectors of these rows contribute to `F⁻¹ x`."""
        vectors_RD = self.vectors_MD[rows]
        out_D -= ((vectors_RD @ x_D) / self.scales_M[rows]) @ vectors_RD

    def solve(self, x_D: Tensor) -> Tensor:
        """`F⁻¹ x`, shape (d,)."""
        out_D = x_D / self.damping
        for top in range(0, len(self.vectors_MD), self.rows):
            self._subtract(out_D, x_D, slice(top, top + self.rows))
        return out_D

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of `F⁻¹`, shape (d,)."""
        out_D = torch.full_like(self.vectors_MD[0], 1 / self.damping)
        for vector_D, scale in zip(self.vectors_MD, self.scales_M, strict=True):
            out_D -= vector_D.square() / scale
        return out_D


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
        device: of everything held and computed; CUDA has native kernels for the coefficients.
    """

    def __init__(
        self,
        num_grads: int,
        dim: int,
        *,
        damping: float,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.damping = damping
        self.grads_MD = torch.zeros(num_grads, dim, dtype=dtype, device=device)
        self.gram_MM = torch.zeros(num_grads, num_grads, dtype=dtype, device=device)
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
        coefficients_MM = unit_lower_inverse((factor_MM / pivots_M).contiguous()) / self.damping
        products_M = lower_product(coefficients_MM, dots_M) / pivots_M.square()
        weights_M = lower_product(coefficients_MM, products_M, transposed=True)
        return grad_D / self.damping - weights_M @ self.grads_MD
