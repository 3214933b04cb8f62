"""Blocks and patterns run along the inputs of an output, however a layer stores its weight."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.pytorch_utils import Conv1D

from mfac_hf import prune_one_shot
from mfac_hf.pruning.layout import Layout
from mfac_hf.pruning.proposal import Proposal
from tests.helpers.pruning_network import FAST, cross_entropy


def networks():
    """Two networks that compute the same, one with weights (out, in), one with (in, out)."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
    transposed = nn.Sequential(Conv1D(12, 8), nn.Tanh(), Conv1D(4, 12))
    with torch.no_grad():
        for theirs, ours in zip(linear, transposed, strict=True):
            if isinstance(ours, Conv1D):
                ours.weight.copy_(theirs.weight.T)
                ours.bias.copy_(theirs.bias)
    return linear, transposed


@pytest.mark.parametrize("batch", [1, 2], ids=["one pass for many", "one pass for each"])
@pytest.mark.parametrize(
    ("method", "pattern", "sparsity"),
    [("mfac", "unstructured", 0.6), ("mfac", "2:4", 0.5), ("mfac", "block4", 0.6), ("magnitude", "2:4", 0.5)],
)
def test_a_transposed_layer_is_pruned_as_the_other(method, pattern, sparsity, batch):
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(dim=1)), batch_size=4)
    options = FAST | {"recomputations": 2, "pattern": pattern, "method": method, "grad_batch_size": batch}
    reports, pruned = [], networks()
    for model in pruned:
        reports.append(prune_one_shot(model, loader, sparsity, loss_fn=cross_entropy, **options))
    for name, weight in pruned[0].named_parameters():
        ours = pruned[1].get_parameter(name)
        torch.testing.assert_close(ours.T if weight.ndim == 2 else ours, weight, rtol=1e-4, atol=1e-6)
        if name in reports[0].masks:
            assert torch.equal(reports[1].masks[name].T, reports[0].masks[name])
    assert reports[1].sparsity == reports[0].sparsity == pytest.approx(sparsity, abs=0.02)


def test_a_width_that_does_not_fit_is_that_of_the_inputs():
    model = nn.Sequential(Conv1D(8, 6))
    with pytest.raises(ValueError, match="rows of 6 weights .*2:4"):
        prune_one_shot(model, None, 0.5, method="magnitude", pattern="2:4")


@pytest.mark.parametrize("shape", [(2, 3), (4, 2, 3)], ids=["a layer", "experts"])
def test_vectors_come_back_as_they_were(shape):
    parameters = {name: nn.Parameter(torch.randn(shape)) for name in "ab"}
    layout = Layout({"b": parameters["b"].shape}, dict.fromkeys("ab", 4) if len(shape) == 3 else {})
    assert torch.equal(layout.flat("a", parameters["a"]), parameters["a"].flatten())
    assert torch.equal(layout.flat("b", parameters["b"]), parameters["b"].mT.flatten())
    assert torch.equal(layout.matrix("b", parameters["b"]), parameters["b"].mT.reshape(-1, 2))
    rows = torch.stack([parameters["b"].flatten(), -parameters["b"].flatten()])
    assert torch.equal(layout.rows("b", rows)[1], -layout.flat("b", parameters["b"]))
    vectors = {name: layout.flat(name, parameter) for name, parameter in parameters.items()}
    proposal = Proposal(0.5, dict(vectors), {name: vector > 0 for name, vector in vectors.items()})
    layout.restore(proposal)
    for name, parameter in parameters.items():
        assert torch.equal(proposal.weights[name].view(shape), parameter)
        assert torch.equal(proposal.keep[name].view(shape), parameter > 0)
