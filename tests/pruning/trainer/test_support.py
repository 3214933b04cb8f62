"""Ways of training that the pruning callback refuses, and the model without float16."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mfac_hf.pruning.trainer.support import refuse_unsupported, without_fp16


def arguments(**options):
    return SimpleNamespace(**{"n_gpu": 0, "save_strategy": "steps", "fp16": False, **options})


def test_what_is_not_supported_is_refused():
    model, state = nn.Linear(2, 2), SimpleNamespace(is_hyper_param_search=False)
    refuse_unsupported(arguments(), state, model)
    with pytest.raises(ValueError, match="one process for 2 GPUs"):
        refuse_unsupported(arguments(n_gpu=2), state, model)
    with pytest.raises(ValueError, match="save_strategy='no'"):
        refuse_unsupported(arguments(), SimpleNamespace(is_hyper_param_search=True), model)
    refuse_unsupported(arguments(save_strategy="no"), SimpleNamespace(is_hyper_param_search=True), model)
    for mark, value in (("ds_id", 3), ("_is_flat_param", True), ("device_mesh", object())):
        model = nn.Linear(2, 2)
        setattr(model.bias, mark, value)
        with pytest.raises(ValueError, match="DeepSpeed ZeRO and FSDP shard the weights"):
            refuse_unsupported(arguments(), state, model)


def test_adapters_that_trainer_would_save_alone_are_refused():
    model, state = nn.Linear(2, 2), SimpleNamespace(is_hyper_param_search=False)
    model.peft_config = {"default": object()}
    with pytest.raises(ValueError, match="adapters of a PEFT model alone.*merge_and_unload"):
        refuse_unsupported(arguments(), state, model)
    refuse_unsupported(arguments(save_strategy="no"), state, model)


def test_float16_is_left_out_while_gradients_are_taken():
    """As accelerate wraps it: the model's own forward stays in `_original_forward`."""
    model = nn.Linear(2, 2)
    model._original_forward = model.forward
    model.forward = lambda x: torch.full_like(x, torch.inf)
    x = torch.ones(1, 2)
    with without_fp16(model, arguments(fp16=True)):
        assert torch.equal(model(x), nn.functional.linear(x, model.weight, model.bias))
    assert model(x).isinf().all()
    with without_fp16(model, arguments(bf16=True)):
        assert model(x).isinf().all(), "bfloat16 has the range of float32"
