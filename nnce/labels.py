"""A linear layer and its sigmoid cross-entropy over a million labels, in flat memory.

The gradients are made in the forward, where z is at hand, for an upstream gradient of 1, by walking
the labels block by block (`nnce.blocks`). The backward scales them in place and hands them over,
once; a second backward, and one whose upstream gradient is not one number for all examples, walks
the blocks anew.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn.functional import embedding

from nnce import rules
from nnce._arguments import (
    check_alike,
    check_block,
    check_dense,
    check_device,
    check_label_smoothing,
    check_reduction,
    check_size,
    check_whole,
    in_unit_interval,
    is_number,
    is_size,
    plain,
    shape_of,
    some_of,
)
from nnce.blocks import (
    Options,
    Wants,
    default_block,
    examples_at_a_time,
    has_unit,
    multiplied,
    multiply_inplace,
    walk,
)
from nnce.functional import Reduction, autocast_dtype, linear, sigmoid_cross_entropy
from nnce.positives import Target, Targets, targets_of

if TYPE_CHECKING:  # not every build of PyTorch has it
    from torch.distributed import ProcessGroup

# -------------------------------------------------------------------------------- one evaluation


class _Task(NamedTuple):
    """Everything but x, W and b."""

    targets: Targets
    options: Options
    example_weight: Tensor | None
    reduction: Reduction
    block: int | None
    product_dtype: torch.dtype
    check_values: bool | None
    group: "ProcessGroup | None"
    offset: int
    """The number of this process's first label."""
    num_labels: int
    """Of all processes."""

    def check(self) -> None:
        """Look at the values: on a CPU always, on CUDA only if asked, without waiting.

        Raises:
            ValueError: a label is out of range, a target not in [0, 1] or a weight negative. (On
                CUDA a RuntimeError, some time later.)
        """
        labels = self.targets.labels
        if labels is not None and len(labels) and self._looks_at(labels):
            there = ((labels >= -1) & (labels < self.num_labels)).all()
            self._hold(
                there,
                lambda: (
                    f"expected labels from 0 to {self.num_labels - 1}, or -1 for none, got "
                    f"{some_of(labels[(labels < -1) | (labels >= self.num_labels)])}"
                ),
            )
        for soft in (self.targets.dense, self.targets.values):
            if soft is None or not soft.is_floating_point() or not soft.numel():
                continue
            if self._looks_at(soft):
                self._hold(
                    in_unit_interval(_extremes(soft)).all(),
                    lambda soft=soft: (
                        f"expected target in [0, 1], got {some_of(soft[~in_unit_interval(soft)])}"
                    ),
                )
        for name, weight in (
            ("weight", self.options.weight),
            ("pos_weight", self.options.pos_weight),
            ("example_weight", self.example_weight),
        ):
            if weight is not None and self._looks_at(weight):
                self._hold(
                    (weight >= 0).all(),
                    lambda name=name, weight=weight: (
                        f"expected {name} of at least 0, got {some_of(weight[~(weight >= 0)])}"
                    ),
                )

    def _looks_at(self, tensor: Tensor) -> bool:
        return bool(self.check_values) if tensor.is_cuda else self.check_values is not False

    def _hold(self, true: Tensor, sentence: Any) -> None:
        if true.is_cuda:
            torch._assert_async(true)
        elif not bool(true):
            raise ValueError(sentence())

    def run(
        self, x: Tensor, W: Tensor, b: Tensor | None, upstream: Tensor | None, wants: Wants
    ) -> tuple[Tensor | None, ...]:
        """C and the gradients with respect to x, W and b, for an upstream gradient of C or of 1.

        The gradients are as in `nnce.blocks.Walk`: `multiplied` rounds them to the inputs' dtypes.
        """
        n = len(x)
        factor = x.new_ones(n, dtype=torch.float64) / self._denominator(n)
        if upstream is not None:
            factor = factor * upstream
        if self.example_weight is not None:
            factor = factor * self.example_weight
        block = self.block or default_block(n, len(W), x.shape[1], self.product_dtype)
        targets = self.targets
        if targets.labels is not None and self.offset:
            labels = targets.labels
            targets = targets._replace(labels=(labels - self.offset).where(labels >= 0, -1))
        C, dx, *others = walk(
            *(x, W, targets, self.options._replace(b=b), factor),
            *(min(block, max(len(W), 1)), self.product_dtype, wants),
        )
        if self.group is not None:
            for total in (C, dx):
                if total is not None:
                    torch.distributed.all_reduce(total, group=self.group)
        if C is not None:
            C = self._reduced(C)
        return C, dx, *others

    def constants(self) -> list[Tensor]:
        """The targets and weights, which have no gradients."""
        found = (*self.targets[:4], *self.options[1:3], self.example_weight)
        return [t for t in found if isinstance(t, Tensor)]

    def _denominator(self, n: int) -> int:
        return {"mean": n * self.num_labels, "batchmean": n}.get(self.reduction, 1)

    def _reduced(self, C: Tensor) -> Tensor:
        n = len(C)
        if self.example_weight is not None:
            C = rules.weighted(self.example_weight, C)
        if self.reduction != "none":
            C = C.sum() / self._denominator(n)
        return C.to(self.value_dtype)

    @property
    def value_dtype(self) -> torch.dtype:
        """Of C: float32 at least."""
        return torch.promote_types(self.product_dtype, torch.float32)


