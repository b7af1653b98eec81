"""Files and tables of a run: `results.json`, text, pictures, Markdown, a network's records."""

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
from typing import Any

import tabulate
import torch
from torch import Tensor

import nnce
from nnce import data
from nnce.experiments.command_line import from_here, heard, keep
from nnce.saving import write_whole
from nnce.training import Record, best_record

# A table must fit the screen: a header is as wide as its text.
tabulate.MIN_PADDING = 0

RESULTS = "results.json"
# Not smoothed, and curves only: neither ends of intervals nor histograms and images.
_HIDDEN = "upper_and_lower|output|confusion|weights|wrong|learning"
TENSORBOARD = (
    "http://localhost:6006/?smoothing=0&tagFilter="
    f"{urllib.parse.quote(f'^(?!{_HIDDEN})', safe='')}#timeseries"
)
# More classes would push the rest off the screen.
_CLASSES_SHOWN = 12
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
    figure.set_layout_engine("none")  # its layout is kept; to find it again takes half of a drawing


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
    """Write `results.json`, for programs: the options, the machine, and the results.

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


def checkout() -> dict[str, Any]:
    """The git commit of nnce's source, and whether its files are those of the commit.

    Empty without git, or where the source is not a checkout.
    """
    described = versions().get("commit")
    if described is None:
        return {}
    commit = described.removesuffix("-dirty")
    return {"git": {"commit": commit, "clean": described == commit}}


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


def machine() -> str:
    """The number of processors, their name and their vector instructions."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux has the name here only
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    return f"{os.cpu_count()} × {name} ({torch.backends.cpu.get_cpu_capability()})"


def device_name(device: torch.device) -> str:
    """The device in words: "cpu", or the name of the graphics card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# ---------------------------------------------------------------------------------- tables


def table(rows: Sequence[Row]) -> str:
    """Rows with the same keys as a Markdown table, numbers to the right."""
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
    # A loss that has run away must not push the table off the screen.
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3g}"


def in_percent(share: float) -> str:
    """A share of [0, 1] in percent, as in every table and line."""
    return f"{100 * share:.2f} %"


def print_end(
    answer: str, results: str, run_dir: Path, curves: Mapping[str, Path] | None = None
) -> None:
    """Print a run's last lines: the answer, where the results are, and how to see the curves.

    Args:
        answer: one or two sentences.
        results: the contents of the run's directory.
        run_dir: the run's directory.
        curves: TensorBoard's folders, by their contents; the run's directory if not given.
    """
    out = heard()
    if out is not sys.stdout:  # --quiet
        print(f"{answer}\n{results}: {from_here(run_dir)}", file=out)
        return
    print(f"\n{answer}\n{results}: {from_here(run_dir)}")
    for title, folder in ({"Curves": run_dir} if curves is None else curves).items():
        print(f"{title}: {tensorboard_command(folder)}")
    if curves is None or curves:
        print(f"In the browser: {TENSORBOARD}")


def tensorboard_command(folder: Path) -> str:
    """The command that shows the curves in a folder."""
    tensorboard = Path(sys.executable).with_name("tensorboard")
    return shlex.join([from_here(tensorboard), "--logdir", from_here(folder)])


# ---------------------------------------------------------------------------------- one network


def describe(name: str, dataset: data.Dataset) -> str:
    """A data set's name and its numbers of examples."""
    train, validation, test = (f"{len(split.x):,}" for split in dataset)
    return f"{name}: {train} training, {validation} validation and {test} test examples"


def epoch_line(record: Record) -> str:
    """One epoch, for people."""
    losses = ", ".join(f"{split} {value:.4f}" for split, value in record.loss.items())
    accuracies = ", ".join(f"{100 * share:.2f}" for share in record.accuracy.values())
    return f"epoch {record.epoch:3}  loss: {losses}  accuracy: {accuracies} %"


def has_line(epoch: int) -> bool:
    """Whether an epoch is printed: the first ten, then every tenth, hundredth and so on."""
    return bool(epoch % 10 ** (len(str(epoch)) - 1) == 0)


def closing_rows(records: Sequence[Record]) -> list[Row]:
    """The start, the epoch that is best on the validation data, and the last epoch."""
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
    """`closing_rows` for people, a row for each network."""
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
    """Confusion matrix, and precision, recall and F1 of each class, as scikit-learn defines them.

    Args:
        counts: examples of each class (row) that are taken for which (column).
    """
    support, taken = counts.sum(1), counts.sum(0)
    right, share = counts.diagonal().double(), support.double() / support.sum()
    scores = torch.stack(  # 0 where nothing is taken for the class, or of it
        [
            right / taken.clamp_min(1),
            right / support.clamp_min(1),
            2 * right / (taken + support).clamp_min(1),
        ],
        -1,
    )
    there = (taken + support) > 0
    averages = {
        "macro avg": scores[there].mean(0),
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
    """`by_class` for people; the averages alone if there are more classes than fit a screen."""
    of_each = classes["classes"] if len(classes["classes"]) <= _CLASSES_SHOWN else []
    return f"Test data by class:\n\n{table([*of_each, *classes['averages']])}"


def record_as_dict(record: Record) -> dict[str, object]:
    """A record for JSON, which knows no named tuples."""
    return {**record._asdict(), "layers": [layer._asdict() for layer in record.layers]}
