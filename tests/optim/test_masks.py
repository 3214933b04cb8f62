"""Masks, also ones that grow during training: the window is that of the kept coordinates alone."""

import copy

import pytest
import torch
from torch import nn

from mfac_hf import MFAC
from mfac_hf.fisher.columns import RowSparseColumns
from tests.helpers.oracles import NaiveMFAC
from tests.helpers.parameters import assert_same, make_params

VOCABULARY, WIDTH = 30, 3
SHAPES = ((4, 3), (5,), (2, 2))


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


@pytest.mark.parametrize("row_sparse", [True, False])
@pytest.mark.parametrize("when", [0, 3, 9])  # before the first step, in a window that fills, in a full one
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"grad_decay": 0.5, "normalize": "count"}])
def test_the_window_of_the_kept_coordinates(tables_of_any_size, row_sparse, when, options):
    """Two pruning steps on some parameters, against a naive optimizer whose stored rows lose the same coordinates."""
    model = Net()
    params = list(model.parameters())
    group = {"params": params, "lr": 0.05, "momentum": options.get("momentum", 0.0)}
    common = {"num_grads": 5, "damping": 1e-2, "grad_decay": options.get("grad_decay", 0.0)}
    common["normalize"] = options.get("normalize", "num_grads")
    naive = NaiveMFAC([group], **common)
    optimizer = MFAC([group], metric="identity", window_dtype=torch.float64, row_sparse=row_sparse, **common)

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
        assert_same(params, naive)

    assert any(isinstance(columns, RowSparseColumns) for columns in optimizer._window.columns) == row_sparse
    assert optimizer.state[model.hidden.weight]["window"].shape == (5, int(second[model.hidden.weight].sum()))
    dense = params if not row_sparse else params[1:]
    kept = sum(int(second[p].sum()) if p in second else p.numel() for p in dense)
    assert sum(columns.dim for columns in optimizer._window.columns if columns.dim != VOCABULARY * WIDTH) == kept
    for p, old in zip(params, before, strict=True):
        moved = p.detach() != old
        assert moved.any() and (p not in second or not moved[~second[p]].any())


def test_stored_gradients_are_those_that_came(tables_of_any_size):
    """Oldest first; zeros where a mask came later; of tables by rows too."""
    model = Net()
    optimizer = MFAC(model.parameters(), metric="identity", num_grads=4, window_dtype=torch.float64)
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
    monkeypatch.setattr("mfac_hf.fisher.dense.GRAM_ELEMENTS", 4100)
    p = nn.Parameter(torch.zeros(5000))
    optimizer = MFAC([p], metric="identity", num_grads=6, window_dtype=dtype)
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
    optimizer = MFAC(model.parameters(), metric="identity", lr=0.05, num_grads=4, momentum=0.9)
    for step in range(6):
        model.backward(step)
        optimizer.step()
    masks = random_masks([model.hidden.weight], 0.5)
    optimizer.set_masks(masks)
    model.backward(6)
    optimizer.step()
    twin.load_state_dict(model.state_dict())
    loaded = MFAC(twin.parameters(), metric="identity", lr=0.05, num_grads=4, momentum=0.9)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(loaded.state[twin.hidden.weight]["mask"], masks[model.hidden.weight])
    for step in range(7, 12):
        for net, steps in ((model, optimizer), (twin, loaded)):
            net.backward(step)
            steps.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_bad_masks_change_nothing(monkeypatch):
    model = Net()
    optimizer = MFAC(model.parameters(), metric="identity", num_grads=3, momentum=0.9)
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


