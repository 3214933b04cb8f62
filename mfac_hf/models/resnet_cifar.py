"""ResNets for 32 x 32 images (He et al. 2016, section 4.2): three stages of 16, 32 and 64 channels.

Parameter names are those of the published CIFAR-10 checkpoints, which come in two families:

* ``shortcut="conv"``: a shortcut that changes shape is a 1 x 1 convolution and a batch norm
  (``layer2.0.downsample.0``, ``.1``), and the classifier is ``fc``, as in the code of the M-FAC paper;
* ``shortcut="pad"``: it takes every other pixel and pads the channels with zeros (option A of the ResNet paper, no
  weights), and the classifier is ``linear``, as in most other CIFAR ResNets.
"""

from __future__ import annotations

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ResNetCifar"]


class PaddedShortcut(nn.Module):
    """Every other pixel, and zero channels on both sides up to ``channels``; no weights."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.padding = (channels - in_channels) // 2

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Half the pixels in each direction, more channels."""
        return F.pad(images_NCHW[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if in_channels != channels and shortcut == "conv":
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )
        elif in_channels != channels:
            self.downsample = PaddedShortcut(in_channels, channels)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """The block's output, rectified."""
        hidden = F.relu(self.bn1(self.conv1(images_NCHW)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.downsample(images_NCHW))


class ResNetCifar(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="mfac_hf",
    pipeline_tag="image-classification",
    tags=["resnet", "cifar"],
):
    """ResNet of depth 6n + 2 for small images.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` come with the mixin: weights as safetensors, the
    arguments below as ``config.json``.

    Args:
        depth: 6n + 2 layers with weights: 20, 32, 44, 56, …
        num_classes: width of the classifier.
        in_channels: channels of the images.
        shortcut: ``"conv"`` or ``"pad"``, see the module's docstring.

    Raises:
        ValueError: there is no such depth or shortcut.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, in_channels: int = 3, shortcut: str = "conv") -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is {depth}; expected 6n + 2, such as 20, 32, 44 or 56")
        if shortcut not in ("conv", "pad"):
            raise ValueError(f"shortcut is {shortcut!r}; expected 'conv' or 'pad'")
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = self._stage(16, 16, blocks, 1, shortcut)
        self.layer2 = self._stage(16, 32, blocks, 2, shortcut)
        self.layer3 = self._stage(32, 64, blocks, 2, shortcut)
        self.classifier_name = "fc" if shortcut == "conv" else "linear"
        self.add_module(self.classifier_name, nn.Linear(64, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
        rest = [BasicBlock(channels, channels, 1, shortcut) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(in_channels, channels, stride, shortcut), *rest)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W), H and W at least 4."""
        hidden = F.relu(self.bn1(self.conv1(images_NCHW)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        logits: Tensor = self.get_submodule(self.classifier_name)(torch.mean(hidden, dim=(2, 3)))
        return logits
