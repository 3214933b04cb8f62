"""Linear layers that multiply by compressed sparse rows (CSR), where that is measured to be faster.

PyTorch's sparse product is fast in one orientation: ``W_csr @ x.T``. The same weights through ``F.linear(x, W_csr)``
are slower than dense ones. Many tokens at once do not stay in the cache, so long inputs are cut into pieces where this
is faster.
"""

from __future__ import annotations

import copy
import logging
import statistics
import warnings
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from mfac_hf.optim.unwrap import unwrap_model

__all__ = ["SparseLinear", "to_sparse_inference"]

logger = logging.getLogger(__name__)

PIECE = 64  # tokens whose inputs and outputs of a BERT layer stay in a core's cache
ROUNDS = 5  # times that a layer is timed

Model = TypeVar("Model", bound=nn.Module)


class _DenseLater(Tensor):
    """The weight of a sparse layer: it has dtype, shape and device, and takes memory when something computes with it.

    T5 asks for the dtype of this weight in each forward pass, and never for its values.
    """

    layer: SparseLinear

    @staticmethod
    def __new__(cls, layer: SparseLinear) -> _DenseLater:
        values = layer.values
        made: _DenseLater = Tensor._make_wrapper_subclass(cls, layer.shape, dtype=values.dtype, device=values.device)
        made.layer = layer
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.layer.dense())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def dense(value: Any) -> Any:
            if isinstance(value, cls):
                return value.layer.dense()
            return type(value)(map(dense, value)) if type(value) in (list, tuple) else value

        return func(*dense(args), **{name: dense(value) for name, value in (kwargs or {}).items()})


