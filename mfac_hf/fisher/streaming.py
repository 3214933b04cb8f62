"""Passes over a window in host memory that another device computes: columns come to it in portions.

Two pinned buffers in host memory and two on the device take turns. While the device computes with one portion, the
next is on its way on a stream of its own, and the processor copies the one after it into the other pinned buffer. So a
pass takes as long as the slowest of the three, and the window itself is ordinary memory: pinning all of it would round
it up to a power of two.

What waits for what is in `Stream.sweep`, and nothing but that: a `Lane` carries out transfers and waits. `CudaLane`
does so with streams and events; the tests have one that carries them out in every order that the waits allow.

Shape suffixes: M stored gradients, C columns of a portion.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CudaLane", "Lane", "Stream", "make_lane"]

# Of each of the four buffers. Rows of a portion are then long enough for a transfer at full speed.
PORTION_BYTES = 32 << 20
# Columns of a portion are a multiple of this: a float32 dot product is added up in float64 over runs of so many.
RUN = 2048


class Lane(Protocol):
    """Transfers beside a device that computes. Marks stand for all that was asked for before them."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory that transfers may read and write by themselves."""

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the device that transfers use, too."""

    def transfer(self, target: Tensor, source: Tensor) -> None:
        """Copy between pinned memory and the device, after the transfers before it."""

    def compute(self, run: Callable[[], None]) -> None:
        """Compute on the device, after what was computed before it."""

    def transferred(self) -> Any:
        """A mark: the transfers so far."""

    def computed(self) -> Any:
        """A mark: what was computed so far."""

    def transfer_after(self, mark: Any) -> None:
        """Later transfers wait for a mark of computing."""

    def compute_after(self, mark: Any) -> None:
        """Later computing waits for a mark of transfers."""

    def wait(self, mark: Any) -> None:
        """This process waits for a mark."""

    def settle(self) -> None:
        """What was computed may be used by what the device does next."""


class CudaLane:
    """Transfers on a stream of their own, beside the current stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side: Any = torch.cuda.Stream(device)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Page-locked memory."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that the allocator does not give away while the side stream uses it."""
        buffer = torch.empty(shape, dtype=dtype, device=self.device)
        buffer.record_stream(self.side)
        return buffer

    def transfer(self, target: Tensor, source: Tensor) -> None:
        """Copy on the side stream."""
        with torch.cuda.stream(self.side):
            target.copy_(source, non_blocking=True)

    def compute(self, run: Callable[[], None]) -> None:
        """Launch on the current stream."""
        run()

    def transferred(self) -> Any:
        """An event of the side stream."""
        return self.side.record_event()

    def computed(self) -> Any:
        """An event of the current stream."""
        return torch.cuda.current_stream(self.device).record_event()

    def transfer_after(self, mark: Any) -> None:
        """The side stream waits."""
        self.side.wait_event(mark)

    def compute_after(self, mark: Any) -> None:
        """The current stream waits."""
        torch.cuda.current_stream(self.device).wait_event(mark)

    def wait(self, mark: Any) -> None:
        """The processor waits."""
        mark.synchronize()

    def settle(self) -> None:
        """Nothing to do: what comes next is on the same stream."""


def make_lane(device: torch.device) -> Lane:
    """The lane of a device.

    Raises:
        ValueError: it is no CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(
            f"a window in host memory is streamed to CUDA devices, not to {device}: leave window_device='host' out"
        )
    return CudaLane(device)


class Stream:
    """Portions of a window's columns, one after the other on a device, with the next on its way.

    Args:
        num_grads: rows of the window, m.
        dtype: of the window.
        lane: that carries out transfers.

    Attributes:
        columns: of a portion.
        device: that computes.
    """

    def __init__(self, num_grads: int, dtype: torch.dtype, lane: Lane) -> None:
        self.lane = lane
        self.columns = max(1, PORTION_BYTES // (num_grads * dtype.itemsize * RUN)) * RUN
        size = (num_grads * self.columns,)
        self._pinned = [lane.pinned(size, dtype) for _ in range(2)]
        self._device = [lane.on_device(size, dtype) for _ in range(2)]
        self.device = self._device[0].device
        self._rows = [lane.pinned((self.columns,), dtype) for _ in range(2)]
        self._filled: list[Any] = [None, None]  # marks of the transfers that last read each pinned buffer

    def sweep(
        self,
        window_MD: Tensor,
        columns: slice,
        run: Callable[[Tensor, slice], None],
        *,
        writes: int | None = None,
    ) -> None:
        """Call ``run(portion_MC, place)`` for all portions of some columns, in order.

        Args:
            window_MD: rows of the window that are read, in host memory.
            columns: of the window.
            run: computes with a portion, which lies on the device, and with the place of its columns in the window.
            writes: a row that ``run`` writes and does not read, which goes back into the window.
        """
        lane, count = self.lane, len(window_MD)
        places = [
            slice(start, min(start + self.columns, columns.stop))
            for start in range(columns.start, columns.stop, self.columns)
        ]
        returned: list[tuple[Any, slice] | None] = [None, None]  # marks of rows that come back, and where they belong

        def portion(buffer_N: Tensor, place: slice) -> Tensor:
            width = place.stop - place.start
            return buffer_N[: count * width].view(count, width)

        def fetch(number: int) -> None:
            slot, place = number % 2, places[number]
            if self._filled[slot] is not None:
                lane.wait(self._filled[slot])
            pinned_MC = portion(self._pinned[slot], place)
            pinned_MC.copy_(window_MD[:, place])
            lane.transfer(portion(self._device[slot], place), pinned_MC)
            self._filled[slot] = lane.transferred()

        def take_back(slot: int) -> None:
            if (row := returned[slot]) is not None:
                mark, place = row
                lane.wait(mark)
                window_MD[writes, place].copy_(self._rows[slot][: place.stop - place.start])
                returned[slot] = None

        lane.transfer_after(lane.computed())  # with the device's buffers, in the sweep before
        if places:
            fetch(0)
        for number, place in enumerate(places):
            slot = number % 2
            portion_MC = portion(self._device[slot], place)
            lane.compute_after(self._filled[slot])
            lane.compute(partial(run, portion_MC, place))
            done = lane.computed()
            if number + 1 < len(places):
                fetch(number + 1)  # before the transfers wait for what is computed now: both at once
            lane.transfer_after(done)
            if writes is not None:
                take_back(slot)
                lane.transfer(self._rows[slot][: place.stop - place.start], portion_MC[writes])
                returned[slot] = lane.transferred(), place
        for slot in range(2):
            take_back(slot)
        lane.settle()
