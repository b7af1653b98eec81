"""Fashion-MNIST and KMNIST from files in their exact format, through `data.load` and train.py."""

import gzip
import hashlib
import json

import killed
import numpy as np
import pytest
import torch
from conftest import slow_unless
from torchvision import datasets
from toys import IMAGES, LABELS, N, header, size_of

import nnce
from nnce import data

CLASSES = {
    "fashion-mnist": [
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker"),
        *("Bag", "Ankle boot"),
    ],
    "kmnist": ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"],
}
FOLDERS = {"fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}


def content(half):
    """The images and labels of one half: the label as a bright row, and a number for each image."""
    n = N[half]
    numbers = np.arange(n)
    labels = (7 * numbers + numbers // 10_000) % 10
    images = np.zeros((n, 28, 28), np.uint8)
    images[numbers, 2 * labels + 3] = 255
    images[:, 0, :3] = np.stack((numbers >> 8, numbers & 255, np.full(n, half == "train")), 1)
    return images, labels.astype(np.uint8)


def write(folder, packed):
    """The four files as they are published, each packed or not; their MD5 sums by name."""
    folder.mkdir(parents=True)
    sums = {}
    for half in N:
        for kind, array in zip((IMAGES, LABELS), content(half), strict=True):
            name = f"{half}-{kind}"
            whole = header(name) + array.tobytes()
            assert len(whole) == size_of(name)
            if packed:
                name, whole = f"{name}.gz", gzip.compress(whole, 1)
            (folder / name).write_bytes(whole)
            sums[name] = hashlib.md5(whole).hexdigest()
    return sums


CASES = [(name, packed) for name in FOLDERS for packed in (False, True)]


@pytest.mark.parametrize(
    ("name", "packed"), slow_unless(lambda name, packed: packed and name == "kmnist", CASES)
)
def test_files_in_their_exact_format(name, packed, tmp_path, monkeypatch):
    """Sizes, magic numbers, file names, class order; packed ones are not downloaded again."""
    sums = write(tmp_path / FOLDERS[name] / "raw", packed)
    if packed:  # their sums are not those of the published files, which are not here
        loader = getattr(datasets, FOLDERS[name])
        assert [file for file, _ in loader.resources] == [*sums]
        monkeypatch.setattr(loader, "resources", list(sums.items()))
        monkeypatch.setattr(loader, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens
    dataset = data.load(name, data_dir=tmp_path)
    assert dataset.about == {"data": name, "image": [28, 28], "classes": CLASSES[name]}
    parts = {"train": range(50_000), "validation": range(50_000, 60_000), "test": range(10_000)}
    for part, (x, y) in dataset.splits().items():
        images, labels = content("t10k" if part == "test" else "train")
        chosen = list(parts[part])
        assert torch.equal((x * 255).round().byte(), torch.from_numpy(images[chosen]).flatten(1))
        assert y.argmax(1).tolist() == labels[chosen].tolist() and (y.sum(1) == 1).all()


@pytest.mark.slow
def test_train_reads_them(tmp_path, capsys):
    write(tmp_path / "FashionMNIST" / "raw", packed=False)
    options = ("--data", "fashion-mnist", "--data-dir", str(tmp_path), "--train-size", "2000")
    run = tmp_path / "run"
    assert killed.loaded("train").main([*options, "--epochs", "2", "--run-dir", str(run)]) == 0
    rows = json.loads((run / "results.json").read_text())["rows"]
    (test,) = [r["accuracy"] for r in rows if (r["network"], r["data"]) == ("last", "test")]
    assert test > 0.99  # a class is a row
    assert nnce.load(run / "network.pt").about["classes"] == CLASSES["fashion-mnist"]
    capsys.readouterr()
    predict = killed.loaded("predict").main
    assert predict([str(run), "--index", "3", "--data-dir", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["class"] == found["target"] == CLASSES["fashion-mnist"][content("t10k")[1][3]]
