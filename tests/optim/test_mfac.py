"""The optimizer's steps against a naive float64 implementation."""

import pytest
import torch
from torch import nn

from mfac_hf import MFAC
from mfac_hf.ops.build import load_native
from tests.helpers.device import DEVICE
from tests.helpers.oracles import NaiveMFAC
from tests.helpers.parameters import all_equal, assert_same, feed, make_grads, make_params, values

# Window and parameters in this type, the error that its rounding may leave after some twenty steps.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("normalize", ["num_grads", "count"])
@pytest.mark.parametrize("grad_decay", [0.0, 0.7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.3, "weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
)
def test_matches_naive_mfac(dtype, normalize, grad_decay, options):
    params = make_params(dtype=dtype)
    common = {"num_grads": 7, "damping": 1e-2, "normalize": normalize, "grad_decay": grad_decay}
    naive = NaiveMFAC([{"params": params, "lr": 0.05, **options}], **common)
    optimizer = MFAC(params, metric="identity", lr=0.05, window_dtype=dtype, **common, **options)
    for grads in make_grads(params, 17):
        feed(optimizer, params, grads)
        naive.step(grads)
        assert_same(params, naive, TOLERANCE[dtype])


@pytest.mark.parametrize("normalize", ["num_grads", "count"])
def test_groups_have_their_own_options(normalize):
    params = make_params()
    groups = [
        {"params": params[:2], "lr": 0.1, "weight_decay": 0.3, "momentum": 0.5},
        {"params": params[2:3], "lr": 0.01, "weight_decay": 0.2, "decoupled_weight_decay": True},
        {"params": params[3:], "lr": 0.02},
    ]
    naive = NaiveMFAC(groups, num_grads=5, damping=1e-2, normalize=normalize)
    optimizer = MFAC(
        groups, metric="identity", lr=123.0, num_grads=5, damping=1e-2, normalize=normalize, window_dtype=torch.float64
    )
    for grads in make_grads(params, 12):
        feed(optimizer, params, grads)
        naive.step(grads)
        assert_same(params, naive, 1e-9)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.8, "weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
)
@pytest.mark.parametrize("seed", range(3))
def test_missing_gradients_are_zero_columns_and_leave_their_parameter(options, seed):
    """Any pattern of None: never there, late, now and then, all at once."""
    generator = torch.Generator().manual_seed(seed)
    params = make_params(seed=seed)
    naive = NaiveMFAC([{"params": params, "lr": 0.1, **options}], num_grads=4, damping=1e-2)
    optimizer = MFAC(
        params, metric="identity", lr=0.1, num_grads=4, damping=1e-2, window_dtype=torch.float64, **options
    )
    for step, full in enumerate(make_grads(params, 14, seed)):
        absent = torch.rand(len(params), generator=generator) < 0.4
        grads = [None if absent[i] or (i == 0 and step < 6) else grad for i, grad in enumerate(full)]
        before = values(params)
        feed(optimizer, params, grads)
        if all(grad is None for grad in grads):
            assert all_equal(before, values(params))
            continue
        naive.step(grads)
        assert_same(params, naive, 1e-9)
        assert all(torch.equal(before[i], p) for i, p in enumerate(params) if grads[i] is None)


def test_step_without_any_gradient_changes_nothing():
    params = make_params()
    optimizer = MFAC(params, metric="identity", num_grads=3)
    assert optimizer.step() is None and optimizer.step(lambda: 1.5) == 1.5
    assert not optimizer.state and optimizer.window_stats()["window_fill"] == 0.0


def test_frozen_then_unfrozen_then_added():
    """Columns appear with the first gradient; the rows stored before hold zeros there."""
    params, added = make_params(), make_params(((3, 2),), seed=9)
    params[1].requires_grad_(False)
    options = {"num_grads": 5, "damping": 1e-2}
    group, further = {"params": params, "lr": 0.1, "momentum": 0.5}, {"params": added, "lr": 0.03}
    naive = NaiveMFAC([group], **options)
    optimizer = MFAC([group], metric="identity", window_dtype=torch.float64, **options)
    for step, grads in enumerate(make_grads([*params, *added], 18)):
        if step == 3:
            params[1].requires_grad_(True)
        if step == 8:
            optimizer.add_param_group(dict(further))
            naive.add_group(further)
        held = params if step < 8 else [*params, *added]
        present = [grad if p.requires_grad else None for p, grad in zip(held, grads, strict=False)]
        feed(optimizer, held, present)
        naive.step(present)
        assert_same(held, naive, 1e-9)
        assert ("window" in optimizer.state[params[1]]) == (step >= 3)