def _extremes(values: Tensor) -> Tensor:
    """The least and the largest value, or NaN if there is one.

    By parts, because aminmax copies a tensor that is not contiguous; it does not know float8.
    """
    parts = [(t if t.itemsize > 1 else t.half()).aminmax() for t in values.chunk(64)]
    return torch.stack([end for part in parts for end in part])


class _Once(Function):
    """The identity, whose derivative is refused: a gradient that has none."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        raise RuntimeError(
            "a loss that is walked block by block has no second derivatives: for those, take "
            "nnce.sigmoid_cross_entropy of nnce.linear"
        )


class _BlockByBlock(Function):
    """Equations 1, 3, 5, 6 and 7 in the forward; the backward scales, or walks anew."""

    @staticmethod
    def forward(
        x: Tensor, W: Tensor, b: Tensor | None, task: "_Task | _Operands", wants: Wants
    ) -> tuple[Tensor | None, ...]:
        task.check()
        value_only = Wants(True, False, False, False)
        if task.reduction == "none":
            return task.run(x, W, b, None, value_only)
        if checkpoint_stage() == "forward":
            C = task.run(x, W, b, None, value_only)[0]
            return C, *placeholders(x, gradient_kinds(x, W, task.product_dtype, wants))
        return task.run(x, W, b, None, wants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, W, b, ctx.task, _ = inputs
        made = () if ctx.task.reduction == "none" else output[1:]
        keep_for_backward(ctx, (x, W, b), made, ctx.task.constants())
        ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        def anew(
            inputs: tuple[Tensor, ...], dC: Tensor, needed: tuple[bool, ...]
        ) -> tuple[Tensor | None, ...]:
            task: _Task | _Operands = ctx.task
            x, W, b = inputs
            return task.run(x, W, b, dC, Wants(False, *needed))[1:]

        return (*handed_over(ctx, upstream[0], anew), None, None)


def checkpoint_stage() -> str | None:
    """Tell the two runs of a `torch.utils.checkpoint(use_reentrant=False)` apart.

    PyTorch has no public function for this, but the hooks of the two have different names. Where a
    version of PyTorch has other names, the gradients are computed in both.

    Returns:
        "forward", "recomputation", or None outside a checkpoint.
    """
    stages = {"_checkpoint_hook": "forward", "_recomputation_hook": "recomputation"}
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None or torch.compiler.is_compiling():
        return None
    if not all(hasattr(torch.utils.checkpoint, name) for name in stages):
        return None
    pack: Any = (top(False) or (None,))[0]
    if getattr(pack, "__module__", None) != "torch.utils.checkpoint":
        return None
    return stages.get(pack.__qualname__.partition(".")[0])


Kind = tuple[Sequence[int], torch.dtype]
"""Shape and dtype of a tensor that the forward makes for the backward."""


def gradient_kinds(
    x: Tensor, W: Tensor, product_dtype: torch.dtype, wants: Wants
) -> list[Kind | None]:
    """The kinds of dx, dW, db and the unit of dW that a walk returns."""
    dtype = torch.promote_types(product_dtype, torch.float32)
    return [
        (x.shape, dtype) if wants.dx else None,
        (W.shape, W.dtype) if wants.dW else None,
        (W.shape[:1], dtype) if wants.db else None,
        (W.shape[:1], torch.float32) if has_unit(W, wants) else None,
    ]


def placeholders(like: Tensor, kinds: Sequence[Kind | None]) -> list[Tensor | None]:
    """Tensors of these kinds, without their memory, for a checkpoint to compare with."""
    return [
        None if kind is None else like.new_empty((), dtype=kind[1]).expand(kind[0])
        for kind in kinds
    ]


def keep_for_backward(
    ctx: Any,
    inputs: Sequence[Tensor | None],
    made: Sequence[Tensor | None],
    constants: Sequence[Tensor] = (),
) -> None:
    """Save what `handed_over` needs: the inputs, and the gradients made in the forward, if any.

    The constants are tensors without a gradient that a second walk reads.
    """
    checkpointed = checkpoint_stage() is not None
    # A checkpoint hands the recomputation's gradients to the backward as saved tensors.
    ctx.save_for_backward(*inputs, *(made if checkpointed else ()))
    ctx.made = [] if checkpointed or not made else [made]
    ctx.num_inputs = len(inputs)
    ctx.versions = [(t, t._version) for t in constants if not t.is_inference()]
    ctx.set_materialize_grads(False)


def handed_over(
    ctx: Any, dC: Tensor | None, anew: Callable[..., tuple[Tensor | None, ...]]
) -> list[Tensor | None]:
    """The gradients made in the forward, scaled, the first time; else those of a walk anew."""
    needed = ctx.needs_input_grad[: ctx.num_inputs]
    if dC is None:
        return [None for _ in needed]
    saved = ctx.saved_tensors  # read once: hooks unpack at each read, and a checkpoint raises
    inputs, recomputed = saved[: ctx.num_inputs], saved[ctx.num_inputs :]
    if not ctx.made and any(t._version != version for t, version in ctx.versions):
        raise RuntimeError(
            "a target or weight of the loss was changed in place after the forward, and this "
            "backward has to read it again: pass a clone to the loss"
        )
    with torch.no_grad():
        if ctx.made or recomputed:
            *made, unit = ctx.made.pop() if ctx.made else recomputed
            upstream: Tensor | None = dC
        else:
            (*made, unit), upstream = anew(inputs, dC, needed), None
        units = (None, unit, None, None)
        gradients = [
            None if gradient is None or not wanted else _scaled(gradient, like.dtype, upstream, of)
            for gradient, like, wanted, of in zip(made, inputs, needed, units, strict=False)
        ]
        del made, recomputed, saved  # the optimizer's .grad takes over what nothing else refers to
    if torch.is_grad_enabled():  # someone may want to differentiate the gradients
        gradients = [None if t is None else _Once.apply(t, dC, *inputs) for t in gradients]
    return gradients


def _scaled(gradient: Tensor, dtype: torch.dtype, dC: Tensor | None, unit: Tensor | None) -> Tensor:
    # In place, but for torch.func, whose gradients may be batched.
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    batched = wrapped(gradient) or (dC is not None and wrapped(dC))
    return (multiplied if batched else multiply_inplace)(gradient, dtype, dC, unit)


# Under torch.compile and torch.export the loss is one operator, which they do not look into. Its
# kernel for autograd computes the gradients through a second operator, since a compiled graph keeps
# the calls that this kernel makes.

_library = torch.library.Library("nnce", "FRAGMENT")
_OPERATOR = "linear_sigmoid_cross_entropy"
_WALK = "_linear_sigmoid_cross_entropy_walk"
_VERSION = (
    2  # of the signature: a file exported with another one would be read argument by argument
)
_OPERANDS = """
    Tensor x, Tensor W, Tensor? b, Tensor? dense, Tensor? rows, Tensor? labels, Tensor? values,
    bool once, Tensor? weight, Tensor? pos_weight, float label_smoothing, Tensor? example_weight,
    str reduction, int? block, ScalarType product_dtype, bool? check_values, int version
