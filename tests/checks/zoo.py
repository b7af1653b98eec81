"""Functions with right and with wrong derivatives, for `check_gradients` to tell apart.

Each kind of mistake is one that `torch.autograd.gradcheck`, or an earlier `check_gradients`, let
pass, or that people make.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import nnce

F = torch.nn.functional


class Animal(NamedTuple):
    name: str
    right: bool
    function: object
    inputs: object
    """Of a number of elements and a generator."""


ZOO: list[Animal] = []
LOW: list[Animal] = []
"""Those that compute in low precision, forward and backward."""


def normal(n, generator, scale=1.0):
    return scale * torch.randn(n, generator=generator, dtype=torch.float64)


def positive(n, generator):
    return normal(n, generator).abs() + 0.01


def rows(n, generator):
    """In rows of three where that can be."""
    values = normal(n, generator)
    return values.view(-1, 3) if n % 3 == 0 else values.view(1, -1)


def add(name, function, inputs=normal, *, right):
    def as_tuple(n, generator):
        made = inputs(n, generator)
        return made if isinstance(made, tuple) else (made,)

    ZOO.append(Animal(name, right, function, as_tuple))


# ------------------------------------------------------------------------------------- the right


def z_and_y(n, generator):
    return normal(n, generator, 3.0), torch.rand(n, generator=generator, dtype=torch.float64)


def layer(n, generator):
    n_in = max(1, n // 4)
    return normal(n_in, generator), normal(3 * n_in, generator).view(3, n_in), normal(3, generator)


add("nnce.sigmoid", nnce.sigmoid, right=True)
for loss in (nnce.sigmoid_cross_entropy, nnce.sigmoid_quadratic):
    add(
        f"{loss.__name__}, none",
        lambda z, y, f=loss: f(z, y, reduction="none"),
        z_and_y,
        right=True,
    )
    add(f"{loss.__name__}, batchmean", loss, z_and_y, right=True)
add("nnce.linear", nnce.linear, layer, right=True)
add("1/x at 0.003", lambda x: 1 / x, lambda n, g: 0.003 * (1 + positive(n, g)), right=True)
add("tan near its pole", torch.tan, lambda n, g: 1.57 - 0.01 * positive(n, g), right=True)
add("tanh(1000 x)", lambda x: torch.tanh(1000 * x), lambda n, g: normal(n, g, 1e-3), right=True)
add("sin(100 x)", lambda x: torch.sin(100 * x), right=True)
add("sin(512 pi x) + x^3", lambda x: x**3 + torch.sin(512 * math.pi * x), right=True)
add("log", torch.log, positive, right=True)
add("sqrt", torch.sqrt, positive, right=True)
add("exp", torch.exp, right=True)
add("relu", torch.relu, right=True)
add("abs", torch.abs, right=True)
add("relu at its kink", torch.relu, lambda n, g: normal(n, g).round(), right=True)
add("clamp", lambda x: x.clamp(-1, 1), right=True)
add("huber", lambda x: F.huber_loss(x, torch.zeros_like(x), reduction="none"), right=True)
add("hard step", lambda x: x * (x > 0.3), right=True)
add("sort", lambda x: x.sort().values, right=True)
add("max", lambda x: x.max(), right=True)
add("2 x", lambda x: 2 * x, right=True)
add("x^2 with zeros", lambda x: x**2, lambda n, g: normal(n, g).round(), right=True)
add("softmax", lambda x: x.softmax(-1), right=True)
add("logsumexp", lambda x: x.logsumexp(-1), right=True)
add("norm", lambda x: x.norm(), right=True)
add("cumsum", lambda x: x.cumsum(0), right=True)
add("x (x - mean)", lambda x: x * (x - x.mean()), right=True)
add("in place", lambda x: x.mul_(2).sigmoid_(), right=True)
add("float32 inside", lambda x: x.float().sin().double(), right=True)
add("a view of rows", lambda x: x.mT.sin().mT, rows, right=True)
add("x y", lambda x, y: x * y, lambda n, g: (normal(n, g), normal(n, g)), right=True)
add("x + b", lambda x, b: x * b.cos(), lambda n, g: (rows(n, g), normal(1, g)), right=True)


class Sin(Function):
    """Right, with a jvp."""

    @staticmethod
    def forward(z):
        return z.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        (z,) = ctx.saved_tensors
        return upstream * z.cos()

    @staticmethod
    def jvp(ctx, dz):
        (z,) = ctx.saved_tensors
        return dz * z.cos()


class SinOnce(Function):
    """Right, and refuses a second derivative and forward mode."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (z,) = ctx.saved_tensors
        return upstream * z.cos()


add("Sin", Sin.apply, right=True)
add("Sin, once differentiable", SinOnce.apply, right=True)


# ------------------------------------------------------------------------------------- the wrong


def wrong(name, forward, backward, inputs=normal, jvp=None):
    """A Function of such rules, the backward of the saved inputs and the upstream gradient."""
    forward_rule, backward_rule, jvp_rule = forward, backward, jvp

    class Wrong(Function):
        @staticmethod
        def forward(*inputs):
            return forward_rule(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, upstream):
            return backward_rule(ctx, *ctx.saved_tensors, upstream)

    if jvp is not None:
        Wrong.jvp = staticmethod(lambda ctx, *tangents: jvp_rule(*ctx.saved_tensors, *tangents))
    add(name, Wrong.apply, inputs, right=False)


