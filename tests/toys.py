"""What several test files share: a row of a table, blank files of MNIST's, and measured errors."""

import functools

from nnce.data import Distortion
from nnce.experiments.proof import precision
from nnce.experiments.published import Row
from nnce.training import Settings
from nnce.training.schedules import Schedule

ROW = Row(
    "T1",
    Settings(
        hidden=(8,),
        epochs=2,
        init=0.05,
        schedule=Schedule("cosine", cosine_epochs=2),
        distortion=Distortion(rotation=5, alpha=3, sigma=1),
    ),
)
IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
N = {"train": 60_000, "t10k": 10_000}
FILES = [f"{half}-{kind}" for half in N for kind in (IMAGES, LABELS)]


def header(name, n=None, side=28):
    """The first bytes of a file of MNIST's."""
    n = N[name.split("-")[0]] if n is None else n
    numbers = [0x803, n, side, side] if IMAGES in name else [0x801, n]
    return b"".join(number.to_bytes(4, "big") for number in numbers)


def size_of(name):
    return len(header(name)) + N[name.split("-")[0]] * (784 if IMAGES in name else 1)


def write_blank(folder):
    """All of MNIST's files with blank images of one class, with holes for what is 0."""
    folder.mkdir(parents=True)
    for name in FILES:
        with (folder / name).open("wb") as file:
            file.write(header(name))
            file.truncate(size_of(name))


# precision.measure, which takes seconds, once for all tests of its results.
measured = functools.cache(precision.measure)
