"""Parameter groups: which options they may have, and which parameters."""

import os
from dataclasses import replace
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mfac_hf.fisher.definite import is_number
from mfac_hf.optim.options import SCHEDULED, ParameterWindowOptions, check_bool
from mfac_hf.optim.settings import check_adam

__all__ = [
    "check_group",
    "check_numbers",
    "check_parameters",
    "check_process_group",
    "follow_groups",
    "labels",
    "remove_window_options",
]


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
    if "betas" in defaults:
        check_adam(group | {name: options[name] for name in ("betas", "eps")}, defaults)


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
    if "betas" in group:
        check_adam(group, group)


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
    _check_listed_once(groups)
    devices = {p.device for p in parameters if p.requires_grad}  # frozen ones may stay elsewhere
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"parameters on several devices ({names}); move the model to one device before building MFAC")


def _check_listed_once(groups: list[dict[str, Any]]) -> None:
    """Refuse a parameter that is listed twice, as a tied weight under each of its names: it would step twice."""
    first: dict[int, str] = {}
    parameters = chain.from_iterable(group["params"] for group in groups)
    for p, label in zip(parameters, labels(groups), strict=True):
        if (other := first.setdefault(id(p), label)) is not label:
            raise ValueError(
                f"{other} is listed twice: it is {label} too, as a tied weight is. List it once, as "
                "model.parameters() does"
            )


def labels(groups: list[dict[str, Any]]) -> list[str]:
    """What errors call each parameter: its name, or where it stands, and its shape."""
    names = chain.from_iterable(group.get("param_names", [None] * len(group["params"])) for group in groups)
    parameters = chain.from_iterable(group["params"] for group in groups)
    return [
        f"parameter {name or position} of shape {tuple(p.shape)}"
        for position, (name, p) in enumerate(zip(names, parameters, strict=False))
    ]


def check_process_group(group: Any) -> dist.ProcessGroup | None:
    """The process group, None for ``"auto"``; refuses what is none, before a step calls it."""
    if group is None or isinstance(group, dist.ProcessGroup):
        return group
    if isinstance(group, str) and group == "auto":
        return None
    raise ValueError(
        f"process_group is {group!r}; expected 'auto', one of torch.distributed, such as "
        "torch.distributed.group.WORLD once init_process_group was called, or None"
    )


def remove_window_options(groups: list[dict[str, Any]]) -> None:
    """Take the fixed options of the window, which torch copies into every group, out of them."""
    for group in groups:
        for name in ParameterWindowOptions.names():
            if name not in SCHEDULED or (name == "grad_decay" and "betas" in group):
                group.pop(name, None)


def follow_groups(groups: list[dict[str, Any]], options: ParameterWindowOptions) -> ParameterWindowOptions:
    """The options of the window with the damping and grad_decay that now stand in the groups.

    Raises:
        ValueError: for a value out of range, another one in each group, or another option of the window: it is fixed.
    """
    if options.metric == "adam":
        groups = [{**group, "grad_decay": group["betas"][0]} for group in groups]
    changed = {}
    for name in options.names():
        values = [group[name] for group in groups if name in group]
        new = [value for value in values if not _equal(value, getattr(options, name))]
        if not new:
            continue
        if name not in SCHEDULED:
            raise ValueError(
                f"{name}={new[0]!r} in a parameter group, but the window was built with {getattr(options, name)!r}, "
                f"which is fixed. Build a new MFAC; only {' and '.join(SCHEDULED)} may change between steps"
            )
        if not all(_equal(value, new[0]) for value in values):
            raise ValueError(
                f"{name} is {values} in the parameter groups: there is one window for all; set it in each of them"
            )
        changed[name] = new[0]
    return replace(options, **changed) if changed else options


def _equal(first: Any, second: Any) -> bool:
    """Whether two options are the same; what is no option, such as a vector, is the same as itself alone."""
    if any(isinstance(value, Tensor) and value.numel() != 1 for value in (first, second)):
        return first is second
    return bool(first == second)
