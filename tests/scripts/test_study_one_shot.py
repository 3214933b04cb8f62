"""The one-shot study: what is there is not computed again, and the table has it."""

import json

import pytest
import study_one_shot as study
import torch

from mfac_hf.models import ResNetCifar

SMALL = {"selection": "diagonal", "update": "sum", "num_grads": 4, "grad_batch_size": 4, "block_size": 16}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The study on digits with two small methods."""
    for name, value in {"NUM_HELD_OUT": 128, "NUM_TUNING": 64, "NUM_BN": 128}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "TUNING", {"paper": (study.Method("paper", SMALL, 1), (1e-5, 1e-3))})
    monkeypatch.setattr(
        study,
        "METHODS",
        {
            "magnitude": study.Method("magnitude", {"method": "magnitude"}),
            "single": study.Method("paper", SMALL, 1),
            "path": study.Method("paper", SMALL, {0.5: 1, 0.8: 2}),
        },
    )
    torch.save(ResNetCifar(20, 10, 1).state_dict(), tmp_path / "dense.pth")

    def start(*flags):
        paths = ["--checkpoint", str(tmp_path / "dense.pth"), "--dataset", "digits", "--output", str(tmp_path)]
        return study.main([*paths, "--sparsities", "0.5", "0.8", *flags])

    start.log = tmp_path / "one-shot-resnet20.jsonl"
    return start


@pytest.mark.slow
def test_a_study_is_continued_and_not_repeated(run, monkeypatch):
    run("--seeds", "0")
    rows = [json.loads(line) for line in run.log.read_text().splitlines()]
    results = [row for row in rows if row["key"]["phase"] == "result"]
    assert len(rows) - len(results) == 2 and len(results) == 3 * 2
    images = {(row["key"]["method"], row["key"]["sparsity"]): row["images"] for row in results}
    # 4 gradients of 4 images each; a path adds up what led to a sparsity
    assert [images["single", s] for s in (0.5, 0.8)] == [16, 16]
    assert [images["path", s] for s in (0.5, 0.8)] == [16, 48]
    assert images["magnitude", 0.8] == 0

    before = run.log.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(study.Study, "prune", lambda *_: pytest.fail("computed again"))
        table = run("--seeds", "0")
    assert run.log.read_text() == before
    run("--seeds", "1", "--methods", "magnitude", "path")
    rows = [json.loads(line)["key"] for line in run.log.read_text().splitlines()]
    assert sum(row["phase"] == "tuning" for row in rows) == 2
    assert sum(row.get("seed") == 1 for row in rows) == 2  # magnitude pruning has one seed
    best = max(
        (row for row in map(json.loads, before.splitlines()) if row["key"]["phase"] == "tuning"),
        key=lambda row: row["accuracy"],
    )
    assert all(row["damping"] == best["key"]["damping"] for row in results if row["key"]["method"] != "magnitude")
    assert "| path | 48 |" in table and "80%" in table


def test_the_table_has_mean_and_deviation():
    def row(seed, value):
        key = {"phase": "result", "method": "magnitude", "sparsity": 0.9, "seed": seed}
        names = [f"{split}_accuracy{bn}" for split in ("test", "train") for bn in ("", "_bn")]
        return {"key": key, "images": 0, "damping": 1e-5, **dict.fromkeys(names, value)}

    assert "| 15.0 ± 7.1 / 15.0 ± 7.1 → 15.0 ± 7.1 / 15.0 ± 7.1 |" in study.table([row(0, 0.1), row(1, 0.2)])
    assert "| 10.0 / 10.0 → 10.0 / 10.0 |" in study.table([row(0, 0.1)])
