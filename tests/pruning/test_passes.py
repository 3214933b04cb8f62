"""What tells examples apart, what comparisons have shown, and the queue of passes."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from mfac_hf.pruning.passes import (
    PassQueue,
    Verdicts,
    device_of,
    example_bytes,
    joined,
    kind_of,
    longest_first,
    memory_budget,
    statistics,
    unlike_examples,
)

IDS = torch.tensor([[5, 6, 7], [8, 9, 0], [3, 4, 2]])
BATCH = {
    "input_ids": IDS,
    "labels": IDS.masked_fill(IDS == 4, -100),
    "weights": torch.tensor([1.0, 1.0, 3.0]),
    "pixels": torch.rand(3, 4, 4),
    "scale": torch.tensor(2.0),
    "table": torch.zeros(7, 2).long(),
    "nested": [torch.tensor([True, False, True])],
}


def test_examples_are_told_apart_by_labels_zeros_and_numbers_of_their_own():
    values = {name: column.tolist() for name, column in statistics(BATCH, 3).items()}
    assert values == {
        "batch.input_ids: ignored": [0, 0, 0],
        "batch.input_ids: zeros": [0, 1, 0],
        "batch.labels: ignored": [0, 0, 1],
        "batch.labels: zeros": [0, 1, 0],
        "batch.weights": [1, 1, 3],
        "batch.nested.0": [1, 0, 1],
    }
    assert unlike_examples(statistics(BATCH, 3), 3) == [0, 1, 2]
    assert unlike_examples({}, 9) == [0, 1] and unlike_examples({}, 1) == [0]
    assert unlike_examples({"x": torch.tensor([1.0, 1, 1, 0, 2])}, 5) == [0, 1, 3, 4]


def test_a_verdict_holds_for_what_it_has_seen():
    verdicts = Verdicts()
    assert verdicts.known({"labels": (0, 3)}) is None
    verdicts.add({"labels": (0, 3)}, True)
    verdicts.add({"labels": (5, 7)}, False)
    for ranges, known in {(0, 3): True, (1, 2): True, (1, 4): None, (4, 8): False, (5, 6): None, None: True}.items():
        assert verdicts.known({"labels": ranges}) is known
    assert verdicts.known({"others": (1, 2)}) is None
    assert verdicts.known({"labels": (1, 2), "mask": (0, 9)}) is None, "something that was not there"


def test_what_is_alike_in_a_batch_tells_nothing_apart():
    """Such as padding to a length that each batch has anew: else each batch would be compared."""
    lengths = [Verdicts.ranges({"zeros": torch.tensor([n, n]), "labels": torch.tensor([0, 1])}) for n in (7, 9)]
    assert lengths[0] == lengths[1] == {"zeros": None, "labels": (0, 1)}
    verdicts = Verdicts()
    verdicts.add(lengths[0], True)
    assert verdicts.known(lengths[1]) is True
    assert verdicts.known({"zeros": (7, 9), "labels": (0, 1)}) is None


def test_comparing_ends_where_nothing_agrees():
    verdicts = Verdicts()
    for i in range(8):
        assert verdicts.known({"x": (i, i + 1)}) is None
        verdicts.add({"x": (i, i + 1)}, False)
    assert verdicts.known({"x": (99, 100)}) is False
    stopped = Verdicts()
    stopped.add({"x": (0, 9)}, True)
    stopped.stop()
    assert stopped.known({"x": (1, 2)}) is False


def test_texts_come_longest_first():
    rows = [{"input_ids": [1] * n} for n in (3, 9, 3, 5)]
    assert longest_first(rows, [2, 0, 3, 1]) == [1, 3, 2, 0], "of equal ones in the given order"
    assert longest_first(rows, []) == []
    assert longest_first([(torch.zeros(2), 1), (torch.zeros(9), 0)], [0, 1]) == [0, 1], "no texts"

    class Lists(torch.utils.data.Dataset):
        """As data sets that read many examples at once may be."""

        def __getitems__(self, indices):
            return [rows[i] for i in indices]

    assert longest_first(Lists(), [0, 1]) == [1, 0]
    assert longest_first([{"input_ids": [1]}, {"pixel_values": 0}, {"input_ids": [1, 1]}], [0, 1, 2]) == [2, 0, 1]


def draw():
    return torch.rand(1).item(), random.random(), np.random.rand()


def test_a_pass_that_was_cut_is_drawn_again():
    queue, seen = PassQueue([7, 8, 9, 4, 5], 3, shared=True), []
    for examples in queue:
        drawn = draw()
        if queue.shared and 8 in examples:
            expected = drawn
            queue.cut()
            continue
        seen.append((examples, queue.shared, drawn))
    assert [(examples, shared) for examples, shared, _ in seen] == [
        ([7], False), ([8], False), ([9], False), ([4, 5], True),
    ]  # fmt: skip
    assert seen[0][2] == expected


def test_batches_of_one_kind_are_joined():
    first, second = (
        {"x": torch.full((1, 2), i), "y": [torch.tensor([i])], "n": 3, "s": torch.tensor(1)} for i in (1, 2)
    )
    assert kind_of(first) == kind_of(second)
    both = joined([first, second])
    assert both["x"].tolist() == [[1, 1], [2, 2]] and both["y"][0].tolist() == [1, 2] and both["n"] == 3
    assert kind_of({"x": torch.zeros(1, 3).long()}) != kind_of({"x": torch.zeros(1, 2).long()})
    assert kind_of({"x": torch.tensor([[-100, 1]])}) != kind_of({"x": torch.tensor([[1, 1]])})


def test_the_bytes_of_an_example_are_those_that_autograd_keeps():
    model, x = nn.Sequential(nn.Linear(100, 50, bias=False), nn.Tanh(), nn.Linear(50, 1)), torch.rand(1, 100)
    assert example_bytes(model, lambda: model(x).sum()) == 2 * 4 * (100 + 50) + 3 * 4 * 100  # input and tanh's output
    assert all(p.grad is None for p in model.parameters())


def test_a_budget_is_what_was_given_or_a_share_of_what_is_free(monkeypatch):
    monkeypatch.setattr("mfac_hf.pruning.passes.available_bytes", lambda device: 1000)
    cpu = torch.device("cpu")
    assert memory_budget(7, cpu, 0.5) == 7 and memory_budget(None, cpu, 0.25) == 250
    assert memory_budget(None, torch.device("meta"), 0.5) > 1 << 60


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_queue_has_every_example_once(size):
    assert [i for examples in PassQueue(range(5), size) for i in examples] == [0, 1, 2, 3, 4]


def test_a_model_with_weights_elsewhere_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="1.weight is on the meta device: accelerate has offloaded it"):
        device_of(model)
    assert device_of(model[0]) == torch.device("cpu")
