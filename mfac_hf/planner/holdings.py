"""What each rank holds: the parts of the parameters that it has, and the bytes of what goes with them."""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor

from mfac_hf.memory import ROW_SPARSE_MIN_NUMEL, gram_matrix_bytes
from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.optim.placement import ROW_SPARSE_MAX_DENSITY, table_bytes
from mfac_hf.optim.sharing import Owner, deal_out

__all__ = ["Holding", "Model", "Piece", "column_bytes", "holding_of", "owned_pieces", "owners_of", "sharded_pieces"]


class Model(NamedTuple):
    """The parameters that a plan counts.

    Attributes:
        trained: those that are trained.
        frozen: the others.
        touched: of embedding tables, rows that one batch of all ranks looks up.
        layered: those in a list of layers, each of which FSDP2 is taken to gather for forward and for backward.
    """

    trained: Sequence[Tensor]
    frozen: Sequence[Tensor]
    touched: Mapping[Tensor, int]
    layered: Set[Tensor] = frozenset()


class Piece(NamedTuple):
    """What one rank's window has of a parameter.

    Attributes:
        numel: its numbers.
        grad_itemsize: bytes of one number of its gradient.
        touched: of a table that is stored by rows, how many a batch looks up; None where it is dense.
        width: of a table's row.
        divided: whether other ranks have other rows.
    """

    numel: int
    grad_itemsize: int
    touched: int | None
    width: int
    divided: bool

    @property
    def height(self) -> int:
        """Rows of a table."""
        return self.numel // self.width

    @property
    def slots(self) -> int:
        """Rows that a table has room for in each gradient: a quarter more than the first one has."""
        return max(1, min(self.height, (self.touched or 0) * 5 // 4))

    def window_bytes(self, options: ParameterWindowOptions) -> int:
        """Bytes of its stored gradients."""
        if self.touched is None:
            return self.numel * options.num_grads * options.window_dtype.itemsize
        return options.num_grads * self.slots * (self.width * options.result_dtype.itemsize + 8)

    def moment_bytes(self, options: ParameterWindowOptions) -> int:
        """Bytes of its second moment; of a table also the step of each row."""
        if not options.moment_itemsize:
            return 0
        return self.numel * options.moment_itemsize + (0 if self.touched is None else 8 * self.height)


class Holding(NamedTuple):
    """Bytes that one rank holds; activations, which depend on the batch, come on top.

    Attributes:
        parameters: trained and frozen ones, or its shards of them.
        gradients: of the trained ones.
        buckets: DistributedDataParallel's copies of the gradients, from which it sends them.
        window: stored gradients.
        second_moment: of Adam's metric.
        matrices: m x m matrices of the Fisher.
        temporary: the most that a step allocates and gives back.
    """

    parameters: int
    gradients: int
    buckets: int
    window: int
    second_moment: int
    matrices: int
    temporary: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def column_bytes(p: Tensor, model: Model, options: ParameterWindowOptions) -> int:
    """Bytes of a parameter's columns and second moment, as the optimizer counts them when it shares them out."""
    if is_table(p, model, options):
        return table_bytes(p.shape, model.touched[p], options)
    return p.numel() * options.column_bytes


def is_table(p: Tensor, model: Model, options: ParameterWindowOptions) -> bool:
    """Whether the gradients of a whole parameter are stored by rows."""
    return _is_sparse(p.numel(), p.shape, model.touched.get(p), options)


def _is_sparse(numel: int, shape: Sequence[int], touched: int | None, options: ParameterWindowOptions) -> bool:
    if touched is None or not options.row_sparse or numel < ROW_SPARSE_MIN_NUMEL:
        return False
    return touched <= ROW_SPARSE_MAX_DENSITY * shape[0]


def owners_of(model: Model, options: ParameterWindowOptions, ranks: int) -> dict[Tensor, Owner]:
    """Who keeps which columns of a window that ranks share."""
    return deal_out({p: column_bytes(p, model, options) for p in model.trained}, {}, (), ranks)


def owned_pieces(
    model: Model, options: ParameterWindowOptions, owners: Mapping[Tensor, Owner], rank: int
) -> Iterator[Piece]:
    """What a rank has of a window that ranks share; all of it, where it is the only one."""
    for p in model.trained:
        if owners[p].holds(rank):
            shape = owners[p].box(rank)[1]
            table = is_table(p, model, options)
            touched = round(model.touched[p] * shape[0] / p.shape[0]) if table else None
            width = shape[1] if table else 1
            yield Piece(torch.Size(shape).numel(), p.dtype.itemsize, touched, width, owners[p].is_divided())


def sharded_pieces(model: Model, options: ParameterWindowOptions, shards: int, shard: int) -> Iterator[Piece]:
    """What a rank has where FSDP2 shards every parameter by its rows."""
    for p in model.trained:
        rows = shard_rows(p, shards, shard)
        if rows:
            numel = p.numel() * rows // (p.shape[0] if p.ndim else 1)
            touched = model.touched.get(p)
            touched = None if touched is None else round(touched * rows / p.shape[0])
            table = _is_sparse(numel, (rows, *p.shape[1:]), touched, options)
            yield Piece(numel, p.dtype.itemsize, touched if table else None, p.shape[1] if table else 1, False)


def shard_rows(p: Tensor, shards: int, shard: int) -> int:
    """Rows of a parameter in one of FSDP2's shards: as many as in any other, but for the last ones."""
    rows = p.shape[0] if p.ndim else 1
    each = -(-rows // shards)
    return min(rows, (shard + 1) * each) - min(rows, shard * each)


def holding_of(
    model: Model,
    options: ParameterWindowOptions,
    pieces: Sequence[Piece],
    *,
    shards: tuple[int, int],
    buckets: bool,
    divided: int | None,
    joins_gradients: bool,
) -> Holding:
    """The bytes of a rank.

    Args:
        model: the parameters.
        options: of the window.
        pieces: what the rank's window has of them.
        shards: into how many shards FSDP2 cuts every parameter, and which of them the rank has; (1, 0) where each
            rank has all.
        buckets: whether DistributedDataParallel sends gradients.
        divided: where ranks that have all parameters share the window, numbers of parameters that several ranks keep;
            else None.
        joins_gradients: as in `Machine`.
    """

    def local(parameters: Sequence[Tensor]) -> int:
        return sum(p.nbytes * shard_rows(p, *shards) // (p.shape[0] if p.ndim else 1) for p in parameters if p.numel())

    trained, itemsize = local(model.trained), options.result_dtype.itemsize
    own = itemsize * sum(piece.numel for piece in pieces if piece.touched is None)
    joined = own if joins_gradients else 0
    if divided is None:
        temporary = max(joined, 0 if options.metric == "adam" else own)
    else:
        # Own directions, then those of all ranks as they came, then those that are put together from several ranks.
        temporary = max(joined, own + itemsize * (sum(p.numel() for p in model.trained) + divided))
    return Holding(
        parameters=trained + local(model.frozen),
        gradients=trained,
        buckets=trained if buckets else 0,
        window=sum(piece.window_bytes(options) for piece in pieces),
        second_moment=sum(piece.moment_bytes(options) for piece in pieces),
        matrices=gram_matrix_bytes(options.num_grads),
        temporary=temporary,
    )
