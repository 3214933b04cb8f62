"""A vision checkpoint becomes a directory that from_pretrained loads."""

import export_vision
import pytest
import torch

from mfac_hf import load_sparse
from mfac_hf.hub.inventory import describe_weights
from mfac_hf.models import ResNetCifar
from tests.helpers.sparse_files import assert_same_state


@pytest.mark.parametrize("shortcut", ["conv", "pad"])
def test_checkpoint_becomes_a_directory(shortcut, tmp_path):
    torch.manual_seed(0)
    model = ResNetCifar(20, 7, 1, shortcut)
    with torch.no_grad():
        model.layer1[0].conv1.weight[3:] = 0
    name = "layer1.0.conv1.weight"
    masks = {name: model.get_parameter(name) != 0}
    torch.save({"model": model.state_dict(), "normalization": "half", "mask": masks}, tmp_path / "model.pth")
    export_vision.main([str(tmp_path / "model.pth"), "--model", "resnet20", "--output", str(tmp_path / "out")])
    assert_same_state(ResNetCifar.from_pretrained(tmp_path / "out").state_dict(), model.state_dict())
    assert_same_state(load_sparse(tmp_path / "out"), model.state_dict())
    # what was pruned is what has a mask, not everything that could have been
    counts = describe_weights(tmp_path / "out")
    assert [tensor["name"] for tensor in counts["tensors"] if tensor["target"]] == [name]
    assert counts["targets"] == {"numel": masks[name].numel(), "zeros": int((~masks[name]).sum())}


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        export_vision.main([str(tmp_path / "nothing.pth"), "--model", "resnet20", "--output", str(tmp_path / "out")])
    assert "nothing.pth" in capsys.readouterr().err and not (tmp_path / "out").exists()
