"""Seeds × losses × rates: all networks side by side, and the statistics of the results.

Networks are *paired*: those of one seed start from the same parameters and see the same
mini-batches, whatever their loss and rate. The control is one of them trained again by PyTorch's
autograd. So the intervals here say how much start and order matter together.
"""

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnce import data, training
from nnce._arguments import is_size
from nnce.engines import loops
from nnce.engines.ensemble import Ensemble, check_engine
from nnce.experiments.estimates import (
    DIFFERENCE,
    SHARE,
    Difference,
    Estimate,
    estimate,
    holm,
    paired_difference,
)
from nnce.losses import LOSSES, Loss
from nnce.modules import MLP
from nnce.training import Engine, Record, Settings, parallel
from nnce.training.parallel import ALONE, World

# Number of training examples that are measured, the first ones: the standard deviation of an
# accuracy of 96 % is 0.3 points.
_MEASURED = 5_000
CONTROL: Engine = "autograd"
# "backprop" is one of the first two.
_ENGINES: tuple[Engine, ...] = ("loops", "products", "functions", "autograd")
# The engines are compared over this many training examples: 200 mini-batches of 10.
_ENGINE_EXAMPLES = 2_000


class Variant(NamedTuple):
    """One side of a comparison: networks that differ in nothing but their seed."""

    loss: Loss
    lr: float
    engine: Engine = "backprop"

    @property
    def is_control(self) -> bool:
        """Whether PyTorch trains it alone."""
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
    """From epoch 0 to the last one that is finished."""
    stopped: bool = False
    """Whether training has given up on it, since its loss is no finite number any more."""
    _packed: tuple[list[Record], Tensor] = field(
        default_factory=lambda: ([], torch.empty(0)), repr=False, compare=False
    )
    """The records that are in the last checkpoint, and as they are in there."""

    @property
    def variant(self) -> Variant:
        """The variant that it belongs to."""
        assert self.settings.engine is not None
        return Variant(self.settings.loss, self.settings.rate, self.settings.engine)

    @property
    def diverged(self) -> bool:
        """Whether a loss is no finite number any more."""
        return self.stopped or not all(map(math.isfinite, self.last.loss.values()))

    @property
    def last(self) -> Record:
        """The last epoch."""
        return self.records[-1]

    @property
    def best(self) -> Record:
        """The epoch of the highest validation accuracy, the first one of several."""
        return training.best_record(self.records)

    def packed_records(self) -> Tensor:
        """The records for a checkpoint; those that were in the last one are not packed again."""
        old, packed = self._packed
        if not old or [*map(id, old)] != [*map(id, self.records[: len(old)])]:
            packed = training.pack(self.records)
        elif new := self.records[len(old) :]:
            packed = torch.cat([packed, training.pack(new)])
        self._packed = list(self.records), packed
        return packed

    def epochs_to(self, accuracy: float) -> int | None:
        """The first epoch at whose end the validation accuracy is that high; None if it never is.

        Args:
            accuracy: in [0, 1].
        """
        reached = (r.epoch for r in self.records if r.accuracy["validation"] >= accuracy)
        return next(reached, None)


# -------------------------------------------------------------------------------------- training


def plan(
    base: Settings, lrs: Mapping[Loss, Sequence[float]], seeds: int, dataset: data.Dataset
) -> list[Settings]:
    """The settings of every network: each loss at each of its rates from each seed.

    Args:
        base: all that they have in common; seeds are counted from its seed.
        lrs: learning rates, by loss; a rate that is there twice counts once.
        seeds: how many starts.
        dataset: their training and test data.

    Raises:
        ValueError: there is no seed, no loss or no rate, or a value makes no sense.
        MemoryError: the networks would not fit; the message says how much they need.
    """
    if not is_size(seeds):
        raise ValueError(f"expected at least 1 seed, a whole number, got {seeds!r}")
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
    """Raise the errors of making networks from these seeds, before any is made.

    Raises:
        ValueError: a seed is out of range, or loops are requested and not available.
        TypeError: loops are asked for, and do not know the dtype.
        MemoryError: they would not fit.
        DataError: the data are no square images, and the settings distort them.
    """
    if seeds.stop > 2**32:
        raise ValueError(
            f"expected seeds below 2**32, got {seeds.start} and {seeds.stop - seeds.start} in all"
        )
    dataclasses.replace(settings, seed=seeds.start)
    x = dataset.train.x
    check_engine(training.ensemble_engine(settings.engine), x.device, x.dtype)
    training.check_suits(settings, dataset, len(seeds) if networks is None else networks)


