"""Gradual pruning that is killed without warning and resumed ends with the same bits, or says why it cannot."""

import copy
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from mfac_hf import MFACPruningCallback, SparsitySchedule
from mfac_hf.pruning import Distillation, MaskSet
from mfac_hf.pruning.trainer import callback as module
from mfac_hf.pruning.trainer.checkpoint import Progress
from tests.helpers.pruning_runs import differing, make_model, make_trainer, weights_of
from tests.helpers.ranks import forked

# Each pruning lies after a checkpoint of its own: those at 4, 8 and 12 see one, two and three of them.
SCHEDULE = SparsitySchedule(((3, 0.3), (7, 0.5), (10, 0.8)))
FAST = {"num_grads": 6, "block_size": 16, "recomputations": 2}

VARIANTS = {
    "adamw": {"optimizer": "adamw", "options": {"lr_cycle": 0.1}},
    "mfac": {"optimizer": "mfac", "options": {"gradients": "optimizer", "num_grads": 3}},
    "distillation": {"optimizer": "adamw", "options": {"distil": True}},
}


def make_pruning(schedule=SCHEDULE, distil=False, **options):
    distillation = Distillation(hardness=0.7) if distil else None
    return MFACPruningCallback(schedule, distillation=distillation, **{**FAST, **options})


def make_run(directory, variant, callbacks=(), **options):
    pruning = make_pruning(**{**VARIANTS[variant]["options"], **options})
    return make_trainer(directory, VARIANTS[variant]["optimizer"], [pruning, *callbacks]), pruning


class KillAt(TrainerCallback):
    """Ends the process as a power cut would, between two gradient accumulations of a step."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(directory, variant, step):
    make_run(directory, variant, [KillAt(step)])[0].train()


def train_until_killed_while_pruning(directory, variant, sparsity):
    """The weights have been pruned, but nothing of it reached the masks' hooks, the optimizer or the disk."""
    prune_to = module.prune_to

    def prune_and_die(model, masks, source, target, *args, **kwargs):
        report = prune_to(model, masks, source, target, *args, **kwargs)
        if target == sparsity:
            os.kill(os.getpid(), signal.SIGKILL)
        return report

    module.prune_to = prune_and_die
    make_run(directory, variant)[0].train()


@pytest.fixture
def one_thread():
    """Sums in the same order here and in the process that is killed."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "when"),
    [("adamw", "training"), ("mfac", "training"), ("mfac", "pruning"), ("distillation", "pruning")],
)
def test_killed_and_resumed_ends_with_the_same_bits(variant, when, tmp_path, one_thread):
    whole, pruned = make_run(tmp_path / "whole", variant)
    whole.train()
    directory = tmp_path / "killed"
    if when == "training":
        step = random.Random(variant).randrange(5, 16)
        work, argument = train_until_killed, step
    else:
        step, argument = 10, 0.8
        work = train_until_killed_while_pruning
    process = forked().Process(target=work, args=(directory, variant, argument))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    assert Path(get_last_checkpoint(directory)).name == f"checkpoint-{step // 4 * 4}"

    resumed, pruning = make_run(directory, variant)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 16
    assert differing(weights_of(whole.model), weights_of(resumed.model)) == []
    assert pruning.masks == pruned.masks and pruning.sparsity == pytest.approx(0.8, abs=1e-3)
    assert len(pruning.reports) == 3
    assert [r.sparsities for r in pruning.reports] == [r.sparsities for r in pruned.reports]
    if VARIANTS[variant]["options"].get("distil"):
        teachers = [weights_of(p.distillation.teacher) for p in (pruned, pruning)]
        assert differing(*teachers) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints at 4, 8, 12 and 16; its teacher lies in its output directory."""
    directory = tmp_path_factory.mktemp("finished")
    trainer, pruning = make_run(directory, "distillation")
    trainer.train()
    return directory, weights_of(trainer.model), pruning.masks


