"""Configurations of strangers: only model classes, no code from elsewhere, bounded work."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from mfac_hf import load_sparse, save_sparse
from mfac_hf.sparse.skeleton import build_skeleton, find_class, read_config

BERT = {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}


def write(folder, config):
    """Write a configuration, as JSON or as it is."""
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def test_the_model_has_the_shapes_and_ties_of_the_real_one(bert, tmp_path):
    bert.save_pretrained(tmp_path)
    skeleton = build_skeleton(tmp_path)
    assert type(skeleton) is type(bert) and all(parameter.is_meta for parameter in skeleton.parameters())
    shapes = [{name: t.shape for name, t in model.state_dict().items()} for model in (skeleton, bert)]
    assert shapes[0] == shapes[1]
    tied = build_skeleton(write(tmp_path, {"architectures": ["BertForMaskedLM"], "num_hidden_layers": 1}))
    assert tied.cls.predictions.decoder.weight is tied.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize(
    "name", ["Trainer", "pipeline", "set_seed", "AutoModel", "PreTrainedModel", "BertConfig", "models"]
)
def test_what_is_no_model_class_is_refused(name, tmp_path):
    write(tmp_path, {"architectures": [name], "model_type": "bert"})
    for read in (find_class, build_skeleton):
        with pytest.raises(ValueError, match=f"names {name}, which is no model class of transformers"):
            read(tmp_path)


@pytest.mark.parametrize("named", [None, [], ["MyNet"], ["BertModel.from_pretrained"], ["os"], [""]])
def test_classes_of_others_are_not_known(named, tmp_path):
    assert find_class(tmp_path) is None, "there is no configuration"
    assert build_skeleton(write(tmp_path, {"architectures": named})) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, message",
    [
        *(("[]", "no configuration"), ("7", "no configuration"), ("{", "no JSON"), ("[" * 100_000, "no JSON")),
        *(({"architectures": "BertModel"}, "expected a list"), ({"architectures": [7]}, "expected a list")),
        (BERT | {"num_hidden_layers": 10**9}, "asks for num_hidden_layers = 1000000000; expected at most 65536"),
        (BERT | {"num_hidden_layers": 60_000}, "more than 10000 modules and parameters"),
        (BERT | {"hidden_size": 10**9}, "asks for hidden_size = 1000000000"),
        (BERT | {"num_labels": 10**6}, "asks for num_labels = 1000000"),
        (BERT | {"vocab_size": 10**4000}, "asks for vocab_size = 1000"),
        (BERT | {"id2label": {str(i): "" for i in range(70_000)}}, "has 70000 entries in id2label"),
        (BERT | {"hidden_size": "32"}, "describes no BertForSequenceClassification"),
        (BERT | {"hidden_size": -4}, "describes no BertForSequenceClassification: .*negative"),
        ({"architectures": ["SwinModel"], "depths": [60_000, 60_000]}, "asks for depths = 120000"),
        ({"architectures": ["SwinModel"], "depths": [60_000], "num_heads": [3]}, "more than 10000 modules"),
        (
            {
                "architectures": ["EncoderDecoderModel"],
                "encoder": {"model_type": "bert"},
                "decoder": {"model_type": "bert", "num_hidden_layers": 10**9},
            },
            "asks for num_hidden_layers",
        ),
    ],
)
def test_senseless_and_endless_configurations_are_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        build_skeleton(write(tmp_path, config))


def test_large_numbers_that_nobody_counts_to_are_allowed(tmp_path):
    config = {"architectures": ["MixtralForCausalLM"], "rope_theta": 10**12, "seed": 2**40, "num_hidden_layers": 1}
    assert read_config(write(tmp_path, config)) == config
    assert build_skeleton(tmp_path) is not None


def test_code_from_elsewhere_is_not_run(tmp_path):
    (tmp_path / "evil.py").write_text("import sys; sys.evil = True")
    kernels = {"attn_implementation": "evil/kernel", "_experts_implementation_internal": "evil/kernel"}
    code = {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "trust_remote_code": True}
    skeleton = build_skeleton(
        write(tmp_path, BERT | kernels | code | {"quantization_config": {"quant_method": "gptq"}})
    )
    assert "evil" not in str(skeleton.config) and not hasattr(sys, "evil")
    detr = {"architectures": ["DetrForObjectDetection"], "use_timm_backbone": True, "backbone": "hf-hub:evil/x"}
    assert build_skeleton(write(tmp_path, detr)) is None, "timm would download it"


def test_a_build_leaves_no_hook_and_no_device_behind(tmp_path):
    with pytest.raises(ValueError):
        build_skeleton(write(tmp_path, BERT | {"num_hidden_layers": 60_000}))
    assert not torch.nn.Linear(2, 2).weight.is_meta
    assert float(torch.nn.Linear(50, 50).weight.detach().std()) > 0
    assert torch.nn.Sequential(*(torch.nn.Identity() for _ in range(20_000)))


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 10**9}, {"num_hidden_layers": 50_000}, {"intermediate_size": 2**24}]
)
def test_load_sparse_compares_shapes_before_it_takes_memory(change, bert, tmp_path):
    save_sparse(bert, tmp_path, sparse_only=True)
    config = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path, config | change)
    with pytest.raises(ValueError, match="asks for|modules and parameters|in the model"):
        load_sparse(tmp_path, AutoModelForSequenceClassification)
