"""Engine "products": matrix products in place, without a graph, for many networks side by side.

For large networks, and for CUDA; `nnce.engines.loops` is faster for small networks on a CPU. The
equations are those of `nnce.algorithm`, which should be read first. Speed comes from:

- No allocation in a step: memory for every z, a and delta is allocated once.
- Updating a parameter in the call that computes its gradient: W ← β W + α dzᵀ a_prev, where
  α = −lr / n is the step and β = 1 − lr · weight_decay the decay.
- On CUDA, one group of all networks: each product is one call for all of them, and the steps of a
  block are captured once as a graph and replayed. On a CPU, where a large network alone uses all
  cores, each network is its own group.

Shapes, for a group of G networks and a mini-batch of n: [G, n, neurons]. Inputs and targets are
[1, n, …] if all networks have the same order of the examples, otherwise [G, n, …].
"""

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnce.algorithm import Hyperparameters
from nnce.losses import LOSSES
from nnce.modules import MLP

# Examples are gathered in blocks of mini-batches of about this many bytes. On a CPU, a block stays
# in the cache until the steps read it. On CUDA, a block is one graph, of enough steps to amortize
# its launch.
BLOCK_BYTES = 1_000_000
BLOCK_BYTES_CUDA = 1_000_000_000
_BLOCK_STEPS_CUDA = 100


Call = Callable[..., object]


class Products:
    """Train networks of one shape by products; their parameters become views of shared memory.

    The arguments are those of `Ensemble`.
    """

    def __init__(
        self,
        networks: Sequence[MLP],
        hyperparameters: Sequence[Hyperparameters],
        batch_size: int,
        *,
        graph: bool,
    ) -> None:
        self._like = networks[0].weights_and_biases()[0][0].detach()
        self._sizes, self._batch_size = networks[0].sizes, batch_size
        self._graph = graph and captures_graphs(self._like.device)
        everyone = list(range(len(networks)))
        together = [everyone] if batches_networks(self._like.device) else [[r] for r in everyone]
        with torch.inference_mode(False):  # otherwise the networks could not be differentiated
            self._groups = [_Group(members, networks, hyperparameters) for members in together]
        self._parameters = [
            p for network in networks for pair in network.weights_and_biases() for p in pair
        ]
        self._blocks: dict[tuple[int, int], _Block] = {}

    def train(self, x: Tensor, y: Tensor, order: Tensor) -> None:
        """As `Ensemble.train_epoch`."""
        try:
            # Not no_grad(), under which each of a step's dozen small calls takes a little longer.
            with torch.inference_mode():
                orders = 1 if order.dim() == 1 else max(group.size for group in self._groups)
                step = orders * self._batch_size * self._sizes[0] * self._like.itemsize
                steps = _block_steps(step, self._like.device)
                n = min(steps * self._batch_size, order.shape[-1])
                for indices in order.split(n, dim=-1):
                    self._block(orders, indices.shape[-1]).run(x, y, indices)
        finally:
            # Parameters were changed in place outside autograd: bump their versions so that stale
            # graphs raise.
            torch.autograd.graph.increment_version(self._parameters)

    def velocities(self) -> list[Tensor]:
        """As `Loops.velocities`."""
        return [
            torch.stack([by_network[r] for r in range(len(by_network))])
            for by_network in self._by_network()
        ]

    def set_velocities(self, velocities: Sequence[Tensor]) -> None:
        """Set the velocities to values that `velocities` returned."""
        for by_network, values in zip(self._by_network(), velocities, strict=True):
            for r, velocity in by_network.items():
                velocity.copy_(values[r])

    def _by_network(self) -> list[dict[int, Tensor]]:
        """For each parameter, a view of the velocity of each network."""
        found: list[dict[int, Tensor]] = []
        moves = any(p.velocity is not None for g in self._groups for pair in g.layers for p in pair)
        for layer in range(len(self._sizes) - 1 if moves else 0):
            for is_b in (False, True):
                by_network: dict[int, Tensor] = {}
                for group in self._groups:
                    value, velocity, *_ = group.layers[layer][is_b]
                    velocity = torch.zeros_like(value) if velocity is None else velocity
                    velocity = velocity.squeeze(1) if is_b else velocity
                    by_network.update(zip(group.members, velocity, strict=True))
                found.append(by_network)
        return found

    def _block(self, orders: int, n: int) -> "_Block":
        """The block for n examples; an epoch has one for full blocks and one for the last."""
        key = orders, n
        if key in self._blocks:
            self._blocks[key] = self._blocks.pop(key)  # most recently used last
        else:
            while len(self._blocks) > 1:
                del self._blocks[next(iter(self._blocks))]
            x, y = (self._like.new_empty(*key, size) for size in (self._sizes[0], self._sizes[-1]))
            self._blocks[key] = _Block(self._groups, x, y, self._batch_size, graph=self._graph)
        return self._blocks[key]


