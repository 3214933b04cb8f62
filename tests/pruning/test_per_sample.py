"""Gradients of single examples from one backward pass, against a pass for each."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mfac_hf.pruning.per_sample import batch_gradients

COUNT = 5


class Twice(nn.Module):
    """Calls its layer two times, so that the gradients of two calls add up."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs):
        return self.layer(torch.tanh(self.layer(inputs)))


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), (4,)),
    "positions": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), (3, 4)),
    "transposed": (lambda: nn.Sequential(Conv1D(6, 4), nn.Tanh()), (3, 4)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 7, 7)),
    "dilated": (lambda: nn.Conv2d(2, 3, (3, 2), padding=(2, 1), dilation=(2, 1)), (2, 7, 6)),
    "twice": (Twice, (4,)),
}


def collect(model, parameters, loss):
    """The rows of all parameters, each copied before the next one overwrites it."""
    return {name: rows.clone() for name, rows in batch_gradients(model, parameters, loss, COUNT)}


@pytest.mark.parametrize("kind", MODELS)
def test_rows_are_the_gradients_of_single_examples(kind):
    build, shape = MODELS[kind]
    torch.manual_seed(0)
    model, inputs = build(), torch.randn(COUNT, *shape)
    parameters = {name: p for name, p in model.named_parameters() if p.ndim > 1}

    def loss(inputs):
        return model(inputs).square().flatten(1).sum(dim=1).mean()

    found = collect(model, parameters, lambda: loss(inputs))
    assert list(found) == list(parameters)
    for i in range(COUNT):
        expected = torch.autograd.grad(loss(inputs[i : i + 1]), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            # float32, and sums in another order
            torch.testing.assert_close(found[name][i], gradient.flatten(), rtol=1e-4, atol=1e-5)


def test_a_weight_that_the_loss_does_not_depend_on_has_zeros():
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    parameters = {"0.weight": model[0].weight, "1.weight": model[1].weight}
    found = collect(model, parameters, lambda: model[0](torch.randn(COUNT, 3)).mean())
    assert found["0.weight"].any() and not found["1.weight"].any() and found["1.weight"].shape == (COUNT, 6)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Conv2d(2, 3, 3, padding="same"), (COUNT, 2, 5, 5), "weight belongs to Conv2d"),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (COUNT, 2, 5, 5), "weight belongs to Conv2d"),
        (nn.Bilinear(3, 3, 2), (COUNT, 3), "weight belongs to Bilinear"),
        (nn.Linear(3, 2), (2 * COUNT, 3), "weight sees inputs that are not one for each example"),
    ],
)
def test_other_layers_and_inputs_are_told(model, shape, message):
    inputs = torch.randn(shape)
    with pytest.raises(NotImplementedError, match=message):
        list(batch_gradients(model, {"weight": model.weight}, lambda: model(inputs).mean(), COUNT))
    bare = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(NotImplementedError, match="bare is no layer's weight"):
        list(batch_gradients(model, {"bare": bare}, lambda: bare.sum(), COUNT))
