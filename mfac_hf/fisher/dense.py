"""Dense columns of the gradient window: a buffer, and passes over it, at once or in portions from host memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mfac_hf.fisher.streaming import Stream, make_lane
from mfac_hf.machine import prefer_huge_pages
from mfac_hf.ops import window

__all__ = ["DenseColumns", "widened"]

GRAM_ELEMENTS = 1 << 22  # numbers of the window widened to float64 at once: 32 MiB


class DenseColumns:
    """Columns kept as one (m, d) buffer.

    >>> columns = DenseColumns(2, 3)
    >>> columns.write(0, torch.tensor([1.0, 0.0, 2.0]))
    >>> columns.write(1, torch.tensor([0.0, 3.0, 1.0]))
    >>> columns.gram(2).tolist(), columns.combine(torch.tensor([1.0, -1.0])).tolist()
    ([[5.0, 2.0], [2.0, 10.0]], [1.0, -3.0, 1.0])

    Args:
        num_grads: rows of the window, m.
        dim: columns of this store, d.
        dtype: storage type, float32, bfloat16 or float64.
        device: of the buffer.
        buffer: an existing buffer to use in place of a new one.
        compute_device: another device, which makes the two passes over a buffer in host memory
            (`mfac_hf.fisher.streaming`); None for that of the buffer.

    Raises:
        ValueError: the buffer is in host memory, and ``compute_device`` no CUDA device.
    """

    def __init__(
        self,
        num_grads: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        buffer: Tensor | None = None,
        compute_device: torch.device | None = None,
    ) -> None:
        self.dim = dim
        # Not initialised, which would touch every page of memory: rows are written before they are read.
        self.buffer_MD = torch.empty(num_grads, dim, dtype=dtype, device=device) if buffer is None else buffer
        prefer_huge_pages(self.buffer_MD)
        self._stream: Stream | None = None
        if compute_device is not None and compute_device != self.device:
            self._stream = Stream(num_grads, self.buffer_MD.dtype, make_lane(compute_device))

    def sweep(
        self, columns: slice, count: int, run: Callable[[Tensor, slice], None], *, writes: int | None = None
    ) -> None:
        """Call ``run(portion_MC, place)`` on the computing device, with all of these columns at once or in portions.

        Args:
            columns: of the store.
            count: rows that are needed, the first ones.
            run: computes with these rows of some columns, and with the place of the columns in the store.
            writes: a row that ``run`` writes and does not read.
        """
        if self._stream is None:
            run(self.buffer_MD[:count, columns], columns)
        else:
            self._stream.sweep(self.buffer_MD[:count], columns, run, writes=writes)

    @property
    def device(self) -> torch.device:
        """Device of the buffer."""
        return self.buffer_MD.device

    @property
    def compute_device(self) -> torch.device:
        """Device of products with the stored gradients."""
        return self.device if self._stream is None else self._stream.device

    @property
    def result_dtype(self) -> torch.dtype:
        """Type of products with the stored gradients: float64 for float64 storage, else float32."""
        return torch.float64 if self.buffer_MD.dtype == torch.float64 else torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer_MD.nbytes

    def write(self, row: int, part: Tensor) -> None:
        """Store d numbers as row ``row``, rounded to the storage type."""
        self.buffer_MD[row].copy_(part)

    def clear(self, rows: slice) -> None:
        """Store zeros in these rows."""
        self.buffer_MD[rows].zero_()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The vectors of several parameters, in the order of their columns, as one."""
        return torch.cat(list(parts) or [torch.zeros(0)])

    def dots(self, row: int, count: int) -> Tensor:
        """Dot products of the stored row ``row`` with the first ``count`` rows; float64."""
        return self._row_dots(widened(self.buffer_MD[row]), count)

    def _row_dots(self, x_D: Tensor, count: int) -> Tensor:
        x_D = x_D.to(self.compute_device)
        dots: list[Tensor] = []
        self.sweep(
            slice(0, self.dim), count, lambda portion_MC, place: dots.append(window.row_dots(portion_MC, x_D[place]))
        )
        return sum(dots[1:], start=dots[0]) if dots else torch.zeros(count, dtype=torch.float64)

    def project(self, x_D: Tensor, count: int) -> Tensor:
        """Dot products of any vector with the first ``count`` rows; float64."""
        return self._row_dots(x_D, count)

    def gram(self, count: int) -> Tensor:
        """All dot products among the first ``count`` rows, (count, count); float64."""
        gram_MM = torch.zeros(count, count, dtype=torch.float64, device=self.device)
        chunk = max(1, GRAM_ELEMENTS // max(count, 1))
        for start in range(0, self.dim, chunk):
            part = self.buffer_MD[:count, start : start + chunk].double()
            gram_MM.addmm_(part, part.t())
        return gram_MM

    def select(self, positions: Tensor, count: int) -> "DenseColumns":
        """A store of the columns at these positions alone, with the first ``count`` rows filled."""
        selected = DenseColumns(
            len(self.buffer_MD),
            len(positions),
            dtype=self.buffer_MD.dtype,
            device=self.device,
            compute_device=self.compute_device,
        )
        for row in range(count):
            torch.index_select(self.buffer_MD[row], 0, positions, out=selected.buffer_MD[row])
        return selected

    def combine(self, weights_M: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Combination of the first ``len(weights_M)`` rows as a vector, (d,); in float64 where ``dtype`` says so."""
        wide = dtype == torch.float64 and self.buffer_MD.dtype != torch.float64
        weights_M = weights_M.to(self.compute_device)
        parts: list[Tensor] = []

        def run(portion_MC: Tensor, place: slice) -> None:
            x_C = torch.zeros(portion_MC.shape[1], dtype=dtype, device=portion_MC.device) if wide else None
            parts.append(window.combine(portion_MC, weights_M, x_C))

        self.sweep(slice(0, self.dim), len(weights_M), run)
        return parts[0] if len(parts) == 1 else torch.cat(parts or [torch.zeros(0)])

    combine_part = combine  # a vector is the part here


def widened(x: Tensor) -> Tensor:
    """A tensor in the precision of products: float64 as it is, any other type as float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
