"""Arguments that the training scripts share: flags, recipes, defaults and the optimizer made from them."""

import json
import logging

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from mfac_hf import MFAC
from mfac_hf.training.arguments import ModelArguments, OptimizerArguments, build_optimizer, parse_args

KINDS = (ModelArguments, OptimizerArguments, TrainingArguments)


def write_recipe(path, text):
    """Write a recipe and return its path."""
    path.write_text(text)
    return str(path)


def test_recipe_gives_typed_values_and_flags_override_them(tmp_path):
    """YAML reads 1e-3 as a string and ``no`` as a truth value; the dataclasses get what the flags would give."""
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        "model_name_or_path: tiny\nlearning_rate: 1e-3\noptim_name: mfac\nnum_grads: 64\ndo_train: true\n"
        "window_device: [cpu, meta]\nsave_window: false\ncache_dir: null\nmax_steps: -1\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nlr_scheduler_type: cosine\n",
    )
    model_args, optimizer_args, training_args = parse_args(*KINDS, argv=[recipe, "--num_grads", "32", "--seed=3"])
    assert model_args == ModelArguments("tiny")
    expected = OptimizerArguments(num_grads=32, window_device=["cpu", "meta"], save_window=False)
    assert optimizer_args == expected
    assert training_args.learning_rate == 1e-3 and training_args.do_train is True and training_args.seed == 3
    assert training_args.lr_scheduler_kwargs == {"num_cycles": 2} and training_args.max_steps == -1


def test_json_recipe(tmp_path):
    """JSON works the same way."""
    recipe = write_recipe(tmp_path / "recipe.json", json.dumps({"model_name_or_path": "tiny", "damping": 1e-4}))
    assert parse_args(*KINDS, argv=[recipe])[1].damping == 1e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_name_or_path: tiny\nnum_gards: 3\n", "keys that are no arguments: num_gards"),
        ("- model_name_or_path\n", "holds a list; expected a mapping"),
        ("", "holds a NoneType; expected a mapping"),
        ("damping: [1, 2", "recipe.yaml is no YAML file"),
        ("damping: [[1]]", r"recipe.yaml: damping\[0\] is a list of 1; expected text"),
        ("damping: 2020-01-01", "damping is datetime.date"),
    ],
)
def test_bad_recipes(text, message, tmp_path):
    """The error names the key or the kind of content."""
    with pytest.raises(ValueError, match=message):
        parse_args(*KINDS, argv=[write_recipe(tmp_path / "recipe.yaml", text)])


def test_a_program_with_a_bad_recipe_ends_with_one_line(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path / "recipe.yaml", "damping: [1, 2")
    monkeypatch.setattr("sys.argv", ["run.py", recipe])
    with pytest.raises(SystemExit) as stop:
        parse_args(*KINDS)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("run.py: error: ") and "recipe.yaml is no YAML file" in said


def test_missing_recipe_and_bad_values(tmp_path, capsys):
    """A missing file, a value of the wrong type, an unknown flag, an abbreviated flag."""
    with pytest.raises(FileNotFoundError, match="recipe nowhere.yaml is no file"):
        parse_args(*KINDS, argv=["nowhere.yaml"])
    recipe = write_recipe(tmp_path / "recipe.yaml", "model_name_or_path: tiny\nnum_grads: many\n")
    with pytest.raises(SystemExit):
        parse_args(*KINDS, argv=[recipe])
    assert "--num_grads" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_args(*KINDS, argv=["--model_name_or_path", "tiny", "--metric", "adamw"])
    said = capsys.readouterr().err
    assert "--metric: invalid choice: 'adamw'" in said and "adam" in said and "identity" in said
    for flag in ("--no_such_flag", "--num_grad"):
        with pytest.raises(ValueError, match=flag):
            parse_args(*KINDS, argv=["--model_name_or_path", "tiny", flag, "3"])


@pytest.mark.parametrize(
    ("flags", "learning_rate", "logged"),
    [
        ([], 5e-5, False),
        (["--optim_name", "adamw"], 5e-5, False),
        (["--optim_name", "adamw", "--metric", "identity"], 5e-5, False),
        (["--metric", "identity"], 1e-4, True),
        (["--metric", "identity", "--learning_rate", "5e-5"], 5e-5, False),
        (["--learning-rate", "0.002"], 2e-3, False),
    ],
)
def test_default_learning_rate_is_that_of_the_optimizer(flags, learning_rate, logged, caplog):
    """Trainer's, but for the identity metric, visibly; a given one always wins, even where it equals Trainer's."""
    with caplog.at_level(logging.INFO, logger="mfac_hf"):
        *_, training_args = parse_args(*KINDS, argv=["--model_name_or_path", "tiny", *flags])
    assert training_args.learning_rate == learning_rate
    assert ("--metric identity has 0.0001" in caplog.text) == logged


@pytest.mark.parametrize("flags", [{}, {"metric": "identity"}])
def test_flags_that_are_not_given_leave_the_defaults_of_mfac(flags, tmp_path):
    """Those of the metric; without flags it is the metric of ``MFAC`` itself."""
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=1e-3, weight_decay=0.01)
    built = build_optimizer(nn.Linear(3, 2), OptimizerArguments(**flags), args).defaults
    assert built == MFAC([nn.Parameter(torch.zeros(1))], lr=1e-3, weight_decay=0.01, **flags).defaults


