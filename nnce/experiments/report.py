"""What a run leaves for people and programs: tables, `results.json`, every epoch, closing lines."""

import contextlib
import csv
import functools
import importlib.metadata
import io
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import nnce
from nnce import data
from nnce.experiments.command_line import from_here, keep
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
from nnce.experiments.estimates import Estimate
from nnce.experiments.tensorboard import Monitor, scalars
from nnce.losses import Loss
from nnce.saving import write_whole
from nnce.training import Record

RESULTS = "results.json"
Row = Mapping[str, object]
"""A row of a table: columns by name."""


# ---------------------------------------------------------------------------------- files


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, whole or not at all; NaN becomes null and an infinity "inf" or "-inf"."""
    write_text(path, json.dumps(_plain(content), indent=2, default=str, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_figure(path: Path, figure: Any, dpi: int) -> None:
    """Write a picture of matplotlib's as PNG, whole or not at all."""
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=dpi))


def _plain(value: Any) -> Any:
    """The same without the numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def write_results(
    run_dir: Path,
    *,
    config: Mapping[str, object],
    device: torch.device,
    seconds: float,
    rows: Sequence[Row],
    **more: Any,
) -> Path:
    """Write `results.json`, for programs: what was asked, where it ran, and what came out.

    Args:
        run_dir: the run's directory.
        config: every option.
        device: where it ran.
        seconds: how long it took.
        rows: the closing table.
        more: what else the script measured, by name.
    """
    path = run_dir / RESULTS
    content = {
        "config": config,
        "versions": versions(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "rows": rows,
        **more,
    }
    write_json(path, content)
    keep(run_dir)
    return path


def versions() -> dict[str, str]:
    """The versions that results depend on, by package, and the git commit of nnce's source."""
    by_package = {"python": platform.python_version(), "torch": torch.__version__}
    # Not the installed metadata, which a `git pull` under `pip install -e` leaves as they are.
    by_package["nnce"] = nnce.__version__
    if commit := _commit(Path(nnce.__file__).parents[1]):
        by_package["commit"] = commit
    for package in ("torchvision", "numpy", "scikit-learn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            by_package[package] = importlib.metadata.version(package)
    return by_package


@functools.cache
def _commit(root: Path) -> str | None:
    """The git commit of a checkout, with "-dirty" where files differ from it; None if it is not."""
    if not (root / ".git").exists():
        return None
    describe = ["describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *describe], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):  # git is not installed, or hangs
        return None
    return done.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """The device in words: "cpu", or the name of the graphics card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# ---------------------------------------------------------------------------------- tables


def table(rows: Sequence[Row]) -> str:
    """Rows with the same keys as a Markdown table, numbers to the right."""
    header = list(rows[0])
    cells = [header, *([_cell(row[key]) for key in header] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    numeric = [isinstance(rows[0][key], int | float) for key in header]

    def line(texts: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(texts, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(
        "-" * (width + 1) + (":" if right else "-")
        for width, right in zip(widths, numeric, strict=True)
    )
    return "\n".join([line(cells[0]), f"|{rule}|", *map(line, cells[1:])])


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    # A loss that has run away must not push the table off the screen.
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3g}"


def tensorboard_command(run_dir: Path) -> str:
    """The command that shows this run's curves, beside those of its neighbours."""
    tensorboard = Path(sys.executable).with_name("tensorboard")
    # A run in the working directory has other things for neighbours.
    here = run_dir.absolute().parent == Path.cwd()
    return shlex.join(
        [from_here(tensorboard), "--logdir", from_here(run_dir if here else run_dir.parent)]
    )


# ---------------------------------------------------------------------------------- one network


def epoch_line(record: Record) -> str:
    """One epoch, for people."""
    losses = ", ".join(f"{split} {value:.4f}" for split, value in record.loss.items())
    accuracies = ", ".join(f"{split} {value:.2%}" for split, value in record.accuracy.items())
    return f"epoch {record.epoch:3}  loss: {losses}  accuracy: {accuracies}"


def closing_rows(records: Sequence[Record]) -> list[Row]:
    """The start, the epoch that is best on the validation data, and the last epoch."""
    best = max(records, key=lambda record: record.accuracy["validation"])
    return [
        {
            "network": name,
            "epoch": record.epoch,
            "data": split,
            "loss": record.loss[split],
            "accuracy": record.accuracy[split],
        }
        for name, record in (
            ("start", records[0]),
            ("best on validation", best),
            ("last", records[-1]),
        )
        for split in record.loss
    ]


def record_as_dict(record: Record) -> dict[str, object]:
    """A record for JSON, which knows no named tuples."""
    return {**record._asdict(), "layers": [layer._asdict() for layer in record.layers]}


# ---------------------------------------------------------------------------------- a comparison

READING = """\
At equal rates part of the difference is the length of the step: cross-entropy's dC/dz is the
quadratic's without the factor σ'(z), which is ¼ at most. The fair comparison is at each loss's best
rate, the one of the highest mean validation accuracy after the last epoch. The intervals are for
start and order of the mini-batches together, which each seed draws. p is the paired t-test's; the
last p is corrected for the number of differences in this table, by Holm's method."""


def summary_row(summary: Summary) -> Row:
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


def more_results(findings: Findings) -> dict[str, object]:
    """What else results.json has: the differences."""
    return {
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


def name_columns(summary: Summary) -> Row:
    """Which variant a row is about."""
    return {
        "loss": summary.variant.loss,
        "rate": f"{summary.variant.lr:g}",
        "engine": summary.variant.engine,
        "n": summary.test_accuracy["last epoch"].n,
    }


def accuracy_row(summary: Summary) -> Row:
    """How well a variant ends, for people, in percent."""
    notes = ["best on validation"] if summary.chosen else []
    if summary.variant.engine == "autograd":
        notes.append("control")
    if summary.diverged:
        notes.append(f"DIVERGED: {summary.diverged} of {summary.networks}")
    return {
        **name_columns(summary),
        **{
            f"test %, {name}": percent(accuracy)
            for name, accuracy in summary.test_accuracy.items()
            if name != "first epoch"
        },
        "": "; ".join(notes),
    }


def learning_row(summary: Summary) -> Row:
    """How fast a variant learns, for people."""
    start, end = summary.saturated
    return {
        **name_columns(summary),
        "test %, first epoch": percent(summary.test_accuracy["first epoch"]),
        **{
            f"epochs to {accuracy:.0%}": median(epochs)
            for accuracy, epochs in summary.epochs_to.items()
        },
        "saturated": "" if math.isnan(end) else f"{start:.0%} → {end:.0%}",
        "s/network": f"{summary.seconds:.2f}",
    }


def percent(estimate: Estimate) -> str:
    """Mean ± standard deviation and interval, in percent."""
    if estimate.n < 2:
        return f"{100 * estimate.mean:.2f}" if estimate.n else ""
    mean, sd, low, high = (100 * value for value in estimate[:4])
    return f"{mean:.2f} ± {sd:.2f} ({low:.2f} to {high:.2f})"


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


def difference_rows(comparisons: Mapping[str, Comparison]) -> list[Row]:
    """Cross-entropy minus quadratic for people, in percentage points."""
    rows: list[Row] = []
    for name in MEASURES:
        for at, compared in comparisons.items():
            mean, low, high, p, n, p_holm = compared.difference[name]
            if n:
                interval = f"{100 * low:+.2f} to {100 * high:+.2f}" if n > 1 else ""
                rows.append(
                    {
                        "rates": at,
                        "test accuracy": name,
                        "difference": f"{100 * mean:+.2f}",
                        "95 % interval": interval,
                        "p": f"{p:.2g}" if math.isfinite(p) else "",
                        "p, Holm": f"{p_holm:.2g}" if math.isfinite(p_holm) else "",
                        "n": n,
                    }
                )
    return rows


def page(findings: Findings, dtype: str) -> str:
    """The tables and what to know of them, in Markdown."""
    parts = [
        table([accuracy_row(summary) for summary in findings.summaries]),
        "Mean ± standard deviation (95 % confidence interval of the mean) over n seeds. How fast, "
        "with the median epoch at which a validation accuracy is first reached, and the share of "
        "saturated output neurons at the start and at the end:",
        table([learning_row(summary) for summary in findings.summaries]),
        *findings.notes,
    ]
    if differences := difference_rows(findings.comparisons):
        parts += [
            "Cross-entropy minus quadratic, in points of test accuracy, paired by the seed; "
            "quadratic's rate first:",
            table(differences),
            READING,
        ]
    if findings.engines:
        parts += [
            "From PyTorch's autograd, over an epoch of at most 2,000 examples in float64:",
            table(
                [
                    {
                        "loss": difference.loss,
                        "engine": difference.engine,
                        "steps": difference.steps,
                        "largest difference of a parameter": f"{difference.difference:.1e}",
                    }
                    for difference in findings.engines
                ]
            ),
        ]
    if findings.controls:
        parts += [
            f"The control in {dtype} minus the same networks trained by hand, in points of test "
            f"accuracy:",
            table(
                [
                    {
                        "loss": difference.loss,
                        "rate": f"{difference.lr:g}",
                        "seed": difference.seed,
                        "first epoch": f"{100 * difference.first_epoch:+.2f}",
                        "last epoch": f"{100 * difference.last_epoch:+.2f}",
                        "largest": f"{100 * difference.largest:.2f}",
                    }
                    for difference in findings.controls
                ]
            ),
        ]
    return "\n\n".join(parts)


_EPOCHS = "epochs.csv"


def _row(run: Run, epoch: int) -> Row:
    """The row of an epoch."""
    record = run.records[epoch]
    return {
        **run.variant._asdict(),
        "seed": run.settings.seed,
        "epoch": record.epoch,
        "step": record.step,
        "seconds": record.seconds,
        **scalars(record),
    }


def _as_csv(rows: Sequence[Row], *, header: bool) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]) if rows else [])
    if header and rows:
        table.writeheader()
    table.writerows(rows)
    return text.getvalue()


