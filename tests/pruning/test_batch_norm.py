"""Batch norms that are averaged anew: over the right examples, and nothing else changes."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mfac_hf import prune_one_shot
from mfac_hf.pruning.batch_norm import averaging_anew
from mfac_hf.pruning.gradients import DataLoaderGradients
from tests.helpers.pruning_network import FAST, cross_entropy, loader, one_shot


@pytest.fixture
def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 3)).eval()


def test_the_statistics_are_the_average_over_calls(normed):
    inputs = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1))
    normed.train()
    normed[2].eval()
    with torch.no_grad(), averaging_anew(normed):
        assert normed[1].training and not normed[2].training
        for part in inputs:
            normed(part)
    hidden = normed[0](inputs)
    torch.testing.assert_close(normed[1].running_mean, hidden.mean(dim=(0, 1)))
    torch.testing.assert_close(normed[1].running_var, hidden.var(dim=1).mean(dim=0))
    assert normed[1].momentum == 0.1 and normed[1].training


def test_pruning_leaves_statistics_of_the_pruned_model(normed):
    seen = []

    class Remembering(TensorDataset):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    data = DataLoader(Remembering(*loader().dataset.tensors))
    options = {**FAST, "targets": [r"^0\."], "recomputations": 2, "examples_per_pass": 1}
    prune_one_shot(normed, data, 0.5, loss_fn=cross_entropy, batch_norm_samples=24, **options)
    hidden = normed[0](data.dataset.tensors[0][seen[-24:]])
    assert len(set(seen[-24:])) == 24 and not normed.training
    assert seen[-24:] == seen[-65:-41]  # the same ones after each sub-step: 16 gradients, whose first one is looked at
    torch.testing.assert_close(normed[1].running_mean, hidden.mean(dim=0))
    torch.testing.assert_close(normed[1].running_var, hidden.var(dim=0))


def test_an_exception_brings_the_statistics_back(normed, monkeypatch):
    before = {name: value.clone() for name, value in normed.state_dict().items()}
    average = DataLoaderGradients.average_batch_norms

    def interrupted(*args):
        average(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(DataLoaderGradients, "average_batch_norms", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one_shot(normed, 0.5, batch_norm_samples=8)
    assert all(torch.equal(value, before[name]) for name, value in normed.state_dict().items())


def test_bad_input_is_refused_before_anything_changes(model, normed):
    with pytest.raises(ValueError, match="batch_norm_samples is 8, and Sequential has no batch norm"):
        one_shot(model, 0.5, batch_norm_samples=8)
    for samples, message in {65: "is 65, and there are 64 examples", -1: "is -1; expected an integer"}.items():
        before = {name: value.clone() for name, value in normed.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            one_shot(normed, 0.5, batch_norm_samples=samples)
        assert all(torch.equal(value, before[name]) for name, value in normed.state_dict().items())
    with pytest.raises(ValueError, match="batch_norm_samples is 8, and there is no data loader"):
        prune_one_shot(normed, None, 0.5, method="magnitude", batch_norm_samples=8)
