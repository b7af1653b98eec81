"""State of a training run: network, optimizer and cursor, saved and loaded together."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnce import data
from nnce._memory import check_memory, shortage
from nnce._torch_private import SGD, Adam
from nnce.engines.ensemble import Ensemble
from nnce.modules import MLP
from nnce.training.cursor import Cursor, generators
from nnce.training.parallel import ALONE, World
from nnce.training.settings import ENSEMBLE_ENGINES, Settings, ensemble_engine, hyperparameters


class Best(NamedTuple):
    """The network with the highest validation accuracy so far; the first if there are several.

    >>> best = nnce.training.Best(epoch=3, accuracy=0.9, network=nnce.MLP((2, 1)))
    >>> best.epoch, best.accuracy
    (3, 0.9)
    """

    epoch: int
    """Number of finished epochs."""
    accuracy: float
    """Accuracy on the validation data, in [0, 1]."""
    network: MLP
    """A copy of the network after that epoch."""


@dataclass
class State:
    """Everything that changes during training.

    Saving by `state_dict` between any two steps and loading again produces results that are
    bit-identical to uninterrupted training.

    >>> settings = nnce.training.Settings(hidden=(8,))
    >>> state = nnce.training.initial_state(settings, nnce.data.load("digits"))
    >>> sorted(state.state_dict())
    ['best', 'cursor', 'losses', 'network', 'optimizer']
    """

    network: MLP
    """The network being trained."""
    optimizer: torch.optim.Optimizer | Ensemble
    """The optimizer, with its momentum; an `Ensemble` of one network for engines without a
    graph."""
    cursor: Cursor
    """Position of the run."""
    world: World = ALONE
    """The processes that train the network together; each has this state."""
    losses: list[Tensor] = field(default_factory=list)
    """Loss before each step of the current epoch, for engines that compute it."""
    best: Best | None = None
    """Best network so far; None before the first record."""

    def keep_if_best(self, accuracy: float) -> None:
        """Copy the network if this validation accuracy, after an epoch, is the highest so far."""
        if self.best is None or accuracy > self.best.accuracy:
            self.best = Best(self.cursor.epoch, accuracy, copy.deepcopy(self.network))

    def is_stale(self, patience: int | None) -> bool:
        """Whether the last `patience` epochs did not improve on the best; False for None."""
        if patience is None or self.best is None:
            return False
        return self.cursor.recorded - self.best.epoch >= patience

    def is_over(self, epochs: int, patience: int | None = None) -> bool:
        """Whether all `epochs` are recorded, or patience has run out in any process.

        Must be called by all processes, which stop together.
        """
        stale = self.world.largest(int(self.is_stale(patience)))
        return self.cursor.recorded >= epochs or bool(stale)

    def state_dict(self) -> dict[str, Any]:
        """The complete state, for a checkpoint."""
        optimizer = self.optimizer.state_dict()
        if isinstance(self.optimizer, torch.optim.Optimizer):
            # Without the parameter groups, which the settings determine.
            optimizer = {str(number): of_one for number, of_one in optimizer["state"].items()}
        return {
            "network": dict(self.network.state_dict()),
            "optimizer": optimizer,
            "losses": torch.stack(self.losses) if self.losses else None,
            "cursor": self.cursor.state_dict(),
            "best": self.best
            and {**self.best._asdict(), "network": dict(self.best.network.state_dict())},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, in a state that `initial_state` made with the same settings.

        Raises:
            ValueError: the saved state does not match this one.
        """
        with mismatch_is_value_error():
            _load_network(self.network, state["network"])
            without_graph = not isinstance(self.optimizer, torch.optim.Optimizer)
            if without_graph != ("velocities" in state["optimizer"]):
                raise ValueError(
                    "expected to resume a run of one process in one, and a run of several in "
                    "several, because engines without a graph save different states"
                )
            if isinstance(self.optimizer, torch.optim.Optimizer):
                _load_optimizer(self.optimizer, state["optimizer"])
            else:
                self.optimizer.load_state_dict(state["optimizer"])
            self.cursor.load_state_dict(state["cursor"])
            losses = state["losses"]
            self.losses = [] if losses is None else list(losses.to(self.network[0].weight.device))
            self.best = self._loaded_best(state["best"])

    def _loaded_best(self, state: Mapping[str, Any] | None) -> Best | None:
        if (state is None) != (self.cursor.recorded < 0):
            got = "none" if state is None else "one"
            raise ValueError(
                f"expected a best network once an epoch is recorded, got {got} with "
                f"recorded={self.cursor.recorded}"
            )
        if state is None:
            return None
        best = Best(state["epoch"], state["accuracy"], copy.deepcopy(self.network))
        if type(best.epoch) is not int or type(best.accuracy) is not float:
            raise ValueError(
                f"expected an int epoch and a float accuracy of the best network, got {best[:2]}"
            )
        _load_network(best.network, state["network"])
        return best


