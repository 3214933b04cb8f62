"""Result files are read into one form, and what they lack is named."""

import dataclasses
import json
import time

import pytest
from transformers import TrainingArguments

from mfac_hf.defaults import MFAC_DEFAULTS
from mfac_hf.hub.run_records import (
    SCHEDULE_SETTINGS,
    MissingResultsError,
    metrics_of,
    perplexities,
    pruning_facts,
    read_run,
    used_settings,
    write_results,
)
from mfac_hf.pruning.options import PruningOptions, PruningReport
from mfac_hf.training.arguments import ModelArguments, OptimizerArguments
from mfac_hf.training.pruning_arguments import GradualArguments
from tests.helpers.results import log, pruned, results


def test_results_of_a_script(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results()))
    run = read_run(path)
    assert run["metrics"] == {"accuracy": 0.8125} and run["split"] == "validation" and run["seed"] == 3
    assert run["dataset"] == {"id": "nyu-mll/glue", "config": "sst2", "source": "data/glue"}
    optimizer = {"name": "M-FAC", "metric": "identity", "num_grads": 256, "damping": 1e-3}
    assert run["optimizer"] == optimizer, "not TrainingArguments' AdamW; the only metric that there was"
    assert run["training"] == {"learning_rate": 3e-3, "max_seq_length": 128}
    assert run["base_model"] == "google/bert_uncased_L-2_H-128_A-2"
    assert read_run(run) == run


@dataclasses.dataclass
class OtherTask:
    """What a script of somebody else may call its flags."""

    dataset_name: str = "data/glue"
    task_name: str = "cola"
    max_seq_length: int = 64


def test_what_is_written_is_read(tmp_path):
    """The reader knows flags by their names, and not in which dataclass of a script they stand."""
    arguments = [ModelArguments("user/model"), OtherTask(), OptimizerArguments(num_grads=8), GradualArguments()]
    arguments += [TrainingArguments(str(tmp_path), learning_rate=0.25, seed=7, use_cpu=True)]
    measured = {"task": "cola", "eval_matthews_correlation": 0.5, "evaluated_on": ["validation"]}
    path = write_results(tmp_path, measured, arguments=arguments, argv=["--x"], started=time.perf_counter())
    run = read_run(path)
    assert run["metrics"] == {"matthews_correlation": 0.5} and run["seed"] == 7 and run["command"][1:] == ["--x"]
    assert run["dataset"] == {"id": "nyu-mll/glue", "config": "cola", "source": "data/glue"}
    assert run["base_model"] == "user/model" and run["pruning"] is None
    assert run["optimizer"]["name"] == "M-FAC" and run["optimizer"]["num_grads"] == 8
    assert run["training"]["learning_rate"] == 0.25 and run["training"]["max_seq_length"] == 64


