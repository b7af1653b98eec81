"""Classify image files, or an example of the test set, with a network trained by train.py."""

if __name__ == "__main__":
    import startup  # noqa: F401  must be first


import argparse
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nnce
from nnce import data
from nnce.data import pictures
from nnce.experiments import report, running
from nnce.experiments.command_line import ArgumentParser
from nnce.saving import write_whole

# Data set and image size by number of inputs, for network files that do not record them.
_USUAL = {64: ("digits", [8, 8]), 784: ("mnist", [28, 28])}
# Largest number of classes in a table, and smallest side of a --picture image in pixels.
_MOST, _SIDE = 10, 200


def parser() -> ArgumentParser:
    """Create the parser of the options."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("run", type=Path, help="run directory of train.py, or a network file")
    files = "PNG or JPEG file of any size, light on dark or dark on light"
    add("images", type=Path, nargs="*", metavar="IMAGE", help=files)
    add("--index", type=int, metavar="N", help="classify example N of the test set, from 0")
    add("--json", action="store_true", help="print JSON")
    inputs = "PNG file to write the network's inputs to"
    add("--picture", type=Path, metavar="FILE", help=inputs)
    folder = "data folder for --index (default: $NNCE_DATA, else data)"
    add("--data-dir", type=Path, help=folder)
    return parser


class Form(NamedTuple):
    """Data set, image size and class names of a network; see `nnce.data.Dataset.about`."""

    data: str
    image: list[int] | None
    classes: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Classify the images; return the exit status."""
    options_parser = parser()
    options = options_parser.parse_args(arguments)
    with options_parser.user_errors():
        if bool(options.images) == (options.index is not None):
            raise ValueError("expected either IMAGE files or --index N")
        network = load(options.run)
        form = form_of(network, options.run)
        named, x = read(options, form, network.linears()[0].weight.dtype)
        if x.shape[1] != network.sizes[0]:
            raise ValueError(
                f"expected {network.sizes[0]} inputs, got {x.shape[1]} from {form.data}"
            )
        with torch.no_grad():
            a = nnce.sigmoid(network(x))
        if options.picture:
            write_picture(options.picture, x, form)
    predictions = [
        {
            **of,
            "class": form.classes[int(activations.argmax())],
            "activations": dict(zip(form.classes, activations.tolist(), strict=True)),
        }
        for of, activations in zip(named, a, strict=True)
    ]
    print(json.dumps(predictions, indent=2) if options.json else as_text(predictions))
    return 0


def load(path: Path) -> nnce.MLP:
    """Load the network of a run directory or file."""
    if path.is_dir() and not (path / "network.pt").is_file():
        raise ValueError(f"expected a run directory of train.py with a network.pt, got {path}")
    return nnce.load(path / "network.pt" if path.is_dir() else path)


def form_of(network: nnce.MLP, path: Path) -> Form:
    """Data set, image size and classes, as recorded in the file, else guessed from the sizes."""
    inputs, *_, outputs = network.sizes
    usual, size = _USUAL.get(inputs, ("", None))
    by_sizes = {"data": usual, "image": size, "classes": list(map(str, range(outputs)))}
    about: dict[str, Any] = {**by_sizes, **network.about}
    image, classes = about["image"], about["classes"]
    is_size = isinstance(image, list) and [*map(type, image)] == [int, int] and min(image) > 0
    if (
        not isinstance(about["data"], str)
        or not (image is None or (is_size and math.prod(image) == inputs))
        or not (isinstance(classes, list) and len({*map(str, classes)}) == outputs)
    ):
        raise ValueError(f"{path} describes inputs or classes that do not match its sizes")
    return Form(about["data"], image, list(map(str, classes)))


def read(
    options: argparse.Namespace, form: Form, dtype: torch.dtype
) -> tuple[list[dict[str, str]], Tensor]:
    """Names of the images (for a test example also its class), and the network's inputs."""
    if options.index is None:
        if form.image is None:
            raise ValueError(f"{options.run} was not trained on images: use --index N")
        of = (form.data, form.image, dtype)
        inputs = torch.stack([pictures.inputs(path, *of) for path in options.images])
        return [{"image": str(path)} for path in options.images], inputs
    if not form.data:
        raise ValueError(f"{options.run} does not record its data set, which --index needs")
    dataset = data.load(form.data, data_dir=options.data_dir, dtype=dtype)
    (x, y), index = dataset.test, options.index
    if not 0 <= index < len(x):
        raise ValueError(
            f"expected --index from 0 to {len(x) - 1:,}, a test example of {form.data}, got "
            f"{index:,}"
        )
    target = dataset.about["classes"][int(y[index].argmax())]
    return [{"image": f"test example {index}", "target": target}], x[index : index + 1]


def write_picture(path: Path, inputs: Tensor, form: Form) -> None:
    """Write the inputs of the network side by side as PNG."""
    from PIL import Image

    if form.image is None:
        raise ValueError("--picture requires a network that was trained on images")
    scale = max(1, _SIDE // min(form.image))
    tiles = torch.cat([x.view(*form.image) for x in inputs], dim=1)
    gray = tiles.mul(255).round().byte().repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    file = io.BytesIO()
    Image.fromarray(gray.numpy()).save(file, format="PNG")
    write_whole(path, lambda whole: whole.write(file.getbuffer()))


def as_text(predictions: Sequence[Mapping[str, Any]]) -> str:
    """Format the class of each image, followed by tables of activations."""
    answers, tables = [], []
    for prediction in predictions:
        image, activations = prediction["image"], prediction["activations"]
        if "target" in prediction:
            image += f" (class {prediction['target']})"
        best = sorted(activations, key=activations.__getitem__, reverse=True)[:_MOST]
        answers.append(f"{image}: {best[0]} (activation {activations[best[0]]:.3f})")
        rows = [{"class": name, "activation": activations[name]} for name in best]
        tables.append(f"{image}\n\n{report.table(rows)}\n")
    return "\n".join([*answers, "", *tables]).rstrip()


if __name__ == "__main__":
    running.run_script(main)
