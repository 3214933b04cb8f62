"""A saved state with values that no optimizer has: refused by documented errors, and nothing changes."""

import copy
import random

import pytest
import torch

from mfac_hf import MFAC
from tests.helpers.parameters import all_equal, feed, make_grads, make_params, values

pytestmark = pytest.mark.usefixtures("tables_of_any_size")

SHAPES = ((4, 3), (5,), (30, 2), ())
DOCUMENTED = (ValueError, TypeError, MemoryError)
DAMAGES = 120  # random ones: some seconds


def make(**options):
    params = make_params(SHAPES, dtype=torch.float32)
    masks = {params[0]: torch.arange(12).view(4, 3) % 3 > 0}
    return params, MFAC(
        params, metric="identity", lr=0.01, num_grads=4, damping=1e-2, momentum=0.5, masks=masks, **options
    )


def gradients(params, steps, seed=1):
    grads = make_grads(params, steps, seed)
    for step in grads:
        step[2][4:] = 0.0
    return grads


def trained(steps=6):
    params, optimizer = make()
    for step in gradients(params, steps):
        feed(optimizer, params, step)
    return params, optimizer


def lead_of(saved):
    return next(state for state in saved["state"].values() if "gram" in state)


def table_of(saved):
    return next(state for state in saved["state"].values() if "window_rows" in state)


def off_diagonal(saved):
    gram = lead_of(saved)["gram"]
    gram[0, 1] = gram[1, 0] = 2 * gram[0, 0] + gram[1, 1]


def same_start(saved):
    for state in saved["state"].values():
        state["window_start"] = 0


CANNOT_BE = {
    "gram NaN": (lambda saved: lead_of(saved)["gram"].fill_(torch.nan), "not finite"),
    "gram infinite": (lambda saved: lead_of(saved)["gram"][1].fill_(torch.inf), "not finite"),
    "gram zero": (lambda saved: lead_of(saved)["gram"].zero_(), "does not belong to the stored gradients"),
    "gram negative": (lambda saved: lead_of(saved)["gram"].neg_(), "no matrix of dot products"),
    "gram lopsided": (lambda saved: lead_of(saved)["gram"][0, 1].mul_(-3).add_(0.1), "no matrix of dot products"),
    "gram beyond Cauchy": (off_diagonal, "no matrix of dot products"),
    "gram of integers": (
        lambda saved: lead_of(saved).update(gram=lead_of(saved)["gram"].long()),
        "torch.int64; expected torch.float64",
    ),
    "window NaN": (lambda saved: lead_of(saved)["window"][2].fill_(torch.nan), "does not belong"),
    "window larger": (lambda saved: lead_of(saved)["window"].mul_(100), "does not belong"),
    "table larger": (lambda saved: table_of(saved)["window_values"].mul_(100), "does not belong"),
    "pushed negative": (lambda saved: lead_of(saved).update(pushed=-3), "pushed of parameter 0.* is -3.* >= 1"),
    "pushed zero": (lambda saved: lead_of(saved).update(pushed=0), "pushed of .* is 0"),
    "pushed too few": (lambda saved: lead_of(saved).update(pushed=2), "beyond the 2 that were stored"),
    "pushed a fraction": (lambda saved: lead_of(saved).update(pushed=6.5), "pushed of .* is 6.5"),
    "skipped negative": (lambda saved: lead_of(saved).update(skipped_steps=-1), "skipped_steps of .* is -1"),
    "step negative": (lambda saved: saved["state"][1].update(step=-1), "step of parameter 1 .* is -1"),
    "momentum NaN": (lambda saved: saved["state"][1]["momentum_buffer"].fill_(torch.nan), "momentum of parameter 1"),
    "one place for all": (same_start, "window_store 0 begin at window_start 0"),
    "a gap": (lambda saved: saved["state"][3].update(window_start=99), "begin at window_start 99"),
    "a table in a dense store": (
        lambda saved: table_of(saved).update(window_store=0, window_start=14),
        "window_store 0 begin",
    ),
    "a state that is a list": (lambda saved: saved["state"].update({1: [1, 2]}), r"parameter 1 .* is \[1, 2\]"),
    "lr a text": (lambda saved: saved["param_groups"][0].update(lr="1e-3"), "lr is '1e-3'"),
    "damping negative": (lambda saved: saved["param_groups"][0].update(damping=-1.0), "damping is -1.0"),
    "groups without parameters": (lambda saved: saved["param_groups"][0].pop("params"), "no list of 'params'"),
    "sparse": (
        lambda saved: saved["state"][1].update(window=torch.eye(4).to_sparse()),
        "(?s)window of parameter 1 .*expected a dense tensor",
    ),
}


