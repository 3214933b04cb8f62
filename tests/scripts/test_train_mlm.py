"""Masked-LM training from end to end, on generated text and on the layout of the Hub's data."""

import json

import pytest
import train_mlm
from transformers import AutoModelForMaskedLM

from tests.helpers import glue_data, squad_data

FLAGS = "--do_train --do_eval --num_train 32 --num_validation 8 --max_seq_length 16 --hidden_size 64 --num_layers 1"
FLAGS += " --max_steps 4 --per_device_train_batch_size 8 --logging_steps 2 --learning_rate 1e-3 --use_cpu"
FLAGS += " --report_to none --save_strategy no --disable_tqdm true"


@pytest.fixture
def run(tmp_path):
    def start(*flags):
        return train_mlm.main([*FLAGS.split(), "--output_dir", str(tmp_path / "out"), *map(str, flags)])

    return start


@pytest.mark.parametrize("optim", ["mfac", "adamw"])
def test_generated_text(run, tmp_path, optim):
    results = run("--optim_name", optim)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"] == results
    assert results["selection_metric"] == "eval_loss" and results["selection_value"] == results["eval_loss"] > 0
    assert results["curve"]["step"] == [2, 4]
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "out")).__name__ == "BertForMaskedLM"


def test_text_of_the_hub(run, tmp_path):
    glue = glue_data.write_glue(tmp_path / "glue", "sst2", rows=60)
    contexts = [f"the old king of the north built a city by the river {i} ." for i in range(40)]
    rows = squad_data.make_examples(*(squad_data.make_row(f"q{i}", text, "king") for i, text in enumerate(contexts)))
    squad = squad_data.write_squad(tmp_path / "squad", train=rows, validation=rows)
    glue_data.make_tokenizer(tmp_path)
    words = (tmp_path / "vocab.txt").read_text() + "\n".join(squad_data.WORDS)
    (tmp_path / "vocab.txt").write_text("\n".join(dict.fromkeys(words.split())) + "\n")
    source = ["--glue_name", glue, "--squad_name", squad, "--vocab_file", tmp_path / "vocab.txt"]
    results = run(*source, "--optim_name", "adamw", "--holdout_fraction", 0.25)
    assert results["eval_loss"] > 0 and "curve" in results
    with pytest.raises(ValueError, match="9,999 blocks of 16 tokens: the text has"):
        run(*source, "--num_train", 9999)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--glue_name", "glue"], "--glue_name and --squad_name need a --vocab_file"),
        (["--vocab_file", "vocab.txt"], "--vocab_file needs text"),
        (["--num_train", 0], "--num_train 0: expected at least 1"),
        (["--squad_name", "squad", "--vocab_file", "none.txt"], "none.txt: no such file"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(run, tmp_path, flags, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run(*flags)
    assert not (tmp_path / "out").exists()
