"""The loss curve of a run: what it holds, what its clocks leave out, and when it reaches a loss."""

import time

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from mfac_hf.training.curve import LossCurve, LossCurveCallback, final_loss, first_reach, running_mean


def curve_of(losses, every=1):
    return {"step": [every * (i + 1) for i in range(len(losses))], "loss": losses}


def test_the_running_mean_is_that_of_the_last_tenth():
    losses = torch.rand(100, generator=torch.Generator().manual_seed(0)).tolist()
    means = running_mean(curve_of(losses, every=3))  # 300 steps: a mean of 30 steps is one of 10 logs
    assert means[:9] == [None] * 9
    for i in range(9, 100):
        assert means[i] == pytest.approx(sum(losses[i - 9 : i + 1]) / 10)
    assert final_loss(curve_of(losses)) == means[-1]


def test_one_log_is_enough_and_a_loss_that_is_never_reached_is_none():
    assert running_mean(curve_of([0.5])) == [0.5] and final_loss(curve_of([0.5])) == 0.5
    assert first_reach(curve_of([0.5]), 0.4) is None
    assert first_reach(curve_of([float("nan")] * 3), 0.4) is None


def test_a_curve_reaches_its_own_last_mean_at_its_end_or_before():
    falling = curve_of([1 / (i + 1) for i in range(50)])
    assert first_reach(falling, running_mean(falling)[-1]) == 49
    bumpy = curve_of([*falling["loss"][:40], *[0.5] * 10])
    assert first_reach(bumpy, running_mean(bumpy)[-1]) < 10


def test_time_between_steps_does_not_count():
    recorder = LossCurve()
    for step in (1, 2):
        recorder.begin_step()
        time.sleep(0.05)
        recorder.end_step(torch.device("cpu"))
        recorder.add(step, 1.0)
        time.sleep(0.2)
    first, second = recorder.curve["seconds"]
    assert 0.05 <= first < second and second >= 0.1
    # Sleeping takes no CPU time, and the pauses would be half of the time of a run that counted them.
    assert recorder.curve["cpu_seconds"][-1] < 0.05 and second < 0.3


def test_a_loop_without_logs_has_means_of_several_steps():
    recorder = LossCurve()
    for loss in (1.0, 2.0, 3.0, 5.0, 9.0):
        recorder.add_step(loss, every=2)
    assert (recorder.curve["step"], recorder.curve["loss"]) == ([2, 4], [1.5, 4.0])


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x, labels):
        return {"loss": (self.weight * x).sum(1).sub(labels).square().mean()}


class SlowLog(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        time.sleep(0.1)


def test_a_trainer_records_every_log(tmp_path):
    data = [{"x": torch.full((3,), i / 10), "labels": torch.tensor(1.0)} for i in range(40)]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_steps=6,
        logging_steps=2,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=Model(), args=args, train_dataset=data, callbacks=[SlowLog()])
    curve = LossCurveCallback.attach(trainer).recorder.curve
    trainer.train()
    logged = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert list(zip(curve["step"], curve["loss"], strict=True)) == logged and curve["step"] == [2, 4, 6]
    assert curve["seconds"] == sorted(curve["seconds"]) and curve["cpu_seconds"][0] > 0
    assert curve["seconds"][-1] < 0.6, "the sleep of another callback counts"
