"""Masks: what they keep, what they zero, and those read from a sparse model."""

import copy

import pytest
import torch
from torch import nn

from mfac_hf import MFAC
from mfac_hf.pruning import MaskSet, masks_from_sparse_model

NAMES = ["0.weight", "2.weight"]


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2))


def sparse_model():
    model = small_model()
    with torch.no_grad():
        model[0].weight[torch.rand(6, 8) < 0.5] = 0
        model[0].bias.zero_()
        model[2].weight.zero_()
    return model


def random_masks(model, names=NAMES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    return MaskSet({name: torch.rand(parameters[name].shape, generator=generator) < 0.5 for name in names})


def train_step(model, optimizer):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.randint(0, 2, (4,))).backward()
    optimizer.step()


def test_sparsity_counts_all_weights_together():
    masks = MaskSet({"a": torch.tensor([True, False]), "b": torch.tensor([[True, True, True, False, False, False]])})
    assert masks.numel == 8
    assert masks.sparsity == 0.5
    assert masks.sparsities() == {"a": 0.5, "b": 0.5}
    assert MaskSet.dense(small_model(), NAMES).sparsity == 0


def test_apply_zeroes_exactly_the_pruned_weights():
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = random_masks(model)
    assert sum(masks.nonzeros(model).values()) == masks.numel - sum(int(keep.sum()) for keep in masks.values())
    with torch.no_grad():
        model[0].weight[~masks["0.weight"]] = float("nan")  # a product with zero would keep it
    masks.apply(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] * masks[name] if name in masks else before[name])
    assert masks.nonzeros(model) == {}


def test_zeros_of_a_sparse_model_stay_pruned_and_untrained_matrices_are_kept():
    model = sparse_model()
    masks = MaskSet.from_model(model, NAMES)
    assert torch.equal(masks["0.weight"], model[0].weight != 0)
    assert masks["2.weight"].all()
    assert masks.sparsity == pytest.approx(int((model[0].weight == 0).sum()) / 60)


def test_update_only_shrinks():
    masks = MaskSet({"a": torch.tensor([True, False, True])})
    masks.update({"a": torch.tensor([False, False, True])})
    assert masks["a"].tolist() == [False, False, True]
    with pytest.raises(ValueError, match="brings back 1 pruned"):
        masks.update({"a": torch.tensor([True, False, False])})
    with pytest.raises(ValueError, match="no mask for 'b'"):
        masks.update({"a": torch.tensor([False, False, False]), "b": torch.tensor([True])})
    with pytest.raises(ValueError, match="shape"):
        masks.update({"a": torch.tensor([False])})
    assert masks["a"].tolist() == [False, False, True]


def test_a_copy_has_masks_of_its_own():
    masks = MaskSet({"a": torch.tensor([True, True])})
    copied = masks.copy()
    assert copied == masks
    copied.update({"a": torch.tensor([True, False])})
    assert masks["a"].all() and copied != masks


@pytest.mark.parametrize("build", [dict, lambda: {"a": torch.ones(2)}])
def test_what_is_no_mask_is_refused(build):
    with pytest.raises((ValueError, TypeError), match="no parameter|expected torch.bool"):
        MaskSet(build())


def test_masks_of_another_model_are_refused_with_what_differs():
    masks = random_masks(small_model())
    other = nn.Sequential(nn.Linear(8, 5), nn.LayerNorm(5))
    for call in (masks.check, masks.apply, masks.attach, masks.parameter_masks, masks.nonzeros):
        with pytest.raises(ValueError, match=r"0.weight has shape \(5, 8\) and its mask \(6, 8\)"):
            call(other)
    with pytest.raises(ValueError, match="2.weight is no parameter"):
        masks.check(other)
    with pytest.raises(ValueError, match="no parameter 3.weight"):
        MaskSet.dense(other, ["3.weight"])


def test_a_shared_weight_has_one_mask():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    masks = MaskSet.dense(model, ["1.weight", "0.weight"])
    assert list(masks) == ["0.weight"]
    masks.update({"0.weight": torch.eye(4, dtype=torch.bool)})
    masks.apply(model)
    assert int((model[1].weight != 0).sum()) == 4
    # the second name finds the same parameter, but two masks for it could disagree
    MaskSet({"1.weight": masks["0.weight"]}).check(model)
    with pytest.raises(ValueError, match="share a weight"):
        MaskSet({"0.weight": masks["0.weight"], "1.weight": masks["0.weight"]}).check(model)


