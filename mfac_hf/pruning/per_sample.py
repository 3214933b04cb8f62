r"""Gradients of each example of a batch from one backward pass.

A linear layer computes :math:`y_{nt} = W x_{nt}` for each example n and position t. The gradient of its weight is a
sum over both, and keeping n apart costs one product more:

.. math:: \frac{\partial \ell_n}{\partial W} = \sum_t \frac{\partial \ell_n}{\partial y_{nt}} x_{nt}^\top

A convolution is the same over the patches of its input. Since examples do not meet in a model in evaluation mode, the
gradient of the batch's mean loss at :math:`y_{nt}` is that of :math:`\ell_n`, divided by the size of the batch.

This holds where the loss is the mean over examples, and every use of a weight is a call of its layer with examples in
the first dimension. Other models need a backward pass for each example; `mfac_hf.pruning.gradients` compares the two.
Extractive question answering needs one where examples are padded to the longest of their batch: its softmax runs over
all positions, padding among them, so that an example has another loss in another batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from mfac_hf.pruning.outputs import plain_gradients

__all__ = ["batch_gradients"]


def batch_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[], Tensor],
    batch_size: int,
    differentiate: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor | None]] = plain_gradients,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the gradients of each example of one batch, N x numel, parameter by parameter.

    Args:
        model: the model, in evaluation mode.
        parameters: weights of linear layers and two-dimensional convolutions, by name.
        loss: function that runs the model on the batch and returns the mean loss over its examples.
        batch_size: number of examples, N.
        differentiate: takes the loss and tensors inside the model, and returns its gradients by them.

    Yields:
        The name of each parameter, and its rows in float32: the next ones overwrite them.

    Raises:
        NotImplementedError: the gradients cannot be told apart this way; the message says why.
    """
    names: dict[Any, str] = {parameter: name for name, parameter in parameters.items()}
    # Not by getattr: the layers of adapters show the weight of the layer inside as theirs.
    layers: list[Any] = [module for module in model.modules() if module._parameters.get("weight") in names]
    for layer in layers:
        if not _is_plain(layer):
            raise NotImplementedError(f"{names[layer.weight]} belongs to {layer}")
    if missing := set(names.values()) - {names[layer.weight] for layer in layers}:
        raise NotImplementedError(f"{sorted(missing)[0]} is no layer's weight")
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def record(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls.append((layer, inputs[0].detach(), output))

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        value = loss()
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise NotImplementedError("the layers are not called, or are compiled and take no hooks")
    for layer, inputs, _ in calls:
        if len(inputs) != batch_size:
            raise NotImplementedError(f"{names[layer.weight]} sees inputs that are not one for each example")
    gradients = differentiate(value, [output for *_, output in calls])
    # One piece of memory for all: the system takes longer to hand out a new one than the products take.
    largest = max(parameter.numel() for parameter in parameters.values())
    memory = torch.empty(batch_size * largest, device=calls[0][1].device)
    for name, parameter in parameters.items():
        rows_ND = memory[: batch_size * parameter.numel()].view(batch_size, -1)
        found = False
        for (layer, inputs, _), gradient in zip(calls, gradients, strict=True):
            if layer.weight is parameter and gradient is not None:
                left, right = _factors(layer, inputs.float(), gradient.float() * batch_size)
                rows_ND.view(len(left), left.shape[1], -1).baddbmm_(left, right, beta=int(found))
                found = True
        yield name, rows_ND if found else rows_ND.zero_()


def _is_plain(layer: nn.Module) -> bool:
    """Return whether :func:`_factors` knows the gradient of the layer's weight."""
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, (nn.Linear, Conv1D))


def _factors(layer: nn.Module, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return two batches of matrices whose products are the gradients of a layer's weight, example by example.

    Args:
        layer: the layer.
        inputs: what it was called with.
        gradient: gradient of its output.
    """
    if isinstance(layer, nn.Conv2d):
        groups = layer.groups
        padding: Any = layer.padding  # numbers: _is_plain
        patches = functional.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
        patches_NGIL = patches.unflatten(1, (groups, -1))
        gradient_NGOL = gradient.flatten(2).unflatten(1, (groups, -1))
        return gradient_NGOL.flatten(0, 1), patches_NGIL.mT.flatten(0, 1)
    inputs_NTI = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    gradient_NTO = gradient.reshape(len(gradient), -1, gradient.shape[-1])
    if isinstance(layer, Conv1D):  # stores its weight as I x O
        return inputs_NTI.mT, gradient_NTO
    return gradient_NTO.mT, inputs_NTI
