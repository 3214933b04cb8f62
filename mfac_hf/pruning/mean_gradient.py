"""The gradient of the mean loss over many examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mfac_hf.pruning.agreement import failing_together
from mfac_hf.pruning.losses import BatchLoss
from mfac_hf.pruning.passes import PassQueue, device_of
from mfac_hf.pruning.undisturbed import undisturbed

if TYPE_CHECKING:
    from mfac_hf.pruning.gradients import DataLoaderGradients

__all__ = ["mean_gradient"]


def mean_gradient(
    source: DataLoaderGradients,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    examples: Sequence[int],
    seed: int,
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss of some examples: flat, float32, by parameter name.

    Passes serve as many examples as memory allows; each counts as often as it has examples.

    Args:
        source: has the examples and the loss; where it has a process group, ranks average over the examples of all.
        model: the model.
        parameters: some of its parameters, by name.
        examples: indices into the source's data set.
        seed: seed of whatever collating draws.

    Raises:
        ValueError: a model that returns no loss, or a loss or gradient that is not finite.
        RuntimeError: another rank failed, or has ended.
    """
    queue = PassQueue(examples, source.at_once(model, {}))
    sums = {name: torch.zeros(p.numel(), device=p.device) for name, p in parameters.items()}
    with failing_together(source.process_group, "taking the mean gradient"), undisturbed(model, parameters, seed):
        for batch in source.batches(model, queue):
            count = len(queue.examples)
            rows = BatchLoss(source.loss_fn, model, batch, count, parameters).by_parameter()
            for total_D, row_D in zip(sums.values(), rows, strict=True):
                total_D.add_(row_D, alpha=count)
    number = torch.tensor(float(len(examples)), device=device_of(model))
    if source.process_group is not None:
        for tensor in (*sums.values(), number):
            dist.all_reduce(tensor, group=source.process_group)
    return {name: total_D.div_(number.to(total_D.device)) for name, total_D in sums.items()}