"""
_WANTS = "Tensor? upstream, bool wants_value, bool wants_dx, bool wants_dW, bool wants_db"
for _signature in (
    f"{_OPERATOR}({_OPERANDS}=0) -> Tensor",
    f"{_WALK}({_OPERANDS}, {_WANTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
):
    _library.define(_signature, tags=(torch.Tag.pt2_compliant_tag,))


class _Operands(NamedTuple):
    """The operators' arguments after x, W and b, in their order: a `_Task` of one process."""

    dense: Tensor | None
    rows: Tensor | None
    labels: Tensor | None
    values: Tensor | None
    once: bool
    weight: Tensor | None
    pos_weight: Tensor | None
    label_smoothing: float
    example_weight: Tensor | None
    reduction: Reduction
    block: int | None
    product_dtype: torch.dtype
    check_values: bool | None
    version: int = 0

    def task(self, num_labels: int) -> _Task:
        """The `_Task` that computes it.

        Raises:
            RuntimeError: the call comes from a file that another version of nnce has exported.
        """
        if self.version != _VERSION:
            raise RuntimeError(
                f"expected nnce::{_OPERATOR} of version {_VERSION}, got {self.version} from a "
                f"model that an older nnce exported: export it again"
            )
        targets, options = Targets(*self[:5]), Options(None, *self[5:8])
        return _Task(targets, options, *self[8:13], None, 0, num_labels)

    def check(self) -> None:
        """Nothing: the operator itself looks at the values."""

    def constants(self) -> list[Tensor]:
        """The targets and weights."""
        return [t for t in self if isinstance(t, Tensor)]

    def run(
        self, x: Tensor, W: Tensor, b: Tensor | None, upstream: Tensor | None, wants: Wants
    ) -> tuple[Tensor | None, ...]:
        """`_Task.run` as an operator."""
        found = getattr(torch.ops.nnce, _WALK)(x, W, b, *self, upstream, *wants)
        there = (*wants, has_unit(W, wants))
        return tuple(t if is_there else None for t, is_there in zip(found, there, strict=True))


