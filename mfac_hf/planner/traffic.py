r"""What a step of each rank reads, writes, computes and sends.

With R ranks, n bytes, bus bandwidth :math:`\beta` and latency :math:`\alpha`, a collective takes

- all-reduce: :math:`2 (R-1) \alpha + \tfrac{2 (R-1)}{R} n / \beta`;
- all-gather and reduce-scatter, n bytes in all: :math:`(R-1) \alpha + \tfrac{R-1}{R} n / \beta`;
- broadcast: :math:`\lceil \log_2 R \rceil \alpha + n / \beta`.

Source of the factors: "Performance reported by NCCL tests" (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.planner.holdings import Piece
from mfac_hf.planner.machine import Machine

__all__ = ["AGREED_NUMBERS", "Collective", "Work", "work_of"]

# What travels with the norm of the gradients (`mfac_hf.optim.gradients.are_finite`), in float64.
AGREED_NUMBERS = 7


class Collective(NamedTuple):
    """Collectives of one kind in a step.

    Attributes:
        what: what is sent.
        by: ``"MFAC"``, or who sends it with any optimizer: ``"DDP"`` or ``"FSDP2"``.
        operation: ``"all_reduce"``, ``"broadcast"``, ``"all_gather"`` or ``"reduce_scatter"``.
        ranks: that take part.
        payload: bytes of the whole tensors that a rank hands over in a step, the same on each.
        calls: collectives, among which the payload is divided.
    """

    what: str
    by: str
    operation: str
    ranks: int
    payload: int
    calls: int = 1

    @property
    def sent(self) -> int:
        """Bytes that a rank sends in a step, and as many that it receives, in the mean over the ranks."""
        return round(self.payload * (self.ranks - 1) / self.ranks * (2 if self.operation == "all_reduce" else 1))

    def seconds(self, machine: Machine) -> float:
        """Time of all of them."""
        hops = {"all_reduce": 2 * (self.ranks - 1), "broadcast": math.ceil(math.log2(self.ranks))}
        moved = self.payload if self.operation == "broadcast" else self.sent
        messages = self.calls * hops.get(self.operation, self.ranks - 1)
        return messages * machine.latency + moved / machine.network_bandwidth


class Work(NamedTuple):
    """What one rank computes in a step with a full window.

    Attributes:
        bytes: that its passes read and write.
        flops: of the passes over the window.
        factor_flops: of factoring the m x m matrix, float64.
        tensors: parameters that it moves.
        fresh: bytes that it allocates and gives back, without those in which it receives.
    """

    bytes: int
    flops: int
    factor_flops: int
    tensors: int
    fresh: int

    def seconds(self, machine: Machine) -> float:
        """Time of the passes, which memory bounds, of the factor, and of what a step costs beside."""
        passes = self.bytes / machine.memory_bandwidth + self.factor_flops / machine.flops
        if machine.fresh_bandwidth is not None:
            passes += self.fresh / machine.fresh_bandwidth
        return passes + machine.step_overhead + self.tensors * machine.tensor_overhead


def work_of(
    pieces: Sequence[Piece],
    options: ParameterWindowOptions,
    moved: Sequence[tuple[int, int]] | None,
    divided: int,
    fresh: int = 0,
) -> Work:
    r"""What a rank computes: with d dense numbers in its window, m gradients of b bytes a number.

    In Adam's metric a step reads the gradient for its norm and again for the window (2 x 4 d bytes), reads and writes
    the second moment (8 d), writes a row (b d) and reads the others ((m - 1) b d), reads the window for the direction
    (m b d) and the second moment (4 d), and reads and writes the parameters (8 d): :math:`d (28 + 2 m b)`. Tables
    that are stored by rows are read twice to find the rows of their gradients, and their stored rows twice.

    Args:
        pieces: what the rank's window has of the parameters.
        options: of the window.
        moved: numbers and item size of all parameters, where ranks share the window and each moves all of them by
            directions that it gets; None where a rank moves its own.
        divided: of those, numbers of parameters whose directions are put together from several ranks.
        fresh: bytes that a step allocates and gives back.
    """
    m, wide, stored = options.num_grads, options.result_dtype.itemsize, options.window_dtype.itemsize
    adam = options.metric == "adam"
    read = flops = 0
    for piece in pieces:
        if piece.touched is None:
            moment = 3 * options.moment_itemsize  # read and written, and read for the direction
            window = 2 * m * stored + (0 if adam else 2 * stored)
            read += piece.numel * (piece.grad_itemsize + moment + window)
            flops += 4 * m * piece.numel
        else:
            rows = piece.touched * piece.width
            used = min(piece.numel, m * rows)  # at most: rows that two gradients share count once
            read += 2 * piece.numel * piece.grad_itemsize + 2 * m * rows * wide + 8 * rows * wide + 4 * used * wide
            flops += 4 * m * rows
    if moved is None:
        for piece in pieces:
            read += piece.numel * 3 * piece.grad_itemsize  # the norm, and the parameter there and back
            if not adam and piece.touched is None:
                read += 2 * piece.numel * wide  # the direction, written and read
    else:
        # Own directions, written and copied side by side; all: the norm, what is put together, decay, and the move.
        dense = sum(piece.numel for piece in pieces if piece.touched is None)
        tables = sum(piece.numel for piece in pieces if piece.touched is not None)
        decayed = 2 if adam else 0
        read += wide * (3 * dense + 3 * tables + 2 * divided)
        read += sum(numel * (itemsize * (3 + decayed) + wide) for numel, itemsize in moved)
    count = len(pieces) if moved is None else len(moved)
    return Work(read, flops, m**3 // 3, count, fresh)