@contextlib.contextmanager
def mismatch_is_value_error() -> Iterator[None]:
    """Context manager that turns errors from loading a state that does not match into ValueError.

    Returns:
        The context manager.

    Raises:
        ValueError: in place of any error, except running out of memory.

    >>> with nnce.training.mismatch_is_value_error():
    ...     {}["network"]
    Traceback (most recent call last):
    ValueError: KeyError: 'network'
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # of any type, depending on the file
        if shortage(error):
            raise
        raise ValueError(f"{type(error).__name__}: {error}") from error


def check_fits(name: str, value: object, like: Tensor) -> None:
    """Raise ValueError unless a value is a tensor of the expected shape and dtype.

    Args:
        name: name of the value in the error message.
        value: the value to check.
        like: a tensor of the expected shape and dtype.

    Raises:
        ValueError: value is not a tensor, or has a different shape or dtype.

    >>> nnce.training.check_fits("W", torch.zeros(2), torch.zeros(3))
    Traceback (most recent call last):
    ValueError: expected W of (3,), torch.float32, got ((2,), torch.float32)
    """
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (like.shape, like.dtype):
        got = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
        raise ValueError(f"expected {name} of {tuple(like.shape)}, {like.dtype}, got {got}")


def _load_network(network: MLP, state: Mapping[str, Any]) -> None:
    # `network.load_state_dict` would cast other dtypes.
    for name, parameter in network.state_dict().items():
        check_fits(name, state[name], parameter)
    network.load_state_dict(state)


def _load_optimizer(optimizer: torch.optim.Optimizer, by_number: Mapping[str, Any]) -> None:
    whole = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, of_one in by_number.items():
        for name, value in of_one.items():
            if name != "step" and value is not None:
                check_fits(name, value, parameters[int(number)])
    state = {int(number): dict(of_one) for number, of_one in by_number.items()}
    optimizer.load_state_dict({**whole, "state": state})


def initial_state(settings: Settings, dataset: data.Dataset, world: World = ALONE) -> State:
    """Create the state before the first step, on the device and in the dtype of the data.

    Args:
        settings: settings of the run.
        dataset: the whole data set, the same in every process.
        world: the processes that train together, each on its share of every mini-batch.

    Returns:
        A new network, its optimizer, and a cursor at the start.

    Raises:
        ValueError: engine "loops" in a process group.
        MemoryError: the network would not fit into memory; the message states how much it needs.
        DataError: the data fail `nnce.data.check`, or the settings distort images that are not
            square.

    >>> settings = nnce.training.Settings(hidden=(8,))
    >>> nnce.training.initial_state(settings, nnce.data.load("digits")).network.sizes
    (64, 8, 10)
    """
    for split in dataset:
        data.check(*split)
    if world.joined and settings.engine == "loops":
        raise ValueError(
            "expected an engine other than 'loops' for several processes, which exchange "
            "gradients; use 'backprop', which uses matrix products then"
        )
    network = make_network(settings, dataset)
    optimizer = _optimizer(network, settings, len(dataset.train.x), world)
    return State(network, optimizer, Cursor.at_start([settings.seed]), world)


def sizes(settings: Settings, dataset: data.Dataset) -> tuple[int, ...]:
    """The sizes of a run's network: features, hidden layers, classes.

    Args:
        settings: settings of the run.
        dataset: its data, x [n, features] and y [n, classes].

    Returns:
        (features, hidden …, classes).

    >>> settings = nnce.training.Settings(hidden=(8,))
    >>> nnce.training.sizes(settings, nnce.data.load("digits"))
    (64, 8, 10)
    """
    x, y = dataset.train
    return (x.shape[1], *settings.hidden, y.shape[1])


def check_suits(settings: Settings, dataset: data.Dataset, networks: int = 1) -> None:
    """Check, before creating networks, that they fit into memory and that the data suit them.

    Args:
        settings: settings of the run.
        dataset: its data.
        networks: number of networks to create.

    Raises:
        MemoryError: the networks would not fit into memory; the message states how much they need.
        DataError: the settings distort images that are not square.

    >>> settings = nnce.training.Settings(hidden=(8,))
    >>> nnce.training.check_suits(settings, nnce.data.load("digits"), networks=100)
    """
    x = dataset.train.x
    if settings.distortion is not None:
        settings.distortion.check(x.shape[1])
        height, width = dataset.about.get("image") or (1, 1)
        if height != width:  # such as 2x8, which has as many pixels as a square
            raise data.DataError(f"expected square images to distort, got {width}x{height}")
    check_memory(sizes(settings, dataset), networks, dtype=x.dtype, device=x.device)


def make_network(settings: Settings, dataset: data.Dataset) -> MLP:
    """Create the initial network of a run.

    Args:
        settings: settings of the run; only hidden, init, seed and distortion are used.
        dataset: its data, which determine sizes, device and dtype.

    Returns:
        A new network.

    Raises:
        MemoryError, DataError: as for `check_suits`.

    >>> settings = nnce.training.Settings(hidden=(8,))
    >>> nnce.training.make_network(settings, nnce.data.load("digits")).sizes
    (64, 8, 10)
    """
    check_suits(settings, dataset)
    x = dataset.train.x
    network = MLP(
        sizes(settings, dataset),
        init=settings.init,
        generator=generators(settings.seed)[0],
        device=x.device,
        dtype=x.dtype,
    )
    network.about = dict(dataset.about)
    return network


def is_finite(network: MLP) -> bool:
    """Whether all parameters of a network are finite.

    Args:
        network: an MLP.

    Returns:
        False if any parameter is infinite or NaN.

    >>> nnce.training.is_finite(nnce.MLP((2, 1)))
    True
    """
    return all(bool(parameter.isfinite().all()) for parameter in network.parameters())


def _optimizer(
    network: MLP, settings: Settings, n_train: int, world: World
) -> torch.optim.Optimizer | Ensemble:
    if settings.engine in ENSEMBLE_ENGINES and not world.joined:
        values = hyperparameters(settings, n_train)
        engine = ensemble_engine(settings.engine)
        return Ensemble([network], [values], batch_size=settings.batch_size, engine=engine)
    weights = [linear.weight for linear in network.linears()]
    biases = [linear.bias for linear in network.linears()]
    groups: list[dict[str, Any]] = [{"params": [*weights, *biases]}]  # one: groups take time
    if decay := settings.l2 / n_train:
        groups = [{"params": weights, "weight_decay": decay}, {"params": biases}]
    if settings.optimizer == "adam":
        return Adam(groups, lr=settings.rate, fused=True)
    return SGD(groups, lr=settings.rate, momentum=settings.momentum, fused=True)