def _walk(x: Tensor, W: Tensor, b: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    *operands, upstream, value, dx, dW, db = arguments
    task = _Operands(*operands).task(len(W))
    if upstream is None:
        task.check()
    found = task.run(x, W, b, upstream, Wants(value, dx, dW, db))
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _walk_without_data(
    x: Tensor, W: Tensor, b: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    *operands, _, value, dx, dW, db = arguments
    kinds = gradient_kinds(x, W, _Operands(*operands).product_dtype, Wants(value, dx, dW, db))
    return (
        _value_without_data(x, W, b, *operands) if value else x.new_empty(0),
        *(
            x.new_empty(0) if kind is None else x.new_empty(kind[0], dtype=kind[1])
            for kind in kinds
        ),
    )


def _value(x: Tensor, W: Tensor, b: Tensor | None, *operands: Any) -> Tensor:
    found = _walk(x, W, b, *operands, None, True, False, False, False)
    return found[0]


def _value_without_data(x: Tensor, W: Tensor, b: Tensor | None, *operands: Any) -> Tensor:
    task = _Operands(*operands).task(W.shape[0])
    shape = x.shape[:1] if task.reduction == "none" else ()
    return x.new_empty(shape, dtype=task.value_dtype)


def _value_with_gradients(x: Tensor, W: Tensor, b: Tensor | None, *arguments: Any) -> Tensor:
    operands = _Operands(*arguments)
    refuse_tangents(x, W, b, *operands.constants())
    if any(t.requires_grad for t in operands.constants()):
        raise ValueError("expected targets and weights that need no gradient: none is computed")
    wants = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (x, W, b)]
    if not any(wants):
        with torch._C._AutoDispatchBelowAutograd():
            return cast(Tensor, getattr(torch.ops.nnce, _OPERATOR)(x, W, b, *operands))
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "a compiled or exported loss that is walked block by block has no derivatives by "
            "torch.func: transform nnce.linear_sigmoid_cross_entropy itself"
        )
    C, *_ = _BlockByBlock.apply(x, W, b, operands, Wants(True, *wants))
    return cast(Tensor, C)


