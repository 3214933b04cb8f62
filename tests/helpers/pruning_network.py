"""A network small enough to prune in a test, its data, and a source of gradients that remembers what it gave."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mfac_hf import prune_one_shot
from mfac_hf.pruning import find_targets
from mfac_hf.pruning.gradients import DataLoaderGradients

FAST = {"num_grads": 16, "block_size": 8, "damping": 1e-3, "progress": False}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))


def cross_entropy(model, batch):
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


def loader(count=64):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 8, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(dim=1)), batch_size=4)


def trained_state():
    """Weights of a network that has learned something: random weights have no saliency worth the name."""
    model = network()
    inputs, labels = loader(256).dataset.tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def one_shot(model, sparsity, data=None, **options):
    return prune_one_shot(model, data or loader(), sparsity, loss_fn=cross_entropy, **(FAST | options))


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def zeros(model):
    return {name: int((weight == 0).sum()) for name, weight in find_targets(model).items()}


class Spy(DataLoaderGradients):
    """Keeps what each collection gave, and the weights it saw."""

    def __init__(self, **options):
        super().__init__(loader(), loss_fn=cross_entropy, **options)
        self.collections = []

    def collect(self, model, parameters, num_grads, seed, consume):
        rows = {name: [] for name in parameters}
        self.collections.append((rows, weights(model)))

        def spy(name, part):
            rows[name].append(part.clone())
            consume(name, part)

        super().collect(model, parameters, num_grads, seed, spy)
