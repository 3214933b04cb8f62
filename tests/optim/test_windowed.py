"""Window, masks and groups agree whatever a user changes between steps; hooks and snapshots of the state."""

import copy
import io
import math

import numpy
import pytest
import torch
from torch import nn

from mfac_hf import MFAC
from tests.helpers.parameters import all_equal, feed, make_grads, make_params, values

OPTIONS = {"lr": 0.05, "num_grads": 4, "damping": 1e-2}
TABLE = (40, 3)


def make(shapes=((4, 3), (5,), TABLE), groups=False, **options):
    params = make_params(shapes, dtype=torch.float32)
    listed = [{"params": [p]} for p in params] if groups else params
    return params, MFAC(listed, metric="identity", **{**OPTIONS, **options})


def gradients(params, steps, seed=1):
    """Those of the table have few rows, so that it is stored by rows."""
    grads = make_grads(params, steps, seed)
    for step in grads:
        for grad in step:
            if tuple(grad.shape) == TABLE:
                grad[3:] = 0.0
    return grads


def window_of(optimizer, params):
    return torch.cat([optimizer.stored_gradients(p).double() for p in params], dim=1)


def assert_gram_fits(optimizer, params):
    rows = window_of(optimizer, params)
    order = (optimizer._window.gram.newest + 1 + torch.arange(len(rows))) % len(rows)
    torch.testing.assert_close(optimizer._window.gram.gram_MM[order][:, order], rows @ rows.T, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("tables_of_any_size")
@pytest.mark.parametrize("removed", [0, 1, 2])
@pytest.mark.parametrize("cleared", [True, False])
def test_a_group_that_is_removed_leaves_the_window(removed, cleared):
    """The rest goes on as in an optimizer that never had it."""
    params, optimizer = make(groups=True)
    grads = gradients(params, 9)
    rest = [i for i in range(3) if i != removed]
    others = [nn.Parameter(params[i].detach().clone()) for i in rest]
    for step in grads[:6]:
        feed(optimizer, params, step)
    expected = MFAC(others, metric="identity", **OPTIONS)
    for step in grads[:6]:
        feed(expected, others, [step[i] for i in rest])
    with torch.no_grad():
        for i, p in zip(rest, others, strict=True):
            p.copy_(params[i])
    del optimizer.param_groups[removed]
    if cleared:
        del optimizer.state[params[removed]]
    params[removed].requires_grad_(False)
    saved = copy.deepcopy(optimizer.state_dict())  # before a step too
    for step in grads[6:]:
        step[removed] = None
        feed(optimizer, params, step)
        feed(expected, others, [step[i] for i in rest])
    assert params[removed] not in optimizer.state and params[removed] not in optimizer._window.owners
    for i, p in zip(rest, others, strict=True):
        torch.testing.assert_close(params[i], p, rtol=1e-5, atol=1e-6)
    assert_gram_fits(optimizer, [params[i] for i in rest])
    fresh = MFAC([{"params": [params[i]]} for i in rest], metric="identity", **OPTIONS)
    fresh.load_state_dict(saved)
    assert fresh.window_stats()["window_fill"] == 1.0


def test_a_parameter_that_takes_the_place_of_another():
    params, optimizer = make()
    for step in gradients(params, 3):
        feed(optimizer, params, step)
    old, new = params[0], nn.Parameter(torch.zeros(4, 3))
    optimizer.param_groups[0]["params"][0] = params[0] = new
    for step in gradients(params, 3, seed=2):
        feed(optimizer, params, step)
    assert old not in optimizer.state and optimizer.state[new]["step"] == 3
    assert_gram_fits(optimizer, params)
    copy.deepcopy(optimizer)


def test_a_cleared_state_is_a_new_window_under_the_same_masks():
    mask = torch.tensor([True, False, True, False, True])
    params, optimizer = make()
    optimizer.set_masks({params[1]: mask})
    before = values(params)
    grads = gradients(params, 4)
    feed(optimizer, params, grads[0])
    feed(optimizer, params, grads[1])
    optimizer.state.clear()
    feed(optimizer, params, grads[2])
    assert optimizer._window.count == 1
    assert torch.equal(params[1][~mask], before[1][~mask]) and torch.equal(optimizer.state[params[1]]["mask"], mask)
    optimizer.state[params[0]] = {}  # of one alone: its columns begin anew
    feed(optimizer, params, grads[3])
    assert optimizer._window.count == 2
    assert not optimizer.stored_gradients(params[0])[0].any() and optimizer.stored_gradients(params[1])[0].any()
    assert_gram_fits(optimizer, params)


@pytest.mark.parametrize("steps", [0, 3])
def test_masked_parameters_are_not_replaced_in_silence(steps):
    params, optimizer = make(masks=None)
    optimizer.set_masks({params[0]: torch.ones(4, 3, dtype=torch.bool)})
    for step in gradients(params, steps):
        feed(optimizer, params, step)
    optimizer.param_groups[0]["params"] = [nn.Parameter(p.detach().clone()) for p in params]
    replaced = optimizer.param_groups[0]["params"]
    before = values(replaced)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"mask of a parameter of shape \(4, 3\) has lost its parameter"):
            feed(optimizer, replaced, gradients(params, 1)[0])
    assert all_equal(before, replaced)
    optimizer.param_groups[0]["params"] = params
    feed(optimizer, params, gradients(params, 1)[0])


