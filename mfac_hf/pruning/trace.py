"""Greedy trace: the order in which a block loses its weights, and the cost of each removal.

Shape suffixes: K blocks, B block size, U units of a tensor, G units of a block, A units still in play, R removed
coordinates, W windows of an N:M pattern.
"""

import torch
from torch import Tensor

from mfac_hf.ops.registry import operators_for, register
from mfac_hf.pruning.patterns import Pattern

__all__ = ["diagonal_units", "kept_units", "trace_blocks", "unit_costs"]

# Number of removals after which a product brings the inverse matrices up to date.
PANEL = 16

# Units that are no longer in play are dropped once this share or less is left: copying has its price too.
DROP = 0.75


def trace_blocks(inverse_KBB: Tensor, weights_KB: Tensor, keep_KB: Tensor, pattern: Pattern) -> Tensor:
    r"""Trace a batch of blocks; ``inverse_KBB`` and ``weights_KB`` may be overwritten.

    The removal of coordinate p is one step of Gaussian elimination on the inverse: with the column :math:`u = H e_p /
    \sqrt{H_{pp}}`, :math:`H \leftarrow H - u u^\top` and :math:`w \leftarrow w - u\, w_p / \sqrt{H_{pp}}`, at the cost
    :math:`w_p^2 / (2 H_{pp})`. A group goes one coordinate after the other. A column is computed when it is needed,
    from the last full matrix and the columns removed since. Every few removals a product brings the matrix up to date,
    and units that are no longer in play are dropped from it. Single weights have a native kernel on a CPU
    (``torch.ops.mfac.greedy_trace``).

    Args:
        inverse_KBB: :math:`F_b^{-1}`, shape (k, B, B).
        weights_KB: shape (k, B).
        keep_KB: bool, False where a weight is pruned already.
        pattern: B has to be a multiple of its span.

    Returns:
        Costs of shape (k, B / unit), float32.
    """
    if pattern.unit == pattern.window == 1:
        return operators_for(inverse_KBB).greedy_trace(inverse_KBB, weights_KB, keep_KB)
    return _trace_blocks(inverse_KBB, weights_KB, keep_KB, pattern)


