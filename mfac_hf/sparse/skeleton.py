"""The model that a configuration describes, without weights, where the configuration may come from a stranger.

Only model classes of transformers are built, on the meta device, without code from elsewhere, and with bounded work: a
configuration that asks for a billion layers is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as torch_module

from mfac_hf.storage import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CONFIG_FILE", "build_skeleton", "bounded_build", "find_class", "read_config"]

CONFIG_FILE = "config.json"
# No model has a longer axis, vocabulary or context, nor more layers or labels, nor longer lists in its configuration.
MOST = 1 << 24
MOST_PARTS = 1 << 16
MOST_CONFIG_BYTES = 16 << 20
# Modules and parameters of a model for each tensor of its files, and for one without files.
PARTS_PER_TENSOR = 50
PARTS = 10_000
_PARTS = re.compile(r"layer|depth|block|stage|head|label")
# Large numbers that nobody counts to.
_NO_COUNT = re.compile(r"theta|base|seed")
# What would choose code from elsewhere.
_FOREIGN_CODE = re.compile(r"(attn|experts)_implementation|auto_map|trust_remote_code|quantization_config")


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the configuration of a model directory; None where it has none.

    Raises:
        ValueError: it is no configuration, or asks for more than any model has.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        return None
    if (size := path.stat().st_size) > MOST_CONFIG_BYTES:
        raise ValueError(f"{path} has {size} bytes; expected at most {MOST_CONFIG_BYTES}")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no configuration: expected a JSON object, found {type(config).__name__}")
    _check_counts(path, "", config)
    return config


def _check_counts(path: Path, key: str, value: Any) -> None:
    """Refuse numbers that would keep whoever builds the model busy for ever."""
    if isinstance(value, dict | list) and len(value) > MOST_PARTS:
        raise ValueError(f"{path} has {len(value)} entries in {key}; expected at most {MOST_PARTS}")
    if isinstance(value, dict):
        for name, entry in value.items():
            _check_counts(path, name, entry)
    elif isinstance(value, list):
        if _PARTS.search(key):
            _check_counts(path, key, sum(entry for entry in value if type(entry) is int))
        for entry in value:
            _check_counts(path, key, entry)
    elif isinstance(value, int) and not _NO_COUNT.search(key):
        most = MOST_PARTS if _PARTS.search(key) else MOST
        if value > most:
            raise ValueError(f"{path} asks for {key} = {value!r:.40}; expected at most {most}")


def find_class(directory: str | os.PathLike[str]) -> type[PreTrainedModel] | None:
    """Find the model class of transformers that the configuration of a directory names.

    Returns:
        The class; None where the directory has no configuration, or one that names no class or one of another library.

    Raises:
        ValueError: the configuration names something in transformers that is no model class, or is none itself.
    """
    import transformers

    path = Path(directory) / CONFIG_FILE
    named = (read_config(directory) or {}).get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"architectures in {path} is {named!r:.80}; expected a list with the name of a class")
    found = getattr(transformers, named[0], None) if named and named[0].isidentifier() else None
    if found is None:
        return None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not is_model or found.config_class is None:
        raise ValueError(f"{path} names {named[0]}, which is no model class of transformers")
    return found


def build_skeleton(directory: str | os.PathLike[str], tensors: int = 0) -> PreTrainedModel | None:
    """Build the model of a directory on the meta device, with tied weights tied.

    Args:
        directory: a directory with a ``config.json``.
        tensors: tensors in its weight files, which bound the parts of the model.

    Returns:
        The model; None where its class is not one of transformers (`find_class`), or of another library within one.

    Raises:
        ValueError: the configuration is none, names no model class, asks for too much, or describes no such model.
    """
    kind: Any = find_class(directory)
    if kind is None:
        return None
    config = read_config(directory)
    if _uses_timm(config):  # it would download
        return None
    try:
        with bounded_build(tensors):
            model: PreTrainedModel = kind(kind.config_class.from_dict(_own_code(config)))
    except Exception as error:  # which one is left to chance where a configuration is a stranger's
        raise ValueError(
            f"{Path(directory) / CONFIG_FILE} describes no {kind.__name__}: {type(error).__name__}: {error!s:.200}"
        ) from error
    model.tie_weights()
    return model


@contextmanager
def bounded_build(tensors: int = 0) -> Iterator[None]:
    """Build modules on the meta device, without initial values, and not more than belong to so many tensors.

    Raises:
        ValueError: the model has too many parts.
    """
    from transformers.initialization import no_init_weights

    most = PARTS + PARTS_PER_TENSOR * tensors
    count = 0

    def add(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ValueError(f"the model has more than {most} modules and parameters, for {tensors} tensors")

    hooks = [
        torch_module.register_module_module_registration_hook(add),
        torch_module.register_module_parameter_registration_hook(add),
    ]
    try:
        with torch.device("meta"), no_init_weights():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _own_code(value: Any) -> Any:
    """Leave out what would make transformers fetch code."""
    if isinstance(value, dict):
        return {key: _own_code(entry) for key, entry in value.items() if not _FOREIGN_CODE.search(key)}
    return [_own_code(entry) for entry in value] if isinstance(value, list) else value


def _uses_timm(value: Any) -> bool:
    """Whether a part of a configuration is a model of timm."""
    if isinstance(value, dict):
        return any(("timm" in key and entry is True) or _uses_timm(entry) for key, entry in value.items())
    if isinstance(value, list):
        return any(map(_uses_timm, value))
    return isinstance(value, str) and value.startswith("timm_")
