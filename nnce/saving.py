"""Save and load a network; write any file whole or not at all.

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
# Names that a network's file may contain: tensors of the usual kinds, and their containers.
_NAMES = re.compile(
    r"torch(\.storage)? \w+Storage|torch\._utils _rebuild_\w+|collections OrderedDict"
)


def save(network: MLP, path: str | os.PathLike[str]) -> None:
    """Save a network, so that `load` gives it back: sizes, parameters in their dtypes, and `about`.

    The file appears whole or not at all: it is written to a temporary file in the same folder,
    which then replaces it, so a process that is killed leaves the previous file. A symbolic link
    stays, and its target is written; an existing file keeps its mode.

    Args:
        network: an MLP.
        path: the file to write.

    Raises:
        TypeError: the network is not an MLP, or its `about` has values that JSON does not have.
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
    network.linears()  # refuses an MLP that is one no more
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
    # In memory first: where the disk is full, torch.save raises a RuntimeError of its own.
    file = io.BytesIO()
    torch.save(content, file)
    write_whole(Path(path), lambda whole: whole.write(file.getbuffer()))


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> MLP:
    """Load a network that `save` or `scripts/train.py` wrote, in the dtypes it was saved with.

    Only tensors and plain values are read; nothing in the file is executed. The sizes that a file
    claims are compared with its length before any memory is allocated.

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
            # PyTorch compresses nothing, so a file that would unfold was not written by it.
            with zipfile.ZipFile(file) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > length:
                    raise ValueError("its parts would be larger than it is")
                if archive.testzip() is not None:  # torch.load looks at no checksum
                    raise ValueError("a checksum in it is wrong")
                _check_names(archive)
            file.seek(0)
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of any type: the content of a foreign file is arbitrary
            if _memory.shortage(error):
                raise
            raise ValueError(f"{path} is damaged or no network that nnce saved") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is no network that nnce saved")
    try:
        sizes, state = content["sizes"], content["state_dict"]
        # Before they are used, even in a sentence: they may be millions, or nested.
        if len(state) != 2 * (len(sizes) - 1) or not all(map(is_size, sizes)):
            raise ValueError("its sizes do not match the number of its parameters")
        _check_parameters(sizes, state)
        if sum(tensor.numel() * tensor.itemsize for tensor in state.values()) > length:
            raise ValueError("its parameters would be larger than it is")
        # A generator of its own: loading must not move PyTorch's global one.
        with torch.inference_mode(False):  # or the network could not be differentiated
            network = MLP(sizes, generator=torch.Generator())
            # Each in its own dtype and, whatever the file says, in memory of its own.
            clones = {name: tensor.clone() for name, tensor in state.items()}
            network.load_state_dict(clones, assign=True)
        if "about" in content:
            network.about = dict(json.loads(content["about"]))
    except Exception as error:  # as above: right in format, and anything else in it
        if _memory.shortage(error):
            raise
        raise ValueError(f"{path} is damaged: its sizes and parameters do not fit") from error
    return network.to(device)


def _check_parameters(sizes: Sequence[int], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the state is that of an MLP of these sizes, plainly stored."""
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
    """Raise ValueError where the pickle names more than a network needs.

    `weights_only` runs nothing foreign, but it knows bytearray: of a terabyte, if the file says so.
    """
    for entry in archive.namelist():
        if entry.endswith("data.pkl"):
            for operation, name, _ in pickletools.genops(archive.read(entry)):
                if operation.name in ("INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4") or (
                    operation.name == "GLOBAL" and not _NAMES.fullmatch(str(name))
                ):
                    raise ValueError(f"it names {name or operation.name}")


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that appears at `path` whole or not at all, even if power fails.

    A symbolic link stays, and its target is written. An existing file keeps its mode and, where
    that is permitted, its owner. One with several hard links is overwritten in place after its new
    content is complete in `.unfinished-…` next to it; should that fail, the latter stays.

    Raises:
        OSError: the file cannot be written, or `path` is not a regular file.
    """
    target = Path(os.path.realpath(path))
    # A name that no other process uses, and where none can have placed a link: "x" refuses both.
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
    """Let an OSError name the path that the caller gave."""
    try:
        yield
    except FileExistsError:  # the temporary file, in spite of its random name
        raise
    except OSError as error:
        if error.errno is None or error.filename not in (None, *map(str, instead_of)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _regular_file(path: Path) -> os.stat_result | None:
    """The status of a regular file, None if nothing is there; raise OSError for anything else."""
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
        with contextlib.suppress(OSError):  # only root may give files away
            os.chown(path, status.st_uid, status.st_gid)
    path.chmod(stat.S_IMODE(status.st_mode))


def _overwrite(target: Path, complete: Path) -> None:
    """Replace the content of a file, which its other hard links then show as well."""
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
    """Wait until a file or folder is on the disk."""
    if os.name != "posix":  # a folder cannot be opened elsewhere
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