@pytest.mark.parametrize("name", CANNOT_BE)
def test_values_that_cannot_be(name):
    spoil, message = CANNOT_BE[name]
    saved = copy.deepcopy(trained()[1].state_dict())
    spoil(saved)
    params, optimizer = trained(3)
    twins, untouched = trained(3)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_goes_on_alike(params, optimizer, twins, untouched)


def assert_goes_on_alike(params, optimizer, twins, untouched):
    for step in gradients(params, 2, seed=5):
        feed(optimizer, params, step)
        feed(untouched, twins, step)
    assert all_equal(params, twins) and optimizer.window_stats() == untouched.window_stats()


def test_counters_of_other_types_are_taken():
    """As a distributed checkpoint or numpy gives them."""
    params, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    lead = lead_of(saved)
    lead["pushed"] = torch.tensor(lead["pushed"])
    saved["state"][1]["step"] = torch.tensor(6.0)
    twins, loaded = make()
    loaded.load_state_dict(saved)
    assert loaded._window.gram.pushed == 6 and loaded.window_stats() == optimizer.window_stats()


def damage(saved, chance):
    """Change one random thing in a state."""
    if chance.random() < 0.2:
        container = chance.choice([saved, saved["param_groups"][0], saved["state"]])
    else:
        container = saved["state"][chance.choice(sorted(saved["state"]))]
    key = chance.choice(sorted(container, key=str))
    value = container[key]
    ways = [None, "x", -1, 0, 7, 2.5, float("nan"), 10**30, [], {}, True, torch.zeros(3), torch.zeros(2, 2).long()]
    if chance.random() < 0.1:
        del container[key]
    elif isinstance(value, torch.Tensor) and chance.random() < 0.7:
        tensor_ways = [value.T if value.ndim == 2 else value.flatten(), value.double(), value.half()]
        tensor_ways += [torch.full_like(value, True), value.unsqueeze(0), value.to("meta"), value.new_zeros(0)]
        if value.is_floating_point():
            tensor_ways += [value * torch.nan, value * 1e30, -value, value.roll(1)]
        container[key] = chance.choice(tensor_ways)
    else:
        container[key] = chance.choice(ways)
    return f"{key}: {container.get(key)!r:.60}"


@pytest.mark.slow
def test_random_damage_is_refused_by_documented_errors_or_does_no_harm():
    good = copy.deepcopy(trained()[1].state_dict())
    chance = random.Random(0)
    refused = 0
    for number in range(DAMAGES):
        saved = copy.deepcopy(good)
        what = f"damage {number}, {damage(saved, chance)}"
        params, optimizer = trained(2)
        twins, untouched = trained(2)
        try:
            optimizer.load_state_dict(saved)
        except DOCUMENTED as error:
            assert len(str(error)) > 20, what
            refused += 1
            assert_goes_on_alike(params, optimizer, twins, untouched)
            continue
        except Exception as error:
            pytest.fail(f"{what}: {error!r}")
        before = values(params)
        feed(optimizer, params, gradients(params, 1, seed=5)[0])
        assert all(bool(p.isfinite().all()) for p in params), what
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert len(before) == len(params)
    assert DAMAGES / 3 < refused < DAMAGES
