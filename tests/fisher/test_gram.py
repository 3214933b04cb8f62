"""The Gram matrix and the weights of a direction against dense float64 matrices of the same gradients."""

import numpy as np
import pytest
import torch

from mfac_hf.fisher.gram import CPU_ROWS, GramMatrix, algebra_device
from mfac_hf.fisher.options import WindowOptions
from mfac_hf.fisher.reference import dense_fisher
from tests.helpers.tensors import draw, relative_error


def make(num_grads, damping=1e-2, normalize="num_grads"):
    return GramMatrix(WindowOptions(num_grads=num_grads, damping=damping, normalize=normalize))


class Pushed:
    """A Gram matrix and, beside it, the rows that its dot products are of."""

    def __init__(self, num_grads, dim, parts=1, **options):
        self.gram = make(num_grads, **options)
        self.rows = torch.zeros(num_grads, dim, dtype=torch.float64)
        self.parts = parts

    @property
    def held(self):
        return self.rows[: self.gram.count]

    def push(self, *grads):
        """Each gradient; its dot products in one part, or in several."""
        for grad in grads:
            row, count = self.gram.next_row, self.gram.next_count
            self.rows[row] = grad
            pieces = self.rows[:count].tensor_split(self.parts, dim=1)
            self.gram.push([piece @ piece[row] for piece in pieces])
            assert self.gram.newest == row and self.gram.count == count


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("normalize", ["num_grads", "count"])
@pytest.mark.parametrize(("m", "d"), [(1, 1), (1, 4), (2, 9), (7, 3), (20, 40)])
def test_directions_while_filling_and_after_wrapping(m, d, normalize, parts):
    """Weights of the stored gradients that make up `F⁻¹` of the newest, or of their decayed average."""
    pushed = Pushed(m, d, parts, normalize=normalize)
    for step, grad in enumerate(draw(2 * m + 3, d)):
        pushed.push(grad)
        gram, held = pushed.gram, pushed.held
        assert gram.count == min(step + 1, m) and gram.pushed == step + 1
        torch.testing.assert_close(gram.gram_MM[: gram.count, : gram.count], held @ held.T)
        assert not gram.gram_MM[gram.count :].any()
        fisher = dense_fisher(held, 1e-2, m if normalize == "num_grads" else gram.count)
        for decay in (0.0, 0.6):
            ages = torch.tensor([(gram.newest - row) % m for row in range(gram.count)])
            weights = torch.tensor(decay, dtype=torch.float64) ** ages
            average = (weights / weights.sum()) @ held
            direction = gram.direction_weights(decay) @ held
            assert relative_error(direction, torch.linalg.solve(fisher, average)) <= 1e-9


@pytest.mark.parametrize("normalize", ["num_grads", "count"])
def test_the_factor_solves_k(normalize):
    pushed = Pushed(6, 10, normalize=normalize, damping=1e-3)
    for grad in draw(9, 10):
        pushed.push(grad)
        gram, held = pushed.gram, pushed.held
        assert gram.shift == (6 if normalize == "num_grads" else gram.count) * 1e-3
        system = held @ held.T + gram.shift * torch.eye(gram.count, dtype=torch.float64)
        rhs = draw(1, gram.count, seed=1)[0]
        assert relative_error(gram.factor().solve(rhs), torch.linalg.solve(system, rhs)) <= 1e-9


def test_a_matrix_that_was_set_is_the_one_used():
    """As after a window lost columns: what was factored before is forgotten."""
    first, second = Pushed(5, 12), Pushed(5, 12)
    first.push(*draw(8, 12))
    first.gram.direction_weights()
    second.push(*draw(8, 12, seed=1))
    first.gram.set(second.held @ second.held.T)
    torch.testing.assert_close(first.gram.direction_weights(), second.gram.direction_weights(), rtol=1e-12, atol=0)


def test_goes_on_from_what_was_saved():
    """To the bit, although the factor is not saved."""
    first, second = Pushed(5, 12), Pushed(5, 12)
    grads = draw(11, 12)
    for grad in grads[:7]:
        first.push(grad)
        first.gram.direction_weights()
    second.rows = first.rows.clone()
    second.gram.restore(first.gram.gram_MM.clone(), first.gram.pushed, first.gram.jitter_escalations)
    for grad in grads[7:]:
        first.push(grad)
        second.push(grad)
        assert torch.equal(first.gram.direction_weights(), second.gram.direction_weights())
    assert second.gram.pushed == 11 and second.gram.newest == 0


def test_an_empty_window_has_no_direction():
    gram = make(3)
    with pytest.raises(RuntimeError, match="push a gradient"):
        gram.direction_weights()
    assert gram.condition() == 1.0 and gram.count == gram.next_row == 0 and gram.next_count == 1


