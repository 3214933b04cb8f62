"""Costs, selection and updates against brute force on small blocks of dense float64 matrices."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_hf.fisher import BlockedFisher, blocked
from mfac_hf.fisher.reference import dense_fisher
from mfac_hf.pruning import obs, trace
from mfac_hf.pruning.patterns import Pattern
from tests.helpers.device import DEVICE
from tests.helpers.real_gradients import BERT_NAMES, bert_on_sst2

INF = float("inf")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(grads, block_size, damping):
    fisher = BlockedFisher(
        grads.shape[1], block_size=block_size, damping=damping, num_grads=len(grads), dtype=torch.float64
    )
    fisher.add(grads)
    return fisher


def problem(dim, block_size, *, m=9, damping=1e-2, pruned=(), seed=0):
    """Weights, mask, Fisher matrix, and the dense matrix of the survivors with the rest decoupled."""
    keep = torch.ones(dim, dtype=torch.bool)
    keep[list(pruned)] = False
    weights, grads = draw(dim, seed=seed) * keep, draw(m, dim, seed=seed + 1)
    blocks = [dense_fisher(part, damping) for part in (grads * keep).split(block_size, dim=1)]
    return weights, keep, build(grads, block_size, damping), torch.block_diag(*blocks)


def joint_cost(weights, keep, dense, removed):
    """Least value of the quadratic model with ``removed`` at zero, and the weights there, by a dense solve."""
    stays = keep.clone()
    stays[removed] = False
    move = torch.zeros_like(weights)
    move[removed] = -weights[removed]
    if stays.any():
        rhs = -dense[stays][:, removed] @ move[removed]
        move[stays] = torch.linalg.solve(dense[stays][:, stays], rhs)
    return float(move @ dense @ move / 2), weights + move


def naive_trace(weights, keep, dense, block_size, pattern):
    """Removal one unit after the other by dense solves from the start: {block: [(unit, running cost)]}."""
    traces = []
    for first in range(0, len(weights), block_size):
        units = [
            list(range(at, at + pattern.unit))
            for at in range(first, min(first + block_size, len(weights)), pattern.unit)
            if keep[at]
        ]
        removed, spent, running, trace = [], 0.0, 0.0, []

        def may_go(unit, removed=removed):
            start = unit[0] // pattern.window * pattern.window
            gone = [i for i in range(start, start + pattern.window) if i in removed or not keep[i]]
            return len(gone) < pattern.window - pattern.kept

        while candidates := [unit for unit in units if unit[0] not in removed and may_go(unit)]:
            costs = [joint_cost(weights, keep, dense, removed + unit)[0] for unit in candidates]
            best = min(range(len(costs)), key=costs.__getitem__)
            running = max(running, costs[best] - spent)
            spent = costs[best]
            removed += candidates[best]
            trace.append((candidates[best][0] // pattern.unit, running))
        traces.append(trace)
    return traces


TRACE_CASES = [
    ("unstructured", 13, 6, ()),
    ("unstructured", 13, 6, (0, 3, 4, 7, 12)),
    ("unstructured", 12, 6, range(6)),  # a whole block is gone
    ("unstructured", 20, 20, (2, 3)),  # more removals than fit into one panel
    ("2:4", 20, 8, ()),
    ("2:4", 20, 8, (0, 1, 6, 8)),
    ("3:5", 20, 10, (1,)),
    ("block4", 20, 8, ()),
    ("block2", 20, 8, (2, 3, 16, 17)),
]


@pytest.mark.parametrize(("name", "dim", "block_size", "pruned"), TRACE_CASES)
@pytest.mark.parametrize("damping", [1.0, 1e-3])
def test_greedy_trace_is_that_of_brute_force(name, dim, block_size, pruned, damping, monkeypatch):
    pattern = Pattern.parse(name)
    weights, keep, fisher, dense = problem(dim, block_size, damping=damping, pruned=pruned)
    monkeypatch.setitem(blocked.CHUNK_BYTES, DEVICE.type, 2 * block_size**2 * 8)  # several batches of blocks
    monkeypatch.setattr(trace, "PANEL", 3)
    costs = obs.greedy_costs(weights, keep, fisher, pattern)
    assert costs.shape == (dim // pattern.unit,)
    expected = torch.full_like(costs, INF)
    for order_and_cost in naive_trace(weights, keep, dense, block_size, pattern):
        order = torch.tensor([unit for unit, _ in order_and_cost], dtype=torch.int64)
        assert bool((costs[order].diff() > 0).all())
        expected[order] = torch.tensor([cost for _, cost in order_and_cost])
    # float32 traces keep three digits by construction, and these need fewer steps than the bound allows for.
    torch.testing.assert_close(costs, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("name", "dim", "block_size", "pruned"), TRACE_CASES)
def test_diagonal_costs_are_those_of_each_unit_alone(name, dim, block_size, pruned):
    pattern = Pattern.parse(name)
    weights, keep, fisher, dense = problem(dim, block_size, pruned=pruned)
    exact = torch.full((dim // pattern.unit,), INF)
    for unit in range(len(exact)):
        at = list(range(unit * pattern.unit, (unit + 1) * pattern.unit))
        if keep[at].all():
            exact[unit] = joint_cost(weights, keep, dense, at)[0]
    costs = obs.diagonal_costs(weights, keep, fisher, pattern)
    torch.testing.assert_close(costs, pattern.restrict(exact), rtol=1e-5, atol=0)
    if name == "unstructured":
        inverse = torch.linalg.inv(dense).diagonal()
        paper = torch.where(keep, weights.square() / (2 * inverse), INF)
        torch.testing.assert_close(costs.double(), paper, rtol=1e-6, atol=0)


def test_magnitude_costs():
    weights = torch.tensor([3.0, -1.0, 0.5, 2.0, 1.0, 0.0, 0.0, 4.0])
    keep = torch.tensor([1, 1, 1, 1, 1, 0, 0, 1]).bool()
    costs = {name: obs.magnitude_costs(weights, keep, Pattern.parse(name)) for name in ("unstructured", "2:4")}
    assert costs["unstructured"].tolist() == [9, 1, 0.25, 4, 1, INF, INF, 16]
    assert costs["2:4"].tolist() == [INF, 1, 0.25, INF, INF, INF, INF, INF]
    keep[:] = True
    assert obs.magnitude_costs(weights, keep, Pattern.parse("block4")).tolist() == [14.25, 17]


@pytest.mark.parametrize("pruned", [(), (1, 4, 11)])
def test_joint_update_is_the_exact_minimum(pruned):
    weights, keep, fisher, dense = problem(13, 6, pruned=pruned)
    new_keep = keep & (draw(13, seed=5) > 0)
    removed = (keep & ~new_keep).nonzero().squeeze(1).tolist()
    assert len(removed) > 3
    found = obs.joint_update(weights, keep, new_keep, fisher)
    torch.testing.assert_close(found, joint_cost(weights, keep, dense, removed)[1], rtol=1e-9, atol=1e-12)
    assert bool((found[~new_keep] == 0).all())
    assert torch.equal(obs.joint_update(weights, keep, keep, fisher), weights)


@pytest.mark.parametrize("name", ["unstructured", "block2"])
@pytest.mark.parametrize("pruned", [(), (2, 3, 10, 11)])
def test_summed_update_adds_up_single_ones(name, pruned):
    pattern = Pattern.parse(name)
    weights, keep, fisher, dense = problem(14, 6, pruned=pruned)
    new_keep = keep & (draw(14 // pattern.unit, seed=5) > 0).repeat_interleave(pattern.unit)
    expected = weights.clone()
    for unit in range(14 // pattern.unit):
        at = list(range(unit * pattern.unit, (unit + 1) * pattern.unit))
        if keep[at].all() and not new_keep[at].any():
            expected += joint_cost(weights, keep, dense, at)[1] - weights
    expected[~new_keep] = 0
    torch.testing.assert_close(obs.summed_update(weights, keep, new_keep, fisher, pattern), expected)


def test_no_set_of_the_same_size_is_cheaper_than_its_joint_cost_says():
    """The trace is greedy, not optimal: on a small block it must lie between the optimum and the paper's choice."""
    totals = {"greedy": 0.0, "diagonal": 0.0, "best": 0.0}
    for seed in range(8):
        weights, keep, fisher, dense = problem(9, 9, damping=1e-2, seed=10 * seed)
        for name in ("greedy", "diagonal"):
            costs = getattr(obs, f"{name}_costs")(weights, keep, fisher, Pattern.parse("unstructured"))
            new_keep = obs.select({"w": costs}, {"w": keep}, 5 / 9, pattern=Pattern.parse("unstructured"))["w"]
            totals[name] += joint_cost(weights, keep, dense, (~new_keep).nonzero().squeeze(1).tolist())[0]
        totals["best"] += min(
            joint_cost(weights, keep, dense, list(removed))[0] for removed in itertools.combinations(range(9), 5)
        )
    assert totals["best"] <= totals["greedy"] < totals["diagonal"]


