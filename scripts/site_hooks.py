r"""What the documentation site needs beside MkDocs: formulas, benchmarks, and no page that loads from elsewhere.

Docstrings have their formulas as Sphinx writes them, ``:math:`x``` and ``.. math::``. `DocstringMath` rewrites these
for Markdown while mkdocstrings reads the package, and `on_page_content` turns every formula into MathML, which
browsers draw without a script.

The tables under ``benchmarks/`` are written by studies. A page of ``docs/benchmarks/`` has a link to one alone on a
line, which a reader of the repository can follow; the site has the table in its place. Raw results and pictures that
pages link to are files of the site, and `on_config` takes the order of the pages from the links of their index.
"""

import html
import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

from mfac_hf.pruning import PruningOptions

_INLINE = re.compile(r":math:`([^`]+)`")
_BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?!\s*\n).*)*)", re.MULTILINE)
_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
_ROLE = re.compile(r":(?:class|func|meth):`([^`]+)`")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_LOADED = re.compile(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//|<link\b[^>]*\bhref="(?:https?:)?//')
_BENCHMARKS = "benchmarks/index.md"
_TABLE = re.compile(r"^\[[^\]]*\]\((?:\.\./)+(benchmarks/[\w.-]+\.md)\)$", re.MULTILINE)
_RESULT = re.compile(r"\]\((?:\.\./)+benchmarks/((?:studies/)?[\w.-]+\.(?:csv|jsonl?|png|yaml))\)")
_RESULTS = "benchmarks/results"  # where the site has the raw results


def on_config(config: Any, **_: Any) -> Any:
    """Put the pages of the benchmarks into the navigation, in the order and under the headings of their index."""
    for entry in config["nav"]:
        if entry == {"Benchmarks": _BENCHMARKS}:
            entry["Benchmarks"] = [_BENCHMARKS, *sections(Path(config["docs_dir"], _BENCHMARKS).read_text())]
    return config


def sections(index: str) -> list[dict[str, list[str]]]:
    r"""Headings of an index of pages, each with the pages that are linked below it.

    >>> sections("# All\n\n## First\n\n| [One](one.md) | [Two](two.md), [again](one.md#part) |\n\n## None\n")
    [{'First': ['benchmarks/one.md', 'benchmarks/two.md']}]
    """
    found = {}
    for section in re.split(r"^## ", index, flags=re.MULTILINE)[1:]:
        pages = dict.fromkeys(re.findall(r"\]\(([\w.-]+\.md)[)#]", section))
        if pages:
            found[section.partition("\n")[0]] = [f"benchmarks/{page}" for page in pages]
    return [{title: pages} for title, pages in found.items()]


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Add the raw results and pictures that pages link to."""
    root = Path(config["config_file_path"]).parent
    pages = [file for file in files.documentation_pages() if file.abs_src_path]
    names = {name for page in pages for name in _RESULT.findall(Path(page.abs_src_path).read_text())}
    for name in sorted(names):
        path = root / "benchmarks" / name
        files.append(File.generated(config, f"{_RESULTS}/{name}", abs_src_path=str(path.resolve(strict=True))))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Put tables in the place of links to them, and let links to raw results lead to the site's files."""
    root = Path(config["config_file_path"]).parent
    markdown = _TABLE.sub(lambda found: without_title((root / found[1]).read_text()), markdown)
    results = posixpath.relpath(_RESULTS, posixpath.dirname(page.file.src_uri))
    return _RESULT.sub(lambda found: f"]({results}/{found[1]})", markdown)


def without_title(text: str) -> str:
    r"""A study's tables without their heading.

    >>> without_title("# name\n\n| a |\n")
    '| a |\n'
    """
    return re.sub(r"\A# .*\n+", "", text)


def to_markdown(docstring: str) -> str:
    r"""Rewrite Sphinx's roles and formulas, and examples, which Markdown would take for quotations.

    >>> to_markdown(":math:`x` as in :meth:`step`.")
    '\\(x\\) as in `step`.'
    """
    docstring = _BLOCK.sub(_block, docstring)
    docstring = _INLINE.sub(lambda found: rf"\({' '.join(found[1].split())}\)", docstring)
    docstring = _EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", docstring)
    return _ROLE.sub(r"`\1`", docstring)


def _block(found: re.Match[str]) -> str:
    indent, formula = found[1], " ".join(found[2].split())
    return textwrap.indent(f"\n\\[ {formula} \\]\n", indent)


class DocstringMath(griffe.Extension):
    """Apply `to_markdown` to every docstring that mkdocstrings shows, and show the values of defaults."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Put the value in the place of a default such as ``PruningOptions.num_grads``."""
        for parameter in func.parameters:
            owner, _dot, name = str(parameter.default).rpartition(".")
            if owner == PruningOptions.__name__:
                parameter.default = repr(getattr(PruningOptions, name))


def on_page_content(content: str, **_: Any) -> str:
    """Turn the formulas of a page into MathML; those on lines of their own scroll where they are too wide."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    formula = html.unescape(found[3])
    if found[2] == "[":
        return f'<div class="formula">{convert(formula, display="block")}</div>'
    return str(convert(formula, display="inline"))


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would load something from elsewhere.

    Raises:
        ValueError: names the page and what it would load.
    """
    if found := _LOADED.search(output):
        raise ValueError(f"{page.file.src_uri} loads from elsewhere: {output[found.start() : found.start() + 200]}")
    return output
