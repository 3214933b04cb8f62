"""MobileNetV1 (Howard et al. 2017): depthwise 3 x 3 and pointwise 1 x 1 convolutions in turn.

Parameter names (``model.<block>.<layer>``, ``fc``) are those of the code of the M-FAC paper and, but for the shape of
``fc``, of the STR repository, whose checkpoints `mfac_hf.models.checkpoints` converts.
"""

from __future__ import annotations

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

__all__ = ["MobileNetV1"]

# Output channels and stride of each depthwise-separable block.
_BLOCKS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


def _convolution(in_channels: int, channels: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(
        in_channels, channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


class MobileNetV1(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="mfac_hf",
    pipeline_tag="image-classification",
    tags=["mobilenet", "imagenet"],
):
    """MobileNetV1 of full width, which shrinks images by a factor of 32.

    Args:
        num_classes: width of the classifier.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        blocks = [nn.Sequential(*_convolution(in_channels, 32, 3, 2))]
        width = 32
        for channels, stride in _BLOCKS:
            depthwise = _convolution(width, width, 3, stride, groups=width)
            blocks.append(nn.Sequential(*depthwise, *_convolution(width, channels, 1, 1)))
            width = channels
        self.model = nn.Sequential(*blocks)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W)."""
        logits: Tensor = self.fc(torch.mean(self.model(images_NCHW), dim=(2, 3)))
        return logits
