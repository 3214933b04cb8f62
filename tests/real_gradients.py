"""Gradients of real models on real data, on which precision is harder than on random numbers."""

import functools

import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

# A query and a feed-forward matrix of the first layer: 16,384 and 65,536 weights.
BERT_NAMES = ("encoder.layer.0.attention.self.query.weight", "encoder.layer.0.intermediate.dense.weight")


@functools.cache
def bert_on_sst2(folder, count, batch_size):
    """Gradients of BERT-tiny, after a few steps of training on SST-2: {name: (count, numel)}, float32.

    Trained a little, because losses close to zero give per-sample gradients of very different sizes.
    """
    torch.manual_seed(0)
    directory = folder / "models" / "bert-tiny-mlm"
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    train = load_dataset(str(folder / "glue"), "sst2", split="train")
    rows = train.shuffle(seed=0).select(range(1280 + count * batch_size))

    def loss(first, size):
        batch = rows[first : first + size]
        encoded = tokenizer(batch["sentence"], padding=True, truncation=True, max_length=64, return_tensors="pt")
        return model(**encoded, labels=torch.tensor(batch["label"])).loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(40):
        optimizer.zero_grad()
        loss(32 * step, 32).backward()
        optimizer.step()
    model.eval()
    parameters = [model.get_parameter(f"bert.{name}") for name in BERT_NAMES]
    gradients = {
        name: torch.empty(count, parameter.numel()) for name, parameter in zip(BERT_NAMES, parameters, strict=True)
    }
    for i in range(count):
        found = torch.autograd.grad(loss(1280 + i * batch_size, batch_size), parameters)
        for name, gradient in zip(BERT_NAMES, found, strict=True):
            gradients[name][i] = gradient.flatten()
    return gradients
