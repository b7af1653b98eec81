"""Training of many networks side by side, and in turn.

Networks are *paired*: for each seed, all losses and rates start from the same parameters and see
the same mini-batches. A *control* is one of the networks, trained again by PyTorch's autograd.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnce import data, training
from nnce._arguments import is_size
from nnce.engines.ensemble import Ensemble, check_engine
from nnce.losses import LOSSES, Loss
from nnce.modules import MLP
from nnce.training import Engine, Record, Settings, parallel
from nnce.training.parallel import ALONE, World

# Accuracy on the training data is measured on the first examples only: its standard error, at 96 %,
# is 0.3 points.
_MEASURED = 5_000
CONTROL: Engine = "autograd"


class Variant(NamedTuple):
    """Loss, rate and engine of a group of networks that differ only in their seed."""

    loss: Loss
    lr: float
    engine: Engine = "backprop"

    @property
    def is_control(self) -> bool:
        """Whether the networks are trained by PyTorch's autograd."""
        return self.engine == CONTROL

    def __str__(self) -> str:
        control = f"-{CONTROL}" if self.is_control else ""
        return f"{self.loss}-lr{self.lr:g}{control}"


@dataclass
class Run:
    """One network of a comparison."""

    settings: Settings
    network: MLP
    records: list[Record] = field(default_factory=list)
    """Records from epoch 0 to the last finished one."""
    stopped: bool = False
    """Whether the loss or a parameter has become NaN or infinite."""
    _packed: tuple[list[Record], Tensor] = field(
        default_factory=lambda: ([], torch.empty(0)), repr=False, compare=False
    )
    """Records in the last checkpoint, and the same packed."""

    @property
    def variant(self) -> Variant:
        """The variant of the network."""
        assert self.settings.engine is not None
        return Variant(self.settings.loss, self.settings.rate, self.settings.engine)

    @property
    def diverged(self) -> bool:
        """Whether training was stopped, or the last record has a non-finite loss."""
        return self.stopped or not all(map(math.isfinite, self.last.loss.values()))

    @property
    def last(self) -> Record:
        """Record of the last epoch."""
        return self.records[-1]

    @property
    def best(self) -> Record:
        """Record of the first epoch with the highest validation accuracy."""
        return training.best_record(self.records)

    def packed_records(self) -> Tensor:
        """Pack the records for a checkpoint, without packing those of the last one again."""
        old, packed = self._packed
        if not old or [*map(id, old)] != [*map(id, self.records[: len(old)])]:
            packed = training.pack(self.records)
        elif new := self.records[len(old) :]:
            packed = torch.cat([packed, training.pack(new)])
        self._packed = list(self.records), packed
        return packed

    def epochs_to(self, accuracy: float) -> int | None:
        """The first epoch with at least this validation accuracy; None if it is never reached.

        Args:
            accuracy: in [0, 1].
        """
        reached = (r.epoch for r in self.records if r.accuracy["validation"] >= accuracy)
        return next(reached, None)


def by_variant(runs: Sequence[Run]) -> dict[Variant, list[Run]]:
    """Group runs by variant, in order."""
    variants: dict[Variant, list[Run]] = {}
    for run in runs:
        variants.setdefault(run.variant, []).append(run)
    return variants


def plan(
    base: Settings, lrs: Mapping[Loss, Sequence[float]], seeds: int, dataset: data.Dataset
) -> list[Settings]:
    """Settings of all networks: each loss at each of its rates, from each seed.

    Args:
        base: common settings; its seed is the first one.
        lrs: learning rates by loss; duplicates are ignored.
        seeds: number of seeds.
        dataset: training and test data.

    Raises:
        ValueError: there is no seed, no loss or no rate, or a value is invalid.
        MemoryError: the networks do not fit in memory; the message states their size.
    """
    if not is_size(seeds):
        raise ValueError(f"expected an integer number of seeds, at least 1, got {seeds!r}")
    seeds = int(seeds)
    for loss in LOSSES:
        if not lrs.get(loss):
            raise ValueError(f"expected at least one learning rate for loss {loss!r}, got none")
    variants = [
        dataclasses.replace(base, loss=loss, lr=lr)
        for loss, rates in lrs.items()
        for lr in dict.fromkeys(rates)
    ]
    check(base, range(base.seed, base.seed + seeds), dataset, networks=len(variants) * seeds)
    return [
        dataclasses.replace(settings, seed=base.seed + number)
        for settings in variants
        for number in range(seeds)
    ]


