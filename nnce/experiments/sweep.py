"""Grid search over training options, with several starts for each combination.

Networks of equal shape, batch size and distortion are trained together, one such group after the
other. The combination with the best validation accuracy is evaluated on the test data.
"""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nnce import data, training
from nnce.experiments import command_line, side_by_side
from nnce.experiments.command_line import ArgumentParser
from nnce.experiments.comparison_report import joined, percent
from nnce.experiments.epochs import epoch_row
from nnce.experiments.estimates import SHARE, Estimate, estimate
from nnce.experiments.figures import HeatMap
from nnce.experiments.report import Row, counted, table
from nnce.experiments.side_by_side import Run, SideBySide
from nnce.losses import LOSSES
from nnce.training.parallel import World

# Training options that cannot be swept.
_NOT_SWEPT = ("help", "epochs", "train_size")
# Splits evaluated in every epoch; the test data are for the chosen combination only.
_SPLITS = ("train", "validation")
# Largest number of printed rows.
_ROWS_SHOWN = 20

Values = dict[str, str]
"""A combination: the values as text, by option."""


class Combination(NamedTuple):
    """One combination of values, and its networks, one per seed."""

    values: Values
    runs: list[Run]

    @property
    def diverged(self) -> int:
        """Number of networks that diverged."""
        return sum(run.diverged for run in self.runs)

    @property
    def validation(self) -> Estimate:
        """Validation accuracy after the last epoch, over the seeds; NaN if any network diverged."""
        accuracies = [run.last.accuracy["validation"] for run in self.runs]
        return estimate([] if self.diverged else accuracies, SHARE)


def as_typed(values: Mapping[str, str]) -> str:
    """Format a combination as in --sweep."""
    return " ".join(f"{name}={text}" for name, text in values.items())


def parse(texts: Sequence[str]) -> dict[str, dict[str, object]]:
    """Parse --sweep to a dictionary of values by option and by text.

    Exits with status 2 and a one-line error for an invalid value.

    Raises:
        ValueError: an option is unknown, has no value, or is given twice.
    """
    parser = ArgumentParser(None)
    parser.add_training_options()
    parser.add_argument("--loss", choices=tuple(LOSSES))
    parser.add_argument("--lr", type=float)
    known = [action.dest for action in parser._actions if action.dest not in _NOT_SWEPT]
    swept: dict[str, dict[str, object]] = {}
    for text in texts:
        option, _, values = text.partition("=")
        name = option.replace("-", "_")
        if name not in known:
            names = ", ".join(sorted(known)).replace("_", "-")
            raise ValueError(f"expected --sweep over options out of {names}, got {option!r}")
        if name in swept or not all(values.split(",")):
            raise ValueError(f"expected each option in --sweep once, as NAME=V,V, got {text!r}")
        texts = values.split(",")
        found: list[object] = []
        for value in texts:
            given = [f"{command_line.option(name)}={value}"]
            if name == "hidden" and value[0] != "-":
                given = ["--hidden", *value.split("-")]
            found.append(getattr(parser.parse_args(given), name))
        command_line.check_distinct(f"--sweep {option}", found, texts)
        swept[name] = dict(zip(texts, found, strict=True))
    return swept


def plan(
    options: argparse.Namespace, dataset: data.Dataset
) -> list[tuple[Values, list[training.Settings]]]:
    """Settings of all networks: for each combination, one per seed.

    Raises:
        ValueError: a value or a combination is invalid.
        MemoryError: the networks do not fit in memory.
    """
    swept, seeds = parse(options.sweep), range(options.seed, options.seed + options.seeds)
    if not 1 <= len(seeds) <= 1_000:
        raise ValueError(f"expected 1 to 1,000 --seeds, got {options.seeds:,}")
    command_line.settings(argparse.Namespace(**vars(options)))  # errors that no swept value causes
    planned: list[tuple[Values, list[training.Settings]]] = []
    count = math.prod(map(len, swept.values())) * len(seeds)
    for texts in itertools.product(*swept.values()):
        values = dict(zip(swept, texts, strict=True))
        changed = {name: swept[name][text] for name, text in values.items()}
        try:
            settings = command_line.settings(argparse.Namespace(**{**vars(options), **changed}))
        except ValueError as error:
            raise ValueError(f"--sweep {as_typed(values)}: {error}") from error
        if not planned or "hidden" in swept:
            side_by_side.check(settings, seeds, dataset, networks=count)
        planned.append((values, [dataclasses.replace(settings, seed=seed) for seed in seeds]))
    return planned


