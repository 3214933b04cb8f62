r"""A model as a file for other engines: ONNX, for ONNX Runtime and others, or OpenVINO's; in float32 or int8.

Both go through PyTorch's own exporter, with batch and sequence lengths left open. With ``int8`` the weights of layers
are rounded symmetrically, :math:`w \approx s\, q` with a scale s for each output and q from -127 to 127, in ONNX files
from -64 to 64: zero stays zero, and so a pruned model stays pruned. Activations are rounded as they come (dynamic
quantization), or not at all where the engine finds that faster; no calibration data is needed.

What is written is run again, on shapes that the exporter did not see, and compared with the model.
"""

from __future__ import annotations

import importlib.util
import inspect
import io
import logging
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from mfac_hf.export.engines import ONNX_FILE, OPENVINO_FILE, Engine, load_exported
from mfac_hf.optim.unwrap import unwrap_model
from mfac_hf.storage import write_json, written_directory

__all__ = ["ExportFormat", "export_model"]

ExportFormat = Literal["onnx", "openvino"]
REPORT_FILE = "export.json"
# What each format needs; the extra of the same name installs it.
PACKAGES = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino", "nncf")}
# Largest difference of an output from the model's, over its largest number: float32 sums in another order.
TOLERANCE = 1e-3
# Batch and sequence length of the example that is traced, and of those that the file is tried with.
TRACED, TRIED = (2, 9), ((1, 5), (3, 16))


def export_model(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    export_format: ExportFormat = "onnx",
    int8: bool = False,
    companions: Mapping[str, str | os.PathLike[str]] | None = None,
) -> dict[str, Any]:
    """Write a model for another engine, and try what was written.

    Args:
        model: of transformers, for text (encoders, and decoders without a cache) or images; or one of
            `mfac_hf.models`. It stays as it is.
        directory: where the files go: ``model.onnx``, or ``openvino_model.xml`` and ``.bin``; ``config.json`` where
            the model has one; and ``export.json``, the report. All of them or none.
        export_format: ``"onnx"`` or ``"openvino"``.
        int8: round the weights to 8 bits, of which an ONNX file uses 7.
        companions: files to copy beside it, by their names there, such as those of a tokenizer.

    Returns:
        Plain JSON types: ``format``, ``int8``, ``inputs``, ``files`` with their bytes; ``weights`` and ``zeros`` of
        the model's matrices and convolutions, ``zeros_exported`` of those in the file; and ``largest_difference`` of
        an output from the model's, over the largest number of that output.

    Raises:
        ImportError: a package is missing; the message has the command that installs it.
        ValueError: an unknown format, or a model of another kind.
        RuntimeError: the file computes something else than the model, or has lost zeros; nothing is left then.
    """
    if export_format not in get_args(ExportFormat):
        raise ValueError(f"format is {export_format!r}; expected one of {', '.join(get_args(ExportFormat))}")
    _require(export_format)
    model = unwrap_model(model)
    examples = [_example(model, *shape) for shape in (TRACED, *TRIED)]
    with written_directory(directory) as folder, _in_evaluation(model):
        path = folder / ONNX_FILE
        outputs = _write_onnx(model, examples[0], path, keep_shapes=_takes_images(model))
        if export_format == "openvino":
            path = _to_openvino(path, folder / OPENVINO_FILE, int8=int8)
        elif int8:
            _round_onnx(path)
        for name, source in (companions or {}).items():
            shutil.copyfile(source, folder / name)
        config: Any = getattr(model, "config", None)
        if config is not None:
            config.save_pretrained(folder)
        zeros, weights = _count_zeros(_matrices(model.parameters()))
        zeros_exported, _ = _count_zeros(_stored_matrices(path))
        difference = _compare(model, load_exported(folder), examples[1:], outputs)
        report = {
            "format": export_format,
            "int8": int8,
            "inputs": list(examples[0]),
            "outputs": outputs,
            "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
            "weights": weights,
            "zeros": zeros,
            "zeros_exported": zeros_exported,
            "largest_difference": difference,
        }
        if not difference <= TOLERANCE and not int8:
            raise RuntimeError(
                f"{export_format} gives other outputs than the model: they differ by {difference:.1e} of the largest "
                f"number; expected at most {TOLERANCE:g}"
            )
        if zeros_exported < zeros:
            raise RuntimeError(f"the file has {zeros_exported:,} zero weights, the model {zeros:,}")
        write_json(folder / REPORT_FILE, report)
    return report


def _require(export_format: ExportFormat) -> None:
    missing = [package for package in PACKAGES[export_format] if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"{export_format} needs {', '.join(missing)}: pip install 'mfac_hf[{export_format}]'")


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _takes_images(model: nn.Module) -> bool:
    return getattr(model, "main_input_name", "pixel_values") == "pixel_values"


