"""The sparse file format: exact to the bit, smallest encoding, and every damage refused."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from mfac_hf.sparse import format as sparse_format
from mfac_hf.sparse.format import DamagedFileError, SparseFile, encode, write_sparse
from tests.helpers.sparse_files import rewrite, same_bits

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def sparse_tensor(shape, density, dtype, seed=0):
    """Random bits (negative zeros, NaN payloads and infinities among them) at random places, zeros elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < density
    bits = sparse_format.BITS[dtype.itemsize]
    limits = torch.iinfo(bits)
    values = torch.randint(limits.min, limits.max, shape, dtype=bits, generator=generator)
    values[torch.rand(shape, generator=generator) >= density] = 0
    if dtype.is_floating_point and values.numel():
        values.view(-1)[-1] = limits.min  # the sign bit alone: a negative zero
    return values.view(dtype)


def positive_zeros(tensor):
    """Return the tensor with every -0.0 as +0.0."""
    return torch.where(tensor == 0, torch.zeros_like(tensor), tensor)


def write(path, **tensors):
    """Write tensors and return the path."""
    write_sparse(path, iter(tensors.items()), {})
    return path


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_round_trip_is_exact(tmp_path_factory, dtype, shape, density, seed):
    tensor = sparse_tensor(shape or (1,), density, dtype, seed).reshape(shape)
    file = SparseFile(write(tmp_path_factory.getbasetemp() / "round-trip", tensor=tensor))
    dense = file.records["tensor"].encoding == "dense"
    assert same_bits(file.read("tensor"), tensor if dense else positive_zeros(tensor))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point])
@pytest.mark.parametrize("density", [0.02, 0.3])
def test_negative_zeros_take_no_more_than_positive_ones(dtype, density, tmp_path):
    """Multiplied by a mask, half of the zeros are negative."""
    tensor = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    masked = tensor * (torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)) < density)
    assert torch.signbit(masked[masked == 0]).any()
    files = [write(tmp_path / name, w=w) for name, w in (("negative", masked), ("positive", positive_zeros(masked)))]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert same_bits(SparseFile(files[0]).read("w"), positive_zeros(masked))


def test_what_looks_like_a_negative_zero_in_other_dtypes_is_kept(tmp_path):
    """The sign bit alone is NaN in float8_e4m3fnuz, and a number in integers."""
    for dtype in (torch.float8_e4m3fnuz, torch.uint8):
        tensor = torch.zeros(100, dtype=torch.uint8)
        tensor[5] = 128
        assert same_bits(SparseFile(write(tmp_path / "file", w=tensor.view(dtype))).read("w"), tensor.view(dtype))


def test_same_weights_give_the_same_bytes(tmp_path):
    tensors = {f"t{i}": sparse_tensor((8, 200), 0.02, torch.float32, i) for i in range(5)}
    assert write(tmp_path / "a", **tensors).read_bytes() == write(tmp_path / "b", **tensors).read_bytes()


def test_tensor_that_is_not_contiguous_round_trips(tmp_path):
    tensor = positive_zeros(sparse_tensor((6, 10), 0.1, torch.float32).T[::2])
    assert not tensor.is_contiguous()
    assert same_bits(SparseFile(write(tmp_path / "file", tensor=tensor)).read("tensor"), tensor)


def test_smallest_encoding_is_chosen():
    """At density p a bitmask costs 1 bit a weight and csr 16 p (8 p for short rows): they cross at 1/16 (1/8)."""
    sizes = {}
    for density in (0.03, 0.1, 1.0):
        record, parts = encode("w", sparse_tensor((512, 1024), density, torch.float32))
        sizes[record.encoding] = sum(part.numel() * part.element_size() for part in parts.values())
    assert list(sizes) == ["csr", "bitmask", "dense"]
    numel = 512 * 1024
    assert sizes["dense"] == 4 * numel
    assert sizes["bitmask"] == pytest.approx(numel * (1 / 8 + 4 * 0.1), rel=0.02)  # 0.02: the drawn density
    assert sizes["csr"] == pytest.approx(numel * 0.03 * (4 + 2) + 512 * 2, rel=0.02)
    short_rows, _ = encode("w", sparse_tensor((2048, 256), 0.1, torch.float32))
    assert short_rows.encoding == "csr"


