import math

import pytest

from nnce.experiments import comparison, comparison_report, side_by_side
from nnce.experiments.side_by_side import Run, Variant
from nnce.monitoring.saturation import LayerFigures
from nnce.training import Record, Settings

BASE = Settings(hidden=(8,), epochs=2)


def record(epoch, validation, test, loss=1.0):
    layers = [LayerFigures(1.0, 0.2, 0.1 * epoch, 0.2)]
    return Record(
        epoch,
        10 * epoch,
        0.5 if epoch else 0.0,
        {"train": loss, "validation": loss, "test": loss},
        {"train": 0.0, "validation": validation, "test": test},
        layers,
    )


def run(loss, lr, seed, curve, losses=None):
    """A run with given validation accuracies, epoch by epoch; the test's are one point lower."""
    settings = Settings(loss=loss, lr=lr, seed=seed)
    losses = losses or [1.0] * len(curve)
    records = [
        record(epoch, value, value - 0.01, loss)
        for epoch, (value, loss) in enumerate(zip(curve, losses, strict=True))
    ]
    return Run(settings, None, records)


def test_an_error_of_any_of_the_files_that_are_flushed_together_is_raised(tmp_path, monkeypatch):
    with comparison_report.Log(tmp_path, {}) as log:
        monitors = [log.monitor(Variant("quadratic", lr)) for lr in (0.1, 1.0, 3.0)]
        log.flush()

        def flush(monitor):
            if monitor is monitors[1]:
                raise OSError("disk full")

        monkeypatch.setattr(comparison_report.Monitor, "flush", flush)
        with pytest.raises(OSError, match="disk full"):
            log.flush()


def test_engines_agree_in_float64(digits):
    settings = [Settings(loss=loss, hidden=(8,)) for loss in ("quadratic", "cross-entropy")]
    differences = comparison.engine_differences(settings, digits)
    assert {(f.loss, f.engine) for f in differences} == {
        (loss, engine)
        for loss in ("quadratic", "cross-entropy")
        for engine in ("loops", "products", "functions")
    }
    for f in differences:
        assert f.steps == 120 and 0 <= f.difference < 1e-12


def test_a_diverging_rate_leaves_the_others_alone(digits):
    def train(lrs):
        runs = side_by_side.make_runs(side_by_side.plan(BASE, lrs, 2, digits), digits)
        list(side_by_side.SideBySide(runs, digits).epochs())
        return {(r.variant, r.settings.seed): r for r in runs}

    wild = train({"quadratic": [1.0], "cross-entropy": [0.5, 1e38]})
    calm = train({"quadratic": [1.0], "cross-entropy": [0.5]})
    diverged = {key for key, r in wild.items() if r.diverged}
    assert diverged == {(Variant("cross-entropy", 1e38), seed) for seed in (0, 1)}
    for key, r in calm.items():
        assert wild[key].last.loss == pytest.approx(r.last.loss, rel=1e-5)
    runs = list(wild.values())
    assert comparison.best_lrs(runs) == {"quadratic": 1.0, "cross-entropy": 0.5}
    best = comparison.best_lrs(runs)
    summary = comparison.summarize(
        side_by_side.by_variant(runs)[Variant("cross-entropy", 1e38)], best
    )
    assert not summary.chosen
    assert summary.diverged == summary.networks == 2
    assert summary.test_accuracy["last epoch"].n == 0


def test_the_rate_is_chosen_on_validation_after_the_last_epoch():
    runs = [
        run("quadratic", 1.0, 0, [0.1, 0.99, 0.90]),
        run("quadratic", 1.0, 1, [0.1, 0.99, 0.92]),
        run("quadratic", 3.0, 0, [0.1, 0.80, 0.93]),
        run("quadratic", 3.0, 1, [0.1, 0.80, 0.91]),
        run("cross-entropy", 0.5, 0, [0.1, 0.5, 0.5]),
        run("cross-entropy", 5.0, 0, [0.1, 0.9, 0.9], losses=[1.0, 1.0, math.nan]),
    ]
    assert comparison.best_lrs(runs) == {"quadratic": 3.0, "cross-entropy": 0.5}


def test_summary():
    summary = comparison.summarize(
        [
            run("quadratic", 1.0, 0, [0.1, 0.91, 0.96, 0.94]),
            run("quadratic", 1.0, 1, [0.1, 0.80, 0.92, 0.98]),
        ],
        {"quadratic": 1.0, "cross-entropy": 0.5},
    )
    assert summary.chosen
    assert summary.epochs == 3 and summary.diverged == 0
    assert summary.epochs_to == {0.90: [1, 2], 0.95: [2, 3], 0.97: [None, 3]}
    assert summary.test_accuracy["first epoch"].mean == pytest.approx((0.90 + 0.79) / 2)
    assert summary.test_accuracy["last epoch"].mean == pytest.approx((0.93 + 0.97) / 2)
    assert summary.test_accuracy["best validation epoch"].mean == pytest.approx((0.95 + 0.97) / 2)
    assert summary.saturated == pytest.approx((0.0, 0.3))
    assert summary.seconds == pytest.approx(1.5)


