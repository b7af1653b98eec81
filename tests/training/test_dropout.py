"""Neurons left out while a network learns: against the formula, and what training makes of it."""

import dataclasses

import pytest
import torch

import nnce
from nnce import rules, training
from nnce.training import Settings
from nnce.training.dropout import WithDropout
from nnce.training.parallel import World

SETTINGS = Settings((9, 8), engine="functions", lr=0.3, epochs=2, dropout=0.5, input_dropout=0.2)


def network(*sizes, dtype=torch.float64):
    return nnce.MLP(sizes, generator=torch.Generator().manual_seed(1), dtype=dtype)


def trained(settings, dataset):
    state = training.initial_state(settings, dataset)
    return state, list(training.train(state, settings, dataset))


def test_it_is_the_formula():
    """z and the gradients by the rules, with the numbers that are drawn for a step."""
    layers = network(6, 5, 4, 3)
    (W1, b1), (W2, b2), (W3, b3) = layers.weights_and_biases()
    x = torch.rand(7, 6, dtype=torch.float64)
    thinned = WithDropout(layers, input=0.2, hidden=0.5, stream=77)
    thinned.at_step(5)
    z = thinned(x)
    generator = torch.Generator().manual_seed(77 ^ 5)

    def mask(n, p):
        """A 16 bit number for each, four of them out of each draw, against p in 65,536ths."""
        drawn = torch.empty(-(-7 * n // 4), dtype=torch.int64)
        numbers = drawn.random_(-(2**63), None, generator=generator).view(torch.int16).int() + 2**15
        kept = numbers[: 7 * n].view(7, n) >= round(p * 2**16)
        return kept.double() / (1 - round(p * 2**16) / 2**16)

    m1, m2, m3 = mask(6, 0.2), mask(5, 0.5), mask(4, 0.5)
    with torch.no_grad():
        z1 = rules.linear(m1 * x, W1, b1)
        z2 = rules.linear(m2 * z1.sigmoid(), W2, b2)
        z3 = rules.linear(m3 * z2.sigmoid(), W3, b3)
    torch.testing.assert_close(z, z3, rtol=0, atol=1e-14)
    y = torch.nn.functional.one_hot(torch.arange(7) % 3, 3).double()
    nnce.sigmoid_cross_entropy(z, y, reduction="sum").backward()
    with torch.no_grad():
        dz3 = rules.dz_cross_entropy(z3, y)
        dz2 = rules.dz_hidden(m3 * rules.da_prev(dz3, W3), z2)
        dz1 = rules.dz_hidden(m2 * rules.da_prev(dz2, W2), z1)
        for W, b, dz, a_prev in (
            (W3, b3, dz3, m3 * z2.sigmoid()),
            (W2, b2, dz2, m2 * z1.sigmoid()),
            (W1, b1, dz1, m1 * x),
        ):
            torch.testing.assert_close(W.grad, rules.dW(dz, a_prev), rtol=0, atol=1e-14)
            torch.testing.assert_close(b.grad, rules.db(dz), rtol=0, atol=1e-14)


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.9])
def test_on_average_nothing_changes(p):
    """A single layer: the mean of z is z, and the share of what is left out is p."""
    layer = network(1000, 1)
    x = torch.ones(2000, 1000, dtype=torch.float64)
    with torch.no_grad():
        z = WithDropout(layer, input=p, hidden=0.0, stream=0)(x)
    expected, sd = layer(x[:1]).item(), (layer[0].weight.norm() * (p / (1 - p)) ** 0.5).item()
    assert z.mean().item() == pytest.approx(expected, abs=5 * sd / 2000**0.5)
    assert z.std().item() == pytest.approx(sd, rel=0.1)


class Unchanged(torch.nn.Linear):
    def forward(self, input):
        return input


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_next_to_nothing_and_next_to_all(p):
    """There is always one of 65,536 that may stay."""
    x = torch.ones(1, 2**20, dtype=torch.float64)
    layers = torch.nn.Sequential(Unchanged(1, 1))
    thinned = WithDropout(layers, input=p, hidden=0.0, stream=1)(x)
    kept = 1.0 if p < 0.5 else 2**16
    assert set(thinned.unique().tolist()) <= {0.0, kept} and kept in thinned
    assert thinned.count_nonzero() == pytest.approx(2**20 / kept, abs=20)


def test_each_step_and_each_example_has_a_network_of_its_own():
    thinned = WithDropout(network(50, 40, 1), input=0.0, hidden=0.5, stream=3)
    x = torch.rand(1, 50, dtype=torch.float64).expand(30, -1)
    drawn = []
    with torch.no_grad():
        for step in (0, 1, 2**33, 1):
            thinned.at_step(step)
            drawn.append(thinned(x))
    assert torch.equal(drawn[1], drawn[3])
    assert len({value.item() for of_step in drawn[:2] for value in of_step}) == 60


def test_nothing_left_out_is_the_network_itself():
    layers = network(6, 5, 3)
    x = torch.rand(4, 6, dtype=torch.float64)
    assert torch.equal(WithDropout(layers, input=0.0, hidden=0.0, stream=0)(x), layers(x))


def test_training_with_it(digits):
    """By the rules as by autograd, to the same bits each time; another seed leaves out others."""
    dataset = type(digits)(*(type(split)(*(t.double() for t in split)) for split in digits))
    (first, records), (again, _), (by_autograd, _) = (
        trained(settings, dataset)
        for settings in (SETTINGS, SETTINGS, dataclasses.replace(SETTINGS, engine="autograd"))
    )
    (without, _) = trained(dataclasses.replace(SETTINGS, dropout=0.0, input_dropout=0.0), dataset)
    for a, b, c, d in zip(
        *(s.network.parameters() for s in (first, again, by_autograd, without)), strict=True
    ):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-12)
        assert not torch.allclose(a, d)
    # It is measured with all its neurons.
    assert records[-1].loss["test"] == pytest.approx(
        training.evaluate(first.network, dataset.test, "cross-entropy").loss
    )


def test_seeds_and_processes_leave_out_others():
    layers, x = network(20, 1), torch.ones(1, 20, dtype=torch.float64)
    drawn = set()
    for seed in (0, 1):
        for world in (World(0, 2), World(1, 2)):
            one = training.with_dropout(layers, dataclasses.replace(SETTINGS, seed=seed), world)
            one.at_step(0)
            drawn.add(one(x).item())
    assert len(drawn) == 4


def test_what_makes_no_sense_is_refused():
    assert Settings(dropout=0.5).engine == Settings(input_dropout=0.5).engine == "functions"
    for engine in training.ENSEMBLE_ENGINES:
        with pytest.raises(ValueError, match=f"no dropout for engine '{engine}'.*'functions'"):
            Settings(engine=engine, dropout=0.5)
    for name in ("dropout", "input_dropout"):
        for value in (-0.1, 1, 1.0, float("nan"), "0.5", None, True, torch.tensor([0.1, 0.2])):
            with pytest.raises(ValueError, match=rf"expected {name} to be a number in \[0, 1\)"):
                Settings(**{name: value})
    with pytest.raises(ValueError, match="expected hidden neurons for dropout"):
        Settings(hidden=(), dropout=0.5)
    assert Settings(hidden=(), input_dropout=0.5).hidden == ()
