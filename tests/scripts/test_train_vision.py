"""The training script: the reference's call, plans, resuming after a kill, sparse optimization."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import train_vision

from mfac_hf.models import ResNetCifar, read_checkpoint
from mfac_hf.training.arguments import parse_args
from mfac_hf.training.vision_run import VisionRun

FEW = ["--train_images", "192", "--batchsize", "64", "--ngrads", "4", "--progress", "false"]


def arguments(*flags):
    return parse_args(train_vision.TrainArguments, argv=["--model", "resnet20", *flags])[0]


@pytest.mark.parametrize(
    ("flags", "epochs", "first", "drops"),
    [
        (["--optim", "mfac"], 164, 1e-3, [82, 123]),
        (["--optim", "sgd"], 164, 0.1, [82, 123]),
        (["--optim", "adam", "--model", "wideresnet-40-2"], 200, 1e-3, [100, 150]),
        (["--optim", "mfac", "--model", "mobilenet"], 100, 1e-3, [50, 75]),
        (["--nepochs", "10", "--lr", "2"], 10, 2.0, [5, 8]),
        (["--nepochs", "10", "--drop_at", "3"], 10, 1e-3, [3]),
    ],
)
def test_epochs_and_learning_rates_are_the_references(flags, epochs, first, drops):
    plan = arguments(*flags).plan()
    assert len(plan) == epochs and plan[0] == first
    assert [e for e in range(1, epochs) if plan[e] < plan[e - 1]] == drops
    assert plan[-1] == pytest.approx(first * 0.1 ** len(drops))


def test_the_references_own_call_is_understood():
    call = "--dataset D --optim mfac --ngrads 512 --weightdecay .003 --batchsize 128 --save rn20-mfac.pth"
    args = arguments(*call.split())
    assert (args.dataset, args.ngrads, args.weightdecay, args.batchsize) == ("D", 512, 0.003, 128)
    assert (args.damping, args.momentum, args.save) == (1e-5, None, "rn20-mfac.pth")
    assert (args.metric, args.grad_decay, args.normalize) == ("identity", 0.0, "num_grads")
    assert arguments("--dataset_path", "D").dataset == "D"


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [["mfac"], ["mfac", "--metric", "adam"]], ids=" ".join)
def test_a_run_that_is_killed_and_resumed_ends_the_same(tmp_path, monkeypatch, optimizer):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "resnet20", "--optim", *optimizer, "--nepochs", "3", "--weightdecay", ".001", *FEW]
    whole = train_vision.main([*flags, "--save", "whole.pth"])
    epoch = VisionRun.train_epoch

    def dies(self, optimizer, number, *options):
        row = epoch(self, optimizer, number, *options)
        if number == 1:
            raise Killed
        return row

    with monkeypatch.context() as patch:
        patch.setattr(VisionRun, "train_epoch", dies)
        with pytest.raises(Killed):
            train_vision.main([*flags, "--save", "killed.pth"])
    resumed = train_vision.main([*flags, "--save", "killed.pth", "--resume"])
    drop_time = [{k: v for k, v in row.items() if k != "seconds"} for row in whole]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in resumed] == drop_time
    ends = [read_checkpoint(tmp_path / f"{name}.pth").weights for name in ("whole", "killed")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    with pytest.raises(ValueError, match="started with --nepochs 3, not 5"):
        train_vision.main([*flags, "--nepochs", "5", "--save", "killed.pth", "--resume"])


@pytest.mark.parametrize("optimizer", ["mfac", "sgd"])
def test_sparse_optimization_trains_the_survivors_alone(tmp_path, monkeypatch, optimizer):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = ResNetCifar(20, 10, 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "conv" in name:
                p.mul_(torch.rand_like(p) < 0.1)
    torch.save(model.state_dict(), "sparse.pth")
    flags = ["--model", "resnet20", "--checkpoint", "sparse.pth", "--sparse", "--nepochs", "1", "--optim", optimizer]
    train_vision.main([*flags, *FEW, "--save", "trained.pth"])
    trained = read_checkpoint("trained.pth")
    moved = 0
    for name, before in model.named_parameters():
        after = trained.weights[name]
        if "conv" in name:
            assert not after[before == 0].any()
            assert torch.equal(trained.mask[name], before != 0)
        moved += (after != before).sum().item()
    assert moved > 5_000
    assert trained.normalization == "half"
    if optimizer == "mfac":
        state = torch.load("trained.pth.state", weights_only=True)["optimizer"]
        dense = sum(p.numel() for p in model.parameters())
        windows = [v for s in state["state"].values() for k, v in s.items() if k == "window"]
        held = sum(window.numel() for window in windows) / 4
        assert 0 < held < 0.2 * dense  # 4 gradients of the tenth that is left, batch norms and classifier


def test_results_say_how_they_were_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_vision.main(["--model", "resnet20", "--optim", "sgd", "--nepochs", "1", *FEW, "--save", "out/model.pth"])
    content = json.loads(Path("out/model.json").read_text())
    assert content["arguments"]["train_images"] == 192 and content["versions"]["torch"] == version("torch")
    assert content["rows"][0].keys() == {"epoch", "lr", "loss", "seconds", "accuracy"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nepochs", "0"], "--nepochs 0: expected at least 1"),
        (["--nepochs", "3", "--drop_at", "1", "2", "3"], "with 3 epochs: expected rising epochs from 1 to 2"),
        (["--train_images", "5000"], "--train_images 5000: expected 1 to 1437"),
        (["--sparse"], "no weight of this model is zero"),
    ],
)
def test_flags_that_cannot_work_are_refused_before_anything_is_written(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        train_vision.main(["--model", "resnet20", *flags])
    assert not list(tmp_path.iterdir())


def test_results_are_those_that_studies_read(tmp_path):
    target = tmp_path / "results.json"
    flags = ["--model", "resnet20", "--optim", "adamw", "--nepochs", "2", *FEW, "--holdout", "100"]
    rows = train_vision.main([*flags, "--save", str(tmp_path / "m.pth"), "--results", str(target)])
    written = json.loads(target.read_text())
    results = written["results"]
    assert results["selection_value"] == results[results["selection_metric"]] == rows[-1]["accuracy"]
    assert results["eval_loss"] > 0 and results["train_runtime"] == sum(row["seconds"] for row in rows)
    curve = results["curve"]
    assert curve["step"] == [1, 2, 3, 4, 5, 6] and curve["cpu_seconds"] == sorted(curve["cpu_seconds"])
    # Three batches of 64 in an epoch, whose mean the row has.
    assert sum(curve["loss"][3:]) / 3 == pytest.approx(rows[-1]["loss"])
    assert written["threads"] == torch.get_num_threads() and written["peak_memory_gib"] > 0
