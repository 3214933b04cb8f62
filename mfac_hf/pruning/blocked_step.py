r"""One sub-step of pruning with a Fisher of blocks: from weights, masks and gradients to new weights and masks.

Every weight gets a cost (`mfac_hf.pruning.obs`), the cheapest ones are selected, and the others make up for them. The
baseline, `magnitude_step`, takes the squared weight for the cost and moves nothing.

Where the Fishers of all targets do not fit into memory together, targets are visited in groups, and each group twice
with the same gradients: for the costs of its weights and, when all costs are known and the weights are selected, for
the update. The model does not change in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mfac_hf.fisher import BlockedFisher
from mfac_hf.pruning import obs
from mfac_hf.pruning.agreement import sum_over_ranks
from mfac_hf.pruning.damping import Dampings
from mfac_hf.pruning.first_order import LengthSearch
from mfac_hf.pruning.gradient_source import Consumer, GradientSet
from mfac_hf.pruning.layout import Layout
from mfac_hf.pruning.options import PruningOptions
from mfac_hf.pruning.patterns import Pattern
from mfac_hf.pruning.places import Places
from mfac_hf.pruning.proposal import Level, Proposal, write_weights

__all__ = ["first_order_step", "magnitude_step", "mfac_step"]


def magnitude_step(
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    levels: Sequence[Level],
    options: PruningOptions,
    layout: Layout,
) -> list[Proposal]:
    """Remove the smallest weights and leave the others alone; arguments and result are those of :func:`mfac_step`."""
    pattern = Pattern.parse(options.pattern)
    weights, kept = _flat(parameters, masks, layout)
    costs = {name: obs.magnitude_costs(weights[name], kept[name], pattern) for name in weights}
    proposals = [Proposal(level, {}, _select(costs, kept, level, pattern, layout)) for level in levels]
    for proposal in proposals:
        proposal.weights = {name: weights[name].masked_fill(~keep, 0) for name, keep in proposal.keep.items()}
        layout.restore(proposal)
    return proposals


def mfac_step(
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    levels: Sequence[Level],
    options: PruningOptions,
    gradients: GradientSet,
    *,
    groups: Sequence[Sequence[str]],
    dampings: Dampings,
    layout: Layout,
    search: LengthSearch | None = None,
) -> list[Proposal]:
    """Remove the weights that the Fisher says cost least, and move the others to make up for them.

    Args:
        parameters: the targets, by name.
        masks: masks of the weights that are left.
        levels: one or more sparsities to reach from here. The same gradients and costs serve all of them.
        options: options of the pruning; ``dampings`` stands in for the damping.
        gradients: gradients that the Fisher is the average of.
        groups: names of targets whose Fishers fit into memory together (`mfac_hf.pruning.groups`).
        dampings: dampings to try.
        layout: order of the targets' weights in vectors.
        search: before weights are removed, those that are left take a first-order step of the length that it finds,
            which the model keeps; None for no step.

    Returns:
        A proposal at each level for each damping with which the Fisher can be inverted.

    Raises:
        ValueError: a loss or gradient that is not finite, or too few gradients.
        FloatingPointError: every damping is too small for the Fisher to be inverted.
    """
    step = _Step(parameters, masks, options, gradients, layout)
    if search is not None:
        step.descend(groups, dampings, search)
    costs, scale = _costs(step, groups, dampings)
    proposals = [
        Proposal(
            level,
            weights={},
            keep=_select(of_damping, step.kept, level, step.pattern, layout),
            damping=damping,
            predicted_loss_increase=0.0,
            relative_damping=damping / scale if scale else None,
        )
        for damping, of_damping in costs.items()
        for level in levels
    ]
    for names in groups:
        if len(groups) > 1:
            step.visit(names)
        for proposal in proposals:
            for name in names:
                step.update(proposal, name)
    for proposal in proposals:
        layout.restore(proposal)
    return proposals


def first_order_step(
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    options: PruningOptions,
    gradients: GradientSet,
    *,
    groups: Sequence[Sequence[str]],
    dampings: Dampings,
    layout: Layout,
    search: LengthSearch,
) -> None:
    """Move the weights that are left along a first-order step, and remove none; see :func:`mfac_step`."""
    _Step(parameters, masks, options, gradients, layout).descend(groups, dampings, search)


def _costs(
    step: _Step, groups: Sequence[Sequence[str]], dampings: Dampings
) -> tuple[dict[float, dict[str, Tensor]], float]:
    """Return costs by damping and target, and the mean squared entry of a gradient; see `_Step.scale`."""
    scale = step.scale(groups, dampings)
    costs: dict[float, dict[str, Tensor]] = {damping: {} for damping in dampings.absolute(scale)}
    for names in groups:
        step.visit(names)
        for damping in list(costs):
            try:
                costs[damping] |= {name: step.costs(name, damping) for name in names}
            except FloatingPointError:
                del costs[damping]
                if not costs:
                    raise
    return costs, scale


class _Step:
    """Weights and masks of the targets as vectors, and the Fishers of the group that was visited last.

    Args:
        parameters: the targets, by name.
        masks: masks of the weights that are left.
        options: options of the pruning.
        gradients: gradients that each Fisher is the average of.
        layout: order of the weights in the vectors.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        options: PruningOptions,
        gradients: GradientSet,
        layout: Layout,
    ) -> None:
        self.parameters = parameters
        self.options = options
        self.gradients = gradients
        self.pattern = Pattern.parse(options.pattern)
        self.layout = layout
        self.weights, self.kept = _flat(parameters, masks, layout)
        assert options.block_size is not None  # full_step has no blocks
        self.places = {
            name: Places.of(kept_D, self.pattern, options.block_size, layout.experts.get(name, 1))
            for name, kept_D in self.kept.items()
        }
        self.fishers: dict[str, BlockedFisher] = {}
        self._mean_square = 0.0

    def visit(self, names: Sequence[str]) -> float:
        """Make the Fishers of these targets in place of the present ones; return the mean squared entry of a gradient.

        Pruned weights do not count in it. Where the Fishers of these targets are there, they stay.
        """
        if list(self.fishers) == list(names):
            return self._mean_square
        self.fishers = {}  # frees the present ones first
        self.fishers = {name: self._empty_fisher(name) for name in names}
        self._collect(names, lambda name, rows: self.fishers[name].add(self.places[name].cut(rows)))
        squares = (fisher.squares()[self.places[name].cut(self.kept[name])] for name, fisher in self.fishers.items())
        self._mean_square = self._mean(names, sum(float(square_D.sum()) for square_D in squares))
        return self._mean_square

    def descend(self, groups: Sequence[Sequence[str]], dampings: Dampings, search: LengthSearch) -> None:
        """Move the weights that are left down the loss, by the length that the search finds; the model has them then.

        One group keeps its Fishers for what follows; several are visited again, at the new weights.
        """
        slopes, directions = self.gradients.mean(self.parameters), {}
        (damping,) = dampings.absolute(self.scale(groups, dampings))  # PruningOptions: there is one
        for names in groups:
            self.visit(names)
            for name in names:
                slope_D = self.layout.rows(name, slopes.pop(name).unsqueeze(0)).squeeze(0)
                self.fishers[name].damping = damping
                cut, kept_D = self.places[name].cut, self.kept[name]
                direction_L = obs.descent_direction(cut(slope_D), cut(kept_D), self.fishers[name])
                directions[name] = self.places[name].spread(direction_L)

        def move(length: float) -> dict[str, Tensor]:
            moved = {name: self.weights[name] + length * directions[name] for name in self.weights}
            proposal = Proposal(0.0, dict(moved), dict(self.kept))
            self.layout.restore(proposal)
            write_weights(self.parameters, proposal.weights)
            return moved

        def loss(length: float) -> float:
            move(length)
            found = self.gradients.source.loss(self.gradients.model)
            assert found is not None  # PruningOptions holds examples out
            return found

        self.weights = move(search.find(loss))
        if len(groups) > 1:
            self.fishers = {}

    def scale(self, groups: Sequence[Sequence[str]], dampings: Dampings) -> float:
        """Return the mean squared entry of a gradient over all targets; 0 for several groups that need no such."""
        if len(groups) == 1:
            return self.visit(groups[0])
        return self._mean_square_of_all() if dampings.relative else 0.0

    def _mean_square_of_all(self) -> float:
        """Return the mean squared entry of a gradient over all targets, by a pass of its own."""
        names = list(self.parameters)
        total = 0.0

        def add(name: str, rows: Tensor) -> None:
            nonlocal total
            total += float(torch.linalg.vector_norm(rows * self.kept[name])) ** 2

        self._collect(names, add)
        total = sum_over_ranks(total, self.parameters[names[-1]].device, self.gradients.source.process_group)
        return self._mean(names, total)

    def _collect(self, names: Sequence[str], consume: Consumer) -> None:
        """Hand the gradients of some targets to ``consume``, in the order of the vectors."""
        self.gradients.collect(
            {name: self.parameters[name] for name in names},
            lambda name, rows: consume(name, self.layout.rows(name, rows)),
        )

    def _mean(self, names: Sequence[str], total: float) -> float:
        left = sum(int(self.kept[name].sum()) for name in names)
        return total / (self.gradients.num_grads * max(left, 1))

    def _empty_fisher(self, name: str) -> BlockedFisher:
        assert self.options.block_size is not None  # full_step has no blocks
        parameter = self.parameters[name]
        return BlockedFisher(
            len(self.places[name]),
            block_size=self.options.block_size,
            damping=1.0,  # until costs or an update name one
            num_grads=self.gradients.num_grads,
            device=parameter.device,
            process_group=self.gradients.source.process_group,
        )

    def costs(self, name: str, damping: float) -> Tensor:
        """Return the cost of each unit of a target."""
        self.fishers[name].damping = damping
        costs = obs.greedy_costs if self.options.selection == "greedy" else obs.diagonal_costs
        cut = self.places[name].cut
        costs_L = costs(cut(self.weights[name]), cut(self.kept[name]), self.fishers[name], self.pattern)
        return self.places[name].spread(costs_L, elsewhere=float("inf"))

    def update(self, proposal: Proposal, name: str) -> None:
        """Add the new weights of a target to a proposal, and the loss increase that they should cause."""
        assert proposal.damping is not None and proposal.predicted_loss_increase is not None
        vectors = (self.weights[name], self.kept[name], proposal.keep[name])
        weights_L, kept_L, keep_L = map(self.places[name].cut, vectors)
        fisher = self.fishers[name]
        fisher.damping = proposal.damping
        if self.options.update == "joint":
            moved_L = obs.joint_update(weights_L, kept_L, keep_L, fisher)
        elif self.options.update == "none":
            moved_L = weights_L.masked_fill(~keep_L, 0)
        else:
            moved_L = obs.summed_update(weights_L, kept_L, keep_L, fisher, self.pattern)
        proposal.weights[name] = self.places[name].spread(moved_L)
        proposal.predicted_loss_increase += _quadratic_loss(moved_L - weights_L, fisher)


