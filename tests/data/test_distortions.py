"""Distortions of square images: the formula, the draw, and what cannot be distorted."""

import math

import numpy
import pytest
import torch
from scipy import ndimage

from nnce import data, training
from nnce.data import DataError, Distorted, Distortion
from nnce.training import ENGINES, Settings


def images(n=6, side=28, dtype=torch.float64):
    """Smooth ones, nothing at their edges."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(n, side, side, generator=generator, dtype=torch.float64).numpy()
    smooth = torch.from_numpy(ndimage.gaussian_filter(noise, (0, 1.5, 1.5)))
    edge = max(1, side // 7)
    smooth[:, :edge] = smooth[:, -edge:] = smooth[:, :, :edge] = smooth[:, :, -edge:] = 0
    return smooth.flatten(1).to(dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(n, side, dtype=torch.float64, elastic=True):
    """What a distortion draws, in the order in which it does."""
    generator = seeded()
    first = torch.empty(6, n, dtype=dtype).uniform_(-1, 1, generator=generator)
    fields = torch.empty(n, 2, side, side, dtype=dtype)
    return first, fields.uniform_(-1, 1, generator=generator) if elastic else None


EVERY = [
    Distortion(rotation=15),
    Distortion(scaling=0.2),
    Distortion(shear=0.3),
    Distortion(translation=2.5),
    Distortion(alpha=34),
    Distortion(alpha=10, sigma=1.5),
    Distortion(rotation=12, scaling=0.15, shear=0.2, translation=1.5, alpha=34, sigma=4),
]


@pytest.mark.parametrize("side", [9, 28])
@pytest.mark.parametrize("distortion", EVERY, ids=str)
def test_it_is_the_formula(distortion, side):
    """Written out pixel by pixel's place, and looked up by SciPy."""
    x = images(side=side)
    found = distortion(x, seeded())
    first, fields = drawn(len(x), side)
    half = (side - 1) / 2
    rows, columns = (torch.arange(side, dtype=torch.float64) - half for _ in range(2))
    for number, image in enumerate(x.view(-1, side, side)):
        angle = math.radians(distortion.rotation) * first[0, number].item()
        s_x = 1 + distortion.scaling * first[1, number].item()
        s_y = 1 + distortion.scaling * first[2, number].item()
        k = distortion.shear * first[3, number].item()
        R = torch.tensor(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]],
            dtype=torch.float64,
        )
        matrix = R @ torch.tensor([[s_x, k], [0.0, s_y]], dtype=torch.float64)
        p = torch.stack([columns.expand(side, side), rows[:, None].expand(side, side)])
        place = torch.einsum("ij,jrc->irc", matrix, p)
        place += distortion.translation * first[4:, number, None, None]
        smooth = [
            ndimage.gaussian_filter(
                field.numpy(), distortion.sigma, mode="constant", truncate=5 + 1 / distortion.sigma
            )
            for field in fields[number]
        ]
        place += distortion.alpha * torch.from_numpy(numpy.stack(smooth))
        seen = ndimage.map_coordinates(
            image.numpy(), (place[1] + half, place[0] + half), order=1, mode="grid-constant"
        )
        torch.testing.assert_close(
            found[number].view(side, side), torch.from_numpy(seen), rtol=0, atol=1e-5
        )


def test_a_displacement_is_as_large_as_it_says():
    """Its standard deviation is α / (σ √(12 π)), away from the edges, where the fields are 0."""
    for sigma in (2.0, 4.0):
        distortion = Distortion(alpha=34, sigma=sigma)
        line = torch.arange(64.0) - 31.5
        fields = distortion._fields(200, seeded(), line)[:, 20:44, 20:44]
        expected = 1 / (sigma * math.sqrt(12 * math.pi))
        assert fields.std().item() == pytest.approx(expected, rel=0.05)


def test_a_narrow_gaussian_is_no_smoothing():
    line = torch.arange(9.0) - 4
    found = Distortion(alpha=1, sigma=0.1)._fields(3, seeded(), line)
    raw = torch.empty(3, 2, 9, 9).uniform_(-1, 1, generator=seeded())
    torch.testing.assert_close(found, raw.movedim(1, -1))


def test_no_images_are_no_images():
    x = torch.zeros(0, 64)
    assert EVERY[-1](x, seeded()).shape == (0, 64)
    epoch = Distorted(images(5, 8), torch.arange(5), EVERY[0], 0, 0)
    assert epoch[0:].shape == epoch[:].shape == (5, 64) and epoch[2:2].shape == (0, 64)


