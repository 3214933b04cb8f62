"""`mfac prune` from end to end, on a random BERT of two layers and synthetic data."""

import argparse
import dataclasses
import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, BertModel, PreTrainedModel, PreTrainedTokenizerBase

import mfac_hf.cli.prune as cli_prune
from mfac_hf.cli import main
from mfac_hf.cli.prune import add_parser
from mfac_hf.pruning import MaskSet, PruningOptions, find_targets
from tests.helpers.glue_data import save_classifier, write_glue


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Directory of a classifier with its tokenizer."""
    return save_classifier(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_glue(tmp_path_factory.mktemp("glue"), "sst2")


@pytest.fixture
def prune(model, data, tmp_path, monkeypatch):
    """Run the command with the flags that every test shares; they come first, so that given ones win."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def call(*flags, source=None):
        common = ["prune", source or model, "--task", "sst2", "--dataset", data, "--output", str(tmp_path / "out")]
        common += ["--cpu", "--sparsity", "0.6", "--num-grads", "6", "--block-size", "16", "--recomputations", "2"]
        return main([*common, "--damping", "1e-4", *flags])

    return call


def test_the_directory_has_a_sparse_model_its_masks_and_the_report(prune, model, tmp_path, capsys):
    assert prune() == 0
    out = tmp_path / "out"
    pruned = AutoModelForSequenceClassification.from_pretrained(out)
    masks = MaskSet.load(out)
    assert set(masks) == set(find_targets(pruned))
    total = sum(weight.numel() for weight in find_targets(pruned).values())
    zeros = sum(int((weight == 0).sum()) for weight in find_targets(pruned).values())
    assert zeros == round(0.6 * total) and masks.nonzeros(pruned) == {}
    dense = AutoModelForSequenceClassification.from_pretrained(model)
    for name, parameter in dense.named_parameters():  # what is no target is as it was
        assert name in masks or torch.equal(parameter, pruned.get_parameter(name))
    record = json.loads((out / "pruning.json").read_text())
    assert record["task"] == "sst2" and record["metric"] == "eval_accuracy"
    assert record["pruning"]["num_grads"] == 12 and record["pruning"]["sparsity"] == pytest.approx(0.6, abs=1e-4)
    assert record["before"]["eval_loss"] != record["after"]["eval_loss"]
    shown = capsys.readouterr().out
    assert f"{record['before']['eval_accuracy']:.4f}" in shown and f"{record['after']['eval_loss']:.4f}" in shown
    assert "60.00%" in shown and f"all {total:,} weights" in shown
    left_out = "bert.embeddings.word_embeddings.weight, bert.embeddings.position_embeddings.weight"
    assert f"Left out: {left_out}" in " ".join(shown.split()) and "classifier.weight (outside of the stacks)" in shown
    assert (out / "tokenizer.json").exists() or (out / "vocab.txt").exists()


def test_defaults_are_those_of_the_library():
    commands = argparse.ArgumentParser().add_subparsers()
    add_parser(commands)
    arguments = commands.choices["prune"].parse_args(["m", "--task", "sst2", "--sparsity", "0.5", "--output", "o"])
    for field in dataclasses.fields(PruningOptions):
        if field.name not in ("loss_samples", "pages", "memory_budget"):  # they have no flag
            assert getattr(arguments, field.name) == field.default, field.name


def test_magnitude_without_evaluation(prune, tmp_path, capsys):
    flags = ["--method", "magnitude", "--no-eval", "--targets", "attention", "--pattern", "2:4", "--sparsity", "0.5"]
    assert prune(*flags) == 0
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["before"] is record["after"] is None and record["pruning"]["num_grads"] == 0
    assert all("attention" in name for name in record["pruning"]["sparsities"])
    assert "before" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sparsity", "1"], "sparsity is 1.0"),
        (["--damping", "small"], "--damping small"),
        (["--num-grads", "21"], "21 gradients .* 20 examples give 20"),
        (["--block-size", "0"], "block_size is 0"),
        (["--fisher-floor", "0"], "fisher_floor is 0.0"),
        (["--targets", "nothing"], "hits no weight"),
        (["--pattern", "2:4"], "allows at most 0.5"),
        (["--task", "imdb"], "unknown task 'imdb'; expected one of cola, .*squad_v2"),
        (["--task", "mnli"], "2 outputs; mnli needs 3"),
        (["--max-train-samples", "0"], "max_train_samples is 0"),
        (["--damping", "auto"], "256 of 20 examples"),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(flags, message, prune, tmp_path, capsys):
    assert prune(*flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mfac prune: error:") and re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_fine_tuned_is_refused(prune, model, tmp_path, capsys):
    headless = tmp_path / "headless"
    BertModel.from_pretrained(model).save_pretrained(headless)
    assert prune(source=str(headless)) == 2
    assert "not fine-tuned for sst2: it has no classifier.bias, classifier.weight" in capsys.readouterr().err


def test_a_directory_with_files_is_left_alone(prune, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert prune() == 2
    assert "no empty directory" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_card_is_made_of_the_directory_as_it_is(prune, model, tmp_path, capsys):
    assert prune("--max-eval-samples", "4") == 0
    out = tmp_path / "out"
    record = json.loads((out / "pruning.json").read_text())
    assert record["model_is_local"] and record["command"][:2] == ["mfac", "prune"] and record["seed"] == 0
    assert main(["card", "--model", str(out), "--no_latency", "--repo_id", "user/x"]) == 0
    card = ModelCard.load(out / "README.md")
    (result,) = card.data.eval_results
    assert result.metric_value == record["after"]["eval_accuracy"] and result.dataset_config == "sst2"
    assert card.data.base_model is None
    for expected in (
        "pruned without training from `",
        f"| dense | accuracy | {100 * record['before']['eval_accuracy']:.2f} |",
        "| block_size | 16 |",
        "| max_eval_samples | 4 |",
        "\nmfac prune ",
        "60.00%",
    ):
        assert expected in card.text, expected
    capsys.readouterr()
    (out / "pruning.json").write_text(json.dumps({**record, "after": None}))
    assert main(["card", "--model", str(out), "--no_latency"]) == 2
    assert "pruning.json lacks metrics; " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "tokenizer", "masks", "report"])
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_no_half_of_a_model(what, there, prune, tmp_path, monkeypatch, capsys):
    def full(*arguments, **options):
        # The tokenizers' own code raises nothing narrower.
        raise Exception("No space left (os error 28)") if what == "tokenizer" else OSError(28, "No space left")

    owner, name = {
        "model": (PreTrainedModel, "save_pretrained"),
        "tokenizer": (PreTrainedTokenizerBase, "save_pretrained"),
        "masks": (MaskSet, "save"),
        "report": (cli_prune, "write_json"),
    }[what]
    if there:
        (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        assert prune("--no-eval") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(tmp_path / "out") in error and "No space left" in error
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"] * there
    assert not there or not any((tmp_path / "out").iterdir())
    assert prune("--no-eval") == 0 and (tmp_path / "out" / "pruning.json").exists()


def test_a_place_that_cannot_be_written_is_refused_at_once(prune, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert prune("--output", str(tmp_path / "file" / "out")) == 2
    assert "is no directory, or not writable" in capsys.readouterr().err
