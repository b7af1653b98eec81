"""`Ensemble`: networks trained side by side by the revised algorithm.

The engine is compiled loops (`nnce.engines.loops`) for small networks on a CPU, otherwise matrix
products (`nnce.engines.products`).
"""

import itertools
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nnce import _torch_private, kernels
from nnce._arguments import check_alike, check_size, is_integer, is_number, is_size, plain
from nnce._memory import check_memory, dashed
from nnce.algorithm import Hyperparameters
from nnce.engines import loops
from nnce.engines.loops import Loops
from nnce.engines.products import Products, block_examples
from nnce.losses import check_loss
from nnce.modules import MLP

Engine = Literal["loops", "products"]
ENGINES: tuple[Engine, ...] = get_args(Engine)

# Number of multiplications in the largest product of a step below which one thread is fastest.
_MULTIPLICATIONS_FOR_THREADS = 10_000_000
# Weights times examples in a chunk, which takes a few tenths of a second.
CHUNK_WORK = 10_000_000_000


class Ensemble:
    """Train networks of one shape side by side, by the rules, without autograd.

    Like an optimizer, an ensemble changes its networks in place. Each remains an ordinary `MLP`,
    which can be evaluated, saved or differentiated. As with any optimizer, a loss computed before
    an epoch cannot be differentiated after it.

    The result matches `torch.optim.SGD` with the gradients of `nnce.backprop`, up to rounding:
    g += weight_decay W for weights only, v = momentum v + g, W −= lr v.

    The engine is chosen at the first epoch, from the sizes and the inputs, and kept (see
    `suits_loops`). With loops, a network's bits do not depend on the other networks or the number
    of threads. With products they may, and from the first epoch on the parameters of the networks
    are views of shared memory.

    Args:
        networks: one or more MLPs of the same sizes, dtype and device.
        hyperparameters: one for each network.
        batch_size: number of examples in a mini-batch; the last one of an epoch may be shorter.
        engine: "loops" or "products"; None for the faster one.
        threads: number of threads among which loops divide the networks; None for the number of
            processors. A larger number warns. Products use PyTorch's threads
            (`torch.set_num_threads`).
        graph: replay the steps of products as a CUDA graph; no effect on a CPU.

    Raises:
        ValueError: there is no network; networks differ in shape, dtype or device; a network occurs
            twice, is frozen, reparametrized or pruned, has hooks (which would not be called) or was
            created under inference_mode; the numbers of networks and hyperparameters differ; a
            value is out of range; or engine "loops" is requested on CUDA, or without a working
            Numba.
        TypeError: an argument is not an MLP or Hyperparameters, or engine "loops" is requested for
            a dtype other than float32 and float64.
        MemoryError: the ensemble would not fit into memory; the message states how much it needs.

    >>> networks = [nnce.MLP((2, 3, 1)) for _ in range(2)]
    >>> rates = [nnce.Hyperparameters("cross-entropy", lr=lr) for lr in (0.1, 1.0)]
    >>> ensemble = nnce.Ensemble(networks, rates, batch_size=2, engine="products")
    >>> x, y = torch.rand(10, 2), torch.zeros(10, 1)
    >>> ensemble.train_epoch(x, y, torch.randperm(10))  # returns the number of steps
    5
    """

    def __init__(
        self,
        networks: Sequence[MLP],
        hyperparameters: Sequence[Hyperparameters],
        *,
        batch_size: int,
        engine: Engine | None = None,
        threads: int | None = None,
        graph: bool = True,
    ) -> None:
        if isinstance(networks, MLP):
            raise TypeError("expected a sequence of networks, got one nnce.MLP: put it in a list")
        self._networks = tuple(networks)
        self._hyperparameters = _check(self._networks, tuple(hyperparameters), batch_size)
        self._batch_size = int(batch_size)
        threads = None if threads is None else check_size("threads", threads)
        processors = os.cpu_count() or 1
        if threads is not None and threads > processors:
            warnings.warn(
                f"threads={threads}: this machine has {processors} processors", stacklevel=2
            )
        self._parameters = [_parameters(network) for network in self.networks]
        like = self._parameters[0][0]
        self.sizes, self.device, self.dtype = self.networks[0].sizes, like.device, like.dtype
        check_engine(engine, self.device, self.dtype)
        check_memory(self.sizes, len(self.networks), dtype=self.dtype, device=self.device)
        self._engine, self._threads, self._graph = engine, threads, graph
        self._trainer: Loops | Products | None = None
        self._dense = False
        self._places: list[list[_Place]] = []

    @property
    def networks(self) -> tuple[MLP, ...]:
        """The networks, which are trained in place."""
        return self._networks

    @property
    def hyperparameters(self) -> tuple[Hyperparameters, ...]:
        """The hyperparameters of each network."""
        return self._hyperparameters

    @property
    def batch_size(self) -> int:
        """Number of examples in a mini-batch."""
        return self._batch_size

    @property
    def engine(self) -> Engine | None:
        """The requested engine, or the one chosen at the first epoch; None before that."""
        return self._engine

    def set_lrs(self, lrs: Sequence[float]) -> None:
        """Set the learning rates, one for each network.

        As with `torch.optim.SGD`, accumulated momentum is applied at the new rate.

        Raises:
            ValueError: the numbers of rates and networks differ, a rate is not positive, or a
                network's parameters have been moved or replaced, or have hooks.
            TypeError: a rate is not a number.
        """
        old = self.hyperparameters
        if len(lrs) != len(old):
            raise ValueError(f"expected a rate for each of the {len(old)} networks, got {len(lrs)}")
        new = _check_hyperparameters([h._replace(lr=lr) for h, lr in zip(old, lrs, strict=True)])
        if new == old:
            return
        self._hyperparameters = new
        if self._trainer is not None and self._engine is not None:
            for number in range(len(self.networks)):
                self._check_network(number)
            velocities = self._trainer.velocities()
            self._trainer = self._make_trainer(self._engine, self._dense)
            # Engines store −lr v.
            ratios = [h.lr / before.lr for h, before in zip(new, old, strict=True)]
            self._trainer.set_velocities(
                [torch.stack([u * c for u, c in zip(us, ratios, strict=True)]) for us in velocities]
            )

    def train_epoch(self, x: Tensor, y: Tensor, order: Tensor) -> int:
        """Train all networks for one epoch.

        On CUDA, only the check of the order is synchronous; the steps may still be running on
        return. After Ctrl-C, every network is at the end of a step, but not necessarily the same
        step.

        Args:
            x: inputs [N, n_in], on the ensemble's device.
            y: targets in [0, 1], [N, n_out].
            order: indices of the examples in the order of this epoch, on the device: [n] for all
                networks, or [networks, n], one row per network.

        Returns:
            The number of steps that each network took.

        Raises:
            ValueError: shapes or devices do not match the networks, or a network's parameters have
                been moved, replaced or frozen, or have hooks.
            TypeError: an argument is not a tensor, or its dtype does not match the networks.
            IndexError: an index in the order is out of range; no step has been taken.
        """
        self._check_data(x, y, order)
        for number in range(len(self.networks)):
            _check_trains(self._check_network(number))
        trainer = self._trainer_for(x)
        if isinstance(trainer, Loops):
            orders = order if order.dim() == 2 else order.expand(len(self.networks), -1)
            trainer.train(x, y, list(orders), self._threads or os.cpu_count() or 1)
        else:
            trainer.train(x, y, order)
        return -(-order.shape[-1] // self.batch_size)

    def _trainer_for(self, x: Tensor) -> Loops | Products:
        if self._trainer is None:
            density = loops.density(x) if self.device.type == "cpu" else 1.0
            if self._engine is None:
                suits = suits_loops(self.sizes, self.batch_size, self.dtype, self.device, density)
                self._engine = "loops" if suits else "products"
            self._trainer = self._make_trainer(self._engine, density > loops.DENSE)
        return self._trainer

    def _make_trainer(self, engine: Engine, dense: bool) -> Loops | Products:
        self._dense = dense
        if engine == "loops":
            return Loops(self.networks, self.hyperparameters, self.batch_size, dense=dense)
        products = Products(self.networks, self.hyperparameters, self.batch_size, graph=self._graph)
        self._places = [[_place_of(p) for p in ps] for ps in self._parameters]
        return products

    def max_chunk(self, networks: int | None = None, at_most: int | None = None) -> int:
        """Number of examples in the chunks into which an order may be divided.

        Consecutive `train_epoch` calls for the chunks of an order produce the same bits as one call
        for the whole order. A chunk takes a few tenths of a second.

        Args:
            networks: number of networks to assume; None for those of this ensemble.
            at_most: upper limit, exceeded only if the shortest possible chunk is longer.
        """
        networks = len(self.networks) if networks is None else networks
        step = block_examples(self.sizes, self.batch_size, networks, self.dtype, self.device)
        weights = sum(n_in * n_out for n_in, n_out in itertools.pairwise(self.sizes))
        examples = CHUNK_WORK // (weights * networks)
        return step * max(1, (examples if at_most is None else min(examples, at_most)) // step)

    def state_dict(self) -> dict[str, Any]:
        """The state to save in addition to the networks' parameters.

        "lrs", the learning rates; "engine", None before the first epoch; "dense", whether loops
        process inputs that are 0, too; "velocities", −lr v of each parameter, [networks, *shape],
        [] without momentum.
        """
        trainer = self._trainer
        return {
            "lrs": [h.lr for h in self.hyperparameters],
            "engine": None if trainer is None else self._engine,
            "dense": self._dense,
            "velocities": [] if trainer is None else trainer.velocities(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, in an ensemble that has not trained yet.

        Raises:
            ValueError: the state does not match, or its engine is not available, or the ensemble
                has already trained.
            TypeError: the engine of the state does not support the dtype.
        """
        engine, velocities = state["engine"], list(state["velocities"])
        if self._trainer is not None:
            raise ValueError("expected an ensemble that has not trained yet; make a new Ensemble")
        self.set_lrs(state["lrs"])
        if engine is None:
            return
        if self._engine not in (None, engine):
            raise ValueError(f"expected a state of engine {self._engine!r}, got {engine!r}")
        check_engine(engine, self.device, self.dtype)
        moving = any(h.momentum for h in self.hyperparameters)
        R = len(self.networks)
        expected = [((R, *p.shape), self.dtype) for p in self._parameters[0]] if moving else []
        found = [(tuple(velocity.shape), velocity.dtype) for velocity in velocities]
        if found != expected:
            raise ValueError(f"expected velocities of {expected}, got {found}")
        self._engine = engine
        self._trainer = self._make_trainer(engine, bool(state["dense"]))
        self._trainer.set_velocities(velocities)

    @torch.no_grad()
    def outputs(self, number: int, x: Tensor) -> Tensor:
        """z of the last layer of one network, like `networks[number](x)`; by loops if in use.

        Thread-safe for different networks.

        Args:
            number: index of the network.
            x: inputs [n, n_in], on the ensemble's device and in its dtype.

        Returns:
            [n, n_out].

        Raises:
            IndexError: there is no network with this index.
            ValueError: the shape or device of x does not match, or the network's parameters have
                been moved or replaced, or have hooks.
            TypeError: x is not a tensor, or its dtype does not match the networks.
        """
        last = len(self.networks) - 1
        if not (is_integer(number) and 0 <= number <= last):
            raise IndexError(f"expected the number of a network, 0 to {last}, got {number!r}")
        number = int(number)
        self._check_network(number)
        check_alike({"the parameters": self._parameters[0][0], "x": x})
        if x.dim() != 2 or x.shape[1] != self.sizes[0]:
            raise ValueError(f"expected x of shape (n, {self.sizes[0]}), got {tuple(x.shape)}")
        if isinstance(self._trainer, Loops):
            return self._trainer.outputs(number, x)
        z: Tensor = self.networks[number](x)
        return z

    def _check_network(self, number: int) -> list[nn.Parameter]:
        """Raise ValueError if a parameter was replaced or moved: it would silently not train.

        Returns:
            The network's parameters.
        """
        parameters, now = self._parameters[number], _check_network(self.networks[number])
        if not all(a is b for a, b in zip(now, parameters, strict=True)):
            raise ValueError(
                "expected the parameters the ensemble was made with, but some have been replaced; "
                "make a new Ensemble"
            )
        if any((p.dtype, p.device) != (self.dtype, self.device) for p in now):
            raise ValueError(
                f"expected the networks' parameters in {self.dtype} on {self.device}, but some "
                f"have been moved; make a new Ensemble"
            )
        if self._places and [_place_of(p) for p in parameters] != self._places[number]:
            raise ValueError(
                "expected the networks' parameters in the ensemble's memory, but some have been "
                "moved, by .to() or by another ensemble; make a new Ensemble"
            )
        return now

    def _check_data(self, x: Tensor, y: Tensor, order: Tensor) -> None:
        check_alike({"the parameters": self._parameters[0][0], "x": x, "y": y})
        if not isinstance(order, Tensor):
            raise TypeError(f"expected order to be a tensor, got {type(order).__name__}")
        if order.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"expected an order of whole numbers (int64), got {order.dtype}")
        for name, tensor, size in (("x", x, self.sizes[0]), ("y", y, self.sizes[-1])):
            if tensor.dim() != 2 or tensor.shape[1] != size:
                raise ValueError(f"expected {name} of shape (n, {size}), got {tuple(tensor.shape)}")
        if len(x) != len(y):
            raise ValueError(f"expected as many targets as inputs, got {len(x)} and {len(y)}")
        R = len(self.networks)
        fits = order.dim() == 1 or (order.dim() == 2 and len(order) == R)
        if not fits or not order.numel() or order.device != self.device:
            raise ValueError(
                f"expected an order of at least one index, of shape (n,) or ({R}, n), on "
                f"{self.device}, got {tuple(order.shape)} on {order.device}"
            )
        first, last = (int(index) for index in order.aminmax())
        if first < 0 or last >= len(x):
            raise IndexError(
                f"expected an order of indices from 0 to {len(x) - 1}, got {first} to {last}"
            )


# --------------------------------------------------------------------------- choice of the engine


def suits_loops(
    sizes: Sequence[int],
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    density: float,
) -> bool:
    """Whether loops are available and faster than products for these networks and inputs.

    Compares estimated times per example in nanoseconds, fitted to measurements of 20 networks on
    one core of an AMD EPYC (2026-11-25):

    - loops, with widths padded to multiples of 32: 350, plus 0.13 per first-layer weight with a
      nonzero input (0.085 per first-layer weight if all inputs are processed), plus 0.15 per other
      weight; a network uses one thread.
    - products: 1.2 per input, for gathering, plus 0.042 per weight; per mini-batch, 9,000 per layer
      for calls, plus 0.19 per weight for the update; half of the total if PyTorch's threads pay.

    Args:
        sizes: sizes of the networks.
        batch_size: number of examples in a mini-batch.
        dtype, device: dtype and device of the networks.
        density: share of inputs that are not 0, in [0, 1].
    """
    if device.type != "cpu" or dtype not in loops.DTYPES:
        return False
    layers = list(itertools.pairwise(sizes))
    first, *above = (n_in * loops.padded_width(n_out) for n_in, n_out in layers)
    of_first = 0.13 * density if density <= loops.DENSE else 0.085
    by_loops = 350 + of_first * first + 0.15 * sum(above)
    weights = sum(n_in * n_out for n_in, n_out in layers)
    by_products = 1.2 * sizes[0] + 0.042 * weights
    by_products += (9_000 * len(layers) + 0.19 * weights) / batch_size
    faster = by_loops < (by_products / 2 if _threads_pay(sizes, batch_size) else by_products)
    return faster and loops.is_available()


def threads(sizes: Sequence[int], batch_size: int) -> int:
    """The fastest number of PyTorch CPU threads for networks of these sizes: 1, or the default.

    A second thread adds a few microseconds to each product, too much for small networks. (Loops
    have their own threads.)
    """
    return torch.get_num_threads() if _threads_pay(sizes, batch_size) else 1


def _threads_pay(sizes: Sequence[int], batch_size: int) -> bool:
    largest = max(n_in * n_out for n_in, n_out in itertools.pairwise(sizes))
    return batch_size * largest >= _MULTIPLICATIONS_FOR_THREADS


def check_engine(engine: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise as `Ensemble` does unless the engine is available for this device and dtype."""
    if engine not in (None, *ENGINES):
        raise ValueError(f"expected engine {' or '.join(map(repr, ENGINES))}, got {engine!r}")
    if engine != "loops":
        return
    if dtype not in loops.DTYPES:
        raise TypeError(f"expected float32 or float64 for engine 'loops', got {dtype}")
    if device.type != "cpu":
        raise ValueError(f"expected networks on the CPU for engine 'loops', got {device}")
    problem = kernels.numba_problem()
    if problem is not None:
        raise ValueError(f"expected a working Numba for engine 'loops', but {problem}")


def _parameters(network: MLP) -> list[nn.Parameter]:
    """Weight and bias of each layer."""
    return [p for pair in network.weights_and_biases() for p in pair]


_Place = tuple[int, tuple[int, ...], bool]


def _place_of(parameter: nn.Parameter) -> _Place:
    return parameter.data_ptr(), parameter.stride(), parameter.is_neg()


def _check_trains(parameters: Sequence[nn.Parameter]) -> None:
    if not all(parameter.requires_grad for parameter in parameters):
        raise ValueError("expected networks to train, but one has parameters that are frozen")


def _check_network(network: MLP) -> list[nn.Parameter]:
    """Raise ValueError where training by the rules would differ from PyTorch's.

    Returns:
        The network's parameters.
    """
    parameters = _parameters(network)
    for parameter in parameters:
        if parameter.is_inference():
            raise ValueError(
                "expected networks that autograd can use, but one was made under inference_mode"
            )
        if _torch_private.tensor_hooks_of(parameter):
            raise ValueError("expected no hooks, which are not called, but a parameter has some")
    for module in network.modules():
        if _torch_private.hooks_of(module):
            kind = type(module).__name__
            raise ValueError(f"expected no hooks, which are not called, but a {kind} has some")
    return parameters


def _check(
    networks: Sequence[MLP], hyperparameters: Sequence[Hyperparameters], batch_size: object
) -> tuple[Hyperparameters, ...]:
    """Check the arguments of an ensemble; return hyperparameters with plain Python numbers."""
    if not networks:
        raise ValueError("expected at least one network, got none")
    parameters: list[nn.Parameter] = []
    for network in networks:
        if not isinstance(network, MLP):
            raise TypeError(f"expected networks to be nnce.MLPs, got {type(network).__name__}")
        of_network = _check_network(network)
        _check_trains(of_network)
        parameters += of_network
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise ValueError("expected networks without common parameters, but one occurs twice")
    kinds = {
        (network.sizes, parameter.dtype, parameter.device)
        for network in networks
        for parameter in network.parameters()
    }
    if len(kinds) > 1:
        kinds_in_words = "; ".join(
            f"{dashed(sizes)} in {dtype} on {device}"
            for sizes, dtype, device in sorted(kinds, key=str)
        )
        raise ValueError(f"expected networks of one shape, dtype and device, got {kinds_in_words}")
    if len(hyperparameters) != len(networks):
        raise ValueError(
            f"expected hyperparameters for each of the {len(networks)} networks, got "
            f"{len(hyperparameters)}"
        )
    checked = _check_hyperparameters(hyperparameters)
    if not is_size(batch_size):
        raise ValueError(f"expected a batch_size of at least 1, a whole number, got {batch_size!r}")
    return checked


def _check_hyperparameters(
    hyperparameters: Sequence[Hyperparameters],
) -> tuple[Hyperparameters, ...]:
    for h in hyperparameters:
        if not isinstance(h, Hyperparameters) or not all(
            map(is_number, (h.lr, h.momentum, h.weight_decay))
        ):
            raise TypeError(f"expected Hyperparameters of numbers for each network, got {h!r}")
        check_loss(h.loss)
        if not (0 < h.lr < math.inf and 0 <= h.momentum < 1 and 0 <= h.weight_decay < math.inf):
            raise ValueError(
                f"expected lr > 0, momentum in [0, 1) and weight_decay of at least 0, got {h}"
            )
    return tuple(Hyperparameters(h.loss, *map(plain, h[1:])) for h in hyperparameters)
