"""A plan of how ranks train a model with `MFAC`: what each holds, sends and computes, and the seconds of a step."""

from typing import NamedTuple

import torch
from torch import nn

from mfac_hf.defaults import MFAC_METRIC, TOUCHED_EMBEDDING_ROWS, defaults_of
from mfac_hf.machine import GIB
from mfac_hf.memory import input_embeddings
from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.optim.sharing import SHARE_MIN_BYTES
from mfac_hf.planner.holdings import (
    Holding,
    Model,
    column_bytes,
    holding_of,
    owned_pieces,
    owners_of,
    sharded_pieces,
)
from mfac_hf.planner.machine import MACHINES, Machine
from mfac_hf.planner.traffic import AGREED_NUMBERS, Collective, Work, work_of

__all__ = ["RankPlan", "plan_ranks"]

MIB = 1 << 20
BUCKET_BYTES = 25 * MIB  # of DistributedDataParallel


class RankPlan(NamedTuple):
    """What ranks hold, send and compute.

    Attributes:
        ranks: all of them.
        shards: into which FSDP2 cuts every parameter; 1 where each rank has all parameters.
        shares_window: whether ranks that have all parameters share the window.
        machine: for which seconds are computed.
        holdings: bytes that each rank holds.
        collectives: of a step, those that the model needs with any optimizer among them.
        work: of each rank.
    """

    ranks: int
    shards: int
    shares_window: bool
    machine: Machine
    holdings: tuple[Holding, ...]
    collectives: tuple[Collective, ...]
    work: tuple[Work, ...]

    @property
    def largest(self) -> Holding:
        """The rank that holds the most."""
        return max(self.holdings, key=lambda holding: holding.total)

    @property
    def fits(self) -> bool:
        """Whether that is less than the machine has; activations come on top."""
        return self.largest.total <= self.machine.memory

    def sent(self, by: str = "MFAC") -> int:
        """Bytes that a rank sends in a step, and as many that it receives, in the mean over the ranks."""
        return sum(each.sent for each in self._sent_by(by))

    def network_seconds(self, by: str = "MFAC") -> float:
        """Seconds of a step's collectives."""
        return sum((each.seconds(self.machine) for each in self._sent_by(by)), 0.0)

    @property
    def compute_seconds(self) -> float:
        """Seconds that the slowest rank computes in a step of `MFAC`."""
        return max(each.seconds(self.machine) for each in self.work)

    @property
    def step_seconds(self) -> float:
        """Seconds of a step of `MFAC`: computing and sending, one after the other."""
        return self.compute_seconds + self.network_seconds()

    def _sent_by(self, by: str) -> list[Collective]:
        return [each for each in self.collectives if each.by == by]

    @property
    def breakdown(self) -> str:
        """In words, a line for each part."""
        return "\n".join([*self._words_of_memory(), *self._words_of_messages(), *self._words_of_time()])

    def _words_of_memory(self) -> list[str]:
        kind = f"{self.ranks} ranks with all parameters"
        if self.shards > 1:
            copies = f" x {self.ranks // self.shards} copies" if self.ranks > self.shards else ""
            kind = f"{self.ranks} ranks, FSDP2: {self.shards} shards{copies}"
        if self.ranks == 1:
            kind = "1 rank"
        elif self.shards == 1:
            kind += ", the window shared" if self.shares_window else ", the whole window on each"
        most, least = self.largest, min(self.holdings, key=lambda holding: holding.total)
        lines = [f"{kind}. A rank holds at most, in MiB:"]
        lines += [f"  {name.replace('_', ' ')}: {size / MIB:,.1f}" for name, size in most._asdict().items() if size]
        verdict = "fits" if self.fits else "does NOT fit"
        lines.append(
            f"  total: {most.total / MIB:,.1f} (the rank with the least: {least.total / MIB:,.1f}); {verdict} into "
            f"{self.machine.memory / GIB:,.1f} GiB, activations on top"
        )
        return lines

    def _words_of_messages(self) -> list[str]:
        if self.ranks == 1:
            return []
        lines = ["each step, bytes handed to collectives, and sent by a rank (as many are received):"]
        for each in self.collectives:
            by = "MFAC" if each.by == "MFAC" else f"{each.by}, with any optimizer"
            calls = f" of {each.calls} calls" if each.calls > 1 else ""
            lines.append(
                f"  {each.what} ({by}): {each.operation}{calls} over {each.ranks} ranks, {each.payload:,} bytes; "
                f"sent {each.sent:,}"
            )
        return lines

    def _words_of_time(self) -> list[str]:
        most, machine = max(self.work, key=lambda work: work.seconds(self.machine)), self.machine
        other = sorted({each.by for each in self.collectives} - {"MFAC"})
        lines = [
            f"each step of MFAC, the slowest rank: {most.bytes:,} bytes of memory read or written, {most.flops:,} "
            f"operations in the passes, {most.factor_flops:,} in factoring",
            f"  {1e3 * self.step_seconds:.2f} ms: {1e3 * self.compute_seconds:.2f} computing, "
            f"{1e3 * self.network_seconds():.2f} sending",
        ]
        lines += [f"  beside it {1e3 * self.network_seconds(by):.2f} ms of what {by} sends" for by in other]
        lines.append(
            f"assumed of a rank: {machine.memory_bandwidth / 1e9:g} GB/s of memory, "
            f"{machine.network_bandwidth / 1e9:g} GB/s of network each way, {1e6 * machine.latency:g} us a message, "
            f"{machine.flops / 1e9:g} GFLOP/s in factoring, {1e3 * machine.step_overhead:g} ms a step and "
            f"{1e6 * machine.tensor_overhead:g} us a tensor beside"
            + (f", {machine.fresh_bandwidth / 1e9:g} GB/s of new memory" if machine.fresh_bandwidth else "")
        )
        return lines


