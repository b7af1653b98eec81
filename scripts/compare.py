"""Train networks with both losses from many starts, and report the effect with error bars."""

if __name__ == "__main__":
    import startup  # noqa: F401  must be first


import argparse
import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

import nnce
from nnce import _memory, data
from nnce.engines import ensemble
from nnce.experiments import (
    command_line,
    comparison,
    comparison_report,
    directories,
    figures,
    report,
    resuming,
    running,
    side_by_side,
    sweep,
)
from nnce.experiments.command_line import ArgumentParser
from nnce.experiments.comparison import Findings
from nnce.experiments.comparison_report import Log
from nnce.experiments.epochs import as_csv
from nnce.experiments.report import counted
from nnce.experiments.side_by_side import Run, SideBySide, Variant
from nnce.losses import LOSSES, Loss
from nnce.training import Settings, parallel
from nnce.training.parallel import World

LRS = ("0.03", "0.1", "0.3", "1", "3", "10", "30")


def parser() -> ArgumentParser:
    """Create the parser of the options."""
    parser = ArgumentParser(__doc__)
    parser.add_common_options()
    parser.add_training_options()
    parser.add_argument(
        "--seeds", type=int, default=8, help="number of seeds, starting with --seed"
    )
    parser.add_argument(
        "--lrs",
        nargs="+",
        default=list(LRS),
        metavar="LR",
        help="learning rates to choose from by validation accuracy: 0.5 3 for both losses, or "
        "quadratic=1,3 cross-entropy=0.5 for each loss",
    )
    parser.add_argument(
        "--control-seeds",
        type=int,
        default=1,
        help="number of networks per loss, at its best rate, to train again by autograd",
    )
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="NAME=V,V",
        help="grid search instead of the comparison: values of training options, as in "
        "lr=0.1,0.3 l2=0,5 hidden=30,100-30; the best is chosen by validation accuracy",
    )
    parser.add_speed_options()
    resuming.add_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison or the sweep; return the exit status."""
    options_parser = parser()
    world = parallel.join()
    start = resuming.start(options_parser, arguments, "compare.py", world)
    work = sweep_all if start.options.sweep else compare
    try:
        return work(options_parser, start, world)
    finally:
        parallel.leave()


def compare(options_parser: ArgumentParser, start: resuming.Start, world: World) -> int:
    """Compare the two losses; return the exit status."""
    options, found = start.options, start.found
    with options_parser.user_errors():
        settings, dataset = prepare(options)
        runs = side_by_side.make_runs(settings, dataset)
        sizes = runs[0].network.sizes
        command_line.set_speed(options, ensemble.threads(sizes, options.batch_size))
        command_line.announce_compilation(options, sizes)
        training = Training(options, dataset, runs, world, found)
    training_name = command_line.training_name(options)
    data_name = command_line.data_name(options)
    name = f"compare-{data_name}-{_memory.dashed(sizes)}-{training_name}-seeds{options.seeds}"
    with start.directory(options_parser, name, world=world) as path:
        if world.rank:
            training.run(None, start.command)
            return 0
        introduce(options, dataset, training)
        run(training, path, start.command)
    return 0


def sweep_all(options_parser: ArgumentParser, start: resuming.Start, world: World) -> int:
    """Train all combinations of --sweep and choose one; return the exit status."""
    options, found = start.options, start.found
    with options_parser.user_errors():
        options.device = command_line.device(options.device).type
        for name in ("lrs", "control_seeds"):
            if getattr(options, name) != options_parser.get_default(name):
                raise ValueError(f"expected --sweep or --{name.replace('_', '-')}, got both")
        dataset = command_line.load_data(options)
        swept = sweep.Sweep(options, dataset, world)
        sizes = swept.groups[0].runs[0].network.sizes
        command_line.set_speed(options, ensemble.threads(sizes, options.batch_size))
        command_line.announce_compilation(options, sizes)
        before = 0.0
        if found is not None:
            resuming.warn(found, world)
            with resuming.loading():
                swept.load_state_dict(found["sweep"])
                before = float(found["seconds"])
    names = "-".join(text.partition("=")[0] for text in options.sweep)
    name = f"sweep-{command_line.data_name(options)}-{names}-seeds{options.seeds}"
    with start.directory(options_parser, name, world=world) as path:
        print(
            f"{report.describe(options.data, dataset)}\n"
            f"{counted(len(swept.combinations), 'combination')} from "
            f"{counted(options.seeds, 'start')} each: {counted(swept.networks, 'network')} in "
            f"{counted(len(swept.groups), 'group')}",
            flush=True,
        )
        train_sweep(swept, dataset, start, path, world, before)
    return 0


def train_sweep(
    swept: sweep.Sweep,
    dataset: data.Dataset,
    start: resuming.Start,
    run_dir: Path,
    world: World,
    before: float,
) -> None:
    """Train a sweep with checkpoints, after `before` seconds so far, and write the results."""
    options = start.options
    header = resuming.header("compare.py", vars(options), world, start.command)
    began = time.perf_counter() - before

    def content() -> dict[str, Any]:
        seconds = time.perf_counter() - began
        return {**header, "sweep": swept.state_dict(), "seconds": seconds}

    path = None if world.rank else run_dir
    saver = resuming.Saver(path, options.checkpoint_every, content, lambda: None, world)
    if start.found is None:
        saver.save()
    total, silent = options.epochs * len(swept.groups), True if world.rank else None
    with (
        tqdm(total=total, unit="epoch", disable=silent, leave=False) as bar,
        resuming.Ending(run_dir, lambda: False, saver.save) as ending,
    ):
        for epoch in swept.epochs(functools.partial(saver.between, ask=1)):
            saver.after(epoch, is_last=epoch == options.epochs)
            bar.update(min(epoch, 1))
    ending.close("Interrupted; resume with:")
    if not world.rank:
        write_sweep(swept, dataset, start, run_dir, time.perf_counter() - began)


def write_sweep(
    swept: sweep.Sweep,
    dataset: data.Dataset,
    start: resuming.Start,
    run_dir: Path,
    seconds: float,
) -> None:
    """Write and print the chosen combination, the ranking and the heat map."""
    conclusion = sweep.conclude(swept, dataset)
    answer = sweep.answer(conclusion)
    page = f"{answer}\n\n{sweep.ranking(conclusion, swept.networks)}"
    report.write_text(run_dir / "results.md", f"{page}\n\nMade by `{start.command}`.\n")
    if conclusion.chosen is not None:
        nnce.save(conclusion.chosen.runs[0].network, run_dir / "network.pt")
    report.write_results(
        run_dir,
        config=vars(start.options),
        device=dataset.train.x.device,
        seconds=seconds,
        command=start.command,
        **sweep.results(conclusion),
    )
    report.write_text(run_dir / "epochs.csv", as_csv(sweep.epoch_rows(conclusion)))
    results = "Results (results.md, epochs.csv)"
    if (accuracies := sweep.heat_map(conclusion)) is not None:
        figure = figures.heat_map(accuracies)
        report.write_figure(run_dir / "heat-map.png", figure, dpi=90)
        results = "Results (results.md, epochs.csv, heat-map.png)"
    tables = f"{sweep.ranking(conclusion)}\n\n{seconds:.1f} s"
    report.print_results(answer, tables, results, run_dir, curves={})


def run(training: "Training", run_dir: Path, command: str) -> None:
    """Train, log and write the results."""
    options, runs = training.options, training.side_by_side.runs
    log = Log(run_dir, vars(options), runs, training.controls.runs, training.controls.finished)
    with log:
        ending = resuming.Ending(run_dir, lambda: log.finished >= 1, lambda: training.saver.save())
        with ending:
            training.run(log, command)
        if ending.stopped is not None:
            for one in runs:  # epochs that are not logged for all networks do not count
                del one.records[log.finished + 1 :]
        if log.finished >= 1:
            findings = write(training, log, command, interrupted=ending.stopped is not None)
    kept = ""
    if log.finished >= 1:
        kept = f"epochs 0 to {log.finished} are in the table; "
        answer = comparison_report.answer(findings)
        tables = f"{comparison_report.overview(findings)}\n\n{training.costs.summary(runs, log)}"
        results = "results.md (all differences, p-values), epochs.csv and plots"
        report.print_results(answer, tables, results, run_dir, log.folders)
    ending.close(f"Interrupted; {kept}resume with:")


def write(training: "Training", log: Log, command: str, *, interrupted: bool) -> Findings:
    """Write the results and return the findings."""
    options, dataset, runs = training.options, training.dataset, training.side_by_side.runs
    controls, run_dir = training.controls.runs, log.run_dir
    with command_line.announced("comparing all engines with autograd"):
        findings = comparison.conclude(runs, controls, dataset)
    results = comparison_report.results(findings)
    page = f"{comparison_report.page(findings, options.dtype)}\n\nMade by `{command}`."

    def write_results() -> None:
        seconds = training.costs.summary(runs, log)
        report.write_text(run_dir / "results.md", f"{page}\n\n{seconds}\n")
        seconds_of = training.costs.by_part(runs, log)
        report.write_results(
            run_dir,
            config=vars(options),
            device=dataset.train.x.device,
            seconds=sum(seconds_of.values()),
            command=command,
            interrupted=interrupted,
            seconds_of=seconds_of,
            **results,
        )

    write_results()  # before plotting, so that the numbers are safe
    layers = _memory.dashed(runs[0].network.sizes)
    title = (
        f"{command_line.data_name(options)}, {layers}, start {options.init}, n = {options.seeds}"
    )
    best = findings.best_lrs
    with command_line.announced("plotting learning curves"):
        figure = figures.learning_curves(runs, best, f"{title}: mean and 95 % interval")
        curves = run_dir / "learning-curves.png"
        report.write_figure(curves, figure, dpi=90)
    with command_line.announced("plotting images for TensorBoard"):
        log.finish([*runs, *controls], best, dataset, page, curves)
    write_results()
    return findings


class Training:
    """Training of all networks together, then of the controls, with checkpoints.

    Args:
        options: options of the script.
        dataset: training, validation and test data.
        runs: all networks; each process trains a share.
        world: the processes.
        found: content of the checkpoint to resume from; None for a new run.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        dataset: data.Dataset,
        runs: Sequence[Run],
        world: World,
        found: Mapping[str, Any] | None,
    ) -> None:
        self.options, self.dataset, self.world, self._found = options, dataset, world, found
        threads = command_line.threads(options)
        self.side_by_side = SideBySide(runs, dataset, threads, world)
        self.controls = side_by_side.controls([], dataset, world)
        self.costs = Costs(world.size)
        if found is not None:
            resuming.warn(found, world)
            with resuming.loading():
                self.side_by_side.load_state_dict(found["side by side"])
                self.costs.load_state_dict(found["costs"])
                # With more epochs than before, other controls may be chosen.
                if self.side_by_side.complete and found["controls"] is not None:
                    self.controls = side_by_side.controls(self._chosen(), dataset, world)
                    self.controls.load_state_dict(found["controls"])

    def _chosen(self) -> list[Run]:
        """Networks to train again: the first ones at the best rate of each loss."""
        variants = side_by_side.by_variant(self.side_by_side.runs)
        return [
            run
            for loss, lr in comparison.best_lrs(self.side_by_side.runs).items()
            for run in variants[Variant(loss, lr)][: self.options.control_seeds]
        ]

    def run(self, log: Log | None, command: str) -> None:
        """Train to the end; `log` is None except on rank 0."""
        header = resuming.header("compare.py", vars(self.options), self.world, command)

        def content() -> dict[str, Any]:
            return {
                **header,
                "side by side": self.side_by_side.state_dict(),
                "controls": self.controls.state_dict() if self.controls.runs else None,
                "costs": self.costs.state_dict(log.seconds if log else 0.0),
            }

        self.saver = resuming.Saver(
            log.run_dir if log else None,
            self.options.checkpoint_every,
            content,
            log.flush if log else lambda: None,
            self.world,
        )
        if self._found is None:
            self.saver.save()
        epochs = self.options.epochs
        with tqdm(total=epochs, unit="epoch", disable=None if log else True, leave=False) as bar:
            bar.set_description(f"{counted(len(self.side_by_side.runs), 'network')} together")
            with self.costs.of("side by side", log):
                for epoch in self.side_by_side.epochs(functools.partial(self.saver.between, ask=1)):
                    if log:
                        log.epoch(self.side_by_side.runs, self.dataset)
                        log.finished = epoch
                        if epoch:
                            directories.keep(log.run_dir)
                    self.saver.after(epoch, is_last=epoch == epochs)
                    bar.update(epoch - bar.n)
            bar.set_description("control, by autograd")
            if not self.controls.runs:
                self.controls = side_by_side.controls(self._chosen(), self.dataset, self.world)
            bar.reset(epochs * len(self.controls.runs))
            with self.costs.of("control", log):
                # Several processes are not at the same step here, so they stop only after an epoch.
                between = self.saver.between if self.world.size == 1 else None
                for epoch in self.controls.epochs(between):
                    if log:
                        active = [run for run in self.controls.runs if not run.stopped]
                        log.epoch(active, self.dataset)
                    self.saver.after(epoch, is_last=epoch == epochs)
                    bar.update(epoch * len(self.controls.runs) - bar.n)


