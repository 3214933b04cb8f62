"""Pruning flags of the scripts."""

from pathlib import Path

import pytest
from transformers import TrainingArguments

from mfac_hf.pruning import PruningOptions
from mfac_hf.training.arguments import parse_args
from mfac_hf.training.pruning_arguments import PruningArguments

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
