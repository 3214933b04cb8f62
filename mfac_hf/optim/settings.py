"""The settings of `MFAC` by metric: which belong to it, their defaults, and what they may be."""

import warnings
from typing import Any

import torch

from mfac_hf.defaults import MFAC_DEFAULTS, defaults_of
from mfac_hf.fisher.definite import is_number

__all__ = ["BY_METRIC", "check_adam", "settings_of", "warn_of_old_habits"]


class _ByMetric:
    def __repr__(self) -> str:
        return "by metric"


# The default of settings that each metric has its own default for, or only one of them has. None would not do: given
# by hand, it is a mistake.
BY_METRIC: Any = _ByMetric()

# In Adam's metric no run is known to need so little damping or so high a rate: they come from the identity metric.
LEAST_DAMPING = 1e-4
HIGHEST_RATE = 1e-2


def settings_of(metric: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a metric, with its defaults in place of what was not given.

    Args:
        metric: ``"adam"`` or ``"identity"``.
        given: settings by name; `BY_METRIC` for those that were not given.

    Raises:
        ValueError: the metric is unknown, or settings were given that belong to the other one.
    """
    defaults = {**defaults_of(metric), "window_dtype": getattr(torch, defaults_of(metric)["window_dtype"])}
    given = {name: value for name, value in given.items() if value is not BY_METRIC}
    if foreign := [name for name in given if name not in defaults]:
        other = next(name for name in MFAC_DEFAULTS if name != metric)
        raise ValueError(
            f"{', '.join(foreign)} given with metric={metric!r}, which has no such option: leave it out, or choose "
            f"metric={other!r}. metric={metric!r} has {', '.join(defaults)}"
        )
    settings = {**defaults, **given}
    if metric == "adam":
        check_adam(settings, settings)
        settings["grad_decay"] = settings["betas"][0]  # the window's name for it
    return settings


def check_adam(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse settings of Adam's metric that are out of range, in a parameter group that may have its own.

    Raises:
        ValueError: names the first that does not fit.
    """
    betas, eps = group["betas"], group["eps"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(map(is_number, betas)):
        raise ValueError(f"betas is {betas!r}; expected two numbers in [0, 1), as for AdamW")
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas is {betas!r}; expected two numbers in [0, 1), as for AdamW")
    if betas[0] != defaults["betas"][0]:
        raise ValueError(
            f"betas is {betas!r} in a parameter group and {defaults['betas']!r} elsewhere: the first is the decay of "
            "the gradients in the window, which all groups share. Give every group the same first beta"
        )
    if not is_number(eps) or not 0.0 < eps < float("inf"):
        raise ValueError(f"eps is {eps!r}; expected a finite number above 0 (AdamW's is 1e-8)")
    for name in ("momentum", "decoupled_weight_decay"):
        if name in group:
            raise ValueError(
                f"{name} in a parameter group, with metric='adam', which has no such option: leave it out"
            )


def warn_of_old_habits(settings: dict[str, Any]) -> None:
    """Warn once of values that are legal in Adam's metric and look like the identity metric's."""
    if settings["damping"] < LEAST_DAMPING:
        warnings.warn(
            f"damping={settings['damping']:g} with metric='adam', where damping is relative to the stored gradients: "
            f"this is nearly none. Leave it out for the default, {MFAC_DEFAULTS['adam']['damping']:g}, or choose "
            "metric='identity', where it is a squared gradient entry",
            stacklevel=3,
        )
    if settings["lr"] >= HIGHEST_RATE:
        warnings.warn(
            f"lr={settings['lr']:g} with metric='adam', which takes AdamW's learning rate: this is higher than usual. "
            "Rates for metric='identity' do not carry over",
            stacklevel=3,
        )
