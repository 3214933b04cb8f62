"""The machines that a plan is for: the speeds from which it computes seconds."""

from typing import NamedTuple

__all__ = ["MACHINES", "Machine"]


class Machine(NamedTuple):
    """What one rank has.

    Attributes:
        memory: bytes for everything that the rank holds.
        memory_bandwidth: bytes a second that passes over large arrays read and write.
        network_bandwidth: bytes a second that a rank sends while it receives as many, into new memory: the bus
            bandwidth of a large collective, as nccl-tests defines it.
        latency: seconds of a message.
        flops: float64 operations a second in factoring an m x m matrix.
        step_overhead: seconds of a step beside its arithmetic: Python and the launching of kernels.
        tensor_overhead: the same, for each parameter tensor.
        fresh_bandwidth: bytes a second at which a step gets new memory for what it allocates; None where an allocator
            keeps the memory of the last step, as on a GPU.
        joins_gradients: whether the gradients of a store are copied side by side first, as on a GPU.
    """

    memory: float
    memory_bandwidth: float
    network_bandwidth: float
    latency: float
    flops: float
    step_overhead: float = 1e-3
    tensor_overhead: float = 2e-5
    fresh_bandwidth: float | None = None
    joins_gradients: bool = True

    def check(self) -> None:
        """Raise a ValueError, with the name and the value, for a speed that cannot be."""
        for name, value in self._asdict().items():
            if name == "joins_gradients" or value is None:
                continue
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} of the machine is {value!r}; expected a finite number, at least 0")
            if (name == "flops" or name.endswith("bandwidth")) and not value > 0:
                raise ValueError(f"{name} of the machine is {value!r}; expected a number above 0")


# Assumptions, not measurements: of the peaks that the makers state, what large copies and collectives are known to
# reach. 84 % of the 3.35 TB/s of an H100's memory; 82 % of the 450 GB/s each way of its NVLink; 90 % of the 50 GB/s of
# one 400 Gb/s InfiniBand adapter a GPU. A Cholesky factorization of so small a matrix is far from any peak. Overheads
# are those of this package's steps on one core of a server.
MACHINES: dict[str, Machine] = {
    "laptop": Machine(16e9, 40e9, 4e9, 50e-6, 2e10, fresh_bandwidth=4e9, joins_gradients=False),
    "h100": Machine(80e9, 2.8e12, 370e9, 10e-6, 1e12),
    "h100-infiniband": Machine(80e9, 2.8e12, 45e9, 20e-6, 1e12),
}
