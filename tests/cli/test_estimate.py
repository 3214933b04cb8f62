"""`mfac estimate`: memory and time, of a configuration and of a number."""

import json

import pytest
import torch
import transformers
from transformers import BertConfig

from mfac_hf import cli, memory_estimate

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def test_estimate_of_a_configuration_and_of_a_number(outputs, bert, capsys):
    (outputs / "sst2-90" / "model.safetensors").unlink()  # the configuration is enough
    flags = ["--num_grads", "16", "--dtype", "bfloat16", "--json", "--no_time"]
    assert cli.main(["estimate", str(outputs / "sst2-90"), *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == memory_estimate(bert, 16, torch.bfloat16).bytes and report["step_seconds"] is None
    assert report["adamw_bytes"] == 8 * sum(p.numel() for p in bert.parameters())
    assert cli.main(["estimate", "1000000", "--num_grads", "8"]) == 0
    shown = capsys.readouterr().out
    assert "dense: 8 x 1,000,000 x 2 bytes" in shown and "fits" in shown and "ms in each step" in shown
    assert "20.0 bytes a parameter (AdamW: 0.01 GiB, 8 bytes)" in shown


@pytest.mark.parametrize(("metric", "num_grads"), [("adam", 8), ("identity", 1024)])
def test_the_metric_decides_the_length_of_the_window(metric, num_grads, capsys):
    flags = [] if metric == "adam" else ["--metric", metric]  # Adam's is the default
    assert cli.main(["estimate", "1000", "--json", *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["metric"], report["num_grads"]) == (metric, num_grads) and report["step_seconds"] > 0
    assert report["bytes"] == memory_estimate(1000, num_grads, metric=metric).bytes


def test_bad_input_is_one_line(refused):
    assert "num_grads is 0" in refused("estimate", "1000", "--num_grads", "0")
    assert "embedding_rows is -1" in refused("estimate", "1000", "--embedding_rows", "-1")
    assert "1000 is a number of parameters" in refused("estimate", "1000", "--head", "masked_lm")
    assert "--lora_rank 8 needs a model" in refused("estimate", "1000", "--lora_rank", "8")


LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


@pytest.mark.slow
def test_lora_of_a_large_decoder_is_counted_without_its_weights(estimate, refused, tmp_path):
    """Factors of rank 8 beside the query and value layers, and nothing of the 6.7 billion weights."""
    pytest.importorskip("peft")
    config = transformers.LlamaConfig(**LLAMA_7B)
    report, shown = estimate(config, ["LlamaForCausalLM"], "--lora_rank", "8")
    factors = 32 * 2 * 2 * 8 * 4096
    assert report["bytes"] == memory_estimate(factors, 4).bytes and report["adamw_bytes"] == 8 * factors
    assert shown.startswith("counted: 4,194,304 numbers that LoRA trains of LlamaForCausalLM, the class of")
    more, _ = estimate(config, ["LlamaForCausalLM"], "--lora_rank", "8", "--lora_targets", "q_proj")
    assert more["adamw_bytes"] == 4 * factors
    assert "--lora_rank 0: expected at least 1" in refused("estimate", str(tmp_path), "--lora_rank", "0")
    assert "--lora_targets ['q_proj'] needs --lora_rank" in refused(
        "estimate", str(tmp_path), "--lora_targets", "q_proj"
    )


@pytest.fixture
def estimate(tmp_path, capsys):
    """Estimate for a configuration, and return the JSON and the text."""

    def call(config, architectures, *flags):
        config.architectures = architectures
        config.save_pretrained(tmp_path)
        outputs = []
        for form in ([], ["--json"]):
            assert cli.main(["estimate", str(tmp_path), "--num_grads", "4", "--no_time", *form, *flags]) == 0
            outputs.append(capsys.readouterr().out)
        return json.loads(outputs[1]), outputs[0]

    return call


def bytes_of(name, config):
    with torch.device("meta"):
        return memory_estimate(getattr(transformers, name)(config), 4).bytes


@pytest.mark.parametrize("named", ["BertForMaskedLM", "BertForPreTraining"])
def test_a_head_for_pretraining_is_counted_as_the_classifier_that_takes_its_place(estimate, named):
    report, shown = estimate(BertConfig(**SMALL), [named])
    assert report["bytes"] == bytes_of("BertForSequenceClassification", BertConfig(**SMALL))
    assert report["bytes"] != bytes_of(named, BertConfig(**SMALL))
    assert (report["model_class"], report["checkpoint_class"]) == ("BertForSequenceClassification", named)
    first = shown.splitlines()[0]
    assert first == f"counted: BertForSequenceClassification (the checkpoint is a {named}; --head counts another)"


def test_an_image_model_for_pretraining_is_counted_as_a_classifier(estimate):
    sizes = SMALL | {"image_size": 16, "patch_size": 8}
    report, _ = estimate(transformers.ViTConfig(**sizes), ["ViTForMaskedImageModeling"])
    assert report["model_class"] == "ViTForImageClassification"


@pytest.mark.parametrize(
    ("head", "counted"),
    [("masked_lm", "BertForMaskedLM"), ("question_answering", "BertForQuestionAnswering"), ("none", "BertModel")],
)
def test_a_head_can_be_chosen(estimate, head, counted):
    report, shown = estimate(BertConfig(**SMALL), ["BertForMaskedLM"], "--head", head)
    assert report["bytes"] == bytes_of(counted, BertConfig(**SMALL))
    assert report["model_class"] == counted and f"counted: {counted}" in shown


@pytest.mark.parametrize(
    ("architectures", "counted"),
    [
        (["GPT2LMHeadModel"], "GPT2LMHeadModel"),  # text models are trained as what they are
        (["GPT2ForSequenceClassification"], "GPT2ForSequenceClassification"),
        (["SomebodysOwnModel"], "GPT2Model"),
        (["pipeline"], "GPT2Model"),  # a function of transformers, no model
        (["Trainer"], "GPT2Model"),
        (None, "GPT2Model"),
    ],
)
def test_the_class_that_was_counted_is_named(estimate, architectures, counted):
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99, n_positions=8, pad_token_id=0)
    report, shown = estimate(config, architectures)
    named = architectures and architectures[0]
    assert (report["model_class"], report["checkpoint_class"]) == (counted, named)
    first = shown.splitlines()[0]
    assert first.startswith(f"counted: {counted}") and "--head" in first and (named or "names no class") in first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "bert", "architectures": "BertModel"}, "'BertModel'"),  # transformers or we say so
        ({"model_type": "bert", "architectures": [3]}, "[3]"),
        ({"model_type": "bert", "architectures": ["\x1b[2J"]}, r"architectures is ['\x1b[2J']"),
        ({"model_type": "bert", "hidden_size": "many"}, ""),
        ({"model_type": "bert", "hidden_size": 30, "num_attention_heads": 7}, "makes no model"),
        ({"model_type": "nothing-known"}, "nothing-known"),
        ({}, ""),
        ([1, 2], ""),
        ("{", ""),
    ],
)
def test_a_configuration_of_another_form_is_one_line(tmp_path, refused, content, message):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "config.json").write_text(text)
    error = refused("estimate", tmp_path, "--no_time")
    assert message in error and "\x1b" not in error


def test_what_has_no_such_head_or_no_configuration_is_one_line(tmp_path, refused):
    assert "has no config.json" in refused("estimate", tmp_path)
    transformers.ViTConfig(**SMALL).save_pretrained(tmp_path)
    assert "its ViTConfig makes no model with --head masked_lm" in refused("estimate", tmp_path, "--head", "masked_lm")


@pytest.mark.slow
def test_a_long_window_is_timed_by_a_shorter_one(capsys):
    """At its own length, factoring alone would take minutes and gigabytes."""
    assert cli.main(["estimate", "1000", "--num_grads", "50000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step_seconds"] is not None
