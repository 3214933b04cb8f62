"""Parameter groups: which options they may have, and which parameters."""

import os
from typing import Any

import torch.distributed as dist

from mfac_hf.fisher.definite import is_number
from mfac_hf.optim.options import ParameterWindowOptions, check_bool

__all__ = ["check_group", "check_numbers", "check_parameters", "check_process_group", "remove_window_options"]


def check_group(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse a parameter group whose options are out of range, or another window's.

    Args:
        group: what the user gave.
        defaults: the optimizer's options, which hold where the group has none of its own.

    Raises:
        ValueError: names the first option that does not fit.
    """
    for name in ParameterWindowOptions.names():
        if name in group and group[name] != defaults[name]:
            raise ValueError(
                f"{name}={group[name]!r} in a parameter group: there is one window for all groups; "
                f"pass {name} to MFAC itself"
            )
    options = {**defaults, **group}
    check_numbers(options)


def check_numbers(group: dict[str, Any]) -> None:
    """Refuse options of a group's own, which a user may change at any time, that are out of range.

    Raises:
        ValueError: names the first option that does not fit.
    """
    for name, upper in (("lr", float("inf")), ("momentum", 1.0), ("weight_decay", float("inf"))):
        value = group.get(name, 0.0)
        if not is_number(value) or not 0.0 <= value < upper:
            raise ValueError(f"{name} is {value!r}; expected a number in [0, {upper})")
    check_bool("decoupled_weight_decay", group.get("decoupled_weight_decay", False))


def check_parameters(groups: list[dict[str, Any]]) -> None:
    """Refuse parameters whose gradients the window cannot take.

    Raises:
        TypeError: for complex parameters.
        ValueError: for parameters of DeepSpeed or FSDP1, or on several devices.
    """
    parameters = [p for group in groups for p in group["params"]]
    for p in parameters:
        if p.is_complex():
            raise TypeError(
                f"a parameter of shape {tuple(p.shape)} is {p.dtype}: the empirical Fisher here is real. "
                "Optimize torch.view_as_real(parameter) instead"
            )
        if hasattr(p, "ds_id") or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
            raise ValueError(
                "DeepSpeed ZeRO partitions and flattens gradients behind the optimizer, so the window would hold "
                "something else. Use DistributedDataParallel with MFAC(process_group=...), or FSDP2, instead"
            )
        if getattr(p, "_is_flat_param", False):
            raise ValueError(
                "FSDP1 flattens parameters, which MFAC does not support. Use FSDP2 (fsdp_version: 2) instead"
            )
    for group in groups:
        _check_listed_once(group)
    devices = {p.device for p in parameters if p.requires_grad}  # frozen ones may stay elsewhere
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"parameters on several devices ({names}); move the model to one device before building MFAC")


def _check_listed_once(group: dict[str, Any]) -> None:
    """Refuse a tied weight that is listed under each of its names: it would step twice, with two sets of columns."""
    first: dict[int, int] = {}
    names = group.get("param_names", [])
    for position, p in enumerate(group["params"]):
        if (other := first.setdefault(id(p), position)) != position:
            both = f" ({names[other]} and {names[position]})" if names else ""
            raise ValueError(
                f"the same parameter of shape {tuple(p.shape)} is listed twice in a group, at {other} and {position}"
                f"{both}: a tied weight. List it once, as model.parameters() does"
            )


def check_process_group(group: Any) -> dist.ProcessGroup | None:
    """The process group; refuses what is none, before a step calls it."""
    if group is None or isinstance(group, dist.ProcessGroup):
        return group
    raise ValueError(
        f"process_group is {group!r}; expected one of torch.distributed, such as torch.distributed.group.WORLD once "
        "init_process_group was called, or None"
    )


def remove_window_options(groups: list[dict[str, Any]]) -> None:
    """Take the options of the window, which torch copies into every group, out of them."""
    for group in groups:
        for name in ParameterWindowOptions.names():
            group.pop(name, None)
