"""The optimizer inside accelerate's wrapper is found, and anything else stays as it is."""

import torch
from accelerate import Accelerator

from mfac_hf import MFAC
from mfac_hf.optim.unwrap import unwrap_optimizer


def test_unwrap():
    optimizer = MFAC([torch.nn.Parameter(torch.ones(2))], num_grads=2)
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    assert wrapped is not optimizer
    assert unwrap_optimizer(wrapped) is unwrap_optimizer(optimizer) is optimizer
    assert unwrap_optimizer(None) is None
