"""A BERT small enough for a test, data for it, and a Trainer over both, for the tests of the pruning callback."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from mfac_hf import MFAC


class Drift(torch.optim.SGD):
    """An optimizer that moves every weight, whatever its gradient, as those do that mix the entries of a matrix."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(1e-4)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "drift": lambda p: Drift(p, lr=1e-2, momentum=0.9),
    "mfac": lambda p: MFAC(p, metric="identity", lr=2e-3, num_grads=6, damping=1e-3, momentum=0.9, weight_decay=0.01),
    "mfac, decoupled": lambda p: MFAC(
        p,
        metric="identity",
        lr=2e-3,
        num_grads=6,
        damping=1e-3,
        grad_decay=0.9,
        weight_decay=0.1,
        decoupled_weight_decay=True,
    ),
}


def make_data(count=64):
    """Random token ids of random lengths, padded; no tokenizer is needed."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for i in range(count):
        length = int(torch.randint(4, 13, (1,), generator=generator))
        ids = torch.randint(1, 100, (12,), generator=generator)
        mask = torch.arange(12) < length
        data.append({"input_ids": ids * mask, "attention_mask": mask.long(), "labels": i % 2})
    return data


def make_model(seed=0):
    """One layer, with dropout, so that a disturbed random state shows."""
    set_seed(seed)
    config = BertConfig(
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config)


def make_trainer(directory, optimizer="adamw", callbacks=(), model=None, scheduler=None, **options):
    """A Trainer of 16 steps, 8 to an epoch; keywords replace its arguments."""
    torch.set_num_threads(1)
    model = make_model() if model is None else model
    settings = {
        "max_steps": 16,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "save_steps": 4,
        "logging_steps": 5,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
    }
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    return Trainer(
        model,
        TrainingArguments(output_dir=str(directory), **{**settings, **options}),
        train_dataset=make_data(),
        eval_dataset=make_data(16),
        optimizers=(optimizer, None if scheduler is None else scheduler(optimizer)),
        callbacks=list(callbacks),
    )


def weights_of(model):
    """A copy of everything that a model knows."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def differing(first, second):
    """Names of the tensors that are not equal to the bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]
