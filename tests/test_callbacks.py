"""The logging callback inside a real Trainer."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from mfac_hf import MFAC
from mfac_hf.callbacks import MFACLoggingCallback

KEYS = {"window_fill", "gram_condition", "skipped_steps", "jitter_escalations", "window_gib"}


class Line(nn.Module):
    """Linear regression with Trainer's calling convention."""

    def __init__(self):
        """Draw the weights."""
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x, labels):
        """Return the squared loss and the prediction."""
        prediction = self.linear(x).squeeze(-1)
        return {"loss": nn.functional.mse_loss(prediction, labels), "prediction": prediction}


class Reporter(TrainerCallback):
    """What a TensorBoard would have been handed."""

    def __init__(self):
        """Start with nothing seen."""
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Keep a copy of the log as it is now."""
        self.seen.append(dict(logs))


def make_trainer(directory, optimizer_type, callbacks, **options):
    """A Trainer of 6 steps that logs every second one, and the reporter that stands before ``callbacks``."""
    torch.manual_seed(0)
    model, reporter = Line(), Reporter()
    data = [{"x": torch.randn(3), "labels": torch.randn(())} for _ in range(12)]
    optimizer = (
        MFAC(model.parameters(), metric="identity", num_grads=4)
        if optimizer_type == "mfac"
        else torch.optim.AdamW(model.parameters())
    )
    args = TrainingArguments(
        output_dir=str(directory),
        max_steps=6,
        per_device_train_batch_size=2,
        logging_steps=2,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=data,
        optimizers=(optimizer, None),
        callbacks=[reporter, *callbacks],
    )
    return trainer, reporter


def test_each_training_log_carries_the_window(tmp_path):
    """The values are those of ``window_stats`` at that step."""
    trainer, _ = make_trainer(tmp_path, "mfac", [MFACLoggingCallback()])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [2, 4, 6]
    assert [log["mfac/window_fill"] for log in logs] == [0.5, 1.0, 1.0]
    assert all({key.removeprefix("mfac/") for key in log if key.startswith("mfac/")} == KEYS for log in logs)
    last = {key: logs[-1][f"mfac/{key}"] for key in KEYS}
    assert last == trainer.optimizer.optimizer.window_stats()
    assert last["window_gib"] > 0 and last["gram_condition"] >= 1 and last["skipped_steps"] == 0


def test_skipped_steps_show_in_the_log(tmp_path):
    """A gradient that is not finite is skipped by M-FAC, and the log says so."""
    trainer, _ = make_trainer(tmp_path, "mfac", [MFACLoggingCallback()], max_grad_norm=0.0)
    trainer.train_dataset[:] = [{**row, "x": torch.full((3,), float("inf"))} for row in trainer.train_dataset]
    with pytest.warns(UserWarning, match="finite"):
        trainer.train()
    assert trainer.state.log_history[0]["mfac/skipped_steps"] == 2


@pytest.mark.slow
def test_attached_in_front_it_reaches_reporters_too(tmp_path):
    """Given through ``callbacks=`` it comes after the reporters; attached, before them."""
    trainer, reporter = make_trainer(tmp_path, "mfac", [MFACLoggingCallback()])
    trainer.train()
    assert not any("mfac/window_fill" in log for log in reporter.seen)

    trainer, reporter = make_trainer(tmp_path, "mfac", [])
    callback = MFACLoggingCallback.attach(trainer)
    trainer.train()
    assert [log["mfac/window_fill"] for log in reporter.seen if "loss" in log] == [0.5, 1.0, 1.0]
    assert not vars(callback), "holds neither the trainer nor anything else"


def test_evaluation_metrics_stay_as_they_are(tmp_path):
    """``evaluate`` returns the dictionary that it logs."""
    trainer, _ = make_trainer(tmp_path, "mfac", [MFACLoggingCallback()], eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert not [key for key in trainer.evaluate() if "mfac" in key]


def test_other_optimizers_are_left_alone(tmp_path):
    """Nothing is added and nothing fails."""
    trainer, reporter = make_trainer(tmp_path, "adamw", [MFACLoggingCallback()])
    trainer.train()
    assert len(reporter.seen) == 4
    assert not [key for log in trainer.state.log_history for key in log if "mfac" in key]
