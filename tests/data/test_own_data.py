"""Data of one's own: an .npz file, a folder of images, what does not fit, and the scripts."""

import json
import shutil

import killed
import numpy as np
import pytest
import torch
from PIL import Image

import nnce
from nnce import data
from nnce.data import DataError

COLORS = ("blue", "green", "red")


def arrays(n=60, shape=(4, 6), dtype=np.uint8):
    """Images of three classes, each bright in rows of its own."""
    chance = np.random.default_rng(0)
    y = np.arange(n) % 3
    x = chance.uniform(0, 80, (n, *shape))
    for row, label in enumerate(y):
        x[row, label] += 150
    x = x.astype(np.uint8)
    return (x if dtype == np.uint8 else (x / 255).astype(dtype)), y


def saved(path, **named):
    np.savez(path, **named)
    return path


def folder(path, n=60):
    x, y = arrays(n)
    for number, (image, label) in enumerate(zip(x, y, strict=True)):
        (path / COLORS[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / COLORS[label] / f"{number:03}.png")
    return path


@pytest.fixture(params=["npz", "folder"])
def source(request, tmp_path):
    x, y = arrays()
    if request.param == "folder":
        return folder(tmp_path / "own data")
    return saved(tmp_path / "own data.npz", x=x, y=np.array(COLORS)[y])


def test_it_is_split_like_digits(source):
    dataset = data.load(source)
    assert [len(split.x) for split in dataset] == [40, 10, 10]
    assert dataset.about == {"data": str(source), "image": [4, 6], "classes": [*COLORS]}
    x, y = arrays()
    rows = (x.reshape(60, -1) / np.float32(255)).tolist()
    expected = dict(zip(map(tuple, rows), y.tolist(), strict=True))
    found = {}
    for split in dataset:
        assert split.x.dtype == torch.float32 and split.y.shape == (len(split.x), 3)
        counts = split.y.sum(0)  # in proportion
        assert counts.max() - counts.min() <= 1
        found |= zip(map(tuple, split.x.tolist()), split.y.argmax(1).tolist(), strict=True)
    assert found == expected
    again = data.load(str(source))
    assert all(torch.equal(a.x, b.x) for a, b in zip(dataset, again, strict=True))
    small = data.load(source, train_size=7, dtype=torch.float64)
    assert torch.equal(small.train.x.float(), dataset.train.x[:7])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", bool, np.int64])
def test_numbers_from_0_to_1_stay_as_they_are(tmp_path, dtype):
    x, y = arrays(dtype=np.float64)
    x = x.round() if dtype in (bool, np.int64) else x
    dataset = data.load(saved(tmp_path / "a.npz", x=x.astype(dtype), y=y), dtype=torch.float64)
    total = sum(split.x.sum().item() for split in dataset)
    assert total == pytest.approx(x.astype(dtype).astype(float).sum(), rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "image"),
    [((9,), [3, 3]), ((13,), None), ((4, 5, 1), [4, 5]), ((4, 5, 3), None), ((4, 5), [4, 5])],
)
def test_which_rows_are_images(tmp_path, shape, image):
    x, y = arrays(shape=shape)
    dataset = data.load(saved(tmp_path / "a.npz", x=x, y=y.astype(float) * 5))
    assert dataset.about["image"] == image and dataset.about["classes"] == ["0", "5", "10"]
    assert dataset.train.x.shape == (40, np.prod(shape))


@pytest.mark.parametrize("n", [9, 10, 11, 17, 30, 61])
@pytest.mark.parametrize("rare", [3, 4, 5])
def test_a_rare_class_is_in_the_training_data(tmp_path, n, rare):
    y = np.array([0] * rare + [1 + i % 2 for i in range(max(n, 6 + rare) - rare)])
    x = np.zeros((len(y), 4), np.uint8)
    dataset = data.load(saved(tmp_path / "a.npz", x=x, y=y))
    assert sum(len(split.x) for split in dataset) == len(y)
    assert (dataset.train.y.sum(0) >= 1).all()


