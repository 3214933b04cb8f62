"""Operators answer by their PyTorch implementation until a native kernel is there, and are not loaded while traced."""

import pytest
import torch

from mfac_hf.ops import registry


@pytest.fixture(scope="module", autouse=True)
def doubled():
    """An operator that no native library knows."""
    registry.register(
        "test_doubled(Tensor x, float factor=2.0) -> Tensor",
        lambda x, factor=2.0: factor * x,
        lambda x, factor=2.0: torch.empty_like(x),
    )


@pytest.fixture
def loads(monkeypatch):
    """The kinds of devices for which kernels were asked."""
    kinds = []
    monkeypatch.setattr(registry, "load_native", kinds.append)
    return kinds


def test_operator_answers_by_its_pytorch_implementation(loads):
    x = torch.tensor([1.0, -3.0])
    assert registry.operators_for(x).test_doubled(x).tolist() == [2, -6]
    assert registry.operators_for(x.to("meta")).test_doubled(x.to("meta"), 3.0).shape == (2,)
    assert loads == ["cpu", "meta"]
    torch.library.opcheck(torch.ops.mfac.test_doubled.default, (x, 3.0))


def test_nothing_is_loaded_while_a_graph_is_traced(loads):
    compiled = torch.compile(lambda x: registry.operators_for(x).test_doubled(x) + 1, backend="eager", fullgraph=True)
    assert compiled(torch.ones(3)).tolist() == [3, 3, 3]
    assert loads == []


def test_a_name_is_registered_once():
    with pytest.raises(RuntimeError, match="test_doubled"):
        registry.register("test_doubled(Tensor x) -> Tensor", lambda x: x, lambda x: x)
