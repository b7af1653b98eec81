"""Data files that are damaged, each refused by its name."""

import gzip
import os
import random
import shutil

import killed
import pytest
import torch
from toys import FILES, IMAGES, N, header, size_of, write_blank

from nnce import data


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Blank images of one class: files in order, with holes for what is 0."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    write_blank(raw)
    return raw


def damages(name, chance):
    """Random ways to damage a file: a name, and a function of its path."""
    begin, size = header(name), size_of(name)

    def change(offset, content):
        def spoil(path):
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(content)

        return spoil

    def replace(content):
        return lambda path: path.write_bytes(content)

    def folder(path):
        path.unlink()
        path.mkdir()

    byte = chance.randrange(4)
    wrong = bytes([begin[byte] ^ (1 << chance.randrange(8))])
    yield "magic", change(byte, wrong)
    number = chance.choice([0, 1, 59_999, 9_999, 60_001, 2**31, 2**32 - 1])
    yield "count", change(4, number.to_bytes(4, "big"))
    yield "cut in its header", lambda path: os.truncate(path, chance.randrange(len(begin)))
    yield "cut in its data", lambda path: os.truncate(path, chance.randrange(len(begin), size))
    yield "too long", lambda path: os.truncate(path, size + chance.randrange(1, 1000))
    yield "gzip", replace(gzip.compress(begin + bytes(100)))
    yield "gzip garbage", replace(b"\x1f\x8b" + chance.randbytes(500))
    yield "random", replace(chance.randbytes(chance.randrange(1, 2000)))
    yield "empty", replace(b"")
    yield "a folder", folder
    if IMAGES in name:
        yield "width", change(12, chance.choice([0, 27, 29, 2**31]).to_bytes(4, "big"))
        half = name.split("-")[0]
        side = 14  # in order, and of another size
        yield "small images", replace(header(name, side=side) + bytes(N[half] * side**2))
    else:
        place = len(begin) + chance.randrange(N[name.split("-")[0]])
        yield "label", change(place, bytes([chance.randrange(10, 256)]))
        yield "images", replace(header(FILES[0]))


@pytest.mark.parametrize(
    "rounds", [1, pytest.param(9, marks=pytest.mark.exhaustive, id="exhaustive")]
)
def test_damaged_files_are_refused_by_name(rounds, good, tmp_path, record_property):
    """Of a round one damage of each kind; nine have more than a hundred, in every file."""
    chance = random.Random(0)
    raw = tmp_path / "MNIST" / "raw"
    trials, kinds = 0, set()
    for number in range(rounds):
        for kind, _ in [*damages(FILES[0], chance), *damages(FILES[1], chance)]:
            # Whichever file has such a kind; the later ones after all before them were read.
            names = [n for n in FILES if kind in dict(damages(n, chance))]
            name = names[(number + trials) % len(names)]
            shutil.copytree(good, raw, copy_function=os.link)
            (raw / name).unlink()
            with (raw / name).open("wb") as file:
                file.write(header(name))
                file.truncate(size_of(name))
            dict(damages(name, chance))[kind](raw / name)
            with pytest.raises(data.DataError) as refused:
                data.load("mnist", data_dir=tmp_path)
            half = name.split("-")[0]
            assert f"{raw} ({half}-…)" in str(refused.value), (kind, name, str(refused.value))
            assert "\n" not in str(refused.value) and len(str(refused.value)) < 600, kind
            shutil.rmtree(raw)
            trials += 1
            kinds.add((kind, name) if rounds > 1 else kind)
    assert trials >= 20 * rounds and len(kinds) >= (40 if rounds > 1 else 14)
    record_property("trials", trials)


BLANK = torch.zeros(28, 28, dtype=torch.uint8).expand(60_000, 28, 28)
ZEROS = torch.zeros(60_000, dtype=torch.int64)
OLDER = {
    "no file of torch's": b"garbage",
    "no pair": torch.zeros(3),
    "lists": ([0], [1]),
    "too few": (BLANK[:3], ZEROS[:3]),
    "negative labels": (BLANK, ZEROS - 1),
    "labels of floats": (BLANK, ZEROS.float()),
    "images of floats": (BLANK[0].float().expand(60_000, 28, 28), ZEROS),
}


@pytest.mark.parametrize("kind", OLDER)
def test_what_torchvision_once_made_of_them_is_refused_by_name(kind, good, tmp_path):
    """It is read in their stead where it is there."""
    shutil.copytree(good.parent, tmp_path / "MNIST", copy_function=os.link)
    older = tmp_path / "MNIST" / "processed"
    older.mkdir()
    for file in ("training.pt", "test.pt"):
        if isinstance(OLDER[kind], bytes):
            (older / file).write_bytes(OLDER[kind])
        else:
            torch.save(OLDER[kind], older / file)
    with pytest.raises(data.DataError, match=r"processed \(train-…\) are damaged or not mnist's: "):
        data.load("mnist", data_dir=tmp_path)


def test_the_files_before_they_are_damaged_are_read(good):
    dataset = data.load("mnist", data_dir=good.parent.parent, train_size=10)
    assert dataset.train.x.shape == (10, 784) and not dataset.test.x.any()


def test_a_script_says_it_in_one_line(good, tmp_path, refused):
    shutil.copytree(good.parent, tmp_path / "MNIST", copy_function=os.link)
    raw = tmp_path / "MNIST" / "raw"
    (raw / FILES[3]).unlink()
    (raw / FILES[3]).write_bytes(header(FILES[3]) + b"\x0b" * 10_000)
    line = refused(killed.loaded("train").main, "--data", "mnist", "--data-dir", str(tmp_path))
    assert f"{raw} (t10k-…) are damaged" in line and "labels from 0 to 9, got 11" in line
