"""Headers are checked before anything they describe is read: types, names, sizes."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mfac_hf.sparse.format import DamagedFileError, SparseFile, write_sparse
from mfac_hf.sparse.header import GRANTED_TO_FILE, MOST_TIMES_SMALLER, _digest
from tests.helpers.sparse_files import rewrite


@pytest.fixture
def path(tmp_path):
    """A file with a csr tensor that keeps nothing."""
    write_sparse(tmp_path / "file", iter({"w": torch.zeros(8, 200), "b": torch.ones(3)}.items()), {"other": "b"})
    return tmp_path / "file"


@pytest.mark.parametrize(
    "entry",
    [
        *({"encoding": "zip"}, {"encoding": ["csr"]}, {"dtype": "nn"}, {"dtype": "complex128"}, {"dtype": 7}),
        *({"shape": [-1]}, {"shape": [True]}, {"shape": [2.0]}, {"shape": ["8", 200]}, {"shape": 8}, {"shape": None}),
    ],
)
def test_senseless_entries_are_refused(path, entry):
    rewrite(path, change_header=lambda header: header["tensors"]["w"].update(entry))
    with pytest.raises(DamagedFileError, match="w in .*makes no sense"):
        SparseFile(path)


def test_parts_and_ties_have_to_fit_the_tensors(path):
    intact = path.read_bytes()
    rewrite(path, lambda parts: parts.update(extra=torch.ones(1)))
    with pytest.raises(DamagedFileError, match=r"not listed \['extra'\]"):
        SparseFile(path)
    for tied in ({"other": "nothing"}, {"w": "b"}, {"other": ["b"]}):
        path.write_bytes(intact)
        rewrite(path, change_header=lambda header, tied=tied: header.update(tied=tied))
        with pytest.raises(DamagedFileError, match="ties names"):
            SparseFile(path)


@pytest.mark.parametrize(
    "text",
    ["[]", "7", "{", "null", '{"version": 1}', "[" * 100_000, '{"version":1,"tensors":[],"tied":{},"sha256":"SUM"}'],
)
def test_text_that_is_no_header_is_refused(path, text):
    text = text.replace("SUM", _digest({"version": 1, "tensors": [], "tied": {}}))
    save_file({"w": torch.ones(2)}, path, metadata={"mfac_sparse": text})
    with pytest.raises(DamagedFileError, match="header of .*(is damaged|makes no sense)"):
        SparseFile(path)


@pytest.mark.parametrize("columns", [300_000_000, 10**12, 2**61])
def test_a_small_file_does_not_claim_a_huge_tensor(path, columns):
    rewrite(path, change_header=lambda header: header["tensors"]["w"].update(shape=[1, columns]))
    with pytest.raises(DamagedFileError, match=r"says that its tensors take .*\(w alone|w in .*overflows"):
        SparseFile(path)


@pytest.mark.parametrize("shape", [[2**32, 2**32], [2**62, 2], [2**64], [0, 2**63], [10**400]])
def test_sizes_beyond_64_bits_are_named(path, shape):
    rewrite(path, change_header=lambda header: header["tensors"]["w"].update(shape=shape))
    with pytest.raises(DamagedFileError, match="w in .*overflows"):
        SparseFile(path)


def test_many_tensors_count_together(tmp_path):
    """Each is granted to a file of its own; together they are not."""
    write_sparse(tmp_path / "file", ((f"t{i}", torch.zeros(4, 4)) for i in range(9)), {})
    eighth = GRANTED_TO_FILE // 4 // 8

    def change(header):
        for entry in header["tensors"].values():
            entry.update(encoding="csr", shape=[1, eighth])

    def replace(parts):
        parts.clear()
        for i in range(9):
            parts |= {f"t{i}/counts": torch.zeros(1, dtype=torch.uint32), f"t{i}/values": torch.zeros(0)}
            parts |= {f"t{i}/columns": torch.zeros(0, dtype=torch.uint32)}

    rewrite(tmp_path / "file", replace, change)
    with pytest.raises(DamagedFileError, match="says that its tensors take"):
        SparseFile(tmp_path / "file")


@pytest.mark.slow
def test_whatever_is_written_is_read(tmp_path):
    """Large tensors of zeros stay within the bound that readers set: csr would make this 8000 times smaller."""
    zeros = torch.zeros(256, 1 << 17, dtype=torch.float64)
    write_sparse(tmp_path / "file", iter([("w", zeros)]), {})
    file = SparseFile(tmp_path / "file")
    assert file.records["w"].encoding == "bitmask" and torch.equal(file.read("w"), zeros)
    assert zeros.nbytes > GRANTED_TO_FILE and MOST_TIMES_SMALLER * (tmp_path / "file").stat().st_size > zeros.nbytes
    with safe_open(tmp_path / "file", framework="pt") as stored:
        assert json.loads(stored.metadata()["mfac_sparse"])["tensors"]["w"]["shape"] == [256, 1 << 17]
