"""Fine-tuned models with their data: which examples give gradients, which judge, and what is refused."""

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

from mfac_hf.pruning import prune_one_shot
from mfac_hf.training.fine_tuned import load_fine_tuned
from tests.helpers.glue_data import ROWS, write_glue
from tests.helpers.glue_data import make_tokenizer as make_glue_tokenizer
from tests.helpers.squad_data import make_examples, make_row, write_squad
from tests.helpers.squad_data import make_tokenizer as make_squad_tokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def save(directory, kind, tokenizer, **options):
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    kind(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES, **options)).save_pretrained(
        directory
    )
    return str(directory)


@pytest.fixture
def load(tmp_path):
    """Load what the test names, on the CPU and with a cache that ends with the test."""

    def call(model, task, data, **options):
        return load_fine_tuned(
            model,
            task,
            data,
            use_cpu=True,
            cache_dir=str(tmp_path / "cache"),
            **options,
        )

    return call


@pytest.fixture
def glue_model(tmp_path):
    (tmp_path / "glue").mkdir()
    tokenizer = make_glue_tokenizer(tmp_path)
    return save(tmp_path / "model", BertForSequenceClassification, tokenizer, num_labels=1), write_glue(
        tmp_path / "glue", "stsb"
    )


def test_glue_is_judged_on_the_validation_split(load, glue_model):
    tuned = load(glue_model[0], "stsb", glue_model[1], max_seq_length=16)
    assert tuned.metric == "eval_pearson" and tuned.evaluated_on == "validation"
    assert len(tuned.trainer.train_dataset) == len(tuned.trainer.eval_dataset) == ROWS
    metrics = tuned.evaluate()
    assert -1 <= metrics["eval_pearson"] <= 1 and metrics["eval_loss"] > 0
    report = prune_one_shot(tuned.model, tuned.loader(), 0.5, num_grads=8, recomputations=1, progress=False)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert tuned.evaluate()["eval_loss"] != metrics["eval_loss"]


def test_a_held_out_part_takes_the_place_of_the_validation_split(load, glue_model):
    tuned = load(glue_model[0], "stsb", glue_model[1], holdout_fraction=0.25)
    assert tuned.evaluated_on == "held-out training examples"
    train, held_out = (
        [tuple(row["input_ids"]) for row in part] for part in (tuned.trainer.train_dataset, tuned.trainer.eval_dataset)
    )
    assert (len(train), len(held_out)) == (ROWS * 3 // 4, ROWS // 4)
    everything = load(glue_model[0], "stsb", glue_model[1]).trainer.train_dataset
    assert sorted(train + held_out) == sorted(tuple(row["input_ids"]) for row in everything)


def test_limits_choose_the_same_examples_each_time(load, glue_model):
    chosen = [
        [
            row["input_ids"]
            for row in load(*glue_model[:1], "stsb", glue_model[1], max_train_samples=5).trainer.train_dataset
        ]
        for _ in range(2)
    ]
    assert len(chosen[0]) == 5 and chosen[0] == chosen[1]


def test_squad_is_judged_by_f1(load, tmp_path):
    context = "the king was in the castle"
    rows = make_examples(*[make_row(str(i), context, "the castle", title=f"t{i % 4}") for i in range(12)])
    model = save(tmp_path / "model", BertForQuestionAnswering, make_squad_tokenizer(tmp_path))
    data = write_squad(tmp_path / "squad", train=rows, validation=rows.select(range(6)))
    tuned = load(model, "squad", data, max_seq_length=36, max_eval_samples=4)
    assert tuned.metric == "eval_f1" and 0 <= tuned.evaluate()["eval_f1"] <= 100
    assert (len(tuned.trainer.train_dataset), len(tuned.trainer.eval_dataset)) == (12, 4)
    report = prune_one_shot(tuned.model, tuned.loader(), 0.5, num_grads=8, recomputations=1, progress=False)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    held_out = load(model, "squad", data, max_seq_length=36, holdout_fraction=0.5)
    assert len(held_out.trainer.train_dataset) == len(held_out.trainer.eval_dataset) == 6


def test_what_is_no_number_of_examples_is_refused(load, glue_model):
    with pytest.raises(ValueError, match="max_eval_samples is 0"):
        load(glue_model[0], "stsb", glue_model[1], max_eval_samples=0)
    with pytest.raises(ValueError, match="unknown task 'boolq'"):
        load(glue_model[0], "boolq", glue_model[1])
