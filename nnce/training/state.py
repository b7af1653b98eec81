"""State of a training run: network, optimizer and cursor, saved and loaded as one."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nnce import data
from nnce._memory import check_memory, shortage
from nnce.engines.ensemble import Ensemble
from nnce.modules import MLP
from nnce.training.cursor import Cursor, generators
from nnce.training.parallel import ALONE, World
from nnce.training.settings import ENSEMBLE_ENGINES, Settings, ensemble_engine, hyperparameters


@dataclass
class State:
    """Everything that changes during training.

    Saved by `state_dict` between any two steps and loaded again, it produces the same bits as if
    training had not been interrupted.
    """

    network: MLP
    optimizer: torch.optim.Optimizer | Ensemble
    """Changes the parameters and holds the momentum; an `Ensemble` of one without a graph."""
    cursor: Cursor
    world: World = ALONE
    """The processes that train the network together; each has this state."""
    losses: list[Tensor] = field(default_factory=list)
    """Loss before each step of the current epoch, for engines that compute it."""

    def state_dict(self) -> dict[str, Any]:
        """Everything in it, for a checkpoint."""
        optimizer = self.optimizer.state_dict()
        if isinstance(self.optimizer, torch.optim.Optimizer):
            # Without its parameter groups, which the settings decide.
            optimizer = {str(number): of_one for number, of_one in optimizer["state"].items()}
        return {
            "network": dict(self.network.state_dict()),
            "optimizer": optimizer,
            "losses": torch.stack(self.losses) if self.losses else None,
            "cursor": self.cursor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there, in a state that `initial_state` made with the same settings.

        Raises:
            ValueError: it does not fit.
        """
        with mismatch_is_value_error():
            # `network.load_state_dict` would cast other dtypes.
            for name, parameter in self.network.state_dict().items():
                check_fits(name, state["network"][name], parameter)
            self.network.load_state_dict(state["network"])
            without_graph = not isinstance(self.optimizer, torch.optim.Optimizer)
            if without_graph != ("velocities" in state["optimizer"]):
                raise ValueError(
                    "expected a run of one process to continue in one, and a run of several in "
                    "several, since engines without a graph differ there"
                )
            if isinstance(self.optimizer, torch.optim.Optimizer):
                _load_optimizer(self.optimizer, state["optimizer"])
            else:
                self.optimizer.load_state_dict(state["optimizer"])
            self.cursor.load_state_dict(state["cursor"])
            losses = state["losses"]
            self.losses = [] if losses is None else list(losses.to(self.network[0].weight.device))


@contextlib.contextmanager
def mismatch_is_value_error() -> Iterator[None]:
    """Turn any error of loading a state that does not fit into a ValueError."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # of many types, depending on the foreign file
        if shortage(error):
            raise
        raise ValueError(f"{type(error).__name__}: {error}") from error


def check_fits(name: str, value: object, like: Tensor) -> None:
    """Raise ValueError unless a value is a tensor of this shape and dtype."""
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (like.shape, like.dtype):
        got = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
        raise ValueError(f"expected {name} of {tuple(like.shape)}, {like.dtype}, got {got}")


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
    """The state before the first step, on the data's device and in their dtype.

    Args:
        settings: settings of the run.
        dataset: all of the data, in every process.
        world: the processes that train together, each on its share of every mini-batch.

    Raises:
        ValueError: engine "loops" with several processes.
        MemoryError: it would not fit into memory; the sentence says how much it needs.
        DataError: the data are not as `nnce.data.check` requires, or are not square images and the
            settings distort them.
    """
    for split in dataset:
        data.check(*split)
    if world.joined and settings.engine == "loops":
        raise ValueError(
            "expected an engine other than 'loops' for several processes, which exchange "
            "gradients; use 'backprop', which means matrix products there"
        )
    network = make_network(settings, dataset)
    optimizer = _optimizer(network, settings, len(dataset.train.x), world)
    return State(network, optimizer, Cursor.at_start([settings.seed]), world)


def sizes(settings: Settings, dataset: data.Dataset) -> tuple[int, ...]:
    """Neurons of each layer, the input's first."""
    x, y = dataset.train
    return (x.shape[1], *settings.hidden, y.shape[1])


def check_suits(settings: Settings, dataset: data.Dataset, networks: int = 1) -> None:
    """Raise what making N networks would raise, before any is made.

    Raises:
        MemoryError: they would not fit into memory; the sentence says how much they need.
        DataError: the data are not square images, and the settings distort them.
    """
    x = dataset.train.x
    if settings.distortion is not None:
        settings.distortion.check(x.shape[1])
        height, width = dataset.about.get("image") or (1, 1)
        if height != width:  # 2x8, say, which has as many numbers as a square
            raise data.DataError(f"expected square images to distort, got {width}x{height}")
    check_memory(sizes(settings, dataset), networks, dtype=x.dtype, device=x.device)


def make_network(settings: Settings, dataset: data.Dataset) -> MLP:
    """The network before the first step, for these data; raises as `check_suits` does."""
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
    """Whether all parameters are finite."""
    return all(bool(parameter.isfinite().all()) for parameter in network.parameters())


def _optimizer(
    network: MLP, settings: Settings, n_train: int, world: World
) -> torch.optim.Optimizer | Ensemble:
    if settings.engine in ENSEMBLE_ENGINES and not world.joined:
        values = hyperparameters(settings, n_train)
        engine = ensemble_engine(settings.engine)
        return Ensemble([network], [values], batch_size=settings.batch_size, engine=engine)
    groups: list[dict[str, Any]] = [
        {
            "params": [linear.weight for linear in network.linears()],
            "weight_decay": settings.l2 / n_train,
        },
        {"params": [linear.bias for linear in network.linears()]},
    ]
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, lr=settings.rate, fused=True)
    return torch.optim.SGD(groups, lr=settings.rate, momentum=settings.momentum, fused=True)
