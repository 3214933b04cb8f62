"""Pruning flags of the training scripts: the options and the callback that they build."""

from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from mfac_hf import SparsitySchedule
from mfac_hf.pruning import PruningOptions
from mfac_hf.training.arguments import parse_args
from mfac_hf.training.pruning_arguments import GradualArguments, PruningArguments, build_pruning_callback

ELSEWHERE = ("model_name_or_path", "dataset_name", "max_seq_length", "doc_stride", "optim_name")
RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"


def parse(*flags):
    return parse_args(PruningArguments, TrainingArguments, argv=["--output_dir", "out", "--use_cpu", *flags])


def test_flags_become_options():
    arguments, _ = parse(
        *("--prune_num_grads", "512", "--prune_grad_batch_size", "4", "--prune_block_size", "50"),
        *("--prune_damping", "1e-6", "--recomputations", "3", "--prune_selection", "diagonal"),
        *("--prune_update", "sum", "--prune_pattern", "2:4", "--prune_scope", "uniform"),
    )
    assert arguments.options(seed=7) == PruningOptions(
        num_grads=512,
        grad_batch_size=4,
        block_size=50,
        damping=1e-6,
        recomputations=3,
        selection="diagonal",
        update="sum",
        pattern="2:4",
        scope="uniform",
        seed=7,
    )
    arguments, _ = parse("--prune_fisher", "empirical", "--prune_fisher_floor", "0.01")
    assert arguments.options(seed=0) == PruningOptions(fisher="empirical", fisher_floor=0.01, damping=1e-5)
    defaults, _ = parse()
    assert defaults.options(seed=0) == PruningOptions()  # the scripts prune as the function does


@pytest.mark.parametrize(("damping", "message"), [("small", "--prune_damping small"), ("0", "damping is 0.0")])
def test_a_damping_that_is_none_is_refused(damping, message):
    with pytest.raises(ValueError, match=message):
        parse("--prune_damping", damping)[0].options(seed=0)


def test_one_shot_is_pruning_without_epochs():
    zero = ("--num_train_epochs", "0", "--do_train")
    assert parse("--sparsity", "0.5", *zero)[0].is_one_shot(parse(*zero)[1])
    assert not parse("--sparsity", "0.5")[0].is_one_shot(parse("--do_train")[1])
    assert not parse("--sparsity", "0.5")[0].is_one_shot(parse(*zero, "--max_steps", "5")[1])
    assert not parse()[0].is_one_shot(parse(*zero)[1])
    with pytest.raises(ValueError, match="--sparsity 0.5 needs --do_train"):
        parse("--sparsity", "0.5")[0].is_one_shot(parse("--do_eval")[1])


def test_the_shipped_recipe_is_one_shot(tmp_path):
    own = {field for kind in (PruningArguments, TrainingArguments) for field in kind.__dataclass_fields__}
    lines = (RECIPES / "one_shot_glue.yaml").read_text().splitlines()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("\n".join(line for line in lines if line.split(":")[0] in own))
    arguments, training_args = parse_args(
        PruningArguments, TrainingArguments, argv=[str(recipe), "--output_dir", str(tmp_path), "--use_cpu"]
    )
    assert arguments.is_one_shot(training_args)
    assert arguments.options(seed=0).damping == "auto"


def callback_of(*flags):
    kinds = (PruningArguments, GradualArguments, TrainingArguments)
    return build_pruning_callback(*parse_args(*kinds, argv=["--use_cpu", "--do_train", *flags]))


def test_flags_become_a_callback(tmp_path):
    callback = callback_of(
        *("--sparsity", "0.9", "--prune_schedule", "linear", "--initial_sparsity", "0.5"),
        *("--prune_start", "1", "--prune_end", "5", "--prune_every", "2", "--prune_unit", "epoch"),
        *("--prune_damping", "auto", "--prune_pattern", "block4", "--prune_targets", "query", "key"),
        *("--prune_lr_cycle", "0.1", "--distillation_hardness", "0.5", "--teacher_name_or_path", str(tmp_path)),
        *("--prune_gradients", "optimizer", "--prune_evaluate"),
    )
    assert callback.schedule == SparsitySchedule.from_list([0.5, 0.7, 0.9], start=1, every=2)
    assert callback.options == PruningOptions(fisher="empirical", damping="auto", pattern="block4", seed=42)
    assert callback.targets == ["query", "key"] and callback.gradients == "optimizer" and callback.evaluate
    assert callback.lr_cycle.lowest == 0.1
    assert (callback.distillation.hardness, callback.distillation.given) == (0.5, str(tmp_path))


def test_defaults_of_the_callback_are_those_of_the_library():
    flags = ["--sparsity", "0.5", "--prune_end", "9"]
    assert callback_of(*flags).options == PruningOptions(seed=42)
    flags += ["--prune_gradients", "optimizer"]
    assert callback_of(*flags).options == PruningOptions(fisher="empirical", seed=42)
    with pytest.raises(ValueError, match="leave fisher out"):
        callback_of(*flags, "--prune_fisher", "scaled")


def test_no_callback_without_sparsity_or_training():
    assert callback_of() is None
    assert callback_of("--sparsity", "0.5", "--num_train_epochs", "0") is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sparsity", "0.5"], "--sparsity 0.5 needs --prune_end, the step at which it is reached"),
        (["--sparsity", "1.5", "--prune_end", "9"], "sparsity 1.5 at step 9"),
        (["--distillation_hardness", "1"], "--distillation_hardness is for pruning during training"),
        (["--sparsity", "0.5", "--prune_end", "9", "--num_train_epochs", "0"], "--prune_end is for pruning during"),
        (["--sparsity", "0.5", "--prune_end", "9", "--prune_damping", "small"], "--prune_damping small"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        callback_of(*flags)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("pruning_*.yaml")), ids=lambda path: path.stem)
def test_recipes_follow_the_published_settings(recipe):
    flags = {key: value for key, value in yaml.safe_load(recipe.read_text()).items() if key not in ELSEWHERE}
    callback = callback_of(*(f"--{key}={value}" for key, value in flags.items()))
    positions, sparsities = zip(*callback.schedule.points, strict=True)
    assert positions == (2, 6, 10, 14, 18, 22, 26) and (sparsities[0], sparsities[-1]) == (0.7, 0.9)
    assert (callback.options.num_grads, callback.options.block_size, callback.options.damping) == (1024, 50, 1e-7)