class Log:
    """Every epoch of every network: in epochs.csv, and in TensorBoard a folder a variant.

    Args:
        run_dir: the run's directory.
        config: name and value of each option.
        runs, controls: networks that have records, if a run goes on; what has been logged after
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
        """Begin the file."""
        self.seconds = 0.0
        """What logging has cost."""
        self.finished = min((len(run.records) for run in runs), default=0) - 1
        """The last epoch that is logged of all networks side by side."""
        self.run_dir, self._config = run_dir, config
        variants = {str(run.variant) for run in controls}
        for folder in run_dir.glob(f"*-{CONTROL}"):  # at a rate that was the best one once
            if folder.name not in variants:
                shutil.rmtree(folder)
        rows: list[Row] = []
        # By variant, the records of each epoch that has been logged.
        self._logged: dict[Variant, list[list[Record]]] = {}
        for several, last in ((runs, self.finished), (controls, controls_finished)):
            for epoch in range(last + 1):
                of_epoch = [run for run in several if epoch < len(run.records)]
                rows += [_row(run, epoch) for run in of_epoch]
                for variant, of_variant in by_variant(of_epoch).items():
                    records = [run.records[epoch] for run in of_variant]
                    self._logged.setdefault(variant, []).append(records)
        write_text(run_dir / _EPOCHS, _as_csv(rows, header=True))
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context((run_dir / _EPOCHS).open("ab", buffering=0))
        self._monitors: dict[Variant, Monitor] = {}

    def __enter__(self) -> "Log":
        """Close the files at the block's end."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the files."""
        self._stack.close()

    def flush(self) -> None:
        """Wait until everything is on the disk."""
        os.fsync(self._file.fileno())
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
            self._append([_row(run, run.last.epoch) for run in runs])
            for variant, of_variant in by_variant(runs).items():
                monitor = self.monitor(variant)
                monitor.log(*(run.last for run in of_variant))
                first = of_variant[0]
                monitor.log_histograms(
                    first.network, dataset.validation, variant.loss, first.last.epoch
                )

    def _append(self, rows: Sequence[Row]) -> None:
        """All of these rows, or where the disk is full none: half a number would be another one."""
        end = self._file.seek(0, os.SEEK_END)
        content = memoryview(_as_csv(rows, header=not end).encode())
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError:
            self._file.truncate(self._file.seek(end))
            raise

    def monitor(self, variant: Variant) -> Monitor:
        """The variant's own TensorBoard run."""
        if variant not in self._monitors:
            self._monitors[variant] = self._stack.enter_context(
                Monitor(
                    self.run_dir / str(variant),
                    {**self._config, **variant._asdict()},
                    self._logged.get(variant, ()),
                )
            )
        return self._monitors[variant]

    def finish(
        self,
        runs: Sequence[Run],
        best: Mapping[Loss, float],
        dataset: data.Dataset,
        page: str,
        figure: Figure,
    ) -> None:
        """What belongs at the end: pictures of the best networks, the page, and the layout."""
        with self._timed():
            chosen = {Variant(loss, lr) for loss, lr in best.items()}
            for variant, of_variant in by_variant(runs).items():
                monitor = self.monitor(variant)
                monitor.log_hparams(of_variant[0].last)
                if variant in chosen:
                    monitor.log_images(
                        of_variant[0].network, dataset.test, of_variant[0].last.epoch
                    )
            with Monitor(self.run_dir, self._config) as monitor:
                monitor.log_layout(runs[0].last)
                monitor.log_text("results", page)
                monitor.log_figure("learning curves", figure)
