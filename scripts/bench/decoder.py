"""One-shot pruning of decoders in the shapes of published ones, with random weights: time, memory, and text after it.

Each runs in a process of its own. Memory beside the model is the most that the process held while it pruned, less the
most before: the model and one backward pass, with a gradient of each parameter. ``memory_budget`` bounds its largest
part, the Fisher's blocks, and as much for a pass.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from bench.common import in_child, print_table
from mfac_hf import prune_one_shot
from mfac_hf.machine import GIB, peak_memory

SHAPES = {
    "tiny": LlamaConfig(  # to try the benchmark
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    ),
    "GPT-2": GPT2Config(),
    "SmolLM-135M": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-0.5B": Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}
SPARSITY, TOKENS, NEW_TOKENS = 0.5, 64, 16


def benchmark_decoder(name: str, num_grads: int, memory_budget: float) -> dict[str, Any]:
    """Prune a decoder to 50 % with gradients of single texts of 64 tokens, and let it write.

    Args:
        name: of `SHAPES`.
        num_grads: gradients.
        memory_budget: GiB for the Fisher's blocks.
    """
    return in_child(_prune, name, num_grads, memory_budget, torch.get_num_threads())


def _prune(name: str, num_grads: int, memory_budget: float, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[name]).eval()
    tokens_NT = torch.randint(model.config.vocab_size, (num_grads, TOKENS))
    texts: Any = [{"input_ids": row_T, "labels": row_T} for row_T in tokens_NT]
    model(input_ids=tokens_NT[:1], labels=tokens_NT[:1]).loss.backward()  # libraries allocate at first use
    model.zero_grad(set_to_none=True)
    before, started = peak_memory(), time.perf_counter()
    report = prune_one_shot(
        model,
        DataLoader(texts, batch_size=8),
        SPARSITY,
        num_grads=num_grads,
        recomputations=1,
        memory_budget=int(memory_budget * GIB),
        progress=False,
    )
    seconds, peak = time.perf_counter() - started, peak_memory()
    written = model.generate(tokens_NT[:1, :8], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return {
        "decoder": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "targets": report.num_weights,
        "num_grads": num_grads,
        "memory_budget_gib": memory_budget,
        "groups": report.steps[0]["groups"],
        "seconds": seconds,
        "model_gib": sum(p.nbytes for p in model.parameters()) / GIB,
        "beside_model_gib": (peak - before) / GIB,
        "sparsity": report.sparsity,
        "zeros": sum(int((model.get_parameter(name) == 0).sum()) for name in report.masks) / report.num_weights,
        "tokens_written": written.shape[1] - 8,
    }


def print_decoders(rows: list[dict[str, Any]]) -> None:
    """Print the decoders as a table."""
    print_table(
        f"decoders pruned to {SPARSITY:.0%} in one go",
        (
            "decoder",
            "targets",
            "m",
            "budget GiB",
            "groups",
            "seconds",
            "model GiB",
            "beside it GiB",
            "zeros",
            "tokens after",
        ),
        [
            (
                row["decoder"],
                f"{row['targets'] / 1e6:.1f}M",
                row["num_grads"],
                f"{row['memory_budget_gib']:g}",
                row["groups"],
                f"{row['seconds']:.0f}",
                f"{row['model_gib']:.2f}",
                f"{row['beside_model_gib']:.2f}",
                f"{row['zeros']:.1%}",
                row["tokens_written"],
            )
            for row in rows
        ],
    )
