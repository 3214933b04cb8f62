"""`mfac card`, `push`, `inspect` and `estimate`: what they write and print, and one line for what users can mend."""

import json

import pytest
import torch
from huggingface_hub import ModelCard, constants

from mfac_hf import cli, memory_estimate, save_sparse
from mfac_hf.hub.card import build_card
from tests.helpers.hub_server import TOKEN, running_hub
from tests.helpers.results import run


@pytest.fixture
def outputs(bert, tmp_path):
    """A sparse model with its results, two more seeds, dense results and caveats."""
    folder = tmp_path / "sst2-90"
    bert.save_pretrained(folder)
    (folder / "results.json").write_text(json.dumps(run(1, 0.79)))
    (tmp_path / "seed2.json").write_text(json.dumps(run(2, 0.75)))
    (tmp_path / "dense.json").write_text(json.dumps(run(1, 0.82)))
    (tmp_path / "caveats.yaml").write_text("- Random weights.\n- Random data.\n")
    return tmp_path


def card_flags(outputs):
    """Flags that name the results."""
    flags = [
        "--results",
        outputs / "sst2-90" / "results.json",
        outputs / "seed2.json",
        "--dense",
        outputs / "dense.json",
    ]
    return [str(flag) for flag in [*flags, "--caveats", outputs / "caveats.yaml", "--no_latency"]]


@pytest.fixture
def hub(monkeypatch):
    """A Hub that is the default one, and a token."""
    with running_hub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_card_and_the_same_card_from_its_facts(outputs, capsys):
    target = outputs / "cards" / "sst2-90"
    arguments = ["card", "--model", str(outputs / "sst2-90"), *card_flags(outputs), "--output", str(target)]
    assert cli.main([*arguments, "--repo_id", "user/sst2-90", "--license", "mit"]) == 0
    assert capsys.readouterr().out.strip() == str(target / "README.md")
    text = (target / "README.md").read_text()
    assert (
        "| sparse | accuracy | 79.00 | 77.00 ± 2.83 | 1, 2 |" in text and "- Random weights.\n- Random data." in text
    )
    assert ModelCard.load(target / "README.md").data.license == "mit"
    facts = json.loads((target / "card.json").read_text())
    assert str(build_card(facts, "user/sst2-90")) == text
    (target / "README.md").unlink()
    assert cli.main(["card", "--facts", str(target / "card.json"), "--repo_id", "user/sst2-90"]) == 0
    assert (target / "README.md").read_text() == text


def test_card_of_results_beside_the_model(outputs):
    with pytest.raises(SystemExit):
        cli.main(["card"])
    folder = outputs / "sst2-90"
    assert cli.main(["card", "--model", str(folder), "--dense", str(outputs / "dense.json"), "--no_latency"]) == 0
    assert "| sparse | accuracy | 79.00 | - | 1 |" in (folder / "README.md").read_text()


def refused(capsys, *arguments):
    """Run a command that fails, and return its one line."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"mfac {arguments[0]}: error: ")
    return error


def test_bad_input_is_one_line(outputs, capsys):
    folder = outputs / "sst2-90"
    assert "the dense model are missing" in refused(capsys, "card", "--model", folder, "--no_latency")
    assert not (folder / "README.md").exists() and not (folder / "card.json").exists()
    (outputs / "caveats.yaml").write_text("just a sentence")
    assert "expected a YAML list" in refused(capsys, "card", "--model", folder, *card_flags(outputs))
    (folder / "results.json").unlink()
    assert "--results is missing" in refused(capsys, "card", "--model", folder)
    assert "no directory and no repository" in refused(capsys, "inspect", outputs / "nothing")
    assert "num_grads is 0" in refused(capsys, "estimate", "1000", "--num_grads", "0")
    assert "no valid name" in refused(capsys, "push", folder, "a/b/c", "--card", outputs / "card.json")


def test_push_and_inspect(outputs, hub, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = str(outputs / "sst2-90")
    assert cli.main(["push", folder, "user/sst2-90", *card_flags(outputs), "--private", "--sparse-only"]) == 0
    assert f"{hub.url}/user/sst2-90/commit/" in capsys.readouterr().out
    repository = hub.repositories["user/sst2-90"]
    assert repository.private and "sparse.safetensors" in repository.branches["main"]
    assert "model.safetensors" not in repository.branches["main"]
    card = repository.branches["main"]["README.md"].decode()
    assert 'load_sparse("user/sst2-90", AutoModelForSequenceClassification)' in card and "from_pretrained" not in card

    hub.requests.clear()
    assert cli.main(["inspect", "user/sst2-90", "--json"]) == 0
    remote = json.loads(capsys.readouterr().out)
    assert not any("model.safetensors" in request for request in hub.requests)
    assert cli.main(["inspect", folder, "--json"]) == 0
    local = json.loads(capsys.readouterr().out)
    assert remote["tensors"] == local["tensors"] and remote["zeros"] == local["zeros"] > 0
    assert "no repository that can be read" in refused(capsys, "inspect", "user/other")
    hub.repositories["user/sst2-90"].branches["main"].pop("sparse.safetensors")
    assert "holds no safetensors weights" in refused(capsys, "inspect", "user/sst2-90")


def test_inspect_prints_a_table_and_draws_a_picture(outputs, bert, capsys, tmp_path):
    save_sparse(bert, tmp_path / "small", sparse_only=True)
    picture = tmp_path / "layers.png"
    assert cli.main(["inspect", str(tmp_path / "small"), "--picture", str(picture)]) == 0
    shown = capsys.readouterr().out
    weight = bert.bert.encoder.layer[0].intermediate.dense.weight
    assert f"{int((weight == 0).sum()) / weight.numel():.2%}" in shown and "(not pruned)" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "--picture" in refused(capsys, "inspect", tmp_path / "small", "--picture", tmp_path / "layers.text")


def test_estimate_of_a_configuration_and_of_a_number(outputs, bert, capsys):
    (outputs / "sst2-90" / "model.safetensors").unlink()  # the configuration is enough
    flags = ["--num_grads", "16", "--dtype", "bfloat16", "--json", "--no_time"]
    assert cli.main(["estimate", str(outputs / "sst2-90"), *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == memory_estimate(bert, 16, torch.bfloat16).bytes and report["step_seconds"] is None
    assert cli.main(["estimate", "1000000", "--num_grads", "8"]) == 0
    shown = capsys.readouterr().out
    assert "dense: 8 x 1,000,000 x 4 bytes" in shown and "fits" in shown and "ms in each step" in shown
