"""Our model card in place of Trainer's, which names the optimizer of TrainingArguments even where another one ran.

Trainer hands itself to no callback and no optimizer, and `Trainer.push_to_hub` writes its card after the last event
that callbacks see. So `CardCallback` replaces ``create_model_card`` of the one Trainer that pushes, and of no other,
and `mfac_hf.MFAC` gives this callback to the Trainer that takes its first step.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mfac_hf.hub.run_records import TRAINING_SETTINGS, metrics_of, pruning_facts

__all__ = ["CardCallback", "facts_of_trainer", "push_run", "use_our_card"]

logger = logging.getLogger(__name__)


class CardCallback(TrainerCallback):
    """See that the Trainer that has this callback pushes our card, whenever and however it pushes.

    What a Trainer does not know (dense results to compare with, caveats, a licence) can be given in ``card_options``,
    which go to `mfac_hf.hub.facts.collect`. Trainer also pushes before it has evaluated: the card then says so.
    """

    card_options: dict[str, Any] = {}

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write our card now, and again where Trainer would write its own."""
        trainer = self._pushing_trainer()
        use_our_card(trainer, self.card_options)
        trainer.create_model_card()

    def _pushing_trainer(self) -> Trainer:
        """The Trainer whose method called the event."""
        for trainer in _calling_trainers():
            if self in trainer.callback_handler.callbacks:
                return trainer
        raise RuntimeError("no Trainer with this callback is pushing: on_push_begin is for Trainer to call")

    @classmethod
    def join(cls) -> None:
        """Add such a callback to the Trainer that calls, if one does, has none yet, and no card of its own kind."""
        trainer = next(_calling_trainers(), None)
        if trainer is None or type(trainer).create_model_card is not Trainer.create_model_card:
            return
        if not any(isinstance(callback, CardCallback) for callback in trainer.callback_handler.callbacks):
            trainer.add_callback(cls())


def _calling_trainers() -> Iterator[Trainer]:
    """The Trainers whose methods are running, innermost first: found on the stack, as they name themselves nowhere."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            yield caller
        frame = frame.f_back


def use_our_card(trainer: Trainer, options: dict[str, Any] | None = None) -> None:
    """Let ``trainer.create_model_card`` write our card from now on.

    Args:
        trainer: the one to change; others stay as they are.
        options: arguments for `mfac_hf.hub.facts.collect`.
    """

    def create_model_card(
        language: Any = None, license: Any = None, tags: Any = None, model_name: str | None = None, **ignored: Any
    ) -> None:
        from mfac_hf.hub.card import build_card  # here and below: a callback that never pushes need not wait for these

        if not trainer.is_world_process_zero():
            return
        chosen = {"name": model_name or Path(trainer.hub_model_id or str(trainer.args.output_dir)).name}
        chosen |= {"license": license} if license else {}
        card = build_card(facts_of_trainer(trainer, **{**chosen, **(options or {})}), trainer.hub_model_id)
        card.save(Path(str(trainer.args.output_dir)) / "README.md")

    trainer.create_model_card = create_model_card  # type: ignore[method-assign, assignment]


def facts_of_trainer(trainer: Trainer, **options: Any) -> dict[str, Any]:
    """What a card says of the model of ``trainer`` as it is now, as `mfac_hf.hub.facts.collect` gathers it."""
    from mfac_hf.hub.facts import collect
    from mfac_hf.machine import describe_run
    from mfac_hf.sparse.files import SPARSE_FILE

    args: Any = trainer.args
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    dataset: Any = trainer.eval_dataset
    info = getattr(dataset, "info", None)
    known = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
    reports = [r.to_dict() for c in trainer.callback_handler.callbacks for r in getattr(c, "reports", [])]
    run = {
        "task": None,
        "split": str(getattr(dataset, "split", None) or "evaluation"),
        "metrics": _last_evaluation(trainer.state, args.load_best_model_at_end),
        "dataset": {"id": known, "config": getattr(info, "config_name", None), "source": known} if known else None,
        "base_model": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "optimizer": _optimizer(trainer.optimizer),
        "training": {
            key: value for key in TRAINING_SETTINGS if (value := getattr(args, key, None)) not in (None, False, -1)
        },
        "pruning": pruning_facts(reports),
        "dense_metrics": None,
        "seed": args.seed,
        "wall_seconds": None,
        **describe_run(None, args.device),
    }
    facts = collect([run], model=model, strict=False, latency=False, **options)
    facts["files"].pop(SPARSE_FILE, None)  # Trainer pushes the ordinary file only
    return facts


def push_run(trainer: Trainer) -> None:
    """Push the output directory of a script's run, with the card that its ``results.json`` gives, in one commit.

    Does nothing without ``--push_to_hub``, or on other ranks than the first.

    Raises:
        PushError: the Hub could not be reached, or refused.
    """
    from mfac_hf.hub.facts import collect
    from mfac_hf.hub.push import push_to_hub

    args: Any = trainer.args
    if not args.push_to_hub or not trainer.is_world_process_zero():
        return
    repo_id = str(trainer.hub_model_id)
    results = Path(args.output_dir) / "results.json"
    facts = collect([results], model=args.output_dir, name=repo_id.rpartition("/")[2], strict=False)
    push_to_hub(args.output_dir, repo_id, card=facts, api=HfApi(token=args.hub_token), revision=args.hub_revision)


def _last_evaluation(state: TrainerState, load_best: bool) -> dict[str, float]:
    """The metrics of the weights that the model has now; empty where these have not been evaluated."""
    ends = [index for index, entry in enumerate(state.log_history) if "train_runtime" in entry]
    step = state.global_step
    if load_best and ends and state.best_global_step is not None:
        step = state.best_global_step
    metrics: dict[str, float] = {}
    for index, entry in enumerate(state.log_history):
        if entry.get("step") == step or (ends and index > ends[-1]):
            metrics |= metrics_of(entry)
    return metrics


def _optimizer(optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Class and settings of the optimizer that ran."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if optimizer is None:
        return {"name": "none: the model was not trained in this run"}
    name = type(optimizer).__name__
    plain = {
        k: v for k, v in optimizer.defaults.items() if isinstance(v, int | float | str | tuple) and v is not False
    }
    plain.pop("lr", None)
    # the learning rate that a schedule starts from
    first = {"lr": optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"])}
    return {"name": "M-FAC" if name == "MFAC" else name, **first, **plain}
