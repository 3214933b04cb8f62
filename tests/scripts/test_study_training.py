"""The study of optimizers: equal tuning on held-out images, no run twice, a table and curves."""

import json

import pytest
import study_training as study


@pytest.mark.slow
def test_each_optimizer_is_tuned_on_held_out_images_and_then_run_with_each_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "NUM_TUNING", 100)
    grids = {"sgd": (["--optim", "sgd"], [1e-9, 0.1]), "adam": (["--optim", "adam"], [1e-9, 3e-3])}
    monkeypatch.setattr(study, "GRIDS", grids)
    flags = ["--nepochs", "1", "--train_images", "640", "--seeds", "1", "2", "--output", str(tmp_path)]
    flags += ["--optimizers", "sgd", "adam", "--tuning_images", "320"]
    text = study.main(flags)
    runs = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    for optimizer in grids:
        mine = [run["key"] for run in runs if run["key"]["optimizer"] == optimizer]
        tuning, final = ([key for key in mine if key["phase"] == phase] for phase in ("tuning", "final"))
        assert [key["lr"] for key in tuning] == grids[optimizer][1] and [key["seed"] for key in final] == [1, 2]
        assert all("--holdout" in key["flags"] for key in tuning)
        sizes = {key["phase"]: key["flags"][key["flags"].index("--train_images") + 1] for key in mine}
        assert sizes == {"tuning": "320", "final": "640"}
        assert not any("--holdout" in key["flags"] for key in final)
        best = max((run for run in runs if run["key"] in tuning), key=study.accuracy)
        assert {key["lr"] for key in final} == {best["key"]["lr"]}
    assert text.count("\n") == 4 and (tmp_path / "training-resnet20.png").stat().st_size > 5_000
    monkeypatch.setattr(study.train_vision, "main", lambda flags: pytest.fail("run again"))
    assert study.main(flags) == text
    with pytest.raises(pytest.fail.Exception, match="run again"):
        study.main([*flags, "--tuning_images", "330"])


def test_tuning_of_mfac_may_be_longer(tmp_path, monkeypatch):
    def trains(flags):
        return [{"accuracy": 0.5, "seconds": 1.0}] * int(flags[flags.index("--nepochs") + 1])

    monkeypatch.setattr(study.train_vision, "main", trains)
    flags = ["--optimizers", "adam", "mfac", "--seeds", "0", "--nepochs", "9", "--tuning_nepochs", "2"]
    study.main([*flags, "--mfac_tuning_nepochs", "5", "--output", str(tmp_path)])
    runs = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    lengths = {(run["key"]["optimizer"], run["key"]["phase"]): len(run["rows"]) for run in runs}
    assert lengths == {(o, p): n for o in ("adam", "mfac") for p, n in (("tuning", 2), ("final", 9))} | {
        ("mfac", "tuning"): 5
    }


def test_a_run_that_diverges_counts_as_the_worst(tmp_path, monkeypatch):
    def diverges(flags):
        raise FloatingPointError("the loss became nan")

    monkeypatch.setattr(study.train_vision, "main", diverges)
    assert (
        study.accuracy(study.Study([], {"tuning": (9, 1)}, tmp_path / "log.jsonl").run("sgd", "tuning", 9.0, 0)) == 0
    )
