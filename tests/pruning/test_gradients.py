"""Gradients for the Fisher: the right ones, as many as asked, and nothing else disturbed."""

import math
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    GPT2Config,
)

from mfac_hf.pruning import MaskSet, find_targets, gradients
from mfac_hf.pruning.gradients import DataLoaderGradients

SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
CONFIGS = {
    "bert": BertConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2, pad_token_id=0),
    "deberta": DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True),
}


def examples(count=40):
    rng = random.Random(0)
    return [
        {"input_ids": [rng.randrange(1, 30) for _ in range(rng.randrange(4, 9))], "labels": rng.randrange(2)}
        for _ in range(count)
    ]


def collate(rows):
    length = max(len(row["input_ids"]) for row in rows)
    padded = torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


def classifier(kind="bert"):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(CONFIGS[kind])


def source(rows=None, **options):
    return DataLoaderGradients(DataLoader(rows or examples(), batch_size=7, collate_fn=collate), **options)


def collect(model, source, num_grads, *, parameters=None, seed=0):
    parameters = parameters or find_targets(model)
    rows = {name: [] for name in parameters}
    source.collect(model, parameters, num_grads, seed, lambda name, part: rows[name].append(part.clone()))
    return {name: torch.cat(parts) for name, parts in rows.items()}


def used_examples(model, source, num_grads, seed=0):
    """Examples that gave gradients, in order, recovered by watching the collate function."""
    seen = []
    plain = source.collate_fn
    source.collate_fn = lambda rows: seen.append(rows) or plain(rows)
    source.examples_per_pass = 1
    collect(model, source, num_grads, seed=seed)
    source.collate_fn = plain
    return seen


@pytest.fixture(params=["empirical", "scaled"])
def fisher(request):
    return request.param


def own_loss(model, batch):
    output = model(**batch)
    return output.loss, output.logits


def backward(model, batch, fisher, loss=own_loss):
    """What Trainer would compute: .grad after one backward pass, scaled by the norm of that of the logits."""
    model.zero_grad()
    value, logits = loss(model, batch)
    logits.retain_grad()
    value.backward()
    norm = logits.grad.norm().clamp(min=1e-3) if fisher == "scaled" else 1.0
    return {name: weight.grad.flatten() / norm for name, weight in find_targets(model).items()}


def assert_rows(rows, expected):
    """Rounding of padding and of other batch sizes, in float32 and over a few layers."""
    for name, row in expected.items():
        torch.testing.assert_close(rows[name], row, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def shared(monkeypatch):
    """Numbers of examples of the passes that gave several gradients, since it was asked for."""
    counts, plain = [], gradients.batch_gradients

    def watch(model, parameters, loss, batch_size, differentiate):
        yield from plain(model, parameters, loss, batch_size, differentiate)
        counts.append(batch_size)

    monkeypatch.setattr(gradients, "batch_gradients", watch)
    return counts


@pytest.mark.parametrize("at_once", [4, 1])
@pytest.mark.parametrize("kind", CONFIGS)
def test_per_sample_gradients_are_those_of_backward(kind, at_once, fisher, shared):
    model = classifier(kind).eval()
    rows = collect(model, source(examples_per_pass=at_once, fisher=fisher), 6)
    used = used_examples(model, source(), 6)
    assert len(used) == 6 and all(len(batch) == 1 for batch in used)
    # DeBERTa's projections also see relative positions, which are no examples: told apart by the comparison
    assert set(shared) == ({4, 2} if at_once == 4 and kind != "deberta" else set())
    expected = [backward(model, collate(batch), fisher) for batch in used]
    assert_rows(rows, {name: torch.stack([row[name] for row in expected]) for name in rows})


def test_mini_batch_gradients_are_means(fisher):
    """Of the gradients of single examples, each of which is divided by a norm of its own."""
    model = classifier().eval()
    rows = collect(model, source(batch_size=4, fisher=fisher), 3)
    used = used_examples(model, source(batch_size=4), 3)
    assert [len(batch) for batch in used] == [4, 4, 4]
    expected = [[backward(model, collate([row]), fisher) for row in batch] for batch in used]
    assert_rows(rows, {
        name: torch.stack([torch.stack([own[name] for own in batch]).mean(dim=0) for batch in expected])
        for name in rows
    })  # fmt: skip


class Convolutions(nn.Module):
    def __init__(self, **conv):
        super().__init__()
        options = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2} | conv
        self.body = nn.Sequential(
            nn.Conv2d(4, 6, 3, **options), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(3)
        )
        self.body(torch.randn(2, 4, 9, 9))

    def forward(self, images):
        return self.body(images)


