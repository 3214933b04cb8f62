"""Masks: which weights of a model are kept. They hold the others at zero."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfac_hf.optim.mfac import MFAC
from mfac_hf.optim.unwrap import unwrap_model, unwrap_optimizer
from mfac_hf.pruning.mask_file import read_masks, write_masks

__all__ = ["MaskSet", "masks_from_sparse_model", "shortened"]


class MaskSet(Mapping[str, Tensor]):
    """Masks by parameter name: bool tensors of the parameter's shape, True where a weight is kept.

    The mapping is read like a dictionary. It changes only by :meth:`update`, which never brings a pruned weight back.
    A weight that several modules share has one mask, under the first of its names. Models may be wrapped in
    torch.compile, DistributedDataParallel or DataParallel; names are those of the model inside.

    Three things keep pruned weights at exactly zero in training: their gradients are zero (:meth:`attach`), the
    optimizer remembers nothing of them (:meth:`clear_optimizer_state`), and those that it moves all the same (AdamW
    does, by rounding and by its averages) are set back after its step (:meth:`apply`).

    Args:
        masks: {parameter name: bool tensor}.

    Raises:
        TypeError: a mask is no bool tensor.
        ValueError: there is no mask at all.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        if not masks:
            raise ValueError("a MaskSet of no parameter; name at least one")
        for name, keep in masks.items():
            if keep.dtype != torch.bool:
                raise TypeError(f"the mask of {name} is {keep.dtype}; expected torch.bool, True = keep")
        self._masks = dict(masks)
        self._handles: list[Any] = []

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self.keys() == other.keys() and all(
            keep.shape == other[name].shape and bool((keep == other[name].to(keep.device)).all())
            for name, keep in self.items()
        )

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} tensors, {self.numel:,} weights, sparsity {self.sparsity:.4f})"

    @classmethod
    def dense(cls, model: nn.Module, names: Iterable[str]) -> MaskSet:
        """Make masks that keep everything.

        Raises:
            ValueError: a name that is no parameter of the model, or none at all.
        """
        return cls({name: torch.ones_like(p, dtype=torch.bool) for name, p in _resolve(model, names).items()})

    @classmethod
    def from_model(cls, model: nn.Module, names: Iterable[str]) -> MaskSet:
        """Make masks of an already sparse model: its zeros stay pruned.

        A tensor that has only zeros counts as not trained yet (LoRA's second factor begins so) and is kept whole. So
        is the padding row of an embedding, which is zero by definition.

        Raises:
            ValueError: a name that is no parameter of the model, or none at all.
        """
        padding = {m.weight: m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding)}
        masks = {}
        for name, parameter in _resolve(model, names).items():
            keep = parameter.detach() != 0
            if padding.get(parameter) is not None:
                keep[padding[parameter]] = True
            masks[name] = keep if keep.any() else torch.ones_like(keep)
        return cls(masks)

    @property
    def numel(self) -> int:
        """Number of weights under a mask, kept or not."""
        return sum(keep.numel() for keep in self.values())

    @property
    def sparsity(self) -> float:
        """Share of the weights under a mask that is pruned."""
        return 1 - sum(int(keep.sum()) for keep in self.values()) / self.numel

    def sparsities(self) -> dict[str, float]:
        """Return the share of pruned weights by parameter name."""
        return {name: 1 - int(keep.sum()) / keep.numel() for name, keep in self.items()}

    def copy(self) -> MaskSet:
        """Return a copy that later updates leave alone, attached to nothing."""
        return MaskSet({name: keep.clone() for name, keep in self.items()})

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Take masks that prune more in place of the present ones; parameters that are not named keep theirs.

        Raises:
            ValueError: an unknown name, another shape, or a mask that would bring pruned weights back. Then nothing
                changes.
        """
        for name, keep in masks.items():
            if name not in self:
                raise ValueError(f"no mask for {name!r}; there are masks for {shortened(self)}")
            if keep.dtype != torch.bool or keep.shape != self[name].shape:
                raise ValueError(
                    f"a mask of shape {tuple(keep.shape)} and dtype {keep.dtype} for {name}; expected a bool tensor "
                    f"of shape {tuple(self[name].shape)}"
                )
            if revived := int((keep & ~self[name].to(keep.device)).sum()):
                raise ValueError(
                    f"the new mask of {name} brings back {revived} pruned weights; masks only ever shrink"
                )
        self._masks.update(masks)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError, with what differs, unless every mask has a parameter of its shape in the model."""
        self.parameters(model)

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the model's parameters that have masks, by name.

        Raises:
            ValueError: the masks belong to another model; the message names what differs.
        """
        of_model = dict(unwrap_model(model).named_parameters(remove_duplicate=False))
        differences = [f"{name} is no parameter of the model" for name in self if name not in of_model]
        differences += [
            f"{name} has shape {tuple(of_model[name].shape)} and its mask {tuple(keep.shape)}"
            for name, keep in self.items()
            if name in of_model and of_model[name].shape != keep.shape
        ]
        found = {name: of_model[name] for name in self if name in of_model}
        if not differences and len(set(found.values())) < len(found):
            shared = [name for name, p in found.items() if sum(p is other for other in found.values()) > 1]
            differences.append(f"{', '.join(shared)} share a weight and need one mask, under one of these names")
        if differences:
            raise ValueError(f"masks of another model: {shortened(differences, '; ')}")
        _refuse_absent(found)
        return found

    def parameter_masks(self, model: nn.Module) -> dict[Tensor, Tensor]:
        """Return the masks by parameter, on its device, as ``MFAC(masks=...)`` and ``MFAC.set_masks`` take them.

        Raises:
            ValueError: the masks belong to another model.
        """
        return {p: self[name].to(p.device) for name, p in self.parameters(model).items()}

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set every pruned weight of the model to exactly zero.

        Raises:
            ValueError: the masks belong to another model.
        """
        for parameter, keep in self.parameter_masks(model).items():
            parameter.masked_fill_(~keep, 0)

    def nonzeros(self, model: nn.Module) -> dict[str, int]:
        """Count the pruned weights that are not zero, by parameter name; empty where the model agrees with the masks.

        Raises:
            ValueError: the masks belong to another model.
        """
        counts = {
            name: int((p.detach()[~self[name].to(p.device)] != 0).sum()) for name, p in self.parameters(model).items()
        }
        return {name: count for name, count in counts.items() if count}

    def attach(self, model: nn.Module) -> None:
        """Zero the gradients of pruned weights as they accumulate, from now until :meth:`detach`.

        Clipping then does not count them. The hooks follow later updates of the masks. Frozen parameters have no
        gradient and get no hook.

        Raises:
            ValueError: the masks belong to another model.
            RuntimeError: they are attached already.
        """
        if self._handles:
            raise RuntimeError("these masks are attached already; detach them first")
        for name, parameter in self.parameters(model).items():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._hook(name)))

    def _hook(self, name: str) -> Any:
        def zero_pruned(parameter: Tensor) -> None:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~self[name].to(parameter.device), 0)

        return zero_pruned

    def detach(self) -> None:
        """Remove the hooks of :meth:`attach`, if there are any."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def clear_optimizer_state(self, model: nn.Module, optimizer: Any) -> None:
        """Zero what an optimizer remembers of pruned weights.

        That is every floating-point state of the parameter's shape, such as AdamW's ``exp_avg`` and ``exp_avg_sq`` or
        a ``momentum_buffer``. An `MFAC` gets the masks too, and its window drops the pruned columns.

        Args:
            model: the model.
            optimizer: its optimizer, bare or as accelerate wraps it.

        Raises:
            ValueError: the masks belong to another model.
        """
        optimizer = unwrap_optimizer(optimizer)
        trained = {p for group in optimizer.param_groups for p in group["params"]}
        masks: dict[Tensor, Tensor] = {p: keep for p, keep in self.parameter_masks(model).items() if p in trained}
        if isinstance(optimizer, MFAC):
            optimizer.set_masks(masks)
        for parameter, keep in masks.items():
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape:
                    value.masked_fill_(~keep.to(value.device), 0)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the masks, one bit a weight.

        Args:
            path: a file, or a directory that gets a ``masks.safetensors``.

        Returns:
            The file (`mfac_hf.pruning.mask_file` has its format).
        """
        return write_masks(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskSet:
        """Read masks, onto the CPU.

        Args:
            path: what :meth:`save` wrote, or the directory with it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no masks, those of another version, or tensors that are cut off.
        """
        return cls(read_masks(path))


def masks_from_sparse_model(model: nn.Module) -> dict[Tensor, Tensor]:
    """Return masks that keep a sparse model sparse, True where a weight is not zero, for ``MFAC(masks=...)``.

    Only weights of two or more dimensions that have both zeros and non-zeros get a mask. Biases and normalisation
    parameters often begin with zeros, and so do whole matrices (such as LoRA's second factor): a mask read from their
    values would freeze them for ever.

    Args:
        model: model with exact zeros where weights were pruned.

    Returns:
        {parameter: bool tensor of its shape, True = keep}; trainable parameters only.

    Raises:
        ValueError: no weight has a zero among non-zeros: the model is dense.
    """
    matrices = [name for name, p in unwrap_model(model).named_parameters() if p.requires_grad and p.ndim >= 2]
    found = MaskSet.from_model(model, matrices).parameter_masks(model) if matrices else {}
    masks = {parameter: keep for parameter, keep in found.items() if not keep.all()}
    if not masks:
        raise ValueError("no weight matrix of this model has zeros among its values: it is dense, and needs no masks")
    return masks


def _resolve(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return parameters by name; a shared one once, under the first of its names in the model."""
    parameters = dict(unwrap_model(model).named_parameters(remove_duplicate=False))
    first = {p: name for name, p in reversed(parameters.items())}
    names = list(names)
    if unknown := [name for name in names if name not in parameters]:
        raise ValueError(f"no parameter {shortened(unknown)} in the model; it has {shortened(parameters)}")
    found = {first[parameters[name]]: parameters[name] for name in names}
    _refuse_absent(found)
    return found


def _refuse_absent(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError for parameters without values."""
    if absent := [name for name, parameter in parameters.items() if parameter.is_meta]:
        raise ValueError(
            f"no values, but the meta device, behind {shortened(absent)}: accelerate has offloaded them, or they were "
            "never loaded; load the whole model onto a device, without offloading"
        )


def shortened(items: Iterable[str], separator: str = ", ", limit: int = 5) -> str:
    """Join the first items of a list for a message, and say how many more there are."""
    items = list(items)
    rest = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + rest
