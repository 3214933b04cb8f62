"""The code that a card shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mfac_hf.sparse.directory import SPARSE_FILE

__all__ = ["FINETUNE_SNIPPET", "load_snippet"]

FINETUNE_SNIPPET = """\
from mfac_hf import MFAC
from mfac_hf.pruning import masks_from_sparse_model

optimizer = MFAC(model.parameters(), lr=5e-5, masks=masks_from_sparse_model(model))"""


def load_snippet(facts: Mapping[str, Any], where: str, sparse_only: bool) -> str:
    """Write the code that loads a model.

    Args:
        facts: the facts of the card; the small file is loaded only where it is among their ``files``.
        where: name on the Hub, or a directory.
        sparse_only: whether only the small file is there.
    """
    if "adapter" in facts["model"]:
        return _load_adapter(facts, where)
    module, name = _auto_class(facts["model"])
    custom = bool(facts["model"].get("custom_code"))
    given = _quoted(where)
    code = ", trust_remote_code=True" if custom else ""
    lines = [f"from {module} import {name}", "", f"model = {name}.from_pretrained({given}{code})"]
    if not facts["sparse"] or (SPARSE_FILE not in facts["files"] and not sparse_only):
        return "\n".join(lines)
    if module == "transformers" and not custom:
        small = ["from mfac_hf import load_sparse, to_sparse_inference", f"from {module} import {name}", ""]
        small += [f"model = load_sparse({given}, {name})  # downloads the small file only"]
        small += ["model = to_sparse_inference(model)  # sparse layers where they are faster on this machine"]
    else:
        small = ["from mfac_hf import load_sparse", ""]
        small += [f"weights = load_sparse({given})  # a state dict; downloads the small file only"]
    return "\n".join(small if sparse_only else [*lines, "", "# or", *small])


def _load_adapter(facts: Mapping[str, Any], where: str) -> str:
    """Write the code that loads an adapter: by itself where it says which base model it needs, else onto that."""
    name = facts["model"]["class"].rpartition(".")[2]
    base = facts.get("base_model")
    adapter = facts["model"]["adapter"]
    # the base model's own head may have another size, and does not get the adapter's weights then
    size = "" if adapter.get("labels") is None else f", num_labels={adapter['labels']}"
    if base and name.startswith("Auto"):
        return f"from peft import {name}\n\nmodel = {name}.from_pretrained({_quoted(where)}{size})"
    known = adapter["base_class"]
    if name.startswith("AutoPeftModelFor"):
        automatic = f"AutoModelFor{name.removeprefix('AutoPeftModelFor')}"
    else:
        automatic = "AutoModel" if known is None else _auto_class({"class": f"transformers.{known}"})[1]
    note = "" if base else "  # the base model, which is not on the Hub"
    return "\n".join(
        [
            "from peft import PeftModel",
            f"from transformers import {automatic}",
            "",
            f"base = {automatic}.from_pretrained({_quoted(base or '...')}{size}){note}",
            f"model = PeftModel.from_pretrained(base, {_quoted(where)})",
        ]
    )


def _auto_class(model: Mapping[str, Any]) -> tuple[str, str]:
    """Return module and class that load the model: transformers' automatic class where there is one."""
    module, _, name = model["class"].rpartition(".")
    if module == "transformers":
        import transformers

        automatic = model.get("auto_class") or f"AutoModelFor{name.partition('For')[2]}"
        return module, automatic if hasattr(transformers, automatic) else name
    return module, name


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
