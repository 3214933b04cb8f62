"""The loop that training and pruning share: batch norm, plans, logs, states."""

import json

import pytest
import torch

from mfac_hf.storage import save_tensors
from mfac_hf.tasks.vision import Images, VisionData, load_vision
from mfac_hf.tasks.vision_preprocess import Preprocess
from mfac_hf.training.vision_run import RunLog, VisionRun, learning_rate_plan, load_state
from tests.helpers.vision_runs import digits_run, small_model


def test_evaluation_counts_every_test_image_once():
    run = digits_run()
    run.model.eval()
    with torch.no_grad():
        logits = run.model(run.preprocess(run.data.test.images_NCHW))
    labels = run.data.test.labels_N
    accuracy, loss = run.accuracy_and_loss()
    assert run.evaluate() == accuracy == (logits.argmax(1) == labels).sum().item() / 360
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())


def test_epochs_are_repeatable_and_differ():
    weights = []
    for epoch in (0, 0, 1):
        run = digits_run()
        optimizer = run.accelerator.prepare(torch.optim.SGD(run.model.parameters(), lr=0.1))
        row = run.train_epoch(optimizer, epoch)
        weights.append(run.bare_model[0].weight.detach().clone())
    assert row["loss"] > 0 and torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_batch_norm_statistics_are_those_of_the_training_images():
    run = digits_run(augment=False)
    with torch.no_grad():
        run.model[1].running_mean.fill_(7)
    weights = {name: p.clone() for name, p in run.model.named_parameters()}
    run.reestimate_batch_norm(256)
    with torch.no_grad():
        hidden = run.model[0](run.preprocess(run.data.train.images_NCHW))
    # every image once, in batches of one size: the average of the batches' means is the mean
    assert torch.allclose(run.model[1].running_mean, hidden.mean((0, 2, 3)), atol=1e-5)
    assert run.model[1].momentum == 0.1
    assert all(torch.equal(p, weights[name]) for name, p in run.model.named_parameters())


def test_both_accuracies_are_reported_and_the_statistics_kept_on_demand():
    run = digits_run()
    before = run.model[1].running_var.clone()
    found = run.accuracies(128, keep=False)
    assert found["accuracy"] == run.evaluate() and torch.equal(run.model[1].running_var, before)
    again = run.accuracies(128, keep=True)
    assert again == found
    assert found["accuracy_bn"] == run.evaluate() and not torch.equal(run.model[1].running_var, before)


def test_a_loss_that_is_not_finite_stops_the_run():
    run = digits_run()
    with torch.no_grad():
        run.model[4].bias.fill_(float("nan"))
    optimizer = run.accelerator.prepare(torch.optim.SGD(run.model.parameters(), lr=0.1))
    with pytest.raises(FloatingPointError, match="nan in epoch 3: lower the learning rate"):
        run.train_epoch(optimizer, 3)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="batch size 300: expected 1 to 256"):
        data = load_vision()
        few = Images(data.train.images_NCHW[:256], data.train.labels_N[:256])
        data = VisionData(few, data.test, 10, 1, "half", 1, False)
        VisionRun(small_model(), data, Preprocess(data), batch_size=300)


def test_learning_rates_drop_at_the_epochs_asked_for():
    assert learning_rate_plan(1.0, 5, [2, 4], 0.5) == [1, 1, 0.5, 0.5, 0.25]
    for drops in ([4, 2], [2, 2], [5], [0]):
        with pytest.raises(ValueError, match="with 5 epochs: expected rising epochs from 1 to 4"):
            learning_rate_plan(1.0, 5, drops, 0.5)


def test_a_log_has_every_row_in_both_files(tmp_path):
    log = RunLog(tmp_path / "new" / "run", {"command": "x"}, [{"epoch": 0, "loss": 2.5}])
    log.add({"epoch": 1, "accuracy": 0.5})
    content = json.loads((tmp_path / "new" / "run.json").read_text())
    assert content == {"command": "x", "rows": [{"epoch": 0, "loss": 2.5}, {"epoch": 1, "accuracy": 0.5}]}
    assert (tmp_path / "new" / "run.csv").read_text().split() == ["epoch,loss,accuracy", "0,2.5,", "1,,0.5"]


def test_a_state_continues_only_the_run_it_is_from(tmp_path):
    path = tmp_path / "deep" / "run.state"
    assert load_state(path, {}) is None
    save_tensors(path, {"arguments": {"lr": 0.1, "seed": 1}, "epoch": 4})
    assert load_state(path, {"lr": 0.1, "seed": 1})["epoch"] == 4
    assert load_state(path, {"lr": 0.1, "seed": 1, "metric": "identity"})["epoch"] == 4  # the only one that there was
    with pytest.raises(ValueError, match="started with --metric identity, not adam"):
        load_state(path, {"lr": 0.1, "seed": 1, "metric": "adam"})
    with pytest.raises(ValueError, match="started with --seed 1, not 2"):
        load_state(path, {"lr": 0.1, "seed": 2})
    with pytest.raises(ValueError, match="started with --fisher empirical, not scaled"):
        load_state(path, {"lr": 0.1, "fisher": "scaled"})
    assert load_state(path, {"lr": 0.1, "fisher": "empirical", "fisher_floor": 1e-3})["epoch"] == 4
    assert [file.name for file in path.parent.iterdir()] == ["run.state"]
