"""Pruning flags of the training scripts, and the options and the callback that they build."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, cast

from transformers import TrainingArguments

from mfac_hf.pruning import Distillation, MFACPruningCallback, SparsitySchedule
from mfac_hf.pruning.options import PruningOptions, parse_damping

__all__ = ["GradualArguments", "PruningArguments", "build_pruning_callback"]


@dataclass
class PruningArguments:
    """Whether and how to prune. With --num_train_epochs 0 the model is pruned in one go and not trained."""

    sparsity: float | None = field(
        default=None, metadata={"help": "Share of the target weights to prune, such as 0.9; without it, none."}
    )
    prune_method: Literal["mfac", "magnitude"] = field(
        default=PruningOptions.method, metadata={"help": "mfac, or magnitude as the baseline."}
    )
    prune_targets: list[str] | None = field(
        default=None,
        metadata={"help": "Regular expressions of parameter names; default: the linear layers of the encoder."},
    )
    recomputations: int = field(
        default=PruningOptions.recomputations, metadata={"help": "Sub-steps of a pruning, each with new gradients."}
    )
    prune_num_grads: int = field(
        default=PruningOptions.num_grads, metadata={"help": "Gradients that each Fisher is the average of."}
    )
    prune_grad_batch_size: int = field(
        default=PruningOptions.grad_batch_size, metadata={"help": "Examples that each of these gradients averages."}
    )
    prune_block_size: int = field(
        default=cast(int, PruningOptions.block_size), metadata={"help": "Weights in a block of the Fisher."}
    )
    prune_damping: str = field(
        default=str(PruningOptions.damping),
        metadata={"help": "Damping of the Fisher, or auto: the value with the lowest loss on held-out examples."},
    )
    prune_selection: Literal["greedy", "diagonal"] = field(
        default=PruningOptions.selection,
        metadata={"help": "greedy updates the costs after each removed weight; diagonal is the paper's selection."},
    )
    prune_update: Literal["joint", "sum"] = field(
        default=PruningOptions.update,
        metadata={"help": "joint is exact for all removed weights together; sum is the paper's update."},
    )
    prune_pattern: str = field(
        default=PruningOptions.pattern, metadata={"help": "unstructured, 2:4 (any N:M) or block4 (any length)."}
    )
    prune_scope: Literal["global", "uniform"] = field(
        default=PruningOptions.scope,
        metadata={"help": "global ranks all targets together; uniform prunes each to the same sparsity."},
    )

    def options(self, seed: int) -> PruningOptions:
        """The flags as `PruningOptions`.

        Raises:
            ValueError: one is out of range.
        """
        return PruningOptions(
            method=self.prune_method,
            num_grads=self.prune_num_grads,
            grad_batch_size=self.prune_grad_batch_size,
            block_size=self.prune_block_size,
            damping=parse_damping(self.prune_damping, "--prune_damping"),
            recomputations=self.recomputations,
            selection=self.prune_selection,
            update=self.prune_update,
            pattern=self.prune_pattern,
            scope=self.prune_scope,
            seed=seed,
        )

    def is_one_shot(self, training_args: TrainingArguments) -> bool:
        """Whether to prune without training.

        Raises:
            ValueError: there is a sparsity, but no training split to take gradients from.
        """
        if self.sparsity is None:
            return False
        if not training_args.do_train:
            raise ValueError(
                f"--sparsity {self.sparsity:g} needs --do_train, for gradients of the training split; "
                "with --num_train_epochs 0 nothing is trained"
            )
        return training_args.num_train_epochs == 0 and training_args.max_steps <= 0


@dataclass
class GradualArguments:
    """When to prune during training, and what happens beside it; `PruningArguments` says how, and to what sparsity."""

    prune_schedule: Literal["cubic", "linear", "geometric"] = field(
        default="cubic", metadata={"help": "Curve from --initial_sparsity to --sparsity."}
    )
    initial_sparsity: float = field(default=0.0, metadata={"help": "Sparsity at --prune_start."})
    prune_start: int = field(default=0, metadata={"help": "Step or epoch before which the first pruning comes."})
    prune_end: int | None = field(default=None, metadata={"help": "Step or epoch at which --sparsity is reached."})
    prune_every: int = field(default=1, metadata={"help": "Steps or epochs from one pruning to the next."})
    prune_unit: Literal["step", "epoch"] = field(
        default="step", metadata={"help": "Unit of --prune_start, --prune_end and --prune_every."}
    )
    prune_gradients: Literal["data", "optimizer"] = field(
        default="data",
        metadata={"help": "Gradients for pruning: new ones of training examples, or those in M-FAC's window."},
    )
    prune_lr_cycle: float | None = field(
        default=None,
        metadata={
            "help": "Share of the scheduled learning rate to which it falls between two prunings; "
            "default: the schedule alone."
        },
    )
    prune_evaluate: bool = field(
        default=False, metadata={"help": "Log the loss before and after each pruning; needs --eval_on_start."}
    )
    distillation_hardness: float | None = field(
        default=None, metadata={"help": "Share of a dense teacher in the loss, in (0, 1]; default: no distillation."}
    )
    distillation_temperature: float = field(
        default=2.0, metadata={"help": "Divides the logits of teacher and student in the distillation loss."}
    )
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "Directory of the teacher; default: a copy taken before the first pruning."}
    )


def build_pruning_callback(
    pruning_args: PruningArguments, gradual_args: GradualArguments, training_args: TrainingArguments
) -> MFACPruningCallback | None:
    """The callback for gradual pruning; None without pruning, and for pruning without training.

    Raises:
        ValueError: a flag is out of range or missing.
    """
    gradual = pruning_args.sparsity is not None and not pruning_args.is_one_shot(training_args)
    if not gradual:
        for name in ("prune_end", "distillation_hardness"):
            if getattr(gradual_args, name) is not None:
                raise ValueError(f"--{name} is for pruning during training: give --sparsity and --num_train_epochs")
        return None
    if gradual_args.prune_end is None:
        raise ValueError(
            f"--sparsity {pruning_args.sparsity} needs --prune_end, the {gradual_args.prune_unit} at which it is "
            "reached, or --num_train_epochs 0 to prune without training"
        )
    distillation = None
    if gradual_args.distillation_hardness is not None:
        distillation = Distillation(
            hardness=gradual_args.distillation_hardness,
            temperature=gradual_args.distillation_temperature,
            teacher=gradual_args.teacher_name_or_path,
        )
    schedule = getattr(SparsitySchedule, gradual_args.prune_schedule)(
        initial=gradual_args.initial_sparsity,
        final=pruning_args.sparsity,
        start=gradual_args.prune_start,
        end=gradual_args.prune_end,
        every=gradual_args.prune_every,
        unit=gradual_args.prune_unit,
    )
    options = pruning_args.options(training_args.seed)
    return MFACPruningCallback(
        schedule,
        targets=pruning_args.prune_targets,
        gradients=gradual_args.prune_gradients,
        evaluate=gradual_args.prune_evaluate,
        lr_cycle=gradual_args.prune_lr_cycle,
        distillation=distillation,
        **dataclasses.asdict(options),
    )
