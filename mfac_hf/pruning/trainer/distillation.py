r"""Knowledge distillation from a dense teacher, without a Trainer subclass.

In training mode the loss that the model returns becomes

.. math:: (1 - h)\, L + h\, T^2\, \mathrm{KL}\big(\mathrm{softmax}(z_t / T) \,\|\, \mathrm{softmax}(z_s / T)\big)

with the hardness h, the temperature T, and the logits :math:`z_t` of the teacher and :math:`z_s` of the student
(Hinton, Vinyals and Dean, 2015). Heads with several logits, such as the start and the end of an answer, take the mean
of their terms. Regression takes the mean squared difference of the outputs. In evaluation mode the loss stays the
task's own, so that neither evaluations nor the Fisher matrix of the pruner see the teacher.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainingArguments

from mfac_hf.pruning.trainer.checkpoint import fingerprint
from mfac_hf.storage import written_aside

__all__ = ["Distillation", "copy_model", "distillation_loss"]

TEACHER_NAME = "teacher.safetensors"
_IGNORED_LABEL = -100


class Distillation:
    """A frozen teacher and its part in the loss of a student.

    Args:
        hardness: share h of the teacher in the loss, in (0, 1]; 1 leaves the labels out.
        temperature: T > 0, which softens both distributions; it plays no part in regression.
        teacher: a model that takes the student's inputs and returns logits of the same names and shapes, or a
            directory to load one of the student's class from; it is frozen. None takes a copy of the student just
            before its first weight is pruned; until then the loss stays the task's own.

    Raises:
        ValueError: a hardness or temperature out of range.
    """

    def __init__(
        self,
        *,
        hardness: float = 1.0,
        temperature: float = 2.0,
        teacher: nn.Module | str | os.PathLike[str] | None = None,
    ) -> None:
        if not 0.0 < hardness <= 1.0:
            raise ValueError(f"hardness is {hardness!r}; expected a number in (0, 1]; leave distillation out for 0")
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature!r}; expected a positive number")
        self.hardness = hardness
        self.temperature = temperature
        self.given = teacher
        self.teacher: nn.Module | None = None
        self.mark: str | None = None  # fingerprint of a teacher that is a copy
        self._handle: Any = None

    def begin(self, model: nn.Module) -> None:
        """Take the teacher that was given, if one was, and forget any other.

        Raises:
            ValueError: the teacher is the student itself, or the student cannot load one from a directory.
            OSError: there is no model in that directory.
        """
        self.end()
        self.teacher = self.mark = None
        if self.given is None:
            return
        if isinstance(self.given, nn.Module):
            teacher = self.given
        else:
            from_pretrained: Any = getattr(type(model), "from_pretrained", None)
            if from_pretrained is None:
                raise ValueError(f"{type(model).__name__} has no from_pretrained: pass the teacher as a model")
            if not Path(self.given).is_dir():
                raise FileNotFoundError(f"no directory {self.given} to load a teacher from; save_pretrained makes one")
            teacher = from_pretrained(self.given)
        if teacher is model:
            raise ValueError("the teacher is the model in training itself; pass a copy, or None to have one taken")
        self._attach(model, teacher)

    def take(self, model: nn.Module) -> None:
        """Take a copy of the model, as it is now, for the teacher."""
        self.end()
        teacher = copy_model(model)
        self.mark = fingerprint(teacher.parameters())
        self._attach(model, teacher)

    def save(self, directory: Path) -> None:
        """Write the teacher's weights into a directory; a run that is killed meanwhile leaves no half of a file.

        Raises:
            OSError: the file cannot be written.
        """
        assert self.teacher is not None
        with written_aside(directory / TEACHER_NAME) as unfinished:
            save_model(self.teacher, str(unfinished))

    def keep(self, args: TrainingArguments) -> None:
        """Save a teacher that is a copy into the output directory, if this run and this rank save anything."""
        if args.should_save and args.save_strategy != "no" and self.given is None:
            self.save(Path(str(args.output_dir)))

    def load(self, directory: Path, model: nn.Module, expected: str | None) -> None:
        """Bring back a teacher that :meth:`save` wrote.

        Args:
            directory: the directory that it lies in.
            model: the student, whose structure the teacher has.
            expected: the teacher's ``mark``; None if the run so far had no teacher.

        Raises:
            FileNotFoundError: there is no teacher in the directory.
            ValueError: it is another teacher, or a damaged file, or the run so far had none.
        """
        if expected is None:
            raise ValueError(
                "weights were pruned before distillation was asked for, so there is no dense model to take as a "
                "teacher; pass one: Distillation(teacher=...)"
            )
        file = directory / TEACHER_NAME
        if not file.is_file():
            raise FileNotFoundError(
                f"no teacher at {file}, where the interrupted run saved the dense model that it distils from; copy "
                "the file there, or pass the same teacher to Distillation(teacher=...)"
            )
        self.end()
        teacher = copy_model(model)
        try:
            load_model(teacher, str(file))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{file} is damaged, or holds another model: {error}") from error
        self.mark = fingerprint(teacher.parameters())
        if self.mark != expected:
            raise ValueError(f"the teacher at {file} is not the one of the interrupted run; bring that one back")
        self._attach(model, teacher)

    def _attach(self, model: nn.Module, teacher: nn.Module) -> None:
        self.teacher = teacher.to(next(model.parameters()).device).eval().requires_grad_(False)
        self._handle = model.register_forward_hook(self._distil, with_kwargs=True)

    def end(self) -> None:
        """Give the model back its own loss; the teacher stays."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _distil(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Replace the loss in the model's output, in training mode."""
        if not model.training:
            return None
        assert self.teacher is not None
        heads = _heads(output)
        with torch.no_grad():
            wanted = self.teacher(*args, **kwargs)
        _check_shapes(heads, output, wanted)
        labels, regression = kwargs.get("labels"), _is_regression(model)
        terms = [
            distillation_loss(
                output[name],
                wanted[name],
                temperature=self.temperature,
                regression=regression,
                counted=_counted(output[name], labels),
            )
            for name in heads
        ]
        loss = output["loss"]
        factor = _normalisation(loss, output[heads[0]], labels, kwargs.get("num_items_in_batch"))
        term = torch.stack(terms).mean() * factor
        output["loss"] = (1 - self.hardness) * loss + self.hardness * term.to(loss.dtype)
        return output


