"""Tables of a study and of several: means, steps to the baseline's loss, and who is ahead."""

import copy
import json
from pathlib import Path

import compare_optimizers as compare
import pytest
from comparison.runs import StudyRuns
from comparison.study_file import load_study
from comparison.summary import format_summary, verdict
from comparison.tables import format_study, summarize

ROOT = Path(__file__).resolve().parents[2]
STEPS = list(range(1, 101))
STUDY = {
    "name": "x",
    "script": "s",
    "flags": {"num_train_epochs": 2},
    "seeds": [1, 2],
    "tuning": {"holdout_fraction": 0.1, "seed": 0},
    "baseline": "adamw",
    "contenders": {"adamw": {"grid": [{"lr": 1}, {"lr": 2}]}, "mfac, drop-in": {"grid": [{"lr": 2}]}},
}


def straight(speed, cost):
    """A curve that falls by ``speed`` a step of ``cost`` CPU seconds, twice as many of the wall."""
    curve = {"step": STEPS, "loss": [1 - speed * step for step in STEPS]}
    return curve | {"cpu_seconds": [cost * step for step in STEPS], "seconds": [2 * cost * step for step in STEPS]}


def add(runs, contender, seed, value, curve=None, point=None):
    """Put a run into the log; of seed None a tuning run."""
    phase = "tuning" if seed is None else "final"
    flags = runs.tuning_flags(contender, point) if seed is None else runs.final_flags(contender, seed)
    results = {"selection_value": value, "eval_loss": 1 - value, "train_runtime": 20.0, "curve": curve}
    row = {"point": point or {}, "value": value, "results": results, "peak_memory_gib": 1.0, "metric": "eval_f1"}
    runs.log.add({"contender": contender, "phase": phase, "flags": flags}, row)


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "x.yaml").write_text(json.dumps(STUDY))
    runs = StudyRuns(load_study(tmp_path / "x.yaml"), tmp_path)
    add(runs, "adamw", None, 0.9, point={"lr": 1})
    add(runs, "adamw", None, 0.8, point={"lr": 2})
    return runs


def test_the_summary_is_over_final_runs_of_the_best_point_alone(runs):
    for seed, value in ((1, 0.5), (2, 0.7)):
        add(runs, "adamw", seed, value)
    stale = {"contender": "adamw", "phase": "final", "flags": {"num_train_epochs": 9, "lr": 1, "seed": 1}}
    runs.log.add(stale, {"point": {"lr": 1}, "value": 0.0})
    row = summarize(runs)["adamw"]
    assert row["mean"] == pytest.approx(0.6) and row["std"] == pytest.approx(0.1 * 2**0.5)
    assert row["seconds_per_epoch"] == 10.0 and row["tuning"] == [({"lr": 1}, 0.9), ({"lr": 2}, 0.8)]
    assert row["train_loss"] == row["steps"] == [None, None], "runs without a curve"
    assert "training loss" not in format_study(runs.study, summarize(runs))


def test_a_contender_of_twice_the_speed_has_half_the_steps(runs):
    for seed in (1, 2):
        add(runs, "adamw", seed, 0.5, straight(0.002, cost=0.5))
        add(runs, "mfac, drop-in", seed, 0.6, straight(0.004, cost=0.75))
    summary = summarize(runs)
    adamw, mfac = summary["adamw"], summary["mfac, drop-in"]
    # The baseline's last mean is over its steps 91 to 100, as low as after 95.5 of 0.002 each; the other's, over ten
    # steps too, is first below where their middle, 4.5 steps before, has more than 47.75 of 0.004.
    assert adamw["steps"] == [100, 100] and mfac["steps"] == [53, 53]
    assert mfac["steps_ratio"] == [0.53, 0.53] and mfac["seconds_ratio"] == [pytest.approx(0.53 * 1.5)] * 2
    assert mfac["cpu_seconds"] == [pytest.approx(53 * 0.75)] * 2 and adamw["seconds_ratio"] == [1, 1]
    assert mfac["ms_per_step"] == [1500, 1500] and mfac["cpu_ms_per_step"] == [750, 750]
    assert mfac["train_loss"] == [pytest.approx(1 - 0.004 * 95.5)] * 2, "steps 91 to 100"
    table = format_study(runs.study, summary)
    assert (
        "| mfac, drop-in | 0.6180 ± 0.0000 | 0.4000 ± 0.0000 | 1500.0 ± 0.0 | 750.0 ± 0.0 | 53 ± 0 | 0.53 ± 0.00 |"
        in table
    )


