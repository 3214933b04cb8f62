"""Adapters: what is pushed is the adapter, and the card is that of an adapter."""

import json

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import save_file
from torch import nn

from mfac_hf import push_to_hub
from mfac_hf.hub.adapter import base_of, count_parameters, describe_adapter, is_adapter
from mfac_hf.hub.card import build_card
from mfac_hf.hub.facts import collect
from mfac_hf.hub.latency import with_latency
from tests.helpers.hub_server import TOKEN, running_hub
from tests.helpers.models import sparse_bert
from tests.helpers.results import run

CONFIG = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 2, "lora_alpha": 8, "bias": "none"}
CONFIG |= {"target_modules": ["query", "value"], "base_model_name_or_path": "user/base"}


@pytest.fixture
def adapter(tmp_path):
    """Directory of an adapter as peft writes it, without the need for peft."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    save_file({"lora_A": torch.ones(2, 8), "lora_B": torch.zeros(8, 2)}, folder / "adapter_model.safetensors")
    (folder / "README.md").write_text("of peft")
    return folder


def record(base="user/base"):
    """Results of a run on top of a base model."""
    found = run(1, 0.8)
    found["arguments"]["ModelArguments"]["model_name_or_path"] = base
    return found


def test_an_adapter_is_told_from_a_model(adapter, bert):
    assert is_adapter(adapter) and not is_adapter(bert) and not is_adapter(adapter.parent)
    bert.save_pretrained(adapter)
    assert not is_adapter(adapter), "the whole model lies beside it"
    assert base_of(bert) is bert


def test_the_card_is_that_of_an_adapter(adapter):
    facts = with_latency(collect([record()], model=adapter), adapter)
    assert json.loads(json.dumps(facts)) == facts and not facts["sparse"] and facts["latency"] is None
    assert facts["weights"]["numel"] == 32 and facts["weights"]["zeros"] == 16
    card = build_card(facts, "user/adapter")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-classification"
    assert card.data.base_model == "user/base" and {"lora", "base_model:adapter:user/base"} <= set(card.data.tags)
    text = str(card)
    assert "LORA adapter (32 weights), trained with M-FAC on top of `user/base`." in text
    assert "| r | 2 |" in text and "| target_modules | query value |" in text and "| bias |" not in text
    assert 'AutoPeftModelForSequenceClassification.from_pretrained("user/adapter")' in text
    assert "It holds low-rank factors (32 numbers). All other weights are those of the base model." in text
    assert "`adapter_model.safetensors` |" in text and "model.safetensors" not in text.replace("adapter_model.s", "")


def test_an_adapter_of_a_local_model_is_loaded_onto_it(adapter):
    facts = collect([record("../base")], model=adapter)
    card = build_card(facts, "user/adapter")
    assert card.data.base_model is None and "lora" in card.data.tags
    assert not any(tag.startswith("base_model") for tag in card.data.tags)
    assert 'base = AutoModelForSequenceClassification.from_pretrained("...")  # the base model' in str(card)
    assert 'PeftModel.from_pretrained(base, "user/adapter")' in str(card)


@pytest.mark.parametrize(
    ("changes", "name", "task"),
    [
        ({"task_type": "CAUSAL_LM"}, "AutoPeftModelForCausalLM", "text-generation"),
        (
            {"task_type": "SEQ_2_SEQ_LM", "peft_type": "PREFIX_TUNING"},
            "AutoPeftModelForSeq2SeqLM",
            "text2text-generation",
        ),
        ({"task_type": None, "auto_mapping": {"base_model_class": "BertForMaskedLM"}}, "AutoPeftModel", "fill-mask"),
        ({"task_type": None}, "PeftModel", None),
    ],
)
def test_class_and_task(changes, name, task, adapter):
    (adapter / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))
    model = describe_adapter(adapter)["model"]
    assert (model["class"], model["task"]) == (f"peft.{name}", task)
    facts = collect([record()], model=adapter)
    compile(build_card(facts).text.split("```python\n")[1].split("```")[0], "card", "exec")
    if task is None:  # a model of transformers to which an adapter was added tells more
        assert describe_adapter(adapter, sparse_bert())["model"]["task"] == "text-classification"


def test_a_pruning_of_the_base_model_is_not_in_the_adapter(adapter):
    reports = {"reports": [{"options": {"num_grads": 64}, "sparsity": 0.9, "steps": []}]}
    found = record()
    found["results"]["pruning"] = reports
    text = str(build_card(collect([found], model=adapter)))
    assert "- The pruning removed weights of the base model, which are not part of this repository." in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", "[1]", "adapter_config.json holds a list"),
        ("adapter_config.json", '{"peft_type": 3}', "adapter_config.json: peft_type is 3; expected text"),
        ("adapter_config.json", '{"auto_mapping": "x"}', "adapter_config.json: auto_mapping is 'x'"),
        ("adapter_model.safetensors", "x", "adapter_model.safetensors is no safetensors file"),
    ],
)
def test_damaged_adapters_are_named(name, content, message, adapter):
    (adapter / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        describe_adapter(adapter)


@pytest.fixture
def api(monkeypatch):
    """A client of a Hub, and the Hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with running_hub() as hub:
        yield HfApi(endpoint=hub.url, token=TOKEN), hub


