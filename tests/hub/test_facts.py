"""Facts are gathered from results and weights that belong together; anything else is refused."""

import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from mfac_hf import save_sparse
from mfac_hf.hub.facts import CardOptions, collect
from mfac_hf.hub.run_records import MissingResultsError
from tests.helpers.models import CONFIG, prune
from tests.helpers.results import log, pruned, run


def test_missing_results_are_refused(bert, tmp_path):
    bert.save_pretrained(tmp_path / "model")
    with pytest.raises(MissingResultsError, match="no result file"):
        collect([], model=tmp_path / "model")
    with pytest.raises(MissingResultsError, match=r"89.7% of the weights are zero, .*the dense model are missing"):
        collect([run(1, 0.8)], model=tmp_path / "model")
    with pytest.raises(MissingResultsError, match="lacks command"):
        collect([run(1, 0.8)], model=tmp_path / "model", options=CardOptions(dense=[run(1, 0.9, command=None)]))


def test_results_of_something_else_are_refused(bert, tmp_path):
    bert.save_pretrained(tmp_path)

    def refused(message, runs, dense=()):
        with pytest.raises(ValueError, match=message):
            collect(runs, model=tmp_path, options=CardOptions(dense=dense))

    reports = [{"options": {}, "sparsity": 0.5, "steps": []}]
    refused(
        "the run pruned to 0.5000 and the weights have a sparsity of 0.8975",
        [run(1, 0.8, pruning={"reports": reports})],
        [run(1, 0.9)],
    )
    refused(r"repeat a seed: \[1, 1\]", [run(1, 0.8), run(1, 0.7)], [run(1, 0.9)])
    other = run(1, 0.9)
    other["results"]["evaluated_on"] = ["held_out"]
    refused("do not belong together: split 'validation' and 'held_out'", [run(1, 0.8)], [other])
    other = run(1, 0.9)
    other["results"]["eval_f1"] = 0.5
    refused("different metrics", [run(1, 0.8)], [other])


def test_the_class_that_is_given_is_looked_up(tmp_path):
    save_sparse(prune(nn.Linear(3, 3)), tmp_path)
    with pytest.raises(ValueError, match="does not say of which class it is"):
        collect([run(1, 0.8)], model=tmp_path)
    with pytest.raises(ValueError, match="'mfac_hf.nothing.Net' cannot be imported"):
        collect([run(1, 0.8)], model=tmp_path, options=CardOptions(model_class="mfac_hf.nothing.Net"))


def test_name_and_base_model(bert, tmp_path):
    """The directory, the class or the options name a model; a base model counts where the Hub can have it."""
    bert.save_pretrained(tmp_path / "sst2-90")
    dense = CardOptions(dense=[run(1, 0.9)])
    found = collect([run(1, 0.8)], model=tmp_path / "sst2-90", options=dense)
    assert found["name"] == "sst2-90" and found["base_model"] == "google/bert_uncased_L-2_H-128_A-2"
    assert found["latency"] is None and found["sparse"] and len(found["dense_runs"]) == 1
    assert collect([run(1, 0.8)], model=bert, options=dense)["name"] == "BertForSequenceClassification"
    local = run(1, 0.8)
    for path in (str(tmp_path), "../models/bert"):
        local["arguments"]["ModelArguments"]["model_name_or_path"] = path
        assert collect([local], model=bert, options=dense)["base_model"] is None


REPORTS = {"reports": [{"options": {}, "sparsity": 0.8975, "steps": []}]}


def test_a_pruning_among_the_dense_results_is_refused_by_name(bert, tmp_path):
    for name, content in (("sst2-90.json", run(7, 0.7, REPORTS)), ("pruning.json", pruned()), ("log.json", log())):
        path = tmp_path / name
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"{name} records a pruning .*leave it out of the dense results"):
            collect([run(1, 0.8)], model=bert, options=CardOptions(dense=[run(1, 0.9), path]))
    same = run(1, 0.8)
    with pytest.raises(ValueError, match="the run of seed 1 is given as a result and as dense"):
        collect([same], model=bert, options=CardOptions(dense=[same]))


def test_all_runs_pruned_alike_or_none_did(bert):
    dense = CardOptions(dense=[run(1, 0.9)])
    with pytest.raises(ValueError, match="of seeds 1 and 2 one records a pruning and the other none"):
        collect([run(1, 0.8, REPORTS), run(2, 0.9)], model=bert, options=dense)
    other = {"reports": [{**REPORTS["reports"][0], "sparsity": 0.5}]}
    with pytest.raises(ValueError, match="the run pruned to 0.5000 .*the result file of seed 2 is not that of these"):
        collect([run(1, 0.8, REPORTS), run(2, 0.9, other)], model=bert, options=dense)
    assert len(collect([run(1, 0.8, REPORTS), run(2, 0.9, REPORTS)], model=bert, options=dense)["runs"]) == 2


def test_local_models_are_no_base_model(bert, tmp_path, monkeypatch):
    """Where the card is made, the directory that a run began with need not be."""
    monkeypatch.chdir(tmp_path)
    options = CardOptions(dense=[run(1, 0.9)])

    def base_model(name, **recorded):
        record = run(1, 0.8, **recorded)
        record["arguments"]["ModelArguments"]["model_name_or_path"] = name
        return collect([record], model=bert, options=options)["base_model"]

    assert base_model("outputs/base") == "outputs/base", "nothing tells it from a name on the Hub"
    assert base_model("outputs/base", base_model_is_local=True) is None
    for name in ("./base", "~/base", "/base", "base.pth", "model.safetensors", "a/b/c"):
        assert base_model(name) is None, name
    (tmp_path / "outputs" / "base").mkdir(parents=True)
    assert base_model("outputs/base") is None


def test_a_sparse_file_that_saves_little_is_not_listed(tmp_path):
    """Here most weights are embeddings; `push_to_hub` leaves the file out."""
    torch.manual_seed(0)
    model = prune(BertForSequenceClassification(BertConfig(**{**CONFIG, "vocab_size": 20_000})))
    found = collect([run(1, 0.8)], model=model, options=CardOptions(dense=[run(1, 0.9)]))
    assert found["sparse"] and list(found["files"]) == ["model.safetensors"]
