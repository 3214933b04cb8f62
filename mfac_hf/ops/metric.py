r"""The two passes over the gradient window in Adam's metric, as dispatcher operators.

In the metric :math:`D = \mathrm{diag}(\sqrt{\hat v} + \epsilon)`, with Adam's second moment :math:`\hat v`, the window
holds :math:`\tilde g = D^{-1/2} g`, and a step is :math:`D^{-1/2} \tilde G^\top c`. ``torch.ops.mfac.metric_push``
brings :math:`\hat v` up to date, scales a gradient, writes it into its row and takes its dot products with the others;
``torch.ops.mfac.metric_combine`` combines the rows and scales the result. Each reads the window once, and a vector as
often as it has to: the PyTorch implementation below passes over the vectors several times, native kernels once.

:math:`\hat v` is the bias-corrected second moment itself: :math:`\hat v_t = \hat v_{t-1} + r_t (g^2 - \hat v_{t-1})`
with :math:`r_t = (1 - \beta_2) / (1 - \beta_2^t)`, which equals Adam's :math:`v_t / (1 - \beta_2^t)`.

Shape suffixes: M stored gradients, D parameters.
"""

import torch
from torch import Tensor

from mfac_hf.ops.registry import operators_for, register
from mfac_hf.ops.window import combine, row_dots

__all__ = ["metric_combine", "metric_push"]


def metric_push(
    grads_MD: Tensor, grad_D: Tensor, moment_D: Tensor, row: int, count: int, rate: float, eps: float
) -> Tensor:
    r"""Take a gradient into :math:`\hat v` and, scaled, into the window.

    Args:
        grads_MD: window of shape (m, d) in float32, bfloat16 or float64; columns are contiguous. Row ``row`` changes.
        grad_D: the gradient, shape (d,), in the type of ``moment_D``.
        moment_D: :math:`\hat v`, shape (d,), float32 or float64; changes.
        row: of the window, in [0, count).
        count: rows that hold gradients, this one among them.
        rate: :math:`r_t` in (0, 1].
        eps: :math:`\epsilon > 0`.

    Returns:
        Dot products of the stored (rounded) row with the first ``count`` rows, (count,), float64.

    Raises:
        ValueError, RuntimeError: if a shape or a type is wrong (by the PyTorch implementation, by a native one).
    """
    return operators_for(grads_MD).metric_push(grads_MD, grad_D, moment_D, row, count, rate, eps)


def metric_combine(grads_MD: Tensor, weights_M: Tensor, moment_D: Tensor, eps: float, wide: bool = False) -> Tensor:
    r"""The step :math:`D^{-1/2} \tilde G^\top c`.

    Args:
        grads_MD: window of shape (m, d).
        weights_M: c, shape (m,), float64.
        moment_D: :math:`\hat v`, shape (d,), float32 or float64.
        eps: :math:`\epsilon > 0`.
        wide: whether to combine in float64.

    Returns:
        Shape (d,), in the type of ``moment_D``.

    Raises:
        ValueError, RuntimeError: if a shape or a type is wrong (by the PyTorch implementation, by a native one).
    """
    return operators_for(grads_MD).metric_combine(grads_MD, weights_M, moment_D, eps, wide)


def _check_moment(grads_MD: Tensor, moment_D: Tensor, eps: float) -> None:
    if moment_D.shape != grads_MD.shape[1:] or moment_D.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the second moment has shape {tuple(moment_D.shape)} and type {moment_D.dtype}; expected "
            f"{tuple(grads_MD.shape[1:])}, float32 or float64"
        )
    if not eps > 0:
        raise ValueError(f"eps is {eps}; expected a number above 0")


def _metric_push(
    grads_MD: Tensor, grad_D: Tensor, moment_D: Tensor, row: int, count: int, rate: float, eps: float
) -> Tensor:
    _check_moment(grads_MD, moment_D, eps)
    if grad_D.shape != moment_D.shape or grad_D.dtype != moment_D.dtype:
        raise ValueError(
            f"the gradient has shape {tuple(grad_D.shape)} and type {grad_D.dtype}; expected "
            f"{tuple(moment_D.shape)} and {moment_D.dtype}"
        )
    if not 0 <= row < count <= len(grads_MD):
        raise ValueError(f"row {row} of {count}; expected 0 <= row < count <= {len(grads_MD)}")
    moment_D.lerp_(grad_D.square(), rate)
    grads_MD[row].copy_(grad_D / moment_D.sqrt().add_(eps).sqrt_())
    stored_D = grads_MD[row]
    return row_dots(grads_MD[:count], stored_D.float() if stored_D.dtype == torch.bfloat16 else stored_D)


def _metric_combine(grads_MD: Tensor, weights_M: Tensor, moment_D: Tensor, eps: float, wide: bool = False) -> Tensor:
    _check_moment(grads_MD, moment_D, eps)
    zero_D = torch.zeros_like(moment_D, dtype=torch.float64) if wide and grads_MD.dtype != torch.float64 else None
    combined_D = combine(grads_MD, weights_M, zero_D)
    return combined_D.to(moment_D.dtype).div_(moment_D.sqrt().add_(eps).sqrt_())


def _metric_push_fake(
    grads_MD: Tensor, grad_D: Tensor, moment_D: Tensor, row: int, count: int, rate: float, eps: float
) -> Tensor:
    return grads_MD.new_empty(count, dtype=torch.float64)


def _metric_combine_fake(
    grads_MD: Tensor, weights_M: Tensor, moment_D: Tensor, eps: float, wide: bool = False
) -> Tensor:
    return torch.empty_like(moment_D)


register(
    "metric_push(Tensor(a!) grads_MD, Tensor grad_D, Tensor(b!) moment_D, int row, int count, float rate, float eps) "
    "-> Tensor",
    _metric_push,
    _metric_push_fake,
)
register(
    "metric_combine(Tensor grads_MD, Tensor weights_M, Tensor moment_D, float eps, bool wide=False) -> Tensor",
    _metric_combine,
    _metric_combine_fake,
)
