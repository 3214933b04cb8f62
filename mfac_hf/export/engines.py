"""What `mfac_hf.export.export_model` has written, loaded into its engine on the CPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["ONNX_FILE", "OPENVINO_FILE", "Engine", "load_exported"]

ONNX_FILE = "model.onnx"
OPENVINO_FILE = "openvino_model.xml"
# What an engine gives for a batch: named outputs.
Engine = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def load_exported(directory: str | os.PathLike[str], *, threads: int | None = None, **options: Any) -> Engine:
    """Load what `export_model` has written, on the CPU.

    Args:
        directory: with the files.
        threads: of the engine; PyTorch's number when None.
        options: further settings: of OpenVINO, by their names; of ONNX Runtime, attributes of its SessionOptions.

    Returns:
        A function from named tensors to named tensors.

    Raises:
        FileNotFoundError: the directory has neither ``model.onnx`` nor ``openvino_model.xml``.
        ImportError: the engine is missing; the message has the command that installs it.
    """
    directory, threads = Path(directory), threads or torch.get_num_threads()
    if (directory / OPENVINO_FILE).is_file():
        return _openvino_engine(directory / OPENVINO_FILE, threads, options)
    if (directory / ONNX_FILE).is_file():
        return _onnx_engine(directory / ONNX_FILE, threads, options)
    raise FileNotFoundError(f"{directory} has neither {ONNX_FILE} nor {OPENVINO_FILE}: mfac export writes them")


def _onnx_engine(path: Path, threads: int, options: Mapping[str, Any]) -> Engine:
    if importlib.util.find_spec("onnxruntime") is None:
        raise ImportError(f"{path} needs onnxruntime: pip install 'mfac_hf[onnx]'")
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = threads, 3
    for name, value in options.items():
        setattr(settings, name, value)
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}

    return run


def _openvino_engine(path: Path, threads: int, options: Mapping[str, Any]) -> Engine:
    if importlib.util.find_spec("openvino") is None:
        raise ImportError(f"{path} needs openvino: pip install 'mfac_hf[openvino]'")
    import openvino

    # In float32 by default: OpenVINO would choose bfloat16 where the processor has it.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, **options}
    compiled = openvino.compile_model(path, "CPU", settings)
    names = [output.get_any_name() for output in compiled.outputs]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = compiled({name: tensor.numpy() for name, tensor in inputs.items()})
        return {name: torch.from_numpy(np.array(found[name])) for name in names}

    return run