def plan_ranks(
    model_or_numel: nn.Module | int,
    num_grads: int | None = None,
    window_dtype: torch.dtype | None = None,
    *,
    metric: str = MFAC_METRIC,
    embedding_rows: int | None = TOUCHED_EMBEDDING_ROWS,
    ranks: int = 1,
    shards: int = 1,
    share_window: bool | None = None,
    machine: Machine | str = "laptop",
) -> RankPlan:
    r"""Plan what each rank holds, sends and computes in a step of `MFAC`, and how long that takes.

    Seconds of a step are :math:`\max_r (b_r / B + a_r / A + m^3 / (3 F) + o + o_t n_r)`, with the bytes :math:`b_r`
    that rank r reads and writes and :math:`a_r` that it allocates, the bandwidths B and A of memory and of new memory,
    the speed F of factoring and the overheads o, and those of the collectives after each other
    (`mfac_hf.planner.traffic`). Parameters are dealt out by the optimizer's own rule.

    Args:
        model_or_numel: a model (on the meta device, if it is large), or the number of (dense) float32 parameters.
        num_grads: length of the window, m; None for the metric's default.
        window_dtype: storage type of the dense part; None for the metric's default.
        metric: of `MFAC`.
        embedding_rows: rows of each embedding table that one batch of all ranks looks up, taken to lie evenly; a table
            of which that is more than a quarter is dense. None counts all as dense.
        ranks: processes.
        shards: into which FSDP2 cuts every parameter. 1: DistributedDataParallel. Fewer than ranks: HSDP, on a mesh of
            ranks / shards copies.
        share_window: whether ranks with all parameters share the window; None as Trainer's do, from 16 MiB on.
        machine: speeds and memory of a rank, or a name in `mfac_hf.planner.MACHINES`.

    Returns:
        The plan; ``breakdown`` has it in words, with what was assumed.

    Raises:
        ValueError: for a number below 1, ``ranks`` that are no multiple of ``shards``, ``share_window`` with shards,
            an unknown metric or machine, or a speed that cannot be.
    """
    machine = _machine(machine)
    _check(ranks, shards, share_window, embedding_rows)
    options = _options(metric, num_grads, window_dtype)
    model = _count(model_or_numel, embedding_rows)
    if shards > 1:
        return _plan_shards(model, options, ranks, shards, machine)
    if share_window is None:
        share_window = sum(column_bytes(p, model, options) for p in model.trained) >= SHARE_MIN_BYTES
    return _plan_whole(model, options, ranks, share_window and ranks > 1, machine)


