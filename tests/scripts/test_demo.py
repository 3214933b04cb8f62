"""The demonstration, end to end, with a tiny model and very few steps."""

import json
import math
import sys

import demo
import pytest

from mfac_hf import load_sparse
from mfac_hf.pruning import PruningOptions

TINY = ["--steps=13", "--batch_size=16", "--prune_steps=5", "--num_validation=16", "--hidden_size=8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return demo.main([*TINY, "--seeds=2", f"--output_dir={folder}"]), folder


@pytest.mark.slow
def test_every_seed_has_both_optimizers_and_both_methods(finished):
    results, _ = finished
    for runs, names in (("trainings", ("adamw", "mfac")), ("prunings", ("magnitude", "mfac"))):
        assert [(run["seed"], run["name"]) for run in results[runs]] == [(s, name) for s in (0, 1) for name in names]
    for run in results["trainings"] + results["prunings"]:
        assert all(math.isfinite(loss) and loss > 0 for loss in [run["train_loss"], *run["curve"]["loss"]])
        assert run["cpu_seconds"] > 0
        assert run["accuracies"][-1][2] == run["validation_accuracy"]
        assert all(0 <= accuracy <= 1 for _, _, accuracy in run["accuracies"])


def test_both_optimizers_start_alike_and_then_part(finished):
    adamw, mfac = (run["curve"]["loss"] for run in finished[0]["trainings"][:2])
    assert adamw[0] == mfac[0]  # before any step: same weights, same batch
    assert adamw[-1] != mfac[-1]


def test_both_methods_start_alike_and_prune_on_the_same_schedule(finished):
    magnitude, mfac = finished[0]["prunings"][:2]
    assert magnitude["curve"]["loss"][0] == mfac["curve"]["loss"][0]  # the first pruning comes after it
    assert magnitude["curve"]["loss"][-1] != mfac["curve"]["loss"][-1]
    cubic = [0.8 * (1 - (1 - step / 4) ** 3) for step in range(5)]
    for run in (magnitude, mfac):
        assert [step for step, _, _ in run["accuracies"]] == [1, 2, 3, 4, 5]
        assert [sparsity for _, sparsity, _ in run["accuracies"]] == pytest.approx(cubic)


def test_the_saved_model_has_the_sparsity_and_the_sizes_that_are_told(finished):
    results, folder = finished
    files, saved = results["files"], folder / "model"
    assert files["sparse"] == (saved / "sparse.safetensors").stat().st_size
    assert files["dense"] == (saved / "model.safetensors").stat().st_size
    assert files["largest_difference"] == 0
    encoder = [w for name, w in load_sparse(saved).items() if "encoder" in name and w.ndim == 2]
    share = sum(int((w == 0).sum()) for w in encoder) / sum(w.numel() for w in encoder)
    assert share == pytest.approx(0.8, abs=1e-3)


def test_results_file_holds_all_and_how_to_repeat_it(finished):
    results, folder = finished
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert record["results"] == json.loads(json.dumps(results))
    assert record["arguments"]["DemoArguments"]["prune_steps"] == 5
    assert "--seeds=2" in record["command"]


def test_picture_is_a_png(finished):
    from PIL import Image

    with Image.open(finished[1] / "demo.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height > 300
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 20  # something is drawn


@pytest.mark.slow
def test_missing_matplotlib_is_said_and_survived(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    demo.main([*TINY, "--steps=2", "--seeds=1", f"--output_dir={tmp_path}"])
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert (tmp_path / "results.json").exists() and not (tmp_path / "demo.png").exists()


@pytest.mark.parametrize(
    ("flag", "least"), [("steps", 1), ("seeds", 1), ("batch_size", 1), ("num_validation", 1), ("prune_steps", 5)]
)
def test_impossible_counts_are_refused(flag, least, tmp_path):
    with pytest.raises(ValueError, match=f"--{flag} is {least - 1}; expected at least {least}"):
        demo.main([*TINY, f"--{flag}={least - 1}", f"--output_dir={tmp_path / 'never'}"])
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("sparsity", [0, 1, math.nan])
def test_impossible_sparsities_are_refused(sparsity):
    with pytest.raises(ValueError, match=f"--sparsity is {float(sparsity)}; expected a share between 0 and 1"):
        demo.DemoArguments(sparsity=float(sparsity))


def test_too_few_sentences_for_the_pruner_are_refused_before_training():
    enough = PruningOptions.num_grads // 8
    demo.DemoArguments(batch_size=8, prune_steps=enough)
    with pytest.raises(ValueError, match=f"--prune_steps {enough - 1} x --batch_size 8 are .* sentences"):
        demo.DemoArguments(batch_size=8, prune_steps=enough - 1)
