"""Files of masks: what they hold to the bit, and files that hold none."""

import json

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
