"""Bytes and seconds by formulas that are written down here once more."""

import pytest
import torch

from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.planner import Machine
from mfac_hf.planner.holdings import Piece
from mfac_hf.planner.traffic import Collective, work_of

MACHINE = Machine(1e9, 1e10, 1e9, 1e-5, 1e9, step_overhead=1e-3, tensor_overhead=1e-4)


@pytest.mark.parametrize(
    ("operation", "sent", "messages", "moved"),
    [
        ("all_reduce", 1500, 6, 1500),  # each rank sends three parts of four twice
        ("all_gather", 750, 3, 750),
        ("reduce_scatter", 750, 3, 750),
        ("broadcast", 750, 2, 1000),  # a tree of two levels, down which all bytes go
    ],
)
def test_collectives_of_four_ranks(operation, sent, messages, moved):
    one = Collective("gradients", "DDP", operation, 4, 1000)
    assert one.sent == sent and one.seconds(MACHINE) == pytest.approx(messages * 1e-5 + moved / 1e9)
    five = one._replace(calls=5)
    assert five.sent == sent and five.seconds(MACHINE) == pytest.approx(5 * messages * 1e-5 + moved / 1e9)


@pytest.mark.parametrize("metric", ["adam", "identity"])
def test_passes_over_dense_columns(metric):
    """As `scripts/bench/cost.py` has the floor of a step, and one more look at the gradient, for its norm."""
    m, b, d = 8, 2, 1000
    options = ParameterWindowOptions(metric=metric, num_grads=m, damping=1.0, window_dtype=torch.bfloat16)
    work = work_of([Piece(d, 4, None, 1, False)], options, None, 0)
    floor = 24 + 2 * m * b if metric == "adam" else 12 + (2 * m + 2) * b + 8
    assert work.bytes == d * (floor + 4) and work.flops == 4 * m * d and work.factor_flops == m**3 // 3
    assert work.seconds(MACHINE) == pytest.approx(work.bytes / 1e10 + work.factor_flops / 1e9 + 1e-3 + 1e-4)


def test_a_table_costs_the_rows_that_batches_touch():
    options = ParameterWindowOptions(metric="adam", num_grads=8, damping=1.0, window_dtype=torch.bfloat16)
    few, more = (work_of([Piece(64_000, 4, n, 64, False)], options, None, 0) for n in (10, 20))
    assert few.flops * 2 == more.flops == 4 * 8 * 20 * 64
    found = 64_000 * (8 + 12)  # the gradient twice for its rows and once for its norm, and the parameter
    assert few.bytes - found == (more.bytes - found) / 2 > 0
