"""A directory gives the names and tensors that the model has in memory, whatever names they have on disk."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, AutoModelForMaskedLM, AutoModelForSequenceClassification

from mfac_hf import load_sparse, save_sparse
from mfac_hf.hub.inventory import describe_weights
from mfac_hf.pruning.targets import find_targets
from mfac_hf.sparse.directory import DENSE_FILE, SPARSE_FILE, read_tensors
from mfac_hf.sparse.format import write_sparse
from mfac_hf.sparse.names import names_in_memory
from tests.helpers.models import CONFIG
from tests.helpers.sparse_files import assert_same_state

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
MODELS = {
    "ViTForImageClassification": dict(image_size=8, patch_size=4, **SIZES),
    "DeiTForImageClassification": dict(image_size=8, patch_size=4, **SIZES),
    "SwinForImageClassification": dict(
        embed_dim=8, depths=[1, 1], num_heads=[1, 2], image_size=16, patch_size=2, window_size=2
    ),
    "MixtralForCausalLM": dict(vocab_size=32, num_key_value_heads=1, num_local_experts=3, **SIZES),
    "BertForMaskedLM": CONFIG,
}


def build(name):
    """Build a model with half of the weights of its targets zero."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**MODELS[name])).eval()
    with torch.no_grad():
        for weight in find_targets(model).values():
            weight[torch.rand_like(weight) < 0.5] = 0
    return model


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """A model, and a directory that transformers wrote."""
    model = build(request.param)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_names_and_values_are_those_in_memory(saved):
    model, directory = saved
    state = model.state_dict()
    tied = state.keys() - {name for name, _ in model.named_parameters()} - {name for name, _ in model.named_buffers()}
    assert_same_state(dict(read_tensors(directory)), {name: t for name, t in state.items() if name not in tied})
    if type(model).__name__ == "MixtralForCausalLM":  # those of the vision models are in newer transformers alone
        assert load_file(directory / DENSE_FILE).keys() != state.keys(), "the names on disk are others"
    assert names_in_memory(model, state) == {name: name for name in state}


def test_counts_and_sparse_files_of_the_directory_are_those_of_the_model(saved, tmp_path):
    model, directory = saved
    counts = describe_weights(model)
    assert counts["targets"]["numel"] > 0
    assert describe_weights(directory) == counts
    save_sparse(directory, tmp_path / "small")
    (tmp_path / "small" / "config.json").write_bytes((directory / "config.json").read_bytes())
    assert describe_weights(tmp_path / "small") == counts
    fresh = type(model)(model.config)
    assert_same_state(load_sparse(tmp_path / "small", fresh).state_dict(), model.state_dict())


def test_sparse_file_with_the_names_on_disk_still_loads(tmp_path):
    """As earlier versions made them of directories."""
    model = build("ViTForImageClassification")
    model.save_pretrained(tmp_path)
    if load_file(tmp_path / DENSE_FILE).keys() == model.state_dict().keys():
        pytest.skip("this release of transformers gives a ViT the same names on disk and in memory")
    write_sparse(tmp_path / SPARSE_FILE, iter(load_file(tmp_path / DENSE_FILE).items()), {})
    built = load_sparse(tmp_path, AutoModelForImageClassification)
    assert_same_state(built.state_dict(), model.state_dict())
    (tmp_path / DENSE_FILE).unlink()
    assert describe_weights(tmp_path) == describe_weights(model)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_old_checkpoints(prefix, old, tmp_path):
    """Gamma and beta, names without the prefix of the base model, layers that the class has not, a tied head twice."""
    model = build("BertForMaskedLM")
    model.save_pretrained(tmp_path)
    weights = {}
    for name, tensor in model.state_dict().items():
        if old:
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        weights[name if prefix else name.removeprefix("bert.")] = tensor.clone()
    weights["cls.seq_relationship.weight"] = torch.ones(2, 32)
    save_file(weights, tmp_path / DENSE_FILE, metadata={"format": "pt"})
    counts, expected = describe_weights(tmp_path), describe_weights(model)
    assert counts["targets"] == expected["targets"] and counts["numel"] == expected["numel"] + 64
    save_sparse(tmp_path, tmp_path)
    built = load_sparse(tmp_path, AutoModelForMaskedLM)
    assert_same_state(built.state_dict(), model.state_dict())
    assert_same_state(built.state_dict(), type(model).from_pretrained(tmp_path).state_dict())
    with pytest.raises(ValueError, match=r"the model lacks \['cls.seq_relationship.weight'\]"):
        load_sparse(tmp_path, model)


def test_each_tensor_keeps_its_dtype(bert, tmp_path):
    bert.half().classifier.float()
    bert.save_pretrained(tmp_path)
    save_sparse(tmp_path, tmp_path)
    assert_same_state(load_sparse(tmp_path), bert.state_dict())
    assert_same_state(load_sparse(tmp_path, AutoModelForSequenceClassification).state_dict(), bert.state_dict())


def test_experts_that_do_not_fit_together_are_named(tmp_path):
    build("MixtralForCausalLM").save_pretrained(tmp_path)
    weights = load_file(tmp_path / DENSE_FILE)
    name = next(name for name in weights if "experts.1.w1" in name)
    weights[name] = torch.ones(5, 5)
    save_file(weights, tmp_path / DENSE_FILE)
    with pytest.raises(ValueError, match=r"experts.gate_up_proj cannot be put together from .*experts.0.w1"):
        describe_weights(tmp_path)


def test_directories_that_hold_no_weights_of_their_own_are_refused(bert, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds a PEFT adapter.*merge_and_unload"):
        describe_weights(tmp_path / "adapter")
    bert.save_pretrained(tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds a quantized model"):
        save_sparse(tmp_path / "quantized", tmp_path / "out")
    assert not (tmp_path / "out").exists()
