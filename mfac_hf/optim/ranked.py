"""An optimizer whose window several ranks hold: how parameters lie on them, who keeps what, and the window on disk."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.optim.checkpoint import load_window, share_out
from mfac_hf.optim.groups import labels
from mfac_hf.optim.metric import saved_moments
from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.optim.parameter_window import ParameterWindow
from mfac_hf.optim.placement import first_bytes
from mfac_hf.optim.sharded import Layout, check_counted_once, layout_of
from mfac_hf.optim.sharing import SHARE_MIN_BYTES
from mfac_hf.optim.state import WINDOW_KEYS
from mfac_hf.optim.window_folder import save_window
from mfac_hf.optim.window_needs import Resumed
from mfac_hf.optim.windowed import WindowedOptimizer

__all__ = ["RankedOptimizer"]

logger = logging.getLogger(__name__)


class RankedOptimizer(WindowedOptimizer):
    """What `MFAC` does about other ranks."""

    def _find_layout(self, gradients: Mapping[Tensor, Tensor]) -> Layout | None:
        """How the parameters lie on ranks; looked for again when others have gradients."""
        placed = list(map(id, gradients))
        if placed != self._placed:
            self._layout = layout_of(self._named(lambda p: p.requires_grad or p.grad is not None), self._process_group)
            self._placed, self._counted_once = placed, False
            if self._window is not None:
                self._window.layout = self._layout
        return self._layout

    def _check_layout(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """See, once, that each number of the parameters counts on one rank."""
        if self._layout is not None and not self._counted_once:
            check_counted_once(self._named(gradients.__contains__), self._layout)
        self._counted_once = True

    def _named(self, belongs: Callable[[Tensor], bool]) -> dict[str, Tensor]:
        """Parameters by what errors call them."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        return {name: p for name, p in zip(labels(self.param_groups), parameters, strict=True) if belongs(p)}

    def _let_in(self, gradients: dict[Tensor, Tensor], masks: dict[Tensor, Tensor]) -> ParameterWindow:
        """The window, with columns for every parameter that has a gradient."""
        window = self._window
        new = gradients if window is None else {p: g for p, g in gradients.items() if p not in window.owners}
        if window is not None and not new:
            return window
        moments = saved_moments(self.param_groups, self.state)
        if window is None:
            window = self._window = ParameterWindow.from_gradients(
                new, masks, self._options, moments=moments, sharing=self._process_group, layout=self._layout
            )
            self._leave_to_others()
        else:
            window.add(new, masks, moments)
        return window

    def _decide_sharing(self, gradients: dict[Tensor, Tensor]) -> None:
        """Share the window among Trainer's ranks, where nobody said whether to and it pays."""
        if not (self._undecided and gradients and self._batches.announced):
            return
        self._undecided = False
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks == 1 or self.shares_window:
            return
        masks = self._masks()
        if self._window is None:
            size = sum(first_bytes(grad, masks.get(p), self._options) for p, grad in gradients.items())
        else:
            moments = [state["second_moment"] for state in self.state.values() if "second_moment" in state]
            size = self._window.nbytes + sum(moment.nbytes for moment in moments)
        if size >= SHARE_MIN_BYTES:
            logger.info("%d ranks share a gradient window of %d MiB", ranks, size >> 20)
            self._process_group = dist.group.WORLD
            self._share_whole()

    def _share_whole(self) -> None:
        """Keep this rank's part of a window that every rank holds whole."""
        if self._window is not None and self._window.sharing is None and self._process_group is not None:
            resumed = Resumed(self.param_groups, self._masks(), self._options, self._process_group, None)
            self._window = share_out(self._window, self.state, resumed)
            self._leave_to_others()
            self._publish()

    def _leave_to_others(self) -> None:
        """Take what other ranks keep out of the states."""
        for p, state in self.state.items():
            if self._window is not None and p not in self._window.placements:
                for name in (*WINDOW_KEYS, "second_moment", "moment_steps"):
                    state.pop(name, None)

    def keep_window_whole(self) -> None:
        """Do not share the window among Trainer's ranks, as ``process_group=None``: before the first step.

        Raises:
            ValueError: ranks share it already.
        """
        if self.shares_window:
            raise ValueError("ranks share this window: build MFAC with process_group=None to keep it whole on each")
        self._undecided = False

    def _restore(
        self, states: dict[Tensor, dict[str, Any]], groups: list[dict[str, Any]], options: ParameterWindowOptions
    ) -> None:
        super()._restore(states, groups, options)
        self._share_whole()

    @torch.no_grad()
    def write_window(self, directory: str | os.PathLike[str]) -> bool:
        """Write the window and the second moments into a folder: where ranks share them, `state_dict` lacks them.

        Each rank writes its part, through `torch.distributed.checkpoint`; all that share the window call this. The
        folder is complete when this returns; one that was cut off is not read. An older one of its name goes.

        Returns:
            Whether there was a window to write: after the first step.

        Raises:
            OSError: the folder cannot be written (as ``CheckpointException`` on all ranks, where there are several).
        """
        self._agree()
        if self._window is None:
            return False
        parameters = [p for group in self.param_groups for p in group["params"]]
        save_window(Path(directory), self._window, parameters, self.state, self.skipped_steps)
        return True

    @torch.no_grad()
    def read_window(self, directory: str | os.PathLike[str]) -> None:
        """Go on with the window that `write_window` wrote, on any number of ranks, shared or sharded in another way.

        Each rank reads what it needs. To the bit on as many ranks, shared in the same way; else sums have another
        order. Load the model first, and the state of `state_dict`, which has masks and momentum. All ranks call this;
        with ``process_group="auto"`` and several ranks, all of them share the window from then on.

        Raises:
            FileNotFoundError: there is no complete window in the folder.
            ValueError: on every rank, if the window is damaged, or of other weights, another model or other options;
                nothing changes then.
        """
        self._agree()
        sharing = self._process_group
        layout = layout_of(self._named(lambda p: p.requires_grad), sharing)
        if self._undecided and layout is None and dist.is_available() and dist.is_initialized():
            sharing = dist.group.WORLD if dist.get_world_size() > 1 else None
        resumed = Resumed(self.param_groups, self._masks(), self._options, sharing, layout)
        loaded = load_window(Path(directory), resumed)
        self._window, self._process_group, self._placed = loaded.window, sharing, None
        self._undecided = self._undecided and sharing is None
        self.skipped_steps = loaded.skipped_steps
        for p, counters in loaded.counters.items():
            self.state[p].update(counters)
        self._leave_to_others()
        self._publish()
