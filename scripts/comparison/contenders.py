"""Optimizers of maintained packages that studies compare with: torch's Muon, and some of ``pytorch_optimizer``.

Each has its package's defaults, but for the learning rate, the weight decay and, of Muon's second part, AdamW's betas
and epsilon, which are those of the flags. They come with ``pip install 'mfac_hf[benchmarks]'``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from mfac_hf.training.arguments import parameter_groups

__all__ = ["CONTENDERS", "MatricesAndRest", "contender_maker"]

Maker = Callable[..., torch.optim.Optimizer]


class MatricesAndRest(torch.optim.Optimizer):
    """Several optimizers of different parameters as one: a schedule sees the groups of all."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._join()

    def _join(self) -> None:
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all of them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of all."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self._join()


def muon(model: nn.Module, args: TrainingArguments, **options: Any) -> torch.optim.Optimizer:
    """Muon of torch for the matrices of the encoder, AdamW for embeddings, vectors and the task's head.

    A step of a matrix is as long as AdamW's (Moonlight, arXiv:2502.16982), so that both have one learning rate.
    """
    trunk: Any = getattr(model, "base_model", model)
    linear = [module.weight for module in trunk.modules() if isinstance(module, nn.Linear)]
    matrices = [weight for weight in linear if weight.requires_grad]
    if not matrices:
        raise ValueError("muon: the model has no matrix of a linear layer to train")
    chosen = set(map(id, matrices))
    rest = [
        {**group, "params": [p for p in group["params"] if id(p) not in chosen]}
        for group in parameter_groups(model, args.weight_decay)
    ]
    options = {"adjust_lr_fn": "match_rms_adamw", **options}
    return MatricesAndRest(
        torch.optim.Muon(matrices, lr=args.learning_rate, weight_decay=args.weight_decay, **options),
        torch.optim.AdamW(
            [group for group in rest if group["params"]],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        ),
    )


def of_package(name: str, **defaults: Any) -> Maker:
    """Make a maker of an optimizer of ``pytorch_optimizer``."""

    def make(model: nn.Module, args: TrainingArguments, **options: Any) -> torch.optim.Optimizer:
        try:
            package = importlib.import_module("pytorch_optimizer")
        except ImportError as error:
            raise ImportError(f"{name} needs pytorch_optimizer: pip install 'mfac_hf[benchmarks]'") from error
        groups = parameter_groups(model, args.weight_decay)
        optimizer: torch.optim.Optimizer = getattr(package, name)(
            groups, lr=args.learning_rate, **{**defaults, **options}
        )
        return optimizer

    return make


# Schedule-free has no decay of the rate: give it --lr_scheduler_type constant_with_warmup. AdEMAMix has a warm-up of
# its own besides, t_alpha_beta3, for which its paper takes the steps of the run.
CONTENDERS: dict[str, Maker] = {
    "muon": muon,
    "soap": of_package("SOAP"),
    "schedule_free": of_package("ScheduleFreeAdamW"),
    "adan": of_package("Adan", weight_decouple=True),
    "ademamix": of_package("AdEMAMix", weight_decouple=True),
}


def contender_maker(name: str, options: dict[str, Any]) -> Callable[..., torch.optim.Optimizer]:
    """What a training script makes its optimizer with.

    Args:
        name: one of `CONTENDERS`.
        options: of that optimizer, by name.

    Raises:
        ValueError: there is no such contender.
    """
    if name not in CONTENDERS:
        raise ValueError(f"--contender {name}: expected one of {', '.join(CONTENDERS)}")

    def make(model: nn.Module, optimizer_args: Any, training_args: TrainingArguments) -> torch.optim.Optimizer:
        return CONTENDERS[name](model, training_args, **options)

    return make
