"""What a kill or a full disk leaves unfinished is passed over; older checkpoints stay until the new one is whole."""

import json
import resource
import shutil

import pytest
from transformers import TrainerCallback

from mfac_hf import MFACPruningCallback, SparsitySchedule
from mfac_hf.checkpoints import LIST_NAME, WholeCheckpoints, last_whole_checkpoint
from tests.helpers.pruning_runs import differing, make_trainer, weights_of

SCHEDULE = SparsitySchedule(((3, 0.3), (10, 0.6)))


def make_run(directory, *callbacks, **options):
    """16 steps with two prunings, saved every four."""
    pruning = MFACPruningCallback(SCHEDULE, num_grads=6, block_size=16, recomputations=1)
    trainer = make_trainer(directory, "mfac", [pruning, *callbacks], **options)
    WholeCheckpoints.attach(trainer)
    return trainer


def names(directory):
    return sorted(path.name for path in directory.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An unbroken run: its directory with the checkpoints at 4, 8, 12 and 16, and its weights."""
    directory = tmp_path_factory.mktemp("finished")
    trainer = make_run(directory)
    trainer.train()
    return directory, weights_of(trainer.model)


def cut(name, keep=0.5):
    """Cut a file off."""

    def spoil(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))])

    return spoil


def remove(name):
    return lambda folder: (folder / name).unlink()


def flip(folder):
    """A bit of the tensors in the archive, whose list of parts stays."""
    content = bytearray((folder / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 4
    (folder / "optimizer.pt").write_bytes(bytes(content))


@pytest.mark.slow
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (cut("model.safetensors"), "model.safetensors"),
        (cut("optimizer.pt", 0.99), "optimizer.pt"),
        (cut("rng_state.pth"), "rng_state.pth"),
        (cut("trainer_state.json"), "trainer_state.json"),
        (remove("trainer_state.json"), "trainer_state.json"),
        (cut("pruning.json"), "pruning.json"),
    ],
)
def test_a_checkpoint_that_was_cut_off_is_passed_over(spoil, reason, listed, finished, tmp_path, caplog):
    for step in (8, 12):
        shutil.copytree(finished[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
        if not listed:
            (tmp_path / f"checkpoint-{step}" / LIST_NAME).unlink()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")
    spoil(tmp_path / "checkpoint-12")
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    assert "checkpoint-12 was cut off while being saved" in caplog.text and reason in caplog.text
    spoil(tmp_path / "checkpoint-8")
    assert last_whole_checkpoint(tmp_path) is None and last_whole_checkpoint(tmp_path / "none") is None


def test_without_a_list_contents_and_the_random_state_of_each_rank_count(finished, tmp_path):
    folder = tmp_path / "checkpoint-12"
    shutil.copytree(finished[0] / "checkpoint-12", folder)
    (folder / LIST_NAME).unlink()
    flip(folder)
    assert last_whole_checkpoint(tmp_path) is None
    shutil.copy(finished[0] / "checkpoint-12" / "optimizer.pt", folder)
    assert last_whole_checkpoint(tmp_path, ranks=2) is not None, "of one process: nothing is missing"
    shutil.move(folder / "rng_state.pth", folder / "rng_state_0.pth")
    assert last_whole_checkpoint(tmp_path) is not None and last_whole_checkpoint(tmp_path, ranks=2) is None


class Stop(TrainerCallback):
    """Ends a run while it is saving, before the callback that keeps checkpoints."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_no_older_checkpoint_goes_before_the_new_one_is_whole(finished, tmp_path):
    trainer = make_run(tmp_path, Stop(12), save_total_limit=1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-12", "checkpoint-8"]
    (tmp_path / "checkpoint-12" / "trainer_state.json").unlink()  # as if it had been cut off earlier
    trainer = make_run(tmp_path, save_total_limit=1)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(tmp_path))
    assert trainer.state.global_step == 16 and names(tmp_path) == ["checkpoint-16"]
    assert differing(finished[1], weights_of(trainer.model)) == []
    assert trainer.args.save_total_limit == 1
    listed = json.loads((tmp_path / "checkpoint-16" / LIST_NAME).read_text())
    assert {"model.safetensors", "optimizer.pt", "masks.safetensors", "pruning.json"} <= listed.keys()


@pytest.mark.slow
def test_the_best_checkpoint_stays(tmp_path):
    trainer = make_trainer(
        tmp_path, save_total_limit=2, load_best_model_at_end=True, eval_strategy="steps", eval_steps=4,
        metric_for_best_model="worst", greater_is_better=True, save_steps=4,
    )  # fmt: skip
    values = iter((1.0, 4.0, 2.0, 3.0))
    trainer.compute_metrics = lambda prediction: {"worst": next(values)}
    WholeCheckpoints.attach(trainer)
    trainer.train()
    assert names(tmp_path) == ["checkpoint-16", "checkpoint-8"]


class FullDisk(TrainerCallback):
    """From a step on, no file may become longer than this; Python gets the error of a full disk's kind."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1000, 40_000], ids=["model", "optimizer"])
def test_a_full_disk_costs_no_older_checkpoint(size, finished, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(Exception, match="(?i)file too large|unexpected pos|PytorchStreamWriter|os error 27"):
            make_run(tmp_path, FullDisk(12, size), save_total_limit=1).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    trainer = make_run(tmp_path, save_total_limit=1)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(tmp_path))
    assert differing(finished[1], weights_of(trainer.model)) == []


def test_a_checkpoint_that_is_being_overwritten_is_none(finished, tmp_path):
    shutil.copytree(finished[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    shutil.copytree(finished[0] / "checkpoint-8", tmp_path / "checkpoint-8")
    seen = []
    trainer = make_run(tmp_path, max_steps=8)
    save = trainer._save_checkpoint
    trainer._save_checkpoint = lambda *args, **kwargs: (seen.append(last_whole_checkpoint(tmp_path)), save(*args))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen == [str(tmp_path / "checkpoint-4")]
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")


@pytest.mark.slow
def test_a_run_that_was_over_moves_no_weight(tmp_path):
    """By itself Trainer takes one step more."""
    options = {"max_steps": 6, "save_steps": 3, "lr_scheduler_type": "constant", "warmup_steps": 0}
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-6")):
        trainer = make_trainer(tmp_path, "sgd", **options)
        WholeCheckpoints.attach(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append(weights_of(trainer.model))
    assert differing(*ends) == []
    alone = make_trainer(tmp_path, "sgd", **options)
    alone.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert differing(ends[0], weights_of(alone.model)), "Trainer has mended it: the callback need not"
