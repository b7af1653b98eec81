"""Networks measured together, against each alone and against the formulas."""

import math

import pytest
import torch

import nnce
from nnce import data, rules, training
from nnce.engines import loops
from nnce.losses import LOSSES

SIZES = (64, 30, 20, 10)


def split(n, dtype, generator):
    x = torch.rand(n, SIZES[0], generator=generator, dtype=dtype)
    labels = torch.randint(SIZES[-1], (n,), generator=generator)
    return data.Split(x, torch.nn.functional.one_hot(labels, SIZES[-1]).to(dtype))


def measured(dtype, generator):
    """Of sizes that are not a multiple of the examples taken at once."""
    return {
        name: split(n, dtype, generator)
        for name, n in (("train", 1_201), ("validation", 2_003), ("test", 7))
    }


def networks(n, dtype, generator, init="large"):
    return [nnce.MLP(SIZES, init=init, generator=generator, dtype=dtype) for _ in range(n)]


def records(some, losses, splits, **options):
    return training.records(some, losses, splits, epoch=3, step=7, seconds=0.5, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_networks_together_have_the_figures_of_each_alone(dtype, threads, generator):
    splits = measured(dtype, generator)
    some = networks(21, dtype, generator)
    losses = ["quadratic" if number % 3 else "cross-entropy" for number in range(21)]
    together = records(some, losses, splits, threads=threads)
    for network, loss, record in zip(some, losses, together, strict=True):
        (alone,) = records([network], [loss], splits)
        assert record.accuracy == alone.accuracy
        assert record.loss == pytest.approx(alone.loss, rel=1e-12, abs=0)
        for layer, of_alone in zip(record.layers, alone.layers, strict=True):
            # dC/da of hidden layers is a batched product, whose bits depend on their number.
            assert layer == pytest.approx(of_alone, rel=100 * torch.finfo(dtype).eps, abs=0)
        assert (record.epoch, record.step, record.seconds) == (3, 7, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_figures_are_those_of_the_formulas(dtype, loss, generator):
    splits = measured(dtype, generator)
    some = networks(3, dtype, generator)
    rel = 1e-6 if dtype == torch.float32 else 1e-12  # products differ in their last bits
    for network, record in zip(some, records(some, [loss] * 3, splits), strict=True):
        for name, (x, y) in splits.items():
            z = network(x).detach().double()
            expected = LOSSES[loss].value(z, y.double()).sum(1).mean().item()
            right = (z.argmax(1) == y.argmax(1)).double().mean().item()
            alone = training.evaluate(network, data.Split(x, y), loss)
            assert record.loss[name] == pytest.approx(expected, rel=rel)
            assert alone.loss == pytest.approx(expected, rel=rel)
            assert record.accuracy[name] == alone.accuracy == pytest.approx(right, abs=1e-12)
        x, y = (part[:1_000] for part in splits["validation"])
        dz = nnce.backprop(network, x, y, loss=loss).dz
        for layer, of_layer in zip(record.layers, dz, strict=True):
            assert layer.dz_norm == pytest.approx(of_layer.norm(dim=1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_of_which_most_are_0_give_the_same_figures(dtype, generator):
    """Of 300 inputs a tenth is not 0: the first layer is done by loops where they are available."""
    x, y = split(1_100, dtype, generator)
    x = torch.rand(1_100, 300, generator=generator, dtype=dtype)
    x *= torch.rand(1_100, 300, generator=generator) < 0.1
    splits = {"validation": data.Split(x, y)}
    some = [nnce.MLP((300, 30, 10), generator=generator, dtype=dtype) for _ in range(9)]
    W, b = some[0][0].weight.detach()[None], some[0][0].bias.detach()[None]
    z = loops.first_layer(x, W, b)
    assert (z is not None) == loops.is_available()
    rel = 1e-6 if dtype == torch.float32 else 1e-12
    if z is not None:
        expected = x[7:40] @ W[0].T + b[0]
        torch.testing.assert_close(z(7, 40)[0], expected, rtol=10 * rel, atol=10 * rel)
    for network, record in zip(some, records(some, ["quadratic"] * 9, splits), strict=True):
        alone = training.evaluate(network, splits["validation"], "quadratic")
        assert record.loss["validation"] == pytest.approx(alone.loss, rel=rel)
        assert record.accuracy["validation"] == alone.accuracy
        assert record == records([network], ["quadratic"], splits)[0]


def test_a_diverged_network_leaves_its_neighbors_alone(generator):
    splits = measured(torch.float32, generator)
    some = networks(3, torch.float32, generator)
    (before, _, after) = records(some, ["quadratic"] * 3, splits)
    with torch.no_grad():
        some[1][0].weight.fill_(math.nan)
    first, diverged, last = records(some, ["quadratic"] * 3, splits)
    assert (first, last) == (before, after)
    assert all(map(math.isnan, diverged.loss.values()))


def test_equal_outputs_count_as_the_first_class(generator):
    (network,) = networks(1, torch.float32, generator)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    splits = measured(torch.float32, generator)
    (record,) = records([network], ["cross-entropy"], splits)
    for name, (_, y) in splits.items():
        assert record.accuracy[name] == pytest.approx(y[:, 0].mean().item())
        assert record.loss[name] == pytest.approx(10 * math.log(2), rel=1e-6)


def test_losses_of_half_precision_are_computed_in_float64(generator):
    network = nnce.MLP((64, 10), generator=generator, dtype=torch.bfloat16)
    part = split(500, torch.bfloat16, generator)
    z = network(part.x).detach().double()
    expected = rules.cross_entropy(z, part.y.double()).sum(1).mean().item()
    found = training.evaluate(network, part, "cross-entropy")
    assert found.loss == pytest.approx(expected, rel=1e-12)
