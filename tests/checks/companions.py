"""Functions that work with the rest of PyTorch, and ones silently wrong in one way each."""

from typing import NamedTuple

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

NESTED = "forward mode in forward mode"  # silently wrong for whatever has a jvp: pytorch #192985


class Companion(NamedTuple):
    name: str
    function: object
    inputs: tuple
    wrong: str
    """The feature with which it is silently wrong; empty if it works with all, or says itself."""


COMPANIONS: list[Companion] = []
Z = torch.tensor([[0.3, -1.2], [0.7, 2.0], [-0.4, 1.1]], dtype=torch.float64)
W = torch.tensor([[1.3, 0.2], [-0.7, 0.4], [0.6, -1.5]], dtype=torch.float64)


def add(name, function, *inputs, wrong=""):
    COMPANIONS.append(Companion(name, function, inputs or (Z,), wrong))


def elementwise(f, df, **rules):
    """A Function of one input, with rules in place of the right ones."""

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    right = {
        "generate_vmap_rule": "vmap" not in rules,
        "forward": staticmethod(lambda z: f(z)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(lambda ctx, u: u * df(ctx.saved_tensors[0])),
        "jvp": staticmethod(lambda ctx, dz: dz * df(ctx.saved_tensors[0])),
    }
    changed = {name: staticmethod(rule) for name, rule in rules.items() if callable(rule)}
    dropped = {name for name, rule in rules.items() if rule is None}
    body = {name: rule for name, rule in {**right, **changed}.items() if name not in dropped}
    return type("Elementwise", (Function,), body)


KINDS = {
    "square": (torch.square, lambda z: 2 * z),
    "sine": (torch.sin, torch.cos),
    "exp": (torch.exp, torch.exp),
    "softplus": (torch.nn.functional.softplus, torch.sigmoid),
    "cube": (lambda z: z**3, lambda z: 3 * z**2),
}
square = KINDS["square"]


# ------------------------------------------------------------------------------------- the right

for kind, rules in KINDS.items():
    add(f"{kind}: with a jvp", elementwise(*rules).apply)
    add(f"{kind}: without a jvp", elementwise(*rules, jvp=None).apply)
for kind in ("square", "sine"):
    f, df = KINDS[kind]
    add(
        f"{kind}: once differentiable",
        elementwise(
            f, df, backward=once_differentiable(lambda ctx, u, df=df: u * df(ctx.saved_tensors[0]))
        ).apply,
    )
add(
    "square: a vmap rule of its own",
    (VMAPPED := elementwise(*square, jvp=None, vmap=lambda info, dims, z: (z * z, dims[0]))).apply,
)
add("tanh times z", lambda z: torch.tanh(z) * z)
add("softmax", lambda z: z.softmax(-1))
add("logsumexp", lambda z: z.logsumexp(-1))
add("layer norm", lambda z: torch.nn.functional.layer_norm(z, (2,)))
add(
    "matrix product",
    lambda z: z @ torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=z.dtype, device=z.device),
)
add("mean of squares", lambda z, w: torch.nn.functional.mse_loss(z, w), Z, W)
add("in place, by PyTorch", lambda z: z.mul_(2).sigmoid_())


class InPlace(Function):
    """2z in place, as it should be."""

    @staticmethod
    def forward(ctx, z):
        ctx.mark_dirty(z)
        return z.mul_(2)

    @staticmethod
    def backward(ctx, upstream):
        return 2 * upstream


add("in place, marked dirty", InPlace.apply)


def product(**rules):
    """A Function of two inputs, with rules in place of the right ones."""

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    def backward(ctx, upstream):
        a, b = ctx.saved_tensors
        return upstream * b, upstream * a

    def jvp(ctx, da, db):
        a, b = ctx.saved_tensors
        return da * b + a * db

    right = {
        "forward": lambda a, b: a * b,
        "setup_context": setup_context,
        "backward": backward,
        "jvp": jvp,
    }
    body = {name: staticmethod(rule) for name, rule in {**right, **rules}.items() if rule}
    return type("Product", (Function,), {"generate_vmap_rule": "vmap" not in rules, **body})


add("product: with a jvp", product().apply, Z, W)
add("product: without a jvp", product(jvp=None).apply, Z, W)
add(
    "product: with a mask that is no input",
    lambda z, m: elementwise(*square).apply(z) * m,
    Z.clone().requires_grad_(),
    W.sign(),
)


# ------------------------------------------------------------------------------------- the wrong


def wrong(name, feature, kind="square", **rules):
    add(f"{feature}: {name}", elementwise(*KINDS[kind], **rules).apply, wrong=feature)


def saves_derivative(ctx, inputs, output):
    ctx.save_for_backward((2 * inputs[0]).detach())


def z_of(ctx):
    return ctx.saved_tensors[0]


