"""The optimizer and the model inside their wrappers are found, and anything else stays as it is."""

import torch
from accelerate import Accelerator

from mfac_hf import MFAC
from mfac_hf.optim.unwrap import unwrap_model, unwrap_optimizer


def test_optimizer():
    optimizer = MFAC([torch.nn.Parameter(torch.ones(2))], metric="identity", num_grads=2)
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    assert wrapped is not optimizer
    assert unwrap_optimizer(wrapped) is unwrap_optimizer(optimizer) is optimizer
    assert unwrap_optimizer(None) is None


def test_model():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    compiled = torch.compile(model, backend="eager")
    for wrapped in (model, compiled, torch.nn.DataParallel(compiled), torch.compile(torch.nn.DataParallel(model))):
        assert unwrap_model(wrapped) is model

    class Holder(torch.nn.Module):
        """Has a `module` of its own, and is no wrapper."""

        def __init__(self):
            super().__init__()
            self.module = model

    holder = Holder()
    assert unwrap_model(holder) is holder
