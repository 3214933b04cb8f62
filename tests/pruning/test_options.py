"""Options of a pruning and its report."""

import dataclasses
import json
from typing import get_type_hints

import pytest

from mfac_hf.defaults import PAPER_PRUNING_DAMPING
from mfac_hf.pruning.options import PruningKeywords, PruningOptions
from tests.helpers.pruning_network import one_shot

FULL = PruningOptions(block_size=None, selection="diagonal")


def test_keywords_are_the_fields_with_their_types():
    assert get_type_hints(PruningKeywords) == get_type_hints(PruningOptions)


def test_automatic_damping_holds_examples_out_by_itself():
    assert PruningOptions(damping="auto").loss_samples == 256
    assert PruningOptions(damping="auto", method="magnitude").loss_samples == 0


def test_a_first_order_step_holds_examples_out_by_itself():
    assert PruningOptions(first_order=True).loss_samples == 1024
    assert PruningOptions(first_order=True, loss_samples=9).loss_samples == 9


def test_the_damping_is_that_of_the_fisher():
    assert PruningOptions().damping is None
    assert PruningOptions(fisher="empirical").damping == PAPER_PRUNING_DAMPING == 1e-5
    assert PruningOptions(fisher="empirical", grad_batch_size=4).damping == 1e-5
    assert PruningOptions(damping=3e-4).damping == PruningOptions(fisher="empirical", damping=3e-4).damping == 3e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "greedy"}, "selection is 'greedy'; without blocks .* only 'diagonal'"),
        ({"pattern": "2:4"}, "pattern is '2:4'"),
        ({"scope": "uniform"}, "scope is 'uniform'"),
        ({"damping": "auto"}, "damping is 'auto'; without blocks"),
        ({"pages": 0}, "pages is 0"),
        ({"block_size": 0}, "block_size is 0; expected an integer of at least 1, or None"),
    ],
)
def test_what_the_full_fisher_does_not_offer_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FULL, **options)


def test_the_report_is_plain_json(model):
    report = one_shot(model, 0.6, recomputations=2, damping="auto", loss_samples=16)
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert told["options"]["fisher"] == "scaled" and told["options"]["fisher_floor"] == 1e-3
    assert told["options"]["damping"] == "auto" and told["options"]["recomputations"] == 2
    assert told["num_weights"] == 276 and told["sparsity_before"] == 0
    assert told["sparsity"] == pytest.approx(0.6, abs=1 / 276)
    assert set(told["sparsities"]) == {"0.weight", "2.weight", "4.weight"}
    assert told["predicted_loss_increase"] == sum(step["predicted_loss_increase"] for step in told["steps"])
    assert told["loss_before"] > 0 and told["loss_after"] > 0 and told["seconds"] > 0
    assert "masks" not in told