@pytest.mark.slow
def test_resumed_into_another_output_directory(finished, tmp_path, caplog):
    directory, weights, masks = finished
    checkpoint = directory / "checkpoint-8"
    trainer, _ = make_run(tmp_path, "distillation")
    with pytest.raises(FileNotFoundError, match=r"resumes at step 8, but there is no .*resume_from=DIRECTORY"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    trainer, pruning = make_run(tmp_path, "distillation", resume_from=checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert differing(weights, weights_of(trainer.model)) == [] and pruning.masks == masks
    assert (tmp_path / "teacher.safetensors").is_file(), "the teacher comes along for the next resume"
    assert "go on by" not in caplog.text
    trainer, _ = make_run(tmp_path / "other", "distillation", resume_from=checkpoint, fisher="empirical")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert f"prunings in {checkpoint} were by the scaled Fisher, and go on by the empirical one" in caplog.text


def test_the_training_arguments_may_name_the_checkpoint(finished, tmp_path):
    directory, weights, _ = finished
    checkpoint = str(directory / "checkpoint-12")
    trainer = make_trainer(tmp_path, "adamw", [make_pruning(distil=True)], resume_from_checkpoint=checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert differing(weights, weights_of(trainer.model)) == []


class CutOff(TrainerCallback):
    """Ends a run while Trainer saves: older checkpoints are gone, callbacks after this one never hear of it."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class StopAt(TrainerCallback):
    """Ends a run at the beginning of a step."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 8], ids=["before the first pruning", "after two"])
def test_a_checkpoint_that_was_cut_off_while_being_saved_resumes(step, tmp_path, one_thread, caplog):
    schedule = SparsitySchedule(((5, 0.3), (7, 0.5))) if step == 4 else SCHEDULE
    whole, pruned = make_run(tmp_path / "whole", "adamw", schedule=schedule)
    whole.train()
    assert not (tmp_path / "whole" / "_pruning").exists(), "nothing is left beside checkpoints that are all whole"
    trainer = make_trainer(tmp_path, "adamw", [CutOff(step), make_pruning(schedule, lr_cycle=0.1)], save_total_limit=1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    checkpoint = tmp_path / f"checkpoint-{step}"
    assert list(tmp_path.glob("checkpoint-*")) == [checkpoint] and not (checkpoint / "pruning.json").exists()
    for cut in (None, CutOff(step + 4)):  # the state stays in reach however often the resumed run ends
        callbacks = [make_pruning(schedule, lr_cycle=0.1)]
        resumed = make_trainer(tmp_path, "adamw", [cut, *callbacks] if cut else callbacks, max_steps=16)
        if cut is None:
            resumed.add_callback(StopAt(step + 1))
        with pytest.raises(KeyboardInterrupt):
            resumed.train(resume_from_checkpoint=str(checkpoint))
    assert "was cut off while being saved" in caplog.text
    resumed, pruning = make_run(tmp_path, "adamw", schedule=schedule)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step + 4}"))
    assert differing(weights_of(whole.model), weights_of(resumed.model)) == []
    assert pruning.masks == pruned.masks and len(pruning.reports) == len(schedule.points)


def test_masks_of_a_later_pruning_do_not_serve_a_checkpoint(finished, tmp_path):
    shutil.copytree(finished[0] / "checkpoint-8", tmp_path / "checkpoint-8")
    shutil.copytree(finished[0] / "checkpoint-12", tmp_path / "_pruning")  # pruned last at step 10
    (tmp_path / "checkpoint-8" / "pruning.json").unlink()
    trainer, _ = make_run(tmp_path, "distillation")
    with pytest.raises(FileNotFoundError, match="If it was cut off"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


PROGRESS = {
    "schedule": {"points": [[3, 0.3], [7, 0.5]], "unit": "step"},
    "target": 0.3,
    "teacher": None,
    "reports": [{"options": {}, "num_weights": 4, "sparsity_before": 0.0, "sparsity": 0.3, "sparsities": {}}],
    "weights": "",
    "step": 3,
}


@pytest.mark.slow
@given(
    path=st.sampled_from(
        [(key,) for key in PROGRESS] + [("schedule", "points"), ("schedule", "points", 0, 1), ("reports", 0)]
    ),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
        max_leaves=6,
    ),
)
@settings(max_examples=100, deadline=None)
def test_whatever_a_record_holds_it_is_read_or_refused_by_name(path, value, tmp_path_factory):
    file = tmp_path_factory.mktemp("record") / "pruning.json"
    content = copy.deepcopy(PROGRESS)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(content))
    try:
        progress = Progress.read(file)
    except ValueError as error:
        assert str(file) in str(error)
    else:
        assert progress.sparsities().points


def test_a_record_of_an_earlier_or_later_version_is_read(tmp_path):
    file = tmp_path / "pruning.json"
    file.write_text(
        json.dumps({key: PROGRESS[key] for key in ("schedule", "target", "teacher", "reports")} | {"new": 1})
    )
    assert Progress.read(file) == Progress(**PROGRESS | {"step": 0})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "mfac", "fisher": "scaled"}, "scaled"),
        ({"method": "mfac"}, "empirical"),  # older than the scaled Fisher
        ({"method": "magnitude", "fisher": "scaled"}, None),
        ({}, None),
        (3, None),
    ],
)
def test_the_fisher_of_a_record(options, expected):
    report = PROGRESS["reports"][0] | {"options": options}
    assert Progress(**PROGRESS | {"reports": [PROGRESS["reports"][0], report]}).fisher() == expected
    assert Progress(**PROGRESS | {"reports": []}).fisher() is None


