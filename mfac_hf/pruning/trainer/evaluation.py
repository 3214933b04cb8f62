"""Loss of a model over a data loader, in the middle of its training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import find_batch_size

from mfac_hf.pruning.agreement import failing_together
from mfac_hf.pruning.losses import model_loss, to_device
from mfac_hf.pruning.undisturbed import undisturbed

__all__ = ["mean_loss"]


def mean_loss(
    model: nn.Module,
    dataloader: DataLoader[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> float:
    """Return the mean loss over the examples of a data loader, in evaluation mode; model and random states stay.

    Args:
        model: the model.
        dataloader: loader of batches, of which the last may be smaller.
        loss_fn: ``loss_fn(model, batch)`` returns a mean over examples; default ``model(**batch).loss``.
        process_group: ranks that have a share of the examples each; the mean is over all examples.
    """
    device = next(model.parameters()).device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    with failing_together(process_group, "evaluating"), undisturbed(model, {}, seed=0), torch.no_grad():
        for batch in dataloader:
            count = find_batch_size(batch)
            loss = (loss_fn or model_loss)(model, to_device(batch, device))
            totals += torch.stack([count * loss.double(), torch.full_like(totals[1], count)])
    if process_group is not None:
        dist.all_reduce(totals, group=process_group)
    return float(totals[0] / totals[1])
