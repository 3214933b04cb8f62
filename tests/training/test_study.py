"""What studies share: the log that they go on from, and how results are shown."""

import json
import sys

import pytest

from mfac_hf.training.study import StudyLog, mean_and_deviation, new_figure, read_study


def test_a_log_goes_on_where_it_stopped(tmp_path):
    log = StudyLog(tmp_path / "new" / "study.jsonl")
    assert log.find(seed=1) is None and not (tmp_path / "new").exists()
    assert log.add({"seed": 1}, {"accuracy": 0.5}) == {"key": {"seed": 1}, "accuracy": 0.5}
    log.add({"seed": 2, "point": {"lr": 0.1}}, {"accuracy": 0.75})
    again = StudyLog(log.path)
    assert again.rows == log.rows == [json.loads(line) for line in log.path.read_text().splitlines()]
    assert again.find(seed=2, point={"lr": 0.1})["accuracy"] == 0.75
    assert again.find(seed=2) is None  # a key is the whole of it


def test_a_study_says_what_it_lacks(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("name: x\nseeds: [1, 2]\n")
    assert read_study(path, ["name", "seeds"]) == {"name": "x", "seeds": [1, 2]}
    with pytest.raises(ValueError, match=r"study.yaml has no 'flags'"):
        read_study(path, ["name", "flags", "grid"])


def test_mean_and_deviation():
    assert mean_and_deviation([1.234], 2) == "1.23"
    assert mean_and_deviation([1.0, 2.0, 3.0]) == "2.0 ± 1.0"


def test_missing_matplotlib_is_said(monkeypatch, capsys):
    assert new_figure(6, 4).get_size_inches().tolist() == [6, 4]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert new_figure(6, 4) is None
    assert "matplotlib is not installed" in capsys.readouterr().out
