"""What the demonstration says of its figures follows from them."""

import io

import pytest
from rich.console import Console
from story.report import compare, find, make_table
from story.runs import Files, Run

from mfac_hf.training.study import mean_and_deviation


def run(name, seed, losses, accuracy, sparsity=0.0):
    steps = list(range(1, len(losses) + 1))
    curve = {"step": steps, "loss": losses, "seconds": [1.0] * len(steps), "cpu_seconds": [2.0] * len(steps)}
    return Run(name, seed, losses[-1], accuracy, 2.0, curve, [(steps[-1], sparsity, accuracy)])


@pytest.fixture
def runs():
    """Two seeds: M-FAC has AdamW's last loss in half of the steps, and loses to magnitude on one of them."""
    slow, fast = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0.8, 0.6, 0.4, 0.3, 0.2, 0.1]
    trainings = [run("adamw", 0, slow, 0.8), run("mfac", 0, fast, 0.9)]
    trainings += [run("adamw", 1, slow, 0.82), run("mfac", 1, fast, 0.94)]
    prunings = [run("magnitude", 0, slow, 0.7, 0.8), run("mfac", 0, fast, 0.9, 0.8)]
    prunings += [run("magnitude", 1, slow, 0.9, 0.8), run("mfac", 1, fast, 0.8, 0.8)]
    return trainings, prunings, Files(dense=4000, sparse=1000, largest_difference=0.0)


def verdict(ours, theirs, sign=1):
    return compare("Score", ours, theirs, "AdamW", sign=sign, digits=1).split(". ", 1)[1]


def test_ahead_is_said_only_where_every_seed_says_it():
    assert verdict([2, 4], [1, 1]) == "M-FAC is ahead on each of 2 seeds, by 2.0 ± 1.4."
    assert verdict([1, 1], [2, 4]) == "AdamW is ahead on each of 2 seeds, by 2.0 ± 1.4."
    assert verdict([2, 4], [1, 1], sign=-1) == "AdamW is ahead on each of 2 seeds, by 2.0 ± 1.4."
    assert verdict([2, 2, 0], [1, 1, 1]).startswith("Not separated: M-FAC is ahead on 2 of 3 seeds, by 0.3 ± ")
    assert verdict([2, 0, 0], [1, 1, 1]).startswith("Not separated: AdamW is ahead on 2 of 3 seeds, by 0.3 ± ")
    assert verdict([1, 2], [1, 1]).startswith("Not separated: M-FAC is ahead on 1 of 2 seeds")


def test_a_tie_and_a_single_seed_have_no_winner():
    assert verdict([1, 1], [1, 1]) == "No difference."
    assert verdict([2], [1]) == "One seed, so the difference may be chance."


def test_a_diverged_run_is_not_ahead():
    nan = float("nan")
    assert verdict([nan, 2], [1, 1]) == "Not separated: M-FAC is ahead on 1 of 2 seeds, by nan ± nan on average."
    assert verdict([nan, nan], [1, 1]) == "No difference."


def test_findings_follow_from_the_figures(runs):
    loss, steps, accuracy, pruned, size = find(*runs)
    assert loss.startswith(
        "Training loss after 6 steps: M-FAC 0.100 ± 0.000, AdamW 0.400 ± 0.000. M-FAC is ahead on each"
    )
    assert steps == "AdamW's last training loss: AdamW has it first at step 6 ± 0, M-FAC at 3 ± 0 (2 of 2 seeds)."
    assert accuracy.endswith("AdamW 81.0 ± 1.4. M-FAC is ahead on each of 2 seeds, by 11.0 ± 1.4.")
    assert "92.0 ± 2.8 before and now 80 %" in pruned and "Not separated: M-FAC is ahead on 1 of 2 seeds" in pruned
    assert size == "Sparse file: 1 kB in place of 4 (25 %); loaded again, its outputs are the same."


def test_a_loss_that_is_never_reached_and_outputs_that_differ_are_said(runs):
    trainings, prunings, files = runs
    trainings = [run("adamw", 0, [0.9, 0.1], 0.8), run("mfac", 0, [0.9, 0.2], 0.8)]
    files.largest_difference = 0.25
    _, steps, *_, size = find(trainings, prunings, files)
    assert steps.endswith("AdamW has it first at step 2, M-FAC on no seed.")
    assert size.endswith("its outputs differ by up to 0.2.")


def test_table_is_computed_from_the_runs(runs):
    trainings, prunings, files = runs
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(make_table(trainings, prunings, files))
    text = console.export_text()
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert set(rows) == {"AdamW", "M-FAC", "80 % pruned, magnitude", "80 % pruned, M-FAC"}
    assert mean_and_deviation([80, 82]) in rows["AdamW"] and "0.400 ± 0.000" in rows["AdamW"]
    assert mean_and_deviation([90, 80]) in rows["80 % pruned, M-FAC"] and " 1 " in rows["80 % pruned, M-FAC"]
    assert "…" not in text  # it fits into 80 columns
