"""The SQuAD script from end to end, on a random BERT of one layer and synthetic data."""

import json
import random
from pathlib import Path

import pytest
import run_squad
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForQuestionAnswering, Trainer, TrainingArguments

from mfac_hf.tasks.squad import load_squad
from mfac_hf.tasks.squad_metric import SquadMetric, best_null_threshold
from mfac_hf.training.arguments import ModelArguments, OptimizerArguments, parse_args
from tests.helpers.squad_data import WORDS, make_examples, make_row, make_tokenizer, write_squad

RECIPES = Path(run_squad.__file__).parent / "recipes"
ARTICLES, PER_ARTICLE = 8, 4
ANSWERS = ("gold", "king")


def make_split(seed, *, unanswerable=False):
    """Contexts of one or two windows in which one of two words occurs once, and the question asks for it by name.

    With ``unanswerable``, every third question asks for the word that is not there.
    """
    rng = random.Random(seed)
    filler = [word for word in WORDS if word not in ANSWERS]
    rows = []
    for article in range(ARTICLES):
        for i in range(PER_ARTICLE):
            there, missing = rng.sample(ANSWERS, 2)
            words = rng.choices(filler, k=rng.choice((8, 24)))
            words[rng.randrange(len(words))] = there
            asks_for_missing = unanswerable and i % 3 == 0
            question = f"where is the {missing if asks_for_missing else there} ?"
            answer = None if asks_for_missing else there
            name = f"{seed}-{article}-{i}"
            rows.append(make_row(name, " ".join(words), answer, question=question, title=f"Article {seed} {article}"))
    return make_examples(*rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Directory of a tiny random BERT with its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(directory)
    assert len(tokenizer) > len(WORDS)
    tokenizer.save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        # as left behind by a classifier: a span head must not inherit it
        num_labels=3,
    )
    torch.manual_seed(0)
    BertForQuestionAnswering(BertConfig(**{**config.to_dict(), "num_labels": 2})).bert.save_pretrained(directory)
    config.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder with v1, a v2 that has only validation, and a v2 that has only train."""
    directory = tmp_path_factory.mktemp("squad")
    write_squad(directory / "v1", train=make_split(0), validation=make_split(1))
    write_squad(directory / "v2", validation=make_split(2, unanswerable=True))
    write_squad(directory / "v2_train", train=make_split(3, unanswerable=True))
    return directory


@pytest.fixture
def run(model, data, tmp_path):
    """Run the script with the flags that every test shares, then the given ones."""

    def call(*flags, source="v1", output="out", optim="adamw"):
        common = ["--model_name_or_path", model, "--dataset_name", str(data / source), "--max_seq_length", "28"]
        common += ["--doc_stride", "6", "--max_query_length", "6", "--cache_dir", str(tmp_path / "cache")]
        common += ["--output_dir", str(tmp_path / output), "--use_cpu", "--disable_tqdm", "True"]
        common += ["--optim_name", optim, "--num_grads", "6", "--learning_rate", "1e-3", "--num_train_epochs", "1"]
        return run_squad.main([*common, "--per_device_train_batch_size", "4", *flags])

    return call


@pytest.fixture
def seen(monkeypatch):
    """The data sets that the script hands to Trainer."""
    found = {}

    class Spy(Trainer):
        def __init__(self, **kwargs):
            found.update(train=kwargs["train_dataset"], evaluation=kwargs["eval_dataset"])
            super().__init__(**kwargs)

    monkeypatch.setattr(run_squad, "Trainer", Spy)
    return found


def ids(features):
    """Ids of the questions behind the features, sorted."""
    return sorted(set(features["example_id"]))


def read(path):
    """Return the content of a JSON file."""
    return json.loads(Path(path).read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "flags"),
    [("adamw", ()), ("mfac", ("--metric", "identity", "--normalize", "count", "--damping", "1e-3"))],
)
def test_training_learns_and_shows_it_at_each_epoch(optim, flags, run, tmp_path):
    """The named word is found in contexts never seen; Trainer's own evaluation log has EM and F1."""
    untrained = run("--do_eval")
    results = run(
        *("--do_train", "--do_eval", "--eval_strategy", "epoch", "--num_train_epochs", "6", "--num_grads", "32"),
        *("--learning_rate", "1e-2", *flags),
        optim=optim,
    )
    log = [row for row in read(tmp_path / "out" / "trainer_state.json")["log_history"] if "eval_f1" in row]
    assert len(log) == 6 and all("eval_exact_match" in row and "eval_loss" in row for row in log)
    assert results["eval_f1"] == results["selection_value"] == log[-1]["eval_f1"] > 90 > 50 > untrained["eval_f1"]
    assert results["selection_metric"] == "eval_f1" and results["evaluated_on"] == "validation"
    assert results["task"] == "squad" and results["eval_total"] == ARTICLES * PER_ARTICLE


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw", "mfac"])
def test_resumed_run_ends_like_an_uninterrupted_one(optim, run, tmp_path):
    """Stopped at step 4 of 9 or more, the weights are equal bit for bit."""
    flags = ("--do_train", "--do_eval", "--save_strategy", "steps", "--save_steps", "4", "--logging_steps", "1")
    results = run(*flags, optim=optim)
    rows = [row for row in read(tmp_path / "out" / "trainer_state.json")["log_history"] if "loss" in row]
    assert len(rows) > 8 and all(("mfac/window_fill" in row) == (optim == "mfac") for row in rows)
    (tmp_path / "again").mkdir()
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "again" / "checkpoint-4")
    resumed = run(*flags, "--resume_from_checkpoint", "last", optim=optim, output="again")
    assert resumed["eval_loss"] == results["eval_loss"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    halfway = load_file(tmp_path / "again" / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], halfway[name]) for name in one)


