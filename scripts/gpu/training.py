"""Trainer on the device: precisions, a checkpoint from a CPU, pruning, and an epoch.

The data are generated (`mfac_hf.tasks.toy`), and lists take the place of ``datasets``, which such a machine may lack.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench.common import print_table
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from gpu.part import Context, NotCheckedError, require, run_tests
from mfac_hf import MFAC, MFACPruningCallback, SparsitySchedule, memory_estimate, prune_one_shot
from mfac_hf.loss_scale import correct_loss_scale
from mfac_hf.machine import GIB
from mfac_hf.pruning import find_targets
from mfac_hf.tasks.toy import toy_accuracy, toy_model, toy_rows, toy_tokenizer

Features = list[dict[str, Any]]

OPTIMIZER_TESTS = [
    *(f"tests/optim/test_{name}.py" for name in ("mfac", "metric", "masks", "groups", "gradients", "windowed")),
    *(f"tests/optim/test_{name}.py" for name in ("parameter_window", "plausible", "update", "unwrap")),
    *(f"tests/fisher/test_{name}.py" for name in ("window", "gram", "columns", "factor")),
]
PRUNING_TESTS = [
    *(f"tests/fisher/test_{name}.py" for name in ("blocked", "full")),
    *(f"tests/pruning/test_{name}.py" for name in ("obs", "trace", "blocked_step", "full_step", "oneshot")),
]
SST2_SENTENCES = 67_349


def features_of(rows: Sequence[tuple[str, int]], tokenizer: PreTrainedTokenizerBase) -> Features:
    """Tokens and labels as Trainer's collator takes them."""
    ids = tokenizer([text for text, _ in rows], truncation=True, max_length=128)["input_ids"]
    return [{"input_ids": row, "labels": label} for row, (_, label) in zip(ids, rows, strict=True)]


def toy_features(sizes: tuple[int, int]) -> tuple[Features, Features]:
    """Generated sentences to train and to evaluate on."""
    rows, tokenizer = toy_rows(*sizes), toy_tokenizer()
    return features_of(rows["train"], tokenizer), features_of(rows["validation"], tokenizer)


def make_trainer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Features, Features],
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Trainer:
    """An unmodified Trainer; options are those of TrainingArguments."""
    settings = {
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 128,
        "lr_scheduler_type": "constant",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(directory), **{**settings, **options}),
        train_dataset=data[0],
        eval_dataset=data[1],
        data_collator=DataCollatorWithPadding(tokenizer or toy_tokenizer()),
        optimizers=(optimizer, None),
        compute_metrics=toy_accuracy,
    )
    trainer.remove_callback(PrinterCallback)  # the output of a part is its tables
    correct_loss_scale(trainer)
    return trainer


