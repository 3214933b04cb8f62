"""MFAC: losses, weights and state, with each option; resuming, copying, masking; ranks that share a window."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from mfac_hf import MFAC
from scenarios.common import identity

__all__ = ["adams_metric", "copies", "masks_while_training", "options", "ranks", "resume"]

OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"window_dtype": torch.bfloat16},
    "float64": {"window_dtype": torch.float64},
    "momentum": {"momentum": 0.9},
    "weight decay": {"weight_decay": 0.1},
    "decoupled weight decay": {"weight_decay": 0.1, "decoupled_weight_decay": True, "window_dtype": torch.bfloat16},
    "count": {"normalize": "count"},
    "grad decay": {"grad_decay": 0.9, "momentum": 0.5},
    "dense embedding": {"row_sparse": False},
    "one gradient": {"num_grads": 1},
    "split": {"window_device": ["cpu", "cpu"]},
    "small damping": {"damping": 1e-9},
}


ADAM: dict[str, dict[str, Any]] = {
    "bfloat16": {"window_dtype": torch.bfloat16},
    "float32": {"window_dtype": torch.float32},
    "decay": {"weight_decay": 0.1, "betas": (0.5, 0.9)},
    "dense embedding": {"row_sparse": False},
    "split": {"window_device": ["cpu", "cpu"]},
}


class Net(nn.Module):
    """An embedding whose gradients have few rows, dense layers, a number, and a layer that gets its gradients late."""

    def __init__(self, seed: int = 0, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(5000, 8, sparse=sparse)
        self.hidden = nn.Linear(8, 72)
        self.late = nn.Linear(72, 72)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.head = nn.Linear(72, 3)

    def forward(self, ids: Tensor, late: bool) -> Tensor:
        """Logits of a batch."""
        hidden = self.hidden(self.words(ids).mean(1)).tanh()
        return self.head(self.late(hidden) if late else hidden) * self.scale


def make(seed: int = 0, masked: bool = False, sparse: bool = False, **options: Any) -> tuple[Net, MFAC]:
    """A network and its optimizer, in two parameter groups."""
    net = Net(seed, sparse)
    groups = [
        {"params": [p for p in net.parameters() if p.ndim > 1], "lr": 2e-3},
        {"params": [p for p in net.parameters() if p.ndim < 2]},
    ]
    masks = masks_of(net, 0.6) if masked else None
    return net, MFAC(
        groups, **{**identity(MFAC), "lr": 1e-3, "num_grads": 6, "damping": 1e-3, "masks": masks, **options}
    )


def masks_of(net: Net, share: float) -> dict[Tensor, Tensor]:
    """Masks of a matrix and of the embedding; those of a smaller share are subsets."""
    generator = torch.Generator().manual_seed(11)
    return {p: torch.rand(p.shape, generator=generator) < share for p in (net.late.weight, net.words.weight)}


def train(net: Net, optimizer: MFAC, steps: range, poison: int | None = None) -> list[Tensor]:
    """Losses of some steps; at step ``poison`` the gradients are not finite."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids, labels = torch.randint(5000, (4, 6), generator=generator), torch.randint(3, (4,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(ids, late=step > 2), labels)
        loss.backward()
        if step == poison:
            net.scale.grad = torch.full_like(net.scale, torch.nan)
        optimizer.step()
        losses.append(loss.detach())
    return losses


def outcome(net: Net, optimizer: MFAC, losses: list[Tensor]) -> dict[str, Any]:
    """All that a run leaves behind."""
    stats = optimizer.window_stats()
    return {
        "losses": losses,
        "weights": net.state_dict(),
        "state": optimizer.state_dict()["state"],
        "stored": [optimizer.stored_gradients(p) for p in (net.hidden.weight, net.words.weight)],
        "stats": stats,
        "skipped": optimizer.skipped_steps,
    }


def options(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """Each option by itself, 14 steps through a window of 6, one of which is skipped."""
    found = {}
    for name, given in OPTIONS.items():
        for masked in (False, True):
            net, optimizer = make(masked=masked, **given)
            losses = train(net, optimizer, range(14), poison=9)
            found[f"{name}, masked" if masked else name] = outcome(net, optimizer, losses)
    net, optimizer = make(sparse=True)
    found["sparse gradients"] = outcome(net, optimizer, train(net, optimizer, range(14)))
    return found


def adams_metric(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """Adam's metric, 14 steps through a window of 6, one of which is skipped."""
    found = {}
    for name, given in ADAM.items():
        for masked in (False, True):
            net, optimizer = make(masked=masked, **{"metric": "adam", "damping": 0.3, **given})
            losses = train(net, optimizer, range(14), poison=9)
            found[f"{name}, masked" if masked else name] = outcome(net, optimizer, losses)
    return found


def resume(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """Training goes on from a checkpoint of the older revision."""
    found = {}
    for name in ("float32", "bfloat16", "momentum", "grad decay", "split"):
        for masked in (False, True):
            path = exchange / f"optimizer {name} {masked}.pt"
            if not path.exists():
                net, optimizer = make(masked=masked, **OPTIONS[name])
                train(net, optimizer, range(8))
                torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, path)
            saved = torch.load(path)
            net, optimizer = make(seed=1, masked=masked, **OPTIONS[name])
            net.load_state_dict(saved["net"])
            optimizer.load_state_dict(saved["optimizer"])
            found[f"{name} {masked}"] = outcome(net, optimizer, train(net, optimizer, range(8, 16)))
    return found


def copies(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """A deep copy in the middle of training goes its own way."""
    net, optimizer = make(masked=True, momentum=0.9)
    train(net, optimizer, range(8))
    both = copy.deepcopy((net, optimizer))
    found = {"copy": outcome(*both, train(*both, range(8, 12)))}
    return found | {"original": outcome(net, optimizer, train(net, optimizer, range(8, 16)))}


def masks_while_training(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """`MFAC.set_masks` shrinks the window twice; then parameters join."""
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        net, optimizer = make(momentum=0.9, window_dtype=dtype)
        losses = train(net, optimizer, range(8))
        for i, share in enumerate((0.7, 0.3)):
            optimizer.set_masks(masks_of(net, share))
            losses += train(net, optimizer, range(8 + 4 * i, 12 + 4 * i))
        net.extra = nn.Parameter(torch.ones(5))
        optimizer.add_param_group({"params": [net.extra], "lr": 0.5})
        net.extra.grad = torch.linspace(-1, 1, 5)
        losses += train(net, optimizer, range(16, 20))
        found[name] = outcome(net, optimizer, losses)
    return found


def ranks(root: Path, folder: Path, exchange: Path) -> dict[str, Any]:
    """Two processes: one window over a process group, and FSDP2."""
    mp.spawn(_rank, args=(folder,), nprocs=2)
    return {f"rank {rank}": torch.load(folder / f"{rank}.pt") for rank in range(2)}


def _rank(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    net = Net()
    optimizer = MFAC(
        net.parameters(), **identity(MFAC), num_grads=6, damping=1e-3, momentum=0.5, process_group=dist.group.WORLD
    )
    found: dict[str, Any] = {
        "process group": {"losses": train(net, optimizer, range(10)), "weights": net.state_dict()}
    }
    net = Net()
    mesh = dist.init_device_mesh("cpu", (2,))
    fully_shard(net, mesh=mesh)
    optimizer = MFAC(net.parameters(), **identity(MFAC), num_grads=6, damping=1e-3, momentum=0.5)
    losses = train(net, optimizer, range(10))
    weights = [p.full_tensor().detach() for p in net.parameters()]
    found["fsdp"] = {"losses": losses, "weights": weights}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
