"""The pruner takes the loss that training minimises, or says before the first step why it cannot."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from mfac_hf import MFACPruningCallback, SparsitySchedule
from mfac_hf.pruning import find_targets
from mfac_hf.pruning.gradients import DataLoaderGradients
from mfac_hf.pruning.trainer.training_loss import calling_trainer, training_loss
from tests.helpers.pruning_runs import differing, make_data, make_model, weights_of

WEIGHT = torch.tensor([0.2, 3.0])


def doubled(outputs, labels, num_items_in_batch=None):
    return (WEIGHT[labels] * cross_entropy(outputs.logits, labels, reduction="none")).mean()


def cancelling(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits, labels, weight=WEIGHT)


class Own(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = doubled(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def smoothed(outputs, labels):
    return cross_entropy(outputs.logits, labels, label_smoothing=0.3)


LOSSES = {
    "the model's": (Trainer, {}, {}, lambda outputs, labels: cross_entropy(outputs.logits, labels)),
    "compute_loss": (Own, {}, {}, doubled),
    "compute_loss_func": (Trainer, {"compute_loss_func": doubled}, {}, doubled),
    "label smoothing": (Trainer, {}, {"label_smoothing_factor": 0.3}, smoothed),
}


def make(directory, pruning, kind=Trainer, keywords=None, options=None, attach=False):
    torch.set_num_threads(1)
    settings = {"max_steps": 3, "use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}
    args = TrainingArguments(str(directory), per_device_train_batch_size=4, **settings, **(options or {}))
    trainer = kind(make_model(), args, train_dataset=make_data(), **(keywords or {}))
    pruning.attach(trainer) if attach else trainer.add_callback(pruning)
    return trainer


def callback(**options):
    settings = {"num_grads": 6, "block_size": 16, "recomputations": 1, "loss_samples": 16, "damping": 1e-3}
    return MFACPruningCallback(SparsitySchedule(((2, 0.5),)), **{**settings, **options})


@pytest.mark.slow
@pytest.mark.parametrize("attach", [False, True], ids=["add_callback", "attach"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_pruner_minimises_what_training_minimises(loss, attach, tmp_path):
    kind, keywords, options, expected = LOSSES[loss]

    def loss_fn(model, batch):
        return expected(model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"])

    runs = []
    for given in (None, loss_fn):
        pruning = callback(loss_fn=given)
        trainer = make(tmp_path, pruning, kind, keywords, options, attach)
        trainer.train()
        runs.append((pruning.reports[0], weights_of(trainer.model)))
    (report, weights), (wanted, wanted_weights) = runs
    assert report.loss_before == pytest.approx(wanted.loss_before, rel=1e-5)
    for name, weight in wanted_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"grad_batch_size": 2, "num_grads": 4}, {"method": "magnitude"}])
def test_weights_that_cancel_in_batches_of_one_are_refused_before_the_first_step(options, tmp_path):
    trainer = make(tmp_path, callback(fisher="empirical"), keywords={"compute_loss_func": cancelling})
    before = weights_of(trainer.model)
    with pytest.raises(ValueError, match=r"cancel in batches of one.*grad_batch_size above 1; or loss_fn"):
        trainer.train()
    assert trainer.state.global_step == 0 and differing(before, weights_of(trainer.model)) == []
    make(tmp_path, callback(fisher="empirical", **options), keywords={"compute_loss_func": cancelling}).train()


@pytest.mark.slow
def test_weights_of_classes_have_no_say_in_scaled_gradients(tmp_path):
    """Each example's gradient is divided by its own norm, and its weight with it."""
    pruned = []
    for keywords in ({}, {"compute_loss_func": cancelling}, {"compute_loss_func": doubled}):
        pruning = callback(loss_samples=0, grad_batch_size=2)
        trainer = make(tmp_path, pruning, keywords=keywords)
        parameters = find_targets(trainer.model)
        source = DataLoaderGradients.of_options(
            trainer.get_train_dataloader(), pruning.options, training_loss(trainer, trainer.args)
        )
        rows = []
        source.collect(trainer.model, parameters, 6, 0, lambda name, part, rows=rows: rows.append(part.clone()))
        pruned.append(torch.cat([part.flatten() for part in rows]))
        trainer.train()
    for other in pruned[1:]:
        torch.testing.assert_close(other, pruned[0], rtol=1e-4, atol=1e-5)


