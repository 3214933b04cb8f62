"""A Trainer's gradients are a mean over accumulated batches, or a warning says how much too large they are."""

import warnings

import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mfac_hf import MFAC, attach_card
from mfac_hf.callbacks import MFACLoggingCallback
from mfac_hf.loss_scale import correct_loss_scale, loss_ignores_num_items

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(kind=BertForSequenceClassification, **options):
    return kind(BertConfig(vocab_size=60, max_position_embeddings=16, **SIZES, **NO_DROPOUT, **options))


def gpt2():
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, bos_token_id=1, eos_token_id=1, **sizes, **dropout))


def examples(kind):
    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(1, 60, (8,), generator=generator)} for _ in range(32)]
    for i, example in enumerate(data):
        if kind == "causal":
            example["labels"] = example["input_ids"]
        elif kind == "answers":
            example |= {"start_positions": torch.tensor(i % 4), "end_positions": torch.tensor(5)}
        else:
            example["labels"] = torch.tensor(float(i % 2)) if kind == "regression" else torch.tensor(i % 2)
    return data


def adapted():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", r=2))


MODELS = {
    "adapted": (adapted, "classes"),
    "classifier": (bert, "classes"),
    "regression": (lambda: bert(num_labels=1), "regression"),
    "causal": (gpt2, "causal"),
    "answers": (lambda: bert(BertForQuestionAnswering), "answers"),
}


def make_trainer(directory, name="classifier", trainer_class=Trainer, batch=4, accumulate=4, **options):
    set_seed(0)
    build, kind = MODELS[name]
    model = build()
    optimizer = MFAC(model.parameters(), metric="identity", lr=1e-3, num_grads=4, damping=1e-2)
    settings = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    settings |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "seed": 3}
    return trainer_class(
        model,
        TrainingArguments(str(directory), disable_tqdm=True, **settings),
        train_dataset=examples(kind),
        optimizers=(optimizer, None),
        **options,
    )


class OwnLoss(Trainer):
    """A loss that is divided as Trainer expects."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="sum")
        return loss / (len(logits) if num_items_in_batch is None else num_items_in_batch)


def summed(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def averaged(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits, labels)


@pytest.mark.parametrize(
    ("name", "options", "ignores"),
    [
        ("classifier", {}, True),
        ("regression", {}, True),
        ("adapted", {}, True),
        ("causal", {}, False),
        ("answers", {}, False),  # nothing is called labels: Trainer has no number, and divides
        ("classifier", {"trainer_class": OwnLoss}, False),
        ("classifier", {"compute_loss_func": summed}, False),
        ("classifier", {"compute_loss_func": averaged}, True),
    ],
)
def test_who_ignores_the_number(tmp_path, name, options, ignores):
    trainer = make_trainer(tmp_path, name, **options)
    state = torch.get_rng_state()
    active = (
        trainer.accelerator.gradient_state.active_dataloader
    )  # of all Trainers: one that failed may have left its own
    trainer.model.train()
    assert loss_ignores_num_items(trainer) is ignores
    assert torch.equal(state, torch.get_rng_state()) and trainer.model.training
    assert trainer.accelerator.gradient_state.active_dataloader is active
    trainer.model_accepts_loss_kwargs = False
    assert loss_ignores_num_items(trainer) is (ignores and "compute_loss_func" in options)


def train(trainer):
    """Gradient norms of the steps, and words of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = [str(warning.message) for warning in caught if "num_items_in_batch" in str(warning.message)]
    return [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log], said


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_accumulated_batches_are_one_batch(tmp_path, name):
    whole, said = train(make_trainer(tmp_path, name, batch=16, accumulate=1))
    assert said == []
    trainer = make_trainer(tmp_path, name)
    correct_loss_scale(trainer)
    split, said = train(trainer)
    assert said == [] and split == pytest.approx(whole, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("attach", [attach_card, MFACLoggingCallback.attach])
def test_a_loss_that_is_not_divided_is_warned_of_once(tmp_path, attach):
    trainer = make_trainer(tmp_path)
    attach(trainer)
    _, said = train(trainer)
    assert len(said) == 1 and "BertForSequenceClassification ignores num_items_in_batch" in said[0]
    assert "accumulation over 4 batches" in said[0] and "trainer.model_accepts_loss_kwargs = False" in said[0]
    assert train(trainer)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "accumulate"), [("causal", 4), ("answers", 4), ("classifier", 1)])
def test_nothing_is_said_where_gradients_are_right(tmp_path, name, accumulate):
    trainer = make_trainer(tmp_path, name, accumulate=accumulate)
    attach_card(trainer)
    assert train(trainer)[1] == []


def test_the_remedy_for_a_loss_function_is_another(tmp_path):
    trainer = make_trainer(tmp_path, compute_loss_func=averaged)
    attach_card(trainer)
    assert "divide the loss of compute_loss_func" in train(trainer)[1][0]


def test_a_training_goes_on_where_nobody_can_tell(tmp_path):
    trainer = make_trainer(tmp_path)
    attach_card(trainer)
    loader, calls = trainer.get_train_dataloader, []

    def fail_once():
        calls.append(None)
        if len(calls) == 2:  # the first is the training's own
            raise OSError("one loader at a time")
        return loader()

    trainer.get_train_dataloader = fail_once
    norms, said = train(trainer)
    assert len(norms) == 2 and "OSError: one loader at a time" in said[0]


def test_without_a_card_the_optimizer_warns(tmp_path):
    assert "accumulates the gradients of 4 batches" in train(make_trainer(tmp_path))[1][0]
