"""Gradual pruning in an unmodified Trainer: what is pruned is zero, and everything else is as it would have been."""

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from mfac_hf import MFAC, MFACPruningCallback, SparsitySchedule
from mfac_hf.pruning import Distillation, MaskSet
from tests.helpers.pruning_runs import OPTIMIZERS, differing, make_data, make_model, make_trainer, weights_of

FAST = {"num_grads": 8, "block_size": 16, "recomputations": 2}
SCHEDULE = SparsitySchedule(((3, 0.3), (7, 0.5), (12, 0.8)))


class Witness(TrainerCallback):
    """Looks at the model wherever somebody else could, and counts what it saw."""

    def __init__(self, pruning):
        self.pruning = pruning
        self.sparsities, self.seen = [], {"evaluation": 0, "checkpoint": 0, "step": 0}

    def look(self, where, weights):
        masks = self.pruning.masks
        assert all(not weights[name][~keep].any() for name, keep in masks.items())
        found = sum(int((weights[name] == 0).sum()) for name in masks)
        assert found == round(self.sparsities[-1] * masks.numel), "no kept weight is zero by chance"
        self.seen[where] += 1

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert all(not gradients[name][~keep].any() for name, keep in self.pruning.masks.items()), (
            "clipping sees these"
        )

    def on_step_end(self, args, state, control, model, **kwargs):
        self.sparsities.append(self.pruning.sparsity)
        self.look("step", model.state_dict())

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.look("evaluation", model.state_dict())

    def on_save(self, args, state, control, model, **kwargs):
        folder = f"{args.output_dir}/checkpoint-{state.global_step}"
        self.look("checkpoint", load_file(f"{folder}/model.safetensors"))
        assert MaskSet.load(folder) == self.pruning.masks


def expected_sparsities(schedule, numel, steps=16):
    return [round(schedule.sparsity_at(step) * numel) / numel for step in range(steps)]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_accumulation_steps": 1}], ids=["fp32", "bf16"])
def test_what_is_pruned_is_zero_at_every_step_evaluation_and_save(optimizer, options, tmp_path):
    pruning = MFACPruningCallback(SCHEDULE, **FAST)
    witness = Witness(pruning)
    trainer = make_trainer(tmp_path, optimizer, eval_strategy="steps", eval_steps=3, save_steps=3, **options)
    before = weights_of(trainer.model)
    trainer.add_callback(pruning)
    trainer.add_callback(witness)
    trainer.train()
    assert witness.seen == {"step": 16, "evaluation": 6, "checkpoint": 6}
    assert witness.sparsities == expected_sparsities(SCHEDULE, pruning.masks.numel)
    assert pruning.sparsity == pytest.approx(0.8, abs=1e-3) and len(pruning.reports) == 3
    after = trainer.model.state_dict()
    for name, keep in pruning.masks.items():
        assert not after[name][~keep].any() and (after[name] != before[name])[keep].float().mean() > 0.9
    inner = trainer.optimizer.optimizer
    if isinstance(inner, MFAC):
        assert all(torch.equal(inner.state[p]["mask"], keep) for p, keep in masks_by_parameter(trainer, pruning))
    for p, keep in masks_by_parameter(trainer, pruning):
        remembered = [v for v in inner.state[p].values() if isinstance(v, torch.Tensor) and v.shape == p.shape]
        assert remembered and not any(v[~keep].any() for v in remembered), "the optimizer forgets pruned weights"


def masks_by_parameter(trainer, pruning):
    return pruning.masks.parameter_masks(trainer.model).items()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "mfac"])
def test_an_idle_callback_changes_no_bit(optimizer, tmp_path):
    plain = make_trainer(tmp_path / "plain", optimizer, eval_on_start=True)
    plain.train()
    idle = MFACPruningCallback(SparsitySchedule.from_list([0.5], start=16, unit="step"), evaluate=True)
    trainer = make_trainer(tmp_path / "idle", optimizer, [idle], eval_on_start=True)
    trainer.train()
    assert differing(weights_of(plain.model), weights_of(trainer.model)) == []
    assert idle.sparsity == 0.0 and idle.reports == []


