"""The GLUE script from end to end, on a random BERT of two layers and synthetic data."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import run_glue
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

from mfac_hf.pruning import MaskSet
from mfac_hf.tasks import glue
from mfac_hf.training.arguments import ModelArguments, OptimizerArguments, parse_args
from mfac_hf.training.lora_arguments import LoraArguments
from tests.helpers.glue_data import ROWS, WORDS, make_tokenizer, write_glue

RECIPES = Path(run_glue.__file__).parent / "recipes"
PRUNER = ("--prune_num_grads", "8", "--prune_block_size", "16", "--recomputations", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Directory of a tiny random BERT with its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(directory)
    assert len(tokenizer) == 5 + len(WORDS)
    tokenizer.save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Directory with three tasks in the Hub's layout; qnli has no training split."""
    directory = tmp_path_factory.mktemp("glue")
    for task in ("sst2", "mnli", "stsb"):
        write_glue(directory, task)
    return write_glue(directory, "qnli", splits=("validation",))


@pytest.fixture
def run(model, data, tmp_path):
    """Run the script with the flags that every test shares, then the given ones."""

    def call(*flags, task="sst2", output="out", optim="adamw"):
        common = ["--model_name_or_path", model, "--dataset_name", data, "--task_name", task, "--max_seq_length", "32"]
        common += ["--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / output), "--use_cpu"]
        common += ["--optim_name", optim, "--num_grads", "6", "--learning_rate", "1e-3", "--disable_tqdm", "True"]
        return run_glue.main([*common, "--per_device_train_batch_size", "4", "--num_train_epochs", "2", *flags])

    return call


def read(path):
    """Return the content of a JSON file."""
    return json.loads(Path(path).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw", "mfac"])
def test_train_evaluate_and_resume(optim, run, tmp_path):
    """A run that stops at step 4 of 10 and resumes ends with the weights of the uninterrupted run, bit for bit."""
    saving = ("--save_strategy", "steps", "--save_steps", "4", "--logging_steps", "1")
    flags = ("--do_train", "--do_eval", *saving)
    results = run(*flags, optim=optim)
    assert results["eval_accuracy"] == results["selection_value"]
    assert results["evaluated_on"] == ["validation"]

    log = read(tmp_path / "out" / "trainer_state.json")["log_history"]
    rows = [row for row in log if "loss" in row]
    assert len(rows) == 2 * ROWS // 4
    fills = [row["mfac/window_fill"] for row in rows] if optim == "mfac" else None
    assert fills == ([min(step, 6) / 6 for step in range(1, 11)] if optim == "mfac" else None)
    assert all(("mfac/window_gib" in row) == (optim == "mfac") for row in rows)

    checkpoint = tmp_path / "out" / "checkpoint-4"
    (tmp_path / "again").mkdir()
    checkpoint.rename(tmp_path / "again" / "checkpoint-4")
    resumed = run(*flags, "--resume_from_checkpoint", "last", optim=optim, output="again")
    assert resumed["eval_loss"] == results["eval_loss"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    initial = load_file(tmp_path / "again" / "checkpoint-4" / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], initial[name]) for name in one)


@pytest.mark.slow
def test_results_file_tells_how_to_repeat_the_run(run, tmp_path, monkeypatch):
    """Metrics, command line, arguments, versions; no absolute path and no token."""
    monkeypatch.chdir(tmp_path)
    results = run("--do_train", "--do_eval", "--seed", "7", "--hub_token", "hf_secret", optim="mfac")
    text = (tmp_path / "out" / "results.json").read_text()
    record = json.loads(text)
    assert record["results"] == results
    assert record["seed"] == 7
    assert record["arguments"]["OptimizerArguments"]["optim_name"] == "mfac"
    assert record["arguments"]["TrainingArguments"]["learning_rate"] == 1e-3
    assert record["arguments"]["GlueArguments"]["task_name"] == "sst2"
    assert record["command"][record["command"].index("--output_dir") + 1] == "out"
    assert record["versions"]["torch"] == version("torch")
    assert record["wall_seconds"] > 0 and record["peak_memory_gib"] > 0
    assert str(tmp_path) not in text and "hf_secret" not in text


@pytest.mark.slow
def test_mnli_evaluates_and_predicts_both_parts(run, tmp_path):
    """Matched decides which model is better; the server gets one file for each part."""
    results = run("--do_train", "--do_eval", "--do_predict", "--max_steps", "1", task="mnli")
    assert {"eval_matched_accuracy", "eval_mismatched_accuracy"} <= set(results)
    assert results["selection_metric"] == "eval_matched_accuracy"
    for name in ("MNLI-m.tsv", "MNLI-mm.tsv"):
        header, *lines = (tmp_path / "out" / name).read_text().splitlines()
        assert header == "index\tprediction" and [line.split("\t")[0] for line in lines] == list(map(str, range(ROWS)))
        assert {line.split("\t")[1] for line in lines} <= set(glue.TASKS["mnli"].label_names)
    config = read(tmp_path / "out" / "config.json")
    assert config["label2id"] == {"entailment": 0, "neutral": 1, "contradiction": 2}


def test_regression_predicts_without_training(run, tmp_path):
    """``--do_predict`` alone writes scores and needs no optimizer."""
    run("--do_predict", task="stsb")
    lines = (tmp_path / "out" / "STS-B.tsv").read_text().splitlines()[1:]
    assert len(lines) == ROWS and all(0 <= float(line.split("\t")[1]) <= 5 for line in lines)


@pytest.mark.slow
def test_holdout_leaves_the_validation_split_alone(run, tmp_path, monkeypatch):
    """Training and evaluation share no example, and neither comes from the validation split."""
    seen = {}

    class Spy(Trainer):
        def __init__(self, **kwargs):
            seen.update(train=kwargs["train_dataset"], evaluation=kwargs["eval_dataset"])
            super().__init__(**kwargs)

    monkeypatch.setattr(run_glue, "Trainer", Spy)
    monkeypatch.setattr(glue, "tokenize", _keep_idx(glue.tokenize))
    results = run("--do_train", "--do_eval", "--holdout_fraction", "0.25", "--max_steps", "1", task="stsb")
    train, held_out = (seen[part]["idx"][:] for part in ("train", "evaluation"))
    assert len(held_out) == ROWS // 4 and sorted(train + held_out) == list(range(ROWS))
    assert results["evaluated_on"] == ["held_out"]

    run(
        "--do_train",
        "--do_eval",
        "--holdout_fraction",
        "0.25",
        "--max_steps",
        "1",
        "--seed",
        "1",
        task="stsb",
        output="other",
    )
    assert seen["evaluation"]["idx"][:] == held_out

    run(
        "--do_train",
        "--do_eval",
        "--holdout_fraction",
        "0.25",
        "--max_train_samples",
        "6",
        "--max_steps",
        "1",
        task="stsb",
    )
    assert seen["train"]["idx"][:] == train[:6] and seen["evaluation"]["idx"][:] == held_out


def _keep_idx(tokenize):
    def wrapped(examples, *args):
        return tokenize(examples, *args).add_column("idx", examples["idx"][:])

    return wrapped


def test_best_model_is_chosen_by_the_task_metric(run, tmp_path):
    """Without ``--metric_for_best_model`` the task's own metric decides, and larger is better."""
    run("--do_train", "--load_best_model_at_end", "--eval_strategy", "epoch", "--save_strategy", "epoch")
    state = read(tmp_path / "out" / "trainer_state.json")
    scores = [row["eval_accuracy"] for row in state["log_history"] if "eval_accuracy" in row]
    assert len(scores) == 2 and state["best_metric"] == max(scores)


def test_limits(run):
    """Fewer examples are used when asked, and no more than there are."""
    results = run("--do_train", "--do_eval", "--max_train_samples", "8", "--max_eval_samples", "1000")
    assert results["epoch"] == 2 and results["train_loss"] > 0
    assert round(results["eval_samples_per_second"] * results["eval_runtime"]) == pytest.approx(ROWS, rel=0.1)


@pytest.mark.parametrize(
    ("flags", "task", "error", "message"),
    [
        ((), "sst2", ValueError, "--do_train, --do_eval, --do_predict"),
        (("--do_train",), "qnli", ValueError, r"--do_train needs the split 'train' of qnli; .* has \['validation'\]"),
        (("--do_predict",), "qnli", ValueError, "--do_predict needs the split 'test'"),
        (("--do_eval", "--holdout_fraction", "0.1"), "qnli", ValueError, "--holdout_fraction needs the split 'train'"),
        (("--do_train", "--holdout_fraction", "1.5"), "sst2", ValueError, "holdout_fraction 1.5 of 20"),
        (("--do_train", "--max_train_samples", "0"), "sst2", ValueError, "--max_train_samples 0: expected at least 1"),
        (("--do_eval", "--max_seq_length", "128"), "sst2", ValueError, "--max_seq_length 128: expected 1 to 64"),
        (("--do_eval",), "sst", ValueError, "unknown GLUE task 'sst'"),
        (("--do_train", "--optim", "adafactor"), "sst2", ValueError, "use --optim_name"),
        (
            ("--do_train", "--optim_name", "mfac", "--momentum", "0.9"),
            "sst2",
            ValueError,
            "momentum .*metric='identity'",
        ),
        (("--do_train", "--resume_from_checkpoint", "last"), "sst2", FileNotFoundError, "no such checkpoint"),
        (("--do_train", "--lora_rank", "0"), "sst2", ValueError, "--lora_rank 0: expected at least 1"),
        (("--do_train", "--lora_rank", "2", "--lora_targets", "x"), "sst2", ValueError, "--lora_targets x: the model"),
        (("--do_train", "--resume_from_checkpoint", "nowhere"), "sst2", FileNotFoundError, "checkpoint nowhere"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(flags, task, error, message, run, tmp_path):
    """A clear error, and no output directory."""
    with pytest.raises(error, match=message):
        run(*flags, task=task)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_in_another_metric_is_not_resumed(run):
    saving = ("--save_strategy", "steps", "--save_steps", "2")
    run("--do_train", "--max_steps", "2", "--metric", "identity", *saving, optim="mfac")
    with pytest.raises(ValueError, match="the saved optimizer has metric='identity', this one metric='adam'"):
        run("--do_train", "--max_steps", "4", "--resume_from_checkpoint", "last", optim="mfac")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("glue_*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_parse(recipe):
    """Each names a model and the data, and leaves the task to the command line."""
    kinds = (ModelArguments, run_glue.GlueArguments, OptimizerArguments, LoraArguments, TrainingArguments)
    _, data_args, optimizer_args, lora_args, training_args = parse_args(
        *kinds, argv=[str(recipe), "--task_name", "cola"]
    )
    assert data_args.dataset_name == "nyu-mll/glue" and training_args.do_train
    lora_args.check()
    kind = recipe.stem.split("_")[1]
    assert (kind == "lora") == (lora_args.lora_rank is not None)
    assert optimizer_args.optim_name == {"lora": "mfac"}.get(kind, kind)


def test_gradual_pruning_on_glue(run, tmp_path):
    schedule = ("--prune_schedule", "linear", "--prune_end", "6", "--prune_every", "3")
    extra = ("--distillation_hardness", "0.5", "--save_strategy", "steps", "--save_steps", "4")
    results = run("--do_train", "--do_eval", "--sparsity", "0.8", *schedule, *PRUNER, *extra)
    assert results["pruning"]["sparsity"] == pytest.approx(0.8, abs=1e-4) and len(results["pruning"]["reports"]) == 2
    written = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["pruning"]
    assert written == results["pruning"]
    masks, weights = MaskSet.load(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    assert masks.sparsity == results["pruning"]["sparsity"]
    assert all(not weights[name][~keep].any() for name, keep in masks.items())


def test_one_shot_on_glue(run, tmp_path):
    run("--do_train", output="dense")
    flags = ("--num_train_epochs", "0", "--sparsity", "0.6", "--model_name_or_path", str(tmp_path / "dense"))
    results = run("--do_train", "--do_eval", *PRUNER, *flags)
    assert results["pruning"]["sparsity"] == pytest.approx(0.6, abs=1e-4) and "eval_accuracy" in results
    dense, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "out"))
    masks = MaskSet.load(tmp_path / "out")
    assert all(not weights[name][~keep].any() for name, keep in masks.items())
    assert all(bool((weights[name] == value).all()) for name, value in dense.items() if name not in masks)
    assert results["before_pruning"]["eval_loss"] != results["eval_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw", "mfac"])
def test_lora_trains_resumes_and_is_evaluated(optim, run, model, tmp_path):
    """The adapter of a run that stops at step 4 of 10 and resumes has the bits of the uninterrupted run's."""
    flags = ("--do_train", "--do_eval", "--lora_rank", "4", "--lora_dropout", "0.1", "--save_strategy", "steps")
    results = run(*flags, "--save_steps", "4", optim=optim)
    described = results["lora"]
    assert read(tmp_path / "out" / "results.json")["results"]["lora"] == described
    assert (described["rank"], described["targets"]) == (4, ["query", "value"])
    assert not (tmp_path / "out" / "model.safetensors").exists()
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == described["trainable_parameters"] == 4 * 2 * 4 * 32 + 66

    (tmp_path / "again").mkdir()
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "again" / "checkpoint-4")
    resumed = run(*flags, "--save_steps", "4", "--resume_from_checkpoint", "last", optim=optim, output="again")
    assert resumed["eval_loss"] == results["eval_loss"]
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)
    early = load_file(tmp_path / "again" / "checkpoint-4" / "adapter_model.safetensors")
    assert any(not torch.equal(saved[name], early[name]) for name in saved)

    adapter = ("--model_name_or_path", str(tmp_path / "out"))
    alone = run("--do_eval", *adapter, output="alone")
    assert alone["eval_loss"] == results["eval_loss"] and "lora" not in alone
    with pytest.raises(ValueError, match="--sparsity prunes weights below the adapter"):
        run("--do_train", "--sparsity", "0.5", "--num_train_epochs", "0", *adapter, output="pruned")
    assert not (tmp_path / "pruned").exists()
