"""Benchmark training, losses and checks against other libraries.

Contenders alternate on one machine. Times are medians over turns, and `ratio` is the median of a
contender's time divided by nnce's in the same turn. The modules of `nnce.experiments.benchmarks`
describe each benchmark.
"""

if __name__ == "__main__":
    import startup  # noqa: F401  must be first


import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nnce.experiments import command_line, pages, report, running
from nnce.experiments.benchmarks import checks, labels, losses, networks
from nnce.experiments.command_line import ArgumentParser

RUNS = Path(__file__).resolve().parents[1] / "runs"
BENCHMARKS = {"networks": networks, "labels": labels, "losses": losses, "checks": checks}


def parser() -> ArgumentParser:
    """Create the parser of the options."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    what = (
        "benchmark: an epoch of training, a loss with many labels, the drop-in loss, or the checks"
    )
    add("what", nargs="?", choices=BENCHMARKS, default="networks", help=what)
    add("--quick", action="store_true", help="a subset that takes about two minutes")
    add("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="device")
    page = "only regenerate runs/benchmarks.md from its JSON files"
    add("--page", action="store_true", help=page)
    add("--repetitions", type=int, default=5, help="turns of each contender, 1 to 1,000")
    parser.add_run_directory_options()
    parser.add_speed_options()
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; return 1 if the result of a contender is wrong, else 0."""
    options_parser = parser()
    options = options_parser.parse_args(arguments)
    if options.page:
        pages.write_benchmarks(RUNS, {name: str(m.__doc__) for name, m in BENCHMARKS.items()})
        return 0
    began = time.perf_counter()
    with options_parser.user_errors():
        device = command_line.device(options.device)
        if not 1 <= options.repetitions <= 1_000:
            raise ValueError(f"expected 1 to 1,000 --repetitions, got {options.repetitions}")
        command_line.set_speed(options, suited=torch.get_num_threads())  # checks the options
    with options_parser.run_directory(options, f"benchmark-{options.what}") as run_dir:
        command_line.announce_threads(options)
        rows = measure(options, device)
        report.write_results(
            run_dir,
            config=vars(options),
            device=device,
            seconds=time.perf_counter() - began,
            rows=rows,
            answer=answer(rows),
        )
        table = report.table([readable(row) for row in rows])
        report.print_results(answer(rows), table, "Results", run_dir, curves={})
    wrong = [row for row in rows if complaint(row)]
    for row in wrong:
        print(f"{row['work']}, {row['peer']}: {complaint(row)}", file=sys.stderr)
    return 1 if wrong else 0


def measure(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Run the chosen benchmark; one row for each workload and contender."""
    rows: list[dict[str, Any]] = BENCHMARKS[options.what].measure_all(options, device)
    return rows


def complaint(row: dict[str, Any]) -> str | None:
    """Describe the error in a contender's result; None without one."""
    is_wrong = row["outcome"] in ("wrong", "failed")
    return f"{row['outcome'].upper()}: {row['note']}" if is_wrong else None


def answer(rows: Sequence[dict[str, Any]]) -> str:
    """Summarize the smallest ratio of any peer, and how often nnce is faster than all peers."""
    by_work: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        is_peer = not row["peer"].startswith(("nnce", "floor", "limit"))
        if is_peer and row["outcome"] == "right" and not math.isnan(row["ratio"]):
            by_work.setdefault((row["work"], row.get("networks", 1)), []).append(row)
    if not by_work:
        return "No peer could be timed."
    fastest = [min(of_work, key=lambda row: float(row["ratio"])) for of_work in by_work.values()]
    least = min(fastest, key=lambda row: float(row["ratio"]))
    slower = sum(row["ratio"] > 1 for row in fastest)
    return (
        f"Fastest peer: {least['peer']}, {least['ratio']:.2f} times nnce's time "
        f"({least['ratio_least']:.2f} to {least['ratio_most']:.2f}; {least['work']}).\n"
        f"nnce is faster than every peer in {slower} of {report.counted(len(fastest), 'workload')}."
    )


def readable(row: dict[str, Any]) -> report.Row:
    """Format a row for the table, with empty cells for unknown numbers."""

    def number(name: str, form: str, scale: float = 1) -> str:
        return "" if math.isnan(row[name]) else format(scale * row[name], form)

    spread = f" ({number('ratio_least', '.2f')}–{number('ratio_most', '.2f')})"
    cells = {
        "seconds": number("seconds", ".3g"),
        "ratio": "" if math.isnan(row["ratio"]) else number("ratio", ".2f") + spread,
        "peak MB": number("peak_bytes", ",.0f", 1e-6),
    }
    if "networks" not in row:
        forms = {"difference": ".1e", "kept": ".2f", "ulps": ",.1f"}
        known = {name: number(name, form) for name, form in forms.items() if name in row}
        return {"work": row["work"], "peer": row["peer"], **cells, **known}
    return {
        **{name: row[name] for name in ("work", "networks", "peer")},
        "seconds": cells.pop("seconds"),
        "examples/s": number("examples_per_second", ",.0f"),
        **cells,
        "threads": row["threads"] or "",
        "note": complaint(row) or row["note"],
    }


if __name__ == "__main__":
    running.run_script(main)
