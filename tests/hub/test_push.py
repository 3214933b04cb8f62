"""Pushing to a Hub on loopback with the real client, and loading from it."""

import json
import socket

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from mfac_hf import load_sparse, push_to_hub, save_sparse
from mfac_hf.hub.push import PushError
from mfac_hf.models import ResNetCifar
from tests.helpers.hub_server import TOKEN, Repository, running_hub
from tests.helpers.models import CONFIG, prune
from tests.helpers.results import run
from tests.helpers.sparse_files import assert_same_state

CARD = ModelCard("---\nlicense: mit\n---\n# A model\n")


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """These tests talk to a server of their own; large files go through LFS, which the server speaks."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def hub():
    """A running Hub."""
    with running_hub() as server:
        yield server


@pytest.fixture
def api(hub):
    """A client with the right token."""
    return HfApi(endpoint=hub.url, token=TOKEN)


def prune_convolutions(model):
    """Zero half of each convolution."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight[: len(module.weight) // 2] = 0


def files(hub, name="user/sparse", branch="main"):
    """The files of a repository."""
    return hub.repositories[name].branches[branch]


def download(hub, name, tmp_path, repo="user/sparse", **options):
    """Fetch a file as any other program would."""
    path = hf_hub_download(repo, name, endpoint=hub.url, token=TOKEN, cache_dir=tmp_path / "cache", **options)
    return open(path, "rb").read()


@pytest.mark.parametrize("large", [(), (".safetensors",)], ids=["regular", "lfs"])
def test_pushed_model_comes_back_bit_for_bit(bert, hub, api, large, tmp_path):
    hub.lfs_suffixes = large
    commit = push_to_hub(bert, "user/sparse", card=CARD, api=api)
    assert commit.oid == hub.repositories["user/sparse"].sha("main")
    assert set(files(hub)) == {"README.md", "config.json", "model.safetensors", "sparse.safetensors"}
    assert (len(hub.large) == 2) == bool(large)
    for name in files(hub):
        (tmp_path / name).write_bytes(download(hub, name, tmp_path))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_state(loaded.state_dict(), bert.state_dict())
    assert str(ModelCard.load(tmp_path / "README.md")) == str(CARD)


def test_load_sparse_downloads_only_the_small_file(bert, hub, api, tmp_path):
    push_to_hub(bert, "user/sparse", card=CARD, api=api, revision="v1")
    options = {"endpoint": hub.url, "token": TOKEN, "cache_dir": tmp_path, "revision": "v1"}
    hub.requests.clear()
    assert_same_state(load_sparse("user/sparse", **options), bert.state_dict())
    fetched = {request.rpartition("/")[2] for request in hub.requests}
    assert fetched == {"sparse.safetensors"}
    built = load_sparse("user/sparse", AutoModelForSequenceClassification, **options)
    assert_same_state(built.state_dict(), bert.state_dict())
    assert files(hub) == {}, "the branch was asked for, not main"
    with pytest.raises(FileNotFoundError, match="has no sparse.safetensors: a push leaves it out"):
        load_sparse("user/sparse", **{**options, "revision": "main"})


