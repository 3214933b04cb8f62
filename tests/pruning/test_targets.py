"""Which weights are pruned by default, and by name."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    DeiTConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    ModernBertConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

from mfac_hf import to_sparse_inference
from mfac_hf.pruning import MaskSet, find_targets
from mfac_hf.pruning.layout import Layout
from mfac_hf.pruning.targets import folded, left_out

WIDTH, INNER, LAYERS = 16, 24, 2
SIZES = {
    "vocab_size": 50,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": INNER,
}
SQUARES = 4 * WIDTH * WIDTH  # query, key, value, output
# Weights of one layer, counted by hand from each architecture's description.
ARCHITECTURES = {
    "bert": (BertConfig(**SIZES), SQUARES + 2 * WIDTH * INNER),
    "distilbert": (
        DistilBertConfig(vocab_size=50, dim=WIDTH, n_layers=LAYERS, n_heads=2, hidden_dim=INNER),
        SQUARES + 2 * WIDTH * INNER,
    ),
    "roberta": (RobertaConfig(**SIZES), SQUARES + 2 * WIDTH * INNER),
    "electra": (ElectraConfig(**SIZES, embedding_size=8), SQUARES + 2 * WIDTH * INNER),
    # positions have projections of their own
    "deberta": (
        DebertaConfig(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=8),
        SQUARES + 2 * WIDTH * WIDTH + 2 * WIDTH * INNER,
    ),
    "deberta-v2": (
        DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=8),
        SQUARES + 2 * WIDTH * WIDTH + 2 * WIDTH * INNER,
    ),
    "deberta-v3": (
        DebertaV2Config(
            **SIZES,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            share_att_key=True,
            position_buckets=4,
            norm_rel_ebd="layer_norm",
        ),
        SQUARES + 2 * WIDTH * INNER,
    ),
    # the first feed-forward matrix is gated and so twice as wide
    "modernbert": (ModernBertConfig(**SIZES, pad_token_id=0), SQUARES + 3 * WIDTH * INNER),
}
HEADS = {
    "classification": AutoModelForSequenceClassification,
    "answers": AutoModelForQuestionAnswering,
    "language": AutoModelForMaskedLM,
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults_are_the_linear_layers_of_the_encoder(architecture, head):
    config, layer_weights = ARCHITECTURES[architecture]
    model = HEADS[head].from_config(config)
    targets = find_targets(model)
    assert sum(weight.numel() for weight in targets.values()) == LAYERS * layer_weights
    assert all(re.search(r"\.layers?\.[01]\.", name) for name in targets)
    excluded = re.compile("embed|norm|bias|pooler|classifier|qa_outputs|predictions|lm_head|decoder", re.IGNORECASE)
    assert not any(excluded.search(name) for name in targets)
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is weight for name, weight in targets.items())


TEXT = {"vocab_size": 50, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
DECODER = TEXT | {"num_attention_heads": 2, "num_key_value_heads": 1}  # so that key and value are half as wide
TIED = {"tie_word_embeddings": True}
IMAGE = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
IMAGE |= {"image_size": 8, "patch_size": 4}
BOTH = {"vocab_size": 50, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS}
BOTH |= {
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
PATCHES = "embeddings.patch_embeddings.projection.weight"
# Configuration, head, weights of all layers as counted by hand, and what is left out.
FAMILIES = {
    "gpt2": (
        GPT2Config(vocab_size=50, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=8),
        AutoModelForCausalLM,
        LAYERS * 12 * WIDTH**2,
        {"transformer.wte.weight": "embedding, tied to lm_head.weight", "transformer.wpe.weight": "embedding"},
    ),
    "llama": (
        LlamaConfig(**DECODER),
        AutoModelForCausalLM,
        LAYERS * (3 * WIDTH**2 + 3 * WIDTH * INNER),
        {"model.embed_tokens.weight": "embedding", "lm_head.weight": "outside of the stacks"},
    ),
    "qwen2": (
        Qwen2Config(**DECODER, **TIED),
        AutoModelForCausalLM,
        LAYERS * (3 * WIDTH**2 + 3 * WIDTH * INNER),
        {"model.embed_tokens.weight": "embedding, tied to lm_head.weight"},
    ),
    "qwen3": (
        Qwen3Config(**DECODER, **TIED, head_dim=16),  # heads twice as wide together as the model
        AutoModelForCausalLM,
        LAYERS * (6 * WIDTH**2 + 3 * WIDTH * INNER),
        {"model.embed_tokens.weight": "embedding, tied to lm_head.weight"},
    ),
    "t5": (
        T5Config(vocab_size=50, d_model=WIDTH, d_kv=8, num_heads=2, d_ff=INNER, num_layers=LAYERS),
        AutoModelForSeq2SeqLM,
        LAYERS * (3 * SQUARES + 2 * 2 * WIDTH * INNER),
        {
            "shared.weight": "embedding, tied to encoder.embed_tokens.weight, decoder.embed_tokens.weight, "
            "lm_head.weight"
        }
        | {
            f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "embedding"
            for part in ("encoder", "decoder")
        },
    ),
    "bart": (
        BartConfig(**BOTH),
        AutoModelForSeq2SeqLM,
        LAYERS * (3 * SQUARES + 2 * 2 * WIDTH * INNER),
        {
            "model.shared.weight": "embedding, tied to model.encoder.embed_tokens.weight, "
            "model.decoder.embed_tokens.weight, lm_head.weight"
        }
        | {f"model.{part}.embed_positions.weight": "embedding" for part in ("encoder", "decoder")},
    ),
    "vit": (
        ViTConfig(**IMAGE),
        AutoModelForImageClassification,
        LAYERS * (SQUARES + 2 * WIDTH * INNER),
        dict.fromkeys(
            ["vit.embeddings.cls_token", "vit.embeddings.position_embeddings", f"vit.{PATCHES}", "classifier.weight"],
            "outside of the stacks",
        ),
    ),
    "deit": (
        DeiTConfig(**IMAGE, architectures=["DeiTForImageClassification"]),
        AutoModelForImageClassification,
        LAYERS * (SQUARES + 2 * WIDTH * INNER),
        dict.fromkeys(
            [f"deit.embeddings.{name}" for name in ("cls_token", "distillation_token", "position_embeddings")]
            + [f"deit.{PATCHES}", "classifier.weight"],
            "outside of the stacks",
        ),
    ),
    "mixtral": (
        MixtralConfig(**DECODER, num_local_experts=4),
        AutoModelForCausalLM,
        LAYERS * (3 * WIDTH**2 + 4 * 3 * WIDTH * INNER),
        {"model.embed_tokens.weight": "embedding", "lm_head.weight": "outside of the stacks"}
        | {f"model.layers.{i}.mlp.gate.weight": "router" for i in range(LAYERS)},
    ),
    "qwen2_moe": (
        Qwen2MoeConfig(**DECODER, **EXPERTS, shared_expert_intermediate_size=20),
        AutoModelForCausalLM,
        LAYERS * (3 * WIDTH**2 + 4 * 3 * WIDTH * 12 + 3 * WIDTH * 20),
        {"model.embed_tokens.weight": "embedding", "lm_head.weight": "outside of the stacks"}
        | {
            f"model.layers.{i}.mlp.{gate}.weight": "router"
            for i in range(2)
            for gate in ("gate", "shared_expert_gate")
        },
    ),
    "qwen3_moe": (
        Qwen3MoeConfig(**DECODER, **EXPERTS, head_dim=8),
        AutoModelForCausalLM,
        LAYERS * (3 * WIDTH**2 + 4 * 3 * WIDTH * 12),
        {"model.embed_tokens.weight": "embedding", "lm_head.weight": "outside of the stacks"}
        | {f"model.layers.{i}.mlp.gate.weight": "router" for i in range(LAYERS)},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_of_other_families(family, caplog):
    caplog.set_level("INFO", "mfac_hf.pruning.targets")
    config, head, weights, others = FAMILIES[family]
    model = head.from_config(config)
    targets = find_targets(model)
    assert sum(weight.numel() for weight in targets.values()) == weights
    assert left_out(model, targets) == others
    [message] = [record.getMessage() for record in caplog.records]  # and no warning
    assert all(name in message for name in folded(targets)) and all(name in message for name in folded(others))
    one = next(iter(targets))
    assert set(left_out(model, [one]).items()) >= others.items() and len(left_out(model, [])) == len(targets | others)


def test_names_of_layers_are_folded():
    names = ["a.0.experts.expert_1.wi_0.weight", "a.12.experts.expert_3.wi_0.weight", "a.1.wi_1.weight", "0.weight"]
    assert folded(names) == ["a.*.experts.expert_*.wi_0.weight (2)", "a.1.wi_1.weight", "0.weight"]


def test_layers_that_store_their_weights_transposed_are_linear_too():
    config = GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = AutoModelForSequenceClassification.from_config(config)
    targets = find_targets(model)
    assert sum(weight.numel() for weight in targets.values()) == 12 * 16 * 16
    assert set(Layout.of(model, targets).by_inputs) == set(targets)


def test_convolutions_and_the_classifier_of_a_vision_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    assert list(find_targets(model)) == ["0.weight", "3.weight"]


def bert():
    return AutoModelForSequenceClassification.from_config(ARCHITECTURES["bert"][0])


def test_patterns_replace_the_defaults():
    model = bert()
    targets = find_targets(model, [r"attention\.self\.query", r"classifier"])
    assert list(targets) == [
        "bert.encoder.layer.0.attention.self.query.weight",
        "bert.encoder.layer.1.attention.self.query.weight",
        "classifier.weight",
    ]
    assert list(find_targets(model, r"pooler")) == ["bert.pooler.dense.weight"]


def test_a_pattern_without_a_match_lists_candidates():
    with pytest.raises(ValueError, match=r"'decoder' hits no weight.*bert\.encoder\.layer\.0\.attention\.self\.query"):
        find_targets(bert(), ["encoder", "decoder"])
    with pytest.raises(ValueError, match="LayerNorm"):  # normalisation is no candidate
        find_targets(bert(), "LayerNorm")


def test_a_pattern_that_hits_an_embedding_is_refused():
    with pytest.raises(ValueError, match="hits an embedding .*word_embeddings"):
        find_targets(bert(), r"bert\.")
    tied = AutoModelForMaskedLM.from_config(ARCHITECTURES["bert"][0])
    assert tied.cls.predictions.decoder.weight is tied.bert.embeddings.word_embeddings.weight
    with pytest.raises(ValueError, match="hits an embedding .*decoder"):
        find_targets(tied, r"predictions\.decoder")


def test_what_cannot_be_a_target_is_refused():
    with pytest.raises(ValueError, match="no regular expression"):
        find_targets(bert(), "layer(")
    with pytest.raises(ValueError, match="empty list"):
        find_targets(bert(), [])
    with pytest.raises(ValueError, match="nothing to prune"):
        find_targets(nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3)))
    quantized = nn.Sequential(nn.Linear(2, 2))
    quantized[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="torch.int8"):
        find_targets(quantized)


def test_a_shared_weight_is_one_target():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert list(find_targets(model)) == ["0.weight", "1.weight"]


WRAPPERS = {
    "compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_targets_of_a_wrapped_model_are_those_of_the_model_inside(wrap):
    model = bert()
    assert list(find_targets(WRAPPERS[wrap](model))) == list(find_targets(model))
    assert list(find_targets(WRAPPERS[wrap](model), "pooler")) == ["bert.pooler.dense.weight"]


def test_targets_of_a_transformer_inside_another_module_are_its_stacks():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = bert().bert, nn.Linear(WIDTH, 3)

    assert list(find_targets(Reader())) == [name.replace("bert.", "encoder.", 1) for name in find_targets(bert())]


def test_the_factors_of_adapters_are_no_targets():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "dense"]))
    names = [name.removeprefix("base_model.model.").replace(".base_layer", "") for name in find_targets(adapted)]
    assert names == list(find_targets(bert()))
    [query, _] = find_targets(adapted, "query")
    assert query.endswith("layer.0.attention.self.query.base_layer.weight")
    with pytest.raises(ValueError, match="hits no weight"):
        find_targets(adapted, "lora_A")
    with pytest.raises(ValueError, match="hits no weight"):
        find_targets(adapted, "original_module")
    adapted.merge_adapter()
    with pytest.raises(ValueError, match=r"layer\.0.*are merged into its weight.*merge_and_unload"):
        find_targets(adapted)
    assert list(find_targets(adapted.merge_and_unload())) == list(find_targets(bert()))


def masked(layer):
    prune.l1_unstructured(layer, "weight", amount=0.5)


def low_rank(layer):
    parametrize.register_parametrization(layer, "weight", nn.Identity())


def two_parameters(layer):
    nn.utils.weight_norm(layer)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", [masked, low_rank, two_parameters])
def test_weights_that_are_computed_are_refused_where_they_would_be_targets(change):
    model = bert()
    change(model.bert.pooler.dense)
    assert list(find_targets(model)) == list(find_targets(bert()))
    change(model.bert.encoder.layer[1].output.dense)
    for patterns in (None, r"layer\.1"):
        with pytest.raises(
            ValueError, match=r"no parameters: bert.encoder.layer.1.output.dense.weight .*prune\.remove"
        ):
            find_targets(model, patterns)
    assert len(find_targets(model, r"layer\.0")) == 6
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    change(network[0])
    with pytest.raises(ValueError, match=r"no parameters: 0.weight .*prune\.remove"):
        find_targets(network)


def test_layers_for_sparse_inference_are_refused():
    model = bert()
    masks = MaskSet.dense(model, find_targets(model))
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, ::2] = 0
    fast = to_sparse_inference(model, tokens=1, min_speedup=0)
    with pytest.raises(ValueError, match=r"layer.0.output.dense.weight \(SparseLinear\).*before to_sparse_inference"):
        find_targets(fast)
    with pytest.raises(ValueError, match="is no parameter of the model"):
        masks.parameters(fast)


def test_matrices_of_no_linear_layer_are_named(caplog):
    config = MambaConfig(vocab_size=20, hidden_size=8, state_size=4, num_hidden_layers=2)
    targets = find_targets(AutoModelForCausalLM.from_config(config))
    assert [name.split(".")[-2] for name in targets] == 2 * ["in_proj", "x_proj", "dt_proj", "out_proj"]
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.endswith("no linear layer: backbone.layers.*.mixer.A_log (2)")


def test_a_transformer_without_linear_layers_in_its_stacks_is_not_pruned_elsewhere():
    model = bert()
    for layer in model.bert.encoder.layer:
        for module in [module for module in layer.modules() if isinstance(module, nn.Linear)]:
            module.__class__ = type("OwnLayer", (nn.Module,), {})
    expected = r"in its stacks, but bert.*word_embeddings.weight, .* \(embedding\); .*layer.\*.*query.weight \(2\)"
    with pytest.raises(ValueError, match=expected.replace("in its stacks", "in its stacks of layers")):
        find_targets(model)


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = bert()
    for make in (MaskSet.dense, MaskSet.from_model):
        with pytest.raises(ValueError, match="the meta device, behind bert.encoder.*offloaded"):
            make(model, find_targets(model))
    masks = MaskSet.dense(bert(), find_targets(bert()))
    with pytest.raises(ValueError, match="the meta device"):
        masks.parameters(model)
