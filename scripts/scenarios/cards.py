"""Model cards: from the facts that lie in the repository, from result files and weights, and from a Trainer."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from transformers import Trainer, TrainingArguments

from mfac_hf import MFAC, MFACPruningCallback, SparsitySchedule
from mfac_hf.cli import main
from scenarios.common import EMPIRICAL, identity, sentences, tiny_bert, zero_most

__all__ = ["of_facts", "of_results", "of_trainers"]

HERE = Path(__file__).resolve().parents[2]
RUN = {
    "results": {"task": "sst2", "eval_accuracy": 0.8125, "eval_loss": 0.4, "evaluated_on": ["validation"]},
    "command": ["scripts/run_glue.py", "--seed", "3"],
    "arguments": {
        "ModelArguments": {"model_name_or_path": "google/bert_uncased_L-2_H-128_A-2"},
        "GlueArguments": {"task_name": "sst2", "dataset_name": "data/glue", "max_seq_length": 128},
        "OptimizerArguments": {"optim_name": "mfac", "num_grads": 256, "damping": 1e-3, "save_window": True},
        "TrainingArguments": {"learning_rate": 3e-3, "optim": "adamw_torch_fused", "max_steps": -1, "fp16": False},
    },
    "seed": 3,
    "versions": {"torch": "2.13.0"},
    "device": "cpu",
    "threads": 1,
    "wall_seconds": 12.5,
    "peak_memory_gib": 0.5,
}


def _card(*arguments: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        if main(["card", *map(str, arguments)]) != 0:
            raise RuntimeError(f"mfac card {arguments} failed")


def of_facts(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """The cards of ``model_cards/``."""
    found = {}
    for path in sorted((HERE / "model_cards").glob("*/card.json")):
        _card("--facts", path, "--output", folder / path.parent.name)
        found[path.parent.name] = (folder / path.parent.name / "README.md").read_bytes()
    return found


def of_results(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """Facts and card of a sparse BERT with two seeds."""
    zero_most(tiny_bert()).save_pretrained(folder / "sst2-90")
    for seed in (1, 2, 3):
        results = {**RUN["results"], "eval_accuracy": 0.7 + seed / 30}
        (folder / f"seed{seed}.json").write_text(json.dumps({**RUN, "seed": seed, "results": results}))
    flags = ["--results", folder / "seed1.json", folder / "seed2.json", "--dense", folder / "seed3.json"]
    _card("--model", folder / "sst2-90", *flags, "--no_latency", "--license", "mit", "--output", folder / "card")
    return {path.name: path.read_bytes() for path in (folder / "card").iterdir()}


def of_trainers(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """What Trainer pushes after gradual pruning with MFAC."""
    import transformers.utils.hub
    from huggingface_hub import HfApi, constants

    hub_server = _load(HERE / "tests" / "helpers" / "hub_server.py")
    with hub_server.running_hub() as hub, contextlib.ExitStack() as patches:
        for change in (
            mock.patch.object(constants, "HF_HUB_OFFLINE", False),
            mock.patch.object(constants, "HF_HUB_DISABLE_XET", True),
            mock.patch.object(transformers.utils.hub, "_hf_api", HfApi(endpoint=hub.url, token=hub_server.TOKEN)),
            mock.patch.object(sys, "argv", ["train.py"]),
        ):
            patches.enter_context(change)
        trainer = _pruning_trainer(folder / "run")
        trainer.train()
        trainer.evaluate()
        trainer.push_to_hub(license="mit")
        card = hub.repositories["user/run"].branches["main"]["README.md"].decode()
    for varying in (r"(?m)(?<= \| 4 \| )[\d.]+", r"[\d.]+(?= GiB)"):  # seconds and peak memory
        card = re.sub(varying, "…", card)
    card = re.sub(r"(?m)^\| fisher \|.*\n", "", card)  # older revisions know one Fisher
    return {"card": card.encode()}


def _pruning_trainer(folder: Path) -> Trainer:
    """A Trainer that prunes and pushes."""
    model = tiny_bert(layers=1)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            push_to_hub=True,
            hub_model_id="user/run",
            hub_strategy="end",
            max_steps=4,
            per_device_train_batch_size=4,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            report_to="none",
        ),
        train_dataset=sentences(16),
        eval_dataset=sentences(16),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        optimizers=(MFAC(model.parameters(), **identity(MFAC), lr=1e-3, num_grads=8), None),
    )
    options = {"num_grads": 4, "block_size": 16, "recomputations": 1, **EMPIRICAL}
    MFACPruningCallback(SparsitySchedule.from_list([0.5, 0.75], unit="step"), **options).attach(trainer)
    return trainer


def _load(path: Path) -> ModuleType:
    """A module of the working tree by its path, whatever revision is on the import path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
