"""The passes over the window in Adam's metric against float64."""

import pytest
import torch

from mfac_hf.ops import metric
from mfac_hf.ops.metric import metric_combine, metric_move, metric_push

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(params=["dispatched", "pytorch"])
def operators(request):
    """With a native kernel where there is one, and without."""
    if request.param == "dispatched":
        return metric_push, metric_combine
    return metric._metric_push, metric._metric_combine


def filled(m, d, dtype, *, stride=0, steps=0, operators=(metric_push, metric_combine)):
    """A window after some steps, what it should hold in float64, and the moment."""
    generator = torch.Generator().manual_seed(m * 1000 + d)
    window = torch.full((m, d + stride), float("nan"), dtype=dtype)[:, :d]
    moment = torch.zeros(d, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    exact = torch.zeros(d, dtype=torch.float64)
    for step in range(1, steps + 1):
        grad = torch.randn(d, generator=generator).to(moment) * 10 ** (step % 3)
        exact = 0.9 * exact + 0.1 * grad.double() ** 2
        rate = 0.1 / (1 - 0.9**step)
        row, count = (step - 1) % m, min(step, m)
        dots = operators[0](window, [grad], moment, row, count, rate, 1e-8)
        scaled = grad.double() / ((exact / (1 - 0.9**step)).sqrt() + 1e-8).sqrt()
    return window, moment, exact / (1 - 0.9**steps), dots, row, scaled


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "d", "stride"), [(1, 1, 0), (3, 5, 0), (9, 33, 3), (17, 4097, 0), (5, 9001, 7)])
def test_a_pushed_gradient_is_scaled_and_multiplied(operators, m, d, stride, dtype):
    window, moment, exact, dots, row, scaled = filled(m, d, dtype, stride=stride, steps=m + 2, operators=operators)
    torch.testing.assert_close(moment.double(), exact, rtol=2e-6, atol=0)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(window[row].double(), scaled, rtol=rounding, atol=0)
    # of the numbers as they are stored
    expected = window.double() @ window[row].double()
    lengths = window.double().norm(dim=1) * window[row].double().norm()
    assert bool(((dots - expected).abs() <= 1e-6 * lengths).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("m", "d", "stride"), [(1, 1, 0), (9, 33, 3), (17, 4097, 0)])
def test_a_step_is_combined_and_scaled(operators, m, d, stride, wide, dtype):
    window, moment, *_ = filled(m, d, dtype, stride=stride, steps=m + 2)
    weights = torch.randn(m, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = operators[1](window, weights, moment, 1e-8, wide)
    assert step.dtype == moment.dtype
    scale = (moment.double().sqrt() + 1e-8).sqrt()
    size = (weights.abs() @ window.double().abs()) / scale
    assert bool(((step.double() - weights @ window.double() / scale).abs() <= 2e-6 * size).all())


def test_entries_that_were_always_zero_stay_zero(operators):
    window, moment = torch.zeros(2, 3), torch.zeros(3)
    dots = operators[0](window, [torch.tensor([0.0, 2.0, 0.0])], moment, 0, 1, 1.0, 1e-8)
    assert window[0].tolist() == pytest.approx([0.0, 2**0.5, 0.0])
    assert dots.tolist() == pytest.approx([2.0])
    step = operators[1](window[:1], torch.ones(1, dtype=torch.float64), moment, 1e-8)
    assert step.tolist() == pytest.approx([0, 1, 0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grads": [torch.ones(4)]}, "4"),
        ({"grads": [torch.ones(3, dtype=torch.float64)]}, "float64|type"),
        ({"moment_D": torch.ones(2)}, "2"),
        ({"row": 2, "count": 2}, "row"),
        ({"count": 3}, "count|row"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(operators, change, words):
    window, moment = torch.zeros(2, 3), torch.zeros(3)
    arguments = {"grads": [torch.ones(3)], "moment_D": moment, "row": 0, "count": 1, "rate": 0.5, "eps": 1e-8}
    with pytest.raises((ValueError, RuntimeError), match=words):
        operators[0](window, **(arguments | change))
    assert not window.any() and not moment.any()


def test_operators_are_registered_soundly():
    window, moment = torch.randn(4, 7), torch.rand(7)
    torch.library.opcheck(torch.ops.mfac.metric_push, (window, [torch.randn(7)], moment, 1, 3, 0.5, 1e-8))
    weights = torch.randn(4, dtype=torch.float64)
    torch.library.opcheck(torch.ops.mfac.metric_combine, (window, weights, moment, 1e-8, False))


SIZES = [1, 4095, 0, 3, 5000, 2]  # pieces that end before, at and behind the end of a tile of columns


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_in_pieces_are_pushed_as_one(operators, dtype):
    d = sum(SIZES)
    windows, moments, grad = torch.zeros(2, 3, d, dtype=dtype), torch.zeros(2, d), torch.randn(d)
    if dtype == torch.float64:
        moments, grad = moments.double(), grad.double()
    strided = [torch.stack([part, part], dim=1)[:, 0] for part in grad.split(SIZES)]
    whole = operators[0](windows[0], [grad], moments[0], 1, 2, 1.0, 1e-8)
    assert torch.equal(operators[0](windows[1], strided, moments[1], 1, 2, 1.0, 1e-8), whole)
    assert torch.equal(windows[0], windows[1]) and torch.equal(moments[0], moments[1])


@pytest.mark.parametrize("move", [metric_move, metric._metric_move], ids=["dispatched", "pytorch"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_move_in_pieces(move, wide, dtype):
    d = sum(SIZES)
    window, moment, *_ = filled(9, d, dtype, stride=3, steps=9)
    weights = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    factors, rates = [1.0, 0.9, 1.0, 1.0, 0.5, 0.5], [0.1, 0.1, 0.1, 0.3, 0.3, 0.3]
    pieces = list(torch.randn(d, generator=torch.Generator().manual_seed(2)).to(moment).split(SIZES))
    moved = [torch.nn.Parameter(piece.clone()) for piece in pieces]
    versions = [p._version for p in moved]
    with torch.no_grad():
        move(window, weights, moment, 1e-8, wide, moved, factors, rates)
    steps = metric_combine(window, weights, moment, 1e-8, wide).split(SIZES)
    for p, piece, step, factor, rate in zip(moved, pieces, steps, factors, rates, strict=True):
        tolerance = 1e-6 if moment.dtype == torch.float32 else 1e-13
        torch.testing.assert_close(p.detach(), factor * piece - rate * step, rtol=tolerance, atol=tolerance)
    if move is metric_move:  # autograd notices
        assert all(p._version > version for p, version in zip(moved, versions, strict=True))


@pytest.mark.parametrize("move", [metric_move, metric._metric_move], ids=["dispatched", "pytorch"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parameters": [torch.ones(2)]}, "2"),
        ({"parameters": [torch.ones(3, dtype=torch.float64)]}, "float64|type"),
        ({"factors": [1.0, 1.0]}, "2 factors"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_moves_that_do_not_fit_are_refused_and_nothing_changes(move, change, words):
    parameters = [torch.ones(3)]
    weights = torch.ones(2, dtype=torch.float64)
    arguments = {"weights_M": weights, "moment_D": torch.ones(3), "eps": 1e-8, "wide": False}
    arguments |= {"parameters": parameters, "factors": [0.5], "rates": [0.5]}
    with pytest.raises((ValueError, RuntimeError), match=words):
        move(torch.ones(2, 3), **(arguments | change))
    assert all(bool((p == 1).all()) for p in (arguments | change)["parameters"])
