"""Files for other engines compute what the model computes, keep its zeros, and are refused where they cannot."""

import json

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from mfac_hf import cli
from mfac_hf.export import export_model, load_exported
from mfac_hf.export import model as exporting
from mfac_hf.models import create_model
from mfac_hf.tasks.toy import toy_tokenizer


def needs(export_format):
    for package in exporting.PACKAGES[export_format]:
        pytest.importorskip(package, reason=f"pip install 'mfac_hf[{export_format}]'")


def tiny_decoder():
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2, **ends))


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("export_format", ["onnx", "openvino"])
def test_a_pruned_encoder_is_exported_by_the_command(bert, export_format, int8, capsys, tmp_path):
    needs(export_format)
    bert.save_pretrained(tmp_path / "model")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    flags = ["--format", export_format, *(["--int8"] if int8 else [])]
    assert cli.main(["export", str(tmp_path / "model"), "--output", str(tmp_path / "out"), *flags]) == 0
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    zeros = sum(int((p == 0).sum()) for p in bert.parameters() if p.ndim > 1)
    assert report["zeros"] == zeros and report["zeros_exported"] >= zeros > 0
    assert f"{zeros:,}" in capsys.readouterr().out
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(toy_tokenizer())
    engine = load_exported(tmp_path / "out", threads=1)
    ids = torch.randint(bert.config.vocab_size, (4, 7), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(7) < torch.tensor([7, 3, 5, 1]).unsqueeze(1)).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        expected = bert.eval()(**inputs).logits
    found = engine({name: inputs[name] for name in report["inputs"]})["logits"]
    # 8 bits of a weight: a relative error of 1/254 at most in each, less in a sum.
    tolerance = 0.05 if int8 else 1e-4
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
    if int8:
        whole = export_model(bert, tmp_path / "float32", export_format=export_format)
        assert sum(report["files"].values()) < sum(whole["files"].values())


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_decoder, lambda: create_model("resnet20", num_classes=10)])
def test_decoders_and_images(make, tmp_path):
    needs("onnx")
    model = make().train()
    report = export_model(model, tmp_path / "out")
    assert report["largest_difference"] <= 1e-4 and report["outputs"] == ["logits"]
    assert model.training  # as it was
    assert (tmp_path / "out" / "config.json").exists() == hasattr(model, "config")


@pytest.mark.slow
def test_weights_that_lie_beside_the_file_of_a_large_model_are_rounded(tmp_path, monkeypatch):
    needs("onnx")
    import onnx

    write = exporting._write_onnx

    def write_beside(model, inputs, path, **options):
        outputs = write(model, inputs, path, **options)
        beside = {"save_as_external_data": True, "location": f"{path.name}.data", "size_threshold": 1024}
        onnx.save(onnx.load(path), path, **beside)
        return outputs

    monkeypatch.setattr(exporting, "_write_onnx", write_beside)
    assert "model.onnx.data" in export_model(tiny_decoder(), tmp_path / "whole")["files"]
    report = export_model(tiny_decoder(), tmp_path / "rounded", int8=True)
    assert [name for name in report["files"] if "onnx" in name] == ["model.onnx"]
    assert report["largest_difference"] <= 0.05
    # 7 bits: processors without VNNI cut off sums of larger products. Others would not show it.
    constants = onnx.load(tmp_path / "rounded" / "model.onnx").graph.initializer
    weights = [
        onnx.numpy_helper.to_array(c) for c in constants if c.data_type == onnx.TensorProto.INT8 and len(c.dims) > 1
    ]
    assert weights and all(abs(q.astype(int)).max() <= 64 for q in weights)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(bert, tmp_path, monkeypatch):
    sizes = dict(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20)
    with pytest.raises(ValueError, match="tensorflow.*onnx, openvino"):
        export_model(bert, tmp_path / "out", export_format="tensorflow")
    monkeypatch.setattr(exporting, "_require", lambda export_format: None)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration.*optimum"):
        export_model(T5ForConditionalGeneration(T5Config(**sizes)), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="mfac export"):
        load_exported(tmp_path)


def test_a_missing_package_is_named(bert, tmp_path, monkeypatch):
    monkeypatch.setitem(exporting.PACKAGES, "onnx", ("onnx", "no_such_package"))
    with pytest.raises(ImportError, match=r"no_such_package.*pip install 'mfac_hf\[onnx\]'"):
        export_model(bert, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_kept(bert, tmp_path, monkeypatch):
    needs("onnx")
    monkeypatch.setattr(exporting, "_compare", lambda *args: float("nan"))
    with pytest.raises(RuntimeError, match="other outputs"):
        export_model(bert, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(exporting, "_compare", lambda *args: 0.0)
    monkeypatch.setattr(exporting, "_stored_matrices", lambda path: [])
    with pytest.raises(RuntimeError, match="zero weights"):
        export_model(bert, tmp_path / "out")
    assert not list(tmp_path.iterdir())
