"""Text from elsewhere says in a card what it said, and is no markup."""

import pytest

from mfac_hf.hub.card_text import code, fenced, one_line, plain, sentence, table


def test_ordinary_text_stays_as_it_is():
    for text in ("bert-tiny_sst2", "a < b".replace("<", "and"), "0.5 (mean), 3 × 3"):
        assert plain(text) == text == sentence(text) == one_line(text)
    assert code("a.b_c") == "`a.b_c`" and fenced("x = 1", "python") == "```python\nx = 1\n```"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("query|key.*", r"query\|key.\*"),
        ("<script>x</script>", r"\<script>x\</script>"),
        ("[here](http://x)", r"\[here\](http://x)"),
        ("a`b", r"a\`b"),
        ("two\nlines\r\n---", "two lines ---"),
        ("\x1b[2Jgone\u202e", r"\[2Jgone"),
        ("\\", "\\\\"),
    ],
)
def test_plain_text_is_escaped(text, expected):
    assert plain(text) == expected


def test_a_sentence_keeps_its_markdown_and_loses_its_html():
    assert sentence("See `a<b>` and [this](x).\n<img src=x>") == "See `a<b>` and [this](x). &lt;img src=x>"


def test_code_cannot_be_left():
    assert code("a`b") == "``a`b``" and code("`a`") == "`` `a` ``" and code("a\nb") == "`a b`"
    assert fenced("print('```')\n```\n# Title") == "````\nprint('```')\n```\n# Title\n````"


def test_cells_stay_in_their_table():
    assert table(["a", "b"], [["`x|y`", plain("x|y")]]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        r"| `x\|y` | x\|y |",
    ]
