"""Train one network of sigmoid neurons, with gradients derived by hand or by autograd."""

if __name__ == "__main__":
    import startup  # noqa: F401  before all else


import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import nnce
from nnce import data, ensemble, training
from nnce.experiments import command_line, report
from nnce.experiments.command_line import ArgumentParser
from nnce.experiments.tensorboard import Monitor
from nnce.losses import LOSSES


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
        "the optimizer is sgd), as loops or as matrix products, whichever suits, or either of them "
        "by name; nnce's Functions in PyTorch's graph; or PyTorch's autograd alone",
    )
    parser.add_argument(
        "--optimizer",
        choices=training.OPTIMIZERS,
        default="sgd",
        help="what is made of the gradients; adam is not for --engine backprop",
    )
    textbook = ", ".join(f"{rules.textbook_lr} for {loss}" for loss, rules in LOSSES.items())
    parser.add_argument(
        "--lr", type=float, help=f"learning rate; if not given, {textbook} (sgd), or 0.001 (adam)"
    )
    parser.add_speed_options()
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, train on one mini-batch, and leave nothing behind",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as asked; the exit status."""
    options_parser = parser()
    options = options_parser.parse_args(arguments)
    try:
        with options_parser.user_errors():
            settings, dataset = prepare(options)
            state = training.initial_state(settings, dataset)
            suited = ensemble.threads(state.network.sizes, settings.batch_size)
            command_line.set_speed(options, suited)
            command_line.announce_compilation(options, state.network.sizes, settings.engine)
        with options_parser.run_directory(
            options.run_dir, run_name(options, settings), dry_run=options.dry_run
        ) as run_dir:
            config = {**vars(options), "lr": settings.lr, "engine": settings.engine}
            run(state, settings, dataset, run_dir, config)
    except training.Diverged as error:
        print(f"{options_parser.prog}: {error}", file=sys.stderr)
        return 1
    if options.dry_run:
        print("Dry run: one mini-batch went through, and nothing was kept.")
    return 0


def run_name(options: argparse.Namespace, settings: training.Settings) -> str:
    """A telling name for the run's directory."""
    layers = "-".join(map(str, options.hidden)) or "single-layer"
    return f"{options.data}-{options.loss}-{layers}-{settings.engine}-seed{options.seed}"


def prepare(options: argparse.Namespace) -> tuple[training.Settings, data.Dataset]:
    """Settings and data out of the options; ValueError where they make no sense."""
    settings = command_line.settings(
        options,
        loss=options.loss,
        engine=options.engine,
        optimizer=options.optimizer,
        lr=options.lr,
    )
    dataset = command_line.load_data(options)
    if options.dry_run:
        x, y = dataset.train
        first = data.Split(x[: settings.batch_size], y[: settings.batch_size])
        return dataclasses.replace(settings, epochs=1), dataset._replace(train=first)
    return settings, dataset


def run(
    state: training.State,
    settings: training.Settings,
    dataset: data.Dataset,
    run_dir: Path,
    config: dict[str, object],
) -> None:
    """Train, log each epoch, and write what came out."""
    began = time.perf_counter()
    device = dataset.train.x.device
    print(
        f"{config['data']}: {len(dataset.train.x):,} training, {len(dataset.validation.x):,} "
        f"validation and {len(dataset.test.x):,} test examples\n"
        f"network {'-'.join(map(str, state.network.sizes))}, {settings.loss} loss, "
        f"engine {settings.engine}, {config['dtype']} on {report.device_name(device)}, "
        f"threads {torch.get_num_threads()}",
        flush=True,
    )
    records: list[training.Record] = []
    stopped: BaseException | None = None
    with Monitor(run_dir, config) as monitor:
        epochs = training.train(state, settings, dataset)
        bar = tqdm(epochs, total=settings.epochs + 1, unit="epoch", disable=None, leave=False)
        try:
            for record in bar:
                with command_line.undisturbed():
                    monitor.log(record)
                    monitor.log_histograms(
                        state.network, dataset.validation, settings.loss, record.epoch
                    )
                    nnce.save(state.network, run_dir / "network.pt")
                    records.append(record)
                    if record.epoch:
                        command_line.keep(run_dir)
                    bar.write(report.epoch_line(record))
        except (KeyboardInterrupt, OSError, training.Diverged) as error:
            if not records or (isinstance(error, training.Diverged) and len(records) == 1):
                raise
            stopped = error
        bar.close()

        rows = report.closing_rows(records)
        seconds = time.perf_counter() - began
        with command_line.undisturbed():
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
            finished = nnce.load(run_dir / "network.pt", device)
            monitor.log_images(finished, dataset.test, records[-1].epoch)
            monitor.log_hparams(records[-1])

    print(f"\n{report.table(rows)}\n")
    print(f"{seconds:.1f} s, {sum(record.seconds for record in records):.1f} s of them training")
    if not config["dry_run"]:
        print(f"Results and network: {run_dir}")
        print(f"Curves: {report.tensorboard_command(run_dir)}")
    if isinstance(stopped, KeyboardInterrupt):
        print(f"Interrupted; epochs 0 to {records[-1].epoch} are kept.", file=sys.stderr)
    if stopped is not None:
        raise stopped


if __name__ == "__main__":
    command_line.run_script(main)
