"""Checkpoint files: a header line with a checksum, then data in safetensors format.

    nnce checkpoint 2 SHA-256 LENGTH

The checksum covers every byte of the file except the checksum itself. It is verified before
anything is parsed, and nothing in the file is executed.
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
    """The file is not a checkpoint, is damaged, or does not match the run."""


class Found(NamedTuple):
    """The newest readable checkpoint in a folder."""

    path: Path
    content: dict[str, Any]
    """The saved state."""
    damaged: list[str]
    """Error messages of newer checkpoints, all of which are unreadable."""


_MAGIC = b"nnce checkpoint "
_VERSION = b"2"
_HEADER = len(_MAGIC) + len(_VERSION) + len(f" {0:064} {0:020}\n")
_CHUNK = 2**20
_CHECKPOINT = re.compile(r"checkpoint-(\d{6,})")
# The newest, and its predecessor in case the newest becomes unreadable.
_KEPT = 2


def write_checkpoint(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write a checkpoint to a folder, then delete all older ones except the previous one.

    The data are written to a temporary file, flushed to disk, renamed and read back before any
    older checkpoint is deleted.

    Args:
        folder: the folder of the run's checkpoints.
        content: tensors and JSON values (numbers, strings, None), in nested dicts and lists.

    Raises:
        OSError: the file cannot be written, or reads back differently. Existing checkpoints are
            kept.
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
        raise OSError(f"{error}: it was just written, so the disk may be failing") from error
    for old in older[: 1 - _KEPT]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(old)
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the content that `write_checkpoint` wrote. Nothing in the file is executed.

    Raises:
        CheckpointError: the file is empty, cut off, too long, damaged, not a checkpoint, or in a
            format that this version does not support.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        _verify(file, path)
        data = file.read()
    try:
        return _unpack(data)
    except Exception as error:  # of any type: a matching checksum does not make the content valid
        if _memory.shortage(error) or isinstance(error, ModuleNotFoundError):
            raise
        raise CheckpointError(f"{path} is not a checkpoint that nnce wrote") from error


def latest_checkpoint(folder: Path) -> Found | None:
    """Read the newest readable checkpoint in a folder; return None if there are no checkpoints.

    Raises:
        CheckpointError: the folder has checkpoints, but none can be read.
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
    """Delete partial files left by a killed process."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        leftover.unlink(missing_ok=True)


def _checkpoints(folder: Path) -> list[Path]:
    """The paths of a folder's checkpoints, oldest first."""
    found = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _verify(file: BinaryIO, path: Path) -> None:
    """Raise CheckpointError unless every byte is intact; leave the file positioned at its data."""
    header = file.read(_HEADER)
    if not header:
        raise CheckpointError(f"{path} is empty")
    if not header.startswith(_MAGIC):
        raise CheckpointError(f"{path} is not a checkpoint that nnce wrote")
    version = header[len(_MAGIC) :].partition(b" ")[0]
    if version != _VERSION and len(header) == _HEADER and version.isdigit():
        raise CheckpointError(
            f"{path} is in checkpoint format {version.decode()}, but this version of nnce reads "
            f"format {_VERSION.decode()}: it was written by a different version, or is damaged"
        )
    matched = re.fullmatch(rb"2 ([0-9a-f]{64})( (\d{20})\n)", header[len(_MAGIC) :])
    if matched is None:
        cut = len(header) < _HEADER
        raise CheckpointError(f"{path} is {'cut off' if cut else 'damaged'} in its first line")
    expected, length = matched[1].decode(), int(matched[3])
    there = os.fstat(file.fileno()).st_size - _HEADER
    if there != length:
        raise CheckpointError(
            f"{path} is {'cut off' if there < length else 'too long'}: expected {length:,} bytes "
            f"of data, got {there:,}"
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
    """Serialize as safetensors: tensors named by their path in the content, the rest as JSON."""
    tensors: dict[str, Tensor] = {}

    def without(value: object, place: str) -> object:
        if isinstance(value, Tensor):
            # A clone: a network of an ensemble is a view, and safetensors rejects views.
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
        raise ValueError(f"expected a dict, got {type(content).__name__}")
    return content


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ModuleNotFoundError(
            "checkpoints need safetensors: pip install 'nnce[scripts]'"
        ) from error
    return safetensors.torch
