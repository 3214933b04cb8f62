"""Where parameters get their columns: embeddings by rows, several devices. None of it changes the steps."""

import copy

import pytest
import torch
from torch import nn

from mfac_hf import MFAC
from mfac_hf.fisher import dense, streaming
from mfac_hf.fisher.columns import DenseColumns, RowSparseColumns
from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.optim.placement import DensePlacement, TablePlacement, first_bytes, nonzero_rows, place
from tests.helpers.lanes import DisorderedLane
from tests.helpers.oracles import NaiveMFAC
from tests.helpers.parameters import assert_same, make_params

VOCABULARY, WIDTH = 24, 3
EXTRA_SHAPES = ((4, 3), (5,), (2, 2))


class Bag(nn.Module):
    """Mean of embeddings, then a linear layer."""

    def __init__(self, sparse=False, dtype=torch.float64, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCABULARY, WIDTH, sparse=sparse)
        self.head = nn.Linear(WIDTH, VOCABULARY if tied else 2)
        self.to(dtype)
        self.tied = tied

    def forward(self, ids):
        hidden = self.words(ids).mean(0)
        return (self.words.weight @ hidden if self.tied else self.head(hidden)).square().sum()

    def backward(self, step, count=4):
        self.zero_grad()
        ids = torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(step))
        self(ids).backward()
        return [p.grad for p in self.parameters()]