def _walk_without_derivatives(*arguments: Any) -> tuple[Tensor, ...]:
    tensors = [t for t in arguments if isinstance(t, Tensor)]
    refuse_tangents(*tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(f"nnce::{_WALK} has no derivatives: take those of nnce::{_OPERATOR}")
    with torch._C._AutoDispatchBelowAutograd():
        return cast(tuple[Tensor, ...], getattr(torch.ops.nnce, _WALK)(*arguments))


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise NotImplementedError if one is differentiated in forward mode."""
    for t in tensors:
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                "a loss that is walked block by block has no forward-mode derivatives: for those, "
                "take nnce.sigmoid_cross_entropy of nnce.linear"
            )


for _name, _kernel, _fake, _for_autograd in (
    (_OPERATOR, _value, _value_without_data, _value_with_gradients),
    (_WALK, _walk, _walk_without_data, _walk_without_derivatives),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    _library.impl(_name, _for_autograd, "Autograd")
    torch.library.register_fake(f"nnce::{_name}", _fake, lib=_library)


# ------------------------------------------------------------------------ the public functions


def linear_sigmoid_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Target,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    example_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0,
    reduction: Reduction = "batchmean",
    block: int | None = None,
    group: "ProcessGroup | None" = None,
    check_values: bool | None = None,
) -> Tensor:
    """C of `sigmoid_cross_entropy(linear(x, W, b), y)`, whose z never exist as a whole.

    z = x Wᵀ + b (equation 1), C = −Σ [y ln σ(z) + (1−y) ln(1 − σ(z))] (3) and dz = (1−y) σ(z) −
    y σ(−z) (5), of which the gradients by x, W and b are made (6, 7): three matrix products of n ×
    features × labels, and a fourth for "none" and for a second backward over a retained graph.
    Beyond the inputs and their gradients it takes the memory of one block. There are no second
    derivatives, no forward mode and no vmap: each is refused.

    Args:
        input: x, [n, features].
        linear_weight: W, [labels, features].
        target: y, one of
            - whole numbers [n] or [n, k]: the labels of each example, −1 for none. One that stands
              twice counts once.
            - `Positives`, or a `torch.sparse_csr` or `sparse_coo` tensor [n, labels]: any number of
              labels for each example, and soft targets. All that is not there is 0.
            - floating-point or boolean [n, labels]: every target.
        linear_bias: b, [labels], or None for no bias.
        weight: multiplies C label by label; [labels], or of a shape that broadcasts to it.
        example_weight: multiplies C example by example; [n].
        pos_weight: multiplies the term of y; as weight. There is no gradient by targets or by any
            of these three.
        label_smoothing: s in [0, 1): y becomes y (1−s) + s/2.
        reduction: "batchmean" divides the sum by n, "mean" by n × labels; "sum"; "none" is summed
            over the labels, one number for each example, unlike `sigmoid_cross_entropy`'s.
            Weights multiply, and do not count for a mean.
        block: how many labels at a time; by default as many as fit the larger of 16 MB and a
            twentieth of the parameters. Examples are taken by the thousand.
        group: processes over which the labels are sharded in the order of the ranks, each with its
            own rows of linear_weight, linear_bias, weight and pos_weight, and all with the same
            input, target (label numbers and widths are those of all labels), example_weight and
            upstream gradient. Each gets the whole value, its own rows' gradients, which are to stay
            outside `DistributedDataParallel`, and the input's whole gradient. Where the input was
            computed by every process alike, or gathered by `torch.distributed.nn.all_gather`, whose
            backward adds up, DDP's averaging gives the gradient of one process; where each process
            puts its own part into a gathered tensor without gradients, multiply by the world's
            size.
        check_values: whether to look at label numbers, targets and weights; by default on a CPU
            only. On CUDA it is a device-side assertion, which does not wait.

    Returns:
        C: one number, or [n] for "none"; float32 at least, also under autocast, which does the
        products in its dtype.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices do not fit, an option makes no sense, a target or weight asks
            for a gradient, a label is out of range, a target is not in [0, 1], or a weight is
            negative.
        RuntimeError: in a second derivative.
    """
    check_reduction(reduction)
    label_smoothing = check_label_smoothing(label_smoothing)
    product_dtype = check_layer(input, linear_weight, linear_bias)
    block = check_block(block)
    n, own_labels = input.shape[0], linear_weight.shape[0]
    offset, num_labels = _shard(own_labels, input, group)
    targets = targets_of(target, n, num_labels, input.device)
    if group is not None:
        targets = _own(targets, offset, own_labels)
    weight = _check_weight("weight", weight, own_labels, input.device)
    pos_weight = _check_weight("pos_weight", pos_weight, own_labels, input.device)
    example_weight = _check_weight("example_weight", example_weight, n, input.device)
    inputs = (input, linear_weight, linear_bias)
    operands = _Operands(
        *targets,
        *(weight, pos_weight, float(label_smoothing), example_weight, reduction),
        *(block, product_dtype, check_values, _VERSION),
    )
    if torch.compiler.is_compiling():
        if group is not None:
            raise ValueError("expected no process group under torch.compile")
        return cast(Tensor, getattr(torch.ops.nnce, _OPERATOR)(*inputs, *operands))
    task = operands.task(num_labels)._replace(group=group, offset=offset)
    if input.is_meta:
        shape = (n,) if reduction == "none" else ()
        parts = sum(t.sum() * 0 for t in inputs if t is not None)
        return (cast(Tensor, parts) + input.new_empty(shape)).to(task.value_dtype)
    refuse_tangents(*task.constants())
    wants = (t is not None and t.requires_grad and torch.is_grad_enabled() for t in inputs)
    C, *_ = _BlockByBlock.apply(*inputs, task, Wants(True, *wants))
    return cast(Tensor, C)


def check_layer(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    names: tuple[str, str, str] = ("input", "linear_weight", "linear_bias"),
) -> torch.dtype:
    """Hold x, W and b to one another; the dtype of the products."""
    low = (torch.float32, torch.bfloat16, torch.float16)
    product_dtype = autocast_dtype(x)
    under_autocast = product_dtype is not None and x.dtype in low
    if under_autocast:
        for name, t in zip(names, (x, W, b), strict=True):
            if t is not None:
                if not isinstance(t, Tensor) or t.dtype not in low:
                    kind = getattr(t, "dtype", type(t).__name__)
                    raise TypeError(
                        f"expected {name} in float32 or less under autocast, got {kind}"
                    )
                check_device(name, t, x.device, like=names[0])
    else:
        check_alike({names[0]: x, names[1]: W}, {names[2]: b})
    if x.dim() != 2:
        raise ValueError(f"expected {names[0]} of shape (n, features), got {shape_of(x)}")
    if W.dim() != 2 or W.shape[1] != x.shape[1]:
        raise ValueError(
            f"expected {names[1]} of shape (labels, {x.shape[1]}) to go with {names[0]} of shape "
            f"{shape_of(x)}, got {shape_of(W)}"
        )
    if b is not None and b.shape != W.shape[:1]:
        raise ValueError(
            f"expected {names[2]} of shape ({W.shape[0]},) to go with {names[1]} of shape "
            f"{shape_of(W)}, got {shape_of(b)}"
        )
    return cast(torch.dtype, product_dtype) if under_autocast else x.dtype


def _check_weight(
    name: str, weight: Tensor | None, size: int, device: torch.device, like: str = "input"
) -> Tensor | None:
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(weight).__name__}")
    check_dense(name, weight)
    if not weight.dtype.is_floating_point:
        raise TypeError(f"expected {name} of a floating-point dtype, got {weight.dtype}")
    check_device(name, weight, device, like=like)
    if weight.requires_grad:
        raise ValueError(f"expected {name} that needs no gradient: none is computed by it")
    if tuple(weight.shape) == (size,):
        return weight
    if name == "example_weight" or weight.dim() > 1 or weight.numel() != 1:
        raise ValueError(f"expected {name} of shape ({size},), got {shape_of(weight)}")
    return weight.expand(size)


def _shard(own_labels: int, x: Tensor, group: "ProcessGroup | None") -> tuple[int, int]:
    """The number of the first label here, and of all of them."""
    if group is None:
        return 0, own_labels
    sizes = gathered_sizes(own_labels, x, group)
    return sum(sizes[: torch.distributed.get_rank(group)]), sum(sizes)


def gathered_sizes(own: int, x: Tensor, group: "ProcessGroup") -> list[int]:
    """A number of each process, in the order of the ranks; x says on which device.

    Raises:
        TypeError: group is no process group.
    """
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"expected group to be a process group, got {type(group).__name__}")
    sizes = x.new_zeros(torch.distributed.get_world_size(group), dtype=torch.int64)
    sizes[torch.distributed.get_rank(group)] = own
    torch.distributed.all_reduce(sizes, group=group)
    return cast(list[int], sizes.tolist())


def _own(targets: Targets, offset: int, own_labels: int) -> Targets:
    """The dense targets of this process's labels; lists keep the numbers of all."""
    if targets.dense is None:
        return targets
    return targets._replace(dense=targets.dense[:, offset : offset + own_labels])


class LinearSigmoidCrossEntropyLoss(nn.Module):
    """A last layer for many labels and its loss: `linear_sigmoid_cross_entropy`.

    Args:
        in_features: features of an example, at least 1.
        num_labels: at least 1; with a group, of this process's own.
        bias: whether there is a bias b.
        prior: the share of positives in (0, 1) from which b starts, as ln(prior / (1 − prior)):
            with many labels the first steps would only say that nearly all targets are 0. b starts
            from 0 if None. (Lin et al., Focal loss for dense object detection, 2017, §3.3.)
        weight, pos_weight: of the loss, [num_labels]; buffers `label_weight` and `pos_weight`,
            since `weight` is the layer's.
        label_smoothing, reduction, block, group: as for `linear_sigmoid_cross_entropy`.
        generator: where the random numbers come from; PyTorch's global generator if None.
        device, dtype: of the parameters.

    The parameters are `weight` W [num_labels, in_features], from N(0, 1/in_features), and `bias` b
    [num_labels], or None, named as those of `torch.nn.Linear`, whose `state_dict` it loads.

    Shape: x [n, in_features] and a target as for `linear_sigmoid_cross_entropy` -> one number, or
        [n] for "none".

    Raises:
        TypeError, ValueError: sizes or options make no sense, or a weight is negative.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    label_weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_labels: int,
        bias: bool = True,
        *,
        prior: float | None = None,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        label_smoothing: float = 0,
        reduction: Reduction = "batchmean",
        block: int | None = None,
        group: "ProcessGroup | None" = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Check the options, and make and draw the parameters."""
        super().__init__()
        in_features = check_size("in_features", in_features)
        num_labels = check_size("num_labels", num_labels)
        if prior is not None:
            if not (is_number(prior) and 0 < prior < 1):
                raise ValueError(f"expected prior between 0 and 1, got {prior!r}")
            prior = plain(prior)
        check_reduction(reduction)
        self.in_features, self.num_labels, self.prior = in_features, num_labels, prior
        self.label_smoothing, self.reduction = check_label_smoothing(label_smoothing), reduction
        self.block, self.group = check_block(block), group
        self.weight = nn.Parameter(torch.empty(num_labels, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.empty(num_labels, device=device, dtype=dtype)) if bias else None,
        )
        for buffer, name, tensor in (
            ("label_weight", "weight", weight),
            ("pos_weight", "pos_weight", pos_weight),
        ):
            tensor = _check_weight(name, tensor, num_labels, self.weight.device, "the parameters")
            if tensor is not None and not tensor.is_meta and not bool((tensor >= 0).all()):
                raise ValueError(f"expected {name} of at least 0, got {some_of(tensor)}")
            self.register_buffer(buffer, tensor)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew, and set the biases."""
        prior = 0.5 if self.prior is None else self.prior
        with torch.no_grad():
            self.weight.normal_(0, self.in_features**-0.5, generator=generator)
            if self.bias is not None:
                self.bias.fill_(math.log(prior / (1 - prior)))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Keep the weights of labels that a state_dict lacks, such as a `torch.nn.Linear`'s."""
        for name in ("label_weight", "pos_weight"):
            if getattr(self, name) is not None:
                state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(
        self, input: Tensor, target: Target, example_weight: Tensor | None = None
    ) -> Tensor:
        """C of the examples and their targets."""
        return linear_sigmoid_cross_entropy(
            input,
            self.weight,
            target,
            linear_bias=self.bias,
            weight=self.label_weight,
            example_weight=example_weight,
            pos_weight=self.pos_weight,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            block=self.block,
            group=self.group,
        )

    def logits(self, input: Tensor) -> Tensor:
        """z of every label of this process, [n, num_labels]: as much memory as that takes."""
        return linear(input, *self._whole())

    def topk(self, input: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k labels of the largest z for each example, and their z: (z, labels), [n, k] each.

        Block by block, without gradients: by z from the largest, and of equal ones the lower label
        first. NaN counts as larger than all else, as in `torch.topk`. With a group the labels are
        those of all processes, and every one of them gets the result.

        Raises:
            ValueError: k is not from 1 to the number of labels.
        """
        W, b = self._whole()
        product_dtype = check_layer(input, W, b, ("input", "weight", "bias"))
        offset, num_labels = _shard(self.num_labels, input, self.group)
        if not (is_size(k) and k <= num_labels):
            raise ValueError(f"expected k from 1 to the {num_labels} labels, got {k!r}")
        k = int(k)
        with torch.no_grad():
            best = [
                _topk(rows, W, b, k, self.block, product_dtype)
                for rows in input.split(examples_at_a_time(len(input)))
            ]
            z, labels = (torch.cat(parts) for parts in zip(*best, strict=True))
            labels += offset
            if self.group is None:
                return z, labels
            return _merged(z, labels, k, self.group)

    def _whole(self) -> tuple[Tensor, Tensor | None]:
        """W and b, gathered where `fully_shard` left each process with a part of them."""
        return _gathered(self.weight), None if self.bias is None else _gathered(self.bias)

    def extra_repr(self) -> str:
        """The sizes, and the options that are not the usual ones."""
        unusual = {
            "prior": (self.prior, None),
            "label_smoothing": (self.label_smoothing, 0),
            "block": (self.block, None),
        }
        return ", ".join(
            [
                f"in_features={self.in_features}, num_labels={self.num_labels}, "
                f"bias={self.bias is not None}, reduction={self.reduction!r}",
                *(
                    f"{name}={value!r}"
                    for name, (value, usual) in unusual.items()
                    if value != usual
                ),
            ]
        )


def _gathered(parameter: Tensor) -> Tensor:
    """The whole of a `DTensor`, whose gradient is the processes' mean as after a forward."""
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import DTensor, Partial  # not in every build of PyTorch

    mean = [Partial("avg")] * cast(DTensor, parameter).device_mesh.ndim
    return cast(DTensor, parameter).full_tensor(grad_placements=mean)


def _topk(
    x: Tensor, W: Tensor, b: Tensor | None, k: int, block: int | None, product_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    block = block or default_block(len(x), len(W), x.shape[1], product_dtype)
    x = x.to(product_dtype)
    z_best = x.new_empty(len(x), 0, dtype=torch.promote_types(product_dtype, torch.float32))
    best = z_best.new_empty(z_best.shape, dtype=torch.int64)
    memory = x.new_empty(len(x) * min(block, len(W)))
    for first in range(0, len(W), block):
        labels = slice(first, min(first + block, len(W)))
        width = labels.stop - first
        z = memory[: len(x) * width].view(len(x), width)
        torch.mm(x, W[labels].to(product_dtype).mT, out=z)
        z = z.to(z_best.dtype)
        if b is not None:
            z += b[labels]
        values, at = _first_of_the_largest(z, min(k, z.shape[1]))
        # What came before has the lower labels: a stable sort keeps it in front.
        z_best, order = torch.cat([z_best, values], 1).sort(dim=1, descending=True, stable=True)
        best = torch.cat([best, at + first], 1).gather(1, order)
        z_best, best = z_best[:, :k], best[:, :k]
    return z_best, best


def _first_of_the_largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` of each row, but of equal numbers the first ones, and in order."""
    values, at = z.topk(min(k + 1, z.shape[1]), 1)
    # The last and the first that is left out are alike: topk may have taken either.
    last, next_one = values[:, k - 1], values[:, -1]
    tied = (last == next_one) | (last.isnan() & next_one.isnan())
    values, at = values[:, :k].contiguous(), at[:, :k].contiguous()
    if z.shape[1] > k and bool(tied.any()):
        ordered, where = z[tied].sort(dim=1, descending=True, stable=True)
        values[tied], at[tied] = ordered[:, :k], where[:, :k]
    at, order = at.sort(1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, at.gather(1, order)


def _merged(z: Tensor, labels: Tensor, k: int, group: "ProcessGroup") -> tuple[Tensor, Tensor]:
    """The best of all processes, of each one's best."""
    sizes = gathered_sizes(z.shape[1], z, group)
    everyone = [z.new_empty(len(z), size) for size in sizes]
    theirs = [labels.new_empty(len(z), size) for size in sizes]
    for rank, (values, numbers) in enumerate(zip(everyone, theirs, strict=True)):
        if rank == torch.distributed.get_rank(group):
            values.copy_(z)
            numbers.copy_(labels)
        source = torch.distributed.get_global_rank(group, rank)
        torch.distributed.broadcast(values, source, group=group)
        torch.distributed.broadcast(numbers, source, group=group)
    z, order = torch.cat(everyone, 1).sort(dim=1, descending=True, stable=True)
    return z[:, :k], torch.cat(theirs, 1).gather(1, order)[:, :k]


class _Picked(Function):
    """b[rows], whose gradient is a `torch.sparse` tensor of those alone."""

    @staticmethod
    def forward(b: Tensor, rows: Tensor) -> Tensor:
        return b[rows]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        b, ctx.rows = inputs
        ctx.shape = b.shape

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (dz,) = upstream
        rows = ctx.rows.reshape(1, -1)
        return torch.sparse_coo_tensor(rows, dz.flatten(), ctx.shape, check_invariants=False), None


def sampled_sigmoid_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    linear_bias: Tensor | None = None,
    log_q: Tensor | None = None,
    sparse: bool = False,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """The cross-entropy of each example's positive labels and of some negative ones.

    C = Σ softplus(−z) over the positives + Σ softplus(z) over the negatives, z = W x + b − ln q, of
    the rows of W that are named and of no others. With ln q of the distribution that the negatives
    were drawn from, z without it comes to estimate the log-odds of all labels (Mikolov et al.,
    2013; Jean et al., 2015). A negative that is a positive of the example too counts as both.

    Args:
        input: x, [n, features].
        linear_weight: W, [labels, features].
        positives: label numbers [n] or [n, k], −1 for none.
        negatives: label numbers, [m] for all examples or [n, m] for each; −1 for none.
        linear_bias: b, [labels], or None for no bias.
        log_q: ln q of each label, [labels], or None for 0; no gradient is computed by it.
        sparse: whether the gradients of W and b are `torch.sparse` ones, of the rows named alone,
            as those of `torch.nn.Embedding`; else they are as large as W and b.
        reduction: "batchmean" divides the sum by n, "mean" by the number of labels that were named;
            "sum"; "none" is summed over the labels, one number for each example.

    Returns:
        C: one number, or [n] for "none"; float32 at least. [n, m] negatives take n × m × features
            of memory.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices do not fit, log_q asks for a gradient, or, on a CPU, a label
            is out of range.
    """
    check_reduction(reduction)
    check_layer(input, linear_weight, linear_bias)
    n, num_labels = len(input), len(linear_weight)
    for name, labels in (("positives", positives), ("negatives", negatives)):
        check_whole(name, labels)
        check_device(name, labels, input.device, like="input")
        shared = name == "negatives" and labels.dim() == 1
        if not shared and (labels.dim() not in (1, 2) or labels.shape[0] != n):
            raise ValueError(
                f"expected {name} of the {n} examples of input, got shape {shape_of(labels)}"
            )
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel():
            wrong = (labels < -1) | (labels >= num_labels)
            if bool(wrong.any()):
                raise ValueError(
                    f"expected {name} from 0 to {num_labels - 1}, or -1 for none, got "
                    f"{some_of(labels[wrong])}"
                )
    log_q = _check_weight("log_q", log_q, num_labels, input.device)
    positives = positives.long() if positives.dim() == 2 else positives.long()[:, None]
    negatives = negatives.long()
    wide = torch.promote_types(linear_weight.dtype, torch.float32)

    def z_of(labels: Tensor) -> Tensor:
        rows = labels.clamp(min=0)
        W = embedding(rows, linear_weight, sparse=sparse)
        z = linear(input, W) if labels.dim() == 1 else (W @ input[:, :, None])[:, :, 0]
        z = z.to(wide)  # float16 ends at 65,504, and sums are soon above it
        if linear_bias is not None:
            z = z + (_Picked.apply(linear_bias, rows) if sparse else linear_bias.to(wide)[rows])
        return z if log_q is None else z - log_q[rows]

    z = torch.cat([z_of(positives), z_of(negatives)], 1)
    named = torch.cat([positives, negatives.expand(n, -1)], 1) >= 0
    y = torch.zeros_like(named, dtype=torch.int64)
    y[:, : positives.shape[1]] = 1
    C = sigmoid_cross_entropy(z, y.where(named, -100), ignore_index=-100, reduction="none")
    if reduction == "none":
        return C.sum(1)
    return C.sum() / (named.sum() if reduction == "mean" else n if reduction == "batchmean" else 1)
