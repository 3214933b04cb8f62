"""Decoders small enough to train in a test, and the sentences that they learn."""

import torch
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from mfac_hf.tasks.toy import toy_dataset

PAD, END = 0, 1


def sentences(count=600):
    """Return sentences of different lengths as lists of word numbers, and the size of the vocabulary."""
    texts = [sentence.split() for sentence in toy_dataset(count, 1)["train"]["sentence"]]
    numbers = {word: i for i, word in enumerate(sorted({word for words in texts for word in words}), start=2)}
    return [[*(numbers[word] for word in words), END] for words in texts], len(numbers) + 2


def padded(examples):
    """Collate sentences: padding has the label -100."""
    length = max(map(len, examples))
    ids = torch.tensor([[*words, *[PAD] * (length - len(words))] for words in examples])
    mask = torch.tensor([[1] * len(words) + [0] * (length - len(words)) for words in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def loader(examples, batch_size=16):
    return DataLoader(examples, batch_size=batch_size, collate_fn=padded)


COMMON = {"initializer_range": 0.06, "pad_token_id": PAD, "eos_token_id": END}
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}


def gpt2(vocabulary, width=32):
    sizes = {"n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": vocabulary}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **COMMON))


def llama(vocabulary, width=32):
    sizes = SIZES | {"hidden_size": width, "intermediate_size": 2 * width, "vocab_size": vocabulary}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **COMMON))


def mixtral(vocabulary, width=32):
    sizes = SIZES | {
        "hidden_size": width,
        "intermediate_size": width,
        "vocab_size": vocabulary,
        "num_local_experts": 4,
    }
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**sizes, **COMMON))


def trained(model, examples, steps=150):
    """Train a model for some steps; untrained weights have no saliency worth the name."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = list(loader(examples))
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
    return model.eval()
