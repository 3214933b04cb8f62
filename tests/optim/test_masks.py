"""Masks that grow during training: the window becomes that of the kept coordinates, as if it had never held others."""

import copy

import pytest
import torch
from torch import nn

from mfac_hf import MFAC
from mfac_hf.fisher.columns import RowSparseColumns
from mfac_hf.optim import placement
from tests.helpers.oracles import NaiveMFAC

VOCABULARY, WIDTH = 30, 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, 4)
        self.head = nn.Linear(4, 2)
        self.double()

    def backward(self, step):
        self.zero_grad()
        ids = torch.randint(VOCABULARY, (4,), generator=torch.Generator().manual_seed(step))
        self.head(self.hidden(self.words(ids).mean(0)).tanh()).square().sum().backward()
        return [p.grad.clone() for p in self.parameters()]


def random_masks(params, keep, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {p: torch.rand(p.shape, generator=generator) < keep for p in params}


def assert_follows(params, naive):
    for p, expected in zip(params, naive.params, strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("row_sparse", [True, False])
@pytest.mark.parametrize("when", [0, 3, 9])  # before the first step, in a window that fills, in a full one
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"grad_decay": 0.5, "normalize": "count"}])
def test_the_window_of_the_kept_coordinates(monkeypatch, row_sparse, when, options):
    """Two pruning steps on some parameters, against a naive optimizer whose stored rows lose the same coordinates."""
    monkeypatch.setattr(placement, "ROW_SPARSE_MIN_NUMEL", 1)
    model = Net()
    params = list(model.parameters())
    group = {"params": params, "lr": 0.05, "momentum": options.get("momentum", 0.0)}
    common = {"num_grads": 5, "damping": 1e-2, "grad_decay": options.get("grad_decay", 0.0)}
    common["normalize"] = options.get("normalize", "num_grads")
    naive = NaiveMFAC([group], **common)
    optimizer = MFAC([group], window_dtype=torch.float64, row_sparse=row_sparse, **common)

    first = random_masks([model.words.weight, model.hidden.weight], 0.7)
    second = {p: mask & random_masks([p], 0.6, seed=1)[p] for p, mask in first.items()}
    second |= random_masks([model.head.bias], 0.5, seed=3)

    def prune(masks):
        optimizer.set_masks(masks)
        naive.masks |= {i: masks[p] for i, p in enumerate(params) if p in masks}
        kept = torch.cat([naive.masks.get(i, torch.ones_like(p)).flatten().double() for i, p in enumerate(params)])
        naive.rows = [row * kept for row in naive.rows]
        naive.velocities = [v * naive.masks.get(i, 1.0) for i, v in enumerate(naive.velocities)]

    for step in range(when + 8):
        if step == when:
            prune(first)
        if step == when + 4:
            prune(second)
            before = [p.detach().clone() for p in params]
        grads = model.backward(step)
        optimizer.step()
        naive.step(grads)
        assert_follows(params, naive)

    assert any(isinstance(columns, RowSparseColumns) for columns in optimizer._window.columns) == row_sparse
    assert optimizer.state[model.hidden.weight]["window"].shape == (5, int(second[model.hidden.weight].sum()))
    dense = params if not row_sparse else params[1:]
    kept = sum(int(second[p].sum()) if p in second else p.numel() for p in dense)
    assert sum(columns.dim for columns in optimizer._window.columns if columns.dim != VOCABULARY * WIDTH) == kept
    for p, old in zip(params, before, strict=True):
        moved = p.detach() != old
        assert moved.any() and (p not in second or not moved[~second[p]].any())


