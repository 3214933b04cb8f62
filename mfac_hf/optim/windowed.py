"""An optimizer with a gradient window: its state is saved, loaded and copied, and window, masks and groups agree."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.optim.accumulation import BatchCount
from mfac_hf.optim.borrowed import alias
from mfac_hf.optim.groups import check_numbers, check_parameters, follow_groups, remove_window_options
from mfac_hf.optim.masks import check_masks_have_parameters
from mfac_hf.optim.metric import saved_moments
from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.optim.parameter_window import ParameterWindow
from mfac_hf.optim.restore import restore_placements
from mfac_hf.optim.sharded import Layout, is_sharded
from mfac_hf.optim.state import WINDOW_KEYS, check_state, publish_window, without_window

__all__ = ["WindowedOptimizer"]


class WindowedOptimizer(torch.optim.Optimizer):
    """What `MFAC` does with its state; it says what each part is for."""

    _options: ParameterWindowOptions
    _process_group: dist.ProcessGroup | None
    _undecided: bool  # whether Trainer's ranks may yet come to share the window
    _batches: BatchCount

    def _start_anew(self) -> None:
        self._window: ParameterWindow | None = None
        self._kept: dict[Tensor, Tensor] = {}  # masks; optimizer.state mirrors them
        self._known: list[int] = []  # ids of the parameters, when window and groups were last compared
        self._placed: list[int] | None = None  # ids of the parameters whose layout is known
        self._layout: Layout | None = None
        self._counted_once = False  # whether the ranks have looked at this layout together
        self.skipped_steps = 0

    def _keep_masks(self, masks: Mapping[Tensor, Tensor]) -> None:
        self._kept |= {p: mask.detach().clone() for p, mask in masks.items()}
        self._mirror_masks()

    def _mirror_masks(self) -> None:
        # In the state, because it is what deepcopy, pickle and checkpoints keep.
        for p, mask in self._kept.items():
            self.state[p]["mask"] = mask

    def _masks(self) -> dict[Tensor, Tensor]:
        return {p: mask.to(p.device) for p, mask in self._kept.items()}

    def _agree(self) -> None:
        """Follow what was changed in ``param_groups`` and ``state`` since the last step.

        A parameter that has left the groups, or whose state was removed, leaves the window, as if it had never been in
        it. Masks outlive a cleared state, as the other options do.

        Raises:
            ValueError: if masked parameters were replaced, or an option of the window was changed; nothing changes.
        """
        for group in self.param_groups:
            check_numbers(group)
        options = follow_groups(self.param_groups, self._options)
        parameters = [id(p) for group in self.param_groups for p in group["params"]]
        if parameters != self._known:
            check_parameters(self.param_groups)
            held = set(parameters)
            check_masks_have_parameters(self._kept, held, replaced=not held <= set(self._known))
            self._kept = {p: mask for p, mask in self._kept.items() if id(p) in held}
            for p in [p for p in self.state if id(p) not in held]:
                del self.state[p]
            self._known = parameters
        self._mirror_masks()
        if self._window is None:
            self._options = options
            return
        gone = self._strangers(self._window)
        if len(gone) == len(self._window.owners):
            self._window = None
        elif gone:
            self._window.forget(gone)
            self._publish()
        self._set_options(options)

    def _strangers(self, window: ParameterWindow) -> list[Tensor]:
        """Parameters of the window whose state was removed, or that have another shape now."""
        reshaped = [p for p, owner in window.owners.items() if window.layout is None and owner.shape != p.shape]
        for p in reshaped:
            if p in self._kept:
                raise ValueError(
                    f"a masked parameter has shape {tuple(p.shape)} now, another than its mask: build MFAC anew"
                )
            del self.state[p]
        stepped = {id(p) for p, state in self.state.items() if "step" in state}  # ids: a tensor's hash is slow
        return [p for p in window.owners if id(p) not in stepped]

    def _set_options(self, options: ParameterWindowOptions) -> None:
        self._options = options
        if self._window is not None:
            self._window.set_options(options)

    def _publish(self) -> None:
        if self._window is not None:
            publish_window(self._window, self.state, self.skipped_steps)

    @property
    def shares_window(self) -> bool:
        """Whether the window's columns are, or will be, spread over several ranks."""
        return self._process_group is not None or self._is_sharded

    @property
    def _is_sharded(self) -> bool:
        return any(is_sharded(p) for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, with the window unless ``save_window=False`` or several ranks share it.

        Raises:
            ValueError: as `step`, for what was changed in ``param_groups``.
        """
        if not self.shares_window:  # else a sum over the ranks, which may not all save
            self._agree()
        if self._window is not None:
            self._window.clear_unwritten()
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            # torch.load(weights_only=True) takes none of numpy's numbers, which schedules may put there.
            group |= {name: value.item() for name, value in group.items() if isinstance(value, numpy.generic)}
        if self.shares_window or not self._options.save_window:
            state_dict["state"] = without_window(state_dict["state"], moments=not self.shares_window)
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state exactly: window, Gram matrix and counters continue to the bit.

        Pre-hooks get the whole saved state before it is checked, post-hooks run when it is there. The saved window is
        used as it is where its layout allows it, so that a large one is not held twice. If somebody else still holds
        it at the next step, it is copied then: a ``state_dict`` that is kept stays as it was. After a state without
        a window (``save_window=False``) the window refills.

        Raises:
            ValueError: if the state is of another optimizer, model, window length, dtype or mask, incomplete, or has
                values that cannot be; it names what differs, and the optimizer stays as it was.
        """
        state_dict = copy.copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            adapted = pre_hook(self, state_dict)
            state_dict = state_dict if adapted is None else adapted
        saved = check_state(state_dict, self.param_groups, self._masks(), self._options)
        groups = _merge(self.param_groups, state_dict["param_groups"])
        options = follow_groups(groups, self._options)
        if any("gram" in state for state in saved.values()) and self._is_sharded:
            warnings.warn("sharded parameters do not load the window of whole ones: it refills", stacklevel=2)
            saved = without_window(saved, moments=False)
        states = {p: {name: _own(name, value, p) for name, value in state.items()} for p, state in saved.items()}
        self._restore(states, groups, options)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _restore(
        self, states: dict[Tensor, dict[str, Any]], groups: list[dict[str, Any]], options: ParameterWindowOptions
    ) -> None:
        """Take over states and groups, and build the window that the states describe; nothing changes if it fails."""
        kept = {p: state["mask"] for p, state in states.items() if "mask" in state}
        placements = restore_placements(states, {p: mask.to(p.device) for p, mask in kept.items()}, options)
        lead = next((state for state in states.values() if "gram" in state), None)
        window = None
        if lead is not None:
            window = ParameterWindow(placements, options, moments=saved_moments(groups, states))
            window.borrows = True
            window.gram.restore(lead["gram"], lead["pushed"], lead["jitter_escalations"])
        self._start_anew()
        self.state, self.param_groups = defaultdict(dict, states), groups
        self._options, self._window, self._kept = options, window, kept
        self.skipped_steps = 0 if lead is None else lead["skipped_steps"]
        self._known = [id(p) for group in groups for p in group["params"]]
        self._publish()

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep.

        Raises:
            TypeError: if several ranks share the window: one of them cannot copy it.
        """
        if self.shares_window:
            raise TypeError("a window shared by several ranks cannot be pickled or deep-copied by one of them")
        self._agree()
        if self._window is not None:
            self._window.clear_unwritten()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the window from the per-parameter state."""
        super().__setstate__(state)
        self._process_group, self._undecided, self._batches = None, False, BatchCount()
        options = ParameterWindowOptions.pick(self.defaults)
        self._restore(dict(self.state), self.param_groups, follow_groups(self.param_groups, options))


def _merge(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with the options that were saved; parameters, and what was not saved, as they are.

    Raises:
        ValueError: for a saved option out of range.
    """
    merged = []
    for own, saved in zip(groups, saved_groups, strict=True):
        merged.append({**own, **copy.deepcopy(dict(saved)), "params": own["params"]})
        check_numbers(merged[-1])
    remove_window_options(merged)
    return merged


def _own(name: str, value: Any, p: Tensor) -> Any:
    """A saved value that the optimizer may change; the window itself stays as it is (`ParameterWindow.borrows`)."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if name in WINDOW_KEYS:
        return alias(value, value.shape, value.stride(), int(value.storage_offset()))
    return value.detach().to(p.device, copy=True)
