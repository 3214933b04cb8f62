r"""The two passes over the gradient window in Adam's metric, as dispatcher operators.

In the metric :math:`D = \mathrm{diag}(\sqrt{\hat v} + \epsilon)`, with Adam's second moment :math:`\hat v`, the window
holds :math:`\tilde g = D^{-1/2} g`, and a step is :math:`D^{-1/2} \tilde G^\top c`. ``torch.ops.mfac.metric_push``
brings :math:`\hat v` up to date, scales a gradient, writes it into its row and takes its dot products with the others;
``torch.ops.mfac.metric_combine`` combines the rows and scales the result, and ``torch.ops.mfac.metric_move`` moves
the parameters by it. Each reads the window once, and a vector as often as it has to: the PyTorch implementation below
passes over the vectors several times, native kernels once. Gradients and parameters are tensors that lie side by side
in the columns: they need not be copied into one vector first.

:math:`\hat v` is the bias-corrected second moment itself: :math:`\hat v_t = \hat v_{t-1} + r_t (g^2 - \hat v_{t-1})`
with :math:`r_t = (1 - \beta_2) / (1 - \beta_2^t)`, which equals Adam's :math:`v_t / (1 - \beta_2^t)`.

Shape suffixes: M stored gradients, D parameters.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from mfac_hf.ops.registry import operators_for, register
from mfac_hf.ops.window import combine, row_dots

__all__ = ["metric_combine", "metric_move", "metric_push"]


def metric_push(
    grads_MD: Tensor, grads: Sequence[Tensor], moment_D: Tensor, row: int, count: int, rate: float, eps: float
) -> Tensor:
    r"""Take a gradient into :math:`\hat v` and, scaled, into the window.

    Args:
        grads_MD: window of shape (m, d) in float32, bfloat16 or float64; columns are contiguous. Row ``row`` changes.
        grads: the gradient, d numbers in the type of ``moment_D``: tensors of any shapes, side by side.
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
    pieces = list(grads)
    if grads_MD.device.type != "cpu":  # one launch for all of them
        pieces = [_joined(pieces)]
    return operators_for(grads_MD).metric_push(grads_MD, pieces, moment_D, row, count, rate, eps)


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


def metric_move(
    grads_MD: Tensor,
    weights_M: Tensor,
    moment_D: Tensor,
    eps: float,
    wide: bool,
    parameters: Sequence[Tensor],
    factors: Sequence[float],
    rates: Sequence[float],
) -> None:
    r"""Take the step: :math:`\theta \leftarrow f \theta - \eta (D^{-1/2} \tilde G^\top c)`.

    Args:
        grads_MD: window of shape (m, d).
        weights_M: c, shape (m,), float64.
        moment_D: :math:`\hat v`, shape (d,), float32 or float64.
        eps: :math:`\epsilon > 0`.
        wide: whether to combine in float64.
        parameters: d numbers in the type of ``moment_D``: contiguous tensors of any shapes, side by side; they change.
        factors: f of each.
        rates: :math:`\eta` of each.

    Raises:
        ValueError, RuntimeError: if a shape or a type is wrong (by the PyTorch implementation, by a native one);
            nothing changes then.
    """
    operators_for(grads_MD).metric_move(
        grads_MD, weights_M, moment_D, eps, wide, list(parameters), list(factors), list(rates)
    )
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(list(parameters))  # as PyTorch's own operators do that change a tensor


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0].reshape(-1) if len(pieces) == 1 else torch.cat([piece.reshape(-1) for piece in pieces])


def _check_pieces(what: str, pieces: Sequence[Tensor], moment_D: Tensor) -> None:
    numbers = sum(piece.numel() for piece in pieces)
    dtypes = {piece.dtype for piece in pieces} - {moment_D.dtype}
    if numbers != moment_D.numel() or dtypes:
        raise ValueError(
            f"{what} has {numbers} numbers of type {dtypes or moment_D.dtype}; expected {moment_D.numel()} of type "
            f"{moment_D.dtype}"
        )