PATTERNS = ["unstructured", "2:4", "1:4", "block4"]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(PATTERNS),
    st.sampled_from(obs.SCOPES),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.lists(st.floats(0, 0.97), min_size=1, max_size=4),
    st.integers(0, 100),
    st.booleans(),
)
def test_selection_is_exact_and_only_ever_prunes_more(name, scope, rows, sparsities, seed, ties):
    pattern = Pattern.parse(name)
    weights = {f"w{i}": draw(8 * n, seed=seed + i) for i, n in enumerate(rows)}
    if ties:
        weights = {name: weight.sign() for name, weight in weights.items()}
    keep = {name: torch.ones(len(weight), dtype=torch.bool) for name, weight in weights.items()}
    for sparsity in sorted(min(s, pattern.max_sparsity) for s in sparsities):
        costs = {name: obs.magnitude_costs(weights[name], keep[name], pattern) for name in weights}
        new = obs.select(costs, keep, sparsity, pattern=pattern, scope=scope)
        assert not any((new[name] & ~keep[name]).any() for name in new)
        tensors = list(new.values()) if scope == "uniform" else [torch.cat(list(new.values()))]
        for mask in tensors:
            zeros = int((~mask).sum())
            assert zeros == pattern.unit * round(round(sparsity * len(mask)) / pattern.unit)
            per_span = mask.view(-1, pattern.span).sum(dim=1)
            if pattern.unit > 1:
                assert bool(((per_span == 0) | (per_span == pattern.unit)).all())
            assert bool((per_span >= pattern.kept).all())
            if pattern.window > 1 and sparsity == pattern.max_sparsity:
                assert bool((per_span == pattern.kept).all())
        keep = new


