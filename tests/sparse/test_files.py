"""Saving and loading sparse models: exact, streaming, and never half."""

import json
import subprocess
import sys
import tempfile

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from mfac_hf import load_sparse, save_sparse
from mfac_hf.optim.unwrap import unwrap_model
from mfac_hf.sparse.directory import SPARSE_FILE, find_weights
from mfac_hf.sparse.files import DamagedFileError
from mfac_hf.sparse.format import SparseFile
from tests.helpers.models import CONFIG, prune
from tests.helpers.sparse_files import assert_same_state, rewrite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_transformers_model_round_trips(bert, dtype, tmp_path):
    bert.to(dtype)
    path = save_sparse(bert, tmp_path)
    assert path == tmp_path / SPARSE_FILE
    expected = bert.state_dict()
    assert_same_state(load_sparse(tmp_path), expected)
    assert_same_state(load_sparse(path), expected)
    # the directory is an ordinary one for everybody else
    ordinary = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype="auto")
    assert_same_state(ordinary.state_dict(), expected)
    built = load_sparse(tmp_path, AutoModelForSequenceClassification)
    assert isinstance(built, BertForSequenceClassification) and not built.training
    assert_same_state(built.state_dict(), expected)


def test_sparse_only_directory_holds_the_small_file_and_the_configuration(bert, tmp_path):
    save_sparse(bert, tmp_path, sparse_only=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", SPARSE_FILE]
    assert_same_state(load_sparse(tmp_path, AutoModelForSequenceClassification).state_dict(), bert.state_dict())
    bert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="already holds model.safetensors"):
        save_sparse(bert, tmp_path, sparse_only=True)


@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_saved_directory_becomes_a_sparse_file(bert, max_shard_size, tmp_path):
    bert.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    shards = find_weights(tmp_path)
    assert (len(shards) > 3) == (max_shard_size == "20KB")
    save_sparse(tmp_path, tmp_path)
    assert find_weights(tmp_path) == [tmp_path / SPARSE_FILE, *shards]
    assert_same_state(load_sparse(tmp_path), bert.state_dict())
    if len(shards) > 1:
        shards[0].unlink()
        with pytest.raises(FileNotFoundError, match=f"shards that are not there: {shards[0].name}"):
            save_sparse(tmp_path, tmp_path)


def test_directory_without_a_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(FileNotFoundError, match=r"holds no model: expected model.safetensors.*found: \['notes.txt'\]"):
        save_sparse(tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        save_sparse(tmp_path / "missing", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match=r"has no sparse.safetensors; found: \['notes.txt'\]"):
        load_sparse(tmp_path)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    torch.manual_seed(0)
    model = prune(BertForMaskedLM(BertConfig(**CONFIG)))
    tied = ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
    file = SparseFile(save_sparse(model, tmp_path / "model"))
    assert file.tied[tied[1]] == tied[0] and tied[1] not in file.records
    state = load_sparse(tmp_path / "model")
    assert_same_state(state, model.state_dict())
    assert state[tied[0]] is state[tied[1]]
    built = load_sparse(tmp_path / "model", AutoModelForMaskedLM)
    assert built.get_parameter(tied[0]) is built.get_parameter(tied[1])
    assert_same_state(built.state_dict(), model.state_dict())
    # files of transformers leave the second name out
    save_sparse(tmp_path / "model", tmp_path / "from_files")
    assert tied[1] not in load_sparse(tmp_path / "from_files")
    torch.manual_seed(1)
    other = BertForMaskedLM(BertConfig(**CONFIG))
    assert load_sparse(tmp_path / "from_files", other) is other
    assert_same_state(other.state_dict(), model.state_dict())


def test_plain_module_with_integer_buffers(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    model(torch.randn(2, 3, 5, 5))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].weight[1, 0, 0, 0] = -0.0
    save_sparse(model, tmp_path)
    assert_same_state(load_file(tmp_path / "model.safetensors"), model.state_dict())
    with torch.no_grad():
        model[0].weight[1, 0, 0, 0] = 0.0  # as which bitmask and csr give zeros back
    assert_same_state(load_sparse(tmp_path), model.state_dict())
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
    assert_same_state(load_sparse(tmp_path, fresh).state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="ResNet has no from_config"):
        load_sparse(tmp_path, type("ResNet", (nn.Module,), {}))


def test_model_that_does_not_fit_is_left_alone(tmp_path):
    save_sparse(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), tmp_path)

    def refused(model, message):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_sparse(tmp_path, model)
        assert_same_state(model.state_dict(), before)

    refused(
        nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)), r"1.weight is float32 of shape \(2, 3\) .* \(5, 3\) in the"
    )
    refused(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double(), "0.weight is float32 .* torch.float64 of shape")
    refused(nn.Sequential(nn.Linear(4, 3)), r"it lacks \[\], and the model lacks \['1.weight', '1.bias'\]")
    three = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    refused(three, r"lacks \['2.weight', '2.bias'\]")


def test_shapes_are_compared_before_a_tensor_is_read(tmp_path, monkeypatch):
    save_sparse(nn.Linear(4, 3), tmp_path)
    monkeypatch.setattr(SparseFile, "read", lambda self, name: pytest.fail(f"read {name}"))
    for model in (nn.Linear(4, 5), nn.Linear(4, 3).double(), nn.Linear(4, 3, bias=False)):
        with pytest.raises(ValueError, match="in the model|does not fit the model"):
            load_sparse(tmp_path, model)


