"""Sparse models on disk: a small file of the weights beside the ordinary one, or in its place.

    save_sparse(model, "model-90")              # model.safetensors for everybody, sparse.safetensors, configuration
    weights = load_sparse("user/model-90")      # downloads the small file alone
    model = load_sparse("user/model-90", AutoModelForSequenceClassification)

`mfac_hf.sparse.format` describes the file, which is exact to the bit but for the sign of zeros.
"""

from __future__ import annotations

import copy
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils.prune import BasePruningMethod

from mfac_hf.optim.unwrap import unwrap_model
from mfac_hf.sparse.directory import DENSE_FILE, SPARSE_FILE, find_weights, read_tensors
from mfac_hf.sparse.format import SparseFile, write_sparse
from mfac_hf.sparse.header import DamagedFileError
from mfac_hf.sparse.inference import to_sparse_inference
from mfac_hf.sparse.names import names_in_memory
from mfac_hf.sparse.skeleton import CONFIG_FILE, bounded_build, read_config

__all__ = ["DamagedFileError", "load_sparse", "save_sparse", "to_sparse_inference"]

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def save_sparse(
    model: nn.Module | str | os.PathLike[str], directory: str | os.PathLike[str], *, sparse_only: bool = False
) -> Path:
    """Save a model with each weight tensor in the smallest of three encodings (`mfac_hf.sparse.format`).

    Args:
        model: a model; inside torch.compile, DistributedDataParallel or DataParallel, what they wrap. Or a directory
            that ``save_pretrained`` wrote, in one file or sharded: then only the sparse file is written.
        directory: gets ``sparse.safetensors``, the configuration where the model has one and, unless ``sparse_only``,
            ``model.safetensors``, so that ``from_pretrained`` loads the directory as any other; made if it is missing.
        sparse_only: whether to leave the ordinary file out.

    Returns:
        The path of the sparse file.

    Raises:
        FileNotFoundError: ``model`` is a directory without a model, or without one of its shards.
        ValueError: a tensor cannot be stored, which the message names; the model has adapters, or layers that are
            quantized, sharded, wrapped or masked by torch; the index of the directory names files elsewhere; or
            ``sparse_only`` into a directory that holds an ordinary file.
    """
    directory = Path(directory)
    path = directory / SPARSE_FILE
    if not isinstance(model, nn.Module):
        if (read_config(model) or {}).get("quantization_config"):
            raise ValueError(f"{model} holds a quantized model: give a directory with floating-point weights")
        # transformers wrote a tied tensor once, and ties it again when it loads the model
        write_sparse(path, read_tensors(model), {})
        return path
    if sparse_only and any(file != path for file in find_weights(directory)):
        raise ValueError(
            f"{directory} already holds {DENSE_FILE}, which from_pretrained would go on loading in place of the "
            "sparse file: remove it or choose another directory"
        )
    model = unwrap_model(model)
    check_plain(model)
    state, tied = distinct(model.state_dict())
    write_sparse(path, iter(state.items()), tied)
    if sparse_only:
        config: Any = copy.deepcopy(getattr(model, "config", None))
        if hasattr(config, "save_pretrained"):
            config.architectures = [type(model).__name__]  # as the model's own save_pretrained does
            config.save_pretrained(directory)
    elif callable(save_pretrained := getattr(model, "save_pretrained", None)):
        save_pretrained(directory)
    else:
        save_model(model, str(directory / DENSE_FILE))
    return path


def check_plain(model: nn.Module) -> None:
    """Refuse a model whose state dict is not that of its class: adapters, quantized, sharded or wrapped layers.

    Raises:
        ValueError: it names what is there, and the way out.
    """
    kind = type(model).__name__
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"{kind} has PEFT adapters, whose files are of another kind: merge them first, "
            "model = model.merge_and_unload()"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{kind} is quantized: load it without quantization, or model.dequantize() it first")
    for name, module in model.named_modules():
        if name and unwrap_model(module) is not module:
            raise ValueError(
                f"{name} of {kind} is wrapped in {type(module).__name__}: put the layer inside back in its place first"
            )
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(f"{kind} is spread over ranks: save it with trainer.save_model, then give the directory")
        if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values()):
            raise ValueError(
                f"{name} of {kind} is masked by torch.nn.utils.prune: make that permanent with prune.remove first"
            )
    for name, value in model.state_dict().items():
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
            what = f"holds {type(value).__module__}.{type(value).__name__}"
            raise ValueError(
                f"{name} of {kind} {what}, no plain tensor: gather a model that is spread over ranks, and load a "
                "quantized one without quantization"
            )


def distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into its tensors, each once, and the further names of those that have several."""
    first: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        key = (
            (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        )
        if key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor
    return tensors, tied


@overload
def load_sparse(source: str | os.PathLike[str], model: None = None, **hub: Any) -> dict[str, Tensor]: ...
@overload
def load_sparse(source: str | os.PathLike[str], model: Model, **hub: Any) -> Model: ...
@overload
def load_sparse(source: str | os.PathLike[str], model: type, **hub: Any) -> nn.Module: ...


def load_sparse(source: str | os.PathLike[str], model: nn.Module | type | None = None, **hub: Any) -> Any:
    """Load a sparse file tensor by tensor, so that memory never holds more than the dense weights and one tensor.

    Args:
        source: a directory with ``sparse.safetensors``, the file itself, or a name on the Hub, from which only this
            file is downloaded (and ``config.json`` where ``model`` is a class).
        model: None for a state dict; a model to fill, which changes only if everything fits; or a class of
            transformers with ``from_config``, such as ``AutoModelForSequenceClassification``, which builds the model
            from the configuration, in evaluation mode.
        hub: ``revision``, ``token``, ``cache_dir`` and further arguments of ``huggingface_hub.hf_hub_download``.

    Returns:
        A state dict on the CPU in which tied names share one tensor; or the model.

    Raises:
        FileNotFoundError: there is no sparse file.
        DamagedFileError: the file is truncated, altered or of a later version; the message names the tensor.
        ValueError: names, shapes or dtypes are not those of the model, or a class has no ``from_config``.
    """
    file = SparseFile(_locate(source, SPARSE_FILE, hub))
    if model is None:
        weights = {name: file.read(name) for name in file.records}
        return weights | {alias: weights[name] for alias, name in file.tied.items()}
    if isinstance(model, nn.Module):
        inner = unwrap_model(model)
        names = _names(inner, file)
        for name in file.records:  # before anything changes: a damaged file leaves the model as it was
            file.read(name)
        _fill(inner, file, names)
        return model
    if not hasattr(model, "from_config"):
        raise ValueError(f"{model.__name__} has no from_config: give an Auto class, a model, or None for a state dict")
    return _build(model, file, _locate(source, CONFIG_FILE, hub)).eval()


def _build(kind: Any, file: SparseFile, config_file: Path) -> nn.Module:
    """Build a model from its configuration and fill it; its shapes are compared before it takes memory."""
    from transformers import AutoConfig

    read_config(config_file.parent)  # asks for nothing that no model has
    config = AutoConfig.from_pretrained(config_file, trust_remote_code=False)
    try:
        with bounded_build(len(file.records)):
            skeleton = kind.from_config(copy.deepcopy(config))
    except Exception as error:  # which one is left to chance where a configuration is a stranger's
        raise ValueError(
            f"{config_file} describes no {kind.__name__}: {type(error).__name__}: {error!s:.200}"
        ) from error
    skeleton.tie_weights()
    names = _names(skeleton, file, built=True)
    numel = Counter({dtype: 0 for dtype in [torch.get_default_dtype()]})
    for record in file.records.values():
        if record.torch_dtype.is_floating_point:
            numel[record.torch_dtype] += record.numel
    model: nn.Module = kind.from_config(config, dtype=numel.most_common(1)[0][0])
    _take_dtypes(model, file, names)
    _fill(model, file, names)
    return model


def _locate(source: str | os.PathLike[str], name: str, hub: dict[str, Any]) -> Path:
    """Return the path of a file of the source, which is downloaded where the source is a repository."""
    path = Path(source)
    if path.is_file():
        return path if name == SPARSE_FILE else path.with_name(name)
    if path.is_dir():
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} has no {name}; found: {sorted(entry.name for entry in path.iterdir())}")
        return path / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), name, **hub))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{source} is neither a file, nor a directory, nor a name on the Hub: {error}"
        ) from error
    except LocalEntryNotFoundError:
        raise  # no network and nothing in the cache, which its message says
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{source} on the Hub has no {name}: a push leaves it out where it is hardly smaller than "
            "model.safetensors, which from_pretrained loads"
        ) from error


def _names(model: nn.Module, file: SparseFile, *, built: bool = False) -> dict[str, str]:
    """Find the tensor of the file for each name in the model's state dict.

    Args:
        model: the model.
        file: the file.
        built: whether the model was built for the file. Then floating-point dtypes may differ, and tensors that the
            class has no place for are left out, as ``from_pretrained`` does.

    Raises:
        ValueError: names, shapes or dtypes are not the model's.
    """
    state = model.state_dict()
    _, shared = distinct(state)
    names = {**{name: name for name in file.records}, **file.tied}
    if not names.keys() <= state.keys() and hasattr(model, "base_model_prefix"):  # names on disk, or of a base model
        moved = names_in_memory(model, names)  # type: ignore[arg-type]
        names = {moved[name]: source for name, source in names.items()}
    # one name of a tied tensor is enough
    held = {shared.get(name, name) for name in names if name in state}
    missing = [name for name in state if name not in names and shared.get(name, name) not in held]
    unexpected = [name for name in names if name not in state]
    if built and unexpected:
        logger.warning("%s has weights that %s has no place for: %s", file.path, type(model).__name__, unexpected)
        names = {name: source for name, source in names.items() if name in state}
        unexpected = []
    if missing or unexpected:
        raise ValueError(f"{file.path} does not fit the model: it lacks {missing}, and the model lacks {unexpected}")
    for name, source in names.items():
        record, tensor = file.records[source], state[name]
        fits = record.torch_dtype == tensor.dtype or (
            built and record.torch_dtype.is_floating_point and tensor.is_floating_point()
        )
        if record.shape != tuple(tensor.shape) or not fits:
            raise ValueError(
                f"{name} is {record.dtype} of shape {record.shape} in {file.path}, {tensor.dtype} of shape "
                f"{tuple(tensor.shape)} in the model. Build the model from the configuration beside the file, and "
                "convert its dtype with model.to(...)"
            )
    return names


def _take_dtypes(model: nn.Module, file: SparseFile, names: dict[str, str]) -> None:
    """Give each weight the dtype that it has in the file: models in half precision keep some layers in float32."""
    weights = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, source in names.items():
        if weights[name].dtype != (dtype := file.records[source].torch_dtype):
            weights[name].data = weights[name].data.to(dtype)


def _fill(model: nn.Module, file: SparseFile, names: dict[str, str]) -> None:
    """Copy the weights of a file into a model."""
    state = model.state_dict()
    targets: dict[str, list[Tensor]] = {}
    for name, source in names.items():
        targets.setdefault(source, []).append(state[name])
    for source, tensors in targets.items():
        values = file.read(source)
        for tensor in tensors:
            tensor.copy_(values)
