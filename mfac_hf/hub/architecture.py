"""Find the class of a model, and load the model by it."""

from __future__ import annotations

import importlib
import os
from typing import Any

from torch import nn

from mfac_hf.optim.unwrap import unwrap_model
from mfac_hf.sparse.directory import SPARSE_FILE, find_weights
from mfac_hf.sparse.files import load_sparse
from mfac_hf.sparse.skeleton import find_class

__all__ = ["describe_architecture", "load_model"]


def describe_architecture(model: nn.Module | str | os.PathLike[str], model_class: str | None = None) -> dict[str, Any]:
    """Name the class, library and task of a model.

    Args:
        model: a model, or a directory that holds one.
        model_class: ``package.module.Class``, where the configuration names no class of transformers.

    Returns:
        ``class`` (to import), ``library``, and the Hub's name of the ``task`` (None where it is not known).

    Raises:
        ValueError: the class is not known, or cannot be imported.
    """
    if isinstance(model, nn.Module):
        kind = type(unwrap_model(model))
        path = f"{kind.__module__}.{kind.__qualname__}"
    else:
        found = None if model_class else find_class(model)
        path = f"transformers.{found.__name__}" if found else ""
    path = model_class or path
    if not path:
        raise ValueError(f"{model} does not say of which class it is: give model_class='package.module.Class'")
    name = path.rpartition(".")[2]
    if path.startswith("transformers."):
        from transformers.modelcard import TASK_MAPPING

        mappings: dict[str, Any] = dict(TASK_MAPPING)
        tasks = [task for task, names in mappings.items() if name in names.values()]
        return {"class": f"transformers.{name}", "library": "transformers", "task": tasks[0] if tasks else None}
    found = _import_class(path)
    info = getattr(found, "_hub_mixin_info", None)
    return {"class": path, "library": "mfac_hf", "task": getattr(info and info.model_card_data, "pipeline_tag", None)}


def _import_class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model class {path!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{path!r} is no model class")
    return found


def load_model(directory: str | os.PathLike[str], path: str) -> nn.Module:
    """Load a model for inference from its ordinary weights, or from its sparse file where it has that alone.

    Args:
        directory: directory of the model.
        path: its class, ``package.module.Class``.

    Raises:
        ValueError: the class cannot be imported, or cannot be built from the sparse file alone.
    """
    kind = _import_class(path)
    if [file.name for file in find_weights(directory)] == [SPARSE_FILE]:
        if not hasattr(kind, "config_class"):
            raise ValueError(
                f"{path} cannot be built from {directory}, which has the sparse file alone: add the dense one"
            )
        config = kind.config_class.from_pretrained(directory)
        return load_sparse(directory, kind(config)).eval()
    model: nn.Module = kind.from_pretrained(directory).eval()
    return model
