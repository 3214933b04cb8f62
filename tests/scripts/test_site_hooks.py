"""Formulas of docstrings, and pages that would load something from elsewhere."""

import pytest

pytest.importorskip("griffe", reason="needs the extra docs")
pytest.importorskip("latex2mathml", reason="needs the extra docs")

import types  # noqa: E402

import site_hooks  # noqa: E402

PAGE = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="page.md"))


def test_formulas_of_sphinx_become_those_of_markdown():
    docstring = "One :math:`a\nb` of :meth:`step`.\n\n    .. math:: x =\n              y\n\n    More."
    assert site_hooks.to_markdown(docstring) == "One \\(a b\\) of `step`.\n\n\n    \\[ x = y \\]\n\n\n    More."


def test_formulas_become_mathml():
    content = '<p>a <span class="arithmatex">\\(x &lt; 1\\)</span> b</p><div class="arithmatex">\\[ y \\]</div>'
    made = site_hooks.on_page_content(content)
    assert made.count("<math") == 2 and made.count('display="block"') == 1
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
