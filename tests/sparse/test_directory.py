"""Directories that may come from strangers: what lies outside of them is not read."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

from mfac_hf.sparse.directory import check_inside, dense_files, find_weights, read_tensors, restore_weights
from tests.helpers.sparse_files import assert_same_state


@pytest.fixture
def secret(tmp_path):
    """A weight file beside the model's directory, which is empty."""
    (tmp_path / "model").mkdir()
    save_file({"secret": torch.ones(4)}, tmp_path / "secret.safetensors")
    return tmp_path / "secret.safetensors"


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "ABSOLUTE", "sub/../../secret.safetensors", "..\\secret.safetensors", "..", "", "C:x"],
)
def test_index_names_plain_files_alone(name, secret, tmp_path):
    name = str(secret) if name == "ABSOLUTE" else name
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"secret": name}}))
    for read in (dense_files, find_weights, read_tensors):
        with pytest.raises(ValueError, match=r"index.json names files outside of its directory.*plain file names"):
            read(tmp_path / "model")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 7}', '{"weight_map": {"w": 7}}', "{", "\ud800"])
def test_index_that_is_none_is_refused(content, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content, errors="surrogatepass")
    with pytest.raises(ValueError, match="index.json is no"):
        dense_files(tmp_path)


def test_links_do_not_lead_out_of_the_directory(secret, tmp_path):
    link = tmp_path / "model" / "model.safetensors"
    link.symlink_to("../secret.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is a link to .*secret.safetensors, outside"):
        dense_files(tmp_path / "model")
    link.unlink()
    (tmp_path / "model" / "shard").symlink_to(secret)
    (tmp_path / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"secret": "shard"}}')
    with pytest.raises(ValueError, match="shard is a link to"):
        dense_files(tmp_path / "model")


def test_links_within_and_those_of_the_cache_are_followed(secret, tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model" / "weights")
    (tmp_path / "model" / "model.safetensors").symlink_to("weights")
    (tmp_path / "other name").symlink_to("model")
    for directory in (tmp_path / "model", tmp_path / "other name"):
        assert [name for name, _ in read_tensors(directory)] == ["w"]
    repository = tmp_path / "models--user--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "1234").mkdir(parents=True)
    (repository / "blobs" / "abc").write_bytes(secret.read_bytes())
    cached = repository / "snapshots" / "1234" / "model.safetensors"
    cached.symlink_to("../../blobs/abc")
    assert check_inside(cached) == cached
    cached.unlink()
    cached.symlink_to(secret)
    with pytest.raises(ValueError, match="outside"):
        check_inside(cached)


def make_mixtral(layers=1):
    """Build a model whose names on disk are not those in memory."""
    heads = dict(num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_hidden_layers=layers)
    return MixtralForCausalLM(MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=24, **heads))


def test_weights_are_restored_where_the_names_on_disk_are_others(bert, tmp_path):
    model, other, larger = make_mixtral(), make_mixtral(), make_mixtral(layers=2)
    model.save_pretrained(tmp_path / "small")
    assert restore_weights(torch.compile(other, backend="eager"), tmp_path / "small")
    assert_same_state(other.state_dict(), model.state_dict())
    larger.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="are not those of this MixtralForCausalLM"):
        restore_weights(other, tmp_path / "large")
    assert_same_state(other.state_dict(), model.state_dict())


def test_models_that_others_restore_are_left_alone(bert, tmp_path):
    bert.save_pretrained(tmp_path)
    before = {name: tensor.clone().add_(1) for name, tensor in bert.state_dict().items()}
    bert.load_state_dict(before)
    for model, directory in ((bert, tmp_path), (bert, tmp_path / "nothing"), (torch.nn.Linear(2, 2), tmp_path)):
        assert not restore_weights(model, directory)
    assert_same_state(bert.state_dict(), before)
