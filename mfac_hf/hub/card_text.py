"""Text from elsewhere in the Markdown of a card: it says what it said, and is no markup."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["adapter_contents", "code", "fenced", "one_line", "plain", "sentence", "table"]


def one_line(text: str) -> str:
    """Fold a text into one line, without characters that control a terminal or the direction of writing."""
    return " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())


def plain(text: str) -> str:
    r"""Escape a text that is no Markdown, such as a name or a value of a setting.

    >>> print(plain("query|key.*"))
    query\|key.\*
    """
    return re.sub(r"([\\`*\[\]<|])", r"\\\1", one_line(text))


def sentence(text: str) -> str:
    """Escape HTML in a sentence, whose Markdown stays, and fold it into one line."""
    parts = re.split(r"(`[^`]*`)", one_line(text))
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in parts)


def code(text: str) -> str:
    """Write a text as code within a line."""
    text = one_line(text)
    ticks = "`" * (1 + _longest_run(text))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def fenced(text: str, language: str = "") -> str:
    """Write a block of code that nothing in it ends."""
    ticks = "`" * max(3, 1 + _longest_run(text))
    return f"{ticks}{language}\n{text}\n{ticks}"


def _longest_run(text: str) -> int:
    """Count the backticks of the longest run of them."""
    return max(map(len, re.findall(r"`+", text)), default=0)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Write a table of cells that are Markdown, without line breaks."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ([re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def adapter_contents(facts: Mapping[str, Any]) -> str:
    """Say what the file of an adapter holds, in a paragraph; nothing where that is not known."""
    whole = (facts["model"].get("adapter") or {}).get("whole")
    if whole is None:
        return ""
    factors = facts["weights"]["numel"] - sum(whole.values())
    parts = [f"low-rank factors ({factors:,} numbers)", *(f"{code(n)} in full ({k:,})" for n, k in whole.items())]
    return f"\n\nIt holds {', '.join(parts)}. All other weights are those of the base model."
