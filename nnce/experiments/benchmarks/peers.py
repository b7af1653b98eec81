"""Implementations of a training epoch: nnce's, and those of other libraries.

Each peer takes networks and data. It returns a function that trains on the examples in a given
order, and one that returns the parameters of the first network.
"""

import copy
import functools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from nnce import _memory, data, functional
from nnce.algorithm import Hyperparameters
from nnce.engines import ensemble, loops
from nnce.engines.ensemble import Ensemble
from nnce.experiments.timing import seconds_of
from nnce.modules import MLP
from nnce.training.twin import BUILT_IN_LOSSES, torch_twin

Array: TypeAlias = Any  # NumPy, JAX (untyped here) or PyTorch
LR = 0.5
BUILT_IN = BUILT_IN_LOSSES["cross-entropy"]
# For the floor: size of a group of networks that fits in the cache, and number of mini-batches that
# are gathered at once.
CACHE_BYTES = 3_000_000
BLOCK_STEPS = 32
# Share of nonzero inputs, as in MNIST; weights of zero inputs need no update.
DENSITY = 0.19


class Work(NamedTuple):
    """A network and its mini-batches."""

    sizes: tuple[int, ...]
    batch_size: int
    networks: tuple[int, ...]
    """Numbers of networks trained together, one row each."""
    density: float = DENSITY
    """Share of nonzero inputs."""
    own_orders: bool = False
    """Whether each of several networks has its own order of the examples."""
    threads: int | None = None
    """Number of threads of an `Ensemble`; None for its default."""

    def __str__(self) -> str:
        inputs = "" if self.density < 1 else ", no zeros"
        orders = ", own orders" if self.own_orders else ""
        return f"{_memory.dashed(self.sizes)}, batch {self.batch_size}{inputs}{orders}"

    def indices(self, order: Tensor, networks: int, generator: torch.Generator) -> Tensor:
        """Order of the examples, [n], or [networks, n] if each network has its own."""
        if not self.own_orders or networks == 1:
            return order
        others = [data.order(len(order), generator, order.device) for _ in range(1, networks)]
        return torch.stack([order, *others])


Epoch = Callable[[Tensor], object]
"""Function that trains on the examples in one order, or in one order per network."""
Parameters = Callable[[], Iterable[Array]]
"""Function that returns the current W, b, W, b, … of the first network."""
Ready = tuple[Epoch, Parameters]
Peer = Callable[[Work, Tensor, Tensor, list[MLP]], Ready]


class Missing(Exception):
    """The peer cannot run here; the message states the reason."""


def _epoch(work: Work, x: Array, y: Array, step: Callable[[Array, Array], object]) -> Epoch:
    """Return an epoch that calls `step` with each mini-batch of tensors or NumPy arrays."""

    def epoch(order: Tensor) -> None:
        for batch in order.split(work.batch_size, dim=-1):
            chosen = batch if isinstance(x, Tensor) else batch.cpu().numpy()
            step(x[chosen], y[chosen])

    return epoch


def nnce_ensemble(
    work: Work, x: Tensor, y: Tensor, networks: list[MLP], engine: ensemble.Engine | None = None
) -> Ready:
    """The revised algorithm on all networks together, with loops or products (default: by size)."""
    if engine == "loops" and (x.is_cuda or not loops.is_available()):
        raise Missing("the loops require a CPU and Numba")
    values = [Hyperparameters("cross-entropy", LR)] * len(networks)
    together = Ensemble(
        networks, values, batch_size=work.batch_size, engine=engine, threads=work.threads
    )
    return partial(together.train_epoch, x, y), networks[0].parameters


def _products(networks: list[MLP], n: int) -> Callable[[Tensor], None]:
    """Return the matrix products of a training step on n examples, without anything else.

    The first layers of all networks are one product, the other layers are batched; forward, da and
    dW. All values that the products alone do not compute are 0, so nothing is learned.
    """
    by_layer = zip(*(network.linears() for network in networks), strict=True)
    weights = [torch.stack([linear.weight.detach() for linear in layer]) for layer in by_layer]
    first = weights[0].flatten(0, 1)  # [R·n_out, n_in]
    z_first, dz_first = (first.new_zeros(n, len(first)) for _ in range(2))
    a = [W.new_zeros(len(networks), n, W.shape[1]) for W in weights]
    dz = [torch.zeros_like(a_layer) for a_layer in a]

    def step(x: Tensor) -> None:
        torch.mm(x, first.mT, out=z_first)
        for W, a_prev, a_layer in zip(weights[1:], a, a[1:], strict=False):
            torch.bmm(a_prev, W.mT, out=a_layer)
        for layer in range(len(weights) - 1, 0, -1):
            W = weights[layer]
            torch.bmm(dz[layer], W, out=a[layer - 1])  # da
            torch.baddbmm(W, dz[layer].mT, a[layer - 1], out=W)  # dW
        torch.addmm(first, dz_first.mT, x, out=first)

    return step


