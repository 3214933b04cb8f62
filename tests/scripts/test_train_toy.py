"""Training on the generated task from end to end: what a run writes, holds out and repeats."""

import json

import pytest
import train_toy
from safetensors.torch import load_file

from mfac_hf.tasks.toy import toy_dataset

FLAGS = "--do_train --do_eval --num_train 64 --num_validation 32 --hidden_size 16 --num_layers 1 --max_steps 6"
FLAGS += " --per_device_train_batch_size 8 --logging_steps 2 --learning_rate 1e-3 --use_cpu --report_to none"
FLAGS += " --save_strategy no --disable_tqdm true"


@pytest.fixture
def run(tmp_path):
    def start(*flags, name="out"):
        return train_toy.main([*FLAGS.split(), "--output_dir", str(tmp_path / name), *flags])

    return start


@pytest.mark.parametrize("optim", ["mfac", "adamw"])
def test_a_run_writes_its_results_and_curve(run, tmp_path, optim):
    results = run("--optim_name", optim)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["results"] == results and written["arguments"]["OptimizerArguments"]["optim_name"] == optim
    assert results["selection_metric"] == "eval_accuracy" and 0 <= results["selection_value"] <= 1
    assert results["curve"]["step"] == [2, 4, 6] and results["curve"]["cpu_seconds"][-1] > 0
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_seed_decides_everything(run, tmp_path):
    losses = {}
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        losses[name] = run("--seed", seed, "--optim_name", "adamw", name=name)["curve"]["loss"]
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in "ab"}
    assert losses["a"] == losses["b"] != losses["c"]
    assert all((tensor == weights["b"][name]).all() for name, tensor in weights["a"].items())


def test_tuning_is_judged_on_training_sentences(run, monkeypatch):
    seen = {}
    monkeypatch.setattr(train_toy, "hold_out", lambda *splits: seen.update(splits=splits) or hold_out(*splits))
    hold_out = train_toy.run_from_scratch.__globals__["hold_out"]
    run("--holdout_fraction", "0.25", "--optim_name", "adamw")
    rest, held_out = hold_out(*seen["splits"])
    assert (len(rest), len(held_out)) == (48, 16)
    labels = toy_dataset(64, 32, seed=42)["train"]["label"][:]  # 42: Trainer's default
    assert rest["label"][:] + held_out["label"][:] == labels


def test_an_evaluation_alone_trains_nothing(tmp_path):
    results = train_toy.main([*FLAGS.replace("--do_train ", "").split(), "--output_dir", str(tmp_path)])
    assert "curve" not in results and "eval_loss" in results
