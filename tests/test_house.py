"""Files and functions stay short, README too; tests mirror the package, and no test module imports another."""

import ast
from pathlib import Path

import pytest
import yaml

import mfac_hf

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "mfac_hf").rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 330, 60
# A longer function says why, on its `def` line or the line above.
REASON = "# long: "


def length(function):
    """Lines of a function without its decorators and its docstring."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def long_functions(source):
    """Names and lengths of the functions that are too long and give no reason."""
    lines = source.splitlines()
    return {
        node.name: length(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and length(node) > FUNCTION_LINES
        and not any(REASON in line for line in lines[max(0, node.lineno - 2) : node.body[0].lineno - 1])
    }


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PACKAGE}
    assert {name: count for name, count in lengths.items() if count > FILE_LINES} == {}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mfac_hf.__version__ and "arXiv:2107.03356" in str(citation["references"])


@pytest.mark.slow
def test_functions_are_short_or_say_why_not():
    found = {str(path.relative_to(ROOT)): long_functions(path.read_text()) for path in PACKAGE}
    assert {name: functions for name, functions in found.items() if functions} == {}


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("def f(a):", {"f": 62}),
        ('def f(a):\n    """First.\n\n    More.\n    """', {"f": 62}),
        ("# long: one loop\ndef f(a):", {}),
        ("@decorator  # long: one loop\ndef f(a):", {}),
        ("def f(a):  # long: one loop", {}),
        ("async def f(\n    a,\n):  # long: one loop", {}),
        ("# long: of another\n\ndef f(a):", {"f": 62}),
    ],
)
def test_long_functions_are_found(head, expected):
    body = "".join(f"\n    a = {i}" for i in range(61))
    assert long_functions(f"{head}{body}\n\n\ndef g():\n    pass\n") == expected


def test_folders_of_tests_mirror_the_package():
    """Each folder of tests is one of the package; csrc/ has no Python, and scripts/ lies beside the package."""
    rooms = {path.parent.relative_to(ROOT / "mfac_hf") for path in PACKAGE}
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders - rooms == {Path("csrc"), Path("scripts")}


def test_no_test_module_imports_another():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[-1].startswith("test_")], path
