"""Distillation: the loss of a model in training mode, for each kind of head, and the teacher's way through a file."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from mfac_hf.pruning.trainer.checkpoint import fingerprint
from mfac_hf.pruning.trainer.distillation import Distillation, distillation_loss

SIZES = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = torch.arange(1, 25).reshape(4, 6)
MASK = torch.ones_like(IDS)


def make(kind=BertForSequenceClassification, **options):
    torch.manual_seed(0)
    model = kind(BertConfig(**SIZES, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model.train()


def moved(model):
    """Another model of the same structure."""
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return other


def kl(student, teacher, temperature):
    """Written out, in float64."""
    p = torch.softmax(teacher.double() / temperature, -1)
    q = torch.softmax(student.double() / temperature, -1)
    return temperature**2 * (p * (p / q).log()).sum(-1)


def check(model, inputs, expected_term, hardness=0.3, temperature=2.0):
    """The loss of the hooked model, against the plain one and a term computed from both models' outputs."""
    teacher = moved(model)
    plain, wanted = model(**inputs), teacher(**inputs)
    distillation = Distillation(hardness=hardness, temperature=temperature, teacher=teacher)
    distillation.begin(model)
    loss = model(**inputs).loss
    expected = (1 - hardness) * plain.loss.double() + hardness * expected_term(plain, wanted)
    # 1e-5: float32 logits and softmax against float64, values near 1
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert abs(loss - plain.loss) > 1e-3, "a teacher that agrees with the student would show nothing"
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters()) and model.classifier_or_head().grad.abs().sum() > 0
    model.eval()
    assert torch.equal(model(**inputs).loss, plain.loss), "evaluation keeps the task's loss"
    model.train()
    distillation.end()
    assert torch.equal(model(**inputs).loss, plain.loss)


@pytest.fixture(autouse=True)
def _head(monkeypatch):
    def head(self):
        return (self.qa_outputs if hasattr(self, "qa_outputs") else self.classifier).weight

    monkeypatch.setattr(torch.nn.Module, "classifier_or_head", head, raising=False)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_classification(temperature):
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1, 2, 0])}
    check(
        make(num_labels=3),
        inputs,
        lambda s, t: kl(s.logits, t.logits, temperature).mean(),
        temperature=temperature,
    )


def test_regression_compares_the_outputs():
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0.1, 1.0, 2.0, 0.0])}
    check(make(num_labels=1), inputs, lambda s, t: (s.logits - t.logits).double().square().mean())


def test_question_answering_takes_the_mean_of_start_and_end():
    inputs = {
        "input_ids": IDS,
        "attention_mask": MASK,
        "start_positions": torch.tensor([0, 1, 2, 3]),
        "end_positions": torch.tensor([1, 2, 3, 4]),
    }

    def term(s, t):
        start, end = kl(s.start_logits, t.start_logits, 2.0), kl(s.end_logits, t.end_logits, 2.0)
        return (start.mean() + end.mean()) / 2

    check(make(BertForQuestionAnswering), inputs, term)


def test_tokens_without_a_label_do_not_count():
    labels = torch.randint(3, IDS.shape, generator=torch.Generator().manual_seed(0))
    labels[:, 4:] = -100
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    check(
        make(BertForTokenClassification, num_labels=3),
        inputs,
        lambda s, t: kl(s.logits, t.logits, 2.0)[labels != -100].mean(),
    )


def test_hardness_1_leaves_only_the_teacher_and_agreement_costs_nothing():
    model = make(num_labels=3)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1, 2, 0])}
    distillation = Distillation()
    distillation.begin(model)
    plain = model(**inputs).loss
    distillation.take(model)
    assert plain > 0.1 and model(**inputs).loss.abs() < 1e-6  # a copy of itself: KL is 0 up to rounding
    assert distillation.teacher is not model and not distillation.teacher.training


class Divides(BertForSequenceClassification):
    """Divides its loss by the labels of the whole step, as language models do."""

    def forward(self, labels=None, num_items_in_batch=None, **inputs):
        output = super().forward(labels=labels, **inputs)
        if num_items_in_batch is not None:
            output["loss"] = output.loss * len(labels) / num_items_in_batch
        return output


@pytest.fixture
def accelerator():
    """One in bfloat16; settings are those of the whole process, also of the tests before and after."""
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(True)