def floor(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> Ready:
    """Dense matrix products only, with the same shuffling and gathering."""
    if work.own_orders:
        raise Missing("networks with different orders share no product")
    # As many networks at a time as in the ensemble; more would exceed the cache.
    size = max(1, CACHE_BYTES // _memory.bytes_of(work.sizes, torch.float32))
    groups = [networks[i : i + size] for i in range(0, len(networks), size)]
    products = functools.cache(lambda n: [_products(group, n) for group in groups])

    def epoch(order: Tensor) -> None:
        with torch.inference_mode():
            for block in order.split(BLOCK_STEPS * work.batch_size):
                batches = x[block].split(work.batch_size)
                for index in range(len(groups)):
                    for batch in batches:
                        products(len(batch))[index](batch)

    return epoch, networks[0].parameters


def _loop(
    work: Work,
    x: Tensor,
    y: Tensor,
    network: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    **settings: bool,
) -> Ready:
    """The usual training loop with SGD and autograd."""
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, **settings)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        criterion(network(x), y).backward()
        optimizer.step()

    return _epoch(work, x, y, step), network.parameters


def eager(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> Ready:
    """torch.nn and autograd, with the fastest implementation of SGD."""

    def seconds(settings: dict[str, bool]) -> float:
        trial = torch_twin(copy.deepcopy(networks[0]))
        epoch, _ = _loop(work, x, y, trial, BUILT_IN, **settings)
        generator = torch.Generator().manual_seed(0)

        def train(n: int) -> None:
            epoch(data.order(min(len(x), n), generator, x.device))

        train(10 * work.batch_size)
        return seconds_of(lambda: train(100 * work.batch_size), x.device)

    best = min(({"fused": True}, {"foreach": True}, {"foreach": False}), key=seconds)
    return _loop(work, x, y, torch_twin(networks[0]), BUILT_IN, **best)


def functions(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> Ready:
    """nnce's autograd Functions in the usual training loop."""
    return _loop(work, x, y, networks[0], functional.sigmoid_cross_entropy, fused=True)


def _gradients_of(twin: nn.Module) -> Callable[..., dict[str, Tensor]]:
    """Return a function of parameters, x and y that computes the gradients of the built-in loss."""

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = torch.func.functional_call(twin, parameters, (x,))
        return BUILT_IN(z, y)

    return torch.func.grad(loss)


def compiled(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> Ready:
    """torch.compile of the whole step: forward, backward and update in one graph."""
    torch.compiler.reset()  # code compiled for other workloads counts towards a limit
    twin = torch_twin(networks[0])
    parameters = {name: p.detach() for name, p in twin.named_parameters()}
    gradients = _gradients_of(twin)

    @torch.compile(fullgraph=True, dynamic=False)
    def step(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> None:
        for name, gradient in gradients(parameters, x, y).items():
            parameters[name].sub_(LR * gradient)

    return _epoch(work, x, y, partial(step, parameters)), parameters.values


def cuda_graphed(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> Ready:
    """torch.nn and autograd, with the whole step captured as a CUDA graph."""
    if not x.is_cuda:
        raise Missing("requires CUDA")
    twin = torch_twin(networks[0])
    optimizer = torch.optim.SGD(twin.parameters(), lr=LR, fused=True)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        BUILT_IN(twin(x), y).backward()
        optimizer.step()

    @functools.cache
    def captured(n: int) -> tuple[Tensor, Tensor, torch.cuda.CUDAGraph]:
        before = copy.deepcopy(twin.state_dict())
        x_n, y_n, graph = x[:n].clone(), y[:n].clone(), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(x_n, y_n)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            step(x_n, y_n)
        twin.load_state_dict(before)
        return x_n, y_n, graph

    def epoch(order: Tensor) -> None:
        for batch in order.split(work.batch_size):
            x_n, y_n, graph = captured(len(batch))
            torch.index_select(x, 0, batch, out=x_n)
            torch.index_select(y, 0, batch, out=y_n)
            graph.replay()

    return epoch, twin.parameters


def _arrays(network: MLP) -> list[list[Array]]:
    """Copies of [W, b] of each layer, as NumPy arrays."""
    layers = network.weights_and_biases()
    return [[p.detach().cpu().numpy().copy() for p in layer] for layer in layers]


def _sigmoid(z: Array) -> Array:
    with np.errstate(over="ignore"):  # e^(−z) = ∞ gives the correct 0
        return 1 / (1 + np.exp(-z))


def numpy_by_example(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> Ready:
    """NumPy as in the textbook: example by example, with column vectors."""
    W, b = map(list, zip(*_arrays(networks[0]), strict=True))
    b = [column[:, None] for column in b]

    def gradients(x: Array, y: Array) -> tuple[list[Array], list[Array]]:
        a = [x]
        for W_, b_ in zip(W, b, strict=True):
            a.append(_sigmoid(W_ @ a[-1] + b_))
        dz = a[-1] - y
        dW, db = [dz @ a[-2].T], [dz]
        for layer in range(2, len(a)):
            dz = (W[-layer + 1].T @ dz) * a[-layer] * (1 - a[-layer])
            dW.insert(0, dz @ a[-layer - 1].T)
            db.insert(0, dz)
        return dW, db

    def step(x: Array, y: Array) -> None:
        sum_W, sum_b = [np.zeros_like(w) for w in W], [np.zeros_like(v) for v in b]
        for x_i, y_i in zip(x, y, strict=True):
            dW, db = gradients(x_i, y_i)
            sum_W = [s + d for s, d in zip(sum_W, dW, strict=True)]
            sum_b = [s + d for s, d in zip(sum_b, db, strict=True)]
        for layer in range(len(W)):
            W[layer] = W[layer] - np.float32(LR / len(x)) * sum_W[layer]
            b[layer] = b[layer] - np.float32(LR / len(x)) * sum_b[layer]

    X, Y = x.cpu().numpy()[:, :, None], y.cpu().numpy()[:, :, None]
    return _epoch(work, X, Y, step), lambda: [p for pair in zip(W, b, strict=True) for p in pair]


def numpy_vectorized(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> Ready:
    """NumPy, vectorized over the mini-batch."""
    layers = _arrays(networks[0])

    def step(x: Array, y: Array) -> None:
        a = [x]
        for W, b in layers:
            a.append(_sigmoid(a[-1] @ W.T + b))
        dz = (a[-1] - y) * np.float32(LR / len(x))
        for (W, b), a_prev in zip(reversed(layers), a[-2::-1], strict=True):
            da = dz @ W
            W -= dz.T @ a_prev
            b -= dz.sum(0)
            dz = da * a_prev * (1 - a_prev)

    epoch = _epoch(work, x.cpu().numpy(), y.cpu().numpy(), step)
    return epoch, lambda: [p for layer in layers for p in layer]


def scikit_learn(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> Ready:
    """scikit-learn's MLPClassifier; multi-label targets give it a sigmoid output layer."""
    try:
        from sklearn.neural_network import MLPClassifier
    except ImportError as error:
        raise Missing("scikit-learn is not installed") from error
    X, Y = x.cpu().numpy(), y.cpu().numpy().astype(int)
    model = MLPClassifier(
        work.sizes[1:-1],
        activation="logistic",
        solver="sgd",
        alpha=0.0,
        batch_size=work.batch_size,
        learning_rate_init=LR,
        momentum=0.0,
        nesterovs_momentum=False,
        shuffle=False,  # the order is shuffled already
    )
    model.partial_fit(X[: work.batch_size], Y[: work.batch_size], classes=np.arange(10))
    for layer, (W, b) in enumerate(_arrays(networks[0])):
        model.coefs_[layer][:], model.intercepts_[layer][:] = W.T, b

    def epoch(order: Tensor) -> None:
        picked = order.cpu().numpy()
        model.partial_fit(X[picked], Y[picked])

    return epoch, lambda: [
        p for W, b in zip(model.coefs_, model.intercepts_, strict=True) for p in (W.T, b)
    ]


def func_vmap(work: Work, x: Tensor, y: Tensor, networks: list[MLP]) -> Ready:
    """torch.func: vmap over the stacked parameters of all networks."""
    twins = [torch_twin(network) for network in networks]
    stacked, _ = torch.func.stack_module_state(twins)
    parameters = {name: p.detach() for name, p in stacked.items()}
    examples = 0 if work.own_orders and len(networks) > 1 else None
    gradients = torch.func.vmap(_gradients_of(twins[0]), in_dims=(0, examples, examples))

    def step(x: Tensor, y: Tensor) -> None:
        for name, gradient in gradients(parameters, x, y).items():
            parameters[name].sub_(LR * gradient)

    return _epoch(work, x, y, step), lambda: [p[0] for p in parameters.values()]


def _jax_gradient(jax: Any) -> Any:
    """Gradient of the cross-entropy with respect to the weights and biases of a network."""

    def loss(parameters: Any, x: Array, y: Array) -> Array:
        a = x
        for W, b in parameters[:-1]:
            a = jax.nn.sigmoid(a @ W.T + b)
        W, b = parameters[-1]
        z = a @ W.T + b
        return (jax.nn.softplus(z) - y * z).sum() / len(x)

    return jax.grad(loss)


def jax_scan(
    work: Work, x: Tensor, y: Tensor, networks: list[MLP], *, side_by_side: bool = False
) -> Ready:
    """JAX: one jitted scan over the mini-batches of an epoch; vmap over several networks."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError as error:
        raise Missing("not installed: pip install -e '.[bench]'") from error
    X, Y = jnp.asarray(x.cpu().numpy()), jnp.asarray(y.cpu().numpy())
    if side_by_side:
        parameters = jax.tree.map(lambda *each: np.stack(each), *map(_arrays, networks))
    else:
        parameters = _arrays(networks[0])
    parameters = jax.tree.map(jnp.asarray, parameters)

    gradient = _jax_gradient(jax)
    if side_by_side:
        examples = 0 if work.own_orders and len(networks) > 1 else None
        gradient = jax.vmap(gradient, in_axes=(0, examples, examples))

    def step(parameters: Any, batch: Array) -> tuple[Any, None]:
        gradients = gradient(parameters, X[batch], Y[batch])
        return jax.tree.map(lambda p, g: p - LR * g, parameters, gradients), None

    @partial(jax.jit, donate_argnums=0)
    def scan(parameters: Any, order: Array) -> Any:
        n = order.shape[-1]
        whole = n // work.batch_size * work.batch_size
        batches = order[..., :whole].reshape(*order.shape[:-1], -1, work.batch_size)
        parameters, _ = jax.lax.scan(step, parameters, jnp.moveaxis(batches, -2, 0))
        if whole < n:
            parameters, _ = step(parameters, order[..., whole:])
        return parameters

    def epoch(order: Tensor) -> None:
        nonlocal parameters
        wait: Any = jax.block_until_ready
        parameters = wait(scan(parameters, jnp.asarray(order.cpu().numpy())))

    def first() -> list[Array]:
        arrays = [np.array(p) for layer in parameters for p in layer]
        return [array[0] for array in arrays] if side_by_side else arrays

    return epoch, first


NNCE = "nnce"
LOOPS = "nnce, loops"
PRODUCTS = "nnce, products"
FLOOR = "floor (dense products alone)"
EAGER = "torch.nn eager"
COMPILED = "torch.compile"
JAX = "JAX jit + scan"
JAX_VMAP = "JAX, vmap over networks"
FUNC_VMAP = "torch.func, vmap over networks"
BY_EXAMPLE = "NumPy, by example"

PEERS: dict[str, Peer] = {
    NNCE: nnce_ensemble,
    LOOPS: partial(nnce_ensemble, engine="loops"),
    PRODUCTS: partial(nnce_ensemble, engine="products"),
    FLOOR: floor,
    EAGER: eager,
    COMPILED: compiled,
    "torch.nn eager, CUDA graph": cuda_graphed,
    "nnce functions": functions,
    JAX: jax_scan,
    JAX_VMAP: partial(jax_scan, side_by_side=True),
    FUNC_VMAP: func_vmap,
    "scikit-learn": scikit_learn,
    "NumPy, vectorized": numpy_vectorized,
    BY_EXAMPLE: numpy_by_example,
}
QUICK_PEERS = (NNCE, FLOOR, EAGER, JAX, JAX_VMAP)
# Peers that train networks together; all others train them one after the other.
SIDE_BY_SIDE = (NNCE, LOOPS, PRODUCTS, FLOOR, JAX_VMAP, FUNC_VMAP)