def test_version_2_trains_on_one_directory_and_predicts_on_another(run, data, tmp_path, seen):
    """The files hold an answer for each question, score as reported, and the threshold is reported apart."""
    flags = ("--version_2_with_negative", "--train_dataset_name", str(data / "v2_train"), "--n_best_size", "3")
    results = run("--do_train", "--do_eval", "--do_predict", *flags, source="v2")
    examples = load_squad(
        str(data / "v2"), "validation", version_2_with_negative=True, cache_dir=str(tmp_path / "cache")
    )
    assert ids(seen["evaluation"]) == sorted(examples["id"]) and all(n.startswith("3-") for n in ids(seen["train"]))

    texts, nbest, odds = (
        read(tmp_path / "out" / f"{name}.json") for name in ("predictions", "nbest_predictions", "null_odds")
    )
    references = [{"id": n, "answers": a} for n, a in zip(examples["id"], examples["answers"], strict=True)]
    scores = SquadMetric().compute(
        predictions=[{"id": name, "prediction_text": text} for name, text in texts.items()], references=references
    )
    assert {f"eval_{name}": value for name, value in scores.items()}.items() <= results.items()
    assert scores["NoAns_total"] == sum(not answers["text"] for answers in examples["answers"]) > 0
    assert all(len(entries) == 4 for entries in nbest.values())
    best = {name: next(entry["text"] for entry in entries if entry["text"]) for name, entries in nbest.items()}
    assert texts == {name: "" if odds[name] > 0 else best[name] for name in texts}
    assert results["threshold_search"] == best_null_threshold(best, odds, references)
    assert results["threshold_search"]["best_f1"] >= results["eval_f1"] == results["selection_value"]
    assert read(tmp_path / "out" / "results.json")["results"] == results

    everything_null = run("--do_eval", "--version_2_with_negative", "--null_score_diff_threshold=-1000", source="v2")
    assert everything_null["eval_NoAns_f1"] == 100 and everything_null["eval_HasAns_f1"] == 0


def test_prediction_needs_no_training(run, tmp_path):
    """``--do_predict`` alone evaluates a model as it is, and version 1 writes no null odds."""
    results = run("--do_predict")
    assert results["eval_total"] == len(read(tmp_path / "out" / "predictions.json"))
    assert "threshold_search" not in results and not (tmp_path / "out" / "null_odds.json").exists()


@pytest.mark.slow
def test_holdout_takes_articles_from_the_training_split(run, data, tmp_path, seen):
    """Training and evaluation share no article, neither comes from validation, and the seed changes nothing."""
    flags = ("--do_train", "--do_eval", "--holdout_fraction", "0.25", "--max_steps", "1")
    results = run(*flags)
    train, held_out = ids(seen["train"]), ids(seen["evaluation"])
    assert results["evaluated_on"] == "held_out" and len(held_out) == ARTICLES * PER_ARTICLE // 4
    assert sorted(train + held_out) == sorted(
        load_squad(str(data / "v1"), "train", cache_dir=str(tmp_path / "cache"))["id"]
    )
    assert not {name.rsplit("-", 1)[0] for name in train} & {name.rsplit("-", 1)[0] for name in held_out}

    run(*flags, "--seed", "1", output="other")
    assert ids(seen["evaluation"]) == held_out
    # a fresh evaluation of the trained model is judged on the same articles
    again = run(
        "--do_eval", "--holdout_fraction", "0.25", "--model_name_or_path", str(tmp_path / "out"), output="eval"
    )
    assert seen["train"] is None and ids(seen["evaluation"]) == held_out
    assert again["eval_loss"] == pytest.approx(results["eval_loss"])

    run(*flags, "--max_train_samples", "7", "--max_eval_samples", "3", output="few")
    assert len(ids(seen["train"])) == 7 and set(ids(seen["train"])) < set(train)
    assert len(ids(seen["evaluation"])) == 3 and set(ids(seen["evaluation"])) < set(held_out)


