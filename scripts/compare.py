"""Train with both losses from many starts, and say with error bars what the choice of loss does."""

if __name__ == "__main__":
    import startup  # noqa: F401  before all else


import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Literal

from tqdm import tqdm

from nnce import data, ensemble, training
from nnce.experiments import command_line, comparison, figures, report
from nnce.experiments.command_line import ArgumentParser
from nnce.experiments.comparison import Run, Variant
from nnce.experiments.report import Log
from nnce.losses import LOSSES, Loss

LRS = ("0.03", "0.1", "0.3", "1", "3", "10", "30")


def parser() -> ArgumentParser:
    """The options."""
    parser = ArgumentParser(__doc__)
    parser.add_common_options()
    parser.add_training_options()
    parser.add_argument("--seeds", type=int, default=8, help="how many starts, counted from --seed")
    parser.add_argument(
        "--lrs",
        nargs="+",
        default=list(LRS),
        metavar="LR",
        help="learning rates to choose from on the validation data: 0.5 3 for both losses, "
        "or quadratic=1,3 cross-entropy=0.5 for each its own",
    )
    parser.add_argument(
        "--control-seeds",
        type=int,
        default=1,
        help="how many of the networks of each loss, at its best rate, to train again by autograd",
    )
    parser.add_speed_options()
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare as asked; the exit status."""
    options_parser = parser()
    options = options_parser.parse_args(arguments)
    command = shlex.join(
        ["scripts/compare.py", *(sys.argv[1:] if arguments is None else arguments)]
    )
    with options_parser.user_errors():
        settings, dataset = prepare(options)
        runs = comparison.make_runs(settings, dataset)
        sizes = runs[0].network.sizes
        command_line.set_speed(options, ensemble.threads(sizes, options.batch_size))
        command_line.announce_compilation(options, sizes)
    layers = "-".join(map(str, sizes))
    name = f"compare-{options.data}-{layers}-{options.init}-seeds{options.seeds}"
    with options_parser.run_directory(options.run_dir, name) as run_dir:
        costs = Costs()
        stopped: BaseException | None = None
        introduce(options, dataset, runs)
        controls: list[Run] = []
        with Log(run_dir, vars(options)) as log:
            try:
                train_all(options, dataset, runs, controls, log, costs)
            except (KeyboardInterrupt, OSError) as error:
                if log.finished < 1:
                    raise
                stopped = error
                for run in runs:  # an epoch that is not logged of all of them does not count
                    del run.records[log.finished + 1 :]
            with command_line.undisturbed():
                findings = comparison.conclude(runs, controls, dataset)

                def write() -> None:
                    report.write_results(
                        run_dir,
                        config=vars(options),
                        device=dataset.train.x.device,
                        seconds=costs.total,
                        rows=[report.summary_row(summary) for summary in findings.summaries],
                        command=command,
                        interrupted=stopped is not None,
                        seconds_of=costs.by_part(runs, log),
                        **report.more_results(findings),
                    )

                write()  # before the pictures: what is computed is safe from now on
                page = report.page(findings, options.dtype)
                title = f"{options.data}, {layers}, start {options.init}, n = {options.seeds}"
                figure = figures.learning_curves(
                    runs, findings.best_lrs, f"{title}: mean and 95 % interval"
                )
                report.write_figure(run_dir / "learning-curves.png", figure, dpi=90)
                markdown = f"{page}\n\nMade by `{command}`.\n"
                report.write_text(run_dir / "results.md", markdown)
                log.finish([*runs, *controls], findings.best_lrs, dataset, markdown, figure)
                write()
        print(f"\n{page}\n")
        parts = ", ".join(f"{name} {s:.1f}" for name, s in costs.by_part(runs, log).items())
        print(f"{costs.total:.1f} s: {parts}")
        print(f"Tables, every epoch of every network, and a picture: {run_dir}")
        print(f"Curves: {report.tensorboard_command(run_dir)}")
        if isinstance(stopped, KeyboardInterrupt):
            print("Interrupted; what was finished is in the table.", file=sys.stderr)
        if stopped is not None:
            raise stopped
    return 0


class Costs:
    """Where the time goes, in seconds."""

    def __init__(self) -> None:
        """Begin."""
        self._began = time.perf_counter()
        self._parts = {"side by side": 0.0, "control": 0.0}

    @property
    def total(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self._began

    @contextlib.contextmanager
    def of(self, part: Literal["side by side", "control"], log: Log) -> Iterator[None]:
        """The block trains and measures all networks or the controls, and logs."""
        began = self.total - log.seconds
        try:
            yield
        finally:
            self._parts[part] += self.total - log.seconds - began

    def by_part(self, runs: Sequence[Run], log: Log) -> dict[str, float]:
        """The total in parts."""
        training = sum(record.seconds for run in runs for record in run.records)
        side_by_side, control = self._parts.values()
        return {
            "training": training,
            "evaluation": side_by_side - training,
            "logging": log.seconds,
            "tables and pictures": self.total - side_by_side - log.seconds - control,
            "control": control,
        }


def introduce(options: argparse.Namespace, dataset: data.Dataset, runs: Sequence[Run]) -> None:
    """Say what is going to be trained."""
    n_train, n_validation, n_test = (len(split.x) for split in dataset)
    variants = comparison.by_variant(runs)
    threads = command_line.threads(options) or os.cpu_count()
    grids = "; ".join(
        f"{loss} at {', '.join(f'{v.lr:g}' for v in variants if v.loss == loss)}" for loss in LOSSES
    )
    print(
        f"{options.data}: {n_train:,} training, {n_validation:,} validation and {n_test:,} test "
        f"examples\n{len(runs)} networks {'-'.join(map(str, runs[0].network.sizes))} side by side, "
        f"starts of each: {options.seeds}; {grids}\n{options.dtype} on "
        f"{report.device_name(dataset.train.x.device)}, threads {threads}",
        flush=True,
    )


def prepare(options: argparse.Namespace) -> tuple[list[training.Settings], data.Dataset]:
    """The settings of every network and the data; ValueError where the options make no sense."""
    base = command_line.settings(options)
    lrs = learning_rates(options.lrs)
    if options.seeds >= 1 and not 0 <= options.control_seeds <= options.seeds:
        raise ValueError(
            f"expected 0 to {options.seeds} --control-seeds, as many as there are seeds, got "
            f"{options.control_seeds}"
        )
    dataset = command_line.load_data(options)
    return comparison.plan(base, lrs, options.seeds, dataset), dataset


def learning_rates(texts: Sequence[str]) -> dict[Loss, list[float]]:
    """--lrs by loss."""
    lrs: dict[Loss, list[float]] = {loss: [] for loss in LOSSES}
    for text in texts:
        loss, _, numbers = text.rpartition("=")
        for number in numbers.split(","):
            try:
                lr = float(number)
            except ValueError as error:
                raise ValueError(f"expected --lrs of numbers, got {text!r}") from error
            if not loss:
                for of_loss in lrs.values():
                    of_loss.append(lr)
            elif loss in LOSSES:
                lrs[loss].append(lr)
            else:
                raise ValueError(
                    f"expected --lrs for {' or '.join(map(repr, LOSSES))}, got {text!r}"
                )
    return lrs


def train_all(
    options: argparse.Namespace,
    dataset: data.Dataset,
    runs: Sequence[Run],
    controls: list[Run],
    log: Log,
    costs: Costs,
) -> None:
    """Train all networks side by side, and then the controls, one by one."""
    epochs, threads = options.epochs + 1, command_line.threads(options)
    with tqdm(total=epochs, unit="epoch", disable=None, leave=False) as bar:
        bar.set_description(f"{len(runs)} networks side by side")
        with costs.of("side by side", log):
            for epoch in comparison.train_together(runs, dataset, threads):
                with command_line.undisturbed():
                    log.epoch(runs, dataset)
                    log.finished = epoch
                    if epoch:
                        command_line.keep(log.run_dir)
                bar.update()
        variants = comparison.by_variant(runs)
        chosen = [
            run
            for loss, lr in comparison.best_lrs(runs).items()
            for run in variants[Variant(loss, lr)][: options.control_seeds]
        ]
        bar.reset(epochs * len(chosen))
        bar.set_description("the control, by autograd")
        # Epoch by epoch through all of them, so that their curves have one point an epoch.
        again = [comparison.control(run, dataset) for run in chosen]
        controls += [run for run, _ in again]
        with costs.of("control", log):
            for _ in range(epochs):
                for _, epochs_of_one in again:
                    next(epochs_of_one, None)
                    bar.update()
                with command_line.undisturbed():
                    log.epoch([run for run in controls if not run.stopped], dataset)


if __name__ == "__main__":
    command_line.run_script(main)
