"""Pruning in one go: against dense formulas and PyTorch's own magnitude pruning, and what must not happen."""

import json
import math

import pytest
import torch
from datasets import load_dataset
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mfac_hf import prune_one_shot
from mfac_hf.fisher import BlockedFisher
from mfac_hf.pruning import MaskSet, PruningOptions, find_targets, prune_to
from mfac_hf.pruning.blocked_step import plan_groups
from mfac_hf.pruning.engine import substep_sparsity
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


@pytest.fixture(scope="module")
def trained():
    """A network that has learned something: random weights have no saliency worth the name."""
    model = network()
    inputs, labels = loader(256).dataset.tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def model(trained):
    network_ = network()
    network_.load_state_dict(trained)
    return network_


def one_shot(model, sparsity, data=None, **options):
    return prune_one_shot(model, data or loader(), sparsity, loss_fn=cross_entropy, **(FAST | options))


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def zeros(model):
    return {name: int((weight == 0).sum()) for name, weight in find_targets(model).items()}


def test_the_papers_procedure_is_its_formulas(model):
    """Selection by w² / 2[F⁻¹]ᵢᵢ and the sum of single updates, with a dense inverse and autograd's gradients."""
    name, weight = "2.weight", model[2].weight
    before = weight.detach().double().flatten()
    data = loader().dataset
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()[:16]
    rows = []
    for i in order:
        inputs, label = data[i]
        loss = nn.functional.cross_entropy(model(inputs[None]), label[None])
        rows.append(torch.autograd.grad(loss, weight)[0].flatten().double())
    gradients = torch.stack(rows)
    fisher = 1e-3 * torch.eye(144, dtype=torch.float64) + gradients.T @ gradients / 16
    inverse = torch.linalg.inv(fisher)
    saliency = before.square() / (2 * inverse.diagonal())
    pruned = saliency.argsort()[:72]
    expected = before - sum(before[i] / inverse[i, i] * inverse[:, i] for i in pruned)
    expected[pruned] = 0

    options = {"targets": r"^2\.", "recomputations": 1, "selection": "diagonal", "update": "sum", "block_size": 144}
    report = one_shot(model, 0.5, **options)
    # float32 gradients from another batch size
    torch.testing.assert_close(weight.detach().flatten().double(), expected, rtol=1e-4, atol=1e-5)
    step = expected - before
    assert report.predicted_loss_increase == pytest.approx(float(step @ fisher @ step) / 2, rel=1e-3)
    assert list(report.sparsities) == [name] and report.sparsity == 0.5


def test_magnitude_is_pytorchs_global_pruning(model):
    twin = network()
    twin.load_state_dict(model.state_dict())
    layers = [(twin[i], "weight") for i in (0, 2, 4)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.7)
    report = prune_one_shot(model, None, 0.7, method="magnitude")
    for i in (0, 2, 4):
        assert torch.equal(model[i].weight, twin[i].weight)
    assert report.num_grads == 0 and report.predicted_loss_increase is None


@pytest.mark.parametrize("selection", ["greedy", "diagonal"])
@pytest.mark.parametrize("update", ["joint", "sum"])
def test_exactly_the_asked_number_of_weights_is_zero(model, selection, update):
    before = weights(model)
    report = one_shot(model, 0.8, recomputations=3, selection=selection, update=update)
    assert sum(zeros(model).values()) == round(0.8 * 276)
    assert report.sparsity == pytest.approx(round(0.8 * 276) / 276)
    assert report.masks.nonzeros(model) == {}
    assert all(torch.equal(keep, dict(model.named_parameters())[name] != 0) for name, keep in report.masks.items())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "bias" in name)
    assert not torch.equal(model[2].weight[report.masks["2.weight"]], before["2.weight"][report.masks["2.weight"]])


def test_uniform_scope_prunes_every_tensor_alike(model):
    one_shot(model, 0.75, scope="uniform", recomputations=2)
    assert zeros(model) == {"0.weight": 72, "2.weight": 108, "4.weight": 27}


