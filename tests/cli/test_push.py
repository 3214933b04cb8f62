"""`mfac push`: model and card arrive, and `mfac inspect` reads them there."""

import json

from huggingface_hub import constants

from mfac_hf import cli


def test_push_and_inspect(outputs, card_flags, hub, refused, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = str(outputs / "sst2-90")
    assert cli.main(["push", folder, "user/sst2-90", *card_flags, "--private", "--sparse-only"]) == 0
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
    assert "no repository that can be read" in refused("inspect", "user/other")
    hub.repositories["user/sst2-90"].branches["main"].pop("sparse.safetensors")
    assert "holds no safetensors weights" in refused("inspect", "user/sst2-90")


def test_bad_input_is_one_line(outputs, refused):
    folder = outputs / "sst2-90"
    assert "no valid name" in refused("push", folder, "a/b/c", "--card", outputs / "card.json")