def wide(n, generator):
    """From −20 to 20, and one of them in saturation for certain."""
    z = normal(n, generator, 7.0).clamp(-20, 20)
    z[n // 2] = 14.0
    return z


def prime(z):
    return z.sigmoid() * (-z).sigmoid()


def one_element(gradient, change):
    """A gradient with one element changed, the last of those of middling size."""
    flat = gradient.flatten()
    chosen = torch.zeros_like(flat)
    chosen[flat.abs().argsort()[len(flat) // 2]] = 1.0
    return gradient + (change(flat) * chosen).view(gradient.shape)


wrong(
    "0 in saturation",
    torch.sigmoid,
    lambda ctx, z, u: u * torch.where(z.abs() < 12, prime(z), 0 * z),
    wide,
)
wrong(
    "0 in saturation, summed",
    lambda z: z.sigmoid().sum(),
    lambda ctx, z, u: u * torch.where(z.abs() < 12, prime(z), 0 * z),
    wide,
)
for change, how in (
    (lambda g: -g, "0"),
    (lambda g: 1e-3 * g, "off by 1e-3"),
    (lambda g: -2 * g, "negated"),
):
    wrong(
        f"one element {how}",
        torch.exp,
        lambda ctx, z, u, change=change: one_element(u * z.exp(), change),
    )
wrong(
    "one element 0, softmax",
    lambda z: z.softmax(-1),
    lambda ctx, z, u: one_element(
        z.softmax(-1) * (u - (u * z.softmax(-1)).sum(-1, keepdim=True)), lambda g: -g
    ),
    lambda n, g: normal(max(n, 2), g),
)
wrong("negated", torch.sin, lambda ctx, z, u: -u * z.cos())
wrong("half", torch.sin, lambda ctx, z, u: u * z.cos() / 2)
wrong("off by 1e-4", torch.sin, lambda ctx, z, u: u * z.cos() * (1 + 1e-4))
wrong("ignores the upstream gradient", torch.sin, lambda ctx, z, u: z.cos())
wrong("upstream gradient squared", torch.sin, lambda ctx, z, u: u * u * z.cos())
wrong("gradient reversal", lambda z: z.clone(), lambda ctx, z, u: -u)
wrong("straight through", torch.round, lambda ctx, z, u: u)
wrong(
    "sin(512 pi x) forgotten",
    lambda x: x**3 + torch.sin(512 * math.pi * x),
    lambda ctx, x, u: u * 3 * x**2,
)
wrong(
    "wrong near 0",
    torch.exp,
    lambda ctx, z, u: u * torch.where(z.abs() < 0.05, 1.1, z.exp()),
    lambda n, g: normal(n, g) * (torch.arange(n) != n // 2),
)
wrong(
    "leaky relu without the leak",
    lambda z: F.leaky_relu(z, 0.01),
    lambda ctx, z, u: u * (z > 0),
    lambda n, g: -positive(n, g),
)
wrong("all NaN", torch.sin, lambda ctx, z, u: u * math.nan)
wrong("one infinite", torch.exp, lambda ctx, z, u: one_element(u * z.exp(), lambda g: g * math.inf))
wrong("all 0", torch.exp, lambda ctx, z, u: 0 * u)
wrong(
    "dz quadratic without sigma prime",
    lambda z, y: (z.sigmoid() - y) ** 2 / 2,
    lambda ctx, z, y, u: (u * (z.sigmoid() - y), u * (y - z.sigmoid())),
    z_and_y,
)
wrong(
    "inputs exchanged",
    lambda x, y: x * y.exp(),
    lambda ctx, x, y, u: (u * x * y.exp(), u * y.exp()),
    lambda n, g: (normal(n, g), normal(n, g)),
)
wrong(
    "W transposed",
    lambda a, W: a @ W.T,
    lambda ctx, a, W, u: (u @ W.T, u.T @ a),
    lambda n, g: (normal(9, g).view(3, 3), normal(9, g).view(3, 3)),
)
wrong(
    "db averaged",
    lambda x, b: x + b,
    lambda ctx, x, b, u: (u, u.mean(0)),
    lambda n, g: (normal(2 * n, g).view(2, n), normal(n, g)),
)
wrong("second derivative: hidden", lambda z: z**2, lambda ctx, z, u: u * (2 * z).detach())
wrong("second derivative: upstream hidden", torch.sin, lambda ctx, z, u: u.detach() * z.cos())
wrong("second derivative: all hidden", torch.sin, lambda ctx, z, u: (u * z.cos()).detach())
wrong("jvp negated", torch.sin, lambda ctx, z, u: u * z.cos(), jvp=lambda z, dz: -dz * z.cos())
wrong(
    "jvp without the tangent", torch.sin, lambda ctx, z, u: u * z.cos(), jvp=lambda z, dz: z.cos()
)
wrong("jvp None", torch.sin, lambda ctx, z, u: u * z.cos(), jvp=lambda z, dz: None)
wrong(
    "jvp of another shape",
    torch.sin,
    lambda ctx, z, u: u * z.cos(),
    jvp=lambda z, dz: (dz * z.cos()).sum().expand(2, 2),
)


def raises(z, dz):
    raise RuntimeError("no forward mode today")


wrong("jvp raises", torch.sin, lambda ctx, z, u: u * z.cos(), jvp=raises)


def only_together(ctx, x, y, u):
    """Right only where both are asked for."""
    both = all(ctx.needs_input_grad)
    return u * y, u * (x if both else 2 * x)


wrong(
    "wrong where one input is frozen",
    lambda x, y: x * y,
    only_together,
    lambda n, g: (normal(n, g), normal(n, g)),
)


def memory(t):
    """The first numbers in memory, whatever the strides."""
    return torch.as_strided(t, t.shape, torch.empty(t.shape).stride())


def matrices(n, generator):
    return normal(2 * (n + 1), generator).view(2, n + 1)


wrong("inputs read as if contiguous", torch.sin, lambda ctx, z, u: u * memory(z).cos(), matrices)
wrong("upstream read as if contiguous", torch.sin, lambda ctx, z, u: memory(u) * z.cos(), matrices)
wrong(
    "value of inputs read as if contiguous",
    lambda z: memory(z).sin(),
    lambda ctx, z, u: u * memory(z).cos(),
    matrices,
)


def overwrites(ctx, z, u):
    with torch.no_grad():
        return u.mul_(z.cos())


wrong("overwrites the upstream gradient", torch.sin, overwrites)


class SavedIntermediate(Function):
    """exp(−z²), whose saved answer is a constant to the second derivative."""

    @staticmethod
    def forward(ctx, z):
        a = torch.exp(-z * z)
        ctx.save_for_backward(z)
        ctx.a = a
        return a.clone()

    @staticmethod
    def backward(ctx, upstream):
        (z,) = ctx.saved_tensors
        return -2 * upstream * z * ctx.a


add("second derivative: a saved intermediate", SavedIntermediate.apply, right=False)


# ------------------------------------------------------------ what a second hunt got past the check

wrong("clips the upstream gradient", torch.sin, lambda ctx, z, u: u.clamp(-2, 2) * z.cos())
wrong(
    "upstream gradient without its sign",
    lambda z: z.sin().sum(),
    lambda ctx, z, u: u.abs() * z.cos(),
)
wrong(
    "tangent read as if contiguous",
    torch.sin,
    lambda ctx, z, u: u * z.cos(),
    matrices,
    jvp=lambda z, dz: memory(dz) * z.cos(),
)
add(
    "batch norm",
    lambda x: F.batch_norm(x, None, None, training=True),
    lambda n, g: normal(4 * n, g).view(4, n),
    right=True,
)
add("cumsum of large numbers", lambda x: x.cumsum(0), lambda n, g: normal(n, g, 1e17), right=True)


# -------------------------------------------------- what real graphs send, and what caches do wrong


class Sine(Function):
    """Right; the base of those that are wrong in one way. Its rules are looked up when called."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.sin()

    @staticmethod
    def backward(ctx, upstream):
        (z,) = ctx.saved_tensors
        return upstream * z.cos()


def sine(name, backward, inputs=normal, *, right=False, forward=None, once=False):
    """The sine with another backward, of ctx and the upstream gradient."""
    rule = once_differentiable(backward) if once else backward
    rules = {"backward": staticmethod(rule)}
    if forward is not None:
        rules["forward"] = staticmethod(forward)
    add(name, type("Wrong", (Sine,), rules).apply, inputs, right=right)


def saved(ctx):
    return ctx.saved_tensors[0]


def pops(ctx, upstream):
    return upstream * ctx.kept.pop().cos()


def keeps(ctx, z):
    ctx.kept = [z.detach()]
    return z.sin()


def overwrites_saved(ctx, upstream):
    z = saved(ctx)
    gradient = upstream * z.cos()
    z.data.zero_()
    return gradient


def saves_a_copy(ctx, z):
    ctx.save_for_backward(z.clone())
    return z.sin()


def accumulates(ctx, upstream):
    ctx.total = getattr(ctx, "total", 0) + upstream * saved(ctx).cos()
    return ctx.total.clone()


def keeps_cosine(ctx, z):
    ctx.buffer = z.detach().cos()
    return z.sin()


def scales_its_buffer(ctx, upstream):
    return ctx.buffer.mul_(upstream).clone()


def counts_calls(ctx, upstream):
    ctx.calls = getattr(ctx, "calls", 0) + 1
    return upstream * saved(ctx).cos() * (1 if ctx.calls == 1 else 1.01)


for once in (False, True):
    how = ", once differentiable" if once else ""
    sine(f"second backward: pops what it saved{how}", pops, forward=keeps, once=once)
    sine(
        f"second backward: overwrites what it saved{how}",
        overwrites_saved,
        forward=saves_a_copy,
        once=once,
    )
    sine(f"second backward: accumulates on ctx{how}", accumulates, once=once)
    sine(
        f"second backward: scales its buffer in place{how}",
        scales_its_buffer,
        forward=keeps_cosine,
        once=once,
    )
sine("second backward: counts its calls", counts_calls)


def frees(ctx, upstream):
    z, ctx.kept = ctx.kept, None
    return upstream * (z.cos() if z is not None else 0 * upstream)


def keeps_alone(ctx, z):
    ctx.kept = z.detach()
    return z.sin()


sine("second backward: frees what it kept", frees, forward=keeps_alone)


class LastCall(Sine):
    """Keeps z on the class: wrong where two forwards precede the backward."""

    @staticmethod
    def forward(ctx, z):
        LastCall.z = z.detach()
        return z.sin()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * LastCall.z.cos()


class Cached(Sine):
    """Keeps one buffer of cosines for all calls of a shape, overwritten by each forward."""

    buffers: dict = {}  # noqa: RUF012  a mistake, on purpose

    @staticmethod
    def forward(ctx, z):
        ctx.buffer = Cached.buffers.setdefault(z.shape, torch.empty(z.shape, dtype=z.dtype))
        ctx.buffer.copy_(z.detach().cos())
        return z.sin()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.buffer


add("two forwards: the last call's z", LastCall.apply, right=False)
add("two forwards: one buffer for all calls", Cached.apply, right=False)


# Upstream gradients with zeros, of any size, all ones.
sine("zeros: g g / g", lambda ctx, u: u * u / u * saved(ctx).cos())
sine("zeros: skips where any is 0", lambda ctx, u: u * saved(ctx).cos() * (u != 0).all())
sine(
    "zeros: by the logarithm",
    lambda ctx, u: u.sign() * u.abs().log().exp() / u.sign().abs() * saved(ctx).cos(),
)
sine("zeros: ε for 0", lambda ctx, u: torch.where(u == 0, 1e-3, u) * saved(ctx).cos())
sine("zeros: by the norm", lambda ctx, u: u / u.norm() * u.norm() * saved(ctx).cos())
sine(
    "tiny: cut below 1e-7", lambda ctx, u: torch.where(u.abs() < 1e-7, 0 * u, u) * saved(ctx).cos()
)
sine("large: clipped at 1000", lambda ctx, u: u.clamp(-1e3, 1e3) * saved(ctx).cos())
sine("large: tanh of a thousandth", lambda ctx, u: 1e4 * (u / 1e4).tanh() * saved(ctx).cos())
sine("small: through half precision", lambda ctx, u: (u * 1.0).half().double() * saved(ctx).cos())
sine("ones: a shortcut that is off", lambda ctx, u: saved(ctx).cos() * (2 if (u == 1).all() else u))
sine(
    "largest alone decides the scale",
    lambda ctx, u: (u / u.abs().max()).round(decimals=3) * u.abs().max() * saved(ctx).cos(),
)
sine(
    "right: a shortcut for ones",
    lambda ctx, u: saved(ctx).cos() * (1 if (u == 1).all() else u),
    right=True,
)
sine(
    "second derivative: 0 where the upstream gradient is",
    lambda ctx, u: torch.where(u == 0, 0 * u, u * saved(ctx).cos()),
)


# Layouts that real graphs send.
def of_storage(t):
    """From the first number in memory on, as if there were no offset."""
    return torch.as_strided(t, t.shape, t.stride(), 0)


def wide_matrices(n, generator):
    return normal(6 * n, generator).view(2, 3 * n)


def images(n, generator):
    return normal(24 * n, generator).view(2, 3, 2, 2 * n)


def flat_memory(t):
    """The numbers in memory order, for the shape's order."""
    if (
        not t.is_contiguous()
        and t.dim() == 4
        and t.is_contiguous(memory_format=torch.channels_last)
    ):
        return t.permute(0, 2, 3, 1).reshape(t.shape)
    return t


def expanded_along(dim):
    def rule(ctx, upstream):
        off = upstream.dim() > dim and upstream.stride(dim) == 0 and upstream.shape[dim] > 1
        return upstream * saved(ctx).cos() * (1.5 if off else 1)

    return rule


sine("upstream expanded along dimension 0", expanded_along(0), wide_matrices)
sine("upstream expanded along dimension 1", expanded_along(1), wide_matrices)
sine(
    "upstream expanded along all",
    lambda ctx, u: (
        u * saved(ctx).cos() * (2 if u.dim() and not any(u.stride()) and u.numel() > 1 else 1)
    ),
    wide_matrices,
)
sine(
    "upstream at an offset",
    lambda ctx, u: (of_storage(u) if u.storage_offset() else u) * saved(ctx).cos(),
    matrices,
)
sine("upstream channels_last", lambda ctx, u: flat_memory(u) * saved(ctx).cos(), images)
sine(
    "upstream strided",
    lambda ctx, u: torch.as_strided(u, u.shape, torch.empty(u.shape).stride()) * saved(ctx).cos(),
    wide_matrices,
)


def sine_of(change):
    """A sine whose backward reads its input in a way that depends on the layout."""

    def backward(ctx, upstream):
        return upstream * change(saved(ctx)).cos()

    return backward


sine("input at an offset", sine_of(lambda z: of_storage(z) if z.storage_offset() else z), matrices)
sine("input channels_last", sine_of(flat_memory), images)
sine(
    "input with stride 0",
    sine_of(lambda z: z * (2 if 0 in z.stride() and z.numel() > 1 else 1)),
    wide_matrices,
)
sine("input transposed", sine_of(lambda z: z if z.is_contiguous() else z + 0.1), wide_matrices)
sine("right: whatever the layout", sine_of(lambda z: z.contiguous()), images, right=True)


# Two inputs that are one, values that depend on who asks, tangents that are not there.
class Aliased(Function):
    """x y, of which the gradients are wrong where x and y are the same tensor."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        ctx.same = x.data_ptr() == y.data_ptr()
        return x * y

    @staticmethod
    def backward(ctx, upstream):
        x, y = ctx.saved_tensors
        return (upstream * x, None) if ctx.same else (upstream * y, upstream * x)


def pair(n, generator):
    return normal(n, generator), normal(n, generator)


add("x y: wrong where both are the same tensor", Aliased.apply, pair, right=False)
add(
    "value: 1e-3 more where a gradient is requested",
    lambda x: x.sin() * (1.001 if x.requires_grad else 1),
    right=False,
)
add("x y of one and the same", lambda x: x * x, right=True)


class Tangents(Function):
    """x y with a jvp that is told what is not there by None."""

    @staticmethod
    def forward(x, y):
        return x * y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        x, y = ctx.saved_tensors
        return upstream * y, upstream * x

    @staticmethod
    def jvp(ctx, dx, dy):
        x, y = ctx.saved_tensors
        return dx * y + x * dy  # fails where one of them is None


class IgnoresTangents(Tangents):
    @staticmethod
    def jvp(ctx, dx, dy):
        x, y = ctx.saved_tensors
        return torch.zeros_like(x) if dx is None or dy is None else dx * y + x * dy


class RightTangents(Tangents):
    @staticmethod
    def jvp(ctx, dx, dy):
        x, y = ctx.saved_tensors
        return (0 if dx is None else dx * y) + (0 if dy is None else x * dy)


add("jvp: fails where a tangent is None", Tangents.apply, pair, right=False)
add("jvp: 0 where a tangent is None", IgnoresTangents.apply, pair, right=False)
add("jvp: tangents may be None", RightTangents.apply, pair, right=True)
wrong(
    "jvp clipped",
    torch.sin,
    lambda ctx, z, u: u * z.cos(),
    jvp=lambda z, dz: dz.clamp(-9, 9) * z.cos(),
)
wrong(
    "jvp one element off",
    lambda z: z.softmax(-1),
    lambda ctx, z, u: z.softmax(-1) * (u - (u * z.softmax(-1)).sum(-1, keepdim=True)),
    lambda n, g: normal(n + 1, g),
    jvp=lambda z, dz: one_element(
        z.softmax(-1) * (dz - (dz * z.softmax(-1)).sum(-1, keepdim=True)), lambda t: 1e-3 * t
    ),
)


# Second derivatives.
class Cosine(Function):
    """cos, whose own derivative is half of what it should be."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.cos()

    @staticmethod
    def backward(ctx, upstream):
        (z,) = ctx.saved_tensors
        return -upstream * z.sin() / 2


sine("second derivative: half", lambda ctx, u: u * Cosine.apply(saved(ctx)))
sine(
    "gradient under create_graph differs",
    lambda ctx, u: u * saved(ctx).cos() * (1.1 if torch.is_grad_enabled() else 1),
)


class CosineOnce(Cosine):
    """Its backward pops what it kept: wrong the second time."""

    @staticmethod
    def forward(ctx, z):
        ctx.kept = [z.detach()]
        return z.cos()

    @staticmethod
    def backward(ctx, upstream):
        return -upstream * (ctx.kept.pop().sin() if ctx.kept else 0 * upstream)


sine("second derivative: wrong the second time", lambda ctx, u: u * CosineOnce.apply(saved(ctx)))


# ---------------------------------------------- piecewise functions, plateaus, zeros of derivatives


def away(*kinks):
    """At least 0.3 from every kink."""

    def made(n, generator):
        x = 8 * torch.rand(400 * n, generator=generator, dtype=torch.float64) - 4
        far = torch.stack([(x - kink).abs() >= 0.3 for kink in kinks]).all(0)
        return x[far][:n]

    return made


def spaced(n, generator):
    """Numbers of which any two are at least 0.3 apart."""
    return 0.32 * torch.randperm(n, generator=generator).double() - 2


for name, function, kinks in (
    ("relu", F.relu, (0,)),
    ("abs", torch.abs, (0,)),
    ("hardtanh", F.hardtanh, (-1, 1)),
    ("leaky relu", F.leaky_relu, (0,)),
    ("hardswish", F.hardswish, (-3, 3)),
    ("relu²", lambda x: F.relu(x) ** 2, (0,)),
    ("hinge", lambda x: F.relu(1 - x).mean(), (1,)),
    ("squared hinge", lambda x: (F.relu(1 - x) ** 2).mean(), (1,)),
    ("floor", torch.floor, range(-5, 6)),
    ("fraction", torch.frac, range(-5, 6)),
    ("triangle wave", lambda x: (x - 2 * (x / 2).round()).abs(), range(-5, 6)),
):
    add(f"away from kinks: {name}", function, away(*kinks), right=True)
for name, function in (
    ("cummax", lambda x: x.cummax(0).values),
    ("topk", lambda x: x.topk(max(1, len(x) // 3)).values),
    ("median", torch.median),
    ("range", lambda x: x.max() - x.min()),
    ("second largest", lambda x: x.sort(descending=True).values[: min(2, len(x))].sum()),
):
    add(f"away from ties: {name}", function, spaced, right=True)
for name, function in (
    ("x³ at 0", lambda x: x**3),
    ("5 + x³ at 0", lambda x: 5 + x**3),
    ("Σ x⁵ at 0", lambda x: (x**5).sum()),
    ("cos at 0", torch.cos),
    ("x² (1 + x) at 0", lambda x: x * x * (1 + x)),
):
    add(f"zero of a derivative: {name}", function, lambda n, g: torch.zeros(n).double(), right=True)
add(
    "zero of a derivative: sin at π/2",
    torch.sin,
    lambda n, g: torch.full((n,), math.pi / 2).double(),
    right=True,
)
wrong(
    "NaN at a zero of the derivative",
    lambda z: z**3,
    lambda ctx, z, u: u * (3 * z**2) ** 2 / (3 * z**2),
    lambda n, g: torch.zeros(n).double(),
)
wrong(
    "0.1 on a plateau",
    F.hardtanh,
    lambda ctx, z, u: u * torch.where(z.abs() < 1, 1.0, 0.1),
    lambda n, g: 2 + positive(n, g),
)
wrong(
    "1e-6 on a plateau",
    F.relu,
    lambda ctx, z, u: u * torch.where(z > 0, 1.0, 1e-6),
    lambda n, g: -1 - positive(n, g),
)
wrong(
    "0 in tanh's saturation",
    torch.tanh,
    lambda ctx, z, u: u * torch.where(z.abs() < 9, 1 - z.tanh() ** 2, 0 * z),
    lambda n, g: 9.5 + 0.1 * positive(n, g),
)
wrong(
    "0 where the exponential is small",
    torch.exp,
    lambda ctx, z, u: u * torch.where(z > -30, z.exp(), 0 * z),
    lambda n, g: -40 - positive(n, g),
)


# --------------------------------------------------------------------- float32 inside, or elsewhere


def single(f):
    """The same function in float32."""
    return lambda *inputs: f(*(t.float() for t in inputs)).double()


for name, function in (
    ("exp", torch.exp),
    ("softplus", F.softplus),
    ("logsumexp", lambda x: x.logsumexp(-1)),
    ("layer norm", lambda x: F.layer_norm(x, x.shape)),
    ("mean of squares", lambda x: x.square().mean()),
    ("norm", torch.linalg.vector_norm),
    ("cumsum", lambda x: x.cumsum(0)),
):
    add(f"float32: {name}", single(function), lambda n, g: normal(n + 2, g), right=True)
add("float32: relu away from its kink", single(F.relu), away(0), right=True)
add("float32: a gate of float64 numbers", lambda x: x * x.float().sigmoid(), right=True)
add("float32: a mask alone", lambda x: x.sin() * (x.float() > 0), right=True)
add("float32: next to float64", lambda x: x + x.float().sin(), right=True)


def single_cosine(ctx, upstream):
    return (upstream.float() * saved(ctx).float().cos()).double()


def by_numpy(ctx, z):
    """The sine in float32, out of PyTorch's sight."""
    ctx.save_for_backward(z)
    return torch.from_numpy(np.sin(z.detach().numpy().astype(np.float32)).astype(np.float64))


sine("float32: what is saved", single_cosine, right=True, once=True)
sine("float32: by NumPy", single_cosine, forward=by_numpy, right=True, once=True)
for name, change in (
    ("off by 1e-3", lambda g: 1e-3 * g),
    ("0", lambda g: -g),
    ("half", lambda g: -g / 2),
):
    sine(
        f"float32: one element {name}",
        lambda ctx, u, change=change: one_element(single_cosine(ctx, u), change),
        forward=by_numpy,
        once=True,
    )
sine(
    "float32: what is saved, off by 1e-4",
    lambda ctx, u: single_cosine(ctx, u) * (1 + 1e-4),
    once=True,
)
wrong(
    "float32: 0 in saturation",
    single(torch.sigmoid),
    lambda ctx, z, u: u * torch.where(z.abs() < 9, prime(z), 0 * z),
    wide,
)
wrong(
    "float32: 0 in saturation, summed",
    single(lambda z: z.sigmoid().sum()),
    lambda ctx, z, u: u * torch.where(z.abs() < 9, prime(z), 0 * z),
    wide,
)
wrong("float32: straight through", single(torch.round), lambda ctx, z, u: u)
wrong(
    "float32: jvp off by 1e-3",
    single(torch.sin),
    lambda ctx, z, u: u * z.cos(),
    jvp=lambda z, dz: dz * z.cos() * (1 + 1e-3),
)
wrong(
    "float32: a mask alone, off by 1e-4",
    lambda z: z.sin() * (z.float() > 0),
    lambda ctx, z, u: u * z.cos() * (z > 0) * (1 + 1e-4),
    lambda n, g: positive(n, g),
)
wrong(
    "float32: softmax as if elements were independent",
    single(lambda z: z.softmax(0)),
    lambda ctx, z, u: u * z.softmax(0) * (1 - z.softmax(0)),
    lambda n, g: normal(n + 1, g),
)
add("float32: max", single(torch.max), spaced, right=True)
add("float32: hardtanh away from its kinks", single(F.hardtanh), away(-1, 1), right=True)
add(
    "float32: half of the output",
    lambda x: torch.cat([x.sin(), x.float().cos().double()]),
    right=True,
)
add("float32: 1/x", single(torch.reciprocal), right=True)
wrong(
    "float32: 0 on a step of the staircase",
    single(torch.sigmoid),
    lambda ctx, z, u: u * torch.where(z.abs() < 9, prime(z), 0 * z),
    lambda n, g: 9.5 + torch.rand(n, generator=g, dtype=torch.float64),
)


# --------------------------------------------------------- low precision, forward and backward

_before = len(ZOO)


def low(f, dtype):
    """The same function in another dtype; autograd differentiates it in that dtype."""
    return lambda *inputs: f(*(t.to(dtype) for t in inputs)).double()


def low_but(name, f, dtype, change, inputs):
    """A function in another dtype, whose gradient is changed after it was computed."""
    g = low(f, dtype)
    wrong(name, g, lambda ctx, z, u: change(torch.func.vjp(g, z)[1](u)[0]), inputs)


def low_rule(name, f, dtype, rule, inputs):
    """A function in another dtype with a wrong rule, computed in that dtype."""
    wrong(
        name,
        low(f, dtype),
        lambda ctx, z, u: rule(z.to(dtype), u.to(dtype)).double(),
        inputs,
    )


def one_more(n, generator):
    return normal(n + 1, generator)


def half_by_numpy(z):
    return torch.from_numpy(np.tanh(z.detach().numpy().astype(np.float16)).astype(np.float64))


BASES = (
    ("sigmoid", torch.sigmoid, lambda z, u: u * z.sigmoid()),
    ("product with a sum", lambda z: z * z.sum(), lambda z, u: u * z.sum()),
    ("softmax", lambda z: z.softmax(0), lambda z, u: u * z.softmax(0) * (1 - z.softmax(0))),
    ("summed loss", lambda z: F.softplus(z).sum(), lambda z, u: u * z.sigmoid() ** 2),
    ("mean of tanh", lambda z: z.tanh().mean(), lambda z, u: u * (1 - z.tanh() ** 2)),
    ("layer norm", lambda z: F.layer_norm(z, z.shape), lambda z, u: u / z.std()),
)
for dtype, share in ((torch.float32, 1e-4), (torch.float16, 0.03), (torch.bfloat16, 0.1)):
    for name, function, rule in BASES:
        name = f"{str(dtype)[6:]} both ways: {name}"
        # With two elements a layer norm is a constant.
        made = (lambda n, g: normal(n + 2, g)) if "layer" in name else one_more
        add(name, low(function, dtype), made, right=True)
        low_but(f"{name}, off by {share}", function, dtype, lambda g, k=1 + share: k * g, made)
        low_but(f"{name}, {share} more", function, dtype, lambda g, k=share: k + g, made)
        low_rule(f"{name}, a wrong term", function, dtype, rule, made)
for dtype in (torch.float16, torch.bfloat16):
    name = str(dtype)[6:]
    add(f"{name}: relu away from its kink", low(F.relu, dtype), away(0), right=True)
    add(f"{name}: exp", low(torch.exp, dtype), right=True)
    add(f"{name}: next to float64", lambda x, d=dtype: x + x.to(d).sin(), right=True)
    add(f"{name}: a mask alone", lambda x, d=dtype: x.sin() * (x.to(d) > 0), right=True)
    low_but(f"{name}: negated", torch.exp, dtype, torch.neg, normal)
    low_but(f"{name}: one element 0", torch.exp, dtype, lambda g: one_element(g, torch.neg), normal)
add("float32: next to a large constant", single(lambda x: 1e4 + x.sin()), right=True)
add("float32: a large constant cancels", single(lambda x: ((1e3 + x) - 1e3).sin()), right=True)
wrong(
    "float32: a large constant cancels, off by 0.03",
    single(lambda x: ((1e3 + x) - 1e3).sin()),
    lambda ctx, z, u: 1.03 * u * z.cos(),
)


def half_rule(ctx, z, u):
    return (u.half() * (1 - half_by_numpy(z).half() ** 2)).double()


class HalfByNumpy(Function):
    """tanh in float16, out of PyTorch's sight."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return half_by_numpy(z)

    @staticmethod
    @once_differentiable
    def backward(ctx, u):
        return half_rule(ctx, *ctx.saved_tensors, u)


class HalfByNumpyOff(HalfByNumpy):
    @staticmethod
    @once_differentiable
    def backward(ctx, u):
        return 1.03 * half_rule(ctx, *ctx.saved_tensors, u)


add("float16: by NumPy", HalfByNumpy.apply, right=True)
add("float16: by NumPy, off by 0.03", HalfByNumpyOff.apply, right=False)


def noisy(f, dtype, size):
    """A function in another dtype, whose gradient is right but for noise that changes with x."""
    g = low(f, dtype)

    def rule(ctx, z, u):
        return torch.func.vjp(g, z)[1](u)[0] * (1 + size * (1e9 * z).sin())

    wrong(f"{str(dtype)[6:]}: a gradient with noise of {size}", g, rule)


noisy(torch.sin, torch.float32, 1e-3)
noisy(lambda z: z.tanh().mean(), torch.float32, 0.1)
noisy(torch.exp, torch.float16, 0.3)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for function in (F.hardtanh, F.relu6):
        add(
            f"{str(dtype)[6:]}: {function.__name__} on its plateaus",
            low(function, dtype),
            lambda n, g: (
                (7 + 2 * torch.rand(n, generator=g, dtype=torch.float64))
                * (1 - 2 * (torch.arange(n) % 2))
            ),
            right=True,
        )
        add(
            f"{str(dtype)[6:]}: {function.__name__} both ways, away from its kinks",
            low(function, dtype),
            away(-1, 0, 1, 6),
            right=True,
        )
low_but(
    "float16: 0.1 on a plateau",
    F.hardtanh,
    torch.float16,
    lambda g: g + 0.1,
    lambda n, g: 2 + positive(n, g),
)
for dtype in (torch.float16, torch.bfloat16):
    for function, least in ((torch.sigmoid, 5.0), (torch.tanh, 2.5), (torch.erf, 1.7)):
        # From where values still move to where they do not.
        wrong(
            f"{str(dtype)[6:]}: 0 in the saturation of {function.__name__}",
            low(function, dtype),
            lambda ctx, z, u: 0 * u * z,
            lambda n, g, least=least: least * (1 + torch.rand(n, generator=g).double()),
        )
    # Rounding x makes steps of some percent of the value.
    wrong(
        f"{str(dtype)[6:]}: 0 in the tail of a Gaussian",
        low(lambda z: (-z * z).exp(), dtype),
        lambda ctx, z, u: torch.where(z.abs() > 1.8, 0 * u, -2 * u * z * (-z * z).exp()),
        lambda n, g: 2 + torch.rand(n, generator=g, dtype=torch.float64) / 2,
    )
LOW += ZOO[_before:]


# ------------------------------------------------------------------------ found by a third search


def tiny(n, generator):
    return normal(n, generator, 1e-8)


add("next to a zero: sin at 1e-8", torch.sin, tiny, right=True)
add("next to a zero: cos at 1e-8", torch.cos, tiny, right=True)
wrong("next to a zero: half", torch.cos, lambda ctx, z, u: -u * z.sin() / 2, tiny)
add("an output that is constant", lambda x: torch.cat([x.sin(), x.new_ones(2)]), right=True)
add("elements in no output", lambda x: x[::3].exp(), right=True)
add(
    "elements added up by index",
    lambda x: x.new_zeros(2).index_add(0, torch.arange(len(x)) % 2, x).sin(),
    right=True,
)
add("complex inside", lambda x: (torch.complex(x, x.cos()) ** 2).imag, right=True)
for name, maximum, right in (
    ("log-sum-exp by hand", lambda x: x.max().detach(), True),
    ("log-sum-exp by hand, half of the maximum detached", torch.max, False),
):
    add(
        name,
        lambda x, m=maximum: (x - x.max().detach()).exp().sum().log() + m(x),
        right=right,
    )
add("atan2", torch.atan2, pair, right=True)
wrong(
    "1e-9 of an element forgotten",
    lambda z: (z[0] * z[1:2]).sum() + 1e-9 * z[2:].sum(),
    lambda ctx, z, u: torch.cat([(u * z[1:2]).sum().view(1), u * z[:1], 0 * z[2:]]),
    lambda n, g: normal(n + 2, g),
)
wrong(
    "0 in the saturation of a difference",
    lambda z: 1 + F.softplus(z[0] - z[1].abs() - 40),
    lambda ctx, z, u: 0 * u * z,
    lambda n, g: normal(2, g),
)
wrong(
    "0 where a minimum inside of a maximum decides",
    lambda z: torch.maximum(z[0], z[1:].min()),
    lambda ctx, z, u: torch.cat([u.view(1), 0 * z[1:]]),
    lambda n, g: torch.arange(n + 2).double() + normal(n + 2, g, 0.01),
)
wrong(
    "softmax as if elements were independent",
    lambda z: z.softmax(0),
    lambda ctx, z, u: u * z.softmax(0) * (1 - z.softmax(0)),
    lambda n, g: normal(n + 1, g),
)
wrong(
    "the gradient of another GELU",
    F.gelu,
    lambda ctx, z, u: torch.func.vjp(lambda t: F.gelu(t, approximate="tanh"), z)[1](u)[0],
)


def every_seventh(ctx, upstream):
    calls.append(None)
    return upstream * saved(ctx).cos() * (1 if len(calls) % 7 else 1.1)


calls: list[None] = []
sine("wrong at every seventh backward of all", every_seventh)


def into_buffer(ctx, z):
    """The sine in memory that all calls share."""
    ctx.save_for_backward(z)
    ctx.buffer = outputs.setdefault(z.shape, torch.empty(z.shape, dtype=z.dtype))
    return ctx.buffer.copy_(z.detach().sin())


outputs: dict[torch.Size, torch.Tensor] = {}
sine(
    "an output in shared memory",
    lambda ctx, u: u * (1 - ctx.buffer**2).sqrt() * saved(ctx).cos().sign(),
    forward=into_buffer,
    once=True,
)


# Memory that calls share, inputs that are frozen or laid out in longer rows.
def in_one_buffer(buffers, values):
    return buffers.setdefault(values.shape, torch.empty_like(values)).copy_(values)


gradients: dict[torch.Size, torch.Tensor] = {}
sine(
    "a gradient in shared memory",
    lambda ctx, u: in_one_buffer(gradients, u * saved(ctx).cos()),
    once=True,
)


class TangentInSharedMemory(Sin):
    """A jvp that returns the same memory at each call."""

    buffers: dict = {}  # noqa: RUF012  a mistake, on purpose

    @staticmethod
    def jvp(ctx, dz):
        return in_one_buffer(TangentInSharedMemory.buffers, Sin.jvp(ctx, dz))


add("a tangent in shared memory", TangentInSharedMemory.apply, right=False)


def remembers_by_address(ctx, z):
    """The cosine that was computed at the first call with this memory, which is kept."""
    ctx.cosine, _ = cosines.setdefault(z.data_ptr(), (z.detach().cos(), z.detach()))
    return z.sin()


cosines: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
sine("cosines by address", lambda ctx, u: u * ctx.cosine, forward=remembers_by_address, once=True)


def read_in_order(t):
    """As if rows followed each other where the elements of a row do."""
    return t if t.stride(-1) != 1 or 0 in t.stride() else t.as_strided(t.shape, contiguous(t.shape))


def contiguous(shape):
    return torch.empty(shape).stride()


sine("input padded", sine_of(read_in_order), wide_matrices)
sine("upstream padded", lambda ctx, u: read_in_order(u) * saved(ctx).cos(), wide_matrices)


class DetachedIfFrozen(Function):
    """x² y, of whose gradient no derivative is taken with respect to x if y is frozen."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * x * y

    @staticmethod
    def backward(ctx, upstream):
        x, y = ctx.saved_tensors
        dy = upstream * x * x
        x = x if all(ctx.needs_input_grad) else x.detach()
        return 2 * upstream * x * y, dy


add("second derivative: 0 if an input is frozen", DetachedIfFrozen.apply, pair, right=False)


# Right where they are asked, and without a value or a derivative at points that the check makes.
def square_matrix(n, generator):
    side = max(2, math.isqrt(n))
    return normal(side * side, generator).view(side, side) + 3 * torch.eye(side)


def by_rule(name, f, rule, inputs):
    """A Function f with a backward of the upstream gradient and the inputs."""

    def backward(ctx, upstream):
        return rule(upstream, *ctx.saved_tensors)

    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return f(*tensors)

    rules = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    add(name, type("ByRule", (Function,), rules).apply, inputs, right=True)


by_rule(
    "right: log det",
    lambda A: torch.linalg.slogdet(A)[1],
    lambda u, A: u * torch.linalg.inv(A).mT,
    square_matrix,
)
by_rule(
    "right: det by the inverse",
    torch.linalg.det,
    lambda u, A: u * torch.linalg.det(A) * torch.linalg.inv(A).mT,
    square_matrix,
)


def between_two_points(upstream, x, y):
    if torch.equal(x, y):
        raise ZeroDivisionError("the points coincide")
    away = upstream * (x - y) / (x - y).norm()
    return away, -away


by_rule("right: distance", lambda x, y: (x - y).norm(), between_two_points, pair)
add("right: inverse", torch.linalg.inv, square_matrix, right=True)


def over_knots(x):
    if not (x.diff() > 0).all():
        raise ValueError("expected knots that increase")
    return torch.trapezoid(x.sin(), x)


add(
    "right: knots that increase",
    over_knots,
    lambda n, g: positive(n + 1, g).cumsum(0),
    right=True,
)
add(
    "right: forward mode inside",
    torch.func.jacfwd(lambda t: t.exp() * t.sum()),
    lambda n, g: normal(min(n, 6), g),
    right=True,
)
