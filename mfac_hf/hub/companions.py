"""The files that belong to a model beside its weights: configuration, tokenizer, processors, code of its own."""

from __future__ import annotations

import ast
import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from mfac_hf.schema import check_schema
from mfac_hf.sparse.directory import check_inside
from mfac_hf.storage import read_json

__all__ = ["auto_classes", "custom_architecture", "find_companions", "read_configuration"]

# Training state, predictions and pickles are never among them.
_NAMES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("image_processor_config.json", "video_preprocessor_config.json", "adapter_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "tekken.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
    *("masks.safetensors", "results.json", "pruning.json"),
)
# What the tokenizers of transformers save besides, where a directory has a tokenizer.
_VOCABULARIES = (
    *("sentencepiece.model", "spm.model", "spm_char.model", "source.spm", "target.spm", "prophetnet.tokenizer"),
    *("bpe.codes", "dict.txt", "emoji.json", "normalizer.json", "entity_vocab.json", "target_vocab.json"),
    *("vocab-src.json", "vocab-tgt.json", "byte_maps.json", "word_shape.json", "word_pronunciation.json"),
)
# Names of code stand in these, under "auto_map".
_WITH_CODE = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
_TASKS = {
    "CausalLM": "text-generation",
    "MaskedLM": "fill-mask",
    "Seq2SeqLM": "text2text-generation",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "ImageClassification": "image-classification",
}


class _Configuration(TypedDict, total=False):
    """What is read of these files."""

    auto_map: dict[str, str | list[str | None] | None] | None
    architectures: list[str] | None
    tokenizer_class: str | None


def find_companions(directory: str | os.PathLike[str]) -> dict[str, Path]:
    """Find the files of a model beside its weights.

    Args:
        directory: directory of the model.

    Returns:
        Their paths by their names in a repository.

    Raises:
        FileNotFoundError: a file names code of the model's own that is not there.
        ValueError: a file is no JSON, or of another form; or it is a link that leads out of the directory.
    """
    folder = Path(directory)
    configurations = {name: read_configuration(folder / name) for name in _WITH_CODE if (folder / name).is_file()}
    names = [*_NAMES, *_vocabularies(folder, configurations), *_code(folder, configurations)]
    names += [f"additional_chat_templates/{path.name}" for path in folder.glob("additional_chat_templates/*.jinja")]
    return {name: check_inside(folder / name, folder) for name in dict.fromkeys(names) if (folder / name).is_file()}


def read_configuration(path: Path) -> dict[str, Any]:
    """Read ``config.json`` or a file like it.

    Raises:
        ValueError: it is no JSON, or what cards and pushes read of it has another form; the message names the file.
    """
    content: dict[str, Any] = read_json(path)
    check_schema(content, _Configuration, str(path))
    return content


def auto_classes(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the code that a configuration names: by the automatic class, ``module.Class`` or ``user/repo--…``."""
    found = {}
    for key, value in (content.get("auto_map") or {}).items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                found[f"{key}{'Fast' if key in found else ''}"] = one
    return found


def custom_architecture(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Describe a model whose class is code of its own, as `describe_architecture` does; None for any other.

    Args:
        config: the model's configuration.
    """
    import transformers

    automatic = {key: code for key, code in auto_classes(config).items() if key.startswith("AutoModel")}
    name = (config.get("architectures") or [""])[0]
    if not automatic or hasattr(transformers, name):
        return None
    fitting = [key for key, code in automatic.items() if code.rpartition(".")[2] == name]
    auto_class = (fitting or sorted(automatic))[0]
    code = automatic[auto_class].rpartition(".")[2]
    task = _TASKS.get(auto_class.rpartition("For")[2])
    known = {"class": f"transformers.{code}", "library": "transformers", "task": task}
    return {**known, "custom_code": True, "auto_class": auto_class}


def _vocabularies(folder: Path, configurations: Mapping[str, Any]) -> list[str]:
    """Name the vocabulary files of the tokenizer's class, whichever it is."""
    if "tokenizer_config.json" not in configurations:
        return []
    tokenizer = configurations["tokenizer_config.json"]
    names = list(_VOCABULARIES)
    if name := tokenizer.get("tokenizer_class"):
        import transformers

        for one in (name, f"{name}Fast", name.removesuffix("Fast")):
            # Without its library a class has no attribute: then the names above have to do.
            with contextlib.suppress(ImportError):
                names += getattr(getattr(transformers, one, None), "vocab_files_names", {}).values()
    for code in auto_classes(tokenizer).values():
        if (path := folder / f"{code.partition('.')[0]}.py").is_file():
            names += _literal_names(path)
    return [name for name in names if isinstance(name, str) and name == Path(name).name]


def _literal_names(path: Path) -> Iterator[str]:
    """Iterate over the files that a tokenizer's own code names in ``vocab_files_names``, without running it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no Python file, or a damaged one: {error}") from error
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
            continue
        if any(isinstance(target, ast.Name) and target.id.lower() == "vocab_files_names" for target in node.targets):
            values = [value.value for value in node.value.values if isinstance(value, ast.Constant)]
            yield from (value for value in values if isinstance(value, str))


def _code(folder: Path, configurations: Mapping[str, Any]) -> list[str]:
    """Name the Python files that the configurations need: those that they name, and what these import from beside."""
    names: list[str] = []
    for file, content in configurations.items():
        for code in auto_classes(content).values():
            module = code.partition(".")[0]
            if "--" in code:
                continue  # lies in another repository
            if not re.fullmatch(r"\w+", module):
                raise ValueError(f"{folder / file}: auto_map names {code!r}; expected 'module.Class'")
            if not (folder / f"{module}.py").is_file():
                if custom_architecture(configurations.get("config.json", {})) is None and file == "config.json":
                    continue  # transformers has the class itself by now
                raise FileNotFoundError(
                    f"{folder / file} needs {module}.py (auto_map: {code}), which is not there, and nobody could load "
                    "the model without it: copy it beside the file"
                )
            names += _imports(folder, module)
    return names


def _imports(folder: Path, module: str) -> list[str]:
    from transformers.dynamic_module_utils import get_relative_import_files

    try:
        beside = get_relative_import_files(folder / f"{module}.py")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{module}.py imports {error.filename}, which is not there") from error
    return [f"{module}.py", *(Path(path).relative_to(folder).as_posix() for path in beside)]