def _heads(output: Any) -> list[str]:
    """Return the names of the logits in a model's output; ValueError where it has no loss or no logits."""
    if not isinstance(output, MutableMapping) or output.get("loss") is None:
        returned = list(output) if isinstance(output, MutableMapping) else type(output).__name__
        raise ValueError(
            f"distillation changes the loss that the model returns, but this one returned {returned}. Let it return a "
            "dictionary with 'loss' and logits: pass labels, and use neither label smoothing nor compute_loss_func"
        )
    heads = [name for name in output if name.endswith("logits") and isinstance(output[name], Tensor)]
    if not heads:
        raise ValueError(f"distillation needs logits, but the model returned {list(output)}")
    return heads


def _check_shapes(heads: list[str], student: Any, teacher: Any) -> None:
    """Raise ValueError unless the teacher's output has the student's logits."""
    for name in heads:
        if name not in teacher or teacher[name].shape != student[name].shape:
            found = tuple(teacher[name].shape) if name in teacher else "none"
            raise ValueError(
                f"{name} has shape {tuple(student[name].shape)} in the student and {found} in the teacher; "
                "the teacher needs the same head and tokens"
            )


def _is_regression(model: nn.Module) -> bool:
    """Return whether the model's task is regression; ValueError for multi-label classification."""
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        raise ValueError("distillation is not defined here for multi_label_classification; leave it out")
    return problem == "regression" or getattr(config, "num_labels", None) == 1


def copy_model(model: nn.Module) -> nn.Module:
    """Return a copy that computes with its own weights, under the same mixed precision."""
    teacher = copy.deepcopy(model)
    wrapped = vars(teacher).get("forward")  # accelerate binds a method; a plain function would call the student
    if wrapped is not None and getattr(wrapped, "__self__", None) is not teacher:
        raise ValueError(
            f"{type(model).__name__}.forward was replaced by a function that belongs to the student, and so would be "
            "its copy's; pass a teacher of its own: Distillation(teacher=...)"
        )
    return teacher


def distillation_loss(
    student: Tensor, teacher: Tensor, *, temperature: float, regression: bool = False, counted: Tensor | None = None
) -> Tensor:
    r"""Return the mean of :math:`T^2\,\mathrm{KL}(\mathrm{softmax}(z_t/T)\,\|\,\mathrm{softmax}(z_s/T))` over rows.

    It is computed in float32.

    Args:
        student: logits (..., classes), with a gradient.
        teacher: logits of the same shape.
        temperature: T.
        regression: take the mean of :math:`(z_t - z_s)^2` instead.
        counted: bool (...), the rows that count; None for all.
    """
    student, teacher = student.float(), teacher.float()
    if regression:
        return functional.mse_loss(student, teacher)
    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    if counted is not None:
        student, teacher = student[counted.flatten()], teacher[counted.flatten()]
    return temperature**2 * functional.kl_div(
        functional.log_softmax(student / temperature, -1),
        functional.log_softmax(teacher / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )


def _counted(logits: Tensor, labels: Any) -> Tensor | None:
    """Return which rows of token or sequence logits have a label; None where the labels are of another kind."""
    if not isinstance(labels, Tensor) or labels.shape != logits.shape[:-1] or labels.is_floating_point():
        return None
    return labels != _IGNORED_LABEL


def _normalisation(loss: Tensor, logits: Tensor, labels: Any, num_items: Any) -> Any:
    """Return the factor from a mean over this batch to the model's own normalisation.

    When gradients accumulate, Trainer tells the model how many labels all batches of the step have. Some models divide
    their summed loss by that number, others (BERT's classifier) take the mean of the batch; only the value of the loss
    shows which.
    """
    counted = _counted(logits, labels)
    if num_items is None or counted is None:
        return 1.0
    mean = functional.cross_entropy(
        logits.detach().float().flatten(0, -2), labels.flatten(), ignore_index=_IGNORED_LABEL
    )
    share = counted.sum() / num_items
    return torch.where((loss.detach() - mean).abs() <= (loss.detach() - share * mean).abs(), 1.0, share)
