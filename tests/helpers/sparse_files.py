"""Comparing tensors bit by bit, and damaging sparse files."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mfac_hf.sparse import format as sparse_format
from mfac_hf.sparse import header as sparse_header


def same_bits(a, b):
    """Whether two tensors agree in dtype, shape and every bit."""
    as_bits = sparse_header.BITS[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(as_bits), b.view(as_bits))


def assert_same_state(state, expected):
    """Compare two state dicts bit by bit."""
    assert state.keys() == expected.keys()
    assert all(same_bits(state[name], tensor) for name, tensor in expected.items())


def rewrite(path, change_parts=lambda parts: None, change_header=lambda header: None):
    """Change a file and put its checksums right again, as another program with a mistake would."""
    with safe_open(path, framework="pt") as file:
        parts = {key: file.get_tensor(key).clone() for key in file.keys()}
        header = json.loads(file.metadata()["mfac_sparse"])
    del header["sha256"]
    change_parts(parts)
    change_header(header)
    for name, entry in header["tensors"].items():
        order = sparse_header.PARTS.get(str(entry["encoding"]), ())
        entry["sha256"] = sparse_format._digest(parts[f"{name}/{part}"] for part in order)
    header["sha256"] = sparse_header._digest(header)
    save_file(parts, path, metadata={"mfac_sparse": json.dumps(header)})