def _select(
    costs: dict[str, Tensor], kept: dict[str, Tensor], level: Level, pattern: Pattern, layout: Layout
) -> dict[str, Tensor]:
    """Return the masks at a level; where each target has its own, each expert's matrix reaches it."""
    if not isinstance(level, Mapping):
        return obs.select(costs, kept, level, pattern=pattern)
    masks = {}
    for name, sparsity in level.items():
        parts = []
        count = layout.experts.get(name, 1)
        for i, (costs_U, kept_D) in enumerate(zip(costs[name].chunk(count), kept[name].chunk(count), strict=True)):
            part = name if count == 1 else f"expert {i} of {name}"
            # An expert may have been pruned further than the others.
            reached = max(sparsity, 1 - int(kept_D.sum()) / len(kept_D))
            masks_ = obs.select({part: costs_U}, {part: kept_D}, reached, pattern=pattern, scope="uniform")
            parts.append(masks_[part])
        masks[name] = torch.cat(parts)
    return masks


def _quadratic_loss(step_D: Tensor, fisher: BlockedFisher) -> float:
    r"""Return :math:`\tfrac12 \delta^\top F \delta`, the loss increase that the Fisher expects of a step."""
    total = 0.0
    for first, last in fisher.chunks():
        step_KB = torch.zeros(last - first, fisher.block_size, dtype=torch.float64, device=fisher.device)
        part_D = step_D[first * fisher.block_size : last * fisher.block_size]
        step_KB.view(-1)[: len(part_D)] = part_D
        total += 0.5 * float(torch.einsum("ki,kij,kj->", step_KB, fisher.matrices(first, last), step_KB))
    return total


def _flat(
    parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], layout: Layout
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return weights (float32; pruned ones zero) and masks as vectors on the parameters' device."""
    kept = {name: layout.flat(name, masks[name].to(p.device)) for name, p in parameters.items()}
    weights = {
        name: layout.flat(name, p.detach()).float().masked_fill(~kept[name], 0) for name, p in parameters.items()
    }
    return weights, kept