def test_sparse_only_leaves_the_dense_file_out_and_removes_an_old_one(bert, hub, api, tmp_path):
    bert.save_pretrained(tmp_path, max_shard_size="20KB")
    push_to_hub(tmp_path, "user/sparse", card=CARD, api=api)
    shards = [name for name in files(hub) if name.startswith("model-")]
    assert len(shards) > 2 and "model.safetensors.index.json" in files(hub)
    before = sorted(path.name for path in tmp_path.iterdir())
    push_to_hub(tmp_path, "user/sparse", card=CARD, api=api, sparse_only=True)
    assert set(files(hub)) == {"README.md", "config.json", "sparse.safetensors"}
    assert hub.repositories["user/sparse"].commits == ["Model and card from mfac_hf"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    # a directory that has the small file alone
    save_sparse(bert, tmp_path / "small", sparse_only=True)
    push_to_hub(tmp_path / "small", "user/other", card=CARD, api=api, sparse_only=True)
    (tmp_path / "other").write_bytes(files(hub, "user/other")["sparse.safetensors"])
    assert_same_state(load_sparse(tmp_path / "other"), bert.state_dict())
    with pytest.raises(FileNotFoundError, match="sparse_only"):
        push_to_hub(tmp_path / "small", "user/third", card=CARD, api=api)
    assert "user/third" not in hub.repositories


def test_training_state_stays_at_home(bert, hub, api, tmp_path):
    bert.save_pretrained(tmp_path)
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "predictions.json", "vocab.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "checkpoint-1").mkdir()
    # a small file that is older than the weights is not the one that is pushed
    torch.manual_seed(1)
    save_sparse(prune(BertForSequenceClassification(BertConfig(**CONFIG))), tmp_path / "old", sparse_only=True)
    (tmp_path / "sparse.safetensors").write_bytes((tmp_path / "old" / "sparse.safetensors").read_bytes())
    push_to_hub(tmp_path, "user/sparse", card=CARD, api=api)
    assert set(files(hub)) == {"README.md", "config.json", "model.safetensors", "sparse.safetensors", "vocab.txt"}
    options = {"endpoint": hub.url, "token": TOKEN, "cache_dir": tmp_path / "cache"}
    assert_same_state(load_sparse("user/sparse", **options), bert.state_dict())


def test_dense_and_plain_models(hub, api, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    push_to_hub(model, "user/plain", card=CARD, api=api)
    assert set(files(hub, "user/plain")) == {"README.md", "model.safetensors"}, "a second copy would save nothing"


def test_vision_model_comes_back(hub, api, tmp_path):
    torch.manual_seed(0)
    model = ResNetCifar(20, 10).eval()
    prune_convolutions(model)
    push_to_hub(model, "user/resnet", card=CARD, api=api)
    for name in files(hub, "user/resnet"):
        (tmp_path / name).write_bytes(download(hub, name, tmp_path, "user/resnet"))
    assert "sparse.safetensors" in files(hub, "user/resnet")
    assert_same_state(ResNetCifar.from_pretrained(tmp_path).state_dict(), model.state_dict())
    assert_same_state(load_sparse(tmp_path), model.state_dict())


def test_private_repositories(bert, hub, api, tmp_path):
    push_to_hub(bert, "user/secret", card=CARD, api=api, private=True)
    assert hub.repositories["user/secret"].private
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        hf_hub_download("user/secret", "config.json", endpoint=hub.url, token=False, cache_dir=tmp_path)
    assert download(hub, "config.json", tmp_path, "user/secret") == files(hub, "user/secret")["config.json"]
    # a public one would not become private
    hub.repositories["user/public"] = Repository()
    with pytest.raises(PushError, match="user/public exists and is public"):
        push_to_hub(bert, "user/public", card=CARD, api=api, private=True)
    assert files(hub, "user/public") == {}


@pytest.mark.slow
@pytest.mark.parametrize("refused, large", [("/commit/", ()), ("/lfs/", (".safetensors",)), ("/preupload/", ())])
def test_failed_upload_leaves_the_repository_and_the_files_unchanged(bert, hub, api, refused, large, tmp_path):
    push_to_hub(bert, "user/sparse", card=CARD, api=api)
    before = dict(files(hub))
    with torch.no_grad():
        bert.classifier.bias += 1
    bert.save_pretrained(tmp_path)
    local = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    hub.refuse, hub.lfs_suffixes = {refused: 403}, large
    with pytest.raises(PushError, match="No file of the repository has changed"):
        push_to_hub(tmp_path, "user/sparse", card=CARD, api=api)
    assert files(hub) == before
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == local
    hub.refuse = {}
    push_to_hub(tmp_path, "user/sparse", card=CARD, api=api)
    assert files(hub)["model.safetensors"] == local["model.safetensors"]


def test_wrong_token_and_no_token(bert, hub, monkeypatch):
    with pytest.raises(PushError, match="401.*the token is wrong or expired: run `hf auth login`"):
        push_to_hub(bert, "user/sparse", card=CARD, api=HfApi(endpoint=hub.url, token="hf_wrong"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(PushError, match="needs a token"):
        push_to_hub(bert, "user/sparse", card=CARD, api=HfApi(endpoint=hub.url))
    assert hub.repositories == {}


def test_no_network(bert, tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    api = HfApi(endpoint=f"http://127.0.0.1:{port}", token=TOKEN)
    bert.save_pretrained(tmp_path)
    local = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(PushError, match="the Hub cannot be reached .*No file of user/sparse has changed"):
        push_to_hub(tmp_path, "user/sparse", card=CARD, api=api)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set"):
        push_to_hub(tmp_path, "user/sparse", card=CARD, api=api)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == local


def test_bad_input_is_refused_before_any_request(bert, hub, api, tmp_path):
    for name in ("a/b/c", "spaces here", "user/-x", "user/x.git"):
        with pytest.raises(ValueError, match=f"repo_id '{name}' is no valid name"):
            push_to_hub(bert, name, card=CARD, api=api)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        push_to_hub(tmp_path, "user/x", card=CARD, api=api)
    bert.save_pretrained(tmp_path)
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"results": {"task": "sst2"}}))
    with pytest.raises(ValueError, match="lacks metrics, seed, command, versions, device, optimizer"):
        push_to_hub(tmp_path, "user/x", card=results, api=api)
    with pytest.raises(ValueError, match="lack name, model, weights, files, runs, mfac_hf"):
        push_to_hub(tmp_path, "user/x", card={"runs": []}, api=api)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "sparse.safetensors", "vocab.txt"])
