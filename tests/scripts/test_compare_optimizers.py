"""How a study of optimizers chooses and sums up; the runs themselves are those of run_glue.py and run_squad.py."""

import json

import compare_optimizers as compare
import pytest

GRID = [{"learning_rate": 0.1}, {"learning_rate": 0.2}, {"learning_rate": 0.3}]


def run(point, value, loss, phase="tuning", seed=0):
    results = {"selection_value": value, "eval_loss": loss, "train_runtime": 20.0}
    key = {"contender": "adamw", "phase": phase, "flags": {"seed": seed}}
    return {
        "key": key,
        "point": point,
        "value": value,
        "results": results,
        "peak_memory_gib": 1.0,
        "metric": "eval_f1",
    }


def test_the_best_point_is_the_highest_value_or_the_lowest_loss():
    runs = [run(GRID[0], 0.7, 0.5), run(GRID[1], 0.8, 0.6), run(GRID[2], 0.9, float("nan"))]
    assert compare.best_point(runs, "adamw", GRID, "selection_value") == GRID[2]
    assert compare.best_point(runs, "adamw", GRID, "eval_loss") == GRID[0]


def test_failed_runs_are_not_chosen():
    failed = {**run(GRID[0], None, None), "error": ["diverged"]}
    assert compare.best_point([failed, run(GRID[1], 0.1, 9.0)], "adamw", GRID, "selection_value") == GRID[1]
    with pytest.raises(RuntimeError, match="diverged"):
        compare.best_point([failed], "adamw", GRID, "selection_value")


def test_the_summary_is_over_final_runs_alone():
    tuning = {"metric": "selection_value", "seed": 0, "holdout_fraction": 0.1, "flags": {}}
    study = {"contenders": {"adamw": {}}, "flags": {"num_train_epochs": 2}, "tuning": tuning}
    runs = [run(GRID[0], 0.99, 0.1), *(run(GRID[0], v, 0.1, "final", i) for i, v in enumerate((0.5, 0.7)))]
    row = compare.summarize(study, runs)["adamw"]
    assert row["mean"] == pytest.approx(0.6) and row["std"] == pytest.approx(0.1 * 2**0.5)
    assert row["seconds_per_epoch"] == 10.0 and row["tuning"] == [(GRID[0], 0.99)]


def test_a_grid_of_one_point_is_not_tuned(tmp_path, monkeypatch):
    phases = []

    def pretend(study, contender, phase, point, flags, log):
        phases.append(phase)
        log.rows.append(
            {**run(point, 0.5, 0.1, phase), "key": {"contender": contender, "phase": phase, "flags": flags}}
        )

    monkeypatch.setattr(compare, "run_once", pretend)
    study = {"name": "x", "script": "s", "flags": {}, "seeds": [1, 2], "tuning": {"holdout_fraction": 0.1, "seed": 0}}
    for points, count in (([{"lr": 1}], 0), ([{"lr": 1}, {"lr": 2}], 2)):
        phases.clear()
        contenders = {"adamw": {"grid": points}}
        (tmp_path / "study.yaml").write_text(json.dumps({**study, "contenders": contenders}))  # JSON is YAML
        compare.main([str(tmp_path / "study.yaml"), "--output", str(tmp_path)])
        assert phases == ["tuning"] * count + ["final"] * 2
        assert ("Nothing was tuned" in (tmp_path / "x.md").read_text()) == (count == 0)


def test_tuning_runs_differ_by_flags_of_the_study_and_of_a_contender(tmp_path, monkeypatch):
    seen = {}

    def pretend(study, contender, phase, point, flags, log):
        seen[contender, phase] = flags["num_train_epochs"]
        log.rows.append(
            {**run(point, 0.5, 0.1, phase), "key": {"contender": contender, "phase": phase, "flags": flags}}
        )

    monkeypatch.setattr(compare, "run_once", pretend)
    grid = [{"lr": 1}, {"lr": 2}]
    study = {
        "name": "x",
        "script": "s",
        "flags": {"num_train_epochs": 9},
        "seeds": [1],
        "tuning": {"holdout_fraction": 0.1, "seed": 0, "flags": {"num_train_epochs": 1}},
        "contenders": {"adamw": {"grid": grid}, "mfac": {"grid": grid, "tuning_flags": {"num_train_epochs": 2}}},
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    compare.main([str(tmp_path / "study.yaml"), "--output", str(tmp_path)])
    expected = {"adamw": (1, 9), "mfac": (2, 9)}
    assert seen == {(c, p): n for c, ns in expected.items() for p, n in zip(("tuning", "final"), ns, strict=True)}


def test_a_study_that_is_missing_or_incomplete_is_refused(tmp_path, capsys):
    (tmp_path / "study.yaml").write_text("name: x\nscript: run_glue.py\n")
    for path, words in ((tmp_path / "none.yaml", "none.yaml"), (tmp_path / "study.yaml", "no 'flags'")):
        with pytest.raises(SystemExit):
            compare.main([str(path), "--output", str(tmp_path)])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"tuning_flag": {"num_train_epochs": 2}}, "has ['tuning_flag']; expected flags, tuning_flags and grid"),
        (
            {"tuning_flags": ["--num_train_epochs", 2]},
            "tuning_flags of contender 'adamw' are ['--num_train_epochs', 2]",
        ),
        ({"flags": "fast"}, "flags of contender 'adamw' are 'fast'; expected {name: value}"),
        ({"grid": [3]}, "the grid of contender 'adamw': [0] is 3; expected an object"),
    ],
)
def test_a_contender_with_other_keys_or_no_mapping_is_refused(tmp_path, capsys, spec, words):
    study = {"name": "x", "script": "s", "flags": {}, "seeds": [1], "tuning": {"holdout_fraction": 0.1, "seed": 0}}
    contenders = {"adamw": {"grid": [{"lr": 1}], **spec}}
    (tmp_path / "study.yaml").write_text(json.dumps({**study, "contenders": contenders}))
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "study.yaml"), "--output", str(tmp_path)])
    assert words in capsys.readouterr().err


def test_only_takes_contenders_of_the_study(tmp_path, capsys):
    study = {"name": "x", "script": "s", "flags": {}, "seeds": [1], "tuning": {"holdout_fraction": 0.1, "seed": 0}}
    contenders = {"adamw": {"grid": [{"lr": 1}]}, "mfac": {"grid": [{"lr": 1}]}}
    (tmp_path / "study.yaml").write_text(json.dumps({**study, "contenders": contenders}))
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "study.yaml"), "--output", str(tmp_path / "out"), "--only", "adam", "mfac"])
    assert "--only adam: the study has adamw; mfac" in capsys.readouterr().err and not (tmp_path / "out").exists()
