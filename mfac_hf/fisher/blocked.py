r"""The static algorithm in blocks: a block-diagonal inverse Fisher from streamed gradients.

A vector of d parameters is cut into blocks of B consecutive ones. The damped empirical Fisher of block b, with the
gradients restricted to it as rows of :math:`G_b` (m x B), is :math:`F_b = \lambda I + G_b^\top G_b / m`. Two exact
forms:

- primal (m >= B): accumulate the B x B matrix :math:`G_b^\top G_b` while gradients stream in. No gradient is kept,
  ranks add up their sums, and the damping can be chosen afterwards;
- dual (m < B): keep the gradients. With :math:`m\lambda I + G_b G_b^\top = L L^\top` and :math:`W = L^{-1} G_b`,
  :math:`F_b^{-1} = (I - W^\top W) / \lambda`.

All arithmetic is float64. On real gradients the entries of :math:`G_b^\top G_b / m` exceed :math:`\lambda` by many
orders of magnitude, and float32 sums or factors were seen to spoil the inverse completely. To save time and memory,
only panels on and below the diagonal of each block are computed and kept: the matrices are symmetric.

Source: Frantar, Kurtic and Alistarh, "Efficient Matrix-Free Approximations of Second-Order Information", NeurIPS 2021,
section 3.1, whose recursion is in `mfac_hf.fisher.reference`.

Shape suffixes: N gradients added at once, M gradients, D parameters, K blocks, B block size, T numbers of a triangle.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.fisher.definite import check_damping, dual_blocks, inverse_blocks, solve_blocks
from mfac_hf.fisher.options import MAX_NORM
from mfac_hf.ops.blocks import add_gram, blocks_of, triangle, unpack_gram

__all__ = ["BlockedFisher"]

# Single gradients are collected until there are this many: adding them one by one would read all sums each time.
PENDING_ROWS = 32

# Gradients multiplied at once.
ROWS_AT_ONCE = 512

# Bytes of the (B, B) matrices that are worked on at once: on a CPU, what a core's caches hold of them and their
# inverses.
CHUNK_BYTES = {"cpu": 1 << 21}
LARGE_CHUNK_BYTES = 1 << 24


class BlockedFisher:
    r"""Inverse of the damped block-diagonal empirical Fisher :math:`F_b = \lambda I + G_b^\top G_b / m`.

    The divisor m is the number of gradients added (over all ranks). Coordinates whose gradients are zero, such as
    those of pruned weights, decouple: their row of :math:`F_b` is :math:`\lambda` on the diagonal.

    >>> fisher = BlockedFisher(4, block_size=2, damping=0.5, num_grads=2)
    >>> fisher.add(torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 2.0]]))
    >>> fisher.matrices(0, 2).tolist()
    [[[1.5, 1.0], [1.0, 1.5]], [[0.5, 0.0], [0.0, 2.5]]]
    >>> fisher.inverse_diagonal()
    tensor([1.2000, 1.2000, 2.0000, 0.4000])

    Args:
        dim: number of parameters, d.
        block_size: B; the last block may be shorter.
        damping: :math:`\lambda > 0`; may be set at any time, also after all gradients were added.
        num_grads: gradients that will be added at most (on this rank); below ``block_size`` they are kept (dual form).
        device: holds the sums and does the work.
        dtype: type of kept gradients and of results: float32 or float64.
        process_group: ranks that each add their own gradients to the same parameters. Their sums are added up at the
            first use, after which no more gradients can be added; every rank has to use it.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        dim: int,
        *,
        block_size: int,
        damping: float,
        num_grads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        _check_sizes(dim, block_size, num_grads)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {dtype}; expected torch.float32 or torch.float64")
        self.dim = dim
        self.block_size = min(block_size, dim)
        self.num_grads = num_grads
        self.damping = damping
        self.device = torch.device("cpu" if device is None else device)
        self.dtype = dtype
        self.process_group = process_group
        self.is_dual = process_group is None and num_grads < self.block_size
        self._count = 0
        self._reduced = False
        self._pending = 0
        rows = num_grads if self.is_dual else min(PENDING_ROWS, num_grads)
        self._rows_MD = torch.empty(rows, dim, dtype=dtype, device=self.device)
        shape = (0 if self.is_dual else self.num_blocks, triangle(self.block_size))
        self._sums_KT = torch.zeros(shape, dtype=torch.float64, device=self.device)

    @staticmethod
    def nbytes(dim: int, block_size: int, num_grads: int, *, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that an object with these arguments will hold (one rank, without process group).

        Its work takes up to about 0.3 GB more, whatever the sizes, unless a single block needs more.

        Raises:
            ValueError: for a value out of range.
        """
        _check_sizes(dim, block_size, num_grads)
        block_size = min(block_size, dim)
        if num_grads < block_size:
            return num_grads * dim * dtype.itemsize
        return -(-dim // block_size) * triangle(block_size) * 8 + min(PENDING_ROWS, num_grads) * dim * dtype.itemsize

    @property
    def damping(self) -> float:
        r""":math:`\lambda`, in units of a squared gradient entry."""
        return self._damping

    @damping.setter
    def damping(self, value: float) -> None:
        self._damping = check_damping(value)

    @property
    def count(self) -> int:
        """Gradients added so far: by this rank, and once the sums are reduced by all."""
        return self._count

    @property
    def num_blocks(self) -> int:
        """Number of blocks, the last of which may be short."""
        return -(-self.dim // self.block_size)

    def add(self, grads_ND: Tensor) -> None:
        """Add one gradient of shape (d,), or several of shape (n, d).

        Raises:
            ValueError: for a wrong shape, more than ``num_grads`` gradients, or one that is not finite (or whose norm
                exceeds 1e19); nothing is added then.
            RuntimeError: if the sums of several ranks were added up already.
        """
        if grads_ND.ndim == 1:
            grads_ND = grads_ND.unsqueeze(0)
        if grads_ND.ndim != 2 or grads_ND.shape[1] != self.dim:
            raise ValueError(f"gradients of shape {tuple(grads_ND.shape)}; expected ({self.dim},) or (n, {self.dim})")
        if self._reduced:
            raise RuntimeError("the sums of all ranks were added up at the first use: add all gradients before it")
        if self.count + len(grads_ND) > self.num_grads:
            raise ValueError(
                f"{self.count} of {self.num_grads} gradients were added, and {len(grads_ND)} more do not fit: "
                "construct it with a larger num_grads"
            )
        grads_ND = grads_ND.detach().to(self.device)
        if grads_ND.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            grads_ND = grads_ND.to(torch.float32)
        if grads_ND.stride(1) != 1:
            grads_ND = grads_ND.contiguous()
        norms_N = torch.linalg.vector_norm(grads_ND, dim=1)
        if not bool((norms_N <= MAX_NORM).all()):
            raise ValueError(
                f"the norm of a gradient is {float(norms_N[~(norms_N <= MAX_NORM)][0])}; expected a finite one up to "
                f"{MAX_NORM:g}. Skip such gradients, or look for the NaN in the loss"
            )
        if self.is_dual:
            self._rows_MD[self.count : self.count + len(grads_ND)] = grads_ND
        else:
            self._add_to_sums(grads_ND)
        self._count += len(grads_ND)

    def _add_to_sums(self, grads_ND: Tensor) -> None:
        start = 0
        while start < len(grads_ND):
            left = len(grads_ND) - start
            if self._pending == 0 and left >= PENDING_ROWS:
                size = min(left, ROWS_AT_ONCE)
                self._accumulate(grads_ND[start : start + size])
            else:
                size = min(left, len(self._rows_MD) - self._pending)
                self._rows_MD[self._pending : self._pending + size] = grads_ND[start : start + size]
                self._pending += size
                if self._pending == len(self._rows_MD):
                    self._flush()
            start += size

    def _flush(self) -> None:
        if self._pending:
            self._accumulate(self._rows_MD[: self._pending])
            self._pending = 0

    def _accumulate(self, grads_ND: Tensor) -> None:
        """Add `Gᵀ G` of these gradients to the sums."""
        add_gram(self._sums_KT, grads_ND, self.block_size)

    def _finish(self) -> None:
        """Bring the sums up to date, over all ranks."""
        self._flush()
        if self.process_group is not None and not self._reduced:
            total = torch.tensor(self._count, device=self.device)
            for tensor in (self._sums_KT, total):
                dist.all_reduce(tensor, group=self.process_group)
            self._count = int(total)
            self._reduced = True
        if self._count == 0:
            raise RuntimeError("no gradient was added, so there is no Fisher matrix: call add first")

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges (first, last) of blocks whose matrices fit into a bounded workspace together."""
        at_once = max(1, CHUNK_BYTES.get(self.device.type, LARGE_CHUNK_BYTES) // (self.block_size**2 * 8))
        for first in range(0, self.num_blocks, at_once):
            yield first, min(first + at_once, self.num_blocks)

    def matrices(self, first: int, last: int, keep_KB: Tensor | None = None) -> Tensor:
        r""":math:`F_b` of blocks ``first`` to ``last``: shape (k, B, B), float64, :math:`\lambda I` beyond the end.

        Args:
            first: the first block.
            last: the one after the last block.
            keep_KB: mask of coordinates; those that are not kept get the row and the column of the identity.

        Raises:
            RuntimeError: if no gradient was added.
        """
        self._finish()
        if not self.is_dual:
            return unpack_gram(self._sums_KT[first:last], self.block_size, self.count, self.damping, keep_KB)
        grads_KMB = blocks_of(self._rows_MD[: self.count], self.block_size, first, last)
        if keep_KB is not None:
            grads_KMB *= keep_KB.unsqueeze(1)
        fisher_KBB = torch.bmm(grads_KMB.mT, grads_KMB).div_(self.count)
        diagonal_KB = fisher_KBB.diagonal(dim1=1, dim2=2)
        diagonal_KB += self.damping if keep_KB is None else torch.where(keep_KB, self.damping, 1.0)
        return fisher_KBB

    def squares(self) -> Tensor:
        r""":math:`\sum_i g_i^2` over all gradients, entry by entry: shape (d,), float64.

        Raises:
            RuntimeError: if no gradient was added.
        """
        self._finish()
        if self.is_dual:
            return self._rows_MD[: self.count].double().square().sum(dim=0)
        rows_B = torch.arange(self.block_size, device=self.device)
        return self._sums_KT[:, rows_B * (rows_B + 3) // 2].flatten()[: self.dim]

    def inverse_diagonal(self) -> Tensor:
        r""":math:`[F^{-1}]_{ii}` for every parameter: shape (d,), in the dtype of this object.

        Raises:
            RuntimeError: if no gradient was added.
            FloatingPointError: if a block is not positive definite in float64: its damping is too small.
        """
        self._finish()
        if self.is_dual:
            return dual_blocks(self._rows_MD[: self.count], self.block_size, self.damping).to(self.dtype)
        parts = []
        for first, last in self.chunks():
            inverse_KBB = inverse_blocks(self.matrices(first, last))
            parts.append(inverse_KBB.diagonal(dim1=1, dim2=2).flatten())
        return torch.cat(parts)[: self.dim].to(self.dtype)

    def solve(self, x_D: Tensor) -> Tensor:
        r""":math:`F^{-1} x`: shape (d,), in the dtype of this object.

        Raises:
            ValueError: for a wrong shape.
            RuntimeError: if no gradient was added.
            FloatingPointError: if a block is not positive definite in float64: its damping is too small.
        """
        if x_D.shape != (self.dim,):
            raise ValueError(f"vector of shape {tuple(x_D.shape)}; expected ({self.dim},)")
        self._finish()
        x_D = x_D.detach().to(self.device, torch.float64)
        if self.is_dual:
            x_D = x_D.contiguous()
            return dual_blocks(self._rows_MD[: self.count], self.block_size, self.damping, x_D).to(self.dtype)
        parts = []
        for first, last in self.chunks():
            x_KB = blocks_of(x_D.unsqueeze(0), self.block_size, first, last).squeeze(1)
            parts.append(solve_blocks(self.matrices(first, last), x_KB).flatten())
        return torch.cat(parts)[: self.dim].to(self.dtype)


def _check_sizes(dim: int, block_size: int, num_grads: int) -> None:
    for name, value in (("dim", dim), ("block_size", block_size), ("num_grads", num_grads)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected a whole number, at least 1")
