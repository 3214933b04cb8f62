"""Models as files for ONNX Runtime and OpenVINO."""

from mfac_hf.export.engines import Engine, load_exported
from mfac_hf.export.model import ExportFormat, export_model

__all__ = ["Engine", "ExportFormat", "export_model", "load_exported"]
