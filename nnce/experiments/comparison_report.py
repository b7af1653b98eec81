"""Tables, epochs.csv and TensorBoard runs of a comparison."""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnce import data
from nnce.experiments.comparison import (
    MEASURES,
    Comparison,
    Findings,
    Summary,
)
from nnce.experiments.epochs import EpochsFile, epoch_row
from nnce.experiments.estimates import CONFIDENCE, Difference, Estimate
from nnce.experiments.report import Row, counted, table
from nnce.experiments.side_by_side import CONTROL, Run, Variant, by_variant
from nnce.experiments.tensorboard import Monitor, options_table
from nnce.losses import LOSSES, Loss
from nnce.training import Record

READING = """\
At equal rates, part of the difference is the step size: dC/dz of the cross-entropy is that of the
quadratic loss without the factor σ'(z) ≤ ¼. The fair comparison is at the best rate of each loss,
the one with the highest mean validation accuracy after the last epoch. Each seed determines initial
parameters and mini-batch order, so the intervals cover both. p is from the paired t-test; the last
column corrects it for the number of differences in this table, by Holm's method."""
BY_LOGIT = """\
† Delta method on the logit of the mean, because Student's t interval exceeds the possible range."""
_MARK = "†"


def _summary_row(summary: Summary) -> Row:
    """Flatten a summary to a row of results.json."""
    row: dict[str, object] = {
        **summary.variant._asdict(),
        "chosen": summary.chosen,
        "networks": summary.networks,
        "diverged": summary.diverged,
        "epochs": summary.epochs,
    }
    for name, accuracy in summary.test_accuracy.items():
        row |= {f"test accuracy, {name}, {key}": value for key, value in accuracy._asdict().items()}
    for threshold, epochs in summary.epochs_to.items():
        row[f"epochs to {threshold:.0%} validation accuracy"] = epochs
    row["saturated outputs at the start"], row["saturated outputs at the end"] = summary.saturated
    row["seconds a network"] = summary.seconds
    return row


def results(findings: Findings) -> dict[str, Any]:
    """Entries of results.json: answer, rows, best rates and differences."""
    return {
        "answer": answer(findings),
        "rows": [_summary_row(summary) for summary in findings.summaries],
        "best_lrs": findings.best_lrs,
        "notes": findings.notes,
        "differences": [
            {
                "at": at,
                "quadratic_lr": compared.quadratic_lr,
                "cross_entropy_lr": compared.cross_entropy_lr,
                "test accuracy": name,
                **difference._asdict(),
            }
            for at, compared in findings.comparisons.items()
            for name, difference in compared.difference.items()
        ],
        "engines": [difference._asdict() for difference in findings.engines],
        "control": [difference._asdict() for difference in findings.controls],
    }


def _name_columns(summary: Summary) -> Row:
    """Columns that identify the variant of a row."""
    return {
        "loss": summary.variant.loss,
        "rate": f"{summary.variant.lr:g}",
        "engine": summary.variant.engine,
        "n": summary.test_accuracy["last epoch"].n,
    }


def _accuracy_row(summary: Summary) -> Row:
    """Row of the table of test accuracies, in percent."""
    notes = ["best on validation"] if summary.chosen else []
    if summary.variant.engine == "autograd":
        notes.append("control")
    if summary.diverged:
        notes.append(f"DIVERGED: {summary.diverged} of {summary.networks}")
    return {
        **_name_columns(summary),
        **{
            f"test %, {name}": percent(accuracy)
            for name, accuracy in summary.test_accuracy.items()
            if name != "first epoch"
        },
        "": "; ".join(notes),
    }


def _learning_row(summary: Summary) -> Row:
    """Row of the table on speed of learning."""
    start, end = summary.saturated
    return {
        **_name_columns(summary),
        "test %, first epoch": percent(summary.test_accuracy["first epoch"]),
        **{
            f"epochs to {100 * accuracy:.0f} %": median(epochs)
            for accuracy, epochs in summary.epochs_to.items()
        },
        "saturated, %": "" if math.isnan(end) else f"{100 * start:.0f} → {100 * end:.0f}",
        "s/network": f"{summary.seconds:.2f}",
    }


