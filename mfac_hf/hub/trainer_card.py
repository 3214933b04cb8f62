"""Let a Trainer write our model card: its own names the optimizer of TrainingArguments, whichever ran."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mfac_hf.defaults import MFAC_DEFAULTS
from mfac_hf.hub.adapter import base_of, count_parameters, is_adapter
from mfac_hf.hub.architecture import describe_architecture
from mfac_hf.hub.card import build_card
from mfac_hf.hub.facts import CardOptions, collect
from mfac_hf.hub.run_records import NOT_TRAINED, metrics_of, perplexities, pruning_facts, used_settings
from mfac_hf.loss_scale import warn_of_loss_scale
from mfac_hf.machine import describe_run
from mfac_hf.optim.unwrap import unwrap_optimizer
from mfac_hf.sparse.directory import SPARSE_FILE
from mfac_hf.storage import write_text

__all__ = ["attach_card", "facts_of_trainer"]

LANGUAGE_TASKS = ("text-generation", "fill-mask")


def attach_card(trainer: Trainer, **card_options: Any) -> None:
    """Let ``trainer`` write our card wherever it would write its own, and with each checkpoint that it pushes.

    This replaces ``create_model_card`` of this object; other trainers stay as they are. A trainer that pushes before
    it has evaluated writes a card that says so. A second call changes the options that it gives, and no others.

    Args:
        trainer: the trainer that gets our card.
        **card_options: fields of `mfac_hf.hub.facts.CardOptions`, which a trainer does not know: ``dense`` results to
            compare with, ``caveats``, ``license``, ``name``, ``model_class``.

    Raises:
        TypeError: for an option that does not exist.
    """
    options = dataclasses.replace(_options_of(trainer), **card_options)
    writer = _writer_of(trainer)
    if writer is None:
        writer = _CardWriter(trainer)
        trainer.add_callback(writer)
        trainer.create_model_card = writer.write  # type: ignore[method-assign, assignment]
    writer.options = options


class _CardWriter(TrainerCallback):
    """Write the card of one trainer.

    Args:
        trainer: the trainer. Its events hand a callback everything but the trainer itself.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.options = CardOptions()
        self.looked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look once whether gradients are a mean (`mfac_hf.loss_scale`)."""
        if not self.looked:
            self.looked = True
            warn_of_loss_scale(self.trainer)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the card: Trainer writes none before it pushes a checkpoint."""
        self.write()

    def write(
        self,
        language: Any = None,
        license: Any = None,
        tags: Any = None,
        model_name: str | None = None,
        **ignored: Any,
    ) -> None:
        """Write the card, in place of ``Trainer.create_model_card``, whose arguments these are."""
        trainer = self.trainer
        if not trainer.is_world_process_zero():
            return
        name = model_name or Path(trainer.hub_model_id or str(trainer.args.output_dir)).name
        facts = facts_of_trainer(trainer, name=name, license=license)
        facts["files"].pop(SPARSE_FILE, None)  # Trainer pushes the ordinary file only
        card = build_card(facts, trainer.hub_model_id)
        write_text(Path(str(trainer.args.output_dir)) / "README.md", str(card))


def _writer_of(trainer: Trainer) -> _CardWriter | None:
    """Return the writer that `attach_card` gave to ``trainer``, if it did."""
    return next((c for c in trainer.callback_handler.callbacks if isinstance(c, _CardWriter)), None)


def _options_of(trainer: Trainer) -> CardOptions:
    """Return the options that `attach_card` got for ``trainer``."""
    writer = _writer_of(trainer)
    return CardOptions() if writer is None else writer.options


def facts_of_trainer(trainer: Trainer, *, name: str, license: str | None = None) -> dict[str, Any]:
    """Gather the facts of a card for the model of ``trainer`` as it is now.

    Args:
        trainer: the trainer.
        name: name of the model, unless `attach_card` got one.
        license: licence of the weights, unless `attach_card` got one.

    Returns:
        What `mfac_hf.hub.facts.collect` returns.
    """
    args: Any = trainer.args
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    dataset: Any = trainer.eval_dataset
    info = getattr(dataset, "info", None)
    known = _dataset_name(info)
    evaluated = _last_evaluation(trainer.state, args.load_best_model_at_end)
    if _minimises_cross_entropy(trainer, model):
        evaluated = perplexities(_last_results(trainer.state, args.load_best_model_at_end)) | evaluated
    metrics = {key: value for key, value in evaluated.items() if math.isfinite(value)}
    not_finite = [key for key in evaluated if key not in metrics]
    reports = [r.to_dict() for c in trainer.callback_handler.callbacks for r in getattr(c, "reports", [])]
    run = {
        "task": None,
        "split": str(getattr(dataset, "split", None) or "evaluation"),
        "metrics": metrics,
        "dataset": {"id": known, "config": getattr(info, "config_name", None), "source": known} if known else None,
        "base_model": base,
        "optimizer": _optimizer(trainer.optimizer),
        "training": _training(trainer),
        "pruning": pruning_facts(reports),
        "dense_metrics": None,
        "seed": args.seed,
        "wall_seconds": None,
        **describe_run(None, args.device),
        **({"not_finite": not_finite} if not_finite else {}),
        **({"base_model_is_local": True} if base and not _is_from_hub(base) else {}),
        **({"parameters": count_parameters(model)} if is_adapter(model) else {}),
    }
    options = _options_of(trainer)
    options = dataclasses.replace(options, name=options.name or name, license=options.license or license)
    return collect([run], model=model, options=options, strict=False)


