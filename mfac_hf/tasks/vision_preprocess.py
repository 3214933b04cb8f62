"""Crops, mirror images and normalisation of whole batches, on their device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from mfac_hf.tasks.vision import Split, VisionData

__all__ = ["NORMALIZATIONS", "AugmentedImages", "Preprocess"]

# Mean and standard deviation of pixels in 0..1, by channel; the last two are those of the training splits.
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0,), (1.0,)),
    "half": ((0.5,), (0.5,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


class Preprocess:
    """Turns uint8 batches into normalised float batches, on the batch's device.

    Args:
        data: says how images may be augmented.
        normalization: key of ``NORMALIZATIONS``; the data's own if None.

    Raises:
        ValueError: the normalisation is unknown, or for another number of channels.
    """

    def __init__(self, data: VisionData, normalization: str | None = None) -> None:
        self.normalization = data.normalization if normalization is None else normalization
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization {normalization!r}: expected one of {', '.join(NORMALIZATIONS)}")
        mean, std = NORMALIZATIONS[self.normalization]
        if len(mean) not in (1, data.in_channels):
            raise ValueError(
                f"normalization {self.normalization!r} is for {len(mean)} channels; these images have "
                f"{data.in_channels}: choose half or none"
            )
        self.padding, self.flip = data.padding, data.flip
        self._mean, self._std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def __call__(self, images_NCHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Normalise, and augment where a generator is given.

        Args:
            images_NCHW: uint8, on any device.
            generator: draws crops and flips; on the images' device.

        Returns:
            float32 (N, C, H, W) in channels-last memory order.
        """
        if generator is not None:
            images_NCHW = self.crop(images_NCHW, *self.draw(len(images_NCHW), generator))
        device = images_NCHW.device
        images = images_NCHW.to(torch.float32, memory_format=torch.channels_last).div_(255)
        return images.sub_(self._mean.to(device)).div_(self._std.to(device))

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Random arguments of `crop` for n images: top (N,), left (N,) and mirrored (N,), true for half."""
        device = generator.device
        top_N, left_N = torch.randint(0, 2 * self.padding + 1, (2, n), generator=generator, device=device)
        mirrored_N = torch.rand(n, generator=generator, device=device) < (0.5 if self.flip else 0.0)
        return top_N, left_N, mirrored_N

    def crop(self, images_NCHW: Tensor, top_N: Tensor, left_N: Tensor, mirrored_N: Tensor) -> Tensor:
        """The part of each image, padded with black, that starts at (top, left); mirrored where that is true."""
        n, _, height, width = images_NCHW.shape
        device = images_NCHW.device
        rows_NH = top_N[:, None] + torch.arange(height, device=device)
        columns_NW = left_N[:, None] + torch.arange(width, device=device)
        columns_NW = torch.where(mirrored_N[:, None], columns_NW.flip(1), columns_NW)
        padded = F.pad(images_NCHW, (self.padding,) * 4).permute(0, 2, 3, 1)
        images = torch.arange(n, device=device)[:, None, None]
        return padded[images, rows_NH[:, :, None], columns_NW[:, None, :]].permute(0, 3, 1, 2)


class AugmentedImages(Dataset[Any]):
    """Images that are cropped and mirrored at random, but each always in the same way.

    The gradient of an image is then the same in every batch, which is what a comparison of gradients needs.

    Args:
        images: a split.
        preprocess: says how far crops may reach, and whether images are mirrored.
        seed: seed of crops and mirroring.
    """

    def __init__(self, images: Split, preprocess: Preprocess, seed: int) -> None:
        self.images, self.preprocess = images, preprocess
        self._draws = preprocess.draw(len(images), torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images_NCHW, labels_N = self.images.__getitems__(indices)
        chosen = torch.as_tensor(indices)
        return self.preprocess.crop(images_NCHW, *(draw[chosen] for draw in self._draws)), labels_N
