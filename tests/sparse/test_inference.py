"""Sparse linear layers compute what dense ones compute, and hide it well."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from mfac_hf import to_sparse_inference
from mfac_hf.pruning.targets import find_targets
from mfac_hf.sparse.inference import SparseLinear
from tests.helpers.models import CONFIG, prune
from tests.helpers.sparse_files import assert_same_state


def linear(inputs=48, outputs=24, sparsity=0.8, bias=True, dtype=torch.float32):
    """A random layer with random zeros and one negative zero."""
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < sparsity] = 0
        layer.weight[0, 0] = -0.0
    return layer


@torch.no_grad()
@pytest.mark.parametrize("piece", [None, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (3, 48), (2, 9, 48), (0, 48)])
def test_output_equals_the_dense_layer(shape, bias, piece):
    """In float64, where a wrong product and rounding cannot be confused."""
    layer = linear(bias=bias, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(SparseLinear(layer, piece=piece)(x), layer(x), rtol=1e-12, atol=1e-12)


def test_state_dict_is_that_of_the_dense_layer():
    layer = linear()
    sparse = SparseLinear(layer)
    positive = layer.state_dict() | {"weight": torch.where(layer.weight == 0, 0.0, layer.weight.detach())}
    assert_same_state(sparse.state_dict(), positive)
    other = linear(sparsity=0.3)
    sparse.load_state_dict(other.state_dict())
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in sparse.state_dict().items())
    assert sparse.values.numel() == int((other.weight != 0).sum())  # without the negative zero
    with pytest.raises(RuntimeError, match=r"weight has shape \(24, 9\); expected \(24, 48\)"):
        sparse.load_state_dict(linear(inputs=9).state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*weight"):
        sparse.load_state_dict({"bias": other.bias})
    with pytest.raises(ValueError, match="bfloat16"):
        SparseLinear(linear(dtype=torch.bfloat16))


def test_copies_and_pickles():
    sparse = SparseLinear(linear(), piece=8)
    x = torch.randn(20, 48)
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(twin(x), sparse(x))
    assert "48, 24, sparsity=0.79" in repr(sparse)


@torch.no_grad()
def test_model_computes_the_same_and_stays_as_it_was():
    torch.manual_seed(0)
    model = prune(BertForSequenceClassification(BertConfig(**CONFIG))).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparse = to_sparse_inference(model, min_speedup=0)
    assert model.training and not sparse.training
    replaced = [name for name, module in sparse.named_modules() if isinstance(module, SparseLinear)]
    assert len(replaced) == 12 and all(".encoder." in name for name in replaced)
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    assert_same_state(model.state_dict(), before)
    assert_same_state(sparse.state_dict(), before)
    # what stays dense is shared, not copied
    assert sparse.classifier.weight is model.classifier.weight
    ids = torch.randint(0, 60, (3, 16))
    difference = sparse(ids).logits - model.eval()(ids).logits
    assert difference.abs().max() <= 1e-5  # rounding in another order
    sparse.load_state_dict({name: tensor * 2 for name, tensor in before.items()})
    assert_same_state(sparse.state_dict(), {name: tensor * 2 for name, tensor in before.items()})


def test_only_plain_float_layers_with_zeros_are_replaced():
    class Scaled(nn.Linear):
        """Computes something else than nn.Linear."""

    model = nn.Sequential(nn.Linear(8, 8), linear(8, 8), linear(8, 8).bfloat16(), Scaled(8, 8))
    nn.init.zeros_(model[3].weight)
    sparse = to_sparse_inference(model, min_speedup=0)
    assert [type(module) for module in sparse] == [nn.Linear, SparseLinear, nn.Linear, Scaled]
    with pytest.raises(ValueError, match="tokens is 0"):
        to_sparse_inference(model, tokens=0)


def test_layer_that_is_not_faster_stays_dense(caplog):
    model = nn.Sequential(linear(8, 8))
    with caplog.at_level("INFO", logger="mfac_hf"):
        slow = to_sparse_inference(model, min_speedup=float("inf"))
    assert type(slow[0]) is nn.Linear
    assert "0 of 1 linear layers" in caplog.text


def test_weight_takes_memory_when_something_computes_with_it(monkeypatch):
    layer = linear()
    sparse = SparseLinear(layer)
    assert torch.equal(sparse.weight @ torch.eye(48), layer.weight)
    assert torch.equal(torch.cat([sparse.weight, sparse.weight]), torch.cat([layer.weight, layer.weight]))
    monkeypatch.setattr(SparseLinear, "dense", lambda self: pytest.fail("put together"))
    weight = sparse.weight
    assert isinstance(weight, torch.Tensor) and weight.dtype == torch.float32
    assert weight.shape == (24, 48) and weight.device.type == "cpu"


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_t5_asks_for_no_dense_weight(gated, monkeypatch):
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    kind = "gated-gelu" if gated else "relu"
    model = T5ForConditionalGeneration(T5Config(feed_forward_proj=kind, **sizes)).eval()
    for weight in find_targets(model).values():
        weight[torch.rand_like(weight) < 0.8] = 0
    sparse = to_sparse_inference(model, min_speedup=0)
    assert sum(isinstance(module, SparseLinear) for module in sparse.modules()) == len(find_targets(model))
    inputs = {"input_ids": torch.randint(0, 60, (2, 9)), "decoder_input_ids": torch.randint(0, 60, (2, 5))}
    expected = model(**inputs).logits
    monkeypatch.setattr(SparseLinear, "dense", lambda self: pytest.fail("put together"))
    torch.testing.assert_close(sparse(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_layers_of_gpt2_are_transposed():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=16)).eval()
    targets = find_targets(model)
    for weight in targets.values():
        weight[torch.rand_like(weight) < 0.8] = 0
    sparse = to_sparse_inference(model, min_speedup=0)
    assert {f"{n}.weight" for n, m in sparse.named_modules() if isinstance(m, SparseLinear)} == targets.keys()
    assert_same_state(sparse.state_dict(), model.state_dict())
    ids = torch.randint(0, 60, (2, 9))
    torch.testing.assert_close(sparse(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    layer = next(module for module in sparse.modules() if isinstance(module, SparseLinear))
    assert layer.weight.shape == (32, 96) == tuple(layer.dense().shape)


def test_wrapped_model_is_unwrapped():
    model = nn.Sequential(linear(8, 8))
    sparse = to_sparse_inference(torch.compile(nn.DataParallel(model), backend="eager"), min_speedup=0)
    assert type(sparse) is nn.Sequential and isinstance(sparse[0], SparseLinear)
