"""Saving, loading and copying in the middle of training: to the bit, or refused with what differs."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from mfac_hf import MFAC
from mfac_hf.fisher.columns import RowSparseColumns

pytestmark = pytest.mark.usefixtures("tables_of_any_size")

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Before the window of 5 is full, when it is just full, and after it wrapped.
STEPS = (2, 5, 13)
LATER = 6


class Net(nn.Module):
    """An embedding whose gradients have few rows, dense layers, a scalar, and a layer that gets its gradients late."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(40, 4)
        self.hidden = nn.Linear(4, 6)
        self.late = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(6, 2)

    def forward(self, ids, late):
        hidden = self.hidden(self.words(ids).mean(0)).tanh()
        return self.head(self.late(hidden) if late else hidden) * self.scale


def masks_of(model):
    """Half of one matrix, and most of the table."""
    generator = torch.Generator().manual_seed(11)
    return {
        p: torch.rand(p.shape, generator=generator) < share
        for p, share in ((model.head.weight, 0.5), (model.words.weight, 0.8))
    }


def make(seed=0, masked=False, **options):
    model = Net(seed)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "lr": 0.02},
    ]
    settings = {"lr": 0.05, "num_grads": 5, "damping": 1e-2, **options}
    return model, MFAC(groups, metric="identity", masks=masks_of(model) if masked else None, **settings)


def train(model, optimizer, start, stop):
    for step in range(start, stop):
        optimizer.zero_grad()
        ids = torch.randint(40, (5 + step % 3,), generator=torch.Generator().manual_seed(step))
        model(ids, late=step >= 4).square().sum().backward()
        optimizer.step()


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def through_a_file(state):
    """What torch.load, in its strict mode, makes of it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def tensors(state_dict):
    """Every tensor in a state, by the parameter's number and the key."""
    found = {}
    for number, state in state_dict["state"].items():
        found.update({(number, key): value for key, value in state.items() if isinstance(value, torch.Tensor)})
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stop", STEPS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "masked": True, "normalize": "count"},
        {"row_sparse": False, "momentum": 0.5, "grad_decay": 0.5},
    ],
)
def test_a_file_continues_to_the_bit(dtype, stop, options):
    model, optimizer = make(window_dtype=dtype, **options)
    train(model, optimizer, 0, stop)
    saved = through_a_file(optimizer.state_dict())
    for key, tensor in tensors(optimizer.state_dict()).items():
        assert tensors(saved)[key].dtype == tensor.dtype, key
    twin, loaded = make(window_dtype=dtype, seed=1, **options)
    twin.load_state_dict(through_a_file(model.state_dict()))
    loaded.load_state_dict(state_dict=saved)
    assert loaded.window_stats() == optimizer.window_stats()
    for key, tensor in tensors(loaded.state_dict()).items():
        assert torch.equal(tensor.nan_to_num(), tensors(optimizer.state_dict())[key].nan_to_num()), key
    train(model, optimizer, stop, stop + LATER)
    train(twin, loaded, stop, stop + LATER)
    assert same(model, twin)


def test_state_is_per_parameter_and_of_plain_types():
    model, optimizer = make(momentum=0.9)
    train(model, optimizer, 0, 7)
    for p, state in optimizer.state.items():
        assert all(type(value) in (int, torch.Tensor) for value in state.values()), state.keys()
        if p is model.words.weight:
            assert state["window_values"].shape[::2] == (5, 4) and state["window_rows"].dtype == torch.int64
        else:
            assert state["window"].shape == (5, *p.shape)
        # The layer that came late took fewer steps.
        assert state["step"] == (3 if p is model.late.weight or p is model.late.bias else 7)
    assert len(optimizer.state) == len(list(model.parameters()))
    assert [group.keys() for group in optimizer.param_groups] == [
        {"params", "lr", "momentum", "weight_decay", "decoupled_weight_decay", "damping", "grad_decay"}
    ] * 2
    newest = optimizer.state[model.hidden.weight]["window"][6 % 5]
    torch.testing.assert_close(newest, model.hidden.weight.grad)


