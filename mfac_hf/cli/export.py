"""`mfac export` writes a model for ONNX Runtime or OpenVINO, in float32 or with int8 weights, zeros kept.

    mfac export MODEL --format onnx --int8 --output DIR

MODEL is a directory or Hub name, sparse or dense. DIR gets the file of the engine, the configuration and the tokenizer
or image processor, and ``export.json``, the report.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mfac_hf.cli.errors import CommandError, as_command_error


def add_parser(commands: Any) -> None:
    """Add `mfac export` to the sub-commands."""
    export = commands.add_parser(
        "export",
        help="write a model for ONNX Runtime or OpenVINO",
        description="Write a model for another engine, zeros kept, and try what was written.",
    )
    export.add_argument("model", metavar="MODEL", help="directory or Hub name of the model")
    export.add_argument("--format", choices=("onnx", "openvino"), default="onnx", help="(default: %(default)s)")
    export.add_argument("--int8", action="store_true", help="round the weights to 8 bits, symmetrically")
    export.add_argument("--output", required=True, type=Path, metavar="DIR", help="directory for the result")
    export.add_argument("--revision", help="branch, tag or commit on the Hub (default: main)")
    export.add_argument(
        "--model_class", metavar="CLASS", help="package.module.Class, where config.json names no class of transformers"
    )
    export.set_defaults(run=_run_export)


def _run_export(arguments: argparse.Namespace) -> None:
    from mfac_hf.export import export_model
    from mfac_hf.hub.architecture import describe_architecture, load_model
    from mfac_hf.hub.inventory import find_model_directory

    try:
        with as_command_error():
            hub = {} if arguments.revision is None else {"revision": arguments.revision}
            directory = find_model_directory(arguments.model, **hub)
            model = load_model(directory, describe_architecture(directory, arguments.model_class)["class"])
            report = export_model(
                model,
                arguments.output,
                export_format=arguments.format,
                int8=arguments.int8,
                companions=_companions(arguments.model, **hub),
            )
    except RuntimeError as error:
        raise CommandError(" ".join(str(error).split())) from error
    for name, size in report["files"].items():
        print(f"{arguments.output / name}: {size:,} bytes")
    print(
        f"{report['zeros_exported']:,} zero weights (the model: {report['zeros']:,} of {report['weights']:,}); "
        f"outputs differ from the model's by {report['largest_difference']:.1e} of the largest number"
    )


def _companions(model: str, **hub: Any) -> dict[str, Path]:
    """Files of the tokenizer or image processor."""
    from huggingface_hub import snapshot_download

    from mfac_hf.hub.companions import find_companions

    directory = Path(model)
    if not directory.exists():
        directory = Path(snapshot_download(model, allow_patterns=["*.json", "*.txt", "*.model", "*.jinja"], **hub))
    ours = ("config.json", "masks.safetensors", "results.json", "pruning.json")
    return {name: path for name, path in find_companions(directory).items() if name not in ours}
