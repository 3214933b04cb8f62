"""How a study of optimizers chooses and what it runs; the runs themselves are those of the training scripts."""

import json

import compare_optimizers as compare
import pytest
from comparison.runs import best_point

GRID = [{"learning_rate": 0.1}, {"learning_rate": 0.2}, {"learning_rate": 0.3}]
STUDY = {"name": "x", "script": "s", "flags": {}, "seeds": [1, 2], "tuning": {"holdout_fraction": 0.1, "seed": 0}}


def run(point, value, loss, metric="eval_f1"):
    results = {"selection_value": value, "eval_loss": loss, "train_runtime": 20.0}
    return {"point": point, "value": value, "results": results, "peak_memory_gib": 1.0, "metric": metric}


@pytest.fixture
def pretended(monkeypatch):
    """Replace the runs: a list of (contender, phase, flags) of those asked for. The best is always the last point."""
    asked = []

    def pretend(study, contender, phase, point, flags, log):
        if log.find(contender=contender, phase=phase, flags=flags) is None:
            asked.append((contender, phase, flags))
            log.add({"contender": contender, "phase": phase, "flags": flags}, run(point, len(asked) / 100, 0.1))

    monkeypatch.setattr(compare, "run_once", pretend)
    return asked


@pytest.fixture
def study_file(tmp_path):
    """Write a study and return the arguments that run it."""

    def write(contenders, name="x", **changes):
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({**STUDY, "name": name, "contenders": contenders, **changes}))  # JSON is YAML
        return [str(path), "--output", str(tmp_path)]

    return write


def test_the_best_point_is_the_highest_value_or_the_lowest_loss():
    runs = [run(GRID[0], 0.7, 0.5), run(GRID[1], 0.8, 0.6), run(GRID[2], 0.9, float("nan"))]
    assert best_point(runs, "adamw", GRID, "selection_value") == GRID[2]
    assert best_point(runs, "adamw", GRID, "eval_loss") == GRID[0]
    losses = [run(point, value, value, "eval_loss") for point, value in zip(GRID, (0.3, 0.2, 0.4), strict=True)]
    assert best_point(losses, "adamw", GRID, "selection_value") == GRID[1], "a task that selects by a loss"


def test_failed_runs_are_not_chosen():
    failed = {"point": GRID[0], "value": None, "error": ["diverged"]}
    assert best_point([failed, run(GRID[1], 0.1, 9.0)], "adamw", GRID, "selection_value") == GRID[1]
    with pytest.raises(RuntimeError, match="diverged"):
        best_point([failed], "adamw", GRID, "selection_value")


def test_a_grid_of_one_point_is_not_tuned(tmp_path, pretended, study_file):
    for points, count in (([{"lr": 1}], 0), ([{"lr": 1}, {"lr": 2}], 2)):
        pretended.clear()
        compare.main(study_file({"adamw": {"grid": points}}, name=f"x{count}"))
        assert [phase for _, phase, _ in pretended] == ["tuning"] * count + ["final"] * 2
        assert ("Nothing was tuned" in (tmp_path / f"x{count}.md").read_text()) == (count == 0)


def test_tuning_runs_differ_by_flags_of_the_study_and_of_a_contender(pretended, study_file):
    grid = [{"lr": 1}, {"lr": 2}]
    contenders = {"adamw": {"grid": grid}, "mfac": {"grid": grid, "tuning_flags": {"num_train_epochs": 2}}}
    tuning = {"holdout": 7, "seed": 5, "flags": {"num_train_epochs": 1}}
    compare.main(study_file(contenders, flags={"num_train_epochs": 9}, tuning=tuning))
    seen = {(contender, phase): flags["num_train_epochs"] for contender, phase, flags in pretended}
    expected = {"adamw": (1, 9), "mfac": (2, 9)}
    assert seen == {(c, p): n for c, ns in expected.items() for p, n in zip(("tuning", "final"), ns, strict=True)}
    for _, phase, flags in pretended:
        assert (flags.get("holdout"), flags["seed"] == 5) == ((7, True) if phase == "tuning" else (None, False))


def test_a_study_goes_on_where_it_stopped(pretended, study_file):
    arguments = study_file({"adamw": {"grid": [{"lr": 1}, {"lr": 2}]}, "mfac": {"grid": [{"lr": 1}]}})
    compare.main([*arguments, "--only", "adamw", "--seeds", "2"])
    assert [flags["seed"] for _, _, flags in pretended] == [0, 0, 2]
    compare.main(arguments)
    assert len(pretended) == 6 and len({json.dumps(one) for one in pretended}) == 6