def test_a_group_with_masks_may_be_removed():
    params, optimizer = make(groups=True)
    optimizer.set_masks({params[0]: torch.ones(4, 3, dtype=torch.bool)})
    del optimizer.param_groups[0]
    feed(optimizer, params, [None, *gradients(params, 1)[0][1:]])
    assert params[0] not in optimizer.state


@pytest.mark.parametrize("metric", [{}])
def test_damping_and_grad_decay_follow_the_groups(metric):
    params, optimizer = make(**metric)
    grads = gradients(params, 6)
    for step in grads[:5]:
        feed(optimizer, params, step)
    for group in optimizer.param_groups:
        group["damping"] *= 50
        group["grad_decay"] = 0.5
    before = values(params)
    feed(optimizer, params, grads[5])
    rows = window_of(optimizer, params)
    weights = 0.5 ** torch.arange(3, -1, -1.0, dtype=torch.float64)
    fisher = 0.5 * torch.eye(rows.shape[1], dtype=torch.float64) + rows.T @ rows / 4
    expected = -0.05 * torch.linalg.solve(fisher, weights / weights.sum() @ rows)
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(params, before, strict=True)])
    torch.testing.assert_close(moved.double(), expected, rtol=1e-3, atol=1e-6)
    twin, loaded = make(**metric)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert loaded.param_groups[0]["damping"] == 0.5 and loaded._window.gram.options.damping == 0.5
    loaded.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert loaded.param_groups[1]["damping"] == 0.5
    assert copy.deepcopy(loaded)._options == loaded._options


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("damping", 0.0, "damping is 0.0; expected"),
        ("damping", "1e-3", "damping is '1e-3'; expected"),
        ("grad_decay", 1.0, "grad_decay is 1.0; expected"),
        ("lr", None, "lr is None; expected"),
        ("momentum", "0.9", "momentum is '0.9'; expected"),
        ("num_grads", 5, "num_grads=5 in a parameter group, but the window was built with 4.*Build a new MFAC"),
        ("window_dtype", torch.bfloat16, "window_dtype=torch.bfloat16"),
        ("row_sparse", False, "row_sparse=False"),
    ],
)
def test_what_a_group_may_not_become_changes_nothing(name, value, message):
    params, optimizer = make()
    grads = gradients(params, 3)
    feed(optimizer, params, grads[0])
    before, kept = values(params), optimizer.param_groups[0].get(name)
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=message):
        feed(optimizer, params, grads[1])
    assert all_equal(before, params) and optimizer._window.count == 1
    optimizer.param_groups[0][name] = kept
    if kept is None:
        del optimizer.param_groups[0][name]
    feed(optimizer, params, grads[1])


def test_one_damping_for_all_groups():
    params, optimizer = make(groups=True)
    optimizer.param_groups[1]["damping"] = 0.5
    with pytest.raises(ValueError, match=r"damping is \[0.01, 0.5, 0.01\].*one window"):
        feed(optimizer, params, gradients(params, 1)[0])