def test_loading_does_not_hold_the_window_twice():
    model, optimizer = make()
    train(model, optimizer, 0, 7)
    saved = through_a_file(optimizer.state_dict())
    twin, loaded = make()
    loaded.load_state_dict(saved)
    from_file = {t.untyped_storage().data_ptr() for t in tensors(saved).values()}
    held = [c.values_MNH if isinstance(c, RowSparseColumns) else c.buffer_MD for c in loaded._window.columns]
    assert len(held) == 3 and all(buffer.untyped_storage().data_ptr() in from_file for buffer in held)
    assert loaded._window.nbytes == optimizer._window.nbytes


def test_views_that_do_not_share_a_buffer_are_joined():
    """As a distributed checkpoint or a clone of every tensor gives them."""
    model, optimizer = make(momentum=0.9)
    train(model, optimizer, 0, 7)
    saved = optimizer.state_dict()
    saved = {
        "param_groups": copy.deepcopy(saved["param_groups"]),
        "state": {
            number: {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
            for number, state in saved["state"].items()
        },
    }
    twin, loaded = make(momentum=0.9)
    twin.load_state_dict(model.state_dict())
    loaded.load_state_dict(saved)
    train(model, optimizer, 7, 7 + LATER)
    train(twin, loaded, 7, 7 + LATER)
    assert same(model, twin)


def test_saving_twice_and_loading_into_a_used_optimizer():
    """A loaded state can be saved again; what the optimizer held before is gone."""
    model, optimizer = make(momentum=0.9)
    train(model, optimizer, 0, 8)
    twin, loaded = make(seed=3, momentum=0.9)
    train(twin, loaded, 20, 31)
    for _ in range(2):
        loaded.load_state_dict(through_a_file(optimizer.state_dict()))
        twin.load_state_dict(model.state_dict())
        third, again = make(seed=4, momentum=0.9)
        again.load_state_dict(through_a_file(loaded.state_dict()))
        third.load_state_dict(model.state_dict())
    for each in ((model, optimizer), (twin, loaded), (third, again)):
        train(*each, 8, 8 + LATER)
    assert same(model, twin) and same(model, third)


def test_groups_take_the_saved_options():
    model, optimizer = make(momentum=0.9)
    train(model, optimizer, 0, 3)
    _, loaded = make(momentum=0.1, lr=7.0)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert [group["lr"] for group in loaded.param_groups] == [0.05, 0.02]
    assert loaded.param_groups[0]["momentum"] == 0.9 and "num_grads" not in loaded.param_groups[0]


@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stop", [0, *STEPS])
@pytest.mark.parametrize("masked", [False, True])
def test_copies_continue_to_the_bit_and_share_nothing(copier, dtype, stop, masked):
    model, optimizer = make(window_dtype=dtype, momentum=0.9, masked=masked)
    train(model, optimizer, 0, stop)
    if copier == "deepcopy":
        twin, copied = copy.deepcopy((model, optimizer))
    else:
        twin, copied = pickle.loads(pickle.dumps((model, optimizer)))
    own = {t.untyped_storage().data_ptr() for t in tensors(optimizer.state_dict()).values()}
    assert own.isdisjoint(t.untyped_storage().data_ptr() for t in tensors(copied.state_dict()).values())
    assert copied.defaults.items() >= optimizer.defaults.items() and copied.window_stats() == optimizer.window_stats()
    before = [p.detach().clone() for p in model.parameters()]
    train(twin, copied, stop, stop + LATER)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    train(model, optimizer, stop, stop + LATER)
    assert same(model, twin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stop", [0, 7])
def test_survives_accelerate(dtype, stop):
    """AcceleratedOptimizer saves, moves and reloads the state when it wraps an optimizer."""
    model, optimizer = make(window_dtype=dtype, momentum=0.9, masked=True)
    twin, wrapped = copy.deepcopy((model, optimizer))
    train(model, optimizer, 0, stop)
    train(twin, wrapped, 0, stop)
    accelerated = Accelerator(cpu=True).prepare(wrapped)
    assert accelerated.optimizer is wrapped and (stop > 0 or wrapped._window is None)
    train(model, optimizer, stop, stop + LATER)
    train(twin, accelerated, stop, stop + LATER)
    assert same(model, twin)


def test_without_the_window():
    """Small, loadable by either kind of optimizer; momentum goes on, the window refills."""
    model, optimizer = make(momentum=0.9, save_window=False, masked=True)
    train(model, optimizer, 0, 9)
    saved = through_a_file(optimizer.state_dict())
    assert all(state.keys() <= {"step", "momentum_buffer", "mask"} for state in saved["state"].values())
    assert set(optimizer.state[model.head.weight]) > {"window"}  # still there
    for save_window in (False, True):
        twin, loaded = make(seed=1, momentum=0.9, save_window=save_window, masked=True)
        twin.load_state_dict(model.state_dict())
        loaded.load_state_dict(copy.deepcopy(saved))
        assert loaded.window_stats()["window_fill"] == 0.0
        assert torch.equal(
            loaded.state[twin.head.weight]["momentum_buffer"], optimizer.state[model.head.weight]["momentum_buffer"]
        )
        train(twin, loaded, 9, 12)
        assert loaded._window.count == 3 and loaded.state[twin.head.weight]["step"] == 12


def test_counters_continue():
    model, optimizer = make()
    train(model, optimizer, 0, 3)
    model.head.bias.grad.fill_(torch.nan)
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    _, loaded = make()
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert loaded.skipped_steps == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for p in loaded.param_groups[0]["params"]:
            p.grad = torch.full_like(p, torch.nan)
        loaded.step()
    assert loaded.skipped_steps == 2


@pytest.mark.parametrize("device", ["meta", ["meta"]])
def test_the_window_goes_where_the_optimizer_wants_it(device):
    """Trainer loads checkpoints onto the CPU, whatever the window lived on ("meta" stands for an accelerator)."""
    model, optimizer = make(row_sparse=False)
    train(model, optimizer, 0, 3)
    _, loaded = make(row_sparse=False, window_device=device)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert loaded._window.gram.gram_MM.device.type == "cpu", "a small matrix is no work for an accelerator"
    assert {columns.device.type for columns in loaded._window.columns} == {"meta"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("stop", [3, 13])
def test_distributed_checkpoint(tmp_path, stop, masked):
    """Through torch's own save and load; row_sparse=False gives every state the shape that a new optimizer's has."""
    options = {"momentum": 0.9, "row_sparse": False, "masked": masked}

    def complete(model, optimizer):
        # The format has no place for parameters without a state, so all of them take part from the start.
        train(model, optimizer, 4, 4 + stop)

    model, optimizer = make(**options)
    complete(model, optimizer)
    checkpoint.save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
    twin, loaded = make(seed=1, **options)
    twin.load_state_dict(model.state_dict())
    if masked:
        for p in twin.parameters():  # with masks in the state torch does not take its dummy step
            p.grad = torch.zeros_like(p)
        loaded.step()
        twin.load_state_dict(model.state_dict())
    state = {"optim": get_optimizer_state_dict(twin, loaded)}
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(twin, loaded, state["optim"])
    assert same(model, twin)
    train(model, optimizer, 20, 20 + LATER)
    train(twin, loaded, 20, 20 + LATER)
    assert same(model, twin)


# Bad checkpoints: the message names what differs, and the optimizer goes on as if nothing had been tried.


def spoil_state(key, change):
    def spoil(saved):
        state = next(state for state in saved["state"].values() if key in state)
        change(state)

    return spoil


def first_with(saved, key):
    return next(number for number, state in saved["state"].items() if key in state)


def drop(key):
    return spoil_state(key, lambda state: state.pop(key))


def swap_groups(saved):
    saved["param_groups"].reverse()


BAD = {
    "no state": (lambda saved: saved.pop("state"), "no 'state'.*truncated"),
    "no groups": (lambda saved: saved.pop("param_groups"), "no 'param_groups'.*truncated"),
    "a group less": (lambda saved: saved["param_groups"].pop(), r"groups of \[4\] parameters, this one of \[4, 4\]"),
    "groups in another order": (swap_groups, "saved momentum of parameter 0.*another model or order"),
    "another optimizer": (lambda saved: saved["param_groups"][0].pop("momentum"), "lack momentum.*another optimizer"),
    "no window": (drop("window"), "lacks its window.*truncated"),
    "no rows": (drop("window_rows"), "lacks its window.*truncated"),
    "no values": (drop("window_values"), "lacks 'window_values'.*truncated"),
    "no store": (drop("window_store"), "lacks 'window_store'.*truncated"),
    "no start": (drop("window_start"), "lacks 'window_start'.*truncated"),
    "no gram": (drop("gram"), "no Gram matrix.*truncated"),
    "no counter": (drop("pushed"), "no Gram matrix or counters.*truncated"),
    "a parameter less": (lambda saved: saved["state"].pop(first_with(saved, "window")), "truncated"),
    "the last parameter less": (lambda saved: saved["state"].pop(7), "8 parameters, but 7 have.*truncated"),
    "gram of another size": (
        spoil_state("gram", lambda state: state.update(gram=state["gram"][:4, :4])),
        r"Gram matrix is \(4, 4\); expected \(5, 5\)",
    ),
    "rows cut short": (
        spoil_state("window", lambda state: state.update(window=state["window"][:3])),
        "holds 3 gradients, this optimizer 5; pass num_grads=3",
    ),
    "another shape": (
        spoil_state("window", lambda state: state.update(window=state["window"].flatten(1))),
        r"has shape \(5, \d+\); expected \(5, .*another model",
    ),
    "another momentum": (
        spoil_state("momentum_buffer", lambda state: state.update(momentum_buffer=torch.zeros(3, 3, 3))),
        r"saved momentum of .* has shape \(3, 3, 3\)",
    ),
    "rows of a larger table": (
        spoil_state("window_rows", lambda state: state["window_rows"].masked_fill_(state["window_rows"] == 40, 50)),
        "another model, or a damaged file",
    ),
    "rows of a smaller table": (
        spoil_state("window_rows", lambda state: state["window_rows"].masked_fill_(state["window_rows"] == 40, 30)),
        "another model, or a damaged file",
    ),
    "rows without their values": (
        spoil_state("window_rows", lambda state: state.update(window_rows=state["window_rows"][:, :-1])),
        "shape|damaged file",
    ),
    "a mask too many": (
        spoil_state("window", lambda state: state.update(mask=torch.ones(1, dtype=torch.bool))),
        r"saved mask of .* is torch.bool of shape \(1,\): another model",
    ),
}


def check_refused(model, optimizer, saved, message):
    """Loading raises; the same training goes on as in an optimizer that was left in peace."""
    twin, undisturbed = copy.deepcopy((model, optimizer))
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    train(model, optimizer, 30, 30 + LATER)
    train(twin, undisturbed, 30, 30 + LATER)
    assert same(model, twin)


@pytest.mark.parametrize("name", BAD)
def test_bad_states(name):
    spoil, message = BAD[name]
    saved_by = make(momentum=0.9)
    train(*saved_by, 0, 9)
    saved = through_a_file(saved_by[1].state_dict())
    spoil(saved)
    model, optimizer = make(momentum=0.9)
    train(model, optimizer, 0, 6)
    check_refused(model, optimizer, saved, message)
    fresh_model, fresh = make(momentum=0.9)
    check_refused(fresh_model, fresh, saved, message)


@pytest.mark.parametrize(
    ("saved_with", "loaded_with", "message"),
    [
        ({"num_grads": 6}, {}, "holds 6 gradients, this optimizer 5; pass num_grads=6"),
        (
            {"window_dtype": torch.bfloat16},
            {},
            "is torch.bfloat16, expected torch.float32; pass the saved window_dtype",
        ),
        ({}, {"window_dtype": torch.float64}, "is torch.float32, expected torch.float64"),
        ({}, {"masked": True}, "trained weights that the mask of .* excludes; pass the masks"),
    ],
)
def test_other_options(saved_with, loaded_with, message):
    saved_by = make(**saved_with)
    train(*saved_by, 0, 6)
    model, optimizer = make(**loaded_with)
    train(model, optimizer, 0, 3)
    check_refused(model, optimizer, through_a_file(saved_by[1].state_dict()), message)


def test_other_masks():
    params = [nn.Parameter(torch.zeros(4))]
    first = MFAC(params, metric="identity", num_grads=2, masks={params[0]: torch.tensor([True, True, False, False])})
    second = MFAC(params, metric="identity", num_grads=2, masks={params[0]: torch.tensor([True, False, True, False])})
    with pytest.raises(ValueError, match=r"trained weights that the mask of parameter 0 of shape \(4,\) excl"):
        second.load_state_dict(first.state_dict())


def named(order):
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in order})
    optimizer = MFAC(model.named_parameters(), metric="identity", num_grads=2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_parameters_in_another_order():
    """All of one shape: only their names can tell."""
    saved = named(["query", "key", "value"]).state_dict()
    other = named(["key", "query", "value"])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="another order.*'query.weight' where this optimizer has 'key.weight'"):
        other.load_state_dict(saved)
    for key, tensor in tensors(other.state_dict()).items():
        assert torch.equal(tensor.nan_to_num(), tensors(before)[key].nan_to_num())
    named(["query", "key", "value"]).load_state_dict(saved)


def test_another_model():
    saved_by = MFAC([nn.Parameter(torch.zeros(3, 4))], metric="identity", num_grads=2)
    saved_by.param_groups[0]["params"][0].grad = torch.ones(3, 4)
    saved_by.step()
    for shape in ((4, 3), (3, 5), (12,), ()):
        optimizer = MFAC([nn.Parameter(torch.zeros(shape))], metric="identity", num_grads=2)
        with pytest.raises(ValueError, match=r"has shape \(2, 3, 4\); expected \(2.*another model or order"):
            optimizer.load_state_dict(saved_by.state_dict())
        assert not optimizer.state


@pytest.mark.parametrize(("metric", "lacking"), [("adam", "damping"), ("identity", "momentum")])
def test_a_state_of_another_optimizer(metric, lacking):
    model = Net()
    adam = torch.optim.AdamW([{"params": list(model.parameters())}], lr=0.5)
    optimizer = MFAC(model.parameters(), metric=metric)
    with pytest.raises(ValueError, match=f"lack {lacking}.*: the state of another optimizer"):
        optimizer.load_state_dict(adam.state_dict())
    assert optimizer.param_groups[0]["lr"] < 0.5


def test_a_file_cut_short():
    """The loader refuses it, before the optimizer sees any of it."""
    model, optimizer = make()
    train(model, optimizer, 0, 6)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    with pytest.raises(RuntimeError, match="zip archive|central directory"):
        torch.load(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]), weights_only=True)


