r"""Pruning to a sparsity: gradients, Fisher, selection and update, repeated in sub-steps.

The way from sparsity :math:`s_0` to s is split into k sub-steps that are geometric in the density, as in the paper's
code:

.. math:: s_j = 1 - (1 - s_0) \left(\frac{1 - s}{1 - s_0}\right)^{j/k}

Each sub-step collects new gradients of the weights that are left, removes the cheapest weights and moves the others to
make up for them. Where the options ask for it, batch norms are averaged anew after that, and before the next sub-step
removes weights the survivors take a first-order step with its gradients; after the last sub-step they take one more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from mfac_hf.optim.unwrap import unwrap_model
from mfac_hf.pruning.agreement import follow_first_rank, of_first_rank
from mfac_hf.pruning.batch_norm import check_batch_norms
from mfac_hf.pruning.blocked_step import first_order_step, magnitude_step, mfac_step
from mfac_hf.pruning.damping import Dampings, best_proposal
from mfac_hf.pruning.experts import whole_experts
from mfac_hf.pruning.first_order import LengthSearch
from mfac_hf.pruning.full_step import full_step
from mfac_hf.pruning.gradient_source import GradientSet, GradientSource
from mfac_hf.pruning.groups import plan_groups
from mfac_hf.pruning.layout import Layout
from mfac_hf.pruning.masks import MaskSet, shortened
from mfac_hf.pruning.options import PruningOptions, PruningReport, check_sparsity
from mfac_hf.pruning.patterns import Pattern
from mfac_hf.pruning.proposal import Level, Proposal, write_weights

__all__ = ["check_targets", "prune_to", "substep_seed", "substep_sparsity"]

logger = logging.getLogger(__name__)


def prune_to(
    model: nn.Module,
    masks: MaskSet,
    source: GradientSource | None,
    sparsity: float,
    options: PruningOptions,
    *,
    progress: bool = True,
    process_group: dist.ProcessGroup | None = None,
) -> PruningReport:
    """Prune a model in place from the sparsity of its masks to a higher one.

    An exception, and an interruption by the keyboard too, leaves weights and masks as they were.

    Args:
        model: the model.
        masks: masks of its targets; they are updated.
        source: source of the gradients; None will do for magnitude pruning without ``loss_samples``.
        sparsity: share of the weights under the masks to be zero (with scope ``"uniform"`` in each matrix).
        options: options of the pruning.
        progress: whether to show a progress bar.
        process_group: ranks that prune copies of the same model; all must call this, and the first one decides.

    Returns:
        The report of what was done.

    Raises:
        ValueError: masks of another model, a sparsity that falls or is out of reach, too few examples, a pattern that
            does not fit, a loss that is not finite.
        MemoryError: the Fisher of a single target does not fit.
        FloatingPointError: the damping is too small for the Fisher to be inverted in float64.
    """
    started = time.perf_counter()
    model = unwrap_model(model)
    parameters = masks.parameters(model)
    _check(model, masks, source, sparsity, options)
    groups = _groups(parameters, source, options, process_group)
    before, new = masks.sparsity, masks.copy()
    with _all_or_nothing([*parameters.values(), *model.buffers()]), torch.no_grad():
        loss_before = _loss(source, model, options)
        steps = _Substeps(model, parameters, source, options, groups, progress, process_group).run(new, sparsity)
        loss_after = _loss(source, model, options)
    masks.update(new)
    _name_whole_experts(model, masks)
    return PruningReport(
        options=asdict(options),
        num_weights=masks.numel,
        sparsity_before=before,
        sparsity=masks.sparsity,
        sparsities=masks.sparsities(),
        predicted_loss_increase=sum(step["predicted_loss_increase"] for step in steps) if groups else None,
        loss_before=loss_before,
        loss_after=loss_after,
        num_grads=sum(step["num_grads"] for step in steps),
        steps=steps,
        seconds=time.perf_counter() - started,
        masks=masks,
    )


def substep_sparsity(start: float, end: float, step: int, steps: int) -> float:
    """Return the sparsity after sub-step ``step`` of ``steps``, geometric in the density."""
    return 1 - (1 - start) * ((1 - end) / (1 - start)) ** (step / steps)


def substep_seed(seed: int, step: int) -> int:
    """Return the seed of the gradients of a sub-step, counted from 1, so that each draws other examples."""
    return seed * 10_007 + step


def check_targets(model: nn.Module, masks: MaskSet, sparsity: float, options: PruningOptions) -> None:
    """Refuse a sparsity that the masks or the pattern do not allow, a pattern that does not fit, or several devices.

    Raises:
        ValueError: it names the value and the way out; or the masks belong to another model.
    """
    parameters = masks.parameters(model)
    if len(devices := {str(parameter.device) for parameter in parameters.values()}) > 1:
        raise ValueError(
            f"the targets lie on several devices ({', '.join(sorted(devices))}), and costs are compared on one: load "
            "the model onto one device, or prune targets of one device at a time"
        )
    current = masks.sparsities().values() if options.scope == "uniform" else [masks.sparsity]
    check_sparsity(sparsity, max(current))
    pattern = Pattern.parse(options.pattern)
    if sparsity > pattern.max_sparsity:
        raise ValueError(
            f"sparsity is {sparsity:g}; the pattern {pattern.name!r} allows at most {pattern.max_sparsity:g}"
        )
    layout = Layout.of(model, parameters)
    for name, parameter in parameters.items():
        block_size = options.block_size if options.method == "mfac" else None
        pattern.check(name, layout.matrix(name, parameter), layout.matrix(name, masks[name]), block_size)


@dataclass(frozen=True)
class _Substeps:
    """The sub-steps of one pruning, and what they have in common."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    source: GradientSource | None
    options: PruningOptions
    groups: list[list[str]]
    progress: bool
    process_group: dist.ProcessGroup | None

    def run(self, masks: MaskSet, sparsity: float) -> list[dict[str, Any]]:
        """Prune model and masks to a sparsity; return ``PruningReport.steps``."""
        records: list[dict[str, Any]] = []
        search = LengthSearch() if self.options.first_order else None
        levels, dampings = list(_levels(masks, sparsity, self.options)), Dampings.of_options(self.options)
        for step, level in enumerate(levels, 1):
            begun = time.perf_counter()
            # Several dampings are judged where they differ most: as if these gradients had to do for all sub-steps.
            asked = [level] if len(dampings.values) == 1 or level == levels[-1] else [level, levels[-1]]
            proposals = self.propose(step, masks, asked, dampings, search if records else None)
            chosen, losses = best_proposal(self.model, self.parameters, proposals, self.source)
            dampings = dampings.after(chosen)
            follow_first_rank(chosen.weights, chosen.keep, self.process_group)
            write_weights(self.parameters, chosen.weights)
            masks.update({name: keep.view_as(masks[name]) for name, keep in chosen.keep.items()})
            self.average_batch_norms()
            record: dict[str, Any] = {
                "sparsity": masks.sparsity,
                "predicted_loss_increase": chosen.predicted_loss_increase,
                "damping": chosen.damping,
                "damping_losses": losses,
                "num_grads": self.options.num_grads if self.groups else 0,
                "groups": len(self.groups),
                "seconds": time.perf_counter() - begun,
            }
            records.append(record)
            logger.info("pruned to %.4f in sub-step %d", masks.sparsity, step)
        if search is not None and records:
            self.descend(masks, search, records)
        for number, record in enumerate(records):
            record["first_order"] = search.steps[number] if search else None
        return records

    def average_batch_norms(self) -> None:
        """Average the batch norms anew, over the same examples each time, if the options ask for it."""
        if count := self.options.batch_norm_samples:
            assert self.source is not None  # _check
            self.source.average_batch_norms(self.model, count, substep_seed(self.options.seed, 0))

    def descend(self, masks: MaskSet, search: LengthSearch, records: list[dict[str, Any]]) -> None:
        """Take the first-order step after the last sub-step, whose record gets its gradients and its time."""
        begun, options, many = time.perf_counter(), self.options, len(self.groups)
        dampings, seed = Dampings.of_options(options), substep_seed(options.seed, len(records) + 1)
        assert self.source is not None  # _check
        with self._bar("first-order step", many + (dampings.relative and many > 1)) as bar:
            gradients = GradientSet(self.source, self.model, options.num_grads, seed, bar.update)
            asked = (self.parameters, masks, options, gradients)
            layout = Layout.of(self.model, self.parameters)
            first_order_step(*asked, groups=self.groups, dampings=dampings, layout=layout, search=search)
        weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
        follow_first_rank(weights, {name: keep for name, keep in masks.items()}, self.process_group)
        self.average_batch_norms()
        records[-1]["num_grads"] += options.num_grads
        records[-1]["seconds"] += time.perf_counter() - begun

    def _bar(self, text: str, passes: int) -> tqdm[Any]:
        total = passes * self.options.num_grads
        return tqdm(desc=text, total=total, unit="gradient", disable=not self.progress)

    def propose(
        self,
        step: int,
        masks: Mapping[str, Tensor],
        levels: Sequence[Level],
        dampings: Dampings,
        search: LengthSearch | None,
    ) -> list[Proposal]:
        """Return new weights and masks for each damping at each of these levels.

        The model does not change, unless a search of the length of a first-order step is given: it takes that step.
        """
        options = self.options
        layout = Layout.of(self.model, self.parameters)
        if options.method == "magnitude":
            return magnitude_step(self.parameters, masks, levels, options, layout)
        assert self.source is not None  # _check
        many = len(self.groups) if len(self.groups) > 1 else 0
        passes = 2 * many + dampings.relative if many else 1
        passes += many + dampings.relative if many and search else 0
        with self._bar(f"pruning {step}/{options.recomputations}", passes) as bar:
            seed = substep_seed(options.seed, step)
            gradients = GradientSet(self.source, self.model, options.num_grads, seed, bar.update)
            if options.block_size is None:
                (level,) = levels  # PruningOptions: there is one damping
                return [full_step(self.parameters, masks, level, options, gradients)]
            return mfac_step(
                *(self.parameters, masks, levels, options, gradients),
                groups=self.groups,
                dampings=dampings,
                layout=layout,
                search=search,
            )


