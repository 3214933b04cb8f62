"""`mfac estimate`: memory and time, of a configuration and of a number."""

import json

import torch

from mfac_hf import cli, memory_estimate


def test_estimate_of_a_configuration_and_of_a_number(outputs, bert, capsys):
    (outputs / "sst2-90" / "model.safetensors").unlink()  # the configuration is enough
    flags = ["--num_grads", "16", "--dtype", "bfloat16", "--json", "--no_time"]
    assert cli.main(["estimate", str(outputs / "sst2-90"), *flags]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == memory_estimate(bert, 16, torch.bfloat16).bytes and report["step_seconds"] is None
    assert cli.main(["estimate", "1000000", "--num_grads", "8"]) == 0
    shown = capsys.readouterr().out
    assert "dense: 8 x 1,000,000 x 4 bytes" in shown and "fits" in shown and "ms in each step" in shown


def test_bad_input_is_one_line(refused):
    assert "num_grads is 0" in refused("estimate", "1000", "--num_grads", "0")