wrong(
    "a saved derivative",
    "double backward",
    jvp=None,
    setup_context=saves_derivative,
    backward=lambda ctx, u: z_of(ctx) * u,
)
wrong(
    "half of it hidden",
    "double backward",
    jvp=None,
    backward=lambda ctx, u: (z_of(ctx) + z_of(ctx).detach()) * u,
)
wrong(
    "upstream hidden",
    "double backward",
    jvp=None,
    backward=lambda ctx, u: 2 * z_of(ctx) * u.detach(),
)
wrong(
    "all hidden",
    "double backward",
    kind="sine",
    jvp=None,
    backward=lambda ctx, u: (z_of(ctx).cos() * u).detach(),
)
wrong(
    "the output, hidden",
    "double backward",
    kind="exp",
    jvp=None,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output.detach()),
    backward=lambda ctx, u: z_of(ctx) * u,
)
wrong("half", "func.jvp", jvp=lambda ctx, dz: z_of(ctx) * dz)
wrong("none", "func.jvp", jvp=lambda ctx, dz: torch.zeros_like(dz))
wrong("negated", "func.jvp", kind="sine", jvp=lambda ctx, dz: -z_of(ctx).cos() * dz)
wrong(
    "without the tangent", "func.jvp", kind="cube", jvp=lambda ctx, dz: 3 * z_of(ctx) ** 2 + 0 * dz
)
wrong("of the output", "func.jvp", kind="exp", jvp=lambda ctx, dz: z_of(ctx) * dz)
wrong(
    "the first dimension is the batch's",
    "func.vmap",
    jvp=None,
    vmap=lambda info, dims, z: (z * z, 0),
)
wrong(
    "mixes examples",
    "func.vmap",
    jvp=None,
    vmap=lambda info, dims, z: ((z - z.mean(0)) ** 2, dims[0]),
)
wrong(
    "the first example's for all",
    "func.vmap",
    jvp=None,
    vmap=lambda info, dims, z: (
        (z.movedim(dims[0], 0)[:1] ** 2).expand(z.movedim(dims[0], 0).shape),
        0,
    ),
)
wrong(
    "reversed",
    "func.vmap",
    kind="sine",
    jvp=None,
    vmap=lambda info, dims, z: (z.sin().flip(dims[0]), dims[0]),
)
add(
    "func.vmap: takes both as batched",
    product(
        jvp=None,
        vmap=lambda info, dims, a, b: (
            (a * b, 0) if None not in dims else (a * b + 1, 0 if dims[0] is None else dims[0])
        ),
    ).apply,
    Z,
    W,
    wrong="func.vmap",
)


class Gradient(Function):
    """A derivative whose rule for vmap is wrong, as only per-sample gradients see."""

    @staticmethod
    def forward(z, u):
        return 2 * z * u

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        z, u = ctx.saved_tensors
        return 2 * u * upstream, 2 * z * upstream

    @staticmethod
    def vmap(info, dims, z, u):
        z, u = (t if d is None else t.movedim(d, 0) for t, d in zip((z, u), dims, strict=True))
        return 2 * z * u.flip(0), 0


wrong(
    "the backward's own vmap",
    "per-sample vmap(grad)",
    jvp=None,
    backward=lambda ctx, u: Gradient.apply(z_of(ctx), u),
)


def memory(t):
    return torch.as_strided(t, t.shape, torch.empty(t.shape).stride())


wrong(
    "backward reads memory",
    "strides",
    jvp=None,
    generate_vmap_rule=None,
    backward=lambda ctx, u: 2 * memory(z_of(ctx)) * u,
)
wrong(
    "stride 0 doubled",
    "strides",
    jvp=None,
    backward=lambda ctx, u: 2 * z_of(ctx) * u * (2 if 0 in z_of(ctx).stride() else 1),
)
wrong(
    "columns first",
    "strides",
    kind="sine",
    jvp=None,
    backward=lambda ctx, u: z_of(ctx).cos() * u if z_of(ctx).is_contiguous() else 0 * u,
)
add(
    "several threads: the last call's z",
    type(
        "Last",
        (elementwise(*square, jvp=None),),
        {
            "setup_context": staticmethod(
                lambda ctx, inputs, output: setattr(LAST, "z", inputs[0])
            ),
            "backward": staticmethod(lambda ctx, u: 2 * LAST.z * u),
        },
    ).apply,
    wrong="several threads",
)


class LAST:
    """Where the last call leaves its input."""


BUFFER = torch.empty(Z.shape, dtype=torch.float64)


def fills_buffer(ctx, inputs, output):
    if inputs[0].shape == BUFFER.shape and type(inputs[0]) is torch.Tensor:
        BUFFER.copy_(inputs[0].detach())
    ctx.save_for_backward(*inputs)


