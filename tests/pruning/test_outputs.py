"""The scaled Fisher: against a dense one from single examples, in batches, and what cannot be scaled."""

import copy

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
)

from mfac_hf import prune_one_shot
from mfac_hf.fisher import BlockedFisher
from mfac_hf.fisher.reference import dense_fisher
from mfac_hf.pruning import find_targets
from mfac_hf.pruning.gradients import DataLoaderGradients
from mfac_hf.pruning.outputs import Scaling
from tests.helpers.pruning_network import FAST, cross_entropy, loader, network, trained_state, weights

COUNT, FLOOR = 12, 1e-3
SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}


def sentences():
    """Token ids of lengths from 3 to 9, and what each task asks of them; some have no token to be guessed."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(COUNT):
        length = int(torch.randint(3, 10, (1,), generator=generator))
        ids = torch.randint(1, 30, (length,), generator=generator)
        asked = torch.rand(length, generator=generator) < (0.4 if i % 4 else 0)
        rows.append({"ids": ids, "class": i % 2, "value": i / 7, "start": i % 3, "end": length - 1, "asked": asked})
    return rows


def padded(tensors, value=0):
    return nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value)


def collate(task):
    def batch_of(rows):
        ids = padded(row["ids"] for row in rows)
        labels = {
            "classes": lambda: {"labels": torch.tensor([row["class"] for row in rows])},
            "regression": lambda: {"labels": torch.tensor([row["value"] for row in rows])},
            "tokens": lambda: {"labels": padded((row["ids"].where(row["asked"], -100) for row in rows), -100)},
            "answers": lambda: {
                "start_positions": torch.tensor([row["start"] for row in rows]),
                "end_positions": torch.tensor([row["end"] for row in rows]),
            },
        }
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), **labels[task]()}

    return batch_of


def model_of(task):
    torch.manual_seed(0)
    kind = {"tokens": BertForMaskedLM, "answers": BertForQuestionAnswering}.get(task, BertForSequenceClassification)
    model = kind(BertConfig(**SIZES, num_labels=1 if task == "regression" else 2)).eval()
    with torch.no_grad():  # random weights make outputs that hardly differ
        for parameter in model.parameters():
            parameter.mul_(6)
    return model


TASKS = ["classes", "regression", "tokens", "answers"]
TARGET = "bert.encoder.layer.0.attention.self.value.weight"  # 256 weights


def scaled_rows(task):
    """Gradients of each example by itself in float64, over the norm of those of its outputs."""
    model, rows = model_of(task).double(), []
    for example in sentences():
        batch = collate(task)([example])
        if task == "regression":
            batch["labels"] = batch["labels"].double()
        output = model(**batch)
        logits = [value for name, value in output.items() if name.endswith("logits")]
        *by_logits, gradient = torch.autograd.grad(output.loss, [*logits, dict(model.named_parameters())[TARGET]])
        norm = sum(part.square().sum() for part in by_logits).sqrt()
        rows.append(gradient.flatten().nan_to_num() / norm.nan_to_num().clamp(min=FLOOR))
    return torch.stack(rows)


def collected(task, **options):
    """Gradients as the pruner takes them, and the examples in its order."""
    model = model_of(task)
    source = DataLoaderGradients(DataLoader(sentences(), collate_fn=collate(task)), fisher="scaled", **options)
    found = []
    count = COUNT // options.get("batch_size", 1)
    source.collect(
        model, {TARGET: find_targets(model)[TARGET]}, count, 0, lambda name, rows: found.append(rows.clone())
    )
    return torch.cat(found), torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("at_once", [4, 1])
@pytest.mark.parametrize("task", TASKS)
def test_the_fisher_is_the_dense_one_of_scaled_gradients(task, at_once):
    expected = scaled_rows(task)
    rows, order = collected(task, examples_per_pass=at_once)
    torch.testing.assert_close(rows.double(), expected[order], rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    unlabelled = [i for i, row in enumerate(sentences()) if not row["asked"].any()] if task == "tokens" else []
    assert [i for i, row in enumerate(expected) if not row.any()] == unlabelled
    assert len(unlabelled) < COUNT / 2 and (task != "tokens" or unlabelled)

    damping = 1e-2
    dense = dense_fisher(expected, damping, COUNT)
    fisher = BlockedFisher(256, block_size=256, damping=damping, num_grads=COUNT)
    fisher.add(rows)
    x = torch.randn(256, generator=torch.Generator().manual_seed(1))
    solved = torch.linalg.solve(dense, x.double())
    assert float((fisher.solve(x).double() - solved).norm() / solved.norm()) < 1e-4
    diagonal = torch.linalg.inv(dense).diagonal()
    assert float((fisher.inverse_diagonal().double() - diagonal).norm() / diagonal.norm()) < 1e-4


@pytest.mark.parametrize("task", ["classes", "regression", "tokens"])
def test_examples_of_a_batch_are_scaled_one_by_one(task):
    """Padding and missing labels included; a softmax over positions sees padding, so answers are left out."""
    expected = scaled_rows(task)
    rows, order = collected(task, batch_size=3)
    means = expected[order].view(COUNT // 3, 3, -1).mean(dim=1)
    assert float((rows.double() - means).norm() / means.norm()) < 1e-3


def test_the_floor_bounds_what_is_divided_by():
    loss, outputs = torch.tensor([[1e-5, 0.0], [3.0, 4.0], [0.0, 0.0]]), torch.zeros(3, 2, requires_grad=True)
    hidden = outputs * 1
    value = (hidden * loss).sum() / 3
    (found,), norms = Scaling(0.5).gradients(value, [hidden], [outputs], {})
    torch.testing.assert_close(norms, torch.tensor([1e-5, 5.0, 0.0]))
    torch.testing.assert_close(3 * found, torch.tensor([[2e-5, 0.0], [0.6, 0.8], [0.0, 0.0]]))


def test_outputs_that_accelerate_converts_are_found():
    """The loss was computed before that, from outputs in bfloat16."""
    batch = collate("classes")(sentences())
    plain = model_of("classes")
    converting = copy.deepcopy(plain)
    inside = torch.autocast("cpu", torch.bfloat16)
    converting.forward = convert_outputs_to_fp32(inside(converting.forward))
    found = []
    for model in (plain, converting):
        target, scaling = find_targets(model)[TARGET], Scaling(FLOOR)
        with scaling.watched(model, COUNT) as outputs:
            if model is plain:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(**batch).loss
            else:
                loss = model(**batch).loss
        assert outputs[0].dtype == (torch.bfloat16 if model is plain else torch.float32)
        (gradient,), norms = scaling.gradients(loss.float(), outputs, [target], {TARGET: target})
        found.append((gradient, norms))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][0].any()


class Tuple(nn.Module):
    """Returns a tuple, with the logits in the second place."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, inputs):
        return inputs.sum(), self.body(inputs)


