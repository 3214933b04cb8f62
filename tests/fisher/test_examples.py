"""The examples in the docstrings of `mfac_hf.fisher` are right."""

import doctest
import importlib
import pkgutil

import pytest

from mfac_hf import fisher

MODULES = [module.name for module in pkgutil.iter_modules(fisher.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    found = doctest.testmod(importlib.import_module(f"mfac_hf.fisher.{name}"))
    assert found.failed == 0
    assert found.attempted > 0 or name in ("factor", "streaming"), "there is an example to run"