def test_a_push_brings_the_adapter_and_takes_the_model_away(adapter, api, bert):
    client, hub = api
    push_to_hub(bert, "user/x", card=ModelCard("---\nlicense: mit\n---\n# x\n"), api=client)
    push_to_hub(adapter, "user/x", card=record(), api=client)
    files = hub.repositories["user/x"].branches["main"]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "config.json"}
    assert b"LORA adapter" in files["README.md"]
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="has no adapter_model.safetensors: save the adapter anew"):
        push_to_hub(adapter, "user/x", card=record(), api=client)
    with pytest.raises(ValueError, match="an adapter has no sparse file"):
        push_to_hub(adapter, "user/x", card=record(), api=client, sparse_only=True)


def test_what_is_saved_in_full_is_named(adapter):
    """`modules_to_save` of peft names layers that the model does not have; the file knows what there is."""
    (adapter / "adapter_config.json").write_text(json.dumps({**CONFIG, "modules_to_save": ["classifier", "score"]}))
    shapes = {"query.lora_A.weight": (2, 8), "query.lora_B.weight": (8, 2), "classifier.weight": (3, 8)}
    shapes |= {"classifier.bias": (3,), "pooler.dense.weight": (8, 8), "key.bias": (8,)}
    tensors = {f"base_model.model.{name}": torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    found = describe_adapter(adapter)["model"]["adapter"]
    assert found["whole"] == {"classifier": 27, "key.bias": 8, "pooler.dense": 64} and found["labels"] == 3
    results = record()
    results["results"]["lora"] = {"trainable_parameters": 131, "total_parameters": 5000, "rank": 2}
    facts = collect([results], model=adapter)
    assert json.loads(json.dumps(facts)) == facts
    text = str(build_card(facts, "user/adapter"))
    assert "on top of `user/base`; 131 of 5,000 parameters were trained." in text
    assert (
        "It holds low-rank factors (32 numbers), `classifier` in full (27), `key.bias` in full (8), `pooler.dense` in "
        "full (64). All other weights are those of the base model."
    ) in text
    assert "score" not in text and 'from_pretrained("user/adapter", num_labels=3)' in text
    with pytest.raises(ValueError, match="the run trained an adapter, and these weights are a whole model"):
        collect([results], model=sparse_bert())
    facts["model"]["adapter"] = {key: found[key] for key in ("type", "base", "base_class", "settings")}
    assert 'from_pretrained("user/adapter")' in str(build_card(facts, "user/adapter")), "written by an older version"


@pytest.mark.parametrize("name", ["default", "other"])
def test_a_model_with_an_adapter_pushes_the_adapter(name, api, bert):
    peft = pytest.importorskip("peft")
    client, hub = api
    options = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    model: nn.Module = peft.get_peft_model(bert, options, adapter_name=name)
    assert is_adapter(model) and base_of(model) is bert
    push_to_hub(model, "user/x", card=record(), api=client)
    files = hub.repositories["user/x"].branches["main"]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    text = files["README.md"].decode()
    assert "LORA adapter" in text and "`classifier` in full (66)" in text and "num_labels=2" in text
    size = len(files["adapter_model.safetensors"])
    assert f"| `adapter_model.safetensors` | {size:,} |" in text
    numbers = 2 * 2 * 2 * 32 + 66  # A and B of two layers, and the head
    assert count_parameters(model)["trainable_parameters"] == numbers and f"adapter ({numbers} weights)" in text
