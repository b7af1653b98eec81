"""Comparison of both losses over seeds and rates: the best rates, and statistics.

The networks are paired (`side_by_side`), so the confidence intervals cover initialization and
mini-batch order together.
"""

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from nnce import data, training
from nnce.engines import loops
from nnce.experiments.estimates import (
    DIFFERENCE,
    SHARE,
    Difference,
    Estimate,
    estimate,
    holm,
    paired_difference,
)
from nnce.experiments.side_by_side import Run, Variant, by_variant
from nnce.losses import LOSSES, Loss
from nnce.training import Engine, Settings

# "backprop" is one of the first two engines.
_ENGINES: tuple[Engine, ...] = ("loops", "products", "functions", "autograd")
# Training examples for the comparison of the engines: 200 mini-batches of 10.
_ENGINE_EXAMPLES = 2_000


def best_lrs(runs: Sequence[Run]) -> dict[Loss, float]:
    """For each loss, the rate with the highest mean validation accuracy after the last epoch.

    Rates at which any network diverged are excluded; a loss without other rates is missing.
    """
    scores: dict[Loss, dict[float, float]] = {}
    for variant, of_variant in by_variant(runs).items():
        if not any(run.diverged for run in of_variant):
            score = statistics.fmean(run.last.accuracy["validation"] for run in of_variant)
            scores.setdefault(variant.loss, {})[variant.lr] = score
    return {loss: max(by_lr, key=by_lr.__getitem__) for loss, by_lr in scores.items()}


MEASURES: dict[str, Callable[[Run], float]] = {
    "first epoch": lambda run: run.records[1].accuracy["test"],
    "last epoch": lambda run: run.last.accuracy["test"],
    "best validation epoch": lambda run: run.best.accuracy["test"],
}
"""Test accuracies in [0, 1] by which variants are compared, by their epoch."""
ACCURACIES = (0.90, 0.95, 0.97)
"""Validation accuracies for `Summary.epochs_to`."""


class Summary(NamedTuple):
    """Results of one variant, over its networks that did not diverge."""

    variant: Variant
    networks: int
    """Number of networks, including the diverged ones."""
    diverged: int
    epochs: int
    """The last finished epoch."""
    test_accuracy: dict[str, Estimate]
    """Test accuracy, by the keys of `MEASURES`."""
    epochs_to: dict[float, list[int | None]]
    """Epochs of each network to reach the accuracies in `ACCURACIES`; None if never reached."""
    saturated: tuple[float, float]
    """Mean share of output neurons with σ'(z) < 0.01, before training and at the end."""
    seconds: float
    """Mean training time of a network."""
    chosen: bool
    """Whether the rate is the best one for its loss, and the variant is not a control."""


def summarize(runs: Sequence[Run], best: Mapping[Loss, float]) -> Summary:
    """Summarize the runs of one variant, given the best rate of each loss."""
    variant = runs[0].variant
    whole = [run for run in runs if not run.diverged]

    def mean(values: list[float]) -> float:
        return statistics.fmean(values) if values else math.nan

    return Summary(
        variant=variant,
        networks=len(runs),
        diverged=len(runs) - len(whole),
        epochs=runs[0].last.epoch,
        test_accuracy={
            name: estimate([measure(run) for run in whole], SHARE)
            for name, measure in MEASURES.items()
        },
        epochs_to={accuracy: [run.epochs_to(accuracy) for run in whole] for accuracy in ACCURACIES},
        saturated=(
            mean([run.records[0].layers[-1].saturated for run in whole]),
            mean([run.last.layers[-1].saturated for run in whole]),
        ),
        seconds=mean([sum(record.seconds for record in run.records) for run in runs]),
        chosen=variant.engine == "backprop" and best.get(variant.loss) == variant.lr,
    )


class Comparison(NamedTuple):
    """Paired difference, cross-entropy minus quadratic, at one rate each."""

    quadratic_lr: float
    cross_entropy_lr: float
    difference: dict[str, Difference]
    """Difference of test accuracy, by the keys of `MEASURES`."""


def compare(runs: Sequence[Run], quadratic_lr: float, cross_entropy_lr: float) -> Comparison:
    """Compare the losses at one rate each, over the seeds for which neither diverged."""
    variants = by_variant([run for run in runs if not run.diverged])
    quadratic, cross_entropy = (
        {run.settings.seed: run for run in variants.get(variant, [])}
        for variant in (
            Variant("quadratic", quadratic_lr),
            Variant("cross-entropy", cross_entropy_lr),
        )
    )
    seeds = [seed for seed in cross_entropy if seed in quadratic]
    return Comparison(
        quadratic_lr,
        cross_entropy_lr,
        {
            name: paired_difference(
                [measure(cross_entropy[seed]) for seed in seeds],
                [measure(quadratic[seed]) for seed in seeds],
                DIFFERENCE,
            )
            for name, measure in MEASURES.items()
        },
    )


def _corrected(comparisons: dict[str, Comparison]) -> dict[str, Comparison]:
    """Add p-values corrected for the total number of tests."""
    ps = [d.p for compared in comparisons.values() for d in compared.difference.values()]
    corrected = iter(holm(ps))
    return {
        at: compared._replace(
            difference={
                name: difference._replace(p_holm=next(corrected))
                for name, difference in compared.difference.items()
            }
        )
        for at, compared in comparisons.items()
    }


