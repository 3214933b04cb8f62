"""The gradient of the mean loss, against autograd over all examples at once."""

import pytest
import torch

from mfac_hf.pruning import find_targets
from mfac_hf.pruning.gradients import DataLoaderGradients
from tests.helpers.pruning_network import cross_entropy, loader


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("fisher", ["scaled", "empirical"])
def test_it_is_that_of_the_loss_over_the_examples_of_the_gradients(model, batch_size, fisher):
    """Five examples are left for the last pass of 7, and count as five."""
    data = loader()
    source = DataLoaderGradients(
        data, loss_fn=cross_entropy, fisher=fisher, batch_size=batch_size, examples_per_pass=7
    )
    parameters = find_targets(model)
    found = source.mean(model, parameters, 12, seed=5)
    drawn = torch.randperm(64, generator=torch.Generator().manual_seed(5))[: 12 * batch_size]
    loss = cross_entropy(model, [tensor[drawn] for tensor in data.dataset.tensors])
    for (name, _), expected in zip(
        parameters.items(), torch.autograd.grad(loss, list(parameters.values())), strict=True
    ):
        torch.testing.assert_close(found[name], expected.flatten())
    assert all(parameter.grad is None for parameter in model.parameters())
