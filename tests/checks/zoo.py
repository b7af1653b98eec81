"""Functions with right and with wrong derivatives, for `check_gradients` to tell apart.

Each kind of mistake is one that `torch.autograd.gradcheck`, or an earlier `check_gradients`, let
pass, or that people make.
"""

import math
from typing import NamedTuple

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
