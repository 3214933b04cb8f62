"""A vision run on a few digits."""

import torch
from torch import nn

from mfac_hf.tasks.vision import Images, VisionData, load_vision
from mfac_hf.tasks.vision_preprocess import Preprocess
from mfac_hf.training.vision_run import VisionRun


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def digits_run(model=None, **options):
    data = load_vision()
    train = Images(data.train.images_NCHW[:256], data.train.labels_N[:256])
    data = VisionData(train, data.test, 10, 1, "half", 1, False)
    return VisionRun(model or small_model(), data, Preprocess(data), batch_size=64, progress=False, **options)
