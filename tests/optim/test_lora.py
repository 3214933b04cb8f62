"""LoRA: factors beside frozen weights. The second one begins at zero, so that the first gets no gradient at first."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mfac_hf import MFAC, memory_estimate
from mfac_hf.fisher.columns import RowSparseColumns
from tests.helpers.oracles import NaiveAdamMetric

peft = pytest.importorskip("peft")
FIRST = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight"
GROUP = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def make_classifier(**options):
    """A small BERT without dropout, whose word embeddings are large enough to be stored by rows."""
    set_seed(0)
    config = BertConfig(
        **{"vocab_size": 1100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 64, "max_position_embeddings": 16, "initializer_range": 0.3},
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    )
    return peft.get_peft_model(
        BertForSequenceClassification(config), peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, **options)
    )


def loss_of(model, step):
    """Half of the vocabulary says one class, half the other."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 2, (16,), generator=generator)
    ids = torch.randint(1, 9, (16, 8), generator=generator) + 500 * labels.unsqueeze(1)
    return model(input_ids=ids, labels=labels).loss


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, optimizer, steps, before_step=lambda grads: None):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        before_step([p.grad for p in trained(model)])
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["word_embeddings"]}])
def test_steps_are_those_of_the_oracle(options):
    """From the first step on, where A's second moment is zero; a table that is trained too is kept by its rows."""
    model = make_classifier(**options).double()
    optimizer = MFAC(model.parameters(), num_grads=6, window_dtype=torch.float32, **GROUP)
    naive = NaiveAdamMetric([{"params": trained(model), **GROUP}], num_grads=6, damping=1.0)
    initial = [p.detach().double().clone() for p in trained(model)]
    factor = [name for name, p in model.named_parameters() if p.requires_grad].index(FIRST)
    first_of_A = []

    def follow(grads):
        first_of_A.append(grads[factor].clone())
        naive.step([grad.clone() for grad in grads])

    for steps in (1, 9):
        train(model, optimizer, steps, follow)
        for p, expected, start in zip(trained(model), naive.params, initial, strict=True):
            # of the way: a part of the parameter itself would hide that A moves little at first
            assert float((p.detach() - expected).norm() / (expected - start).norm()) <= 1e-5
    assert not first_of_A[0].any() and all(grad.any() for grad in first_of_A[1:])
    stores = {type(place.columns) for place in optimizer._window.placements.values()}
    assert (RowSparseColumns in stores) == bool(options)


def test_a_large_damping_gives_about_the_steps_of_adamw():
    """AdamW divides old gradients by today's root, MFAC half by theirs, and gradients of A grow from zero with B."""
    ours, theirs = make_classifier(), make_classifier()
    initial = [p.detach().clone() for p in trained(ours)]
    limit = {"num_grads": 20, "damping": 1e9, "nesterov": False, "window_dtype": torch.float32}
    train(ours, MFAC(ours.parameters(), **limit, **GROUP), 20)
    train(theirs, torch.optim.AdamW(trained(theirs), **GROUP), 20)
    for p, q, start in zip(trained(ours), trained(theirs), initial, strict=True):
        way, other = (p.detach() - start).flatten(), (q.detach() - start).flatten()
        # seen over three tasks: cosines from 0.989, lengths from 0.98 to 1.21, the longest of them those of A
        assert float(torch.cosine_similarity(way, other, dim=0)) > 0.95
        assert 0.8 < float(way.norm() / other.norm()) < 1.4


def test_training_with_defaults():
    model = make_classifier()
    losses = train(model, MFAC(model.parameters(), lr=1e-3), 60)
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert last < 0.5 * first  # seen: 0.70 and 0.20


NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}
DECODERS = {
    # Conv1D layers, whose weights lie the other way round, and a head that shares the embeddings
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=1100, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.1, **NO_TOKENS)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            **{"vocab_size": 1100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, **NO_TOKENS},
        )
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DECODERS))
def test_a_decoder_learns_generates_and_comes_back(name, tmp_path):
    """Sequences that count: the loss falls, the factors alone move, and the saved adapter has the same outputs."""
    set_seed(0)
    base = DECODERS[name]()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(base, config)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    begin = torch.randint(5, 1000, (64, 1), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in (begin % 20 + torch.arange(12)) % 20]
    settings = {"per_device_train_batch_size": 16, "max_steps": 60, "logging_steps": 10, "save_strategy": "no"}
    settings |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant"}
    optimizer = MFAC(model.parameters(), lr=5e-3)
    args = TrainingArguments(str(tmp_path / "run"), **settings)
    trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]  # seen: 0.68 and 0.64; the frozen head bounds the logits
    size = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert memory_estimate(model).bytes == memory_estimate(size).bytes, "what is frozen takes no room"
    assert optimizer._window.nbytes == 8 * size * 2  # the default: eight gradients in bfloat16
    factors = {n for n, p in model.named_parameters() if p.grad is not None or p in optimizer.state}
    assert factors == {n for n, p in model.named_parameters() if "lora_" in n}
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    if base.config.tie_word_embeddings:
        assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    inputs = torch.arange(3, 7).unsqueeze(0)
    words = model.eval().generate(input_ids=inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert words.tolist() == [[3, 4, 5, 6, 7, 8, 9, 10]]
    trainer.save_model(str(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=inputs).logits, model(input_ids=inputs).logits)
