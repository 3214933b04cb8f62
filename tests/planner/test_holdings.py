"""Shards, and tables that are stored by rows or not, as FSDP2 and the optimizer have them."""

import pytest
import torch
from torch import nn

from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.planner.holdings import Model, column_bytes, is_table, owned_pieces, owners_of, shard_rows

OPTIONS = ParameterWindowOptions(metric="adam", num_grads=8, damping=1.0, window_dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "shards", "rows"), [((7, 3), 4, [2, 2, 2, 1]), ((5,), 4, [2, 2, 1, 0]), ((), 2, [1, 0])]
)
def test_shards_are_those_of_chunk(shape, shards, rows):
    assert [shard_rows(torch.empty(shape), shards, shard) for shard in range(shards)] == rows
    if shape:
        sizes = [len(part) for part in torch.empty(shape).chunk(shards)]
        assert sizes == [count for count in rows if count]


def test_a_table_is_dense_from_a_quarter_of_its_rows_on():
    words = nn.Parameter(torch.empty(4096, 16, device="meta"))
    assert is_table(words, Model([words], [], {words: 1024}), OPTIONS)
    assert not is_table(words, Model([words], [], {words: 1025}), OPTIONS)
    assert not is_table(words, Model([words], [], {}), OPTIONS)
    small = nn.Parameter(torch.empty(64, 16, device="meta"))
    assert not is_table(small, Model([small], [], {small: 1}), OPTIONS)


def test_ranks_share_everything_and_nothing_twice():
    shapes = [(4096, 16), (128, 128), (3,), (), (100, 7)]
    parameters = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    model = Model(parameters, [], {parameters[0]: 300})
    for ranks in (1, 3, 4):
        owners = owners_of(model, OPTIONS, ranks)
        pieces = [piece for rank in range(ranks) for piece in owned_pieces(model, OPTIONS, owners, rank)]
        assert sum(piece.numel for piece in pieces) == sum(p.numel() for p in parameters)
        whole = sum(column_bytes(p, model, OPTIONS) for p in parameters)
        held = sum(piece.window_bytes(OPTIONS) + piece.moment_bytes(OPTIONS) for piece in pieces)
        room = 8 * (300 // 4 + ranks) * (16 * 4 + 8)  # for a quarter more rows
        assert whole <= held <= whole + room
