"""Settings of a training run, validated on construction."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from nnce import data
from nnce._arguments import is_integer, is_number, is_size, plain
from nnce.algorithm import Hyperparameters
from nnce.engines.ensemble import Engine as EnsembleEngine
from nnce.losses import LOSSES, Loss, check_loss
from nnce.modules import Init, check_init
from nnce.training.schedules import CONSTANT, Schedule, check_schedule

Engine = Literal["backprop", "loops", "products", "functions", "autograd"]
"""Name of an engine, which computes a training step.

>>> nnce.training.Engine.__args__
('backprop', 'loops', 'products', 'functions', 'autograd')
"""
ENGINES: tuple[Engine, ...] = get_args(Engine)
"""Names of all engines.

>>> nnce.training.ENGINES
('backprop', 'loops', 'products', 'functions', 'autograd')
"""
ENSEMBLE_ENGINES: tuple[Engine, ...] = ("backprop", "loops", "products")
"""Engines that train by an `Ensemble`, without a graph.

>>> nnce.training.ENSEMBLE_ENGINES
('backprop', 'loops', 'products')
"""
Optimizer = Literal["sgd", "adam"]
"""Name of an optimizer.

>>> nnce.training.Optimizer.__args__
('sgd', 'adam')
"""
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
"""Names of all optimizers.

>>> nnce.training.OPTIMIZERS
('sgd', 'adam')
"""

# torch.optim.Adam's default.
_ADAM_LR = 1e-3
# A schedule is checked for this many epochs at most, and for the last epoch.
_EPOCHS_CHECKED = 10_000


@dataclass(frozen=True)
class Settings:
    """All settings of a training run, except for the data.

    The same settings on the same machine produce bit-identical results.

    Raises:
        ValueError: a value is out of range, or two values exclude each other; the message names
            them.

    >>> settings = nnce.training.Settings(loss="quadratic", epochs=5)
    >>> settings.engine, settings.lr
    ('backprop', 3.0)
    """

    hidden: tuple[int, ...] = (30,)
    """Number of neurons of each hidden layer; empty for a single layer."""
    loss: Loss = "cross-entropy"
    """Loss to minimize."""
    engine: Engine | None = None
    """Engine that computes the gradients: "backprop", the revised algorithm without a graph, by
    "loops" or "products", whichever is faster for the sizes; either of these by name; "functions",
    nnce's Functions in PyTorch's graph; "autograd", PyTorch alone. None for "backprop" if the
    optimizer and dropout allow it, else "functions"."""
    optimizer: Optimizer = "sgd"
    """"sgd" for `torch.optim.SGD`, or "adam" for `torch.optim.Adam`, which requires engine
    "functions" or "autograd"."""
    epochs: int = 30
    """Number of passes over the training data, at least 1."""
    batch_size: int = 10
    """Number of examples in a mini-batch, at least 1; the last one of an epoch may be shorter."""
    lr: float | None = None
    """Learning rate η; None for the textbook's (0.5 for cross-entropy, 3.0 for quadratic) with SGD,
    and 0.001 with Adam."""
    momentum: float = 0.0
    """Momentum μ of SGD, in [0, 1)."""
    l2: float = 0.0
    """L2 regularization λ, at least 0: weight decay λ / n_train of weights, not biases, as in the
    textbook."""
    schedule: Schedule = CONSTANT
    """Factor of the learning rate for each epoch, one of `nnce.training.schedules`."""
    distortion: data.Distortion | None = None
    """Random distortion of the training images, redrawn in each epoch; None for no distortion."""
    dropout: float = 0.0
    """Dropout probability of hidden neurons, in [0, 1), drawn for each example and step. Requires
    engine "functions" or "autograd"; the masks depend on the number of processes."""
    input_dropout: float = 0.0
    """Dropout probability of inputs, in [0, 1); as `dropout` otherwise."""
    init: Init = "scaled"
    """Initialization of the layers, as for `nnce.Linear`."""
    seed: int = 0
    """Random seed, 0 to 2³² − 1, of the initial parameters, the example order, distortions and
    dropout. Each has its own random stream, so networks of different shapes see the same
    mini-batches."""

    def __post_init__(self) -> None:
        check_loss(self.loss)
        object.__setattr__(self, "init", check_init(self.init))
        check_schedule(self.schedule)
        _raise_first(_checks_before_defaults(self))
        if self.engine is None:
            graph = self.optimizer != "sgd" or self.has_dropout
            object.__setattr__(self, "engine", "functions" if graph else "backprop")
        if self.lr is None:
            lr = LOSSES[self.loss].textbook_lr if self.optimizer == "sgd" else _ADAM_LR
            object.__setattr__(self, "lr", lr)
        _raise_first(_checks(self))
        object.__setattr__(self, "hidden", tuple(map(int, self.hidden)))
        for name in _NUMBERS:
            object.__setattr__(self, name, plain(getattr(self, name)))

    @property
    def rate(self) -> float:
        """The learning rate with its default filled in, before the schedule's factor."""
        assert self.lr is not None
        return self.lr

    @property
    def has_dropout(self) -> bool:
        """Whether hidden neurons or inputs are left out."""
        return self.dropout > 0 or self.input_dropout > 0

    def rate_of(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        return self.rate * self.schedule.factor(epoch)


_NUMBERS = ("epochs", "batch_size", "lr", "momentum", "l2", "dropout", "input_dropout", "seed")
_Checks = Iterator[tuple[bool, str]]
"""Conditions, each with the error message for settings that do not meet it. They are evaluated one
by one, so that a condition may rely on those before it."""


def _raise_first(checks: _Checks) -> None:
    for is_met, sentence in checks:
        if not is_met:
            raise ValueError(f"expected {sentence}")


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))