def test_what_was_not_given_is_told_as_the_default_of_the_metric():
    record = results()
    given = dataclasses.asdict(OptimizerArguments(damping=0.5))
    record["arguments"]["OptimizerArguments"] = given
    record["arguments"]["TrainingArguments"] |= {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8}
    shown = ("num_grads", "nesterov", "window_dtype")
    expected = {name: MFAC_DEFAULTS["adam"][name] for name in shown} | {"damping": 0.5}
    expected |= {"name": "M-FAC", "metric": "adam", "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8}
    assert read_run(record)["optimizer"] == expected
    record["arguments"]["OptimizerArguments"] = given | {"metric": "identity", "momentum": 0.9}
    optimizer = read_run(record)["optimizer"]
    assert optimizer["metric"] == "identity" and optimizer["num_grads"] == 1024 and optimizer["momentum"] == 0.9
    assert optimizer["normalize"] == "num_grads" and "adam_beta1" not in optimizer


def test_a_vision_log_tells_the_metric():
    record = log()
    record["arguments"] |= {"optim": "mfac", "lr": 1e-3}
    assert read_run(record)["optimizer"]["metric"] == "identity"
    record["arguments"] |= {"metric": "adam", "grad_decay": None}
    assert read_run(record)["optimizer"]["metric"] == "adam" and "grad_decay" not in read_run(record)["optimizer"]


def test_a_card_tells_every_flag_of_gradual_pruning():
    assert list(SCHEDULE_SETTINGS) == [field.name for field in dataclasses.fields(GradualArguments)]


def test_adamw_is_called_adamw():
    record = results()
    record["arguments"]["OptimizerArguments"] = {"optim_name": "adamw", "num_grads": 1024}
    record["arguments"]["TrainingArguments"] |= {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    expected = {"name": "AdamW", "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    assert read_run(record)["optimizer"] == expected


def test_squad():
    record = results(
        results={"task": "squad_v2", "eval_f1": 52.1, "eval_exact_match": 50, "evaluated_on": "validation"}
    )
    record["arguments"]["SquadArguments"] = {"dataset_name": "data/squad_v2", "doc_stride": 128}
    del record["arguments"]["GlueArguments"]
    run = read_run(record)
    assert run["dataset"] == {"id": "rajpurkar/squad_v2", "source": "data/squad_v2"}
    assert run["metrics"] == {"f1": 52.1, "exact_match": 50} and run["training"]["doc_stride"] == 128


def test_metrics_are_told_from_times_and_losses():
    mnli = {"eval_matched_accuracy": 0.7, "eval_matched_loss": 1.0, "eval_mismatched_accuracy": 0.71, "epoch": 3.0}
    mnli |= {"eval_matched_runtime": 3.0, "eval_matched_samples_per_second": 9.0, "train_loss": 1.0, "eval_name": "x"}
    assert metrics_of(mnli) == {"matched_accuracy": 0.7, "mismatched_accuracy": 0.71}


@pytest.mark.parametrize("sparsity, accuracy, steps", [(0.0, 0.9, 0), (0.5, 0.85, 1), (0.8, 0.6, 2), (None, 0.6, 2)])
def test_vision_log_is_read_at_the_sparsity_of_the_weights(sparsity, accuracy, steps):
    """After a pruning step the saved model has re-estimated statistics; after an epoch it has its own."""
    run = read_run(log(), sparsity=sparsity)
    assert run["metrics"] == {"accuracy": accuracy} and run["dense_metrics"] == {"accuracy": 0.9}
    assert len(run["pruning"]["steps"]) == steps
    assert run["optimizer"] == {"name": "SGD", "lr": 0.005, "momentum": 0.9}
    assert run["dataset"] == {"id": "uoft-cs/cifar10", "source": "data/cifar10"} and run["seed"] == 1


def test_vision_log_without_that_sparsity_is_refused():
    with pytest.raises(MissingResultsError, match=r"lacks an accuracy at sparsity 0.9, .*it has \[0.0, 0.5, 0.8\]"):
        read_run(log(), sparsity=0.9)


def test_missing_results_are_named(tmp_path):
    with pytest.raises(MissingResultsError, match="the given record lacks metrics, seed;"):
        read_run(results(results={"task": "sst2", "train_loss": 0.3}, seed=None))
    assert read_run(results(results={"task": "sst2"}), strict=False)["metrics"] == {}
    path = tmp_path / "results.json"
    path.write_text("accuracy: 0.8")
    with pytest.raises(ValueError, match="results.json is no JSON file"):
        read_run(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds a list; expected an object"):
        read_run(path)
    with pytest.raises(FileNotFoundError):
        read_run(tmp_path / "other.json")


def test_pruning_reports():
    def report(sparsity):
        steps = [{"sparsity": sparsity, "damping": 1e-4, "num_grads": 64}]
        return PruningReport(
            vars(PruningOptions(damping="auto", seed=7)),
            100,
            0.0,
            sparsity,
            {"w": sparsity},
            num_grads=64,
            steps=steps,
        ).to_dict()

    facts = pruning_facts([report(0.5), report(0.9)])
    assert facts["options"]["fisher"] == "scaled" and facts["options"]["fisher_floor"] == 1e-3
    for changes, expected in {
        "older": ({"fisher": None, "fisher_floor": None}, "empirical"),
        "empirical": ({"fisher": "empirical"}, "empirical"),
        "magnitude": ({"method": "magnitude"}, None),
    }.values():
        other = report(0.9)
        other["options"] = {k: v for k, v in (other["options"] | changes).items() if v is not None}
        options = pruning_facts([other])["options"]
        assert options.get("fisher") == expected and "fisher_floor" not in options
    assert facts["options"]["recomputations"] == 16 and facts["options"]["block_size"] == 128
    assert "damping" not in facts["options"], "what 'auto' chose stands with the steps"
    assert [step["sparsity"] for step in facts["steps"]] == [0.5, 0.9]
    assert facts["steps"][0]["damping"] == [1e-4]
    assert pruning_facts([]) is None
    flags = {"prune_schedule": "cubic", "prune_end": 20, "initial_sparsity": 0.5, "teacher_name_or_path": None}
    assert pruning_facts([report(0.9)], flags)["options"]["prune_schedule"] == "cubic"
    assert "teacher_name_or_path" not in pruning_facts([report(0.9)], flags)["options"]
    at_once = pruning_facts([report(0.9)], {**flags, "prune_end": None})
    assert "prune_schedule" not in at_once["options"], "flags that had no part in it"


def test_model_that_was_pruned_at_once():
    """run_glue.py --num_train_epochs 0 measures the dense model itself, and trains with no optimizer."""
    record = results()
    record["arguments"]["TrainingArguments"]["num_train_epochs"] = 0
    record["results"]["before_pruning"] = {"eval_accuracy": 0.84, "eval_loss": 0.3}
    run = read_run(record)
    assert run["dense_metrics"] == {"accuracy": 0.84} and run["metrics"] == {"accuracy": 0.8125}
    assert run["optimizer"] == {"name": "none (pruned without training)"}


def test_a_pruning_without_training():
    """What mfac prune wrote."""
    run = read_run(pruned())
    assert run["metrics"] == {"accuracy": 0.8} and run["dense_metrics"] == {"accuracy": 0.9}
    assert run["optimizer"] == {"name": "none (pruned without training)"} and run["base_model"] == "user/dense"
    assert run["dataset"] == {"id": "nyu-mll/glue", "config": "sst2", "source": "data/glue"}
    # older than the scaled Fisher
    assert run["pruning"]["options"] == {"method": "mfac", "num_grads": 64, "fisher": "empirical"}
    assert run["training"] == {"max_seq_length": 32} and run["split"] == "validation"
    assert "base_model_is_local" not in run and read_run(pruned(model_is_local=True))["base_model_is_local"]
    squad = read_run(pruned(task="squad", after={"eval_f1": 80.0}, before={"eval_f1": 82.0}))
    assert squad["dataset"] == {"id": "rajpurkar/squad", "source": "data/glue"} and squad["metrics"] == {"f1": 80.0}
    with pytest.raises(MissingResultsError, match="lacks metrics; .*prune again without --no-eval"):
        read_run(pruned(before=None, after=None))
    with pytest.raises(MissingResultsError, match="lacks metrics, seed, command, versions, device; "):
        read_run({"before": None, "after": None, "pruning": pruned()["pruning"]})  # of an earlier version


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_metrics_that_are_no_number_are_refused(value, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results(results={"task": "sst2", "eval_accuracy": value})))
    with pytest.raises(ValueError, match=r"results.json: accuracy is (nan|-?inf); a card takes finite metrics only"):
        read_run(path, strict=False)
    with pytest.raises(ValueError, match="before pruning, accuracy is"):
        read_run(pruned(before={"eval_accuracy": value}))
    diverged = log()
    diverged["rows"][-1]["accuracy_bn"] = value
    with pytest.raises(ValueError, match="accuracy is"):
        read_run(diverged)


def test_losses_count_where_nothing_else_was_measured():
    assert metrics_of({"eval_loss": 0.5, "eval_runtime": 1.0}) == {"loss": 0.5}
    assert metrics_of({"eval_loss": 0.5, "eval_accuracy": 0.9, "eval_good": True}) == {"accuracy": 0.9}
    found = perplexities({"eval_loss": 2.0, "eval_news_loss": 1e3, "eval_accuracy": 0.5, "train_loss": 1.0})
    assert found == {"loss": 2.0, "perplexity": pytest.approx(7.389056), "news_loss": 1e3}


def test_settings_without_a_part_in_the_training_are_left_out():
    flags = {"num_train_epochs": 3.0, "max_steps": 100, "learning_rate": 1e-3, "n_gpu": 1, "fp16": False, "other": 1}
    assert used_settings(flags) == {"max_steps": 100, "learning_rate": 1e-3}
    assert used_settings({**flags, "max_steps": -1, "n_gpu": 2}) == {
        **{"num_train_epochs": 3.0, "n_gpu": 2, "learning_rate": 1e-3}
    }
    record = results()
    record["arguments"]["TrainingArguments"] |= {"do_train": False, "do_eval": True}
    run = read_run(record)  # a script that evaluates a model and nothing else
    assert run["optimizer"] == {"name": "none: the model was not trained in this run"}
    assert run["training"] == {"max_seq_length": 128}


def test_a_local_base_model_is_recorded_as_such(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training = TrainingArguments("out", use_cpu=True)
    for name, local in (("outputs/base", True), ("user/base", None)):
        (tmp_path / "outputs" / "base").mkdir(parents=True, exist_ok=True)
        path = write_results("out", {}, arguments=[ModelArguments(name), training], argv=[], started=0.0)
        assert json.loads(path.read_text()).get("base_model_is_local") is local
        run = read_run(results(**{key: True for key in ["base_model_is_local"] if local}))
        assert run.get("base_model_is_local") is local
    assert read_run(log())["base_model_is_local"], "the checkpoint of a vision run is a file"


def test_results_are_written_whole(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("before")
    with pytest.raises(TypeError):
        write_results(
            tmp_path, {"x": object()}, arguments=[TrainingArguments("out", use_cpu=True)], argv=[], started=0
        )
    assert path.read_text() == "before" and [file.name for file in tmp_path.iterdir()] == ["results.json"]
