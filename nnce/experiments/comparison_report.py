"""Tables, epochs.csv and TensorBoard folders of a comparison."""

from __future__ import annotations

import contextlib
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnce import data
from nnce.experiments.comparison import (
    CONTROL,
    MEASURES,
    Comparison,
    Findings,
    Run,
    Summary,
    Variant,
    by_variant,
)
from nnce.experiments.epochs import EpochsFile, epoch_row
from nnce.experiments.estimates import Difference, Estimate
from nnce.experiments.report import Row, table
from nnce.experiments.tensorboard import Monitor, options_table
from nnce.losses import LOSSES, Loss
from nnce.training import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

READING = """\
At equal rates part of the difference is the length of the step: cross-entropy's dC/dz is the
quadratic's without the factor σ'(z), which is ¼ at most. The fair comparison is at each loss's best
rate, the one of the highest mean validation accuracy after the last epoch. The intervals are for
start and order of the mini-batches together, which each seed draws. p is the paired t-test's; the
last p is corrected for the number of differences in this table, by Holm's method."""
BY_LOGIT = """\
† Delta method on the logit of the mean, because Student's t interval leaves the possible range."""
_MARK = "†"


def _summary_row(summary: Summary) -> Row:
    """A row of results.json, flat."""
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
    """The answer, rows, best rates and differences for results.json."""
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
    """Which variant a row is about."""
    return {
        "loss": summary.variant.loss,
        "rate": f"{summary.variant.lr:g}",
        "engine": summary.variant.engine,
        "n": summary.test_accuracy["last epoch"].n,
    }


def _accuracy_row(summary: Summary) -> Row:
    """How well a variant ends, for people, in percent."""
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
    """How fast a variant learns, for people."""
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
    """Mean, standard deviation if wanted, and interval, in percent."""
    if estimate.n < 2:
        return f"{100 * estimate.mean:.2f}" if estimate.n else ""
    mean, spread, low, high = (100 * value for value in estimate[:4])
    mark = _MARK if estimate.by_logit else ""
    return f"{mean:.2f}{f' ± {spread:.2f}' * sd} ({low:.2f} to {high:.2f}){mark}"


def _points(value: float) -> str:
    """A difference of shares, in percentage points."""
    return f"{100 * value:+.2f}".replace("-", "−")


def _interval(difference: Difference) -> str:
    mark = _MARK if difference.by_logit else ""
    return f"{_points(difference.low)} to {_points(difference.high)}{mark}"


def _difference(difference: Difference) -> str:
    """A difference and its interval, in percentage points."""
    if difference.n < 2:
        return _points(difference.mean) if difference.n else ""
    return f"{_points(difference.mean)} ({_interval(difference)})"


def answer(findings: Findings) -> str:
    """Say in one or two sentences what difference the loss makes."""
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
    after = f"after {epochs} epochs" if epochs > 1 else "after the first epoch"
    sentence = (
        f"cross-entropy − quadratic, each at its best rate ({fast:g} and {slow:g}): "
        f"{_points(last.mean)} points of test accuracy {after}"
    )
    if last.n < 2:
        return f"{sentence}; one seed, so no interval: use --seeds 8."
    lines = [f"{sentence} (95 % {_interval(last)}, n = {last.n}): {_verdict(last)}"]
    if epochs > 1:
        lines.append(
            f"After the first epoch: {_points(first.mean)} (95 % {_interval(first)}): "
            f"{_verdict(first)}"
        )
    return "\n".join(lines)


def _verdict(difference: Difference) -> str:
    if difference.low <= 0 <= difference.high:
        return "no difference shown"
    return f"{'cross-entropy' if difference.mean > 0 else 'quadratic'} is better"


def overview(findings: Findings) -> str:
    """Both losses side by side, a row for each rate, and the notes."""
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
        f"Test accuracy after epoch {epochs}: mean (95 % interval), n = {networks}; cross-entropy "
        f'− quadratic; "best" on validation.'
    )
    return joined([heading, table(rows), *_diverged(findings), *findings.notes])


def joined(parts: Sequence[str]) -> str:
    """Paragraphs, with the footnote once if a mark refers to it."""
    text = "\n\n".join(part.removesuffix(BY_LOGIT).rstrip() for part in parts)
    return f"{text}\n\n{BY_LOGIT}" if _MARK in text else text


def _diverged(findings: Findings) -> list[str]:
    """A sentence about the networks that are left out, if there are any."""
    of = [
        f"{summary.diverged} of {summary.networks} ({summary.variant})"
        for summary in findings.summaries
        if summary.diverged
    ]
    return [f"Diverged and left out: {', '.join(of)}."] if of else []


