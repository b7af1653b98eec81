"""Save a trained network to a file, and load it again."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nnce.modules import MLP

_FORMAT = "nnce.MLP 1"


def save(network: MLP, path: str | os.PathLike[str]) -> None:
    """Save a network, so that `load` gives it back: sizes, dtype and parameters.

    The file appears whole or not at all: it is written beside its place and moved there, so a plug
    pulled half-way leaves the one before it.

    Raises:
        TypeError: the network is no MLP.
        ValueError: layers have been added to the MLP or taken out.
        OSError: the file cannot be written.
    """
    if not isinstance(network, MLP):
        raise TypeError(f"expected an nnce.MLP, got {type(network).__name__}")
    network.linears()  # refuses an MLP that is one no more
    # Clones: a network of an ensemble is a view, and torch.save would write the whole ensemble.
    content = {
        "format": _FORMAT,
        "sizes": network.sizes,
        "state_dict": {
            name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()
        },
    }
    write_whole(Path(path), lambda file: torch.save(content, file))


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> MLP:
    """Load a network that `save` or `scripts/train.py` wrote, in the dtype it was saved with.

    Only tensors and plain values are read; nothing in the file is executed.

    Args:
        path: the file.
        device: where to put the network.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds something else.
    """
    with Path(path).open("rb") as file:
        try:
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of many types: what a foreign file gives is left to chance
            raise ValueError(f"{path} is damaged or no network that nnce saved") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is no network that nnce saved")
    try:
        state = content["state_dict"]
        # A generator of its own: loading must not move PyTorch's global one.
        network = MLP(
            content["sizes"], generator=torch.Generator(), dtype=next(iter(state.values())).dtype
        )
        network.load_state_dict(state)
    except Exception as error:  # as above: right in format, and anything else in it
        raise ValueError(f"{path} is damaged: its sizes and parameters do not fit") from error
    return network.to(device)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that appears at `path` whole or not at all.

    Raises:
        OSError: the file cannot be written; nothing of it is left then.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file to write")
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            write(file)
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()
