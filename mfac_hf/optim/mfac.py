r"""The M-FAC optimizer: preconditioning by the inverse of a sliding-window empirical Fisher.

Each step stores the new gradient g in a window of the last m, and moves the parameters along

.. math:: v \leftarrow \beta v + (1 - \beta) F^{-1} g, \qquad \theta \leftarrow \theta - \eta v, \qquad
          F = \lambda I + \tfrac{1}{n} \sum_{i=1}^{m} g_i g_i^\top

(`mfac_hf.fisher.window` has the algebra.) While :math:`n\lambda` is small against the part of g that is orthogonal to
the other stored gradients, :math:`g_\perp`, the direction is about :math:`n g_\perp / |g_\perp|^2`: it grows with the
window and shrinks with the gradient. Tune ``lr * num_grads``, not ``lr``.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.defaults import MFAC_DAMPING, MFAC_LEARNING_RATE, MFAC_NUM_GRADS
from mfac_hf.fisher.window import MAX_NORM, check_window_options
from mfac_hf.machine import GIB
from mfac_hf.optim.parameter_window import ParameterWindow
from mfac_hf.optim.state import WINDOW_KEYS, check_state, restore_placements

__all__ = ["MFAC"]

_WINDOW_OPTIONS = (
    "num_grads",
    "damping",
    "normalize",
    "window_dtype",
    "window_device",
    "grad_decay",
    "row_sparse",
    "save_window",
)


class MFAC(torch.optim.Optimizer):
    r"""Matrix-free approximate natural-gradient descent with the dynamic algorithm of M-FAC.

    Usage with the Hugging Face Trainer: ``Trainer(..., optimizers=(MFAC(model.parameters(), lr=1e-3), None))``. The
    learning rate is this optimizer's own (``TrainingArguments.learning_rate`` is not used), and Trainer adds its
    schedule to it. Trainer clips gradients to ``max_grad_norm`` (1.0) before they enter the window, as in the
    published runs.

    Memory: m * d numbers of ``window_dtype`` for dense parameters, allocated at the first step; embeddings are stored
    exactly by the rows that each batch touched. See `mfac_hf.memory_estimate`.

    Args:
        params: parameters, named parameters or parameter groups. Groups may have their own lr, momentum, weight_decay
            and decoupled_weight_decay; everything else is common to all.
        lr: learning rate, >= 0.
        num_grads: gradients in the window, m >= 1.
        damping: :math:`\lambda > 0`.
        momentum: :math:`\beta` in [0, 1), exponential average of the *directions*.
        weight_decay: coefficient >= 0 of the L2 penalty, added to the gradient before it enters the window, as in the
            paper's code. That makes the gradient of an embedding dense.
        decoupled_weight_decay: multiply the parameters by (1 - lr * weight_decay) instead.
        normalize: ``"num_grads"`` divides the sum in F by m always (the paper); ``"count"`` divides by the gradients
            held so far, which makes the first steps shorter: a warm-up that needs no schedule. The same once the
            window is full.
        grad_decay: :math:`\gamma` in [0, 1): precondition the average of the stored gradients with weights
            :math:`\gamma^{age}` instead of the newest alone. Costs no memory and no pass.
        window_dtype: torch.float32, torch.bfloat16 (half the memory; embeddings stay float32) or torch.float64.
        window_device: None for the parameters' device, another device such as ``"cpu"``, or a list to split the window
            over.
        masks: {parameter: bool tensor of its shape, True = keep}. Masked coordinates never move and take no room in
            the window.
        process_group: ranks with the same parameters and gradients (as under DistributedDataParallel) that share one
            window: each keeps the columns of some parameters. Not needed under FSDP2, where each rank keeps the
            columns of its shards. In both cases the window is not part of ``state_dict`` and refills after a resume.
        row_sparse: store gradients with few non-zero rows by these rows. Exact; turn it off for fixed state shapes.
        save_window: put the window into ``state_dict``. Without it checkpoints are small, and the window refills after
            a resume.

    Raises:
        ValueError: for an option or a mask out of range, before anything changes.
        TypeError: for complex parameters.
        MemoryError: at the first step, if the window does not fit; the message has the numbers and the ways out.

    Source: Frantar, Kurtic and Alistarh, NeurIPS 2021, section 3.2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = MFAC_LEARNING_RATE,
        *,
        num_grads: int = MFAC_NUM_GRADS,
        damping: float = MFAC_DAMPING,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        normalize: str = "num_grads",
        grad_decay: float = 0.0,
        window_dtype: torch.dtype = torch.float32,
        window_device: torch.device | str | list[torch.device | str] | None = None,
        masks: Mapping[Tensor, Tensor] | None = None,
        process_group: dist.ProcessGroup | None = None,
        row_sparse: bool = True,
        save_window: bool = True,
    ) -> None:
        check_window_options(num_grads, damping, normalize, window_dtype)
        if not 0.0 <= grad_decay < 1.0:
            raise ValueError(f"grad_decay is {grad_decay!r}; expected a number in [0, 1)")
        if isinstance(window_device, (list, tuple)):
            if not window_device:
                raise ValueError("window_device is an empty list; name at least one device, or leave it out")
            window_device = [str(device) for device in window_device]
        elif window_device is not None:
            window_device = str(window_device)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "num_grads": num_grads,
            "damping": damping,
            "normalize": normalize,
            "window_dtype": window_dtype,
            "window_device": window_device,
            "grad_decay": grad_decay,
            "row_sparse": row_sparse,
            "save_window": save_window,
        }
        self._reset_window()
        self._process_group = process_group
        super().__init__(params, defaults)
        self._keep_masks(masks or {})

    def _reset_window(self) -> None:
        self._window: ParameterWindow | None = None
        self._rank_loads: list[int] = []  # numbers that each rank keeps for one gradient
        self.skipped_steps = 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their columns join the window when their first gradients arrive.

        Raises:
            ValueError: for an option out of range, one that is common to all groups, or another device than before.
            TypeError: for complex parameters.
        """
        for name in _WINDOW_OPTIONS:
            if name in param_group and param_group[name] != self.defaults[name]:
                raise ValueError(
                    f"{name}={param_group[name]!r} in a parameter group: there is one window for all groups; "
                    f"pass {name} to MFAC itself"
                )
        group = {**self.defaults, **param_group}
        for name, upper in (("lr", float("inf")), ("momentum", 1.0), ("weight_decay", float("inf"))):
            if not 0.0 <= group[name] < upper:
                raise ValueError(f"{name} is {group[name]!r}; expected a number in [0, {upper})")
        known = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            self._check_parameters()
        except (TypeError, ValueError):
            del self.param_groups[known:]
            raise
        for name in _WINDOW_OPTIONS:
            self.param_groups[-1].pop(name, None)

    def _check_parameters(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        for p in parameters:
            if p.is_complex():
                raise TypeError(
                    f"a parameter of shape {tuple(p.shape)} is {p.dtype}: the empirical Fisher here is real. "
                    "Optimize torch.view_as_real(parameter) instead"
                )
            if hasattr(p, "ds_id") or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
                raise ValueError(
                    "DeepSpeed ZeRO partitions and flattens gradients behind the optimizer, so the window would hold "
                    "something else. Use DistributedDataParallel with MFAC(process_group=...), or FSDP2, instead"
                )
            if getattr(p, "_is_flat_param", False):
                raise ValueError(
                    "FSDP1 flattens parameters, which MFAC does not support. Use FSDP2 (fsdp_version: 2) instead"
                )
        devices = {p.device for p in parameters}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"parameters on several devices ({names}); move the model to one device before building MFAC"
            )

    @torch.no_grad()
    def set_masks(self, masks: Mapping[Tensor, Tensor]) -> None:
        """Mask more coordinates: they stop where they are, and the window and the momentum forget them.

        The window shrinks to the kept coordinates and is theirs exactly, as if it had never held the others. Its Gram
        matrix is computed anew, which takes m x m x d operations. Ranks that share a window must all call this, with
        the same masks.

        Args:
            masks: {parameter: bool tensor of its shape, True = keep}; other parameters stay as they are.

        Raises:
            ValueError: for an unknown parameter, another shape or dtype, or a mask that brings back a coordinate
                masked before; nothing changes then.
            MemoryError: if the smaller window does not fit beside the one that it replaces; nothing changes then.
        """
        masks = {p: mask.to(p.device) for p, mask in self._checked_masks(masks).items()}
        for p, old in self._masks().items():
            if p in masks and bool((masks[p] & ~old).any()):
                raise ValueError(
                    f"the new mask of a parameter of shape {tuple(p.shape)} keeps {int((masks[p] & ~old).sum())} "
                    "coordinates that are masked already; masks only ever shrink. Build a new MFAC to bring them back"
                )
        if self._window is not None:
            self._window.shrink(masks)
        for p, mask in masks.items():
            if "momentum_buffer" in self.state[p]:
                self.state[p]["momentum_buffer"].mul_(mask)
        self._keep_masks(masks)
        self._publish()

    def stored_gradients(self, parameter: Tensor) -> Tensor:
        """The gradients that the window holds of one parameter: (count, numel), oldest first, in the window's dtype.

        Raises:
            ValueError: if this rank's window has no gradient of it: before its first step, or on another rank.
        """
        if self._window is None or parameter not in self._window.placements:
            raise ValueError(
                f"the window holds no gradient of a parameter of shape {tuple(parameter.shape)} here: it has not been "
                "stepped with one, or another rank keeps its columns"
            )
        return self._window.stored_gradients(parameter)

    def _checked_masks(self, masks: Mapping[Tensor, Tensor]) -> Mapping[Tensor, Tensor]:
        known = {id(p) for group in self.param_groups for p in group["params"]}
        for parameter, mask in masks.items():
            if id(parameter) not in known:
                raise ValueError(
                    f"a mask for a parameter of shape {tuple(parameter.shape)} that this optimizer does not have"
                )
            if mask.shape != parameter.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"a mask of shape {tuple(mask.shape)} and dtype {mask.dtype} for a parameter of shape "
                    f"{tuple(parameter.shape)}; expected a bool tensor of the parameter's shape, True = keep"
                )
        return masks

    def _keep_masks(self, masks: Mapping[Tensor, Tensor]) -> None:
        for parameter, mask in self._checked_masks(masks).items():
            # In the state, because it is what deepcopy, pickle and checkpoints keep.
            self.state[parameter]["mask"] = mask.detach().clone()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Store the gradients and move the parameters; those without a gradient stay where they are.

        A gradient with a NaN or infinite entry (or a norm above 1e19) is skipped: neither window nor parameters
        change, and ``skipped_steps`` counts it.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = self._gradients()
        if not gradients:
            return loss
        if not self._finite(gradients):
            if self.skipped_steps == 0:
                warnings.warn(
                    f"a gradient is not finite (or its norm is above {MAX_NORM:g}): this step is skipped, as will be "
                    "others like it. They are counted in MFAC.skipped_steps",
                    stacklevel=2,
                )
            self.skipped_steps += 1
            self._publish()
            return loss
        masks = self._masks()
        if self._window is None:
            self._window = ParameterWindow.from_gradients(
                gradients, masks, self.defaults, sharing=self._process_group, shards=self._shards(gradients)
            )
        else:
            self._window.add(gradients, masks)
        self._window.push_gradients(gradients, masks)
        self._apply(gradients, self._window.directions(gradients))
        self._publish()
        return loss

    def _gradients(self) -> dict[Tensor, Tensor]:
        """Gradient of each parameter that has one, coupled weight decay included."""
        gradients = {}
        for group in self.param_groups:
            decay = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad
                if grad.is_sparse and (p.ndim != 2 or grad.sparse_dim() != 1):
                    raise ValueError(
                        f"a sparse gradient with {grad.sparse_dim()} sparse dimensions for a parameter of shape "
                        f"{tuple(p.shape)}; MFAC takes the row-sparse ones of torch.nn.Embedding(sparse=True)"
                    )
                gradients[p] = _local(p).mul(decay).add_(_local(grad)) if decay else _local(grad)
        return gradients

    def _shards(self, gradients: dict[Tensor, Tensor]) -> dist.ProcessGroup | None:
        """The ranks over which FSDP2 has sharded the parameters, if it has."""
        p: Any = next(iter(gradients))
        if not _is_sharded(p):
            return None
        if self._process_group is not None or p.device_mesh.ndim != 1:
            raise ValueError(
                f"parameters sharded over a device mesh of {p.device_mesh.ndim} dimensions, with process_group="
                f"{self._process_group}: MFAC takes FSDP2's shards over a mesh of one dimension, without process_group"
            )
        return p.device_mesh.get_group()

    def _finite(self, gradients: dict[Tensor, Tensor]) -> bool:
        values = [grad.coalesce().values() if grad.is_sparse else grad for grad in gradients.values()]
        dtype = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
        total = torch.stack(torch._foreach_norm(values, 2, dtype=dtype)).sum()
        group = self._process_group or self._shards(gradients)
        if group is not None:  # all ranks skip, or none
            dist.all_reduce(total, group=group)
        return bool(total <= MAX_NORM)  # false for NaN

    def _masks(self) -> dict[Tensor, Tensor]:
        return {p: state["mask"].to(p.device) for p, state in self.state.items() if "mask" in state}

    def _apply(self, gradients: dict[Tensor, Tensor], directions: dict[Tensor, Any]) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            moved = [p for p in group["params"] if p in gradients]
            decay = lr * group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
            dense_moved, dense_directions = [], []
            for p in moved:
                state, direction = self.state[p], directions[p]
                target = _local(p)
                if decay and "mask" in state:
                    target.copy_(torch.where(state["mask"].to(p.device), target * (1 - decay), target))
                elif decay:
                    target.mul_(1 - decay)
                state["step"] = state.get("step", 0) + 1
                if momentum:
                    direction = _average(state, direction, momentum, p)
                if isinstance(direction, tuple):
                    target.index_add_(0, direction[0], direction[1].to(p.dtype), alpha=-lr)
                else:
                    dense_moved.append(target)
                    dense_directions.append(direction.to(p.dtype))
            if dense_moved:
                torch._foreach_add_(dense_moved, dense_directions, alpha=-lr)

    def _publish(self) -> None:
        """Put the window and the count of skipped steps into the per-parameter state."""
        states = {} if self._window is None else self._window.state()
        for i, (p, entries) in enumerate(states.items()):
            state = self.state[p]
            for name in [name for name in state if name in WINDOW_KEYS and name not in entries]:
                del state[name]  # of columns that have become dense
            state.update(entries)
            if i == 0:
                state["skipped_steps"] = self.skipped_steps

    def window_stats(self) -> dict[str, float]:
        """Figures for a log: share of the window filled, condition number of K, counts, and size in GiB."""
        window = self._window
        return {
            "window_fill": 0.0 if window is None else window.count / window.num_grads,
            "gram_condition": 1.0 if window is None else window.condition(),
            "skipped_steps": float(self.skipped_steps),
            "jitter_escalations": 0.0 if window is None else float(window.jitter_escalations),
            "window_gib": 0.0 if window is None else window.nbytes / GIB,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers; the window too, unless ``save_window=False`` or several ranks share it."""
        if self._window is not None:
            self._window.clear_unwritten()
        state_dict = super().state_dict()
        if self.shares_window or not self.defaults["save_window"]:
            state_dict["state"] = {
                key: {name: value for name, value in state.items() if name not in WINDOW_KEYS}
                for key, state in state_dict["state"].items()
            }
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state exactly: window, Gram matrix and counters continue to the bit.

        The saved tensors are used as they are where the layout allows it, so that a large window is not held twice. A
        state without a window (``save_window=False``) is loaded too; the window then refills.

        Raises:
            ValueError: if the state is of another model, window length, dtype or mask, or parts of it are missing;
                names what differs, and leaves the optimizer as it was.
        """
        saved = check_state(self, state_dict)
        if any("gram" in state for state in saved.values()) and self.shares_window:
            warnings.warn("ranks that share a window do not load a saved one: it refills", stacklevel=2)
            saved = {p: {k: v for k, v in state.items() if k not in WINDOW_KEYS} for p, state in saved.items()}
        super().load_state_dict({**state_dict, "state": {}})
        for p in [p for p in self.state if p not in saved]:
            del self.state[p]
        for p, state in saved.items():
            self.state[p] = {
                name: value.to(p.device) if isinstance(value, Tensor) and name not in WINDOW_KEYS else value
                for name, value in state.items()
            }
        for group in self.param_groups:
            for name in _WINDOW_OPTIONS:
                group.pop(name, None)
        self._restore_window()

    def _restore_window(self) -> None:
        """Build the window that the state describes."""
        self._reset_window()
        placements, lead = restore_placements(self.state, self._masks(), self.defaults)
        if lead is None:
            return
        self._window = ParameterWindow(placements, self.defaults)
        self._window.set_gram(lead["gram"])
        self._window.pushed = lead["pushed"]
        self._window.jitter_escalations = lead["jitter_escalations"]
        self.skipped_steps = lead["skipped_steps"]
        self._publish()

    @property
    def shares_window(self) -> bool:
        """Whether the window's columns are, or will be, spread over several ranks."""
        return self._process_group is not None or any(
            _is_sharded(p) for group in self.param_groups for p in group["params"]
        )

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep; a window shared by ranks cannot be copied by one of them."""
        if self.shares_window:
            raise TypeError(
                "an MFAC whose window is shared by several ranks cannot be pickled or deep-copied by one of them"
            )
        if self._window is not None:
            self._window.clear_unwritten()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the window from the per-parameter state."""
        super().__setstate__(state)
        self._process_group = getattr(self, "_process_group", None)  # kept by load_state_dict, which comes here too
        self._restore_window()


def _is_sharded(tensor: Tensor) -> bool:
    # Importing the module takes a second; where nobody has, there are no such tensors.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _local(tensor: Any) -> Tensor:
    """This rank's shard of a tensor that FSDP2 has sharded; any other tensor as it is."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def _average(state: dict[str, Any], direction: Any, momentum: float, p: Tensor) -> Tensor:
    """Exponential average of the directions, v <- momentum * v + (1 - momentum) * direction."""
    if "momentum_buffer" not in state:
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        state["momentum_buffer"] = torch.zeros_like(p, dtype=dtype)
    buffer = _local(state["momentum_buffer"])
    if isinstance(direction, tuple):
        rows, values = direction
        return buffer.mul_(momentum).index_add_(0, rows, values.to(buffer.dtype), alpha=1 - momentum)
    return buffer.lerp_(direction.to(buffer.dtype), 1 - momentum)
