"""A step takes its own types, whatever surrounds it."""

import pytest
import torch

from mfac_hf import MFAC
from mfac_hf.optim.parameter_window import ParameterWindow
from tests.helpers.device import DEVICE
from tests.helpers.parameters import all_equal, feed, make_grads, make_params


@pytest.mark.usefixtures("tables_of_any_size")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"window_dtype": torch.bfloat16}, {"momentum": 0.9, "weight_decay": 0.1}])
def test_no_digit_changes_inside_autocast(options, dtype):
    shapes = ((4, 3), (5,), (40, 2))
    params, twins = make_params(shapes, torch.float32), make_params(shapes, torch.float32)
    settings = {"lr": 0.01, "num_grads": 3, "damping": 1e-3, **options}
    optimizer, plain = MFAC(params, metric="identity", **settings), MFAC(twins, metric="identity", **settings)
    for step, grads in enumerate(make_grads(params, 8)):
        grads[2][5:] = 0.0
        with torch.autocast(DEVICE.type, dtype=dtype):
            feed(optimizer, params, grads)
            if step == 5:
                optimizer.set_masks({params[0]: torch.arange(12).view(4, 3) % 2 > 0})
            assert torch.is_autocast_enabled(DEVICE.type)
        feed(plain, twins, grads)
        if step == 5:
            plain.set_masks({twins[0]: torch.arange(12).view(4, 3) % 2 > 0})
    assert all_equal(params, twins)


def test_the_closure_keeps_its_autocast():
    p = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = MFAC([p], metric="identity", num_grads=2)

    def closure():
        product = p @ torch.ones(3, 3)
        assert product.dtype == torch.bfloat16
        loss = product.sum()
        loss.backward()
        return loss

    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert optimizer.step(closure) == 27


def test_a_compiled_step_is_the_same_step():
    params, twins = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    settings = {"lr": 0.01, "num_grads": 3, "damping": 1e-3}
    optimizer, plain = MFAC(params, metric="identity", **settings), MFAC(twins, metric="identity", **settings)
    compiled = torch.compile(optimizer.step, backend="eager")
    for grads in make_grads(params, 5):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        compiled()
        feed(plain, twins, grads)
    assert all_equal(params, twins)


def test_autocast_is_off_where_products_are_taken(monkeypatch):
    """CUDA's autocast lowers matrix-vector products, and the CPU's does not: so this looks at the switch."""
    seen = []
    for name in ("push", "shrink"):
        original = getattr(ParameterWindow, name)

        def watched(*args, original=original):
            seen.append(torch.is_autocast_enabled(DEVICE.type))
            return original(*args)

        monkeypatch.setattr(ParameterWindow, name, watched)
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = MFAC([p], metric="identity", num_grads=2)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        feed(optimizer, [p], [torch.ones(3)])
        optimizer.set_masks({p: torch.tensor([True, True, False])})
        feed(optimizer, [p], [torch.ones(3)])
    assert seen == [False] * 3