X, Y = arrays()


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ({"x": X}, "expected arrays x and y, got x"),
        ({"images": X, "labels": Y}, "expected arrays x and y, got images, labels"),
        ({"x": X, "y": Y[:-1]}, "name for each row of x, got (60, 4, 6) and (59,)"),
        (
            {"x": X, "y": np.eye(3)[Y]},
            "y of shape (n,), a class number or name for each row of x, got (60, 4, 6) and (60, 3)",
        ),
        ({"x": X[:0], "y": Y[:0]}, "got (0, 4, 6) and (0,)"),
        ({"x": X[:, 0, 0], "y": Y}, "expected x of shape (n, …)"),
        ({"x": np.where(X[7, 2, 3] == X, np.nan, X / 255), "y": Y}, "got nan of float64 at ["),
        ({"x": np.where(X > 0, np.inf, 0), "y": Y}, "expected x in [0, 1], or bytes (uint8)"),
        ({"x": (X > 99).astype(np.uint8), "y": Y}, "convert inputs of 0 and 1 to bool or float32"),
        ({"x": X.astype(int), "y": Y}, "int64 at [0, 0, 0]: scale it first"),
        ({"x": X.astype(str), "y": Y}, "expected numbers in x, and whole numbers or names in y"),
        ({"x": X, "y": Y + 0.5}, "whole numbers or names in y, got uint8 and float64"),
        (
            {"x": X, "y": np.where(Y, np.inf, 0)},
            "whole numbers or names in y, got uint8 and float64",
        ),
        ({"x": X, "y": np.array([None, *Y[1:]])}, "Object arrays cannot be loaded"),
        ({"x": X, "y": Y * 0}, "expected two classes or more, got ['0']"),
        ({"x": X[:7], "y": Y[:7]}, "expected at least 3 examples of each class, one each for"),
    ],
)
def test_arrays_that_do_not_fit_are_one_sentence(named, sentence, tmp_path, refused):
    path = saved(tmp_path / "own.npz", **named)
    line = refused(killed.loaded("train").main, "--data", str(path))
    assert sentence in line and "own.npz" in line


def a_text(path):
    path.with_suffix(".npz").write_text("not an archive")


def a_cut_archive(path):
    saved(path.with_suffix(".npz"), x=X, y=Y)
    whole = path.with_suffix(".npz").read_bytes()
    path.with_suffix(".npz").write_bytes(whole[: len(whole) // 2])


def an_array(path):
    np.save(path, X)
    path.with_suffix(".npy").rename(path.with_suffix(".npz"))


def no_folders(path):
    path.mkdir()


def an_empty_class(path):
    (folder(path) / "purple").mkdir()


def one_class(path):
    folder(path)
    for color in COLORS[1:]:
        shutil.rmtree(path / color)


def two_sizes(path):
    Image.new("L", (6, 5)).save(folder(path) / "green" / "odd.png")


def parts(path):
    for part in ("train", "Test"):
        folder(path / part)
        Image.new("L", (6, 4)).save(path / part / "a.png")


def a_damaged_image(path):
    (folder(path) / "red" / "bad.png").write_bytes(b"\x89PNG nothing")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (a_text, "own.npz is damaged or not a NumPy archive (.npz): not an archive"),
        (a_cut_archive, "own.npz is damaged or not a NumPy archive (.npz)"),
        (an_array, "own.npz is damaged or not a NumPy archive (.npz): not an archive"),
        (no_folders, "own: expected a folder of images for each class: Couldn't find any class"),
        (an_empty_class, "own: expected a folder of images for each class: Found no valid file"),
        (one_class, "own: expected two classes or more, got ['blue']"),
        (two_sizes, "expected images of one size, 6x4 like"),
        (parts, "own: expected a folder for each class, got Test, train: pass one of these"),
        (a_damaged_image, "bad.png: cannot identify image file"),
    ],
)
def test_files_that_do_not_fit_are_one_sentence(make, sentence, tmp_path, refused):
    make(tmp_path / "own")
    (path,) = tmp_path.iterdir()
    assert sentence in refused(killed.loaded("train").main, "--data", str(path))