def test_take_gives_the_tuned_values_of_another_contender(pretended, study_file):
    contenders = {
        "adamw": {"flags": {"warmup_steps": 0.1}, "grid": [{"lr": 1}, {"lr": 2}]},
        "drop-in": {"flags": {"optim": "mfac"}, "take": {"from": "adamw", "flags": ["lr", "warmup_steps"]}},
        "twice": {"take": {"from": "adamw", "flags": ["lr"], "scale": {"lr": 2.5}}},
        "damped": {"take": {"from": "adamw", "flags": ["lr"]}, "grid": [{"damping": 1}, {"damping": 3}]},
    }
    compare.main(study_file(contenders))
    final = {contender: flags for contender, phase, flags in pretended if phase == "final"}
    assert final["drop-in"] == {"optim": "mfac", "lr": 2, "warmup_steps": 0.1, "seed": 2}, "the second point is best"
    assert final["twice"] == {"lr": 5.0, "seed": 2} and final["damped"] == {"damping": 3, "lr": 2, "seed": 2}
    assert sum(phase == "tuning" for _, phase, _ in pretended) == 4


def test_take_from_another_study(pretended, study_file, capsys):
    later = {"adamw": {"take": {"study": "first", "from": "best", "flags": ["lr"]}}}
    with pytest.raises(SystemExit):
        compare.main(study_file(later, name="later"))
    assert "first.jsonl has no final run: run that study first" in capsys.readouterr().err
    compare.main(study_file({"best": {"grid": [{"lr": 4}, {"lr": 3}]}}, name="first"))
    compare.main(study_file(later, name="later"))
    assert pretended[-1] == ("adamw", "final", {"lr": 3, "seed": 2})


def test_what_a_contender_takes_has_to_be_tuned_before_it(pretended, study_file, capsys):
    arguments = study_file(
        {"adamw": {"grid": [{"lr": 1}, {"lr": 2}]}, "mfac": {"take": {"from": "adamw", "flags": ["lr"]}}}
    )
    with pytest.raises(SystemExit):
        compare.main([*arguments, "--only", "mfac"])
    assert "adamw is not tuned: 0 of its 2 points were run" in capsys.readouterr().err and not pretended


def test_studies_share_a_base_and_a_log(pretended, study_file, tmp_path):
    compare.main(study_file({"adamw": {"grid": [{"lr": 1}]}}, name="one", flags={"a": 1, "b": 1}))
    more = {"name": "two", "base": "one.yaml", "log": "one", "contenders": {"half": {"grid": [{"lr": 0.5}]}}}
    (tmp_path / "two.yaml").write_text(json.dumps(more))
    compare.main([str(tmp_path / "two.yaml"), "--output", str(tmp_path)])
    assert [contender for contender, _, _ in pretended] == ["adamw"] * 2 + ["half"] * 2, "adamw was run before"
    (tmp_path / "two.yaml").write_text(json.dumps({**more, "flags": {"b": 2}}))
    compare.main([str(tmp_path / "two.yaml"), "--output", str(tmp_path)])
    assert [(c, flags["a"], flags["b"]) for c, _, flags in pretended[4:]] == [("adamw", 1, 2)] * 2 + [
        ("half", 1, 2)
    ] * 2


def test_a_study_that_is_missing_or_incomplete_is_refused(tmp_path, capsys):
    (tmp_path / "study.yaml").write_text("name: x\nscript: run_glue.py\n")
    for path, words in ((tmp_path / "none.yaml", "none.yaml"), (tmp_path / "study.yaml", "no 'flags'")):
        with pytest.raises(SystemExit):
            compare.main([str(path), "--output", str(tmp_path)])
        assert words in capsys.readouterr().err


def test_one_study_or_several_to_sum_up(capsys):
    for arguments in ([], ["a.yaml", "--summary", "b.yaml"]):
        with pytest.raises(SystemExit):
            compare.main(arguments)
        assert "one study to run, or --summary" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"tuning_flag": {"num_train_epochs": 2}}, "has ['tuning_flag']; expected flags, tuning_flags, grid, take"),
        (
            {"tuning_flags": ["--num_train_epochs", 2]},
            "tuning_flags of contender 'adamw' are ['--num_train_epochs', 2]",
        ),
        ({"flags": "fast"}, "flags of contender 'adamw' are 'fast'; expected {name: value}"),
        ({"grid": [3]}, "the grid of contender 'adamw': [0] is 3; expected an object"),
        ({"grid": []}, "has an empty grid; expected at least one point, or take"),
        ({"take": {"from": "sgd"}}, "take has from; expected from and flags"),
        ({"take": {"from": "sgd", "flags": ["lr"], "times": 2}}, "take has from, flags, times; expected from"),
        ({"take": {"from": "later", "flags": ["lr"]}}, "takes from 'later'; expected a contender before it: sgd"),
        ({"take": {"from": "sgd", "flags": ["lr"], "scale": {"damping": 2}}}, "scales ['damping'], which it does not"),
    ],
)
def test_a_contender_with_other_keys_or_no_mapping_is_refused(study_file, capsys, spec, words):
    contenders = {"sgd": {"grid": [{"lr": 1}]}, "adamw": {"grid": [{"lr": 1}], **spec}, "later": {"grid": [{"lr": 1}]}}
    with pytest.raises(SystemExit):
        compare.main(study_file(contenders))
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baseline": "sgd"}, "baseline 'sgd' is no contender; expected one of adamw"),
        ({"tuning": {"seed": 0}}, "tuning has metric, flags, seed; expected holdout_fraction, or holdout"),
    ],
)
def test_a_study_that_contradicts_itself_is_refused(study_file, capsys, changes, words):
    with pytest.raises(SystemExit):
        compare.main(study_file({"adamw": {"grid": [{"lr": 1}]}}, **changes))
    assert words in capsys.readouterr().err


