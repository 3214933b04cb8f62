"""`mfac estimate --ranks`: the plan as text and JSON, of a configuration and of a number."""

import json

import pytest
import torch
import transformers

from mfac_hf import cli, plan_ranks
from mfac_hf.planner import MACHINES

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def test_a_configuration_is_planned_with_its_dtype(tmp_path, capsys):
    config = transformers.BertConfig(**SMALL, architectures=["BertForSequenceClassification"], dtype="bfloat16")
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(config)
    flags = ["--ranks", "4", "--share_window", "True", "--embedding_rows", "100"]
    for more, dtype in (([], torch.bfloat16), (["--model_dtype", "float32"], torch.float32)):
        assert cli.main(["estimate", str(tmp_path), *flags, *more, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        plan = plan_ranks(model.to(dtype), ranks=4, share_window=True, embedding_rows=100)
        found = report["plan"]
        assert [held["total"] for held in found["bytes_held"]] == [holding.total for holding in plan.holdings]
        assert found["collectives"][0]["payload"] == sum(p.nbytes for p in model.parameters())
        assert found["step_seconds"] == plan.step_seconds and found["shares_window"] and report["step_seconds"] is None
    assert cli.main(["estimate", str(tmp_path), *flags, *more]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("counted: BertForSequenceClassification") and shown.strip().endswith(plan.breakdown)


def test_speeds_and_shards(capsys):
    speeds = ["--memory_bandwidth", "100", "--network_bandwidth", "25", "--latency", "5"]
    flags = ["--ranks", "8", "--shards", "4", "--machine", "h100-infiniband", "--num_grads", "4", *speeds]
    assert cli.main(["estimate", "1000000", *flags]) == 0
    speeds = {"memory_bandwidth": 100e9, "network_bandwidth": 25e9, "latency": 5 * 1e-6}
    machine = MACHINES["h100-infiniband"]._replace(**speeds)
    assert capsys.readouterr().out == plan_ranks(10**6, 4, ranks=8, shards=4, machine=machine).breakdown + "\n"


def test_lora_of_a_7b_llama(tmp_path, capsys):
    """The shapes of its factors, and of the weights that they stand beside, without any weights."""
    pytest.importorskip("peft")
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2, "num_attention_heads": 32}
    config = transformers.LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(tmp_path)
    flags = ["--lora_rank", "16", "--lora_targets", "all-linear", "--ranks", "8", "--shards", "8", "--json"]
    assert cli.main(["estimate", str(tmp_path), *flags]) == 0
    held = json.loads(capsys.readouterr().out)["plan"]["bytes_held"][0]
    factors = 2 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))  # of two layers
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    frozen = 2 * layer + 2 * 32_000 * 4096 + 4096
    assert held["parameters"] == (4 * factors + 2 * frozen) // 8 and held["gradients"] == 4 * factors // 8
    assert held["window"] == 8 * 2 * factors // 8 and held["second_moment"] == 4 * factors // 8


def test_bad_input_is_one_line(refused):
    assert "--shards 2 needs --ranks" in refused("estimate", "1000", "--shards", "2")
    assert "--machine abacus: expected one of laptop, h100" in refused(
        "estimate", "1000", "--ranks", "2", "--machine", "abacus"
    )
    assert "ranks is 0; expected at least 1" in refused("estimate", "1000", "--ranks", "0")
    assert "expected a multiple of 3 ranks" in refused("estimate", "1000", "--ranks", "4", "--shards", "3")
    assert "memory_bandwidth of the machine is -1" in refused(
        "estimate", "1000", "--ranks", "2", "--memory_bandwidth", "-1"
    )
    assert "--model_dtype float16 needs a model" in refused(
        "estimate", "1000", "--ranks", "2", "--model_dtype", "float16"
    )
