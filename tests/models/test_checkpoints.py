"""Checkpoint files in every published form, the STR key map, and files that must be refused."""

import os

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from mfac_hf.models import MobileNetV1, ResNetCifar, create_model, load_weights, read_checkpoint


def small():
    return ResNetCifar(8, num_classes=3, in_channels=1)


@pytest.mark.parametrize("form", ["plain", "state_dict", "model", "module", "mask"])
def test_every_published_form_gives_the_same_weights(tmp_path, form):
    model = small()
    weights, path = model.state_dict(), tmp_path / "weights.pth.tar"
    mask = {"conv1.weight": torch.rand(16, 1, 3, 3) > 0.5}
    prefixed = {f"module.{key}": value for key, value in weights.items()}
    content = {
        "plain": weights,
        "state_dict": {"state_dict": weights, "epoch": 3, "arch": "resnet"},
        "model": {"model": weights},
        "module": {"state_dict": prefixed, "optimizer": {"state": {}, "param_groups": []}},
        "mask": {"model": prefixed, "mask": {f"module.{key}": value for key, value in mask.items()}},
    }[form]
    torch.save(content, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.weights.keys() == weights.keys()
    assert all(torch.equal(checkpoint.weights[key], weights[key]) for key in weights)
    assert (checkpoint.mask is None) == (form != "mask")
    if form == "mask":
        assert torch.equal(checkpoint.mask["conv1.weight"], mask["conv1.weight"])


def test_safetensors_and_a_flat_mask(tmp_path):
    weights = small().state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    torch.save({"model": weights, "mask": torch.ones(5, dtype=torch.bool)}, tmp_path / "weights.th")
    assert read_checkpoint(tmp_path / "weights.safetensors").weights.keys() == weights.keys()
    assert read_checkpoint(tmp_path / "weights.th").mask.shape == (5,)


def test_old_checkpoints_without_batch_counters_load(tmp_path):
    weights = {k: v for k, v in small().state_dict().items() if not k.endswith("num_batches_tracked")}
    model = small()
    load_weights(model, weights)
    assert all(torch.equal(model.state_dict()[key], weights[key]) for key in weights)


def test_the_shortcut_family_is_the_checkpoints(shared_data):
    folder = shared_data / "checkpoints"
    for file, classifier in [("mfac_resnet20_cifar10.pth.tar", "fc"), ("resnet20-12fca82f.th", "linear")]:
        weights = read_checkpoint(folder / file).weights
        model = create_model("resnet20", num_classes=10, weights=weights)
        assert torch.equal(model.get_submodule(classifier).weight, weights[f"{classifier}.weight"])
        original = read_checkpoint(folder / (file.split(".")[0] + ".safetensors")).weights
        assert all(torch.equal(original[key], weights[key]) for key in original)


def test_weights_of_another_model_are_refused_and_change_nothing():
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="first 'layer2.0.downsample.0.weight'.*first 'linear.weight'"):
        load_weights(model, ResNetCifar(8, 3, 1, "pad").state_dict())
    with pytest.raises(ValueError, match=r"first 'layer1.1.conv1.weight'"):
        load_weights(ResNetCifar(14, 3, 1), small().state_dict())
    with pytest.raises(ValueError, match=r"first 'conv1.weight': \(16, 3, 3, 3\) in the checkpoint, \(16, 1, 3, 3\)"):
        load_weights(model, ResNetCifar(8, 3, 3).state_dict(), source="file.pth")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_checkpoint_with_a_flipped_bit_is_refused_and_one_without_checksums_loads(tmp_path):
    path, weights = tmp_path / "weights.pth.tar", small().state_dict()
    torch.save(weights, path)
    whole, entries = path.read_bytes(), weights["conv1.weight"].numpy().tobytes()
    damaged = bytearray(whole)
    damaged[whole.index(entries) + 1] ^= 4
    path.write_bytes(damaged)
    assert not torch.equal(torch.load(path)["conv1.weight"], weights["conv1.weight"]), "torch itself takes no notice"
    with pytest.raises(ValueError, match=r"weights\.pth\.tar cannot be read: .*damaged or no checkpoint \(.*checksum"):
        read_checkpoint(path)
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(path).weights["conv1.weight"], weights["conv1.weight"])
    path.chmod(0)
    if not os.access(path, os.R_OK):  # root may read it
        with pytest.raises(PermissionError):
            read_checkpoint(path)