def test_a_path_that_is_not_there(refused):
    line = refused(killed.loaded("train").main, "--data", "nowhere.npz")
    assert "mnist, fashion-mnist, kmnist, got 'nowhere.npz'" in line
    with pytest.raises(DataError, match=r"expected an \.npz file, a folder of images by class"):
        data.load("nowhere")


def test_images_in_color_and_of_16_bits_become_gray(tmp_path):
    for number in range(3):
        for label in "ab":
            (tmp_path / label).mkdir(exist_ok=True)
            picture = Image.new("RGB", (2, 2), (0, 255, 0))
            if label == "b":
                picture = Image.fromarray(np.full((2, 2), 51 * 257, np.uint16))
            picture.save(tmp_path / label / f"{number}.png")
    dataset = data.load(tmp_path)
    of_a, of_b = (dataset.train.x[dataset.train.y[:, k] == 1] for k in (0, 1))
    assert of_a.unique().item() == pytest.approx(150 / 255)  # 0.587 of green
    assert of_b.unique().item() == pytest.approx(51 / 255)


OPTIONS = ("--epochs", "2", "--hidden", "5", "--batch-size", "5")


def test_train_resume_and_predict(source, tmp_path, monkeypatch, capsys):
    """Trained by a relative path, it is resumed from another folder, and predicts by name."""
    train, predict = (killed.loaded(name) for name in ("train", "predict"))
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data", source.name, *OPTIONS]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("own_data-cross-entropy-lr")
    config = json.loads((run / "results.json").read_text())["config"]
    assert config["data"] == str(source)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train.main(["--resume", str(run), "--epochs", "40"]) == 0
    assert f"{source}: 40 training, 10 validation and 10 test examples" in capsys.readouterr().out
    network = nnce.load(run / "network.pt")
    assert network.sizes == (24, 5, 3)
    assert network.about == data.load(source).about
    Image.fromarray(X[2]).save("red.png")
    assert predict.main([str(run), "red.png", "--json", "--picture", "saw.png"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["class"] == "red" and [*found["activations"]] == [*COLORS]
    seen = torch.from_numpy(X[2]).flatten() / 255
    assert [*found["activations"].values()] == pytest.approx(nnce.sigmoid(network(seen)).tolist())
    with Image.open("saw.png") as picture:
        assert picture.size == (300, 200)
    assert predict.main([str(run), "--index", "4", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["target"] in COLORS


def test_images_that_are_not_square_are_not_distorted(tmp_path, refused):
    for shape in ((4, 6), (2, 8)):
        x = np.zeros((60, *shape), np.uint8)
        path = saved(tmp_path / "own.npz", x=x, y=Y)
        line = refused(killed.loaded("train").main, "--data", str(path), "--rotation", "9")
        assert "square" in line


def test_rows_that_are_not_images(tmp_path, refused, capsys):
    x, y = arrays(shape=(13,))
    path = saved(tmp_path / "wine.npz", x=x, y=y)
    run = str(tmp_path / "run")
    assert killed.loaded("train").main(["--data", str(path), *OPTIONS, "--run-dir", run]) == 0
    predict = killed.loaded("predict").main
    assert predict([run, "--index", "0"]) == 0
    capsys.readouterr()
    assert "was not trained on images: use --index" in refused(predict, run, "a.png")
    assert "--picture requires a network that was trained on images" in refused(
        predict, run, "--index=0", "--picture=a.png"
    )
    saved(path, x=x[:, :12], y=y)  # changed since
    assert "expected 13 inputs, got 12" in refused(predict, run, "--index", "0")


@pytest.mark.slow
def test_compare(tmp_path, monkeypatch):
    path = saved(tmp_path / "own.npz", x=X, y=Y)
    monkeypatch.chdir(tmp_path)
    options = ("--lrs", "1", "--seeds", "2", "--data", str(path), *OPTIONS)
    assert killed.loaded("compare").main(options) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("compare-own-24-5-3-")
    assert json.loads((run / "results.json").read_text())["config"]["data"] == str(path)
