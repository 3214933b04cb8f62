"""Images and labels as whole batches: CIFAR through `datasets`, ImageNet as a folder, scikit-learn's digits.

`load_vision` gives splits whose items are uint8 images, so that a batch is one index operation and travels to the
device at a quarter of its float size. `mfac_hf.tasks.vision_preprocess` crops, flips and normalises it there.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mfac_hf.hub_names import VISION

__all__ = ["FolderImages", "Images", "Split", "VisionData", "load_vision", "whole_batch"]

_LABEL_COLUMNS = ("label", "fine_label")
_TEST_SPLITS = ("test", "validation", "val")
_FOLDER_SIZE = 224  # pixels of a crop from an image folder
_FOLDER_RESIZED = 256  # shorter side before the central crop


class Split(Protocol):
    """A map-style data set whose ``__getitems__`` gives a whole batch: images (N, C, H, W) uint8, labels (N,)."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]: ...


class Images(Dataset[Any]):
    """Images in memory.

    Args:
        images_NCHW: uint8.
        labels_N: int64.
    """

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor) -> None:
        self.images_NCHW, self.labels_N = images_NCHW, labels_N

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images_NCHW[index], self.labels_N[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices)
        return self.images_NCHW[chosen], self.labels_N[chosen]


class FolderImages(Dataset[Any]):
    """Images of a folder, read when they are asked for.

    A training image is a random part of the file's (a fifth to all of its area, ratio 3:4 to 4:3) scaled to 224 x 224;
    another is the centre of the image whose shorter side was scaled to 256. Seed, ``epoch`` and index alone decide the
    random part, so a repeated epoch sees the same images.

    Args:
        files: data set with the columns ``image`` (not decoded) and ``label``.
        training: whether the parts are random.
        seed: seed of the random parts.
    """

    def __init__(self, files: Any, *, training: bool, seed: int = 0) -> None:
        self.files, self.training, self.seed, self.epoch = files, training, seed, 0

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.files[int(index)]
        image = _open(row["image"]).convert("RGB")
        box = self._random_box(image.size, index) if self.training else _central_box(image.size)
        pixels = np.asarray(image.resize((_FOLDER_SIZE, _FOLDER_SIZE), box=box), dtype=np.uint8).copy()
        return torch.from_numpy(pixels).permute(2, 0, 1), torch.tensor(row["label"])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*(self[index] for index in indices), strict=True)
        return torch.stack(images), torch.stack(labels)

    def _random_box(self, size: tuple[int, int], index: int) -> tuple[float, float, float, float]:
        draw = np.random.default_rng((self.seed, self.epoch, index))
        width, height = size
        area, ratio = draw.uniform(0.2, 1.0) * width * height, np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
        left, top = draw.uniform(0, width - w), draw.uniform(0, height - h)
        return left, top, left + w, top + h


def _central_box(size: tuple[int, int]) -> tuple[float, float, float, float]:
    width, height = size
    side = min(size) * _FOLDER_SIZE / _FOLDER_RESIZED
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _open(encoded: dict[str, Any]) -> Any:
    """Decode one image; ValueError with its path where that fails."""
    from PIL import Image

    try:
        image = Image.open(encoded["path"] if encoded["bytes"] is None else io.BytesIO(encoded["bytes"]))
        image.load()
    except OSError as error:
        raise ValueError(
            f"image {encoded['path'] or 'without a name'} cannot be read ({error}); replace it, or remove it from the "
            "data set"
        ) from error
    return image


@dataclass(frozen=True)
class VisionData:
    """A classification data set.

    Attributes:
        train: training images.
        test: images to evaluate on.
        num_classes: number of labels.
        in_channels: channels of an image.
        normalization: normalisation of the images where no checkpoint names another, by its name in
            `mfac_hf.tasks.vision_preprocess.NORMALIZATIONS`.
        padding: pixels around an image from which random crops are taken.
        flip: whether a mirrored image keeps its label.
    """

    train: Any
    test: Any
    num_classes: int
    in_channels: int
    normalization: str
    padding: int
    flip: bool


def whole_batch(batch: Any) -> Any:
    """``collate_fn`` for splits whose ``__getitems__`` gives whole batches."""
    return batch