def test_float64_arithmetic_where_weights_cancel():
    """Copies of one gradient get weights of opposite signs; ordinary gradients and zeros do not."""
    pushed = Pushed(16, 40, damping=1e-8)
    for grad in draw(20, 40):
        pushed.push(grad)
        assert pushed.gram.combine_dtype(pushed.gram.direction_weights()) is None
    pushed.push(torch.zeros(40))
    assert pushed.gram.combine_dtype(pushed.gram.direction_weights()) is None
    pushed.push(grad, grad, grad)
    assert pushed.gram.combine_dtype(pushed.gram.direction_weights()) == torch.float64


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-2])
def test_jitter_mends_an_indefinite_matrix(size):
    """Where rounding left the matrix indefinite, by a little or by a lot: escalated, counted, no more than needed."""
    pushed = Pushed(6, 20, damping=1e-12)
    pushed.push(*draw(6, 20))
    gram = pushed.gram
    values, vectors = torch.linalg.eigh(gram.gram_MM)
    gram.set(gram.gram_MM - (values[0] + size) * torch.outer(vectors[:, 0], vectors[:, 0]))
    assert torch.linalg.cholesky_ex(gram.gram_MM).info > 0
    assert gram.direction_weights().isfinite().all()
    escalations = gram.jitter_escalations
    assert escalations >= 2
    # Ten times more each time from machine precision: no more than it takes.
    smallest = torch.finfo(torch.float64).eps * float(gram.gram_MM.diagonal().max())
    assert smallest * 10 ** (escalations - 1) <= 20 * size
    pushed.push(draw(1, 20, seed=1)[0])
    gram.direction_weights()
    assert gram.jitter_escalations > escalations  # the broken entries are still in the matrix
    pushed.push(*draw(6, 20, seed=2))
    healed = gram.jitter_escalations
    system = pushed.held @ pushed.held.T + gram.shift * torch.eye(6, dtype=torch.float64)
    newest = torch.eye(6, dtype=torch.float64)[gram.newest]
    assert relative_error(gram.direction_weights(), 6 * torch.linalg.solve(system, newest)) <= 1e-6
    assert gram.jitter_escalations == healed


def test_a_matrix_that_cannot_be_mended_is_an_error():
    """Jitter without end would be a hang."""
    gram = make(3)
    gram.push([torch.tensor([torch.nan], dtype=torch.float64)])
    with pytest.raises(FloatingPointError, match="NaN or infinite entries"):
        gram.direction_weights()


@pytest.mark.parametrize("seed", range(6))
def test_condition(seed):
    m, d = [(4, 10), (16, 12), (30, 200), (64, 500), (12, 40), (3, 3)][seed]
    pushed = Pushed(m, d, damping=10.0 ** -(seed % 3 + 2))
    pushed.push(*(draw(m + seed, d, seed=seed) * torch.logspace(0, 1, d)))
    exact = np.linalg.cond(pushed.gram.gram_MM.numpy() + pushed.gram.shift * np.eye(m))
    assert pushed.gram.condition() == pytest.approx(exact, rel=1e-4)
    assert pushed.gram.jitter_escalations == 0  # looking changes nothing


def test_condition_of_duplicates():
    pushed = Pushed(4, 3, damping=1e-3)
    pushed.push(*torch.ones(4, 3))
    exact = np.linalg.cond(pushed.gram.gram_MM.numpy() + 4e-3 * np.eye(4))
    assert pushed.gram.condition() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("damping", [1e-3, 0.3, 30.0])
@pytest.mark.parametrize("pushed", [1, 3, 9])
def test_relative_damping_keeps_the_length_of_the_average(damping, pushed):
    """Against the dense matrix s I + Gᵀ G, whose s knows the scale of the gradients."""
    torch.manual_seed(pushed)
    for scale in (1e-4, 1.0, 1e4):
        gram = GramMatrix(WindowOptions(num_grads=5, damping=damping), relative=True)
        grads = torch.zeros(5, 7, dtype=torch.float64)
        for number in range(pushed):
            grads[number % 5] = scale * torch.randn(7, dtype=torch.float64)
            gram.push([grads[: gram.next_count] @ grads[gram.next_row]])
        held = grads[: gram.count]
        ages = (gram.newest - torch.arange(gram.count)) % 5
        weights = 0.9 ** ages.double()
        average = weights / weights.sum() @ held
        shift = damping * held.square().sum(dim=1).mean()
        expected = torch.linalg.solve(shift * torch.eye(7, dtype=torch.float64) + held.T @ held, average)
        direction = gram.direction_weights(0.9) @ held
        torch.testing.assert_close(direction, expected * average.norm() / expected.norm(), rtol=1e-9, atol=0)


def test_a_large_relative_damping_gives_the_average():
    gram = GramMatrix(WindowOptions(num_grads=3, damping=1e9), relative=True)
    for dots in ([2.0], [1.0, 3.0], [0.5, -1.0, 4.0]):
        gram.push([torch.tensor(dots, dtype=torch.float64)])
    expected = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64) / 1.75
    torch.testing.assert_close(gram.direction_weights(0.5), expected, rtol=1e-8, atol=0)


def test_zero_gradients_have_a_zero_direction():
    gram = GramMatrix(WindowOptions(num_grads=3, damping=0.3), relative=True)
    gram.push([torch.zeros(1, dtype=torch.float64)])
    assert gram.direction_weights(0.9).isfinite().all()
    gram.push([torch.tensor([0.0, 4.0], dtype=torch.float64)])
    weights = gram.direction_weights(0.9)
    assert float(weights[1]) == pytest.approx(1 / 1.9)  # as long as the average of zero and the new one


def test_a_small_matrix_is_the_cpus():
    """Whatever device the gradients are on: a GPU would be told of thirty operators, and asked for some answers."""
    device = torch.device("meta")
    assert algebra_device(CPU_ROWS, device) == torch.device("cpu") and algebra_device(CPU_ROWS + 1, device) == device
