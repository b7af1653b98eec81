"""Numbers of other libraries are accepted wherever Python's are, and kept as Python's."""

import fractions
import math

import numpy as np
import pytest
import torch

import nnce
from nnce import _arguments, data
from nnce.data import DataError
from nnce.engines.ensemble import Ensemble
from nnce.experiments import side_by_side
from nnce.training import Settings
from nnce.training.schedules import Schedule


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.int32(3)])
def test_integers(value):
    assert _arguments.is_integer(value) and _arguments.is_number(value)
    assert _arguments.is_size(value)
    assert type(_arguments.plain(value)) is int and _arguments.plain(value) == 3


@pytest.mark.parametrize(
    "value", [0.5, np.float64(0.5), np.float32(0.5), np.float16(0.5), fractions.Fraction(1, 2)]
)
def test_real_numbers(value):
    assert _arguments.is_number(value) and not _arguments.is_integer(value)
    assert type(_arguments.plain(value)) is float and _arguments.plain(value) == 0.5


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), "3", None, 3j, np.complex64(3), torch.tensor(3), [3]]
)
def test_not_numbers(value):
    assert not _arguments.is_number(value)
    assert not _arguments.is_integer(value)
    assert not _arguments.is_size(value)


def together(**options):
    network = nnce.MLP((4, 3), generator=torch.Generator().manual_seed(0))
    h = nnce.Hyperparameters("cross-entropy", options.pop("lr", 0.5), 0.5, 0.0)
    return Ensemble([network], [h], **{"batch_size": 2, **options})


def trained(**options):
    """The parameters after an epoch, which say what the options meant."""
    ensemble = together(**options)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(6, 4, generator=generator), torch.rand(6, 3, generator=generator)
    ensemble.train_epoch(x, y, torch.arange(6))
    return torch.cat([p.detach().flatten() for p in ensemble.networks[0].parameters()])


def layer(**options):
    return nnce.LinearSigmoidCrossEntropyLoss(
        **{"in_features": 3, "num_labels": 5, **options},
        generator=torch.Generator().manual_seed(0),
    )


def loss_of_labels(**options):
    x, W = torch.linspace(-1, 1, 6).view(2, 3), torch.linspace(-2, 1, 15).view(5, 3)
    return nnce.linear_sigmoid_cross_entropy(x, W, torch.tensor([1, 4]), **options)


def loss_of_pairs(scale=2.0, bias=-1.0, **options):
    x, y = torch.linspace(-1, 1, 6).view(2, 3), torch.linspace(-2, 1, 6).view(2, 3)
    return nnce.pair_sigmoid_cross_entropy(x, y, scale, bias, **options)


def loss(**options):
    z, y = torch.linspace(-2, 2, 6).view(2, 3), torch.tensor([[0, 1, -7], [1, 0, 0]])
    return nnce.sigmoid_cross_entropy(z, y, **{"ignore_index": -7, **options})


DATASET = data.load("digits", train_size=20)


def planned(seeds):
    lrs = {"quadratic": [3.0], "cross-entropy": [0.5]}
    return side_by_side.plan(Settings(hidden=(3,), epochs=1), lrs, seeds, DATASET)