class Sweep:
    """All networks of a sweep, in groups that are trained together.

    Each process of `world` trains a share of every group.
    """

    def __init__(self, options: argparse.Namespace, dataset: data.Dataset, world: World) -> None:
        self._dataset = dataset
        self.combinations = [
            Combination(values, side_by_side.make_runs(settings, dataset))
            for values, settings in plan(options, dataset)
        ]
        by_kind: dict[object, list[Run]] = {}
        for run in itertools.chain(*(combination.runs for combination in self.combinations)):
            of = run.settings
            by_kind.setdefault((of.hidden, of.batch_size, of.distortion), []).append(run)
        threads = command_line.threads(options)
        self.groups = [
            SideBySide(runs, dataset, threads, world, _SPLITS) for runs in by_kind.values()
        ]

    @property
    def networks(self) -> int:
        """Total number of networks."""
        return sum(len(group.runs) for group in self.groups)

    def epochs(self, between: Callable[[], None]) -> Iterator[int]:
        """Train group by group, and yield each epoch of each group."""
        for group in self.groups:
            yield from group.epochs(between)

    def state_dict(self) -> list[dict[str, Any]]:
        """State for a checkpoint, complete on rank 0; waits for all processes."""
        return [group.state_dict() for group in self.groups]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Restore the state of a checkpoint; raises ValueError if it does not fit."""
        for group, of_group in zip(self.groups, state, strict=True):
            group.load_state_dict(of_group)


class Conclusion(NamedTuple):
    """Results of a sweep."""

    ranked: list[Combination]
    """Combinations by descending validation accuracy; those with diverged networks are last."""
    test: Estimate | None
    """Test accuracy of the chosen combination; None if every combination diverged."""

    @property
    def chosen(self) -> Combination | None:
        """The combination with the highest validation accuracy; None if every one diverged."""
        return None if self.test is None else self.ranked[0]


def conclude(sweep: Sweep, dataset: data.Dataset) -> Conclusion:
    """Rank the combinations by validation accuracy, and evaluate the best on the test data."""

    ranked = sorted(sweep.combinations, key=lambda c: (bool(c.diverged), -c.validation.mean))
    best = ranked[0]
    if best.diverged:
        return Conclusion(ranked, None)
    accuracies = [
        training.evaluate(run.network, dataset.test, run.settings.loss).accuracy
        for run in best.runs
    ]
    return Conclusion(ranked, estimate(accuracies, SHARE))


def answer(conclusion: Conclusion) -> str:
    """Describe the chosen combination and its accuracies."""
    ranked, chosen = conclusion.ranked, conclusion.chosen
    if chosen is None or conclusion.test is None:
        return f"No combination chosen: all {len(ranked)} diverged."
    return (
        f"Best of {len(ranked)} on validation: {as_typed(chosen.values)}\n"
        f"Validation accuracy {percent(chosen.validation, sd=False)} %, test accuracy "
        f"{percent(conclusion.test, sd=False)} %; seeds: {len(chosen.runs)}."
    )


def results(conclusion: Conclusion) -> dict[str, Any]:
    """Entries of results.json: answer, choice, test accuracy and rows."""
    chosen, test = conclusion.chosen, conclusion.test
    rows = []
    for one in conclusion.ranked:
        validation = one.validation._asdict()
        accuracy = {f"validation accuracy, {key}": value for key, value in validation.items()}
        counts = {"networks": len(one.runs), "diverged": one.diverged}
        rows.append({**one.values, **counts, **accuracy})
    return {
        "answer": answer(conclusion),
        "chosen": chosen and chosen.values,
        "test": test and test._asdict(),
        "rows": rows,
    }


def epoch_rows(conclusion: Conclusion) -> list[Row]:
    """Rows of epochs.csv; without values per layer, since the number of layers may vary."""
    found: list[Row] = []
    for values, runs in conclusion.ranked:
        swept = {name: text for name, text in values.items() if name not in ("loss", "lr")}
        rows = [epoch_row(run.settings, record, **swept) for run in runs for record in run.records]
        found += [{name: v for name, v in row.items() if "/layer" not in name} for row in rows]
    return found


def ranking(conclusion: Conclusion, most: int = _ROWS_SHOWN) -> str:
    """Format the ranking as a table."""
    rows: list[Row] = []
    for place, one in enumerate(conclusion.ranked[:most], start=1):
        diverged = f"diverged: {one.diverged} of {len(one.runs)}"
        accuracy = diverged if one.diverged else percent(one.validation, sd=False)
        rows.append({"": place, **one.values, "validation %": accuracy})
    left = len(conclusion.ranked) - len(rows)
    return joined([table(rows), *([f"{counted(left, 'more row')} in results.md"] if left else [])])


def heat_map(conclusion: Conclusion) -> HeatMap | None:
    """Accuracy over the first two varied options, the others as chosen; None if fewer vary."""
    best = conclusion.ranked[0].values
    texts = {name: {c.values[name] for c in conclusion.ranked} for name in best}
    names = [name for name, of in texts.items() if len(of) > 1][:2]
    if len(names) < 2:
        return None
    by_values = {as_typed(c.values): c.validation.mean for c in conclusion.ranked}
    rows, columns = (_in_order(texts[name]) for name in names)
    accuracies = [
        [by_values[as_typed({**best, names[0]: row, names[1]: column})] for column in columns]
        for row in rows
    ]
    others = {name: text for name, text in best.items() if name not in names}
    return HeatMap(names, [rows, columns], accuracies, as_typed(others))


def _in_order(texts: Iterable[str]) -> list[str]:
    """Sort numbers by value, and other texts alphabetically."""
    try:
        return sorted(texts, key=float)
    except ValueError:
        return sorted(texts)
