"""Vision data from every kind of source."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

from mfac_hf.tasks.vision import load_vision

DRAW = np.random.default_rng(0)


def save_parquet(folder, images, labels, label_column="label", num_classes=10):
    """A data set directory as the Hub has it, one parquet file for each split."""
    names = [f"class {index}" for index in range(num_classes)]
    features = Features({"img": Image(), label_column: ClassLabel(names=names)})
    for split in ("train", "test"):
        rows = {"img": [Pillow.fromarray(image) for image in images], label_column: labels}
        (folder / "data").mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{split}-00000.parquet")


@pytest.mark.parametrize(("label_column", "num_classes"), [("label", 10), ("fine_label", 100)])
def test_a_directory_laid_out_like_cifar_on_the_hub(tmp_path, label_column, num_classes):
    pixels = DRAW.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    save_parquet(tmp_path, pixels, [3, 1, 4, 1, 5, 9], label_column, num_classes)
    data = load_vision(str(tmp_path))
    assert np.array_equal(data.train.images_NCHW.permute(0, 2, 3, 1), pixels)
    assert data.test.labels_N.tolist() == [3, 1, 4, 1, 5, 9]
    assert (data.num_classes, data.in_channels, data.padding, data.flip) == (num_classes, 3, 4, True)
    assert data.normalization == f"cifar{num_classes}"
    images, labels = data.train.__getitems__([4, 0])
    assert torch.equal(images, data.train.images_NCHW[[4, 0]]) and labels.tolist() == [5, 3]


def test_digits_are_split_once_and_for_all():
    data = load_vision()
    assert (len(data.train), len(data.test), data.in_channels, data.flip) == (1437, 360, 1, False)
    assert data.train.images_NCHW.dtype == torch.uint8 and data.train.images_NCHW.max() == 255
    assert torch.bincount(data.test.labels_N).min() >= 34  # stratified: no digit is rare
    assert torch.equal(data.test.labels_N, load_vision().test.labels_N)


def write_image(path, size, color):
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.new("RGB", size, color).save(path)


def image_folder(folder):
    for split in ("train", "val"):
        write_image(folder / split / "cat" / "a.png", (300, 260), (250, 0, 0))
        write_image(folder / split / "dog" / "b.png", (64, 90), (0, 0, 200))
    return folder


def test_an_image_folder_is_read_as_it_is_asked_for(tmp_path):
    data = load_vision(str(image_folder(tmp_path)), seed=3)
    images, labels = data.test.__getitems__([0, 1])
    assert images.shape == (2, 3, 224, 224) and labels.tolist() == [0, 1]
    assert images[0].flatten(1).float().mean(1).tolist() == [250, 0, 0]
    assert (data.num_classes, data.normalization, data.padding, data.flip) == (2, "imagenet", 0, True)


def test_the_centre_of_an_image_for_evaluation_and_repeatable_parts_for_training(tmp_path):
    folder = image_folder(tmp_path)
    gradient = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3))
    for split in ("train", "val"):
        Pillow.fromarray(gradient).save(folder / split / "cat" / "a.png")
    data = load_vision(str(folder))
    centre = data.test[0][0]
    assert torch.equal(centre, torch.from_numpy(gradient[16:240, 16:240].copy()).permute(2, 0, 1))
    train = data.train
    first = train[0][0]
    assert torch.equal(train[0][0], first)
    train.epoch = 1
    assert not torch.equal(train[0][0], first)


def test_images_that_cannot_be_read_are_named(tmp_path):
    folder = image_folder(tmp_path)
    (folder / "train" / "cat" / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image .*a\.png cannot be read"):
        load_vision(str(folder)).train.__getitems__([0, 1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda path: path / "nowhere", FileNotFoundError, "found neither as a directory nor on the Hub"),
        (lambda path: image_folder(path / "x") and [p.unlink() for p in (path / "x").glob("*/*/*")] and path / "x",
         ValueError, "image folder .* cannot be read"),
        (lambda path: image_folder(path / "x") and (path / "x" / "val").rename(path / "y") and path / "x",
         ValueError, "has the splits train; expected 'train' and 'test'"),
    ],
)  # fmt: skip
def test_sources_that_are_no_data_set(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        load_vision(str(make(tmp_path)))


def test_a_data_set_without_images_or_with_images_of_several_sizes(tmp_path):
    rows = Dataset.from_dict(
        {"text": ["a"], "label": [0]}, features=Features({"text": Value("string"), "label": Value("int64")})
    )
    for split in DatasetDict(train=rows, test=rows).items():
        (tmp_path / "text" / "data").mkdir(parents=True, exist_ok=True)
        split[1].to_parquet(tmp_path / "text" / "data" / f"{split[0]}-00000.parquet")
    with pytest.raises(ValueError, match="has the columns text, label; expected an image column"):
        load_vision(str(tmp_path / "text"))
    save_parquet(tmp_path / "sizes", [np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)], [0, 1])
    with pytest.raises(ValueError, match="images of 2 sizes"):
        load_vision(str(tmp_path / "sizes"))
