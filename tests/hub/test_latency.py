"""What the measurement of a forward pass reports, whatever its time."""

import torch
from torch import nn

from mfac_hf.hub import latency
from mfac_hf.hub.latency import measure_latency, with_latency


def test_dense_and_sparse_are_timed_in_turns(bert, monkeypatch):
    calls = []
    monkeypatch.setattr(latency, "ROUNDS", 3)
    monkeypatch.setattr(latency, "to_sparse_inference", lambda model, tokens: nn.Sequential(model))
    bert.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape))
    found = measure_latency(bert.train(), sparse=True)
    assert calls == [(1, 16)] * 2 * (3 + 1), "the first round warms up; the model has 16 positions"
    assert set(found["seconds"]) == {"dense", "sparse"} and min(found["seconds"].values()) > 0
    assert found["calls"] == 3 and found["example"] == "1 x 16 tokens" and found["sparse_layers"] == 0
    assert found["threads"] == torch.get_num_threads() and found["torch"] == torch.__version__
    assert not bert.training


def test_images(monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 2))
    found = measure_latency(model, sparse=False)
    assert set(found["seconds"]) == {"dense"} and found["example"] == "1 image of 32 x 32"


def test_a_directory_is_loaded_and_the_facts_given_stay(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", 1)
    bert.save_pretrained(tmp_path)
    facts = {"model": {"class": "transformers.BertForSequenceClassification"}, "sparse": False, "latency": None}
    found = with_latency(facts, tmp_path)
    assert facts["latency"] is None and found == {**facts, "latency": found["latency"]}
    assert found["latency"]["example"] == "1 x 16 tokens"
