"""Flags for gradual pruning that the training scripts share, and the callback that they ask for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from mfac_hf.pruning import Distillation, MFACPruningCallback, SparsitySchedule
from mfac_hf.training.pruning_arguments import PruningArguments

__all__ = ["GradualArguments", "build_pruning_callback", "pruning_results"]


@dataclass
class GradualArguments:
    """When to prune during training, and what else happens then; where to and how is in `PruningArguments`."""

    prune_schedule: Literal["cubic", "linear", "geometric"] = field(
        default="cubic", metadata={"help": "Curve from --initial_sparsity to --sparsity."}
    )
    initial_sparsity: float = field(default=0.0, metadata={"help": "Sparsity at --prune_start."})
    prune_start: int = field(default=0, metadata={"help": "Step or epoch at whose beginning pruning starts."})
    prune_end: int | None = field(default=None, metadata={"help": "Step or epoch at which --sparsity is reached."})
    prune_every: int = field(default=1, metadata={"help": "Steps or epochs from one pruning to the next."})
    prune_unit: Literal["step", "epoch"] = field(default="step", metadata={"help": "What these three count."})
    prune_gradients: Literal["data", "optimizer"] = field(
        default="data", metadata={"help": "Gradients for pruning: of training examples, or those in M-FAC's window."}
    )
    prune_lr_cycle: float | None = field(
        default=None,
        metadata={"help": "From one pruning to the next the learning rate falls to this share of the scheduled one."},
    )
    prune_evaluate: bool = field(
        default=False, metadata={"help": "Log the loss before and after each pruning; needs --eval_on_start."}
    )
    distillation_hardness: float | None = field(
        default=None, metadata={"help": "Share of a dense teacher in the loss, in (0, 1]; default: no distillation."}
    )
    distillation_temperature: float = field(default=2.0, metadata={"help": "Softens teacher and student."})
    teacher_name_or_path: str | None = field(
        default=None, metadata={"help": "Directory of the teacher; default: a copy taken before the first pruning."}
    )


def build_pruning_callback(
    pruning_args: PruningArguments, gradual_args: GradualArguments, training_args: TrainingArguments
) -> MFACPruningCallback | None:
    """The callback for gradual pruning; None where there is no pruning, or pruning without training.

    Raises:
        ValueError: a flag out of range, or one that is missing.
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


def pruning_results(callback: MFACPruningCallback, training_args: TrainingArguments) -> dict[str, Any]:
    """After training: save the masks beside the model, and return what ``results.json`` says of the pruning."""
    assert callback.masks is not None
    if training_args.should_save:
        callback.masks.save(str(training_args.output_dir))
    return {
        "pruning": {
            "sparsity": callback.sparsity,
            "sparsities": callback.masks.sparsities(),
            "reports": [report.to_dict() for report in callback.reports],
        }
    }
