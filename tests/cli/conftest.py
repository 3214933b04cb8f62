"""A model with results, a Hub, and a command that fails, for the tests of the sub-commands."""

import json

import pytest
from huggingface_hub import constants

from mfac_hf import cli
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


@pytest.fixture
def card_flags(outputs):
    """Flags that name the results."""
    flags = ["--results", outputs / "sst2-90" / "results.json", outputs / "seed2.json"]
    flags += ["--dense", outputs / "dense.json", "--caveats", outputs / "caveats.yaml", "--no_latency"]
    return [str(flag) for flag in flags]


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


@pytest.fixture
def refused(capsys):
    """Run a command that fails, and return its one line."""

    def call(*arguments):
        assert cli.main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"mfac {arguments[0]}: error: ")
        return error

    return call
