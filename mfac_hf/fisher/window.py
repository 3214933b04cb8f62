r"""The dynamic algorithm: a sliding window of gradients and the inverse of its damped empirical Fisher.

With the stored gradients as rows of G (m x d), the damped empirical Fisher is :math:`F = \lambda I + G^\top G / n`. It
is never formed. Everything wanted from its inverse follows from the small matrix :math:`K = n\lambda I + G G^\top` (m
x m):

- a vector in the row span, :math:`x = G^\top w`, has :math:`F^{-1} x = n\, G^\top K^{-1} w` (push-through identity).
  The optimizer preconditions gradients that it has just stored, so its step is a plain combination of stored
  gradients: nothing is subtracted from anything, and small damping costs no digits;
- any other vector has :math:`F^{-1} x = (x - G^\top K^{-1} G x) / \lambda` (Woodbury identity).

Each step makes two passes over G: one for the new row's dot products, which also are the new row and column of the
Gram matrix, and one for the combination. K is factored in float64, by a method that never drifts
(`mfac_hf.fisher.factor`).

Source: Frantar, Kurtic and Alistarh, "Efficient Matrix-Free Approximations of Second-Order Information", NeurIPS 2021,
section 3.2 (the dynamic algorithm), whose recursion is in `mfac_hf.fisher.reference`.

Shape suffixes: M stored gradients, D parameters.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.fisher.columns import DenseColumns, RowSparseColumns
from mfac_hf.fisher.factor import CachedFactor, Factor

__all__ = ["MAX_NORM", "NORMALIZATIONS", "WINDOW_DTYPES", "GradientWindow"]

NORMALIZATIONS = ("num_grads", "count")
WINDOW_DTYPES = (torch.float32, torch.bfloat16, torch.float64)

# The square of a larger norm overflows float32, in which products are computed: an infinite Gram matrix has no factor.
MAX_NORM = 1e19


class GradientWindow:
    r"""Sliding window of m gradients with products by the inverse of their damped empirical Fisher.

    Args:
        num_grads: length of the window, m >= 1.
        dim: number of parameters, d; or the column stores to use, in order.
        damping: :math:`\lambda > 0`, in units of a squared gradient entry.
        normalize: n in :math:`F = \lambda I + G^\top G / n`: ``"num_grads"`` divides by m always, as the paper does,
            also while the window is filling; ``"count"`` divides by the gradients held so far. The same once the
            window is full.
        dtype: storage of the window: float32, bfloat16 or float64.
        device: a device, or a list of devices to split the columns over.
        process_group: ranks that each hold their own columns; dot products are summed over them, everything else is
            local.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        num_grads: int,
        dim: int | Sequence[DenseColumns | RowSparseColumns],
        *,
        damping: float,
        normalize: str = "num_grads",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | Sequence[torch.device | str] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_window_options(num_grads, damping, normalize, dtype)
        self.num_grads = num_grads
        self.damping = damping
        self.normalize = normalize
        self.process_group = process_group
        if isinstance(dim, int):
            if dim < 1:
                raise ValueError(f"dim is {dim}; a window needs at least one parameter")
            devices = [device] if device is None or isinstance(device, (str, torch.device)) else list(device)
            if not devices:
                raise ValueError("device is an empty list; name at least one device, or leave it out")
            sizes = [dim // len(devices) + (i < dim % len(devices)) for i in range(len(devices))]
            self.columns: list[DenseColumns | RowSparseColumns] = [
                DenseColumns(num_grads, size, dtype=dtype, device=where)
                for size, where in zip(sizes, devices, strict=True)
            ]
        else:
            self.columns = list(dim)
        self.pushed = 0
        self.jitter_escalations = 0
        self.gram_MM = torch.zeros(num_grads, num_grads, dtype=torch.float64, device=self.columns[0].device)
        self._cached = CachedFactor(num_grads)

    @property
    def dim(self) -> int:
        """Number of parameters (columns) held here."""
        return sum(columns.dim for columns in self.columns)

    @property
    def count(self) -> int:
        """Number of gradients held, at most ``num_grads``."""
        return min(self.pushed, self.num_grads)

    @property
    def newest(self) -> int:
        """Row that holds the newest gradient."""
        return (self.pushed - 1) % self.num_grads

    @property
    def nbytes(self) -> int:
        """Bytes that the stored gradients take here."""
        return sum(columns.nbytes for columns in self.columns)

    def push(self, grad: Tensor | Sequence[Tensor | tuple[Tensor, Tensor]]) -> None:
        """Store a gradient in place of the oldest one.

        Args:
            grad: shape (d,), or one part for each column store: a vector, or (row numbers, values) for row-sparse
                columns.

        Raises:
            ValueError: if the shape is wrong, or the norm of a whole gradient is not finite or above `MAX_NORM`; the
                window stays as it was.
        """
        if isinstance(grad, Tensor):
            if grad.shape != (self.dim,):
                raise ValueError(f"gradient of shape {tuple(grad.shape)}; this window takes ({self.dim},)")
            norm = float(torch.linalg.vector_norm(grad, dtype=torch.float64))
            if not norm <= MAX_NORM:
                raise ValueError(
                    f"the norm of the gradient is {norm}; expected a finite one up to {MAX_NORM:g}, whose square "
                    "float32 can hold. It would spoil every later step: skip it instead"
                )
            grad = grad.split([columns.dim for columns in self.columns])
        row = self.pushed % self.num_grads
        for columns, part in zip(self.columns, grad, strict=True):
            columns.write(row, part)
        self.pushed += 1
        dots_M = self._sum([columns.dots(row, self.count) for columns in self.columns])
        self.gram_MM[row, : self.count] = dots_M
        self.gram_MM[: self.count, row] = dots_M

    def clear_unwritten(self) -> None:
        """Zero the rows that hold no gradient yet: before they are saved or copied, not before they are used."""
        for columns in self.columns:
            if isinstance(columns, DenseColumns):
                columns.buffer_MD[self.count :].zero_()

    def add_columns(self, columns: DenseColumns | RowSparseColumns) -> None:
        """Append parameters that had no gradient so far: zeros in the rows already stored, which is exact."""
        if isinstance(columns, DenseColumns):
            columns.buffer_MD[: self.count].zero_()
        self.columns.append(columns)

    def direction_weights(self, grad_decay: float = 0.0) -> Tensor:
        r"""Coefficients c of the direction :math:`F^{-1} g = G^\top c` for the newest gradient g; (count,), float64.

        Args:
            grad_decay: :math:`\beta` in [0, 1): precondition the average :math:`\sum_i \beta^{age(i)} g_i / \sum_i
                \beta^{age(i)}` of the stored gradients in place of the newest alone, at no extra pass.
        """
        if self.pushed == 0:
            raise RuntimeError("the window is empty: push a gradient before asking for a direction")
        ages_M = (self.newest - torch.arange(self.count, device=self.gram_MM.device)) % self.num_grads
        target_M = torch.pow(float(grad_decay), ages_M.double())  # 0 ** 0 is 1: without decay the newest alone
        return self._divisor() * self._factor().solve(target_M / target_M.sum())

    def direction(self, grad_decay: float = 0.0) -> Tensor:
        """`F⁻¹ g` for the newest gradient g: shape (d,) on the first device, float32 (in a float64 window float64)."""
        weights_M = self.direction_weights(grad_decay)
        dtype = self.combine_dtype(weights_M)
        parts = [columns.combine(weights_M, dtype=dtype).to(columns.result_dtype) for columns in self.columns]
        return torch.cat([part.to(parts[0].device) for part in parts])

    def combine_dtype(self, weights_M: Tensor) -> torch.dtype | None:
        r"""Arithmetic that :math:`G^\top c` needs: float64 where c cancels too much for float32, else None.

        Repeated gradients get large coefficients of opposite signs. Rounding them to float32 costs about
        :math:`\epsilon \sum_i |c_i| |g_i|`, which was seen to be 90 times the result for 128 copies of one gradient
        (damping 1e-8, norm 1). The Gram matrix has all that is needed to foresee it.
        """
        gram_MM = self.gram_MM[: self.count, : self.count]
        length = (weights_M @ gram_MM @ weights_M).clamp(min=0.0).sqrt()
        rounding = torch.finfo(torch.float32).eps * (weights_M.abs() @ gram_MM.diagonal().sqrt())
        return torch.float64 if bool(rounding > 1e-3 * length) else None

    def solve(self, x_D: Tensor) -> Tensor:
        """`F⁻¹ x` for any vector, shape (d,), in the dtype and on the device of ``x_D``.

        Computed in float64 throughout, many times slower than `direction`: for other vectors the Woodbury identity
        subtracts nearly equal numbers, and the Gram matrix, right to about 1e-8, is too coarse for that. So K is
        applied through float64 passes over the window, and the factor of the Gram matrix only preconditions the
        conjugate gradients.

        Raises:
            ValueError: if the shape is wrong.
        """
        if x_D.shape != (self.dim,):
            raise ValueError(f"vector of shape {tuple(x_D.shape)}; this window takes ({self.dim},)")
        x_D64 = x_D.double()
        if self.count == 0:
            return (x_D64 / self.damping).to(x_D.dtype)
        weights_M = self._solve_exactly(self._project(x_D64))
        return ((x_D64 - self._combine(weights_M).to(x_D.device)) / self.damping).to(x_D.dtype)

    def _project(self, x_D: Tensor) -> Tensor:
        parts = x_D.split([columns.dim for columns in self.columns])
        return self._sum(
            [columns.project(part, self.count) for columns, part in zip(self.columns, parts, strict=True)]
        )

    def _combine(self, weights_M: Tensor) -> Tensor:
        """Combination of the stored gradients in float64, on the first device."""
        parts = [columns.combine(weights_M, dtype=torch.float64) for columns in self.columns]
        return torch.cat([part.to(parts[0].device) for part in parts])

    def _solve_exactly(self, rhs_M: Tensor, tolerance: float = 1e-13, iterations: int = 50) -> Tensor:
        """Solve K a = rhs by conjugate gradients.

        K is applied by passes over the window; the factor of the Gram matrix preconditions.
        """
        factor = self._factor()
        shift = self._divisor() * self.damping
        solution_M = torch.zeros_like(rhs_M)
        residual_M = rhs_M.clone()
        search_M = torch.zeros_like(rhs_M)
        previous: Tensor | float = 1.0
        for _ in range(iterations):
            if residual_M.norm() <= tolerance * rhs_M.norm():
                break
            scaled_M = factor.solve(residual_M)
            current = residual_M @ scaled_M
            search_M = scaled_M + (current / previous) * search_M
            image_M = shift * search_M + self._project(self._combine(search_M))
            step = current / (search_M @ image_M)
            solution_M += step * search_M
            residual_M -= step * image_M
            previous = current
        return solution_M

    def condition(self) -> float:
        """Condition number of K in the 2-norm. Eigenvalues that rounding made negative count as zero."""
        if self.count == 0:
            return 1.0
        values = torch.linalg.eigvalsh(self.gram_MM[: self.count, : self.count]).clamp(min=0.0)
        shift = self._divisor() * self.damping
        return float((values[-1] + shift) / (values[0] + shift))

    def _divisor(self) -> int:
        return self.num_grads if self.normalize == "num_grads" else max(self.count, 1)

    def _sum(self, dots: list[Tensor]) -> Tensor:
        total_M = torch.stack([part.to(self.gram_MM.device) for part in dots]).sum(dim=0)
        if self.process_group is not None:
            dist.all_reduce(total_M, group=self.process_group)
        return total_M

    def set_gram(self, gram_MM: Tensor) -> None:
        """Take these dot products of the gradients held, (count, count), in place of the ones from `push`."""
        self.gram_MM[: len(gram_MM), : len(gram_MM)] = gram_MM
        self._cached.clear()

    def _factor(self) -> Factor:
        """Factor of K, with the smallest jitter that makes it definite where rounding left it indefinite."""
        gram_MM = self.gram_MM[: self.count, : self.count]
        shift = self._divisor() * self.damping
        jitter = 0.0
        while True:
            factor = self._cached.factor(gram_MM, self.pushed, shift + jitter)
            if factor is not None:
                return factor
            self.jitter_escalations += 1
            smallest = torch.finfo(torch.float64).eps * (float(gram_MM.diagonal().max()) + shift + jitter)
            if not smallest < float("inf"):  # no jitter would ever do
                raise FloatingPointError(
                    "the Gram matrix has NaN or infinite entries: a gradient that has them was pushed in parts"
                )
            jitter = 10 * jitter if jitter else smallest


def check_window_options(num_grads: int, damping: float, normalize: str, dtype: torch.dtype) -> None:
    """Raise a ValueError that names the first option out of range, what was expected, and the way out."""
    if isinstance(num_grads, bool) or not isinstance(num_grads, int) or num_grads < 1:
        raise ValueError(f"num_grads is {num_grads!r}; expected a whole number of gradients, at least 1")
    if not 0.0 < damping < float("inf"):
        raise ValueError(f"damping is {damping!r}; expected a finite number above 0 (the published runs use 1e-6)")
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize is {normalize!r}; expected one of {', '.join(map(repr, NORMALIZATIONS))}")
    if dtype not in WINDOW_DTYPES:
        raise ValueError(f"window dtype is {dtype}; expected one of {', '.join(map(str, WINDOW_DTYPES))}")
