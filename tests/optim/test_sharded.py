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
        model.parameters(),
        metric="identity",
        lr=0.01,
        num_grads=4,
        damping=1e-3,
        momentum=0.5,
        weight_decay=0.1,
        normalize="count",
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


@pytest.fixture
def one_rank(tmp_path):
    """Ranks of one process: enough to place tensors on meshes."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def placed(shape, mesh_shape, *placements):
    from torch.distributed.tensor import distribute_tensor

    names = ("rows", "columns")[: len(mesh_shape)]
    mesh = dist.init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    return torch.nn.Parameter(distribute_tensor(torch.randn(shape), mesh, placements))


def refuse(params, message, **options):
    for p in params:
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in params]
    optimizer = MFAC(params, metric="identity", num_grads=2, **options)
    with pytest.raises(ValueError, match=f"{message}.*shard every parameter"):
        optimizer.step()
    assert optimizer._window is None and not optimizer.state
    for p, old in zip(params, before, strict=True):
        assert torch.equal(getattr(p, "_local_tensor", p), getattr(old, "_local_tensor", old))


def test_other_placements_are_refused_by_name(one_rank):
    from torch.distributed.tensor import Replicate, Shard

    def sharded(dim=0):
        return placed((4, 3), (1,), Shard(dim))

    plain = torch.nn.Parameter(torch.zeros(2))
    ordinary = r"of shape \(2,\) is an ordinary tensor"
    refuse([sharded(), plain], f"parameter 1 {ordinary}")
    refuse([plain, sharded()], f"parameter 0 {ordinary}")
    refuse([sharded(), placed((4, 3), (1,), Replicate())], "parameter 1 .* is not sharded but R")
    refuse([placed((4, 3), (1, 1), Replicate(), Shard(0))], "parameter 0 .* over a mesh of 2 dimensions")
    refuse([sharded(), placed((4, 3), (1, 1), Shard(1), Replicate())], "parameter 1 .* over a mesh of 2 dimensions")
    refuse([sharded()], "parameter 0 .* with process_group=<", process_group=dist.group.WORLD)
    plain.requires_grad_(False)
    plain.grad = None
    for good in ([sharded(), sharded(1)], [plain, sharded()]):  # frozen ones take no part
        for p in good:
            p.grad = None if p is plain else torch.ones_like(p)
        MFAC(good, metric="identity", num_grads=2).step()


def test_masks_of_sharded_parameters_are_refused(one_rank):
    from torch.distributed.tensor import Shard

    p = placed((4, 3), (1,), Shard(0))
    mask = torch.ones(4, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="masks of whole parameters"):
        MFAC([p], metric="identity", masks={p: mask})
    optimizer, whole = MFAC([p], metric="identity", num_grads=2), torch.nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="masks of whole parameters"):
        optimizer.set_masks({p: mask})
    with pytest.raises(ValueError, match="mask of parameter 0 .*sharded"):
        optimizer.load_state_dict(MFAC([whole], metric="identity", num_grads=2, masks={whole: mask}).state_dict())
