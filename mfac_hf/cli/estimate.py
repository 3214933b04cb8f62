"""`mfac estimate` prints the memory that `MFAC` takes for a model, beside AdamW's, and its time in each step.

    mfac estimate google-bert/bert-base-uncased --dtype bfloat16
    mfac estimate google/bert_uncased_L-2_H-128_A-2 --metric identity --num_grads 1024
    mfac estimate 4400000
    mfac estimate meta-llama/Llama-2-7b-hf --lora_rank 8
    mfac estimate google-bert/bert-large-uncased --ranks 8 --machine h100
    mfac estimate meta-llama/Llama-2-7b-hf --lora_rank 16 --ranks 64 --shards 8 --machine h100-infiniband

It reads the configuration of the model and downloads no weights. A checkpoint with a head for pretraining is counted
with the head of a classifier, with which it is fine-tuned; ``--head`` chooses another. With ``--lora_rank``, what LoRA
trains is counted. The time is that of the two passes over the window, at the pace that this machine shows on a small
window of the same dtype, and of factoring an m x m matrix.

With ``--ranks`` it plans instead: what each rank holds, what it sends and computes in a step, and the seconds that
takes on a machine (`mfac_hf.planner`). No rank is started and nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mfac_hf.cli.errors import as_command_error
from mfac_hf.cli.planned import add_plan_flags, describe_plan, planned, weights_dtype
from mfac_hf.defaults import MFAC_DEFAULTS, MFAC_METRIC, TOUCHED_EMBEDDING_ROWS

# Names of --head, and the classes of transformers that build a model with such a head.
HEADS = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "multiple_choice": "AutoModelForMultipleChoice",
    "image_classification": "AutoModelForImageClassification",
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "pretraining": "AutoModelForPreTraining",
    "none": "AutoModel",
}
# Classes of these endings hold what a task is seldom trained with. Language models that generate are another matter.
PRETRAINING_HEADS = ("ForMaskedLM", "ForPreTraining", "ForMaskedImageModeling")
# What is counted in their place: the first that there is.
FINE_TUNED_HEADS = ("sequence_classification", "image_classification")

# Above this size the factorization is timed at this size, and the time grows with the third power.
FACTOR_SAMPLE = 2048
SAMPLE_BYTES = 128 << 20  # larger than the caches
ROUNDS = 5


def add_parser(commands: Any) -> None:
    """Add `mfac estimate` to the sub-commands."""
    estimate = commands.add_parser(
        "estimate",
        help="print memory and time of the optimizer for a model",
        description="Print the memory that MFAC takes for a model, beside AdamW's, and its time in each step on this "
        "machine.",
    )
    estimate.add_argument(
        "model", help="directory or Hub name of a model (config.json is read), or a number of parameters"
    )
    estimate.add_argument(
        "--head",
        choices=tuple(HEADS),
        help="head that the model is trained with (default: that of its class, or a classifier's if that is for "
        "pretraining)",
    )
    estimate.add_argument(
        "--metric", choices=tuple(MFAC_DEFAULTS), default=MFAC_METRIC, help="metric of MFAC (default: %(default)s)"
    )
    defaults = ", ".join(f"{options['num_grads']} for {metric}" for metric, options in MFAC_DEFAULTS.items())
    estimate.add_argument("--num_grads", type=int, help=f"number of gradients in the window, m (default: {defaults})")
    defaults = ", ".join(f"{options['window_dtype']} for {metric}" for metric, options in MFAC_DEFAULTS.items())
    estimate.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float64"), help=f"dtype of the window (default: {defaults})"
    )
    estimate.add_argument(
        "--embedding_rows",
        type=int,
        default=TOUCHED_EMBEDDING_ROWS,
        help=f"rows of an embedding table that one batch looks up (default: {TOUCHED_EMBEDDING_ROWS})",
    )
    estimate.add_argument("--lora_rank", type=int, help="count what LoRA trains, with factors of this rank")
    estimate.add_argument(
        "--lora_targets",
        nargs="+",
        help="layers that get factors, or all-linear (default: peft's choice for the architecture)",
    )
    add_plan_flags(estimate)
    estimate.add_argument("--no_time", action="store_true", help="do not measure the time on this machine")
    estimate.add_argument("--json", action="store_true", help="print JSON in place of text")
    estimate.set_defaults(run=_run_estimate)


def _run_estimate(arguments: argparse.Namespace) -> None:
    import torch

    from mfac_hf.machine import GIB, available_bytes
    from mfac_hf.memory import adamw_bytes, gram_matrix_bytes, memory_estimate

    with as_command_error():
        model: Any = int(arguments.model) if arguments.model.isdecimal() else None
        named = ""
        if model is None:
            model, named = _skeleton(arguments.model, arguments.head)
            if arguments.ranks is not None:
                model = model.to(weights_dtype(model, arguments))
        elif flag := next(
            (f for f in ("head", "lora_rank", "model_dtype") if getattr(arguments, f) is not None), None
        ):
            raise ValueError(f"--{flag} {getattr(arguments, flag)} needs a model; {model} is a number of parameters")
        model_class = None if isinstance(model, int) else type(model).__name__
        model = _with_lora(model, arguments.lora_rank, arguments.lora_targets)
        metric, num_grads = arguments.metric, arguments.num_grads
        if num_grads is None:
            num_grads = MFAC_DEFAULTS[metric]["num_grads"]
        dtype = getattr(torch, arguments.dtype or MFAC_DEFAULTS[metric]["window_dtype"])
        memory = memory_estimate(model, num_grads, dtype, metric=metric, embedding_rows=arguments.embedding_rows)
        plan = planned(model, num_grads, dtype, arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = available_bytes(device)
    report: dict[str, Any] = {
        "model_class": model_class,
        "checkpoint_class": named or None,
        "metric": metric,
        "num_grads": num_grads,
        "bytes": memory.bytes,
        "adamw_bytes": adamw_bytes(model),
        "device": str(device),
        "free_bytes": free,
        "step_seconds": None,
        "plan": None if plan is None else describe_plan(plan),
    }
    if plan is None and not arguments.no_time:
        window_bytes = memory.bytes - gram_matrix_bytes(num_grads)
        report["step_seconds"] = _step_seconds(window_bytes, num_grads, dtype, device, metric)
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    if report["model_class"] is not None:
        part = "" if arguments.lora_rank is None else f"{adamw_bytes(model) // 8:,} numbers that LoRA trains of "
        print(f"counted: {part}{_describe_class(report['model_class'], named)}")
    if plan is not None:
        print(plan.breakdown)
        return
    print(memory.breakdown)
    verdict = "fits" if memory.bytes <= free else "does NOT fit"
    print(f"{verdict}: {free / GIB:.2f} GiB are free on {device} (the model and its training come on top)")
    if report["step_seconds"] is not None:
        print(f"about {1000 * report['step_seconds']:.0f} ms in each step on top of forward and backward, window full")


def _with_lora(model: Any, rank: int | None, targets: list[str] | None) -> Any:
    """Freeze a model and give it LoRA's factors where there is a rank.

    Raises:
        ValueError: the model cannot get them.
        ModuleNotFoundError: peft is missing.
    """
    if rank is None and targets is None:
        return model
    from mfac_hf.training.lora_arguments import LoraArguments, add_lora

    arguments = LoraArguments(lora_rank=rank, lora_targets=targets)
    arguments.check()
    return add_lora(model, arguments)


def _describe_class(counted: str, named: str) -> str:
    """Say in words which class was counted, which one the checkpoint is of, and how to count another."""
    if named == counted:
        return f"{counted}, the class of the checkpoint (--head counts another)"
    of_checkpoint = f"the checkpoint is a {named}" if named else "the configuration names no class"
    return f"{counted} ({of_checkpoint}; --head counts another)"


def _skeleton(name: str, head: str | None) -> tuple[Any, str]:
    """Build a model from its configuration, without weights.

    Args:
        name: directory or Hub name of the model.
        head: key of `HEADS`. None takes the class that the configuration names, or a classifier in its place where
            that one has a head for pretraining.

    Returns:
        The model, and the class that the configuration names ("" if none).

    Raises:
        ValueError: no model can be built from the configuration, or none with this head.
        OSError: there is no configuration.
    """
    import torch
    import transformers

    config, named = _configuration(name)
    own = getattr(transformers, named, None)
    is_model = isinstance(own, type) and issubclass(own, transformers.PreTrainedModel)
    heads = [head] if head else [*FINE_TUNED_HEADS] if named.endswith(PRETRAINING_HEADS) else []
    builders = [getattr(transformers, HEADS[key]).from_config for key in heads]
    if head is None:
        builders.append(own if is_model else transformers.AutoModel.from_config)
    reasons = []
    for build in builders:
        try:
            with torch.device("meta"):
                return build(config), named
        except Exception as error:  # which one is left to chance where a configuration says anything
            reasons.append(_one_line(error))
    wanted = f"no model with --head {head}" if head else "no model"
    raise ValueError(f"{name}: its {type(config).__name__} makes {wanted} ({reasons[-1]})")


def _configuration(name: str) -> tuple[Any, str]:
    """Read the configuration of a model, and the class that it names ("" if none).

    Raises:
        ValueError: it has another form than that of a configuration.
        OSError: there is none.
    """
    from transformers import AutoConfig

    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json; expected the directory of a model")
    try:
        source = path / "config.json" if path.is_dir() else name
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):
        raise
    except Exception as error:  # as above
        raise ValueError(f"{name} has no configuration of a model ({_one_line(error)})") from error
    named = config.architectures or [""]
    if not isinstance(named, list) or not isinstance(named[0], str) or not (named[0] or "_").isidentifier():
        raise ValueError(
            f"{name}: architectures is {named!r} in its configuration; expected a list of names of classes"
        )
    return config, named[0]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _step_seconds(window_bytes: int, num_grads: int, dtype: Any, device: Any, metric: str) -> float:
    """Seconds of two passes over the window at the pace of this machine, and of the factorization."""
    import torch
    from torch.utils.benchmark import Timer

    from mfac_hf.ops.metric import metric_combine, metric_push
    from mfac_hf.ops.window import combine, row_dots

    rows = min(num_grads, 64)
    columns = SAMPLE_BYTES // (rows * dtype.itemsize)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    window_MD = torch.ones(rows, columns, dtype=dtype, device=device)
    x_D = torch.ones(columns, dtype=wide, device=device)
    moment_D = torch.ones(columns if metric == "adam" else 0, dtype=wide, device=device)
    weights_M = torch.ones(rows, dtype=torch.float64, device=device)
    size = min(num_grads, FACTOR_SAMPLE)
    gram_MM = torch.eye(size, dtype=torch.float64, device=device)

    def passes() -> None:
        if metric == "adam":
            metric_push(window_MD, [x_D], moment_D, 0, rows, rate=0.001, eps=1e-8)
            metric_combine(window_MD, weights_M, moment_D, eps=1e-8)
        else:
            row_dots(window_MD, x_D)
            combine(window_MD, weights_M)

    def seconds(call: Any) -> float:
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        median: float = timer.timeit(ROUNDS).median
        return median

    factor = seconds(lambda: torch.linalg.cholesky_ex(gram_MM))
    sample_bytes = window_MD.nbytes + moment_D.nbytes
    return seconds(passes) * window_bytes / sample_bytes + factor * (num_grads / size) ** 3