def make_masks(params):
    generator = torch.Generator().manual_seed(7)
    return {i: torch.rand(params[i].shape, generator=generator) < 0.5 for i in (0, 2)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
)
def test_masks_equal_an_optimizer_of_the_kept_coordinates(options):
    """The masked weights here are not zero, so that decay would show; gradients are not zero there either."""
    params = make_params(SHAPES)
    masks = make_masks(params)
    naive = NaiveMFAC([{"params": params, "lr": 0.1, **options}], num_grads=4, damping=1e-2, masks=masks)
    optimizer = MFAC(
        params,
        metric="identity",
        lr=0.1,
        num_grads=4,
        damping=1e-2,
        window_dtype=torch.float64,
        masks={params[i]: mask for i, mask in masks.items()},
        **options,
    )
    before = [p.detach().clone() for p in params]
    for step in range(11):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        naive.step([p.grad for p in params])
        assert_same(params, naive)
    for i, mask in masks.items():
        assert torch.equal(params[i][~mask], before[i][~mask])
        assert not torch.isclose(params[i][mask], before[i][mask]).any()
        assert optimizer.state[params[i]]["window"].shape == (4, int(mask.sum()))
    kept = 5 + sum(int(mask.sum()) for mask in masks.values())
    assert (
        sum(columns.dim for columns in optimizer._window.columns) == kept and optimizer._window.nbytes == 4 * kept * 8
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_weights_keep_every_bit(momentum, dtype):
    """Also negative zeros, which a sum with zero may turn."""
    p = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype))
    with torch.no_grad():
        p[:8] = -0.0
    mask = torch.arange(64) % 2 == 0
    optimizer = MFAC(
        [p],
        metric="identity",
        lr=0.1,
        num_grads=3,
        momentum=momentum,
        weight_decay=0.5,
        decoupled_weight_decay=True,
        masks={p: mask},
    )
    bits = p.detach().view(torch.int32 if dtype == torch.float32 else torch.int16).clone()
    for step in range(6):
        p.grad = torch.randn(64, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.step()
    now = p.detach().view(bits.dtype)
    assert torch.equal(bits[~mask], now[~mask]) and not torch.equal(bits[mask], now[mask])


def test_mask_on_an_embedding_stored_by_rows(tables_of_any_size):
    model = Net()
    params = list(model.parameters())
    keep = torch.rand(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(1)) < 0.5
    group = {"params": params, "lr": 0.1, "momentum": 0.9}
    naive = NaiveMFAC([group], num_grads=4, damping=1e-2, masks={0: keep})
    optimizer = MFAC(
        [group], metric="identity", num_grads=4, damping=1e-2, window_dtype=torch.float64, masks={params[0]: keep}
    )
    before = model.words.weight.detach().clone()
    for step in range(9):
        grads = model.backward(step)
        optimizer.step()
        naive.step(grads)
        assert_same(params, naive)
    assert any(isinstance(columns, RowSparseColumns) for columns in optimizer._window.columns)
    assert torch.equal(model.words.weight[~keep], before[~keep])


def test_everything_masked():
    """A layer that was pruned away entirely, alone and beside others."""
    for others in ([], make_params(SHAPES)):
        gone = nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = MFAC(
            [gone, *others], metric="identity", lr=0.1, num_grads=3, masks={gone: torch.zeros(4, dtype=torch.bool)}
        )
        for _ in range(5):
            for p in (gone, *others):
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert torch.equal(gone, torch.ones(4)) and optimizer._window.gram.pushed == 5
        twin = MFAC(
            [gone, *others], metric="identity", lr=0.1, num_grads=3, masks={gone: torch.zeros(4, dtype=torch.bool)}
        )
        twin.load_state_dict(optimizer.state_dict())
        twin.step()
        assert twin._window.gram.pushed == 6


def test_a_mask_is_the_optimizers_own():
    """Changing the tensor that was passed must not shift columns under the window."""
    p = nn.Parameter(torch.zeros(4))
    mask = torch.tensor([True, False, True, True])
    optimizer = MFAC([p], metric="identity", lr=0.1, num_grads=3, masks={p: mask})
    p.grad = torch.ones(4)
    optimizer.step()
    mask.fill_(True)
    optimizer.step()
    assert p[1] == 0.0 and optimizer.state[p]["mask"].tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, dtype=torch.bool), r"shape \(4,\).*\(3, 2\).*bool tensor of the parameter's shape"),
        (torch.ones(2, 3, dtype=torch.bool), r"shape \(2, 3\)"),
        (torch.ones(3, 2), "dtype torch.float32"),
        (torch.ones(3, 2, dtype=torch.uint8), "dtype torch.uint8"),
    ],
)
def test_bad_masks(mask, message):
    p = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=message):
        MFAC([p], metric="identity", masks={p: mask})


def test_mask_of_an_unknown_parameter():
    p, other = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"mask for a parameter of shape \(2, 2\) that this optimizer does not have"):
        MFAC([p], metric="identity", masks={other: torch.ones(2, 2, dtype=torch.bool)})
