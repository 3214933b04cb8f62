r"""What the documentation site needs beside MkDocs: formulas as MathML, and no page that loads from elsewhere.

Docstrings have their formulas as Sphinx writes them, ``:math:`x``` and ``.. math::``. `DocstringMath` rewrites these
for Markdown while mkdocstrings reads the package, and `on_page_content` turns every formula into MathML, which
browsers draw without a script.
"""

import html
import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

_INLINE = re.compile(r":math:`([^`]+)`")
_BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?!\s*\n).*)*)", re.MULTILINE)
_ROLE = re.compile(r":(?:class|func|meth):`([^`]+)`")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_LOADED = re.compile(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//|<link\b[^>]*\bhref="(?:https?:)?//')


def to_markdown(docstring: str) -> str:
    r"""Rewrite Sphinx's roles and formulas.

    >>> to_markdown(":math:`x` as in :meth:`step`.")
    '\\(x\\) as in `step`.'
    """
    docstring = _BLOCK.sub(_block, docstring)
    docstring = _INLINE.sub(lambda found: rf"\({' '.join(found[1].split())}\)", docstring)
    return _ROLE.sub(r"`\1`", docstring)


def _block(found: re.Match[str]) -> str:
    indent, formula = found[1], " ".join(found[2].split())
    return textwrap.indent(f"\n\\[ {formula} \\]\n", indent)


class DocstringMath(griffe.Extension):
    """Apply `to_markdown` to every docstring that mkdocstrings shows."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def on_page_content(content: str, **_: Any) -> str:
    """Turn the formulas of a page into MathML."""
    return _FORMULA.sub(
        lambda found: convert(html.unescape(found[3]), display="block" if found[2] == "[" else "inline"), content
    )


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would load something from elsewhere.

    Raises:
        ValueError: names the page and what it would load.
    """
    if found := _LOADED.search(output):
        raise ValueError(f"{page.file.src_uri} loads from elsewhere: {output[found.start() : found.start() + 200]}")
    return output
