"""What the vision scripts' flags build: masks of checkpoints, targets, models with their normalisation."""

import pytest
import torch

from mfac_hf import MFAC
from mfac_hf.models import Checkpoint, MobileNetV1, ResNetCifar, read_checkpoint
from mfac_hf.training.vision_arguments import (
    VisionArguments,
    build_optimizer,
    build_run,
    masks_of,
    sparse_masks,
    vision_targets,
)


def test_a_flat_mask_goes_over_convolutions_and_fc_in_the_models_order():
    model = ResNetCifar(8, 3, 1)
    names = [n for n, _ in model.named_parameters() if n.split(".")[-2] in ("conv1", "conv2", "fc") and "weight" in n]
    expected = {name: torch.rand_like(model.get_parameter(name)) < 0.5 for name in names}
    flat = torch.cat([expected[name].flatten() for name in names])
    masks = masks_of(Checkpoint({}, flat), model)
    assert list(masks) == names and all(torch.equal(masks[name], expected[name]) for name in names)
    with pytest.raises(ValueError, match="flat mask of 5 weights; this model's convolutions and fc have"):
        masks_of(Checkpoint({}, flat[:5]), model)
    assert masks_of(Checkpoint({}), model) is None
    with pytest.raises(ValueError, match="masks of another model"):
        masks_of(Checkpoint({}, {"conv9.weight": torch.ones(2, dtype=torch.bool)}), model)


@pytest.mark.parametrize(("shortcut", "classifier"), [("conv", "fc"), ("pad", "linear")])
def test_a_cifar_resnet_is_pruned_without_its_small_shortcuts(shortcut, classifier):
    model = ResNetCifar(20, shortcut=shortcut)
    found = vision_targets(model)
    # 3 x 3 convolutions of the three stages, the first one and the classifier
    assert sum(p.numel() for p in found.values()) == 432 + 6 * 2304 + 4608 + 5 * 9216 + 18432 + 5 * 36864 + 640
    assert f"{classifier}.weight" in found and not any("downsample" in name for name in found)
    assert "layer2.0.downsample.0.weight" in vision_targets(ResNetCifar(20), ["downsample"])
    assert len(vision_targets(MobileNetV1())) == 28


def test_zeros_count_as_pruned_and_a_dense_model_is_refused():
    model = ResNetCifar(8, 3, 1)
    with pytest.raises(ValueError, match="no weight of this model is zero"):
        sparse_masks(None, model)
    with torch.no_grad():
        model.conv1.weight[0] = 0
    assert not sparse_masks(None, model)["conv1.weight"][0].any()


@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
def test_a_checkpoint_that_is_known_brings_its_normalisation(shared_data, suffix):
    folder = shared_data / "checkpoints"
    assert read_checkpoint(folder / f"mfac_resnet20_cifar10{suffix}").normalization == "half"
    for name in ("resnet20-12fca82f", "resnet32-d509ac18", "resnet44-014dd654", "resnet56-4bfd9763"):
        assert read_checkpoint(folder / f"{name}{suffix.replace('.pth.tar', '.th')}").normalization == "imagenet"


def test_held_out_images_are_the_same_for_every_seed_and_never_trained_on():
    def runs(seed):
        run, _ = build_run(VisionArguments("resnet20", holdout=300, train_images=500, seed=seed, progress=False))
        held_out, trained = (
            split.__getitems__(range(len(split)))[0].flatten(1) for split in (run.data.test, run.data.train)
        )
        return held_out, trained

    (held_out, trained), (again, other) = runs(0), runs(1)
    assert len(held_out) == 300 and len(trained) == 500
    assert torch.equal(held_out, again) and not torch.equal(trained, other)
    assert not set(map(tuple, held_out.tolist())) & set(map(tuple, trained.tolist()))


def test_a_seed_decides_fresh_weights_and_the_images_chosen():
    def weights(seed):
        run, checkpoint = build_run(VisionArguments("resnet20", train_images=200, seed=seed, progress=False))
        assert checkpoint is None and len(run.data.train) == 200
        return run.bare_model.fc.weight, run.data.train.__getitems__([0])[0]

    (first, image), (again, image_again), (other, other_image) = weights(1), weights(1), weights(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(image, image_again) and not torch.equal(image, other_image)


@pytest.fixture(scope="module")
def run():
    return build_run(VisionArguments("resnet20", train_images=128, progress=False))[0]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("identity", {"num_grads": 1024, "damping": 1e-5, "momentum": 0.5, "window_dtype": torch.float32}),
        ("adam", MFAC([torch.nn.Parameter(torch.zeros(1))]).defaults),
    ],
)
def test_mfac_has_the_defaults_of_its_metric(metric, expected, run):
    """The identity's are those of the reference's script."""
    args = VisionArguments("resnet20", metric=metric, weightdecay=0.25)
    momentum = expected.get("momentum")
    optimizer = build_optimizer(run, "mfac", args, lr=1e-3, momentum=momentum).optimizer
    expected = expected | {"metric": metric, "lr": 1e-3, "weight_decay": 0.25}
    assert {name: optimizer.defaults[name] for name in expected} == expected


@pytest.mark.parametrize("option", [{"momentum": 0.9}, {"grad_decay": 0.9}, {"normalize": "count"}])
def test_options_of_the_identity_metric_are_refused_in_adams(option, run):
    args = VisionArguments("resnet20", metric="adam", **{k: v for k, v in option.items() if k != "momentum"})
    with pytest.raises(ValueError, match=f"{next(iter(option))} given with metric='adam'"):
        build_optimizer(run, "mfac", args, lr=1e-3, momentum=option.get("momentum"))


def test_adamw_is_torchs(run):
    args = VisionArguments("resnet20", weightdecay=0.25)
    optimizer = build_optimizer(run, "adamw", args, lr=1e-3, momentum=None).optimizer
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["weight_decay"] == 0.25
