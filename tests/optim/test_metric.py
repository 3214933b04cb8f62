"""MFAC in Adam's metric against float64, and its state."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from mfac_hf import MFAC
from mfac_hf.defaults import MFAC_DEFAULTS, MFAC_METRIC
from tests.helpers.oracles import NaiveAdamMetric
from tests.helpers.ranks import run_on_ranks

GROUP = {"lr": 5e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
EXACT = {"window_dtype": torch.float32}  # not the default, whose rounding an oracle would not see past


class Net(nn.Module):
    """A table that batches touch in places, two layers, and a head that some steps do without."""

    def __init__(self, height=600):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.hidden, self.head = nn.Embedding(height, 64), nn.Linear(64, 5), nn.Linear(5, 3)

    def loss(self, step):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, min(self.table.num_embeddings, 40), (8,), generator=generator)
        hidden = torch.tanh(self.hidden(self.table(ids)))
        loss = hidden.square().sum() + hidden.sum()
        return loss + self.head(hidden).square().sum() if step > 8 and step % 3 else loss


def train(model, optimizer, steps, naive=None):
    for step in steps:
        optimizer.zero_grad()
        model.loss(step).backward()
        if naive is not None:
            naive.step([p.grad for p in model.parameters()])
        optimizer.step()


def assert_close(model, naive, tolerance):
    for p, expected in zip(model.parameters(), naive.params, strict=True):
        error = (p.detach().double() - expected).norm() / expected.norm()
        assert float(error) <= tolerance


def assert_same_bits(first, second):
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("damping", [1e-2, 0.3, 10.0])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-5),
        ({"row_sparse": False}, 1e-5),
        ({"window_dtype": torch.float64}, 2e-6),
        ({"window_device": ["cpu", "cpu"]}, 1e-5),
        ({"window_dtype": torch.bfloat16}, 2e-2),
        ({"nesterov": False}, 1e-5),
    ],
)
def test_steps_are_those_of_the_dense_formula(options, tolerance, damping):
    """Late parameters, parameters without a gradient now and then, and tables included."""
    model = Net()
    optimizer = MFAC(model.parameters(), metric="adam", num_grads=6, damping=damping, **GROUP, **{**EXACT, **options})
    groups = [{"params": list(model.parameters()), **GROUP}]
    naive = NaiveAdamMetric(groups, num_grads=6, damping=damping, nesterov=options.get("nesterov", True))
    train(model, optimizer, range(25), naive)
    assert_close(model, naive, tolerance)


def test_a_small_model_meets_the_matrix_of_all_parameters():
    """D^{1/2} (s I + Gᵀ G) D^{1/2}, solved as it stands."""
    torch.manual_seed(1)
    weights = [nn.Parameter(torch.randn(9, 7, dtype=torch.float64)), nn.Parameter(torch.randn(5, dtype=torch.float64))]
    optimizer = MFAC(weights, metric="adam", num_grads=4, window_dtype=torch.float64, **GROUP)
    naive = NaiveAdamMetric([{"params": weights, **GROUP}], num_grads=4, damping=1.0)
    for step in range(12):
        for p in weights:
            p.grad = torch.randn(p.shape, dtype=torch.float64) * 10.0 ** (step % 5 - 2)
        naive.step([p.grad for p in weights])
        optimizer.step()
    for p, expected in zip(weights, naive.params, strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-8, atol=1e-10)


def test_groups_have_their_own_rates_and_decays():
    model = Net()
    groups = [
        {"params": list(model.table.parameters()), **GROUP, "lr": 3e-3, "weight_decay": 0.0},
        {"params": [*model.hidden.parameters(), *model.head.parameters()], **GROUP, "betas": (0.9, 0.9), "eps": 1e-3},
    ]
    optimizer = MFAC([dict(group) for group in groups], metric="adam", num_grads=6, **EXACT)
    naive = NaiveAdamMetric(groups, num_grads=6, damping=1.0)
    train(model, optimizer, range(15), naive)
    assert_close(model, naive, 1e-5)


def test_a_large_damping_gives_the_steps_of_adamw():
    """Where the second moment does not change: AdamW divides old gradients by today's root, MFAC half by theirs."""
    torch.manual_seed(2)
    sizes = torch.rand(40) * 10.0 ** torch.randint(-3, 3, (40,))
    ours, theirs = (nn.Parameter(torch.ones(40)) for _ in range(2))
    optimizers = (
        MFAC([ours], metric="adam", num_grads=30, damping=1e9, nesterov=False, **EXACT, **GROUP),
        torch.optim.AdamW([theirs], **GROUP),
    )
    for _ in range(30):
        ours.grad = theirs.grad = sizes * (2.0 * torch.randint(0, 2, (40,)) - 1)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_masked_coordinates_stay_and_count_for_nothing():
    model = Net()
    masks = {
        model.hidden.weight: torch.rand(5, 64, generator=torch.Generator().manual_seed(3)) > 0.5,
        model.table.weight: torch.rand(600, 64, generator=torch.Generator().manual_seed(4)) > 0.5,
    }
    by_position = {0: masks[model.table.weight], 1: masks[model.hidden.weight]}
    optimizer = MFAC(model.parameters(), metric="adam", num_grads=6, masks=masks, **EXACT, **GROUP)
    groups = [{"params": list(model.parameters()), **GROUP}]
    naive = NaiveAdamMetric(groups, num_grads=6, damping=1.0, masks=by_position)
    train(model, optimizer, range(12), naive)
    assert_close(model, naive, 1e-5)