def test_limits_draw_from_all_articles_and_always_the_same(run, seen):
    """The files are sorted by article, so their beginning is no sample."""
    run("--do_eval", "--max_eval_samples", "12")
    sample = ids(seen["evaluation"])
    assert len(sample) == 12 and len({name.rsplit("-", 1)[0] for name in sample}) > 12 // PER_ARTICLE
    run("--do_eval", "--max_eval_samples", "12", "--seed", "9")
    assert ids(seen["evaluation"]) == sample
    assert run("--do_eval", "--max_eval_samples", "1000")["eval_total"] == ARTICLES * PER_ARTICLE


def test_best_model_is_chosen_by_f1(run, tmp_path):
    """Without ``--metric_for_best_model`` F1 decides, and larger is better."""
    saving = ("--load_best_model_at_end", "--eval_strategy", "epoch", "--save_strategy", "epoch")
    run("--do_train", *saving, "--num_train_epochs", "2", "--learning_rate", "1e-2")
    state = read(tmp_path / "out" / "trainer_state.json")
    scores = [row["eval_f1"] for row in state["log_history"] if "eval_f1" in row]
    assert len(scores) == 2 and state["best_metric"] == max(scores)


@pytest.mark.parametrize(
    ("flags", "source", "error", "message"),
    [
        ((), "v1", ValueError, "--do_train, --do_eval, --do_predict"),
        (("--do_train",), "v2", ValueError, "no split 'train'"),
        (("--do_eval",), "v2_train", ValueError, "no split 'validation'"),
        (("--do_eval",), "v2", ValueError, "has no answer: for SQuAD v2 set version_2_with_negative"),
        (("--do_train", "--holdout_fraction", "1.5"), "v1", ValueError, "between 0 and 1, got 1.5"),
        (("--do_train", "--max_train_samples", "0"), "v1", ValueError, "--max_train_samples 0: expected at least 1"),
        (("--do_eval", "--max_eval_samples", "-1"), "v1", ValueError, "--max_eval_samples -1: expected at least 1"),
        (("--do_eval", "--max_seq_length", "128"), "v1", ValueError, "--max_seq_length 128: expected 1 to 64"),
        (("--do_eval", "--doc_stride", "28"), "v1", ValueError, "expected more than doc_stride 28"),
        (("--do_eval", "--train_sampling_strategy", "group_by_length"), "v1", ValueError, "group_by_length also"),
        (("--do_train", "--optim", "adafactor"), "v1", ValueError, "use --optim_name"),
        (("--do_train", "--resume_from_checkpoint", "last"), "v1", FileNotFoundError, "no such checkpoint"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(flags, source, error, message, run, tmp_path):
    """A clear error, and no output directory."""
    with pytest.raises(error, match=message):
        run(*flags, source=source)
    assert not (tmp_path / "out").exists()


def test_gradual_pruning_with_a_teacher_for_both_ends_of_the_answer(run):
    """The flags are those of the GLUE script, where they are tested further."""
    pruning = ("--sparsity", "0.5", "--prune_schedule", "linear", "--prune_end", "4", "--prune_every", "2")
    pruner = ("--prune_num_grads", "8", "--prune_block_size", "16", "--recomputations", "1")
    results = run("--do_train", "--do_eval", *pruning, *pruner, "--distillation_hardness", "0.5")
    assert results["pruning"]["sparsity"] == pytest.approx(0.5, abs=1e-3) and "eval_f1" in results
    assert len(results["pruning"]["reports"]) == 2


def test_lora_trains_the_head_of_answers(run, tmp_path):
    """The flags are those of the GLUE script, where they are tested further."""
    results = run("--do_train", "--do_eval", "--lora_rank", "2", optim="mfac")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name for name in saved if "lora" not in name} == {
        f"base_model.model.qa_outputs.{part}" for part in ("weight", "bias")
    }
    alone = run("--do_eval", "--model_name_or_path", str(tmp_path / "out"), output="alone")
    assert alone["eval_f1"] == results["eval_f1"] and alone["eval_exact_match"] == results["eval_exact_match"]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("squad*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_parse(recipe):
    """The name of each says the data and the optimizer."""
    kinds = (ModelArguments, run_squad.SquadArguments, OptimizerArguments, TrainingArguments)
    _, data_args, optimizer_args, training_args = parse_args(*kinds, argv=[str(recipe)])
    version, optimizer = recipe.stem.rsplit("_", 1)
    assert data_args.dataset_name == f"rajpurkar/{version}" and optimizer_args.optim_name == optimizer
    assert data_args.version_2_with_negative == (version == "squad_v2") and training_args.do_train
