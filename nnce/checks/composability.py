"""Which PyTorch features a function works with.

`check_composability` tests a custom `torch.autograd.Function`, or any function of tensors. Each
check computes a result with one PyTorch feature and compares it with the plain result: the function
called eagerly and differentiated once by `backward`, which `check_gradients` tests.
"""

import concurrent.futures
import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from nnce.checks._subject import Subject, alike, copied
from nnce.checks._torch_private import (
    TANGENT_IGNORED,
    Unavailable,
    compile_counter,
    operators_without_tangents,
)

Verdict = Literal["works", "wrong", "fails", "not tried"]


class Cell(NamedTuple):
    """The result of one check."""

    verdict: Verdict
    """"wrong": the result differs, without an error. "fails": an exception, or an operator without
    forward mode, whose tangent PyTorch ignores."""
    detail: str = ""
    """Location and size of the difference, PyTorch's error, or the reason for not trying."""


class Composability(dict[str, Cell]):
    """The report of `check_composability`: a `Cell` for each PyTorch feature, by its name."""

    @property
    def wrong(self) -> list[str]:
        """Names of the features with which the function is silently wrong."""
        return [name for name, cell in self.items() if cell.verdict == "wrong"]

    @property
    def right(self) -> bool:
        """Whether no feature is silently wrong; features that fail raise an error when used."""
        return not self.wrong

    def __bool__(self) -> bool:
        """Return `right`, so that `assert check_composability(…)` works."""
        return self.right

    def __str__(self) -> str:
        """A summary sentence, then one line per feature."""
        verdicts = [cell.verdict for cell in self.values()]
        counts = ", ".join(
            f"{verdicts.count(verdict)} {words}"
            for verdict, words in (("works", "work"), ("fails", "fail"), ("not tried", "not tried"))
            if verdict in verdicts
        )
        right = "right where it works: " if "fails" in verdicts else "right: "
        first = f"wrong: {', '.join(self.wrong)}; " if self.wrong else right
        lines = [
            f"{name:<30}{cell.verdict:<11}{cell.detail}".rstrip() for name, cell in self.items()
        ]
        return "\n".join([f"{first}{counts or 'nothing else'}", *lines])


def check_composability(
    function: Callable[..., Tensor],
    *inputs: Any,
    reference: Callable[..., Tensor] | None = None,
    examples: Sequence[bool] | None = None,
    only: Sequence[str] | None = None,
) -> Composability:
    """Use a function with PyTorch's features, and compare each result with the plain one.

    The features are double backward, `torch.func`'s transforms and forward mode in forward mode,
    per-sample gradients, `torch.compile` (with aot_eager, inductor, dynamic shapes, and over
    transforms), autocast, export, other strides and leading dimensions, several threads,
    checkpoints, inference mode, frozen inputs, the meta device, and whether the function overwrites
    its inputs. All checks except autocast run in float64.

    Without a reference, second derivatives are compared with central differences of the first
    derivatives. First derivatives are assumed to be right: check them with `check_gradients`.

    Args:
        function: takes the inputs and returns a tensor, such as a Function's `apply`. It receives
            copies, so it may work in place.
        inputs: the function's arguments. It is differentiated with respect to the floating-point
            tensors that require a gradient, or all floating-point tensors if none does. Small
            inputs away from kinks are enough.
        reference: a trusted implementation of the same function, such as PyTorch's own.
        examples: for each input, whether its first dimension is a batch dimension of any size;
            without it, checks that need a batch dimension are not tried.
        only: the names of the checks to run (default: all).

    Returns:
        One cell per feature. The verdict says whether the function works with it, is wrong, fails,
        or was not tried; the cell also gives the reason.

    Raises:
        TypeError: the function is not callable, no input is a floating-point tensor, or the output
            is not a floating-point tensor.
        ValueError: the function or the reference cannot be called with these inputs in float64, or
            their outputs have different shapes; the function is random, or not differentiable with
            respect to its inputs; an input is empty, sparse or on the meta device; gradients are
            disabled; `examples` does not have one entry per input; or a name in `only` is unknown.

    >>> z, y = torch.tensor([[0.5, -1.0]]), torch.tensor([[1.0, 0.0]])
    >>> only = ["double backward"]
    >>> report = nnce.check_composability(nnce.sigmoid_cross_entropy, z, y, only=only)
    >>> report["double backward"].verdict
    'works'
    """
    unknown = sorted(set(only or ()) - set(COLUMNS))
    if unknown:
        raise ValueError(f"expected only names of checks ({', '.join(COLUMNS)}), got {unknown}")
    case = _Case(function, inputs, reference, examples)
    names = COLUMNS if only is None else [name for name in COLUMNS if name in only]
    found = Composability({name: _try(COLUMNS[name], case) for name in names})
    if any(found[name].verdict == "wrong" for name in _FORWARD_MODE if name in found):
        ignoring = ", ".join(operators_without_tangents(lambda: case.number(*case.inputs)))
        for name in _FORWARD_MODE if ignoring else ():
            if name in found and found[name].verdict == "wrong":
                found[name] = Cell("fails", f"{TANGENT_IGNORED}: {ignoring}")
    return found


