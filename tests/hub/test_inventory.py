"""Weights and files are counted alike in a model, its ordinary file and its sparse file."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import BartConfig, BartForConditionalGeneration

from mfac_hf import save_sparse
from mfac_hf.hub.inventory import describe_weights, file_sizes
from mfac_hf.pruning.masks import MaskSet


def test_weights_are_counted_alike_in_models_and_files(bert, tmp_path):
    save_sparse(bert, tmp_path / "sparse", sparse_only=True)
    bert.save_pretrained(tmp_path / "dense")
    counts = describe_weights(bert)
    assert describe_weights(tmp_path / "sparse") == describe_weights(tmp_path / "dense") == counts
    assert counts["numel"] == sum(p.numel() for p in bert.parameters())
    assert counts["zeros"] == sum(int((p == 0).sum()) for p in bert.parameters())
    targets = [t["name"] for t in counts["tensors"] if t["target"]]
    assert len(targets) == 12 and all(".encoder.layer." in name for name in targets)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        describe_weights(tmp_path)


def test_buffers_are_no_weights_of_a_file(tmp_path):
    """BART keeps a bias of its logits among them, (1, vocabulary), and all zero."""
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"vocab_size": 30, "d_model": 8, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
    model = BartForConditionalGeneration(BartConfig(**sizes))
    save_sparse(model, tmp_path / "sparse", sparse_only=True)
    model.save_pretrained(tmp_path / "dense")
    counts = describe_weights(model)
    assert counts["numel"] == model.num_parameters()
    assert describe_weights(tmp_path / "sparse") == describe_weights(tmp_path / "dense") == counts


def test_wrappers_change_nothing(bert):
    for wrapped in (torch.compile(bert, backend="eager"), torch.nn.DataParallel(bert)):
        assert describe_weights(wrapped) == describe_weights(bert)


def test_negative_zeros_count_as_zeros_everywhere(bert, tmp_path):
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.copy_(torch.where((parameter == 0) & (torch.rand_like(parameter) < 0.5), -0.0, parameter))
    save_sparse(bert, tmp_path / "sparse", sparse_only=True)
    bert.save_pretrained(tmp_path / "dense")
    counts = describe_weights(bert)
    assert counts["targets"]["zeros"] > 0.8 * counts["targets"]["numel"]
    assert describe_weights(tmp_path / "sparse") == describe_weights(tmp_path / "dense") == counts
    masks = MaskSet.from_model(bert, [t["name"] for t in counts["tensors"] if t["target"]])
    assert sum(int(mask.sum()) for mask in masks.values()) == counts["targets"]["numel"] - counts["targets"]["zeros"]


def test_weights_in_eight_bits_are_counted(tmp_path):
    weights = torch.tensor([[0.0, -0.0, 1.0], [2.0, 0.0, 3.0]]).to(torch.float8_e4m3fn)
    save_file({"w": weights}, tmp_path / "model.safetensors")
    assert describe_weights(tmp_path)["zeros"] == 3


def test_file_sizes_are_those_on_the_disk(bert, tmp_path):
    save_sparse(bert, tmp_path / "both")
    save_sparse(bert, tmp_path / "small", sparse_only=True)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "both").glob("*.safetensors")}
    assert file_sizes(tmp_path / "both", sparse=True) == sizes
    assert file_sizes(tmp_path / "both", sparse=False) == {"model.safetensors": sizes["model.safetensors"]}
    assert file_sizes(tmp_path / "small", sparse=True) == {"sparse.safetensors": sizes["sparse.safetensors"]}
    of_model = file_sizes(bert, sparse=True)
    assert of_model["sparse.safetensors"] == sizes["sparse.safetensors"]
    # the tensors alone: a file has a header besides
    assert of_model["model.safetensors"] == sum(4 * p.numel() for p in bert.parameters()) < sizes["model.safetensors"]
