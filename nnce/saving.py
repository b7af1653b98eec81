"""Save and load a network; write files atomically.

Nothing in a network's file is executed when it is loaded. May import `modules`.
"""

import contextlib
import errno
import io
import itertools
import json
import os
import pickletools
import re
import secrets
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from nnce import _memory
from nnce._arguments import is_size
from nnce.modules import MLP

__all__ = ["load", "save"]

_FORMAT = "nnce.MLP 1"
# Python names that a network's file may contain: ordinary tensors and their containers.
_NAMES = re.compile(
    r"torch(\.storage)? \w+Storage|torch\._utils _rebuild_\w+|collections OrderedDict"
)


def save(network: MLP, path: str | os.PathLike[str]) -> None:
    """Save a network for `load`: its sizes, its parameters in their dtypes, and `about`.

    Saving is atomic: a temporary file in the same folder is written, then replaces the file, so if
    the process is killed, the previous file remains. A symbolic link is followed; an existing file
    keeps its mode.

    Args:
        network: an MLP.
        path: the file to write.

    Raises:
        TypeError: the network is not an MLP, or its `about` contains values that are not JSON
            serializable.
        ValueError: layers have been added to the MLP or removed, or its parameters are not exactly
            the weight and the bias of each layer, so that `load` could not restore them.
        OSError: the file cannot be written, or path is not a regular file.

    >>> path = tempfile.mkdtemp() + "/network.pt"
    >>> nnce.save(nnce.MLP((2, 3, 1)), path)
    >>> nnce.load(path).sizes
    (2, 3, 1)
    """
    if not isinstance(network, MLP):
        raise TypeError(f"expected an nnce.MLP, got {type(network).__name__}")
    network.linears()  # raises if layers were added or removed
    state = network.state_dict()
    _check_parameters(network.sizes, state)
    # Clones: a network of an ensemble is a view, and torch.save would write the whole ensemble.
    content = {
        "format": _FORMAT,
        "sizes": tuple(int(size) for size in network.sizes),
        "state_dict": {name: tensor.detach().cpu().clone() for name, tensor in state.items()},
    }
    if network.about:
        content["about"] = json.dumps(dict(network.about))
    # In memory first: on a full disk, torch.save would raise a RuntimeError instead of an OSError.
    file = io.BytesIO()
    torch.save(content, file)
    write_whole(Path(path), lambda whole: whole.write(file.getbuffer()))


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> MLP:
    """Load a network that `save` or `scripts/train.py` wrote, in the dtypes of the saved tensors.

    Only tensors and plain values are read; nothing in the file is executed. The sizes in the file
    are compared with its length before any memory is allocated.

    Args:
        path: the file to read.
        device: device of the network.

    Returns:
        The network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or is not a network that nnce saved.

    >>> path = tempfile.mkdtemp() + "/network.pt"
    >>> nnce.save(nnce.MLP((2, 3, 1)), path)
    >>> nnce.load(path)(torch.zeros(5, 2)).shape
    torch.Size([5, 1])
    """
    with Path(path).open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        try:
            # torch.save does not compress, so a compressed file was not written by it.
            with zipfile.ZipFile(file) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > length:
                    raise ValueError("its parts would be larger than the file")
                if archive.testzip() is not None:  # torch.load does not verify checksums
                    raise ValueError("a checksum in it is wrong")
                _check_names(archive)
            file.seek(0)
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of any type: the content of the file is arbitrary
            if _memory.shortage(error):
                raise
            raise ValueError(f"{path} is damaged or not a network that nnce saved") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a network that nnce saved")
    try:
        sizes, state = content["sizes"], content["state_dict"]
        # Before any other use, even in an error message: there may be millions, or nested ones.
        if len(state) != 2 * (len(sizes) - 1) or not all(map(is_size, sizes)):
            raise ValueError("its sizes do not match the number of its parameters")
        _check_parameters(sizes, state)
        if sum(tensor.numel() * tensor.itemsize for tensor in state.values()) > length:
            raise ValueError("its parameters would be larger than the file")
        # A new generator: loading must not advance PyTorch's global one.
        with torch.inference_mode(False):  # otherwise the network could not be differentiated
            network = MLP(sizes, generator=torch.Generator())
            # Each in its own dtype and its own memory: tensors in a file may share storage.
            clones = {name: tensor.clone() for name, tensor in state.items()}
            network.load_state_dict(clones, assign=True)
        if "about" in content:
            network.about = dict(json.loads(content["about"]))
    except Exception as error:  # of any type, as above
        if _memory.shortage(error):
            raise
        raise ValueError(f"{path} is damaged: its sizes and parameters do not match") from error
    return network.to(device)


