"""Files that are whole or absent: written under another name, synced to the disk, then renamed.

A run that is killed, or finds the disk full, leaves the file that was there before. Readers check what they read
before they use it, and name the file in every error.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "load_tensors",
    "read_json",
    "read_yaml",
    "save_safetensors",
    "save_tensors",
    "sync_directory",
    "sync_tree",
    "write_json",
    "write_text",
    "written_aside",
    "written_directory",
]

StrPath = str | os.PathLike[str]
# First bytes of a zip archive, the format of torch.save.
_ZIP_START = b"PK\x03\x04"
# Ends the name of a file that is not finished.
_MARK = ".unfinished"
# How safetensors, torch.save and tokenizers say that the system refused to write.
_WRITE_FAILURES = ("I/O error", "IoError", "PytorchStreamWriter", "iostream error", "unexpected pos", "(os error ")


@contextmanager
def written_aside(path: StrPath) -> Iterator[Path]:
    """Give a file name beside ``path`` to write to; at the end of the block the file takes the name ``path``.

    The folder is made if it is missing. What the block wrote is on the disk before it takes the name, and the name
    before this returns. Where the block raises, ``path`` stays as it was and nothing is left beside it.

    Raises:
        OSError: the file cannot be written; the error names ``path``.
    """
    path = Path(path)
    # The name holds the process, so that two programs that write the same file do not write into each other's.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{_MARK}")
    try:
        with _named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield unfinished
            _sync(unfinished)
            os.replace(unfinished, path)
            sync_directory(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def written_directory(path: StrPath) -> Iterator[Path]:
    """Give an empty folder beside ``path`` to write to; its files move into ``path`` when the block ends.

    Files of the same names in ``path`` are replaced one by one, others stay. Where the block raises, ``path`` stays as
    it was (absent, if it was absent) and nothing is left beside it.

    Raises:
        OSError: a file cannot be written; the error names ``path``.
    """
    path = Path(path)
    whole = Path(os.path.abspath(path))  # "." has no name
    unfinished = whole.with_name(f".{whole.name}.{os.getpid()}{_MARK}")
    try:
        with _named(path):
            whole.parent.mkdir(parents=True, exist_ok=True)
            unfinished.mkdir()
            yield unfinished
            files = [file for file in sorted(unfinished.rglob("*")) if file.is_file()]
            for file in files:
                _sync(file)
            if path.exists():
                for file in files:
                    target = path / file.relative_to(unfinished)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, target)
                sync_directory(path)
            else:
                sync_directory(unfinished)
                os.replace(unfinished, path)
                sync_directory(path.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sync_tree(folder: StrPath) -> None:
    """Write all files below a folder, and their names, to the disk.

    Raises:
        OSError: the disk does not take them.
    """
    for path in sorted(Path(folder).rglob("*"), reverse=True):  # what a folder holds before its own name
        if path.is_dir():
            sync_directory(path)
        elif path.is_file():
            _sync(path)
    sync_directory(folder)
    sync_directory(Path(folder).parent)


def write_text(path: StrPath, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all (`written_aside`)."""
    with written_aside(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: StrPath, value: Any, *, indent: int = 2) -> None:
    """Write a JSON file, whole or not at all (`written_aside`).

    Raises:
        TypeError: the value holds what JSON has no form for.
        OSError: the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=indent) + "\n")


def save_safetensors(path: StrPath, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all (`written_aside`).

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save_file

    with written_aside(path) as unfinished:
        save_file(dict(tensors), unfinished, metadata=metadata)


def save_tensors(path: StrPath, state: Mapping[str, Any]) -> None:
    """Write plain values and tensors for `load_tensors`, whole or not at all (`written_aside`).

    Raises:
        OSError: the file cannot be written.
    """
    import torch

    # Into an open file: given a name, torch.save writes that name into the file.
    with written_aside(path) as unfinished, open(unfinished, "wb") as file:
        torch.save(dict(state), file)


def read_json(path: StrPath) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON in UTF-8, or nested too deeply; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file, or a damaged one: {error}") from error


def read_yaml(path: StrPath) -> Any:
    """Read a YAML file of plain values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML in UTF-8, holds other objects, or is nested too deeply; the message names the file.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML file, or a damaged one: {' '.join(str(error).split())}") from error


def load_tensors(path: StrPath) -> Any:
    """Read what ``torch.save`` wrote: plain values and tensors, on the CPU, without running code.

    The checksums of the archive are compared first: ``torch.load`` reads past a bit that has flipped. The format of
    torch before 1.6, and files saved with ``torch.serialization.set_crc32_options(False)``, have none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds other objects; the message names it.
    """
    import torch  # here and below: the command line imports this before torch

    try:
        with open(path, "rb") as file:
            # As torch tells the formats apart. zipfile.is_zipfile looks at the end, where another may have anything.
            if file.read(4) == _ZIP_START:
                _compare_checksums(file)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # which one is left to chance where bytes are
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged, or holds more than tensors and plain values: {reason}") from error


def _compare_checksums(file: IO[bytes]) -> None:
    with zipfile.ZipFile(file) as archive:
        if any(part.CRC for part in archive.infolist()) and (name := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of its part {name} does not fit")


def sync_directory(folder: StrPath) -> None:
    """Write the names in a folder to the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(file: Path) -> None:
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Make whatever says that a file cannot be written an OSError that names the file that was asked for."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and _MARK not in str(error.filename)):
            raise  # of another file, or of no file
        raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from error
    except Exception as error:  # tokenizers raise no narrower one
        if not any(words in str(error) for words in _WRITE_FAILURES):
            raise
        raise OSError(f"{path} could not be written: {str(error).splitlines()[0]}") from error
