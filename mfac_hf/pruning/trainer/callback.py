"""Gradual pruning inside an unmodified Trainer."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mfac_hf.hub.trainer_card import attach_card
from mfac_hf.pruning.engine import check_targets, prune_to
from mfac_hf.pruning.gradient_source import GradientSource
from mfac_hf.pruning.masks import MaskSet, shortened
from mfac_hf.pruning.options import PruningKeywords, PruningReport
from mfac_hf.pruning.outputs import OutputsFunction
from mfac_hf.pruning.schedule import SparsitySchedule
from mfac_hf.pruning.targets import find_targets
from mfac_hf.pruning.trainer.checkpoint import (
    Progress,
    checkpoint_folder,
    forget_state,
    read_checkpoint,
    write_checkpoint,
    write_state,
)
from mfac_hf.pruning.trainer.distillation import Distillation
from mfac_hf.pruning.trainer.evaluation import mean_loss
from mfac_hf.pruning.trainer.lr_cycle import LearningRateCycle
from mfac_hf.pruning.trainer.support import (
    all_ranks,
    check_source,
    gradient_source,
    pruning_options,
    refuse_unsupported,
    schedule_in_steps,
    warn_of_end,
    without_fp16,
)
from mfac_hf.pruning.trainer.training_loss import calling_trainer, check_is_mean, training_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["MFACPruningCallback"]

logger = logging.getLogger(__name__)


class MFACPruningCallback(TrainerCallback):
    """Prune a model step by step while Trainer trains it.

    ``trainer.add_callback(MFACPruningCallback(SparsitySchedule.cubic(final=0.9, start=100, end=900, every=100)))`` is
    all that a script needs. At the beginning of a step that the schedule names, when no gradient has accumulated,
    weights are selected and removed, and the others make up for them (`mfac_hf.pruning.engine`). From then on pruned
    weights have no gradient, and the optimizer has no memory of them. Whatever the optimizer does, they are exactly
    zero after its step, and so in each evaluation and checkpoint. The window of `MFAC` shrinks with the model.

    Whenever the sparsity rises, Trainer's record of the best model is cleared, so that ``load_best_model_at_end``
    loads the best model of the final sparsity. Each checkpoint gets the masks and ``pruning.json``. A run that was
    killed, even in the middle of a pruning, goes on from its last checkpoint to the same bits.

    Args:
        schedule: when to prune, and to which sparsity of the targets.
        targets: regular expressions of parameter names; default: `mfac_hf.pruning.find_targets`.
        loss_fn: ``loss_fn(model, inputs)`` for the gradients of the pruner; default: the loss that training minimises,
            with ``compute_loss``, ``compute_loss_func`` and label smoothing.
        outputs_fn: finds the outputs that the scaled Fisher divides by (`mfac_hf.prune_one_shot`).
        gradients: ``"data"`` takes the pruner's gradients from the training data, ``"optimizer"`` takes those that the
            window of `MFAC` holds, at no cost, for the empirical Fisher.
        evaluate: whether to log the loss over Trainer's evaluation data before and after each pruning.
        lr_cycle: c in (0, 1): from one pruning to the next, and from the last to the end, the learning rate of
            Trainer's schedule is multiplied by a factor that falls from 1 to c. None leaves it as it is.
        distillation: dense teacher whose outputs the pruned model learns.
        resume_from: checkpoint that training resumes from, where it does not lie in the output directory.
        **options: fields of `PruningOptions`, such as method, fisher, num_grads, damping, recomputations and pattern.

    Attributes:
        masks: `MaskSet` of the targets; None before training.
        reports: a `PruningReport` of each pruning.
        sparsity: share of the targets' weights that is pruned.

    Raises:
        TypeError: an option that does not exist.
        ValueError: an option out of range.
    """

    def __init__(
        self,
        schedule: SparsitySchedule,
        *,
        targets: Sequence[str] | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        outputs_fn: OutputsFunction | None = None,
        gradients: str = "data",
        evaluate: bool = False,
        lr_cycle: float | None = None,
        distillation: Distillation | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        **options: Unpack[PruningKeywords],
    ) -> None:
        if not isinstance(schedule, SparsitySchedule):
            raise TypeError(f"schedule is a {type(schedule).__name__}; expected a SparsitySchedule")
        self.schedule, self.targets = schedule, targets
        self.loss_fn, self.outputs_fn = loss_fn, outputs_fn
        self.gradients, self.evaluate = gradients, evaluate
        self.lr_cycle = None if lr_cycle is None else LearningRateCycle(lr_cycle)
        self.distillation = distillation
        self.resume_from = None if resume_from is None else Path(resume_from)
        self.options = pruning_options(gradients, options)
        self.masks: MaskSet | None = None
        self.reports: list[PruningReport] = []
        self._steps = schedule  # the same by steps, once training has begun
        self._reached = 0.0  # the last sparsity of the schedule that was reached
        self._changed = 0  # the step of the last pruning
        self._pending_log: dict[str, float] = {}  # of the last pruning, for the next log
        self._trainer: Trainer | None = None
        self._loss = loss_fn

    @property
    def sparsity(self) -> float:
        """Share of the targets' weights that is pruned; 0 before training."""
        return 0.0 if self.masks is None else self.masks.sparsity

    def attach(self, trainer: Trainer) -> MFACPruningCallback:
        """Add this callback in front of the reporters of ``trainer``, so that TensorBoard and others see its logs.

        With ``trainer.add_callback`` it comes last, and its logs are in ``state.log_history`` alone. A trainer that
        pushes to the Hub gets our card too (`mfac_hf.attach_card`).
        """
        trainer.callback_handler.callbacks.insert(0, self)
        self._trainer = trainer
        attach_card(trainer)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a run or go on with an interrupted one; refuse what cannot work before the model changes."""
        model, optimizer, dataloader = kwargs["model"], kwargs["optimizer"], kwargs["train_dataloader"]
        if self.masks is not None:
            self.masks.detach()  # an error ended an earlier training
        refuse_unsupported(args, state, model, lacks_evaluation=self.evaluate and kwargs["eval_dataloader"] is None)
        steps = schedule_in_steps(self.schedule, args, state, dataloader)
        folder, masks, progress = self._load_or_begin(args, state, model)
        # Refuse now what a pruning would refuse after hours of training.
        check_targets(model, masks, max(self.schedule.final, masks.sparsity), self.options)
        trained = training_loss(calling_trainer(self) or self._trainer, args) if self.loss_fn is None else None
        self._loss = self.loss_fn or trained
        parameters, source = masks.parameters(model), self._source(args, optimizer, dataloader)
        with without_fp16(model, args):
            check_source(source, self.options, model, parameters, steps.points[0][0])
            if trained is not None and self.options.method == "mfac":
                check_is_mean(source, model, parameters)

        self._steps, self.masks = steps, masks
        self._reached, self._changed = progress.target, progress.step
        self.reports, self._pending_log = [PruningReport(**report) for report in progress.reports], {}
        self._begin_distillation(args, model, folder, progress)
        if folder is None and masks.sparsity:  # a sparse model is pruned further
            masks.clear_optimizer_state(model, optimizer)
        if self.lr_cycle is not None:
            self.lr_cycle.begin([step for step, _ in steps.points], state.max_steps)
        write_state(args, masks, self._progress())
        masks.attach(model)

    def _load_or_begin(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module
    ) -> tuple[Path | None, MaskSet, Progress]:
        """Return the checkpoint that is resumed (None in a new run), the masks and the progress."""
        targets = find_targets(model, self.targets)
        if not state.global_step:
            progress = Progress(dataclasses.asdict(self.schedule), target=0.0, teacher=None, reports=[])
            return None, MaskSet.from_model(model, targets), progress
        return read_checkpoint(args, state, model, self.schedule, targets, self.resume_from, self.options.fisher)

    def _begin_distillation(
        self, args: TrainingArguments, model: nn.Module, folder: Path | None, progress: Progress
    ) -> None:
        """Take the teacher that was given, or bring back the one that the resumed run took."""
        if self.distillation is None:
            return
        self.distillation.begin(model)
        if folder is not None and self.distillation.given is None and progress.reports:
            self.distillation.load(folder.parent, model, progress.teacher)
            self.distillation.keep(args)  # for the next resume: this output directory may be another one

    def _source(self, args: TrainingArguments, optimizer: Any, dataloader: DataLoader) -> GradientSource | None:
        """Make a new source of gradients for each pruning, so that it does not depend on earlier ones."""
        data = dataloader, self._loss, all_ranks(args), self.outputs_fn
        return gradient_source(self.options, self.gradients, optimizer, *data)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune if the schedule says so."""
        sparsity = self._steps.sparsity_at(state.global_step)
        if sparsity <= self._reached:
            return
        self._reached = sparsity
        if sparsity <= self.sparsity:
            logger.info("step %d asks for a sparsity of %g and finds %g", state.global_step, sparsity, self.sparsity)
            return
        if self.distillation is not None and self.distillation.teacher is None:
            self.distillation.take(kwargs["model"])
            self.distillation.keep(args)
        with without_fp16(kwargs["model"], args):
            self._prune(sparsity, args, state, **kwargs)
        # The best model so far has more weights.
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        self._changed = state.global_step
        assert self.masks is not None
        write_state(args, self.masks, self._progress())
        logger.info("step %d: pruned to a sparsity of %.4f", state.global_step, self.sparsity)

    def _prune(
        self,
        sparsity: float,
        args: TrainingArguments,
        state: TrainerState,
        *,
        model: nn.Module,
        optimizer: Any,
        train_dataloader: DataLoader,
        eval_dataloader: DataLoader,
        **_: Any,
    ) -> None:
        assert self.masks is not None
        losses = {}
        if self.evaluate:
            losses["pruning/loss_before"] = mean_loss(model, eval_dataloader, self._loss, all_ranks(args))
        # Each pruning draws other examples, and the same ones after a resume.
        options = dataclasses.replace(self.options, seed=self.options.seed + state.global_step)
        report = prune_to(
            model,
            self.masks,
            self._source(args, optimizer, train_dataloader),
            sparsity,
            options,
            progress=state.is_world_process_zero and not args.disable_tqdm,
            process_group=all_ranks(args),
        )
        self.reports.append(dataclasses.replace(report, masks=None))
        self.masks.clear_optimizer_state(model, optimizer)
        if self.evaluate:
            losses["pruning/loss_after"] = mean_loss(model, eval_dataloader, self._loss, all_ranks(args))
        self._pending_log = {
            f"pruning/sparsity/{name}": value for name, value in self.masks.sparsities().items()
        } | losses

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Scale the learning rates by the factor of the cycle, for this step alone."""
        if self.lr_cycle is not None:
            self.lr_cycle.scale(kwargs["optimizer"], state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set pruned weights back to zero, and the learning rates back to those of the scheduler."""
        assert self.masks is not None
        self.masks.apply(kwargs["model"])
        if self.lr_cycle is not None:
            self.lr_cycle.restore(kwargs["optimizer"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Let Trainer log the step of a pruning."""
        if self._pending_log and args.logging_strategy != "no":
            control.should_log = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the sparsity to each training log, and after a pruning that of each tensor."""
        if logs is None or "loss" not in logs:  # an evaluation returns its log as its metrics
            return
        values = {"pruning/sparsity": self.sparsity, **self._pending_log}
        if self.lr_cycle is not None:
            values["pruning/lr_factor"] = self.lr_cycle.factor(state.global_step - 1)
        self._pending_log = {}
        logs.update(values)
        state.log_history[-1].update(values)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write masks and progress into the checkpoint."""
        assert self.masks is not None
        if args.should_save:
            write_checkpoint(checkpoint_folder(args, state), kwargs["model"], self.masks, self._progress())

    def _progress(self) -> Progress:
        return Progress(
            schedule=dataclasses.asdict(self.schedule),
            target=self._reached,
            teacher=None if self.distillation is None else self.distillation.mark,
            reports=[report.to_dict() for report in self.reports],
            step=self._changed,
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say where the schedule was not reached; check that the model has the sparsity that was."""
        assert self.masks is not None
        self.masks.detach()
        forget_state(args)
        if self._reached < self.schedule.final:
            warn_of_end(self._steps, state, self.sparsity)
        if self.distillation is not None:
            self.distillation.end()
        if nonzeros := self.masks.nonzeros(kwargs["model"]):
            raise RuntimeError(
                f"training ended with a model that is not pruned to {self.sparsity:.4f}: "
                f"{sum(nonzeros.values())} weights that should be zero are not, in {shortened(nonzeros)}. Something "
                f"else changed them, or the best model that was loaded ({state.best_model_checkpoint}) is an earlier, "
                "denser one; the last checkpoint has the pruned model"
            )
