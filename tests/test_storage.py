"""Files are whole or absent, and damaged ones are refused by name."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch

from mfac_hf.storage import (
    load_tensors,
    read_json,
    read_yaml,
    save_safetensors,
    save_tensors,
    write_json,
    write_text,
    written_aside,
    written_directory,
)

BIG = torch.arange(100_000)
WRITERS = {
    "text": lambda path: write_text(path, "x" * 400_000),
    "json": lambda path: write_json(path, ["x" * 400_000]),
    "safetensors": lambda path: save_safetensors(path, {"x": BIG}),
    "tensors": lambda path: save_tensors(path, {"x": BIG}),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_is_replaced_whole(writer, tmp_path):
    path = tmp_path / "new" / "file"
    WRITERS[writer](path)
    first = path.read_bytes()
    path.write_bytes(b"older")
    WRITERS[writer](path)
    assert path.read_bytes() == first
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_file_before_and_names_it(writer, tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    program = f"""
import resource, signal
from tests.test_storage import WRITERS
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    WRITERS[{writer!r}]({str(path)!r})
except OSError as error:
    print("OSError", error)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.startswith("OSError") and str(path) in said and ".unfinished" not in said
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("there_before", [False, True])
def test_an_error_in_the_block_leaves_everything_as_it_was(there_before, tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    if there_before:
        file.write_text("before")
        folder.mkdir()
        (folder / "other").write_text("before")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyError), written_aside(file) as unfinished:
        unfinished.write_text("half")
        raise KeyError
    with pytest.raises(KeyError), written_directory(folder) as unfinished:
        (unfinished / "a").write_text("half")
        raise KeyError
    assert sorted(tmp_path.rglob("*")) == before
    assert not there_before or file.read_text() == (folder / "other").read_text() == "before"


def test_a_directory_keeps_its_other_files(tmp_path):
    folder = tmp_path / "folder"
    for text in ("first", "second"):
        with written_directory(folder) as unfinished:
            (unfinished / "sub").mkdir()
            (unfinished / "sub" / "a").write_text(text)
        (folder / "other").write_text("kept")
    assert (folder / "sub" / "a").read_text() == "second"
    assert (folder / "other").read_text() == "kept"
    assert os.listdir(tmp_path) == ["folder"]


def test_errors_of_other_files_keep_their_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"), written_aside(tmp_path / "file"):
        open(tmp_path / "missing")
    with pytest.raises(RuntimeError, match="of another kind"), written_aside(tmp_path / "file"):
        raise RuntimeError("of another kind")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_named(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is no JSON file"):
        read_json(tmp_path / "a.json")


def test_json_comes_back(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, 0.1, None, "ü"]})
    assert (
        read_json(tmp_path / "a.json") == json.loads((tmp_path / "a.json").read_text()) == {"a": [1, 0.1, None, "ü"]}
    )
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")


def test_every_flipped_bit_of_a_state_is_found(tmp_path):
    path = tmp_path / "state.pt"
    save_tensors(path, {"x": torch.arange(64.0), "n": 3})
    whole = path.read_bytes()
    state = load_tensors(path)
    assert torch.equal(state["x"], torch.arange(64.0)) and state["n"] == 3
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(len(whole), (200,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            state = load_tensors(path)
        except ValueError as error:
            assert "state.pt" in str(error)
        else:  # a bit of padding, or of a date
            assert torch.equal(state["x"], torch.arange(64.0)) and state["n"] == 3


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no archive"])
def test_what_torch_did_not_save_is_refused(content, tmp_path):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.pt is damaged"):
        load_tensors(tmp_path / "state.pt")


@pytest.mark.parametrize("form", ["before torch 1.6", "an archive's end in it", "no checksums"])
def test_files_without_checksums_load(form, tmp_path):
    path, state = tmp_path / "state.pt", {"x": torch.arange(64.0)}
    if form == "an archive's end in it":
        state["x"][-1:].view(torch.uint8)[:] = torch.tensor(list(b"PK\x05\x06"), dtype=torch.uint8)
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(form != "no checksums")
    try:
        torch.save(state, path, _use_new_zipfile_serialization=form == "no checksums")
    finally:
        torch.serialization.set_crc32_options(computed)
    assert torch.equal(load_tensors(path)["x"], state["x"])


def test_code_in_a_state_does_not_run(tmp_path):
    torch.save({"x": resource.getrusage}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="more than tensors"):
        load_tensors(tmp_path / "state.pt")


@pytest.mark.slow
def test_yaml_is_read_or_refused_by_name(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("a: [1, 2.5, yes, null]\n")
    assert read_yaml(path) == {"a": [1, 2.5, True, None]}
    for text in (b"a: [1", b"a: !!python/object:os.system x", b"\xff\xfe\x00", b"{[1]: 2}", b"[" * 5000):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"file.yaml is no YAML file, or a damaged one: "):
            read_yaml(path)


def test_a_directory_without_a_name_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with written_directory(".") as folder:
        (folder / "x").write_text("1")
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [Exception("File too large (os error 27)"), RuntimeError("iostream error")])
def test_libraries_that_find_the_disk_full_are_understood(error, tmp_path):
    """The tokenizers' own code raises no narrower error than Exception."""
    with pytest.raises(OSError, match="out could not be written: "), written_directory(tmp_path / "out"):
        raise error
    with pytest.raises(Exception, match="^something else$"), written_directory(tmp_path / "out"):
        raise Exception("something else")
    assert os.listdir(tmp_path) == []