def _check_moment(grads_MD: Tensor, moment_D: Tensor, eps: float) -> None:
    if moment_D.shape != grads_MD.shape[1:] or moment_D.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the second moment has shape {tuple(moment_D.shape)} and type {moment_D.dtype}; expected "
            f"{tuple(grads_MD.shape[1:])}, float32 or float64"
        )
    if not eps > 0:
        raise ValueError(f"eps is {eps}; expected a number above 0")


def _metric_push(
    grads_MD: Tensor, grads: Sequence[Tensor], moment_D: Tensor, row: int, count: int, rate: float, eps: float
) -> Tensor:
    _check_moment(grads_MD, moment_D, eps)
    _check_pieces("the gradient", grads, moment_D)
    if not 0 <= row < count <= len(grads_MD):
        raise ValueError(f"row {row} of {count}; expected 0 <= row < count <= {len(grads_MD)}")
    grad_D = _joined(grads)
    moment_D.lerp_(grad_D.square(), rate)
    grads_MD[row].copy_(grad_D / moment_D.sqrt().add_(eps).sqrt_())
    stored_D = grads_MD[row]
    return row_dots(grads_MD[:count], stored_D.float() if stored_D.dtype == torch.bfloat16 else stored_D)


def _metric_combine(grads_MD: Tensor, weights_M: Tensor, moment_D: Tensor, eps: float, wide: bool = False) -> Tensor:
    _check_moment(grads_MD, moment_D, eps)
    zero_D = torch.zeros_like(moment_D, dtype=torch.float64) if wide and grads_MD.dtype != torch.float64 else None
    combined_D = combine(grads_MD, weights_M, zero_D)
    return combined_D.to(moment_D.dtype).div_(moment_D.sqrt().add_(eps).sqrt_())


def _metric_move(
    grads_MD: Tensor,
    weights_M: Tensor,
    moment_D: Tensor,
    eps: float,
    wide: bool,
    parameters: Sequence[Tensor],
    factors: Sequence[float],
    rates: Sequence[float],
) -> None:
    _check_moment(grads_MD, moment_D, eps)
    _check_pieces("the list of parameters", parameters, moment_D)
    if not len(parameters) == len(factors) == len(rates):
        raise ValueError(
            f"{len(parameters)} parameters, {len(factors)} factors and {len(rates)} rates; expected as many of each"
        )
    step_D = metric_combine(grads_MD, weights_M, moment_D, eps, wide)
    parts = step_D.split([p.numel() for p in parameters])
    pieces = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
    moves = zip(parameters, pieces, factors, rates, strict=True)
    for (factor, rate), alike in groupby(moves, key=lambda move: move[2:]):
        moved, steps, *_ = (list(part) for part in zip(*alike, strict=True))
        if factor != 1:
            torch._foreach_mul_(moved, factor)
        torch._foreach_add_(moved, steps, alpha=-rate)


def _metric_push_fake(
    grads_MD: Tensor, grads: Sequence[Tensor], moment_D: Tensor, row: int, count: int, rate: float, eps: float
) -> Tensor:
    return grads_MD.new_empty(count, dtype=torch.float64)


def _metric_combine_fake(
    grads_MD: Tensor, weights_M: Tensor, moment_D: Tensor, eps: float, wide: bool = False
) -> Tensor:
    return torch.empty_like(moment_D)


def _metric_move_fake(
    grads_MD: Tensor,
    weights_M: Tensor,
    moment_D: Tensor,
    eps: float,
    wide: bool,
    parameters: Sequence[Tensor],
    factors: Sequence[float],
    rates: Sequence[float],
) -> None:
    return None


register(
    "metric_push(Tensor(a!) grads_MD, Tensor[] grads, Tensor(b!) moment_D, int row, int count, float rate, float eps) "
    "-> Tensor",
    _metric_push,
    _metric_push_fake,
)
register(
    "metric_combine(Tensor grads_MD, Tensor weights_M, Tensor moment_D, float eps, bool wide=False) -> Tensor",
    _metric_combine,
    _metric_combine_fake,
)
register(
    "metric_move(Tensor grads_MD, Tensor weights_M, Tensor moment_D, float eps, bool wide, Tensor(a!)[] parameters, "
    "float[] factors, float[] rates) -> ()",
    _metric_move,
    _metric_move_fake,
)