def test_scopes():
    costs = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([10.0, 20.0, 30.0, 40.0])}
    keep = {name: torch.ones(4, dtype=torch.bool) for name in costs}
    plain = Pattern.parse("unstructured")
    everywhere = obs.select(costs, keep, 0.5, pattern=plain, scope="global")
    assert [mask.tolist() for mask in everywhere.values()] == [[False] * 4, [True] * 4]
    each = obs.select(costs, keep, 0.5, pattern=plain, scope="uniform")
    assert [mask.tolist() for mask in each.values()] == [[False, False, True, True]] * 2


def test_two_of_four_by_the_trace():
    weights, keep, fisher, _ = problem(48, 16, m=30)
    pattern = Pattern.parse("2:4")
    costs = {"w": obs.greedy_costs(weights, keep, fisher, pattern)}
    half = obs.select(costs, {"w": keep}, 0.5, pattern=pattern)["w"]
    assert half.view(-1, 4).sum(dim=1).tolist() == [2] * 12
    quarter = obs.select(costs, {"w": keep}, 0.25, pattern=pattern)["w"]
    assert int((~quarter).sum()) == 12
    assert bool((quarter | ~half).all())  # one trace, nested masks


def test_bad_requests():
    costs = {"a": torch.tensor([1.0, 2.0, 3.0, INF]), "b": torch.tensor([INF] * 4)}
    keep = {"a": torch.tensor([1, 1, 1, 0]).bool(), "b": torch.tensor([0, 0, 1, 1]).bool()}
    plain = Pattern.parse("unstructured")
    for sparsity in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="sparsity is"):
            obs.select(costs, keep, sparsity, pattern=plain)
    with pytest.raises(ValueError, match="scope is 'local'"):
        obs.select(costs, keep, 0.5, pattern=plain, scope="local")
    with pytest.raises(ValueError, match=r"3 of 8 weights over all targets \(0.375\) are pruned"):
        obs.select(costs, keep, 0.25, pattern=plain)
    with pytest.raises(ValueError, match="2 of 4 weights in b"):
        obs.select(costs, keep, 0.25, pattern=plain, scope="uniform")
    with pytest.raises(ValueError, match="'unstructured' allows at most 0.75"):
        obs.select(costs, keep, 0.9, pattern=plain)
    fisher = build(draw(3, 4), 2, 1.0)
    with pytest.raises(ValueError, match="expected flat tensors of 4 entries"):
        obs.greedy_costs(draw(2, 2), keep["a"], fisher, plain)
    with pytest.raises(ValueError, match="mask of torch.bool"):
        obs.joint_update(draw(4), keep["a"].float(), keep["a"], fisher)


@pytest.mark.slow
@pytest.mark.parametrize("damping", [1e-4, 1e-8])
@pytest.mark.cpu("models of transformers are made there")
def test_float32_traces_on_gradients_of_bert(shared_data, damping, monkeypatch):
    """Where the trace chooses float32, it agrees with float64 on what goes, up to near-ties."""
    grads = bert_on_sst2(shared_data, 256, 1)[BERT_NAMES[0]][:, :8192]
    weights, keep = draw(8192).float() / 20, torch.ones(8192, dtype=torch.bool)
    plain = Pattern.parse("unstructured")
    fisher = build(grads, 64, damping)
    costs = obs.greedy_costs(weights, keep, fisher, plain)
    monkeypatch.setattr(obs, "FLOAT32_SHRINKAGE", 0.0)
    exact = obs.greedy_costs(weights, keep, fisher, plain)
    for sparsity in (0.5, 0.9):
        masks = [obs.select({"w": c}, {"w": keep}, sparsity, pattern=plain)["w"] for c in (costs, exact)]
        assert int((masks[0] != masks[1]).sum()) <= 2 * 8  # of 8,192