def cross_entropy(model, batch):
    return loss_and_logits(model, batch)[0]


def loss_and_logits(model, batch):
    images, labels = batch
    logits = model(images)
    return nn.functional.cross_entropy(logits, labels), logits


@pytest.mark.parametrize("conv", [{}, {"dilation": 2, "groups": 1}, {"padding": "same", "stride": 1}])
def test_convolutions_with_a_loss_function(conv, fisher, shared):
    torch.manual_seed(0)
    model = Convolutions(**conv).train()
    data = TensorDataset(torch.randn(5, 4, 9, 9), torch.randint(0, 3, (5,)))
    origin = DataLoaderGradients(DataLoader(data), loss_fn=cross_entropy, fisher=fisher)
    rows = collect(model, origin, 5)
    assert set(shared) == ({5} if "padding" not in conv else set())
    model.eval()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0)).tolist()
    for position, i in enumerate(order):
        expected = backward(model, [part[None] for part in data[i]], fisher, loss_and_logits)
        assert_rows({n: row[position] for n, row in rows.items()}, expected)


def language_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS["gpt2"]).eval()


def collate_tokens(rows):
    """Labels for each token, in as many as the row says; the mean is over all of them."""
    batch = collate([row | {"labels": 0} for row in rows])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for i, row in enumerate(rows):
        labels[i, row.get("labelled", 99) :] = -100
    return batch | {"labels": labels}


