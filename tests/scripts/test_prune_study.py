"""The study of one-shot pruning: from a study file to the table, without doing anything twice."""

import json
import re
from pathlib import Path

import prune_study
import pytest
import yaml

from tests.helpers.glue_data import save_classifier, write_glue

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Directory of a classifier with its tokenizer."""
    return save_classifier(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_glue(tmp_path_factory.mktemp("glue"), "sst2")


@pytest.fixture
def study(model, data, tmp_path):
    """A study of one model."""
    content = {
        "name": "tiny",
        "task": {"task": "sst2", "dataset_name": data, "use_cpu": True, "cache_dir": str(tmp_path / "cache")},
        "models": {1: model},
        "sparsities": [0.8, 0.5],
        "recomputations": [1, 2],
        "options": {"num_grads": 4, "block_size": 16},
        "contenders": {
            "magnitude": {"options": {"method": "magnitude"}},
            "ours": {"options": {"selection": "greedy"}, "grid": [{"damping": 1e-4}, {"damping": 1e-2}]},
        },
        "tuning": {"holdout_fraction": 0.25, "sparsity": 0.8, "recomputations": 2},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "study.yaml"


@pytest.fixture(autouse=True)
def whole_sentences(monkeypatch):
    """The synthetic sentences are too short to be held out as SST-2's are."""
    monkeypatch.setattr("mfac_hf.tasks.glue.SENTENCE_WORDS", 4)


@pytest.mark.slow
def test_a_study_is_finished_once(study, tmp_path, monkeypatch):
    table = prune_study.main([str(study), "--output", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "tiny.jsonl").read_text().splitlines()]
    keys = [json.dumps(row["key"]) for row in rows]
    assert len(set(keys)) == len(keys) == 2 * 2 + 1 + 2 + 2 * 2  # tuning, dense, magnitude, ours
    tuning = {r["key"]["recomputations"]: [] for r in rows if r["key"]["phase"] == "tuning"}
    for row in rows:
        if row["key"]["phase"] == "tuning":
            tuning[row["key"]["recomputations"]].append((row["loss"], row["key"]["point"]))
    for row in rows:  # the chosen point has the lowest loss on the held-out part, for its number of recomputations
        if row["key"].get("contender") == "ours" and row["key"]["phase"] == "result":
            assert row["key"]["point"] == min(tuning[row["key"]["recomputations"]], key=lambda entry: entry[0])[1]
    assert {row["key"]["sparsity"] for row in rows if row["key"]["phase"] == "result"} == {0.0, 0.5, 0.8}
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| magnitude", "| ours", "| ours"]
    losses = [row["loss"] for row in rows if row["key"].get("contender") == "magnitude"]
    assert [f"{loss:.3f}" for loss in losses] == lines[7].strip("| ").split(" | ")[-2:]
    assert "| 50% | 80% |" in lines[0] and (tmp_path / "tiny.md").read_text() == table

    monkeypatch.setattr(prune_study, "load_fine_tuned", None)  # nothing is loaded when all is there
    assert prune_study.main([str(study), "--output", str(tmp_path)]) == table


def test_each_row_says_how_many_recomputations():
    """Also of a contender without a grid; in magnitude pruning there are none to count."""
    study = {
        "name": "tiny",
        "task": {"task": "sst2"},
        "models": {"1": "model"},
        "sparsities": [0.5],
        "recomputations": [1, 4],
        "from_dense": 8,
        "contenders": {"magnitude": {"options": {"method": "magnitude"}}, "scaled": {"options": {"fisher": "scaled"}}},
        "tuning": {"holdout_fraction": 0.25, "sparsity": 0.5},
    }

    class Found:
        def find(self, **key):
            return {"metric": 0.5 + 0.01 * key["recomputations"], "loss": 0.25}

    points = {("magnitude", 1): {}, ("scaled", 1): {}, ("scaled", 4): {}}
    lines = [line for line in prune_study.format_table(study, points, Found()).splitlines() if line.startswith("| ")]
    rows = [[" magnitude ", "  "], [" scaled ", " 1 "], [" scaled ", " 4 "]]
    assert [line.split("|")[1:3] for line in lines[2:5]] == [line.split("|")[1:3] for line in lines[7:]] == rows
    assert [line.split("|")[4].strip() for line in lines[4:10:5]] == ["54.0", "0.250"]


@pytest.mark.slow
def test_a_study_that_was_cut_off_goes_on_where_it_stopped(study, tmp_path, monkeypatch):
    table = prune_study.main([str(study), "--output", str(tmp_path)])
    log = tmp_path / "tiny.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    kept = [row for row in rows if row["key"].get("sparsity") != 0.8]
    assert len(kept) == len(rows) - 3  # magnitude, and ours with 1 and 2 recomputations
    log.write_text("".join(json.dumps(row) + "\n" for row in kept))
    reached = []
    prune_to = prune_study.prune_to
    monkeypatch.setattr(prune_study, "prune_to", lambda *args, **kw: reached.append(args[3]) or prune_to(*args, **kw))
    assert prune_study.main([str(study), "--output", str(tmp_path)]) == table
    assert reached == [0.8]

    def losses(rows):
        return {json.dumps(row["key"]): row["loss"] for row in rows}

    assert losses(map(json.loads, log.read_text().splitlines())) == losses(rows)