def _check(
    model: nn.Module,
    masks: MaskSet,
    source: GradientSource | None,
    sparsity: float,
    options: PruningOptions,
) -> None:
    """Refuse what can be refused before work begins."""
    check_targets(model, masks, sparsity, options)
    check_batch_norms(model, options.batch_norm_samples)
    if source is None:
        if options.method == "mfac":
            raise ValueError("method 'mfac' needs gradients: pass a data loader (or method='magnitude')")
        for name in ("loss_samples", "batch_norm_samples"):
            if count := getattr(options, name):
                raise ValueError(f"{name} is {count}, and there is no data loader to take them from")
    elif options.method == "mfac":
        if source.fisher != options.fisher:
            raise ValueError(
                f"fisher is {options.fisher!r}, and the source's gradients are for the {source.fisher!r} one; give "
                "both the same, as DataLoaderGradients.of_options does"
            )
        source.check(options.num_grads, options.batch_norm_samples)


def _groups(
    parameters: dict[str, nn.Parameter],
    source: GradientSource | None,
    options: PruningOptions,
    process_group: dist.ProcessGroup | None,
) -> list[list[str]]:
    """Return the names of targets in groups (`plan_groups`), the same on all ranks; no group for magnitude pruning."""
    if options.method == "magnitude":
        return []
    assert source is not None  # _check
    return of_first_rank(plan_groups(parameters, options, source), process_group)