def _check_parameters(sizes: Sequence[int], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless state has the dense parameters of an MLP of these sizes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        shapes |= {f"{2 * layer}.weight": (n_out, n_in), f"{2 * layer}.bias": (n_out,)}
    if state.keys() != shapes.keys():
        raise ValueError(
            f"expected the parameters of an MLP of sizes {tuple(sizes)}, {', '.join(shapes)}, got "
            f"{', '.join(state)}"
        )
    for name, shape in shapes.items():
        tensor = state[name]
        plain = type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_meta
        if not (plain and tensor.is_floating_point() and tensor.shape == shape):
            raise ValueError(
                f"expected {name} to be a plain floating-point tensor of shape {shape}, got "
                f"{type(tensor).__name__}, {tensor.dtype}, {tensor.layout}, on {tensor.device}, of "
                f"shape {tuple(tensor.shape)}"
            )


def _check_names(archive: zipfile.ZipFile) -> None:
    """Raise ValueError if the pickle contains names that a network's file does not need.

    `weights_only` executes no code from the file, but allows bytearray, of a terabyte if requested.
    """
    for entry in archive.namelist():
        if entry.endswith("data.pkl"):
            for operation, name, _ in pickletools.genops(archive.read(entry)):
                if operation.name in ("INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4") or (
                    operation.name == "GLOBAL" and not _NAMES.fullmatch(str(name))
                ):
                    raise ValueError(f"it contains the name {name or operation.name}")


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically, even if the power fails.

    A symbolic link is followed. An existing file keeps its mode and, if permitted, its owner. A
    file with several hard links is overwritten in place, after its complete new content has been
    written to `.unfinished-…` next to it, which is kept if overwriting fails.

    Raises:
        OSError: the file cannot be written, or `path` is not a regular file.
    """
    target = Path(os.path.realpath(path))
    # A random name, opened with "x": it fails if another process made a file or a link there.
    unfinished = target.with_name(f"{UNFINISHED}{secrets.token_hex(8)}")
    with _errors_name(path, instead_of=(unfinished, target)):
        before = _regular_file(target)
        linked = before is not None and before.st_nlink > 1
        file = unfinished.open("xb")
        try:
            with file:
                if before is not None:
                    _copy_owner_and_mode(before, unfinished)
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if not linked:
                os.replace(unfinished, target)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        if linked:
            _overwrite(target, unfinished)
        to_disk(target.parent)


@contextlib.contextmanager
def _errors_name(path: Path, instead_of: Sequence[Path]) -> Iterator[None]:
    """Replace the file name in an OSError by the caller's path."""
    try:
        yield
    except FileExistsError:  # the temporary file exists, in spite of its random name
        raise
    except OSError as error:
        if error.errno is None or error.filename not in (None, *map(str, instead_of)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _regular_file(path: Path) -> os.stat_result | None:
    """The status of a regular file, or None if it does not exist; OSError for anything else."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "expected a file to write, got a folder")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "expected a regular file, got a device, pipe or socket")
    return status


def _copy_owner_and_mode(status: os.stat_result, path: Path) -> None:
    if hasattr(os, "chown"):  # not on Windows
        with contextlib.suppress(OSError):  # only root may change owners
            os.chown(path, status.st_uid, status.st_gid)
    path.chmod(stat.S_IMODE(status.st_mode))


def _overwrite(target: Path, complete: Path) -> None:
    """Overwrite a file in place, so that its other hard links have the new content, too."""
    try:
        file = target.open("r+b")
    except OSError:
        complete.unlink()
        raise
    try:
        with file, complete.open("rb") as content:
            shutil.copyfileobj(content, file)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (complete content: {complete})") from error
    complete.unlink()


UNFINISHED = ".unfinished-"


def to_disk(path: Path) -> None:
    """Flush a file or folder to disk; does nothing on Windows."""
    if os.name != "posix":  # Windows cannot open folders
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