# What takes a number, and that number as Python has it: a value that compares says what was made.
PLACES = {
    "sizes": (lambda v: nnce.MLP((4, v, 2)).sizes, 3),
    "in_features": (lambda v: nnce.Linear(v, 2).extra_repr(), 3),
    "out_features": (lambda v: nnce.Linear(2, v).extra_repr(), 3),
    "init": (lambda v: repr(nnce.Linear(2, 2, init=v)), 0.5),
    "label_smoothing": (lambda v: loss(label_smoothing=v), 0.25),
    "label_smoothing of a module": (
        lambda v: repr(nnce.SigmoidCrossEntropyLoss(label_smoothing=v)),
        0.25,
    ),
    "ignore_index": (lambda v: loss(ignore_index=v), -7),
    "ignore_index of a module": (
        lambda v: repr(nnce.SigmoidCrossEntropyLoss(ignore_index=v)),
        -7,
    ),
    "features of labels": (lambda v: layer(in_features=v).weight.shape, 4),
    "num_labels": (lambda v: repr(layer(num_labels=v)), 4),
    "prior": (lambda v: repr(layer(prior=v)), 0.25),
    "block of a layer": (lambda v: repr(layer(block=v)), 2),
    "block": (lambda v: loss_of_labels(block=v), 2),
    "smoothing of labels": (lambda v: loss_of_labels(label_smoothing=v), 0.25),
    "k": (lambda v: layer().topk(torch.ones(2, 3), v)[1], 2),
    "scale": (lambda v: loss_of_pairs(scale=v), 3),
    "bias": (lambda v: loss_of_pairs(bias=v), -0.5),
    "block of pairs": (lambda v: loss_of_pairs(block=v), 2),
    "batch_size": (lambda v: trained(batch_size=v), 4),
    "threads": (lambda v: trained(threads=v), 1),
    "lr": (lambda v: trained(lr=v), 0.25),
    "number": (lambda v: together().outputs(v, torch.ones(1, 4)), 0),
    "lrs": (lambda v: (e := together(), e.set_lrs([v]), repr(e.hyperparameters))[2], 0.25),
    **{
        name: (lambda v, name=name: repr(Settings(epochs=3, **{name: v})), value)
        for name, value in {
            "batch_size": 5,
            "lr": 0.25,
            "momentum": 0.5,
            "l2": 0.5,
            "init": 0.5,
        }.items()
    },
    "epochs": (lambda v: repr(Settings(epochs=v)), 3),
    "hidden": (lambda v: repr(Settings(hidden=(v, 2))), 3),
    "seed": (lambda v: repr(Settings(seed=v)), 3),
    "dropout": (lambda v: repr(Settings(dropout=v)), 0.5),
    "input_dropout": (lambda v: repr(Settings(input_dropout=v)), 0.5),
    "step_size": (lambda v: repr(Schedule("step", v, 0.5)), 3),
    "gamma": (lambda v: repr(Schedule("step", 2, v)), 0.5),
    "cosine_epochs": (lambda v: repr(Schedule("cosine", cosine_epochs=v)), 3),
    "warmup": (lambda v: repr(Schedule(warmup=v)), 3),
    "warmup_start": (lambda v: repr(Schedule(warmup=3, warmup_start=v)), 0.5),
    "rotation": (lambda v: repr(data.Distortion(rotation=v)), 7),
    "train_size": (lambda v: data.load("digits", train_size=v).train.x, 5),
    "seeds": (lambda v: repr(planned(v)), 2),
    "every": (lambda v: steps_logged(v), 3),
    "n": (
        lambda v: repr(nnce.Positives.from_coo(torch.tensor([1]), torch.tensor([0]), v)),
        3,
    ),
}


class Writer(set):
    """The steps at which points are added."""

    def add_scalar(self, name, value, step):
        self.add(step)


def steps_logged(every):
    network, writer = nnce.MLP((2, 2)), Writer()
    with nnce.watch(network, writer, every=every):
        for _ in range(5):
            nnce.sigmoid_cross_entropy(network(torch.zeros(1, 2)), torch.zeros(1, 2)).backward()
    return writer


def same(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("place", PLACES)
def test_numpys_numbers_mean_what_pythons_do(place):
    use, value = PLACES[place]
    kinds = (np.int64, np.int16) if isinstance(value, int) else (np.float32, np.float64)
    expected = use(value)
    for kind in kinds:
        assert same(use(kind(value)), expected)


@pytest.mark.parametrize("place", PLACES)
def test_booleans_and_text_are_refused_and_named(place):
    use, value = PLACES[place]
    for wrong in (True, np.bool_(True), repr(value)):
        with pytest.raises((TypeError, ValueError, IndexError), match=r"^expected ") as caught:
            use(wrong)
    sentence = str(caught.value)  # of the text, which is told apart from the number that it spells
    assert repr(wrong) in sentence or sentence.endswith("got str")


def test_small_integer_types_do_not_overflow():
    """Sizes of int8 multiply as Python's: 100 × 100 is no int8."""
    network = nnce.MLP((np.int8(100), np.int8(100)))
    assert network[0].weight.shape == (100, 100) and all(type(n) is int for n in network.sizes)
    assert network.sizes == nnce.MLP(np.array([100, 100], dtype=np.int8)).sizes


def test_a_sequence_of_sizes_may_be_an_array():
    assert nnce.MLP(np.array([4, 3, 2])).sizes == (4, 3, 2)
    with pytest.raises(ValueError, match=r"at least two positive whole sizes.*got array\(\[4\.5"):
        nnce.MLP(np.array([4.5, 3]))


def test_what_is_not_there_is_refused_by_data_in_its_own_error():
    for wrong in (np.float64(5), np.bool_(True), math.nan):
        with pytest.raises(DataError, match=r"^expected a train size"):
            data.load("digits", train_size=wrong)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_modules_take_numpys_numbers(backend):
    z, y = torch.linspace(-2, 2, 6).view(2, 3), torch.tensor([[0, 1, -7], [1, 0, 0]])
    options = {"label_smoothing": np.float32(0.25), "ignore_index": np.int64(-7)}
    module = nnce.SigmoidCrossEntropyLoss(**options)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    # Compiled code composes the rules; eager code is a fused pass, which rounds differently.
    torch.testing.assert_close(compiled(z, y), module(z, y), rtol=1e-6, atol=0)
    wide = layer(block=np.int64(2), label_smoothing=np.float32(0.25))
    x, target = torch.ones(2, 3), torch.tensor([1, 4])
    compiled = torch.compile(wide, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x, target), wide(x, target))
