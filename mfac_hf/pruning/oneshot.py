"""Pruning of a trained model in one go, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.data import DataLoader

from mfac_hf.pruning.engine import prune_to
from mfac_hf.pruning.gradients import DataLoaderGradients
from mfac_hf.pruning.masks import MaskSet
from mfac_hf.pruning.options import (
    Fisher,
    Method,
    PruningOptions,
    PruningReport,
    Scope,
    Selection,
    Update,
    check_sparsity,
)
from mfac_hf.pruning.outputs import OutputsFunction
from mfac_hf.pruning.targets import find_targets

__all__ = ["prune_one_shot"]


# long: its arguments, and what is said of them
def prune_one_shot(
    model: nn.Module,
    dataloader: DataLoader[Any] | None,
    sparsity: float,
    *,
    method: Method = PruningOptions.method,
    fisher: Fisher = PruningOptions.fisher,
    fisher_floor: float = PruningOptions.fisher_floor,
    targets: Sequence[str] | str | None = None,
    num_grads: int = PruningOptions.num_grads,
    grad_batch_size: int = PruningOptions.grad_batch_size,
    examples_per_pass: int = PruningOptions.examples_per_pass,
    block_size: int | None = PruningOptions.block_size,
    damping: float | Literal["auto"] | None = PruningOptions.damping,
    recomputations: int = PruningOptions.recomputations,
    selection: Selection = PruningOptions.selection,
    update: Update = PruningOptions.update,
    pattern: str = PruningOptions.pattern,
    scope: Scope = PruningOptions.scope,
    first_order: bool = PruningOptions.first_order,
    batch_norm_samples: int = PruningOptions.batch_norm_samples,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    outputs_fn: OutputsFunction | None = None,
    loss_samples: int = PruningOptions.loss_samples,
    seed: int = PruningOptions.seed,
    pages: int = PruningOptions.pages,
    memory_budget: int | None = PruningOptions.memory_budget,
    progress: bool = True,
) -> PruningReport:
    """Prune a trained model without training it any further.

    ``prune_one_shot(model, trainer.get_train_dataloader(), 0.5)`` changes the model in place; an exception leaves it
    as it was. Zeros of an already sparse model stay pruned and count. ``report.masks`` keeps the model sparse in
    training that follows (`MaskSet`). `PruningOptions` says more of the options.

    Args:
        model: the model, on the device where it is to be pruned.
        dataloader: loader of training data, of which the data set and the collate function are used; None will do for
            magnitude pruning.
        sparsity: share of the target weights to be zero, in [0, 1).
        method: ``"mfac"``, or ``"magnitude"``.
        fisher: ``"scaled"`` by the norm of the loss's gradient by the model's outputs, or ``"empirical"`` as in the
            paper.
        fisher_floor: least number that the scaled Fisher divides by.
        targets: regular expressions of parameter names; default: `find_targets`.
        num_grads: gradients that each Fisher is the average of.
        grad_batch_size: examples that each gradient is the mean of.
        examples_per_pass: examples that one pass through the model serves at most.
        block_size: weights of a block of the Fisher; None for one Fisher of all targets together.
        damping: number added to the Fisher's diagonal, or ``"auto"``; None for the default of the Fisher.
        recomputations: sub-steps, with new gradients in each.
        selection: ``"greedy"``, or ``"diagonal"`` as in the paper.
        update: ``"joint"``, ``"sum"`` as in the paper, or ``"none"``.
        pattern: ``"unstructured"``, ``"2:4"`` (or another N:M), ``"block4"`` (or another length).
        scope: ``"global"`` ranks all targets together, ``"uniform"`` prunes each alike.
        first_order: whether the survivors of each sub-step also take a step down the loss, of a length that is
            searched on held-out examples (1,024 unless ``loss_samples`` says otherwise).
        batch_norm_samples: examples with which batch norms are averaged anew after each sub-step; 0 leaves them.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of a batch; default ``model(**batch).loss``.
        outputs_fn: for the scaled Fisher, ``outputs_fn(returned)`` takes what the model returned and returns the
            tensor, or tensors, that the loss is computed from, with a row for each example. Default: what the model
            returned, if it is a tensor, or all of it whose name ends in ``logits``.
        loss_samples: held-out examples on which the loss is measured.
        seed: seed of the choice of examples.
        pages: pieces in which the gradients go to the device where ``block_size`` is None.
        memory_budget: bytes for the Fisher's blocks, and for a pass; default half and a quarter of what is free.
        progress: whether to show a progress bar.

    Returns:
        The report of what was done.

    Raises:
        ValueError: an option out of range, targets that match nothing or an embedding, too few examples, a pattern
            that does not fit, a loss that is not finite, a model without outputs to scale by.
        MemoryError: the Fisher of a single target does not fit into ``memory_budget``.
        FloatingPointError: the damping is too small for the Fisher to be inverted.
    """
    options = PruningOptions(
        method=method,
        fisher=fisher,
        fisher_floor=fisher_floor,
        num_grads=num_grads,
        grad_batch_size=grad_batch_size,
        examples_per_pass=examples_per_pass,
        block_size=block_size,
        damping=damping,
        recomputations=recomputations,
        selection=selection,
        update=update,
        pattern=pattern,
        scope=scope,
        first_order=first_order,
        batch_norm_samples=batch_norm_samples,
        loss_samples=loss_samples,
        seed=seed,
        pages=pages,
        memory_budget=memory_budget,
    )
    check_sparsity(sparsity)
    masks = MaskSet.from_model(model, find_targets(model, targets))
    source = None
    if dataloader is not None:
        source = DataLoaderGradients.of_options(dataloader, options, loss_fn, outputs_fn=outputs_fn)
    return prune_to(model, masks, source, sparsity, options, progress=progress)
