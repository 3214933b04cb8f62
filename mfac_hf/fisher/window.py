r"""The dynamic algorithm: a sliding window of gradients and the inverse of its damped empirical Fisher.

With the stored gradients as rows of G (m x d), the damped empirical Fisher is :math:`F = \lambda I + G^\top G / n`. It
is never formed. Everything wanted from its inverse follows from the small matrix :math:`K = n\lambda I + G G^\top` (m
x m) of `mfac_hf.fisher.gram`:

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

from mfac_hf.fisher.columns import ColumnStore, DenseColumns, Part
from mfac_hf.fisher.gram import GramMatrix
from mfac_hf.fisher.options import MAX_NORM, WindowOptions

__all__ = ["GradientWindow"]


class GradientWindow:
    r"""Sliding window of m gradients with products by the inverse of their damped empirical Fisher.

    >>> window = GradientWindow(2, 3, damping=0.5)
    >>> window.push(torch.tensor([2.0, 0.0, 0.0]))
    >>> window.direction()  # F = diag(0.5 + 2² / 2, 0.5, 0.5)
    tensor([0.8000, 0.0000, 0.0000])
    >>> window.solve(torch.ones(3))
    tensor([0.4000, 2.0000, 2.0000])

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

    Attributes:
        columns: the stores of the gradients, in the order of the parameters.
        gram: the Gram matrix of the stored gradients, a `GramMatrix`.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        num_grads: int,
        dim: int | Sequence[ColumnStore],
        *,
        damping: float,
        normalize: str = "num_grads",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | Sequence[torch.device | str] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        options = WindowOptions(num_grads=num_grads, damping=damping, normalize=normalize, window_dtype=dtype)
        self.columns = _dense_columns(options, dim, device) if isinstance(dim, int) else list(dim)
        self.gram = GramMatrix(options, device=self.columns[0].device, process_group=process_group)

    @property
    def options(self) -> WindowOptions:
        """num_grads, damping, normalize and window_dtype."""
        return self.gram.options

    @property
    def dim(self) -> int:
        """Number of parameters (columns) held here."""
        return sum(columns.dim for columns in self.columns)

    @property
    def count(self) -> int:
        """Number of gradients held, at most ``num_grads``."""
        return self.gram.count

    @property
    def nbytes(self) -> int:
        """Bytes that the stored gradients take here."""
        return sum(columns.nbytes for columns in self.columns)

    def push(self, grad: Tensor | Sequence[Part]) -> None:
        """Store a gradient in place of the oldest one.

        Args:
            grad: shape (d,), or one part for each column store: a vector, or `SparseRows` for row-sparse columns.

        Raises:
            ValueError: if the shape is wrong, or the norm of a whole gradient is not finite or above `MAX_NORM`; the
                window stays as it was.
        """
        parts = self._parts(grad) if isinstance(grad, Tensor) else grad
        row = self.gram.next_row
        for columns, part in zip(self.columns, parts, strict=True):
            columns.write(row, part)
        self.gram.push([columns.dots(row, self.gram.next_count) for columns in self.columns])

    def _parts(self, grad: Tensor) -> Sequence[Tensor]:
        """A whole gradient, checked, cut into a part for each column store."""
        if grad.shape != (self.dim,):
            raise ValueError(f"gradient of shape {tuple(grad.shape)}; this window takes ({self.dim},)")
        norm = float(torch.linalg.vector_norm(grad, dtype=torch.float64))
        if not norm <= MAX_NORM:
            raise ValueError(
                f"the norm of the gradient is {norm}; expected a finite one up to {MAX_NORM:g}, whose square "
                "float32 can hold. It would spoil every later step: skip it instead"
            )
        return grad.split([columns.dim for columns in self.columns])

    def direction(self, grad_decay: float = 0.0) -> Tensor:
        r"""`F⁻¹ g` for the newest gradient g: shape (d,) on the first device, float32 (in a float64 window float64).

        Args:
            grad_decay: :math:`\beta_1` in [0, 1): the decay of an average of the stored gradients that takes the
                place of g (`GramMatrix.direction_weights`), at no extra pass.

        Raises:
            RuntimeError: if the window is empty.
        """
        weights_M = self.gram.direction_weights(grad_decay)
        dtype = self.gram.combine_dtype(weights_M)
        parts = [columns.combine(weights_M, dtype=dtype).to(columns.result_dtype) for columns in self.columns]
        return torch.cat([part.to(parts[0].device) for part in parts])

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
        damping = self.options.damping
        if self.count == 0:
            return (x_D64 / damping).to(x_D.dtype)
        weights_M = self._solve_exactly(self._project(x_D64))
        return ((x_D64 - self._combine(weights_M).to(x_D.device)) / damping).to(x_D.dtype)

    def _project(self, x_D: Tensor) -> Tensor:
        """Dot products of a vector with the stored gradients, `G x`, float64."""
        parts = x_D.split([columns.dim for columns in self.columns])
        return self.gram.add_up(
            [columns.project(part, self.count) for columns, part in zip(self.columns, parts, strict=True)]
        )

    def _combine(self, weights_M: Tensor) -> Tensor:
        """Combination of the stored gradients, `Gᵀ w`, in float64 on the first device."""
        parts = [columns.combine(weights_M, dtype=torch.float64) for columns in self.columns]
        return torch.cat([part.to(parts[0].device) for part in parts])

    def _solve_exactly(self, rhs_M: Tensor, tolerance: float = 1e-13, iterations: int = 50) -> Tensor:
        """Solve K a = rhs by conjugate gradients.

        K is applied by passes over the window; the factor of the Gram matrix preconditions.
        """
        factor = self.gram.factor()
        shift = self.gram.shift
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
        """Condition number of K in the 2-norm (`GramMatrix.condition`)."""
        return self.gram.condition()


def _dense_columns(
    options: WindowOptions, dim: int, device: torch.device | str | Sequence[torch.device | str] | None
) -> list[ColumnStore]:
    """Dense stores for d columns, dealt out evenly to the devices."""
    if dim < 1:
        raise ValueError(f"dim is {dim}; a window needs at least one parameter")
    devices = [device] if device is None or isinstance(device, (str, torch.device)) else list(device)
    if not devices:
        raise ValueError("device is an empty list; name at least one device, or leave it out")
    sizes = [dim // len(devices) + (i < dim % len(devices)) for i in range(len(devices))]
    return [
        DenseColumns(options.num_grads, size, dtype=options.window_dtype, device=where)
        for size, where in zip(sizes, devices, strict=True)
    ]