def make_runs(settings: Sequence[Settings], dataset: data.Dataset) -> list[Run]:
    """The networks before the first step, one for each of the settings."""
    return [Run(of_run, training.make_network(of_run, dataset)) for of_run in settings]


class SideBySide:
    """All networks of a comparison, trained together by the rules, and where their training is.

    Several processes share them out; the first one has all records, and all networks as they are
    after an epoch.

    Args:
        runs: from `make_runs`. They differ in loss, rate and seed alone; each one's seed fixes its
            start and its order of the mini-batches.
        dataset: on one device, in one dtype. The records' "train" is its first 5,000 training
            examples.
        threads: for loops, as `Ensemble` takes them, and to measure that many networks at once;
            None for as many as this process has processors.
        world: the processes.
        splits: what the records are of; "validation" at least.

    Raises:
        ValueError: an engine in PyTorch's graph; those train in turn.
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
                    f"expected engine {engines} for networks side by side, got "
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
        """The last epoch that all networks have a record of; −1 for none."""
        return self._cursor.recorded

    @property
    def complete(self) -> bool:
        """Whether the last epoch is recorded."""
        return self.finished >= self._common.epochs

    def epochs(self, between: Callable[[], None] | None = None) -> Iterator[int]:
        """Train, yielding each epoch once every run has its record of it.

        Args:
            between: called between steps, where all networks are at the same one.
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
        """The distorted images of the current epoch, by seed; empty without distortion."""
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
        """A part of an epoch, in which each seed has images of its own."""
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
        """Examples between two pauses, equal for all processes so that they pause together."""
        networks = -(-len(self.runs) // self._world.size)
        most = None
        if self._common.distortion is not None:
            most = data.MAX_CHUNK // len({run.settings.seed for run in self.runs})
        own = self._together.max_chunk(networks, most) if self._together is not None else 0
        return self._world.largest(own)

    def _record(self) -> None:
        """Record each network after an epoch."""
        records: list[Record] = []
        cursor = self._cursor
        if self._together is not None:
            # Some networks for each thread are faster than several threads for each product.
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
        # Appended together, so that an interruption finds them all equally long.
        for run, record in zip(self._share, records, strict=True):
            run.records.append(record)
            # A weight whose input is always 0 may be NaN, and no loss would show it.
            run.stopped = run.stopped or not training.is_finite(run.network)
        _spread(self.runs, cursor.epoch, self._world)
        cursor.recorded, cursor.seconds = cursor.epoch, 0.0

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint; waits for all processes. The first one has it."""
        own = {} if self._together is None else self._together.state_dict()
        by_rank = self._world.gather((own, _parameters(self._share)))
        return {
            "cursor": self._cursor.state_dict(),
            "ensembles": [ensemble for ensemble, _ in by_rank],
            "parameters": [parameters for _, parameters in by_rank],
            "records": [run.packed_records() for run in self.runs],
            "stopped": [run.stopped for run in self.runs],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, with the same runs and data and as many processes.

        Raises:
            ValueError: it does not fit.
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
    """Those of the runs' networks, stacked: [runs, *shape] each."""
    by_run = [list(run.network.state_dict().values()) for run in runs]
    return [torch.stack(of_all).cpu() for of_all in zip(*by_run, strict=True)]


def _set_parameters(runs: Sequence[Run], stacked: Sequence[Tensor]) -> None:
    """In place, so that an ensemble of them continues with these."""
    for number, run in enumerate(runs):
        values = run.network.state_dict()
        for (name, place), of_all in zip(values.items(), stacked, strict=True):
            training.check_fits(name, of_all[number], place)
            place.copy_(of_all[number])


def _spread(runs: Sequence[Run], epoch: int, world: World) -> None:
    """Tell all processes the others' records of an epoch, and the first one their networks."""
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
        raise ValueError(
            f"expected as many processes as it was made by, {made_by}, got {world.size}"
        )


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Use this many threads for each of PyTorch's products."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class InTurn:
    """Some networks trained one after the other, epoch by epoch, each by an engine of its own.

    Several processes share them out.

    Args:
        settings: of each network; all for as many epochs.
        dataset: on one device, in one dtype. The records' "train" is as in `SideBySide`.
        world: the processes.
        splits: what the records are of; "validation" at least.

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
            raise ValueError("expected as many epochs for each of the networks in turn")
        self._settings, self._dataset, self._world = settings, dataset, world
        measured = _measured(dataset)
        self._measured = {name: measured[name] for name in splits}
        self._states = [training.initial_state(of_one, dataset) for of_one in settings]
        self.runs = [
            Run(of_one, state.network) for of_one, state in zip(settings, self._states, strict=True)
        ]
        self.finished = -1
        """The last epoch that all of them have a record of, but those that have stopped."""

    def epochs(self, between: Callable[[], None] | None = None) -> Iterator[int]:
        """Train, yielding each epoch: through all of them, so their curves have one point an epoch.

        Args:
            between: called between the steps of any of them.
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
            _spread(self.runs, epoch, self._world)
            self.finished = epoch
            yield epoch

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint; waits for all processes. The first one has it."""
        own = [state.state_dict() for state in self._states[self._world.rank :: self._world.size]]
        return {
            "finished": self.finished,
            "states": self._world.gather(own),
            "records": [run.packed_records() for run in self.runs],
            "stopped": [run.stopped for run in self.runs],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, with the same runs and data and as many processes.

        Raises:
            ValueError: it does not fit.
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
    """Some networks once more, from their start, by PyTorch's autograd alone."""
    return InTurn(
        [dataclasses.replace(run.settings, engine=CONTROL) for run in runs], dataset, world
    )


def _measured(dataset: data.Dataset) -> dict[str, data.Split]:
    x, y = dataset.train
    return {**dataset.splits(), "train": data.Split(x[:_MEASURED], y[:_MEASURED])}


class EngineDifference(NamedTuple):
    """How far an engine comes from autograd in a short training run in float64."""

    loss: Loss
    engine: Engine
    steps: int
    difference: float
    """The largest difference of a parameter."""


def engine_differences(
    settings: Sequence[Settings], dataset: data.Dataset
) -> list[EngineDifference]:
    """One epoch of the first 2,000 training examples in float64, by every engine.

    In float32 rounding differs, and training amplifies it; in float64 there is room to see that the
    engines do the same. Large rates or momentum amplify even there.
    """
    n = _ENGINE_EXAMPLES
    short = data.Dataset(*(data.Split(x[:n].double(), y[:n].double()) for x, y in dataset))
    differences = []
    for of_loss in settings:
        trained: dict[Engine, training.State] = {}
        for engine in _ENGINES:
            if engine == "loops" and not loops.is_available():
                continue
            one = dataclasses.replace(of_loss, engine=engine, epochs=1)
            trained[engine] = training.initial_state(one, short)
            with contextlib.suppress(training.Diverged):  # all of them do; the difference is NaN
                for _ in training.train(trained[engine], one, short):
                    pass
        control = trained.pop("autograd")
        for engine, state in trained.items():
            pairs = zip(state.network.parameters(), control.network.parameters(), strict=True)
            difference = max((a - b).abs().max().item() for a, b in pairs)
            differences.append(
                EngineDifference(of_loss.loss, engine, state.cursor.step, difference)
            )
    return differences


# --------------------------------------------------------------------------- results


def by_variant(runs: Sequence[Run]) -> dict[Variant, list[Run]]:
    """The runs of each variant, in their order."""
    variants: dict[Variant, list[Run]] = {}
    for run in runs:
        variants.setdefault(run.variant, []).append(run)
    return variants


def best_lrs(runs: Sequence[Run]) -> dict[Loss, float]:
    """For each loss the rate with the highest mean validation accuracy after the last epoch.

    A rate at which any network diverged is out; a loss of which none is left is not in the answer.
    """
    scores: dict[Loss, dict[float, float]] = {}
    for variant, of_variant in by_variant(runs).items():
        if not any(run.diverged for run in of_variant):
            score = statistics.fmean(run.last.accuracy["validation"] for run in of_variant)
            scores.setdefault(variant.loss, {})[variant.lr] = score
    return {loss: max(by_lr, key=by_lr.__getitem__) for loss, by_lr in scores.items()}


MEASURES: dict[str, Callable[[Run], float]] = {
    "first epoch": lambda run: run.records[1].accuracy["test"],
    "last epoch": lambda run: run.last.accuracy["test"],
    "best validation epoch": lambda run: run.best.accuracy["test"],
}
"""The test accuracies that variants are compared by, in [0, 1], by when they are taken."""
ACCURACIES = (0.90, 0.95, 0.97)
"""The validation accuracies that variants are timed to."""


class Summary(NamedTuple):
    """What became of one variant: of its networks that did not diverge."""

    variant: Variant
    networks: int
    diverged: int
    epochs: int
    """The last epoch that is finished."""
    test_accuracy: dict[str, Estimate]
    """By `MEASURES`."""
    epochs_to: dict[float, list[int | None]]
    """By `ACCURACIES`, for each network: the epochs it took; None if it never came there."""
    saturated: tuple[float, float]
    """The mean share of output neurons with σ'(z) < 0.01, at the start and at the end."""
    seconds: float
    """Of training, a network."""
    chosen: bool
    """Whether its rate is the best one for its loss."""


def summarise(runs: Sequence[Run], best: Mapping[Loss, float]) -> Summary:
    """The summary of runs of one variant, given the losses' best rates."""
    variant = runs[0].variant
    whole = [run for run in runs if not run.diverged]

    def mean(values: list[float]) -> float:
        return statistics.fmean(values) if values else math.nan

    return Summary(
        variant=variant,
        networks=len(runs),
        diverged=len(runs) - len(whole),
        epochs=runs[0].last.epoch,
        test_accuracy={
            name: estimate([measure(run) for run in whole], SHARE)
            for name, measure in MEASURES.items()
        },
        epochs_to={accuracy: [run.epochs_to(accuracy) for run in whole] for accuracy in ACCURACIES},
        saturated=(
            mean([run.records[0].layers[-1].saturated for run in whole]),
            mean([run.last.layers[-1].saturated for run in whole]),
        ),
        seconds=mean([sum(record.seconds for record in run.records) for run in runs]),
        chosen=variant.engine == "backprop" and best.get(variant.loss) == variant.lr,
    )


class Comparison(NamedTuple):
    """Cross-entropy minus quadratic, pair by pair."""

    quadratic_lr: float
    cross_entropy_lr: float
    difference: dict[str, Difference]
    """Of the test accuracy, by `MEASURES`."""


def compare(runs: Sequence[Run], quadratic_lr: float, cross_entropy_lr: float) -> Comparison:
    """The losses at a rate each, over the seeds at which neither diverged."""
    variants = by_variant([run for run in runs if not run.diverged])
    quadratic, cross_entropy = (
        {run.settings.seed: run for run in variants.get(variant, [])}
        for variant in (
            Variant("quadratic", quadratic_lr),
            Variant("cross-entropy", cross_entropy_lr),
        )
    )
    seeds = [seed for seed in cross_entropy if seed in quadratic]
    return Comparison(
        quadratic_lr,
        cross_entropy_lr,
        {
            name: paired_difference(
                [measure(cross_entropy[seed]) for seed in seeds],
                [measure(quadratic[seed]) for seed in seeds],
                DIFFERENCE,
            )
            for name, measure in MEASURES.items()
        },
    )


def _corrected(comparisons: dict[str, Comparison]) -> dict[str, Comparison]:
    """With p-values corrected for how many there are in all."""
    ps = [d.p for compared in comparisons.values() for d in compared.difference.values()]
    corrected = iter(holm(ps))
    return {
        at: compared._replace(
            difference={
                name: difference._replace(p_holm=next(corrected))
                for name, difference in compared.difference.items()
            }
        )
        for at, compared in comparisons.items()
    }


class ControlDifference(NamedTuple):
    """How far the test accuracy of a control is from that of the network it repeats, in [−1, 1].

    In float32 rounding differs, and training amplifies it; see `engine_differences` for float64.
    """

    loss: Loss
    lr: float
    seed: int
    first_epoch: float
    last_epoch: float
    largest: float
    """In absolute value, over all epochs."""


def control_differences(runs: Sequence[Run], controls: Sequence[Run]) -> list[ControlDifference]:
    """The difference of each control that has finished an epoch."""
    twins = {(run.variant, run.settings.seed): run for run in runs}
    all_differences = []
    for run in controls:
        twin = twins[run.variant._replace(engine="backprop"), run.settings.seed]
        differences = [
            a.accuracy["test"] - b.accuracy["test"]
            for a, b in zip(run.records, twin.records, strict=False)
        ]
        if len(differences) > 1:
            loss, lr, _ = run.variant
            all_differences.append(
                ControlDifference(
                    loss,
                    lr,
                    run.settings.seed,
                    first_epoch=differences[1],
                    last_epoch=differences[-1],
                    largest=max(map(abs, differences)),
                )
            )
    return all_differences


class Findings(NamedTuple):
    """Results of a comparison."""

    best_lrs: dict[Loss, float]
    summaries: list[Summary]
    comparisons: dict[str, Comparison]
    """By the rates: "both 1", and "best: 3 and 1", quadratic's first; each pair of rates once."""
    engines: list[EngineDifference]
    controls: list[ControlDifference]
    notes: list[str]
    """Caveats for the reader, a sentence each."""


def conclude(runs: Sequence[Run], controls: Sequence[Run], dataset: data.Dataset) -> Findings:
    """What runs and their controls say, finished or interrupted after their first epoch."""
    best = best_lrs(runs)
    variants = by_variant(runs)
    notes = []
    if runs[0].last.epoch < runs[0].settings.epochs:
        notes.append(f"**Interrupted after epoch {runs[0].last.epoch}.**")
    elif any(run.last.epoch < run.settings.epochs and not run.stopped for run in controls):
        notes.append("**Interrupted; the control is not finished.**")
    for loss in LOSSES:
        grid = [variant.lr for variant in variants if variant.loss == loss]
        if loss not in best:
            notes.append(f"No rate of {loss} is left: all diverged.")
        elif len(grid) > 1 and best[loss] in (min(grid), max(grid)):
            notes.append(f"The best rate for {loss}, {best[loss]:g}, is at the edge of its grid.")
    if len({run.settings.seed for run in runs}) == 1:
        notes.append("One seed: there is no interval and no p-value; use --seeds 8.")
    comparisons = {
        f"both {variant.lr:g}": compare(runs, variant.lr, variant.lr)
        for variant in variants
        if variant.loss == "quadratic" and variant._replace(loss="cross-entropy") in variants
    }
    if len(best) == len(LOSSES):
        slow, fast = best["quadratic"], best["cross-entropy"]
        if slow == fast:  # the same test, which must not count twice in Holm's correction
            del comparisons[f"both {slow:g}"]
        comparisons[f"best: {slow:g} and {fast:g}"] = compare(runs, slow, fast)
    comparisons = _corrected(comparisons)
    common = runs[0].settings
    return Findings(
        best,
        [
            summarise(of_variant, best)
            for of_variant in by_variant([*runs, *controls]).values()
            if len(of_variant[0].records) > 1
        ],
        comparisons,
        engine_differences(
            [dataclasses.replace(common, loss=loss, lr=lr) for loss, lr in best.items()], dataset
        ),
        control_differences(runs, controls),
        notes,
    )