def test_nothing_is_allocated_before_the_first_step():
    """Trainer builds the optimizer early, and accelerate moves and reloads whatever state there is."""
    params = make_params()
    optimizer = MFAC(params, metric="identity", num_grads=1 << 40)  # would be hundreds of terabytes
    assert not optimizer.state and optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("num_grads", [1, 2])
def test_shortest_windows(num_grads):
    params = make_params()
    naive = NaiveMFAC([{"params": params, "lr": 0.1}], num_grads=num_grads, damping=0.1)
    optimizer = MFAC(params, metric="identity", lr=0.1, num_grads=num_grads, damping=0.1, window_dtype=torch.float64)
    for grads in make_grads(params, 6):
        feed(optimizer, params, grads)
        naive.step(grads)
        assert_same(params, naive, 1e-9)


def test_closure():
    """Evaluated once, with gradients enabled, and its loss returned."""
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    first, second = (
        MFAC(model.parameters(), metric="identity", num_grads=4),
        MFAC(twin.parameters(), metric="identity", num_grads=4),
    )
    calls = []

    def closure():
        first.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        calls.append(loss.item())
        return loss

    for _ in range(6):
        returned = first.step(closure)
        second.zero_grad()
        loss = twin(x).square().mean()
        loss.backward()
        second.step()
        assert returned.item() == loss.item() == calls[-1]
    assert len(calls) == 6 and all_equal(model.parameters(), twin.parameters())


def test_learning_rate_schedule():
    """Also a warm-up that starts at zero: the parameters stay, the gradient enters the window."""
    params = make_params()
    group = {"params": params, "lr": 0.1}
    naive = NaiveMFAC([group], num_grads=4, damping=1e-2)
    optimizer = MFAC(params, metric="identity", lr=0.1, num_grads=4, damping=1e-2, window_dtype=torch.float64)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 5) / 5)
    before = values(params)
    for step, grads in enumerate(make_grads(params, 9)):
        group["lr"] = 0.1 * min(step, 5) / 5
        feed(optimizer, params, grads)
        schedule.step()
        naive.step(grads)
        assert step > 0 or all_equal(before, values(params))
        assert_same(params, naive, 1e-9)


def test_learning_rate_as_a_tensor():
    params, twins = make_params(), make_params()
    optimizer, plain = (
        MFAC(params, torch.tensor(0.1), metric="identity", num_grads=3),
        MFAC(twins, 0.1, metric="identity", num_grads=3),
    )
    for grads in make_grads(params, 4):
        feed(optimizer, params, grads)
        feed(plain, twins, grads)
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-6)  # 0.1 as float32


def test_gradient_scaler_keeps_overflowed_steps_out_of_the_window():
    model = nn.Linear(3, 1)
    optimizer = MFAC(model.parameters(), metric="identity", lr=1e-3, num_grads=4)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10)
    for step in range(6):
        optimizer.zero_grad()
        loss = model(torch.full((2, 3), float(step + 1))).mean()
        scaler.scale(loss * (float("inf") if step in (0, 3) else 1.0)).backward()
        pushed, before = 0 if optimizer._window is None else optimizer._window.gram.pushed, values(model.parameters())
        scaler.step(optimizer)
        scaler.update()
        skipped = step in (0, 3)
        assert (0 if optimizer._window is None else optimizer._window.gram.pushed) == pushed + (not skipped)
        assert all_equal(before, model.parameters()) == skipped
    assert optimizer.skipped_steps == 0  # the scaler never called step
    newest = optimizer._window.columns[0].buffer_MD[optimizer._window.gram.newest]
    torch.testing.assert_close(newest, torch.tensor([6.0, 6.0, 6.0, 1.0]))  # unscaled