class Taught(Trainer):
    """Adds what a dense teacher says, which is called with the same inputs."""

    teacher = make_model(seed=1).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss + taught(outputs.logits, inputs)
        return (loss, outputs) if return_outputs else loss


def taught(logits, inputs):
    with torch.no_grad():
        wanted = Taught.teacher(**inputs).logits
    return kl_div(logits.log_softmax(-1), wanted.softmax(-1), reduction="batchmean")


@pytest.mark.slow
def test_a_teacher_in_the_loss_is_seen_through_the_models_outputs(tmp_path):
    """As by a loss function that says where the outputs are; there is none of the teacher among them."""

    def loss_fn(model, batch):
        logits = model(**{k: v for k, v in batch.items() if k != "labels"})["logits"]
        return cross_entropy(logits, batch["labels"]) + taught(logits, batch)

    weights = []
    for options in ({}, {"loss_fn": loss_fn, "outputs_fn": lambda returned: [returned["logits"]]}):
        pruning = callback(**options)
        trainer = make(tmp_path, pruning, Taught)
        trainer.train()
        assert pruning.reports[0].options["fisher"] == "scaled"
        weights.append(weights_of(trainer.model))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-5)


class Nameless(BertForSequenceClassification):
    """Calls its logits something else."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **rest):
        outputs = super().forward(input_ids, attention_mask, labels=labels)
        return {"loss": outputs.loss, "scores": outputs.logits}


@pytest.mark.slow
def test_outputs_of_another_name_are_asked_for_before_the_first_step(tmp_path):
    trainer = make(tmp_path, callback())
    trainer.model.__class__ = Nameless
    before = weights_of(trainer.model)
    with pytest.raises(ValueError, match=r"Nameless returned a dictionary of \['loss', 'scores'\], without logits"):
        trainer.train()
    assert trainer.state.global_step == 0 and differing(before, weights_of(trainer.model)) == []
    pruning = callback(outputs_fn=lambda returned: returned["scores"])
    trainer = make(tmp_path, pruning)
    trainer.model.__class__ = Nameless
    trainer.train()
    assert pruning.sparsity == pytest.approx(0.5, abs=0.01)


def test_examples_of_unequal_lengths_are_not_taken_for_weights(tmp_path):
    """Labels for each token: the mean over tokens is not the mean over examples, and needs no refusal."""
    pruning = callback(loss_samples=0)
    data = make_data()
    trainer = make(tmp_path, pruning, keywords={"compute_loss_func": tokens})
    trainer.train_dataset = [
        row | {"labels": row["input_ids"] % 2 - 100 * (1 - row["attention_mask"])} for row in data
    ]
    trainer.train()
    assert pruning.sparsity == pytest.approx(0.5, abs=0.01)


def tokens(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, None].expand(-1, labels.shape[1], -1)
    return cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_a_model_without_a_loss_is_refused_before_the_first_step(tmp_path):
    trainer = make(tmp_path, callback())
    trainer.train_dataset = [{k: v for k, v in row.items() if k != "labels"} for row in make_data()]
    with pytest.raises(ValueError, match="returned no loss for a batch of .* labels are missing"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_trainer_is_found_by_its_callbacks_alone(tmp_path):
    class Asks(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.found = calling_trainer(self), calling_trainer(TrainerCallback())

    asks = Asks()
    trainer = make(tmp_path, callback(method="magnitude", loss_samples=0))
    trainer.add_callback(asks)
    trainer.train()
    assert asks.found == (trainer, None) and calling_trainer(asks) is None


def test_smoothed_labels_without_a_trainer_are_refused(tmp_path):
    plain, smoothing = (TrainingArguments(str(tmp_path), label_smoothing_factor=factor) for factor in (0.0, 0.1))
    assert training_loss(None, plain) is None
    with pytest.raises(ValueError, match=r"label_smoothing_factor 0.1.*attach\(trainer\), or give its loss_fn"):
        training_loss(None, smoothing)