def from_buffer(ctx, u):
    return 2 * (BUFFER if u.shape == BUFFER.shape else z_of(ctx)) * u


wrong(
    "one buffer",
    "several threads",
    jvp=None,
    generate_vmap_rule=None,
    setup_context=fills_buffer,
    backward=from_buffer,
)
add(
    "inference_mode: without gradients",
    lambda z: z * z if torch.is_grad_enabled() else z * z + 1,
    wrong="inference_mode",
)
add(
    "inference_mode: 1e-6 more",
    lambda z: z * z * (1 if torch.is_grad_enabled() else 1 + 1e-6),
    wrong="inference_mode",
)


def only_both(ctx, upstream):
    a, b = ctx.saved_tensors
    return (upstream * b, upstream * a) if all(ctx.needs_input_grad) else (0 * a, 0 * b)


def other_one(ctx, upstream):
    a, b = ctx.saved_tensors
    both = all(ctx.needs_input_grad)
    return upstream * b, upstream * (a if both else b)


add(
    "frozen inputs: both or none",
    product(jvp=None, backward=only_both).apply,
    Z,
    W,
    wrong="frozen inputs",
)
add(
    "frozen inputs: the other one's",
    product(jvp=None, backward=other_one).apply,
    Z,
    W,
    wrong="frozen inputs",
)
add(
    "frozen inputs: twice if alone",
    product(
        jvp=None,
        backward=lambda ctx, u: tuple(
            u * t * (1 if all(ctx.needs_input_grad) else 2) for t in reversed(ctx.saved_tensors)
        ),
    ).apply,
    Z,
    W,
    wrong="frozen inputs",
)


def overwrites(z):
    output = z * z
    with torch.no_grad():
        z.detach().add_(1)
    return output


def overwrites_data(z):
    output = z * z
    z.data.zero_()
    return output


def sorts_in_place(z):
    output = z * z
    z.detach().copy_(z.detach().sort(0).values)
    return output


def overwrites_second(a, b):
    output = a * b
    b.data.mul_(2)
    return output


FEATURE = "inputs untouched"
wrong("overwritten", FEATURE, jvp=None, generate_vmap_rule=None, forward=overwrites)
wrong("zeroed through .data", FEATURE, jvp=None, generate_vmap_rule=None, forward=overwrites_data)
wrong("sorted in place", FEATURE, jvp=None, generate_vmap_rule=None, forward=sorts_in_place)
add(
    f"{FEATURE}: the second one doubled",
    product(jvp=None, forward=overwrites_second).apply,
    Z,
    W,
    wrong=FEATURE,
)
wrong(
    "the upstream gradient",
    FEATURE,
    jvp=None,
    generate_vmap_rule=None,
    backward=lambda ctx, u: u.detach().mul_(2 * z_of(ctx)),
)
wrong(
    "the upstream gradient, later",
    FEATURE,
    kind="sine",
    jvp=None,
    generate_vmap_rule=None,
    backward=lambda ctx, u: (u * z_of(ctx).cos(), u.detach().zero_())[0],
)


def overwrites_labels(z, labels):
    output = z * labels.to(z.dtype).unsqueeze(1)
    labels.zero_()
    return output + 0 * z


LABELS = torch.tensor([1, 2, 3])
add(f"{FEATURE}: integer labels zeroed", overwrites_labels, Z, LABELS, wrong=FEATURE)


