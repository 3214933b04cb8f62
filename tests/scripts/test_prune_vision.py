"""The pruning script: the reference's call, one-shot and gradual runs, pages, resuming, refusals."""

import json
from pathlib import Path

import prune_vision
import pytest
import torch
import train_vision
from accelerate.state import AcceleratorState
from torch.nn import functional as F

from mfac_hf.models import create_model, read_checkpoint
from mfac_hf.storage import load_tensors, save_tensors
from mfac_hf.training.arguments import parse_args
from mfac_hf.training.vision_arguments import build_run
from mfac_hf.training.vision_run import VisionRun

QUIET = ["--progress", "false", "--bn_images", "128"]
CALL = """--model resnet20 --checkpoint F --data DATASET --nepochs 10 --optim sgd --lr .005 --momentum .9
    --batchsize 128 --drop_at 7 9 --pruner mfac --blocksize 128 --nrecomps 16 --ngrads_schedule 64
    --sparsities .5 .75 .875 --prun_every 2 --prun_lrs .005 .0005 --prefix experiments/rn20-test/model"""


def arguments(*flags):
    return parse_args(prune_vision.PruneArguments, argv=["--model", "resnet20", *flags])[0]


def test_the_references_own_call_gives_its_plan():
    args = arguments(*CALL.split()[2:])
    assert args.steps() == ((0, 0.5), (2, 0.75), (4, 0.875))
    assert args.plan() == pytest.approx([0.005, 0.0005, 0.005, 0.0005, *[0.005] * 3, 0.0005, 0.0005, 0.00005])
    options = args.options(2, 3)
    assert (options.num_grads, options.grad_batch_size, options.recomputations) == (64, 32, 16)
    assert (options.selection, options.update, options.fisher) == ("greedy", "joint", "scaled")
    assert options.damping is args.prundamp is None
    args = arguments(*CALL.split()[2:], "--fisher", "empirical", "--fisher_floor", ".01")
    options = args.options(2, 3)
    assert (options.fisher, options.fisher_floor, options.damping) == ("empirical", 0.01, 1e-5)


def test_steps_down_the_loss_and_batch_norms_are_the_options():
    args = arguments(*CALL.split()[2:], "--first_order", "--batch_norm_samples", "96")
    options = args.options(0, 3)
    assert (options.first_order, options.batch_norm_samples, options.loss_samples) == (True, 96, 1024)


def test_drops_are_counted_over_all_epochs_and_rates_cycle_from_each_pruning_step():
    flags = "--nepochs 9 --lr 1 --sparsities .1 .2 .3 --prun_every 3 --prun_lrs 5 4 3 --drop_at 4 8 --drop_by .5"
    assert arguments(*flags.split()).plan() == [5, 4, 3, 5, 4, 3, 0.5, 0.5, 0.25]
    flags = "--nepochs 4 --lr 1 --sparsities .1 .2 --prun_every 2 --prun_lrs 7"
    assert arguments(*flags.split()).plan() == [7, 7, 1, 1]


def test_gradients_by_step():
    args = arguments(*"--nepochs 0 --sparsities .1 .2 --ngrads_schedule 8 32 --pruner mag --nrecomps 3".split())
    assert [args.options(step, 2).num_grads for step in range(2)] == [8, 32]
    assert args.options(0, 2).method == "magnitude"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A ResNet-20 that has learned the digits a little."""
    path = tmp_path_factory.mktemp("dense") / "dense.pth"
    flags = ["--optim", "sgd", "--nepochs", "4", "--batchsize", "64", "--progress", "false", "--save", str(path)]
    rows = train_vision.main(["--model", "resnet20", *flags])
    assert rows[-1]["accuracy"] > 0.8
    return str(path)


@pytest.fixture
def prune(dense, tmp_path, monkeypatch):
    """Runs the script on the digits; returns its rows."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, prefix="out/model"):
        # small blocks: the trace through one costs as the square of its size, for each weight
        small = "--prun_batchsize 4 --ngrads_schedule 32 --nrecomps 2 --blocksize 32".split()
        call = ["--model", "resnet20", "--checkpoint", dense, "--prefix", prefix, *small, *QUIET, *flags]
        return prune_vision.main(call)

    return run


