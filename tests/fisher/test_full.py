"""The full inverse against the dense float64 matrix and the paper's recursion, in pages of any size."""

import numpy as np
import pytest
import torch

from mfac_hf.fisher import FullFisher, full
from mfac_hf.fisher.reference import PaperSwapInverse, dense_fisher, paper_static_solve
from mfac_hf.pruning import obs
from mfac_hf.pruning.patterns import Pattern
from tests.helpers.real_gradients import REAL
from tests.helpers.tensors import draw, relative_error

PLAIN = Pattern.parse("unstructured")


@pytest.fixture
def small_portions(monkeypatch):
    """Portions and strips so small that little vectors have several."""
    monkeypatch.setattr(full, "PORTION", 8)
    monkeypatch.setattr(full, "STRIP", 3)


@pytest.mark.parametrize(("m", "d"), [(1, 1), (1, 20), (7, 20), (7, 24), (33, 20)])
@pytest.mark.parametrize("damping", [1.0, 1e-3, 1e-6])
@pytest.mark.usefixtures("small_portions")
def test_agrees_with_the_dense_matrix(m, d, damping):
    grads, x = draw(m, d), draw(1, d, seed=1)[0]
    fisher = FullFisher(grads, damping=damping)
    inverse = torch.linalg.inv(dense_fisher(grads, damping))
    # The condition number is up to about 1e8: eight of the sixteen digits are left, two for safety.
    assert relative_error(fisher.solve(x), inverse @ x) <= 1e-6
    assert relative_error(fisher.inverse_diagonal(), inverse.diagonal()) <= 1e-6
    assert relative_error(FullFisher(grads, damping=1e-2).solve(x), paper_static_solve(grads, x, 1e-2)) <= 1e-9


@pytest.mark.parametrize("pruned", [[], [0, 5, 19]])
@pytest.mark.usefixtures("small_portions")
def test_joint_update_is_the_exact_minimum(pruned):
    keep = torch.ones(20, dtype=torch.bool)
    keep[pruned] = False
    grads, weights = draw(7, 20) * keep, draw(1, 20, seed=2)[0] * keep
    new_keep = keep & (draw(1, 20, seed=3)[0] > 0)
    removed = keep & ~new_keep
    dense = dense_fisher(grads, 1e-2)
    expected = torch.where(removed, 0, weights)
    expected[new_keep] += torch.linalg.solve(
        dense[new_keep][:, new_keep], dense[new_keep][:, removed] @ weights[removed]
    )
    fisher = FullFisher(grads, damping=1e-2)
    found = fisher.joint_update(weights, keep, new_keep)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert bool((found[~new_keep] == 0).all())
    assert torch.equal(found, obs.joint_update(weights, keep, new_keep, fisher))


def test_costs_and_summed_update():
    keep = torch.ones(20, dtype=torch.bool)
    keep[[0, 5]] = False
    grads, weights = draw(7, 20) * keep, draw(1, 20, seed=2)[0] * keep
    fisher = FullFisher(grads, damping=1e-2)
    inverse = torch.linalg.inv(dense_fisher(grads, 1e-2))
    costs = obs.diagonal_costs(weights, keep, fisher, PLAIN)
    torch.testing.assert_close(
        costs[keep].double(), (weights.square() / (2 * inverse.diagonal()))[keep], rtol=1e-6, atol=0
    )
    assert bool(costs[~keep].isinf().all())
    new_keep = obs.select({"w": costs}, {"w": keep}, 0.5, pattern=PLAIN)["w"]
    removed = keep & ~new_keep
    moves = [-inverse[:, q] * weights[q] / inverse[q, q] for q in removed.nonzero().squeeze(1)]
    expected = (weights + sum(moves)).masked_fill(~new_keep, 0)
    torch.testing.assert_close(obs.summed_update(weights, keep, new_keep, fisher, PLAIN), expected)
    for function in (obs.diagonal_costs, lambda w, k, f, p: obs.summed_update(w, k, new_keep, f, p)):
        with pytest.raises(ValueError, match="'block4', and the full Fisher serves single weights"):
            function(weights, keep, fisher, Pattern.parse("block4"))


