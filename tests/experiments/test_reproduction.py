"""A row of a table, trained from many starts: what is chosen on what."""

import math
from dataclasses import asdict, astuple

import pytest
import torch
from toys import ROW

from nnce import data, training
from nnce.experiments import reproduction
from nnce.experiments.published import Row, Table
from nnce.training import Settings


def test_a_committee_decides_by_the_mean_output(digits):
    networks = [
        training.initial_state(Settings(hidden=(8,), seed=seed), digits).network
        for seed in range(3)
    ]
    x, y = digits.test
    mean = sum(torch.sigmoid(network(x)) for network in networks) / 3
    expected = (mean.argmax(1) == y.argmax(1)).double().mean().item()
    assert reproduction.committee_accuracy(networks, digits.test) == pytest.approx(expected)


def test_what_trains_and_chooses_cannot_see_the_test_set(digits, monkeypatch):
    """Another test set changes test figures alone; and it is not looked at before the end."""
    looked = []
    evaluate, records = training.evaluate, training.records

    def spied_evaluate(output, split, loss):
        looked.append(split.x.data_ptr())
        return evaluate(output, split, loss)

    def spied_records(networks, losses, measured, **more):
        looked.extend(split.x.data_ptr() for split in measured.values())
        return records(networks, losses, measured, **more)

    for module in (training, training.evaluation):
        monkeypatch.setattr(module, "evaluate", spied_evaluate)
        monkeypatch.setattr(module, "records", spied_records)

    def outcome(test):
        attempt = reproduction.Attempt(ROW, ROW.settings, digits._replace(test=test), [0, 1])
        list(attempt.epochs())
        assert looked and test.x.data_ptr() not in looked
        found = attempt.finish(test)
        assert test.x.data_ptr() in looked
        looked.clear()
        return found, [run.network for run in attempt.runs]

    x, y = digits.test
    (honest, networks), (scrambled, others) = (
        outcome(data.Split(x, y)),
        outcome(data.Split(x.flip(0).clone(), y.roll(7, 1))),
    )
    for a, b in zip(networks, others, strict=True):
        assert all(map(torch.equal, a.parameters(), b.parameters()))
    for a, b in zip(honest.trained, scrambled.trained, strict=True):
        assert astuple(a)[:5] == astuple(b)[:5] and a.chosen_test != b.chosen_test
        assert math.isnan(a.best_test)
    assert honest.curve == scrambled.curve


def test_a_spread_is_of_what_there_is():
    """Not of starts that have diverged, nor of what was not measured."""
    nan = math.nan
    table = Table("A toy", "no one", "error", 3, (ROW,))
    trained = [
        reproduction.Trained(0, False, 1, 0.9, 0.8, nan, 0.97, 0.96),
        reproduction.Trained(1, True, 1, 0.1, 0.1, nan, nan, nan),
        reproduction.Trained(2, False, 1, 0.7, 0.6, nan, 0.95, 0.94),
    ]
    outcome = reproduction.Outcome("T1", trained, nan, [], 1.0)
    mean, sd, low, high, n = outcome.spread(table, "chosen_test")
    assert (mean, low, high, n) == (*map(pytest.approx, (4.0, 3.0, 5.0)), 2)
    assert sd == pytest.approx(math.sqrt(2))
    assert outcome.spread(table, "best_test").n == 0
    again = reproduction.Outcome.from_dict(asdict(outcome))
    assert astuple(again.trained[0]) == pytest.approx(astuple(trained[0]), nan_ok=True)


def test_a_trial_is_cut_short_and_no_longer():
    assert reproduction.protocol(ROW, epochs=1).epochs == 1
    assert reproduction.protocol(ROW, epochs=9) == reproduction.protocol(ROW) == ROW.settings


def test_dropout_is_trained_in_turn_and_goes_on(digits):
    """What is chosen and shown is as if it had not been stopped between two networks."""
    settings = Settings(hidden=(8,), dropout=0.5, epochs=3, batch_size=100)
    row = Row("T", settings)
    alone = reproduction.Attempt(row, settings, digits, [0, 1])
    assert list(alone.epochs()) == [0, 1, 2, 3] and alone.next_epoch == 4
    expected = alone.finish(digits.test)
    assert len(expected.curve) == 4 and expected.committee > 0.5
    for steps in (1, 14, 20, 31):
        count = iter(range(steps))

        def between(count=count):
            if next(count, None) is None:
                raise KeyboardInterrupt

        first = reproduction.Attempt(row, settings, digits, [0, 1])
        with pytest.raises(KeyboardInterrupt):
            list(first.epochs(between))
        # Of the epoch in which it stopped one network may have its record, and it is not yielded.
        assert first.next_epoch == min(len(run.records) for run in first.runs)
        second = reproduction.Attempt(row, settings, digits, [0, 1])
        second.load_state_dict(first.state_dict())
        list(second.epochs())
        found = second.finish(digits.test)
        assert found.curve == expected.curve and found.committee == expected.committee
        for a, b in zip(found.trained, expected.trained, strict=True):
            assert a == pytest.approx(b, nan_ok=True)
        for a, b in zip(second.runs, alone.runs, strict=True):
            assert all(map(torch.equal, a.network.parameters(), b.network.parameters()))


def test_networks_in_turn_that_diverge_are_given_up(digits):
    settings = Settings(hidden=(8,), dropout=0.5, epochs=2, lr=1e38)
    attempt = reproduction.Attempt(Row("T", settings), settings, digits, [0, 1])
    list(attempt.epochs())
    found = attempt.finish(digits.test)
    assert all(one.diverged for one in found.trained) and list(found.curve) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [({"chosen": []}, "shorter"), ({"training": {}}, "KeyError"), ({"chosen": None}, "TypeError")],
)
def test_a_state_that_does_not_fit_is_refused(change, message, digits):
    attempt = reproduction.Attempt(ROW, ROW.settings, digits, [0])
    with pytest.raises(ValueError, match=message):
        attempt.load_state_dict({**attempt.state_dict(), **change})


def test_what_has_diverged_has_no_say(digits):
    """Neither in the committee nor in the curve."""
    plain = Row("T", Settings(hidden=(8,), epochs=1))
    attempt = reproduction.Attempt(plain, plain.settings, digits, [0, 1, 2])
    list(attempt.epochs())
    honest = attempt.finish(digits.test)
    expected = reproduction.committee_accuracy([run.network for run in attempt.runs], digits.test)
    assert all(one.chosen_epoch == 1 for one in honest.trained)
    assert honest.committee == expected
    attempt.runs[1].stopped = True
    found = attempt.finish(digits.test)
    rest = [run for number, run in enumerate(attempt.runs) if number != 1]
    assert found.committee == reproduction.committee_accuracy(
        [run.network for run in rest], digits.test
    )
    curve = [sum(run.records[e].accuracy["validation"] for run in rest) / 2 for e in (0, 1)]
    assert found.curve == pytest.approx(curve)
    assert [one.diverged for one in found.trained] == [False, True, False]
    for run in attempt.runs:
        run.stopped = True
    nothing = attempt.finish(digits.test)
    assert math.isnan(nothing.committee) and list(nothing.curve) == []
