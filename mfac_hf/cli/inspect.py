"""`mfac inspect` shows the sparsity of each layer: `mfac inspect DIRECTORY` or `mfac inspect user/name`.

It prints a table; ``--picture FILE`` draws a bar for each layer. From a repository on the Hub it downloads the sparse
file alone, where there is one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mfac_hf.cli.errors import CommandError, as_command_error, printable
from mfac_hf.storage import written_aside


def add_parser(commands: Any) -> None:
    """Add `mfac inspect` to the sub-commands."""
    inspect = commands.add_parser(
        "inspect",
        help="show the sparsity of each layer of a model",
        description="Show the file sizes and the sparsity of each layer of a model.",
    )
    inspect.add_argument("model", help="directory or Hub name of a model")
    inspect.add_argument("--revision", help="branch, tag or commit on the Hub (default: main)")
    inspect.add_argument("--json", action="store_true", help="print JSON in place of tables")
    inspect.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the sparsity of each layer into this file (.png, .svg)"
    )
    inspect.set_defaults(run=_run_inspect)


def _run_inspect(arguments: argparse.Namespace) -> None:
    from mfac_hf.hub.inventory import describe_weights, find_model_directory
    from mfac_hf.sparse.directory import find_weights

    with as_command_error():
        hub = {} if arguments.revision is None else {"revision": arguments.revision}
        directory = find_model_directory(arguments.model, **hub)
        sizes = {path.name: path.stat().st_size for path in find_weights(directory)}
        report = {"files": sizes, **describe_weights(directory)}
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print_tables(report)
    if arguments.picture is not None:
        _draw(report, arguments.picture)


def _print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    layers = Table(title="Matrices and convolutions", title_justify="left")
    for header in ("tensor", "shape", "zeros", "sparsity", ""):
        layers.add_column(header, overflow="fold")
    for tensor in report["tensors"]:
        share = tensor["zeros"] / max(tensor["numel"], 1)
        bar = "█" * round(20 * share) if tensor["target"] else "(not pruned)"
        shape = " x ".join(map(str, tensor["shape"]))
        layers.add_row(Text(printable(tensor["name"])), shape, f"{tensor['zeros']:,}", f"{share:.2%}", bar)
    console.print(layers)
    totals = Table("", "weights", "zeros", "sparsity", title="Together", title_justify="left")
    for title, counts in (("layers that pruning is meant for", report["targets"]), ("all", report)):
        share = counts["zeros"] / max(counts["numel"], 1)
        totals.add_row(title, f"{counts['numel']:,}", f"{counts['zeros']:,}", f"{share:.2%}")
    console.print(totals)
    for name, size in report["files"].items():
        console.print(Text(f"{printable(name)}: {size:,} bytes"))


def _draw(report: dict[str, Any], path: Path) -> None:
    """Draw a bar for each tensor that pruning is meant for."""
    try:
        import matplotlib
    except ImportError as error:
        raise CommandError(f"--picture needs matplotlib ({error}): pip install 'mfac_hf[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    tensors = [tensor for tensor in report["tensors"] if tensor["target"]]
    names = [printable(tensor["name"].removesuffix(".weight")) for tensor in tensors]
    shares = [100 * tensor["zeros"] / max(tensor["numel"], 1) for tensor in tensors]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.22 * len(tensors)), layout="constrained")
    axes.barh(names, shares)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("zeros in %")
    axes.tick_params(axis="y", labelsize=7)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a name with dollar signs is no formula
    try:
        with written_aside(path) as unfinished:
            figure.savefig(unfinished, format=path.suffix.removeprefix(".") or "png")
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not know
        raise CommandError(f"--picture {path}: {error}") from error
    finally:
        pyplot.close(figure)
    print(path)
