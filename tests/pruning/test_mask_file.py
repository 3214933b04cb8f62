"""Files of masks: what they hold to the bit, and files that hold none."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from mfac_hf.pruning import MaskSet


def test_saved_masks_come_back_in_an_eighth_of_the_bytes(tmp_path):
    shapes, generator = {"0.weight": (6, 8), "2.weight": (2, 6)}, torch.Generator().manual_seed(0)
    masks = MaskSet({name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()})
    file = masks.save(tmp_path)
    assert file == tmp_path / "masks.safetensors" and [path.name for path in tmp_path.iterdir()] == [file.name]
    for path in (tmp_path, file):
        assert MaskSet.load(path) == masks
    with safe_open(file, framework="pt") as stored:
        assert stored.get_tensor("0.weight").nbytes == 6 and stored.get_tensor("2.weight").nbytes == 2
        assert json.loads(stored.metadata()["shapes"]) == {"0.weight": [6, 8], "2.weight": [2, 6]}
        assert stored.metadata()["version"] == "1"
        # bit order is part of the format: the first weight is the highest bit
        first_byte = "".join(str(int(bit)) for bit in masks["0.weight"].flatten()[:8])
        assert int(stored.get_tensor("0.weight")[0]) == int(first_byte, 2)


@given(bits=st.lists(st.booleans(), min_size=1, max_size=70), rows=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_any_mask_survives_its_file(bits, rows, tmp_path_factory):
    masks = MaskSet({"w": torch.tensor([bits] * rows), "b": ~torch.tensor(bits)})
    assert MaskSet.load(masks.save(tmp_path_factory.mktemp("masks"))) == masks


def test_files_that_hold_no_masks_are_refused(tmp_path):
    file = tmp_path / "masks.safetensors"
    with pytest.raises(FileNotFoundError, match="no masks at"):
        MaskSet.load(tmp_path)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="no safetensors file"):
        MaskSet.load(file)
    save_file({"w": torch.zeros(1, dtype=torch.uint8)}, file)
    with pytest.raises(ValueError, match="format None"):
        MaskSet.load(file)
    header = {"format": "mfac_hf.masks", "version": "2", "shapes": '{"w": [9]}'}
    save_file({"w": torch.zeros(2, dtype=torch.uint8)}, file, metadata=header)
    with pytest.raises(ValueError, match="version '2'"):
        MaskSet.load(file)
    for content in ({"w": torch.zeros(1, dtype=torch.uint8)}, {"v": torch.zeros(2, dtype=torch.uint8)}):
        save_file(content, file, metadata=header | {"version": "1"})
        with pytest.raises(ValueError, match="damaged"):
            MaskSet.load(file)


MASKS = MaskSet({"a.weight": torch.arange(9).view(3, 3) % 3 > 0, "b.weight": torch.arange(20).view(2, 10) % 7 > 2})


@pytest.mark.parametrize("seed", range(20))
def test_every_flipped_bit_is_found(seed, tmp_path):
    file, generator = MASKS.save(tmp_path), random.Random(seed)
    content = file.read_bytes()
    for at in generator.sample(range(8 * len(content)), 20):
        damaged = bytearray(content)
        damaged[at // 8] ^= 1 << at % 8
        file.write_bytes(damaged)
        try:
            assert MaskSet.load(file) == MASKS  # the bit was none of the masks
        except ValueError as error:
            assert str(file) in str(error)


def test_a_file_from_before_the_checksum_is_read_and_it_is_said(tmp_path, caplog):
    file = MASKS.save(tmp_path)
    with safe_open(file, "pt") as stored:
        header, bits = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}
    assert len(header.pop("sha256")) == 64
    save_file(bits, file, metadata=header)
    assert MaskSet.load(file) == MASKS
    assert "has no checksum" in caplog.text and str(file) in caplog.text


HEADERS = [
    None,
    "null",
    "[]",
    "[" * 50_000,
    '{"a": null}',
    '{"a": [-3, -3]}',
    '{"a": [9.0]}',
    '{"a": [true, 9]}',
    '{"a": 9}',
]
HEADERS += [
    '{"a": [3, 3], "b": [1]}',
    '{"b": [3, 3]}',
    '{"a": [4611686018427387905, 4]}',
    "{",
    '{"a": ' + str([1] * 99) + "}",
]


@pytest.mark.parametrize("shapes", HEADERS, ids=lambda shapes: str(shapes)[:20])
def test_headers_that_are_none_are_refused_by_name(shapes, tmp_path):
    header = {"format": "mfac_hf.masks", "version": "1"} | ({} if shapes is None else {"shapes": shapes})
    save_file({"a": torch.zeros(2, dtype=torch.uint8)}, tmp_path / "masks.safetensors", metadata=header)
    with pytest.raises(ValueError, match="masks.safetensors (has|is damaged)"):
        MaskSet.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.tensor([0, 1], dtype=torch.uint8)},
        {"a": torch.zeros(2)},
        {"a": torch.zeros(2, 1, dtype=torch.uint8)},
        {},
    ],
    ids=["bits after the last weight", "another dtype", "another shape", "no masks"],
)
def test_tensors_that_are_no_masks_are_refused_by_name(content, tmp_path):
    header = {"format": "mfac_hf.masks", "version": "1", "shapes": '{"a": [3, 3]}'}
    save_file(content, tmp_path / "masks.safetensors", metadata=header)
    with pytest.raises(ValueError, match="masks.safetensors (has|is damaged)"):
        MaskSet.load(tmp_path)


@given(
    cut=st.integers(0, 400),
    junk=st.binary(max_size=60),
    header=st.dictionaries(
        st.sampled_from(["format", "version", "shapes", "sha256", "a"]),
        st.sampled_from(
            ["mfac_hf.masks", "1", '{"a": [3, 3]}', '{"a.weight": [3, 3], "b.weight": [2, 10]}', "{}", ""]
        ),
    ),
    tensors=st.dictionaries(
        st.sampled_from(["a", "a.weight", "b.weight", ""]),
        st.sampled_from(
            [torch.zeros(2, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8), torch.zeros(0), torch.zeros(())]
        ),
    ),
)
@settings(max_examples=150, deadline=None)
def test_whatever_a_file_holds_it_is_masks_or_refused_by_name(cut, junk, header, tensors, tmp_path_factory):
    file = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    MASKS.save(file)
    whole = file.read_bytes()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata=header)
    strange = file.read_bytes()
    for content in (whole[:cut] + junk + whole[cut + len(junk) :], whole[:cut], junk, strange, strange + junk):
        file.write_bytes(content)
        try:
            MaskSet.load(file)
        except ValueError as error:
            assert str(file) in str(error)