def median(epochs: Sequence[int | None]) -> str:
    """The median, and how many came there at all if not all did."""
    # Never is later than any epoch.
    ordered = sorted(math.inf if epoch is None else epoch for epoch in epochs)
    if not ordered or ordered[0] == math.inf:
        return "never"
    middle = statistics.median_high(ordered)
    reached = sum(epoch < math.inf for epoch in ordered)
    text = f"{middle:g}" if middle < math.inf else "never"
    return text if reached == len(ordered) else f"{text} ({reached}/{len(ordered)})"


def _difference_rows(comparisons: Mapping[str, Comparison]) -> list[Row]:
    """Cross-entropy minus quadratic for people, in percentage points."""

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


def page(findings: Findings, dtype: str) -> str:
    """The answer, all tables and what to know of them, in Markdown."""
    parts = [
        answer(findings).replace("\n", "  \n"),
        overview(findings),
        "Every variant:",
        table([_accuracy_row(summary) for summary in findings.summaries]),
        "Mean ± standard deviation (95 % confidence interval of the mean) over n seeds. How fast, "
        "with the median epoch at which a validation accuracy is first reached, and the share of "
        "saturated output neurons at the start and at the end:",
        table([_learning_row(summary) for summary in findings.summaries]),
    ]
    if differences := _difference_rows(findings.comparisons):
        parts += [
            "Cross-entropy minus quadratic, in points of test accuracy, paired by the seed; "
            "quadratic's rate first:",
            table(differences),
            READING,
        ]
    if findings.engines:
        rows: list[Row] = [
            {
                "loss": difference.loss,
                "engine": difference.engine,
                "steps": difference.steps,
                "largest difference of a parameter": f"{difference.difference:.1e}",
            }
            for difference in findings.engines
        ]
        parts += [
            "From PyTorch's autograd, over an epoch of at most 2,000 examples in float64:",
            table(rows),
        ]
    if findings.controls:
        rows = [
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
        parts += [
            f"The control in {dtype} minus the same networks trained by hand, in points of test "
            f"accuracy:",
            table(rows),
        ]
    return joined(parts)


BEST, ALL = "best-rates", "all-rates"
"""Folders of TensorBoard's runs: a run for each loss at its best rate and for each control, written
at the end, and one for every variant."""


class Log:
    """Every epoch of every network: in epochs.csv, and in TensorBoard a run for each variant.

    Args:
        run_dir: the run's directory.
        config: name and value of each option.
        runs, controls: networks that have records, if a run is resumed; points logged after
            those goes.
        controls_finished: the last epoch that all controls have a record of.
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
        """What logging has cost."""
        self.finished = min((len(run.records) for run in runs), default=0) - 1
        """The last epoch that is logged of all networks side by side."""
        self.run_dir, self._config = run_dir, config
        variants = {str(run.variant) for run in controls}
        for folder in run_dir.glob(f"{ALL}/*-{CONTROL}"):  # at a rate that was the best one once
            if folder.name not in variants:
                shutil.rmtree(folder)
        self._remove_best()
        rows: list[Row] = []
        # By variant, the records of each epoch that has been logged.
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
        """TensorBoard's folders, by their contents."""
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
        """Wait until everything is on the disk."""
        self._csv.flush()
        for monitor in self._monitors.values():
            monitor.flush()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def epoch(self, runs: Sequence[Run], dataset: data.Dataset) -> None:
        """The last epoch of these runs."""
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
        """The variant's own TensorBoard run."""
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
        figure: Figure,
    ) -> None:
        """Add the end: pictures of the best networks, texts, and their folder."""
        with self._timed():
            by_name = by_variant(runs)
            chosen = [variant for variant in by_name if best.get(variant.loss) == variant.lr]
            for variant, of_variant in by_name.items():
                monitor, last = self.monitor(variant), of_variant[0].last
                monitor.log_hparams({**self._config, **variant._asdict()}, last)
                if variant in chosen and not variant.is_control:
                    monitor.log_images(of_variant[0].network, dataset.test, last.epoch)
            # In one of the runs: a run of its own would be one more in TensorBoard's list.
            monitor = self.monitor(next(iter(chosen or by_name)))
            monitor.log_text("config", options_table(self._config))
            monitor.log_text("results", page)
            monitor.log_figure("learning curves", figure)
            for monitor in self._monitors.values():
                monitor.close()
            self._remove_best()
            for variant in chosen:
                name = str(variant)
                shutil.copytree(self.run_dir / ALL / name, self.run_dir / BEST / name)
