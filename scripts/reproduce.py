"""Reproduce published tables row by row with the hand-written rules, from several starts."""

if __name__ == "__main__":
    import startup  # noqa: F401  must be first


import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from nnce.experiments import (
    command_line,
    directories,
    figures,
    pages,
    published,
    report,
    reproduction,
    resuming,
    running,
    side_by_side,
)
from nnce.experiments.command_line import ArgumentParser
from nnce.experiments.published import TABLES, Row, Table
from nnce.experiments.report import counted
from nnce.experiments.reproduction import Attempt, Outcome, Spread, repr_without_defaults
from nnce.experiments.tensorboard import Monitor
from nnce.training import Settings, parallel
from nnce.training.parallel import ALONE

RUNS = Path(__file__).resolve().parents[1] / "runs"


def parser() -> ArgumentParser:
    """Create the parser of the options."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("table", nargs="?", help="name of a table; without it, all are listed")
    add("rows", nargs="*", help="names of rows (default: all)")
    parser.add_common_options()
    add("--seeds", type=int, help="number of starts per row (default: depends on the table)")
    limit = "largest number of epochs, for a trial that departs from the published protocol"
    add("--max-epochs", type=int, help=limit)
    parser.add_train_size_option()
    parser.add_speed_options()
    page = "only regenerate runs/reproduced/README.md from its JSON files"
    add("--page", action="store_true", help=page)
    resuming.add_options(parser)
    parser.set_defaults(data="mnist", checkpoint_every="60s")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """List the tables or reproduce one; return the exit status."""
    options_parser = parser()
    start = resuming.start(options_parser, arguments, "reproduce.py", ALONE)
    options = start.options
    if options.page:
        pages.write_reproduced(RUNS)
        return 0
    if options.table is None:
        print("\n\n".join(map(listing, TABLES)))
        return 0
    with options_parser.user_errors():
        if parallel.under_torchrun():
            raise ValueError(
                "expected a single process, which trains all networks together, got torchrun"
            )
        work = Work(start)
    name = "-".join(["reproduce", options.table, *options.rows])
    with start.directory(options_parser, name) as path:
        command_line.announce_threads(options)
        run(work, path)
    return 0


def listing(name: str) -> str:
    """Describe a table and its rows."""
    table = TABLES[name]
    cells = [("row", "published, on", "network and training")]
    for row in table.rows:
        figure = "" if row.published is None else f"{row.published:g}, {row.of}"
        cells.append((row.name, figure, reproduction.protocol_line(row.settings, 784, 10)))
    lines = [f"  {row:8}{figure:38}{protocol}" for row, figure, protocol in cells]
    return "\n".join([f"{name}: {table.title} ({table.measure} in percent)", *lines])


class Work:
    """Rows to train, and their progress."""

    def __init__(self, start: resuming.Start) -> None:
        options, self.command = start.options, start.command
        self.table, self.rows = published.find(options.table, options.rows)
        options.device = command_line.device(options.device).type
        self.options = options
        count = self.table.seeds if options.seeds is None else options.seeds
        if not 1 <= count <= 1_000:
            raise ValueError(f"expected 1 to 1,000 --seeds, got {count:,}")
        self.seeds = range(options.seed, options.seed + count)
        self.settings = {
            row.name: reproduction.protocol(row, epochs=options.max_epochs) for row in self.rows
        }
        self.dataset = command_line.load_data(options)
        for row in self.rows:  # report errors before any training
            side_by_side.check(self.settings[row.name], self.seeds, self.dataset)
        command_line.set_speed(options, torch.get_num_threads())
        self.outcomes: dict[str, Outcome] = {}
        self.attempt: Attempt | None = None
        self._before, self._began = 0.0, time.perf_counter()
        if start.found is not None:
            self._resume(start.found)

    @property
    def protocols(self) -> dict[str, str]:
        """Protocol of each row, recorded and compared on resuming."""
        starts = f"{len(self.seeds)} starts from seed {self.seeds[0]}"
        # Without defaults, so that options of later versions do not change the text.
        return {
            row.name: f"{repr_without_defaults(self.settings[row.name])}, {row.of}, {starts}"
            for row in self.rows
        }

    @property
    def finished(self) -> list[Row]:
        """Rows with results, in the order of the table."""
        return [row for row in self.rows if row.name in self.outcomes]

    @property
    def compares(self) -> bool:
        """Whether results are comparable with the published ones: full protocol, on MNIST."""
        return self.options.data == "mnist" and not self.is_trial

    @property
    def is_trial(self) -> bool:
        """Whether epochs or training data are reduced."""
        whole = all(self.settings[row.name] == row.settings for row in self.rows)
        return self.options.train_size is not None or not whole

    @property
    def seconds(self) -> float:
        """Total time of the run, across resumptions."""
        return self._before + time.perf_counter() - self._began

    def _resume(self, found: Mapping[str, Any]) -> None:
        resuming.warn(found, ALONE)
        for name, protocol in self.protocols.items():
            # Rows that were added to the table later are ignored.
            if found.get("protocols", {}).get(name, protocol) != protocol:
                raise ValueError(
                    f"the run was started with a different protocol of row {name}: start a new run"
                )
        with resuming.loading():
            self.outcomes = {
                name: Outcome.from_dict(plain) for name, plain in found["outcomes"].items()
            }
            self._before = float(found["seconds"])
            if found["attempt"] is not None:
                self.attempt = self.begin(self.table.row(found["attempt"]["row"]))
                self.attempt.load_state_dict(found["attempt"])

    def begin(self, row: Row) -> Attempt:
        """Create the networks of a row, before the first step."""
        threads = command_line.threads(self.options)
        return Attempt(row, self.settings[row.name], self.dataset, list(self.seeds), threads)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "protocols": self.protocols,
            "outcomes": {name: asdict(outcome) for name, outcome in self.outcomes.items()},
            "attempt": None if self.attempt is None else self.attempt.state_dict(),
            "seconds": self.seconds,
        }


# ---------------------------------------------------------------------------------------- a run


def run(work: Work, run_dir: Path) -> None:
    """Train row by row, and write the results after each row."""
    options = work.options
    header = resuming.header("reproduce.py", vars(options), ALONE, work.command)
    monitor: Monitor | None = None
    saver = resuming.Saver(
        run_dir,
        options.checkpoint_every,
        lambda: {**header, **work.state_dict()},
        lambda: monitor.flush() if monitor else None,
        ALONE,
    )
    introduce(work)
    if not work.outcomes and work.attempt is None:
        saver.save()
    with resuming.Ending(run_dir, lambda: False, saver.save) as ending:
        under_way = [] if work.attempt is None else [work.attempt.row]
        for row in dict.fromkeys([*under_way, *work.rows]):
            if row.name in work.outcomes:
                continue
            settings = work.settings[row.name]
            if work.attempt is None:
                work.attempt = work.begin(row)
            attempt = work.attempt
            config = {"row": row.name, **vars(settings), "data": options.data}
            so_far = [attempt.records(epoch) for epoch in range(attempt.next_epoch)]
            with Monitor(run_dir / row.name, config, so_far, several=True) as monitor:
                train(attempt, settings, monitor, saver)
                work.outcomes[row.name] = attempt.finish(work.dataset.test)
                if settings.distortion is not None:
                    figure = figures.distortions(work.dataset.train.x, settings.distortion)
                    monitor.log_figure("distortion", figure)
                    report.write_figure(run_dir / row.name / "distortion.png", figure, dpi=90)
            work.attempt = monitor = None
            saver.save()
            directories.keep(run_dir)
            write(work, run_dir)
            cells = closing_row(work, row).items()
            print(", ".join(f"{name} {value}" for name, value in cells if value), flush=True)
    ending.close("Interrupted; resume with:")
    write(work, run_dir)  # again, in case the run was killed before the last write
    tables = f"{page(work)}\n\n{work.seconds:.1f} s"
    report.print_results(answer(work), tables, "Results and reproduced.png", run_dir)


def train(attempt: Attempt, settings: Settings, monitor: Monitor, saver: resuming.Saver) -> None:
    """Train all epochs of a row, with a progress bar."""
    epochs, done = settings.epochs, max(0, attempt.next_epoch - 1)
    with command_line.progress(total=epochs, initial=done, unit="epoch") as bar:
        bar.set_description(f"{attempt.row.name}, {counted(len(attempt.runs), 'network')}")
        for epoch in attempt.epochs(functools.partial(saver.between, ask=1)):
            if new := attempt.records(epoch):
                monitor.log(*new)
            saver.after(epoch, is_last=epoch == epochs)
            bar.update(epoch - bar.n)


def introduce(work: Work) -> None:
    """Print a description of the rows, the data and the hardware."""
    rows = ", ".join(row.name for row in work.rows)
    threads = command_line.threads(work.options) or parallel.processors()
    trial = " (shortened: not the published protocol)" if work.is_trial else ""
    done = f"\nresumed after {', '.join(work.outcomes) or 'the start'}" if work._before else ""
    print(
        f"{work.table.title}: {rows}, {counted(len(work.seeds), 'start')} each{trial}\n"
        f"{report.describe(work.options.data, work.dataset)}; "
        f"{work.options.dtype} on {report.device_name(work.dataset.train.x.device)}, threads "
        f"{threads}{done}",
        flush=True,
    )


# ----------------------------------------------------------------------------------- output


def closing_row(work: Work, row: Row) -> report.Row:
    """Row of results: published, ours measured in the same way, and on the test set."""
    table, outcome, compares = work.table, work.outcomes[row.name], work.compares
    chosen = outcome.spread(table, "chosen_validation")
    same = outcome.spread(table, reproduction.published_field(row))
    diverged = sum(one.diverged for one in outcome.trained)
    return {
        "row": row.name,
        "published": f"{row.published:.2f}" if row.published and compares else "",
        "ours, the same figure": mean_sd_range(same),
        "verdict": verdict(table, row, same) if compares else "",
        "validation, chosen epoch": mean_sd_range(chosen),
        "test, chosen epoch": mean_sd_range(outcome.spread(table, "chosen_test")),
        "test, last epoch": mean_sd_range(outcome.spread(table, "last_test")),
        "n": f"{chosen.n}" + (f" ({diverged} diverged)" if diverged else ""),
        "minutes": f"{outcome.seconds / 60:.1f}",
    }


def mean_sd_range(spread: Spread) -> str:
    """Format as mean ± sd (min–max)."""
    if math.isnan(spread.mean):
        return ""
    if spread.n == 1:
        return f"{spread.mean:.2f}"
    return f"{spread.mean:.2f} ± {spread.sd:.2f} ({spread.min:.2f}–{spread.max:.2f})"


def verdict(table: Table, row: Row, ours: Spread) -> str:
    """Compare the published result with the range of ours."""
    if row.published is None or math.isnan(ours.mean):
        return ""
    published = round(row.published, 2)
    if round(ours.min, 2) <= published <= round(ours.max, 2):
        return "within"
    better = published < ours.min if table.measure == "accuracy" else published > ours.max
    return "ours is better" if better else "ours is worse"


def answer(work: Work) -> str:
    """Summarize how many published results are reproduced, and which are not."""
    rows = [closing_row(work, row) for row in work.finished]
    if any(row["verdict"] for row in rows):
        return reproduction.summary(rows)
    reason = "nothing published" if work.compares else "not the published protocol or data"
    starts = counted(len(work.seeds), "start")
    return f"{counted(len(rows), 'row')}, {starts} each, not compared: {reason}."


def page(work: Work) -> str:
    """Markdown page with the table, protocols, notes, source and command."""
    table = work.table
    rows = work.finished
    features, classes = work.dataset.train.x.shape[1], work.dataset.train.y.shape[1]
    lines = [
        f"{table.title}, {table.measure} in percent, mean ± sd (min–max) over n starts; "
        f"{work.options.data}. {table.about}".strip(),
        *(["Shortened: not the published protocol."] if work.is_trial else []),
        f"\n{report.table([closing_row(work, row) for row in rows])}\n",
    ]
    for row in rows:
        sentences = [reproduction.protocol_line(work.settings[row.name], features, classes) + "."]
        if row.published is not None and work.compares:
            sentences.append(f"Published: {row.of}.")
        if row.note:
            sentences.append(row.note)
        committee = reproduction.percent(table, work.outcomes[row.name].committee)
        if len(work.seeds) > 1 and not math.isnan(committee):
            sentences.append(f"Ensemble of all {len(work.seeds)} networks: {committee:.2f}.")
        lines.append(f"- {row.name}: {' '.join(sentences)}")
    return "\n".join([*lines, "", f"Source: {table.source}. Made by `{work.command}`."])


def write(work: Work, run_dir: Path) -> None:
    """Write results.json, results.md and the figure, and log both to TensorBoard."""
    table = work.table
    rows = work.finished
    report.write_results(
        run_dir,
        config=vars(work.options),
        device=work.dataset.train.x.device,
        seconds=work.seconds,
        rows=[closing_row(work, row) for row in rows],
        answer=answer(work),
        command=work.command,
        protocols={row.name: work.protocols[row.name] for row in rows},
        published={row.name: row.published for row in rows},
        outcomes={name: asdict(outcome) for name, outcome in work.outcomes.items()},
    )
    markdown = page(work)
    report.write_text(run_dir / "results.md", f"{markdown}\n")
    columns = []
    for row in rows:
        field, trained = reproduction.published_field(row), work.outcomes[row.name].trained
        ours = [reproduction.percent(table, getattr(one, field)) for one in trained]
        columns.append((row.name, row.published if work.compares else None, ours))
    shortened = ", shortened" if work.is_trial else ""
    title = f"{table.title}: {table.measure} in percent on {work.options.data}{shortened}"
    figure = figures.reproduced(columns, title)
    report.write_figure(run_dir / "reproduced.png", figure, dpi=90)
    for old in run_dir.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(run_dir)) as writer:
        writer.add_figure("reproduced", figure)
        writer.add_text("results", markdown)


if __name__ == "__main__":
    running.run_script(main)