def spoil_nothing(folder):
    pass


def spoil_masks(folder):
    masks = MaskSet.load(folder)
    name = next(iter(masks))
    masks.update({name: torch.zeros_like(masks[name])})
    masks.save(folder)


def spoil_weights(folder):
    progress = json.loads((folder / "pruning.json").read_text())
    (folder / "pruning.json").write_text(json.dumps({**progress, "weights": "of another run"}))


def spoil_teacher(folder):
    progress = json.loads((folder / "pruning.json").read_text())
    (folder / "pruning.json").write_text(json.dumps({**progress, "teacher": None}))


def spoil_model(folder):
    make_model(seed=5).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "options", "error", "message"),
    [
        (lambda folder: (folder / "pruning.json").unlink(), {}, FileNotFoundError, "If it was cut off"),
        (lambda folder: (folder / "masks.safetensors").unlink(), {}, FileNotFoundError, "no masks at"),
        (spoil_masks, {}, ValueError, "should be pruned are not zero in bert.encoder"),
        (spoil_model, {}, ValueError, "should be pruned are not zero in bert.encoder"),
        *[
            (
                lambda folder, text=text: (folder / "pruning.json").write_text(text),
                {},
                ValueError,
                "pruning.json(:| holds| is) ",
            )
            for text in ("{", "[]", "{}", '{"schedule": 1, "target": 0, "teacher": null, "reports": []}')
        ],
        (spoil_weights, {}, ValueError, "is not the one in .*checkpoint-8; name the checkpoint"),
        (spoil_nothing, {"schedule": SparsitySchedule(((3, 0.3), (7, 0.6)))}, ValueError, "follows the schedule"),
        (spoil_nothing, {"targets": ["query"]}, ValueError, "resume with the same targets"),
        (spoil_teacher, {}, ValueError, "weights were pruned before distillation was asked for"),
        (lambda folder: (folder.parent / "teacher.safetensors").unlink(), {}, FileNotFoundError, "no teacher at"),
        (
            lambda folder: (folder.parent / "teacher.safetensors").write_bytes(b"none"),
            {},
            ValueError,
            "teacher.safetensors is damaged",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(spoil, options, error, message, finished, tmp_path):
    shutil.copytree(finished[0] / "checkpoint-8", tmp_path / "checkpoint-8")
    shutil.copy(finished[0] / "teacher.safetensors", tmp_path)
    spoil(tmp_path / "checkpoint-8")
    trainer, _ = make_run(tmp_path, "distillation", **options)
    with pytest.raises(error, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)


def make_vit():
    config = ViTConfig(image_size=8, patch_size=4, hidden_dropout_prob=0.1, **SIZES)
    return ViTForImageClassification(config), [
        {"pixel_values": torch.full((3, 8, 8), i / 64), "labels": i % 2} for i in range(64)
    ]


def make_mixtral():
    config = MixtralConfig(vocab_size=32, num_key_value_heads=1, num_local_experts=2, **SIZES)
    ids = [(torch.arange(8) * i) % 32 for i in range(64)]
    return MixtralForCausalLM(config), [{"input_ids": each, "labels": each} for each in ids]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "options"), [(make_vit, {"method": "magnitude"}), (make_mixtral, FAST)], ids=["vit", "mixtral"]
)
def test_models_with_other_names_on_disk_resume(make, options, tmp_path):
    """Trainer by itself leaves out each weight whose name on disk is not the one in memory."""

    def run(seed):
        set_seed(seed)
        model, data = make()
        pruning = MFACPruningCallback(SCHEDULE, **options)
        trainer = make_trainer(tmp_path, callbacks=[pruning], model=model, max_steps=12)
        trainer.train_dataset = data
        return trainer

    trainer = run(0)
    trainer.train()
    expected = weights_of(trainer.model)
    resumed = run(1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert differing(expected, weights_of(resumed.model)) == []