def test_what_cannot_be_stored_is_named(tmp_path):
    for bad in (torch.empty(3, device="meta"), torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex128)):
        with pytest.raises(ValueError, match="^classifier.weight cannot be stored"):
            write(tmp_path / "file", **{"classifier.weight": bad})
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write(tmp_path / "file", w=torch.eye(3))

    def full_disk(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        write(path, w=torch.zeros(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert torch.equal(SparseFile(path).read("w"), torch.eye(3))


@pytest.fixture
def small(tmp_path):
    """A file with all three encodings, and what it holds."""
    tensors = {
        "dense": sparse_tensor((33,), 1.0, torch.float32),
        "bitmask": positive_zeros(sparse_tensor((4, 16), 0.3, torch.float32)),
        "csr": positive_zeros(sparse_tensor((8, 200), 0.02, torch.float32)),
    }
    path = write(tmp_path / "small", **tensors)
    assert {name: record.encoding for name, record in SparseFile(path).records.items()} == {n: n for n in tensors}
    return path, tensors


def load_all(path):
    """Read every tensor of a file."""
    file = SparseFile(path)
    return {name: file.read(name) for name in file.records} | {"tied": file.tied}


@pytest.mark.slow
def test_every_flipped_bit_is_noticed(small):
    """No single flipped bit, anywhere in the file, changes what is loaded: it is refused (or meant nothing)."""
    path, tensors = small
    intact = path.read_bytes()
    refused = 0
    for position in range(len(intact)):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            loaded = load_all(path)
        except DamagedFileError:
            refused += 1
            continue
        assert loaded.pop("tied") == {}
        assert loaded.keys() == tensors.keys() and all(same_bits(loaded[name], tensors[name]) for name in tensors)
    # The bytes of tensors and the JSON of the header; spaces and the order of keys carry no meaning.
    assert refused > 0.97 * len(intact)


def test_damage_names_the_tensor(small):
    path, _ = small
    with safe_open(path, framework="pt") as file:
        begin = len(path.read_bytes()) - sum(
            file.get_tensor(k).numel() * file.get_tensor(k).element_size() for k in file.keys()
        )
    data = bytearray(path.read_bytes())
    names = set()
    for position in range(begin, len(data), 4):
        damaged = bytearray(data)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match="does not match its checksum") as caught:
            load_all(path)
        names.add(str(caught.value).split()[0])
    assert names == {"dense", "bitmask", "csr"}


def test_truncated_file_is_refused(small):
    path, _ = small
    data = path.read_bytes()
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedFileError, match="truncated or damaged"):
            load_all(path)
    with pytest.raises(FileNotFoundError, match="is no file"):
        SparseFile(path.with_name("nothing"))


def test_unknown_files_and_later_versions_are_refused(small):
    path, _ = small
    rewrite(path, change_header=lambda header: header.update(version=2))
    with pytest.raises(DamagedFileError, match="version 2 .* reads versions up to 1"):
        SparseFile(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(DamagedFileError, match="not a sparse file"):
        SparseFile(path)


def set_part(key, index, value):
    """Return a change of one entry of one part."""

    def change(parts):
        parts[key][index] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (set_part("csr/columns", -1, 200), "csr .*index out of range: column 200 in rows of 200"),
        (set_part("csr/columns", 1, 0), "csr .*not ascending"),
        (set_part("csr/counts", 0, 99), "csr .*counts add up to"),
        (set_part("bitmask/mask", 0, 255), "bitmask .*the mask keeps"),
        (lambda parts: parts.update({"bitmask/mask": parts["bitmask/mask"][:-1]}), "bitmask .*does not fit shape"),
        (lambda parts: parts.update({"csr/counts": parts["csr/counts"].int()}), "csr .*expected torch.uint8"),
        (lambda parts: parts.update({"dense/values": parts["dense/values"][:2]}), r"dense .*shape \(2,\)"),
        (set_part("csr/counts", 0, 201), "csr .*counts reach 201 in rows of 200"),
        (lambda parts: parts.update({"csr/values": parts["csr/values"].double()}), "csr .*values are torch.float64"),
    ],
)
def test_inconsistent_parts_are_refused(small, change, message):
    path, _ = small
    rewrite(path, change)
    with pytest.raises(DamagedFileError, match=message):
        load_all(path)


def test_mask_bits_after_the_last_weight_are_refused(tmp_path):
    path = write(tmp_path / "file", w=torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 0, 0, 1]))
    rewrite(path, lambda parts: parts["w/mask"].__setitem__(1, parts["w/mask"][1] | 128))
    with pytest.raises(DamagedFileError, match="^w in .*index out of range"):
        load_all(path)
