"""A window over parameters is one window over all their coordinates, wherever these lie."""

import pytest
import torch

from mfac_hf.fisher import GradientWindow
from mfac_hf.fisher.columns import DenseColumns, RowSparseColumns
from mfac_hf.optim import placement
from mfac_hf.optim.options import ParameterWindowOptions
from mfac_hf.optim.parameter_window import ParameterWindow
from tests.helpers.tensors import draw

OPTIONS = ParameterWindowOptions(num_grads=4, damping=1e-2, window_dtype=torch.float64, grad_decay=0.5)


@pytest.fixture(autouse=True)
def new_memory(monkeypatch):
    """Dense columns that start with NaN for what new memory may hold."""

    def uninitialised(num_grads, dim, *, dtype, device, compute_device):
        buffer = torch.full((num_grads, dim), torch.nan, dtype=dtype, device=device)
        return DenseColumns(num_grads, dim, buffer=buffer)

    monkeypatch.setattr(placement, "DenseColumns", uninitialised)


def make_parameters():
    """A matrix, a table whose gradients are sparse, and a vector; 6, 12 and 5 numbers."""
    return [torch.zeros(shape, dtype=torch.float64) for shape in ((2, 3), (6, 2), (5,))]


def make_gradients(parameters, step):
    """Of the table three rows, as a sparse tensor."""
    numbers = draw(1, sum(p.numel() for p in parameters), seed=step)[0].split([p.numel() for p in parameters])
    gradients = [part.view(p.shape).clone() for part, p in zip(numbers, parameters, strict=True)]
    gradients[1][step % 3 :: 2] = 0.0
    gradients[1] = gradients[1].to_sparse(1)
    return dict(zip(parameters, gradients, strict=True))


def to_vector(parameters, values):
    """The values of all parameters one after the other, zeros where there is none."""
    return torch.cat(
        [values[p].to_dense().flatten() if p in values else torch.zeros_like(p).flatten() for p in parameters]
    )


def make_plain():
    return GradientWindow(4, 23, damping=OPTIONS.damping, dtype=torch.float64)


def assert_directions(window, plain, parameters, gradients):
    found = window.directions(gradients, {})
    assert found.keys() == gradients.keys()
    expected = plain.direction(OPTIONS.grad_decay).split([p.numel() for p in parameters])
    for p, part in zip(parameters, expected, strict=True):
        if p in gradients:
            dense = found[p] if isinstance(found[p], torch.Tensor) else found[p].to_dense(p.shape)
            torch.testing.assert_close(dense, part.view(p.shape), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_directions_are_those_of_one_window(masked):
    """Any of the parameters may lack a gradient in a step; masked coordinates have none."""
    parameters, plain = make_parameters(), make_plain()
    masks = {p: draw(1, p.numel(), seed=9).view(p.shape) > 0 for p in parameters[:2]} if masked else {}
    window = ParameterWindow.from_gradients(make_gradients(parameters, 0), masks, OPTIONS)
    assert [type(columns) for columns in window.columns] == [DenseColumns, RowSparseColumns]
    for step in range(11):
        gradients = make_gradients(parameters, step)
        for p in [p for i, p in enumerate(parameters) if step % 4 == i + 1]:
            del gradients[p]
        window.push(gradients, masks)
        plain.push(to_vector(parameters, {p: g.to_dense() * masks.get(p, 1.0) for p, g in gradients.items()}))
        assert_directions(window, plain, parameters, gradients)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_late_columns_are_zero_in_the_rows_already_stored(late):
    """Exact: a parameter that had no gradient so far had a zero one."""
    parameters, plain = make_parameters(), make_plain()
    early = {p: g for i, (p, g) in enumerate(make_gradients(parameters, 0).items()) if i != late}
    window = ParameterWindow.from_gradients(early, {}, OPTIONS)
    for step in range(9):
        gradients = make_gradients(parameters, step)
        if step < 3:
            del gradients[parameters[late]]
        if new := {p: grad for p, grad in gradients.items() if p not in window.owners}:
            window.add(new, {})
        window.push(gradients, {})
        plain.push(to_vector(parameters, gradients))
        assert_directions(window, plain, parameters, gradients)
    assert window.nbytes >= plain.gram.options.num_grads * 11 * 8 and window.count == 4


def test_rows_without_a_gradient_are_cleared_before_they_are_saved():
    parameters = make_parameters()
    window = ParameterWindow.from_gradients(make_gradients(parameters, 0), {}, OPTIONS)
    window.push(make_gradients(parameters, 0), {})
    window.clear_unwritten()
    dense, table = window.columns
    assert dense.buffer_MD[0].any() and not dense.buffer_MD[1:].any()
    assert (table.rows_MN[0] < 6).any() and (table.rows_MN[1:] == 6).all()
