"""A gradient window on disk: each of the ranks that hold it has written its part.

A folder of `torch.distributed.checkpoint`, all of whose entries are plain tensors:

- ``gram`` (m, m), ``counters`` and ``norms``, which all ranks have: of the window, and of each parameter's weights;
- ``parts.<rank>``, a row for each parameter of which this rank wrote its part: the fields of `Part`;
- ``<name>.<parameter>.<rank>``: that part, with the name and the shape that it has in the optimizer's state.
"""

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mfac_hf.optim.parameter_window import ParameterWindow
from mfac_hf.optim.sharded import Layout, box_of, local

__all__ = ["HeldWindow", "Part", "WindowFolder", "save_window", "weight_norms"]

FORMAT = 1
TENSORS = ("window", "window_rows", "window_values", "second_moment", "moment_steps")
MAX_NDIM = 8


class Part(NamedTuple):
    """What a rank has written of a parameter.

    Attributes:
        rank: the rank.
        parameter: its number in the optimizer.
        store: number of the store that has its columns.
        start: the first of its columns there.
        step: steps of the parameter.
        moment_step: those that its second moment has seen; 0 without one.
        offset: where the part begins in the whole parameter.
        shape: of the part.
    """

    rank: int
    parameter: int
    store: int
    start: int
    step: int
    moment_step: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def box(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where the part lies in the whole parameter."""
        return self.offset, self.shape

    def row(self) -> list[int]:
        """The part as numbers."""
        ndim = len(self.shape)
        padding = [0] * (MAX_NDIM - ndim)
        return [*self[:6], ndim, *self.offset, *padding, *self.shape, *padding]

    @classmethod
    def of_row(cls, row: Sequence[int]) -> "Part":
        """The part of such numbers."""
        ndim, boxes = row[6], row[7:]
        rank, parameter, store, start, step, moment_step = row[:6]
        offset, shape = tuple(boxes[:ndim]), tuple(boxes[MAX_NDIM : MAX_NDIM + ndim])
        return cls(rank, parameter, store, start, step, moment_step, offset, shape)

    def overlap(self, box: tuple[Sequence[int], Sequence[int]]) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """Where the part and a box overlap, counted from the beginning of each; None where they do not."""
        theirs, ours = [], []
        for start, size, own_start, own_size in zip(*self.box, *box, strict=True):
            low, high = max(start, own_start), min(start + size, own_start + own_size)
            if low >= high:
                return None
            theirs.append(slice(low - start, high - start))
            ours.append(slice(low - own_start, high - own_start))
        return tuple(theirs), tuple(ours)


def save_window(
    directory: Path,
    window: ParameterWindow,
    parameters: Sequence[Tensor],
    states: Mapping[Tensor, dict[str, Any]],
    skipped_steps: int,
) -> None:
    """Write the window, each rank its part; all ranks that hold it call this.

    Raises:
        OSError: it cannot be written (as ``CheckpointException`` on every rank, where there are several).
    """
    from torch.distributed import checkpoint

    group = window.gram.process_group
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    parts: list[list[int]] = []
    tensors: dict[str, Tensor] = {}
    for number, p in enumerate(parameters):
        if p not in window.placements or p in window.copies:
            continue
        state = states[p]
        store, start, step = (int(state[name]) for name in ("window_store", "window_start", "step"))
        moment_step = int(state.get("moment_step", 0))
        offset, shape = (box_of(p), tuple(local(p).shape)) if window.sharing is None else window.owners[p].box(rank)
        parts.append(Part(rank, number, store, start, step, moment_step, offset, shape).row())
        tensors |= {f"{name}.{number}.{rank}": state[name] for name in TENSORS if name in state}
    window.clear_unwritten()
    shared = int(window.sharing is not None)
    counters = [FORMAT, ranks, shared, window.gram.pushed, window.gram.jitter_escalations, skipped_steps]
    tensors |= {
        f"parts.{rank}": torch.tensor(parts, dtype=torch.int64).view(len(parts), 7 + 2 * MAX_NDIM),
        "gram": window.gram.gram_MM,
        "counters": torch.tensor(counters),
        "norms": weight_norms([p if p in window.owners else None for p in parameters], window.layout),
    }
    if rank == 0:  # an older one would be overwritten file by file
        shutil.rmtree(directory, ignore_errors=True)
    if group is not None:
        dist.barrier(group=group)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        checkpoint.save(tensors, checkpoint_id=directory, process_group=group, no_dist=group is None)


def weight_norms(parameters: Sequence[Tensor | None], layout: Layout | None) -> Tensor:
    """The norm of each parameter's weights, (P,), float64; 0 for None and for those that have no place in a layout."""
    total = torch.zeros(len(parameters), dtype=torch.float64)
    for number, p in enumerate(parameters):
        if p is not None and (layout is None or (p in layout.kinds and p not in layout.copies)):
            total[number] = torch.linalg.vector_norm(local(p.detach()), dtype=torch.float64).square()
    if layout is not None:
        total = total.to(local(next(iter(layout.kinds))).device)
        dist.all_reduce(total, group=layout.group)
    return total.sqrt().cpu()


class WindowFolder:
    """What `save_window` wrote, read by one rank.

    Attributes:
        path: the folder.
        gram: the Gram matrix.
        norms: of the weights of then, (P,); 0 for parameters without columns.
        ranks: how many wrote it.
        is_shared: whether they shared the window of whole parameters.
        pushed: gradients ever pushed.
        jitter_escalations: as of the Gram matrix.
        skipped_steps: as of the optimizer.
        parts: of each parameter, by its number.

    Raises:
        FileNotFoundError: there is no window, or it was not finished.
        ValueError: the folder is damaged, of another format, or of something else.
    """

    def __init__(self, path: Path) -> None:
        from torch.distributed import checkpoint

        self.path, self._checkpoint = path, checkpoint
        try:
            metadata = checkpoint.FileSystemReader(path).read_metadata()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} holds no gradient window: it is missing, or was not finished") from error
        except Exception as error:  # whatever pickle says of other bytes
            raise ValueError(f"{path} is damaged: its metadata cannot be read ({error})") from error
        self._entries: Mapping[str, Any] = metadata.state_dict_metadata
        if not {"gram", "counters", "norms"} <= set(self._entries):
            raise ValueError(f"{path} holds a checkpoint of something else than a gradient window")
        tables = [name for name in self._entries if name.startswith("parts.")]
        found = self.read(["gram", "counters", "norms", *tables])
        version, self.ranks, shared, self.pushed, self.jitter_escalations, self.skipped_steps = found[
            "counters"
        ].tolist()
        if version != FORMAT:
            raise ValueError(f"{path} is of format {version}; this version of mfac_hf reads {FORMAT}")
        self.is_shared = bool(shared)
        self.gram, self.norms = found["gram"], found["norms"]
        self.parts: dict[int, list[Part]] = {}
        for part in sorted(Part.of_row(row) for name in tables for row in found[name].tolist()):
            self.parts.setdefault(part.parameter, []).append(part)

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """These entries.

        Raises:
            OSError: a file is missing.
            ValueError: a file is damaged.
        """
        tensors = {}
        for name in names:
            entry = self._entries[name]
            tensors[name] = torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        if not tensors:
            return {}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                self._checkpoint.load(tensors, checkpoint_id=self.path, no_dist=True)
        except BaseException as error:  # CheckpointException is none of Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ValueError(f"{self.path} is damaged, or a part of it is missing: {error}") from error
        return tensors

    def names(self, part: Part) -> dict[str, str]:
        """The entries of a part, by the names that they have in the optimizer's state."""
        full = {name: f"{name}.{part.parameter}.{part.rank}" for name in TENSORS}
        return {name: entry for name, entry in full.items() if entry in self._entries}

    def read_part(self, part: Part) -> dict[str, Tensor]:
        """What the optimizer's state had of a part."""
        names = self.names(part)
        tensors = self.read(list(names.values()))
        return {name: tensors[entry] for name, entry in names.items()}

    def nbytes(self, part: Part) -> int:
        """Bytes of a part."""
        entries = [self._entries[name] for name in self.names(part).values()]
        return sum(torch.Size(entry.size).numel() * entry.properties.dtype.itemsize for entry in entries)

    def stored(self, part: Part) -> tuple[torch.Size, torch.dtype]:
        """Shape and type of a gradient as it is stored."""
        names = self.names(part)
        entry = self._entries[names.get("window") or names["window_values"]]
        return torch.Size(entry.size[1:]), entry.properties.dtype


