"""Crops, mirror images and normalisation of whole batches."""

import dataclasses

import numpy as np
import pytest
import torch

from mfac_hf.tasks.vision import Images, VisionData, load_vision
from mfac_hf.tasks.vision_preprocess import AugmentedImages, Preprocess

DRAW = np.random.default_rng(0)


def colour_data(n=64, size=8, padding=2, flip=True):
    images = torch.from_numpy(DRAW.integers(0, 256, (n, 3, size, size), dtype=np.uint8))
    split = Images(images, torch.arange(n) % 10)
    return VisionData(split, split, 10, 3, "cifar10", padding, flip)


def test_normalisation_is_that_of_the_pixels_in_0_to_1():
    data = colour_data()
    out = Preprocess(data, "imagenet")(data.train.images_NCHW)
    expected = (data.train.images_NCHW[5, 2, 1, 7].item() / 255 - 0.406) / 0.225
    assert out[5, 2, 1, 7].item() == pytest.approx(expected, abs=1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert Preprocess(data).normalization == "cifar10"


def test_every_crop_is_a_part_of_the_padded_image_or_its_mirror_image():
    data = colour_data()
    preprocess, images = Preprocess(data, "none"), data.train.images_NCHW
    out = (preprocess(images, torch.Generator().manual_seed(0)) * 255).round().to(torch.uint8)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    mirrored = offsets = 0
    for image, source in zip(out, padded, strict=True):
        parts = {(top, left): source[:, top : top + 8, left : left + 8] for top in range(5) for left in range(5)}
        plain = [key for key, part in parts.items() if torch.equal(part, image)]
        turned = [key for key, part in parts.items() if torch.equal(part.flip(2), image)]
        assert len(plain) + len(turned) == 1
        mirrored += len(turned)
        offsets += (plain + turned)[0] != (2, 2)
    assert 16 < mirrored < 48 and offsets > 48  # of 64 images: 4 standard deviations


def test_digits_are_not_mirrored_and_a_seed_repeats():
    data = dataclasses.replace(colour_data(padding=0), flip=False)
    preprocess = Preprocess(data, "half")
    assert torch.equal(preprocess(data.train.images_NCHW, torch.Generator()), preprocess(data.train.images_NCHW))
    preprocess = Preprocess(colour_data(), "half")
    first, second, third = (preprocess(data.train.images_NCHW, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_augmented_images_do_not_depend_on_the_batch_they_come_in():
    data = colour_data()
    images = AugmentedImages(data.train, Preprocess(data), seed=0)
    together, labels = images.__getitems__([7, 3, 20])
    alone, _ = images.__getitems__([3])
    assert torch.equal(together[1], alone[0]) and labels.tolist() == [7, 3, 0]
    assert not torch.equal(images.__getitems__(range(64))[0], data.train.images_NCHW)
    assert not torch.equal(AugmentedImages(data.train, Preprocess(data), seed=1).__getitems__([3])[0], alone)


def test_a_normalisation_that_does_not_exist_or_fit_is_refused():
    with pytest.raises(ValueError, match="'cifar': expected one of none, half"):
        Preprocess(colour_data(), "cifar")
    with pytest.raises(ValueError, match="'imagenet' is for 3 channels; these images have 1"):
        Preprocess(load_vision(), "imagenet")
