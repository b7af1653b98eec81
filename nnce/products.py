"""The revised algorithm as matrix products: no graph, in place, many networks side by side.

The same equations as in `nnce.algorithm`, which is the one to read first. For large networks and
for CUDA; small ones on a CPU are faster as `nnce.loops`. What makes it fast:

- Nothing is allocated in a step: every z, a and delta has its place in memory, made once.
- Networks that see the same mini-batch have one first layer, G networks wide: its z is one matrix
  product. The layers above are batched products, G small ones in one call.
- Parameters are updated where their gradient is made: W ← β W + α dz a_prevᵀ is one call, in which
  α = −lr / n is the step and β = 1 − lr · weight_decay the decay.
- Networks are walked in groups whose first layers stay in the processor's cache.
- On CUDA the steps of a block are captured once as a graph and replayed.

Shapes, for a group of G networks and a mini-batch of n: the first layer is [n, G·h], each other one
[G, n, h]; a group of one network drops the G and is made of plain matrices.
"""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnce.algorithm import Hyperparameters
from nnce.losses import LOSSES
from nnce.memory import bytes_of
from nnce.modules import MLP

# Examples are gathered into mini-batches a block at a time, about this many bytes of them: they
# are still in the cache when the steps read them.
_BLOCK_BYTES = 1_000_000
# On CUDA a block is one graph: as many steps as keep its launch cheap.
_BLOCK_STEPS_CUDA = 100
# The rows of a first layer are filled up to a multiple of this: products of odd sizes leave the
# fast path of the matrix library (784-30-10: 14 µs against 9).
_ROWS = 16
# The parameters of a group of networks may take this much, or what one network takes.
CACHE_BYTES = 3_000_000


Call = Callable[..., Tensor]


class Products:
    """Trains networks of one shape side by side, whose parameters become views of its memory.

    Args:
        networks: MLPs of one shape, dtype and device.
        hyperparameters: one for each.
        batch_size: examples in a mini-batch.
        graph: replay the steps as a CUDA graph; has no meaning on a CPU.
        own_orders: whether each network has its own order of the examples; then they share no
            product.
    """

    def __init__(
        self,
        networks: Sequence[MLP],
        hyperparameters: Sequence[Hyperparameters],
        batch_size: int,
        *,
        graph: bool,
        own_orders: bool,
    ) -> None:
        """Move the parameters in."""
        like = networks[0].weights_and_biases()[0][0]
        size = group_size(networks[0].sizes, len(networks), like.dtype, like.device)
        # Sorted, so that most groups are of one loss and rate and need no masks.
        ranks = sorted(range(len(networks)), key=lambda r: hyperparameters[r])
        members = [ranks[i : i + size] for i in range(0, len(ranks), size)]
        if own_orders:
            members = [[r] for r in range(len(networks))]
        with torch.inference_mode(False):  # or the networks could not be differentiated any more
            groups = [
                _Group([networks[r] for r in group], [hyperparameters[r] for r in group])
                for group in members
            ]
        self._parameters = [
            p for network in networks for pair in network.weights_and_biases() for p in pair
        ]
        graph = graph and like.device.type == "cuda"
        together = [[group] for group in groups] if own_orders else [groups]
        self._walks = [
            _Walk(some, networks[0].sizes, batch_size, like, graph=graph) for some in together
        ]

    def train(self, x: Tensor, y: Tensor, orders: Sequence[Tensor]) -> None:
        """One pass over the training data.

        Args:
            x: inputs [N, n_in].
            y: targets [N, n_out].
            orders: of the examples, one for all networks or one for each.
        """
        try:
            # Not no_grad(): a step is a dozen small calls, and this saves a little at each.
            with torch.inference_mode():
                for walk, order in zip(self._walks, orders, strict=True):
                    walk.train(x, y, order)
        finally:
            # The steps are behind autograd's back, which must know that its values are no more.
            torch.autograd.graph.increment_version(self._parameters)


