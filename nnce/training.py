"""One training loop for every engine: stochastic gradient descent on one network.

`initial_state` makes the state, `train` moves it and yields a record per epoch. The engines differ
only in who differentiates. What is measured is measured by the rules, alike for every engine.

All that decides the rest of a run is in its state, between any two steps: saved by
`State.state_dict` and loaded again, it comes to the same bits.
"""

import concurrent.futures
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnce import data
from nnce.algorithm import Hyperparameters
from nnce.dropout import WithDropout
from nnce.engines.ensemble import Engine as EnsembleEngine
from nnce.engines.ensemble import Ensemble
from nnce.functional import LOSS_FUNCTIONS
from nnce.losses import LOSSES, Loss, check_loss
from nnce.memory import check_memory, shortage
from nnce.modules import MLP, Init, check_init, is_number, is_size
from nnce.parallel import ALONE, FlatGradients, World
from nnce.reference import BUILT_IN_LOSSES, torch_twin
from nnce.saturation import LayerFigures, layer_figures
from nnce.schedules import CONSTANT, Schedule, check_schedule

Engine = Literal["backprop", "loops", "products", "functions", "autograd"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
WHOLE: tuple[Engine, ...] = ("backprop", "loops", "products")
"""Engines that are an `Ensemble`, without a graph."""
Optimizer = Literal["sgd", "adam"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)

# torch.optim.Adam's.
_ADAM_LR = 1e-3

# Of a schedule so many are looked at beforehand.
_EPOCHS_CHECKED = 10_000

# How many validation examples the figures of the layers are taken from.
_LAYER_EXAMPLES = 1_000
# How many examples are evaluated at once, to bound the memory that wide layers take.
_EVALUATION_CHUNK = 10_000


@dataclass(frozen=True)
class Settings:
    """What a training run depends on beside the data. Same settings and machine, same bits.

    Raises ValueError, naming the value, where one makes no sense.
    """

    hidden: tuple[int, ...] = (30,)
    """Neurons of each hidden layer; none for a single layer."""
    loss: Loss = "cross-entropy"
    engine: Engine | None = None
    """Who makes the gradients: "backprop", the revised algorithm run whole, without a graph, as
    "loops" or as "products", whichever suits, or either of those by name; "functions", nnce's
    Functions in PyTorch's graph; "autograd", PyTorch alone. None for the first of them that knows
    the optimizer and dropout."""
    optimizer: Optimizer = "sgd"
    """`torch.optim.SGD`, or "adam" for `torch.optim.Adam`, which wants a graph."""
    epochs: int = 30
    batch_size: int = 10
    lr: float | None = None
    """Learning rate η; None for the textbook's (0.5 for cross-entropy, 3.0 for quadratic), or for
    Adam's 0.001."""
    momentum: float = 0.0
    """For SGD alone."""
    l2: float = 0.0
    """λ of the notes: weights (not biases) decay by λ / n_train, as in the textbook."""
    schedule: Schedule = CONSTANT
    """How the rate changes from epoch to epoch, out of `nnce.schedules`."""
    distortion: data.Distortion | None = None
    """What is done to the training images, anew in each epoch."""
    dropout: float = 0.0
    """How many of the hidden neurons are left out, anew for each example and step, in [0, 1); for
    the engines in PyTorch's graph. Several processes leave out others than one does."""
    input_dropout: float = 0.0
    """The same of the inputs."""
    init: Init = "scaled"
    seed: int = 0
    """Fixes the start, the order of the mini-batches, the distortions and who is left out, 0 to
    2³² − 1. They are drawn from streams of their own, so networks of different shape see the same
    mini-batches."""

    def __post_init__(self) -> None:
        """Check every value, and fill in the rate."""
        check_loss(self.loss)
        check_init(self.init)
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"expected optimizer {' or '.join(map(repr, OPTIMIZERS))}, got {self.optimizer!r}"
            )
        for name in ("dropout", "input_dropout"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < 1:
                raise ValueError(f"expected {name} to be a number in [0, 1), got {value!r}")
        if self.engine is None:
            graph = self.optimizer != "sgd" or self.leaves_out
            object.__setattr__(self, "engine", "functions" if graph else "backprop")
        if self.engine not in ENGINES:
            raise ValueError(
                f"expected engine {' or '.join(map(repr, ENGINES))}, got {self.engine!r}"
            )
        if self.engine in WHOLE and self.optimizer != "sgd":
            raise ValueError(
                f"expected optimizer 'sgd' for engine {self.engine!r}, got {self.optimizer!r}; "
                f"engine 'functions' knows it"
            )
        if self.engine in WHOLE and self.leaves_out:
            raise ValueError(
                f"expected no dropout for engine {self.engine!r}, got dropout={self.dropout} and "
                f"input_dropout={self.input_dropout}; engine 'functions' knows it"
            )
        if self.lr is None:
            lr = LOSSES[self.loss].textbook_lr if self.optimizer == "sgd" else _ADAM_LR
            object.__setattr__(self, "lr", lr)
        if not isinstance(self.hidden, tuple) or not all(map(is_size, self.hidden)):
            raise ValueError(f"expected positive hidden sizes, got {self.hidden}")
        for name in ("epochs", "batch_size"):
            if not is_size(getattr(self, name)):
                raise ValueError(
                    f"expected {name} of at least 1, a whole number, got {getattr(self, name)}"
                )
        for name in ("lr", "momentum", "l2"):
            value = getattr(self, name)
            if not is_number(value):
                raise ValueError(f"expected {name} to be a number, got {value!r}")
        if not 0 < self.rate < float("inf"):
            raise ValueError(f"expected a positive learning rate, got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"expected momentum in [0, 1), got {self.momentum}")
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"expected no momentum for optimizer {self.optimizer!r}, which has its own, got "
                f"{self.momentum}"
            )
        if not 0 <= self.l2 < float("inf"):
            raise ValueError(f"expected l2 of at least 0, got {self.l2}")
        if self.dropout and not self.hidden:
            raise ValueError(
                f"expected hidden neurons for dropout to leave out, got hidden={self.hidden}; "
                f"input_dropout leaves out inputs"
            )
        check_schedule(self.schedule)
        if not isinstance(self.distortion, data.Distortion | None):
            raise ValueError(f"expected an nnce.data.Distortion, got {self.distortion!r}")
        epochs = range(0 if self.schedule == CONSTANT else min(self.epochs, _EPOCHS_CHECKED))
        if not all(self.rate_of(epoch) > 0 for epoch in (*epochs, self.epochs - 1)):
            raise ValueError(
                f"expected a schedule that leaves a positive rate for all {self.epochs} epochs, "
                f"got {self.schedule}"
            )
        # PyTorch's CPU generator tells no more seeds apart.
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**32):
            raise ValueError(f"expected a seed from 0 to 2**32 - 1, got {self.seed}")

    @property
    def rate(self) -> float:
        """The learning rate, the default filled in; the first one where a schedule changes it."""
        assert self.lr is not None
        return self.lr

    @property
    def leaves_out(self) -> bool:
        """Whether there is any dropout."""
        return self.dropout > 0 or self.input_dropout > 0

    def rate_of(self, epoch: int) -> float:
        """The learning rate of the epoch after so many finished ones."""
        return self.rate * self.schedule.factor(epoch)


