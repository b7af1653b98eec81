import gzip
import hashlib
import http.server
import os
import pathlib
import shutil
import sys
import threading

import pytest
import torch
from torchvision import datasets

from nnce import data
from nnce.data import DataError
from nnce.data import datasets as sources


def test_digits(digits):
    assert [len(split.x) for split in digits] == [1197, 300, 300]
    for x, y in digits:
        assert x.shape[1:] == (64,) and y.shape[1:] == (10,)
        assert x.dtype == y.dtype == torch.float32
        assert x.min() >= 0 and x.max() == 1
        assert (y.sum(1) == 1).all() and set(y.unique().tolist()) == {0.0, 1.0}
        # Stratified: 1,797 digits hold between 174 and 183 of each class.
        share = y.mean(0)
        assert share.min() > 0.09 and share.max() < 0.11


def test_digits_split_is_fixed_and_disjoint(digits):
    rows = [{tuple(row.tolist()) for row in split.x} for split in digits]
    assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
    again = data.load("digits")
    assert all(torch.equal(a.x, b.x) for a, b in zip(digits, again, strict=True))


def test_digits_are_read_without_scikit_learn_as_with_it(digits, monkeypatch):
    assert sources.digits_file() is not None
    monkeypatch.setattr(sources, "digits_file", lambda: None)
    for ours, theirs in zip(digits, data.load("digits"), strict=True):
        assert torch.equal(ours.x, theirs.x) and torch.equal(ours.y, theirs.y)


def test_mnist(mnist):
    assert [len(split.x) for split in mnist] == [2_000, 10_000, 10_000]
    assert mnist.train.x.shape == (2_000, 784) and mnist.train.x.dtype == torch.float64
    assert mnist.train.x.min() == 0 and mnist.train.x.max() == 1
    assert mnist.train.y[:5].argmax(1).tolist() == [5, 0, 4, 1, 9]
    assert mnist.test.y[:5].argmax(1).tolist() == [7, 2, 1, 0, 4]


def test_mnist_validation_is_the_last_10_000_of_the_training_images(mnist):
    whole = data.load("mnist")
    assert len(whole.train.x) == 50_000
    raw = datasets.MNIST(os.environ["NNCE_DATA"], train=True)
    assert torch.equal(whole.validation.x, raw.data[-10_000:].flatten(1) / 255)
    assert torch.equal(whole.train.y.argmax(1), raw.targets[:50_000])


def test_train_size(digits):
    small = data.load("digits", train_size=7)
    assert torch.equal(small.train.x, digits.train.x[:7])
    assert len(small.test.x) == 300
    with pytest.raises(DataError, match="at most 1,197 for digits, got 1,198"):
        data.load("digits", train_size=1198)
    with pytest.raises(DataError, match="at least 1, a whole number, got 0"):
        data.load("digits", train_size=0)


def test_unknown_name():
    with pytest.raises(DataError, match="digits, mnist, fashion-mnist, kmnist, got 'cifar10'"):
        data.load("cifar10")


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([[0.0], [1.5]], [[1.0], [0.0]], r"inputs x in \[0, 1\], got 1.5 at \[1, 0\]"),
        ([[0.0], [1.0]], [[1.0], [-0.25]], r"targets y in \[0, 1\], got -0.25 at \[1, 0\]"),
        ([[float("nan")]], [[1.0]], r"inputs x in \[0, 1\], got nan at \[0, 0\]"),
        ([[0.5]], [[float("nan")]], r"targets y in \[0, 1\], got nan at \[0, 0\]"),
        ([[0.5]], [[1.0], [0.0]], "1 inputs, 2 targets"),
        ([[0.5]], [[1]], "targets y of a floating-point dtype, got torch.int64"),
    ],
)
def test_values_are_checked(x, y, message):
    with pytest.raises(DataError, match=message):
        data.check(torch.tensor(x), torch.tensor(y))


def test_soft_targets_are_allowed():
    data.check(torch.tensor([[0.5]]), torch.tensor([[0.25]]))