def _levels(masks: MaskSet, sparsity: float, options: PruningOptions) -> Iterator[Level]:
    """Yield the level that each sub-step reaches; none where nothing is left to prune."""
    if round(sparsity * masks.numel) == masks.numel - sum(int(keep.sum()) for keep in masks.values()):
        return
    # Magnitudes would be the same in each sub-step.
    steps = 1 if options.method == "magnitude" else options.recomputations
    before, by_name = masks.sparsity, masks.sparsities()
    for step in range(1, steps + 1):
        if options.scope == "global":
            yield substep_sparsity(before, sparsity, step, steps)
        else:
            yield {name: substep_sparsity(start, sparsity, step, steps) for name, start in by_name.items()}


def _name_whole_experts(model: nn.Module, masks: MaskSet) -> None:
    """Warn of experts without a weight: what no example reaches has no gradient, and seems to cost nothing."""
    if gone := whole_experts(model, masks):
        found = shortened((f"{name}: {shortened(map(str, experts))}" for name, experts in gone.items()), "; ")
        logger.warning(
            "nothing is left of these experts: %s. Where so few examples never reach an expert it seems to cost "
            "nothing: take more of them (num_grads), or prune each expert alike (scope='uniform')",
            found,
        )


def _loss(source: GradientSource | None, model: nn.Module, options: PruningOptions) -> float | None:
    """Return the loss on the held-out examples; None where there are none."""
    loss = source.loss(model) if source is not None else None
    if loss is None and options.method == "mfac" and options.damping == "auto":
        raise ValueError("damping='auto' is judged on held-out examples, and this source of gradients has none")
    return loss


@contextmanager
def _all_or_nothing(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put the values of tensors back where anything at all goes wrong inside the block."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, values in zip(tensors, before, strict=True):
                tensor.copy_(values)
        raise
