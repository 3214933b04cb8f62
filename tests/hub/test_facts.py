"""Facts are gathered from results and weights that belong together; anything else is refused."""

import pytest
from torch import nn

from mfac_hf import save_sparse
from mfac_hf.hub.facts import CardOptions, collect
from mfac_hf.hub.run_records import MissingResultsError
from tests.helpers.models import prune
from tests.helpers.results import run


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
