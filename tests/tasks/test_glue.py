"""GLUE tasks: data, checks and features, on synthetic data in the Hub's layout."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import DataCollatorWithPadding

from mfac_hf.tasks import glue
from mfac_hf.tasks.glue_metric import GlueMetric
from tests.helpers.glue_data import make_tokenizer, write_glue


@pytest.fixture
def cache(tmp_path):
    """A folder for Arrow files that ends with the test."""
    return str(tmp_path / "cache")


def test_nine_tasks_with_the_shapes_of_the_benchmark():
    """Text columns, outputs and selection metrics are those of GLUE; WNLI's classes stand the other way round."""
    expected = {
        "cola": (1, 2, "matthews_correlation"),
        "sst2": (1, 2, "accuracy"),
        "mrpc": (2, 2, "f1"),
        "stsb": (2, 1, "pearson"),
        "qqp": (2, 2, "f1"),
        "mnli": (2, 3, "accuracy"),
        "qnli": (2, 2, "accuracy"),
        "rte": (2, 2, "accuracy"),
        "wnli": (2, 2, "accuracy"),
    }
    seen = {n: (len(t.text_columns), t.num_labels, t.selection_metric) for n, t in glue.TASKS.items()}
    assert seen == expected
    assert glue.TASKS["wnli"].label_names == glue.TASKS["rte"].label_names[::-1]


@pytest.mark.parametrize("name", glue.TASKS)
def test_every_task_loads_and_becomes_features(name, tmp_path, cache):
    """Features equal the tokenizer's own output, truncated, padded by batch, with the label in the right type."""
    task = glue.get_task(name)
    data = glue.load_glue(write_glue(tmp_path / "glue", name), name, cache_dir=cache)
    assert set(data) == {"train", *task.validation_splits, *task.server_files}

    tokenizer = make_tokenizer(tmp_path)
    features = glue.tokenize(data["train"], task, tokenizer, max_seq_length=12)
    assert set(features.column_names) == {"label", "input_ids", "token_type_ids", "attention_mask"}
    assert features["label"][:] == data["train"]["label"][:]
    lengths = [len(ids) for ids in features["input_ids"]]
    assert max(lengths) <= 12 and min(lengths) < max(lengths), "truncated and not padded"
    first = data["train"][0]
    by_hand = tokenizer(*(first[column] for column in task.text_columns), truncation=True, max_length=12)
    assert features[0]["input_ids"] == by_hand["input_ids"]
    segments = 1 + max(features[0]["token_type_ids"])
    assert segments == len(task.text_columns)

    batch = DataCollatorWithPadding(tokenizer)([features[i] for i in range(4)])
    assert batch["input_ids"].shape == (4, max(lengths[:4])), "padded to the longest of the batch"
    assert batch["labels"].is_floating_point() == task.is_regression


def test_a_directory_with_several_tasks_gives_the_one_asked_for(tmp_path, cache):
    """One directory holds several tasks, as on the Hub."""
    for name in ("rte", "qqp"):
        write_glue(tmp_path / "glue", name)
    assert "question1" in glue.load_glue(tmp_path / "glue", "qqp", cache_dir=cache)["train"].column_names


def test_unknown_task_names_the_known_ones():
    """A misspelt task is refused before anything is loaded."""
    with pytest.raises(ValueError, match=r"unknown GLUE task 'sst-2'; expected one of cola, sst2"):
        glue.load_glue("nyu-mll/glue", "sst-2")


def test_directory_without_the_task(tmp_path, cache):
    """The error tells which tasks the directory has."""
    write_glue(tmp_path / "glue", "rte")
    with pytest.raises(ValueError, match=r"cannot load GLUE task 'qqp'.*rte"):
        glue.load_glue(tmp_path / "glue", "qqp", cache_dir=cache)


def test_missing_column_is_named(tmp_path, cache):
    """The error names the missing column and those that are there."""
    write_glue(tmp_path / "glue", "qqp", columns=("question1", "question"))
    with pytest.raises(ValueError, match=r"'qqp', split 'train': no column 'question2' among .*'question'"):
        glue.load_glue(tmp_path / "glue", "qqp", cache_dir=cache)