class Costs:
    """Time of the parts of a run, in seconds."""

    def __init__(self, processes: int) -> None:
        self._began, self._processes = time.perf_counter(), processes
        self._logging = 0.0  # before the run was resumed
        self._parts = {"side by side": 0.0, "control": 0.0}

    def state_dict(self, logging: float) -> dict[str, float]:
        """State for a checkpoint, with the time of logging since the run started or was resumed."""
        return {**self._parts, "total": self.total, "logging": self._logging + logging}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the state of a checkpoint."""
        self._parts = {part: float(state[part]) for part in self._parts}
        self._began = time.perf_counter() - float(state["total"])
        self._logging = float(state["logging"])

    @property
    def total(self) -> float:
        """Total time of the run, across resumptions."""
        return time.perf_counter() - self._began

    @contextlib.contextmanager
    def of(self, part: Literal["side by side", "control"], log: Log | None) -> Iterator[None]:
        """Add the time of the block, except for logging, to a part."""

        def without_logging() -> float:
            return self.total - (log.seconds if log else 0.0)

        began = without_logging()
        try:
            yield
        finally:
            self._parts[part] += without_logging() - began

    def summary(self, runs: Sequence[Run], log: Log) -> str:
        """Format the total time and its parts in one line."""
        parts = self.by_part(runs, log)
        line = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
        return f"{sum(parts.values()):.1f} s: {line}"

    def by_part(self, runs: Sequence[Run], log: Log) -> dict[str, float]:
        """Time by part; the sum is the total time."""
        training = sum(record.seconds for run in runs for record in run.records) / self._processes
        side_by_side, control = self._parts.values()
        logging = self._logging + log.seconds
        return {
            "training": training,
            "evaluation": side_by_side - training,
            "logging": logging,
            "tables and pictures": self.total - side_by_side - logging - control,
            "control": control,
        }


def introduce(options: argparse.Namespace, dataset: data.Dataset, training: Training) -> None:
    """Print a description of the networks, the data and the hardware."""
    runs = training.side_by_side.runs
    variants = side_by_side.by_variant(runs)
    threads = command_line.threads(options) or parallel.processors()
    world = training.world
    processes = f" in each of {counted(world.size, 'process', 'processes')}" if world.joined else ""
    after = f"\nresumed after epoch {runs[0].last.epoch}" if runs[0].records else ""
    grids = "; ".join(
        f"{loss} at {', '.join(f'{v.lr:g}' for v in variants if v.loss == loss)}" for loss in LOSSES
    )
    command_line.announce_threads(options)
    print(
        f"{report.describe(options.data, dataset)}\n"
        f"{counted(len(runs), 'network')} {_memory.dashed(runs[0].network.sizes)}, "
        f"{counted(options.seeds, 'seed')}; {grids}\n{options.dtype} on "
        f"{report.device_name(dataset.train.x.device)}, threads {threads}{processes}{after}",
        flush=True,
    )


def prepare(options: argparse.Namespace) -> tuple[list[Settings], data.Dataset]:
    """Return the settings of all networks, and the data; raises ValueError for bad options."""
    options.device = command_line.device(options.device).type
    base = command_line.settings(options)
    lrs = learning_rates(options.lrs)
    if options.seeds >= 1 and not 0 <= options.control_seeds <= options.seeds:
        raise ValueError(
            f"expected 0 to {options.seeds} --control-seeds, at most --seeds, got "
            f"{options.control_seeds}"
        )
    dataset = command_line.load_data(options)
    return side_by_side.plan(base, lrs, options.seeds, dataset), dataset


def learning_rates(texts: Sequence[str]) -> dict[Loss, list[float]]:
    """Parse --lrs to a list of rates for each loss."""
    lrs: dict[Loss, list[float]] = {loss: [] for loss in LOSSES}
    for text in texts:
        loss, _, numbers = text.rpartition("=")
        for number in numbers.split(","):
            try:
                lr = float(number)
            except ValueError as error:
                raise ValueError(f"expected numbers in --lrs, got {text!r}") from error
            if not loss:
                for of_loss in lrs.values():
                    of_loss.append(lr)
            elif loss in LOSSES:
                lrs[loss].append(lr)
            else:
                raise ValueError(
                    f"expected --lrs for {' or '.join(map(repr, LOSSES))}, got {text!r}"
                )
    for of_loss in lrs.values():
        command_line.check_distinct("--lrs", of_loss, [f"{lr:g}" for lr in of_loss])
    return lrs


if __name__ == "__main__":
    running.run_script(main)
