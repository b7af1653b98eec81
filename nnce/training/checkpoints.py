"""Checkpoints of a run: a line of text with a checksum, and a file in safetensors' format.

    nnce checkpoint 2 SHA-256 LENGTH

The checksum is of all bytes of the file except itself. It is verified before anything is parsed,
and nothing that is parsed is executed.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from nnce import _memory
from nnce.saving import UNFINISHED, write_whole


class CheckpointError(ValueError):
    """A file that is no checkpoint, or one that is damaged or does not fit."""


class Found(NamedTuple):
    """The newest good checkpoint of a folder."""

    path: Path
    content: dict[str, Any]
    """The state that was saved."""
    damaged: list[str]
    """A sentence for each newer one that is not good."""


_MAGIC = b"nnce checkpoint "
_VERSION = b"2"
_HEADER = len(_MAGIC) + len(_VERSION) + len(f" {0:064} {0:020}\n")
_CHUNK = 2**20
_CHECKPOINT = re.compile(r"checkpoint-(\d{6,})")
# The newest, and the one before it, should the newest not be readable any more.
_KEPT = 2


def write_checkpoint(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write a checkpoint into a folder, and remove all older ones but the previous one.

    To a temporary file, flushed to disk, renamed, read back; only then an older one goes.

    Args:
        folder: where they are.
        content: tensors and what JSON has (numbers, strings, None), in dicts by name and lists.

    Raises:
        OSError: it cannot be written, or does not read back as it was written; what was there
            before is there still.
    """
    data = _pack(content)
    length = b" %020d\n" % len(data)
    digest = hashlib.sha256(_MAGIC + _VERSION + length)
    digest.update(data)
    older = _checkpoints(folder)
    number = _number(older[-1]) + 1 if older else 1
    path = folder / f"checkpoint-{number:06}"

    def write(file: BinaryIO) -> None:
        file.write(_MAGIC + _VERSION + b" " + digest.hexdigest().encode() + length)
        file.write(data)

    write_whole(path, write)
    try:
        with path.open("rb") as file:
            _verify(file, path)
    except CheckpointError as error:
        path.unlink()
        raise OSError(f"{error}: it was just written, and does not read back") from error
    for old in older[: 1 - _KEPT]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(old)
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote. Nothing in the file is executed.

    Raises:
        CheckpointError: the file is empty, cut off, too long, damaged, no checkpoint, or written in
            a format that this version does not know.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        _verify(file, path)
        data = file.read()
    try:
        return _unpack(data)
    except Exception as error:  # of many types: its checksum is right, and anything else in it
        if _memory.shortage(error) or isinstance(error, ModuleNotFoundError):
            raise
        raise CheckpointError(f"{path} is no checkpoint that nnce wrote") from error


def latest_checkpoint(folder: Path) -> Found | None:
    """The newest checkpoint in a folder that can be read; None if the folder has no checkpoint.

    Raises:
        CheckpointError: there are some, and none is good.
    """
    damaged: list[str] = []
    for path in reversed(_checkpoints(folder)):
        try:
            return Found(path, read_checkpoint(path), damaged)
        except CheckpointError as error:
            damaged.append(str(error))
        except OSError as error:
            damaged.append(f"{path} cannot be read: {error.strerror or error}")
    if damaged:
        raise CheckpointError("; ".join(damaged))
    return None


def clear_unfinished(folder: Path) -> None:
    """Delete files that a killed process had begun to write."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        leftover.unlink(missing_ok=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    found = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _verify(file: BinaryIO, path: Path) -> None:
    """Raise CheckpointError unless every byte is as it was written; leaves the file at its data."""
    header = file.read(_HEADER)
    if not header:
        raise CheckpointError(f"{path} is empty")
    if not header.startswith(_MAGIC):
        raise CheckpointError(f"{path} is no checkpoint of nnce's")
    version = header[len(_MAGIC) :].partition(b" ")[0]
    if version != _VERSION and len(header) == _HEADER and version.isdigit():
        raise CheckpointError(
            f"{path} is in format {version.decode()}, and this nnce reads format "
            f"{_VERSION.decode()}: it was damaged, or written by another version"
        )
    matched = re.fullmatch(rb"2 ([0-9a-f]{64})( (\d{20})\n)", header[len(_MAGIC) :])
    if matched is None:
        cut = len(header) < _HEADER
        raise CheckpointError(f"{path} is {'cut off' if cut else 'damaged'}, in its first line")
    expected, length = matched[1].decode(), int(matched[3])
    there = os.fstat(file.fileno()).st_size - _HEADER
    if there != length:
        raise CheckpointError(
            f"{path} is {'cut off' if there < length else 'too long'}: {there:,} bytes are there "
            f"where {length:,} were written"
        )
    digest = hashlib.sha256(_MAGIC + _VERSION + matched[2])
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    if digest.hexdigest() != expected:
        raise CheckpointError(f"{path} is damaged: its checksum is wrong")
    file.seek(_HEADER)


_JSON = "json"
_TENSOR = "tensor in this file"


def _pack(content: Mapping[str, Any]) -> bytes:
    """As safetensors: each tensor by its place in the content, and the rest as JSON."""
    tensors: dict[str, Tensor] = {}

    def without(value: object, place: str) -> object:
        if isinstance(value, Tensor):
            # A clone: a network of an ensemble is a view, and safetensors takes none.
            tensors[place] = value.detach().cpu().contiguous().clone()
            return {_TENSOR: place}
        if isinstance(value, Mapping):
            return {key: without(item, f"{place}/{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [without(item, f"{place}/{number}") for number, item in enumerate(value)]
        return value

    rest = json.dumps(without(content, "")).encode()
    tensors[_JSON] = torch.frombuffer(bytearray(rest), dtype=torch.uint8)
    return _safetensors().save(tensors)  # type: ignore[no-any-return]


def _unpack(data: bytes) -> dict[str, Any]:
    tensors = _safetensors().load(data)

    def within(value: object) -> object:
        if isinstance(value, dict) and value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        if isinstance(value, dict):
            return {key: within(item) for key, item in value.items()}
        if isinstance(value, list):
            return [within(item) for item in value]
        return value

    content = within(json.loads(tensors.pop(_JSON).numpy().tobytes()))
    if not isinstance(content, dict):
        raise ValueError("expected values by name")
    return content


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ModuleNotFoundError(
            "checkpoints need safetensors: pip install 'nnce[scripts]'"
        ) from error
    return safetensors.torch