def test_a_mask_that_comes_later_leaves_the_rest_as_if_it_had_been_there():
    models = [Net(), Net()]
    keep = torch.rand(5, 64, generator=torch.Generator().manual_seed(3)) > 0.5
    optimizers = [MFAC(model.parameters(), metric="adam", num_grads=6, **EXACT, **GROUP) for model in models]
    optimizers[1].set_masks({models[1].hidden.weight: keep})
    for step in range(10):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            models[0].loss(step).backward() if model is models[0] else None
            for p, q in zip(model.parameters(), models[0].parameters(), strict=True):
                p.grad = None if q.grad is None else q.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        if step == 4:
            optimizers[0].set_masks({models[0].hidden.weight: keep})
    first, second = (optimizer.state[model.hidden.weight] for optimizer, model in zip(optimizers, models, strict=True))
    assert torch.equal(first["second_moment"], second["second_moment"])
    assert torch.equal(first["window"], second["window"])


@pytest.mark.parametrize("options", [{}, {"window_dtype": torch.bfloat16}, {"row_sparse": False}])
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_a_run_that_goes_on_later_ends_with_the_same_bits(way, options):
    whole, cut = Net(), Net()
    settings = {"metric": "adam", "num_grads": 6, **GROUP, **options}
    optimizer = MFAC(whole.parameters(), **settings)
    train(whole, optimizer, range(14))
    optimizer = MFAC(cut.parameters(), **settings)
    train(cut, optimizer, range(10))
    if way == "state_dict":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer = MFAC(cut.parameters(), **settings)
        optimizer.load_state_dict(torch.load(file, weights_only=True))
    elif way == "deepcopy":
        cut, optimizer = copy.deepcopy((cut, optimizer))
    else:
        cut, optimizer = pickle.loads(pickle.dumps((cut, optimizer)))
    train(cut, optimizer, range(10, 14))
    assert_same_bits(whole, cut)


def test_without_the_window_the_second_moment_goes_on():
    model = Net()
    settings = {"metric": "adam", "num_grads": 6, "save_window": False, **GROUP}
    optimizer = MFAC(model.parameters(), **settings)
    train(model, optimizer, range(12))
    saved = copy.deepcopy(optimizer.state_dict())
    assert not any("window" in state or "gram" in state for state in saved["state"].values())
    after = MFAC(model.parameters(), **settings)
    after.load_state_dict(saved)
    model.loss(12).backward()
    optimizer.step()
    after.step()
    for p in (model.table.weight, model.hidden.weight):
        first, second = optimizer.state[p], after.state[p]
        assert first["moment_step"] == second["moment_step"] == 13
        torch.testing.assert_close(first["second_moment"], second["second_moment"], rtol=0, atol=0)


@pytest.mark.parametrize(("saved", "own"), [("adam", "identity"), ("identity", "adam")])
def test_the_state_of_the_other_metric_is_refused(saved, own):
    model = Net()
    optimizer = MFAC(model.parameters(), metric=saved, num_grads=4)
    train(model, optimizer, range(3))
    with pytest.raises(ValueError, match=f"metric='{saved}'"):
        MFAC(model.parameters(), metric=own, num_grads=4).load_state_dict(optimizer.state_dict())


def damaged(name, value):
    model = Net()
    optimizer = MFAC(model.parameters(), metric="adam", num_grads=4)
    train(model, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0 if name == "moment_steps" else 1][name] = value
    return MFAC(model.parameters(), metric="adam", num_grads=4), state


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("second_moment", torch.full((5, 64), -1.0)),
        ("second_moment", torch.full((5, 64), float("nan"))),
        ("second_moment", torch.ones(3)),
        ("second_moment", "x"),
        ("moment_step", -3),
        ("moment_step", None),
        ("moment_steps", torch.full((600,), 99)),
    ],
)
def test_a_second_moment_that_cannot_be_is_refused(name, value):
    optimizer, state = damaged(name, value)
    with pytest.raises(ValueError, match=name.replace("second_moment", "second.moment")):
        optimizer.load_state_dict(state)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metric": "adamw"}, "'adamw'.*'adam', 'identity'"),
        ({"metric": "adam", "momentum": 0.9}, "momentum.*metric='identity'"),
        ({"metric": "adam", "grad_decay": 0.9, "normalize": "count"}, "normalize, grad_decay"),
        ({"metric": "identity", "betas": (0.9, 0.99)}, "betas.*metric='adam'"),
        ({"metric": "adam", "betas": (1.0, 0.999)}, "betas"),
        ({"metric": "adam", "betas": 0.9}, "betas"),
        ({"metric": "adam", "eps": 0.0}, "eps"),
        ({"metric": "adam", "eps": "1e-8"}, "eps"),
    ],
)
def test_options_that_do_not_fit_the_metric_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        MFAC([nn.Parameter(torch.zeros(2))], **options)


