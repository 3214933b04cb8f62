"""Masks read off a sparse model."""

import pytest
import torch

from mfac_hf import MFAC
from mfac_hf.pruning import masks_from_sparse_model


def sparse_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[torch.rand(6, 8) < 0.5] = 0
        model[0].bias.zero_()
        model[2].weight.zero_()
    return model


def test_only_matrices_with_zeros_among_values_are_masked():
    model = sparse_model()
    masks = masks_from_sparse_model(model)
    assert list(masks) == [model[0].weight]
    assert torch.equal(masks[model[0].weight], model[0].weight != 0)


def test_training_keeps_the_zeros_and_moves_zero_biases():
    model = sparse_model()
    torch.nn.init.normal_(model[2].weight)  # a zero output layer would give the layers below no gradient
    zeros = model[0].weight == 0
    optimizer = MFAC(model.parameters(), lr=0.01, num_grads=4, damping=1e-3, masks=masks_from_sparse_model(model))
    for _ in range(6):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.randint(0, 2, (4,))).backward()
        optimizer.step()
    assert torch.equal(model[0].weight == 0, zeros)
    assert model[0].bias.abs().min() > 0


def test_a_padding_row_is_not_pruning():
    with pytest.raises(ValueError, match="dense"):
        masks_from_sparse_model(torch.nn.Embedding(5, 3, padding_idx=0))


def test_frozen_and_dense_weights_get_no_mask():
    model = sparse_model()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="dense"):
        masks_from_sparse_model(model)
