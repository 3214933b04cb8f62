"""The pages of docs/: their Python runs, their commands have the flags that they show, the reference is complete.

Links of all Markdown files lead somewhere, and each study with a table has a page.
"""

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


def pages_to_run():
    """The pages with Python, without those that `tests/scripts/test_make_notebooks.py` runs as notebooks."""
    notebooks = {}
    if importlib.util.find_spec("nbclient") is not None:
        notebooks = runpy.run_path(str(ROOT / "scripts" / "make_notebooks.py"))["TUTORIALS"]
    return sorted(set(pages_with("python")) - {page for pages in notebooks.values() for page in pages})


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_to_run())
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
            known = (["python3", "-m", "venv"], ["hf", "auth", "login"], ["source", ".venv/bin/activate"])
            assert words[:3] in known, f"no test knows {words}"


@pytest.mark.slow
@pytest.mark.parametrize(("theirs", "ours", "flags"), [("main_optim.py", "train", 8), ("main_prun.py", "prune", 25)])
def test_flags_of_the_reference_are_those_of_the_scripts(theirs, ours, flags, help_of):
    """The tables have every flag of the two scripts, and ours take all of them."""
    section = (DOCS / "from-the-reference.md").read_text().split(f"## `{theirs}`")[1].split("\n## ")[0]
    left = " ".join(re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE))
    named = set(re.findall(r"--[a-z][\w-]+", left))
    assert len(named) == flags
    shown = re.findall(r"--[\w-]+", help_of(f"scripts/{ours}_vision.py"))
    assert sorted(named - set(shown)) == []


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


def documented():
    """The names that the reference has, each with its module."""
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    return {tuple(name.rsplit(".", 1)) for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}


@pytest.mark.parametrize(
    "room",
    [
        "mfac_hf",
        "mfac_hf.callbacks",
        "mfac_hf.checkpoints",
        "mfac_hf.export",
        "mfac_hf.fisher",
        "mfac_hf.hub",
        "mfac_hf.models",
        "mfac_hf.optim",
        "mfac_hf.pruning",
        "mfac_hf.sparse",
    ],
)
def test_the_reference_has_every_public_name(room):
    shown = [getattr(importlib.import_module(module), name) for module, name in documented()]
    module = importlib.import_module(room)
    assert [name for name in module.__all__ if name[0] != "_" and getattr(module, name) not in shown] == []


@pytest.mark.parametrize("page", ["../README.md", *pages_with("python")])
def test_the_reference_has_every_name_that_a_page_imports(page):
    shown = [getattr(importlib.import_module(module), name) for module, name in documented()]
    trees = [ast.parse(text) for text, _, _ in blocks(DOCS / page, "python")]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if node.module.partition(".")[0] == "mfac_hf":
            module = importlib.import_module(node.module)
            assert [one.name for one in node.names if getattr(module, one.name) not in shown] == [], node.module


def tokens_of(text):
    """All tokens of a text, those within lines included."""
    for token in MarkdownIt().enable("table").parse(text):
        yield token
        yield from token.children or []


def anchors(page):
    """What a link to a part of a page may name, as GitHub and MkDocs make it of headings."""
    tokens = list(tokens_of(page.read_text()))
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    texts = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", title).lower() for title in titles]
    return {re.sub(r"[^\w -]", "", text).replace(" ", "-") for text in texts}


def broken_links(page):
    """Targets of relative links and pictures that are not there."""
    targets = [token.attrGet("href") or token.attrGet("src") for token in tokens_of(page.read_text())]
    for target in targets:
        if target is None or re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        # anchors of the reference are names of Python: MkDocs makes and checks them
        if not file.exists() or (anchor and DOCS / "reference" not in file.parents and anchor not in anchors(file)):
            yield target


@pytest.mark.parametrize("folder", ["", ".github", "benchmarks", "docs", "model_cards"])
def test_links_lead_somewhere(folder):
    pages = sorted((ROOT / folder).rglob("*.md") if folder else ROOT.glob("*.md"))
    assert pages, folder
    assert {str(page): broken for page in pages if (broken := list(broken_links(page)))} == {}


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A *B* `c_d`: e\n\n[a](#a-b-c_d-e) [b](#b) [c](page.md#c) [d](no.md) ![e](no.png) [f](https://example.org/no)\n"
        "| [g](page.md) |\n| --- |\n| [h](no/h.md#x) |\n"
    )
    assert list(broken_links(page)) == ["#b", "page.md#c", "no.md", "no.png", "no/h.md#x"]


def test_each_study_has_a_page_and_each_page_a_study():
    """A table that nobody explains, and a page of no measurement, are both left-overs."""
    tables = {path.name for path in (ROOT / "benchmarks").glob("*.md")} - {"README.md"}
    pages = {path.name: path.read_text() for path in (DOCS / "benchmarks").glob("*.md")}
    index = pages.pop("index.md")
    linked = {name: set(re.findall(r"\]\(\.\./\.\./benchmarks/([\w.-]+)\)", text)) for name, text in pages.items()}
    assert tables - set().union(*linked.values()) == set(), "a table without a page in docs/benchmarks"
    assert [name for name, files in linked.items() if not files] == [], "a page without results"
    assert [name for name in pages if f"]({name})" not in index] == [], "a page that docs/benchmarks/index.md lacks"
    # The site has a table in the place of a link that stands alone on a line.
    table = r"\[[^\]]*\]\(\.\./\.\./benchmarks/[\w.-]+\.md\)"
    lines = [line for text in pages.values() for line in text.splitlines() if re.search(table, line)]
    assert [line for line in lines if not re.fullmatch(table, line)] == []
    assert len(lines) >= len(tables)
