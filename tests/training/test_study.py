"""What studies share: the log that they go on from, and how results are shown."""

import json
import subprocess
import sys
from typing import TypedDict

import pytest

from mfac_hf.training.study import StudyLog, expand_variables, mean_and_deviation, new_figure, read_study, save_figure


def test_a_log_goes_on_where_it_stopped(tmp_path):
    log = StudyLog(tmp_path / "new" / "study.jsonl")
    assert log.find(seed=1) is None and not (tmp_path / "new").exists()
    assert log.add({"seed": 1}, {"accuracy": 0.5}) == {"key": {"seed": 1}, "accuracy": 0.5}
    log.add({"seed": 2, "point": {"lr": 0.1}}, {"accuracy": 0.75})
    again = StudyLog(log.path)
    assert again.rows == log.rows == [json.loads(line) for line in log.path.read_text().splitlines()]
    assert again.find(seed=2, point={"lr": 0.1})["accuracy"] == 0.75
    assert again.find(seed=2) is None  # a key is the whole of it


def test_a_log_finds_runs_from_before_there_was_another_metric(tmp_path):
    log = StudyLog(tmp_path / "study.jsonl")
    earlier = log.add({"phase": "final", "flags": {"num_grads": 8}}, {"accuracy": 0.5})
    assert log.find(phase="final", flags={"metric": "identity", "num_grads": 8}) == earlier
    assert log.find(phase="final", flags={"metric": "adam", "num_grads": 8}) is None
    named = log.add({"phase": "final", "flags": {"metric": "identity"}}, {"accuracy": 0.75})
    assert log.find(phase="final", flags={"metric": "identity"}) == named
    assert log.find(phase="final", flags={}) is None


def test_a_study_says_what_it_lacks(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("name: x\nseeds: [1, 2]\n")
    assert read_study(path, ["name", "seeds"]) == {"name": "x", "seeds": [1, 2]}
    with pytest.raises(ValueError, match=r"study.yaml has no 'flags'"):
        read_study(path, ["name", "flags", "grid"])


def test_mean_and_deviation():
    assert mean_and_deviation([1.234], 2) == "1.23"
    assert mean_and_deviation([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert mean_and_deviation([1.0, float("nan")]) == mean_and_deviation([float("nan")] * 3) == "nan ± nan"
    assert mean_and_deviation([1.0, float("inf")]) == "inf ± nan"


def test_missing_matplotlib_is_said(monkeypatch, capsys):
    assert new_figure(6, 4).get_size_inches().tolist() == [6, 4]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert new_figure(6, 4) is None
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_a_log_goes_on_after_a_line_that_was_cut_off(tmp_path):
    log = StudyLog(tmp_path / "study.jsonl")
    log.add({"seed": 1}, {"accuracy": 0.5})
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b'{"key": {"seed": 2}, "accur')
    again = StudyLog(log.path)
    assert again.rows == log.rows
    again.add({"seed": 3}, {"accuracy": 0.75})
    log.add({"seed": 4}, {"accuracy": 0.25})  # another run of the same study
    assert [row["key"]["seed"] for row in StudyLog(log.path).rows] == [1, 3, 4]
    log.path.write_bytes(b"[1]\n" + whole)
    with pytest.raises(ValueError, match=r"study.jsonl, line 1, holds a list of 1; expected an object"):
        StudyLog(log.path)
    log.path.write_bytes(whole + b"{\n")
    with pytest.raises(ValueError, match=r"study.jsonl, line 2, is no JSON"):
        StudyLog(log.path)


def test_a_row_that_has_no_room_leaves_the_others(tmp_path):
    log = StudyLog(tmp_path / "study.jsonl")
    log.add({"seed": 1}, {"accuracy": 0.5})
    before = log.path.read_bytes()
    program = f"""
import resource
from mfac_hf.training.study import StudyLog
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
try:
    StudyLog({str(log.path)!r}).add({{"seed": 2}}, {{"text": "x" * 500}})
except OSError as error:
    print("OSError")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "OSError\n" and log.path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "holds a list of 1; expected an object"),
        ("name: 3\nseeds: [1]\n", "name is 3; expected text"),
        ("name: x\nseeds: [1, two]\n", r"seeds\[1\] is 'two'; expected a whole number"),
        ("name: [x\n", "is no YAML file"),
    ],
)
def test_a_study_of_another_form_is_refused(text, message, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"study.yaml.*{message}"):
        read_study(path, ["name", "seeds"], TypedDict("Kind", {"name": str, "seeds": list[int]}))


def test_a_picture_is_written_whole(tmp_path):
    figure = new_figure(1, 1)
    save_figure(figure, tmp_path / "new" / "x.png", dpi=20)
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "new" / "x.other").write_text("before")
    with pytest.raises(ValueError, match="other"):
        save_figure(figure, tmp_path / "new" / "x.other", dpi=20)
    assert (tmp_path / "new" / "x.other").read_text() == "before" and len(list((tmp_path / "new").iterdir())) == 2


def test_variables_that_are_not_set_are_refused_by_name(monkeypatch):
    monkeypatch.setenv("SOME_DATA", "/data")
    monkeypatch.delenv("OTHER_DATA", raising=False)
    assert expand_variables("${SOME_DATA}/glue") == "/data/glue"
    assert expand_variables('{"cost": "5 $"}') == '{"cost": "5 $"}'
    with pytest.raises(ValueError, match="OTHER_DATA is not set"):
        expand_variables("${OTHER_DATA}/glue")