def test_runs_are_paired_by_seed_and_one_that_never_gets_there_is_said(runs):
    add(runs, "adamw", 1, 0.5, straight(0.002, cost=1))
    add(runs, "adamw", 2, 0.5, straight(0.004, cost=1))
    for seed in (1, 2):
        add(runs, "mfac, drop-in", seed, 0.6, straight(0.003, cost=1))
    row = summarize(runs)["mfac, drop-in"]
    assert row["steps"] == [69, None] and row["steps_ratio"] == [0.69, None]
    assert "| 69 (1 of 2) | 0.69 (1 of 2) |" in format_study(runs.study, summarize(runs))


def contender(values, losses=(0.5, 0.5, 0.5), metric="eval_f1", ratio=0.5):
    return {
        "metric": metric,
        "seeds": [1, 2, 3],
        "values": list(values),
        "eval_loss": list(losses),
        "train_loss": list(losses),
        "steps_ratio": [ratio] * 3,
        "seconds_ratio": [2 * ratio] * 3,
    }


def test_ahead_means_by_more_than_the_standard_error_of_the_differences():
    base = contender([0.1, 0.5, 0.9])
    assert verdict(contender([0.11, 0.52, 0.93]), base, "metric") == 1, "seeds differ by more than contenders do"
    assert verdict(contender([0.09, 0.48, 0.87]), base, "metric") == -1
    assert verdict(contender([0.13, 0.49, 0.89]), base, "metric") == 0
    assert verdict(base, base, "metric") == 0
    lower = contender([0.1, 0.5, 0.9], (0.4, 0.39, 0.41))
    assert verdict(lower, base, "training loss") == 1 and verdict(base, lower, "validation loss") == -1
    loss = contender([3.0, 3.1, 3.2], metric="eval_loss")
    assert verdict(contender([2.0, 2.2, 2.1], metric="eval_loss"), loss, "metric") == 1
    assert verdict(contender([0.5, 0.6, 0.7], (None, None, 0.1)), base, "training loss") is None


def test_the_table_of_several_studies_counts_wins(runs):
    studies = [{"name": name, "baseline": "adamw"} for name in ("one", "two", "unfinished")]
    good, bad = contender([0.6, 0.61, 0.62], (0.3, 0.31, 0.32)), contender([0.4, 0.41, 0.43], ratio=0.8)
    bad["steps_ratio"] = [0.8, None, 0.8]
    base = contender([0.5, 0.51, 0.52], ratio=1.0)
    summaries = {
        "one": {"adamw": base, "mfac, drop-in": good, "soap": copy.deepcopy(base)},
        "two": {"adamw": base, "mfac, drop-in": bad, "mfac, tuned": good},
        "unfinished": {},
    }
    table = format_summary(studies, summaries, "drop-in")
    assert "| one | 3 | f1 | 51.00 ± 1.00 / 61.00 ± 1.00 / - |" in table
    assert "| 0.50 ± 0.00 / - | 1.00 ± 0.00 / - |" in table and "0.80 ± 0.00 (2 of 3) / 0.50 ± 0.00" in table
    assert "| mfac, drop-in | 2 | 1 / 0 / 1 | 1 / 1 / 0 | 1 / 1 / 0 | 1 | 1 | 1 |" in table
    assert "| mfac, tuned | 1 | 1 / 0 / 0 | 1 / 0 / 0 | 1 / 0 / 0 | 1 | 1 | 1 |" in table
    assert "| soap | 1 | 0 / 1 / 0 |" in table and "No final run of the baseline yet: unfinished." in table
    assert "| one | mfac, drop-in | **61.00 ± 1.00** | **0.3100 ± 0.0100** |" in table
    assert "| mfac, tuned | 1 | 1 | 1 |" in table.split("best on so many tasks")[1]
    with pytest.raises(ValueError, match="study x names no baseline"):
        format_summary([{"name": "x"}], summaries, "drop-in")


def test_summary_writes_the_table_of_what_was_run(runs, tmp_path, capsys):
    for seed in (1, 2):
        add(runs, "adamw", seed, 0.5, straight(0.002, cost=1))
    compare.main(["--summary", str(tmp_path / "x.yaml"), "--output", str(tmp_path), "--summary_name", "all"])
    assert (tmp_path / "all.md").read_text().startswith("# all\n") and "| x | 2 | f1 |" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_of_the_repository_load(path):
    if "script:" not in path.read_text() and "base:" not in path.read_text():
        pytest.skip("a study of pruning, which prune_study.py reads")
    study = load_study(path)
    assert study["name"] == path.stem and (ROOT / "scripts" / study["script"]).is_file()
