r"""The small matrix of the dynamic algorithm: K = s I + G Gᵀ, its factor, and the weights of a direction.

With the stored gradients as rows of G (m x d), the Gram matrix :math:`G G^\top` (m x m) has all that the inverse of
the damped Fisher :math:`F = \lambda I + G^\top G / n` needs to know of them. A vector in the row span,
:math:`x = G^\top w`, has :math:`F^{-1} x = n\, G^\top K^{-1} w` (push-through identity). So `GramMatrix` gives the
weights :math:`c = n K^{-1} w` of a direction, and whoever stores the gradients combines them, :math:`G^\top c`.

With *relative* damping :math:`\rho`, which has no unit, :math:`K = s I + G G^\top` with s = :math:`\rho` times the
mean squared length of the stored gradients, and the direction is made as long as the average that it preconditions:
:math:`c = K^{-1} w \, |G^\top w| / |G^\top K^{-1} w|`, both lengths from the Gram matrix.

Nothing here reads a gradient: dot products come in, weights go out.

Shape suffixes: M stored gradients.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.fisher.factor import CachedFactor, Factor
from mfac_hf.fisher.options import WindowOptions

__all__ = ["GramMatrix", "algebra_device"]

# Rows up to which a CPU is through with the small matrix before a GPU has been told what to do.
CPU_ROWS = 64


def algebra_device(num_grads: int, device: torch.device) -> torch.device:
    """Where the matrix of a window of so many gradients on ``device`` belongs: a small one on the CPU.

    A step calls dozens of operators for it, some of them for an answer that the CPU waits for.
    """
    return torch.device("cpu") if num_grads <= CPU_ROWS else device


class GramMatrix:
    r"""Gram matrix of a sliding window of gradients, with solutions of :math:`K = n\lambda I + G G^\top`.

    Three gradients (1, 0), (0, 2) and (1, 2) in a window of two: the third takes the place of the first.

    >>> gram = GramMatrix(WindowOptions(num_grads=2, damping=0.5))
    >>> for dots in ([1.0], [0.0, 4.0], [5.0, 4.0]):
    ...     gram.push([torch.tensor(dots, dtype=torch.float64)])
    >>> gram.gram_MM.tolist(), gram.newest
    ([[5.0, 4.0], [4.0, 4.0]], 0)
    >>> gram.direction_weights()  # 2 K⁻¹ (1, 0)
    tensor([ 0.7143, -0.5714], dtype=torch.float64)

    Args:
        options: num_grads, damping and normalize.
        device: of the matrix.
        process_group: ranks that each hold their own columns of G; dot products are summed over them.

    Attributes:
        gram_MM: dot products of the stored gradients, (m, m), float64; zero where no gradient is stored yet.
        pushed: gradients ever pushed.
        jitter_escalations: how often more had to be added to the diagonal to make K positive definite.
    """

    def __init__(
        self,
        options: WindowOptions,
        *,
        relative: bool = False,
        device: torch.device | str | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.options = options
        self.relative = relative
        self.process_group = process_group
        self.gram_MM = torch.zeros(options.num_grads, options.num_grads, dtype=torch.float64, device=device)
        self.pushed = 0
        self.jitter_escalations = 0
        self._cached = CachedFactor(options.num_grads)

    @property
    def count(self) -> int:
        """Gradients held, at most ``num_grads``."""
        return min(self.pushed, self.options.num_grads)

    @property
    def newest(self) -> int:
        """Row that holds the newest gradient."""
        return (self.pushed - 1) % self.options.num_grads

    @property
    def next_row(self) -> int:
        """Row that the next gradient takes: the first free one, or that of the oldest gradient."""
        return self.pushed % self.options.num_grads

    @property
    def next_count(self) -> int:
        """Gradients held after the next `push`."""
        return min(self.pushed + 1, self.options.num_grads)

    @property
    def shift(self) -> float:
        r"""What K adds to the diagonal of the Gram matrix: :math:`n\lambda`, or :math:`\rho` times its mean."""
        if self.relative:
            return self.options.damping * float(self._held.diagonal().mean())
        return self._divisor * self.options.damping

    @property
    def _held(self) -> Tensor:
        """The Gram matrix of the gradients that are held, (count, count)."""
        return self.gram_MM[: self.count, : self.count]

    @property
    def _divisor(self) -> int:
        return self.options.num_grads if self.options.normalize == "num_grads" else max(self.count, 1)

    def add_up(self, parts: list[Tensor]) -> Tensor:
        """Sum of what several stores of columns found, over the ranks too; on the device of the Gram matrix."""
        total = torch.stack([part.to(parts[0].device) for part in parts]).sum(dim=0)
        if self.process_group is not None:  # where the parts are: some backends reduce on GPUs alone
            dist.all_reduce(total, group=self.process_group)
        return total.to(self.gram_MM.device)

    def push(self, dots: list[Tensor]) -> None:
        """Take in a gradient that was stored in row `next_row`.

        Args:
            dots: its dot products with the first `next_count` rows (itself among them), (`next_count`,), float64: a
                part for each store of columns.
        """
        row, count = self.next_row, self.next_count
        dots_M = self.add_up(dots)
        self.gram_MM[row, :count] = dots_M
        self.gram_MM[:count, row] = dots_M
        self.pushed += 1

    def set(self, gram_MM: Tensor) -> None:
        """Take these dot products of the first rows, (c, c), in place of those from `push`."""
        self.gram_MM[: len(gram_MM), : len(gram_MM)] = gram_MM
        self._cached.clear()

    def restore(self, gram_MM: Tensor, pushed: int, jitter_escalations: int) -> None:
        """Go on from a matrix and counters that were saved."""
        self.set(gram_MM)
        self.pushed = pushed
        self.jitter_escalations = jitter_escalations

    def factor(self) -> Factor:
        """Factor of K, with the smallest jitter that makes it definite where rounding left it indefinite.

        Raises:
            FloatingPointError: if the Gram matrix has entries that are not finite.
        """
        gram_MM, shift = self._held, self.shift
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

    def direction_weights(self, grad_decay: float = 0.0, *, nesterov: bool = False) -> Tensor:
        r"""Weights c of the direction :math:`F^{-1} \bar g = G^\top c` for the newest gradient; (count,), float64.

        Args:
            grad_decay: :math:`\beta_1` in [0, 1): precondition the average :math:`\bar g = \sum_i \beta_1^{age(i)}
                g_i / \sum_i \beta_1^{age(i)}` of the stored gradients; 0 takes the newest alone.
            nesterov: precondition :math:`\beta_1 \bar g + (1 - \beta_1) g` instead, g the newest: the average as it
                would be after one more step with the same gradient (Dozat 2016).

        Raises:
            RuntimeError: if no gradient was pushed.
            FloatingPointError: if the Gram matrix has entries that are not finite.
        """
        if self.pushed == 0:
            raise RuntimeError("the window is empty: push a gradient before asking for a direction")
        ages_M = (self.newest - torch.arange(self.count, device=self.gram_MM.device)) % self.options.num_grads
        target_M = torch.pow(float(grad_decay), ages_M.double())  # 0 ** 0 is 1: without decay the newest alone
        target_M /= target_M.sum()
        if nesterov:
            target_M *= grad_decay
            target_M[self.newest] += 1.0 - grad_decay
        if not self.relative:
            return self._divisor * self.factor().solve(target_M)
        if not bool(self._held.diagonal().any()):
            return target_M  # all gradients are zero, and so is every combination of them
        weights_M = self.factor().solve(target_M)
        squared = torch.stack([target_M @ self._held @ target_M, weights_M @ self._held @ weights_M]).clamp(min=0.0)
        return weights_M * (squared[0] / squared[1]).sqrt() if squared[1] > 0 else target_M

    def combine_dtype(self, weights_M: Tensor) -> torch.dtype | None:
        r"""Arithmetic that :math:`G^\top c` needs: float64 where c cancels too much for float32, else None.

        Repeated gradients get large weights of opposite signs. Rounding them to float32 costs about
        :math:`\epsilon \sum_i |c_i| |g_i|`, which was seen to be 90 times the result for 128 copies of one gradient
        (damping 1e-8, norm 1). The Gram matrix has all that is needed to foresee it.
        """
        gram_MM = self._held
        length = (weights_M @ gram_MM @ weights_M).clamp(min=0.0).sqrt()
        rounding = torch.finfo(torch.float32).eps * (weights_M.abs() @ gram_MM.diagonal().sqrt())
        return torch.float64 if bool(rounding > 1e-3 * length) else None

    def condition(self) -> float:
        """Condition number of K in the 2-norm. Eigenvalues that rounding made negative count as zero."""
        if self.count == 0:
            return 1.0
        values = torch.linalg.eigvalsh(self._held).clamp(min=0.0)
        return float((values[-1] + self.shift) / (values[0] + self.shift))
