"""Files in MNIST's format."""

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
N = {"train": 60_000, "t10k": 10_000}
FILES = [f"{half}-{kind}" for half in N for kind in (IMAGES, LABELS)]


def header(name, n=None, side=28):
    """The first bytes of a file."""
    n = N[name.split("-")[0]] if n is None else n
    numbers = [0x803, n, side, side] if IMAGES in name else [0x801, n]
    return b"".join(number.to_bytes(4, "big") for number in numbers)


def size_of(name):
    return len(header(name)) + N[name.split("-")[0]] * (784 if IMAGES in name else 1)


def write_blank(raw):
    """Write blank images of one class to a new folder: files with holes, which take no space."""
    raw.mkdir(parents=True)
    for name in FILES:
        with (raw / name).open("wb") as file:
            file.write(header(name))
            file.truncate(size_of(name))
