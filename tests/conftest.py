"""Settings and fixtures that every test shares."""

import os

# Before any Hugging Face import, which reads them once: a look-up of a name that is not on disk then fails at once
# instead of retrying against the Hub, and tokenizers do not warn about worker processes that fork after their use.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before torch: of several processes that test side by side (pytest -n), each computes with one thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

SHARED_DATA_VARIABLE = "MFAC_SHARED_DATA"


def pytest_configure(config):
    """Let the tests compute on the device that MFAC_TEST_DEVICE names (`tests.helpers.device`)."""
    if os.environ.get("MFAC_TEST_DEVICE", "cpu") != "cpu":
        from mfac_hf.fisher import BlockedFisher, GradientWindow
        from mfac_hf.fisher.columns import DenseColumns, RowSparseColumns
        from mfac_hf.fisher.gram import GramMatrix
        from mfac_hf.fisher.reference import PaperDynamicInverse
        from tests.helpers.device import DEVICE, OnDevice, place

        for cls in (BlockedFisher, DenseColumns, GradientWindow, GramMatrix, PaperDynamicInverse, RowSparseColumns):
            place(cls)
        mode = OnDevice(DEVICE)
        mode.__enter__()
        config.add_cleanup(lambda: mode.__exit__(None, None, None))


def pytest_collection_modifyitems(config, items):
    """Leave out what is about the CPU alone where the tests compute elsewhere."""
    if os.environ.get("MFAC_TEST_DEVICE", "cpu") != "cpu":
        for item in items:
            if reason := item.get_closest_marker("cpu"):
                item.add_marker(pytest.mark.skip(reason=f"about the CPU alone: {reason.args[0]}"))


@pytest.fixture(autouse=True)
def plain_logging():
    """What a script tells, run within an earlier test, is not told in this one."""
    logging.getLogger("mfac_hf").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets and weights; a test that asks for it is skipped where there is none."""
    named = os.environ.get(SHARED_DATA_VARIABLE)
    if named:
        folder = Path(named).resolve()  # some tests run scripts in another folder
        if not folder.is_dir():
            # Not a skip: whoever sets the variable wants these tests to run.
            pytest.fail(f"{SHARED_DATA_VARIABLE} is {named!r}, not a folder: correct it or unset it", pytrace=False)
        return folder
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(
            f"needs real data: set {SHARED_DATA_VARIABLE} to a folder that holds glue/, squad/, models/, … laid out "
            "like the Hub repositories, or put one at ../shared/data beside the checkout"
        )
    return folder


@pytest.fixture
def bert():
    """A tiny random classifier with sparse encoder layers."""
    from tests.helpers.models import sparse_bert  # here: most tests need not wait for transformers

    return sparse_bert()
