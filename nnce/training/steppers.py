"""One training step by each engine: what turns some examples into a change of the parameters."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnce import data
from nnce.dropout import WithDropout
from nnce.ensemble import Ensemble
from nnce.functional import LOSS_FUNCTIONS
from nnce.modules import MLP
from nnce.parallel import FlatGradients, World
from nnce.reference import BUILT_IN_LOSSES, torch_twin
from nnce.training.settings import ENSEMBLE_ENGINES, Settings
from nnce.training.state import State


class Stepper(NamedTuple):
    """How an engine takes steps."""

    step: Callable[[Tensor, Tensor, Tensor], Tensor | None]
    """Trains on the examples of x and y with these numbers; returns the loss before the step where
    the engine computes it."""
    chunk: int
    """Examples for each call: a mini-batch, or several for an `Ensemble`."""


def make_stepper(state: State, settings: Settings) -> Stepper:
    """The engine of the settings, for this network, optimizer and world."""
    if isinstance(state.optimizer, Ensemble):
        return _by_ensemble(state.optimizer, settings)
    if settings.engine in ENSEMBLE_ENGINES:
        return _by_rules(state, settings, state.optimizer)
    return _by_graph(state, settings, state.optimizer)


def _by_ensemble(ensemble: Ensemble, settings: Settings) -> Stepper:
    def step(x: Tensor, y: Tensor, rows: Tensor) -> None:
        ensemble.train_epoch(x, y, rows)

    most = None if settings.distortion is None else data.A_STRETCH
    return Stepper(step, ensemble.stretch(most=most))


def _by_rules(state: State, settings: Settings, optimizer: torch.optim.Optimizer) -> Stepper:
    """The rules in several processes, whose gradients are summed."""
    world, gradients = state.world, FlatGradients(state.network)

    def step(x: Tensor, y: Tensor, rows: Tensor) -> None:
        share = world.share(rows)
        gradients.fill(x[share], y[share], settings.loss, n=len(rows))
        optimizer.step()

    return Stepper(step, settings.batch_size)


def _by_graph(state: State, settings: Settings, optimizer: torch.optim.Optimizer) -> Stepper:
    """A graph of nnce's Functions or of PyTorch's own, in one process or several."""
    world = state.world
    network, criterion = with_graph(state.network, settings)
    dropout = with_dropout(network, settings, world) if settings.has_dropout else None
    forward: nn.Module = dropout or network
    if world.joined:
        forward = DistributedDataParallel(forward)

    def step(x: Tensor, y: Tensor, rows: Tensor) -> Tensor | None:
        share = world.share(rows)
        if dropout is not None:
            dropout.at_step(state.cursor.step)
        optimizer.zero_grad()
        z = forward(x[share])
        # The mean over an empty share would be 0 / 0.
        C = criterion(z, y[share]) if len(share) else 0.0 * z.sum()
        if world.joined:
            # The share's part of the mean over all examples, times the number of processes, by
            # which DistributedDataParallel divides the sum of the gradients.
            C = C * (len(share) * world.size / len(rows))
        C.backward()
        optimizer.step()
        return None if world.joined else C.detach()

    return Stepper(step, settings.batch_size)


def with_dropout(layers: nn.Module, settings: Settings, world: World) -> WithDropout:
    """The network with dropout; each process draws from a stream of its own."""
    stream = data.stream(settings.seed, 3 + world.rank)
    return WithDropout(layers, input=settings.input_dropout, hidden=settings.dropout, stream=stream)


def with_graph(
    network: MLP, settings: Settings
) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Network and loss whose `backward()` computes the gradients, without dropout."""
    if settings.engine == "autograd":
        return torch_twin(network), BUILT_IN_LOSSES[settings.loss]
    return network, LOSS_FUNCTIONS[settings.loss]
