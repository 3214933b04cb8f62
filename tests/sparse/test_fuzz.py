"""Random damage to sparse files: documented errors, nothing but the right bits, and no memory beyond the bound."""

import copy
import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mfac_hf import load_sparse
from mfac_hf.sparse import header as sparse_header
from mfac_hf.sparse.format import DamagedFileError, SparseFile, _digest, write_sparse
from tests.helpers.sparse_files import same_bits

ROUNDS = 250
# What a program with a mistake, or a stranger, may put in the place of anything.
ODD = [
    *(
        -1,
        0,
        1,
        7,
        2**31,
        2**32 + 1,
        2**62,
        2**63,
        2**64,
        10**30,
        True,
        None,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "w",
    ),
    *(
        "csr",
        "bitmask",
        "dense",
        "float64",
        "bfloat16",
        "int8",
        "qint8",
        "complex64",
        "nn",
        "__name__",
        "\ud800",
        "a/b",
    ),
    *([], {}, [1], [0, 2**40], [2**32, 2**32], [8, 200], [1600], [[8], 200], {"w": "w"}),
]


def model_of(tensors):
    """A module with these tensors as its state."""
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, torch.zeros_like(tensor))
    return module


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """A file with every encoding and several dtypes, and what it holds; little memory is granted."""
    monkeypatch.setattr(sparse_header, "GRANTED_TO_FILE", 1 << 20)
    generator = torch.Generator().manual_seed(0)

    def some(shape, density, dtype):
        kept = torch.rand(shape, generator=generator) < density
        return (torch.randn(shape, generator=generator) * 99).to(dtype) * kept

    tensors = {
        "dense": some((33,), 1.0, torch.float32),
        "bits": some((4, 32), 0.3, torch.bfloat16).abs(),
        "rows": some((8, 200), 0.02, torch.float32).abs(),
        "wide": some((2, 300), 0.02, torch.float64).abs(),
        "count": torch.arange(5),
    }
    write_sparse(tmp_path / "file", iter(tensors.items()), {"twin": "rows"})
    encodings = {record.encoding for record in SparseFile(tmp_path / "file").records.values()}
    assert encodings == {"dense", "bitmask", "csr"}
    return tmp_path / "file", tensors


def try_to_load(path, tensors):
    """Load a damaged file in both ways: right, or refused with a documented error, or other tensors in bounds."""
    try:
        loaded = load_sparse(path)
    except DamagedFileError:
        loaded = None
    if loaded is not None:
        assert sum(tensor.nbytes for tensor in set(loaded.values())) <= max(1 << 20, 1000 * path.stat().st_size)
    model = model_of(tensors)
    try:
        load_sparse(path, model)
    except ValueError:  # damaged, or not that of the model
        assert not any(buffer.count_nonzero() for buffer in model.buffers()), "nothing is half loaded"
    return loaded


def test_flipped_bits_and_cut_files(sample):
    path, tensors = sample
    intact, chance = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(ROUNDS):
        damaged = bytearray(intact)
        for _ in range(chance.choice([1, 1, 2, 8])):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        if chance.random() < 0.2:
            damaged = damaged[: chance.randrange(len(damaged))] + chance.randbytes(chance.choice([0, 0, 9]))
        path.write_bytes(damaged)
        loaded = try_to_load(path, tensors)
        refused += loaded is None
        if loaded is not None:  # a flip that carries no meaning
            assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())
    assert refused > 0.9 * ROUNDS


def change_somewhere(value, chance):
    """Put something odd in the place of a random entry, or take one out."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    if not keys:
        return
    key = chance.choice(keys)
    if isinstance(value[key], dict | list) and value[key] and chance.random() < 0.8:
        change_somewhere(value[key], chance)
    elif chance.random() < 0.15:
        del value[key]
    else:
        value[key] = copy.deepcopy(chance.choice(ODD))


def change_parts(parts, chance):
    """Change values, length, shape or dtype of a random part."""
    key = chance.choice(list(parts))
    part = parts[key].clone()
    kind = chance.choice(["value", "length", "dtype", "shape", "swap", "drop"])
    if kind == "value" and part.numel():
        part.view(torch.uint8).view(-1)[chance.randrange(part.nbytes)] = chance.randrange(256)
    elif kind == "length":
        part = part.view(-1)[: chance.randrange(part.numel() + 1)].clone()
    elif kind == "dtype":
        part = part.to(chance.choice([torch.uint8, torch.int16, torch.int64, torch.float32, torch.uint64]))
    elif kind == "shape":
        part = part[None]
    elif kind == "swap":
        part = parts[chance.choice(list(parts))].clone()
    elif kind == "drop":
        del parts[key]
        return
    parts[key] = part


def test_other_headers_and_parts_with_right_checksums(sample):
    """What nobody's checksum finds: the sizes, names, types and positions are checked one by one."""
    path, tensors = sample
    intact, chance = path.read_bytes(), random.Random(1)
    refused = 0
    for _ in range(ROUNDS):
        path.write_bytes(intact)
        with safe_open(path, framework="pt") as file:
            parts = {key: file.get_tensor(key).clone() for key in file.keys()}
            header = json.loads(file.metadata()["mfac_sparse"])
        if chance.random() < 0.5:
            change_parts(parts, chance)
        else:
            del header["sha256"]
            change_somewhere(header, chance)
        seal(path, parts, header)
        refused += try_to_load(path, tensors) is None
    assert refused > 0.7 * ROUNDS


def seal(path, parts, header):
    """Write a file whose checksums are right, as far as its header has places for them."""
    header.pop("sha256", None)
    save_file(parts, path, metadata={"mfac_sparse": "{}"})
    entries = header.get("tensors")
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("sha256"), str):
            keys = [f"{name}/{part}" for part in sparse_header.PARTS.get(str(entry.get("encoding")), ())]
            entry["sha256"] = _digest(parts[key] for key in keys if key in parts)
    header["sha256"] = sparse_header._digest(header)
    save_file(parts, path, metadata={"mfac_sparse": json.dumps(header)})
