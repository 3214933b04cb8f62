"""Gradients of real models on real data, on which precision is harder than on random numbers."""

import functools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mfac_hf.models import create_model

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
    datasets = pytest.importorskip("datasets")  # a machine with a GPU may lack it
    train = datasets.load_dataset(str(folder / "glue"), "sst2", split="train")
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


RESNET_NAMES = ("layer1.0.conv1.weight", "layer3.2.conv2.weight")  # 2,304 and 36,864 weights


@functools.cache
def resnet20_on_cifar10(folder, count, batch_size):
    """Gradients of the M-FAC paper's ResNet-20 on CIFAR-10: {name: (count, numel)}, float32."""
    model = create_model(
        "resnet20", num_classes=10, weights=load_file(folder / "checkpoints" / "mfac_resnet20_cifar10.safetensors")
    ).eval()
    rows = pytest.importorskip("datasets").load_dataset(str(folder / "cifar10"), split="train")[: count * batch_size]
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in rows["img"]])
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1  # the normalisation that this checkpoint expects
    labels = torch.tensor(rows["label"])
    parameters = [model.get_parameter(name) for name in RESNET_NAMES]
    gradients = {name: torch.empty(count, p.numel()) for name, p in zip(RESNET_NAMES, parameters, strict=True)}
    for i in range(count):
        batch = slice(i * batch_size, (i + 1) * batch_size)
        loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
        for name, gradient in zip(RESNET_NAMES, torch.autograd.grad(loss, parameters), strict=True):
            gradients[name][i] = gradient.flatten()
    return gradients


# Both models, single examples (whose gradients vary most) and batches, more and fewer gradients than a block is long.
REAL = [
    pytest.param(function, name, count, batch_size, id=f"{name}-{count}x{batch_size}")
    for function, names in ((bert_on_sst2, BERT_NAMES), (resnet20_on_cifar10, RESNET_NAMES))
    for name in names
    for count, batch_size in ((256, 1), (64, 8))
]