def test_only_and_seeds_take_what_the_study_has(tmp_path, study_file, capsys):
    arguments = study_file({"adamw": {"grid": [{"lr": 1}]}, "mfac": {"grid": [{"lr": 1}]}})
    for flags, words in (
        (["--only", "adam", "mfac"], "--only adam: the study has adamw; mfac"),
        (["--seeds", "2", "3"], "--seeds 3: the study has 1; 2"),
    ):
        with pytest.raises(SystemExit):
            compare.main([*arguments, *flags])
        assert words in capsys.readouterr().err and not (tmp_path / "x.jsonl").exists()


def test_a_run_is_a_process_whose_results_and_failures_are_kept(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(
        "import json, os, sys\n"
        "flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "assert float(flags['--lr']) < 1, 'too large'\n"
        "results = {'selection_value': 0.5, 'selection_metric': 'eval_f1', 'threads': os.environ['OMP_NUM_THREADS']}\n"
        "record = {'results': results, 'versions': {}, 'device': 'cpu', 'threads': 1, 'peak_memory_gib': 1}\n"
        "open(flags['--output_dir'] + '/results.json', 'w').write(json.dumps(record))\n"
    )
    monkeypatch.setattr(compare, "SCRIPTS", tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    log = compare.StudyLog(tmp_path / "log.jsonl")
    for lr in (0.5, 2):
        compare.run_once({**STUDY, "script": "script.py"}, "adamw", "final", {}, {"lr": lr, "seed": 1}, log)
    good, bad = log.rows
    assert (good["value"], good["metric"], good["results"]["threads"]) == (0.5, "eval_f1", "1")
    assert bad["value"] is None and "too large" in bad["error"][0]


def test_an_unset_variable_is_refused_and_no_failure_is_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NO_SUCH_DATA", raising=False)
    contenders = {"adamw": {"grid": [{"lr": 1}]}}
    study = {**STUDY, "flags": {"dataset_name": "${NO_SUCH_DATA}/glue"}, "contenders": contenders}
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(study))
    with pytest.raises(SystemExit):
        compare.main([str(path), "--output", str(tmp_path)])
    assert "NO_SUCH_DATA is not set" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_contender_of_another_package_runs_through_its_own_script(tmp_path, monkeypatch):
    (tmp_path / "run_contender.py").write_text(
        "import json, sys\n"
        "results = {'selection_value': 0.5, 'selection_metric': 'eval_f1', 'argv': sys.argv[1:]}\n"
        "record = {'results': results, 'versions': {}, 'device': 'cpu', 'threads': 1, 'peak_memory_gib': 1}\n"
        "open(sys.argv[sys.argv.index('--output_dir') + 1] + '/results.json', 'w').write(json.dumps(record))\n"
    )
    monkeypatch.setattr(compare, "SCRIPTS", tmp_path)
    log = compare.StudyLog(tmp_path / "log.jsonl")
    flags = {"contender": "soap", "contender_options": {"precondition_frequency": 5}, "seed": 1}
    compare.run_once({**STUDY, "script": "run_glue.py"}, "soap", "final", {}, flags, log)
    argv = log.rows[0]["results"]["argv"]
    assert argv[0] == "run_glue.py" and argv[argv.index("--contender") + 1] == "soap"
    assert json.loads(argv[argv.index("--contender_options") + 1]) == {"precondition_frequency": 5}
    assert "pytorch_optimizer" in log.rows[0]["versions"]


def test_the_script_for_vision_models_gets_its_own_flags(tmp_path, monkeypatch):
    (tmp_path / "train_vision.py").write_text(
        "import json, sys\n"
        "flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "results = {'selection_value': 0.5, 'selection_metric': 'eval_accuracy', 'flags': sorted(flags)}\n"
        "record = {'results': results, 'versions': {}, 'device': 'cpu', 'threads': 1, 'peak_memory_gib': 1}\n"
        "open(flags['--results'], 'w').write(json.dumps(record))\n"
    )
    monkeypatch.setattr(compare, "SCRIPTS", tmp_path)
    log = compare.StudyLog(tmp_path / "log.jsonl")
    compare.run_once({**STUDY, "script": "train_vision.py"}, "sgd", "final", {}, {"lr": 1, "seed": 1}, log)
    assert log.rows[0]["results"]["flags"] == ["--lr", "--progress", "--results", "--save", "--seed"]