def drawn(rows, count):
    """Examples that a source draws for so many gradients, in its order: the longest first."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return sorted(order[:count], key=lambda i: -len(rows[i]["input_ids"]))


def own_gradients(model, rows, num_grads, make_batch, fisher, loss=own_loss):
    """Gradients of these examples, each by a backward pass of its own."""
    expected = [backward(model, make_batch([rows[i]]), fisher, loss) for i in drawn(rows, num_grads)]
    return {name: torch.stack([row[name] for row in expected]) for name in expected[0]}


@pytest.mark.parametrize("odd", [{"input_ids": [5, 6, 7]}, {"labelled": 3}], ids=["shorter", "fewer labels"])
def test_a_few_unlike_examples_have_their_own_gradients_wherever_they_come(odd, fisher, shared):
    """Most have eight tokens and labels; the mean over tokens is that of examples where all have equally many."""
    rows = [{"input_ids": [1 + (7 * i + j) % 29 for j in range(8)]} for i in range(40)]
    order = drawn(rows, 20)
    for position in (6, 13):  # in the second and fourth pass of four examples, or, where they are short, in the last
        rows[order[position]] |= odd
    origin = DataLoaderGradients(DataLoader(rows, collate_fn=collate_tokens), examples_per_pass=4, fisher=fisher)
    model = language_model()
    assert_rows(collect(model, origin, 20), own_gradients(model, rows, 20, collate_tokens, fisher))
    assert shared.count(4) >= 3, "passes of equal examples are shared"


def test_padding_that_changes_the_loss_of_a_shorter_example_alone_is_noticed(fisher, shared):
    """A softmax over positions, as for the ends of an answer: full examples have the same loss in any batch."""
    rows = [{"input_ids": [1 + (7 * i + j) % 29 for j in range(8)], "labels": 0} for i in range(40)]
    rows[drawn(rows, 12)[6]]["input_ids"] = [5, 6, 7]
    model = language_model()

    def loss(model, batch):
        logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
        return nn.functional.cross_entropy(logits[:, :, 0], batch["labels"]), logits

    origin = DataLoaderGradients(
        DataLoader(rows, collate_fn=collate),
        loss_fn=lambda *given: loss(*given)[0],
        examples_per_pass=4,
        fisher=fisher,
    )
    assert_rows(collect(model, origin, 12), own_gradients(model, rows, 12, collate, fisher, loss))
    assert shared.count(4) >= 2


def test_a_loss_that_is_no_mean_over_examples_gets_a_pass_for_each(fisher, shared):
    rows, model = examples(), language_model()
    origin = DataLoaderGradients(DataLoader(rows, collate_fn=collate_tokens), fisher=fisher)
    assert_rows(collect(model, origin, 5), own_gradients(model, rows, 5, collate_tokens, fisher))
    assert shared == [5], "tried once"


def test_one_example_alone_tells_nothing_of_several(fisher):
    """A sum over examples is the loss of a single one: that this was right is no leave to share passes."""
    rows = [{"input_ids": [1 + (7 * i + j) % 29 for j in range(8)], "labels": 0} for i in range(40)]
    model = classifier().eval()

    def loss(model, batch):
        logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"), logits

    origin = DataLoaderGradients(
        DataLoader(rows, collate_fn=collate),
        loss_fn=lambda *given: loss(*given)[0],
        examples_per_pass=4,
        fisher=fisher,
    )
    collect(model, origin, 1)
    assert_rows(collect(model, origin, 8), own_gradients(model, rows, 8, collate, fisher, loss))


def test_weights_of_classes_that_come_late_are_noticed(fisher, shared):
    """The first pass has one class, so that its weight cancels as it does in a pass for each."""
    model, weight = classifier().eval(), torch.tensor([0.1, 5.0])

    def loss(model, batch):
        logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
        return nn.functional.cross_entropy(logits, batch["labels"], weight=weight), logits

    rows = [row | {"labels": 0} for row in examples()]
    rows[drawn(rows, 12)[6]]["labels"] = 1
    origin = DataLoaderGradients(
        DataLoader(rows, collate_fn=collate),
        loss_fn=lambda *given: loss(*given)[0],
        examples_per_pass=4,
        fisher=fisher,
    )
    assert_rows(collect(model, origin, 12), own_gradients(model, rows, 12, collate, fisher, loss))
    assert 4 in shared


@pytest.mark.parametrize(
    "options", [{}, {"examples_per_pass": 1}, {"batch_size": 2}], ids=["shared", "single", "pairs"]
)
def test_examples_without_a_label_have_the_gradient_zero(options, fisher, caplog):
    caplog.set_level("INFO")
    rows, model = examples(), language_model()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()  # in which pairs come
    for position in (0, 1, 4):
        rows[(order if "batch_size" in options else drawn(rows, 6))[position]]["labelled"] = 0
    origin = DataLoaderGradients(DataLoader(rows, collate_fn=collate_tokens), fisher=fisher, **options)
    found = collect(model, origin, 6)
    empty = [0] if "batch_size" in options else [0, 1, 4]
    for part in found.values():
        assert [i for i, row in enumerate(part) if not row.any()] == empty and torch.isfinite(part).all()
    if "batch_size" not in options:
        expected = own_gradients(model, rows, 6, collate_tokens, fisher)
        assert_rows(found, {name: row.nan_to_num() for name, row in expected.items()})
    assert f"{2 if 'batch_size' in options else 3} of {12 if 'batch_size' in options else 6} examples" in caplog.text


def test_labels_that_are_all_missing_are_refused():
    rows = [row | {"labelled": 0} for row in examples()]
    origin = DataLoaderGradients(DataLoader(rows, collate_fn=collate_tokens), loss_samples=4)
    with pytest.raises(ValueError, match=r"each of 6 examples is nan.*ignored \(-100\)"):
        collect(language_model(), origin, 6)
    assert math.isnan(origin.loss(language_model()))


def test_held_out_batches_without_a_label_do_not_count():
    rows = examples()
    origin = DataLoaderGradients(DataLoader(rows, collate_fn=collate_tokens), loss_samples=4, examples_per_pass=1)
    model = language_model()
    rows[origin.held_out[0]]["labelled"] = 0
    with torch.no_grad():
        losses = [float(model(**collate_tokens([rows[i]])).loss) for i in origin.held_out[1:]]
    assert origin.loss(model) == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_memory_bounds_the_examples_of_a_pass(shared, caplog):
    """By an estimate from the forward pass of one example."""
    caplog.set_level("INFO")
    model = classifier().eval()
    plenty = source(memory_budget=1 << 30)
    expected = collect(model, plenty, 12)
    assert set(shared) == {12}
    needed = plenty._example_bytes + 8 * max(weight.numel() for weight in find_targets(model).values())
    del shared[:]
    assert_rows(collect(model, source(memory_budget=5 * needed), 12), expected)
    assert set(shared) == {5, 2} and "passes for 5 examples" in caplog.text
    del shared[:]
    assert_rows(collect(model, source(memory_budget=1), 12), expected)
    assert shared == []


def test_one_batch_is_tried():
    origin = DataLoaderGradients(DataLoader(examples(), collate_fn=lambda rows: rows))
    with pytest.raises(ValueError, match="a batch is a list, and the model takes the entries of a dictionary"):
        origin.try_batch(classifier(), find_targets(classifier()))
    model = classifier()
    source().try_batch(model, find_targets(model))
    assert all(p.grad is None for p in model.parameters())


def test_what_is_no_loader_is_refused():
    with pytest.raises(TypeError, match="dataloader is a list; expected a torch.utils.data.DataLoader"):
        DataLoaderGradients([collate(examples(2))])


def test_the_seed_decides_the_examples_whatever_the_parameters():
    model = classifier().eval()
    targets = find_targets(model)
    all_rows = collect(model, source(), 6)
    last = list(targets)[-1]
    assert torch.equal(collect(model, source(), 6)[last], all_rows[last])
    torch.testing.assert_close(
        collect(model, source(), 6, parameters={last: targets[last]})[last], all_rows[last], rtol=1e-5, atol=1e-7
    )
    assert not torch.allclose(collect(model, source(), 6, seed=1)[last], all_rows[last])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_nothing_else_is_disturbed(batch_size):
    model = classifier()
    model.train()
    model.bert.encoder.layer[0].eval()  # a part that its user has frozen
    frozen = model.bert.encoder.layer[0].output.dense.weight
    frozen.requires_grad_(False)
    targets = find_targets(model)
    masks = MaskSet.dense(model, targets)
    masks.update({name: torch.zeros_like(keep) for name, keep in masks.items()})
    masks.attach(model)  # its hooks are for training; the Fisher needs the gradients
    first = next(iter(targets.values()))
    first.grad = torch.ones_like(first)
    modes = [module.training for module in model.modules()]
    weights = [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(5), random.seed(6), np.random.seed(7)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(6), np.random.seed(7)

    loader = DataLoader(examples(), batch_size=2, shuffle=True, collate_fn=drawing_collate)
    origin = DataLoaderGradients(loader, batch_size=batch_size, loss_samples=4)
    rows = collect(model, origin, 4)
    origin.loss(model)

    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand()) == expected[1:]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.equal(first.grad, torch.ones_like(first))
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert not frozen.requires_grad
    assert all(part.any() for part in rows.values())


def drawing_collate(rows):
    torch.rand(1), random.random(), np.random.rand()
    return collate(rows)


def test_held_out_examples_give_the_loss_and_no_gradients():
    model = classifier().eval()
    origin = source(loss_samples=8, seed=3)
    used = used_examples(model, origin, 32)
    held_out = [origin.dataset[i] for i in origin.held_out]
    assert len(held_out) == 8 and not any(batch[0] is row for batch in used for row in held_out)
    with torch.no_grad():
        losses = [model(**collate([row])).loss for row in held_out]
    assert origin.loss(model) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert source().loss(model) is None


def test_too_few_examples_are_counted():
    with pytest.raises(ValueError, match="41 gradients of 1 example.*40 examples give 40"):
        collect(classifier(), source(), 41)
    with pytest.raises(ValueError, match="11 gradients of 4 example.*36 examples give 9"):
        source(batch_size=4, loss_samples=4).check(11)
    with pytest.raises(ValueError, match="40 of 40 examples"):
        source(loss_samples=40)


def test_a_data_set_without_a_length_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from examples()

    with warnings.catch_warnings(), pytest.raises(ValueError, match="Stream has no length"):
        warnings.simplefilter("ignore")
        DataLoaderGradients(DataLoader(Stream(), collate_fn=collate))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_losses_and_gradients_that_are_not_finite_are_refused(batch_size, fisher):
    model = classifier()
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss of a batch is nan"):
        collect(model, source(batch_size=batch_size, fisher=fisher), 4)
    assert [module.training for module in model.modules()] == modes
    model = classifier()
    infinite = DataLoaderGradients(
        DataLoader(examples(), collate_fn=collate),
        loss_fn=lambda model, batch: model(**batch).logits.sub(model(**batch).logits).square().sum().sqrt(),
        batch_size=batch_size,
        fisher=fisher,
    )
    with pytest.raises(ValueError, match="gradient of .* is not finite"):
        collect(model, infinite, 4)


def test_a_model_without_a_loss_is_refused():
    unlabelled = [{"input_ids": row["input_ids"], "labels": 0} for row in examples()]

    def collate_inputs(rows):
        batch = collate(rows)
        del batch["labels"]
        return batch

    origin = DataLoaderGradients(DataLoader(unlabelled, collate_fn=collate_inputs))
    with pytest.raises(ValueError, match=r"returned no loss for a batch of \['attention_mask', 'input_ids'\]"):
        collect(classifier(), origin, 2)