def test_epochs_and_warm_up(tmp_path):
    """8 steps to an epoch: 64 examples, batches of 4, two batches to a step."""
    pruning = MFACPruningCallback(SparsitySchedule.from_list([0.25, 0.5], unit="epoch"), method="magnitude")
    trainer = make_trainer(tmp_path, "mfac", [pruning], warmup_steps=12)
    witness = Witness(pruning)
    trainer.add_callback(witness)
    trainer.train()
    steps = SparsitySchedule(((0, 0.25), (8, 0.5)))
    assert witness.sparsities == expected_sparsities(steps, pruning.masks.numel)


def test_epochs_of_data_without_a_length_are_refused(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(make_data())

    trainer = make_trainer(tmp_path, callbacks=[MFACPruningCallback(SparsitySchedule.from_list([0.5]))])
    trainer.train_dataset = Stream()
    with pytest.raises(ValueError, match="no length to count epochs by; use a schedule of unit='step'"):
        trainer.train()


@pytest.mark.slow
def test_one_fisher_of_all_targets(tmp_path):
    options = {"num_grads": 8, "block_size": None, "selection": "diagonal", "damping": 1e-3, "recomputations": 2}
    pruning = MFACPruningCallback(SCHEDULE, **options)
    make_trainer(tmp_path, "adamw", [pruning], save_strategy="no").train()
    assert pruning.sparsity == pytest.approx(0.8, abs=1e-3) and len(pruning.reports) == 3


@pytest.mark.slow
def test_a_sparse_model_is_pruned_further_and_keeps_its_zeros(tmp_path):
    model = make_model()
    masks = MaskSet.dense(model, [name for name, _ in model.named_parameters() if "query.weight" in name])
    masks.update({name: torch.rand(keep.shape) < 0.5 for name, keep in masks.items()})
    masks.apply(model)
    pruning = MFACPruningCallback(SparsitySchedule.from_list([0.01, 0.3], every=8, unit="step"), method="magnitude")
    trainer = make_trainer(tmp_path, "mfac", [pruning], model=model)
    trainer.train()
    assert len(pruning.reports) == 1 and pruning.sparsity == pytest.approx(0.3, abs=1e-3)
    assert all(not (pruning.masks[name] & ~keep).any() for name, keep in masks.items())


class BestSeen(TrainerCallback):
    """Trainer's record of the best model at the beginning of each step, and one evaluation that nothing beats."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append(state.best_global_step)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_quality"] = 1.0 if state.global_step == 2 else state.global_step / 100


@pytest.mark.slow
def test_the_best_model_is_the_best_of_the_final_sparsity(tmp_path):
    pruning = MFACPruningCallback(SparsitySchedule(((3, 0.3), (11, 0.6))), method="magnitude")
    best = BestSeen()
    options = {
        "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "quality", "greater_is_better": True,
    }  # fmt: skip
    trainer = make_trainer(tmp_path, "adamw", [pruning, best], **options)
    trainer.train()
    assert best.steps[:3] == [None, None, 2] and best.steps[3] is None and best.steps[11] is None
    assert trainer.state.best_global_step == 16 and pruning.sparsity == pytest.approx(0.6, abs=1e-3)

    class Nostalgia(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 15:
                state.best_metric, state.best_global_step = 2.0, 2

    trainer = make_trainer(tmp_path, "adamw", [pruning, BestSeen(), Nostalgia()], **options)
    with pytest.raises(RuntimeError, match=r"not pruned to 0.5999: .*checkpoint-2\) is an earlier, denser one"):
        trainer.train()


class Reporter(TrainerCallback):
    """What a TensorBoard would have been handed."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_sparsities_and_losses_are_logged(tmp_path):
    reporter = Reporter()
    trainer = make_trainer(tmp_path, "adamw", [reporter], eval_on_start=True, logging_steps=2, save_strategy="no")
    pruning = MFACPruningCallback(SparsitySchedule(((4, 0.5),)), evaluate=True, method="magnitude").attach(trainer)
    trainer.train()
    logs = {log["step"]: log for log in trainer.state.log_history if "loss" in log}
    assert sorted(logs) == [2, 4, 5, 6, 8, 10, 12, 14, 16], "the step of a pruning is logged too"
    assert [logs[step]["pruning/sparsity"] for step in (2, 4, 5, 16)] == [0, 0, pruning.sparsity, pruning.sparsity]
    of_tensors = {key.removeprefix("pruning/sparsity/"): v for key, v in logs[5].items() if key.count("/") == 2}
    assert of_tensors == pruning.masks.sparsities() == pruning.reports[0].sparsities
    assert not any(key.count("/") == 2 for step, log in logs.items() if step != 5 for key in log)
    assert 0 < logs[5]["pruning/loss_before"] != logs[5]["pruning/loss_after"] > 0
    seen = [log for log in reporter.seen if "loss" in log]
    assert [log["pruning/sparsity"] for log in seen] == [log["pruning/sparsity"] for log in logs.values()]
    assert not any("pruning/sparsity" in log for log in trainer.state.log_history if "eval_loss" in log)


@pytest.mark.slow
def test_evaluation_around_a_pruning_is_exact_and_disturbs_nothing(tmp_path):
    runs = {}
    for evaluate in (False, True):
        pruning = MFACPruningCallback(SparsitySchedule(((4, 0.5),)), evaluate=evaluate, method="magnitude")
        trainer = make_trainer(tmp_path, "adamw", [pruning], eval_on_start=True, save_strategy="no")
        after = Witness(pruning)
        trainer.train()
        runs[evaluate] = weights_of(trainer.model)
    assert differing(*runs.values()) == []
    assert after.seen["step"] == 0
    log = next(log for log in trainer.state.log_history if "pruning/loss_after" in log)
    # The loss before is that of the weights after four steps.
    short = make_trainer(tmp_path, "adamw", eval_on_start=True, save_strategy="no")
    short.add_callback(StopAt(4))
    short.train()
    # 1e-5: batches of another order of sums
    assert log["pruning/loss_before"] == pytest.approx(short.evaluate()["eval_loss"], rel=1e-5)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
        return control


@pytest.mark.slow
@pytest.mark.parametrize("stop", [6, 16])
def test_a_schedule_whose_end_was_not_reached_is_named_at_the_end(stop, tmp_path, caplog):
    schedule = SparsitySchedule(((2, 0.3), (5, 0.5), (12, 0.8)))
    pruning = MFACPruningCallback(schedule, method="magnitude")
    make_trainer(tmp_path, "sgd", [StopAt(stop), pruning], save_strategy="no").train()
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("mfac_hf.pruning")]
    if stop == 6:
        assert len(warnings) == 1
        assert "ended at step 6 with a sparsity of 0.5; the schedule asks for 0.8, from step 12 on" in warnings[0]
    else:
        assert warnings == []