@pytest.mark.cpu("a memory-mapped file stays there")
def test_pages_do_not_change_a_bit(tmp_path):
    """Also over a memory-mapped file; so one page and eight prune the same weights."""
    d = 6 * full.PORTION + 37
    grads = draw(5, d, dtype=torch.float32)
    stored = np.lib.format.open_memmap(tmp_path / "grads.npy", mode="w+", dtype=np.float32, shape=tuple(grads.shape))
    stored[:] = grads.numpy()
    stored.flush()
    mapped = torch.from_numpy(np.load(tmp_path / "grads.npy", mmap_mode="r+"))
    whole = FullFisher(grads, damping=1e-3)
    weights, keep = draw(1, d, seed=1, dtype=torch.float32)[0], torch.ones(d, dtype=torch.bool)
    costs = obs.diagonal_costs(weights, keep, whole, PLAIN)
    new_keep = obs.select({"w": costs}, {"w": keep}, 0.7, pattern=PLAIN)["w"]
    for source, page_size in ((grads, -(-d // 8)), (mapped, 1), (mapped, d)):
        paged = FullFisher(source, damping=1e-3, page_size=page_size)
        assert torch.equal(paged.solve(weights), whole.solve(weights))
        assert torch.equal(obs.diagonal_costs(weights, keep, paged, PLAIN), costs)
        assert torch.equal(paged.joint_update(weights, keep, new_keep), whole.joint_update(weights, keep, new_keep))


@pytest.mark.slow
@pytest.mark.parametrize(("function", "name", "count", "batch_size"), REAL)
@pytest.mark.cpu("models of transformers are made there")
def test_precision_on_real_gradients(shared_data, function, name, count, batch_size):
    """The issue asks for 1e-4 at damping 1e-8 and above; results are float32."""
    grads = function(shared_data, count, batch_size)[name][:, :1500]
    x = draw(1, grads.shape[1], seed=1, dtype=torch.float32)[0]
    for damping in (1e-4, 1e-6, 1e-8):
        fisher = FullFisher(grads, damping=damping)
        inverse = torch.linalg.inv(dense_fisher(grads, damping))
        diagonal = inverse.diagonal()
        assert float(((fisher.inverse_diagonal() - diagonal) / diagonal).abs().max()) <= 1e-4
        assert relative_error(fisher.solve(x), inverse @ x.double()) <= 1e-4
    paper = PaperSwapInverse(grads.double(), damping=1e-8, pages=3)
    assert relative_error(fisher.inverse_diagonal(), paper.inverse_diagonal()) <= 1e-4
    assert relative_error(fisher.solve(x), paper.solve(x.double())) <= 1e-4


@pytest.mark.parametrize(
    ("grads", "options", "message"),
    [
        (torch.ones(4), {}, r"shape \(4,\)"),
        (torch.ones(0, 4), {}, r"shape \(0, 4\)"),
        (torch.ones(2, 4, dtype=torch.bfloat16), {}, "torch.bfloat16"),
        (torch.ones(2, 4), {"page_size": 0}, "page_size is 0"),
        (torch.ones(2, 4), {"damping": -1.0}, "damping is -1.0"),
        (torch.tensor([[1.0, float("nan")]]), {}, "not finite"),
    ],
)
def test_bad_input(grads, options, message):
    with pytest.raises(ValueError, match=message):
        FullFisher(grads, **({"damping": 1e-3} | options))
    fisher = FullFisher(torch.ones(2, 4), damping=1e-3)
    for call in (fisher.solve, lambda x: fisher.joint_update(torch.ones(4), torch.ones(4).bool(), x.bool())):
        with pytest.raises(ValueError, match=r"expected \(4,\)"):
            call(torch.ones(3))