class HeldWindow:
    """A whole window in memory, with what a `WindowFolder` has.

    Args:
        window: the window, whose rows without a gradient are zero.
        parameters: of the optimizer.
        states: of the optimizer, which show the window.
    """

    ranks, is_shared = 1, False

    def __init__(
        self, window: ParameterWindow, parameters: Sequence[Tensor], states: Mapping[Tensor, dict[str, Any]]
    ) -> None:
        self._states = {number: states[p] for number, p in enumerate(parameters) if p in window.placements}
        self.gram = window.gram.gram_MM
        self.pushed, self.jitter_escalations = window.gram.pushed, window.gram.jitter_escalations
        self.parts: dict[int, list[Part]] = {}
        for number, state in self._states.items():
            shape = tuple(parameters[number].shape)
            places = (state["window_store"], state["window_start"], int(state["step"]), state.get("moment_step", 0))
            self.parts[number] = [Part(0, number, *places, (0,) * len(shape), shape)]

    def names(self, part: Part) -> dict[str, str]:
        """The entries of a part, by the names that they have in the optimizer's state."""
        return {name: f"{name}.{part.parameter}" for name in TENSORS if name in self._states[part.parameter]}

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """These entries."""
        found = {}
        for entry in names:
            name, number = entry.split(".")
            found[entry] = self._states[int(number)][name]
        return found

    def read_part(self, part: Part) -> dict[str, Tensor]:
        """What the optimizer's state has of a part."""
        return {name: self._states[part.parameter][name] for name in self.names(part)}

    def nbytes(self, part: Part) -> int:
        """Bytes of a part."""
        return sum(tensor.nbytes for tensor in self.read_part(part).values())