def _example(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Inputs of a model: random tokens, the last ones of the first text masked, or random images."""
    generator = torch.Generator().manual_seed(batch)
    config: Any = getattr(model, "config", None)
    parameter = next(model.parameters())
    if _takes_images(model):
        side, channels = getattr(config, "image_size", 32), getattr(config, "num_channels", 3)
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        images = torch.randn(batch, channels, height, width, generator=generator)
        return {"pixel_values": images.to(parameter)}
    accepted = inspect.signature(model.forward).parameters
    if getattr(config, "is_encoder_decoder", False) or "input_ids" not in accepted:
        raise ValueError(
            f"{type(model).__name__} is not exported: expected a model that takes input_ids alone or pixel_values. "
            "optimum-onnx and optimum-intel export models of several parts"
        )
    length = min(length, getattr(config, "max_position_embeddings", length) or length)
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, max(1, length - 2) :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: value.to(parameter.device) for name, value in inputs.items() if name in accepted}


class _Positional(nn.Module):
    """A model with tensors as inputs and outputs, as the exporter needs it."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.model, self.names = model, list(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(_run(self.model, dict(zip(self.names, inputs, strict=True))).values())


def _run(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a model by name."""
    if not hasattr(model, "config"):
        (images,) = inputs.values()
        return {"logits": model(images)}
    options = {"return_dict": True}
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    return {name: value for name, value in model(**inputs, **options).items() if isinstance(value, Tensor)}


def _write_onnx(model: nn.Module, inputs: Mapping[str, Tensor], path: Path, *, keep_shapes: bool) -> list[str]:
    """Write an ONNX file and return the names of its outputs; of images the batch alone is left open."""
    outputs = list(_run(model, inputs))
    free = {0: torch.export.Dim.DYNAMIC} | ({} if keep_shapes else {1: torch.export.Dim.DYNAMIC})
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")  # the exporter announces its own coming changes
        program = torch.onnx.export(
            _Positional(model, inputs),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes={"inputs": tuple(dict(free) for _ in inputs)},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path)
    return outputs


def _round_onnx(path: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # torch 2.10 leaves shapes that weights had before they were transposed; rounding infers all shapes anew.
    model = onnx.load(path, load_external_data=False)
    del model.graph.value_info[:]
    onnx.save(model, path)
    rounded = path.with_name("int8.onnx")
    with _quiet("root"):
        # Processors without VNNI add pairs of products of 8 bits in 16, where they are cut off: weights have 7 bits.
        symmetric = {"WeightSymmetric": True}
        quantize_dynamic(
            path, rounded, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True, extra_options=symmetric
        )
    for file in path.parent.glob(f"{path.name}*"):  # with what a large model keeps beside it
        file.unlink()
    rounded.rename(path)


def _to_openvino(source: Path, path: Path, *, int8: bool) -> Path:
    """Turn an ONNX file into OpenVINO's two, and remove it."""
    import openvino

    converted = openvino.convert_model(source)
    if int8:
        import nncf

        with _quiet("nncf"), redirect_stdout(io.StringIO()):  # a bar of progress
            converted = nncf.compress_weights(converted, mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(converted, path, compress_to_fp16=False)
    for file in source.parent.glob(f"{source.name}*"):
        file.unlink()
    return path


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keep back what libraries tell their developers."""
    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


def _compare(
    model: nn.Module, engine: Engine, examples: Iterable[Mapping[str, Tensor]], outputs: Iterable[str]
) -> float:
    """Largest difference of an engine's outputs from the model's, over the largest number of each."""
    worst = 0.0
    for inputs in examples:
        found = engine({name: tensor.cpu() for name, tensor in inputs.items()})
        expected = _run(model, inputs)
        for name in outputs:
            size = float(expected[name].abs().max().clamp(min=1e-6))
            worst = max(worst, float((found[name] - expected[name].cpu()).abs().max()) / size)
    return worst


def _matrices(tensors: Iterable[Tensor]) -> Iterator[np.ndarray]:
    for tensor in tensors:
        if tensor.ndim >= 2:
            yield tensor.detach().cpu().float().numpy()


def _stored_matrices(path: Path) -> Iterator[np.ndarray]:
    """Constants of two dimensions or more in an exported file."""
    if path.suffix == ".onnx":
        import onnx

        constants = {constant.name: constant for constant in onnx.load(path).graph.initializer}
        for name, constant in constants.items():
            if len(constant.dims) < 2:
                continue
            array = onnx.numpy_helper.to_array(constant, base_dir=str(path.parent))
            # An embedding is rounded to numbers from 0 to 255, with one that stands for zero.
            middle = constants.get(name.replace("_quantized", "_zero_point"))
            if middle is not None and middle is not constant and not middle.dims:
                array = array != onnx.numpy_helper.to_array(middle)
            yield array
    else:
        import openvino

        for node in openvino.Core().read_model(path).get_ops():
            if node.get_type_name() == "Constant" and len(node.get_output_shape(0)) >= 2:
                yield node.get_data()


def _count_zeros(arrays: Iterable[np.ndarray]) -> tuple[int, int]:
    zeros = numbers = 0
    for array in arrays:
        zeros, numbers = zeros + int((array == 0).sum()), numbers + array.size
    return zeros, numbers