def test_another_point_asks_for_new_results(study, tmp_path):
    content = yaml.safe_load(study.read_text())
    content |= {"recomputations": [1], "sparsities": [0.8]}
    tables = []
    for damping in (1e-4, 10.0):
        content["contenders"]["ours"]["grid"] = [{"damping": damping}]
        study.write_text(yaml.safe_dump(content))
        tables.append(prune_study.main([str(study), "--output", str(tmp_path)]))
        rows = [json.loads(line)["key"] for line in (tmp_path / "tiny.jsonl").read_text().splitlines()]
    assert [row["point"] for row in rows if row["contender"] == "ours"] == [{"damping": 1e-4}, {"damping": 10.0}]
    assert [row["contender"] for row in rows].count("magnitude") == 1
    assert "| damping 0.0001 |" in tables[0] and "| damping 10 |" in tables[1]
    assert "±" not in tables[1]  # of one model there is one value: that of the other point is none of this table's


def test_another_path_asks_for_new_results(study, tmp_path):
    content = yaml.safe_load(study.read_text())
    content |= {"recomputations": [3], "from_dense": 1}
    content["contenders"] = {"ours": {"options": {"selection": "greedy"}, "grid": [{"damping": 1e-4}]}}
    tables, found = [], []
    for sparsities in ([0.8], [0.5, 0.8], [0.8]):
        study.write_text(yaml.safe_dump(content | {"sparsities": sparsities}))
        tables.append(prune_study.main([str(study), "--output", str(tmp_path)]))
        rows = [json.loads(line)["key"] for line in (tmp_path / "tiny.jsonl").read_text().splitlines()]
        found.append([row["path"] for row in rows if row["contender"] == "ours"])
    assert found[1] == [[[0.8, 3]], [[0.5, 1]], [[0.5, 1], [0.8, 2]]]
    assert found[2] == found[1] and tables[2] == tables[0]
    assert "±" not in tables[1]  # 80 % from the dense model is none of this table's


def test_one_path_of_substeps_stops_at_every_sparsity():
    assert prune_study.substeps([0.5, 0.8], 4, from_dense=8) == [(0.5, 4), (0.8, 4)]
    path = prune_study.substeps([0.5, 0.6, 0.7, 0.8, 0.9, 0.95], 16, from_dense=8)
    assert sum(steps for _, steps in path) == 16 and all(steps >= 1 for _, steps in path)
    assert path[0] == (0.5, 4)  # a quarter of the way in the logarithm of the density


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda study: study.pop("tuning"), "has no 'tuning'"),
        (lambda study: study["contenders"]["ours"]["options"].update(selection="best"), "'ours': selection is 'best'"),
        (lambda study: study["contenders"]["ours"]["options"].update(sel="best"), "unexpected keyword"),
        (lambda study: study.update(from_dense="all"), "from_dense is 'all'"),
        (lambda study: study.update(from_dense=1, recomputations=[2], sparsities=[0.5, 0.6, 0.7]), "cannot stop at 3"),
    ],
)
def test_a_study_that_cannot_be_is_refused_at_once(change, message, study, capsys):
    content = yaml.safe_load(study.read_text())
    change(content)
    study.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit):
        prune_study.main([str(study)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(STUDIES.glob("prune-*.yaml")))
def test_shipped_studies_can_be_read(path):
    study = prune_study.load_study(path)
    budgets = {len(contender["grid"]) for name, contender in study["contenders"].items() if name != "magnitude"}
    assert len(budgets - {1}) == 1  # whoever is tuned has as many points; the scaled Fisher has the library's damping


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ["x"]}, "models is a list of 1; expected an object"),
        ({"sparsities": ["high"]}, r"sparsities\[0\] is 'high'; expected a number"),
        ({"recomputations": 4}, "recomputations is 4; expected a list"),
        ({"tuning": {"sparsity": 0.5}}, "tuning is an object without 'holdout_fraction'"),
        ({"contenders": {"ours": {"grid": [{"damping": None}]}}}, "contender 'ours': .*NoneType"),
        ({"contenders": {"ours": [1]}}, "contenders.ours is a list of 1"),
    ],
)
def test_studies_of_another_form_are_refused_by_name(change, message, study, capsys):
    study.write_text(yaml.safe_dump({**yaml.safe_load(study.read_text()), **change}))
    with pytest.raises(SystemExit) as stop:
        prune_study.main([str(study)])
    assert stop.value.code == 2 and re.search(f"study.yaml: {message}", capsys.readouterr().err)
