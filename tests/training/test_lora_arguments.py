"""LoRA flags: what is trained, what is saved, and what is refused before anything is loaded."""

import builtins

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AlbertConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from mfac_hf.training.arguments import parse_args
from mfac_hf.training.lora_arguments import LoraArguments, add_lora, base_of_adapter, describe_lora, load_adapter

peft = pytest.importorskip("peft")
CLASSIFIER = AutoModelForSequenceClassification
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 32}


def adapt(model, *flags, drawn=()):
    (arguments,) = parse_args(LoraArguments, argv=["--lora_rank", "4", *flags])
    arguments.check()
    return add_lora(model, arguments, drawn)


def trained(model):
    """Names of what is trained, without peft's own parts."""
    names = [name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad]
    return {name.replace(".default", "").replace(".modules_to_save", "") for name in names}


def test_factors_and_head_are_trained_and_nothing_else(bert):
    total = sum(p.numel() for p in bert.parameters())
    adapted = adapt(bert, "--lora_dropout", "0.1")
    layers = [f"bert.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")]
    factors = {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    assert trained(adapted) == factors | {"classifier.weight", "classifier.bias"}
    described = describe_lora(adapted)
    head = 32 * 2 + 2
    assert described == {
        "rank": 4,
        "alpha": 8,  # twice the rank
        "dropout": 0.1,
        "targets": ["query", "value"],
        "trainable_parameters": 4 * 2 * 4 * 32 + head,
        "total_parameters": total + 4 * 2 * 4 * 32 + head,  # the head as it was stays beside the one that is trained
    }


@pytest.mark.parametrize(
    ("flags", "targets"),
    [
        (("--lora_targets", "query", "output.dense"), {"query", "dense"}),
        (("--lora_targets", "all-linear"), {"query", "key", "value", "dense"}),
    ],
)
def test_targets(flags, targets, bert):
    adapted = adapt(bert, "--lora_alpha", "3", *flags)
    assert set(describe_lora(adapted)["targets"]) == targets and describe_lora(adapted)["alpha"] == 3
    assert not any("classifier.lora" in name for name in trained(adapted))


def test_the_head_of_answers(bert, tmp_path):
    bert.save_pretrained(tmp_path)
    model, loading = AutoModelForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    adapted = adapt(model, drawn=loading["missing_keys"])
    assert {"qa_outputs.weight", "qa_outputs.bias"} < trained(adapted)


@pytest.mark.parametrize(
    ("pretrained", "whole"),
    [
        (BertForMaskedLM(BertConfig(**SIZES)), {"bert.pooler.dense", "classifier"}),
        (RobertaForMaskedLM(RobertaConfig(**SIZES)), {"classifier.dense", "classifier.out_proj"}),
    ],
)
def test_what_the_checkpoint_lacks_is_saved_with_the_adapter(pretrained, whole, tmp_path):
    """Whoever loads the adapter draws these layers anew: outputs are the same only if it brings them along."""
    pretrained.save_pretrained(tmp_path / "base")
    model, loading = CLASSIFIER.from_pretrained(tmp_path / "base", output_loading_info=True, num_labels=3)
    adapted = adapt(model, drawn=loading["missing_keys"])
    assert {name for name in trained(adapted) if "lora" not in name} == {
        f"{module}.{part}" for module in whole for part in ("weight", "bias")
    }
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    assert (
        sum(t.numel() for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values())
        == (describe_lora(adapted)["trainable_parameters"])
    )
    torch.manual_seed(99)
    base = CLASSIFIER.from_pretrained(base_of_adapter(tmp_path / "adapter"), num_labels=3)
    again = load_adapter(base, tmp_path / "adapter", LoraArguments(), trainable=False).eval()
    inputs = {"input_ids": torch.arange(5, 17).view(2, 6)}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, adapted.eval()(**inputs).logits)
    assert not trained(again)
    base = CLASSIFIER.from_pretrained(tmp_path / "base", num_labels=3)
    assert trained(load_adapter(base, tmp_path / "adapter", LoraArguments(), trainable=True)) == trained(adapted)
    with pytest.raises(ValueError, match="--lora_rank 8: .*adapter holds an adapter already"):
        load_adapter(base, tmp_path / "adapter", LoraArguments(lora_rank=8), trainable=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lora_rank", "0"), "--lora_rank 0: expected at least 1"),
        (("--lora_rank", "4", "--lora_alpha", "-1"), "--lora_alpha -1: expected at least 1"),
        (("--lora_rank", "4", "--lora_dropout", "1.0"), r"--lora_dropout 1: expected a share in \[0, 1\)"),
        (("--lora_alpha", "8"), "--lora_alpha 8 needs --lora_rank"),
        (("--lora_dropout", "0.1"), "--lora_dropout 0.1 needs --lora_rank"),
        (("--lora_targets", "query"), r"--lora_targets \['query'\] needs --lora_rank"),
    ],
)
def test_flags_that_cannot_be_followed(flags, message):
    (arguments,) = parse_args(LoraArguments, argv=list(flags))
    with pytest.raises(ValueError, match=message):
        arguments.check()


@pytest.mark.parametrize("targets", [("nothing",), ("query", "nothing")])
def test_targets_that_the_model_lacks(targets, bert):
    with pytest.raises(ValueError, match="nothing: the model has no such layer.*; .* query, key, value, dense, class"):
        adapt(bert, "--lora_targets", *targets)


def test_an_architecture_without_default_targets():
    sizes = {"embedding_size": 16, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    model = CLASSIFIER.from_config(AlbertConfig(vocab_size=60, **sizes))
    with pytest.raises(ValueError, match="--lora_targets is missing, and peft has no default for albert: .*all-lin"):
        adapt(model)
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query"
    assert f"{layer}.lora_A.weight" in trained(adapt(model, "--lora_targets", "query"))


def test_a_model_for_another_task():
    with pytest.raises(ValueError, match="--lora_rank with a BertForMaskedLM: expected a model that classifies"):
        adapt(BertForMaskedLM(BertConfig(**SIZES)))


def test_a_bare_parameter_that_the_checkpoint_lacks(bert):
    with pytest.raises(ValueError, match="the checkpoint lacks scale, which an adapter cannot save"):
        adapt(bert, drawn=["classifier.weight", "scale"])


def test_an_adapter_that_does_not_name_its_model(bert, tmp_path):
    bert.config._name_or_path = bert.name_or_path = ""
    adapt(bert).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not name its base model"):
        base_of_adapter(str(tmp_path))


def test_peft_is_missing(monkeypatch):
    found = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'")
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    LoraArguments().check()
    with pytest.raises(ModuleNotFoundError, match=r"needs peft .*pip install 'mfac_hf\[lora\]'"):
        LoraArguments(lora_rank=8).check()
