"""The options of an optimizer's window."""

import dataclasses

import numpy
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


@pytest.mark.parametrize("value", [numpy.int64(3), numpy.int32(3)])
def test_whole_numbers_of_any_type(value):
    options = make(num_grads=value, damping=numpy.float32(0.5), grad_decay=numpy.float64(0.25))
    assert options == make(num_grads=3, damping=0.5, grad_decay=0.25)
    assert (type(options.num_grads), type(options.damping), type(options.grad_decay)) == (int, float, float)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_grads", "3"),
        ("num_grads", 3.0),
        ("num_grads", True),
        ("damping", "1e-3"),
        ("damping", None),
        ("damping", float("nan")),
        ("grad_decay", "0.9"),
        ("grad_decay", None),
        ("row_sparse", "false"),
        ("save_window", None),
        ("window_dtype", "float32"),
        ("window_device", "gpu"),
        ("window_device", ["cpu", "gpu:1"]),
        ("window_device", 17),
    ],
)
def test_other_types_are_refused_by_name_and_value(name, value):
    seen = value[-1] if isinstance(value, list) else value
    with pytest.raises(ValueError, match=f"{name} is '?{seen}'?[;,].*expected"):
        make(**{name: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device of this name")
def test_host_memory_is_worked_with_by_the_device_of_the_parameters():
    options, gpu = make(window_device="host"), torch.device("cuda", 1)
    assert options.devices(gpu) == [torch.device("cpu")] and options.compute_device(gpu) == gpu
    assert make(window_device="cpu").compute_device(gpu) is None and make().compute_device(gpu) is None


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="window_device is 'cuda:0', which cannot be used here"):
        make(window_device="cuda:0")