class _Differs(Exception):
    """A result that differs from the plain one."""


class _NotTried(Exception):
    """A check that cannot run with this function, these inputs or this PyTorch."""


def _try(check: "Check", case: "_Case") -> Cell:
    try:
        check(case)
    except (_NotTried, Unavailable) as reason:
        return Cell("not tried", str(reason))
    except _Differs as difference:
        return Cell("wrong", str(difference))
    except Exception as error:  # any error from PyTorch
        return Cell("fails", f"{type(error).__name__}: {_first_sentence(str(error))}")
    return Cell("works")


def _first_sentence(words: str) -> str:
    """The first line, plus the next if it ends in a colon ("backend='inductor' raised:")."""
    lines = [line.strip() for line in words.splitlines() if line.strip()] or ["no message"]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


# --------------------------------------------------------------------------------- the function


class _Case:
    """The function reduced to a scalar, and its plain derivatives."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: Sequence[Any],
        reference: Callable[..., Tensor] | None,
        examples: Sequence[bool] | None,
    ) -> None:
        self.subject = Subject(function, inputs, "the function")
        self.inputs = self.subject.inputs
        if not all(t.numel() for t in self.inputs):
            raise ValueError(
                "expected elements to differentiate with respect to, got an empty tensor"
            )
        if examples is not None and (
            not isinstance(examples, Sequence) or len(examples) != len(inputs)
        ):
            raise ValueError(
                f"expected examples for each of the {len(inputs)} inputs, got {examples!r}"
            )
        # Arguments that are not differentiated are not batched.
        fixed = len(self.inputs) < len(inputs)
        self.examples = None if examples is None or fixed else tuple(map(bool, examples))
        value = self.subject.observe()
        self.shape = value.shape
        self.has_reference = reference is not None
        self._plain = self.subject
        if reference is not None:
            self._plain = Subject(reference, inputs, "the reference")
            expected = self._plain.observe()
            if expected.shape != value.shape:
                raise ValueError(
                    f"expected a reference whose output has the function's shape, "
                    f"{tuple(value.shape)}, got {tuple(expected.shape)}"
                )

    def call(self, *inputs: Tensor) -> Tensor:
        """Return the function's output; exceptions propagate."""
        return self.subject.function(*self.subject.fill(inputs))

    def number(self, *inputs: Tensor) -> Tensor:
        """Reduce the output to a scalar, with a different gradient at each element."""
        return _one_number(self.call(*inputs))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors among the arguments."""
        return tuple(value for value in self.subject.arguments if isinstance(value, Tensor))

    def number_of_tensors(self, *tensors: Tensor) -> Tensor:
        """Reduce the output to a scalar, as a function of all tensor arguments."""
        given = iter(map(copied, tensors) if self.subject.writes else tensors)
        arguments = [
            next(given) if isinstance(value, Tensor) else value for value in self.subject.arguments
        ]
        return _one_number(self.subject.function(*arguments))

    def plain(self, *inputs: Tensor) -> Tensor:
        """The scalar computed by the reference, or by the function if there is no reference."""
        return _one_number(self._plain.function(*self._plain.fill(inputs)))

    def leaves(self) -> list[Tensor]:
        """Copies of the inputs that require a gradient."""
        return [t.clone().requires_grad_() for t in self.inputs]

    @property
    def argnums(self) -> tuple[int, ...]:
        """The positions of all inputs, for `torch.func`."""
        return tuple(range(len(self.inputs)))

    def gradients(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The plain first derivatives, at the given inputs if any."""
        return _gradients(self.plain, inputs or self.inputs)

    def second(self, along: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The plain second derivatives times a direction."""
        if self.has_reference:
            leaves = self.leaves()
            first = torch.autograd.grad(self.plain(*leaves), leaves, create_graph=True)
            pulled = _dot(first, along)
            if not pulled.requires_grad:
                return tuple(torch.zeros_like(t) for t in self.inputs)
            second = torch.autograd.grad(pulled, leaves, allow_unused=True)
            return _zeros_for_none(second, self.inputs)

        def at(step: float) -> tuple[Tensor, ...]:
            moved = (t + step * d for t, d in zip(self.inputs, along, strict=True))
            return self.gradients(*moved)

        # Fourth order: relative error about 1e-10 for a smooth function of inputs near 1.
        h = 2e-3
        values = zip(at(-2 * h), at(-h), at(h), at(2 * h), strict=True)
        return tuple((a - 8 * b + 8 * c - d) / (12 * h) for a, b, c, d in values)

    def directions(self, count: int = 3) -> Iterator[tuple[Tensor, ...]]:
        """Random directions through all inputs."""
        for seed in range(count):
            yield tuple(
                _random(*t.shape, seed=7 + 13 * seed + i) for i, t in enumerate(self.inputs)
            )

    @property
    def tolerance(self) -> dict[str, float]:
        """The tolerances for second derivatives."""
        return {} if self.has_reference else {"rtol": 1e-6, "atol": 1e-7}


def _one_number(output: Tensor) -> Tensor:
    return output if output.dim() == 0 else (output + 0.5 * output * output).sum()


def _random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return _zeros_for_none(
        torch.autograd.grad(function(*leaves), leaves, allow_unused=True), inputs
    )


def _zeros_for_none(
    gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    pairs = zip(gradients, inputs, strict=True)
    return tuple(torch.zeros_like(t) if g is None else g for g, t in pairs)


def _dot(some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(some, others, strict=True)]).sum()


def _same(what: str, got: Any, expected: Any, *, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    """Raise _Differs unless two results, or sequences of results, agree."""
    if isinstance(expected, Tensor):
        got, expected = (got,), (expected,)
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        of = f", input {number}" if len(expected) > 1 else ""
        if not isinstance(a, Tensor) or a.shape != b.shape:
            shape = tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__
            raise _Differs(f"{what}{of}: expected shape {tuple(b.shape)}, got {shape}")
        a, b = a.detach().double(), b.detach().double()
        off = (a - b).abs()
        wrong = ~((off <= atol + rtol * b.abs()) | alike(a, b))
        if wrong.any():
            at = tuple(int(i) for i in torch.nonzero(wrong)[off[wrong].nan_to_num().argmax()])
            difference = f"expected at {at}, got {a[at]:.6g}, off by {off[at]:.1e}"
            raise _Differs(f"{what}{of}: {b[at]:.6g} {difference}")


# ----------------------------------------------------------------------------------- the checks


def _double_backward(case: _Case) -> None:
    for along in case.directions():
        leaves = case.leaves()
        number = case.number(*leaves)
        first = torch.autograd.grad(number, leaves, create_graph=True, allow_unused=True)
        pulled = _dot(_zeros_for_none(first, leaves), along)
        if pulled.requires_grad:
            pulled.backward()  # unlike grad(), reaches nodes that raise when differentiated
        got = _zeros_for_none([leaf.grad for leaf in leaves], leaves)
        _same("second derivative", got, case.second(along), **case.tolerance)


def _func_grad(case: _Case) -> None:
    _same("gradient", grad(case.number, case.argnums)(*case.inputs), case.gradients())


def _func_vjp(case: _Case) -> None:
    value_and_vjp: Any = vjp(case.number, *case.inputs)
    value, pull_back = value_and_vjp
    _same("value", value, case.plain(*case.inputs))
    upstream = torch.tensor(1.7, dtype=torch.float64)
    _same("gradient", pull_back(upstream), tuple(1.7 * g for g in case.gradients()))


def _func_jvp(case: _Case) -> None:
    gradients = case.gradients()
    for along in case.directions():
        value_and_tangent: Any = jvp(case.number, case.inputs, along)
        value, tangent = value_and_tangent
        _same("value", value, case.plain(*case.inputs))
        _same("tangent", tangent, _dot(gradients, along))


def _batches(case: _Case) -> Iterator[tuple[tuple[int | None, ...], tuple[Tensor, ...]]]:
    """in_dims and inputs: all inputs batched (3 copies, first or last dim), and each alone."""
    each = [[t, 0.5 * t, t.sigmoid()] for t in case.inputs]
    three = tuple(map(torch.stack, each))
    yield tuple(0 for _ in three), three
    yield tuple(-1 for _ in three), tuple(torch.stack(versions, dim=-1) for versions in each)
    if len(three) > 1:
        for wanted in case.argnums:
            yield (
                tuple(0 if i == wanted else None for i in case.argnums),
                tuple(three[i] if i == wanted else t for i, t in enumerate(case.inputs)),
            )


def _one_by_one(
    in_dims: tuple[int | None, ...], inputs: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor, ...]]:
    for i in range(3):
        pairs = zip(in_dims, inputs, strict=True)
        yield tuple(t if dim is None else t.select(dim, i) for dim, t in pairs)


def _func_vmap(case: _Case) -> None:
    for in_dims, inputs in _batches(case):
        got = vmap(case.number, in_dims=in_dims)(*inputs)
        _same("value", got, torch.stack([case.plain(*one) for one in _one_by_one(in_dims, inputs)]))


def _gradients_one_by_one(
    case: _Case, in_dims: tuple[int | None, ...], inputs: tuple[Tensor, ...]
) -> list[Tensor]:
    each = [case.gradients(*one) for one in _one_by_one(in_dims, inputs)]
    return [torch.stack(of_input) for of_input in zip(*each, strict=True)]


def _per_sample(case: _Case) -> None:
    for in_dims, inputs in _batches(case):
        got = vmap(grad(case.number, case.argnums), in_dims=in_dims)(*inputs)
        _same("gradient", got, _gradients_one_by_one(case, in_dims, inputs))


def _func_jacrev(case: _Case) -> None:
    _same("gradient", jacrev(case.number, case.argnums)(*case.inputs), case.gradients())


def _hold_hessian(what: str, case: _Case, got: Any) -> None:
    """Compare a Hessian, a block per pair of inputs, with second derivatives along directions."""
    for along in case.directions():
        rows = [
            torch.stack(
                [
                    torch.tensordot(block, d, dims=d.dim())
                    for block, d in zip(of_input, along, strict=True)
                ]
            ).sum(0)
            for of_input in got
        ]
        _same(what, rows, case.second(along), **case.tolerance)


def _func_hessian(case: _Case) -> None:
    _hold_hessian("hessian", case, hessian(case.number, case.argnums)(*case.inputs))


def _nested_forward_mode(case: _Case) -> None:
    """Second (with a reference, also third) derivatives by nested forward mode are right."""
    forward: Any = functools.partial(jacfwd, argnums=case.argnums)
    backward: Any = functools.partial(jacrev, argnums=case.argnums)
    _hold_hessian("hessian", case, forward(forward(case.number))(*case.inputs))
    if case.has_reference:
        third = backward(backward(backward(case.plain)))(*case.inputs)
        for transformed in (
            forward(forward(backward(case.number))),
            forward(backward(forward(case.number))),
        ):
            got = transformed(*case.inputs)
            _same("third derivative", list(_flat(got)), list(_flat(third)))


def _flat(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    else:
        for part in nested:
            yield from _flat(part)


@contextlib.contextmanager
def _compiling(
    function: Callable[..., Any], backend: Any = "aot_eager", **options: Any
) -> Iterator[Callable[..., Any]]:
    """Reset dynamo before and after: compilations count toward a global limit."""
    torch.compiler.reset()
    try:
        yield torch.compile(function, fullgraph=True, backend=backend, **options)
    finally:
        torch.compiler.reset()


def _compiled(backend: str) -> "Check":
    def check(case: _Case) -> None:
        if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
            raise _NotTried("inductor needs a C++ compiler, and none was found")
        with _compiling(case.number, backend) as compiled:
            _same("value", compiled(*case.inputs), case.plain(*case.inputs))
            _same("gradient", _gradients(compiled, case.inputs), case.gradients())

    return check


def _wants_examples(case: _Case) -> tuple[bool, ...]:
    if case.examples is None or not any(case.examples):
        raise _NotTried("it was not said which inputs have a row for each example")
    return case.examples


def _dynamic_shapes(case: _Case) -> None:
    """One compilation serves batches of every size."""
    examples = _wants_examples(case)
    counter = compile_counter()
    after: list[int] = []  # dynamo may restart within the first call, and counts that
    with _compiling(case.number, counter, dynamic=True) as compiled:
        for repeats in (2, 3, 1):
            inputs = tuple(
                torch.cat(repeats * [t]) if each else t
                for t, each in zip(case.inputs, examples, strict=True)
            )
            _same("gradient", _gradients(compiled, inputs), case.gradients(*inputs))
            after.append(counter.frame_count)
    if len(set(after)) > 1:
        raise _Differs(f"compiled anew for another size of batch, {len(set(after))} times")


def _compiled_double_backward(case: _Case) -> None:
    with _compiling(case.number) as compiled:
        for along in case.directions(1):
            leaves = case.leaves()
            first = torch.autograd.grad(compiled(*leaves), leaves, create_graph=True)
            got = torch.autograd.grad(_dot(first, along), leaves)
            _same("second derivative", got, case.second(along), **case.tolerance)


def _compiled_per_sample(case: _Case) -> None:
    in_dims, inputs = next(_batches(case))
    with _compiling(vmap(grad(case.number, case.argnums), in_dims=in_dims)) as compiled:
        _same("gradient", compiled(*inputs), _gradients_one_by_one(case, in_dims, inputs))


def _compiled_hessian(case: _Case) -> None:
    transformed = hessian(case.number)  # first input only: PyTorch 2.11 cannot do several
    with _compiling(transformed) as compiled:
        _same("hessian", compiled(*case.inputs), transformed(*case.inputs))


def _autocast(device: str, dtype: torch.dtype) -> "Check":
    """Results are close to those in full precision, and gradients have the dtype of their leaves.

    With a reference, the output has the reference's dtype, and the first input may be in half
    precision.
    """

    def check(case: _Case) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise _NotTried("there is no CUDA device")

        def under_autocast(function: Callable[..., Tensor], half: bool) -> list[Tensor]:
            leaves = [t.to(device, torch.float32).requires_grad_() for t in case.inputs]
            with torch.autocast(device, dtype):
                first, *others = leaves
                output = function(first.to(dtype) if half else first, *others)
            gradients = torch.autograd.grad(output, leaves, allow_unused=True)
            return [output, *_zeros_for_none(gradients, leaves)]

        def scaled(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
            for name, a, b in zip(("value", *len(got) * ["gradient"]), got, expected, strict=False):
                _same(name, a, b, rtol=0.05, atol=0.05 * float(b.abs().max()))

        expected = [case.plain(*case.inputs), *case.gradients()]
        expected = [t.to(device) for t in expected]
        got = under_autocast(case.number, False)
        scaled(got, expected)
        if any(g.dtype != torch.float32 for g in got[1:]):
            raise _Differs("gradients of float32 leaves are in another dtype")
        if case.has_reference:
            theirs = under_autocast(case.plain, False)
            if got[0].dtype != theirs[0].dtype:
                raise _Differs(f"output: expected {theirs[0].dtype}, got {got[0].dtype}")
            scaled(under_autocast(case.number, True), expected)

    return check


class _Module(torch.nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def _export(case: _Case) -> None:
    for strict in (False, True):
        # Pass all tensors as arguments: PyTorch before 2.9 cannot export closed-over tensors.
        exported = torch.export.export(_Module(case.number_of_tensors), case.tensors, strict=strict)
        _same("value", exported.module()(*case.tensors), case.plain(*case.inputs))


def _strides(case: _Case) -> None:
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "not contiguous": lambda t: torch.stack([t, -t], dim=-1)[..., 0],
        "columns first": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
        "at an offset": lambda t: torch.cat([-t.flatten(), t.flatten()])[t.numel() :].view(t.shape),
        "stride 0": lambda t: t[:1].expand(t.shape) if t.dim() else t,
    }
    for name, change in layouts.items():
        leaves = [change(t).detach().requires_grad_() for t in case.inputs]
        got = torch.autograd.grad(case.number(*leaves), leaves, allow_unused=True)
        expected = case.gradients(*(t.detach().clone() for t in leaves))
        _same(f"gradient, inputs {name}", _zeros_for_none(got, leaves), expected)


def _leading_dimensions(case: _Case) -> None:
    examples = _wants_examples(case)
    for leading in ((), (2,), (2, 1), (2, 1, 5, 3)):
        inputs = tuple(
            _random(*leading, *t.shape[1:], seed=i).sigmoid() if each else t
            for i, (t, each) in enumerate(zip(case.inputs, examples, strict=True))
        )
        _same(
            f"gradient, leading dimensions {leading}",
            _gradients(case.number, inputs),
            case.gradients(*inputs),
        )


def _threads(case: _Case) -> None:
    """Eight calls with separate inputs run their backward passes concurrently."""
    each = [[t / i for t in case.inputs] for i in range(1, 9)]
    leaves = [[t.clone().requires_grad_() for t in inputs] for inputs in each]
    outputs = [case.number(*inputs) for inputs in leaves]
    with concurrent.futures.ThreadPoolExecutor(len(outputs)) as pool:
        list(pool.map(torch.Tensor.backward, outputs))
    for inputs, of_call in zip(each, leaves, strict=True):
        got = _zeros_for_none([leaf.grad for leaf in of_call], inputs)
        _same("gradient of one of eight threads", got, case.gradients(*inputs))


def _history(value: Any) -> Any:
    """The tensor's autograd graph node; an in-place operation replaces it."""
    return value.grad_fn if isinstance(value, Tensor) else None


def _untouched(case: _Case) -> None:
    """Neither the inputs nor the upstream gradient are overwritten.

    A function may work in place if it tells autograd, for example by `mark_dirty`: then the input's
    graph node is the function's.
    """
    arguments = case.subject.fresh()
    history = [_history(value) for value in arguments]
    output = case.subject.function(*arguments)
    kept = [_history(value) is then for value, then in zip(arguments, history, strict=True)]

    def compare(when: str) -> None:
        triples = zip(arguments, case.subject.arguments, kept, strict=True)
        for i, (got, expected, should_be) in enumerate(triples):
            if should_be and isinstance(got, Tensor):
                _same(f"input {i} {when}", got, expected)

    compare("after the call")
    upstream = _random(*output.shape, seed=3).to(output.dtype)
    before = upstream.clone()
    inputs = [arguments[i] for i in case.subject.places]
    roots = [t for t in inputs if _history(t) is not None]
    torch.autograd.grad(output, roots, upstream, allow_unused=True)
    _same("upstream gradient after the backward", upstream, before)
    compare("after the backward")
    arguments = [copied(value) for value in case.subject.arguments]
    with torch.no_grad():
        case.subject.function(*arguments)
    compare("after a call under no_grad")


def _checkpoint(case: _Case) -> None:
    def recomputed(*inputs: Tensor) -> Tensor:
        output: Tensor = checkpoint(case.number, *inputs, use_reentrant=False)
        return output

    _same("gradient", _gradients(recomputed, case.inputs), case.gradients())


def _inference_mode(case: _Case) -> None:
    with torch.inference_mode():
        output = case.number(*(t.clone() for t in case.inputs))
        if not output.is_inference():
            raise _Differs("the output is no inference tensor")
        value = output.clone()
    _same("value", value, case.plain(*case.inputs))


def _frozen(case: _Case) -> None:
    """Inputs without requires_grad get no gradient, and the other gradients are unchanged.

    Tested with each single input requiring a gradient, and with all inputs but one.
    """
    expected = case.gradients()
    alone = [(i,) for i in case.argnums]
    but_one = [tuple(k for k in case.argnums if k != i) for i in case.argnums]
    for wanted in dict.fromkeys([*alone, *but_one]) if len(alone) > 1 else alone:
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(case.inputs)]
        output = case.number(*leaves)
        names = " and ".join(map(str, wanted))
        if not output.requires_grad:
            if any(expected[i].any() for i in wanted):
                raise _Differs(f"input {names} alone has no gradient")
            continue
        output.backward()
        for i in wanted:
            got = _zeros_for_none([leaves[i].grad], [leaves[i]])
            alone_or = "alone" if len(wanted) == 1 else f"where {names} require one"
            _same(f"gradient of input {i} {alone_or}", got, (expected[i],))