class OverwritesInBackward(Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z * z

    @staticmethod
    def backward(ctx, upstream):
        (z,) = ctx.saved_tensors
        gradient = 2 * z * upstream
        z.data.mul_(0.5)
        return gradient


add(f"{FEATURE}: in the backward", OverwritesInBackward.apply, wrong=FEATURE)


class Undeclared(Function):
    """2z in place, and not marked dirty."""

    @staticmethod
    def forward(ctx, z):
        z.data.mul_(2)
        return z.clone()

    @staticmethod
    def backward(ctx, upstream):
        return 2 * upstream


add(f"{FEATURE}: in place, not marked", Undeclared.apply, wrong=FEATURE)
add(
    "autocast (CPU): half as much",
    lambda z: z * z * (0.5 if torch.is_autocast_enabled("cpu") else 1),
    wrong="autocast (CPU)",
)
add(
    "autocast (CPU): overflows",
    lambda z: (z * z * (1e39 if torch.is_autocast_enabled("cpu") else 1)).to(z.dtype),
    wrong="autocast (CPU)",
)
add(
    "checkpoint: recomputed otherwise",
    lambda z: (
        elementwise(*square, jvp=None).apply(z)
        * (2 if torch._C._current_graph_task_id() != -1 else 1)
    ),
    wrong="checkpoint",
)
add(
    "func.grad: under a transform",
    lambda z: z * z * (2 if torch._C._functorch.peek_interpreter_stack() is not None else 1),
    wrong="func.grad",
)
add(
    "compile (aot_eager): another power",
    lambda z: z**3 if torch.compiler.is_compiling() else z**2,
    wrong="compile (aot_eager)",
)
add(
    "compile, dynamic shapes: by the number of examples",
    lambda z: z * z if z.shape[0] > 3 else z * z * 1.0,
    wrong="compile, dynamic shapes",
)


# ------------------------------------------------------------------------ found by a second search


class Bias(Function):
    """z w + b; the gradient with respect to w is changed by `off`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z, w, b):
        return z * w + b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def off(needs):
        return 1

    @classmethod
    def backward(cls, ctx, u):
        z, w = ctx.saved_tensors
        return u * w, u * z * cls.off(ctx.needs_input_grad), u


class BiasFrozen(Bias):
    @staticmethod
    def off(needs):
        return 2 if needs == (True, True, False) else 1


class Unmaterialized(product()):
    """Gradients and tangents that are None stay None."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, da, db):
        a, b = ctx.saved_tensors
        return (0 if da is None else da * b) + (0 if db is None else a * db)


def saves_output(ctx, inputs, output):
    ctx.save_for_backward(output)
    ctx.save_for_forward(output)


OUTPUT = {
    "setup_context": saves_output,
    "backward": lambda ctx, u: u * z_of(ctx),
    "jvp": lambda ctx, dz: dz * z_of(ctx),
}


def reversed_sum(u):
    return u.flip(-1).cumsum(-1).flip(-1)


add("exp: saves its output", elementwise(torch.exp, None, **OUTPUT).apply)
add("product: gradients that may be None", Unmaterialized.apply, Z, W)
add("z w + b", Bias.apply, Z, W, Z.cos())
add(
    "cumulative sum",
    elementwise(
        lambda z: z.cumsum(-1),
        None,
        backward=lambda ctx, u: reversed_sum(u),
        jvp=lambda ctx, dz: dz.cumsum(-1),
    ).apply,
)
add(
    "a view of the input",
    elementwise(lambda z: z.mT, None, backward=lambda ctx, u: u.mT, jvp=None).apply,
)

add(
    "frozen inputs: twice if the third alone is frozen",
    BiasFrozen.apply,
    Z,
    W,
    Z.cos(),
    wrong="frozen inputs",
)


def from_start(t):
    """Reads the memory of a tensor from its start, whatever its offset."""
    return t.as_strided(t.shape, t.stride(), 0)


wrong(
    "the offset ignored",
    "strides",
    jvp=None,
    generate_vmap_rule=None,
    backward=lambda ctx, u: 2 * from_start(z_of(ctx)) * u,
)
wrong(
    "over the dimension that vmap adds",
    "func.vmap",
    jvp=None,
    forward=lambda z: z - z.mean(0),
    vmap=lambda info, dims, z: (z - z.mean(0), dims[0]),
    backward=lambda ctx, u: u - u.mean(0),
)


class Swish(Function):
    """z σ(z), which saves σ(z): of that no derivative is taken."""

    @staticmethod
    def forward(ctx, z):
        a = z.sigmoid()
        ctx.save_for_backward(z, a)
        return z * a

    @staticmethod
    def backward(ctx, u):
        z, a = ctx.saved_tensors
        return u * (a + z * a * (1 - a))


add("double backward: an intermediate number saved", Swish.apply, wrong="double backward")


class HalfTangent(Function):
    """2 z u, with half a jvp, for a backward: only forward mode over backward sees it."""

    generate_vmap_rule = True
    forward = staticmethod(lambda z, u: 2 * z * u)
    backward = staticmethod(Gradient.backward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, dz, du):
        z, u = ctx.saved_tensors
        return dz * u + 2 * z * du


wrong(
    "half a jvp in the backward",
    "func.hessian",
    backward=lambda ctx, u: HalfTangent.apply(z_of(ctx), u),
)


def notes_autocast(ctx, inputs, output):
    ctx.autocast = torch.is_autocast_enabled("cpu")
    ctx.save_for_backward(*inputs)


wrong(
    "half the gradient",
    "autocast (CPU)",
    jvp=None,
    setup_context=notes_autocast,
    backward=lambda ctx, u: z_of(ctx) * u * (1 if ctx.autocast else 2),
)
add(
    "meta device: another shape",
    lambda z: (z * z).sum(0) if z.is_meta else z * z,
    wrong="meta device",
)
add(
    "inputs untouched: in place without gradients",
    lambda z: z * z if torch.is_grad_enabled() else z.mul_(z),
    wrong=FEATURE,
)
add(
    "export: another power",
    lambda z: z**3 if torch.compiler.is_exporting() else z**2,
    wrong="export",
)