def test_compare_is_cross_entropy_minus_quadratic_by_seed():
    runs = [
        run("quadratic", 1.0, 0, [0.1, 0.5, 0.6]),
        run("quadratic", 1.0, 1, [0.1, 0.5, 0.8]),
        run("quadratic", 1.0, 2, [0.1, 0.5, 0.8]),
        # In another order, and one is missing, one diverged.
        run("cross-entropy", 1.0, 1, [0.1, 0.7, 0.9]),
        run("cross-entropy", 1.0, 0, [0.1, 0.7, 0.8]),
        run("cross-entropy", 1.0, 2, [0.1, 0.7, 0.1], losses=[1.0, 1.0, math.inf]),
    ]
    differences = comparison.compare(runs, 1.0, 1.0).difference
    assert differences["last epoch"].mean == pytest.approx((0.2 + 0.1) / 2)
    assert differences["last epoch"].n == 2
    assert differences["first epoch"].mean == pytest.approx(0.2)


def test_conclude_notes_what_a_reader_must_know(digits):
    runs = [
        run("quadratic", 1.0, 0, [0.1, 0.5]),
        run("quadratic", 3.0, 0, [0.1, 0.7]),
        run("cross-entropy", 1.0, 0, [0.1, 0.7], losses=[1.0, math.nan]),
    ]
    findings = comparison.conclude(runs, [], digits)
    assert findings.best_lrs == {"quadratic": 3.0}
    assert findings.notes == [
        "**Interrupted after epoch 1.**",  # of 30
        "The best rate for quadratic, 3, is at the edge of its grid.",
        "No usable rate for cross-entropy: all diverged.",
        "With one seed there are no intervals and p-values; use --seeds 8.",
    ]
    assert list(findings.comparisons) == ["both 1"]
    assert findings.comparisons["both 1"].difference["last epoch"].n == 0
    assert [difference.loss for difference in findings.engines] == 3 * ["quadratic"]


def test_a_test_is_not_counted_twice_where_best_rates_coincide(digits):
    """Three measures at two pairs of rates are six tests."""
    runs = [
        run(loss, lr, seed, [0.1, *(of + more * (1 + 0.01 * seed) for of in (0.5, last))])
        for loss, more in (("quadratic", 0.0), ("cross-entropy", 0.1))
        for lr, last in ((1.0, 0.6), (3.0, 0.7))
        for seed in range(3)
    ]
    findings = comparison.conclude(runs, [], digits)
    assert list(findings.comparisons) == ["both 1", "best: 3 and 3"]
    differences = [d for c in findings.comparisons.values() for d in c.difference.values()]
    assert len(differences) == 6
    least = min(d.p for d in differences)
    assert min(d.p_holm for d in differences) == pytest.approx(6 * least)


@pytest.mark.parametrize(
    ("gain", "verdict"), [(0.1, "cross-entropy is better"), (-0.1, "quadratic is better")]
)
def test_the_answer_says_which_is_better(gain, verdict, digits):
    runs = [
        run(loss, lr, seed, [0.1, 0.5 + more, 0.6 + more + 0.001 * seed * more])
        for loss, lr, more in (("quadratic", 3.0, 0.0), ("cross-entropy", 1.0, gain))
        for seed in range(3)
    ]
    first, second = comparison_report.answer(comparison.conclude(runs, [], digits)).splitlines()
    assert first.startswith("cross-entropy − quadratic, each at its best rate (1 and 3): ")
    assert f"{100 * gain:+.0f}.0".replace("-", "−") in first and first.endswith(verdict)
    assert second.startswith("After the first epoch: ")


@pytest.mark.parametrize(
    ("lrs", "gains", "verdict"),
    [
        ([3.0], (0.10, 0.12, 0.14), "cross-entropy is better"),  # p = 0.0092, three times
        (
            [1.0, 3.0],
            (0.10, 0.12, 0.14),
            "no difference shown after correction for 6 comparisons (p = 0.055)",
        ),
        ([3.0], (0.10, 0.10, 0.10), "no p-value, because all differences are equal"),
    ],
)
def test_the_answer_claims_no_more_than_the_corrected_p(lrs, gains, verdict, digits):
    """The interval of each difference alone excludes 0."""
    runs = [
        run(loss, lr, seed, [0.1, 0.5 + has * gain, 0.6 + 0.01 * lr + has * noise])
        for loss, has in (("quadratic", 0), ("cross-entropy", 1))
        for lr in lrs
        for seed, (gain, noise) in enumerate(
            zip(gains if lr == 3.0 else (0.01, -0.01, 0.02), (0.01, -0.01, 0.005), strict=True)
        )
    ]
    findings = comparison.conclude(runs, [], digits)
    assert findings.comparisons["best: 3 and 3"].difference["first epoch"].low > 0
    assert comparison_report.answer(findings).endswith(f": {verdict}")


def test_the_overview_is_at_most_100_columns_wide(digits):
    """Also where intervals are long, marked and of the best rate."""
    curves = {0: [0.1, 0.2, 1.0], 1: [0.1, 0.2, 1.0], 2: [0.1, 0.2, 0.7]}
    runs = [
        run(loss, lr, seed, curve)
        for loss in ("quadratic", "cross-entropy")
        for lr in (0.03, 10.0)
        for seed, curve in curves.items()
    ]
    text = comparison_report.overview(comparison.conclude(runs, [], digits))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and max(map(len, rows)) <= 100
    assert "† best" in rows[2] and text.count("Delta method on the logit") == 1


def test_control_differences():
    twin = run("quadratic", 1.0, 0, [0.1, 0.50, 0.60, 0.70])
    again = run("quadratic", 1.0, 0, [0.1, 0.51, 0.57, 0.70])
    again.settings = Settings(loss="quadratic", lr=1.0, seed=0, engine="autograd")
    (difference,) = comparison.control_differences([twin], [again])
    assert (difference.first_epoch, difference.last_epoch, difference.largest) == pytest.approx(
        (0.01, 0, 0.03)
    )
