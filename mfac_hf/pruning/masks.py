"""Masks: which weights of a model are kept."""

from torch import Tensor, nn

__all__ = ["masks_from_sparse_model"]


def masks_from_sparse_model(model: nn.Module) -> dict[Tensor, Tensor]:
    """Masks that keep a sparse model sparse: True where a weight is not zero, for ``MFAC(masks=...)``.

    Only weights of two or more dimensions that have both zeros and non-zeros get a mask. Biases and normalisation
    parameters are often initialised with zeros, and so are whole matrices (such as LoRA's second factor): a mask read
    off their values would freeze them for ever.

    Args:
        model: model with exact zeros where weights were pruned.

    Returns:
        {parameter: bool tensor of its shape, True = keep}; trainable parameters only.

    Raises:
        ValueError: if no weight has a zero among non-zeros: the model is dense.
    """
    padding = {m.weight: m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding)}
    masks: dict[Tensor, Tensor] = {}
    for parameter in model.parameters():
        keep = parameter.detach() != 0
        if padding.get(parameter) is not None:
            keep[padding[parameter]] = True  # zero by definition, not by pruning
        if parameter.requires_grad and parameter.ndim >= 2 and keep.any() and not keep.all():
            masks[parameter] = keep
    if not masks:
        raise ValueError("no weight matrix of this model has zeros among its values: it is dense, and needs no masks")
    return masks