def _block_steps(step: int, device: torch.device) -> int:
    """Number of mini-batches of `step` bytes in a block."""
    if device.type == "cuda":
        return min(_BLOCK_STEPS_CUDA, max(1, BLOCK_BYTES_CUDA // step))
    return max(1, BLOCK_BYTES // step)


def block_examples(
    sizes: Sequence[int],
    batch_size: int,
    networks: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """A number of examples that fills whole blocks, with one order for all networks or one each.

    Training an epoch in chunks of this length does not shift the boundaries of its blocks.
    """
    step = batch_size * sizes[0] * dtype.itemsize
    orders = {1, networks if batches_networks(device) else 1}
    return batch_size * math.lcm(*(_block_steps(n * step, device) for n in orders))


def batches_networks(device: torch.device) -> bool:
    """Whether each call processes all networks at once."""
    return device.type == "cuda"


def captures_graphs(device: torch.device) -> bool:
    """Whether steps can be captured as a graph."""
    return device.type == "cuda"


# ------------------------------------------------------------------------------------ parameters


class _Parameter(NamedTuple):
    """W [G, n_out, n_in] or b [G, 1, n_out] of one layer of a group, with its update rule.

    A factor is a float if all networks share it, otherwise [G, 1, 1].
    """

    value: Tensor
    velocity: Tensor | None
    """−lr v; None without momentum."""
    momentum: float | Tensor
    decay: float | Tensor
    """Factor of the value in the step, 1 − lr · weight_decay."""
    shrink: Tensor | None
    """−lr · weight_decay, for the velocity; None without momentum or without decay."""


class _Group:
    """Networks trained in the same calls: their parameters, layer by layer, and their settings."""

    def __init__(
        self,
        members: list[int],
        networks: Sequence[MLP],
        hyperparameters: Sequence[Hyperparameters],
    ) -> None:
        # Quadratic losses first: only their last dz has the factor σ'(z).
        def slowed(r: int) -> bool:
            return LOSSES[hyperparameters[r].loss].has_sigmoid_prime

        self.members = sorted(members, key=lambda r: not slowed(r))
        self.size = len(members)
        self.slowed = sum(map(slowed, members))
        values = [hyperparameters[r] for r in self.members]
        by_network = [networks[r].weights_and_biases() for r in self.members]
        like = by_network[0][0][0]

        # Different rates are factors of the last dz, and thereby of all gradients.
        lrs = _factor([h.lr for h in values], like)
        self.lr = lrs if isinstance(lrs, float) else 1.0
        self.lrs = None if isinstance(lrs, float) else lrs

        decays = [-h.lr * h.weight_decay for h in values]
        momenta = [h.momentum for h in values]
        self.layers = [
            (
                _moving(_move_in([W for W, _ in layer]), momenta, decays),
                _moving(_move_in([b for _, b in layer]).unsqueeze(1), momenta, [0.0] * self.size),
            )
            for layer in zip(*by_network, strict=True)
        ]

    def state(self) -> list[Tensor]:
        """All tensors that a step changes."""
        return [
            tensor
            for layer in self.layers
            for parameter in layer
            for tensor in (parameter.value, parameter.velocity)
            if tensor is not None
        ]


def _move_in(parameters: list[nn.Parameter]) -> Tensor:
    """Stack a parameter of several networks, whose parameters become views of the stack."""
    like = parameters[0].detach()
    memory = like.new_empty(len(parameters), *like.shape)
    # One by one, each freeing its old memory, so that old and new copies do not all coexist.
    for parameter, place in zip(parameters, memory, strict=True):
        parameter.data = place.copy_(parameter.detach())
    return memory


def _moving(value: Tensor, momenta: list[float], decays: list[float]) -> _Parameter:
    """A parameter with its update rule; decays are −lr · weight_decay of each network."""
    moves = any(momenta)
    shrink = None
    if moves and any(decays):
        shrink = torch.as_tensor(_factor(decays, value), dtype=value.dtype, device=value.device)
    return _Parameter(
        value=value,
        velocity=torch.zeros_like(value) if moves else None,
        momentum=_factor(momenta, value),
        decay=_factor([1 + decay for decay in decays], value),
        shrink=shrink,
    )


def _factor(values: list[float], like: Tensor) -> float | Tensor:
    """One float for all networks, or [G, 1, 1]."""
    column = torch.tensor(values, dtype=like.dtype, device=like.device)
    if len(set(values)) == 1:
        return column[0].item()  # rounded to dtype; infinite if out of range
    return column.view(-1, 1, 1)


# ------------------------------------------------------------------------------------- the step


class _Place(NamedTuple):
    """One layer, and the memory of its a, dz and da for a mini-batch of n, [G, n, n_out] each."""

    W: _Parameter
    b: _Parameter
    a: Tensor
    """First z, then overwritten by a; in the last layer always z."""
    dz: Tensor
    da: Tensor


class _Step:
    """One step of gradient descent of a group of networks, for mini-batches of n."""

    def __init__(self, group: _Group, n: int) -> None:
        self._group = group
        self._alpha = -group.lr / n
        self._places = []
        for W, b in group.layers:
            a, dz, da = (W.value.new_empty(group.size, n, W.value.shape[1]) for _ in range(3))
            self._places.append(_Place(W, b, a, dz, da))
        self._ones = self._places[0].a.new_ones(group.size, 1, n)
        self._scratch = [torch.empty_like(self._places[-1].dz) for _ in range(2)]

    def calls(self, x: Tensor, y: Tensor, not_y: Tensor) -> list[Call]:
        """The calls of a step; x [G, n, n_in], y [G or 1, n, n_out], not_y is 1 − y.

        They are prepared once, because looking up about sixty attributes and taking the same
        branches in each step would take a fifth of its time.
        """
        return [*self._forward(x), *self._dz_last(y, not_y), *self._backward(x)]

    def _forward(self, a_prev: Tensor) -> Iterator[Call]:
        for place in self._places:
            W, b, z = place.W.value, place.b.value, place.a
            yield partial(torch.baddbmm, b, a_prev, W.mT, out=z)  # (1)
            if place is not self._places[-1]:
                yield partial(torch.sigmoid, z, out=place.a)  # (1), overwrites z
            a_prev = place.a

    def _dz_last(self, y: Tensor, not_y: Tensor) -> Iterator[Call]:
        group, last = self._group, self._places[-1]
        z, dz = last.a, last.dz
        a, not_a = self._scratch
        yield partial(torch.sigmoid, z, out=a)
        yield partial(torch.neg, z, out=not_a)
        yield partial(torch.sigmoid, not_a, out=not_a)  # σ(−z)
        yield partial(torch.mul, a, not_y, out=dz)
        yield partial(torch.addcmul, dz, y, not_a, value=-1, out=dz)  # (5)
        if group.slowed:
            a, not_a, slowed = (part[: group.slowed] for part in (a, not_a, dz))
            yield partial(torch.mul, a, not_a, out=a)  # σ'(z)
            yield partial(torch.mul, slowed, a, out=slowed)  # (4)
        if group.lrs is not None:
            yield partial(torch.mul, dz, group.lrs, out=dz)

    def _backward(self, x: Tensor) -> Iterator[Call]:
        downwards = self._places[::-1]
        for place, below in itertools.pairwise(downwards):
            # da of the layer below requires this layer's weights from before the update.
            yield partial(torch.bmm, place.dz, place.W.value, out=below.da)  # (7)
            yield from self._update(place, below.a)
            # (8): da ∘ a ∘ (1 − a), since z has been overwritten
            yield partial(_sigmoid_backward, below.da, below.a, grad_input=below.dz)
        yield from self._update(downwards[-1], x)

    def _update(self, place: _Place, a_prev: Tensor) -> Iterator[Call]:
        """Equation 6, averaged over the mini-batch, combined with the update."""
        add = partial(torch.baddbmm, alpha=self._alpha)
        for parameter, A, B in (
            (place.W, place.dz.mT, a_prev),
            (place.b, self._ones, place.dz),
        ):
            value, velocity = parameter.value, parameter.velocity
            if velocity is None:
                beta = yield from _scale(value, parameter.decay)
                yield partial(add, value, A, B, beta=beta, out=value)  # (6)
                continue
            # The velocity is −lr v, where v is that of torch.optim.SGD.
            beta = yield from _scale(velocity, parameter.momentum)
            yield partial(add, velocity, A, B, beta=beta, out=velocity)  # (6)
            if parameter.shrink is not None:
                yield partial(torch.addcmul, velocity, value, parameter.shrink, out=velocity)
            yield partial(torch.add, value, velocity, out=value)


# grad ∘ a ∘ (1 − a) in one pass: PyTorch's kernel for the backward of σ.
_sigmoid_backward: Call = torch.ops.aten.sigmoid_backward.grad_input


def _scale(tensor: Tensor, factor: float | Tensor) -> Generator[Call, None, float]:
    """Multiply each network by its factor; a common factor is returned as β of the product."""
    if isinstance(factor, float):
        return factor
    yield partial(torch.mul, tensor, factor, out=tensor)
    return 1.0


class _Block:
    """Consecutive mini-batches in fixed memory, and the calls that train each group on them."""

    def __init__(
        self,
        groups: list[_Group],
        x: Tensor,
        y: Tensor,
        batch_size: int,
        *,
        graph: bool,
    ) -> None:
        self._groups, self._x, self._y, self._not_y = groups, x, y, torch.empty_like(y)
        self._state = [tensor for group in groups for tensor in group.state()]
        n = min(batch_size, x.shape[1])
        batches = list(zip(*(t.split(n, dim=1) for t in (x, y, self._not_y)), strict=True))
        sizes = {batches[0][0].shape[1], batches[-1][0].shape[1]}
        self._calls: list[list[Call]] = []
        for group in groups:
            steps = {n: _Step(group, n) for n in sizes}
            self._calls.append(
                [
                    call
                    for x, y, not_y in batches
                    for call in steps[x.shape[1]].calls(x.expand(group.size, -1, -1), y, not_y)
                ]
            )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._wants_graph = graph

    def run(self, x: Tensor, y: Tensor, indices: Tensor) -> None:
        """Train on the examples of x and y at these indices, [n] for all, or [networks, n]."""
        if indices.dim() == 1:
            self._gather(x, y, indices)
        for group, calls in zip(self._groups, self._calls, strict=True):
            if indices.dim() == 2:
                self._gather(x, y, indices[group.members].flatten())
            self._run(calls)

    def _gather(self, x: Tensor, y: Tensor, indices: Tensor) -> None:
        """Copy the examples into fixed memory, where a captured graph reads them."""
        torch.index_select(x, 0, indices, out=self._x.view(-1, self._x.shape[-1]))
        torch.index_select(y, 0, indices, out=self._y.view(-1, self._y.shape[-1]))
        torch.neg(self._y, out=self._not_y)
        self._not_y.add_(1)

    def _run(self, calls: list[Call]) -> None:
        if self._wants_graph and self._graph is None:
            self._graph = self._capture(calls)
        if self._graph is not None:
            self._graph.replay()
        else:
            for call in calls:
                call()

    def _capture(self, calls: list[Call]) -> torch.cuda.CUDAGraph:
        """Capture the steps as a CUDA graph, after a warm-up whose changes are undone."""
        before = [tensor.clone() for tensor in self._state]
        stream = torch.cuda.Stream(self._x.device)
        stream.wait_stream(torch.cuda.current_stream(self._x.device))
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream(self._x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        for tensor, value in zip(self._state, before, strict=True):
            tensor.copy_(value)
        return graph
