"""Work on a model in the middle of its training that leaves no trace."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

__all__ = ["undisturbed"]


@contextlib.contextmanager
def undisturbed(model: nn.Module, parameters: Mapping[str, nn.Parameter], seed: int) -> Iterator[None]:
    """Inside the block: evaluation mode, seeded generators, gradients of the parameters. After it all is as before."""
    modes = {module: module.training for module in model.modules()}
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.enable_grad():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            model.eval()
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, mode in modes.items():
            module.training = mode
        for parameter in frozen:
            parameter.requires_grad_(False)