def test_one_hot():
    assert data.one_hot(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    with pytest.raises(DataError, match="labels from 0 to 2, got 0 to 3"):
        data.one_hot(torch.tensor([3, 0]), 3)


def test_orders():
    def epoch(seed):
        return data.order(23, torch.Generator().manual_seed(seed))

    assert [len(batch) for batch in epoch(0).split(5)] == [5, 5, 5, 5, 3]
    assert sorted(epoch(0).tolist()) == list(range(23))
    assert torch.equal(epoch(0), epoch(0))
    assert not torch.equal(epoch(0), epoch(1))
    generator = torch.Generator().manual_seed(0)
    first, second = (data.order(23, generator) for _ in range(2))
    assert not torch.equal(first, second)  # a new order every epoch


# -------------------------------------------------------------- what can be wrong in a folder


def _idx(path, shape, dtype_code=8, size=None):
    header = bytes([0, 0, dtype_code, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    count = torch.Size(shape).numel() if size is None else size
    path.write_bytes(header + bytes(count))


@pytest.fixture
def fake_mnist(tmp_path):
    """The files of MNIST, right in shape and black all over."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for half, n in (("train", 60_000), ("t10k", 10_000)):
        _idx(raw / f"{half}-images-idx3-ubyte", (n, 28, 28))
        _idx(raw / f"{half}-labels-idx1-ubyte", (n,))
    return tmp_path


def test_a_folder_in_torchvisions_layout(fake_mnist, monkeypatch):
    monkeypatch.setenv("NNCE_DATA", str(fake_mnist))
    assert [len(split.x) for split in data.load("mnist")] == [50_000, 10_000, 10_000]


def _damage_truncate(raw):
    _idx(raw / "train-images-idx3-ubyte", (60_000, 28, 28), size=1_000)


def _damage_foreign(raw):
    (raw / "t10k-labels-idx1-ubyte").write_text("<html>Not found</html>" * 10)


def _damage_empty(raw):
    (raw / "t10k-images-idx3-ubyte").write_bytes(b"")


def _damage_zipped(raw):
    with gzip.open(raw / "train-labels-idx1-ubyte", "wb") as file:
        file.write(bytes(60_000))


def _damage_other_set(raw):
    shutil.copy(raw / "t10k-images-idx3-ubyte", raw / "train-images-idx3-ubyte")


def _damage_labels(raw):
    path = raw / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + bytes([200]))


@pytest.mark.parametrize(
    "damage",
    [
        _damage_truncate,
        _damage_foreign,
        _damage_empty,
        _damage_zipped,
        _damage_other_set,
        _damage_labels,
    ],
)
def test_damaged_files_are_named(fake_mnist, damage):
    damage(fake_mnist / "MNIST" / "raw")
    with pytest.raises(DataError) as error:
        data.load("mnist", data_dir=fake_mnist)
    message = str(error.value)
    assert "\n" not in message
    assert str(fake_mnist / "MNIST" / "raw") in message


def test_files_of_another_set_are_refused(mnist, tmp_path):
    """Right in size, and labels from 0 to 9: only their sums tell."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in pathlib.Path(os.environ["NNCE_DATA"], "MNIST", "raw").iterdir():
        (raw / file.name).symlink_to(file.resolve())
    with pytest.raises(
        DataError, match=r"not fashion-mnist's: train-images-idx3-ubyte belongs to mnist"
    ):
        data.load("fashion-mnist", data_dir=tmp_path)


def test_packed_files_are_checked_where_they_are(fake_mnist, monkeypatch):
    raw = fake_mnist / "MNIST" / "raw"
    packed = raw / "t10k-labels-idx1-ubyte.gz"
    packed.write_bytes(gzip.compress((raw / packed.stem).read_bytes()))
    with pytest.raises(DataError, match=r"t10k-labels\S+gz does not have the MD5 sum that torchv"):
        data.load("mnist", data_dir=fake_mnist)
    right = hashlib.md5(packed.read_bytes()).hexdigest()
    resources = [
        (name, right if name == packed.name else md5) for name, md5 in datasets.MNIST.resources
    ]
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    assert len(data.load("mnist", data_dir=fake_mnist).test.x) == 10_000
    content = bytearray((raw / packed.stem).read_bytes())
    content[-1] = 7
    (raw / packed.stem).write_bytes(content)
    differs = r"t10k-labels\S+ubyte differs from the content of t10k-labels\S+gz"
    with pytest.raises(DataError, match=differs):
        data.load("mnist", data_dir=fake_mnist)


def test_download_is_asked_for(tmp_path, monkeypatch, capsys):
    asked = []

    class Imposter(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"not MNIST")

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Imposter)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/mnist/"
    monkeypatch.setattr(datasets.MNIST, "mirrors", [address])
    try:
        message = _refusal(tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    assert set(asked) == {"/mnist/train-images-idx3-ubyte.gz"}
    assert "corrupted" in message
    assert capsys.readouterr().out == ""


def test_no_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens
    assert "refused" in _refusal(tmp_path)
    assert not list(tmp_path.iterdir())  # not even an empty folder
    assert capsys.readouterr().out == ""


def _refusal(data_dir):
    with pytest.raises(DataError) as error:
        data.load("mnist", data_dir=data_dir)
    message = str(error.value)
    begin, end = "set --data-dir or $NNCE_DATA to the", "folder that contains MNIST/raw"
    assert message.startswith(f"mnist is not in {data_dir}: {begin} {end}")
    assert not list(data_dir.rglob("*ubyte"))
    assert "--data-dir" in message and "\n" not in message
    return message


def test_a_torchvision_of_another_build(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match="same build as torch"):
        data.load("mnist")


def test_no_memory_is_not_taken_for_damage(tmp_path, monkeypatch):
    """Else one would be told to delete files that are whole."""

    def no_memory(*arguments, **more):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(datasets, "MNIST", no_memory)
    with pytest.raises(RuntimeError, match="can't allocate"):
        data.load("mnist", data_dir=tmp_path)
