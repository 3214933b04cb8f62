"""Gradual pruning under DistributedDataParallel: each rank takes a share of the gradients, and all prune alike."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import default_data_collator

from mfac_hf import MFACPruningCallback, SparsitySchedule
from mfac_hf.pruning import MaskSet, PruningOptions, find_targets, prune_to
from mfac_hf.pruning.gradients import DataLoaderGradients
from tests.helpers.pruning_runs import make_data, make_model, make_trainer
from tests.helpers.ranks import run_on_ranks

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


def prune(rank):
    """What two ranks make of their shares, beside what one process makes of all gradients."""
    batches = {"num_grads": 20, "grad_batch_size": 2, "damping": "auto", "loss_samples": 8}
    for options in ({}, batches, {"fisher": "empirical"}):
        options = PruningOptions(**{**FAST, **options})
        results = []
        for group in (dist.group.WORLD, None):
            model = make_model()
            source = DataLoaderGradients(
                DataLoader(make_data(), collate_fn=default_data_collator),
                fisher=options.fisher,
                batch_size=options.grad_batch_size,
                loss_samples=options.loss_samples,
                process_group=group,
            )
            masks = MaskSet.dense(model, find_targets(model))
            report = prune_to(model, masks, source, 0.6, options, progress=False, process_group=group)
            results.append((model, masks, report))
            seen = []
            source.collect(model, find_targets(model), 9, 0, lambda name, rows, seen=seen: seen.append(len(rows)))
            if group is not None:
                with pytest.raises(ValueError, match="1 gradients for 2 ranks"):
                    source.check(1)
            assert sum(seen) == len(masks) * (9 if group is None else 4 + rank), "the work is shared"
        (shared, shared_masks, report), (alone, alone_masks, alone_report) = results
        assert_ranks_agree(shared.parameters())
        assert shared_masks == alone_masks and report.sparsity == alone_report.sparsity
        # 1e-4: sums in another order, and blocks in the other of two exact forms
        for p, q in zip(shared.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def prune_and_train(rank, directory):
    prune(rank)
    train(rank, directory)


@pytest.mark.slow
def test_ranks_share_the_work_and_prune_alike(tmp_path):
    """Both in one pair of processes, which take long to start."""
    run_on_ranks(prune_and_train, tmp_path, tmp_path)
