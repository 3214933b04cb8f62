"""Mixtures of experts: tensors of three dimensions are pruned as the matrices that they consist of."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GptOssConfig,
    JetMoeConfig,
    Llama4TextConfig,
    MixtralConfig,
    PhimoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)

from mfac_hf import prune_one_shot
from mfac_hf.pruning import MaskSet, find_targets
from mfac_hf.pruning.experts import expert_weights, router_weights, whole_experts
from mfac_hf.pruning.gradients import DataLoaderGradients
from mfac_hf.pruning.layout import Layout
from tests.helpers.pruning_network import FAST, cross_entropy

SIZES = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}
CHOICE = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXTURES = {
    "mixtral": MixtralConfig(**SIZES, **CHOICE),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, head_dim=4),
    "gpt_oss": GptOssConfig(**SIZES, **CHOICE, head_dim=4),
    "llama4": Llama4TextConfig(**SIZES, num_local_experts=4, intermediate_size_mlp=12, head_dim=4, pad_token_id=0),
    "phimoe": PhimoeConfig(**SIZES, **CHOICE),
    "jetmoe": JetMoeConfig(
        **{name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        **CHOICE, num_key_value_heads=2, kv_channels=4,
    ),
}  # fmt: skip
WORDS = torch.randint(1, 30, (24, 6), generator=torch.Generator().manual_seed(0))


def mixture(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MIXTURES[name]).eval()


@pytest.mark.parametrize("name", MIXTURES)
def test_a_row_of_an_experts_matrix_has_the_weights_of_one_output(name):
    model = mixture(name)
    targets = {name: weight for name, weight in find_targets(model).items() if weight.ndim == 3}
    layout = Layout.of(model, targets)
    assert layout.experts == dict.fromkeys(targets, 4)
    assert set(layout.by_inputs) == (set(targets) if name in ("gpt_oss", "llama4") else set())
    widths = {
        key.removeprefix("model.layers.0."): layout.matrix(key, weight).shape[1] for key, weight in targets.items()
    }
    inner = 6 if name == "qwen3_moe" else 12
    if name == "jetmoe":
        attention = {f"self_attention.experts.{part}_linear.weight": 8 for part in ("input", "output")}
        assert widths == {"mlp.input_linear.weight": 8, "mlp.output_linear.weight": inner} | attention
    else:
        assert {key.split(".")[-1]: width for key, width in widths.items()} == {"gate_up_proj": 8, "down_proj": inner}


def test_routers_are_left_alone():
    switch = SwitchTransformersConfig(
        **{"vocab_size": 30, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_heads": 2, "num_layers": 2, "num_experts": 4},
        **{"num_sparse_encoder_layers": 1, "num_decoder_layers": 2, "num_sparse_decoder_layers": 1},
    )
    models = {name: mixture(name) for name in MIXTURES} | {"switch": AutoModelForSeq2SeqLM.from_config(switch)}
    for name, model in models.items():
        routers, targets = set(router_weights(model)), set(find_targets(model).values())
        matrices = [parameter for parameter in routers if parameter.ndim == 2]
        assert matrices and all(parameter.shape == (4, 8) for parameter in matrices), name
        assert not routers & targets and not routers & set(expert_weights(model)), name
    assert list(find_targets(mixture("phimoe"), r"router")) == ["model.layers.0.mlp.router.weight"]


class PairExperts(nn.Module):
    """Four matrices in one tensor; each token takes all of them by its own weights."""

    def __init__(self, out, inputs, transposed):
        super().__init__()
        self.is_transposed = transposed
        self.up_proj = nn.Parameter(torch.randn(4, inputs, out) if transposed else torch.randn(4, out, inputs))

    def forward(self, x, gates):
        matrices = self.up_proj if self.is_transposed else self.up_proj.mT
        return torch.einsum("ne,ni,eio->no", gates, x, matrices)


class Together(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        self.gate, self.head, self.experts = nn.Linear(8, 4), nn.Linear(12, 3), PairExperts(12, 8, transposed)

    def forward(self, x):
        return self.head(torch.tanh(self.experts(x, self.gate(x).softmax(1))))


class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.head = nn.Linear(8, 4), nn.Linear(12, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 12, bias=False) for _ in range(4))

    def forward(self, x):
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return self.head(torch.tanh((self.gate(x).softmax(1).unsqueeze(2) * outputs).sum(1)))


def data(count=64):
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(dim=1)), batch_size=4)


def twins(transposed):
    """Return the same mixture twice: with one matrix for each expert, and with one tensor for all."""
    torch.manual_seed(0)
    apart, together = Apart(), Together(transposed)
    with torch.no_grad():
        matrices = torch.stack([expert.weight for expert in apart.experts])
        together.experts.up_proj.copy_(matrices.mT if transposed else matrices)
    together.gate.load_state_dict(apart.gate.state_dict())
    together.head.load_state_dict(apart.head.state_dict())
    return apart, together


@pytest.mark.parametrize("transposed", [False, True], ids=["out, in", "in, out"])
@pytest.mark.parametrize(
    ("pattern", "scope", "method"),
    [
        ("unstructured", "global", "mfac"),
        ("unstructured", "uniform", "mfac"),
        ("2:4", "uniform", "mfac"),
        ("block4", "global", "mfac"),
        ("unstructured", "uniform", "magnitude"),
    ],
)
def test_experts_in_one_tensor_are_pruned_as_matrices_apart(pattern, scope, method, transposed):
    apart, together = twins(transposed)
    options = FAST | {"pattern": pattern, "scope": scope, "method": method, "recomputations": 2}
    targets = r"experts"
    separate = prune_one_shot(apart, data(), 0.5, targets=targets, loss_fn=cross_entropy, **options)
    joint = prune_one_shot(together, data(), 0.5, targets=targets, loss_fn=cross_entropy, **options)
    assert list(joint.sparsities) == ["experts.up_proj"] and len(separate.sparsities) == 4
    weights, keep = together.experts.up_proj, joint.masks["experts.up_proj"]
    for i, expert in enumerate(apart.experts):
        ours, theirs = (weights[i].T, keep[i].T) if transposed else (weights[i], keep[i])
        assert torch.equal(theirs, separate.masks[f"experts.{i}.weight"])
        torch.testing.assert_close(ours, expert.weight, rtol=1e-4, atol=1e-6)
    if scope == "uniform":
        assert (~keep).flatten(1).sum(1).tolist() == 4 * [48]


def test_an_expert_that_is_sparser_than_the_others_stays_so():
    _, together = twins(False)
    with torch.no_grad():
        together.experts.up_proj[2].flatten()[:72] = 0
    options = FAST | {"scope": "uniform", "method": "magnitude", "targets": "experts"}
    report = prune_one_shot(together, None, 0.5, **options)
    assert (~report.masks["experts.up_proj"]).flatten(1).sum(1).tolist() == [48, 48, 72, 48]


def test_a_pattern_has_to_fit_the_inputs_of_each_expert():
    _, together = twins(False)
    together.experts = PairExperts(12, 6, False)  # 12 x 6 is a multiple of 4, 6 is not
    with pytest.raises(ValueError, match=r"experts.up_proj has rows of 6 weights .*2:4"):
        prune_one_shot(together, None, 0.5, targets="experts", method="magnitude", pattern="2:4")


def test_experts_without_a_weight_are_named(caplog):
    _, together = twins(False)
    with torch.no_grad():
        together.gate.bias[1] = -1e4  # no token ever gets to expert 1
    options = FAST | {"targets": "experts", "loss_fn": cross_entropy, "damping": 1e-6, "recomputations": 2}
    report = prune_one_shot(together, data(), 0.5, **options)
    assert whole_experts(together, report.masks) == {"experts.up_proj": [1]}
    assert "nothing is left of these experts: experts.up_proj: 1. " in caplog.text and "uniform" in caplog.text
    caplog.clear()
    together = twins(False)[1]
    report = prune_one_shot(together, data(), 0.5, **options, scope="uniform")
    assert whole_experts(together, report.masks) == {} and caplog.text == ""


def rows_of(model, words, **options):
    """Return the gradients of examples by parameter."""
    examples = [{"input_ids": ids, "labels": ids} for ids in words]
    targets, found = find_targets(model), {}
    source = DataLoaderGradients(DataLoader(examples, batch_size=4), **options)
    source.collect(model, targets, len(words), 0, lambda name, rows: found.setdefault(name, []).append(rows.clone()))
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_gradients_are_those_of_single_examples(name):
    model = mixture(name)
    found = rows_of(model, WORDS[:6], fisher="empirical")
    targets = find_targets(model)
    expected = {key: [] for key in targets}
    for ids in WORDS[:6]:
        model.zero_grad()
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
        for key, weight in targets.items():
            expected[key].append(weight.grad.flatten())
    for key, rows in expected.items():
        order = found[key].norm(dim=1).argsort()  # examples are drawn in another order
        stacked = torch.stack(rows)
        torch.testing.assert_close(found[key][order], stacked[stacked.norm(dim=1).argsort()], rtol=1e-3, atol=1e-7)


def test_a_mixture_of_transformers_is_pruned_and_stays_sparse():
    model = mixture("mixtral")
    examples = [{"input_ids": ids, "labels": ids} for ids in WORDS]
    report = prune_one_shot(model, DataLoader(examples), 0.6, num_grads=16, block_size=8, progress=False)
    weight = model.model.layers[0].mlp.experts.gate_up_proj
    assert report.sparsity == pytest.approx(0.6, abs=1e-3)
    assert (weight == 0).any() and (weight != 0).any(dim=2).any(dim=1).all()
    report.masks.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=WORDS[:4], labels=WORDS[:4]).loss.backward()
        gone = ~report.masks["model.layers.0.mlp.experts.gate_up_proj"]
        assert not weight.grad[gone].any() and weight.grad[~gone].any()
        optimizer.step()
        report.masks.apply(model)
        report.masks.clear_optimizer_state(model, optimizer)
        assert not optimizer.state[weight]["exp_avg"][gone].any()
    assert report.masks.nonzeros(model) == {}
    assert MaskSet.from_model(model, report.masks) == report.masks