def losses_of(trainer: Trainer) -> list[float]:
    """The training losses that it logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run_optimizer_tests(context: Context) -> dict[str, Any]:
    """The optimizer and its window by their tests."""
    return run_tests(context.kind, OPTIMIZER_TESTS)


def train_in_precisions(context: Context) -> dict[str, Any]:
    """Trainer with MFAC in float32 and under both kinds of autocast; a step inside autocast changes no digit."""
    results: dict[str, Any] = {"autocast": run_tests(context.kind, ["tests/optim/test_autocast.py"])}
    steps, batch = (20, 32) if context.rehearsal else (200, 128)
    data = toy_features((steps * batch, 256))
    for name in ("fp32", "bf16", "fp16"):
        if name == "fp16" and context.rehearsal:
            results[name] = {"reason": "float16 autocast with loss scaling needs a GPU"}
            continue
        model = toy_model(hidden_size=32 if context.rehearsal else 128)
        optimizer = MFAC(model.parameters(), lr=1.5e-3)  # the rate of the demonstration
        options = {"max_steps": steps, "per_device_train_batch_size": batch, "use_cpu": context.rehearsal}
        options |= {} if name == "fp32" else {name: True}
        trainer = make_trainer(model, optimizer, data, context.scratch / name, **options)
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
        losses = losses_of(trainer)
        require(all(map(math.isfinite, losses)), f"{name}: losses {losses}")
        require(losses[-1] < losses[0], f"{name}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
        require(optimizer.skipped_steps == 0, f"{name}: {optimizer.skipped_steps} steps were skipped")
        kinds = {p.dtype for p in model.parameters()} | {p.device.type for p in model.parameters()}
        require(kinds == {torch.float32, context.kind}, f"{name}: the parameters are {kinds}")
        window = next(state["window"] for state in optimizer.state.values() if "window" in state)
        require(window.device.type == context.kind, f"{name}: the window is on {window.device}")
        results[name] = {"losses": losses, "seconds": seconds, **trainer.evaluate()}
    print_table(
        f"{steps} steps of MFAC under Trainer",
        ("precision", "first loss", "last loss", "accuracy", "seconds"),
        [
            (name, f"{row['losses'][0]:.3f}", f"{row['losses'][-1]:.3f}", f"{row['eval_accuracy']:.3f}",
             f"{row['seconds']:.1f}")
            for name, row in results.items() if "losses" in row
        ],
    )  # fmt: skip
    if context.rehearsal:
        print(f"\nfp16: not checked, {results['fp16']['reason']}")
    return results


def resume_from_cpu(context: Context) -> dict[str, Any]:
    """Half a run on the CPU, its other half on the device: as if it had stayed, up to rounding."""
    data, folder = toy_features((600, 64)), context.scratch

    def trainer(use_cpu: bool, steps: int) -> Trainer:
        model = toy_model(hidden_size=32)
        optimizer = MFAC(model.parameters(), lr=1e-3)
        saving = {"save_strategy": "steps", "save_steps": 8}
        return make_trainer(model, optimizer, data, folder, max_steps=steps, use_cpu=use_cpu, **saving)

    def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
        return {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters()}

    trainer(True, 8).train()
    checkpoint = str(folder / "checkpoint-8")
    half = weights_in(checkpoint)
    ended = []
    for use_cpu in (True, context.rehearsal):  # accelerate has one device for all: that of the newest arguments
        ended.append(trainer(use_cpu, 16))
        ended[-1].train(resume_from_checkpoint=checkpoint)
    stayed, moved = ended
    require(moved.state.global_step == 16, f"the resumed run ended at step {moved.state.global_step}")
    state = moved.optimizer.optimizer.state.values()
    places = {value.device.type for each in state for value in each.values() if torch.is_tensor(value)}
    require(places <= {context.kind, "cpu"} and context.kind in places, f"the state is on {places}")
    first, second = weights(stayed), weights(moved)
    # Softmax does not see a key's bias: its gradient is rounding alone, which Adam's metric makes a whole step.
    seen = [name for name in first if "key.bias" not in name]
    off = math.hypot(*(float((first[name] - second[name]).norm()) for name in seen))
    way = math.hypot(*(float((first[name] - half[name]).norm()) for name in seen))
    require(way > 0, "the resumed run moved no weight")
    equal = all(torch.equal(first[name], second[name]) for name in first)
    print(f"8 steps after a checkpoint of a CPU: {off / way:.1e} of the way from those on the CPU (allowed: 1e-2)")
    require(
        equal if context.rehearsal else off <= 1e-2 * way, f"off by {off / way:.1e} of the way, equal bits: {equal}"
    )
    return {"off": off / way, "equal_bits": equal}


def weights_in(checkpoint: str) -> dict[str, torch.Tensor]:
    """The parameters that a checkpoint holds."""
    model = BertForSequenceClassification.from_pretrained(checkpoint)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def prune(context: Context) -> dict[str, Any]:
    """The pruner by its tests; a model pruned on the device and on the CPU; gradual pruning under bfloat16."""
    results: dict[str, Any] = {"tests": run_tests(context.kind, PRUNING_TESTS)}
    steps, width = (20, 32) if context.rehearsal else (150, 128)
    train, evaluation = toy_features((32 * steps, 256))
    on_cpu = toy_model(hidden_size=width)
    adamw = torch.optim.AdamW(on_cpu.parameters(), lr=1e-3)
    trained = make_trainer(
        on_cpu, adamw, (train, evaluation), context.scratch, max_steps=steps, use_cpu=context.rehearsal
    )
    trained.train()
    on_cpu = trained.model.cpu()
    on_device = copy.deepcopy(on_cpu).to(context.device)
    loader = DataLoader(train, batch_size=32, collate_fn=DataCollatorWithPadding(toy_tokenizer()))  # type: ignore[arg-type]
    seconds, reports = {}, {}
    for name, model in (("cpu", on_cpu), (context.kind, on_device)):
        begun = time.perf_counter()
        reports[name] = prune_one_shot(
            model, loader, 0.6, num_grads=256, block_size=64, recomputations=2, progress=False
        )
        seconds[name] = time.perf_counter() - begun
    masks, theirs = (report.masks for report in (reports["cpu"], reports[context.kind]))
    same = sum(int((keep == theirs[name].cpu()).sum()) for name, keep in masks.items())
    total = sum(keep.numel() for keep in masks.values())
    off = max(
        float((p - q.cpu()).norm() / p.norm())
        for p, q in zip(find_targets(on_cpu).values(), find_targets(on_device).values(), strict=True)
    )
    results["one_shot"] = {"masks_agree": same / total, "largest_difference": off, "seconds": seconds}
    print(f"one shot to 60 %: {same} of {total} mask bits agree with the CPU's, weights differ by {off:.1e} at most")
    # Weights of nearly the same saliency change places with the last digit of a gradient.
    require(same >= 0.99 * total and off <= 0.1, f"pruned otherwise than on the CPU: {results['one_shot']}")

    pruning = MFACPruningCallback(
        SparsitySchedule.cubic(final=0.8, start=2, end=steps - 5, every=4 if context.rehearsal else 12),
        num_grads=32,
        block_size=64,
        recomputations=1,
    )
    model = toy_model(hidden_size=width)
    trainer = make_trainer(
        model, MFAC(model.parameters(), lr=1e-3), (train, evaluation), context.scratch / "gradual",
        max_steps=steps, use_cpu=context.rehearsal, bf16=True,
    )  # fmt: skip
    trainer.add_callback(pruning)
    trainer.train()
    losses = losses_of(trainer)
    require(all(map(math.isfinite, losses)), f"gradual pruning: losses {losses}")
    require(abs(pruning.sparsity - 0.8) < 1e-3, f"gradual pruning ended at {pruning.sparsity}")
    require(not pruning.masks.nonzeros(model), f"pruned weights are not zero: {pruning.masks.nonzeros(model)}")
    results["gradual"] = {"prunings": len(pruning.reports), "sparsity": pruning.sparsity, "losses": losses}
    print(f"gradual pruning under bf16: {len(pruning.reports)} prunings to {pruning.sparsity:.3f}")
    return results


def load_sst2(folder: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Features, Features]:
    """SST-2 from parquet files in the layout of GLUE on the Hub.

    Raises:
        NotCheckedError: there is no reader of parquet files.
    """
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise NotCheckedError("SST-2 comes as parquet files, and pyarrow is not installed") from error
    splits = []
    for split in ("train", "validation"):
        table = parquet.read_table(sorted(Path(folder, "sst2").glob(f"{split}-*.parquet")))
        rows = list(zip(table["sentence"].to_pylist(), table["label"].to_pylist(), strict=True))
        splits.append(features_of(rows, tokenizer))
    return splits[0], splits[1]


def train_epoch(context: Context) -> dict[str, Any]:
    """An epoch beside AdamW: MFAC as it is, and with the published window; memory beside the estimate."""
    tokenizer = toy_tokenizer()
    if context.sst2 is not None:
        folder, name = context.sst2
        tokenizer = AutoTokenizer.from_pretrained(name)
        data, about = load_sst2(folder, tokenizer), "SST-2,"
        if context.rehearsal:
            data, about = (data[0][:320], data[1][:64]), "320 sentences of SST-2,"
    else:
        count = 320 if context.rehearsal else SST2_SENTENCES
        data = toy_features((count, 872))
        about = f"{count:,} generated sentences," + ("" if context.rehearsal else " as many as SST-2 has,")

    def new_model() -> nn.Module:
        if context.sst2 is not None:
            torch.manual_seed(0)
            return AutoModelForSequenceClassification.from_pretrained(context.sst2[1], num_labels=2)
        config = toy_model(hidden_size=128).config
        config.vocab_size = 30_522  # BERT's
        torch.manual_seed(0)
        return BertForSequenceClassification(config)

    published = {"metric": "identity", "num_grads": 32 if context.rehearsal else 1024, "damping": 1e-6}
    published |= {"window_dtype": torch.bfloat16}
    rows: dict[str, dict[str, Any]] = {}
    for name, options in (("adamw", None), ("mfac", {}), ("mfac, published window", published)):
        model = new_model()
        rate = 1e-4 if options is published else 5e-4
        if options is None:
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
        else:
            optimizer = MFAC(model.parameters(), lr=rate, **options)
        if not context.rehearsal:
            torch.cuda.reset_peak_memory_stats()
        trainer = make_trainer(
            model, optimizer, data, context.scratch, tokenizer, num_train_epochs=1, use_cpu=context.rehearsal
        )
        ran = trainer.train().metrics
        losses = losses_of(trainer)
        require(all(map(math.isfinite, losses)), f"{name}: losses {losses}")
        row: dict[str, Any] = {"seconds": ran["train_runtime"], "train_loss": ran["train_loss"], **trainer.evaluate()}
        if not context.rehearsal:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        if isinstance(optimizer, MFAC):
            require(optimizer.skipped_steps == 0, f"{name}: {optimizer.skipped_steps} steps were skipped")
            asked = {key: options[key] for key in ("num_grads", "window_dtype", "metric") if key in (options or {})}
            row["estimate_gib"] = memory_estimate(model, **asked).bytes / GIB
            row["window_gib"] = optimizer.window_stats()["window_gib"]
        row["over_adamw"] = row["seconds"] / rows["adamw"]["seconds"] if rows else 1.0
        rows[name] = row
    columns = {
        "seconds": ("seconds", "{:.1f}"), "/ AdamW": ("over_adamw", "{:.2f}"), "loss": ("train_loss", "{:.3f}"),
        "accuracy": ("eval_accuracy", "{:.3f}"), "peak GiB": ("peak_gib", "{:.2f}"),
        "state, estimated GiB": ("estimate_gib", "{:.2f}"),
    }  # fmt: skip
    print_table(
        f"an epoch of {about} BERT-tiny, batches of 32",
        ("optimizer", *columns),
        [
            (name, *(form.format(row[key]) if key in row else "" for key, form in columns.values()))
            for name, row in rows.items()
        ],
    )
    return {"data": about, **rows}