def _dataset_name(info: Any) -> str | None:
    """Return the name of a data set; None where it is that of a file format, such as ``json`` or ``generator``."""
    name, builder = getattr(info, "dataset_name", None), getattr(info, "builder_name", None)
    return None if name == builder else name or builder


def _is_from_hub(name: str) -> bool:
    """Whether weights of this name came from the Hub: then its file lies in the cache, and no directory is so called.

    A directory that has gone meanwhile must not become a link to whoever has a repository of that name.
    """
    try:
        return not Path(name).exists() and isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def _training(trainer: Trainer) -> dict[str, Any]:
    """Return the settings of a trainer that its training used; an optimizer or a schedule given to it has its own."""
    args: Any = trainer.args
    optimizer = unwrap_optimizer(trainer.optimizer)
    if optimizer is None:
        return {}
    batch_size = (trainer.state.train_batch_size or args.train_batch_size) // max(1, args.n_gpu)
    found = {"n_gpu": args.n_gpu, "per_device_train_batch_size": batch_size}  # auto_find_batch_size lowers it
    used = used_settings({**vars(args), **found})
    unused: list[str] = []
    if {group.get("initial_lr", group["lr"]) for group in optimizer.param_groups} != {args.learning_rate}:
        unused.append("learning_rate")
    if args.weight_decay not in {group.get("weight_decay") for group in optimizer.param_groups}:
        unused.append("weight_decay")
    if trainer.lr_scheduler is not None and not getattr(trainer, "_created_lr_scheduler", True):
        unused += ["lr_scheduler_type", "warmup_steps"]
    return {key: value for key, value in used.items() if key not in unused}


def _minimises_cross_entropy(trainer: Trainer, model: Any) -> bool:
    """Whether the loss is a language model's own, whose exponential is a perplexity."""
    task = describe_architecture(base_of(model))["task"]
    args: Any = trainer.args
    return task in LANGUAGE_TASKS and not args.label_smoothing_factor and trainer.compute_loss_func is None


def _last_evaluation(state: TrainerState, load_best: bool) -> dict[str, float]:
    """Return the metrics of the weights that the model has now; none where nobody has evaluated them."""
    return metrics_of(_last_results(state, load_best))


def _last_results(state: TrainerState, load_best: bool) -> dict[str, Any]:
    """Return all that Trainer reported of the evaluations of the weights that the model has now."""
    ends = [index for index, entry in enumerate(state.log_history) if "train_runtime" in entry]
    step = state.global_step
    if load_best and ends and state.best_global_step is not None:
        step = state.best_global_step
    results: dict[str, Any] = {}
    for index, entry in enumerate(state.log_history):
        if entry.get("step") == step or (ends and index > ends[-1]):
            results |= entry
    return results


def _optimizer(optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Name the optimizer that ran, and its settings."""
    optimizer = unwrap_optimizer(optimizer)
    if optimizer is None:
        return {"name": NOT_TRAINED}
    name = type(optimizer).__name__
    plain: dict[str, Any] = {
        k: v for k, v in optimizer.defaults.items() if isinstance(v, int | float | str | tuple) and v is not False
    }
    plain.pop("lr", None)
    if name == "MFAC":
        own = MFAC_DEFAULTS[plain["metric"]]
        foreign = set().union(*MFAC_DEFAULTS.values()) - own.keys()
        plain = {k: v for k, v in plain.items() if k not in foreign}
        plain |= {
            k: v for k, v in optimizer.defaults.items() if own.get(k) is True
        }  # told where it was turned off too
        plain["window_dtype"] = str(optimizer.defaults["window_dtype"]).removeprefix("torch.")
    decays = list(dict.fromkeys(group.get("weight_decay") for group in optimizer.param_groups))
    if decays != [None]:
        plain["weight_decay"] = decays[0] if len(decays) == 1 else decays  # what groups have, and not their default
    # the learning rate that a schedule starts from
    first = {"lr": optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"])}
    return {"name": "M-FAC" if name == "MFAC" else name, **first, **plain}
