"""Pruning flags of the training scripts, and the options and the callback that they build."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from transformers import TrainingArguments

from mfac_hf.defaults import PRUNING_DAMPING_TEXT
from mfac_hf.pruning import Distillation, MFACPruningCallback, SparsitySchedule
from mfac_hf.pruning.options import (
    Fisher,
    Method,
    PruningKeywords,
    PruningOptions,
    Scope,
    Selection,
    Update,
    parse_damping,
)
from mfac_hf.pruning.trainer.support import pruning_options
from mfac_hf.training.arguments import flag

__all__ = ["GradualArguments", "PruningArguments", "build_pruning_callback"]


@dataclass
class PruningArguments:
    """Whether and how to prune. With --num_train_epochs 0 the model is pruned in one go and not trained."""

    sparsity: float | None = flag(None, "Share of the target weights to prune, such as 0.9; without it, none.")
    prune_method: Method = flag(PruningOptions.method, "mfac, or magnitude as the baseline.")
    prune_fisher: Fisher | None = flag(
        None,
        "scaled divides each example's gradient by that of its loss by the model's outputs, empirical is the paper's; "
        "default: scaled, but empirical with --prune_gradients optimizer.",
    )
    prune_fisher_floor: float = flag(PruningOptions.fisher_floor, "Least norm by which the scaled Fisher divides.")
    prune_targets: list[str] | None = flag(
        None, "Regular expressions of parameter names; default: the linear layers of the encoder."
    )
    recomputations: int = flag(PruningOptions.recomputations, "Sub-steps of a pruning, each with new gradients.")
    prune_num_grads: int = flag(PruningOptions.num_grads, "Gradients that each Fisher is the average of.")
    prune_grad_batch_size: int = flag(PruningOptions.grad_batch_size, "Examples that each gradient is the mean of.")
    prune_examples_per_pass: int = flag(
        PruningOptions.examples_per_pass, "Examples that one pass through the model serves at most."
    )
    prune_block_size: int = flag(PruningOptions.block_size, "Weights in a block of the Fisher.")
    prune_damping: str | None = flag(
        None,
        "Damping of the Fisher, or auto: the value with the lowest loss on held-out training examples; default: "
        f"{PRUNING_DAMPING_TEXT}.",
    )
    prune_selection: Selection = flag(
        PruningOptions.selection, "greedy updates all costs after each removed weight; diagonal is the paper's."
    )
    prune_update: Update = flag(
        PruningOptions.update, "Update of the survivors: joint (exact for all removed), sum (the paper's) or none."
    )
    prune_pattern: str = flag(PruningOptions.pattern, "unstructured, 2:4 (any N:M) or block4 (any length).")
    prune_scope: Scope = flag(
        PruningOptions.scope, "global ranks the weights of all targets together; uniform prunes all targets alike."
    )
    prune_first_order: bool = flag(
        PruningOptions.first_order,
        "A step of the survivors down the loss after each sub-step, as long as 1,024 held-out examples say.",
    )
    prune_batch_norm_samples: int = flag(
        PruningOptions.batch_norm_samples, "Examples that batch norms are averaged over after each sub-step; 0: not."
    )

    def options(self, seed: int, gradients: str = "data") -> PruningOptions:
        """The flags as `PruningOptions`.

        Args:
            seed: seed of the choice of examples.
            gradients: where they come from (`MFACPruningCallback`).

        Raises:
            ValueError: one is out of range.
        """
        keywords = PruningKeywords(
            method=self.prune_method,
            fisher_floor=self.prune_fisher_floor,
            num_grads=self.prune_num_grads,
            grad_batch_size=self.prune_grad_batch_size,
            examples_per_pass=self.prune_examples_per_pass,
            block_size=self.prune_block_size,
            damping=None if self.prune_damping is None else parse_damping(self.prune_damping, "--prune_damping"),
            recomputations=self.recomputations,
            selection=self.prune_selection,
            update=self.prune_update,
            pattern=self.prune_pattern,
            scope=self.prune_scope,
            first_order=self.prune_first_order,
            batch_norm_samples=self.prune_batch_norm_samples,
            seed=seed,
        )
        if self.prune_fisher is not None:
            keywords["fisher"] = self.prune_fisher
        return pruning_options(gradients, keywords)

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

    prune_schedule: Literal["cubic", "linear", "geometric"] = flag(
        "cubic", "Curve from --initial_sparsity to --sparsity."
    )
    initial_sparsity: float = flag(0.0, "Sparsity at --prune_start.")
    prune_start: int = flag(0, "Step or epoch at whose beginning pruning starts.")
    prune_end: int | None = flag(None, "Step or epoch at which --sparsity is reached.")
    prune_every: int = flag(1, "Steps or epochs from one pruning to the next.")
    prune_unit: Literal["step", "epoch"] = flag("step", "Unit of --prune_start, --prune_end and --prune_every.")
    prune_gradients: Literal["data", "optimizer"] = flag(
        "data", "Gradients for pruning: of training examples, or those in M-FAC's window."
    )
    prune_lr_cycle: float | None = flag(
        None,
        "Factor in (0, 1) to which the scheduled learning rate falls from pruning to pruning; default: none.",
    )
    prune_evaluate: bool = flag(False, "Log the loss before and after each pruning; needs --eval_on_start.")
    distillation_hardness: float | None = flag(
        None, "Share of a dense teacher in the loss, in (0, 1]; default: no distillation."
    )
    distillation_temperature: float = flag(2.0, "Temperature that softens the outputs of teacher and student.")
    teacher_name_or_path: str | None = flag(
        None, "Directory of the teacher; default: a copy taken before the first pruning."
    )


def build_pruning_callback(
    pruning_args: PruningArguments, gradual_args: GradualArguments, training_args: TrainingArguments
) -> MFACPruningCallback | None:
    """The callback for gradual pruning; None where nothing is pruned, or pruned without training.

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
    options = pruning_args.options(training_args.seed, gradual_args.prune_gradients)
    return MFACPruningCallback(
        schedule,
        targets=pruning_args.prune_targets,
        gradients=gradual_args.prune_gradients,
        evaluate=gradual_args.prune_evaluate,
        lr_cycle=gradual_args.prune_lr_cycle,
        distillation=distillation,
        **dataclasses.asdict(options),
    )