def test_rows_without_a_gradient_are_saved_as_zeros():
    """No raw memory in a checkpoint: the same training gives the same file."""
    parameter = torch.nn.Parameter(torch.zeros(5))
    optimizer = MFAC([parameter], metric="identity", num_grads=4, damping=1e-3)
    parameter.grad = torch.ones(5)
    optimizer.step()
    optimizer._window.columns[0].buffer_MD[1:] = float("nan")  # what uninitialised memory may hold
    saved = optimizer.state_dict()["state"][0]["window"]
    assert torch.equal(saved[0], torch.ones(5)) and torch.equal(saved[1:], torch.zeros(3, 5))
    optimizer._window.columns[0].buffer_MD[1:] = float("nan")
    assert torch.equal(copy.deepcopy(optimizer).state_dict()["state"][0]["window"], saved)
    parameter.grad = torch.arange(5.0)
    optimizer.step()
    assert parameter.isfinite().all()


def assert_state_is_the_window(optimizer, p):
    """The state has the rows that the optimizer combines, not some that it had before."""
    state = optimizer.state_dict()["state"][0]
    assert "window_rows" not in state and "moment_steps" not in state
    held = state["window"][: int(state["pushed"])].reshape(int(state["pushed"]), -1)
    assert torch.equal(held, optimizer.stored_gradients(p))


def test_a_table_that_becomes_dense_is_dense_in_the_state():
    p = torch.nn.Parameter(torch.zeros(600, 64))
    optimizer = MFAC([p], metric="adam", num_grads=8, window_dtype=torch.float32)
    for rows in (5, 600, 600):
        p.grad = torch.zeros(600, 64)
        p.grad[:rows] = torch.randn(rows, 64)
        optimizer.step()
        if rows == 5:
            assert "window_rows" in optimizer.state[p]
    assert_state_is_the_window(optimizer, p)


def test_a_step_after_a_state_that_is_kept_is_in_the_state():
    """The loaded window is copied at that step: the state has to show the copy."""
    p = torch.nn.Parameter(torch.zeros(20))
    optimizer, other = (MFAC([p], metric="adam", num_grads=8, window_dtype=torch.float32) for _ in range(2))
    p.grad = torch.randn(20)
    optimizer.step()
    kept = optimizer.state_dict()
    other.load_state_dict(kept)
    p.grad = torch.randn(20)
    other.step()
    assert_state_is_the_window(other, p)
