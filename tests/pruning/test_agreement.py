"""A rank that fails or dies within a pruning ends the others at once, and they say why."""

import os
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import default_data_collator

from mfac_hf import MFAC
from mfac_hf.pruning import MaskSet, PruningOptions, find_targets, prune_to
from mfac_hf.pruning.agreement import failing_together
from mfac_hf.pruning.gradients import DataLoaderGradients
from tests.helpers import ranks
from tests.helpers.pruning_runs import make_data, make_model

OPTIONS = PruningOptions(num_grads=8, block_size=16, recomputations=1)


def prune(loss_fn):
    model = make_model()
    before = [p.detach().clone() for p in model.parameters()]
    loader = DataLoader(make_data(), collate_fn=default_data_collator)
    group = dist.group.WORLD
    source = DataLoaderGradients.of_options(loader, OPTIONS, loss_fn, group)
    masks = MaskSet.dense(model, find_targets(model))
    try:
        prune_to(model, masks, source, 0.6, OPTIONS, progress=False, process_group=group)
    finally:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)), "all or nothing"


def train_with_nan(rank):
    """The loss of one rank is NaN in one step: all of them skip it, and stay alike."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 2)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = MFAC(model.parameters(), lr=1e-2, num_grads=4)
    for step in range(6):
        optimizer.zero_grad()
        loss = wrapped(torch.randn(3, 5, generator=torch.Generator().manual_seed(10 * step + rank))).square().mean()
        before = [p.detach().clone() for p in model.parameters()]
        (loss * (torch.nan if rank == 1 and step == 3 else 1.0)).backward()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "a gradient is not finite")
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) == (step == 3)
    assert optimizer.skipped_steps == 1
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    assert torch.equal(*both)


def fail_and_die(rank, directory):
    """First NaN on the second rank alone, in training and in a pruning, after which the group goes on; then a kill."""
    train_with_nan(rank)

    def is_nan(model, batch):
        return model(**batch).loss * (torch.nan if rank == 1 else 1.0)

    with pytest.raises((ValueError, RuntimeError)) as caught:
        prune(is_nan)
    said = [f"{type(caught.value).__name__}: {caught.value}"]
    with failing_together(dist.group.WORLD, "doing nothing"):
        pass
    dist.barrier()

    def dies(model, batch):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return model(**batch).loss

    begun = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        prune(dies)
    said += [str(caught.value), str(time.monotonic() - begun)]
    (directory / "said").write_text("\n".join(said))


@pytest.mark.slow
def test_a_rank_that_fails_or_dies_ends_the_others_with_the_reason(tmp_path):
    context = ranks.forked()  # not torch's start_processes: that ends the others itself
    arguments = (fail_and_die, f"file://{tmp_path / 'rendezvous'}", 2, (tmp_path,), dict(os.environ))
    processes = [context.Process(target=ranks._run, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    of_nan, of_death, seconds = (tmp_path / "said").read_text().splitlines()
    assert of_nan.startswith("RuntimeError: rank 1 failed taking gradients to prune by: ValueError: ")
    assert "nan" in of_nan
    assert of_death.startswith("another rank ended, or did not answer in time, taking gradients to prune by (")
    assert float(seconds) < 60, "the time limit of the group"


def test_without_a_group_an_exception_stays_what_it_is():
    with pytest.raises(KeyError, match="'own'"), failing_together(None, "anything"):
        raise KeyError("own")