class SparseLinear(nn.Module):
    """Computes ``x @ W.T + b`` with W in compressed sparse rows; for inference, in float32 or float64.

    Its state dict is that of the layer it replaces: it holds, and loads, a dense ``weight`` and a ``bias``. Zeros of
    either sign are left out and come back as +0.0.

    Args:
        linear: the layer to replace, an ``nn.Linear`` or GPT-2's ``Conv1D``, whose weight is transposed; its bias is
            shared.
        piece: tokens to multiply at once; None for all.

    Raises:
        ValueError: the weight is of another dtype.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Module, *, piece: int | None = None) -> None:
        super().__init__()
        weight: Any = linear.weight
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the weight is {weight.dtype}: sparse products need float32 or float64")
        self.transposed = not isinstance(linear, nn.Linear)
        self.out_features, self.in_features = weight.T.shape if self.transposed else weight.shape
        self.piece = piece
        self.bias = linear.bias  # type: ignore[assignment]
        self._compress(weight.detach())

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the dense weight as the state dict has it."""
        shape = self.out_features, self.in_features
        return shape[::-1] if self.transposed else shape

    def _compress(self, weight: Tensor) -> None:
        weight_OI = weight.T if self.transposed else weight
        keep_OI = weight_OI != 0
        counts_O = keep_OI.sum(1)
        rows = torch.cat([counts_O.new_zeros(1), counts_O.cumsum(0)])
        # MKL takes 32-bit indices as they are; others it converts at every product
        self.register_buffer("rows", rows.int(), persistent=False)
        self.register_buffer("columns", keep_OI.nonzero()[:, 1].int(), persistent=False)
        self.register_buffer("values", weight_OI[keep_OI], persistent=False)

    def _csr(self) -> Tensor:
        size = (self.out_features, self.in_features)
        with warnings.catch_warnings():  # CSR tensors announce themselves as beta
            warnings.simplefilter("ignore")
            return torch.sparse_csr_tensor(self.rows, self.columns, self.values, size, check_invariants=False)

    def dense(self) -> Tensor:
        """Put the dense weight together."""
        values = self.values
        dense_OI = torch.zeros(self.out_features, self.in_features, dtype=values.dtype, device=values.device)
        counts_O = torch.diff(self.rows)
        row_of = torch.repeat_interleave(torch.arange(self.out_features, device=values.device), counts_O)
        dense_OI[row_of, self.columns] = values
        return dense_OI.T.contiguous() if self.transposed else dense_OI

    @property
    def weight(self) -> Tensor:
        """The dense weight, put together at each computation with it."""
        return _DenseLater(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        x_NI = x.reshape(-1, self.in_features)
        weight_OI = self._csr()
        if self.piece is None or len(x_NI) <= self.piece:
            out_NO = self._product(weight_OI, x_NI)
        else:
            out_NO = torch.cat([self._product(weight_OI, x_PI) for x_PI in x_NI.split(self.piece)])
        return out_NO.reshape(*x.shape[:-1], self.out_features)

    def _product(self, weight_OI: Tensor, x_NI: Tensor) -> Tensor:
        if self.bias is None:
            return (weight_OI @ x_NI.T).T
        return torch.addmm(self.bias[:, None], weight_OI, x_NI.T).T

    def extra_repr(self) -> str:
        """Describe the layer for its line in the printed model."""
        total = self.in_features * self.out_features
        kept = self.values.numel()
        return f"{self.in_features}, {self.out_features}, sparsity={1 - kept / total:.4f}, piece={self.piece}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.dense()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight = state_dict.pop(prefix + "weight", None)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if weight is None:
            missing_keys.append(prefix + "weight")
        elif weight.shape != self.shape:
            error_msgs.append(f"{prefix}weight has shape {tuple(weight.shape)}; expected {self.shape}")
        else:
            self._compress(weight.detach().to(self.values))


@torch.no_grad()
def to_sparse_inference(model: Model, *, tokens: int = 128, min_speedup: float = 1.05) -> Model:
    """Replace each linear layer by a sparse one where that is measured to be faster.

    Every ``nn.Linear``, and every ``Conv1D`` of GPT-2, with zeros is timed against its sparse counterpart on this
    machine, on ``tokens`` random tokens and with PyTorch's present number of threads. Outputs differ by rounding.
    Sparse products take as much memory for activations as dense ones; the weights of a replaced layer take 8 bytes for
    each that is not zero (float32).

    Args:
        model: it stays as it is; the result shares what is not replaced. Of a model inside torch.compile,
            DistributedDataParallel or DataParallel, what they wrap.
        tokens: tokens to expect in a forward pass: batch size times sequence length.
        min_speedup: how many times faster a sparse layer has to be; 0 replaces every layer that has zeros.

    Returns:
        A model in evaluation mode with the state dict of ``model``. A log line says how many layers were replaced.

    Raises:
        ValueError: ``tokens`` is below 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; expected at least 1")
    from transformers.pytorch_utils import Conv1D  # here: importing this need not wait for it

    model = cast(Model, unwrap_model(model))
    shared = [*model.parameters(), *model.buffers()]
    result = copy.deepcopy(model, {id(tensor): tensor for tensor in shared}).eval()
    candidates = [
        (name, module)
        for name, module in result.named_modules()
        # the exact type, as a subclass may compute something else
        if type(module) in (nn.Linear, Conv1D)
        and module.weight.dtype in (torch.float32, torch.float64)
        and not module.weight.all()
    ]
    replaced = 0
    for name, linear in candidates:
        best = _fastest(linear, tokens, min_speedup)
        if best is not None:
            result.set_submodule(name, best)
            replaced += 1
    logger.info("%d of %d linear layers with zeros are faster as sparse ones", replaced, len(candidates))
    return result


def _fastest(linear: Any, tokens: int, min_speedup: float) -> SparseLinear | None:
    """Return the fastest sparse layer, or None where the dense one is as good."""
    layers = [SparseLinear(linear), *([SparseLinear(linear, piece=PIECE)] if tokens > PIECE else [])]
    if min_speedup == 0 and len(layers) == 1:
        return layers[0]
    x = torch.randn(tokens, layers[0].in_features, dtype=linear.weight.dtype, device=linear.weight.device)
    times: list[list[float]] = [[] for _ in range(1 + len(layers))]
    timers = [
        Timer("layer(x)", globals={"layer": layer, "x": x}, num_threads=torch.get_num_threads())
        for layer in (linear, *layers)
    ]
    for _ in range(ROUNDS):  # in turns, so that all meet the same noise
        for spent, timer in zip(times, timers, strict=True):
            spent.append(timer.timeit(1).mean)
    dense, *sparse = map(statistics.median, times)
    best = min(range(len(layers)), key=lambda i: sparse[i])
    return layers[best] if dense >= min_speedup * sparse[best] else None
