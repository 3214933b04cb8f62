r"""Gradients divided by the norm of the loss's gradient by the model's outputs, for the scaled Fisher.

With the outputs :math:`z_i` and the loss :math:`\ell_i` of example i,

.. math:: r_i = \max(\lVert \partial \ell_i / \partial z_i \rVert_2, \text{floor})

is held constant, and :math:`g_i / r_i` is its gradient. An example that the model gets right has a small
:math:`g_i`, and a small :math:`r_i` too: what its outputs depend on stays visible. Examples do not meet in a model in
evaluation mode, so one backward pass from the loss of a batch to its outputs gives each its own :math:`\partial \ell_i
/ \partial z_i`, divided by the size of the batch. From there on the pass goes back with each example's part divided
by :math:`r_i`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

__all__ = ["OutputsFunction", "Scaling", "plain_gradients"]

OutputsFunction = Callable[[Any], Any]

_WAYS_OUT = "give outputs_fn, which takes what the model returned and returns these tensors, or fisher='empirical'"


def plain_gradients(loss: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradients of a loss by some tensors; None for those that it does not depend on."""
    return torch.autograd.grad(loss, list(inputs), allow_unused=True)


@dataclass(frozen=True)
class Scaling:
    """Where the outputs of a model are found, and how gradients are divided by the norm of the gradient by them.

    Attributes:
        floor: least number to divide by, > 0.
        outputs_fn: takes what the model returned and returns its outputs, a tensor or several with an example in each
            row; they are what the loss is computed from. None: a tensor that the model returned, or the entries of a
            dictionary or ``ModelOutput`` whose names end in ``logits``.
    """

    floor: float
    outputs_fn: OutputsFunction | None = None

    @contextmanager
    def watched(self, model: nn.Module, count: int) -> Iterator[list[Tensor]]:
        """Collect the outputs of the calls of a model inside the block that have a gradient.

        Args:
            model: the model.
            count: examples of a batch.

        Raises:
            ValueError: in the call, where what it returned has no outputs, or not one row for each example.
        """
        found: list[Tensor] = []

        def keep(model: nn.Module, inputs: Any, returned: Any) -> None:
            for name, output in self._find(model, returned).items():
                if output.ndim == 0 or len(output) != count:
                    raise ValueError(
                        f"{name} of {type(model).__name__} has the shape {tuple(output.shape)} for a batch of {count} "
                        f"example(s); the scaled Fisher needs outputs with one row for each example: {_WAYS_OUT}"
                    )
                if output.requires_grad:
                    found.append(output)

        handle = model.register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()

    def _find(self, model: nn.Module, returned: Any) -> dict[str, Tensor]:
        """Return the outputs among what a model returned, by what to call them."""
        if self.outputs_fn is not None:
            chosen = self.outputs_fn(returned)
            tensors = list(chosen) if isinstance(chosen, tuple | list) else [chosen]
            if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
                raise ValueError(
                    f"outputs_fn returned {_described(chosen)}; expected the tensor that the loss is computed from, "
                    "or a list of such tensors"
                )
            return {f"output {number} of outputs_fn": tensor for number, tensor in enumerate(tensors, 1)}
        if isinstance(returned, Tensor) and returned.ndim:
            return {"the output": returned}
        entries = returned if isinstance(returned, Mapping) else getattr(returned, "__dict__", {})
        logits = {
            name: value
            for name, value in entries.items()
            if isinstance(name, str) and name.endswith("logits") and isinstance(value, Tensor)
        }
        if not logits:
            raise ValueError(
                f"{type(model).__name__} returned {_described(returned)}, without logits, by whose gradients the "
                f"scaled Fisher divides: {_WAYS_OUT}"
            )
        return logits

    def gradients(
        self, loss: Tensor, outputs: Sequence[Tensor], inputs: Sequence[Tensor], parameters: Mapping[str, nn.Parameter]
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        r"""Return scaled gradients of a batch's loss.

        Args:
            loss: the mean loss over N examples.
            outputs: what :meth:`watched` has found, each with N rows.
            inputs: tensors that the outputs depend on: weights, or outputs of layers.
            parameters: the weights whose gradients the result is for.

        Returns:
            :math:`\frac1N \sum_i \frac{1}{r_i} \partial \ell_i / \partial x` for each input x, or None where the
            outputs do not depend on it; and :math:`\lVert \partial \ell_i / \partial z_i \rVert`, (N,).

        Raises:
            ValueError: the loss does not depend on the outputs, or depends on a parameter beside them.
        """
        edges, beside = _edges_of_outputs(loss, outputs, {id(p): name for name, p in parameters.items()})
        if not edges:
            raise ValueError(
                "the loss of a batch does not depend on the outputs of the model that the scaled Fisher divides by "
                f"({len(outputs)} with a gradient were found). It has to be computed from what the model returns when "
                f"it is called: {_WAYS_OUT}"
            )
        if beside is not None:
            raise ValueError(
                f"the loss of a batch depends on {beside} beside the outputs that the scaled Fisher divides by: by a "
                "penalty on weights, an auxiliary loss, or an output of another name. Leave that part out of the "
                f"loss; or, where all that it depends on are outputs, {_WAYS_OUT}"
            )
        by_outputs = torch.autograd.grad(loss, edges)
        count = len(by_outputs[0])
        squares = [_norms(gradient).square() for gradient in by_outputs]
        norms_N = count * torch.stack(squares).sum(dim=0).sqrt()
        scale_N = 1 / norms_N.clamp(min=self.floor)
        scaled = [
            (gradient * scale_N.view(-1, *[1] * (gradient.ndim - 1))).to(gradient.dtype) for gradient in by_outputs
        ]
        return torch.autograd.grad(edges, list(inputs), scaled, allow_unused=True), norms_N


def _norms(gradient: Tensor) -> Tensor:
    """Return the norm of each example's part, (N,), at least in float32."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    return torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1, dtype=dtype)


def _edges_of_outputs(
    loss: Tensor, outputs: Sequence[Tensor], names: Mapping[int, str]
) -> tuple[list[GradientEdge], str | None]:
    """Go from a loss back to the outputs that it depends on, and no further.

    Accelerate converts what a model returns to float32; the loss in it was computed from what was there before. So an
    output that is a copy of another type also stands for what it is a copy of.

    Args:
        loss: the loss.
        outputs: tensors with a gradient.
        names: of the parameters, by their ids.

    Returns:
        The edges of the autograd graph that the outputs are, and the name of a parameter that the loss depends on
        by a way beside them; None if there is none.
    """
    ends = [_ends(output) for output in outputs]
    stops = {end for pair in ends for end in pair}
    assert loss.grad_fn is not None  # BatchLoss
    reached, beside, waiting = set(), None, [(loss.grad_fn, loss.output_nr)]
    seen: set[Any] = set()
    while waiting:
        node, number = waiting.pop()
        if (node, number) in stops:
            reached.add((node, number))
        elif node not in seen:
            seen.add(node)
            beside = beside or names.get(id(getattr(node, "variable", None)))
            waiting.extend((after, position) for after, position in node.next_functions if after is not None)
    chosen = {next((end for end in reversed(pair) if end in reached), None): None for pair in ends}
    return [GradientEdge(*end) for end in chosen if end is not None], beside


def _ends(output: Tensor) -> list[tuple[Any, int]]:
    """Return the edge of an output and, where it is a copy of another type, of what it is a copy of."""
    edge = get_gradient_edge(output)
    found = [(edge.node, edge.output_nr)]
    if edge.node.name().startswith("ToCopyBackward"):
        found += [(node, number) for node, number in edge.node.next_functions if node is not None]
    return found


def _described(value: Any) -> str:
    """Say in short what a function returned."""
    if isinstance(value, Mapping):
        return f"a dictionary of {sorted(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