def test_hooks_see_the_whole_state():
    params, optimizer = make()
    for step in gradients(params, 2):
        feed(optimizer, params, step)
    seen = []
    twins, loaded = make(lr=9.0)

    def halve(optimizer, state_dict):
        seen.append(len(state_dict["state"]))
        groups = [{**group, "lr": group["lr"] / 2} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    loaded.register_load_state_dict_pre_hook(halve)
    loaded.register_load_state_dict_post_hook(lambda optimizer: seen.append(optimizer.window_stats()["window_fill"]))
    loaded.load_state_dict(optimizer.state_dict())
    assert seen == [3, 0.5] and loaded.param_groups[0]["lr"] == 0.025


@pytest.mark.usefixtures("tables_of_any_size")
@pytest.mark.parametrize("change", ["step", "masks"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"row_sparse": False}])
def test_a_kept_state_stays_as_it_was(options, change):
    params, optimizer = make(**options)
    grads = gradients(params, 9)
    for step in grads[:6]:
        feed(optimizer, params, step)
    kept = copy.deepcopy(optimizer.state_dict())
    reference = copy.deepcopy(kept)
    first, second = make(**options), make(**options)
    for _, loaded in (first, second):
        loaded.load_state_dict(kept)
    for own, loaded in (first, second):  # two optimizers that hold one state
        if change == "masks":
            loaded.set_masks({p: torch.rand(p.shape) < 0.5 for p in own})
        for step in grads[6:]:
            feed(loaded, own, step)
    assert same_tensors(kept, reference)
    if change == "step":
        for a, b in zip(first[0], second[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def same_tensors(one, other):
    pairs = [(one["state"][n][key], other["state"][n][key]) for n in one["state"] for key in one["state"][n]]
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


@pytest.mark.usefixtures("tables_of_any_size")
def test_a_state_that_nobody_holds_is_not_copied():
    params, optimizer = make()
    for step in gradients(params, 6):
        feed(optimizer, params, step)
    state = copy.deepcopy(optimizer.state_dict())
    twins, loaded = make()
    loaded.load_state_dict(state)
    before = [columns_memory(columns) for columns in loaded._window.columns]
    del state
    feed(loaded, twins, gradients(params, 1)[0])
    assert [columns_memory(columns) for columns in loaded._window.columns] == before


def columns_memory(columns):
    return (columns.buffer_MD if hasattr(columns, "buffer_MD") else columns.values_MNH).data_ptr()


def test_a_copy_that_does_not_fit_is_refused_before_the_step(monkeypatch):
    params, optimizer = make()
    feed(optimizer, params, gradients(params, 1)[0])
    kept = copy.deepcopy(optimizer.state_dict())
    twins, loaded = make()
    loaded.load_state_dict(kept)
    before = values(twins)
    monkeypatch.setattr("mfac_hf.memory.available_bytes", lambda device: 8)
    with pytest.raises(MemoryError, match="copy of a loaded window"):
        feed(loaded, twins, gradients(params, 1)[0])
    assert all_equal(before, twins) and loaded._window.count == 1
    assert math.isclose(float(kept["state"][0]["gram"][0, 0]), float(loaded._window.gram.gram_MM[0, 0]))


def test_a_parameter_of_another_shape_begins_anew():
    """As when an embedding is resized in place."""
    params, optimizer = make(momentum=0.5)
    for step in gradients(params, 3):
        feed(optimizer, params, step)
    params[0].data, params[0].grad = torch.zeros(6, 3), None
    feed(optimizer, params, gradients(params, 1)[0])
    assert optimizer.state[params[0]]["step"] == 1 and optimizer.state[params[1]]["step"] == 4
    assert_gram_fits(optimizer, params)
    optimizer.set_masks({params[1]: torch.ones(5, dtype=torch.bool)})
    params[1].data, params[1].grad = torch.zeros(7), None
    with pytest.raises(ValueError, match=r"masked parameter has shape \(7,\) now"):
        feed(optimizer, params, gradients(params, 1)[0])


def test_numbers_of_numpy_are_saved_as_plain_ones():
    """Or torch.load(weights_only=True), which Trainer resumes by, would refuse the checkpoint."""
    params, optimizer = make(lr=numpy.float32(0.5), momentum=numpy.float64(0.25))
    optimizer.param_groups[0]["damping"] = numpy.float64(0.125)
    feed(optimizer, params, gradients(params, 1)[0])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    group = torch.load(file, weights_only=True)["param_groups"][0]
    assert (group["lr"], group["momentum"], group["damping"]) == (0.5, 0.25, 0.125)
    assert isinstance(optimizer.param_groups[0]["lr"], numpy.float32)  # the user's own stays
