"""Adversarial arrays through every public function: a right result, or an error that says why."""

import itertools
import random
import warnings
from collections import Counter

import pytest
import torch
from oracles import laid_out
from torch import nn

import nnce
from nnce import data
from nnce.algorithm import Hyperparameters

NAMED = (TypeError, ValueError, IndexError, NotImplementedError)
N, COMPONENTS, FEATURES = 4, 3, 5


# ---------------------------------------------------------------------------- what may be handed in


class Subclass(torch.Tensor):
    """One of the user's own."""


def one(tensor, value):
    changed = tensor.detach().clone()
    changed.view(-1)[:1] = value
    return changed


def quantized(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and may come all the same
        return torch.quantize_per_tensor(tensor.detach().float(), 0.1, 0, torch.qint8)


def csr(tensor):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tensor.detach().to_sparse_csr()


VALUES = {
    "huge": lambda t: t * 1e15,
    "largest": lambda t: torch.full_like(t, torch.finfo(t.dtype).max),
    "tiny": lambda t: t * 1e-30,
    "subnormal": lambda t: t * (torch.finfo(t.dtype).tiny / 8),
    "inf": lambda t: torch.full_like(t, torch.inf),
    "-inf": lambda t: torch.full_like(t, -torch.inf),
    "one inf": lambda t: one(t, torch.inf),
    "nan": lambda t: torch.full_like(t, torch.nan),
    "one nan": lambda t: one(t, torch.nan),
    "0": torch.zeros_like,
    "-0": lambda t: -torch.zeros_like(t),
    "1": torch.ones_like,
}
LAYOUTS = {
    "transposed": lambda t: laid_out(t.detach(), "transposed"),
    "strided": lambda t: laid_out(t.detach(), "strided"),
    "expanded": lambda t: laid_out(t.detach(), "expanded"),
    "one row": lambda t: t.detach()[:1],
    "no rows": lambda t: t.detach()[:0],
    "no columns": lambda t: t.detach()[..., :0],
    "zero-dimensional": lambda t: t.detach().flatten()[0],
    "one more dimension": lambda t: t.detach()[None],
    "one less": lambda t: t.detach()[0],
    "flat": lambda t: t.detach().flatten(),
    "asks for a gradient": lambda t: t.detach().clone().requires_grad_(t.is_floating_point()),
    "parameter": lambda t: nn.Parameter(t.detach().clone(), t.is_floating_point()),
    "subclass": lambda t: t.detach().clone().as_subclass(Subclass),
}
FOREIGN = {
    **{
        str(dtype): lambda t, dtype=dtype: t.detach().to(dtype)
        for dtype in (
            *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
            *(torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64),
        )
    },
    "meta": lambda t: t.detach().to("meta"),
    "sparse": lambda t: t.detach().to_sparse(),
    "sparse rows": csr,
    "quantized": quantized,
    "list": lambda t: t.detach().tolist(),
    "numpy": lambda t: t.detach().numpy(),
    "None": lambda t: None,
    "string": lambda t: "z",
    "number": lambda t: 0.5,
}
KINDS = {**VALUES, **LAYOUTS, **FOREIGN}


# ------------------------------------------------------------------------------------ what is right


def plain(value):
    """A dense float64 tensor of the user's numbers, with no history."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    if value.is_quantized:
        value = value.dequantize()
    return torch.tensor(value.to_dense().tolist(), dtype=torch.float64).reshape(value.shape)


def times(weight, term):
    """A term whose weight is 0 is 0, and NaN stays NaN."""
    zero = (weight == 0) & ~term.isnan()
    return torch.where(zero, torch.zeros_like(term), weight * term)


def cross_entropy(z, y, weight=None, pos_weight=None):
    z, y = torch.broadcast_tensors(z, y)
    log = nn.functional.logsigmoid
    positive = times(y if pos_weight is None else y * pos_weight, -log(z))
    C = positive + times(1 - y, -log(-z))
    return C if weight is None else times(torch.as_tensor(weight).expand(C.shape), C)


def quadratic(z, y):
    return 0.5 * (z.sigmoid() - y) ** 2


def dz_cross_entropy(z, y):
    return times(1 - y, z.sigmoid()) - times(y, (-z).sigmoid())


def dz_quadratic(z, y):
    return (z.sigmoid() - y) * z.sigmoid() * (-z).sigmoid()


def same_shapes(z, y, C, **more):
    """Losses broadcast nothing."""
    assert z.shape == y.shape
    return C(z, y, **more)


def with_gradient(function, name="z"):
    """The value, and the gradient by one argument under an upstream gradient of 2."""

    def call(**arguments):
        of = arguments[name]
        floating = isinstance(of, torch.Tensor) and of.is_floating_point() and not of.is_meta
        if (
            floating
            and type(of) is torch.Tensor
            and not of.is_sparse
            and of.layout == torch.strided
        ):
            arguments[name] = of = of.detach().requires_grad_()
        value = function(**arguments)
        if not (isinstance(of, torch.Tensor) and value.requires_grad and of.requires_grad):
            return (value,)
        if not of.is_leaf or value.is_meta:
            return (value,)
        (gradient,) = torch.autograd.grad(value, of, torch.full_like(value, 2.0))
        return value, gradient

    return call


def with_dz(C, dz):
    """The oracle of a loss under reduction "none"."""
    return lambda z, y: (same_shapes(z, y, C), 2 * dz(z, y))


def linear_oracle(a_prev, W, b):
    b = torch.zeros(len(W), dtype=torch.float64) if b is None else b
    assert W.dim() == 2 and b.dim() == 1 and a_prev.dim() and a_prev.shape[-1] == W.shape[1]
    assert b.shape[0] == W.shape[0]
    value = a_prev @ W.mT + b
    return value, 2 * torch.ones_like(value) @ W


def labels_oracle(x, W, y, linear_bias):
    linear_bias = W.new_zeros(len(W)) if linear_bias is None else linear_bias
    assert x.dim() == 2 and y.shape == (len(x), len(W)) and linear_bias.shape == (len(W),)
    z = x @ W.mT + linear_bias
    return (cross_entropy(z, y).sum(1), 2 * dz_cross_entropy(z, y) @ W)


def pairs_oracle(x, y, scale, bias):
    scale, bias = torch.as_tensor(scale), torch.as_tensor(0.0 if bias is None else bias)
    assert x.shape == y.shape and x.dim() == 2 and scale.numel() == bias.numel() == 1
    z = scale * x @ y.mT + bias
    target = torch.eye(len(x), dtype=torch.float64)
    return (cross_entropy(z, target).sum(1),)


def backprop_oracle(W, b, x, y):
    z = x @ W.mT + (0 if b is None else b)
    dz = dz_cross_entropy(z, y)
    assert y.shape == z.shape and x.dim() == 2 and W.dim() == 2
    assert b is None or b.shape == W.shape[:1]
    return z, z.sigmoid(), dz, dz.mT @ x / len(x), dz.sum(0) / len(x)


def backprop(W, b, x, y):
    found = nnce.backprop([(W, b)], x, y)
    return found.z[0], found.a[0], found.dz[0], *found.gradients.values()


def ensemble(x, y, order):
    """A step of one network by products, and what it then puts out."""
    network = nnce.MLP((FEATURES, COMPONENTS), generator=torch.Generator().manual_seed(0))
    one = nnce.Ensemble(
        [network], [Hyperparameters("cross-entropy", 0.5)], batch_size=N, engine="products"
    )
    one.train_epoch(x, y, order)
    return network[0].weight.detach(), one.outputs(0, x)


def ensemble_oracle(x, y, order):
    network = nnce.MLP((FEATURES, COMPONENTS), generator=torch.Generator().manual_seed(0))
    W, b = (p.detach().double() for p in network.parameters())
    order = order.long()[0] if order.dim() == 2 and len(order) == 1 else order.long()
    assert order.dim() == 1
    for batch in order.split(N):
        dz = dz_cross_entropy(x[batch] @ W.mT + b, y[batch]) / len(batch)
        W, b = W - 0.5 * dz.mT @ x[batch], b - 0.5 * dz.sum(0)
    return W, x @ W.mT + b


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def valid(dtype):
    """Every public function of tensors: good arguments, the call, and its oracle."""
    z, x, W = draw(N, COMPONENTS, dtype=dtype), draw(N, FEATURES, dtype=dtype), None
    W, b = draw(COMPONENTS, FEATURES, dtype=dtype, seed=1), draw(COMPONENTS, dtype=dtype, seed=2)
    y = draw(N, COMPONENTS, dtype=dtype, seed=3).sigmoid()
    hard = y.round()
    numbers = {"scale": torch.tensor(2.0, dtype=dtype), "bias": torch.tensor(-1.0, dtype=dtype)}
    none = {"reduction": "none"}
    yield (
        "sigmoid",
        {"z": z},
        with_gradient(nnce.sigmoid),
        lambda z: (
            z.sigmoid(),
            2 * z.sigmoid() * (-z).sigmoid(),
        ),
    )
    yield (
        "linear",
        {"a_prev": x, "W": W, "b": b},
        with_gradient(nnce.linear, "a_prev"),
        linear_oracle,
    )
    yield (
        "sigmoid_cross_entropy",
        {"z": z, "y": y},
        with_gradient(lambda z, y: nnce.sigmoid_cross_entropy(z, y, **none)),
        with_dz(cross_entropy, dz_cross_entropy),
    )
    yield (
        "sigmoid_quadratic",
        {"z": z, "y": y},
        with_gradient(lambda z, y: nnce.sigmoid_quadratic(z, y, **none)),
        with_dz(quadratic, dz_quadratic),
    )
    yield (
        "sigmoid_cross_entropy, weighted",
        {"z": z, "y": y, "weight": b.abs(), "pos_weight": b.abs() + 1},
        lambda **arguments: (nnce.sigmoid_cross_entropy(**arguments, **none),),
        lambda z, y, weight=None, pos_weight=None: (
            same_shapes(z, y, cross_entropy, weight=weight, pos_weight=pos_weight),
        ),
    )
    yield (
        "the module",
        {"z": z, "y": y},
        with_gradient(lambda z, y: nnce.SigmoidCrossEntropyLoss("none")(z, y)),
        with_dz(cross_entropy, dz_cross_entropy),
    )
    yield (
        "linear_sigmoid_cross_entropy",
        {"x": x, "W": W, "y": hard, "linear_bias": b},
        with_gradient(
            lambda x, W, y, linear_bias: nnce.linear_sigmoid_cross_entropy(
                x, W, y, linear_bias=linear_bias, **none
            ),
            "x",
        ),
        labels_oracle,
    )
    yield (
        "pair_sigmoid_cross_entropy",
        {"x": x, "y": draw(N, FEATURES, dtype=dtype, seed=5), **numbers},
        lambda **arguments: (nnce.pair_sigmoid_cross_entropy(**arguments, **none),),
        pairs_oracle,
    )
    yield "backprop", {"W": W, "b": b, "x": x, "y": y}, backprop, backprop_oracle
    if dtype == torch.float32:
        order = torch.arange(N)
        yield "Ensemble", {"x": x, "y": y, "order": order}, ensemble, ensemble_oracle
    yield (
        "data.check",
        {"x": x.sigmoid(), "y": y},
        lambda x, y: (data.check(x, y), x, y)[1:],
        lambda x, y: (_in_range(x), _in_range(y)),
    )
    yield (
        "data.one_hot",
        {"labels": torch.tensor([0, 2, 1])},
        lambda labels: (data.one_hot(labels, 3),),
        lambda labels: (torch.eye(3, dtype=torch.float64)[labels.long()],),
    )


def _in_range(values):
    assert values.dim() == 2 and len(values) and ((values >= 0) & (values <= 1)).all()
    return values


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def close(found, expected, inputs):
    """Whether a result is right, as far as the dtypes on its way go."""
    if found.shape != expected.shape:
        return False
    if not found.is_floating_point():
        return torch.equal(plain(found), expected)
    tensors = [t for t in inputs if isinstance(t, torch.Tensor) and t.is_floating_point()]
    tolerance = max(TOLERANCE[t.dtype] for t in (*tensors, found))
    # Of numbers near 0 next to others, what is lost by cancelling is as large as those.
    finite = [plain(t)[plain(t).isfinite()].abs().flatten().tolist() for t in tensors]
    ours = expected[expected.isfinite()].abs().flatten().tolist()
    scale = min(1.0, max([0.0, *ours]))
    largest = max([0.0, *itertools.chain(*finite)])
    scale = largest if largest > 1e3 else scale
    # And of numbers below the normal ones some of the last digit.
    smallest = max(torch.finfo(t.dtype).smallest_normal * torch.finfo(t.dtype).eps for t in tensors)
    # Where sums of the largest numbers run over on their way, no finite number is known.
    limits = torch.finfo(found.dtype)
    extreme = any(
        number > torch.finfo(t.dtype).max / 100
        for t, numbers in zip(tensors, finite, strict=True)
        for number in numbers
    )
    found, fits = plain(found), expected.abs() <= limits.max
    over = ~found.isfinite() & (~fits | expected.isnan() | extreme)
    same = (found - expected).abs() <= tolerance * (expected.abs() + scale) + 10 * smallest
    return bool((over | same | (found == expected) | (found.isnan() & expected.isnan())).all())


def tried(name, arguments, call, oracle):
    """What becomes of a call: "right", or the kind of error; anything else is what is wrong."""
    try:
        found = call(**arguments)
    except NAMED as error:
        words = str(error)
        if not words or "INTERNAL ASSERT" in words:
            return f"WRONG: an error without a sentence: {words!r}"
        return type(error).__name__
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {str(error).splitlines()[0][:150]}"
    if any(isinstance(value, torch.Tensor) and value.is_meta for value in arguments.values()):
        return "right" if all(value.is_meta for value in found) else "WRONG: not on meta"
    try:
        expected = oracle(**{name: plain(value) for name, value in arguments.items()})
    except Exception as error:
        return f"WRONG: taken, where the oracle says {type(error).__name__}: {error}"
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
        if not close(ours, theirs, arguments.values()):
            return f"WRONG: result {number} is {plain(ours).tolist()}, not {theirs.tolist()}"
    return "right"


def trials(dtype, pairs):
    """Each argument of each function in each way, and a number of random pairs of them."""
    for name, arguments, call, oracle in valid(dtype):
        places = list(itertools.product(arguments, KINDS))
        chance = random.Random(name)
        for changes in [(place,) for place in places] + [
            tuple(chance.sample(places, 2)) for _ in range(pairs)
        ]:
            changed = dict(arguments)
            try:
                for argument, kind in changes:
                    changed[argument] = KINDS[kind](arguments[argument])
            except (RuntimeError, IndexError, TypeError):
                continue  # there is no such tensor
            yield f"{name}, {dtype}: {changes}", name, changed, call, oracle


@pytest.mark.parametrize(
    ("dtypes", "pairs"),
    [
        pytest.param((torch.float32,), 3, marks=pytest.mark.slow),
        pytest.param(tuple(TOLERANCE), 300, marks=pytest.mark.exhaustive, id="exhaustive"),
    ],
)
def test_a_right_result_or_an_error_that_says_why(dtypes, pairs, record_property):
    found, wrong = Counter(), []
    for dtype in dtypes:
        for what, *trial in trials(dtype, pairs):
            result = tried(*trial)
            found[result if result in ("right", *(e.__name__ for e in NAMED)) else "wrong"] += 1
            if result.startswith("WRONG"):
                wrong.append(f"{what}: {result}")
    record_property("trials", dict(found))
    assert not wrong, f"{len(wrong)} of {sum(found.values())}\n" + "\n".join(wrong[:40])
    assert found.total() > 500 * len(dtypes) and found["right"] > found.total() / 10
    assert found["TypeError"] > 50 and found["ValueError"] > 50


def test_targets_that_ask_for_a_gradient_get_the_right_one():
    """As PyTorch's do, where the loss is a Function; refused where it walks."""
    z, y = draw(N, COMPONENTS).double(), draw(N, COMPONENTS, seed=3).double().sigmoid()
    y.requires_grad_()
    for loss, expected in (
        (nnce.sigmoid_cross_entropy, -z),
        (nnce.sigmoid_quadratic, y.detach() - z.sigmoid()),
    ):
        (gradient,) = torch.autograd.grad(loss(z, y, reduction="sum"), y)
        torch.testing.assert_close(gradient, expected)
    with pytest.raises(ValueError, match="gradient"):
        nnce.linear_sigmoid_cross_entropy(z, draw(COMPONENTS, COMPONENTS).double(), y)