def group_size(
    sizes: Sequence[int], networks: int, dtype: torch.dtype, device: torch.device
) -> int:
    """How many networks go together: on a CPU as many as fit the cache."""
    if device.type != "cpu":
        return networks
    return min(networks, max(1, CACHE_BYTES // bytes_of(sizes, dtype)))


class _Walk:
    """Groups that see the same mini-batches."""

    def __init__(
        self,
        groups: "list[_Group]",
        sizes: Sequence[int],
        batch_size: int,
        like: Tensor,
        *,
        graph: bool,
    ) -> None:
        self._groups, self._sizes, self._batch_size = groups, sizes, batch_size
        self._like, self._graph = like.detach(), graph
        self._blocks: dict[int, _Block] = {}

    def train(self, x: Tensor, y: Tensor, order: Tensor) -> None:
        for indices in order.split(min(self.block_steps() * self._batch_size, len(order))):
            # Gathered into places of their own: the graph reads its input there.
            block = self._block(len(indices))
            torch.index_select(x, 0, indices, out=block.x)
            torch.index_select(y, 0, indices, out=block.y)
            block.run()

    def block_steps(self) -> int:
        """How many mini-batches make a block."""
        if self._like.is_cuda:
            return _BLOCK_STEPS_CUDA
        example = self._sizes[0] * self._like.itemsize
        return max(1, _BLOCK_BYTES // (self._batch_size * example))

    def _block(self, n: int) -> "_Block":
        """The block of n examples; an epoch has one for its whole blocks and one for its last."""
        if n in self._blocks:
            self._blocks[n] = self._blocks.pop(n)  # the last used is last
        else:
            while len(self._blocks) > 1:
                del self._blocks[next(iter(self._blocks))]
            x, y = (self._like.new_empty(n, size) for size in (self._sizes[0], self._sizes[-1]))
            self._blocks[n] = _Block(self._groups, x, y, self._batch_size, graph=self._graph)
        return self._blocks[n]


# ------------------------------------------------------------------------------------ parameters


class _Parameter(NamedTuple):
    """W or b of one layer of all the networks of a group, and how it moves.

    A factor is a float where all networks share it.
    """

    value: Tensor
    filled: Tensor
    """The value, of the first layer with rows of zeros up to a multiple of 16: for the forward."""
    velocity: Tensor | None
    """−lr v, where there is momentum."""
    momentum: float | Tensor
    decay: float | Tensor
    """What the step leaves of the value, 1 − lr · weight_decay."""
    shrink: Tensor | None
    """−lr · weight_decay where momentum and decay come together, for the velocity."""


class _Layer(NamedTuple):
    """One layer of all the networks of a group."""

    W: _Parameter
    """[G·n_out, n_in] of the first layer, [G, n_out, n_in] of another, [n_out, n_in] if G is 1."""
    b: _Parameter
    """[G·n_out] of the first layer, [G, 1, n_out] of another, [n_out] if G is 1."""


class _Group:
    """Networks that are walked together: their parameters, layer by layer, and their settings."""

    def __init__(self, networks: list[MLP], hyperparameters: list[Hyperparameters]) -> None:
        self.size = len(networks)
        like = networks[0].weights_and_biases()[0][0]

        # Where rates differ they are folded into the last dz, from which all else is made.
        lrs = [h.lr for h in hyperparameters]
        common = len(set(lrs)) == 1
        self.lr = _per_network(lrs, like)[0].item() if common else 1.0
        self.lrs = None if common else _per_network(lrs, like).view(-1, 1, 1)
        slowed = [LOSSES[h.loss].has_sigmoid_prime for h in hyperparameters]
        self.any_slowed, self.all_slowed = any(slowed), all(slowed)
        # 1 where σ'(z) belongs into the last dz, 0 where not.
        self.is_slowed = _per_network([float(one) for one in slowed], like).view(-1, 1, 1)
        self.is_not_slowed = 1 - self.is_slowed

        decays = [-h.lr * h.weight_decay for h in hyperparameters]
        self.layers = [
            _move_in(list(layer), hyperparameters, decays, is_first=position == 0)
            for position, layer in enumerate(
                zip(*(network.weights_and_biases() for network in networks), strict=True)
            )
        ]

    def state(self) -> list[Tensor]:
        """All that a step changes."""
        return [
            tensor
            for layer in self.layers
            for parameter in layer
            for tensor in (parameter.value, parameter.velocity)
            if tensor is not None
        ]


def _per_network(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _move_in(
    parameters: list[tuple[nn.Parameter, nn.Parameter]],
    hyperparameters: list[Hyperparameters],
    decays: list[float],
    *,
    is_first: bool,
) -> _Layer:
    """One layer of some networks, whose parameters become views of common memory."""
    G = len(parameters)
    n_out, n_in = parameters[0][0].shape
    rows = G * n_out
    filled = -(-rows // _ROWS) * _ROWS if is_first else rows
    like = parameters[0][0].detach()
    W_filled, b_filled = like.new_zeros(filled, n_in), like.new_zeros(filled)
    W, b = W_filled[:rows], b_filled[:rows]  # [G·n_out, n_in], [G·n_out]
    # Network by network, each leaving the memory it had: both whole would be twice as much.
    places = zip(W.view(G, n_out, n_in), b.view(G, n_out), strict=True)
    for of_network, of_memory in zip(parameters, places, strict=True):
        for parameter, place in zip(of_network, of_memory, strict=True):
            parameter.data = place.copy_(parameter.detach())
    if G > 1 and not is_first:
        W, b = W.view(G, n_out, n_in), b.view(G, 1, n_out)
        W_filled, b_filled = W, b
    momenta = [h.momentum for h in hyperparameters]
    return _Layer(
        _moving(W, W_filled, momenta, decays, n_out),
        _moving(b, b_filled, momenta, [0.0] * G, n_out),
    )


def _moving(
    value: Tensor, filled: Tensor, momenta: list[float], decays: list[float], n_out: int
) -> _Parameter:
    """A parameter and how it moves; decays are −lr · weight_decay of each network."""
    moves = any(momenta)
    shrink = None
    if moves and any(decays):
        factor = _factor(decays, value, n_out)
        shrink = torch.as_tensor(factor, dtype=value.dtype, device=value.device)
    return _Parameter(
        value=value,
        filled=filled,
        velocity=torch.zeros_like(value) if moves else None,
        momentum=_factor(momenta, value, n_out),
        decay=_factor([1 + decay for decay in decays], value, n_out),
        shrink=shrink,
    )


def _factor(values: list[float], like: Tensor, n_out: int) -> float | Tensor:
    """One float for all networks, or a tensor that multiplies each one's part of another."""
    column = _per_network(values, like)
    if len(set(values)) == 1:
        return column[0].item()  # rounded; too large a number has become infinite
    if like.dim() == 3:
        return column.view(-1, 1, 1)
    column = column.repeat_interleave(n_out)
    return column if like.dim() == 1 else column.view(-1, 1)


# ------------------------------------------------------------------------------------- the step


class _Place(NamedTuple):
    """One layer with the places of its z, a and dz for a mini-batch of n."""

    layer: _Layer
    WT: Tensor
    """Of W's filled rows."""
    z: Tensor
    """[n, G·n_out and some] of the first layer, [G, n, n_out] of another; a hidden layer's a takes
    its place."""
    a: Tensor
    """z's place as the next layer reads it, [G, n, n_out]."""
    dz: Tensor
    """[n, G·n_out] or [G, n, n_out]."""
    dz_by_network: Tensor
    """dz's place as the layer above writes it, [G, n, n_out]."""
    dzT: Tensor
    da: Tensor
    """[G, n, n_out]."""
    sum_examples: tuple[Callable[..., Tensor], Tensor, Tensor]
    """torch.addmv, dzᵀ and n ones, or torch.baddbmm, G rows of n ones and dz."""
    multiply: Callable[..., Tensor]
    """torch.mm or torch.bmm."""
    multiply_add: Callable[..., Tensor]
    """torch.addmm or torch.baddbmm: β c + α a b."""


def _place(layer: _Layer, G: int, n: int) -> _Place:
    """Memory for one layer of G networks and a mini-batch of n."""
    W = layer.W.value
    batched = W.dim() == 3
    n_out = W.shape[1] if batched else len(W) // G
    dz = W.new_empty((G, n, n_out) if batched else (n, G * n_out))
    z = torch.empty_like(dz) if batched else W.new_empty(n, len(layer.W.filled))
    return _Place(
        layer=layer,
        WT=layer.W.filled.mT,
        z=z,
        a=_by_network(z, G, n_out),
        dz=dz,
        dz_by_network=_by_network(dz, G, n_out),
        dzT=dz.mT,
        da=W.new_empty(n, n_out) if G == 1 else W.new_empty(G, n, n_out),
        sum_examples=(
            (torch.baddbmm, W.new_ones(G, 1, n), dz)
            if batched
            else (torch.addmv, dz.mT, W.new_ones(n))
        ),
        multiply=torch.bmm if batched else torch.mm,
        multiply_add=torch.baddbmm if batched else torch.addmm,
    )


def _by_network(tensor: Tensor, G: int, n_out: int) -> Tensor:
    """[G, n, n_out], or [n, n_out] for one network, of [n, G·n_out and some]."""
    if tensor.dim() == 3:
        return tensor
    tensor = tensor[:, : G * n_out]
    return tensor if G == 1 else tensor.view(len(tensor), G, n_out).transpose(0, 1)


class _Step:
    """One step of gradient descent of a group of networks, for mini-batches of n."""

    def __init__(self, group: _Group, n: int) -> None:
        self._group = group
        self._alpha = -group.lr / n
        self._places = [_place(layer, group.size, n) for layer in group.layers]
        last = self._places[-1].dz_by_network
        self._scratch = [
            torch.empty_like(last, memory_format=torch.contiguous_format) for _ in range(3)
        ]

    def calls(self, x: Tensor, y: Tensor, not_y: Tensor) -> list[Call]:
        """What the step does, call by call; x [n, n_in], y [n, n_out], and not_y is 1 − y.

        A list of prepared calls, made once, since looking up some sixty attributes and taking the
        same branches at each step took a fifth of it.
        """
        return [*self._forward(x), *self._dz_last(y, not_y), *self._backward(x)]

    def _forward(self, a_prev: Tensor) -> Iterator[Call]:
        for place in self._places:
            b, WT = place.layer.b.filled, place.WT
            yield partial(place.multiply_add, b, a_prev, WT, out=place.z)  # (1)
            if place is not self._places[-1]:
                yield partial(torch.sigmoid, place.z, out=place.z)  # (1), in z's place
            a_prev = place.a

    def _dz_last(self, y: Tensor, not_y: Tensor) -> Iterator[Call]:
        group, last = self._group, self._places[-1]
        z, dz = last.a, last.dz_by_network  # in the last a's place is z still
        a, one_minus_a, prime = self._scratch
        yield partial(torch.sigmoid, z, out=a)
        yield partial(torch.neg, z, out=one_minus_a)
        yield partial(torch.sigmoid, one_minus_a, out=one_minus_a)  # σ(−z)
        yield partial(torch.mul, a, not_y, out=dz)
        yield partial(torch.addcmul, dz, y, one_minus_a, value=-1, out=dz)  # (5)
        if group.any_slowed:
            yield partial(torch.mul, a, one_minus_a, out=prime)  # σ'(z)
            if not group.all_slowed:  # σ'(z) for one loss, 1 for the other
                yield partial(torch.mul, prime, group.is_slowed, out=prime)
                yield partial(torch.add, prime, group.is_not_slowed, out=prime)
            yield partial(torch.mul, dz, prime, out=dz)  # (4)
        if group.lrs is not None:
            yield partial(torch.mul, dz, group.lrs, out=dz)

    def _backward(self, x: Tensor) -> Iterator[Call]:
        downwards = self._places[::-1]
        for place, below in itertools.pairwise(downwards):
            # A layer's da is made before its weights move.
            yield partial(place.multiply, place.dz, place.layer.W.value, out=below.da)  # (7)
            yield from self._update(place, below.a)
            # (8): da ∘ a ∘ (1 − a), since z is no more
            yield partial(_sigmoid_backward, below.da, below.a, grad_input=below.dz_by_network)
        yield from self._update(downwards[-1], x)

    def _update(self, place: _Place, a_prev: Tensor) -> Iterator[Call]:
        """Equation 6, averaged over the mini-batch, and the step made of it."""
        alpha = self._alpha
        for parameter, add_gradient, A, B in (
            (place.layer.W, place.multiply_add, place.dzT, a_prev),
            (place.layer.b, *place.sum_examples),
        ):
            value, velocity = parameter.value, parameter.velocity
            if velocity is None:
                beta = yield from _scale(value, parameter.decay)
                yield partial(add_gradient, value, A, B, beta=beta, alpha=alpha, out=value)  # (6)
                continue
            # The velocity is −lr v: with a constant rate the same as torch.optim.SGD's v.
            beta = yield from _scale(velocity, parameter.momentum)
            yield partial(add_gradient, velocity, A, B, beta=beta, alpha=alpha, out=velocity)  # (6)
            if parameter.shrink is not None:
                yield partial(torch.addcmul, velocity, value, parameter.shrink, out=velocity)
            yield partial(torch.add, value, velocity, out=value)


# grad ∘ a ∘ (1 − a) in one pass: the kernel PyTorch's own σ is differentiated with.
_sigmoid_backward: Call = torch.ops.aten.sigmoid_backward.grad_input


def _scale(tensor: Tensor, factor: float | Tensor) -> Generator[Call, None, float]:
    """Multiply networks by a factor each; a common one is left to the product, as its β."""
    if isinstance(factor, float):
        return factor
    yield partial(torch.mul, tensor, factor, out=tensor)
    return 1.0


class _Block:
    """A row of mini-batches in one place, and the steps through them, all groups one by one."""

    def __init__(
        self,
        groups: list[_Group],
        x: Tensor,
        y: Tensor,
        batch_size: int,
        *,
        graph: bool,
    ) -> None:
        self.x, self.y = x, y
        self._not_y = torch.empty_like(y)
        self._state = [tensor for group in groups for tensor in group.state()]
        self._calls: list[Call] = [
            partial(torch.neg, y, out=self._not_y),
            partial(torch.add, self._not_y, 1, out=self._not_y),
        ]
        n = min(batch_size, len(x))
        batches = list(zip(*(tensor.split(n) for tensor in (x, y, self._not_y)), strict=True))
        for group in groups:
            steps = {n: _Step(group, n) for n in {len(batches[0][0]), len(batches[-1][0])}}
            for batch in batches:
                self._calls += steps[len(batch[0])].calls(*batch)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._wants_graph = graph

    def run(self) -> None:
        """Take the steps; x and y have been filled."""
        if self._wants_graph and self._graph is None:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()

    def _run(self) -> None:
        for call in self._calls:
            call()

    def _capture(self) -> None:
        """Record the steps as a CUDA graph. The rehearsal that CUDA wants moves nothing."""
        before = [tensor.clone() for tensor in self._state]
        stream = torch.cuda.Stream(self.x.device)
        stream.wait_stream(torch.cuda.current_stream(self.x.device))
        with torch.cuda.stream(stream):
            self._run()
        torch.cuda.current_stream(self.x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        for tensor, value in zip(self._state, before, strict=True):
            tensor.copy_(value)
        self._graph = graph