def stores(optimizer):
    return [type(columns) for columns in optimizer._window.columns]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("row_sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_embedding_gradients_by_rows(tables_of_any_size, momentum, sparse, row_sparse, dtype):
    """Dense gradients, those of nn.Embedding(sparse=True), and dense storage: the same steps."""
    model = Bag(sparse, dtype)
    options = {"num_grads": 6, "damping": 1e-2}
    naive = NaiveMFAC([{"params": list(model.parameters()), "lr": 0.1, "momentum": momentum}], **options)
    optimizer = MFAC(
        model.parameters(),
        metric="identity",
        lr=0.1,
        momentum=momentum,
        row_sparse=row_sparse,
        window_dtype=dtype,
        **options,
    )
    for step in range(16):
        grads = model.backward(step, count=3 + step % 6)  # slots grow now and then
        optimizer.step()
        naive.step(grads)
        assert_same(model.parameters(), naive, 1e-9 if dtype == torch.float64 else 2e-4)
    assert (RowSparseColumns in stores(optimizer)) == row_sparse


def test_half_window_keeps_embedding_rows_in_float32(tables_of_any_size):
    model = Bag(dtype=torch.float32)
    optimizer = MFAC(model.parameters(), metric="identity", num_grads=4, window_dtype=torch.bfloat16)
    model.backward(0)
    optimizer.step()
    state = optimizer.state[model.words.weight]
    assert state["window_values"].dtype == torch.float32
    assert optimizer.state[model.head.weight]["window"].dtype == torch.bfloat16
    rows = state["window_rows"][0][state["window_rows"][0] < VOCABULARY]
    torch.testing.assert_close(state["window_values"][0, : len(rows)], model.words.weight.grad[rows], rtol=0, atol=0)


def test_coupled_weight_decay_makes_embeddings_dense_and_decoupled_does_not(tables_of_any_size):
    for decoupled in (False, True):
        for sparse in (False, True):
            model = Bag(sparse)
            group = {
                "params": list(model.parameters()),
                "lr": 0.1,
                "weight_decay": 0.1,
                "decoupled_weight_decay": decoupled,
            }
            naive = NaiveMFAC([group], num_grads=4, damping=1e-2)
            optimizer = MFAC([group], metric="identity", num_grads=4, damping=1e-2, window_dtype=torch.float64)
            for step in range(9):
                grads = model.backward(step)
                optimizer.step()
                naive.step(grads)
                assert_same(model.parameters(), naive)
            assert (RowSparseColumns in stores(optimizer)) == decoupled


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("when", [1, 3, 9])
def test_an_embedding_that_turns_dense_midway(tables_of_any_size, when, masked):
    """As when the output layer that shares it is unfrozen; while the window fills, and after it wrapped."""
    model = Bag()
    params = list(model.parameters())
    keep = torch.rand(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(5)) < 0.6
    masks = {0: keep} if masked else {}
    group = {"params": params, "lr": 0.1, "momentum": 0.5}
    naive = NaiveMFAC([group], num_grads=5, damping=1e-2, masks=masks)
    optimizer = MFAC(
        [group],
        metric="identity",
        num_grads=5,
        damping=1e-2,
        window_dtype=torch.float64,
        masks={params[i]: m for i, m in masks.items()},
    )
    before = model.words.weight.detach().clone()
    for step in range(15):
        model.tied = step >= when
        grads = model.backward(step)
        optimizer.step()
        naive.step(grads)
        assert_same(params, naive)
        assert stores(optimizer).count(RowSparseColumns) == (step < when)
    state = optimizer.state[params[0]]
    assert "window_rows" not in state and state["window"].shape == (
        (5, int(keep.sum())) if masked else (5, *keep.shape)
    )
    assert not masked or torch.equal(model.words.weight[~keep], before[~keep])
    twin = Bag()
    twin.load_state_dict(model.state_dict())
    loaded = MFAC(
        [{"params": list(twin.parameters())}],
        metric="identity",
        num_grads=5,
        damping=1e-2,
        window_dtype=torch.float64,
        masks={twin.words.weight: keep} if masked else None,
    )
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (twin, loaded)):
        each.tied = True
        each.backward(77)
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_turning_dense_without_memory_for_it_changes_nothing(tables_of_any_size, monkeypatch):
    model = Bag()
    optimizer = MFAC(model.parameters(), metric="identity", lr=0.1, num_grads=5)
    model.backward(0)
    optimizer.step()
    model.tied = True
    model.backward(1)
    before, pushed = [p.detach().clone() for p in model.parameters()], optimizer._window.gram.pushed
    monkeypatch.setattr("mfac_hf.memory.available_bytes", lambda device: 5 * VOCABULARY * WIDTH * 4 - 1)
    with pytest.raises(MemoryError, match="no longer row-sparse"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer._window.gram.pushed == pushed and RowSparseColumns in stores(optimizer)


def test_what_counts_as_row_sparse(monkeypatch):
    """A matrix of some size with few non-zero rows; small or full ones are cheaper dense."""

    def store(grad, **options):
        p = nn.Parameter(torch.zeros(grad.shape))
        settings = ParameterWindowOptions(num_grads=2, damping=1e-3, **options)
        return type(place({p: grad}, {}, settings, [torch.device("cpu")])[p].columns)

    few = torch.zeros(4096, 8)
    few[::4] = 1.0
    assert store(few) is RowSparseColumns
    assert store(few, row_sparse=False) is DenseColumns
    assert store(torch.ones(4096, 8)) is DenseColumns
    assert store(few[:4000]) is DenseColumns
    assert store(few.view(64, 64, 8)) is DenseColumns
    assert store(few[:40].to_sparse(1)) is RowSparseColumns
    more = few.clone()
    more[1] = 1.0
    assert store(more) is DenseColumns


def test_nonzero_rows():
    grad = torch.zeros(6, 2)
    grad[4, 1], grad[1, 0] = -2.0, 3.0
    for given in (grad, grad.to_sparse(1), grad.bfloat16()):
        rows, values = nonzero_rows(given)
        assert rows.tolist() == [1, 4] and values.tolist() == [[3.0, 0.0], [0.0, -2.0]]
        assert values.dtype == torch.float32
    rows, values = nonzero_rows(torch.zeros(6, 2))
    assert rows.shape == (0,) and values.shape == (0, 2)


@pytest.mark.parametrize(
    "devices", ["cpu", ["cpu"], ["cpu", "cpu"], ["cpu", "cpu:0"], [torch.device("cpu"), torch.device("cpu:0")]]
)
def test_window_over_several_devices(tables_of_any_size, devices):
    """Parameters are dealt out by size; the steps are those of one window."""
    model = Bag()
    extra = make_params(EXTRA_SHAPES)
    params = [*model.parameters(), *extra]
    naive = NaiveMFAC([{"params": params, "lr": 0.1}], num_grads=4, damping=1e-2)
    optimizer = MFAC(
        params, metric="identity", lr=0.1, num_grads=4, damping=1e-2, window_dtype=torch.float64, window_device=devices
    )
    for step in range(9):
        grads = model.backward(step)
        for p in extra:
            p.grad = torch.full_like(p, step + 1.0).cumsum(0)
        optimizer.step()
        naive.step([*grads, *(p.grad for p in extra)])
        assert_same(params, naive)
    distinct = len({str(device) for device in devices}) if isinstance(devices, list) else 1
    assert stores(optimizer) == [DenseColumns] * distinct + [RowSparseColumns]
    sizes = [columns.dim for columns in optimizer._window.columns[:-1]]
    assert max(sizes) - min(sizes) <= max(p.numel() for p in extra)


@pytest.fixture
def streamed_by(monkeypatch):
    """Lets a processor stand in for a GPU: a window in host memory comes to it in portions, in any order allowed."""

    def prepare(order):
        monkeypatch.setattr(streaming, "PORTION_BYTES", 1)
        monkeypatch.setattr(dense, "make_lane", lambda device: DisorderedLane(order))
        elsewhere = torch.device("cpu", 0)  # another name than that of the buffer's device
        monkeypatch.setattr(
            ParameterWindowOptions,
            "compute_device",
            lambda options, default: elsewhere if options.window_device == "host" else None,
        )

    return prepare


@pytest.mark.parametrize("order", ["late", "transfers", 3])
@pytest.mark.parametrize("options", [{}, {"metric": "identity", "damping": 1e-2, "lr": 0.01}])
def test_a_window_in_host_memory_is_streamed(streamed_by, options, order):
    """Parameters over several portions and several in one, some without a gradient, masks, groups, and a resume."""
    streamed_by(order)
    shapes = [(70, 90), (3,), (50, 60), (), (40, 50)]
    common = {"num_grads": 3, "window_dtype": torch.float64, "process_group": None, **options}
    models = [[nn.Parameter(p) for p in make_params(shapes)] for _ in range(2)]
    others = {} if options else {"betas": (0.9, 0.99)}
    groups = [[{"params": params[:3]}, {"params": params[3:], **others}] for params in models]
    pair = [MFAC(own, window_device=where, **common) for own, where in zip(groups, ("host", None), strict=True)]

    def step(number):
        for params, optimizer in zip(models, pair, strict=True):
            generator = torch.Generator().manual_seed(number)
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                if (i, number) in ((1, 4), (2, 5)):
                    p.grad = None
            optimizer.step()

    for number in range(6):
        step(number)
    pair[0].load_state_dict(copy.deepcopy(pair[0].state_dict()))
    assert pair[0]._window.columns[0]._stream is not None and pair[1]._window.columns[0]._stream is None
    for number in range(6, 9):
        step(number)
    for params, optimizer in zip(models, pair, strict=True):
        optimizer.set_masks({params[0]: torch.rand(70, 90, generator=torch.Generator().manual_seed(9)) < 0.8})
    step(9)
    for p, q in zip(*models, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)  # sums of portions have another order


def test_host_memory_of_a_processor_is_its_memory():
    ends = []
    for device in ("host", "cpu", None):
        params = make_params([(4, 3), (5,)])
        optimizer = MFAC(params, window_device=device)
        for number in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number)).to(p.dtype)
            optimizer.step()
        assert optimizer._window.columns[0]._stream is None
        ends.append([p.detach() for p in params])
    assert all(torch.equal(p, q) for other in ends[1:] for p, q in zip(ends[0], other, strict=True))


