"""Train with both losses from many starts, and say with error bars what the choice of loss does."""

if __name__ == "__main__":
    import startup  # noqa: F401  before all else


import argparse
import contextlib
import csv
import io
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from nnce import backprop, comparison, data, ensemble, experiment, modules, plots, training
from nnce.backprop import Loss
from nnce.comparison import Run, Variant
from nnce.monitor import Monitor, scalars

LRS = ("0.03", "0.1", "0.3", "1", "3", "10", "30")
READING = """\
At equal rates part of the difference is the length of the step: cross-entropy's dC/dz is the
quadratic's without the factor σ'(z), which is ¼ at most. The fair comparison is at each loss's best
rate, the one of the highest mean validation accuracy after the last epoch. The intervals are for
the choice of the start; the order of the mini-batches is the same for all. The p-values (paired
t-test) are not corrected for their number."""


def parser() -> experiment.ArgumentParser:
    """The options."""
    parser = experiment.ArgumentParser(__doc__)
    parser.add_common_options()
    parser.add_argument(
        "--hidden", type=int, nargs="*", default=[30], help="neurons of each hidden layer"
    )
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
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training data")
    parser.add_argument("--batch-size", type=int, default=10, help="examples in a mini-batch")
    parser.add_argument("--momentum", type=float, default=0.0, help="as torch.optim.SGD's")
    parser.add_argument(
        "--l2", type=float, default=0.0, help="lambda; weights decay by lambda / n_train"
    )
    parser.add_argument(
        "--init",
        choices=modules.INITS,
        default="scaled",
        help="weights from N(0, 1/n_in), or from N(0, 1)",
    )
    parser.add_argument(
        "--train-size", type=int, help="use the first so many training examples; all if not given"
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
        runs = comparison.start(settings, dataset)
        sizes = runs[0].network.sizes
        experiment.set_speed(options, ensemble.threads(sizes, options.batch_size, len(runs)))
    layers = "-".join(map(str, sizes))
    name = f"compare-{options.data}-{layers}-{options.init}-seeds{options.seeds}"
    with options_parser.run_directory(options.run_dir, name) as run_dir:
        began = time.perf_counter()
        stopped: BaseException | None = None
        introduce(options, dataset, runs)
        controls: list[Run] = []
        with Log(run_dir, vars(options)) as log:
            try:
                train(options, dataset, runs, controls, log)
            except (KeyboardInterrupt, OSError) as error:
                if log.finished < 1:
                    raise
                stopped = error
                for run in runs:  # an epoch that is not logged of all of them does not count
                    del run.records[log.finished + 1 :]
            with experiment.undisturbed():
                found = comparison.conclude(runs, controls, dataset)

                def write() -> None:
                    experiment.write_results(
                        run_dir,
                        config=vars(options),
                        device=dataset.train.x.device,
                        seconds=time.perf_counter() - began,
                        rows=[summary_row(summary) for summary in found.summaries],
                        command=command,
                        interrupted=stopped is not None,
                        logging_seconds=log.seconds,
                        **more_results(found),
                    )

                write()  # before the pictures: what is computed is safe from now on
                text = page(found, options.dtype)
                title = f"{options.data}, {layers}, start {options.init}, n = {options.seeds}"
                figure = learning_curves(runs, found.best_lrs, f"{title}: mean and 95 % interval")
                experiment.write_figure(run_dir / "learning-curves.png", figure, dpi=90)
                markdown = f"{text}\n\nMade by `{command}`.\n"
                experiment.write_text(run_dir / "results.md", markdown)
                log.finish([*runs, *controls], found.best_lrs, dataset, markdown, figure)
                write()
        print(f"\n{text}\n")
        print(f"{time.perf_counter() - began:.1f} s, {log.seconds:.1f} s of them logging")
        print(f"Tables, every epoch of every network, and a picture: {run_dir}")
        print(f"Curves: {experiment.tensorboard_command(run_dir)}")
        if isinstance(stopped, KeyboardInterrupt):
            print("Interrupted; what was finished is in the table.", file=sys.stderr)
        if stopped is not None:
            raise stopped
    return 0


def introduce(options: argparse.Namespace, dataset: data.Dataset, runs: Sequence[Run]) -> None:
    """Say what is going to be trained."""
    n_train, n_validation, n_test = (len(split.x) for split in dataset)
    grids = "; ".join(
        f"{loss} at {', '.join(f'{v.lr:g}' for v in comparison.by_variant(runs) if v.loss == loss)}"
        for loss in backprop.LOSSES
    )
    print(
        f"{options.data}: {n_train:,} training, {n_validation:,} validation and {n_test:,} test "
        f"examples\n{len(runs)} networks {'-'.join(map(str, runs[0].network.sizes))} side by side, "
        f"starts of each: {options.seeds}; {grids}\n{options.dtype} on "
        f"{experiment.device_name(dataset.train.x.device)}, threads {torch.get_num_threads()}",
        flush=True,
    )


def prepare(options: argparse.Namespace) -> tuple[list[training.Settings], data.Dataset]:
    """The settings of every network and the data; ValueError where the options make no sense."""
    base = training.Settings(
        hidden=tuple(options.hidden),
        epochs=options.epochs,
        batch_size=options.batch_size,
        momentum=options.momentum,
        l2=options.l2,
        init=options.init,
        seed=options.seed,
    )
    lrs = rates(options.lrs)
    if not 0 <= options.control_seeds <= max(0, options.seeds):
        raise ValueError(
            f"expected 0 to {options.seeds} --control-seeds, as many as there are seeds, got "
            f"{options.control_seeds}"
        )
    dataset = data.load(
        options.data,
        data_dir=options.data_dir,
        train_size=options.train_size,
        device=experiment.device(options.device),
        dtype=experiment.DTYPES[options.dtype],
    )
    return comparison.plan(base, lrs, options.seeds, dataset), dataset


def rates(texts: Sequence[str]) -> dict[Loss, list[float]]:
    """--lrs by loss."""
    found: dict[Loss, list[float]] = {loss: [] for loss in backprop.LOSSES}
    for text in texts:
        loss, _, numbers = text.rpartition("=")
        for number in numbers.split(","):
            try:
                lr = float(number)
            except ValueError as error:
                raise ValueError(f"expected --lrs of numbers, got {text!r}") from error
            if not loss:
                for its in found.values():
                    its.append(lr)
            elif loss in backprop.LOSSES:
                found[loss].append(lr)
            else:
                raise ValueError(
                    f"expected --lrs for {' or '.join(map(repr, backprop.LOSSES))}, got {text!r}"
                )
    return found


class Log:
    """Every epoch of every network: in epochs.csv, and in TensorBoard a folder a variant."""

    def __init__(self, run_dir: Path, config: Mapping[str, object]) -> None:
        """Begin the file."""
        self.seconds = 0.0
        """What logging has cost."""
        self.finished = -1
        """The last epoch that is logged of all networks side by side."""
        self.run_dir, self._config = run_dir, config
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context((run_dir / "epochs.csv").open("wb", buffering=0))
        self._monitors: dict[Variant, Monitor] = {}

    def __enter__(self) -> "Log":
        """Close the files at the block's end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the files."""
        self._stack.close()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def epoch(self, runs: Sequence[Run], dataset: data.Dataset) -> None:
        """The last epoch of these runs."""
        with self._timed():
            rows = [
                {
                    **run.variant._asdict(),
                    "seed": run.settings.seed,
                    "epoch": run.last.epoch,
                    "step": run.last.step,
                    "seconds": run.last.seconds,
                    **scalars(run.last),
                }
                for run in runs
            ]
            self._append(rows)
            for variant, its in comparison.by_variant(runs).items():
                monitor = self.monitor(variant)
                monitor.log(*(run.last for run in its))
                first = its[0]
                monitor.log_histograms(
                    first.network, dataset.validation, variant.loss, first.last.epoch
                )

    def _append(self, rows: Sequence[experiment.Row]) -> None:
        """All of these rows, or where the disk is full none: half a number would be another one."""
        end = self._file.tell()
        text = io.StringIO()
        table = csv.DictWriter(text, list(rows[0]) if rows else [])
        if not end:
            table.writeheader()
        table.writerows(rows)
        content = memoryview(text.getvalue().encode())
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError:
            self._file.truncate(end)
            raise

    def monitor(self, variant: Variant) -> Monitor:
        """The variant's own TensorBoard run."""
        if variant not in self._monitors:
            self._monitors[variant] = self._stack.enter_context(
                Monitor(self.run_dir / str(variant), {**self._config, **variant._asdict()})
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
            for variant, its in comparison.by_variant(runs).items():
                monitor = self.monitor(variant)
                monitor.log_hparams(its[0].last)
                if variant in chosen:
                    monitor.log_images(its[0].network, dataset.test, its[0].last.epoch)
            with Monitor(self.run_dir, self._config) as monitor:
                monitor.log_layout(runs[0].last)
                monitor.log_text("results", page)
                monitor.log_figure("learning curves", figure)


def train(
    options: argparse.Namespace,
    dataset: data.Dataset,
    runs: Sequence[Run],
    controls: list[Run],
    log: Log,
) -> None:
    """Train all networks side by side, and then the controls, one by one."""
    epochs = options.epochs + 1
    with tqdm(total=epochs, unit="epoch", disable=None, leave=False) as bar:
        bar.set_description(f"{len(runs)} networks side by side")
        for epoch in comparison.train(runs, dataset):
            with experiment.undisturbed():
                log.epoch(runs, dataset)
                log.finished = epoch
                if epoch:
                    experiment.keep(log.run_dir)
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
        again = [comparison.control(run, dataset, order_seed=options.seed) for run in chosen]
        controls += [run for run, _ in again]
        for _ in range(epochs):
            for _, its_epochs in again:
                next(its_epochs, None)
                bar.update()
            with experiment.undisturbed():
                log.epoch([run for run in controls if not run.stopped], dataset)


# ------------------------------------------------------------------------------- what it comes to


def summary_row(summary: comparison.Summary) -> experiment.Row:
    """A row of results.json, flat."""
    row: dict[str, object] = {
        **summary.variant._asdict(),
        "chosen": summary.chosen,
        "networks": summary.networks,
        "diverged": summary.diverged,
        "epochs": summary.epochs,
    }
    for name, its in summary.test_accuracy.items():
        row |= {f"test accuracy, {name}, {key}": value for key, value in its._asdict().items()}
    for accuracy, epochs in summary.epochs_to.items():
        row[f"epochs to {accuracy:.0%} validation accuracy"] = epochs
    row["saturated outputs at the start"], row["saturated outputs at the end"] = summary.saturated
    row["seconds a network"] = summary.seconds
    return row


def more_results(found: comparison.Findings) -> dict[str, object]:
    """What else results.json has: the differences."""
    return {
        "best_lrs": found.best_lrs,
        "notes": found.notes,
        "differences": [
            {
                "at": at,
                "quadratic_lr": its.quadratic_lr,
                "cross_entropy_lr": its.cross_entropy_lr,
                "test accuracy": name,
                **difference._asdict(),
            }
            for at, its in found.comparisons.items()
            for name, difference in its.difference.items()
        ],
        "engines": [its._asdict() for its in found.engines],
        "control": [its._asdict() for its in found.controls],
    }


def name_columns(summary: comparison.Summary) -> experiment.Row:
    """Which variant a row is about."""
    return {
        "loss": summary.variant.loss,
        "rate": f"{summary.variant.lr:g}",
        "engine": summary.variant.engine,
        "n": summary.test_accuracy["last epoch"].n,
    }


def accuracy_row(summary: comparison.Summary) -> experiment.Row:
    """How well a variant ends, for people, in percent."""
    notes = ["best on validation"] if summary.chosen else []
    if summary.variant.engine == "autograd":
        notes.append("control")
    if summary.diverged:
        notes.append(f"DIVERGED: {summary.diverged} of {summary.networks}")
    its = summary.test_accuracy
    return {
        **name_columns(summary),
        **{f"test %, {name}": percent(its[name]) for name in its if name != "first epoch"},
        "": "; ".join(notes),
    }


def learning_row(summary: comparison.Summary) -> experiment.Row:
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


def percent(its: comparison.Estimate) -> str:
    """Mean ± standard deviation and interval, in percent."""
    if its.n < 2:
        return f"{100 * its.mean:.2f}" if its.n else ""
    return (
        f"{100 * its.mean:.2f} ± {100 * its.sd:.2f} ({100 * its.low:.2f} to {100 * its.high:.2f})"
    )


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


def difference_rows(compared: Mapping[str, comparison.Comparison]) -> list[experiment.Row]:
    """Cross-entropy minus quadratic for people, in percentage points."""
    return [
        {
            "rates": at,
            "test accuracy": name,
            "difference": f"{100 * its.mean:+.2f}",
            "95 % interval": f"{100 * its.low:+.2f} to {100 * its.high:+.2f}" if its.n > 1 else "",
            "p": f"{its.p:.2g}" if math.isfinite(its.p) else "",
            "n": its.n,
        }
        for name in comparison.MEASURES
        for at, found in compared.items()
        if (its := found.difference[name]).n
    ]


def learning_curves(runs: Sequence[Run], best: Mapping[Loss, float], title: str) -> Figure:
    """The picture of the comparison."""
    variants = comparison.by_variant([run for run in runs if not run.diverged])

    def band(places: Sequence[float], values: Sequence[Sequence[float]]) -> plots.Band:
        found = [comparison.estimate([v for v in its if math.isfinite(v)]) for its in values]
        return plots.Band(
            list(places), [f.mean for f in found], [f.low for f in found], [f.high for f in found]
        )

    def by_epoch(its: Sequence[Run], value: Callable[[training.Record], float]) -> plots.Band:
        epochs = list(zip(*(run.records for run in its), strict=True))
        return band(
            [records[0].epoch for records in epochs],
            [[value(record) for record in records] for records in epochs],
        )

    chosen = {
        f"{loss}, rate {lr:g}": variants[Variant(loss, lr)] for loss, lr in sorted(best.items())
    }
    rates = {
        loss: sorted(variant.lr for variant in variants if variant.loss == loss)
        for loss in sorted(best)
    }
    return plots.learning_curves(
        {
            name: by_epoch(its, lambda record: 100 * record.accuracy["test"])
            for name, its in chosen.items()
        },
        {
            loss: band(
                its,
                [
                    [100 * run.last.accuracy["test"] for run in variants[Variant(loss, lr)]]
                    for lr in its
                ],
            )
            for loss, its in rates.items()
        },
        {
            name: by_epoch(its, lambda record: record.layers[-1].slowdown)
            for name, its in chosen.items()
        },
        title,
    )


def page(found: comparison.Findings, dtype: str) -> str:
    """The tables and what to know of them, in Markdown."""
    parts = [
        experiment.table([accuracy_row(summary) for summary in found.summaries]),
        "Mean ± standard deviation (95 % confidence interval of the mean) over n starts. How fast, "
        "with the median epoch at which a validation accuracy is first reached, and the share of "
        "saturated output neurons at the start and at the end:",
        experiment.table([learning_row(summary) for summary in found.summaries]),
        *found.notes,
    ]
    if differences := difference_rows(found.comparisons):
        parts += [
            "Cross-entropy minus quadratic, in points of test accuracy, paired by the start; "
            "quadratic's rate first:",
            experiment.table(differences),
            READING,
        ]
    if found.engines:
        parts += [
            "From PyTorch's autograd, over an epoch of at most 2,000 examples in float64:",
            experiment.table(
                [
                    {
                        "loss": its.loss,
                        "engine": its.engine,
                        "steps": its.steps,
                        "largest difference of a parameter": f"{its.difference:.1e}",
                    }
                    for its in found.engines
                ]
            ),
        ]
    if found.controls:
        parts += [
            f"The control in {dtype} minus the same networks trained by hand, in points of test "
            f"accuracy:",
            experiment.table(
                [
                    {
                        "loss": its.loss,
                        "rate": f"{its.lr:g}",
                        "seed": its.seed,
                        "first epoch": f"{100 * its.first_epoch:+.2f}",
                        "last epoch": f"{100 * its.last_epoch:+.2f}",
                        "largest": f"{100 * its.largest:.2f}",
                    }
                    for its in found.controls
                ]
            ),
        ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    experiment.run_script(main)