def percent(estimate: Estimate, *, sd: bool = True) -> str:
    """Format mean, standard deviation (optional) and interval in percent."""
    if estimate.n < 2:
        return f"{100 * estimate.mean:.2f}" if estimate.n else ""
    mean, spread, low, high = (100 * value for value in estimate[:4])
    mark = _MARK if estimate.by_logit else ""
    return f"{mean:.2f}{f' ± {spread:.2f}' * sd} ({low:.2f} to {high:.2f}){mark}"


def _points(value: float) -> str:
    """Format a difference of shares in percentage points."""
    return f"{100 * value:+.2f}".replace("-", "−")


def _interval(difference: Difference) -> str:
    mark = _MARK if difference.by_logit else ""
    return f"{_points(difference.low)} to {_points(difference.high)}{mark}"


def _difference(difference: Difference) -> str:
    """Format a difference and its interval in percentage points."""
    if difference.n < 2:
        return _points(difference.mean) if difference.n else ""
    return f"{_points(difference.mean)} ({_interval(difference)})"


def answer(findings: Findings) -> str:
    """Summarize the effect of the loss on test accuracy in one or two sentences."""
    best, epochs = findings.best_lrs, findings.summaries[0].epochs
    if len(best) < len(LOSSES):
        diverged = " and ".join(loss for loss in LOSSES if loss not in best)
        return f"No comparison: {diverged} diverged at every rate."
    slow, fast = best["quadratic"], best["cross-entropy"]
    difference = next(
        compared.difference
        for compared in findings.comparisons.values()
        if (compared.quadratic_lr, compared.cross_entropy_lr) == (slow, fast)
    )
    first, last = difference["first epoch"], difference["last epoch"]
    tests = sum(
        math.isfinite(one.p_holm)
        for compared in findings.comparisons.values()
        for one in compared.difference.values()
    )
    after = f"after {counted(epochs, 'epoch')}" if epochs > 1 else "after the first epoch"
    sentence = (
        f"cross-entropy − quadratic, each at its best rate ({fast:g} and {slow:g}): "
        f"{_points(last.mean)} points of test accuracy {after}"
    )
    if last.n < 2:
        return f"{sentence}; no interval from one seed: use --seeds 8."
    lines = [f"{sentence} (95 % {_interval(last)}, n = {last.n}): {_verdict(last, tests)}"]
    if epochs > 1:
        lines.append(
            f"After the first epoch: {_points(first.mean)} (95 % {_interval(first)}): "
            f"{_verdict(first, tests)}"
        )
    return "\n".join(lines)


def _verdict(difference: Difference, tests: int) -> str:
    """Conclude from the interval, and from p corrected for the number of tests."""
    if difference.low <= 0 <= difference.high:
        return "no difference shown"
    if math.isnan(difference.p_holm):
        return "no p-value, because all differences are equal"
    if difference.p_holm >= 1 - CONFIDENCE:
        comparisons = counted(tests, "comparison")
        return (
            f"no difference shown after correction for {comparisons} (p = {difference.p_holm:.2g})"
        )
    return f"{'cross-entropy' if difference.mean > 0 else 'quadratic'} is better"


def overview(findings: Findings) -> str:
    """Table of both losses with one row per rate, and the notes."""
    by_variant = {summary.variant: summary for summary in findings.summaries}
    lrs = sorted({variant.lr for variant in by_variant})
    equal = {
        compared.quadratic_lr: compared.difference["last epoch"]
        for compared in findings.comparisons.values()
        if compared.quadratic_lr == compared.cross_entropy_lr
    }

    def cell(loss: Loss, lr: float) -> str:
        summary = by_variant.get(Variant(loss, lr))
        if summary is None:
            return ""
        text = percent(summary.test_accuracy["last epoch"], sd=False) or "diverged"
        return f"{text} best" if summary.chosen else text

    rows: list[Row] = [
        {
            "rate": f"{lr:g}",
            **{f"{loss}, test %": cell(loss, lr) for loss in LOSSES},
            "difference, points": _difference(equal[lr]) if lr in equal else "",
        }
        for lr in lrs
    ]
    epochs, networks = findings.summaries[0].epochs, findings.summaries[0].networks
    heading = (
        f"Test accuracy after epoch {epochs}: mean (95 % interval), n = {networks}. Difference: "
        f'cross-entropy − quadratic. "best": highest validation accuracy.'
    )
    return joined([heading, table(rows), *_diverged(findings), *findings.notes])