def test_groups_that_disagree_on_beta1_are_refused():
    groups = [
        {"params": [nn.Parameter(torch.zeros(2))]},
        {"params": [nn.Parameter(torch.zeros(2))], "betas": (0.5, 0.9)},
    ]
    with pytest.raises(ValueError, match="betas"):
        MFAC(groups, metric="adam")


@pytest.mark.parametrize(("options", "words"), [({"damping": 1e-6}, "damping"), ({"lr": 1e-2}, "lr")])
def test_settings_by_old_habit_are_said(options, words):
    with pytest.warns(UserWarning, match=words):
        MFAC([nn.Parameter(torch.zeros(2))], **options)


def test_adams_metric_is_the_default():
    """With the defaults of `mfac_hf.defaults`; AdamW's wherever AdamW has them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = MFAC([nn.Parameter(torch.zeros(2))])
    assert optimizer.defaults["metric"] == MFAC_METRIC == "adam"
    expected = {**MFAC_DEFAULTS["adam"], "window_dtype": torch.bfloat16}
    assert {name: optimizer.defaults[name] for name in expected} == expected
    adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(2))]).defaults
    shared = ("lr", "betas", "eps", "weight_decay")
    assert {name: optimizer.defaults[name] for name in shared} == {name: adamw[name] for name in shared}


def test_the_identity_metric_has_the_published_defaults():
    defaults = MFAC([nn.Parameter(torch.zeros(2))], metric="identity").defaults
    published = {"lr": 1e-4, "num_grads": 1024, "damping": 1e-6, "momentum": 0.0, "weight_decay": 0.0}
    assert {name: defaults[name] for name in published} == published
    assert defaults["window_dtype"] == torch.float32
    assert defaults["normalize"] == "num_grads" and defaults["grad_decay"] == 0.0
    assert defaults["decoupled_weight_decay"] is False and "betas" not in defaults


@pytest.mark.parametrize("betas", [(0.9, 1.0), (1.0, 0.9), 0.9])
def test_betas_that_were_changed_for_the_worse_are_refused_at_the_step(betas):
    p = nn.Parameter(torch.ones(3))
    optimizer = MFAC([p], metric="adam")
    optimizer.param_groups[0]["betas"] = betas
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="betas"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3)) and not optimizer.state[p]


def test_a_step_that_finds_no_memory_is_not_counted(monkeypatch):
    model = Net()
    optimizer = MFAC(model.parameters(), metric="adam", num_grads=6, **EXACT, **GROUP)
    train(model, optimizer, range(3))
    moment = optimizer.state[model.table.weight]["second_moment"].clone()
    model.table.weight.grad = torch.ones_like(model.table.weight)  # no longer row-sparse
    with monkeypatch.context() as context:
        context.setattr("mfac_hf.memory.available_bytes", lambda device: 0)
        with pytest.raises(MemoryError):
            optimizer.step()
    assert optimizer.state[model.table.weight]["moment_step"] == 3
    assert torch.equal(optimizer.state[model.table.weight]["second_moment"], moment)


def share_a_window(rank, expected):
    model = Net()
    group = torch.distributed.group.WORLD
    optimizer = MFAC(model.parameters(), metric="adam", num_grads=6, process_group=group, **EXACT, **GROUP)
    train(model, optimizer, range(12))
    for p, q in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.cpu("ranks that begin from a copy of a process cannot use a GPU")
def test_ranks_that_share_a_window_step_as_one_process(tmp_path):
    model = Net()
    train(model, MFAC(model.parameters(), metric="adam", num_grads=6, **EXACT, **GROUP), range(12))
    run_on_ranks(share_a_window, tmp_path, [p.detach().clone() for p in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_have_a_float32_moment(dtype):
    p = nn.Parameter(torch.ones(8, dtype=dtype))
    optimizer = MFAC([p], lr=5e-3, weight_decay=0.0)
    p.grad = torch.linspace(1e-4, 1.0, 8).to(dtype)
    optimizer.step()
    assert optimizer.state[p]["second_moment"].dtype == torch.float32
    torch.testing.assert_close(p.detach().float(), torch.full((8,), 0.995), rtol=0, atol=4e-3)
