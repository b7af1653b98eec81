"""The training step of each engine: from examples to changed parameters."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from nnce import data, rules
from nnce.algorithm import deltas
from nnce.engines.ensemble import Ensemble
from nnce.functional import LOSS_FUNCTIONS
from nnce.losses import Loss
from nnce.modules import MLP
from nnce.training.dropout import WithDropout
from nnce.training.parallel import World
from nnce.training.settings import ENSEMBLE_ENGINES, Settings
from nnce.training.state import State
from nnce.training.twin import BUILT_IN_LOSSES, torch_twin


class Stepper(NamedTuple):
    """The training step of an engine, and the number of examples it takes."""

    step: Callable[[Tensor, Tensor, Tensor], Tensor | None]
    """step(x, y, rows) trains on these rows of x and y. Returns the loss before the step, or None
    if the engine does not compute it."""
    chunk: int
    """Number of examples per call: one mini-batch, or several for an `Ensemble`."""


def make_stepper(state: State, settings: Settings) -> Stepper:
    """Create the step of the settings' engine for a state."""
    if isinstance(state.optimizer, Ensemble):
        return _by_ensemble(state.optimizer, settings)
    if settings.engine in ENSEMBLE_ENGINES:
        return _by_rules(state, settings, state.optimizer)
    return _by_graph(state, settings, state.optimizer)


def _by_ensemble(ensemble: Ensemble, settings: Settings) -> Stepper:
    def step(x: Tensor, y: Tensor, rows: Tensor) -> None:
        ensemble.train_epoch(x, y, rows)

    most = None if settings.distortion is None else data.MAX_CHUNK
    return Stepper(step, ensemble.max_chunk(at_most=most))


def _by_rules(state: State, settings: Settings, optimizer: torch.optim.Optimizer) -> Stepper:
    """Step by the rules in several processes, with summed gradients."""
    world, gradients = state.world, FlatGradients(state.network)

    def step(x: Tensor, y: Tensor, rows: Tensor) -> None:
        share = world.share(rows)
        gradients.fill(x[share], y[share], settings.loss, n=len(rows))
        optimizer.step()

    return Stepper(step, settings.batch_size)


def _by_graph(state: State, settings: Settings, optimizer: torch.optim.Optimizer) -> Stepper:
    """Step by PyTorch's graph, of nnce's Functions or built-in ones, in one process or several."""
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
        # The mean over an empty share would be NaN.
        C = criterion(z, y[share]) if len(share) else 0.0 * z.sum()
        if world.joined:
            # From the mean over the share to its part of the mean over all examples. The factor
            # world.size cancels DistributedDataParallel's division of the gradients.
            C = C * (len(share) * world.size / len(rows))
        C.backward()
        optimizer.step()
        return None if world.joined else C.detach()

    return Stepper(step, settings.batch_size)


def with_dropout(layers: nn.Module, settings: Settings, world: World) -> WithDropout:
    """Add dropout to a network; each process has its own random stream.

    Args:
        layers: the network, or its `torch.nn` twin.
        settings: settings of the run; only dropout, input_dropout and seed are used.
        world: the processes that train together.

    Returns:
        A module whose `at_step` must be called before each step.

    >>> settings = nnce.training.Settings(hidden=(8,), dropout=0.5)
    >>> state = nnce.training.initial_state(settings, nnce.data.load("digits"))
    >>> module = nnce.training.with_dropout(state.network, settings, state.world)
    >>> module.at_step(0)
    >>> module(torch.zeros(4, 64)).shape
    torch.Size([4, 10])
    """
    stream = data.stream(settings.seed, 3 + world.rank)
    return WithDropout(layers, input=settings.input_dropout, hidden=settings.dropout, stream=stream)


def with_graph(
    network: MLP, settings: Settings
) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Network and loss for training in PyTorch's graph, without dropout.

    Args:
        network: an MLP.
        settings: settings of the run; only engine and loss are used.

    Returns:
        For engine "autograd", modules of `torch.nn` that share the network's parameters, and a
        built-in loss; otherwise the network itself and nnce's loss. The loss takes z and y
        [n, n_out] and returns a scalar.

    >>> network, settings = nnce.MLP((2, 1)), nnce.training.Settings(engine="functions")
    >>> module, loss = nnce.training.with_graph(network, settings)
    >>> module is network, loss is nnce.sigmoid_cross_entropy
    (True, True)
    """
    if settings.engine == "autograd":
        return torch_twin(network), BUILT_IN_LOSSES[settings.loss]
    return network, LOSS_FUNCTIONS[settings.loss]


class FlatGradients:
    """Gradients of a network by the rules, in one flat tensor, summed over all processes.

    Args:
        network: an MLP; the `grad` of each parameter becomes a view of the flat tensor.
    """

    def __init__(self, network: MLP) -> None:
        self._layers = [(W.detach(), b.detach()) for W, b in network.weights_and_biases()]
        parameters = [p for pair in network.weights_and_biases() for p in pair]
        like = parameters[0]
        self._flat = like.new_zeros(sum(p.numel() for p in parameters))
        places = self._flat.split([p.numel() for p in parameters])
        self._places = [place.view_as(p) for place, p in zip(places, parameters, strict=True)]
        for parameter, place in zip(parameters, self._places, strict=True):
            parameter.grad = place

    @torch.no_grad()
    def fill(self, x: Tensor, y: Tensor, loss: Loss, n: int) -> None:
        """Compute the gradients of C, averaged over the n examples of a mini-batch.

        Must be called by all processes, each with its share.

        Args:
            x: inputs of this process's share, [share, n_in].
            y: targets of the share, [share, n_out].
            loss: "quadratic" or "cross-entropy".
            n: number of examples in all shares.
        """
        _, a, dz = deltas(self._layers, x, y, loss)
        places = iter(self._places)
        for of_layer, a_prev in zip(dz, [x, *a[:-1]], strict=True):
            next(places).copy_(rules.dW(of_layer, a_prev))  # (6), summed over the share
            next(places).copy_(rules.db(of_layer))  # (6)
        self._flat.div_(n)
        distributed.all_reduce(self._flat)