def _checks_before_defaults(s: Settings) -> _Checks:
    yield s.optimizer in OPTIMIZERS, f"optimizer {_either(OPTIMIZERS)}, got {s.optimizer!r}"
    for name in ("dropout", "input_dropout"):
        p = getattr(s, name)
        yield is_number(p) and 0 <= p < 1, f"{name} to be a number in [0, 1), got {p!r}"


def _checks(s: Settings) -> _Checks:
    has_graph = s.engine not in ENSEMBLE_ENGINES
    yield s.engine in ENGINES, f"engine {_either(ENGINES)}, got {s.engine!r}"
    yield (
        has_graph or s.optimizer == "sgd",
        f"optimizer 'sgd' for engine {s.engine!r}, got {s.optimizer!r}; use engine 'functions'",
    )
    yield (
        has_graph or not s.has_dropout,
        f"no dropout for engine {s.engine!r}, got dropout={s.dropout} and "
        f"input_dropout={s.input_dropout}; use engine 'functions'",
    )
    yield (
        isinstance(s.hidden, tuple) and all(map(is_size, s.hidden)),
        f"positive hidden sizes, got {s.hidden!r}",
    )
    for name in ("epochs", "batch_size"):
        size = getattr(s, name)
        yield is_size(size), f"{name} of at least 1, a whole number, got {size!r}"
    yield is_number(s.lr), f"lr to be a number, got {s.lr!r}"
    yield 0 < s.rate < math.inf, f"a positive learning rate, got {s.lr!r}"
    yield is_number(s.momentum), f"momentum to be a number, got {s.momentum!r}"
    yield 0 <= s.momentum < 1, f"momentum in [0, 1), got {s.momentum!r}"
    yield is_number(s.l2), f"l2 to be a number, got {s.l2!r}"
    yield 0 <= s.l2 < math.inf, f"l2 of at least 0, got {s.l2!r}"
    yield (
        not s.momentum or s.optimizer == "sgd",
        f"no momentum for optimizer {s.optimizer!r}, which has its own, got {s.momentum}",
    )
    yield (
        not s.dropout or bool(s.hidden),
        f"hidden neurons for dropout, got hidden={s.hidden}; use input_dropout for dropout of "
        f"inputs",
    )
    yield (
        s.distortion is None or isinstance(s.distortion, data.Distortion),
        f"an nnce.data.Distortion, got {s.distortion!r}",
    )
    changing = s.schedule != CONSTANT
    first = range(min(s.epochs, _EPOCHS_CHECKED) if changing else 0)
    yield (
        all(s.rate_of(epoch) > 0 for epoch in (*first, s.epochs - 1)),
        f"a schedule that leaves a positive rate for all {s.epochs} epochs, got {s.schedule}",
    )
    # PyTorch's CPU generator uses 32 bits of a seed.
    yield (
        is_integer(s.seed) and 0 <= s.seed < 2**32,
        f"a seed from 0 to 2**32 - 1, got {s.seed!r}",
    )


def hyperparameters(settings: Settings, n_train: int) -> Hyperparameters:
    """Convert settings to the hyperparameters of an `Ensemble`, with λ divided by n_train.

    Args:
        settings: settings of a run.
        n_train: number of training examples.

    Returns:
        Hyperparameters with weight_decay = λ / n_train.

    >>> settings = nnce.training.Settings(l2=5.0)
    >>> nnce.training.hyperparameters(settings, n_train=50_000).weight_decay
    0.0001
    """
    return Hyperparameters(
        settings.loss, settings.rate, settings.momentum, weight_decay=settings.l2 / n_train
    )


def ensemble_engine(engine: Engine | None) -> EnsembleEngine | None:
    """Convert an engine of the settings to the `engine` argument of an `Ensemble`.

    Args:
        engine: an element of `ENGINES`.

    Returns:
        "loops", "products", or None for whichever is faster.

    >>> nnce.training.ensemble_engine("loops"), nnce.training.ensemble_engine("backprop")
    ('loops', None)
    """
    return engine if engine == "loops" or engine == "products" else None
