"""Train one network of sigmoid neurons, with gradients derived by hand or by autograd."""

if __name__ == "__main__":
    import startup  # noqa: F401  before all else


import argparse
import copy
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import nnce
from nnce import data, training
from nnce.engines import ensemble
from nnce.experiments import command_line, figures, report, resuming
from nnce.experiments.command_line import ArgumentParser
from nnce.experiments.tensorboard import Monitor
from nnce.losses import LOSSES
from nnce.training import parallel


def parser() -> ArgumentParser:
    """The options."""
    parser = ArgumentParser(__doc__)
    parser.add_common_options()
    parser.add_training_options()
    parser.add_argument(
        "--loss", choices=tuple(LOSSES), default="cross-entropy", help="what to minimise"
    )
    parser.add_argument(
        "--engine",
        choices=training.ENGINES,
        help="who makes the gradients: the revised algorithm without a graph (if not given, and "
        "there is neither adam nor dropout), as loops or as matrix products, whichever suits, or "
        "either of them by name; nnce's Functions in PyTorch's graph; or PyTorch's autograd alone",
    )
    parser.add_argument(
        "--optimizer",
        choices=training.OPTIMIZERS,
        default="sgd",
        help="what is made of the gradients; adam is for functions and autograd",
    )
    textbook = ", ".join(f"{rules.textbook_lr} for {loss}" for loss, rules in LOSSES.items())
    parser.add_argument(
        "--lr", type=float, help=f"learning rate; if not given, {textbook} (sgd), or 0.001 (adam)"
    )
    for name, of in (("--dropout", "hidden neurons"), ("--input-dropout", "inputs")):
        parser.add_argument(
            name,
            type=float,
            default=0.0,
            metavar="P",
            help=f"leave out so many of the {of}, anew for each example and step; for functions "
            "and autograd",
        )
    parser.add_speed_options()
    resuming.add_options(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, train on one mini-batch, and leave nothing behind",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as asked; the exit status."""
    options_parser = parser()
    world = parallel.join()
    options, found, run_dir = resuming.start(options_parser, arguments, "train.py", world)
    try:
        with options_parser.user_errors():
            settings, dataset = prepare(options)
            state = training.initial_state(settings, dataset, world)
            suited = ensemble.threads(state.network.sizes, settings.batch_size)
            command_line.set_speed(options, suited)
            command_line.announce_compilation(options, state.network.sizes, settings.engine)
            so_far = go_on(state, found) if found else SoFar([])
        config = {**vars(options), "lr": settings.lr, "engine": settings.engine}
        with (
            command_line.undisturbed(),
            options_parser.run_directory(
                run_dir or options.run_dir,
                run_name(options, settings),
                dry_run=options.dry_run,
                resumed=found is not None,
                world=world,
            ) as path,
        ):
            if world.rank:
                follow(state, settings, dataset, options.checkpoint_every)
                return 0
            command_line.announce_threads(options)
            run(state, settings, dataset, so_far, path, config)
    except training.Diverged as error:
        parallel.after_the_first()
        print(f"{options_parser.prog}: {error}", file=sys.stderr)
        return 1
    finally:
        parallel.leave()
    if options.dry_run:
        print("Dry run: one mini-batch went through, and nothing was kept.")
    return 0


def run_name(options: argparse.Namespace, settings: training.Settings) -> str:
    """A telling name for the run's directory."""
    layers = "-".join(map(str, options.hidden)) or "single-layer"
    return f"{options.data}-{options.loss}-{layers}-{settings.engine}-seed{options.seed}"


def prepare(options: argparse.Namespace) -> tuple[training.Settings, data.Dataset]:
    """Settings and data out of the options; ValueError where they make no sense."""
    options.device = command_line.device(options.device).type
    settings = command_line.settings(
        options,
        loss=options.loss,
        engine=options.engine,
        optimizer=options.optimizer,
        lr=options.lr,
        dropout=options.dropout,
        input_dropout=options.input_dropout,
    )
    dataset = command_line.load_data(options)
    if options.dry_run:
        x, y = dataset.train
        first = data.Split(x[: settings.batch_size], y[: settings.batch_size])
        return dataclasses.replace(settings, epochs=1), dataset._replace(train=first)
    return settings, dataset


class SoFar(NamedTuple):
    """What a run has come to beside its state."""

    records: list[training.Record]
    finished: nnce.MLP | None = None
    """The network of the last record, which a run that was killed may have gone beyond."""
    seconds: float = 0.0


def go_on(state: training.State, found: Mapping[str, Any]) -> SoFar:
    """Take the state to where the checkpoint is; ValueError if it does not fit."""
    resuming.warn(found, state.world)
    with resuming.loading():
        state.load_state_dict(found["state"])
        records = training.unpack(found["records"])
        layers = len(state.network.sizes) - 1
        epochs = [record.epoch for record in records if len(record.layers) == layers]
        if epochs != list(range(state.cursor.recorded + 1)):
            raise ValueError(f"expected records up to epoch {state.cursor.recorded}")
        finished = copy.deepcopy(state.network)
        if found["finished"] is not None:
            finished.load_state_dict(found["finished"])
        return SoFar(records, finished if records else None, float(found["seconds"]))


def follow(
    state: training.State, settings: training.Settings, dataset: data.Dataset, every: str
) -> None:
    """Train along with the first process, which alone logs and writes."""
    saver = resuming.Saver(None, every, dict, lambda: None, state.world)
    for record in training.train(state, settings, dataset, between=saver.between):
        saver.after(record.epoch, settings.epochs)


def run(
    state: training.State,
    settings: training.Settings,
    dataset: data.Dataset,
    so_far: SoFar,
    run_dir: Path,
    config: dict[str, Any],
) -> None:
    """Train, log each epoch, and write what came out."""
    records = so_far.records
    began = time.perf_counter() - so_far.seconds
    device = dataset.train.x.device
    introduce(state, settings, dataset, config)
    header = resuming.header("train.py", config, state.world)
    network_path = run_dir / "network.pt"

    def content() -> dict[str, Any]:
        """All that decides the rest; and the network of the last record, if it is another one."""
        at_hand = state.cursor.position == 0 and state.cursor.recorded == state.cursor.epoch
        finished = None if at_hand or not records else dict(nnce.load(network_path).state_dict())
        return {
            **header,
            "seconds": time.perf_counter() - began,
            "state": state.state_dict(),
            "records": training.pack(records),
            "finished": finished,
        }

    stopped: BaseException | None = None
    with Monitor(run_dir, config, [[record] for record in records]) as monitor:
        saver = resuming.Saver(
            run_dir, config["checkpoint_every"], content, monitor.flush, state.world
        )
        if so_far.finished:
            nnce.save(so_far.finished, network_path)
        if not state.cursor.step:
            saver.save()
        epochs = training.train(state, settings, dataset, between=saver.between)
        bar = tqdm(
            epochs,
            total=settings.epochs + 1,
            initial=len(records),
            unit="epoch",
            disable=None,
            leave=False,
        )
        try:
            for record in bar:
                monitor.log(record)
                monitor.log_histograms(
                    state.network, dataset.validation, settings.loss, record.epoch
                )
                nnce.save(state.network, network_path)
                records.append(record)
                if record.epoch:
                    command_line.keep(run_dir)
                saver.after(record.epoch, settings.epochs)
                bar.write(report.epoch_line(record))
        except (KeyboardInterrupt, OSError, training.Diverged) as error:
            stopped = error
            if isinstance(error, KeyboardInterrupt | BrokenPipeError):
                saver.save()
                command_line.keep(run_dir)
            elif len(records) < 2:
                raise
        bar.close()
        if records:
            seconds = time.perf_counter() - began
            rows = report.closing_rows(records)
            report.write_results(  # before the pictures, which are worth less
                run_dir,
                config=config,
                device=device,
                seconds=seconds,
                rows=rows,
                interrupted=stopped is not None,
                training_seconds=sum(record.seconds for record in records),
                epochs=[report.record_as_dict(record) for record in records],
            )
            # The network at hand may be in the midst of an epoch that does not count.
            finished = nnce.load(network_path, device)
            monitor.log_images(finished, dataset.test, records[-1].epoch)
            monitor.log_hparams(records[-1])
            if settings.distortion is not None:
                figure = figures.distortions(dataset.train.x, settings.distortion)
                monitor.log_figure("distortion", figure)

    if records:
        print(f"\n{report.table(rows)}\n")
        trained = sum(record.seconds for record in records)
        print(f"{seconds:.1f} s, {trained:.1f} s of them training")
    if not config["dry_run"]:
        print(f"Results and network: {run_dir}")
        print(f"Curves: {report.tensorboard_command(run_dir)}")
    if isinstance(stopped, KeyboardInterrupt):
        last = f"epochs 0 to {records[-1].epoch} are kept; " if records else ""
        print(f"Interrupted after step {state.cursor.step:,}; {last}to go on:", file=sys.stderr)
        print(command_line.command_to_resume(run_dir), file=sys.stderr)
    if stopped is not None:
        raise stopped


def introduce(
    state: training.State,
    settings: training.Settings,
    dataset: data.Dataset,
    config: Mapping[str, object],
) -> None:
    """Say what is going to be trained."""
    processes = f", {state.world.size} processes" if state.world.joined else ""
    after = f"\ngoing on after step {state.cursor.step:,}" if state.cursor.step else ""
    print(
        f"{config['data']}: {len(dataset.train.x):,} training, {len(dataset.validation.x):,} "
        f"validation and {len(dataset.test.x):,} test examples\n"
        f"network {'-'.join(map(str, state.network.sizes))}, {settings.loss} loss, "
        f"engine {settings.engine}, {config['dtype']} on "
        f"{report.device_name(dataset.train.x.device)}, threads {torch.get_num_threads()}"
        f"{processes}{after}",
        flush=True,
    )


if __name__ == "__main__":
    command_line.run_script(main)
