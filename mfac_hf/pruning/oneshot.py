r"""Pruning in one go: gradients, Fisher, selection and update, repeated in sub-steps.

A step from sparsity :math:`s_0` to s is split into k sub-steps that are geometric in the density, as in the paper's
code:

.. math:: s_j = 1 - (1 - s_0) \left(\frac{1 - s}{1 - s_0}\right)^{j/k}

Each collects new gradients of the weights that are left, removes the cheapest and moves the others to make up for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from mfac_hf.pruning.agreement import follow_first_rank, of_first_rank
from mfac_hf.pruning.blocked_step import magnitude_step, mfac_step, plan_groups
from mfac_hf.pruning.damping import SWEEP, best_proposal, write_weights
from mfac_hf.pruning.full_step import full_step
from mfac_hf.pruning.gradients import DataLoaderGradients, GradientSource
from mfac_hf.pruning.masks import MaskSet
from mfac_hf.pruning.options import PruningOptions, PruningReport, check_sparsity
from mfac_hf.pruning.patterns import Pattern
from mfac_hf.pruning.targets import find_targets

__all__ = ["check_targets", "prune_one_shot", "prune_to", "substep_sparsity"]

logger = logging.getLogger(__name__)


def prune_one_shot(
    model: nn.Module,
    dataloader: DataLoader[Any] | None,
    sparsity: float,
    *,
    method: Literal["mfac", "magnitude"] = "mfac",
    targets: Sequence[str] | str | None = None,
    num_grads: int = 64,
    grad_batch_size: int = 1,
    block_size: int | None = 128,
    damping: float | Literal["auto"] = 1e-5,
    recomputations: int = 16,
    selection: Literal["greedy", "diagonal"] = "greedy",
    update: Literal["joint", "sum"] = "joint",
    pattern: str = "unstructured",
    scope: Literal["global", "uniform"] = "global",
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    loss_samples: int = 0,
    seed: int = 0,
    pages: int = 1,
    memory_budget: int | None = None,
    progress: bool = True,
) -> PruningReport:
    """Prune a trained model without training it any further.

    ``prune_one_shot(model, trainer.get_train_dataloader(), 0.5)``. The model is changed in place; an exception leaves
    it as it was. Zeros of an already sparse model stay pruned and count. ``report.masks`` keeps the model sparse in
    training that follows (`MaskSet`).

    Args:
        model: the model, on the device where it is to be pruned.
        dataloader: over training data. Only its data set and collate function are used. None will do for magnitude.
        sparsity: share of the target weights to be zero, in [0, 1).
        method: ``"mfac"``, or ``"magnitude"``.
        targets: regular expressions of parameter names; default: `find_targets`.
        num_grads: gradients that each Fisher is made of.
        grad_batch_size: examples that each gradient is the mean of.
        block_size: weights of a block of the Fisher; None: all targets together.
        damping: of the Fisher, or ``"auto"``.
        recomputations: sub-steps, with new gradients in each.
        selection: ``"greedy"``, or ``"diagonal"`` as in the paper.
        update: ``"joint"``, or ``"sum"`` as in the paper.
        pattern: ``"unstructured"``, ``"2:4"``, ``"block4"``.
        scope: ``"global"`` or ``"uniform"``.
        loss_fn: ``loss_fn(model, batch)``, the mean loss of a batch; default ``model(**batch).loss``.
        loss_samples: held-out examples on which the loss is measured.
        seed: of the choice of examples.
        pages: pieces that the gradients are worked on in where ``block_size`` is None.
        memory_budget: bytes for the Fisher; default half of what is free.
        progress: whether to show a progress bar.

    Returns:
        What was done; `PruningOptions` explains the options further, `PruningReport` the report.

    Raises:
        ValueError: an option out of range, targets that match nothing or an embedding, too few examples, a pattern
            that does not fit, a loss that is not finite.
        MemoryError: the Fisher of a single target does not fit.
    """
    options = PruningOptions(
        method=method,
        num_grads=num_grads,
        grad_batch_size=grad_batch_size,
        block_size=block_size,
        damping=damping,
        recomputations=recomputations,
        selection=selection,
        update=update,
        pattern=pattern,
        scope=scope,
        loss_samples=loss_samples,
        seed=seed,
        pages=pages,
        memory_budget=memory_budget,
    )
    check_sparsity(sparsity)
    masks = MaskSet.from_model(model, find_targets(model, targets))
    source = None
    if dataloader is not None:
        source = DataLoaderGradients(
            dataloader, loss_fn=loss_fn, batch_size=grad_batch_size, loss_samples=options.loss_samples, seed=seed
        )
    return prune_to(model, masks, source, sparsity, options, progress=progress)


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
    """Take a model from the sparsity of its masks to a higher one, in place.

    An exception, also an interruption by the keyboard, leaves weights and masks as they were.

    Args:
        model: the model.
        masks: of its targets; updated.
        source: of the gradients; None will do for magnitude pruning without ``loss_samples``.
        sparsity: share of the weights under the masks to be zero (with scope ``"uniform"`` in each tensor).
        options: how.
        progress: whether to show a progress bar.
        process_group: ranks that prune copies of the same model, and must all call this; the first one decides.

    Raises:
        ValueError: masks of another model, a sparsity that falls or is out of reach, too few examples, a pattern that
            does not fit, a loss that is not finite.
        MemoryError: the Fisher of a single target does not fit.
        FloatingPointError: the damping is too small for the Fisher to be inverted in float64.
    """
    started = time.perf_counter()
    parameters = masks.parameters(model)
    _check(masks, parameters, source, sparsity, options)
    groups: list[list[str]] = []
    if options.method == "mfac":
        sizes = {name: p.numel() for name, p in parameters.items()}
        device, shared = (
            next(iter(parameters.values())).device,
            source is not None and source.process_group is not None,
        )
        if options.block_size is None:
            groups = [list(sizes)]
        else:
            groups = of_first_rank(plan_groups(sizes, options, device, shared=shared), process_group)
    report = PruningReport(
        asdict(options), masks.numel, masks.sparsity, sparsity=masks.sparsity, sparsities=masks.sparsities()
    )
    new = masks.copy()
    passes = 2 if len(groups) > 1 else 1
    with _all_or_nothing(parameters), torch.no_grad():
        report.loss_before = _loss(source, model, options)
        targets = list(_substeps(masks, sparsity, options))
        relative_dampings: Sequence[float] = SWEEP
        for number, target in enumerate(targets, 1):
            begun = time.perf_counter()
            if options.method == "magnitude":
                proposals = magnitude_step(parameters, new, [target], options)
            else:
                assert source is not None  # _check
                bar = tqdm(
                    desc=f"pruning {number}/{options.recomputations}",
                    total=passes * options.num_grads,
                    unit="gradient",
                    disable=not progress,
                )
                sources: dict[str, Any] = {"source": source, "seed": options.seed * 10_007 + number}
                with bar:
                    if options.block_size is None:
                        step = full_step(model, parameters, new, target, options, **sources, advance=bar.update)
                        proposals = [step]
                    else:
                        proposals = mfac_step(
                            model,
                            parameters,
                            new,
                            # A sweep is judged where dampings differ most: if these gradients had to do for all.
                            [target]
                            if len(relative_dampings) == 1 or target == targets[-1]
                            else [target, targets[-1]],
                            options,
                            **sources,
                            groups=groups,
                            advance=bar.update,
                            relative_dampings=relative_dampings,
                        )
            chosen, losses = best_proposal(model, parameters, proposals, source)
            if chosen.relative_damping is not None:
                relative_dampings = (chosen.relative_damping,)
            follow_first_rank(chosen.weights, chosen.keep, process_group)
            write_weights(parameters, chosen.weights)
            new.update({name: keep.view_as(new[name]) for name, keep in chosen.keep.items()})
            report.steps.append(
                {
                    "sparsity": new.sparsity,
                    "predicted_loss_increase": chosen.predicted_loss_increase,
                    "damping": chosen.damping,
                    "damping_losses": losses,
                    "num_grads": options.num_grads if groups else 0,
                    "groups": len(groups),
                    "seconds": time.perf_counter() - begun,
                }
            )
            logger.info("pruned to %.4f in sub-step %d", new.sparsity, number)
        report.loss_after = _loss(source, model, options)
    masks.update(new)
    report.masks = masks
    report.sparsity, report.sparsities = masks.sparsity, masks.sparsities()
    report.num_grads = sum(step["num_grads"] for step in report.steps)
    if groups:
        report.predicted_loss_increase = sum(step["predicted_loss_increase"] for step in report.steps)
    report.seconds = time.perf_counter() - started
    return report


def substep_sparsity(start: float, end: float, step: int, steps: int) -> float:
    """Sparsity after sub-step ``step`` of ``steps``, geometric in the density."""
    return 1 - (1 - start) * ((1 - end) / (1 - start)) ** (step / steps)


def _check(
    masks: MaskSet,
    parameters: dict[str, nn.Parameter],
    source: GradientSource | None,
    sparsity: float,
    options: PruningOptions,
) -> None:
    """Everything that can be refused before work begins."""
    check_targets(masks, parameters, sparsity, options)
    if source is None:
        if options.method == "mfac":
            raise ValueError("method 'mfac' needs gradients: pass a data loader (or method='magnitude')")
        if options.loss_samples:
            raise ValueError(f"loss_samples is {options.loss_samples}, and there is no data loader to take them from")
    elif options.method == "mfac":
        source.check(options.num_grads)


def check_targets(
    masks: MaskSet, parameters: Mapping[str, nn.Parameter], sparsity: float, options: PruningOptions
) -> None:
    """Raise ValueError for a sparsity that the masks or the pattern do not allow, or a pattern that does not fit."""
    current = masks.sparsities().values() if options.scope == "uniform" else [masks.sparsity]
    check_sparsity(sparsity, max(current))
    pattern = Pattern.parse(options.pattern)
    if sparsity > pattern.max_sparsity:
        raise ValueError(
            f"sparsity is {sparsity:g}; the pattern {pattern.name!r} allows at most {pattern.max_sparsity:g}"
        )
    for name, parameter in parameters.items():
        block_size = options.block_size if options.method == "mfac" else None
        pattern.check(name, parameter, masks[name], block_size)


def _substeps(masks: MaskSet, sparsity: float, options: PruningOptions) -> Iterator[float | dict[str, float]]:
    """Sparsity that each sub-step reaches, overall or by tensor; none where nothing is left to do."""
    if round(sparsity * masks.numel) == masks.numel - sum(int(keep.sum()) for keep in masks.values()):
        return
    # Magnitudes do not change from one sub-step to the next.
    steps = 1 if options.method == "magnitude" else options.recomputations
    before, by_name = masks.sparsity, masks.sparsities()
    for step in range(1, steps + 1):
        if options.scope == "global":
            yield substep_sparsity(before, sparsity, step, steps)
        else:
            yield {name: substep_sparsity(start, sparsity, step, steps) for name, start in by_name.items()}


def _loss(source: GradientSource | None, model: nn.Module, options: PruningOptions) -> float | None:
    loss = source.loss(model) if source is not None else None
    if loss is None and options.method == "mfac" and options.damping == "auto":
        raise ValueError("damping='auto' is judged on held-out examples, and this source of gradients has none")
    return loss


@contextmanager
def _all_or_nothing(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Put the weights back where anything at all goes wrong."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
        raise
