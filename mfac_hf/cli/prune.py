"""`mfac prune` prunes a fine-tuned model in one go, without training it, and shows what that costs.

    mfac prune MODEL --task sst2 --sparsity 0.8 --output DIR

MODEL is the directory or Hub name of a model that is fine-tuned on the task. DIR gets the pruned model and its
tokenizer, which `from_pretrained` reads as before; `masks.safetensors`, which keeps the model sparse in training that
follows; and `pruning.json`, the report, the metrics before and after and what it takes to repeat the run. `mfac card`
and `mfac push` take DIR as it is.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mfac_hf.cli.errors import CommandError
from mfac_hf.defaults import PRUNING_DAMPING_TEXT
from mfac_hf.pruning.options import Fisher, Method, PruningOptions, Scope, Selection, Update
from mfac_hf.storage import write_json, written_directory

if TYPE_CHECKING:
    from mfac_hf.pruning.options import PruningReport
    from mfac_hf.training.fine_tuned import FineTuned

_EVAL_BATCH_SIZE = 64
# Flags about the data that `pruning.json` records.
_DATA = ("dataset", "max_seq_length", "max_train_samples", "max_eval_samples")


def add_parser(commands: Any) -> None:
    """Add `mfac prune` to the sub-commands; the options have the defaults of `PruningOptions`."""
    prune = commands.add_parser(
        "prune",
        help="prune a fine-tuned model in one go",
        description="Prune a model that is fine-tuned on a GLUE task or SQuAD, without training it further.",
    )
    prune.add_argument("model", metavar="MODEL", help="directory or Hub name of the model")
    prune.add_argument("--task", required=True, help="GLUE task (sst2, mrpc, ...), squad or squad_v2")
    prune.add_argument("--sparsity", required=True, type=float, help="share of the target weights to set to zero")
    prune.add_argument("--output", required=True, type=Path, metavar="DIR", help="new directory for the result")
    data = prune.add_argument_group("data")
    data.add_argument(
        "--dataset", help="Hub name of the data, or a directory in the same layout (default: that of the task)"
    )
    data.add_argument("--max-seq-length", type=int, help="tokens of an input at most (default: 128, SQuAD 384)")
    data.add_argument(
        "--max-train-samples", type=int, help="take gradients from N examples only, always the same ones"
    )
    data.add_argument("--max-eval-samples", type=int, help="evaluate on N examples only, always the same ones")
    data.add_argument("--no-eval", action="store_true", help="do not evaluate before and after")
    _add_method(prune.add_argument_group("method"))
    prune.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    prune.set_defaults(run=_run_prune)


def _add_method(group: Any) -> None:
    """Add the flags that become `PruningOptions`."""

    def add(flag: str, text: str, **settings: Any) -> None:
        default = getattr(PruningOptions(), flag.replace("-", "_"))
        group.add_argument(f"--{flag}", **{"default": default, **settings}, help=f"{text} (default: %(default)s)")

    add("method", "inverse Fisher, or magnitude as the baseline", choices=get_args(Method))
    add("fisher", "empirical is the paper's; scaled sees examples that the model gets right", choices=get_args(Fisher))
    add("fisher-floor", "least norm by which the scaled Fisher divides", type=float)
    group.add_argument(
        "--targets",
        nargs="+",
        metavar="REGEX",
        help="parameters to prune (default: linear layers and experts of all layers)",
    )
    add("recomputations", "sub-steps, each with new gradients", type=int)
    add("num-grads", "gradients in each sub-step", type=int)
    add("grad-batch-size", "examples that each gradient is the mean of", type=int)
    add("examples-per-pass", "examples that one pass through the model serves at most", type=int)
    add("block-size", "weights in a block of the Fisher", type=int)
    group.add_argument(
        "--damping",
        help="added to the Fisher's diagonal, or auto: the value with the lowest loss on held-out training examples "
        f"(default: {PRUNING_DAMPING_TEXT})",
    )
    add("selection", "how weights are chosen; diagonal is the paper's way", choices=get_args(Selection))
    makes_up = "how the other weights make up for them; sum is the paper's way, none leaves them alone"
    add("update", makes_up, choices=get_args(Update))
    add("pattern", "unstructured, 2:4 (any N:M), block4 (any length)")
    add("scope", "rank the weights of all targets together, or prune each alike", choices=get_args(Scope))
    group.add_argument(
        "--first-order",
        action="store_true",
        help="a step of the survivors down the loss after each sub-step, as long as held-out examples say",
    )
    add("batch-norm-samples", "examples that batch norms are averaged over after each sub-step; 0: not", type=int)
    add("seed", "seed that chooses the examples", type=int)


def _run_prune(arguments: argparse.Namespace) -> None:
    """Check what can be checked at once, then load, prune, save and show."""
    started = time.perf_counter()
    from mfac_hf.pruning.engine import check_targets, prune_to
    from mfac_hf.pruning.gradients import DataLoaderGradients
    from mfac_hf.pruning.masks import MaskSet
    from mfac_hf.pruning.options import check_sparsity
    from mfac_hf.pruning.targets import find_targets
    from mfac_hf.training.fine_tuned import load_fine_tuned

    try:
        _check_output(arguments.output)
        options = _options(arguments)
        check_sparsity(arguments.sparsity)
        tuned = load_fine_tuned(
            arguments.model,
            arguments.task,
            arguments.dataset,
            max_seq_length=arguments.max_seq_length,
            max_train_samples=arguments.max_train_samples,
            max_eval_samples=arguments.max_eval_samples,
            eval_batch_size=_EVAL_BATCH_SIZE,
            use_cpu=arguments.cpu,
        )
        masks = MaskSet.from_model(tuned.model, find_targets(tuned.model, arguments.targets))
        # What can be refused is refused before an evaluation that takes minutes.
        check_targets(tuned.model, masks, arguments.sparsity, options)
        source = DataLoaderGradients.of_options(tuned.loader(), options)
        if options.method == "mfac":
            source.check(options.num_grads)
            source.try_batch(tuned.model, masks.parameters(tuned.model))
        before = None if arguments.no_eval else tuned.evaluate()
        report = prune_to(tuned.model, masks, source, arguments.sparsity, options)
        after = None if arguments.no_eval else tuned.evaluate()
        _save(arguments, tuned, report, {"before": before, "after": after}, started)
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        raise CommandError(" ".join(str(error).split())) from error
    _show(tuned, report, before, after)


def _check_output(output: Path) -> None:
    """Refuse a directory that has something in it, or cannot be written to."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CommandError(f"{output} exists and is no empty directory; name a new one")
    whole = Path(os.path.abspath(output))
    nearest = next(folder for folder in (whole, *whole.parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise CommandError(f"{output} cannot be made: {nearest} is no directory, or not writable")


def _options(arguments: argparse.Namespace) -> PruningOptions:
    """Make the options that the flags name; a ValueError names the flag that is wrong."""
    from mfac_hf.pruning.options import parse_damping

    return PruningOptions(
        method=arguments.method,
        fisher=arguments.fisher,
        fisher_floor=arguments.fisher_floor,
        num_grads=arguments.num_grads,
        grad_batch_size=arguments.grad_batch_size,
        examples_per_pass=arguments.examples_per_pass,
        block_size=arguments.block_size,
        damping=None if arguments.damping is None else parse_damping(arguments.damping, "--damping"),
        recomputations=arguments.recomputations,
        selection=arguments.selection,
        update=arguments.update,
        pattern=arguments.pattern,
        scope=arguments.scope,
        first_order=arguments.first_order,
        batch_norm_samples=arguments.batch_norm_samples,
        seed=arguments.seed,
    )


def _save(
    arguments: argparse.Namespace,
    tuned: FineTuned,
    report: PruningReport,
    metrics: Mapping[str, dict[str, float] | None],
    started: float,
) -> None:
    """Write model, tokenizer, masks and `pruning.json`, all of them or nothing."""
    from mfac_hf.machine import describe_run, relative_paths

    assert report.masks is not None
    device = tuned.trainer.args.device
    described = describe_run(arguments.argv, device)
    record = {
        "model": relative_paths(arguments.model),
        "model_is_local": Path(arguments.model).exists(),
        "task": arguments.task,
        "evaluated_on": tuned.evaluated_on,
        "metric": tuned.metric,
        **metrics,
        "data": relative_paths({name: getattr(arguments, name) for name in _DATA}),
        "pruning": report.to_dict(),
        "seed": arguments.seed,
        **described,
        "command": ["mfac", *described["command"][1:]],
        "wall_seconds": round(time.perf_counter() - started, 2),
    }
    with written_directory(arguments.output) as folder:
        tuned.model.save_pretrained(folder)
        tuned.tokenizer.save_pretrained(folder)
        report.masks.save(folder)
        write_json(folder / "pruning.json", record)


def _show(
    tuned: FineTuned, report: PruningReport, before: dict[str, float] | None, after: dict[str, float] | None
) -> None:
    """Print the metrics before and after, the sparsity of each target, and what is none."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mfac_hf.pruning.targets import grouped, left_out

    console = Console()
    if before is not None and after is not None:
        table = Table(title=f"On {tuned.evaluated_on}", title_justify="left")
        for column in ("", "before", "after"):
            table.add_column(column, justify="left" if not column else "right")
        for name in (tuned.metric, "eval_loss"):
            table.add_row(name.removeprefix("eval_"), f"{before[name]:.4f}", f"{after[name]:.4f}")
        console.print(table)
    table = Table(title="Sparsity", title_justify="left", show_footer=True)
    table.add_column("target", footer=f"all {report.num_weights:,} weights", overflow="fold")
    table.add_column("pruned", footer=f"{report.sparsity:.2%}", justify="right")
    for name, sparsity in report.sparsities.items():
        table.add_row(Text(name), f"{sparsity:.2%}")
    console.print(table)
    console.print(Text(f"Left out: {grouped(left_out(tuned.model, report.sparsities))}"))