def of_tuple(model, batch):
    return nn.functional.cross_entropy(model(batch[0])[1], batch[1])


def test_outputs_are_found_by_a_function():
    models = network(), Tuple()
    models[0].load_state_dict(trained_state())
    models[1].body.load_state_dict(trained_state())
    options = {**FAST, "progress": False, "recomputations": 2}
    prune_one_shot(models[0], loader(), 0.6, loss_fn=cross_entropy, **options)
    report = prune_one_shot(
        models[1], loader(), 0.6, loss_fn=of_tuple, outputs_fn=lambda returned: returned[1], **options
    )
    assert report.options["fisher"] == "scaled"
    for weight, same in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(weight, same)


def detached(model, batch):
    model(batch[0])
    return sum(p.square().sum() for p in model.parameters())


def penalised(model, batch):
    return cross_entropy(model, batch) + 1e-3 * model[2].weight.square().sum()


def uncalled(model, batch):
    return nn.functional.cross_entropy(model[4](model[3](model[2](model[1](model[0](batch[0]))))), batch[1])


def flat(model, batch):
    return 0 * model(batch[0]).sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_fn": detached}, "does not depend on the outputs .*outputs_fn, .* or fisher='empirical'"),
        ({"loss_fn": uncalled}, r"does not depend on the outputs .*\(0 with a gradient were found\)"),
        ({"loss_fn": penalised}, "depends on 2.weight beside the outputs .*penalty on weights"),
        ({"loss_fn": flat}, "gradient of the loss by the model's outputs is zero for each of 16 examples"),
        ({"outputs_fn": lambda z: z.T}, r"output 1 of outputs_fn of Sequential has the shape \(3, .*one row for each"),
        ({"outputs_fn": lambda z: z.sum()}, r"has the shape \(\) for a batch of"),
        ({"outputs_fn": lambda z: "logits"}, "outputs_fn returned a str; expected the tensor"),
        ({"outputs_fn": lambda z: []}, "outputs_fn returned a list of 0"),
        ({"fisher": "natural"}, "fisher is 'natural'; expected one of scaled, empirical"),
        ({"fisher_floor": 0.0}, "fisher_floor is 0.0; expected a positive number, such as 0.001"),
        ({"fisher_floor": -1.0}, "fisher_floor is -1.0"),
        ({"fisher_floor": float("nan")}, "fisher_floor is nan"),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_what_cannot_be_scaled_is_refused_before_a_weight_changes(options, message, size, model):
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        sizes = {"num_grads": 16 // size, "grad_batch_size": size}
        prune_one_shot(model, loader(), 0.5, **{"loss_fn": cross_entropy, **FAST, **sizes, **options})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_model_without_logits_is_refused():
    class Dictionary(Tuple):
        def forward(self, inputs):
            return {"scores": self.body(inputs), "logits": None}

    inputs, labels = loader().dataset.tensors
    data = DataLoader(TensorDataset(inputs, labels))
    for model, key, described in (
        (Tuple(), 1, "a tuple of 2"),
        (Dictionary(), "scores", r"a dictionary of \['logits', 'scores'\]"),
    ):
        before = weights(model)

        def loss_fn(model, batch, key=key):
            return nn.functional.cross_entropy(model(batch[0])[key], batch[1])

        with pytest.raises(
            ValueError, match=f"{type(model).__name__} returned {described}, without logits.*outputs_fn"
        ):
            prune_one_shot(model, data, 0.5, loss_fn=loss_fn, **FAST)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_empirical_fisher_asks_for_no_outputs():
    model = Tuple()
    report = prune_one_shot(model, loader(), 0.5, loss_fn=of_tuple, fisher="empirical", **FAST)
    assert report.options["fisher"] == "empirical" and report.sparsity == 0.5
