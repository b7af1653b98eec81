"""Train one row of a published table from several starts, and evaluate the networks.

The test set is used only after training. The exception are rows whose source quotes the best test
epoch: that accuracy is reported in addition, and nothing is chosen by it.
"""

import copy
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnce import _memory, data, training
from nnce.data import Distortion
from nnce.experiments import estimates, side_by_side
from nnce.experiments.published import Row, Table
from nnce.experiments.report import counted
from nnce.experiments.side_by_side import InTurn, Run, SideBySide
from nnce.modules import MLP
from nnce.training import Settings
from nnce.training.schedules import CONSTANT, Schedule


def protocol(row: Row, *, epochs: int | None = None) -> Settings:
    """Training settings of a row, with at most `epochs` epochs if given."""
    whole = row.settings.epochs
    return dataclasses.replace(row.settings, epochs=whole if epochs is None else min(epochs, whole))


@dataclass(frozen=True)
class Trained:
    """Results of one start: accuracies in [0, 1], NaN if not measured."""

    seed: int
    diverged: bool
    chosen_epoch: int
    """First epoch with the highest validation accuracy."""
    chosen_validation: float
    last_validation: float
    best_test: float
    """Highest test accuracy of any epoch, for rows with of="best test epoch"."""
    chosen_test: float
    last_test: float


