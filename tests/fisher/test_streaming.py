"""Portions of a window in host memory: whatever the device does first, the same bits; and every wait is needed."""

import pytest
import torch

from mfac_hf.fisher import dense, streaming
from mfac_hf.fisher.dense import DenseColumns
from tests.helpers.lanes import DisorderedLane

ROWS, DIM = 5, 5 * 2048 + 777
ORDERS = ["late", "transfers", "computing", *range(20)]


@pytest.fixture
def stream_of(monkeypatch):
    """Makes a stream of portions of 2,048 columns."""
    monkeypatch.setattr(streaming, "PORTION_BYTES", 1)
    return lambda lane, dtype=torch.float32: streaming.Stream(ROWS, dtype, lane)


def make_window():
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))


def two_sweeps(stream):
    """A sweep that writes a row, and one that reads it: the window, and what the second found."""
    window_MD, found = make_window(), []

    def write(portion_MC, place):
        portion_MC[2] = portion_MC[0] + portion_MC[3:].sum(0)

    stream.sweep(window_MD, slice(0, DIM), write, writes=2)
    stream.sweep(window_MD[:4], slice(100, DIM), lambda portion_MC, place: found.append(portion_MC.clone()))
    return window_MD, torch.cat(found, dim=1)


def expected():
    window_MD = make_window()
    window_MD[2] = window_MD[0] + window_MD[3:].sum(0)
    return window_MD, window_MD[:4, 100:]


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_gives_the_same_bits(stream_of, order):
    lane = DisorderedLane(order)
    for found, right in zip(two_sweeps(stream_of(lane)), expected(), strict=True):
        assert torch.equal(found, right)
    assert not any(lane.queues["computing"])


@pytest.mark.parametrize("wait", ["transfer_after", "compute_after", "wait"])
def test_every_wait_is_needed(stream_of, wait):
    right = expected()
    wrong = [
        order
        for order in ORDERS
        if not all(map(torch.equal, two_sweeps(stream_of(DisorderedLane(order, ignores=(wait,)))), right))
    ]
    assert wrong


def test_the_next_portion_is_on_its_way_while_one_is_computed(stream_of):
    """When computing never starts by itself, the transfer of the second portion is done before the first is used."""
    lane = DisorderedLane("transfers")
    arrived = []
    transfer = lane.transfer

    def watched(target, source):
        number = len(arrived)
        arrived.append(False)

        def copy():
            target.copy_(source)
            arrived[number] = True

        lane._ask("transfers", copy)

    assert transfer
    lane.transfer = watched
    seen = []
    stream_of(lane).sweep(make_window(), slice(0, DIM), lambda portion_MC, place: seen.append(sum(arrived)))
    assert seen == [2, 3, 4, 5, 6, 6]


def test_columns_are_whole_runs_and_few_numbers_are_one_portion(monkeypatch):
    stream = streaming.Stream(8, torch.bfloat16, DisorderedLane("late"))
    assert stream.columns % streaming.RUN == 0 and stream.columns * 8 * 2 == streaming.PORTION_BYTES
    places = []
    stream.sweep(torch.zeros(8, 10, dtype=torch.bfloat16), slice(0, 10), lambda _, place: places.append(place))
    stream.sweep(torch.zeros(8, 0, dtype=torch.bfloat16), slice(0, 0), lambda _, place: places.append(place))
    assert places == [slice(0, 10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_of_a_streamed_store_are_those_of_a_whole_one(monkeypatch, dtype):
    monkeypatch.setattr(streaming, "PORTION_BYTES", 1)
    monkeypatch.setattr(dense, "make_lane", lambda device: DisorderedLane(7))
    whole = DenseColumns(ROWS, DIM, dtype=dtype)
    whole.buffer_MD.copy_(make_window())
    streamed = DenseColumns(ROWS, DIM, buffer=whole.buffer_MD, compute_device=torch.device("cpu", 0))
    weights_M = torch.linspace(-1, 1, ROWS, dtype=torch.float64)
    x_D = torch.randn(DIM, generator=torch.Generator().manual_seed(1))
    # Sums of whole runs, added up in float64 in another order.
    torch.testing.assert_close(streamed.dots(1, 4), whole.dots(1, 4), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(streamed.project(x_D, 5), whole.project(x_D, 5), rtol=1e-12, atol=1e-10)
    for wide in (None, torch.float64):
        torch.testing.assert_close(
            streamed.combine(weights_M, dtype=wide), whole.combine(weights_M, dtype=wide), rtol=1e-6, atol=1e-6
        )
    fewer = streamed.select(torch.arange(0, DIM, 2), ROWS)
    assert (
        torch.equal(fewer.buffer_MD, whole.buffer_MD[:, ::2]) and fewer._stream is None
    )  # the lane's device is a CPU


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="streamed to CUDA devices, not to meta"):
        streaming.make_lane(torch.device("meta"))
