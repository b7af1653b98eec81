"""Train one network of sigmoid neurons, with hand-written gradients or autograd."""

if __name__ == "__main__":
    import startup  # noqa: F401  must be first


import argparse
import copy
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import nnce
from nnce import _memory, data, training
from nnce.engines import ensemble
from nnce.experiments import command_line, directories, figures, report, resuming, running
from nnce.experiments.command_line import ArgumentParser
from nnce.experiments.epochs import EpochsFile, epoch_row
from nnce.experiments.tensorboard import Monitor
from nnce.losses import LOSSES
from nnce.training import parallel


def parser() -> ArgumentParser:
    """Create the parser of the options."""
    parser = ArgumentParser(__doc__)
    parser.add_common_options()
    parser.add_training_options()
    add = parser.add_argument
    add("--loss", choices=tuple(LOSSES), default="cross-entropy", help="loss to minimize")
    gradients = (
        "computation of the gradients: backprop, the revised algorithm without a graph, as "
        "loops or products by size, or either by name; functions, nnce's Functions in PyTorch's "
        "graph; autograd, PyTorch only (default: backprop; with adam or dropout, functions)"
    )
    add("--engine", choices=training.ENGINES, help=gradients)
    optimizer = "optimizer; adam selects --engine functions unless autograd is given"
    add("--optimizer", choices=training.OPTIMIZERS, default="sgd", help=optimizer)
    textbook = ", ".join(f"{rules.textbook_lr} for {loss}" for loss, rules in LOSSES.items())
    add("--lr", type=float, help=f"learning rate (default: {textbook}; 0.001 for adam)")
    for name, of in (("--dropout", "hidden neurons"), ("--input-dropout", "inputs")):
        dropout = (
            f"dropout probability of the {of}, in [0, 1); requires --engine functions or autograd"
        )
        add(name, type=float, default=0.0, metavar="P", help=dropout)
    stop = "stop after N epochs without a higher validation accuracy (default: no limit)"
    add("--patience", type=int, metavar="N", help=stop)
    parser.add_speed_options()
    resuming.add_options(parser)
    trial = "check options and data, train on one mini-batch, and write nothing"
    add("--dry-run", action="store_true", help=trial)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a network; return the exit status."""
    options_parser = parser()
    world = parallel.join()
    start = resuming.start(options_parser, arguments, "train.py", world)
    options, found = start.options, start.found
    try:
        with options_parser.user_errors():
            settings, dataset = prepare(options)
            state = training.initial_state(settings, dataset, world)
            suited = ensemble.threads(state.network.sizes, settings.batch_size)
            command_line.set_speed(options, suited)
            command_line.announce_compilation(options, state.network.sizes, settings.engine)
            progress = resume(state, found) if found else Progress([])
        config = {**vars(options), "lr": settings.lr, "engine": settings.engine}
        name, dry_run = run_name(options, settings), options.dry_run
        with start.directory(options_parser, name, dry_run=dry_run, world=world) as path:
            if world.rank:
                follow(state, settings, dataset, options)
                return 0
            command_line.announce_threads(options)
            Training(state, settings, dataset, config, path, progress).run()
    except training.Diverged as error:
        parallel.wait_for_rank0_error()
        print(f"{options_parser.prog}: {error}", file=sys.stderr)
        return 1
    finally:
        parallel.leave()
    if options.dry_run:
        print("Dry run: trained on one mini-batch, kept no files.")
    return 0


def run_name(options: argparse.Namespace, settings: training.Settings) -> str:
    """Default name of the run directory."""
    layers = _memory.dashed(options.hidden) or "single-layer"
    optimizer = "" if settings.optimizer == "sgd" else f"-{settings.optimizer}"
    return (
        f"{command_line.data_name(options)}-{options.loss}-lr{settings.rate:g}{optimizer}-{layers}-"
        f"{command_line.training_name(options)}-{settings.engine}-seed{options.seed}"
    )


def prepare(options: argparse.Namespace) -> tuple[training.Settings, data.Dataset]:
    """Return the settings and the data; raises ValueError for bad options."""
    options.device = command_line.device(options.device).type
    if options.patience is not None and options.patience < 1:
        raise ValueError(f"expected --patience of at least 1 epoch, got {options.patience:,}")
    settings = command_line.settings(options)
    dataset = command_line.load_data(options)
    if options.dry_run:
        x, y = dataset.train
        first = data.Split(x[: settings.batch_size], y[: settings.batch_size])
        return dataclasses.replace(settings, epochs=1), dataset._replace(train=first)
    return settings, dataset


class Progress(NamedTuple):
    """Progress of a resumed run in addition to its training state."""

    records: list[training.Record]
    finished: nnce.MLP | None = None
    """Network of the last record; the training state may be ahead of it."""
    seconds: float = 0.0


def resume(state: training.State, found: Mapping[str, Any]) -> Progress:
    """Load a checkpoint into the state; raises ValueError if it does not fit."""
    resuming.warn(found, state.world)
    with resuming.loading():
        state.load_state_dict(found["state"])
        records = training.unpack(found["records"])
        layers = len(state.network.sizes) - 1
        epochs = [record.epoch for record in records if len(record.layers) == layers]
        if epochs != list(range(state.cursor.recorded + 1)):
            raise ValueError(f"expected records up to epoch {state.cursor.recorded}")
        if state.best and training.best_record(records).epoch != state.best.epoch:
            raise ValueError(f"expected the network of epoch {training.best_record(records).epoch}")
        finished = copy.deepcopy(state.network)
        if found["finished"] is not None:
            finished.load_state_dict(found["finished"])
        return Progress(records, finished if records else None, float(found["seconds"]))


def follow(
    state: training.State,
    settings: training.Settings,
    dataset: data.Dataset,
    options: argparse.Namespace,
) -> None:
    """Train in a process other than rank 0, without output."""
    saver = resuming.Saver(None, options.checkpoint_every, dict, lambda: None, state.world)
    patience = options.patience
    for record in training.train(
        state, settings, dataset, between=saver.between, patience=patience
    ):
        saver.after(record.epoch, is_last=state.is_over(settings.epochs, patience))


class Training:
    """Training of one network, with logs, checkpoints and results in a run directory."""

    def __init__(
        self,
        state: training.State,
        settings: training.Settings,
        dataset: data.Dataset,
        config: Mapping[str, object],
        run_dir: Path,
        progress: Progress,
    ) -> None:
        self.state, self.settings, self.dataset, self.config = state, settings, dataset, config
        self.run_dir = run_dir
        self.network_path, self.best_path = run_dir / "network.pt", run_dir / "best.pt"
        self.patience: Any = config["patience"]
        self.records, self._finished = progress.records, progress.finished
        self._began = time.perf_counter() - progress.seconds
        self._header = resuming.header("train.py", config, state.world)

    @property
    def seconds(self) -> float:
        """Total time of the run, across resumptions."""
        return time.perf_counter() - self._began

    @property
    def training_seconds(self) -> float:
        """Training time, without evaluation and logging."""
        return sum(record.seconds for record in self.records)

    def state_dict(self) -> dict[str, Any]:
        """Content of a checkpoint; includes the network of the last record if training is ahead."""
        cursor = self.state.cursor
        is_recorded = cursor.position == 0 and cursor.recorded == cursor.epoch
        is_ahead = bool(self.records) and not is_recorded
        return {
            **self._header,
            "seconds": self.seconds,
            "state": self.state.state_dict(),
            "records": training.pack(self.records),
            "finished": dict(nnce.load(self.network_path).state_dict()) if is_ahead else None,
        }

    def run(self) -> None:
        """Train to the end, then write and print the results."""
        records, state = self.records, self.state
        introduce(state, self.settings, self.dataset, self.config)
        rows = [epoch_row(self.settings, record) for record in records]
        with (
            Monitor(self.run_dir, self.config, [[record] for record in records]) as monitor,
            EpochsFile(self.run_dir, rows) as csv,
        ):

            def flush() -> None:
                monitor.flush()
                csv.flush()

            every = str(self.config["checkpoint_every"])
            saver = resuming.Saver(self.run_dir, every, self.state_dict, flush, state.world)
            if self._finished:
                nnce.save(self._finished, self.network_path)
                if state.best is not None:
                    nnce.save(state.best.network, self.best_path)
            if not state.cursor.step:
                saver.save()
            with resuming.Ending(self.run_dir, lambda: len(records) > 1, saver.save) as ending:
                self._train(monitor, csv, saver)
            seconds = self.seconds
            if records:
                tables = self._write(monitor, seconds, interrupted=ending.stopped is not None)
        if records:
            tables += f"\n\n{seconds:.1f} s in total, {self.training_seconds:.1f} s training"
            files = "Results, epochs.csv and learning-curves.png"
            if self.config["dry_run"]:
                print(f"\n{tables}")
            else:
                report.print_results(self.answer(), tables, files, self.run_dir)
        kept = f"epochs 0 to {records[-1].epoch} are kept; " if records else ""
        ending.close(f"Interrupted after step {state.cursor.step:,}; {kept}resume with:")

    @property
    def stopped_early(self) -> bool:
        """Whether --patience has stopped the training."""
        last = self.records[-1].epoch
        return last < self.settings.epochs and self.state.is_stale(self.patience)

    def answer(self) -> str:
        """Summarize the accuracy of the last and the best network, and how to load them."""
        last, best = self.records[-1], training.best_record(self.records)
        early = ""
        if self.stopped_early:
            early = f": no higher validation accuracy in {report.counted(self.patience, 'epoch')}"
        _, validation, test = map(report.in_percent, best.accuracy.values())
        network, best_one = map(directories.from_here, (self.network_path, self.best_path))
        return (
            f"Test accuracy {report.in_percent(last.accuracy['test'])} after epoch {last.epoch}"
            f"{early}.\n"
            f"Best on validation: {validation} after epoch {best.epoch}, with {test} on test.\n"
            f"Last network: nnce.load({network!r})\nBest network: nnce.load({best_one!r})"
        )

    def _train(self, monitor: Monitor, csv: EpochsFile, saver: resuming.Saver) -> None:
        """Train, and log and save the network after each epoch."""
        network, settings, dataset = self.state.network, self.settings, self.dataset
        done = self.records[-1].epoch if self.records else 0
        with command_line.progress(total=settings.epochs, initial=done, unit="epoch") as bar:
            for record in training.train(
                self.state, settings, dataset, between=saver.between, patience=self.patience
            ):
                monitor.log(record)
                csv.append([epoch_row(settings, record)])
                monitor.log_histograms(network, dataset.validation, settings.loss, record.epoch)
                nnce.save(network, self.network_path)
                self.records.append(record)
                best = self.state.best
                if best is not None and best.epoch == record.epoch:
                    nnce.save(best.network, self.best_path)
                if record.epoch:
                    directories.keep(self.run_dir)
                is_last = self.state.is_over(settings.epochs, self.patience)
                saver.after(record.epoch, is_last=is_last)
                bar.update(record.epoch - bar.n)
                if is_last or report.has_line(record.epoch):
                    bar.write(report.epoch_line(record))

    def _write(self, monitor: Monitor, seconds: float, *, interrupted: bool) -> str:
        """Write results.json, then the plots; return the tables to print."""
        device = self.dataset.train.x.device
        # The network in memory may be in an unfinished epoch.
        finished = nnce.load(self.network_path, device)
        rows = report.closing_rows(self.records)
        classes = report.by_class(training.confusion(finished, self.dataset.test))
        report.write_results(
            self.run_dir,
            config=self.config,
            device=device,
            seconds=seconds,
            rows=rows,
            answer=self.answer(),
            interrupted=interrupted,
            best=report.record_as_dict(training.best_record(self.records)),
            stopped_early=self.stopped_early,
            test=classes,
            training_seconds=self.training_seconds,
            epochs=[report.record_as_dict(record) for record in self.records],
        )
        with command_line.announced("plotting learning curves"):
            title = f"{self.config['data']}, {self.settings.loss}, rate {self.settings.rate:g}"
            figure = figures.training_curves(self.records, title)
            report.write_figure(self.run_dir / "learning-curves.png", figure, dpi=90)
        with command_line.announced("plotting images for TensorBoard"):
            monitor.log_images(finished, self.dataset.test, self.records[-1].epoch)
        monitor.log_hparams(self.config, self.records[-1])
        if self.settings.distortion is not None:
            figure = figures.distortions(self.dataset.train.x, self.settings.distortion)
            monitor.log_figure("distortion", figure)
        return f"{report.closing_table(rows)}\n\n{report.class_table(classes)}"


def introduce(
    state: training.State,
    settings: training.Settings,
    dataset: data.Dataset,
    config: Mapping[str, object],
) -> None:
    """Print a description of the network, the data and the hardware."""
    joined = report.counted(state.world.size, "process", "processes")
    processes = f", {joined}" if state.world.joined else ""
    after = f"\nresumed after step {state.cursor.step:,}" if state.cursor.step else ""
    print(
        f"{report.describe(str(config['data']), dataset)}\n"
        f"network {_memory.dashed(state.network.sizes)}, {settings.loss} loss, "
        f"engine {settings.engine}, {config['dtype']} on "
        f"{report.device_name(dataset.train.x.device)}, threads {torch.get_num_threads()}"
        f"{processes}{after}",
        flush=True,
    )


if __name__ == "__main__":
    running.run_script(main)
