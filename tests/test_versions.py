"""Versions: the oldest that are tested are those that are claimed; private names of other packages change with any."""

import ast
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("test", "lora", "plots", "onnx", "openvino", "vision")  # what `make test` installs
FOREIGN = ("accelerate", "datasets", "evaluate", "huggingface_hub", "peft", "transformers")


def requirements():
    """What the package and the extras of `make test` need, but for the package itself."""
    lines = PROJECT["dependencies"] + [line for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra]]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != "mfac_hf"]


def pinned(file):
    """The version of each package in a file of constraints."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    pins = map(Requirement, filter(None, lines))
    return {canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in pins}


def test_the_lowest_constraints_are_the_bounds_of_pyproject():
    claimed = {}
    for requirement in requirements():
        (bound,) = [s for s in requirement.specifier if s.operator == ">="]
        claimed.setdefault(canonicalize_name(requirement.name), set()).add(Version(bound.version))
    assert claimed == {name: {version} for name, version in pinned("constraints-lowest.txt").items()}


def test_the_tested_versions_are_within_the_bounds():
    tested = pinned("constraints.txt")
    for requirement in requirements():
        assert tested[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def private_names(source):
    """Names with a leading underscore that a module takes from other packages, or passes them as keywords."""
    tree, foreign, found = ast.parse(source), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, alias.asname or alias.name.partition(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [(f"{node.module}.{alias.name}", alias.asname or alias.name) for alias in node.names]
        else:
            continue
        for name, local in names:
            if name.partition(".")[0] in FOREIGN:
                foreign.add(local)
                found += [name] if any(is_private(part) for part in name.split(".")) else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and root(node) in foreign:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and root(node.func) in foreign:
            found += [f"{ast.unparse(node.func)}({k.arg}=)" for k in node.keywords if is_private(k.arg or "")]
    return found


def is_private(name):
    """Whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__")


def root(node):
    """The name that a chain of attributes and calls begins with."""
    while isinstance(node, ast.Attribute | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def test_no_private_names_of_hugging_face():
    found = {str(path.relative_to(ROOT)): private_names(path.read_text()) for path in (ROOT / "mfac_hf").rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from transformers.utils import _helper", ["transformers.utils._helper"]),
        ("import peft._private as p", ["peft._private"]),
        ("import transformers.utils.hub\nx = transformers.utils.hub._hf_api", ["transformers.utils.hub._hf_api"]),
        ("from huggingface_hub import CommitInfo\nCommitInfo(oid='', _endpoint='')", ["CommitInfo(_endpoint=)"]),
        ("def f():\n    from transformers import Trainer\n    Trainer()._step()", ["Trainer()._step"]),
        ("from mfac_hf.hub import _names\nfrom transformers import Trainer as _Trainer\n_Trainer.__init__", []),
    ],
)
def test_private_names_are_found(source, expected):
    assert private_names(source) == expected
