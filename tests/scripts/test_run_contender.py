"""Optimizers of other packages train through the scripts, and stand with the flags' learning rate and schedule."""

import pytest
import run_contender
import torch
from comparison.contenders import CONTENDERS, MatricesAndRest, contender_maker
from transformers import TrainingArguments

from mfac_hf.tasks.toy import toy_model

FLAGS = "--do_train --do_eval --num_train 96 --num_validation 16 --hidden_size 16 --num_layers 1 --max_steps 12"
FLAGS += " --per_device_train_batch_size 8 --logging_steps 3 --learning_rate 1e-2 --warmup_steps 2 --use_cpu"
FLAGS += " --report_to none --save_strategy no --disable_tqdm true"


@pytest.fixture
def arguments(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), learning_rate=0.01, weight_decay=0.1, use_cpu=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTENDERS)
def test_a_contender_trains_through_a_script(tmp_path, name):
    if name != "muon":
        pytest.importorskip("pytorch_optimizer")
    schedule = ["--lr_scheduler_type", "constant_with_warmup"] if name == "schedule_free" else []
    results = run_contender.main(
        ["train_toy.py", "--contender", name, *FLAGS.split(), *schedule, "--output_dir", str(tmp_path)]
    )
    losses = results["curve"]["loss"]
    assert len(losses) == 4 and all(0 < loss < 2 for loss in losses) and losses[0] != losses[-1]


def test_muon_takes_the_matrices_of_the_encoder_and_adamw_the_rest(arguments):
    model = toy_model(hidden_size=16, num_layers=1)
    optimizer = contender_maker("muon", {"momentum": 0.8})(model, None, arguments)
    muon, adamw = optimizer.optimizers
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    others = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert matrices | others == set(names.values()) and not matrices & others
    assert {name.split(".")[-2] for name in matrices} == {"query", "key", "value", "dense"}
    assert "classifier.weight" in others and any("word_embeddings" in name for name in others)
    assert muon.param_groups[0]["momentum"] == 0.8 and {group["lr"] for group in optimizer.param_groups} == {0.01}
    decays = {
        name: group["weight_decay"] for group in adamw.param_groups for p in group["params"] for name in [names[id(p)]]
    }
    assert decays["classifier.weight"] == 0.1 and decays["classifier.bias"] == 0.0


def test_a_schedule_reaches_both_parts_after_a_load():
    one, two = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))

    def make():
        return MatricesAndRest(torch.optim.Muon([one], lr=0.1), torch.optim.AdamW([two], lr=0.1))

    optimizer = make()
    optimizer.load_state_dict(optimizer.state_dict())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    one.grad, two.grad = torch.randn(2, 2), torch.randn(2, 2)
    before = [parameter.detach().clone() for parameter in (one, two)]
    optimizer.step()
    assert not torch.equal(one, before[0]) and not torch.equal(two, before[1])
    schedule.step()
    frozen = [parameter.detach().clone() for parameter in (one, two)]
    optimizer.step()
    assert torch.equal(one, frozen[0]) and torch.equal(two, frozen[1]), "the rate is zero for both"
    again = make()
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(
        again.optimizers[0].state[one]["momentum_buffer"], optimizer.optimizers[0].state[one]["momentum_buffer"]
    )
    optimizer.zero_grad()
    assert one.grad is None and two.grad is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["train_toy.py", "--contender", "sgd"], "invalid choice: 'sgd'"),
        (["none.py", "--contender", "muon"], "none.py is no script of"),
        (["train_vision.py", "--contender", "muon"], "train_vision.py makes its optimizer itself"),
        (["train_toy.py", "--contender", "muon", "--contender_options", "[1]"], "expected an object"),
    ],
)
def test_what_is_not_there_is_refused(capsys, flags, words):
    with pytest.raises(SystemExit):
        run_contender.main(flags)
    assert words in capsys.readouterr().err


def test_an_unknown_contender_is_named():
    with pytest.raises(ValueError, match="--contender sgd: expected one of muon, soap"):
        contender_maker("sgd", {})