@pytest.mark.parametrize("method", ["mfac", "magnitude"])
def test_patterns(model, method):
    options = {"targets": [r"^0\.", r"^2\."], "method": method, "recomputations": 2}
    one_shot(model, 0.5, pattern="2:4", **options)
    for i in (0, 2):
        assert ((model[i].weight != 0).view(-1, 4).sum(dim=1) == 2).all()
    fresh = network()
    one_shot(fresh, 0.5, pattern="block4", **options)
    for i in (0, 2):
        kept = (fresh[i].weight != 0).view(-1, 4).sum(dim=1)
        assert ((kept == 0) | (kept == 4)).all()
    assert zeros(fresh)["0.weight"] + zeros(fresh)["2.weight"] == 120


def test_substeps_are_geometric_in_the_density(model):
    assert substep_sparsity(0.5, 0.9, 4, 4) == pytest.approx(0.9)
    densities = [1 - substep_sparsity(0.5, 0.9, step, 4) for step in range(5)]
    ratios = [after / before for before, after in zip(densities, densities[1:], strict=False)]
    assert ratios == pytest.approx([0.2**0.25] * 4)
    report = one_shot(model, 0.9, recomputations=4)
    expected = [round(276 * (1 - 0.1 ** (step / 4))) / 276 for step in range(1, 5)]
    assert [step["sparsity"] for step in report.steps] == pytest.approx(expected)
    assert report.num_grads == 64


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


def test_each_substep_has_new_gradients_of_the_weights_that_are_left(model):
    masks, source = MaskSet.dense(model, find_targets(model)), Spy()
    prune_to(model, masks, source, 0.9, PruningOptions(num_grads=16, block_size=8, recomputations=3), progress=False)
    seen = [after for _, after in source.collections]
    assert len(seen) == 3
    counts = [sum(int((w[name] == 0).sum()) for name in masks) for w in seen]
    assert counts == [round(276 * substep_sparsity(0, 0.9, step, 3)) for step in range(3)]
    first, second = (torch.cat(rows["4.weight"]) for rows, _ in source.collections[:2])
    assert first.shape == second.shape == (16, 36)
    assert not any(torch.allclose(a, b) for a, b in zip(first, second, strict=True))


def test_groups_of_targets_give_what_all_at_once_give(model):
    """Passes over the same gradients, before the weights change: rounding of batched products is all that differs."""
    twin = network()
    twin.load_state_dict(model.state_dict())
    options = {"num_grads": 16, "block_size": 8, "damping": 1e-3, "recomputations": 2}
    budget = max(BlockedFisher.nbytes(w.numel(), 8, 16) for w in find_targets(model).values())
    prune_to(twin, MaskSet.dense(twin, find_targets(twin)), Spy(), 0.7, PruningOptions(**options), progress=False)
    source, masks = Spy(), MaskSet.dense(model, find_targets(model))
    grouped = PruningOptions(**options, memory_budget=budget)
    report = prune_to(model, masks, source, 0.7, grouped, progress=False)
    groups = [tuple(rows) for rows, _ in source.collections]
    assert groups == 2 * 2 * [("0.weight",), ("2.weight",), ("4.weight",)]
    assert report.steps[0]["groups"] == 3
    for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(weight == 0, other == 0)
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5)


def test_a_target_too_large_for_memory_is_refused_with_the_numbers(model):
    before, source = weights(model), Spy()
    options = PruningOptions(block_size=8, num_grads=16, memory_budget=1000)
    with pytest.raises(MemoryError, match=r"0.weight \(96 weights in blocks of 8, 16 gradients\) needs .* budget"):
        prune_to(model, MaskSet.dense(model, find_targets(model)), source, 0.5, options)
    assert source.collections == [] and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    # by default what is free on the machine is shared with everything else
    assert plan_groups({"a": torch.empty(10), "b": torch.empty(20)}, PruningOptions(), source) == [["a", "b"]]


def test_the_joint_update_is_the_best_for_the_same_weights(model, trained):
    options = {"selection": "diagonal", "recomputations": 1}
    summed = one_shot(model, 0.6, update="sum", **options)
    model.load_state_dict(trained)
    joint = one_shot(model, 0.6, update="joint", **options)
    assert joint.masks == summed.masks
    assert 0 < joint.predicted_loss_increase < summed.predicted_loss_increase


def test_second_order_pruning_harms_less_than_magnitude(model, trained):
    options = {"loss_samples": 192, "data": loader(256), "num_grads": 64, "block_size": 48, "recomputations": 8}
    ours = one_shot(model, 0.8, **options)
    model.load_state_dict(trained)
    magnitude = one_shot(model, 0.8, method="magnitude", **options)
    assert ours.loss_before == magnitude.loss_before < 0.01
    assert ours.loss_after < 0.7 * magnitude.loss_after  # 0.23 and 0.52


