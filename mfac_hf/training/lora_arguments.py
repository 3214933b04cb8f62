"""LoRA flags of the training scripts, and the model that they wrap: small factors are trained, the rest is frozen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from mfac_hf.hub.adapter import count_parameters
from mfac_hf.training.arguments import flag

__all__ = ["LoraArguments", "add_lora", "base_of_adapter", "describe_lora", "load_adapter"]

ALL_LINEAR = "all-linear"  # peft's name for every linear layer but the output layer
# By peft's name of a task: classes of models for it, and the modules that peft trains and saves in full.
TASKS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "SEQ_CLS": (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, ("classifier", "score")),
    "QUESTION_ANS": (modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, ("qa_outputs",)),
    "CAUSAL_LM": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, ()),
}


@dataclass
class LoraArguments:
    """Whether to train low-rank factors beside frozen weights (LoRA, with peft). The head is trained and saved too."""

    lora_rank: int | None = flag(None, "Rank of the factors; without it, all weights are trained.")
    lora_alpha: int | None = flag(
        None, "The factors' product is multiplied by lora_alpha / lora_rank; default: twice the rank."
    )
    lora_dropout: float = flag(0.0, "Dropout before the factors.")
    lora_targets: list[str] | None = flag(
        None,
        f"Names of the layers that get factors, or {ALL_LINEAR}; default: peft's choice for the architecture, "
        "query and value layers for most.",
    )

    @property
    def alpha(self) -> int:
        """``lora_alpha``, or its default."""
        return 2 * (self.lora_rank or 0) if self.lora_alpha is None else self.lora_alpha

    def check(self) -> None:
        """Raise an error unless the flags can be followed, before anything is loaded.

        Raises:
            ValueError: a flag is out of range, or given without a rank.
            ModuleNotFoundError: peft is missing.
        """
        if self.lora_rank is None:
            for name in ("lora_alpha", "lora_dropout", "lora_targets"):
                if (value := getattr(self, name)) not in (None, 0.0):
                    raise ValueError(f"--{name} {value} needs --lora_rank, the rank of the factors, such as 8")
            return
        if self.lora_rank < 1:
            raise ValueError(f"--lora_rank {self.lora_rank}: expected at least 1")
        if self.alpha < 1:
            raise ValueError(f"--lora_alpha {self.lora_alpha}: expected at least 1")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"--lora_dropout {self.lora_dropout:g}: expected a share in [0, 1)")
        _import_peft("--lora_rank")


def add_lora(model: PreTrainedModel, arguments: LoraArguments, drawn: Iterable[str] = ()) -> Any:
    """Freeze a model and give its layers factors to train.

    Args:
        model: the model; it is changed.
        arguments: the flags, with a rank.
        drawn: names of parameters that its checkpoint lacks, such as a new head. Whoever loads the adapter draws other
            ones, so that their modules are trained and saved in full.

    Returns:
        The ``peft.PeftModel`` around ``model``.

    Raises:
        ValueError: the model is for another task, peft knows no targets for the architecture, or the model has none of
            these names.
    """
    peft = _import_peft("--lora_rank")
    task, heads = _task_of(model)
    targets: Any = arguments.lora_targets
    layers = _linear_layers(model)
    hint = f"name some of its linear layers, {', '.join(layers)}, or {ALL_LINEAR}"
    known = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if targets is None and model.config.model_type not in known:
        raise ValueError(f"--lora_targets is missing, and peft has no default for {model.config.model_type}: {hint}")
    config = peft.LoraConfig(
        task_type=task,
        r=arguments.lora_rank,
        lora_alpha=arguments.alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        modules_to_save=_whole_modules(drawn, heads) or None,
    )
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        named, reason = " ".join(targets or []), str(error).partition(". ")[0]
        raise ValueError(f"--lora_targets {named}: the model has no such layer ({reason}); {hint}") from error
    reached = adapted.base_model.targeted_module_names
    for name in [] if targets in (None, [ALL_LINEAR]) else targets:
        if not any(f".{layer}".endswith(f".{name}") for layer in reached):
            raise ValueError(f"--lora_targets {name}: the model has no such layer; {hint}")
    return adapted


def base_of_adapter(directory: str) -> str:
    """Name or directory of the model that the adapter in ``directory`` belongs to.

    Raises:
        ModuleNotFoundError: peft is missing.
        ValueError: the adapter does not say.
    """
    config = _import_peft(directory).PeftConfig.from_pretrained(directory)
    if not config.base_model_name_or_path:
        raise ValueError(f"{directory} holds an adapter that does not name its base model (base_model_name_or_path)")
    return str(config.base_model_name_or_path)


def load_adapter(model: PreTrainedModel, directory: str, arguments: LoraArguments, *, trainable: bool) -> Any:
    """Load an adapter onto its model, to train it further or to evaluate it.

    Raises:
        ValueError: the flags ask for new factors beside its own.
    """
    if arguments.lora_rank is not None:
        raise ValueError(
            f"--lora_rank {arguments.lora_rank}: {directory} holds an adapter already; leave the flag out to go on "
            "with it"
        )
    return _import_peft(directory).PeftModel.from_pretrained(model, directory, is_trainable=trainable)


def describe_lora(adapted: Any) -> dict[str, Any]:
    """What ``results.json`` says of an adapted model: the settings, what is saved, and the numbers of parameters."""
    config = adapted.peft_config[adapted.active_adapter]
    return {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "targets": sorted(set(_last_names(adapted.base_model.targeted_module_names))),
        **count_parameters(adapted),
    }


def _task_of(model: PreTrainedModel) -> tuple[str, tuple[str, ...]]:
    """Find the task that a model is for, and the modules that peft saves in full."""
    name = type(model).__name__
    for task, (classes, heads) in TASKS.items():
        if name in classes.values():
            return task, heads
    raise ValueError(
        f"--lora_rank with a {name}: expected a model that classifies sequences, answers questions or generates text"
    )


def _whole_modules(drawn: Iterable[str], heads: tuple[str, ...]) -> list[str]:
    """Names of the outermost modules that have these parameters, without those that peft saves by itself."""
    names = {name: name.rpartition(".")[0] for name in drawn}
    if bare := sorted(name for name, module in names.items() if not module):
        raise ValueError(
            f"the checkpoint lacks {', '.join(bare)}, which an adapter cannot save: train without --lora_rank, or "
            "from a checkpoint that has it"
        )
    whole: list[str] = []
    for module in sorted(set(names.values())):  # outer before inner
        inside = any(module.startswith(f"{outer}.") for outer in whole)
        if not inside and not any(part.endswith(heads) for part in module.split(".")):
            whole.append(module)
    return whole


def _linear_layers(model: nn.Module) -> list[str]:
    """The last parts of the names of linear layers, each once."""
    kinds = (nn.Linear, Conv1D)
    return list(dict.fromkeys(_last_names(n for n, module in model.named_modules() if isinstance(module, kinds))))


def _last_names(names: Iterable[str]) -> list[str]:
    return [name.rpartition(".")[2] for name in names]


def _import_peft(what: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModuleNotFoundError(f"{what} needs peft ({error}): pip install 'mfac_hf[lora]'") from error
    return peft
