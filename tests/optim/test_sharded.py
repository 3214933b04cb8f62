"""Parameters placed on meshes of ranks: each number counts once, and the steps are those of one process."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist

from mfac_hf import MFAC
from mfac_hf.optim import placement
from tests.helpers.ranks import run_on_ranks

STEPS, RANKS = 7, 4
VARIANTS = {
    "adam": {"metric": "adam", "lr": 1e-3, "num_grads": 4, "weight_decay": 0.1, "window_dtype": torch.float64},
    "identity": {
        **{"metric": "identity", "lr": 0.01, "num_grads": 4, "damping": 1e-3, "momentum": 0.5, "weight_decay": 0.1},
        **{"normalize": "count", "window_dtype": torch.float64},
    },
}


class Net(torch.nn.Module):
    """A table whose gradients have few rows, and layers whose 7 and 3 rows do not divide by two or four."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(300, 6)
        self.first = torch.nn.Linear(6, 8)
        self.norm = torch.nn.LayerNorm(6)
        self.second = torch.nn.Linear(8, 6)
        self.uneven = torch.nn.Linear(6, 7)
        self.head = torch.nn.Linear(7, 3)
        self.double()

    def forward(self, ids):
        hidden = self.norm(self.second(self.first(self.words(ids).mean(1)).tanh())).tanh()
        return self.head(self.uneven(hidden).tanh())


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(300, (8, 2), generator=generator), torch.randint(0, 3, (8,), generator=generator)


def train(model, optimizer, steps=range(STEPS), poison=None, before_step=None):
    for step in steps:
        inputs, labels = batch(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        if step == poison:
            next(model.parameters()).grad.mul_(float("nan"))
        if before_step is not None:
            before_step(model)
        optimizer.step()


def whole(p):
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()


def fsdp(mesh, ignored=()):
    from torch.distributed.fsdp import fully_shard

    def shard(model):
        ignored_params = {getattr(model, name).weight for name in ignored} | {getattr(model, n).bias for n in ignored}
        for layer in (model.first, model.uneven):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh, ignored_params=ignored_params)

    return shard


def tensor_parallel(mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return lambda model: parallelize_module(model, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})


def both(mesh):
    return lambda model: fsdp(mesh["data"])(tensor_parallel(mesh["tensor"])(model))


def average(*names):
    """Reduce the gradients that FSDP2 leaves alone."""

    def reduce(model):
        for name in names:
            for p in getattr(model, name).parameters():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()

    return reduce