def test_stored_gradients_are_those_that_came(monkeypatch):
    """Oldest first; zeros where a mask came later; of tables by rows too."""
    monkeypatch.setattr(placement, "ROW_SPARSE_MIN_NUMEL", 1)
    model = Net()
    optimizer = MFAC(model.parameters(), num_grads=4, window_dtype=torch.float64)
    with pytest.raises(ValueError, match="holds no gradient of a parameter of shape"):
        optimizer.stored_gradients(model.head.weight)
    history = []
    for step in range(7):
        history.append(model.backward(step))
        optimizer.step()
        for i, p in enumerate(model.parameters()):
            expected = torch.stack([grads[i].flatten() for grads in history[-4:]])
            assert torch.equal(optimizer.stored_gradients(p), expected)
    masks = random_masks([model.words.weight, model.hidden.weight], 0.5)
    optimizer.set_masks(masks)
    for i, p in enumerate(model.parameters()):
        expected = torch.stack([grads[i].flatten() for grads in history[-4:]])
        assert torch.equal(optimizer.stored_gradients(p), expected * masks[p].flatten() if p in masks else expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_matrix_after_shrinking(monkeypatch, dtype):
    """Against the stored, rounded rows in float64, by chunks of 683 columns."""
    monkeypatch.setattr("mfac_hf.fisher.columns.GRAM_ELEMENTS", 4100)
    p = nn.Parameter(torch.zeros(5000))
    optimizer = MFAC([p], num_grads=6, window_dtype=dtype)
    for step in range(8):
        p.grad = torch.randn(5000, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    rows = optimizer.stored_gradients(p).double().roll(8 % 6, 0)  # from oldest first to their places in the window
    keep = torch.arange(5000) % 5 < 3
    optimizer.set_masks({p: keep})
    assert optimizer._window.nbytes == 6 * 3000 * dtype.itemsize
    torch.testing.assert_close(optimizer._window.gram.gram_MM, (rows * keep) @ (rows * keep).T, rtol=1e-12, atol=1e-12)


def test_a_checkpoint_brings_its_masks_along():
    """Into an optimizer built without masks, as when Trainer resumes a run that prunes; to the bit."""
    model, twin = Net(), Net()
    optimizer = MFAC(model.parameters(), lr=0.05, num_grads=4, momentum=0.9)
    for step in range(6):
        model.backward(step)
        optimizer.step()
    masks = random_masks([model.hidden.weight], 0.5)
    optimizer.set_masks(masks)
    model.backward(6)
    optimizer.step()
    twin.load_state_dict(model.state_dict())
    loaded = MFAC(twin.parameters(), lr=0.05, num_grads=4, momentum=0.9)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(loaded.state[twin.hidden.weight]["mask"], masks[model.hidden.weight])
    for step in range(7, 12):
        for net, steps in ((model, optimizer), (twin, loaded)):
            net.backward(step)
            steps.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_bad_masks_change_nothing(monkeypatch):
    model = Net()
    optimizer = MFAC(model.parameters(), num_grads=3, momentum=0.9)
    weight = model.hidden.weight
    for step in range(4):
        model.backward(step)
        optimizer.step()
    keep = random_masks([weight], 0.5)
    optimizer.set_masks(keep)
    window = optimizer.state[weight]["window"].clone()
    bad = {
        "that this optimizer does not have": {weight.detach().clone(): keep[weight]},
        r"a mask of shape \(3,\) and dtype torch.bool": {weight: torch.ones(3, dtype=torch.bool)},
        "dtype torch.float32": {weight: torch.ones_like(weight, dtype=torch.float32)},
        "coordinates that are masked already": {weight: torch.ones_like(weight, dtype=torch.bool)},
    }
    for message, masks in bad.items():
        with pytest.raises(ValueError, match=message):
            optimizer.set_masks({model.head.weight: torch.zeros_like(model.head.weight, dtype=torch.bool)} | masks)
    smaller = {weight: torch.zeros_like(weight, dtype=torch.bool)}

    def refuse(*_):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("mfac_hf.optim.masks.require_memory", refuse)
        with pytest.raises(MemoryError, match="no room"):
            optimizer.set_masks(smaller)
    assert torch.equal(optimizer.state[weight]["window"], window)
    assert torch.equal(optimizer.state[weight]["mask"], keep[weight])
    assert "mask" not in optimizer.state[model.head.weight]
    optimizer.set_masks(smaller)
    assert optimizer.state[weight]["window"].shape == (3, 0)