def load_vision(source: str = "digits", *, seed: int = 0) -> VisionData:
    """Load a classification data set.

    Args:
        source: ``"digits"`` (1,797 images of 8 x 8 that come with scikit-learn, a fifth of them held out);
            ``"cifar10"``, ``"cifar100"`` or any name on the Hub; a local directory laid out like the Hub repository;
            or a directory with the folders ``train`` and ``val`` that hold one folder of images for each class.
        seed: seed of the random parts that a folder's training images are cropped to.

    Raises:
        FileNotFoundError: there is no such data set.
        ValueError: splits or columns are missing, or images cannot be read or differ in size.
    """
    if source == "digits":
        return _digits()
    folder = Path(source)
    if folder.is_dir() and any(path.is_dir() for path in folder.glob("train/*")):
        return _image_folder(folder, seed)
    return _from_datasets(VISION.get(source, source))


def _digits() -> VisionData:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    parts = train_test_split(pixels, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return VisionData(
        Images(train_images, train_labels), Images(test_images, test_labels), 10, 1, "half", padding=1, flip=False
    )


def _columns(features: Any, source: object) -> tuple[str, str]:
    """Names of the image and the label column."""
    from datasets import ClassLabel, Image

    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    labels = [name for name in _LABEL_COLUMNS if isinstance(features.get(name), ClassLabel)]
    if not images or not labels:
        raise ValueError(
            f"data set {source} has the columns {', '.join(features)}; expected an image column and a class label "
            f"called {' or '.join(_LABEL_COLUMNS)}"
        )
    return images[0], labels[0]


def _test_split(splits: Any, source: object) -> str:
    test = next((name for name in _TEST_SPLITS if name in splits), None)
    if "train" not in splits or test is None:
        raise ValueError(f"data set {source} has the splits {', '.join(splits)}; expected 'train' and 'test'")
    return test


def _from_datasets(source: str) -> VisionData:
    from datasets import load_dataset

    try:
        splits = load_dataset(source)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"data set {source!r} was found neither as a directory nor on the Hub ({error}); give 'digits', "
            "'cifar10', 'cifar100', a name on the Hub or a directory"
        ) from error
    test = _test_split(splits, source)
    image_column, label_column = _columns(splits["train"].features, source)
    train_images, test_images = (_in_memory(splits[name], image_column, label_column) for name in ("train", test))
    num_classes = splits["train"].features[label_column].num_classes
    channels, size = train_images.images_NCHW.shape[1:3]
    normalization = f"cifar{num_classes}" if num_classes in (10, 100) and channels == 3 else "half"
    return VisionData(
        train_images, test_images, num_classes, channels, normalization, padding=size // 8, flip=channels == 3
    )


def _in_memory(split: Any, image_column: str, label_column: str) -> Images:
    """Decode a split; `datasets` keeps the result on disk for the next time."""
    from datasets import Features, Image, Sequence, Value

    encoded = split.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    features = Features({"pixels": Value("binary"), "shape": Sequence(Value("int32"))})
    decoded = encoded.map(
        _decode, input_columns=image_column, remove_columns=image_column, features=features, desc="Decoding images"
    ).with_format("arrow")[:]
    shapes = set(map(tuple, decoded["shape"].to_pylist()))
    if len(shapes) != 1:
        raise ValueError(
            f"images of {len(shapes)} sizes, such as {sorted(shapes)[:3]}; expected one size. Large images of many "
            "sizes go into folders train/CLASS and val/CLASS"
        )
    pixels = np.frombuffer(b"".join(decoded["pixels"].to_pylist()), np.uint8).reshape(-1, *shapes.pop())
    images_NCHW = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    return Images(images_NCHW, torch.tensor(split[label_column][:], dtype=torch.int64))


def _decode(encoded: dict[str, Any]) -> dict[str, Any]:
    image = _open(encoded)
    pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"), dtype=np.uint8)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return {"pixels": pixels.tobytes(), "shape": pixels.shape}


def _image_folder(folder: Path, seed: int) -> VisionData:
    from datasets import Image, load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        splits = load_dataset("imagefolder", data_dir=str(folder))
    except (DatasetGenerationError, FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"image folder {folder} cannot be read ({error}); expected train/CLASS/IMAGE and val/CLASS/IMAGE"
        ) from error
    test = _test_split(splits, folder)
    _, label_column = _columns(splits["train"].features, folder)
    train, held_out = (splits[name].cast_column("image", Image(decode=False)) for name in ("train", test))
    return VisionData(
        FolderImages(train, training=True, seed=seed),
        FolderImages(held_out, training=False),
        splits["train"].features[label_column].num_classes,
        3,
        "imagenet",
        padding=0,
        flip=True,
    )