def joined(parts: Sequence[str]) -> str:
    """Join paragraphs, with the footnote at the end if any of them refers to it."""
    text = "\n\n".join(part.removesuffix(BY_LOGIT).rstrip() for part in parts)
    return f"{text}\n\n{BY_LOGIT}" if _MARK in text else text


def _diverged(findings: Findings) -> list[str]:
    """A sentence on the diverged networks, if there are any."""
    of = [
        f"{summary.diverged} of {summary.networks} ({summary.variant})"
        for summary in findings.summaries
        if summary.diverged
    ]
    return [f"Diverged and excluded: {', '.join(of)}."] if of else []


def median(epochs: Sequence[int | None]) -> str:
    """Median epoch, followed by the number of networks that reach it if not all do."""
    # "Never" counts as later than any epoch.
    ordered = sorted(math.inf if epoch is None else epoch for epoch in epochs)
    if not ordered or ordered[0] == math.inf:
        return "never"
    middle = statistics.median_high(ordered)
    reached = sum(epoch < math.inf for epoch in ordered)
    text = f"{middle:g}" if middle < math.inf else "never"
    return text if reached == len(ordered) else f"{text} ({reached}/{len(ordered)})"


def _difference_rows(comparisons: Mapping[str, Comparison]) -> list[Row]:
    """Rows of the table of differences, cross-entropy minus quadratic, in points."""

    def p_value(p: float) -> str:
        return f"{p:.2g}" if math.isfinite(p) else ""

    return [
        {
            "rates": at,
            "test accuracy": name,
            "difference": _points(difference.mean),
            "95 % interval": _interval(difference) if difference.n > 1 else "",
            "p": p_value(difference.p),
            "p, Holm": p_value(difference.p_holm),
            "n": difference.n,
        }
        for name in MEASURES
        for at, compared in comparisons.items()
        if (difference := compared.difference[name]).n
    ]


def _engine_rows(findings: Findings) -> list[Row]:
    """Rows of the table of differences between the engines and autograd."""
    return [
        {
            "loss": difference.loss,
            "engine": difference.engine,
            "steps": difference.steps,
            "largest difference of a parameter": f"{difference.difference:.1e}",
        }
        for difference in findings.engines
    ]


def _control_rows(findings: Findings) -> list[Row]:
    """Rows of the table of differences between the controls and the networks they repeat."""
    return [
        {
            "loss": difference.loss,
            "rate": f"{difference.lr:g}",
            "seed": difference.seed,
            "first epoch": _points(difference.first_epoch),
            "last epoch": _points(difference.last_epoch),
            "largest": f"{100 * difference.largest:.2f}",
        }
        for difference in findings.controls
    ]


def page(findings: Findings, dtype: str) -> str:
    """Markdown page with the answer, all tables and explanations."""
    parts = [
        answer(findings).replace("\n", "  \n"),
        overview(findings),
        "Every variant:",
        table([_accuracy_row(summary) for summary in findings.summaries]),
        "Mean ± standard deviation (95 % confidence interval of the mean) over n seeds.",
        "Speed of learning, the median epoch at which a validation accuracy is first reached, and "
        "the share of saturated output neurons before training and at the end:",
        table([_learning_row(summary) for summary in findings.summaries]),
    ]
    if differences := _difference_rows(findings.comparisons):
        parts += [
            "Cross-entropy minus quadratic, in points of test accuracy, paired by seed; the rate "
            "of the quadratic loss first:",
            table(differences),
            READING,
        ]
    if rows := _engine_rows(findings):
        parts += [
            "Difference from autograd after one epoch of at most 2,000 examples in float64:",
            table(rows),
        ]
    if rows := _control_rows(findings):
        parts += [
            f"Control (autograd, {dtype}) minus the same networks trained by the hand-written "
            f"rules, in points of test accuracy:",
            table(rows),
        ]
    return joined(parts)


BEST, ALL = "best-rates", "all-rates"
"""Folders of TensorBoard runs: the best rate of each loss with its control, written at the end; and
all variants."""


