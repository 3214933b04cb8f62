"""Learning-rate cycles: the factor's formula, and schedulers that never see it."""

import math

import pytest
import torch
from transformers import TrainerCallback

from mfac_hf import MFACPruningCallback, SparsitySchedule
from mfac_hf.pruning.trainer.lr_cycle import LearningRateCycle
from tests.helpers.pruning_runs import make_trainer


def test_the_factor_falls_from_each_pruning_to_the_next():
    cycle = LearningRateCycle(0.2)
    cycle.begin([2, 6, 30], max_steps=10)
    factors = [cycle.factor(step) for step in range(10)]
    assert factors == pytest.approx([1, 1, 1, 0.8, 0.6, 0.4, 1, 0.8, 0.6, 0.4])
    assert cycle.factor(10) == 1.0
    cycle.begin([30], max_steps=10)
    assert [cycle.factor(step) for step in range(10)] == [1.0] * 10, "a schedule that never prunes has no cycles"


@pytest.mark.parametrize("lowest", [0.0, 1.0, -0.5, math.nan])
def test_bad_input(lowest):
    with pytest.raises(ValueError, match="lr_cycle is"):
        LearningRateCycle(lowest)


class LearningRates(TrainerCallback):
    """The learning rates that the optimizer steps with, and what is left on its groups afterwards."""

    def __init__(self, used, left):
        self.used, self.left = used, left

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.used.append([group["lr"] for group in optimizer.param_groups])

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        self.left.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler", [None, lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16)]
)
def test_cycles_multiply_what_the_scheduler_says(scheduler, tmp_path):
    """CosineAnnealingLR computes each rate from the one before, which it finds on the groups."""
    used, left, plain_used, plain_left = [], [], [], []
    plain = make_trainer(tmp_path, "adamw", scheduler=scheduler, save_strategy="no")
    plain.add_callback(LearningRates(plain_used, plain_left))
    plain.train()
    pruning = MFACPruningCallback(SparsitySchedule(((4, 0.2), (8, 0.5))), method="magnitude", lr_cycle=0.1)
    trainer = make_trainer(tmp_path, "adamw", [pruning], scheduler=scheduler, save_strategy="no", logging_steps=1)
    trainer.add_callback(LearningRates(used, left))
    trainer.train()
    assert left == plain_left, "the scheduler goes on as if there were no cycles"
    factors = [1] * 4 + [1 - 0.9 * i / 4 for i in range(4)] + [1 - 0.9 * i / 8 for i in range(8)]
    for (lr,), (plain_lr,), factor in zip(used, plain_used, factors, strict=True):
        assert lr == pytest.approx(factor * plain_lr, rel=1e-12)
    logged = [log["pruning/lr_factor"] for log in trainer.state.log_history if "loss" in log]
    assert logged == pytest.approx(factors)
    assert [log["learning_rate"] for log in trainer.state.log_history if "loss" in log] == [lr for (lr,) in plain_used]