def test_reversed_classes_are_refused(tmp_path, cache):
    """Ids that mean something else would train and score without a sign of it."""
    write_glue(tmp_path / "glue", "wnli", names=("entailment", "not_entailment"))
    with pytest.raises(ValueError, match=r"classes are \['entailment', 'not_entailment'\]; expected \['not_ent"):
        glue.load_glue(tmp_path / "glue", "wnli", cache_dir=cache)


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("mnli", [0, 1, 2, 3, 3], r"label 3 in row 3 \(2 such rows\) is out of range; expected 0 to 2"),
        ("sst2", [0, 1, 1, 0, -1], r"label -1 in row 4 .*hidden labels of a test split only"),
        ("stsb", [0.0, 5.0, 2.5, 5.5, 1.0], r"label 5.5 in row 3 .*expected 0.0 to 5.0"),
        ("stsb", [0.0, float("nan"), 2.5, 1.5, 1.0], r"label nan in row 1 "),
        ("rte", [0.0, 1.0, 1.0, 0.0, 1.0], r"labels such as .*0.0.* \(float32\); expected integers from 0 to 1"),
    ],
)
def test_labels_out_of_range_are_named(task, labels, message, tmp_path, cache):
    """The error gives the value, its row and the range."""
    write_glue(tmp_path / "glue", task, labels=labels, rows=5)
    with pytest.raises(ValueError, match=rf"'{task}', split 'train': {message}"):
        glue.load_glue(tmp_path / "glue", task, cache_dir=cache)


def test_labels_may_be_hidden_or_absent_in_test_only(tmp_path, cache):
    """-1 and a missing column pass in a test split and nowhere else."""
    write_glue(tmp_path / "glue", "rte", splits=("test",))
    assert set(glue.load_glue(tmp_path / "glue", "rte", cache_dir=cache)["test"]["label"]) == {-1}
    without = Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"]})
    glue._check_split(glue.TASKS["rte"], "test", without)
    with pytest.raises(ValueError, match="no column 'label'"):
        glue._check_split(glue.TASKS["rte"], "validation", without)


def test_hold_out_is_a_fixed_partition_of_the_training_split():
    """Deterministic whatever the global seed, disjoint, complete and drawn at random."""
    train = Dataset.from_dict({"idx": list(range(1000))})
    np.random.seed(0)
    rest, held_out = glue.hold_out(train, 0.1)
    np.random.seed(1)
    again, held_out_again = glue.hold_out(train, 0.1)
    assert held_out["idx"][:] == held_out_again["idx"][:] and rest["idx"][:] == again["idx"][:]
    assert len(held_out) == 100
    assert sorted(rest["idx"][:] + held_out["idx"][:]) == list(range(1000)), "disjoint, and nothing is lost"
    assert 300 < np.mean(held_out["idx"][:]) < 700, "drawn at random, not cut off one end"


def test_held_out_sentences_share_no_phrase_with_the_training_part():
    """Long examples are held out; their phrases, and what contains them, are in neither part."""
    words = [f"w{i}" for i in range(400)]
    sentences = [" ".join(words[i : i + 20]) for i in range(0, 400, 20)]
    phrases = [" ".join(s.split()[3:8]) + " " for s in sentences]
    longer = [f"well , {s} !" for s in sentences]
    train = Dataset.from_dict({"sentence": sentences + phrases + longer})
    rest, held_out = glue.hold_out(train, 0.1, "sentence")
    assert len(held_out) == 6 and len(rest) > 0
    assert (again := glue.hold_out(train, 0.1, "sentence"))[1]["sentence"][:] == held_out["sentence"][:] and again
    for kept in rest["sentence"][:]:
        assert not any(kept.strip() in out or out in kept for out in held_out["sentence"][:])
    untouched = [i for i, s in enumerate(sentences) if not any(s in out for out in held_out["sentence"][:])]
    assert {phrases[i] for i in untouched} <= set(rest["sentence"][:]), "other sentences keep their phrases"


@pytest.mark.parametrize("fraction", [-0.1, 0.0, 1.0, 1.5, 0.001, 0.999, float("nan")])
def test_hold_out_refuses_an_empty_part(fraction):
    """Neither part may be empty."""
    with pytest.raises(ValueError, match=f"holdout_fraction {fraction} of 100"):
        glue.hold_out(Dataset.from_dict({"idx": list(range(100))}), fraction)


@pytest.mark.parametrize(
    ("task", "rows"), [("cola", 1043), ("mrpc", 408), ("qnli", 5463), ("rte", 277), ("stsb", 1500), ("wnli", 71)]
)
def test_real_data(task, rows, shared_data, cache):
    """The real splits pass every check and have the official sizes."""
    data = glue.load_glue(shared_data / "glue", task, cache_dir=cache)
    assert len(data["validation"]) == rows
    if task == "wnli":
        # A constant answer scores the share of its class.
        answers = np.zeros(rows, dtype=int)
        scores = GlueMetric(task).compute(predictions=answers, references=data["validation"]["label"][:])
        assert scores == pytest.approx({"accuracy": 40 / 71})