def check(
    settings: Settings, seeds: range, dataset: data.Dataset, networks: int | None = None
) -> None:
    """Check that networks with these settings and seeds can be created and trained.

    Raises:
        ValueError: a seed is out of range, or the loops are requested and not available.
        TypeError: the loops are requested and do not support the dtype.
        MemoryError: the networks do not fit in memory.
        DataError: the settings distort images, and the data are not square images.
    """
    if seeds.stop > 2**32:
        raise ValueError(f"expected all seeds below 2**32, got {len(seeds)} from {seeds.start} on")
    dataclasses.replace(settings, seed=seeds.start)
    x = dataset.train.x
    check_engine(training.ensemble_engine(settings.engine), x.device, x.dtype)
    training.check_suits(settings, dataset, len(seeds) if networks is None else networks)


def make_runs(settings: Sequence[Settings], dataset: data.Dataset) -> list[Run]:
    """Create the networks, one per settings, before the first step."""
    return [Run(of_run, training.make_network(of_run, dataset)) for of_run in settings]


class SideBySide:
    """Joint training of many networks by an `Ensemble`, without autograd.

    With several processes, each trains a share of the networks. Every process has all records, and
    rank 0 has all networks as of the last finished epoch.

    Args:
        runs: from `make_runs`; with equal epochs, hidden layers, batch size and distortion. The
            seed of a run determines its initial parameters and its mini-batches.
        dataset: on one device, in one dtype. Records of "train" are of the first 5,000 examples.
        threads: number of threads of the loops, and of networks evaluated at once (default: the
            number of processors per process).
        world: the processes.
        splits: names of the splits to evaluate, including "validation".

    Raises:
        ValueError: the engine needs autograd; use `InTurn`.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        dataset: data.Dataset,
        threads: int | None = None,
        world: World = ALONE,
        splits: Sequence[str] = data.SPLITS,
    ) -> None:
        self.runs, self._world, self._train = runs, world, dataset.train
        self._share = list(runs[world.rank :: world.size])
        self._common = runs[0].settings
        for run in runs:
            if run.settings.engine not in training.ENSEMBLE_ENGINES:
                engines = " or ".join(map(repr, training.ENSEMBLE_ENGINES))
                raise ValueError(
                    f"expected engine {engines} for networks that are trained together, got "
                    f"{run.settings.engine!r}"
                )
        self._threads = threads or parallel.processors()
        measured = _measured(dataset)
        self._measured = {name: measured[name] for name in splits}
        self._together: Ensemble | None = None
        if self._share:
            n_train = len(dataset.train.x)
            self._together = Ensemble(
                [run.network for run in self._share],
                [training.hyperparameters(run.settings, n_train) for run in self._share],
                batch_size=self._common.batch_size,
                engine=training.ensemble_engine(self._common.engine),
                threads=self._threads,
            )
        self._cursor = training.Cursor.at_start(run.settings.seed for run in runs)

    @property
    def finished(self) -> int:
        """Last epoch recorded for all networks; −1 for none."""
        return self._cursor.recorded

    @property
    def complete(self) -> bool:
        """Whether all epochs are recorded."""
        return self.finished >= self._common.epochs

    def epochs(self, between: Callable[[], None] | None = None) -> Iterator[int]:
        """Train, and yield each epoch once it is recorded for all networks.

        Args:
            between: called between steps, when all networks are at the same one.
        """
        cursor = self._cursor
        while True:
            if cursor.recorded < cursor.epoch:
                self._record()
                yield cursor.epoch
            if self.complete:
                return
            self._train_epoch(between)
            if between is not None:
                between()

    def _train_epoch(self, between: Callable[[], None] | None) -> None:
        x, y = self._train
        cursor = self._cursor
        orders = cursor.orders(len(x), x.device)
        images = self._distorted(orders)
        together = self._together
        if together is not None:
            by_run = torch.stack([orders[run.settings.seed] for run in self._share])
            together.set_lrs([run.settings.rate_of(cursor.epoch) for run in self._share])

        def train_on(begin: int, end: int) -> None:
            if together is None:
                return
            if images:
                self._train_on(images, orders, begin, end)
            else:
                together.train_epoch(x, y, by_run[:, begin:end])

        cursor.run_epoch(
            len(x),
            train_on,
            between,
            chunk=self._chunk(),
            batch_size=self._common.batch_size,
            device=x.device,
        )

    def _distorted(self, orders: Mapping[int, Tensor]) -> dict[int, data.Distorted]:
        """Distorted images of the current epoch, by seed; empty without distortion."""
        x, distortion = self._train.x, self._common.distortion
        if distortion is None:
            return {}
        return {
            seed: data.Distorted(x, orders[seed], distortion, seed, self._cursor.epoch)
            for seed in {run.settings.seed: None for run in self._share}
        }

    def _train_on(
        self,
        images: Mapping[int, data.Distorted],
        orders: Mapping[int, Tensor],
        begin: int,
        end: int,
    ) -> None:
        """Train on a part of an epoch, with different distorted images for each seed."""
        assert self._together is not None
        new = torch.cat([distorted[begin:end] for distorted in images.values()])
        y = self._train.y[torch.cat([orders[seed][begin:end] for seed in images])]
        n = end - begin
        first = {seed: number * n for number, seed in enumerate(images)}
        order = torch.stack(
            [torch.arange(n, device=y.device) + first[run.settings.seed] for run in self._share]
        )
        self._together.train_epoch(new, y, order)

    def _chunk(self) -> int:
        """Number of examples between two calls of `between`, the same in all processes."""
        networks = -(-len(self.runs) // self._world.size)
        most = None
        if self._common.distortion is not None:
            most = data.MAX_CHUNK // len({run.settings.seed for run in self.runs})
        own = self._together.max_chunk(networks, most) if self._together is not None else 0
        return self._world.largest(own)

    def _record(self) -> None:
        """Evaluate and record each network at the end of an epoch."""
        records: list[Record] = []
        cursor = self._cursor
        if self._together is not None:
            # One thread per network is faster than several threads per matrix product.
            at_once = 1 if self._train.x.is_cuda else self._threads
            with _torch_threads(1 if at_once > 1 else torch.get_num_threads()):
                records = training.records(
                    self._together.networks,
                    [run.settings.loss for run in self._share],
                    self._measured,
                    epoch=cursor.epoch,
                    step=cursor.step,
                    seconds=cursor.seconds / len(self._share),
                    threads=at_once,
                )
        # The loss does not reveal a NaN weight whose input is always 0.
        finite = [of_all.isfinite().flatten(1).all(1) for of_all in _parameters(self._share)]
        is_finite = torch.stack(finite).all(0).tolist() if finite else []
        # Appended together, so that all have the same length after an interruption.
        for run, record, ok in zip(self._share, records, is_finite, strict=True):
            run.records.append(record)
            run.stopped = run.stopped or not ok
        _share_records(self.runs, cursor.epoch, self._world)
        cursor.recorded, cursor.seconds = cursor.epoch, 0.0

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, complete on rank 0; waits for all processes."""
        own = {} if self._together is None else self._together.state_dict()
        by_rank = self._world.gather((own, _parameters(self._share)))
        return {
            "cursor": self._cursor.state_dict(),
            "ensembles": [ensemble for ensemble, _ in by_rank],
            "parameters": [parameters for _, parameters in by_rank],
            # All have the same length, and one tensor is saved faster than one per network.
            "records": torch.stack([run.packed_records() for run in self.runs]),
            "stopped": [run.stopped for run in self.runs],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint of the same runs, data and number of processes.

        Raises:
            ValueError: the state does not fit.
        """
        with training.mismatch_is_value_error():
            _check_processes(len(state["parameters"]), self._world)
            for rank, parameters in enumerate(state["parameters"]):
                _set_parameters(self.runs[rank :: self._world.size], parameters)
            if self._together is not None:
                self._together.load_state_dict(state["ensembles"][self._world.rank])
            self._cursor.load_state_dict(state["cursor"])
            _set_records(self.runs, state, tuple(self._measured))
            if {len(run.records) - 1 for run in self.runs} != {self.finished}:
                raise ValueError(f"expected records up to epoch {self.finished} of all networks")


def _parameters(runs: Sequence[Run]) -> list[Tensor]:
    """Stack the parameters of the networks: tensors of shape [runs, *shape]."""
    by_run = [list(run.network.parameters()) for run in runs]
    return [torch.stack(of_all).detach().cpu() for of_all in zip(*by_run, strict=True)]


def _set_parameters(runs: Sequence[Run], stacked: Sequence[Tensor]) -> None:
    """Set the parameters of the networks in place, so that their ensemble uses them."""
    for number, run in enumerate(runs):
        values = run.network.state_dict()
        for (name, value), of_all in zip(values.items(), stacked, strict=True):
            training.check_fits(name, of_all[number], value)
            value.copy_(of_all[number])


def _share_records(runs: Sequence[Run], epoch: int, world: World) -> None:
    """Send the records since an epoch to all processes, and the networks to rank 0."""
    if world.size == 1:
        return
    share = runs[world.rank :: world.size]
    own = [(run.records[epoch:], run.stopped) for run in share]
    for rank, theirs in enumerate(world.exchange(own)):
        if rank != world.rank:
            for run, (records, stopped) in zip(runs[rank :: world.size], theirs, strict=True):
                run.records += records
                run.stopped = stopped
    for rank, parameters in enumerate(world.gather(_parameters(share))):
        if rank:
            _set_parameters(runs[rank :: world.size], parameters)


def _set_records(
    runs: Sequence[Run], state: Mapping[str, Any], splits: Sequence[str] = data.SPLITS
) -> None:
    for run, rows, stopped in zip(runs, state["records"], state["stopped"], strict=True):
        run.records, run.stopped = training.unpack(rows, splits), bool(stopped)


def _check_processes(made_by: int, world: World) -> None:
    if made_by != world.size:
        raise ValueError(f"expected {made_by} processes, as in the checkpoint, got {world.size}")


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Set PyTorch's number of threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class InTurn:
    """Training of several networks in alternation, one epoch each, by any engine.

    With several processes, each trains a share of the networks.

    Args:
        settings: settings of each network, with equal numbers of epochs.
        dataset: on one device, in one dtype. Records of "train" are as in `SideBySide`.
        world: the processes.
        splits: names of the splits to evaluate, including "validation".

    Raises:
        ValueError: the numbers of epochs differ.
    """

    def __init__(
        self,
        settings: Sequence[Settings],
        dataset: data.Dataset,
        world: World = ALONE,
        splits: Sequence[str] = data.SPLITS,
    ) -> None:
        if len({of_one.epochs for of_one in settings}) > 1:
            raise ValueError("expected the same number of epochs for all networks")
        self._settings, self._dataset, self._world = settings, dataset, world
        measured = _measured(dataset)
        self._measured = {name: measured[name] for name in splits}
        self._states = [training.initial_state(of_one, dataset) for of_one in settings]
        self.runs = [
            Run(of_one, state.network) for of_one, state in zip(settings, self._states, strict=True)
        ]
        self.finished = -1
        """Last epoch recorded for all networks that have not stopped; −1 for none."""

    def epochs(self, between: Callable[[], None] | None = None) -> Iterator[int]:
        """Train, and yield each epoch once all networks have finished it.

        Args:
            between: called between steps of any network.
        """
        share = range(self._world.rank, len(self.runs), self._world.size)
        trainings = {
            number: training.train(
                self._states[number],
                self._settings[number],
                self._dataset,
                measured=self._measured,
                between=between,
            )
            for number in share
        }
        last = self._settings[0].epochs if self._settings else -1
        for epoch in range(self.finished + 1, last + 1):
            for number in share:
                run = self.runs[number]
                if not run.stopped and len(run.records) <= epoch:
                    try:
                        run.records.append(next(trainings[number]))
                    except training.Diverged:
                        run.stopped = True
            _share_records(self.runs, epoch, self._world)
            self.finished = epoch
            yield epoch

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, complete on rank 0; waits for all processes."""
        own = [state.state_dict() for state in self._states[self._world.rank :: self._world.size]]
        return {
            "finished": self.finished,
            "states": self._world.gather(own),
            "records": [run.packed_records() for run in self.runs],
            "stopped": [run.stopped for run in self.runs],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint of the same runs, data and number of processes.

        Raises:
            ValueError: the state does not fit.
        """
        with training.mismatch_is_value_error():
            _check_processes(len(state["states"]), self._world)
            for rank, of_rank in enumerate(state["states"]):
                own = self._states[rank :: self._world.size]
                for one, of_one in zip(own, of_rank, strict=True):
                    one.load_state_dict(of_one)
            _set_records(self.runs, state, tuple(self._measured))
            self.finished = int(state["finished"])
            if any(len(run.records) <= self.finished and not run.stopped for run in self.runs):
                raise ValueError(f"expected records of epoch {self.finished} of all networks")


def controls(runs: Sequence[Run], dataset: data.Dataset, world: World = ALONE) -> InTurn:
    """Prepare to train networks again, from their initial parameters, by PyTorch's autograd."""
    return InTurn(
        [dataclasses.replace(run.settings, engine=CONTROL) for run in runs], dataset, world
    )


def _measured(dataset: data.Dataset) -> dict[str, data.Split]:
    x, y = dataset.train
    return {**dataset.splits(), "train": data.Split(x[:_MEASURED], y[:_MEASURED])}