@pytest.mark.parametrize("optim", ["mfac", "adamw"])
def test_weight_decay_groups_are_those_of_trainer(optim, tmp_path):
    """Same parameters in the same order, biases and layer norms without decay, frozen ones left out."""
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    bert = BertForSequenceClassification(config)
    bert.bert.embeddings.requires_grad_(False)
    args = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.01, learning_rate=2e-3, use_cpu=True)
    ours = build_optimizer(bert, OptimizerArguments(optim_name=optim, num_grads=4), args)
    theirs = Trainer(bert, args).create_optimizer()
    assert isinstance(ours, MFAC if optim == "mfac" else torch.optim.AdamW)
    assert len(ours.param_groups) == len(theirs.param_groups) == 2
    for one, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert one["weight_decay"] == other["weight_decay"] and one["lr"] == 2e-3
        assert [id(p) for p in one["params"]] == [id(p) for p in other["params"]]


def test_without_weight_decay_the_order_is_that_of_the_model(tmp_path):
    """One group, as for a plain ``MFAC(model.parameters())``."""
    layer = nn.Linear(3, 2)
    (group,) = build_optimizer(layer, OptimizerArguments(), TrainingArguments(output_dir=str(tmp_path))).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in layer.parameters()]


@pytest.mark.parametrize(
    "options",
    [
        {"metric": "adam"},
        {
            "metric": "identity",
            "momentum": 0.25,
            "grad_decay": 0.125,
            "normalize": "count",
            "decoupled_weight_decay": True,
        },
    ],
)
def test_optimizer_options_reach_mfac(options, tmp_path):
    """Every flag arrives under its own name, and Adam's betas and eps where they have a meaning."""
    args = TrainingArguments(
        output_dir=str(tmp_path), adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5, weight_decay=0.1
    )
    common = {"num_grads": 3, "damping": 0.5, "row_sparse": False, "save_window": False}
    chosen = OptimizerArguments(window_dtype="bfloat16", window_device=["cpu"], **common, **options)
    optimizer = build_optimizer(nn.Linear(3, 2), chosen, args)
    wanted = {"window_dtype": torch.bfloat16, "window_device": "cpu", **common, **options}
    if options["metric"] == "adam":
        wanted |= {"betas": (0.8, 0.95), "eps": 1e-5}
    assert {name: optimizer.defaults[name] for name in wanted} == wanted
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("share", [True, False])
def test_a_flag_keeps_the_window_whole(share, tmp_path, monkeypatch):
    """Without it, ranks that Trainer announces share a window that is large enough."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 2)
    asked = []
    monkeypatch.setattr("mfac_hf.optim.ranked.first_bytes", lambda grad, mask, options: asked.append(grad) or 0)
    layer, arguments = nn.Linear(3, 2), TrainingArguments(output_dir=str(tmp_path))
    optimizer = build_optimizer(layer, OptimizerArguments(share_window=share), arguments)
    optimizer.train()
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert bool(asked) == share and not optimizer.shares_window


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], None), (["--decoupled_weight_decay"], True), (["--decoupled_weight_decay", "false"], False)],
)
def test_a_switch_is_told_from_one_that_is_not_given(flags, expected):
    argv = ["--model_name_or_path", "tiny", "--metric", "identity", *flags]
    assert parse_args(*KINDS, argv=argv)[1].decoupled_weight_decay is expected


def test_optimizer_options_reach_adamw(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5)
    adamw = build_optimizer(nn.Linear(3, 2), OptimizerArguments(optim_name="adamw"), args)
    assert adamw.defaults["betas"] == (0.8, 0.95) and adamw.defaults["eps"] == 1e-5


@pytest.mark.parametrize(
    ("flags", "adam", "words"),
    [
        ({"momentum": 0.9}, {}, "momentum given with metric='adam'.*choose metric='identity'"),
        ({"normalize": "count", "grad_decay": 0.9}, {}, "grad_decay, normalize given with metric='adam'"),
        ({"decoupled_weight_decay": False}, {}, "decoupled_weight_decay given"),
        ({"metric": "adamw"}, {}, "metric is 'adamw'; expected one of 'adam', 'identity'"),
        ({}, {"adam_beta1": 1.0}, "betas is \\(1.0, 0.999\\); expected two numbers in"),
        ({}, {"adam_epsilon": 0.0}, "eps is 0.0; expected a finite number above 0"),
        ({"damping": 0.0}, {}, "damping"),
        ({"num_grads": 0}, {}, "num_grads"),
    ],
)
def test_options_that_do_not_fit_the_metric(flags, adam, words, tmp_path):
    """MFAC's own errors."""
    args = TrainingArguments(output_dir=str(tmp_path), **adam)
    with pytest.raises(ValueError, match=words):
        build_optimizer(nn.Linear(3, 2), OptimizerArguments(**flags), args)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--damping", "1e-6"], "damping=1e-06 with metric='adam'.*nearly none"),
        (["--learning_rate", "1e-2"], "lr=0.01 with metric='adam'.*AdamW's learning rate"),
    ],
)
def test_values_by_old_habit_warn_on_the_way_from_the_flags(flags, words, tmp_path):
    argv = ["--model_name_or_path", "tiny", "--output_dir", str(tmp_path), *flags]
    _, optimizer_args, training_args = parse_args(*KINDS, argv=argv)
    with pytest.warns(UserWarning, match=words):
        build_optimizer(nn.Linear(3, 2), optimizer_args, training_args)


def test_model_without_trainable_parameters(tmp_path):
    """Named as such, instead of an empty parameter list deep inside."""
    layer = nn.Linear(3, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(layer, OptimizerArguments(), TrainingArguments(output_dir=str(tmp_path)))


def test_help_shows_the_description_as_written_and_the_defaults_that_are_values(capsys):
    with pytest.raises(SystemExit):
        parse_args(ModelArguments, argv=["--help"], description="First line.\n\n    python script.py")
    printed = capsys.readouterr().out
    assert "First line.\n\n    python script.py" in printed
    assert "(default: main)" in printed and "None" not in printed
