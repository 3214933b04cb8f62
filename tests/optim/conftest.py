"""Fixtures of the optimizer's tests."""

import pytest

from mfac_hf.optim import placement


@pytest.fixture
def tables_of_any_size(monkeypatch):
    """Row-sparse storage for tables that a dense oracle can follow."""
    monkeypatch.setattr(placement, "ROW_SPARSE_MIN_NUMEL", 1)