@dataclass
class State:
    """Everything that changes while training."""

    network: MLP
    optimizer: torch.optim.Optimizer | Ensemble
    """Moves the network, and holds the momentum; without a graph it is an `Ensemble` of one."""
    generator: torch.Generator
    """Draws the order of the mini-batches."""
    world: World = ALONE
    """The processes that train the network together; each has this state."""
    epoch: int = 0
    """The last one that is finished."""
    step: int = 0
    recorded: int = -1
    """The last epoch that there is a record of."""
    position: int = 0
    """How many examples of the epoch under way are behind."""
    seconds: float = 0.0
    """Of training, in the epoch under way or, until there is a record of it, the last one."""
    losses: list[Tensor] = field(default_factory=list)
    """Of the steps of that epoch, where an engine makes some on its way."""
    drawn_from: Tensor | None = None
    """The generator's state before it drew the order of the epoch under way."""

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        optimizer = self.optimizer.state_dict()
        if isinstance(self.optimizer, torch.optim.Optimizer):
            # Not its parameter groups, which the settings decide.
            optimizer = {str(number): of_one for number, of_one in optimizer["state"].items()}
        return {
            "network": dict(self.network.state_dict()),
            "optimizer": optimizer,
            "generator": self.generator.get_state() if self.position == 0 else self.drawn_from,
            "losses": torch.stack(self.losses) if self.losses else None,
            **{name: getattr(self, name) for name in _NUMBERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, in a state as `initial_state` makes it, with the same settings.

        Raises:
            ValueError: it does not fit.
        """
        with what_does_not_fit():
            _load_parameters(self.network, state["network"])
            alone = not isinstance(self.optimizer, torch.optim.Optimizer)
            if alone != ("velocities" in state["optimizer"]):
                raise ValueError(
                    "expected a run of one process to go on in one, and one of several in several, "
                    "since without a graph these are different engines"
                )
            if isinstance(self.optimizer, torch.optim.Optimizer):
                _load_optimizer(self.optimizer, state["optimizer"])
            else:
                self.optimizer.load_state_dict(state["optimizer"])
            set_back(self.generator, state["generator"])
            self.drawn_from = state["generator"]
            losses = state["losses"]
            self.losses = [] if losses is None else list(losses.to(self.network[0].weight.device))
            for name, kind in _NUMBERS.items():
                if type(state[name]) is not kind:
                    raise ValueError(f"expected {name} to be {kind.__name__}, got {state[name]!r}")
                setattr(self, name, state[name])
            least = min(self.epoch, self.step, self.position, self.seconds)
            if least < 0 or not self.epoch - 1 <= self.recorded <= self.epoch:
                raise ValueError(f"expected a record of epoch {self.epoch}, got {self.recorded}")


@contextlib.contextmanager
def what_does_not_fit() -> Iterator[None]:
    """Around the loading of a state: what does not fit, in whatever way, is a ValueError."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # of many types: what a foreign file gives is left to chance
        if shortage(error):
            raise
        raise ValueError(f"{type(error).__name__}: {error}") from error


_NUMBERS: dict[str, type] = {
    **dict.fromkeys(("epoch", "step", "recorded", "position"), int),
    "seconds": float,
}


def _load_parameters(network: MLP, parameters: Mapping[str, Tensor]) -> None:
    """As `network.load_state_dict`, which would cast what is of another dtype."""
    for name, parameter in network.state_dict().items():
        check_fits(name, parameters[name], parameter)
    network.load_state_dict(parameters)


def check_fits(name: str, value: Any, like: Tensor) -> None:
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


class Record(NamedTuple):
    """What is known at an epoch's end; epoch 0 is the start, before any step."""

    epoch: int
    step: int
    seconds: float
    """Training alone, of this epoch, without evaluation."""
    loss: dict[str, float]
    """C, by split: "train", "validation", "test", or those of them that are measured."""
    accuracy: dict[str, float]
    """The share of examples whose largest output is the right one, in [0, 1], by split."""
    layers: list[LayerFigures]
    """From the first layer with weights to the last."""


def pack(records: Sequence[Record]) -> Tensor:
    """Records of one network as numbers, a row each, for a checkpoint; float64."""
    rows = [
        [
            *record[:3],
            *record.loss.values(),
            *record.accuracy.values(),
            *(figure for layer in record.layers for figure in layer),
        ]
        for record in records
    ]
    return torch.tensor(rows, dtype=torch.float64)


def unpack(rows: Tensor, splits: Sequence[str] = data.SPLITS) -> list[Record]:
    """`pack` undone, of records in which these splits are measured."""
    found = []
    for epoch, step, seconds, *figures in rows.tolist():
        n, width = len(splits), len(LayerFigures._fields)
        loss, accuracy, layers = figures[:n], figures[n : 2 * n], figures[2 * n :]
        found.append(
            Record(
                int(epoch),
                int(step),
                seconds,
                dict(zip(splits, loss, strict=True)),
                dict(zip(splits, accuracy, strict=True)),
                [
                    LayerFigures(*layers[begin : begin + width])
                    for begin in range(0, len(layers), width)
                ],
            )
        )
    return found


class Diverged(ArithmeticError):
    """The loss is no longer a number."""


def initial_state(settings: Settings, dataset: data.Dataset, world: World = ALONE) -> State:
    """The network before the first step, on the data's device and in their dtype.

    Args:
        settings: what is trained.
        dataset: on what; all of it in every process.
        world: the processes that train it together, each with its share of every mini-batch.

    Raises:
        ValueError: engine "loops", which one process has for itself, and several processes.
        MemoryError: it would not fit into memory; the sentence says how much it needs.
        DataError: the data are not what `nnce.data.check` wants, or no square images to distort.
    """
    for split in dataset:
        data.check(*split)
    if world.joined and settings.engine == "loops":
        raise ValueError(
            "expected another engine than 'loops' for several processes, which would each need "
            "its gradients; 'backprop' is matrix products there"
        )
    network = make_network(settings, dataset)
    optimizer = _optimizer(network, settings, len(dataset.train.x), world)
    return State(network, optimizer, generators(settings.seed)[1], world)


def generators(seed: int) -> tuple[torch.Generator, torch.Generator]:
    """The two streams of one seed: for the start, and for the order of the mini-batches."""
    start, order = (torch.Generator().manual_seed(data.stream(seed, number)) for number in (0, 1))
    return start, order


def set_back(generator: torch.Generator, state: Tensor) -> None:
    """`generator.set_state`, which crashes on a row of a larger tensor (PyTorch 2.14)."""
    generator.set_state(state.clone())


def sizes(settings: Settings, dataset: data.Dataset) -> tuple[int, ...]:
    """Neurons of each layer, the input's first."""
    x, y = dataset.train
    return (x.shape[1], *settings.hidden, y.shape[1])


def check_suits(settings: Settings, dataset: data.Dataset, networks: int = 1) -> None:
    """Raise what making so many networks would, before any is made.

    Raises:
        MemoryError: they would not fit into memory; the sentence says how much they need.
        DataError: the data are no square images, and the settings distort them.
    """
    x = dataset.train.x
    if settings.distortion is not None:
        settings.distortion.check(x.shape[1])
    check_memory(sizes(settings, dataset), networks, dtype=x.dtype, device=x.device)


def make_network(settings: Settings, dataset: data.Dataset) -> MLP:
    """The network that the settings start from, for these data.

    Raises:
        MemoryError: it would not fit into memory; the sentence says how much it needs.
        DataError: the data are no square images, and the settings distort them.
    """
    check_suits(settings, dataset)
    x = dataset.train.x
    return MLP(
        sizes(settings, dataset),
        init=settings.init,
        generator=generators(settings.seed)[0],
        device=x.device,
        dtype=x.dtype,
    )


def hyperparameters(settings: Settings, n_train: int) -> Hyperparameters:
    """What an ensemble needs to know of the settings."""
    return Hyperparameters(
        settings.loss, settings.rate, settings.momentum, weight_decay=settings.l2 / n_train
    )


def ensemble_engine(engine: Engine | None) -> EnsembleEngine | None:
    """What an `Ensemble` is asked for: loops or products by name, None for whichever suits."""
    return engine if engine == "loops" or engine == "products" else None


def _optimizer(
    network: MLP, settings: Settings, n_train: int, world: World
) -> torch.optim.Optimizer | Ensemble:
    if settings.engine in WHOLE and not world.joined:
        values = hyperparameters(settings, n_train)
        how = ensemble_engine(settings.engine)
        return Ensemble([network], [values], batch_size=settings.batch_size, engine=how)
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


def set_rate(optimizer: torch.optim.Optimizer | Ensemble, rate: float) -> None:
    """Go on with another learning rate."""
    if isinstance(optimizer, Ensemble):
        optimizer.set_lrs([rate] * len(optimizer.networks))
    else:
        for group in optimizer.param_groups:
            group["lr"] = rate


def nothing() -> None:
    """What happens between two steps if nothing else is asked for."""


def train(
    state: State,
    settings: Settings,
    dataset: data.Dataset,
    *,
    measured: Mapping[str, data.Split] | None = None,
    between: Callable[[], None] = nothing,
) -> Iterator[Record]:
    """Train up to `settings.epochs`, yielding a record of the start and one after each epoch.

    Args:
        state: from `initial_state`; moved in place, so `state.network` is the trained network.
        settings: those the state was made with.
        dataset: on one device, in one floating-point dtype.
        measured: what the records are measured on, "validation" at least; all of the dataset if
            None.
        between: called between steps, where the state is whole: after each step in PyTorch's graph,
            and after some tenths of a second without. It may save the state, or raise.

    Raises:
        Diverged: the loss of a step, or of what is measured at an epoch's end, is infinite or NaN.
            Engines without a graph, and several processes, make no losses on their way, so there it
            is seen at the end. A parameter that is infinite or NaN counts as well, though no loss
            may show it.
    """
    measured = dataset.splits() if measured is None else measured
    engine = _engine(state, settings)
    while True:
        if state.recorded < state.epoch:
            (record,) = records(
                [state.network],
                [state.network],
                [settings.loss],
                measured,
                epoch=state.epoch,
                step=state.step,
                seconds=state.seconds,
            )
            finite = all(map(math.isfinite, record.loss.values())) and is_finite(state.network)
            if state.epoch and not finite:
                raise Diverged(_diverged(f"after epoch {state.epoch}", settings))
            state.recorded, state.seconds = state.epoch, 0.0
            yield record
        if state.epoch >= settings.epochs:
            return
        _train_epoch(state, settings, dataset.train, engine, between)


# ------------------------------------------------------------------------------------ the engines


class _Engine(NamedTuple):
    """How steps are taken."""

    step: Callable[[Tensor, Tensor, Tensor], Tensor | None]
    """Through some examples of x and y; the loss before it, where the engine makes one."""
    examples: int
    """So many at once: a mini-batch, or several where an `Ensemble` takes the steps."""


def _engine(state: State, settings: Settings) -> _Engine:
    """The engine that the settings name, for this network, optimizer and world."""
    network, optimizer, world, loss = state.network, state.optimizer, state.world, settings.loss
    if isinstance(optimizer, Ensemble):

        def walk(x: Tensor, y: Tensor, batches: Tensor) -> None:
            optimizer.train_epoch(x, y, batches)

        most = None if settings.distortion is None else data.A_STRETCH
        return _Engine(walk, optimizer.max_chunk(at_most=most))

    if settings.engine in WHOLE:
        gradients = FlatGradients(network)

        def explicit(x: Tensor, y: Tensor, batch: Tensor) -> None:
            share = world.share(batch)
            gradients.fill(x[share], y[share], loss, n=len(batch))
            optimizer.step()

        return _Engine(explicit, settings.batch_size)

    forward, criterion = with_graph(network, settings)
    dropout = _with_dropout(forward, settings, world) if settings.leaves_out else None
    forward = dropout or forward
    if not world.joined:

        def alone(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
            if dropout is not None:
                dropout.at_step(state.step)
            optimizer.zero_grad()
            C = criterion(forward(x[batch]), y[batch])
            C.backward()
            optimizer.step()
            return C.detach()

        return _Engine(alone, settings.batch_size)

    shared = DistributedDataParallel(forward)

    def together(x: Tensor, y: Tensor, batch: Tensor) -> None:
        share = world.share(batch)
        if dropout is not None:
            dropout.at_step(state.step)
        optimizer.zero_grad()
        z = shared(x[share])
        # The share's part of the mean over all; an empty one's is 0, and not 0 / 0. Times the
        # number of processes, by which DistributedDataParallel divides the sum.
        C = criterion(z, y[share]) if len(share) else 0.0 * z.sum()
        (C * (len(share) * world.size / len(batch))).backward()
        optimizer.step()

    return _Engine(together, settings.batch_size)


def _with_dropout(layers: nn.Module, settings: Settings, world: World) -> WithDropout:
    """The network as it learns; each process leaves out others."""
    stream = data.stream(settings.seed, 3 + world.rank)
    return WithDropout(layers, input=settings.input_dropout, hidden=settings.dropout, stream=stream)


def with_graph(
    network: MLP, settings: Settings
) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Network and loss whose `backward()` fills in the gradients; every neuron is there."""
    if settings.engine == "autograd":
        return torch_twin(network), BUILT_IN_LOSSES[settings.loss]
    return network, LOSS_FUNCTIONS[settings.loss]


def _train_epoch(
    state: State,
    settings: Settings,
    split: data.Split,
    engine: _Engine,
    between: Callable[[], None],
) -> None:
    """One pass over the training data, or what is left of the one under way."""
    x, y = split
    if state.position == 0:
        state.drawn_from = state.generator.get_state()
    else:  # the same order again
        assert state.drawn_from is not None
        set_back(state.generator, state.drawn_from)
    order = data.order(len(x), state.generator, x.device)
    set_rate(state.optimizer, settings.rate_of(state.epoch))
    new = distorted(x, order, settings, state.epoch)
    began = time.perf_counter() - state.seconds
    while state.position < len(x):
        # (No mini-batch is longer than the data; PyTorch counts in 64 bits.)
        batches = order[state.position :][: engine.examples]
        if new is None:
            loss = engine.step(x, y, batches)
        else:
            images = new[state.position : state.position + len(batches)]
            loss = engine.step(images, y[batches], torch.arange(len(batches), device=x.device))
        if loss is not None:
            state.losses.append(loss)
        state.position += len(batches)
        state.step += -(-len(batches) // settings.batch_size)
        if state.position == len(x):
            break
        paused = time.perf_counter()
        state.seconds = paused - began
        between()
        began += time.perf_counter() - paused
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    state.seconds = time.perf_counter() - began
    state.epoch += 1
    state.position = 0
    _check_steps(state, settings)
    between()


def distorted(x: Tensor, order: Tensor, settings: Settings, epoch: int) -> data.Distorted | None:
    """The images of an epoch in their order, if the settings distort them."""
    if settings.distortion is None:
        return None
    return data.Distorted(x, order, settings.distortion, settings.seed, epoch)


def is_finite(network: MLP) -> bool:
    """Whether all parameters are finite numbers."""
    return all(bool(parameter.isfinite().all()) for parameter in network.parameters())


def _check_steps(state: State, settings: Settings) -> None:
    """Raise Diverged if a loss of the epoch's steps is no finite number."""
    losses, state.losses = state.losses, []
    if losses:
        wrong = (~torch.stack(losses).isfinite()).nonzero()
        if len(wrong):
            step = state.step - len(losses) + int(wrong[0]) + 1
            raise Diverged(_diverged(f"in epoch {state.epoch}, step {step}", settings))


def _diverged(when: str, settings: Settings) -> str:
    return (
        f"the loss is no longer a finite number {when}, with loss={settings.loss}, "
        f"lr={settings.lr}, momentum={settings.momentum}, l2={settings.l2}, "
        f"init={settings.init}, seed={settings.seed}; try a smaller learning rate"
    )


# ------------------------------------------------------------------------------------- evaluation


class Evaluation(NamedTuple):
    """How good a network is on a split."""

    loss: float
    """C, at least 0."""
    accuracy: float
    """In [0, 1]."""


Output = Callable[[Tensor], Tensor]
"""A network, or what stands for it: z of the last layer, [n, n_out], of inputs [n, n_in]."""


def records(
    outputs: Sequence[Output],
    networks: Sequence[MLP],
    losses: Sequence[Loss],
    measured: Mapping[str, data.Split],
    *,
    epoch: int,
    step: int,
    seconds: float,
    threads: int = 1,
) -> list[Record]:
    """A record of each of some networks, at the end of an epoch.

    Args:
        outputs: of each network.
        networks: the same ones, for the figures of their layers.
        losses: what each is trained with.
        measured: what they are measured on, by name; "validation" at least.
        epoch, step, seconds: where training is, and what the epoch took.
        threads: how many networks to measure at once.
    """
    x, y = (part[:_LAYER_EXAMPLES] for part in measured["validation"])

    def record(output: Output, network: MLP, loss: Loss) -> Record:
        by_split = {name: evaluate(output, split, loss) for name, split in measured.items()}
        return Record(
            epoch,
            step,
            seconds,
            loss={name: evaluation.loss for name, evaluation in by_split.items()},
            accuracy={name: evaluation.accuracy for name, evaluation in by_split.items()},
            layers=layer_figures(network, x, y, loss),
        )

    if min(threads, len(networks)) == 1:
        return list(map(record, outputs, networks, losses))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(record, outputs, networks, losses))


@torch.no_grad()
def evaluate(output: Output, split: data.Split, loss: Loss) -> Evaluation:
    """C and accuracy of a network on a split.

    Args:
        output: the network.
        split: of one-hot targets.
        loss: by which C is meant.
    """
    n, device = len(split.x), split.x.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    right = torch.zeros((), dtype=torch.float64, device=device)
    for x, y in zip(
        split.x.split(_EVALUATION_CHUNK), split.y.split(_EVALUATION_CHUNK), strict=True
    ):
        z = output(x)
        # In float64, where PyTorch's log1p takes a third of the time it takes in float32.
        total += LOSSES[loss].value(z.double(), y.double()).sum()
        # 1 where the largest output is the right one.
        right += y.gather(-1, z.argmax(-1, keepdim=True)).sum(dtype=torch.float64)
    return Evaluation(total.item() / n, right.item() / n)