def test_a_teacher_that_is_taken_computes_with_its_own_weights_in_mixed_precision(accelerator):
    """Accelerate puts a wrapped forward on the model itself, which a copy has to get as its own."""
    model = accelerator.prepare(make(num_labels=3))
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1, 2, 0])}
    before = model(**inputs).logits
    distillation = Distillation()
    distillation.take(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    assert torch.equal(distillation.teacher(**inputs).logits, before)
    assert not torch.equal(distillation.teacher(**inputs).logits, make(num_labels=3)(**inputs).logits)
    assert model(**inputs).loss > 1e-3
    model.forward = functional.relu
    with pytest.raises(ValueError, match="belongs to the student"):
        distillation.take(model)


@pytest.mark.parametrize(("kind", "part"), [(BertForSequenceClassification, 1.0), (Divides, 0.25)])
def test_the_teachers_term_is_normalised_like_the_models_own_loss(kind, part):
    model = make(kind, num_labels=3)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1, 2, 0])}
    plain, alone = model(**inputs, num_items_in_batch=torch.tensor(16)).loss, model(**inputs).loss
    torch.testing.assert_close(plain, part * alone)
    teacher = moved(model)
    term = kl(model(**inputs).logits, teacher(**inputs).logits, 2.0).mean()
    Distillation(teacher=teacher).begin(model)
    loss = model(**inputs, num_items_in_batch=torch.tensor(16)).loss
    torch.testing.assert_close(loss.double(), part * term, rtol=1e-5, atol=1e-6)


def test_loss_of_logits_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert math.isclose(distillation_loss(student, teacher, temperature=1.0), expected, rel_tol=1e-6)


def test_a_teacher_comes_back_from_its_file(tmp_path):
    model = make(num_labels=3)
    distillation = Distillation()
    distillation.take(model)
    mark = fingerprint(distillation.teacher.parameters())
    distillation.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["teacher.safetensors"]

    student, again = moved(model), Distillation()
    again.load(tmp_path, student, mark)
    assert all(map(torch.equal, again.teacher.parameters(), model.parameters()))
    with pytest.raises(ValueError, match="not the one of the interrupted run"):
        again.load(tmp_path, student, fingerprint(student.parameters()))
    with pytest.raises(FileNotFoundError, match="no teacher at"):
        again.load(tmp_path / "elsewhere", student, mark)


def test_a_teacher_from_a_directory(tmp_path):
    model = make(num_labels=3)
    moved(model).save_pretrained(tmp_path)
    distillation = Distillation(teacher=tmp_path)
    distillation.begin(model)
    assert fingerprint(distillation.teacher.parameters()) == fingerprint(moved(model).parameters())
    with pytest.raises(FileNotFoundError, match="to load a teacher from"):
        Distillation(teacher=tmp_path / "elsewhere").begin(model)
    with pytest.raises(ValueError, match="Linear has no from_pretrained"):
        Distillation(teacher=tmp_path).begin(torch.nn.Linear(2, 2))


def test_bad_input():
    for hardness in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"hardness is {hardness}"):
            Distillation(hardness=hardness)
    for temperature in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=f"temperature is {temperature}"):
            Distillation(temperature=temperature)
    model = make(num_labels=3)
    with pytest.raises(ValueError, match="the model in training itself"):
        Distillation(teacher=model).begin(model)
    distillation = Distillation(teacher=make(num_labels=2))
    distillation.begin(model)
    with pytest.raises(ValueError, match="pass labels"):
        model(input_ids=IDS)
    with pytest.raises(ValueError, match=r"logits has shape \(4, 3\) in the student and \(4, 2\) in the teacher"):
        model(input_ids=IDS, labels=torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="returned tuple"):
        model(input_ids=IDS, labels=torch.tensor([0, 1, 0, 1]), return_dict=False)
    multi = make(num_labels=3, problem_type="multi_label_classification")
    Distillation(teacher=moved(multi)).begin(multi)
    with pytest.raises(ValueError, match="multi_label_classification"):
        multi(input_ids=IDS, labels=torch.zeros(4, 3))


def test_logits_of_the_wrong_kind_are_refused():
    torch.manual_seed(0)

    class NoLogits(torch.nn.Linear):
        def forward(self, x):
            return {"loss": super().forward(x).sum()}

    model = NoLogits(2, 2)
    Distillation(teacher=copy.deepcopy(model)).begin(model)
    with pytest.raises(ValueError, match="needs logits, but the model returned"):
        model(functional.one_hot(torch.tensor([0, 1])).float())
