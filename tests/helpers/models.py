"""A BERT small enough for a test, with sparse encoder layers."""

import torch
from transformers import BertConfig, BertForSequenceClassification

CONFIG = dict(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=16,
)


def prune(model, sparsity=0.9, seed=0):
    """Zero random weights of the encoder's matrices."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "encoder" in name and parameter.ndim == 2:
                parameter[torch.rand(parameter.shape, generator=generator) < sparsity] = 0
    return model


def sparse_bert():
    """A random classifier with sparse encoder layers."""
    torch.manual_seed(0)
    return prune(BertForSequenceClassification(BertConfig(**CONFIG))).eval()
