"""The revised algorithm for speed: no graph, in place, many networks side by side.

The same equations as in `nnce.algorithm`, which is the one to read first. What makes it fast:

- Nothing is allocated in a step: every z, a and delta has its place in memory, made once.
- All networks see the same mini-batch, so their first layers are one layer, G networks wide: its z
  is one matrix product. The layers above are batched products, G small ones in one call.
- Parameters are updated where their gradient is made: W ← β W + α dz a_prevᵀ is one call, in which
  α = −lr / n is the step and β = 1 − lr · weight_decay the decay.
- Networks are walked in groups whose first layers stay in the processor's cache.
- On CUDA the steps of a block are captured once as a graph and replayed.

Shapes, for a group of G networks and a mini-batch of n: the first layer is [n, G·h], each other one
[G, n, h]; a group of one network drops the G and is made of plain matrices.
"""

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnce.functional import check_alike
from nnce.losses import LOSSES, Loss, check_loss
from nnce.memory import bytes_of, check_memory
from nnce.modules import MLP, Linear, is_size

# Examples are gathered into mini-batches a block at a time, about this many bytes of them: they
# are still in the cache when the steps read them.
_BLOCK_BYTES = 1_000_000
# On CUDA a block is one graph: as many steps as keep its launch cheap.
_BLOCK_STEPS_CUDA = 100
# The parameters of a group of networks may take this much, or what one network takes.
_CACHE_BYTES = 3_000_000
# The rows of a first layer are filled up to a multiple of this: products of odd sizes leave the
# fast path of the matrix library (784-30-10: 14 µs against 9).
_ROWS = 16
# Below this many multiplications in the largest product of a step a second thread does not pay.
_MULTIPLICATIONS_FOR_THREADS = 10_000_000


Call = Callable[..., Tensor]


class Hyperparameters(NamedTuple):
    """What may differ from network to network, in the words of `torch.optim.SGD`."""

    loss: Loss
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    """λ / n_train, for weights only."""


