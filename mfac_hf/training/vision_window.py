"""The optimizer in the state of a vision run, with the window that several processes share."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfac_hf.optim.mfac import MFAC
from mfac_hf.optim.unwrap import unwrap_optimizer
from mfac_hf.training.vision_run import VisionRun

__all__ = ["resume_optimizer", "save_state"]


def save_state(path: str | os.PathLike[str], run: VisionRun, state: Mapping[str, Any], optimizer: Any) -> None:
    """Write the state of a run with its optimizer; a window that processes share goes into a folder beside it.

    All processes call this. The state names the folder that belongs to it; the one before goes when the state is
    there.

    Args:
        path: of the state, for `mfac_hf.training.vision_run.load_state`.
        run: the run.
        state: all but the optimizer; its ``epoch`` and ``steps`` make up the folder's name.
        optimizer: as accelerate wraps it.
    """
    folder, name = Path(path).resolve().parent, Path(path).name
    mfac, window = unwrap_optimizer(optimizer), f"{name}.window-{state['epoch']}-{state.get('steps', 0)}"
    shared = isinstance(mfac, MFAC) and mfac.shares_window and mfac.write_window(folder / window)
    run.save(path, {**state, "optimizer": optimizer.state_dict(), "window": window if shared else None})
    if run.accelerator.is_main_process:
        for older in folder.glob(f"{glob.escape(name)}.window-*"):
            if older.name != window:
                shutil.rmtree(older, ignore_errors=True)


def resume_optimizer(path: str | os.PathLike[str], state: Mapping[str, Any], optimizer: Any) -> None:
    """Load what `save_state` wrote of the optimizer; the model has its weights of then. All processes call this."""
    optimizer.load_state_dict(state["optimizer"])
    if (window := state.get("window")) is not None:
        unwrap_optimizer(optimizer).read_window(Path(path).resolve().parent / window)