class EngineDifference(NamedTuple):
    """Difference between an engine and autograd after a short training run in float64."""

    loss: Loss
    engine: Engine
    steps: int
    difference: float
    """Largest absolute difference of a parameter."""


def engine_differences(
    settings: Sequence[Settings], dataset: data.Dataset
) -> list[EngineDifference]:
    """Train one epoch of the first 2,000 examples in float64 by every engine, and compare.

    In float32, training amplifies differences in rounding. float64 leaves enough digits to show
    that the engines agree, except at large rates or with momentum.
    """
    n = _ENGINE_EXAMPLES
    short = data.Dataset(*(data.Split(x[:n].double(), y[:n].double()) for x, y in dataset))
    differences = []
    for of_loss in settings:
        trained: dict[Engine, training.State] = {}
        for engine in _ENGINES:
            if engine == "loops" and not loops.is_available():
                continue
            one = dataclasses.replace(of_loss, engine=engine, epochs=1)
            trained[engine] = training.initial_state(one, short)
            with contextlib.suppress(training.Diverged):  # in all engines alike: NaN difference
                for _ in training.train(trained[engine], one, short):
                    pass
        control = trained.pop("autograd")
        for engine, state in trained.items():
            pairs = zip(state.network.parameters(), control.network.parameters(), strict=True)
            difference = max((a - b).abs().max().item() for a, b in pairs)
            differences.append(
                EngineDifference(of_loss.loss, engine, state.cursor.step, difference)
            )
    return differences


class ControlDifference(NamedTuple):
    """Test accuracy of a control minus that of the network it repeats, in [−1, 1].

    In float32, training amplifies differences in rounding; see `engine_differences` for float64.
    """

    loss: Loss
    lr: float
    seed: int
    first_epoch: float
    last_epoch: float
    largest: float
    """Largest absolute difference over all epochs."""


def control_differences(runs: Sequence[Run], controls: Sequence[Run]) -> list[ControlDifference]:
    """Differences of all controls that have finished at least one epoch."""
    twins = {(run.variant, run.settings.seed): run for run in runs}
    all_differences = []
    for run in controls:
        twin = twins[run.variant._replace(engine="backprop"), run.settings.seed]
        differences = [
            a.accuracy["test"] - b.accuracy["test"]
            for a, b in zip(run.records, twin.records, strict=False)
        ]
        if len(differences) > 1:
            loss, lr, _ = run.variant
            all_differences.append(
                ControlDifference(
                    loss,
                    lr,
                    run.settings.seed,
                    first_epoch=differences[1],
                    last_epoch=differences[-1],
                    largest=max(map(abs, differences)),
                )
            )
    return all_differences


class Findings(NamedTuple):
    """Results of a comparison."""

    best_lrs: dict[Loss, float]
    """Best rate of each loss."""
    summaries: list[Summary]
    comparisons: dict[str, Comparison]
    """Comparisons by rates: "both 1", and "best: 3 and 1" (quadratic first); no pair twice."""
    engines: list[EngineDifference]
    controls: list[ControlDifference]
    notes: list[str]
    """Caveats, one sentence each."""


def conclude(runs: Sequence[Run], controls: Sequence[Run], dataset: data.Dataset) -> Findings:
    """Evaluate runs and controls that are finished, or interrupted after their first epoch."""
    best = best_lrs(runs)
    variants = by_variant(runs)
    notes = []
    if runs[0].last.epoch < runs[0].settings.epochs:
        notes.append(f"**Interrupted after epoch {runs[0].last.epoch}.**")
    elif any(run.last.epoch < run.settings.epochs and not run.stopped for run in controls):
        notes.append("**Interrupted; the control is not finished.**")
    for loss in LOSSES:
        grid = [variant.lr for variant in variants if variant.loss == loss]
        if loss not in best:
            notes.append(f"No usable rate for {loss}: all diverged.")
        elif len(grid) > 1 and best[loss] in (min(grid), max(grid)):
            notes.append(f"The best rate for {loss}, {best[loss]:g}, is at the edge of its grid.")
    if len({run.settings.seed for run in runs}) == 1:
        notes.append("With one seed there are no intervals and p-values; use --seeds 8.")
    comparisons = {
        f"both {variant.lr:g}": compare(runs, variant.lr, variant.lr)
        for variant in variants
        if variant.loss == "quadratic" and variant._replace(loss="cross-entropy") in variants
    }
    if len(best) == len(LOSSES):
        slow, fast = best["quadratic"], best["cross-entropy"]
        if slow == fast:  # the same test must not count twice in Holm's correction
            del comparisons[f"both {slow:g}"]
        comparisons[f"best: {slow:g} and {fast:g}"] = compare(runs, slow, fast)
    comparisons = _corrected(comparisons)
    common = runs[0].settings
    return Findings(
        best,
        [
            summarize(of_variant, best)
            for of_variant in by_variant([*runs, *controls]).values()
            if len(of_variant[0].records) > 1
        ],
        comparisons,
        engine_differences(
            [dataclasses.replace(common, loss=loss, lr=lr) for loss, lr in best.items()], dataset
        ),
        control_differences(runs, controls),
        notes,
    )
