"""Save a trained network to a file, and load it again."""

import io
import itertools
import os
import secrets
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from nnce import memory
from nnce.modules import MLP, is_size

_FORMAT = "nnce.MLP 1"


def save(network: MLP, path: str | os.PathLike[str]) -> None:
    """Save a network, so that `load` gives it back: sizes and parameters, each in its dtype.

    The file appears whole or not at all: it is written beside its place and moved there, so a
    process that is killed half-way leaves the one before it.

    Raises:
        TypeError: the network is no MLP.
        ValueError: layers have been added to the MLP or taken out, or its parameters are not the
            weight and the bias of each layer and nothing else: `load` would not know them.
        OSError: the file cannot be written.
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
    # In memory first: where the disk is full, torch.save raises a RuntimeError of its own.
    file = io.BytesIO()
    torch.save(content, file)
    write_whole(Path(path), lambda whole: whole.write(file.getbuffer()))


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> MLP:
    """Load a network that `save` or `scripts/train.py` wrote, in the dtypes it was saved with.

    Only tensors and plain values are read; nothing in the file is executed. What a file claims is
    held against how large it is before anything is made of it.

    Args:
        path: the file.
        device: where to put the network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds something else.
    """
    with Path(path).open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        try:
            # PyTorch compresses nothing, so a file that would unfold is none of its own.
            with zipfile.ZipFile(file) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > length:
                    raise ValueError("its parts would be larger than it is")
                if archive.testzip() is not None:  # torch.load looks at no checksum
                    raise ValueError("a checksum in it is wrong")
            file.seek(0)
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of many types: what a foreign file gives is left to chance
            if memory.shortage(error):
                raise
            raise ValueError(f"{path} is damaged or no network that nnce saved") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is no network that nnce saved")
    try:
        sizes, state = content["sizes"], content["state_dict"]
        # Before anything is made of them, be it a sentence: they may be millions, or nested.
        if len(state) != 2 * (len(sizes) - 1) or not all(map(is_size, sizes)):
            raise ValueError("its sizes are none of an MLP with so many parameters")
        _check_parameters(sizes, state)
        if sum(tensor.numel() * tensor.itemsize for tensor in state.values()) > length:
            raise ValueError("its parameters would be larger than it is")
        # A generator of its own: loading must not move PyTorch's global one.
        with torch.inference_mode(False):  # or the network could not be differentiated
            network = MLP(sizes, generator=torch.Generator())
            # Each in its own dtype and, whatever the file says, in memory of its own.
            clones = {name: tensor.clone() for name, tensor in state.items()}
            network.load_state_dict(clones, assign=True)
    except Exception as error:  # as above: right in format, and anything else in it
        if memory.shortage(error):
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


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that appears at `path` whole or not at all.

    Raises:
        OSError: the file cannot be written; nothing of it is left then.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file to write")
    # A name that nobody else uses, nor can have laid a link at: "x" refuses what is there.
    unfinished = path.with_name(f".unfinished-{secrets.token_hex(8)}")
    file = unfinished.open("xb")
    try:
        with file:
            write(file)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
