"""Published tables: results, networks and training protocols, as data for `reproduction`.

Each row follows the protocol of its source; notes name the options that the source leaves open.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nnce.data import Distortion
from nnce.losses import Loss
from nnce.training import Settings
from nnce.training.schedules import Schedule

Of = Literal["test", "best test epoch", "best validation epoch"]
"""How a published result is measured: "test" on the test set after training; otherwise, as in the
book, as the maximum over all epochs on the test or the validation set."""


@dataclass(frozen=True)
class Row:
    """One published result, and the training settings of its network."""

    name: str
    settings: Settings
    """Training settings, except for the seed."""
    published: float | None = None
    """Accuracy or error in percent, as in the table; None if nothing is published."""
    of: Of = "test"
    """How the published result is measured."""
    note: str = ""
    """Options that the source leaves open, and other remarks."""


@dataclass(frozen=True)
class Table:
    """Published results of one source."""

    title: str
    source: str
    measure: Literal["accuracy", "error"]
    seeds: int
    """Default number of starts per row."""
    rows: tuple[Row, ...]
    about: str = ""
    """Remarks that apply to all rows."""
    choices: tuple[str, ...] = ()
    """Choices made on the validation set; {NAME} is a candidate in `<table>-candidates.json`."""

    def row(self, name: str) -> Row:
        """Return the row with the given name."""
        return next(row for row in self.rows if row.name == name)


def find(table: str, rows: Sequence[str] = ()) -> tuple[Table, tuple[Row, ...]]:
    """Find a table by name, and the named rows of it, in the order of the table.

    Args:
        table: a key of `TABLES`.
        rows: names of rows; N8 stands for N8a, N8b, …; empty for all rows.

    Raises:
        ValueError: there is no such table or row; the message suggests similar names.
    """
    if table not in TABLES:
        raise _unknown("table", table, tuple(TABLES))
    found = TABLES[table]
    names = [row.name for row in found.rows]
    for name in rows:
        if not any(_matches(name, one) for one in names):
            raise _unknown(f"row of {table}", name, names)
        if rows.count(name) > 1:
            raise ValueError(f"expected each row once, got {name} {rows.count(name)} times")
    chosen = tuple(
        row for row in found.rows if not rows or any(_matches(name, row.name) for name in rows)
    )
    return found, chosen


def _matches(requested: str, name: str) -> bool:
    return requested.lower() in (name.lower(), name.rstrip("abcdefgh").lower())


def _unknown(kind: str, name: str, names: Sequence[str]) -> ValueError:
    by_lower = {one.lower(): one for one in names}
    near = [by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, cutoff=0.5)]
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    return ValueError(f"expected a {kind} out of {', '.join(names)}, got {name!r}{meant}")


# ------------------------------------------------------------------------------------ the textbook

_VALIDATION: Of = "best validation epoch"
_THREE = "The best of three runs."
_NO_INIT = (
    "The initialization is not stated with this result; as in the rest of the section, weights are "
    "from N(0, 1)."
)


def _nielsen(
    name: str,
    hidden: tuple[int, ...],
    loss: Loss,
    lr: float,
    published: float,
    of: Of = "best test epoch",
    note: str = "",
    **more: Any,
) -> Row:
    """Row with the book's usual initialization and epochs, unless `more` has others."""
    settings = Settings(hidden, loss, lr=lr, **{"init": "large", "epochs": 30, **more})
    return Row(name, settings, published, of, note)


_LATER: Any = {"l2": 5.0, "init": "scaled"}

NIELSEN = Table(
    title="Neural Networks and Deep Learning",
    source="M. Nielsen, Neural Networks and Deep Learning, 2015, chapters 1, 3 and 5",
    measure="accuracy",
    seeds=10,
    about="The book quotes the best epoch of one run, or of the best of three runs; mini-batches "
    "of 10. `scripts/slowdown.py` reproduces the single neuron of its chapter 3.",
    rows=(
        _nielsen("N1", (30,), "quadratic", 3.0, 95.42, note=_THREE),
        _nielsen("N2", (100,), "quadratic", 3.0, 96.59, note=_THREE),
        _nielsen("N3", (30,), "cross-entropy", 0.5, 95.49),
        _nielsen("N4", (100,), "cross-entropy", 0.5, 96.82),
        _nielsen("N5", (30,), "cross-entropy", 0.5, 96.49, l2=5.0),
        _nielsen("N6", (100,), "cross-entropy", 0.5, 97.92, _VALIDATION, l2=5.0),
        _nielsen(
            "N7", (100,), "cross-entropy", 0.1, 98.04, _VALIDATION, _NO_INIT, l2=5.0, epochs=60
        ),
        _nielsen("N8a", (30,), "cross-entropy", 0.1, 96.48, _VALIDATION, **_LATER),
        _nielsen("N8b", (30, 30), "cross-entropy", 0.1, 96.90, _VALIDATION, **_LATER),
        _nielsen("N8c", (30, 30, 30), "cross-entropy", 0.1, 96.57, _VALIDATION, **_LATER),
        _nielsen("N8d", (30, 30, 30, 30), "cross-entropy", 0.1, 96.53, _VALIDATION, **_LATER),
    ),
)

# ---------------------------------------------------------------------------------- Simard et al.

_AFFINE = Distortion(rotation=10, scaling=0.15, shear=0.15, translation=1.5)
_STRONGER = Distortion(alpha=27, sigma=4)
_ELASTIC = Distortion(alpha=20, sigma=4)
_LONGER = ", because the authors trained for hundreds of epochs"


def _after(row: str, why: str = "") -> str:
    return f"Added after the test error of {row} was known{why}."