@pytest.mark.parametrize("window_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_parameters(window_dtype):
    """Directions are computed in float32 and rounded once on the way into the parameters."""
    params = make_params(dtype=torch.bfloat16)
    options = {"num_grads": 5, "damping": 1e-1}
    group = {"params": params, "lr": 0.1, "momentum": 0.9}
    naive = NaiveMFAC([group], **options)
    optimizer = MFAC(params, metric="identity", lr=0.1, momentum=0.9, window_dtype=window_dtype, **options)
    for grads in make_grads(params, 10):
        feed(optimizer, params, grads)
        naive.step(grads)
        for (expected, _), p in zip(naive.entries, params, strict=True):
            # One unit in the last place of the parameter: the direction was rounded before it was subtracted.
            torch.testing.assert_close(p.detach().double(), expected, rtol=2**-7, atol=2**-9)
            expected.copy_(p.detach())
        assert all(optimizer.state[p]["momentum_buffer"].dtype == torch.float32 for p in params)


def test_mixed_parameter_types():
    params = [
        *make_params(((3, 2),), torch.float64),
        *make_params(((4,),), torch.float32),
        *make_params(((2,),), torch.bfloat16),
    ]
    naive = NaiveMFAC([{"params": params, "lr": 0.01}], num_grads=4, damping=1e-1)
    optimizer = MFAC(params, metric="identity", lr=0.01, num_grads=4, damping=1e-1)
    for grads in make_grads(params, 6):
        feed(optimizer, params, grads)
        naive.step(grads)
    for p, expected, tolerance in zip(params, naive.params, (1e-5, 1e-5, 2e-2), strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=tolerance, atol=tolerance)


def test_parameters_that_are_not_contiguous():
    """Transposed, strided and channels-last: columns follow the logical order, so the results are the same bits."""
    plain = make_params(((4, 6), (3, 2, 2, 2), (5,)))
    odd = [
        nn.Parameter(plain[0].detach().t().contiguous().t()),
        nn.Parameter(plain[1].detach().clone().to(memory_format=torch.channels_last)),
        nn.Parameter(torch.zeros(10, dtype=torch.float64)[::2]),
    ]
    with torch.no_grad():
        odd[2].copy_(plain[2])
    assert not any(p.is_contiguous() for p in odd)
    options = {"lr": 0.1, "num_grads": 4, "momentum": 0.9, "weight_decay": 0.1}
    first, second = MFAC(plain, metric="identity", **options), MFAC(odd, metric="identity", **options)
    for grads in make_grads(plain, 7):
        feed(first, plain, grads)
        feed(second, odd, [grad.t().contiguous().t() if grad.ndim == 2 else grad for grad in grads])
        assert all_equal(plain, odd)


def test_repeated_gradients_move_parameters_sanely():
    """A full batch at a tiny learning rate repeats itself; the step must not be rounding noise."""
    p = nn.Parameter(torch.zeros(400))
    grad = torch.randn(400, generator=torch.Generator().manual_seed(0))
    if not load_native("cpu"):
        pytest.skip("needs the native kernels, which treat every row alike")
    optimizer = MFAC([p], metric="identity", lr=1.0, num_grads=32, damping=1e-8)
    for copies in range(1, 40):
        before = p.detach().clone()
        feed(optimizer, [p], [grad])
        expected = -grad / (1e-8 + min(copies, 32) * grad.square().sum() / 32)
        torch.testing.assert_close(p.detach() - before, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_grads": 0}, "num_grads is 0"),
        ({"num_grads": -3}, "num_grads is -3"),
        ({"num_grads": 1.5}, r"num_grads is 1\.5"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"damping": -1.0}, "damping is -1.0"),
        ({"damping": float("nan")}, "damping is nan"),
        ({"lr": -1e-3}, "lr is -0.001"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"grad_decay": 1.0}, "grad_decay is 1.0"),
        ({"normalize": "mean"}, "normalize is 'mean'"),
        ({"window_dtype": torch.float16}, "float16"),
        ({"window_device": []}, "window_device is an empty list"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MFAC(make_params(), metric="identity", **options)


@pytest.mark.parametrize("params", [[], [{"params": []}], iter(())])
def test_empty_parameter_list(params):
    if isinstance(params, list) and params:
        assert (
            MFAC(params, metric="identity").param_groups[0]["params"] == []
        )  # torch allows an empty group, and so an empty decay group
    else:
        with pytest.raises(ValueError, match="empty parameter list"):
            MFAC(params, metric="identity")


def test_window_stats():
    params = make_params(((40,), (24,)), dtype=torch.float32)
    optimizer = MFAC(params, metric="identity", num_grads=4, damping=1e-2)
    keys = ["window_fill", "gram_condition", "skipped_steps", "jitter_escalations", "window_gib"]
    assert list(optimizer.window_stats()) == keys and optimizer.window_stats()["window_gib"] == 0.0
    for step, grads in enumerate(make_grads(params, 6)):
        feed(optimizer, params, grads)
        stats = optimizer.window_stats()
        assert all(type(value) is float for value in stats.values())
        assert stats["window_fill"] == min(step + 1, 4) / 4
        assert stats["window_gib"] == 4 * 64 * 4 / 2**30
    rows = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in make_grads(params, 6)[2:]]).double()
    exact = torch.linalg.cond(rows @ rows.T + 4 * 1e-2 * torch.eye(4))
    assert optimizer.window_stats()["gram_condition"] == pytest.approx(float(exact), rel=1e-4)
