"""Flags that the training scripts share, recipes of such flags, and the optimizer that they build."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import HfArgumentParser, TrainingArguments

from mfac_hf.checkpoints import last_whole_checkpoint
from mfac_hf.defaults import MFAC_DEFAULTS, MFAC_METRIC
from mfac_hf.optim.mfac import MFAC
from mfac_hf.optim.settings import settings_of
from mfac_hf.schema import check_schema
from mfac_hf.storage import read_yaml

logger = logging.getLogger(__name__)


def flag(default: Any, text: str, *aliases: str, **options: Any) -> Any:
    """A field of a dataclass of flags: its default, help text and other names, and options of ``add_argument``."""
    return field(default=default, metadata={"help": text, "aliases": list(aliases), **options})


# A flag that is None where it is not given, and True where it has no value.
SWITCH: dict[str, Any] = {"nargs": "?", "const": True}


@dataclass
class ModelArguments:
    """Which model and tokenizer to load; a token for private ones is read from the environment (``HF_TOKEN``)."""

    model_name_or_path: str = field(metadata={"help": "Name on the Hub, or a local directory."})
    tokenizer_name: str | None = flag(None, "Name or directory of the tokenizer; default: the model's.")
    revision: str = flag("main", "Branch, tag or commit on the Hub.")
    cache_dir: str | None = flag(None, "Directory for downloads.")

    @property
    def model_source(self) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained`` that locate the model."""
        return {
            "pretrained_model_name_or_path": self.model_name_or_path,
            "revision": self.revision,
            "cache_dir": self.cache_dir,
        }

    @property
    def tokenizer_source(self) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained`` that locate the tokenizer."""
        if self.tokenizer_name is None:
            return self.model_source
        return {"pretrained_model_name_or_path": self.tokenizer_name, "cache_dir": self.cache_dir}


_ADAM, _IDENTITY = MFAC_DEFAULTS["adam"], MFAC_DEFAULTS["identity"]


@dataclass
class OptimizerArguments:
    """The optimizer; learning rate, weight decay and Adam's betas and epsilon are those of ``TrainingArguments``.

    None stands for the default of M-FAC's metric.
    """

    optim_name: Literal["mfac", "adamw"] = flag(
        "mfac",
        "Optimizer; takes the place of TrainingArguments' --optim. Without --learning_rate, both run at Trainer's "
        f"5e-5, and mfac with --metric identity at {_IDENTITY['lr']:g}.",
    )
    metric: Literal["adam", "identity"] = flag(
        MFAC_METRIC,
        "mfac: what damping is measured in. adam takes AdamW's learning rate, --adam_beta1, --adam_beta2, "
        "--adam_epsilon and decoupled --weight_decay; identity is the method as published.",
    )
    num_grads: int | None = flag(
        None,
        f"mfac: gradients in the window; default: {_ADAM['num_grads']}, with --metric identity "
        f"{_IDENTITY['num_grads']}.",
    )
    damping: float | None = flag(
        None,
        f"mfac: damping relative to the stored gradients, default {_ADAM['damping']:g}; with --metric identity the "
        f"multiple of the identity that is added to the Fisher, default {_IDENTITY['damping']:g}.",
    )
    momentum: float | None = flag(
        None, "mfac, --metric identity: decay of the exponential average of directions; default: 0."
    )
    grad_decay: float | None = flag(
        None,
        "mfac, --metric identity: decay of the exponential average of gradients that is preconditioned; default: 0.",
    )
    normalize: Literal["num_grads", "count"] | None = flag(
        None,
        "mfac, --metric identity: divide the Fisher by num_grads (default), or by the gradients that the window holds "
        "so far.",
    )
    decoupled_weight_decay: bool | None = flag(
        None,
        "mfac, --metric identity: apply --weight_decay to the weights, as AdamW does; else (default) it is added to "
        "the gradient, which then is dense.",
        **SWITCH,
    )
    nesterov: bool | None = flag(
        None,
        "mfac, --metric adam: let the average of the gradients look one step ahead, as NAdam does; default: True.",
        **SWITCH,
    )
    window_dtype: Literal["float32", "bfloat16", "float64"] | None = flag(
        None,
        f"mfac: storage of the window; default: {_ADAM['window_dtype']}, with --metric identity "
        f"{_IDENTITY['window_dtype']}.",
    )
    window_device: list[str] | None = flag(
        None,
        "mfac: device or devices that hold the window; host streams it from there; default: the parameters' own.",
    )
    row_sparse: bool = flag(True, "mfac: keep only the rows of embedding gradients that a batch touches.")
    share_window: bool = flag(
        True, "mfac: under several processes (accelerate launch) each keeps a part of the window, if that is large."
    )
    save_window: bool = flag(True, "mfac: write the window into checkpoints; without it, a resumed run refills it.")

    def given(self) -> dict[str, Any]:
        """The options of M-FAC that depend on its metric and were given.

        Raises:
            ValueError: one of them belongs to the other metric.
        """
        names = [field.name for field in dataclasses.fields(self) if field.name in {**_ADAM, **_IDENTITY}]
        options = {name: value for name in names if (value := getattr(self, name)) is not None}
        if "window_dtype" in options:
            options["window_dtype"] = getattr(torch, options["window_dtype"])
        settings_of(self.metric, options)
        return options


OptimizerMaker = Callable[[nn.Module, OptimizerArguments, TrainingArguments], torch.optim.Optimizer]


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows a description as it is written, and defaults unless they are None, which a flag's text explains."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def recipe_to_flags(path: str | os.PathLike[str], known: Iterable[str]) -> list[str]:
    """Read a YAML or JSON mapping of argument names to values as command line flags.

    Going through flags gives recipes the types and checks of the command line (``1e-3``, which YAML reads as a
    string, becomes a float). A null value leaves the default.

    Args:
        path: the recipe.
        known: names of the arguments that exist.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no YAML, no mapping of names to plain values, or has a key that is no argument.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"recipe {path} is no file; give flags, or a .yaml or .json file as first argument")
    recipe: Any = read_yaml(path)
    if not isinstance(recipe, dict):
        raise ValueError(
            f"recipe {path} holds a {type(recipe).__name__}; expected a mapping of argument names to values"
        )
    scalar = str | float | bool | None
    check_schema(recipe, dict[str, scalar | list[scalar] | dict[str, Any]], f"recipe {path}")
    if unknown := sorted(set(map(str, recipe)) - set(known)):
        raise ValueError(
            f"recipe {path} has keys that are no arguments: {', '.join(unknown)}; --help lists what exists"
        )
    flags: list[str] = []
    for name, value in recipe.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def parse_args(
    *dataclass_types: Any, argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """Parse flags, or a recipe followed by flags that override it, into one instance of each dataclass.

    Where :class:`OptimizerArguments` is among the types, mfac was chosen in the identity metric and no learning rate
    was given, the learning rate becomes the one of that metric instead of Trainer's 5e-5, which a log line says.

    Args:
        dataclass_types: dataclasses with disjoint field names.
        argv: arguments without the program's name; ``sys.argv[1:]`` if None.
        description: text above the flags in ``--help``.

    Raises:
        ValueError: an unknown flag or recipe key.
        SystemExit: a missing or malformed flag (argparse prints which), or a recipe of ``sys.argv`` that cannot be
            read.
    """
    as_program = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(
        dataclass_types, allow_abbrev=False, description=description, formatter_class=HelpFormatter
    )
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        names = [f.name for kind in dataclass_types for f in dataclasses.fields(kind) if f.init]
        try:
            argv = recipe_to_flags(argv[0], names) + argv[1:]
        except (OSError, ValueError) as error:
            if not as_program:
                raise
            parser.exit(2, f"{parser.prog}: error: {error}\n")
    if OptimizerArguments in dataclass_types and TrainingArguments in dataclass_types:
        default = parser.get_default("learning_rate")
        parser.set_defaults(learning_rate=None)
        chosen, _ = parser.parse_known_args(argv)
        if chosen.learning_rate is None and chosen.optim_name == "mfac" and chosen.metric == "identity":
            ours = MFAC_DEFAULTS["identity"]["lr"]
            logger.info("no --learning_rate given: --metric identity has %g, not Trainer's %g", ours, default)
            default = ours
        parser.set_defaults(learning_rate=default)
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


def require_action(training_args: TrainingArguments) -> None:
    """Raise ValueError unless at least one of --do_train, --do_eval and --do_predict was given."""
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise ValueError("nothing to do: give at least one of --do_train, --do_eval, --do_predict")


def find_checkpoint(training_args: TrainingArguments) -> str | None:
    """Resolve ``--resume_from_checkpoint``: a checkpoint directory, or ``last`` for the last whole one in the output.

    Raises:
        FileNotFoundError: the directory, or any checkpoint to take for ``last``, is missing.
    """
    asked, output_dir = training_args.resume_from_checkpoint, str(training_args.output_dir)
    if asked is None:
        return None
    checkpoint = last_whole_checkpoint(output_dir, ranks=training_args.world_size) if asked == "last" else asked
    if checkpoint is None or not os.path.isdir(checkpoint):
        raise FileNotFoundError(
            f"--resume_from_checkpoint {asked}: no such checkpoint; give a checkpoint-<step> directory, "
            f"or 'last' for the latest one in --output_dir ({output_dir})"
        )
    return checkpoint


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that do not, as Trainer does.

    Matrices decay; vectors and scalars (biases, layer norms) do not. With ``weight_decay`` 0 all stay in one group,
    in the model's order.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if weight_decay == 0:
        return [{"params": parameters, "weight_decay": 0.0}]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, optimizer_args: OptimizerArguments, training_args: TrainingArguments
) -> torch.optim.Optimizer:
    """Make the optimizer to hand to ``Trainer(optimizers=(optimizer, None))``.

    Learning rate, weight decay and Adam's betas and epsilon come from ``training_args``; biases and layer norms are
    exempt from weight decay (:func:`parameter_groups`).

    Raises:
        ValueError: the model has no trainable parameter, ``--optim`` was given, which would have no effect, or an
            option of M-FAC is out of range or of another metric than the chosen one.
    """
    trainer_default = TrainingArguments.__dataclass_fields__["optim"].default
    if training_args.optim != trainer_default:
        raise ValueError(f"--optim {training_args.optim} would have no effect here: use --optim_name mfac or adamw")
    groups = parameter_groups(model, training_args.weight_decay)
    if not any(group["params"] for group in groups):
        raise ValueError("the model has no trainable parameter: requires_grad is False everywhere")
    betas, eps = (training_args.adam_beta1, training_args.adam_beta2), training_args.adam_epsilon
    if optimizer_args.optim_name == "adamw":
        return torch.optim.AdamW(groups, lr=training_args.learning_rate, betas=betas, eps=eps)

    options: dict[str, Any] = optimizer_args.given()
    if optimizer_args.metric == "adam":
        options |= {"betas": betas, "eps": eps}
    devices: Any = optimizer_args.window_device
    return MFAC(
        groups,
        lr=training_args.learning_rate,
        metric=optimizer_args.metric,
        **options,
        weight_decay=training_args.weight_decay,
        window_device=devices[0] if devices is not None and len(devices) == 1 else devices,
        process_group="auto" if optimizer_args.share_window else None,
        row_sparse=optimizer_args.row_sparse,
        save_window=optimizer_args.save_window,
    )
