"""Which weights are pruned by default, and by name."""

import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    ModernBertConfig,
    RobertaConfig,
)

from mfac_hf.pruning import find_targets

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


def test_layers_that_store_their_weights_transposed_are_linear_too():
    config = GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = AutoModelForSequenceClassification.from_config(config)
    assert sum(weight.numel() for weight in find_targets(model).values()) == 12 * 16 * 16


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