def test_nothing_asked_for_is_nothing_done():
    x = images()
    torch.testing.assert_close(Distortion()(x, seeded()), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_stay_in_their_range_and_dtype(dtype):
    x = torch.ones(4, 64, dtype=dtype)
    found = EVERY[-1](x, seeded())
    assert found.dtype == dtype and found.shape == x.shape
    data.check(found, torch.zeros(4, 1, dtype=dtype))


def test_each_image_has_its_own():
    x = images(1).expand(5, -1)
    for distortion in EVERY:
        found = distortion(x, seeded())
        assert all((found[i] - found[j]).abs().max() > 0.01 for i in range(5) for j in range(i)), (
            distortion
        )


# ------------------------------------------------------------------------------ through an epoch


def test_an_epoch_does_not_depend_on_how_it_is_cut():
    x, order = images(2500, 8, torch.float32), torch.randperm(2500, generator=seeded(4))
    whole = Distorted(x, order, EVERY[-1], seed=3, epoch=2)[0:2500]
    assert whole.shape == (2500, 64)
    for size in (10, 999, 1000, 1700):
        cut = Distorted(x, order, EVERY[-1], seed=3, epoch=2)
        parts = [cut[begin : begin + size] for begin in range(0, 2500, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_every_epoch_and_seed_has_new_ones():
    x, order = images(20), torch.arange(20)
    found = [
        Distorted(x, order, EVERY[-1], seed, epoch)[0:20]
        for seed in (0, 1, 2**32 - 1)
        for epoch in (0, 1, 2)
    ]
    assert all((a - b).abs().max() > 0.01 for i, a in enumerate(found) for b in found[:i])
    torch.testing.assert_close(found[0], Distorted(x, order, EVERY[-1], 0, 0)[0:20])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit(threads):
    x = images(1000, dtype=torch.float32)
    expected = EVERY[-1](x, seeded())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(EVERY[-1](x, seeded()), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_learns_from_the_same_images(engine, digits):
    """As PyTorch alone does from the images written out."""
    dataset = data.Dataset(*(data.Split(*(part[:1100].double() for part in s)) for s in digits))
    distortion = Distortion(rotation=10, alpha=8, sigma=2)
    settings = Settings(
        *((9,), "cross-entropy", engine), epochs=2, lr=0.2, seed=6, distortion=distortion
    )
    state = training.initial_state(settings, dataset)
    twin = training.initial_state(settings, dataset).network
    list(training.train(state, settings, dataset))
    generator = training.generators(6)[1]
    x, y = dataset.train
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.2)
    for epoch in range(2):
        order = data.order(len(x), generator)
        new = Distorted(x, order, distortion, 6, epoch)[0 : len(x)]
        for begin in range(0, len(x), 10):
            optimizer.zero_grad()
            z = twin(new[begin : begin + 10])
            targets = y[order[begin : begin + 10]]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(z, targets)
            (loss * y.shape[1]).backward()
            optimizer.step()
    for ours, theirs in zip(state.network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_only_the_training_images_are_distorted(digits, monkeypatch):
    seen = []
    whole = Distortion.__call__

    def spied(self, x, generator):
        seen.append(x)
        return whole(self, x, generator)

    monkeypatch.setattr(Distortion, "__call__", spied)
    settings = Settings(epochs=1, distortion=Distortion(rotation=5))
    list(training.train(training.initial_state(settings, digits), settings, digits))
    rows = {tuple(row) for row in digits.train.x.tolist()}
    assert sum(map(len, seen)) == len(digits.train.x)
    assert all(tuple(row) in rows for part in seen for row in part.tolist())


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rotation": -1}, "rotation from 0 to 180, got -1"),
        ({"rotation": 181}, "rotation from 0 to 180, got 181"),
        ({"scaling": 1.0}, "scaling from 0 to 0.99, got 1.0"),
        ({"shear": math.inf}, "shear from 0 to 1000, got inf"),
        ({"translation": math.nan}, "translation from 0 to 1000, got nan"),
        ({"alpha": "34"}, "alpha from 0 to 1e\\+06, got '34'"),
        ({"alpha": True}, "alpha from 0 to 1e\\+06, got True"),
        ({"sigma": 0.0}, "sigma from 0.1 to 1000, got 0.0"),
        ({"sigma": 1e-23}, "sigma from 0.1 to 1000, got 1e-23"),
    ],
)
def test_what_makes_no_sense_is_named(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Distortion(**values)


@pytest.mark.parametrize("features", [1, 3, 50, 783])
def test_what_is_no_square_image_is_named(features):
    split = data.Split(torch.zeros(4, features), torch.zeros(4, 2))
    settings = Settings(distortion=Distortion(alpha=1))
    sentence = f"expected square images to distort, got examples of {features} features"
    with pytest.raises(DataError, match=sentence):
        Distortion(alpha=1)(split.x, seeded())
    with pytest.raises(DataError, match=sentence):
        training.initial_state(settings, data.Dataset(split, split, split))
    with pytest.raises(ValueError, match=r"expected an nnce.data.Distortion, got 'elastic'"):
        Settings(distortion="elastic")