def test_gradients_of_pruned_weights_are_zero_while_attached():
    model = small_model()
    masks = random_masks(model)
    inputs, labels = torch.randn(4, 8), torch.tensor([0, 1, 1, 0])

    def gradients():
        model.zero_grad()
        for _ in range(2):  # accumulation
            nn.functional.cross_entropy(model(inputs), labels).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    free = gradients()
    masks.attach(model)
    with pytest.raises(RuntimeError, match="attached already"):
        masks.attach(model)
    masked = gradients()
    for name in free:
        torch.testing.assert_close(masked[name], free[name] * masks[name] if name in masks else free[name])
    masks.update({"0.weight": torch.zeros(6, 8, dtype=torch.bool)})
    assert not gradients()["0.weight"].any()
    masks.detach()
    torch.testing.assert_close(gradients()["0.weight"], free["0.weight"])


def test_a_frozen_parameter_needs_no_hook():
    model = small_model()
    model[0].weight.requires_grad_(False)
    masks = random_masks(model)
    masks.attach(model)
    copy.deepcopy(model)  # Trainer and users copy models in the middle of training
    masks.detach()


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_forget_pruned_weights(optimizer_class):
    model = small_model()
    options = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {"amsgrad": True}
    optimizer = optimizer_class(model.parameters(), lr=0.1, weight_decay=0.1, **options)
    for _ in range(3):
        train_step(model, optimizer)
    masks = random_masks(model)
    masks.attach(model)
    masks.apply(model)
    before = copy.deepcopy(optimizer.state[model[0].weight])
    masks.clear_optimizer_state(model, optimizer)
    state = optimizer.state[model[0].weight]
    moments = [name for name, value in state.items() if torch.is_tensor(value) and value.shape == (6, 8)]
    assert len(moments) == (1 if optimizer_class is torch.optim.SGD else 3)
    for name in moments:
        assert torch.equal(state[name], before[name] * masks["0.weight"])
    for _ in range(3):  # with zero gradients and no memory the weights stay where they are, weight decay or not
        train_step(model, optimizer)
        assert masks.nonzeros(model) == {}


def test_mfac_gets_the_masks_as_its_own():
    model = small_model()
    optimizer = MFAC(
        model.parameters(), metric="identity", lr=0.01, num_grads=4, damping=1e-3, momentum=0.9, weight_decay=0.1
    )
    for _ in range(3):
        train_step(model, optimizer)
    masks = random_masks(model)
    masks.apply(model)
    masks.clear_optimizer_state(model, optimizer)
    state = optimizer.state[model[0].weight]
    assert torch.equal(state["mask"], masks["0.weight"])
    assert not state["momentum_buffer"][~masks["0.weight"]].any() and state["momentum_buffer"].any()
    for _ in range(3):  # the window itself leaves them out: no hook is needed
        train_step(model, optimizer)
        assert masks.nonzeros(model) == {}


def test_only_matrices_with_zeros_among_values_are_masked():
    model = sparse_model()
    masks = masks_from_sparse_model(model)
    assert list(masks) == [model[0].weight]
    assert torch.equal(masks[model[0].weight], model[0].weight != 0)


def test_training_keeps_the_zeros_and_moves_zero_biases():
    model = sparse_model()
    nn.init.normal_(model[2].weight)  # a zero output layer would give the layers below no gradient
    zeros = model[0].weight == 0
    optimizer = MFAC(
        model.parameters(), metric="identity", lr=0.01, num_grads=4, damping=1e-3, masks=masks_from_sparse_model(model)
    )
    for _ in range(6):
        train_step(model, optimizer)
    assert torch.equal(model[0].weight == 0, zeros)
    assert model[0].bias.abs().min() > 0


def test_a_padding_row_is_not_pruning():
    with pytest.raises(ValueError, match="dense"):
        masks_from_sparse_model(nn.Embedding(5, 3, padding_idx=0))


def test_frozen_and_dense_weights_get_no_mask():
    model = sparse_model()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="dense"):
        masks_from_sparse_model(model)
