"""The options of an optimizer's window."""

import dataclasses

import pytest
import torch

from mfac_hf.optim.options import ParameterWindowOptions


def make(**options):
    return ParameterWindowOptions(**{"num_grads": 3, "damping": 1e-3, **options})


@pytest.mark.parametrize(
    ("given", "kept", "devices"),
    [
        (None, None, ["meta"]),
        ("cpu", "cpu", ["cpu"]),
        (torch.device("cpu", 0), "cpu:0", ["cpu:0"]),
        (["cpu", torch.device("cpu"), "meta"], ["cpu", "cpu", "meta"], ["cpu", "meta"]),
    ],
)
def test_devices_are_kept_by_name_and_used_once(given, kept, devices):
    options = make(window_device=given)
    assert options.window_device == kept
    assert options.devices(torch.device("meta")) == [torch.device(name) for name in devices]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_directions_are_at_least_float32(dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert make(window_dtype=dtype).result_dtype == expected


def test_picked_from_the_settings_of_an_optimizer():
    options = make(grad_decay=0.5, window_device=["cpu"], save_window=False)
    settings = {"lr": 1.0, **dataclasses.asdict(options), "momentum": 0.9}
    assert ParameterWindowOptions.pick(settings) == options
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.damping = 1.0
    with pytest.raises(ValueError, match="grad_decay is 1.0"):
        ParameterWindowOptions.pick({**settings, "grad_decay": 1.0})
