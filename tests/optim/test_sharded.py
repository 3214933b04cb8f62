"""FSDP2: every rank keeps the columns of its shards, and the steps are those of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mfac_hf import MFAC

STEPS = 7


def small_model():
    torch.manual_seed(0)
    # 7 and 3 rows do not divide by two: the ranks' shards differ, and one of the last bias is smaller
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def train(model, optimizer, steps=range(STEPS), poison=None):
    for step in steps:
        inputs, labels = batch(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        if step == poison:
            next(model.parameters()).grad.mul_(float("nan"))
        optimizer.step()


def make_optimizer(model):
    return MFAC(
        model.parameters(), lr=0.01, num_grads=4, damping=1e-3, momentum=0.5, weight_decay=0.1, normalize="count"
    )


def worker(rank, path, results):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = small_model()
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = make_optimizer(model)
    train(model, optimizer)
    results[rank] = [p.full_tensor().detach().clone() for p in model.parameters()]
    train(model, optimizer, steps=range(STEPS, STEPS + 1), poison=STEPS)
    results[f"skipped{rank}"] = optimizer.skipped_steps
    results[f"unchanged{rank}"] = all(
        torch.equal(p.full_tensor(), before) for p, before in zip(model.parameters(), results[rank], strict=True)
    )
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = make_optimizer(model)
    set_optimizer_state_dict(model, other, saved)
    results[f"momentum{rank}"] = all(
        torch.equal(
            optimizer.state[p]["momentum_buffer"].full_tensor(), other.state[p]["momentum_buffer"].full_tensor()
        )
        for p in model.parameters()
    )
    results[f"refills{rank}"] = other.window_stats()["window_fill"]
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards_take_the_steps_of_one_process(tmp_path):
    expected = small_model()
    train(expected, make_optimizer(expected))
    results = mp.Manager().dict()
    mp.spawn(worker, args=(tmp_path / "rendezvous", results), nprocs=2)
    for rank in range(2):
        for found, wanted in zip(results[rank], expected.parameters(), strict=True):
            torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-6)
        # one rank's bad gradient makes both skip
        assert results[f"skipped{rank}"] == 1
        assert results[f"unchanged{rank}"]
        assert results[f"momentum{rank}"]
        assert results[f"refills{rank}"] == 0.0