def _plan_whole(model: Model, options: ParameterWindowOptions, ranks: int, shares: bool, machine: Machine) -> RankPlan:
    """Ranks that each have all parameters."""
    owners = owners_of(model, options, ranks if shares else 1)
    moved = [(p.numel(), p.dtype.itemsize) for p in model.trained] if shares else None
    divided = sum(p.numel() for p in model.trained if owners[p].is_divided())
    holdings, work = [], []
    for rank in range(ranks if shares else 1):
        pieces = list(owned_pieces(model, options, owners, rank))
        holdings.append(
            holding_of(
                model,
                options,
                pieces,
                shards=(1, 0),
                buckets=ranks > 1,
                divided=divided if shares else None,
                joins_gradients=machine.joins_gradients,
            )
        )
        fresh = holdings[-1].temporary
        if shares:
            # Directions of tables are made dense before they are sent, and given back at once; the time of memory in
            # which those of others arrive is that of the network.
            tables = sum(piece.numel for piece in pieces if piece.touched is not None)
            arrives = sum(p.numel() for p in model.trained) - sum(piece.numel for piece in pieces)
            fresh += (tables - arrives) * options.result_dtype.itemsize
        work.append(work_of(pieces, options, moved, divided, fresh))
    if not shares:
        holdings, work = holdings * ranks, work * ranks
    collectives = []
    if ranks > 1:
        size = sum(p.nbytes for p in model.trained)
        collectives = [Collective("gradients", "DDP", "all_reduce", ranks, size, -(-size // BUCKET_BYTES))]
    if shares:
        collectives += _own_collectives(options, ranks)
        every = options.result_dtype.itemsize * sum(p.numel() for p in model.trained)
        holding = sum(any(owner.holds(rank) for owner in owners.values()) for rank in range(ranks))
        collectives.append(Collective("directions", "MFAC", "broadcast", ranks, every, holding))
    return RankPlan(ranks, 1, shares, machine, tuple(holdings), tuple(collectives), tuple(work))


def _plan_shards(model: Model, options: ParameterWindowOptions, ranks: int, shards: int, machine: Machine) -> RankPlan:
    """Ranks that have shards: FSDP2, or HSDP."""
    holdings, work = [], []
    for shard in range(shards):
        pieces = list(sharded_pieces(model, options, shards, shard))
        holdings.append(
            holding_of(
                model,
                options,
                pieces,
                shards=(shards, shard),
                buckets=False,
                divided=None,
                joins_gradients=machine.joins_gradients,
            )
        )
        work.append(work_of(pieces, options, None, 0, holdings[-1].temporary))
    copies = ranks // shards
    # A module that is no layer among others, the outermost one, keeps its parameters until backward.
    gathered = sum(p.nbytes * (2 if p in model.layered else 1) for p in [*model.trained, *model.frozen])
    grads = sum(p.nbytes for p in model.trained)
    collectives = [
        Collective("parameters", "FSDP2", "all_gather", shards, gathered),
        Collective("gradients", "FSDP2", "reduce_scatter", shards, grads),
    ]
    if copies > 1:
        collectives.append(Collective("gradients", "FSDP2", "all_reduce", copies, -(-grads // shards)))
    collectives += _own_collectives(options, ranks)
    return RankPlan(ranks, shards, False, machine, tuple(holdings) * copies, tuple(collectives), tuple(work) * copies)


def _own_collectives(options: ParameterWindowOptions, ranks: int) -> list[Collective]:
    return [
        Collective("norm and agreement", "MFAC", "all_reduce", ranks, 8 * AGREED_NUMBERS),
        Collective("dot products", "MFAC", "all_reduce", ranks, 8 * options.num_grads),
    ]


def _machine(machine: Machine | str) -> Machine:
    if isinstance(machine, str):
        if machine not in MACHINES:
            raise ValueError(f"machine is {machine!r}; expected one of {', '.join(MACHINES)}, or a Machine")
        machine = MACHINES[machine]
    machine.check()
    return machine


def _check(ranks: int, shards: int, share_window: bool | None, embedding_rows: int | None) -> None:
    for name, value in (("ranks", ranks), ("shards", shards)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    if ranks % shards:
        raise ValueError(
            f"{ranks} ranks with parameters in {shards} shards; expected a multiple of {shards} ranks: each copy of "
            "the parameters lies on as many ranks as it has shards"
        )
    if shards > 1 and share_window is not None:
        raise ValueError(
            f"share_window is {share_window} with {shards} shards; leave it out: there each rank keeps the columns of "
            "what it has"
        )
    if embedding_rows is not None and embedding_rows < 0:
        raise ValueError(f"embedding_rows is {embedding_rows}; expected at least 0, or None for dense embeddings")


def _options(metric: str, num_grads: int | None, window_dtype: torch.dtype | None) -> ParameterWindowOptions:
    defaults = defaults_of(metric)
    return ParameterWindowOptions(
        metric=metric,
        num_grads=defaults["num_grads"] if num_grads is None else num_grads,
        damping=defaults["damping"],
        window_dtype=getattr(torch, defaults["window_dtype"]) if window_dtype is None else window_dtype,
    )


def _count(model_or_numel: nn.Module | int, embedding_rows: int | None) -> Model:
    if isinstance(model_or_numel, int):
        if model_or_numel < 1:
            raise ValueError(f"{model_or_numel} parameters to optimize; expected at least 1")
        return Model([torch.empty(model_or_numel, device="meta")], [], {}, frozenset())
    parameters = [p for p in model_or_numel.parameters() if p.numel()]
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise ValueError("0 parameters to optimize; expected at least 1 that requires a gradient")
    touched = {}
    if embedding_rows is not None:
        tables = input_embeddings(model_or_numel).values()
        touched = {table: min(embedding_rows, table.shape[0]) for table in tables}
    lists = [module for module in model_or_numel.modules() if isinstance(module, nn.ModuleList)]
    layered = frozenset(p for module in lists for p in module.parameters())
    return Model(trained, [p for p in parameters if not p.requires_grad], touched, layered)
