"""Parameters and options that the optimizer refuses, when it is built and when a group is added."""

import pytest
import torch
from torch import nn

from mfac_hf import MFAC
from tests.helpers.parameters import make_params


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, device="meta"))],
            ValueError,
            "((cpu|cuda:0), meta|meta, )",
        ),
        (lambda: [nn.Parameter(torch.zeros(3, dtype=torch.complex64))], TypeError, "complex64.*view_as_real"),
    ],
)
def test_bad_parameters(build, error, message):
    with pytest.raises(error, match=message):
        MFAC(build(), metric="identity")
    optimizer = MFAC(make_params(), metric="identity")
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": build()})
    assert len(optimizer.param_groups) == 1


def test_bad_groups_leave_the_optimizer_as_it_was():
    params = make_params()
    optimizer = MFAC(params[:2], metric="identity", num_grads=4)
    for group, message in (
        ({"lr": -1.0}, "lr is -1.0"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"num_grads": 5}, "num_grads=5 in a parameter group.*pass num_grads to MFAC itself"),
        ({"damping": 1.0}, "damping=1.0 in a parameter group"),
        ({"window_dtype": torch.bfloat16}, "window_dtype=torch.bfloat16 in a parameter group"),
        ({"normalize": "count"}, "normalize='count' in a parameter group"),
        ({"save_window": False}, "save_window=False in a parameter group"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": params[2:], **group})
        with pytest.raises(ValueError, match=message):
            MFAC([{"params": params, **group}], metric="identity", num_grads=4)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    optimizer.add_param_group({"params": params[2:], "num_grads": 4})  # the same value is no contradiction
    assert "num_grads" not in optimizer.param_groups[1]


def test_frameworks_that_partition_gradients_are_refused(monkeypatch):
    params = make_params()
    params[1].ds_id = 3
    with pytest.raises(ValueError, match="DeepSpeed ZeRO.*process_group.*FSDP2"):
        MFAC(params, metric="identity")
    params = make_params()
    params[0]._is_flat_param = True
    with pytest.raises(ValueError, match="FSDP1 flattens.*FSDP2"):
        MFAC(params, metric="identity")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed ZeRO"):
        MFAC(make_params(), metric="identity")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", "1e-4"),
        ("lr", None),
        ("lr", True),
        ("momentum", None),
        ("momentum", "0.9"),
        ("weight_decay", [0.1]),
        ("weight_decay", float("nan")),
        ("decoupled_weight_decay", "false"),
        ("process_group", True),
        ("process_group", "gloo"),
        ("masks", [True]),
        ("masks", {"weight": torch.ones(3, dtype=torch.bool)}),
    ],
)
def test_options_of_another_type_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} (is|maps) .*expected"):
        MFAC(make_params(), metric="identity", **{name: value})


@pytest.mark.parametrize("names", [("a", "b"), None])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_tied_weight_is_listed_once(names):
    p, other = make_params()[:2]
    listed = [p, other, p] if names is None else [("a", p), ("c", other), ("b", p)]
    with pytest.raises(
        ValueError,
        match="parameter 0 of .* listed twice.*parameter 2 .*tied" if names is None else "parameter a .* parameter b",
    ):
        MFAC(listed, metric="identity")
    optimizer = MFAC([other], metric="identity")
    with pytest.raises(ValueError, match="listed twice"):
        optimizer.add_param_group({"params": [p, p]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [p]})
    optimizer.param_groups[0]["params"].append(p)  # torch does not look at this
    with pytest.raises(ValueError, match="listed twice"):
        optimizer.step()


def test_frozen_parameters_may_lie_elsewhere():
    frozen = nn.Parameter(torch.zeros(2, device="meta"), requires_grad=False)
    p = nn.Parameter(torch.zeros(3))
    optimizer = MFAC([p, frozen], metric="identity", num_grads=2)
    p.grad = torch.ones(3)
    optimizer.step()
    assert bool((p != 0).all())
