"""Gradual pruning under DistributedDataParallel: each rank takes a share of the gradients, and all prune alike."""

import os

import pytest
import torch
import torch.distributed as dist
from pruning_runs import make_trainer
from ranks import run_on_ranks

from mfac_hf import MFACPruningCallback, SparsitySchedule

FAST = {"num_grads": 9, "block_size": 16, "recomputations": 2}


def assert_ranks_agree(tensors):
    flat = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    assert torch.equal(*both)


def train(rank, directory):
    rank_variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in rank_variables.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # asked for, not used: the group exists
    for optimizer, gradients in (("adamw", "data"), ("mfac", "optimizer")):
        options = {**FAST, "gradients": gradients, "num_grads": 3 if gradients == "optimizer" else 9}
        pruning = MFACPruningCallback(SparsitySchedule(((3, 0.4), (6, 0.7))), evaluate=True, **options)
        trainer = make_trainer(
            directory / optimizer, optimizer, [pruning], max_steps=8, eval_on_start=True, gradient_accumulation_steps=1
        )
        assert trainer.args.world_size == 2
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        assert_ranks_agree(trainer.model.parameters())
        assert_ranks_agree(pruning.masks.values())
        assert pruning.sparsity == pytest.approx(0.7, abs=1e-3) and len(pruning.reports) == 2
        losses = [log["pruning/loss_after"] for log in trainer.state.log_history if "pruning/loss_after" in log]
        assert len(losses) == 2
        assert_ranks_agree([torch.tensor(losses)])
        assert (directory / optimizer / "checkpoint-8" / "masks.safetensors").is_file()


@pytest.mark.slow
def test_two_ranks_prune_alike(tmp_path):
    run_on_ranks(train, tmp_path, tmp_path)
