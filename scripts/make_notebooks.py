"""Make notebooks of the tutorials: ``python scripts/make_notebooks.py [--output outputs/notebooks]``.

A page of docs/ is the source: its Python blocks become cells of code, what stands between them cells of text. The
notebooks are built and not kept, so that nothing is written twice; the tests execute them. Needs the extra ``test``.
"""

from __future__ import annotations

import argparse
import re
from itertools import pairwise
from pathlib import Path

import nbformat
from markdown_it import MarkdownIt
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
# Name of a notebook: its pages, one after the other.
TUTORIALS = {
    "getting-started": ["getting-started.md"],
    "lora": ["lora.md"],
    "pruning": ["pruning.md"],
    "sparse-files-and-deployment": ["sparse-files.md", "deployment.md"],
}
COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]+\)")


def make_notebook(texts: list[str]) -> NotebookNode:
    """Return the notebook of one or more pages.

    Args:
        texts: the pages as Markdown. A Python block below a comment cannot run everywhere, and is text.
    """
    cells: list[NotebookNode] = []
    for text in texts:
        lines, written = text.splitlines(keepends=True), 0
        tokens = MarkdownIt().enable("table").parse(text)
        for before, token in pairwise([tokens[0], *tokens]):
            if token.type == "fence" and token.info == "python" and not COMMENT.match(before.content):
                begin, end = token.map or (0, 0)
                _add_text(cells, "".join(lines[written:begin]))
                cells.append(nbformat.v4.new_code_cell(token.content.rstrip("\n"), id=f"cell-{len(cells)}"))
                written = end
        _add_text(cells, "".join(lines[written:]))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def _add_text(cells: list[NotebookNode], text: str) -> None:
    """Add a cell of text, without comments and without links to pages that a notebook does not have beside it."""
    text = LINK.sub(r"\1", COMMENT.sub("", text)).strip()
    if text:
        cells.append(nbformat.v4.new_markdown_cell(text, id=f"cell-{len(cells)}"))


def read_pages(name: str) -> list[str]:
    """Return the pages that a tutorial is made from."""
    return [(ROOT / "docs" / page).read_text(encoding="utf-8") for page in TUTORIALS[name]]


def main() -> None:
    """Write all notebooks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/notebooks"), help="(default: %(default)s)")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for name in TUTORIALS:
        nbformat.write(make_notebook(read_pages(name)), output / f"{name}.ipynb")
        print(output / f"{name}.ipynb")


if __name__ == "__main__":
    main()
