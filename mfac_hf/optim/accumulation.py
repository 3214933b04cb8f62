"""A warning of gradients that several batches or ranks may have added up, where nobody has looked at the loss.

An optimizer sees gradients, and no loss. But Trainer calls ``optimizer.train()`` before each batch, as schedule-free
optimizers need it: so its batches can be counted.
"""

import warnings

import torch.distributed as dist

__all__ = ["BatchCount"]


class BatchCount:
    """Batches that Trainer announced since the last step.

    Attributes:
        trusted: whether somebody knows that the loss is scaled as it should be, or a warning was given.
        announced: whether a batch was ever announced: Trainer trains, and its ranks step together.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.trusted = False
        self.announced = False

    def add(self) -> None:
        """Count a batch."""
        self.batches += 1
        self.announced = True

    def check(self) -> None:
        """Begin a step: warn, once, if it has several batches or ranks."""
        batches, self.batches = self.batches, 0
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if self.trusted or not batches or batches * ranks == 1:
            return
        self.trusted = True
        warnings.warn(
            f"Trainer accumulates the gradients of {batches} batches on {ranks} ranks for a step, and MFAC's damping "
            "and lr are in units of the gradient. Where a model's forward takes **kwargs and its loss ignores "
            f"num_items_in_batch, as with BERT's classifiers, gradients are {batches * ranks} times too large: set "
            "trainer.model_accepts_loss_kwargs = False. mfac_hf.attach_card(trainer) looks whether that is so",
            stacklevel=5,
        )