def _trace_blocks(inverse_KBB: Tensor, weights_KB: Tensor, keep_KB: Tensor, pattern: Pattern) -> Tensor:
    unit, window = pattern.unit, pattern.window
    blocks, size = weights_KB.shape
    device, dtype = weights_KB.device, weights_KB.dtype
    if blocks == 0:
        return torch.empty(0, size // unit, device=device)
    starts_K1 = torch.arange(blocks, device=device).unsqueeze(1)
    in_play_KG = kept_units(keep_KB.flatten(), pattern).view(blocks, -1)
    costs_KG = torch.full(in_play_KG.shape, float("inf"), device=device)
    # Units that each window of an N:M pattern may still lose.
    quota_KW = in_play_KG.unflatten(1, (-1, window)).sum(dim=2) - pattern.kept
    in_play_KG &= (quota_KW > 0).repeat_interleave(window, dim=1)
    running_K1, endless = torch.full((blocks, 1), -1.0, device=device), torch.tensor(float("inf"), device=device)
    identity_K1uu = torch.eye(unit, device=device, dtype=dtype).expand(blocks, 1, unit, unit)
    ids_KA = torch.arange(size // unit, device=device).repeat(blocks, 1)
    while (most := int(in_play_KG.sum(dim=1).max())) > 0:
        if most <= DROP * in_play_KG.shape[1]:
            # A block with fewer in play keeps some others, so that all blocks have the same size.
            order_KA = in_play_KG.byte().sort(dim=1, descending=True, stable=True).indices[:, :most]
            in_play_KG, ids_KA = in_play_KG.gather(1, order_KA), ids_KA.gather(1, order_KA)
            at_KB = (order_KA.unsqueeze(2) * unit + torch.arange(unit, device=device)).flatten(1)
            inverse_KBB = _submatrices(inverse_KBB, at_KB)
            weights_KB = weights_KB.gather(1, at_KB)
        width = weights_KB.shape[1]
        rows_SB = inverse_KBB.view(-1, width)
        columns_KRB, removed = weights_KB.new_zeros(blocks, PANEL * unit, width), 0
        diagonal_KAuu = diagonal_units(inverse_KBB, unit)
        weights_KAu = weights_KB.unflatten(1, (-1, unit))
        barred_KA = torch.zeros_like(weights_KAu[:, :, 0]).masked_fill_(~in_play_KG, float("inf"))
        for _ in range(min(PANEL, most)):
            cost_K1, unit_K1 = (unit_costs(diagonal_KAuu, weights_KAu) + barred_KA).min(dim=1, keepdim=True)
            goes_K1 = cost_K1.isfinite()
            for i in range(unit):
                at_K1 = unit_K1 * unit + i
                column_KB = rows_SB.index_select(0, (starts_K1 * width + at_K1).squeeze(1))
                # At least eight columns, the rest of them zeros: products of fewer are slow.
                earlier_KRB = columns_KRB[:, : max(removed, 8)]
                factors_KR1 = earlier_KRB.gather(2, at_K1.unsqueeze(1).expand(-1, earlier_KRB.shape[1], 1))
                column_KB -= torch.bmm(factors_KR1.mT, earlier_KRB).squeeze(1)
                # Blocks that have nothing left in play subtract zeros.
                scale_K1 = column_KB.gather(1, at_K1).rsqrt_().masked_fill_(~goes_K1, 0)
                column_KB = torch.mul(column_KB, scale_K1, out=columns_KRB[:, removed])
                weights_KB.addcmul_(column_KB, weights_KB.gather(1, at_K1) * scale_K1, value=-1)
                column_KAu = column_KB.unflatten(1, (-1, unit))
                diagonal_KAuu.addcmul_(column_KAu.unsqueeze(3), column_KAu.unsqueeze(2), value=-1)
                removed += 1
            # A unit that went has no weight and no diagonal left; its cost would be 0 / 0.
            diagonal_KAuu.scatter_(1, unit_K1[:, :, None, None].expand(-1, 1, unit, unit), identity_K1uu)
            barred_KA.scatter_(1, unit_K1, float("inf"))
            cost_K1 = torch.maximum(cost_K1.float(), torch.nextafter(running_K1, endless))
            running_K1 = torch.where(goes_K1, cost_K1, running_K1)
            found_K1 = ids_KA.gather(1, unit_K1)
            costs_KG.scatter_(1, found_K1, torch.where(goes_K1, cost_K1, costs_KG.gather(1, found_K1)))
            if window > 1:
                quota_KW.scatter_add_(1, found_K1 // window, -goes_K1.to(quota_KW.dtype))
                barred_KA.masked_fill_(quota_KW.gather(1, ids_KA // window) <= 0, float("inf"))
        in_play_KG = barred_KA == 0
        inverse_KBB.baddbmm_(columns_KRB[:, :removed].mT, columns_KRB[:, :removed], alpha=-1)
    return costs_KG


def _submatrices(matrices_KBB: Tensor, at_KA: Tensor) -> Tensor:
    """Return rows and columns ``at_KA`` of each matrix: shape (k, a, a)."""
    blocks, size, _ = matrices_KBB.shape
    starts_K1 = size * torch.arange(blocks, device=at_KA.device).unsqueeze(1)
    rows_KAB = matrices_KBB.view(-1, size).index_select(0, (starts_K1 + at_KA).flatten()).unflatten(0, at_KA.shape)
    return rows_KAB.gather(2, at_KA.unsqueeze(1).expand(-1, at_KA.shape[1], -1))


def diagonal_units(matrices_KBB: Tensor, unit: int) -> Tensor:
    """Return a copy of the diagonal (unit, unit) blocks: shape (k, g, unit, unit)."""
    return torch.stack(
        [matrices_KBB[:, i::unit, j::unit].diagonal(dim1=1, dim2=2) for i in range(unit) for j in range(unit)],
        dim=2,
    ).unflatten(2, (unit, unit))


def unit_costs(diagonal_KGuu: Tensor, weights_KGu: Tensor) -> Tensor:
    r"""Return :math:`\tfrac12 w_Q^\top ([F^{-1}]_{QQ})^{-1} w_Q` of each unit, by elimination within it: (k, g)."""
    unit = weights_KGu.shape[2]
    if unit == 1:
        return weights_KGu.squeeze(2).square() / (2 * diagonal_KGuu[:, :, 0, 0])
    diagonal_KGuu, weights_KGu = diagonal_KGuu.clone(), weights_KGu.clone()
    costs_KG = torch.zeros_like(weights_KGu[:, :, 0])
    for i in range(unit):
        pivot_KG1 = diagonal_KGuu[:, :, i, i : i + 1]
        row_KGu = diagonal_KGuu[:, :, i, i + 1 :] / pivot_KG1
        costs_KG += weights_KGu[:, :, i].square() / (2 * pivot_KG1.squeeze(2))
        weights_KGu[:, :, i + 1 :] -= row_KGu * weights_KGu[:, :, i : i + 1]
        diagonal_KGuu[:, :, i + 1 :, i + 1 :] -= row_KGu.unsqueeze(3) * (row_KGu * pivot_KG1).unsqueeze(2)
    return costs_KG


def kept_units(keep_D: Tensor, pattern: Pattern) -> Tensor:
    """Return whether each unit is kept, (units,): all of its weights are, or none."""
    return keep_D.view(-1, pattern.unit).any(dim=1)


def _greedy_trace(inverse_KBB: Tensor, weights_KB: Tensor, keep_KB: Tensor) -> Tensor:
    return _trace_blocks(inverse_KBB.clone(), weights_KB.clone(), keep_KB, Pattern.parse("unstructured"))


def _greedy_trace_fake(inverse_KBB: Tensor, weights_KB: Tensor, keep_KB: Tensor) -> Tensor:
    return torch.empty_like(weights_KB, dtype=torch.float32)


register(
    "greedy_trace(Tensor inverse_KBB, Tensor weights_KB, Tensor keep_KB) -> Tensor", _greedy_trace, _greedy_trace_fake
)
