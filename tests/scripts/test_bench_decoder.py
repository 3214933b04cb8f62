"""The benchmark of decoders prunes one, which writes afterwards, in a process of its own."""

import pytest
from bench import decoder as bench


@pytest.mark.slow
def test_decoder(capsys):
    row = bench.benchmark_decoder("tiny", 4, 0.5)
    assert row["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert row["zeros"] >= row["sparsity"] - 1e-9
    assert row["tokens_written"] == bench.NEW_TOKENS
    assert row["targets"] < row["parameters"] == row["model_gib"] * 2**30 / 4
    assert 0 <= row["beside_model_gib"] < 2
    bench.print_decoders([row])
    assert "| tiny |" in capsys.readouterr().out