def _warm(epochs: int) -> Schedule:
    """Schedule with 5 epochs of warm-up from a tenth of the rate, then a cosine."""
    return Schedule("cosine", cosine_epochs=epochs - 5, warmup=5)


def _simard(
    name: str,
    loss: Loss,
    distortion: Distortion | None,
    published: float | None = None,
    epochs: int = 100,
    note: str = "",
) -> Row:
    """Row for their network, 784-800-10, with their initial standard deviation, 0.05."""
    settings = Settings(
        hidden=(800,),
        loss=loss,
        lr={"cross-entropy": 0.6, "quadratic": 3.0}[loss],
        epochs=epochs,
        schedule=_warm(epochs),
        init=0.05,
        distortion=distortion,
    )
    return Row(name, settings, published, note=note)


SIMARD = Table(
    title="Best Practices for Convolutional Neural Networks",
    source="P. Simard, D. Steinkraus, J. Platt, Best practices for convolutional neural networks "
    "applied to visual document analysis, ICDAR 2003, and LeCun's table of MNIST results",
    measure="error",
    seeds=4,
    about="The authors start from a rate of 0.005 and multiply it by 0.3 every 100 epochs, for "
    "hundreds of epochs. Our rates, mini-batch size, affine ranges and α were chosen on the "
    "validation set.",
    choices=(
        "Mini-batches of 10: {CE2}, as good as single examples ({CE6}) and better than 100 ({CE4}, "
        "{CE5}).",
        "A rate of 0.6 (quadratic: 3), with a warm-up over 5 epochs from a tenth of it, then a "
        "cosine. The warm-up allows twice the rate ({CE7} without, {CE9} with it). Without it, the "
        "quadratic loss fails to learn at rates of 1 and above ({QE5}, {QE2}); with it, 3 is best "
        "({QE6}, {QE7}) and 6 is too large ({QE8}).",
        "Elastic fields smoothed by a Gaussian whose weights sum to 1, α = 20 ({CE9}; their α = 34 "
        "{CW3}); in 100 epochs, α = 27 {CM1} and α = 34 {CM2}.",
        "Affine maps: rotation up to 10°, scaling and shear up to 0.15, translation up to 1.5 "
        "pixels ({CA2}); smaller ({CA1}) and larger ({CA3}) ranges are equally good.",
        "No weight decay: λ = 0 {CP2}, λ = 5 {CP4}.",
    ),
    rows=(
        _simard("S1", "cross-entropy", None, 1.6),
        _simard("S2", "cross-entropy", _AFFINE, 1.1),
        _simard("S3", "quadratic", _ELASTIC, 0.9),
        _simard("S4a", "cross-entropy", _ELASTIC, 0.7),
        _simard("S4b", "cross-entropy", _ELASTIC, 0.7, 250, _after("S4a", _LONGER)),
        _simard("S4c", "cross-entropy", _STRONGER, 0.7, 400, _after("S4b")),
        _simard("S5", "quadratic", None, note="Not in their table."),
        _simard("S6", "quadratic", _AFFINE, note="Not in their table."),
    ),
)

# ------------------------------------------------------------------------------- our own networks

_DISTORTED: Any = {"engine": "loops", "distortion": dataclasses.replace(_AFFINE, alpha=20, sigma=4)}
_DROPOUT: Any = {"dropout": 0.2, "input_dropout": 0.2, "batch_size": 100, "momentum": 0.9}


def _ours(
    name: str, loss: Loss, lr: float, epochs: int, published: float, note: str = "", **more: Any
) -> Row:
    settings = Settings((800, 300), loss, lr=lr, epochs=epochs, schedule=_warm(epochs), **more)
    return Row(name, settings, published, note=note)


OURS = Table(
    title="Our best sigmoid networks",
    source="our own; the published values are from Simard et al. (O1, O2) and from "
    "N. Srivastava et al., Dropout, JMLR 15, 2014 (O3, O4: logistic neurons, with dropout)",
    measure="error",
    seeds=5,
    about="Sizes, rates and distortions were chosen on the validation set. The number of epochs "
    "was limited to four hours on two cores per network.",
    choices=(
        "Two hidden layers, 800 and 300: {C5}; one of 800 {C1}, of 1,500 {C2}.",
        "A rate of 1 (quadratic: 5), with a warm-up over 5 epochs, then a cosine; twice the rate "
        "is worse ({D1}, {D2}). Other rates of the quadratic loss were not tried for this network.",
        "Both the affine distortions of S2 and the elastic ones of S4. Smaller distortions are no "
        "worse in 40 epochs ({D3}); the larger ones were kept for longer training.",
        "Without distortions: for O3, weight decay λ = 1 ({P1}; λ = 3 {P2}) and two layers "
        "({P4}); for O4, dropout of a fifth of the hidden neurons and inputs ({P8}) rather than "
        "half of the hidden neurons ({P5}, {P6}, {P7}). P5 to P7 used an older random stream for "
        "the dropout masks and cannot be repeated bit for bit.",
    ),
    rows=(
        _ours("O1a", "cross-entropy", 1.0, 150, 0.7, **_DISTORTED),
        _ours("O1b", "cross-entropy", 1.0, 240, 0.7, _after("O1a"), **_DISTORTED),
        _ours("O2", "quadratic", 5.0, 150, 0.9, **_DISTORTED),
        _ours("O3", "cross-entropy", 1.0, 100, 1.35, engine="loops", l2=1.0),
        _ours("O4", "cross-entropy", 0.5, 150, 1.35, **_DROPOUT),
    ),
)

TABLES: Mapping[str, Table] = {"nielsen": NIELSEN, "simard": SIMARD, "ours": OURS}
