"""Output of a run: results.json, text files, plots, and Markdown tables of the records."""

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tabulate
import torch
from torch import Tensor

import nnce
from nnce import data
from nnce.experiments.directories import from_here, keep
from nnce.experiments.running import unmuted_stdout
from nnce.saving import write_whole
from nnce.training import Record, best_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# No padding of the headers, so that tables fit the screen.
tabulate.MIN_PADDING = 0

RESULTS = "results.json"
# TensorBoard opens without smoothing and hides these tags: ends of intervals, histograms, images.
_HIDDEN = "upper_and_lower|output|confusion|weights|wrong|learning"
TENSORBOARD = (
    "http://localhost:6006/?smoothing=0&tagFilter="
    f"{urllib.parse.quote(f'^(?!{_HIDDEN})', safe='')}#timeseries"
)
# Above this number of classes, only averages are printed.
_CLASSES_SHOWN = 12
Row = Mapping[str, object]
"""A row of a table: values by column name."""


# ---------------------------------------------------------------------------------- files


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically; NaN becomes null, and infinities "inf" and "-inf"."""
    write_text(path, json.dumps(_plain(content), indent=2, default=str, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as .npz atomically, a few megabytes at a time."""
    write_whole(path, lambda file: np.savez(file, **arrays))


def write_figure(path: Path, figure: "Figure", dpi: int) -> None:
    """Write a matplotlib figure as PNG, atomically."""
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=dpi))
    # Keep the computed layout: computing it again would take half of the drawing time.
    figure.set_layout_engine("none")