class Attempt:
    """Training of the networks of one row, from one start per seed.

    The test set is not used for training or choices. `threads` is as for `SideBySide`; the engines
    with autograd use PyTorch's number of threads.
    """

    def __init__(
        self,
        row: Row,
        settings: Settings,
        dataset: data.Dataset,
        seeds: Sequence[int],
        threads: int | None = None,
    ) -> None:
        self.row = row
        self._uses_test = row.of == "best test epoch"
        by_seed = [dataclasses.replace(settings, seed=seed) for seed in seeds]
        # Training gets the validation set in place of the test set.
        seen = dataset if self._uses_test else dataset._replace(test=dataset.validation)
        splits = ("validation", "test") if self._uses_test else ("validation",)
        self._training: SideBySide | InTurn
        if settings.engine in training.ENSEMBLE_ENGINES:
            runs = side_by_side.make_runs(by_seed, seen)
            self._training = SideBySide(runs, seen, threads, splits=splits)
        else:
            self._training = InTurn(by_seed, seen, splits=splits)
        self.runs: Sequence[Run] = self._training.runs
        self._chosen = [_parameters(run.network) for run in self.runs]

    def epochs(self, between: Callable[[], None] | None = None) -> Iterator[int]:
        """Train, and yield each epoch once it is recorded; `between` is called between steps."""
        for epoch in self._training.epochs(between):
            for number, run in enumerate(self.runs):
                if run.best.epoch == epoch:
                    self._chosen[number] = _parameters(run.network)
            yield epoch

    @property
    def next_epoch(self) -> int:
        """The first epoch that has not been yielded."""
        return self._training.finished + 1

    def records(self, epoch: int) -> list[training.Record]:
        """Records of an epoch, of all networks that have reached it."""
        return [run.records[epoch] for run in self.runs if len(run.records) > epoch]

    @property
    def seconds(self) -> float:
        """Training time of all networks, without evaluation."""
        return sum(record.seconds for run in self.runs for record in run.records)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        state = self._training.state_dict()
        return {"row": self.row.name, "training": state, "chosen": self._chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint; raises ValueError if it does not fit."""
        self._training.load_state_dict(state["training"])
        with training.mismatch_is_value_error():
            for run, chosen in zip(self.runs, state["chosen"], strict=True):
                for name, parameter in run.network.state_dict().items():
                    training.check_fits(name, chosen[name], parameter)
            self._chosen = list(state["chosen"])

    def finish(self, test: data.Split) -> "Outcome":
        """Evaluate the trained networks on the test set."""
        best = [copy.deepcopy(run.network) for run in self.runs]
        for network, chosen in zip(best, self._chosen, strict=True):
            network.load_state_dict(chosen)
        both = list(zip(self.runs, best, strict=True))
        trained = [self._trained(run, network, test) for run, network in both]
        finite = [(run, network) for run, network in both if not run.diverged]
        committee, curve = math.nan, []
        if finite:
            records = zip(*(run.records for run, _ in finite), strict=True)
            curve = [statistics.fmean(r.accuracy["validation"] for r in epoch) for epoch in records]
            committee = committee_accuracy([network for _, network in finite], test)
        return Outcome(self.row.name, trained, committee, curve, self.seconds)

    def _trained(self, run: Run, best: MLP, test: data.Split) -> Trained:
        on_test = [
            math.nan if run.diverged else training.evaluate(one, test, run.settings.loss).accuracy
            for one in (best, run.network)
        ]
        return Trained(
            run.settings.seed,
            run.diverged,
            run.best.epoch,
            run.best.accuracy["validation"],
            run.last.accuracy["validation"],
            max(r.accuracy["test"] for r in run.records) if self._uses_test else math.nan,
            *on_test,
        )


def _parameters(network: MLP) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def committee_accuracy(networks: Sequence[MLP], split: data.Split) -> float:
    """Accuracy of an ensemble of networks, by the mean of their outputs a."""

    def mean(x: Tensor) -> Tensor:
        return torch.stack([network(x).sigmoid() for network in networks]).mean(0)

    # `evaluate` expects z; for the accuracy, only the position of the maximum matters.
    return training.evaluate(mean, split, "quadratic").accuracy


# ---------------------------------------------------------------------------------- results


class Spread(NamedTuple):
    """Statistics of one result over several starts, in percent."""

    mean: float
    sd: float
    """Standard deviation; NaN for n < 2."""
    min: float
    max: float
    n: int


@dataclass(frozen=True)
class Outcome:
    """Results of one row."""

    row: str
    trained: Sequence[Trained]
    committee: float
    """Test accuracy of the ensemble of all chosen networks that have not diverged."""
    curve: Sequence[float]
    """Mean validation accuracy after each epoch; empty if all networks have diverged."""
    seconds: float
    """Training time of all starts."""

    def spread(self, table: Table, field: str) -> Spread:
        """Statistics of a field of `Trained`, over the starts that have not diverged."""
        accuracies = [getattr(one, field) for one in self.trained if not one.diverged]
        values = [percent(table, value) for value in accuracies if not math.isnan(value)]
        found = estimates.estimate(values)
        least, most = min(values, default=math.nan), max(values, default=math.nan)
        return Spread(found.mean, found.sd, least, most, found.n)

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> "Outcome":
        """The inverse of `dataclasses.asdict`; raises ValueError if it does not fit."""
        with training.mismatch_is_value_error():
            trained = [Trained(**one) for one in plain["trained"]]
            return Outcome(
                str(plain["row"]),
                trained,
                float(plain["committee"]),
                [float(value) for value in plain["curve"]],
                float(plain["seconds"]),
            )


def summary(rows: Sequence[Mapping[str, object]]) -> str:
    """Summarize the verdicts of all rows in one sentence."""
    verdicts: dict[str, list[str]] = {}
    for row in rows:
        if row["verdict"]:
            verdicts.setdefault(str(row["verdict"]), []).append(str(row["row"]))
    total = sum(map(len, verdicts.values()))
    within = len(verdicts.pop("within", []))
    others = [f"; {verdict} in {', '.join(names)}" for verdict, names in verdicts.items()]
    figures = counted(total, "published figure is", "published figures are")
    of_all = f"{within} of {figures} within the range of our starts"
    return f"{of_all}{''.join(others)}."


def percent(table: Table, accuracy: float) -> float:
    """Convert an accuracy in [0, 1] to the table's accuracy or error in percent."""
    return 100 * (accuracy if table.measure == "accuracy" else 1 - accuracy)


def published_field(row: Row) -> str:
    """Name of the field of `Trained` that corresponds to the published result."""
    return {
        "test": "chosen_test",
        "best test epoch": "best_test",
        "best validation epoch": "chosen_validation",
    }[row.of]


def protocol_line(settings: Settings, features: int, classes: int) -> str:
    """Describe a training protocol in one line."""
    sizes = _memory.dashed((features, *settings.hidden, classes))
    start = {"large": "N(0, 1)", "scaled": "N(0, 1/n_in)"}.get(
        str(settings.init), f"N(0, {settings.init}²)"
    )
    parts = [
        f"{sizes}, {settings.loss}, lr {settings.rate:g}, mini-batch {settings.batch_size}",
        f"{counted(settings.epochs, 'epoch')}, weights from {start}",
        f"λ = {settings.l2:g}" if settings.l2 else "",
        f"momentum {settings.momentum:g}" if settings.momentum else "",
        f"dropout {settings.dropout:g}" if settings.dropout else "",
        f"input dropout {settings.input_dropout:g}" if settings.input_dropout else "",
        "" if settings.schedule == CONSTANT else _changed_fields(settings.schedule),
        _changed_fields(settings.distortion) if settings.distortion else "",
    ]
    return ", ".join(part for part in parts if part)


def _changed_fields(value: Schedule | Distortion) -> str:
    """List the fields that differ from their defaults: "cosine, warmup 5", "rotation 10"."""
    return ", ".join(
        f"{field.name.replace('_', ' ')} {getattr(value, field.name)}".removeprefix("kind ")
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    )


def repr_without_defaults(value: object) -> str:
    """Return `repr(value)` without the dataclass fields that equal their defaults."""
    if not dataclasses.is_dataclass(value):
        return repr(value)
    changed = (
        f"{field.name}={repr_without_defaults(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    )
    return f"{type(value).__name__}({', '.join(changed)})"
