"""The demonstration, end to end, with a tiny model and very few steps."""

import io
import json
import math
import sys

import demo
import pytest
from rich.console import Console

from mfac_hf.training.study import mean_and_deviation

TINY = ["--steps=13", "--batch_size=4", "--num_validation=16", "--hidden_size=8", "--num_grads=5"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return demo.main([*TINY, "--seeds=2", f"--output_dir={folder}"]), folder


def test_both_optimizers_run_every_seed_for_the_same_steps(finished):
    runs, _ = finished
    assert [(run.seed, run.optimizer) for run in runs] == [(s, name) for s in (0, 1) for name in ("mfac", "adamw")]
    for run in runs:
        assert [step for step, _ in run.loss_curve] == list(range(1, 14))
        assert run.accuracy_curve[-1] == (13, run.validation_accuracy)
        figures = [run.train_loss, run.seconds, run.ms_per_step, *(loss for _, loss in run.loss_curve)]
        assert all(math.isfinite(figure) and figure > 0 for figure in figures)
        assert all(0 <= accuracy <= 1 for _, accuracy in run.accuracy_curve)
        assert run.ms_per_step * 13 < 1000 * run.seconds  # evaluation is not counted


def test_both_optimizers_start_alike_and_then_part(finished):
    runs, _ = finished
    mfac, adamw = runs[:2]
    # Warm-up makes the first rate 0 or small; the first loss comes before any step: same weights, same batch.
    assert mfac.loss_curve[0] == adamw.loss_curve[0]
    assert mfac.loss_curve[-1] != adamw.loss_curve[-1]


def test_only_mfac_has_a_window(finished):
    runs, _ = finished
    assert all((run.window_gib is None) == (run.optimizer == "adamw") for run in runs)
    assert all(0 < run.window_gib < 0.01 for run in runs if run.optimizer == "mfac")


def test_results_file_holds_runs_and_how_to_repeat_them(finished):
    runs, folder = finished
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert [run["validation_accuracy"] for run in record["results"]["runs"]] == [r.validation_accuracy for r in runs]
    assert record["arguments"]["DemoArguments"]["num_grads"] == 5
    assert "--seeds=2" in record["command"]


def test_picture_is_a_png(finished):
    from PIL import Image

    with Image.open(finished[1] / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height > 300
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 20  # something is drawn


def test_table_is_computed_from_the_runs(finished):
    runs, _ = finished
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(demo.make_table(runs))
    rows = {line.split("│")[1].strip(): line for line in console.export_text().splitlines() if line.startswith("│")}
    assert set(rows) == {"M-FAC", "AdamW"}
    assert mean_and_deviation([run.train_loss for run in runs if run.optimizer == "adamw"], 3) in rows["AdamW"]
    accuracies = [100 * run.validation_accuracy for run in runs if run.optimizer == "mfac"]
    assert f"{mean_and_deviation(accuracies, 1)} %" in rows["M-FAC"]
    assert "none" in rows["AdamW"] and "none" not in rows["M-FAC"]


def test_missing_matplotlib_is_said_and_survived(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    demo.main([*TINY, "--steps=2", f"--output_dir={tmp_path}"])
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert (tmp_path / "results.json").exists() and not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("flag", ["steps", "seeds", "batch_size"])
def test_impossible_counts_are_refused(flag, tmp_path):
    with pytest.raises(ValueError, match=f"--{flag} is 0"):
        demo.main([*TINY, f"--{flag}=0", f"--output_dir={tmp_path / 'never'}"])
    assert not (tmp_path / "never").exists()


def test_both_learning_rates_reach_their_optimizers():
    args = demo.DemoArguments(mfac_lr=0.25, adamw_lr=0.125)
    model = demo.toy_model(hidden_size=8)
    assert demo.make_optimizer("mfac", model, args).param_groups[0]["lr"] == 0.25
    assert demo.make_optimizer("adamw", model, args).param_groups[0]["lr"] == 0.125
