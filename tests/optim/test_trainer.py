"""Fine-tuning through an unmodified Trainer: killed without warning and resumed, a run ends with the same bits."""

import copy
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from mfac_hf import MFAC
from mfac_hf.fisher.columns import RowSparseColumns
from tests.helpers.ranks import forked

STEPS = 23
SAVE_EVERY = 4

# Named for what is special about each; the window of 6 wraps before the first kill that can happen after a checkpoint.
VARIANTS = {
    "float32": {"frozen": True, "optimizer": {}},
    "bfloat16": {"frozen": True, "optimizer": {"window_dtype": torch.bfloat16, "normalize": "count"}},
    "embeddings": {
        "frozen": False,
        "optimizer": {"momentum": 0.9, "weight_decay": 0.01, "decoupled_weight_decay": True},
    },
    "Adam's metric": {"frozen": False, "optimizer": {"metric": "adam", "damping": 0.3}},
}


class KillAt(TrainerCallback):
    """Ends the process as a power cut would, between two gradient accumulations of a step."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def make_data():
    """Random token ids of random lengths, padded; no tokenizer is needed."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for i in range(64):
        length = int(torch.randint(4, 13, (1,), generator=generator))
        ids = torch.randint(1, 2000, (12,), generator=generator)
        mask = torch.arange(12) < length
        data.append({"input_ids": ids * mask, "attention_mask": mask.long(), "labels": i % 2})
    return data


def make_model(frozen):
    """A BERT small enough for a test, whose word embeddings are large enough to be stored by rows."""
    set_seed(0)
    config = BertConfig(
        vocab_size=2000,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    model = BertForSequenceClassification(config)
    model.bert.embeddings.requires_grad_(not frozen)
    return model


def make_arguments(directory, **options):
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "save_steps": SAVE_EVERY,
        "logging_steps": 5,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
    }
    return TrainingArguments(output_dir=str(directory), **{**settings, **options})


def make_trainer(directory, variant, callbacks=()):
    """A Trainer over all of this; the optimizer is the only thing that is not Trainer's own."""
    torch.set_num_threads(1)
    chosen = VARIANTS[variant]
    model = make_model(chosen["frozen"])
    options = {"metric": "identity", "lr": 2e-3, "num_grads": 6, "damping": 1e-3, **chosen["optimizer"]}
    optimizer = MFAC(model.parameters(), **options)
    return Trainer(
        model,
        make_arguments(directory),
        train_dataset=make_data(),
        optimizers=(optimizer, None),
        callbacks=list(callbacks),
    )


def train_until_killed(directory, variant, step):
    make_trainer(directory, variant, [KillAt(step)]).train()


@pytest.fixture
def one_thread():
    """Sums in the same order here and in the process that is killed."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_ends_with_the_same_bits(variant, tmp_path, one_thread):
    whole = make_trainer(tmp_path / "whole", variant)
    initial = copy.deepcopy(whole.model.state_dict())
    whole.train()
    assert whole.state.global_step == STEPS

    step = random.Random(variant).randrange(SAVE_EVERY + 1, STEPS)
    directory = tmp_path / "killed"
    process = forked().Process(target=train_until_killed, args=(directory, variant, step))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    checkpoint = Path(get_last_checkpoint(directory))
    assert checkpoint.name == f"checkpoint-{step // SAVE_EVERY * SAVE_EVERY}"

    resumed = make_trainer(directory, variant)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS

    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    first, second = whole.optimizer.optimizer, resumed.optimizer.optimizer
    assert first.window_stats() == second.window_stats() and second._window.gram.pushed == STEPS
    # Not a comparison of two models that stood still, or of another kind of storage than meant.
    moved = [name for name in expected if not torch.equal(expected[name], initial[name])]
    frozen = VARIANTS[variant]["frozen"]
    assert ("bert.embeddings.word_embeddings.weight" in moved) == (not frozen) and len(moved) >= 15
    assert any(isinstance(columns, RowSparseColumns) for columns in second._window.columns) == (not frozen)


@pytest.mark.slow
def test_checkpoints_without_the_window_are_small_and_resume(tmp_path, one_thread):
    sizes = {}
    for save_window in (True, False):
        model = make_model(frozen=True)
        optimizer = MFAC(model.parameters(), metric="identity", lr=2e-3, num_grads=6, save_window=save_window)
        arguments = make_arguments(tmp_path / str(save_window), max_steps=4)
        Trainer(model, arguments, train_dataset=make_data(), optimizers=(optimizer, None)).train()
        sizes[save_window] = (tmp_path / str(save_window) / "checkpoint-4" / "optimizer.pt").stat().st_size
    window = 6 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes[True] > window and sizes[False] < 0.1 * window
    model = make_model(frozen=True)
    optimizer = MFAC(model.parameters(), metric="identity", lr=2e-3, num_grads=6, save_window=False)
    arguments = make_arguments(tmp_path / "False", max_steps=7)
    trainer = Trainer(model, arguments, train_dataset=make_data(), optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 7 and optimizer._window.gram.pushed == 3


@pytest.mark.slow
def test_a_class_and_options_in_place_of_an_optimizer(tmp_path):
    """Trainer builds the optimizer, with its groups for decayed and other parameters; FSDP needs it this way."""
    model, twin = make_model(frozen=False), make_model(frozen=False)
    arguments = make_arguments(tmp_path, max_steps=3, weight_decay=0.1, save_strategy="no")
    trainer = Trainer(model, arguments, train_dataset=make_data(), optimizer_cls_and_kwargs=(MFAC, {"lr": 1e-3}))
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, MFAC) and optimizer.defaults["metric"] == "adam"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer._window.gram.pushed == 3

    decays = trainer.get_decay_parameter_names(twin)
    groups = [
        {"params": [p for name, p in twin.named_parameters() if name in decays], "weight_decay": 0.1},
        {"params": [p for name, p in twin.named_parameters() if name not in decays], "weight_decay": 0.0},
    ]
    Trainer(twin, arguments, train_dataset=make_data(), optimizers=(MFAC(groups, lr=1e-3), None)).train()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_loop_with_accelerate_is_the_plain_loop():
    """``accelerator.prepare``, with clipping, ends with the bits of torch alone."""
    accelerator, data = Accelerator(cpu=True), make_data()
    ends = []
    for prepare in (lambda *objects: objects, accelerator.prepare):
        model = make_model(frozen=False).eval()  # without dropout
        loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=default_data_collator)
        model, optimizer, loader = prepare(model, MFAC(model.parameters(), lr=1e-3), loader)
        for batch, _ in zip(loader, range(12), strict=False):
            loss = model(**batch).loss
            if prepare == accelerator.prepare:
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            else:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(ends[0], make_model(frozen=False).parameters(), strict=True))