class Code:
    def __reduce__(self):
        return os.system, ("exit 0",)


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    path = tmp_path / "file.pth"
    with pytest.raises(FileNotFoundError, match="is no file"):
        read_checkpoint(path)
    torch.save({"state_dict": small().state_dict(), "hook": Code()}, path)
    with pytest.raises(ValueError, match="refused: it holds pickled code .*system"):
        read_checkpoint(path)
    torch.save(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        read_checkpoint(path)
    for content in (b"", b"not a checkpoint at all", bytes(range(256))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or no checkpoint"):
            read_checkpoint(path)
    (tmp_path / "file.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        read_checkpoint(tmp_path / "file.safetensors")
    for content, message in [
        ([1, 2], "holds a list"),
        ({}, "holds nothing"),
        ({"state_dict": {"epoch": 3}}, "holds int at 'epoch'"),
        ({"model": small().state_dict(), "mask": torch.ones(3)}, "no bool tensor"),
    ]:
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(path)


# -- checkpoints in the naming of the STR repository -----------------------------------------------------------------


def batch_norm(name, channels):
    return {f"{name}.{leaf}": torch.rand(channels) + 0.5 for leaf in ("weight", "bias", "running_mean", "running_var")}


def convolution(name, out_channels, in_channels, kernel):
    weight = torch.randn(out_channels, in_channels, kernel, kernel) * (2 / (in_channels * kernel**2)) ** 0.5
    return {f"{name}.weight": weight}


def str_resnet50():
    """A ResNet-50 as STR names it, and what its forward pass computes, written out."""
    weights = convolution("conv1", 64, 3, 7) | batch_norm("bn1", 64)
    in_channels = 64
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            for index, (out, inner, kernel) in enumerate(
                [(width, in_channels, 1), (width, width, 3), (4 * width, width, 1)], start=1
            ):
                weights |= convolution(f"{name}.conv{index}", out, inner, kernel) | batch_norm(
                    f"{name}.bn{index}", out
                )
            if block == 0:
                weights |= convolution(f"{name}.downsample.0", 4 * width, in_channels, 1)
                weights |= batch_norm(f"{name}.downsample.1", 4 * width)
            in_channels = 4 * width
    return weights | convolution("fc", 1000, 2048, 1)


def str_resnet50_forward(weights, images):
    def normalize(x, name):
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = F.relu(normalize(F.conv2d(images, weights["conv1.weight"], stride=2, padding=3), "bn1"))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage, blocks in enumerate([3, 4, 6, 3], start=1):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = F.relu(normalize(F.conv2d(x, weights[f"{name}.conv1.weight"]), f"{name}.bn1"))
            out = F.conv2d(out, weights[f"{name}.conv2.weight"], stride=stride, padding=1)
            out = F.relu(normalize(out, f"{name}.bn2"))
            out = normalize(F.conv2d(out, weights[f"{name}.conv3.weight"]), f"{name}.bn3")
            if block == 0:
                x = F.conv2d(x, weights[f"{name}.downsample.0.weight"], stride=stride)
                x = normalize(x, f"{name}.downsample.1")
            x = F.relu(out + x)
    return F.conv2d(x.mean(dim=(2, 3), keepdim=True), weights["fc.weight"]).flatten(1)


def test_a_resnet50_in_strs_naming_computes_what_str_computes():
    torch.manual_seed(0)
    weights = str_resnet50()
    model = create_model("resnet50", num_classes=1000, weights=weights).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = model(images).logits, str_resnet50_forward(weights, images)
    # 50 layers in float32, in another order of summation
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_mobilenet_in_strs_naming():
    torch.manual_seed(0)
    weights = convolution("model.0.0", 32, 3, 3) | batch_norm("model.0.1", 32)
    width = 32
    for block, out in enumerate([64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024], start=1):
        weights |= convolution(f"model.{block}.0", width, 1, 3) | batch_norm(f"model.{block}.1", width)
        weights |= convolution(f"model.{block}.3", out, width, 1) | batch_norm(f"model.{block}.4", out)
        width = out
    weights |= convolution("fc", 1000, 1024, 1)
    dense = MobileNetV1()
    load_weights(dense, weights)
    assert torch.equal(dense.fc.weight, weights["fc.weight"][:, :, 0, 0]) and not dense.fc.bias.any()
    assert all(torch.equal(dense.state_dict()[key], weights[key]) for key in weights if not key.startswith("fc."))

    threshold = torch.tensor([[-3.0]])  # sigmoid: 0.047
    model = MobileNetV1()
    load_weights(model, {**weights, "model.3.3.sparseThreshold": threshold})
    expected = F.softshrink(weights["model.3.3.weight"], torch.sigmoid(threshold).item())
    assert torch.allclose(model.model[3][3].weight, expected, rtol=0, atol=1e-7)
    assert (model.model[3][3].weight == 0).any()


def test_strs_names_do_not_hide_that_a_model_is_another():
    with pytest.raises(ValueError, match="keys are missing, first 'resnet.encoder.stages.2"):
        weights = {key: value for key, value in str_resnet50().items() if not key.startswith(("layer3", "layer4"))}
        create_model("resnet50", num_classes=1000, weights=weights)