def _meta(case: _Case) -> None:
    inputs = [t.to("meta").requires_grad_() for t in case.inputs]
    output = case.call(*inputs)
    if output.shape != case.shape:
        raise _Differs(f"output: expected shape {tuple(case.shape)}, got {tuple(output.shape)}")
    gradients = torch.autograd.grad(_one_number(output), inputs, allow_unused=True)
    for number, (g, t) in enumerate(zip(gradients, inputs, strict=True)):
        if g is not None and g.shape != t.shape:
            raise _Differs(
                f"gradient, input {number}: expected shape {tuple(t.shape)}, got {tuple(g.shape)}"
            )


Check = Callable[[_Case], None]
COLUMNS: dict[str, Check] = {
    "double backward": _double_backward,
    "func.grad": _func_grad,
    "func.vjp": _func_vjp,
    "func.jvp": _func_jvp,
    "func.vmap": _func_vmap,
    "func.jacrev": _func_jacrev,
    "func.hessian": _func_hessian,
    "forward mode in forward mode": _nested_forward_mode,
    "per-sample vmap(grad)": _per_sample,
    "compile (aot_eager)": _compiled("aot_eager"),
    "compile (inductor)": _compiled("inductor"),
    "compile, dynamic shapes": _dynamic_shapes,
    "compile, double backward": _compiled_double_backward,
    "compile(vmap(grad))": _compiled_per_sample,
    "compile(hessian)": _compiled_hessian,
    "autocast (CPU)": _autocast("cpu", torch.bfloat16),
    "autocast (CUDA)": _autocast("cuda", torch.float16),
    "export": _export,
    "strides": _strides,
    "leading dimensions": _leading_dimensions,
    "several threads": _threads,
    "checkpoint": _checkpoint,
    "inference_mode": _inference_mode,
    "frozen inputs": _frozen,
    "inputs untouched": _untouched,
    "meta device": _meta,
}
"""The checks, by feature name."""
_FORWARD_MODE = ("func.jvp", "func.hessian", "forward mode in forward mode", "compile(hessian)")
