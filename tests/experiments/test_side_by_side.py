import pytest
import torch

from nnce import training
from nnce.experiments import side_by_side
from nnce.experiments.side_by_side import Run
from nnce.training import Settings

BASE = Settings(hidden=(8,), epochs=2)


def test_records_in_checkpoints_of_earlier_versions_are_a_list(digits):
    lrs = {"quadratic": [3.0], "cross-entropy": [0.5]}
    settings = side_by_side.plan(BASE, lrs, 2, digits)
    first, second = (
        side_by_side.SideBySide(side_by_side.make_runs(settings, digits), digits, threads=1)
        for _ in range(2)
    )
    for _ in first.epochs():
        pass
    state = first.state_dict()
    second.load_state_dict({**state, "records": list(state["records"])})
    assert [len(run.records) for run in second.runs] == [3] * 4
    assert [run.records for run in second.runs] == [run.records for run in first.runs]


def test_plan_pairs_every_loss_and_rate_with_every_seed(digits):
    lrs = {"quadratic": [3.0, 1.0, 3.0], "cross-entropy": [0.5]}
    settings = side_by_side.plan(BASE, lrs, 2, digits)
    planned = [(s.loss, s.lr, s.seed) for s in settings]
    assert planned == [
        ("quadratic", 3.0, 0),
        ("quadratic", 3.0, 1),
        ("quadratic", 1.0, 0),
        ("quadratic", 1.0, 1),
        ("cross-entropy", 0.5, 0),
        ("cross-entropy", 0.5, 1),
    ]


@pytest.mark.parametrize(
    ("lrs", "seeds", "message"),
    [
        (
            {"quadratic": [1.0], "cross-entropy": [1.0]},
            0,
            "integer number of seeds, at least 1, got 0",
        ),
        ({"quadratic": [1.0], "cross-entropy": [1.0]}, True, "number of seeds, at least 1"),
        ({"quadratic": [1.0]}, 1, "at least one learning rate for loss 'cross-entropy'"),
        ({"quadratic": [1.0], "cross-entropy": [-1.0]}, 1, "positive learning rate, got -1.0"),
        ({"quadratic": [1.0], "cross-entropy": [1.0], "hinge": [1.0]}, 1, "got 'hinge'"),
        ({"quadratic": [1.0], "cross-entropy": [1.0]}, 2**32 + 1, "seeds below 2\\*\\*32"),
    ],
)
def test_bad_plans(lrs, seeds, message, digits):
    with pytest.raises(ValueError, match=message):
        side_by_side.plan(BASE, lrs, seeds, digits)


def test_more_networks_than_memory_holds(digits):
    lrs = {"quadratic": [1.0], "cross-entropy": [1.0]}
    with pytest.raises(MemoryError, match=r"2,000,000,000 networks of sizes 64-8-10 would need"):
        side_by_side.plan(BASE, lrs, 1_000_000_000, digits)


@pytest.fixture(scope="module")
def trained(digits):
    """Two losses, two seeds, in float64."""
    dataset = type(digits)(*(type(s)(s.x.double(), s.y.double()) for s in digits))
    lrs = {"quadratic": [1.0], "cross-entropy": [0.5]}
    runs = side_by_side.make_runs(side_by_side.plan(BASE, lrs, 2, dataset), dataset)
    starts = [[p.detach().clone() for p in r.network.parameters()] for r in runs]
    assert list(side_by_side.SideBySide(runs, dataset).epochs()) == [0, 1, 2]
    return dataset, runs, starts


def test_starts_are_paired_and_differ_from_seed_to_seed(trained):
    _, runs, starts = trained
    by_seed = {}
    for r, start in zip(runs, starts, strict=True):
        by_seed.setdefault(r.settings.seed, []).append(start)
    for a, b in by_seed.values():
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert not torch.equal(by_seed[0][0][0], by_seed[1][0][0])


def test_the_control_retraces_every_network(trained):
    """Same start, same mini-batches, and autograd's gradients: the same curves in float64."""
    dataset, runs, _ = trained
    controls = side_by_side.controls(runs, dataset)
    assert list(controls.epochs()) == [0, 1, 2]
    for r, again in zip(runs, controls.runs, strict=True):
        assert again.variant == r.variant._replace(engine="autograd")
        for a, b in zip(again.network.parameters(), r.network.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        for a, b in zip(again.records, r.records, strict=True):
            assert a.accuracy == b.accuracy and a.step == b.step
            assert a.loss == pytest.approx(b.loss)


def test_packed_records_follow_the_records(trained):
    _, runs, _ = trained
    records = list(runs[0].records)
    r = Run(runs[0].settings, None, [])
    for some in ([], records[:1], records, records[:2], [records[0], records[2]], records[1:]):
        r.records[:] = some
        for _ in range(2):
            torch.testing.assert_close(r.packed_records(), training.pack(some), rtol=0, atol=0)


def test_records_say_what_training_does(trained):
    dataset, runs, _ = trained
    for r in runs:
        assert [record.epoch for record in r.records] == [0, 1, 2]
        assert r.last.step == 2 * 120 and r.last.seconds > 0
        network, loss = r.network, r.settings.loss
        alone = training.evaluate(network, dataset.test, loss)
        assert r.last.loss["test"] == pytest.approx(alone.loss)
        assert r.last.accuracy["test"] == alone.accuracy


def test_engines_in_the_graph_are_not_trained_side_by_side(digits):
    """They would be trained by another one, without their dropout."""
    whole, graph = Settings(hidden=(8,)), Settings(hidden=(8,), dropout=0.5)
    runs = side_by_side.make_runs([whole, graph], digits)
    with pytest.raises(ValueError, match="trained together, got 'functions'"):
        side_by_side.SideBySide(runs, digits)


def test_networks_in_turn_are_for_as_many_epochs(digits):
    settings = [Settings(hidden=(8,), epochs=epochs) for epochs in (1, 2)]
    with pytest.raises(ValueError, match="same number of epochs"):
        side_by_side.InTurn(settings, digits)


def test_a_diverging_control_is_marked(digits):
    settings = Settings(hidden=(8,), lr=1e38, epochs=3)
    run = Run(settings, training.make_network(settings, digits))
    controls = side_by_side.controls([run], digits)
    assert list(controls.epochs()) == [0, 1, 2, 3]
    (again,) = controls.runs
    assert len(again.records) == 1 and again.stopped and again.diverged