def test_damaged_file_leaves_the_model_alone(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(30, 20))
    with torch.no_grad():
        model[1].weight[1:] = 0
    path = save_sparse(model, tmp_path)
    rewrite(path, lambda parts: parts["1.weight/columns"].__setitem__(0, 255))
    before = {name: tensor.clone().zero_() for name, tensor in model.state_dict().items()}
    model.load_state_dict(before)
    with pytest.raises(DamagedFileError, match="^1.weight in "):
        load_sparse(tmp_path, model)
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize("source", ["no/such/place", "spaces are bad", "a--b/.."])
def test_what_is_neither_a_place_nor_a_name_is_refused(source):
    with pytest.raises(FileNotFoundError, match="is neither a file, nor a directory, nor a name on the Hub"):
        load_sparse(source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_layer_comes_back_in_its_own_dtype(dtype, bert, tmp_path):
    """Half precision with some layers in float32, as T5 and users keep them."""
    bert.to(dtype)
    for layer in (bert.classifier, bert.bert.encoder.layer[1].output.LayerNorm, bert.bert.encoder.layer[0].output):
        layer.float()
    save_sparse(bert, tmp_path, sparse_only=True)
    built = load_sparse(tmp_path, AutoModelForSequenceClassification)
    assert_same_state(built.state_dict(), bert.state_dict())
    assert {p.dtype for p in built.parameters()} == {dtype, torch.float32}
    bert.half().double()
    with pytest.raises(ValueError, match="in the model"):
        load_sparse(tmp_path, bert)


@pytest.fixture
def rank():
    """A process group of one rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "ddp": nn.parallel.DistributedDataParallel,
    "data parallel": nn.DataParallel,
    "average": torch.optim.swa_utils.AveragedModel,
    "accelerate": lambda model: Accelerator(cpu=True).prepare(model),
    "nested": lambda model: torch.compile(
        nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager")), backend="eager"
    ),
}


@pytest.mark.parametrize("sparse_only", [False, True])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrapped_model_gives_the_files_of_the_model_inside(wrap, sparse_only, bert, rank, tmp_path):
    save_sparse(bert, tmp_path / "plain", sparse_only=sparse_only)
    save_sparse(wrap(bert), tmp_path / "wrapped", sparse_only=sparse_only)
    files = [{path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()} for kind in ("plain", "wrapped")]
    assert files[0] == files[1]
    fresh = wrap(BertForSequenceClassification(bert.config))
    assert load_sparse(tmp_path / "wrapped", fresh) is fresh
    assert_same_state(unwrap_model(fresh).state_dict(), bert.state_dict())


def compile_a_layer(model):
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0], backend="eager")
    return model


def mask_a_layer(model):
    torch.nn.utils.prune.l1_unstructured(model.bert.encoder.layer[0].output.dense, "weight", 0.5)
    return model


def call_it_quantized(model):
    model.hf_quantizer = object()  # what from_pretrained leaves there
    return model


BROKEN = {
    "compiled layer": (compile_a_layer, r"bert.encoder.layer.0 of .* is wrapped in OptimizedModule"),
    "torch prune": (mask_a_layer, r"layer.0.output.dense of .* prune.remove"),
    "quantizer": (call_it_quantized, "is quantized: load it without quantization"),
    "dynamic": (lambda m: torch.ao.quantization.quantize_dynamic(m), "no plain tensor: .*without quantization"),
    "sharded": (fully_shard, "holds torch.distributed.tensor.DTensor, no plain tensor: gather"),
    "flattened": (lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu")), "is spread over ranks"),
}


@pytest.mark.filterwarnings("ignore")  # of torch.ao and FSDP1, which are deprecated
@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN.keys())
def test_model_that_is_not_that_of_its_class_is_refused(change, message, bert, rank, tmp_path):
    if change is fully_shard:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        broken = change(bert, mesh=mesh)
    else:
        broken = change(bert)
    with pytest.raises(ValueError, match=message):
        save_sparse(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_are_refused(bert, tmp_path):
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="has PEFT adapters.*merge_and_unload"):
        save_sparse(peft.get_peft_model(bert, peft.LoraConfig(task_type="SEQ_CLS", r=2)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


MEMORY = """
import json, sys
from pathlib import Path
from mfac_hf.sparse.files import load_sparse

def peak():  # ru_maxrss would begin with the peak of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

load_sparse(sys.argv[2])  # a small one first: what the libraries need for themselves is no part of the figure
before = peak()
load_sparse(sys.argv[1])
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_dense_model_and_one_tensor(tmp_path):
    """The peak of a fresh process that loads 12 x 8 MiB (mapped file pages included) is below 13.5 x 8 MiB."""
    tensor_bytes, count = 1024 * 2048 * 4, 12
    torch.manual_seed(0)
    model = nn.ParameterList(nn.Parameter(torch.randn(1024, 2048)) for _ in range(count))
    with torch.no_grad():
        for parameter in model:
            parameter[torch.rand_like(parameter) < 0.5] = 0  # a file of half the size, so that mapping it would show
    save_sparse(model, tmp_path / "big")
    save_sparse(nn.Linear(300, 300), tmp_path / "small")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "big"), str(tmp_path / "small")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    # half a tensor of slack: the allocator rounds up and keeps freed pages for a while
    assert count * tensor_bytes < json.loads(result.stdout) < (count + 1.5) * tensor_bytes
