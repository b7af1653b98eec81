import json
import os
import random
import zlib

import drawings
import killed
import pytest
import torch
from conftest import missing
from PIL import Image, ImageOps

import nnce
from nnce.data import pictures


@pytest.fixture
def predict(script):
    return script("predict")


def trained(folder, *options):
    assert killed.loaded("train").main([*options, "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "digits", "--epochs", "20")


@pytest.fixture(scope="module")
def mnist_run(tmp_path_factory):
    if "NNCE_DATA" not in os.environ:
        missing("mnist", "$NNCE_DATA does not say where MNIST is")
    options = ("--data", "mnist", "--epochs", "2", "--batch-size", "10")
    return trained(tmp_path_factory.mktemp("runs") / "mnist", *options)


def predictions(predict, capsys, *arguments):
    capsys.readouterr()
    assert predict.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def count_right(predict, capsys, tmp_path, record_property):
    """A function that counts the drawings, PNG and JPEG, that a run classifies correctly."""

    def count(run, tries):
        chance = random.Random(2026)
        paths = []
        for number in range(tries):
            paths.append(tmp_path / f"{number:03}.{('png', 'jpg')[number // 10 % 2]}")
            drawings.drawing(number % 10, chance).save(paths[-1])
        found = predictions(predict, capsys, run, *paths)
        assert [prediction["image"] for prediction in found] == [str(path) for path in paths]
        right = sum(found[number]["class"] == str(number % 10) for number in range(tries))
        record_property("right", f"{right} of {tries}")
        return right

    return count


@pytest.mark.slow
def test_of_drawn_digits_8_of_10_are_right_by_a_network_of_mnist(mnist_run, count_right):
    assert count_right(mnist_run, 100) >= 80


def test_of_drawn_digits_8_of_10_are_right_by_a_network_of_digits(digits_run, count_right):
    assert count_right(digits_run, 40) >= 32


def test_json_table_and_picture(predict, capsys, digits_run, tmp_path):
    path, saw = tmp_path / "three.png", tmp_path / "saw.png"
    drawings.drawing(3, random.Random(1)).save(path)
    (found,) = predictions(predict, capsys, digits_run, path, "--picture", saw)
    assert set(found) == {"image", "class", "activations"}
    assert found["image"] == str(path) and found["class"] == "3"
    x = pictures.inputs(path, "digits", (8, 8), torch.float32)
    a = nnce.sigmoid(nnce.load(digits_run / "network.pt")(x)).tolist()
    assert [found["activations"][name] for name in "0123456789"] == pytest.approx(a)
    with Image.open(saw) as picture:
        assert picture.size == (200, 200) and picture.mode == "L"
        assert list(picture.resize((8, 8), Image.NEAREST).tobytes()) == (x * 255).round().tolist()

    assert predict.main([str(digits_run / "network.pt"), str(path)]) == 0
    first, _, _, _, _, _, row, *_ = capsys.readouterr().out.splitlines()
    assert first == f"{path}: 3 (activation {max(a):.3f})"
    assert row.split() == ["|", "3", "|", f"{max(a):.4f}", "|"]


def test_an_example_of_the_test_set(predict, capsys, digits_run, digits):
    (found,) = predictions(predict, capsys, digits_run, "--index", 17)
    a = nnce.sigmoid(nnce.load(digits_run / "network.pt")(digits.test.x[17]))
    assert found["image"] == "test example 17"
    assert found["target"] == str(digits.test.y[17].argmax().item())
    assert list(found["activations"].values()) == pytest.approx(a.tolist())
    assert predict.main([str(digits_run), "--index", "17"]) == 0
    assert f"test example 17 (class {found['target']}): " in capsys.readouterr().out


def test_a_network_whose_file_says_nothing_of_its_data(predict, capsys, digits_run, tmp_path):
    network = nnce.load(digits_run / "network.pt")
    network.about = {}
    nnce.save(network, tmp_path / "plain.pt")
    plain, whole = (
        predictions(predict, capsys, path, "--index", 5)
        for path in (tmp_path / "plain.pt", digits_run)
    )
    assert plain == whole


@pytest.mark.parametrize("form", ["mnist", "digits", "fashion-mnist", "kmnist"])
def test_polarity_color_place_and_frame_do_not_matter(form, tmp_path):
    size = (8, 8) if form == "digits" else (28, 28)
    black = drawings.drawing(5, random.Random(3)).convert("L").point(lambda v: 255 * (v > 128))
    ink = ImageOps.invert(black) if black.getpixel((0, 0)) else black
    ways = {
        "light": ink,
        "dark": ImageOps.invert(ink),
        "elsewhere": ImageOps.expand(ink, (130, 0, 0, 70), 0),
        "red on green": ImageOps.colorize(ink, (10, 200, 30), (220, 30, 20)),
    }
    transparent = Image.new("RGBA", ink.size, (0, 0, 0, 0))
    transparent.paste((255, 255, 255, 255), mask=ink)
    ways["transparent"] = transparent
    ways["turned"] = ink.rotate(90, expand=True)
    seen = {}
    for way, picture in ways.items():
        exif = picture.getexif()
        if way == "turned":
            exif[0x112] = 6  # as a camera notes that it was turned
        picture.save(tmp_path / "x.png", exif=exif)
        seen[way] = pictures.inputs(tmp_path / "x.png", form, size, torch.float64)
    assert seen["light"].max() == 1 and seen["light"].dtype == torch.float64
    for way, x in seen.items():
        torch.testing.assert_close(x, seen["light"], atol=1e-5, rtol=0, msg=way)


def test_a_jpeg_for_printing(tmp_path):
    """In four inks, which Pillow does not convert to every other kind."""
    picture = drawings.drawing(4, random.Random(4))
    picture.save(tmp_path / "rgb.png")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    rgb, cmyk = (
        pictures.inputs(tmp_path / name, "mnist", (28, 28), torch.float32)
        for name in ("rgb.png", "cmyk.jpg")
    )
    assert (rgb - cmyk).abs().max() < 0.2


@pytest.mark.parametrize("digit", range(10))
def test_a_drawing_has_the_form_of_the_data_set(digit, tmp_path, digits):
    drawings.drawing(digit, random.Random(digit)).save(tmp_path / "x.png")
    x = pictures.inputs(tmp_path / "x.png", "mnist", (28, 28), torch.float32).view(28, 28)
    mass, numbers = x.sum(), torch.arange(28.0)
    for axis in (0, 1):
        used = (x.amax(axis) > 0).nonzero()
        assert used[-1] - used[0] < 20
        assert abs((x.sum(axis) * numbers).sum() / mass - 14) <= 0.5
    assert max((x.amax(axis) > 0.2).sum() for axis in (0, 1)) >= 19
    eight = pictures.inputs(tmp_path / "x.png", "digits", (8, 8), torch.float32)
    counts = eight * 16
    assert torch.equal(counts, counts.round())
    ink = 16 * digits.train.x.sum(1)
    assert counts.sum() == 312 and abs(ink.mean() - 312) < 2  # as in scikit-learn's


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("RUN", "text.txt"), "expected a picture (PNG or JPEG) in text.txt: cannot identify"),
        (("RUN", "nothing.png"), "in nothing.png: No such file or directory"),
        (("RUN", "cut.png"), "expected a picture (PNG or JPEG) in cut.png: "),
        (("RUN", "empty.png"), "expected a drawing in empty.png, got a picture of one color"),
        (("RUN", "bomb.png"), "expected a picture (PNG or JPEG) in bomb.png: Image size"),
        (("RUN", "--index", "300"), "expected --index from 0 to 299, a test example of digits"),
        (("RUN", "--index", "-1"), "expected --index from 0 to 299"),
        (("RUN",), "expected either IMAGE files or --index N"),
        (("RUN", "text.txt", "--index", "1"), "expected either IMAGE files or --index N"),
        (("RUN", "--index", "1", "--picture", "."), "expected a file to write, got a folder"),
        (("nowhere", "text.txt"), "No such file or directory: nowhere"),
        ((".", "text.txt"), "expected a run directory of train.py with a network.pt, got ."),
        (("text.txt", "text.txt"), "text.txt is damaged or not a network that nnce saved"),
    ],
)
def test_bad_input_is_one_sentence(predict, refused, digits_run, tmp_path, arguments, sentence):
    (tmp_path / "text.txt").write_text("not a picture")
    Image.new("RGB", (30, 20), "white").save(tmp_path / "empty.png")
    whole = (tmp_path / "empty.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:50])
    header = whole[12:16] + (30_000).to_bytes(4, "big") * 2 + whole[24:29]
    checksum = zlib.crc32(header).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(whole[:12] + header + checksum + whole[33:])
    arguments = [str(digits_run) if a == "RUN" else a for a in arguments]
    assert sentence in refused(predict.main, *arguments)


@pytest.mark.parametrize(
    "about",
    [
        {"classes": ["a", "b"]},
        {"classes": "abcdefghij"},
        {"image": [7, 8]},
        {"image": [8, "8"]},
        {"data": 5},
    ],
)
def test_a_file_that_describes_something_else_is_one_sentence(
    predict, refused, digits_run, tmp_path, about
):
    network = nnce.load(digits_run / "network.pt")
    network.about = {**network.about, **about}
    nnce.save(network, tmp_path / "odd.pt")
    line = refused(predict.main, "odd.pt", "--index", "1")
    assert "odd.pt describes inputs or classes that do not match its sizes" in line