def test_automatic_damping_takes_the_lowest_held_out_loss(model, trained):
    report = one_shot(model, 0.7, damping="auto", loss_samples=24, recomputations=1)
    tried = {entry["damping"]: entry["loss"] for entry in report.steps[0]["damping_losses"]}
    assert len(tried) == 5 == len(set(tried.values()))
    assert report.steps[0]["damping"] == min(tried, key=tried.get)
    assert report.loss_after == min(tried.values())  # the model is that of the choice, not of the last trial
    for damping, loss in tried.items():
        model.load_state_dict(trained)
        fixed = one_shot(model, 0.7, damping=damping, loss_samples=24, recomputations=1)
        assert fixed.loss_after == pytest.approx(loss, rel=1e-4)


def test_later_substeps_keep_the_damping_relative_to_their_gradients(model):
    masks, source = MaskSet.dense(model, find_targets(model)), Spy(loss_samples=24)
    options = PruningOptions(num_grads=16, block_size=8, damping="auto", recomputations=3)
    report = prune_to(model, masks, source, 0.9, options, progress=False)
    relative = []
    for step, (rows, weights_) in zip(report.steps, source.collections, strict=True):
        kept = {name: (weights_[name] != 0).flatten() for name in masks}
        squares = torch.cat([torch.cat(parts)[:, kept[name]].flatten() for name, parts in rows.items()]).square()
        relative.append(step["damping"] / float(squares.mean()))
    assert relative[0] == pytest.approx(min((1e-3, 1e-2, 1e-1, 1, 10), key=lambda value: abs(value - relative[0])))
    assert relative == pytest.approx([relative[0]] * 3, rel=1e-4)
    assert [len(step["damping_losses"]) for step in report.steps] == [5, 0, 0]
    assert len({step["damping"] for step in report.steps}) == 3


def test_automatic_damping_holds_examples_out_by_itself():
    assert PruningOptions(damping="auto").loss_samples == 256
    assert PruningOptions(damping="auto", method="magnitude").loss_samples == 0


def test_an_already_sparse_model_is_pruned_further(model):
    first = one_shot(model, 0.5, recomputations=1)
    already = {name: ~keep for name, keep in first.masks.items()}
    report = one_shot(model, 0.75, recomputations=2)
    assert report.sparsity_before == 0.5 and report.sparsity == 0.75
    assert all(not report.masks[name][gone].any() for name, gone in already.items())
    again = one_shot(model, 0.75)
    assert again.steps == [] and again.sparsity == 0.75
    with pytest.raises(ValueError, match="0.5 is below the 0.75"):
        one_shot(model, 0.5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_on_the_way_leaves_everything_as_it_was(model, error):
    class Failing(Spy):
        def collect(self, *args):
            if len(self.collections) == 2:
                raise error("now")
            super().collect(*args)

    masks, before, source = MaskSet.dense(model, find_targets(model)), weights(model), Failing()
    with pytest.raises(error, match="now"):
        prune_to(model, masks, source, 0.9, PruningOptions(num_grads=8, block_size=8), progress=False)
    assert len(source.collections) == 2
    assert not torch.equal(source.collections[1][1]["2.weight"], before["2.weight"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert masks.sparsity == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity is 1.0; expected a number in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": math.nan}, "sparsity is nan"),
        ({"targets": "nothing"}, "hits no weight.*0.weight"),
        ({"num_grads": 65}, "65 gradients .* 64 examples give 64"),
        ({"num_grads": 0}, "num_grads is 0"),
        ({"block_size": 0}, "block_size is 0; expected an integer of at least 1"),
        ({"recomputations": 0}, "recomputations is 0"),
        ({"recomputations": 1.5}, "recomputations is 1.5"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"damping": "best"}, "damping is 'best'"),
        ({"damping": math.nan}, "damping is nan"),
        ({"method": "random"}, "method is 'random'; expected one of mfac, magnitude"),
        ({"selection": "best"}, "selection is 'best'"),
        ({"update": "none"}, "update is 'none'"),
        ({"scope": "local"}, "scope is 'local'"),
        ({"pattern": "4:2"}, "pattern is '4:2'"),
        ({"pattern": "2:4", "sparsity": 0.6}, "allows at most 0.5"),
        ({"pattern": "2:5"}, "0.weight has rows of 8 weights"),
        ({"pattern": "2:4", "block_size": 6}, "block_size is 6"),
        ({"memory_budget": 0}, "memory_budget is 0"),
        ({"loss_samples": 64}, "64 of 64 examples"),
    ],
)
def test_bad_input_is_refused_before_a_weight_changes(model, changes, message):
    before = weights(model)
    arguments = {"sparsity": 0.5} | changes
    with pytest.raises(ValueError, match=message):
        one_shot(model, arguments.pop("sparsity"), **arguments)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_loss_that_is_not_finite_is_refused(model):
    model[4].bias.data[0] = math.nan
    before = weights(model)
    with pytest.raises(ValueError, match="loss of a batch is nan"):
        one_shot(model, 0.5)
    assert all(torch.equal(model[i].weight, before[f"{i}.weight"]) for i in (0, 2, 4))


