"""Options of a pruning, and its report."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from mfac_hf.defaults import PAPER_PRUNING_DAMPING

if TYPE_CHECKING:
    from mfac_hf.pruning.masks import MaskSet

__all__ = [
    "Fisher",
    "Method",
    "PruningKeywords",
    "PruningOptions",
    "PruningReport",
    "Scope",
    "Selection",
    "Update",
    "check_fisher",
    "check_sparsity",
    "parse_damping",
]

Method = Literal["mfac", "magnitude"]
Fisher = Literal["scaled", "empirical"]
Selection = Literal["greedy", "diagonal"]
Update = Literal["joint", "sum", "none"]
Scope = Literal["global", "uniform"]

AUTO_LOSS_SAMPLES, FIRST_ORDER_LOSS_SAMPLES = 256, 1024


@dataclass(frozen=True)
class PruningOptions:
    """How to prune. The sparsity to reach is not among the options.

    The defaults stand here and nowhere else: whatever has the same option reads them as attributes of the class, such
    as ``PruningOptions.num_grads``.

    Attributes:
        method: ``"mfac"``, or ``"magnitude"`` as the baseline, which needs no gradients.
        fisher: ``"scaled"`` divides each example's gradient by the norm of its loss's gradient by the model's outputs,
            so that examples that the model gets right count as well; ``"empirical"`` takes gradients as they are, as
            the paper does. Inside a batch each example is divided by its own norm.
        fisher_floor: least number that the scaled Fisher divides by.
        num_grads: gradients of which each Fisher is the average, m.
        grad_batch_size: examples that each gradient is the mean of; 1 for per-sample gradients.
        examples_per_pass: examples that one pass through the model serves at most, where it can serve more than one
            gradient; fewer where ``memory_budget`` demands.
        block_size: B, weights of a block of the Fisher; None for one Fisher of all targets together, for which
            selection is ``"diagonal"`` and the gradients are kept in host memory.
        damping: number added to the Fisher's diagonal, in units of a squared gradient entry. It has to scale with the
            gradients: those of single examples are larger than those of batches, and scaled ones than others. None:
            for the scaled Fisher 0.03 times the mean squared entry of the gradients of each sub-step, pruned weights
            left out; 1e-5, the paper's, for the empirical one. ``"auto"`` tries several numbers in the first sub-step,
            as if that were the only one, and takes the one with the lowest loss on ``loss_samples`` held-out
            examples; later sub-steps scale it with their gradients.
        recomputations: sub-steps, with new gradients in each.
        selection: ``"greedy"`` removes one weight after the other and updates the costs of the rest; ``"diagonal"``
            takes all costs from one inverse, as the paper does.
        update: move of the surviving weights: ``"joint"`` to the exact minimum for the removed set; ``"sum"`` by the
            sum of what each removed weight alone would ask for, as the paper does; ``"none"`` leaves them as they are,
            so that the Fisher decides only which weights go.
        pattern: ``"unstructured"``, ``"2:4"`` (or another N:M), ``"block4"`` (or another length).
        scope: ``"global"`` ranks the weights of all targets together, ``"uniform"`` prunes every target alike.
        first_order: whether the survivors of each sub-step also take a step down the loss, along its mean gradient
            times the inverse Fisher, of a length that is searched on the ``loss_samples`` held-out examples
            (`mfac_hf.pruning.first_order`). Gradients are those of the next sub-step, and ``num_grads`` new ones
            after the last.
        batch_norm_samples: examples over which the statistics of batch norms are averaged anew after each sub-step,
            the same ones each time; 0 leaves them as they are.
        loss_samples: held-out examples on which the loss is measured before and after; 0 for none, which
            ``damping="auto"`` raises to 256 and ``first_order`` to 1024. They give no gradients.
        seed: seed of the choice of examples.
        pages: pieces in which the gradients go to the device where ``block_size`` is None; the result is the same.
        memory_budget: bytes for the Fisher's blocks, and as many for a pass through the model. Targets that need more
            are visited in groups, each with a pass over the same gradients; a pass that needs more serves fewer
            examples. None: half and a quarter of what is free on the model's device.

    Raises:
        ValueError: an option out of range.
    """

    method: Method = "mfac"
    fisher: Fisher = "scaled"
    fisher_floor: float = 1e-3
    num_grads: int = 64
    grad_batch_size: int = 1
    examples_per_pass: int = 32
    block_size: int | None = 128
    damping: float | Literal["auto"] | None = None
    recomputations: int = 16
    selection: Selection = "greedy"
    update: Update = "joint"
    pattern: str = "unstructured"
    scope: Scope = "global"
    first_order: bool = False
    batch_norm_samples: int = 0
    loss_samples: int = 0
    seed: int = 0
    pages: int = 1
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        for name, choices in {"method": Method, "selection": Selection, "update": Update, "scope": Scope}.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(choices))}")
        for name, least in {
            "num_grads": 1, "grad_batch_size": 1, "examples_per_pass": 1, "pages": 1, "recomputations": 1,
            "loss_samples": 0, "batch_norm_samples": 0,
        }.items():  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")
        check_fisher(self.fisher, self.fisher_floor)
        if self.damping is None and self.fisher == "empirical":
            object.__setattr__(self, "damping", PAPER_PRUNING_DAMPING)
        if self.block_size is None:
            self._check_full()
        elif not isinstance(self.block_size, int) or isinstance(self.block_size, bool) or self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size!r}; expected an integer of at least 1, or None")
        if isinstance(self.damping, str):
            if self.damping != "auto":
                raise ValueError(f"damping is {self.damping!r}; expected a positive number or 'auto'")
            if self.loss_samples == 0 and self.method == "mfac":
                object.__setattr__(self, "loss_samples", AUTO_LOSS_SAMPLES)
        elif self.damping is not None and not 0 < self.damping < float("inf"):
            raise ValueError(f"damping is {self.damping!r}; expected a positive number or 'auto'")
        if not isinstance(self.first_order, bool):
            raise ValueError(f"first_order is {self.first_order!r}; expected True or False")
        if self.first_order:
            self._check_first_order()
        if self.memory_budget is not None and self.memory_budget < 1:
            raise ValueError(f"memory_budget is {self.memory_budget}; expected a number of bytes, or None")

    def _check_full(self) -> None:
        """Refuse what the Fisher of all targets together does not offer."""
        for name, only in {"selection": "diagonal", "pattern": "unstructured", "scope": "global"}.items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; without blocks (block_size None) only {only!r} is possible"
                )
        if isinstance(self.damping, str):
            raise ValueError("damping is 'auto'; without blocks (block_size None) it has to be a number or None")

    def _check_first_order(self) -> None:
        """Refuse what a first-order step cannot go with, and hold examples out for its length."""
        for name, wrong in {"method": "magnitude", "block_size": None, "damping": "auto"}.items():
            if getattr(self, name) == wrong:
                raise ValueError(
                    f"{name} is {wrong!r}; a first-order step (first_order) needs method 'mfac', a block_size and a "
                    "damping that is a number or None"
                )
        if self.loss_samples == 0:
            object.__setattr__(self, "loss_samples", FIRST_ORDER_LOSS_SAMPLES)


class PruningKeywords(TypedDict, total=False):
    """The fields of `PruningOptions` as keyword arguments, for functions that pass them on."""

    method: Method
    fisher: Fisher
    fisher_floor: float
    num_grads: int
    grad_batch_size: int
    examples_per_pass: int
    block_size: int | None
    damping: float | Literal["auto"] | None
    recomputations: int
    selection: Selection
    update: Update
    pattern: str
    scope: Scope
    first_order: bool
    batch_norm_samples: int
    loss_samples: int
    seed: int
    pages: int
    memory_budget: int | None


@dataclass
class PruningReport:
    """What a pruning step did.

    Attributes:
        options: the `PruningOptions`, as a dictionary.
        num_weights: weights of the targets, pruned or not.
        sparsity_before: share of them that was pruned before.
        sparsity: share that is pruned now.
        sparsities: share that is pruned now, by target.
        predicted_loss_increase: what the quadratic model expects of all sub-steps together; None for magnitude.
        loss_before: loss on the held-out examples before the pruning; None if it was not measured.
        loss_after: the same after the pruning.
        num_grads: gradients taken in all sub-steps together.
        steps: of each sub-step ``sparsity``, ``predicted_loss_increase``, ``damping``, ``damping_losses`` (of all
            dampings that were tried), ``first_order`` (``length``, ``loss_before`` and ``loss_after`` of the step of
            its survivors; None without one), ``num_grads``, ``groups`` (of targets) and ``seconds``.
        seconds: wall time.
        masks: masks of the weights that are kept now.
    """

    options: dict[str, Any]
    num_weights: int
    sparsity_before: float
    sparsity: float
    sparsities: dict[str, float]
    predicted_loss_increase: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    num_grads: int = 0
    steps: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    masks: MaskSet | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The report without the masks, as plain JSON types."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "masks"}


def check_fisher(fisher: str, floor: float) -> None:
    """Raise ValueError unless there is such a Fisher, and the least number to divide by is positive."""
    if fisher not in get_args(Fisher):
        raise ValueError(f"fisher is {fisher!r}; expected one of {', '.join(get_args(Fisher))}")
    if not 0 < floor < float("inf"):  # false for NaN
        raise ValueError(
            f"fisher_floor is {floor!r}; expected a positive number, such as {PruningOptions.fisher_floor:g}"
        )


def check_sparsity(sparsity: float, current: float = 0.0) -> None:
    """Raise ValueError unless ``sparsity`` lies in [0, 1) and not below the current one."""
    if not 0 <= sparsity < 1:  # false for NaN
        raise ValueError(f"sparsity is {sparsity!r}; expected a number in [0, 1), such as 0.9 to keep a tenth")
    if sparsity < current - 1e-9:
        raise ValueError(f"sparsity {sparsity:g} is below the {current:g} that is pruned already; it only ever rises")


def parse_damping(text: str, flag: str) -> float | Literal["auto"]:
    """Read the damping from a flag of the command line; `PruningOptions` checks whether it is positive.

    Raises:
        ValueError: the text is neither a number nor ``auto``.
    """
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{flag} {text}: expected a positive number or auto") from None