@pytest.mark.slow
def test_distillation_begins_with_the_first_pruning(tmp_path):
    """With hardness 1 the loss right after is the teacher's alone."""
    distillation = Distillation(hardness=1.0)
    pruning = MFACPruningCallback(SparsitySchedule(((4, 0.9),)), method="magnitude", distillation=distillation)
    plain = make_trainer(tmp_path / "plain", "adamw", logging_steps=1, save_strategy="no")
    plain.train()
    trainer = make_trainer(tmp_path, "adamw", [pruning], logging_steps=1, save_steps=6)
    trainer.train()
    losses = [[log["loss"] for log in run.state.log_history if "loss" in log] for run in (plain, trainer)]
    assert losses[0][:4] == losses[1][:4] and losses[1][4] < 0.5 * losses[0][4]
    assert (tmp_path / "teacher.safetensors").is_file() and not trainer.model._forward_hooks
    assert trainer.evaluate()["eval_loss"] > 0.5, "evaluation is by the labels"


@pytest.mark.slow
def test_a_teacher_that_is_given_teaches_from_the_first_step(tmp_path):
    teacher = make_model(seed=1)
    before = weights_of(teacher)
    pruning = MFACPruningCallback(
        SparsitySchedule(((4, 0.5),)), method="magnitude", distillation=Distillation(teacher=teacher)
    )
    plain = make_trainer(tmp_path / "plain", "adamw", logging_steps=1, save_strategy="no")
    plain.train()
    trainer = make_trainer(tmp_path, "adamw", [pruning], logging_steps=1)
    trainer.train()
    first = [next(log["loss"] for log in run.state.log_history if "loss" in log) for run in (plain, trainer)]
    assert first[1] < 0.5 * first[0] and not (tmp_path / "teacher.safetensors").exists()
    assert differing(before, weights_of(teacher)) == []


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MFACPruningCallback(0.9), TypeError, "schedule is a float; expected a SparsitySchedule"),
        (lambda: MFACPruningCallback(SCHEDULE, gradients="window"), ValueError, "gradients is 'window'"),
        (lambda: MFACPruningCallback(SCHEDULE, lr_cycle=2.0), ValueError, "lr_cycle is 2.0"),
        (lambda: MFACPruningCallback(SCHEDULE, block_size=0), ValueError, "block_size is 0"),
        (lambda: MFACPruningCallback(SCHEDULE, num_grad=8), TypeError, "num_grad"),
        (lambda: MFACPruningCallback(SCHEDULE, fisher="natural"), ValueError, "fisher is 'natural'"),
        (lambda: MFACPruningCallback(SCHEDULE, fisher_floor=0), ValueError, "fisher_floor is 0"),
        (
            lambda: MFACPruningCallback(SCHEDULE, gradients="optimizer", fisher="scaled"),
            ValueError,
            "means over examples, and fisher='scaled' .* leave fisher out .*or take gradients='data'",
        ),
        (
            lambda: MFACPruningCallback(SCHEDULE, gradients="optimizer", first_order=True),
            ValueError,
            "first_order and batch_norm_samples need examples .* or take gradients='data'",
        ),
    ],
)
def test_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "optimizer", "message"),
    [
        ({"targets": ["nothing"]}, "adamw", "hits no weight"),
        ({"targets": ["word_embeddings"]}, "adamw", "hits an embedding"),
        ({"num_grads": 65}, "adamw", "65 gradients of 1 example"),
        ({"pattern": "3:5"}, "adamw", "3:5"),
        ({"evaluate": True}, "adamw", "eval_on_start=True"),
        ({"gradients": "optimizer"}, "adamw", "gradients='optimizer' needs MFAC"),
        ({"gradients": "optimizer", "num_grads": 7}, "mfac", "7 gradients .* holds 3 of at most 6"),
        ({"gradients": "optimizer", "num_grads": 6}, "mfac", "6 gradients .* holds 3 of at most 6"),
    ],
)
def test_bad_input_is_refused_before_a_step_is_made(options, optimizer, message, tmp_path):
    trainer = make_trainer(tmp_path, optimizer, [MFACPruningCallback(SCHEDULE, **{**FAST, **options})])
    before = weights_of(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0 and differing(before, weights_of(trainer.model)) == []


def test_the_optimizers_window_serves_as_gradients(tmp_path, monkeypatch):
    """No backward pass but those of training."""
    backward, passes = torch.autograd.backward, []
    monkeypatch.setattr(torch.autograd, "backward", lambda *a, **k: passes.append(1) or backward(*a, **k))
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("a backward pass of its own"))
    pruning = MFACPruningCallback(SCHEDULE, gradients="optimizer", **{**FAST, "num_grads": 3})
    make_trainer(tmp_path, "mfac", [pruning], save_strategy="no").train()
    assert len(pruning.reports) == 3 and len(passes) == 2 * 16
    assert all(report.options["fisher"] == "empirical" for report in pruning.reports)
    assert (
        pruning.options
        == MFACPruningCallback(SCHEDULE, gradients="optimizer", fisher="empirical", **{**FAST, "num_grads": 3}).options
    )
    assert pruning.sparsity == pytest.approx(0.8, abs=1e-3)