def test_gradients_are_needed_where_they_are_used(model):
    with pytest.raises(ValueError, match="'mfac' needs gradients"):
        prune_one_shot(model, None, 0.5)
    with pytest.raises(ValueError, match="no data loader"):
        prune_one_shot(model, None, 0.5, method="magnitude", loss_samples=3)
    without = DataLoaderGradients(loader(), loss_fn=cross_entropy)
    masks = MaskSet.dense(model, find_targets(model))
    with pytest.raises(ValueError, match="judged on held-out examples"):
        prune_to(model, masks, without, 0.5, PruningOptions(damping="auto"))
    with pytest.raises(ValueError, match="another model"):
        prune_to(nn.Linear(2, 2), masks, without, 0.5, PruningOptions())


def test_the_report_is_plain_json(model):
    report = one_shot(model, 0.6, recomputations=2, damping="auto", loss_samples=16)
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["options"]["damping"] == "auto" and told["options"]["recomputations"] == 2
    assert told["num_weights"] == 276 and told["sparsity_before"] == 0
    assert told["sparsity"] == pytest.approx(0.6, abs=1 / 276)
    assert set(told["sparsities"]) == {"0.weight", "2.weight", "4.weight"}
    assert told["predicted_loss_increase"] == sum(step["predicted_loss_increase"] for step in told["steps"])
    assert told["loss_before"] > 0 and told["loss_after"] > 0 and told["seconds"] > 0
    assert "masks" not in told


def test_half_precision_models_stay_what_they_are(model):
    half = model.to(torch.bfloat16)
    data = DataLoader(TensorDataset(loader().dataset.tensors[0].bfloat16(), loader().dataset.tensors[1]))
    report = one_shot(half, 0.5, data=data, recomputations=2)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert report.sparsity == 0.5 and report.masks.nonzeros(half) == {}


@pytest.mark.slow
def test_a_language_model_loses_less_than_by_magnitude(shared_data):
    """Real weights and sentences, one gradient set: where most of the encoder goes, the Fisher knows better."""
    folder = shared_data / "models" / "bert-tiny-mlm"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentences = load_dataset(str(shared_data / "glue"), "sst2", split="train[:400]")["sentence"]

    def collate(texts):
        """Every third token is to be guessed."""
        batch = dict(tokenizer(texts, truncation=True, max_length=32, padding=True, return_tensors="pt"))
        guessed = batch["attention_mask"].bool() & (torch.arange(batch["input_ids"].shape[1]) % 3 == 1)
        labels = batch["input_ids"].masked_fill(~guessed, -100)
        return batch | {
            "input_ids": batch["input_ids"].masked_fill(guessed, tokenizer.mask_token_id),
            "labels": labels,
        }

    losses = {}
    for method in ("mfac", "magnitude"):
        language_model = AutoModelForMaskedLM.from_pretrained(folder)
        report = prune_one_shot(
            language_model,
            DataLoader(list(sentences), collate_fn=collate),
            0.6,
            method=method,
            num_grads=200,
            block_size=32,
            damping=1e-6,
            recomputations=1,
            loss_samples=100,
            progress=False,
        )
        assert report.masks.nonzeros(language_model) == {} and report.sparsity == pytest.approx(0.6, abs=1e-5)
        losses[method] = report.loss_after - report.loss_before
    assert 0 < losses["mfac"] < 0.3 * losses["magnitude"]  # 0.08 and 0.57