@pytest.mark.slow
def test_one_shot_reaches_each_sparsity_and_beats_magnitude(prune):
    ours = prune("--nepochs", "0", "--sparsities", ".7", ".9")
    theirs = prune("--nepochs", "0", "--sparsities", ".7", ".9", "--pruner", "mag", prefix="out/mag")
    assert [row["event"] for row in ours] == ["initial", "prune", "prune"]
    assert [row["sparsity"] for row in ours] == pytest.approx([0, 0.7, 0.9], abs=1e-5)
    assert ours[0]["accuracy"] == theirs[0]["accuracy"] > 0.8
    # seen: 0.93 and 0.1; the margin is a fraction of that
    assert ours[2]["accuracy"] > theirs[2]["accuracy"] + 0.3
    checkpoint = read_checkpoint("out/model-prune-900.pth")
    zeros = sum((checkpoint.weights[name] == 0).sum().item() for name in checkpoint.mask)
    total = sum(keep.numel() for keep in checkpoint.mask.values())
    assert zeros >= round(0.9 * total)
    assert all(not checkpoint.weights[name][~keep].any() for name, keep in checkpoint.mask.items())
    assert checkpoint.normalization == "half"
    assert Path("out/model.png").stat().st_size > 5_000
    assert [r["sparsity"] for r in json.loads(Path("out/model.json").read_text())["rows"]] == [
        row["sparsity"] for row in ours
    ]


