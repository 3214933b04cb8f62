"""Names of weights on disk and in memory.

transformers writes some models (ViT, Swin, Mixtral) under the names, and in the pieces, that their first publishers
chose, and loads files of base models into models with heads. Whoever reads a directory wants the names in memory:
those of targets, masks and state dicts. The rules are transformers' own, those that ``from_pretrained`` follows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mfac_hf.pruning.masks import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["names_in_memory", "tensors_in_memory"]


class _Rules:
    """The rules of a model class, which keep count of what they have seen: for one reading of one file."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model)
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.by_pattern = {pattern: rule for rule in self.converters for pattern in rule.source_patterns}
        self.state, self.prefix = model.state_dict(), model.base_model_prefix

    def name(self, name: str) -> tuple[str, str | None]:
        """Return a name in memory, and the pattern of the converter that makes it of several tensors, or splits it."""
        from transformers.core_model_loading import rename_source_key

        found, pattern = rename_source_key(name, self.renamings, self.converters, self.prefix, self.state)
        if found not in self.state:  # it may have its name in memory already, but for the prefix
            found, pattern = rename_source_key(name, [], [], self.prefix, self.state)
        return (found, pattern) if found in self.state else (name, None)


def names_in_memory(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Find the name in memory of each tensor on disk; one that the model has no place for keeps its name.

    Args:
        model: a model of the class, possibly on the meta device.
        names: names on disk, or in memory already.
    """
    from transformers.core_model_loading import dot_natural_key

    rules = _Rules(model)
    return {name: rules.name(name)[0] for name in sorted(names, key=dot_natural_key)}  # the order that rules rely on


def tensors_in_memory(
    model: PreTrainedModel, names: Iterable[str], read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of a file as the model has them: renamed, and put together or split where it has others.

    Args:
        model: a model of the class, possibly on the meta device.
        names: the names on disk.
        read: reads the tensor with a name on disk.

    Yields:
        Names in memory and tensors, in the order of ``names``, in the dtypes on disk. Tensors that the model has no
        place for come under their own names.

    Raises:
        ValueError: tensors that belong together do not fit.
    """
    from transformers.core_model_loading import dot_natural_key

    names = list(names)
    place = {name: i for i, name in enumerate(names)}
    rules = _Rules(model)
    sources: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(names, key=dot_natural_key):
        found, pattern = rules.name(name)
        sources.setdefault(found, []).append((name, pattern))
    for found, pieces in sorted(sources.items(), key=lambda item: min(place[name] for name, _ in item[1])):
        if pieces[0][1] is None:
            yield found, read(pieces[0][0])
            continue
        converter: Any = copy.deepcopy(rules.by_pattern[pieces[0][1]])
        for name, pattern in pieces:
            converter.add_tensor(found, name, pattern, lambda name=name: read(name))
        try:
            made = converter.convert(found, model=model, config=model.config)
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            parts = [name for name, _ in pieces]
            raise ValueError(f"{found} cannot be put together from {shortened(parts)}: {error}") from error
        for target, value in made.items():
            yield target, value[0] if isinstance(value, list) else value