def assert_same(model, expected):
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(
            whole(found), wanted.detach(), rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_ranks_agree(model):
    """What ranks have copies of is the same to the bit."""
    flat = torch.cat([whole(p).flatten() for p in model.parameters()])
    every = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(every, flat)
    assert all(torch.equal(every[0], other) for other in every)


def check_steps(shard, options, before_step=None):
    """Sharded in this way, a model takes the steps of one process."""
    expected = Net()
    train(expected, MFAC(expected.parameters(), **options))
    model = shard(Net())
    optimizer = MFAC(model.parameters(), **options)
    train(model, optimizer, before_step=before_step)
    assert_same(model, expected)
    assert_ranks_agree(model)
    return model, optimizer


def check_memory(optimizer):
    """Each rank keeps its shards, and some shards of the embedding by the rows that batches touched."""
    held = torch.tensor([sum(s[k][0].numel() for s in optimizer.state.values() for k in ("window",) if k in s)])
    tables = torch.tensor([sum("window_rows" in state for state in optimizer.state.values())])
    dense = sum(p.numel() for group in optimizer.param_groups for p in group["params"] if p.shape != (300, 6))
    dist.all_reduce(tables)
    assert tables >= 1
    assert held <= (0.35 if int(tables) == RANKS else 10) * dense


def check_bad_gradients(model, optimizer):
    """One rank's bad gradient makes all skip."""
    before = [whole(p) for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a gradient is not finite")
        train(model, optimizer, steps=[STEPS], poison=STEPS)
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(whole(p), old) for p, old in zip(model.parameters(), before, strict=True))


def check_disk(shard, options, folder, others):
    """Written by these ranks; read by as many to the bit, and onto other layouts to rounding."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = shard(Net())
    optimizer = MFAC(model.parameters(), **options)
    train(model, optimizer)
    assert optimizer.write_window(folder)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    weights = [whole(p) for p in model.parameters()]
    train(model, optimizer, steps=range(STEPS, STEPS + 4))
    for name, place in {"itself": shard, **others}.items():
        again = Net()
        with torch.no_grad():
            for p, value in zip(again.parameters(), weights, strict=True):
                p.copy_(value)
        again = place(again)
        loaded = MFAC(
            again.parameters(), **{**options, "process_group": dist.group.WORLD if name == "shared" else None}
        )
        if name == "itself":
            set_optimizer_state_dict(again, loaded, saved)
        elif options["metric"] == "identity":
            continue  # the momentum is in the state
        loaded.read_window(folder)
        train(again, loaded, steps=range(STEPS, STEPS + 4))
        if name == "itself":
            assert all(
                torch.equal(whole(p), whole(q)) for p, q in zip(again.parameters(), model.parameters(), strict=True)
            )
        for p, q in zip(again.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(whole(p), whole(q), rtol=1e-10, atol=1e-10)
    other = Net()
    with pytest.raises(ValueError, match="had the norm .* load the weights of the same checkpoint first"):
        MFAC(other.parameters(), **options, process_group=None).read_window(folder)


def check_refused(mesh):
    """Gradients that differ between ranks are refused by the parameter's name, on every rank."""
    model = fsdp(mesh, ignored=("head",))(Net())
    optimizer = MFAC(model.named_parameters(), **VARIANTS["adam"])
    local_batches = range(dist.get_rank(), dist.get_rank() + 1)
    with pytest.raises(ValueError, match=r"gradients of other norms: that of parameter head\.\w+ .*ignored_params"):
        train(model, optimizer, steps=local_batches)
    model = fsdp(mesh)(Net())
    optimizer = MFAC(model.named_parameters(), **VARIANTS["adam"])

    def forget(model):
        if dist.get_rank() == 1:
            model.uneven.bias.grad = None

    with pytest.raises(ValueError, match=r"parameter uneven\.bias .*has a gradient on ranks \[0, 2, 3\] alone"):
        train(model, optimizer, before_step=forget)
    assert optimizer._window is None


def check_all(rank, folder):
    placement.ROW_SPARSE_MIN_NUMEL = 1
    line = dist.init_device_mesh("cpu", (RANKS,))
    square = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for name, options in VARIANTS.items():
        model, optimizer = check_steps(fsdp(line), options)
        if name == "adam":  # coupled weight decay makes the embedding's gradients dense
            check_memory(optimizer)
        check_bad_gradients(model, optimizer)
        check_steps(fsdp(square), options)  # HSDP
        check_steps(fsdp(line, ignored=("norm", "head")), options, average("norm", "head"))
        check_steps(tensor_parallel(line), options)
        check_steps(both(square), options)
        check_disk(
            fsdp(line), options, folder / name, {"HSDP": fsdp(square), "whole": lambda m: m, "shared": lambda m: m}
        )
        check_disk(fsdp(square), options, folder / f"{name}-square", {"FSDP2": fsdp(line)})
        check_disk(both(square), options, folder / f"{name}-both", {"FSDP2": fsdp(line)})
    check_refused(line)


@pytest.mark.slow
def test_four_ranks(tmp_path):
    """All in one start of the processes, which takes longer than what they do."""
    run_on_ranks(check_all, tmp_path, tmp_path, ranks=RANKS)


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
        if not any(placement.is_partial() for placement in getattr(p, "placements", ())):
            p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in params]
    optimizer = MFAC(params, metric="identity", num_grads=2, **options)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert optimizer._window is None and not optimizer.state
    for p, old in zip(params, before, strict=True):
        assert torch.equal(getattr(p, "_local_tensor", p), getattr(old, "_local_tensor", old))


def test_what_cannot_be_counted_is_refused_by_name(one_rank, monkeypatch):
    from torch.distributed.tensor import DTensor, Partial, Shard

    def sharded(dim=0):
        return placed((4, 3), (1,), Shard(dim))

    refuse([sharded()], "parameter 0 .* with process_group=<", process_group=dist.group.WORLD)
    mesh = dist.init_device_mesh("cpu", (1,))
    terms = torch.nn.Parameter(DTensor.from_local(torch.zeros(3), mesh, [Partial()]))
    refuse([sharded(), terms], "parameter 1 .*have terms of a sum")
    p = sharded()
    p.grad = torch.ones_like(p)
    monkeypatch.setattr("mfac_hf.optim.sharded.local", lambda tensor: tensor.to_local()[:2])  # the rest is nowhere
    with pytest.raises(ValueError, match="parameter 0 .* 12 numbers, and the ranks together count 6"):
        MFAC([p], metric="identity", num_grads=2).step()
    monkeypatch.undo()
    plain = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
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
    optimizer, whole_one = MFAC([p], metric="identity", num_grads=2), torch.nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="masks of whole parameters"):
        optimizer.set_masks({p: mask})
    with pytest.raises(ValueError, match="mask of parameter 0 .*sharded"):
        optimizer.load_state_dict(
            MFAC([whole_one], metric="identity", num_grads=2, masks={whole_one: mask}).state_dict()
        )
