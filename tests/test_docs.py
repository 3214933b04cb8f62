"""The pages of docs/: their Python runs, their commands have the flags that they show, the reference is complete."""

import ast
import importlib
import importlib.util
import re
import runpy
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from mfac_hf.cli import _parser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Stands above a block that needs the Hub, or a package that the tests do not install.
COMPILED_ONLY = re.compile(r"<!-- compiled only(?: without (\w+))?\b.*-->")


def pages_with(language):
    """The pages that have a block of a language, by their names."""
    return [str(page.relative_to(DOCS)) for page in sorted(DOCS.rglob("*.md")) if blocks(page, language)]


def blocks(page, language):
    """Each block of a language: its text, the line that it begins in, and whether it is to be compiled only."""
    tokens = MarkdownIt().enable("table").parse(page.read_text())
    return [
        (token.content, token.map[0] + 1, is_compiled_only(before.content))
        for before, token in pairwise([tokens[0], *tokens])
        if token.type == "fence" and token.info == language
    ]


def is_compiled_only(comment):
    """Whether a comment says so: without condition, or without a package that is not here."""
    mark = COMPILED_ONLY.match(comment)
    return mark is not None and (mark[1] is None or importlib.util.find_spec(mark[1]) is None)


def commands(page):
    """The words of each command in a page's bash blocks."""
    for text, _, _ in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("python"))
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """Blocks run in the page's order, in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    for text, line, compiled_only in blocks(DOCS / page, "python"):
        code = compile("\n" * line + text, str(DOCS / page), "exec")
        if not compiled_only:
            exec(code, namespace)


def test_blocks_are_found_with_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\na = 1\n```\n\n<!-- compiled only: this needs the Hub -->\n```python\nb\n```\n\n"
        "<!-- compiled only without no_such_package -->\n```python\nc\n```\n\n"
        "<!-- compiled only without pytest -->\n```python\nd\n```\n\n```bash\nls\n```\n"
    )
    assert blocks(page, "python") == [("a = 1\n", 3, False), ("b\n", 8, True), ("c\n", 13, True), ("d\n", 18, False)]
    assert list(commands(page)) == [["ls"]]


@pytest.fixture
def help_of(monkeypatch, capsys):
    """Return the text of a script's --help."""

    def run(script):
        monkeypatch.syspath_prepend(str(ROOT / "scripts"))
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_of_a_page_exist(page, help_of):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for words in commands(DOCS / page):
        script = next((word for word in words if word.startswith("scripts/") and word.endswith(".py")), None)
        if words[0] == "mfac":
            _parser().parse_args(words[1:])
        elif script:
            flags = [word.partition("=")[0] for word in words[words.index(script) + 1 :] if word.startswith("--")]
            shown = re.findall(r"--[\w-]+", help_of(script))
            assert [flag for flag in flags if flag not in shown] == [], words
        elif words[0] == "make":
            assert words[1] in targets, words
        elif words[:2] == ["pip", "install"]:
            named = re.findall(r"\[([\w,]+)\]", " ".join(words))
            assert [extra for extra in ",".join(named).split(",") if extra and extra not in extras] == [], words
        else:
            assert words[:3] in (["python3", "-m", "venv"], ["hf", "auth", "login"]), f"no test knows {words}"


def test_messages_of_troubleshooting_are_those_of_the_package():
    """What stands in bold before an explanation, between its dots, is in a string of the source."""
    terms = re.findall(r"^(\*\*.+)\n:   ", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    messages = [
        message for term in terms for bold in re.findall(r"\*\*(.+?)\*\*", term) for message in bold.split("; ")
    ]
    trees = [ast.parse(path.read_text()) for path in (ROOT / "mfac_hf").rglob("*.py")]
    strings = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    text = "\n".join(string for string in strings if isinstance(string, str))
    assert len(messages) > 40
    pieces = {piece.strip(" ,.;:") for message in messages for piece in message.split("…")}
    assert [piece for piece in sorted(pieces) if piece not in text] == []


def test_the_reference_has_every_public_name():
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    documented = [name.rpartition(".") for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
    shown = [getattr(importlib.import_module(module), name) for module, _, name in documented]
    for room in (
        "mfac_hf",
        "mfac_hf.callbacks",
        "mfac_hf.checkpoints",
        "mfac_hf.fisher",
        "mfac_hf.hub",
        "mfac_hf.pruning",
    ):
        module = importlib.import_module(room)
        missing = [name for name in module.__all__ if name[0] != "_" and getattr(module, name) not in shown]
        assert missing == [], room