def _plain(value: Any) -> Any:
    """Replace numbers that JSON does not support."""
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
    """Write results.json: options, versions, machine and results.

    Args:
        run_dir: the run directory.
        config: values of all options.
        device: the device of the computation.
        seconds: wall time of the run.
        rows: the table of results.
        more: additional entries, by name.
    """
    path = run_dir / RESULTS
    content = {
        "config": config,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        **checkout(),
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
    """Versions of Python, the packages and nnce, and the git commit of nnce's source."""
    by_package = {"python": platform.python_version(), "torch": torch.__version__}
    # Not from the installed metadata, which `git pull` does not update under `pip install -e`.
    by_package["nnce"] = nnce.__version__
    if commit := _commit(Path(nnce.__file__).parents[1]):
        by_package["commit"] = commit
    for package in ("torchvision", "numpy", "scikit-learn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            by_package[package] = importlib.metadata.version(package)
    return by_package


def checkout() -> dict[str, Any]:
    """The git commit of nnce's source, and whether its files are unmodified.

    Empty without git, or if the source is not a git checkout.
    """
    described = versions().get("commit")
    if described is None:
        return {}
    commit = described.removesuffix("-dirty")
    return {"git": {"commit": commit, "clean": described == commit}}


@functools.cache
def _commit(root: Path) -> str | None:
    """Git commit of a checkout, plus "-dirty" if files are modified; None if not a checkout."""
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


def machine() -> str:
    """Number and name of the processors, and their vector instructions."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # the only place on Linux that has the name
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    return f"{os.cpu_count()} × {name} ({torch.backends.cpu.get_cpu_capability()})"


def device_name(device: torch.device) -> str:
    """Name of the device: "cpu", or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# ---------------------------------------------------------------------------------- tables


def table(rows: Sequence[Row]) -> str:
    """Format rows with the same keys as a Markdown table, with numbers right-aligned."""
    return tabulate.tabulate(
        [[_cell(row[key]) for key in rows[0]] for row in rows],
        headers=list(rows[0]),
        tablefmt="pipe",
        colalign=["right" if isinstance(v, int | float) else "left" for v in rows[0].values()],
        disable_numparse=True,
    )


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    # The loss of a diverging network may have many digits.
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3g}"


def in_percent(share: float) -> str:
    """Format a share in [0, 1] as a percentage with two decimals."""
    return f"{100 * share:.2f} %"


def counted(count: int, noun: str, plural: str = "") -> str:
    """Format a number with its noun: "1 seed", "1,197 seeds"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def print_results(
    answer: str, tables: str, files: str, run_dir: Path, curves: Mapping[str, Path] | None = None
) -> None:
    """Print answer and tables, then the answer again, run directory and TensorBoard commands.

    Args:
        answer: the result in one or two sentences.
        tables: everything else; left out under --quiet.
        files: description of the files in the run directory.
        run_dir: the run directory.
        curves: TensorBoard folders by title (default: the run directory).
    """
    out = unmuted_stdout()
    if out is not sys.stdout:  # --quiet
        print(f"{answer}\n{files}: {from_here(run_dir)}", file=out)
        return
    print(f"\n{answer}\n\n{tables}\n\n{answer}\n{files}: {from_here(run_dir)}")
    for title, folder in ({"Curves": run_dir} if curves is None else curves).items():
        print(f"{title}: {tensorboard_command(folder)}")
    if curves is None or curves:
        print(f"In the browser: {TENSORBOARD}")


def tensorboard_command(folder: Path) -> str:
    """Command that starts TensorBoard on a folder."""
    tensorboard = Path(sys.executable).with_name("tensorboard")
    return shlex.join([from_here(tensorboard), "--logdir", from_here(folder)])


# ---------------------------------------------------------------------------------- one network


def describe(name: str, dataset: data.Dataset) -> str:
    """Describe a data set: its name and the number of examples in each split."""
    train, validation, test = (len(split.x) for split in dataset)
    return (
        f"{name}: {train:,} training, {validation:,} validation and {counted(test, 'test example')}"
    )


def epoch_line(record: Record) -> str:
    """Format losses and accuracies of one epoch as a line."""
    losses = ", ".join(f"{split} {value:.4f}" for split, value in record.loss.items())
    accuracies = ", ".join(f"{100 * share:.2f}" for share in record.accuracy.values())
    return f"epoch {record.epoch:3}  loss: {losses}  accuracy: {accuracies} %"


def has_line(epoch: int) -> bool:
    """Whether an epoch is printed: 0 to 10, then every 10th, from 100 on every 100th, and so on."""
    return bool(epoch % 10 ** (len(str(epoch)) - 1) == 0)


def closing_rows(records: Sequence[Record]) -> list[Row]:
    """Rows for the initial network, the best epoch on the validation data, and the last epoch."""
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
            ("best on validation", best_record(records)),
            ("last", records[-1]),
        )
        for split in record.loss
    ]


def closing_table(rows: Sequence[Row]) -> str:
    """Format `closing_rows` as a table, one row per network."""
    by_network: dict[object, dict[str, object]] = {}
    for row in rows:
        of_network = by_network.setdefault(
            row["network"], {"network": row["network"], "epoch": row["epoch"]}
        )
        loss, accuracy = row["loss"], row["accuracy"]
        assert isinstance(accuracy, float)
        of_network[str(row["data"])] = f"{_cell(loss)}, {in_percent(accuracy)}"
    return f"Loss and accuracy:\n\n{table(list(by_network.values()))}"


def by_class(counts: Tensor) -> dict[str, Any]:
    """Confusion matrix, and precision, recall and F1 per class as in scikit-learn.

    Args:
        counts: number of examples by true class (row) and predicted class (column).
    """
    support, predicted = counts.sum(1), counts.sum(0)
    right, share = counts.diagonal().double(), support.double() / support.sum()
    scores = torch.stack(  # 0 for classes without predictions or examples
        [
            right / predicted.clamp_min(1),
            right / support.clamp_min(1),
            2 * right / (predicted + support).clamp_min(1),
        ],
        -1,
    )
    occurs = (predicted + support) > 0
    averages = {
        "macro avg": scores[occurs].mean(0),
        "weighted avg": share @ scores,
    }

    def rows(names: Iterable[object], scores: Tensor, support: Tensor) -> list[Row]:
        columns = ("class", "precision", "recall", "f1-score", "support")
        values = zip(names, *scores.T.tolist(), support.tolist(), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in values]

    return {
        "confusion": counts.tolist(),
        "classes": rows(range(len(counts)), scores, support),
        "averages": rows(averages, torch.stack([*averages.values()]), support.sum().expand(2)),
    }


def class_table(classes: Mapping[str, Any]) -> str:
    """Format `by_class` as a table; averages only if there are too many classes."""
    of_each = classes["classes"] if len(classes["classes"]) <= _CLASSES_SHOWN else []
    return f"Test data by class:\n\n{table([*of_each, *classes['averages']])}"


def record_as_dict(record: Record) -> dict[str, object]:
    """Convert a record and its layers to dictionaries, for JSON."""
    return {**record._asdict(), "layers": [layer._asdict() for layer in record.layers]}
