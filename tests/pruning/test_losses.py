"""The loss is found where Trainer finds it, and what is none is described."""

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from mfac_hf.pruning.losses import BatchLoss, is_unlabelled, model_loss

LOSS, LOGITS = torch.tensor(0.5, requires_grad=True), torch.zeros(4, 2)


def returning(value):
    model = nn.Module()
    model.forward = lambda **batch: value
    return model


@pytest.mark.parametrize(
    "output",
    [{"loss": LOSS, "logits": LOGITS}, (LOSS, LOGITS), [LOSS], SequenceClassifierOutput(loss=LOSS, logits=LOGITS)],
    ids=["dictionary", "tuple", "list", "ModelOutput"],
)
def test_the_loss_is_found_as_trainer_finds_it(output):
    assert model_loss(returning(output), {"x": LOGITS}) is LOSS


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"logits": LOGITS}, r"a dictionary of \['logits'\]: labels"),
        ((LOGITS, LOGITS), r"a tuple of 2, with a tensor of shape \(4, 2\) in its place"),
        ((), "a tuple of 0"),
        (LOGITS, "a Tensor"),
        ({"loss": LOGITS}, r"a dictionary of \['loss'\], with a tensor of shape"),
        (SequenceClassifierOutput(logits=LOGITS), r"a dictionary of \['logits'\]"),
        (None, "a NoneType"),
    ],
)
def test_what_is_no_loss_is_described(output, message):
    with pytest.raises(ValueError, match=rf"no loss for a batch of \['x'\], but {message}"):
        model_loss(returning(output), {"x": LOGITS})


@pytest.mark.parametrize("batch", [(LOGITS, LOGITS), [LOGITS], LOGITS])
def test_batches_that_are_no_dictionaries_are_refused(batch):
    with pytest.raises(ValueError, match=rf"a batch is a {type(batch).__name__}, .*loss_fn"):
        model_loss(returning(LOSS), batch)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3), r"a tensor of shape \(3,\)"),
        (0.5, "float"),
        (torch.tensor(0.5), "has no gradient"),
        (LOSS / 0, "is inf"),
    ],
)
def test_losses_without_a_use_are_refused(value, message):
    with pytest.raises(ValueError, match=f"the loss of a batch {'' if 'has' in message else '.*'}{message}"):
        BatchLoss(lambda model, batch: value, nn.Module(), {}, 4, {})()


def test_a_loss_of_nan_may_have_no_gradient_but_zero():
    loss = BatchLoss(lambda model, batch: LOSS * float("nan"), nn.Module(), {}, 4, {})
    assert loss().isnan() and loss.missing
    assert torch.equal(loss.checked("w", torch.zeros(2)), torch.zeros(2))
    for rows in (torch.ones(2), torch.full((2,), float("nan"))):
        with pytest.raises(ValueError, match="the loss of a batch is nan"):
            loss.checked("w", rows)


def test_labels_that_are_all_ignored():
    ignored = torch.full((2, 3), -100)
    assert is_unlabelled({"labels": ignored}) and not is_unlabelled({"labels": ignored + torch.eye(2, 3).long()})
    assert not is_unlabelled({"x": ignored}) and not is_unlabelled([ignored]) and not is_unlabelled({"labels": None})
