"""Formulas of docstrings, tables of studies, and pages that would load something from elsewhere."""

import pytest

pytest.importorskip("griffe", reason="needs the extra docs")
pytest.importorskip("latex2mathml", reason="needs the extra docs")
pytest.importorskip("mkdocs", reason="needs the extra docs")

import doctest  # noqa: E402
import types  # noqa: E402

import griffe  # noqa: E402
import site_hooks  # noqa: E402

from mfac_hf.pruning import PruningOptions  # noqa: E402

PAGE = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="page.md"))


def test_formulas_of_sphinx_become_those_of_markdown():
    docstring = "One :math:`a\nb` of :meth:`step`.\n\n    .. math:: x =\n              y\n\n    More."
    assert site_hooks.to_markdown(docstring) == "One \\(a b\\) of `step`.\n\n\n    \\[ x = y \\]\n\n\n    More."


def test_examples_become_code():
    docstring = "One.\n\n>>> a = 1\n>>> a\n1\n\nMore.\n\nExample:\n    >>> b\n"
    fenced = "```pycon\n>>> a = 1\n>>> a\n1\n```"
    assert site_hooks.to_markdown(docstring) == f"One.\n\n{fenced}\n\nMore.\n\nExample:\n    >>> b\n"


def test_defaults_are_shown_by_their_values():
    source = "def f(a: int = PruningOptions.num_grads, b=PruningOptions.method, c=1.5, *, d=Other.num_grads): ...\n"
    with griffe.temporary_visited_module(source) as module:
        site_hooks.DocstringMath().on_function(func=module["f"])
        defaults = [str(parameter.default) for parameter in module["f"].parameters]
    assert defaults == [repr(PruningOptions.num_grads), repr(PruningOptions.method), "1.5", "Other.num_grads"]


def test_formulas_become_mathml():
    content = '<p>a <span class="arithmatex">\\(x &lt; 1\\)</span> b</p><div class="arithmatex">\\[ y \\]</div>'
    made = site_hooks.on_page_content(content)
    assert made.count("<math") == 2 and made.count('<div class="formula"><math') == made.count('display="block"') == 1
    assert "arithmatex" not in made and "&#x0003C;" in made


@pytest.mark.parametrize(
    ("tag", "refused"),
    [
        ('<script src="https://example.org/a.js">', True),
        ('<link rel="stylesheet" href="//example.org/a.css">', True),
        ('<img alt="" src="http://example.org/a.png">', True),
        ('<script src="assets/a.js">', False),
        ('<a href="https://example.org">', False),
    ],
)
def test_pages_load_nothing_from_elsewhere(tag, refused):
    if refused:
        with pytest.raises(ValueError, match=r"page\.md loads from elsewhere"):
            site_hooks.on_post_page(tag, page=PAGE)
    else:
        assert site_hooks.on_post_page(tag, page=PAGE) == tag


def test_doctests():
    found = doctest.testmod(site_hooks)
    assert found.attempted >= 3 and found.failed == 0


def test_a_link_to_a_table_becomes_the_table(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "one.md").write_text("# one\n\n| a |\n| --- |\n")
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="benchmarks/one.md"))
    text = "# One\n\n[The table](../../benchmarks/one.md)\n\nRuns: [a](../../benchmarks/one.jsonl), [b](two.md).\n"
    made = site_hooks.on_page_markdown(text, page=page, config={"config_file_path": str(tmp_path / "mkdocs.yml")})
    assert made == "# One\n\n| a |\n| --- |\n\n\nRuns: [a](results/one.jsonl), [b](two.md).\n"


def test_pages_follow_the_index(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "index.md").write_text("# All\n\n## First\n\n[One](one.md)\n")
    config = {"docs_dir": str(tmp_path), "nav": ["a.md", {"Benchmarks": "benchmarks/index.md"}]}
    pages = ["benchmarks/index.md", {"First": ["benchmarks/one.md"]}]
    assert site_hooks.on_config(config)["nav"] == ["a.md", {"Benchmarks": pages}]
