"""Wide ResNets for 32 x 32 images (Zagoruyko and Komodakis 2016): pre-activation blocks, ``widen`` times the channels.

Parameter names are those of the code of the M-FAC paper: convolutions have biases, shortcuts that change shape are
``shortcut.0``, the classifier is ``linear``. One difference: the last batch norm averages its statistics over about
ten batches, as the others do; that code lets it forget nine tenths at each batch.
"""

from __future__ import annotations

import math

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["WideResNet"]


class WideBlock(nn.Module):
    """Two 3 x 3 convolutions, each after batch norm and rectifier, beside a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
        self.shortcut = nn.Sequential()
        if in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride=stride))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """The block's output, not yet rectified."""
        hidden: Tensor = self.conv1(F.relu(self.bn1(images_NCHW)))
        hidden = self.conv2(F.relu(self.bn2(hidden)))
        return hidden + self.shortcut(images_NCHW)


class WideResNet(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="mfac_hf",
    pipeline_tag="image-classification",
    tags=["wide-resnet", "cifar"],
):
    """Wide ResNet of depth 6n + 4; 22-2, 40-2 and 22-4 are those of the M-FAC paper.

    Args:
        depth: 6n + 4.
        widen: factor of the channels, at least 2.
        num_classes: width of the classifier.
        in_channels: channels of the images.

    Raises:
        ValueError: depth or factor is out of range.
    """

    def __init__(self, depth: int = 22, widen: int = 2, num_classes: int = 100, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth is {depth}; expected 6n + 4, such as 22 or 40")
        if widen < 2:
            raise ValueError(f"widen is {widen}; expected at least 2 (a factor of 1 is a plain ResNet)")
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1)
        self.layer1 = self._stage(16, 16 * widen, blocks, 1)
        self.layer2 = self._stage(16 * widen, 32 * widen, blocks, 2)
        self.layer3 = self._stage(32 * widen, 64 * widen, blocks, 2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.linear = nn.Linear(64 * widen, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight, gain=math.sqrt(2))
                nn.init.zeros_(module.bias)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [WideBlock(channels, channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(WideBlock(in_channels, channels, stride), *rest)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W)."""
        hidden = self.layer3(self.layer2(self.layer1(self.conv1(images_NCHW))))
        logits: Tensor = self.linear(torch.mean(F.relu(self.bn1(hidden)), dim=(2, 3)))
        return logits