class Log:
    """Log of every epoch of all networks, in epochs.csv and in one TensorBoard run per variant.

    Args:
        run_dir: the run directory.
        config: name and value of each option.
        runs, controls: networks of a resumed run, with their records; logged points of later epochs
            are removed.
        controls_finished: the last epoch recorded for all controls.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, object],
        runs: Sequence[Run] = (),
        controls: Sequence[Run] = (),
        controls_finished: int = -1,
    ) -> None:
        self.seconds = 0.0
        """Time spent on logging."""
        self.finished = min((len(run.records) for run in runs), default=0) - 1
        """The last logged epoch of the networks that are trained together."""
        self.run_dir, self._config = run_dir, config
        variants = {str(run.variant) for run in controls}
        for folder in run_dir.glob(f"{ALL}/*-{CONTROL}"):  # at a rate that is no longer the best
            if folder.name not in variants:
                shutil.rmtree(folder)
        self._remove_best()
        rows: list[Row] = []
        # The records of each logged epoch, by variant.
        self._logged: dict[Variant, list[list[Record]]] = {}
        for several, last in ((runs, self.finished), (controls, controls_finished)):
            for epoch in range(last + 1):
                of_epoch = [run for run in several if epoch < len(run.records)]
                rows += [epoch_row(run.settings, run.records[epoch]) for run in of_epoch]
                for variant, of_variant in by_variant(of_epoch).items():
                    records = [run.records[epoch] for run in of_variant]
                    self._logged.setdefault(variant, []).append(records)
        self._stack = contextlib.ExitStack()
        self._csv = self._stack.enter_context(EpochsFile(run_dir, rows))
        self._monitors: dict[Variant, Monitor] = {}

    @property
    def folders(self) -> dict[str, Path]:
        """Folders for TensorBoard, by title."""
        titles = {"Curves at the best rates": BEST, "Curves at all rates": ALL}
        folders = {title: self.run_dir / name for title, name in titles.items()}
        return {title: folder for title, folder in folders.items() if folder.is_dir()}

    def _remove_best(self) -> None:
        if (self.run_dir / BEST).is_dir():
            shutil.rmtree(self.run_dir / BEST)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def flush(self) -> None:
        """Flush all files to disk."""
        # Concurrently: a disk syncs several files in about the time of one.
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda file: file.flush(), [self._csv, *self._monitors.values()]))

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def epoch(self, runs: Sequence[Run], dataset: data.Dataset) -> None:
        """Log the last epoch of the runs."""
        with self._timed():
            self._csv.append([epoch_row(run.settings, run.last) for run in runs])
            for variant, of_variant in by_variant(runs).items():
                monitor = self.monitor(variant)
                monitor.log(*(run.last for run in of_variant))
                first = of_variant[0]
                monitor.log_histograms(
                    first.network, dataset.validation, variant.loss, first.last.epoch
                )

    def monitor(self, variant: Variant) -> Monitor:
        """The TensorBoard run of a variant."""
        if variant not in self._monitors:
            folder, logged = self.run_dir / ALL / str(variant), self._logged.get(variant, ())
            monitor = Monitor(folder, so_far=logged, several=True)
            self._monitors[variant] = self._stack.enter_context(monitor)
        return self._monitors[variant]

    def finish(
        self,
        runs: Sequence[Run],
        best: Mapping[Loss, float],
        dataset: data.Dataset,
        page: str,
        curves: Path,
    ) -> None:
        """Log hyperparameters, plots and texts; copy the best runs.

        Args:
            runs: all networks and controls.
            best: the best rate of each loss.
            dataset: source of the test examples that are plotted.
            page: the results in Markdown.
            curves: a PNG file of the learning curves.
        """
        with self._timed():
            by_name = by_variant(runs)
            chosen = [variant for variant in by_name if best.get(variant.loss) == variant.lr]
            for variant, of_variant in by_name.items():
                monitor, last = self.monitor(variant), of_variant[0].last
                monitor.log_hparams({**self._config, **variant._asdict()}, last)
                if variant in chosen and not variant.is_control:
                    monitor.log_images(of_variant[0].network, dataset.test, last.epoch)
            # In an existing run, to keep the list of runs in TensorBoard short.
            monitor = self.monitor(next(iter(chosen or by_name)))
            monitor.log_text("config", options_table(self._config))
            monitor.log_text("results", page)
            monitor.log_figure("learning curves", curves.read_bytes())
            for monitor in self._monitors.values():
                monitor.close()
            self._remove_best()
            for variant in chosen:
                name = str(variant)
                shutil.copytree(self.run_dir / ALL / name, self.run_dir / BEST / name)