class Ensemble:
    """Trains networks of one shape side by side, by the rules, without autograd.

    Like an optimizer, it trains the networks it is given: afterwards they are the trained ones.
    From its making on, their parameters are views of the ensemble's memory; each remains an
    ordinary `MLP`, to be evaluated, saved or differentiated. A loss that was made before an epoch
    cannot be differentiated after it, as after a step of any optimizer.

    What comes out is what `torch.optim.SGD` makes of the gradients of `nnce.backprop`, up to
    rounding: g += weight_decay W for weights only, v = momentum v + g, W −= lr v.

    Args:
        networks: one or more MLPs of the same sizes, dtype and device.
        hyperparameters: one for each network.
        batch_size: examples in a mini-batch; the last one of an epoch may be shorter.
        graph: replay the steps as a CUDA graph; has no meaning on a CPU.

    Raises:
        ValueError: there is no network, they differ in shape, dtype or device, one is there twice,
            is frozen, reparametrised, pruned, has hooks (which would not be called) or was made
            under inference_mode, the numbers of networks and hyperparameters differ, or a value
            makes no sense.
        MemoryError: the ensemble would not fit into memory; the sentence says how much it needs.
    """

    def __init__(
        self,
        networks: Sequence[MLP],
        hyperparameters: Sequence[Hyperparameters],
        *,
        batch_size: int,
        graph: bool = True,
    ) -> None:
        """Check everything, and move the parameters into the ensemble's memory."""
        self._networks = tuple(networks)
        self._hyperparameters = tuple(hyperparameters)
        self._batch_size = batch_size
        _check(self.networks, self.hyperparameters, batch_size)
        first = self.networks[0]
        self.sizes = first.sizes
        self.device = first.linears()[0].weight.device
        self.dtype = first.linears()[0].weight.dtype
        check_memory(self.sizes, len(self.networks), dtype=self.dtype, device=self.device)
        self._graph = graph and self.device.type == "cuda"
        self._members = self._grouped()
        with torch.inference_mode(False):  # or the networks could not be differentiated any more
            self._groups = [
                _Group(
                    [self.networks[r] for r in members], [self.hyperparameters[r] for r in members]
                )
                for members in self._members
            ]
        self._parameters = [_parameters(network) for network in self.networks]
        self._places = [[_place_of(p) for p in parameters] for parameters in self._parameters]
        self._blocks: dict[int, _Block] = {}

    @property
    def networks(self) -> tuple[MLP, ...]:
        """The networks, which are trained in place."""
        return self._networks

    @property
    def hyperparameters(self) -> tuple[Hyperparameters, ...]:
        """Those of each network."""
        return self._hyperparameters

    @property
    def batch_size(self) -> int:
        """Examples in a mini-batch."""
        return self._batch_size

    def _grouped(self) -> list[list[int]]:
        """Which networks go together: alike ones, as many as fit the cache."""
        size = len(self.networks)
        if self.device.type == "cpu":
            size = max(1, _CACHE_BYTES // bytes_of(self.sizes, self.dtype))
        # Sorted, so that most groups are of one loss and rate and need no masks.
        order = sorted(range(len(self.networks)), key=lambda r: self.hyperparameters[r])
        return [order[i : i + size] for i in range(0, len(order), size)]

    def train_epoch(self, x: Tensor, y: Tensor, order: Tensor) -> int:
        """One pass over the training data, all networks on the same mini-batches.

        On CUDA nothing is waited for but the check of the order: the steps may be under way still.

        Args:
            x: inputs [N, n_in], on the ensemble's device.
            y: targets in [0, 1], [N, n_out].
            order: indices of the examples in the order of this epoch, [n], on the device.

        Returns:
            How many steps it were.

        Raises:
            ValueError: shapes or devices do not fit the networks, or a network's parameters have
                been moved, replaced or frozen, or have got hooks.
            TypeError: no tensors, or another dtype than the networks'.
            IndexError: the order names an example that is not there; no step has been taken then.
        """
        self._check_data(x, y, order)
        self._check_networks()
        for network in self.networks:
            _check_trains(network)
        try:
            # Not no_grad(): a step is a dozen small calls, and this saves a little at each.
            with torch.inference_mode():
                for indices in order.split(min(self._block_steps() * self.batch_size, len(order))):
                    # Gathered into places of their own: the graph reads its input there.
                    block = self._block(len(indices))
                    torch.index_select(x, 0, indices, out=block.x)
                    torch.index_select(y, 0, indices, out=block.y)
                    block.run()
        finally:
            # The steps are behind autograd's back, which must know that its values are no more.
            torch.autograd.graph.increment_version(list(itertools.chain(*self._parameters)))
        return -(-len(order) // self.batch_size)

    @torch.no_grad()
    def outputs(self, x: Tensor) -> list[Tensor]:
        """z of the last layer of every network, as `network(x)` of each one, side by side.

        Args:
            x: inputs [n, n_in], on the ensemble's device and in its dtype.

        Returns:
            [n, n_out] for each network, in their order.
        """
        self._check_networks()
        z: dict[int, Tensor] = {}
        for members, group in zip(self._members, self._groups, strict=True):
            z |= zip(members, group.outputs(x), strict=True)
        return [z[r] for r in range(len(self.networks))]

    def _block_steps(self) -> int:
        """How many mini-batches make a block."""
        if self.device.type == "cuda":
            return _BLOCK_STEPS_CUDA
        return max(1, _BLOCK_BYTES // (self.batch_size * self.sizes[0] * self.dtype.itemsize))

    def _block(self, n: int) -> "_Block":
        """The block of n examples; an epoch has one for its whole blocks and one for its last."""
        if n in self._blocks:
            self._blocks[n] = self._blocks.pop(n)  # the last used is last
        else:
            while len(self._blocks) > 1:
                del self._blocks[next(iter(self._blocks))]
            x, y = (
                torch.empty(n, size, dtype=self.dtype, device=self.device)
                for size in (self.sizes[0], self.sizes[-1])
            )
            self._blocks[n] = _Block(self._groups, x, y, self.batch_size, graph=self._graph)
        return self._blocks[n]

    def _check_networks(self) -> None:
        """A parameter that is another, or lies elsewhere by now, would silently not be trained."""
        for network, parameters, places in zip(
            self.networks, self._parameters, self._places, strict=True
        ):
            _check_network(network)
            for now, then, place in zip(_parameters(network), parameters, places, strict=True):
                if now is not then or _place_of(now) != place:
                    raise ValueError(
                        "expected the networks' parameters in the ensemble's memory, but some have "
                        "been replaced, or moved, by .to() or by another ensemble; make a new "
                        "Ensemble"
                    )

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
        if order.dim() != 1 or not len(order) or order.device != self.device:
            raise ValueError(
                f"expected an order of at least one index, on {self.device}, got "
                f"{tuple(order.shape)} on {order.device}"
            )
        first, last = (int(index) for index in order.aminmax())
        if first < 0 or last >= len(x):
            raise IndexError(
                f"expected an order of indices from 0 to {len(x) - 1}, got {first} to {last}"
            )


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
        like = networks[0].linears()[0].weight

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
            _move_in(list(linears), hyperparameters, decays, is_first=position == 0)
            for position, linears in enumerate(
                zip(*(network.linears() for network in networks), strict=True)
            )
        ]

    def outputs(self, x: Tensor) -> list[Tensor]:
        """z of the last layer for each network."""
        first = self.layers[0]
        z = torch.addmm(first.b.value, x, first.W.value.mT).view(len(x), self.size, -1)  # (1)
        z = z.transpose(0, 1)  # [G, n, n_out]
        for W, b in self.layers[1:]:
            W_by_network = W.value.view(self.size, -1, z.shape[-1])
            b_by_network = b.value.view(self.size, 1, -1)
            z = torch.baddbmm(b_by_network, z.sigmoid(), W_by_network.mT)  # (1)
        return list(z)

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
    linears: list[Linear],
    hyperparameters: list[Hyperparameters],
    decays: list[float],
    *,
    is_first: bool,
) -> _Layer:
    """One layer of some networks, whose parameters become views of common memory."""
    G = len(linears)
    n_out, n_in = linears[0].weight.shape
    rows = G * n_out
    filled = -(-rows // _ROWS) * _ROWS if is_first else rows
    like = linears[0].weight.detach()
    W_filled, b_filled = like.new_zeros(filled, n_in), like.new_zeros(filled)
    W, b = W_filled[:rows], b_filled[:rows]  # [G·n_out, n_in], [G·n_out]
    # Network by network, each leaving the memory it had: both whole would be twice as much.
    for linear, W_of_one, b_of_one in zip(
        linears, W.view(G, n_out, n_in), b.view(G, n_out), strict=True
    ):
        for parameter, place in ((linear.weight, W_of_one), (_bias(linear), b_of_one)):
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


# ------------------------------------------------------------------------- what is asked before


def threads(sizes: Sequence[int], batch_size: int, networks: int = 1) -> int:
    """How many CPU threads suit networks of these sizes: 1, or all that PyTorch would take.

    A second thread costs some microseconds at each product, which a textbook's network does not
    have to give away.
    """
    group = min(networks, max(1, _CACHE_BYTES // bytes_of(sizes, torch.float32)))
    layers = list(itertools.pairwise(sizes))
    # The first layer is one product for the whole group; others are one for each network.
    work = [group * layers[0][0] * layers[0][1], *(n_in * n_out for n_in, n_out in layers[1:])]
    if batch_size * max(work) < _MULTIPLICATIONS_FOR_THREADS:
        return 1
    return torch.get_num_threads()


def _bias(linear: Linear) -> nn.Parameter:
    """The bias that every layer of an MLP has."""
    if linear.bias is None:
        raise ValueError("expected networks whose layers all have a bias")
    bias: nn.Parameter = linear.bias
    return bias


def _parameters(network: MLP) -> list[nn.Parameter]:
    """Weight and bias of each layer."""
    return [p for linear in network.linears() for p in (linear.weight, _bias(linear))]


def _place_of(parameter: nn.Parameter) -> tuple[int, tuple[int, ...]]:
    return parameter.data_ptr(), parameter.stride()


def _check_trains(network: MLP) -> None:
    if not all(parameter.requires_grad for parameter in _parameters(network)):
        raise ValueError("expected networks to train, but one has parameters that are frozen")


def _check_network(network: MLP) -> None:
    """Raise ValueError where training by the rules would be another training than PyTorch's."""
    for parameter in _parameters(network):
        if parameter.is_inference():
            raise ValueError(
                "expected networks that autograd can use, but one was made under inference_mode"
            )
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ValueError("expected no hooks, which are not called, but a parameter has some")
    for module in network.modules():
        if any(
            (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
        ):
            kind = type(module).__name__
            raise ValueError(f"expected no hooks, which are not called, but a {kind} has some")


def _check(
    networks: Sequence[MLP], hyperparameters: Sequence[Hyperparameters], batch_size: object
) -> None:
    if not networks:
        raise ValueError("expected at least one network, got none")
    for network in networks:
        if not isinstance(network, MLP):
            raise TypeError(f"expected networks to be nnce.MLPs, got {type(network).__name__}")
        _check_network(network)
        _check_trains(network)
    parameters = [parameter for network in networks for parameter in _parameters(network)]
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise ValueError("expected networks without common parameters, but one is there twice")
    kinds = {
        (network.sizes, parameter.dtype, parameter.device)
        for network in networks
        for parameter in network.parameters()
    }
    if len(kinds) > 1:
        kinds_in_words = "; ".join(
            f"{'-'.join(map(str, sizes))} in {dtype} on {device}"
            for sizes, dtype, device in sorted(kinds, key=str)
        )
        raise ValueError(f"expected networks of one shape, dtype and device, got {kinds_in_words}")
    if len(hyperparameters) != len(networks):
        raise ValueError(
            f"expected hyperparameters for each of the {len(networks)} networks, got "
            f"{len(hyperparameters)}"
        )
    for h in hyperparameters:
        if not isinstance(h, Hyperparameters) or not all(
            isinstance(value, int | float) for value in (h.lr, h.momentum, h.weight_decay)
        ):
            raise TypeError(f"expected Hyperparameters of numbers for each network, got {h!r}")
        check_loss(h.loss)
        if not (0 < h.lr < math.inf and 0 <= h.momentum < 1 and 0 <= h.weight_decay < math.inf):
            raise ValueError(
                f"expected lr > 0, momentum in [0, 1) and weight_decay of at least 0, got {h}"
            )
    if not is_size(batch_size):
        raise ValueError(f"expected a batch_size of at least 1, a whole number, got {batch_size}")