@pytest.mark.slow
def test_a_pruned_model_is_pruned_further_and_trained_with_mfac(prune, dense):
    prune("--nepochs", "0", "--sparsities", ".5", "--pruner", "mag")
    rows = prune(
        *("--checkpoint", "out/model-prune-500.pth", "--nepochs", "1", "--sparsities", ".8", "--optim", "mfac"),
        *("--ngrads", "4", "--momentum", "0", "--train_images", "192", "--nrecomps", "1"),
        prefix="more/model",
    )
    assert rows[0]["sparsity"] == pytest.approx(0.5, abs=1e-5)
    first, last = read_checkpoint("out/model-prune-500.pth"), read_checkpoint("more/model-last.pth")
    for name, keep in first.mask.items():
        assert not (last.mask[name] & ~keep).any() and not last.weights[name][~last.mask[name]].any()
    assert sum(int(keep.sum()) for keep in last.mask.values()) == pytest.approx(
        0.2 * sum(keep.numel() for keep in last.mask.values()), abs=1
    )


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_gradual_run_that_is_killed_and_resumed_ends_the_same(prune, monkeypatch):
    flags = ["--nepochs", "3", "--sparsities", ".5", ".8", "--prun_every", "1", "--train_images", "192"]
    flags += ["--distillation_hardness", ".9"]
    whole = prune(*flags)
    epoch = VisionRun.train_epoch

    def dies(self, optimizer, number, *args, **kwargs):
        if number == 1:  # after the second pruning step
            raise Killed
        return epoch(self, optimizer, number, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(VisionRun, "train_epoch", dies)
        with pytest.raises(Killed):
            prune(*flags, prefix="killed/model")
    resumed = prune(*flags, "--resume", prefix="killed/model")

    def timeless(rows):
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    assert [row["event"] for row in whole] == ["initial", "prune", "epoch", "prune", "epoch", "epoch"]
    assert timeless(resumed) == timeless(whole)
    ends = [read_checkpoint(f"{folder}/model-last.pth") for folder in ("out", "killed")]
    assert all(torch.equal(ends[0].weights[key], ends[1].weights[key]) for key in ends[0].weights)
    assert all(torch.equal(ends[0].mask[key], ends[1].mask[key]) for key in ends[0].mask)


@pytest.mark.slow
def test_the_dense_model_is_the_teacher(prune, dense, monkeypatch):
    teacher = create_model("resnet20", num_classes=10, in_channels=1, weights=read_checkpoint(dense).weights).eval()
    distil, seen = prune_vision.Pruner.distil, []

    def checked(self, images, logits, loss):
        found = distil(self, images, logits, loss)
        with torch.no_grad():
            wanted, had = (F.log_softmax(z / 3, 1) for z in (teacher(images), logits))
        term = 9 * (wanted.exp() * (wanted - had)).sum(1).mean()
        torch.testing.assert_close(found, 0.25 * loss + 0.75 * term)
        seen.append(term.item())
        return found

    monkeypatch.setattr(prune_vision.Pruner, "distil", checked)
    flags = ["--nepochs", "1", "--sparsities", ".9", "--pruner", "mag", "--train_images", "128"]
    rows = prune(*flags, "--distillation_hardness", ".75", "--distillation_temperature", "3")
    assert len(seen) == 1 and seen[0] > 0.1
    assert rows[-1]["event"] == "epoch"


def test_mixed_precision_runs_the_passes_of_training_and_pruning():
    dtypes = []
    for precision in ("bf16", "no"):
        AcceleratorState._reset_state()  # one for the whole process otherwise
        run, _ = build_run(arguments("--mixed_precision", precision))
        run.bare_model.conv1.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        images = next(iter(run.train_loader))
        assert run.logits(run.model, images).dtype == torch.float32
        run.loss(run.bare_model, images)
    assert dtypes == [torch.bfloat16] * 2 + [torch.float32] * 2


@pytest.mark.slow
def test_a_state_without_a_fisher_is_one_of_the_empirical(prune):
    flags = ["--nepochs", "0", "--sparsities", ".5", "--nrecomps", "1"]
    rows = prune(*flags, "--fisher", "empirical")
    state = load_tensors("out/model.state")
    newer = ("fisher", "fisher_floor", "first_order", "batch_norm_samples", "mixed_precision")
    for name in (*newer, "distillation_hardness", "distillation_temperature"):
        del state["arguments"][name]
    save_tensors("out/model.state", state)
    assert prune(*flags, "--fisher", "empirical", "--resume") == rows
    with pytest.raises(ValueError, match="started with --fisher empirical, not scaled"):
        prune(*flags, "--resume")


@pytest.mark.slow
def test_the_full_inverse_prunes_the_same_weights_in_one_page_and_in_eight(prune):
    flags = ["--nepochs", "0", "--sparsities", ".6", "--blocksize", "-1", "--ngrads_schedule", "16"]
    for pages in ("1", "8"):
        prune(*flags, "--pages", pages, prefix=f"pages{pages}/model")
    one, eight = (read_checkpoint(f"pages{pages}/model-prune-600.pth") for pages in (1, 8))
    assert all(torch.equal(one.mask[name], eight.mask[name]) for name in one.mask)
    assert all(torch.allclose(one.weights[k], eight.weights[k], rtol=1e-4, atol=1e-6) for k in one.mask)


@pytest.mark.slow
def test_a_few_blocks_at_a_time_prune_the_same_weights(prune):
    flags = ["--nepochs", "0", "--sparsities", ".5", "--nrecomps", "1", "--ngrads_schedule", "8"]
    prune(*flags)
    rows = prune(*flags, "--perbatch", "1", prefix="few/model")
    assert rows[1]["groups"] > 3
    all_at_once, few = (read_checkpoint(f"{folder}/model-prune-500.pth") for folder in ("out", "few"))
    assert all(torch.equal(all_at_once.mask[name], few.mask[name]) for name in few.mask)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--nepochs 0 --sparsities .5 --bn_images 0", "--bn_images 0: expected at least 1"),
        ("--nepochs 0 --sparsities .5 --perbatch 0", "--perbatch 0: expected at least 1"),
        ("--sparsities .5", "--nepochs None: expected a number of epochs"),
        ("--nepochs 1", "--sparsities is missing"),
        ("--nepochs 4 --sparsities .5 .4", "falls from 0.5 to 0.4"),
        ("--nepochs 4 --sparsities .5 1.0", "sparsity 1.0 at epoch 1; expected a number in"),
        ("--nepochs 2 --sparsities .5 .6 .7", "the pruning step to 0.7 would come before epoch 2, and there are 2"),
        ("--nepochs 2 --sparsities .5 --drop_at 1 2 3", "with 2 epochs: expected rising epochs from 1 to 1"),
        ("--nepochs 0 --sparsities .5 .6 --ngrads_schedule 4 4 4", "has 3 numbers for 2 pruning steps"),
        ("--nepochs 0 --sparsities .5 --blocksize 0", "--blocksize 0: expected at least 1, or -1"),
        ("--nepochs 0 --sparsities .5 --prundamp 0", "damping is 0.0"),
        ("--nepochs 1 --sparsities .5 --distillation_hardness 1.5", "--distillation_hardness 1.5: expected 0 to 1"),
        ("--nepochs 1 --sparsities .5 --distillation_temperature 0", "--distillation_temperature 0.0: expected above"),
        ("--nepochs 0 --sparsities .5 --fisher_floor 0", "fisher_floor is 0.0"),
        ("--nepochs 0 --sparsities .5 --prun_batchsize 0", "grad_batch_size is 0"),
        ("--nepochs 0 --sparsities .5 --ngrads_schedule 1000", "1437 examples give 359"),
        ("--nepochs 0 --sparsities .99 --adjust_sparsities", "of all parameters cannot be pruned"),
        ("--nepochs 0 --sparsities .5 --model resnet32", "keys are missing, first 'layer1.3.conv1.weight'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(prune, flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        prune(*flags.split())
    assert not list(tmp_path.iterdir())


def test_sparsities_of_the_whole_model(prune):
    rows = prune("--nepochs", "0", "--sparsities", ".5", "--adjust_sparsities", "--pruner", "mag")
    weights = read_checkpoint(next(Path("out").glob("model-prune-*.pth")))
    parameters = [name for name in weights.weights if "running" not in name and "num_batches" not in name]
    zeros = sum(int((weights.weights[name] == 0).sum()) for name in weights.mask)
    assert zeros / sum(weights.weights[name].numel() for name in parameters) == pytest.approx(0.5, abs=1e-4)
    assert rows[1]["sparsity"] > 0.5