def test_late_parameters_add_columns_without_touching_the_others(tables_of_any_size):
    """One by one, a dense one and a table, each exact."""
    model = Bag()
    extra = make_params(EXTRA_SHAPES)
    params = [*model.parameters(), *extra]
    naive = NaiveMFAC([{"params": params, "lr": 0.1, "momentum": 0.9}], num_grads=5, damping=1e-2)
    optimizer = MFAC(
        params, metric="identity", lr=0.1, momentum=0.9, num_grads=5, damping=1e-2, window_dtype=torch.float64
    )
    for step in range(14):
        model.backward(step)
        for i, p in enumerate(extra):
            p.grad = torch.full_like(p, step + i + 1.0).cumsum(0)
        grads = [p.grad for p in params]
        for i in range(len(params)):
            if step < 2 * i - 4 or (i == 0 and step < 3):
                grads[i] = params[i].grad = None
        optimizer.step()
        naive.step(grads)
        assert_same(params, naive)


def test_a_first_gradient_of_zeros_is_taken_for_a_dense_one(tables_of_any_size):
    """As that of a LoRA adapter's A, whose B begins at zero: the memory is asked for at the first step."""
    adapter, table = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(40, 2))
    optimizer = MFAC([adapter, table], metric="identity", num_grads=3, damping=1e-2)
    adapter.grad, table.grad = torch.zeros(6, 4), torch.zeros(40, 2)
    table.grad[1] = 1.0
    optimizer.step()
    held = optimizer.window_stats()["window_gib"]
    placements = optimizer._window.placements
    assert isinstance(placements[adapter], DensePlacement) and isinstance(placements[table], TablePlacement)
    adapter.grad = torch.randn(6, 4)
    optimizer.step()
    assert optimizer.window_stats()["window_gib"] == held
    assert first_bytes(torch.zeros(6, 4), None, optimizer._options) == 24 * 3 * 4
