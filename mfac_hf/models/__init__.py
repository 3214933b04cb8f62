"""Vision models by the names that the reference's scripts use; they load the published checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mfac_hf.models.checkpoints import Checkpoint, load_weights, read_checkpoint
from mfac_hf.models.mobilenet import MobileNetV1
from mfac_hf.models.resnet_cifar import ResNetCifar
from mfac_hf.models.wide_resnet import WideResNet

__all__ = [
    "MODEL_NAMES",
    "Checkpoint",
    "MobileNetV1",
    "ResNetCifar",
    "WideResNet",
    "create_model",
    "load_weights",
    "read_checkpoint",
]

MODEL_NAMES = (
    *("resnet20", "resnet32", "resnet44", "resnet56"),
    *("wideresnet-22-2", "wideresnet-40-2", "wideresnet-22-4"),
    *("mobilenet", "resnet50"),
)


def create_model(
    name: str, *, num_classes: int, in_channels: int = 3, weights: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Make a model, with fresh weights or with those of a checkpoint.

    A CIFAR ResNet takes the kind of shortcut that the weights have, and convolutional ones where there are none.
    ``resnet50`` is the one of `transformers`, whose output has the logits under ``.logits``.

    Args:
        name: one of ``MODEL_NAMES``.
        num_classes: width of the classifier.
        in_channels: channels of the images.
        weights: state dict, as `read_checkpoint` returns it.

    Raises:
        ValueError: the name is unknown, or the weights are another model's.
    """
    if name not in MODEL_NAMES:
        raise ValueError(f"model {name!r} is unknown; expected one of {', '.join(MODEL_NAMES)}")
    model: nn.Module
    if name == "mobilenet":
        model = MobileNetV1(num_classes, in_channels)
    elif name == "resnet50":
        model = _resnet50(num_classes, in_channels)
    elif name.startswith("wideresnet-"):
        depth, widen = map(int, name.split("-")[1:])
        model = WideResNet(depth, widen, num_classes, in_channels)
    else:
        shortcut = "pad" if weights is not None and "linear.weight" in weights else "conv"
        model = ResNetCifar(int(name.removeprefix("resnet")), num_classes, in_channels, shortcut)
    if weights is not None:
        load_weights(model, weights)
    return model


def _resnet50(num_classes: int, in_channels: int) -> nn.Module:
    # Here, so that the CIFAR models do not wait for transformers.
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=in_channels,
        embedding_size=64,
        hidden_sizes=[256, 512, 1024, 2048],
        depths=[3, 4, 6, 3],
        layer_type="bottleneck",
        downsample_in_bottleneck=False,  # the stride is in the 3 x 3 convolution, as STR and torchvision have it
        num_labels=num_classes,  # type: ignore[call-arg]  # a property of the base class
    )
    return ResNetForImageClassification(config)