def test_links_to_elsewhere_are_not_pushed(name, bert, hub, api, tmp_path):
    """A directory of a stranger may link to what its pusher keeps private."""
    save_sparse(bert, tmp_path / "model", sparse_only=name == "sparse.safetensors")
    (tmp_path / "private").write_bytes(b"secret")
    link = tmp_path / "model" / name
    if link.exists():
        link.replace(tmp_path / "private")
    link.symlink_to("../private")
    with pytest.raises(ValueError, match=f"{name} is a link to .*private, outside of its directory"):
        push_to_hub(tmp_path / "model", "user/m", card=CARD, api=api, sparse_only=name == "sparse.safetensors")
    assert "user/m" not in hub.repositories
    weights = tmp_path / "model" / "weights"
    (link.resolve()).replace(weights)
    link.unlink()
    link.symlink_to("weights")
    if name in ("model.safetensors", "tokenizer.json"):
        push_to_hub(tmp_path / "model", "user/m", card=CARD, api=api)
        assert hub.repositories["user/m"].branches["main"][name] == weights.read_bytes()


@pytest.mark.parametrize("sparse_only", [False, True])
def test_the_card_names_the_files_that_are_pushed(hub, api, sparse_only):
    """Here most weights are embeddings, so that the sparse file saves little."""
    torch.manual_seed(0)
    model = prune(BertForSequenceClassification(BertConfig(**{**CONFIG, "vocab_size": 20_000})))
    dense = {"eval_accuracy": 0.9}
    record = run(1, 0.8)
    record["results"]["before_pruning"] = dense
    push_to_hub(model, "user/sparse", card=record, api=api, sparse_only=sparse_only)
    text = files(hub)["README.md"].decode()
    name, other = ("sparse", "model") if sparse_only else ("model", "sparse")
    assert f"| `{name}.safetensors` | {len(files(hub)[f'{name}.safetensors']):,} |" in text
    assert f"{other}.safetensors" not in text and f"{other}.safetensors" not in files(hub)
    assert ("load_sparse(" in text) == sparse_only != ("from_pretrained(" in text)


def test_all_files_of_tokenizer_and_code_are_pushed(bert, hub, api, tmp_path):
    bert.save_pretrained(tmp_path)
    config = {"tokenizer_class": "MarianTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = {"source.spm", "target.spm", "vocab.json", "tokenization_own.py", "pruning.json", "chat_template.jinja"}
    for name in ours | {"train.py", "notes.txt"}:
        (tmp_path / name).write_text("")
    push_to_hub(tmp_path, "user/sparse", card=CARD, api=api)
    weights = {"model.safetensors", "sparse.safetensors"}
    assert set(files(hub)) == ours | weights | {"README.md", "config.json", "tokenizer_config.json"}


def test_malformed_cards_and_results_are_named(bert, hub, api, tmp_path):
    bert.save_pretrained(tmp_path / "model")
    for content, message in (
        ("[1]", "x.json holds a list"),
        ('{"runs": [{"metrics": 1}]}', "x.json: the facts of the card lack name"),
        (
            '{"results": {"pruning": {"reports": [1]}}}',
            r"x.json: results.pruning.reports\[0\] is 1; expected an object",
        ),
        ("{", "x.json is no JSON file"),
    ):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            push_to_hub(tmp_path / "model", "user/x", card=tmp_path / "x.json", api=api)
    assert hub.requests == []
