"""Where a function works: with what else of PyTorch it can be put together.

`check_composability` is for a `torch.autograd.Function` of your own, or any function of tensors.
Each check computes something both ways and holds the two together; the plain way is the function
itself, called eagerly and differentiated once by `backward`, which `check_gradients` is for. nnce's
own table is the same, applied to its four functions: the tests run every cell, and
`scripts/check_gradients.py` prints it.
"""

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from nnce import functional
from nnce.labels import linear_sigmoid_cross_entropy
from nnce.pairs import pair_sigmoid_cross_entropy

_F = torch.nn.functional

Verdict = Literal["works", "wrong", "fails", "not tried"]


class Cell(NamedTuple):
    """What came of one check."""

    verdict: Verdict
    """"wrong" is a result that differs, of which PyTorch says nothing; "fails" an exception."""
    detail: str = ""
    """Where and by how much it differs, PyTorch's reason, or why it was not tried."""


class Composability(dict[str, Cell]):
    """What `check_composability` found: a `Cell` for each of PyTorch's ways, by its name."""

    @property
    def wrong(self) -> list[str]:
        """The names of what is silently wrong."""
        return [name for name, cell in self.items() if cell.verdict == "wrong"]

    @property
    def right(self) -> bool:
        """Whether nothing is silently wrong; what fails with an exception says so itself."""
        return not self.wrong

    def __bool__(self) -> bool:
        """`right`, so that `assert check_composability(…)` means what it says."""
        return self.right

    def __str__(self) -> str:
        """A line for each."""
        return "\n".join(
            f"{name:<30}{cell.verdict:<11}{cell.detail}".rstrip() for name, cell in self.items()
        )


def check_composability(
    function: Callable[..., Tensor],
    *inputs: Any,
    reference: Callable[..., Tensor] | None = None,
    examples: Sequence[bool] | None = None,
) -> Composability:
    """Try a function with all that PyTorch puts together with one, and hold each to the plain way.

    Tried are double backward, `torch.func`'s transforms and forward mode in forward mode,
    per-sample gradients, `torch.compile` (with aot_eager, inductor, dynamic shapes, and over
    transforms), autocast, export, other strides and leading dimensions, several threads,
    checkpoints, inference mode, frozen inputs, the meta device, and whether anything is changed in
    place. All in float64, but autocast.

    Without a reference second derivatives are held to central differences of the first ones. It
    goes by the first derivatives of the plain way: whether these are right, `check_gradients` says.

    Args:
        function: takes the inputs and returns a tensor; a Function's `apply`, for instance.
        inputs: floating-point tensors are differentiated by; all else is handed on as it is. Small
            ones will do, away from kinks.
        reference: computes the same by means that are trusted, PyTorch's own functions, say.
        examples: for each input, whether its first dimension numbers examples, whose number does
            not matter to the function; what wants to know is not tried if it is not said.

    Returns:
        What came of each: it works; it is wrong, with where and by how much; it fails, with
        PyTorch's reason; or it was not tried, with ours.

    Raises:
        TypeError: the function is none, no input is a floating-point tensor, or the output is not
            a floating-point tensor.
        ValueError: the function or the reference cannot be called with these inputs in float64, or
            they give outputs of two shapes; the function is random, or does not depend on them
            differentiably; an input is empty; or there are not as many `examples` as inputs.
    """
    if not callable(function):
        raise TypeError(f"expected a function of tensors, got {type(function).__name__}")
    case = _Case(function, inputs, reference, examples)
    return Composability({name: _try(check, case) for name, check in COLUMNS.items()})


class _Differs(Exception):
    """A result that is another than the plain one."""


class _NotTried(Exception):
    """A check that cannot be made here."""


def _try(check: "Check", case: "_Case") -> Cell:
    try:
        check(case)
    except _NotTried as reason:
        return Cell("not tried", str(reason))
    except _Differs as difference:
        return Cell("wrong", str(difference))
    except Exception as error:  # whatever PyTorch raises
        return Cell("fails", f"{type(error).__name__}: {_first_sentence(str(error))}")
    return Cell("works")


def _first_sentence(words: str) -> str:
    """The first line, and the one after what only announces it ("backend='inductor' raised:")."""
    lines = [line.strip() for line in words.splitlines() if line.strip()] or ["without a word"]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


# --------------------------------------------------------------------------------- the function


class _Case:
    """A function of the inputs that are differentiated by, made one number, and the plain way."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: Sequence[Any],
        reference: Callable[..., Tensor] | None,
        examples: Sequence[bool] | None,
    ) -> None:
        self._whole = [_wide(value) for value in inputs]
        self._places = [i for i, value in enumerate(self._whole) if _is_real(value)]
        if not self._places:
            kinds = ", ".join(_kind(value) for value in inputs) or "no inputs"
            raise TypeError(f"expected a floating-point tensor to differentiate by, got {kinds}")
        if examples is not None and (
            not isinstance(examples, Sequence) or len(examples) != len(inputs)
        ):
            raise ValueError(
                f"expected examples for each of the {len(inputs)} inputs, got {examples!r}"
            )
        self.inputs = tuple(self._whole[i] for i in self._places)
        if not all(t.numel() for t in self.inputs):
            raise ValueError("expected something to differentiate by, got an empty tensor")
        # What is handed on as it is has no part in batches.
        fixed = len(self._places) < len(inputs)
        self.examples = None if examples is None or fixed else tuple(map(bool, examples))
        self._function, self._reference = function, reference
        self.has_reference = reference is not None
        self._look(function)

    def _look(self, function: Callable[..., Tensor]) -> None:
        """Whether it is a function that anything can be said of."""
        outputs = []
        for _ in range(2):
            leaves = self.leaves()
            try:
                output = function(*self._arguments(leaves))
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise ValueError(f"expected a function of these inputs, got {reason}") from error
            if not _is_real(output):
                raise TypeError(f"expected a floating-point tensor for output, got {_kind(output)}")
            if not output.requires_grad:
                raise ValueError("expected a function that depends differentiably on its inputs")
            outputs.append(output.detach())
        if not torch.equal(*(output.nan_to_num() for output in outputs)):
            raise ValueError("expected a function that gives the same each time, got two outputs")
        if self._reference is None:
            return
        try:
            expected = self._reference(*self._arguments(self.leaves()))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"expected a reference of these inputs, got {reason}") from error
        if not _is_real(expected) or expected.shape != outputs[0].shape:
            kind = tuple(expected.shape) if _is_real(expected) else _kind(expected)
            raise ValueError(
                f"expected a reference whose output is a tensor of the function's shape, "
                f"{tuple(outputs[0].shape)}, got {kind}"
            )

    def _arguments(self, inputs: Sequence[Tensor]) -> list[Any]:
        given = iter(inputs)
        return [next(given) if _is_real(value) else value for value in self._whole]

    def call(self, *inputs: Tensor) -> Tensor:
        """The function's output."""
        return self._function(*self._arguments(inputs))

    def number(self, *inputs: Tensor) -> Tensor:
        """The function's output as one number; one that is not pulls at no two elements alike."""
        return _one_number(self.call(*inputs))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The inputs and, among them, the tensors that are handed on as they are."""
        return tuple(value for value in self._whole if isinstance(value, Tensor))

    def number_of_tensors(self, *tensors: Tensor) -> Tensor:
        """The function's output as one number, of all tensors."""
        given = iter(tensors)
        whole = [next(given) if isinstance(value, Tensor) else value for value in self._whole]
        return _one_number(self._function(*whole))

    def plain(self, *inputs: Tensor) -> Tensor:
        """The same by the reference, or by the function itself."""
        function = self._function if self._reference is None else self._reference
        return _one_number(function(*self._arguments(inputs)))

    def leaves(self) -> list[Tensor]:
        """Copies of the inputs to differentiate by."""
        return [t.clone().requires_grad_() for t in self.inputs]

    @property
    def argnums(self) -> tuple[int, ...]:
        """All inputs, for `torch.func`."""
        return tuple(range(len(self.inputs)))

    def gradients(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The plain first derivatives, here or at other inputs."""
        return _gradients(self.plain, inputs or self.inputs)

    def second(self, along: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The plain second derivatives times a direction."""
        if self.has_reference:
            leaves = self.leaves()
            first = torch.autograd.grad(self.plain(*leaves), leaves, create_graph=True)
            pulled = _dot(first, along)
            return _zeros_for_none(
                torch.autograd.grad(pulled, leaves, allow_unused=True)
                if pulled.requires_grad
                else [None for _ in leaves],
                self.inputs,
            )

        def at(step: float) -> tuple[Tensor, ...]:
            moved = (t + step * d for t, d in zip(self.inputs, along, strict=True))
            return self.gradients(*moved)

        # Of the fourth order: some 1e-10 of what it is, of a smooth function of numbers about 1.
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
        """Of second derivatives."""
        return {} if self.has_reference else {"rtol": 1e-6, "atol": 1e-7}


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _one_number(output: Tensor) -> Tensor:
    return output if output.dim() == 0 else (output + 0.5 * output * output).sum()


def _wide(value: Any) -> Any:
    return value.detach().double() if _is_real(value) else value


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


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
        wrong = ~((off <= atol + rtol * b.abs()) | (a == b) | (a.isnan() & b.isnan()))
        if wrong.any():
            at = tuple(int(i) for i in torch.nonzero(wrong)[off[wrong].nan_to_num().argmax()])
            difference = f"expected at {at}, got {a[at]:.6g}, off by {off[at]:.1e}"
            raise _Differs(f"{what}{of}: {b[at]:.6g} {difference}")


# ----------------------------------------------------------------------------------- the checks


def _double_backward(case: _Case) -> None:
    for along in case.directions():
        leaves = case.leaves()
        first = torch.autograd.grad(
            case.number(*leaves), leaves, create_graph=True, allow_unused=True
        )
        pulled = _dot(_zeros_for_none(first, leaves), along)
        if pulled.requires_grad:
            pulled.backward()  # unlike grad(), it comes by what says that it has no derivative
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
    """in_dims and inputs: all of them three times, first or last, and each of them alone."""
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


def _per_sample(case: _Case) -> None:
    for in_dims, inputs in _batches(case):
        got = vmap(grad(case.number, case.argnums), in_dims=in_dims)(*inputs)
        each = [case.gradients(*one) for one in _one_by_one(in_dims, inputs)]
        _same("gradient", got, [torch.stack(of_input) for of_input in zip(*each, strict=True)])


def _func_jacrev(case: _Case) -> None:
    _same("gradient", jacrev(case.number, case.argnums)(*case.inputs), case.gradients())


def _hold_hessian(what: str, case: _Case, got: Any) -> None:
    """A block for each pair of inputs, to second derivatives along directions."""
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
    """Second derivatives, and with a reference third ones, of one forward mode inside another."""
    argnums = case.argnums

    def forward(derivative: Callable[..., Any]) -> Callable[..., Any]:
        transformed: Callable[..., Any] = jacfwd(derivative, argnums)
        return transformed

    def backward(derivative: Callable[..., Any]) -> Callable[..., Any]:
        transformed: Callable[..., Any] = jacrev(derivative, argnums)
        return transformed

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
def _fresh_compiler() -> Iterator[None]:
    """What others have compiled counts against a limit, and so would this."""
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


def _compiled(backend: str) -> "Check":
    def check(case: _Case) -> None:
        if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
            raise _NotTried("inductor wants a C++ compiler, and there is none")
        with _fresh_compiler():
            compiled = torch.compile(case.number, fullgraph=True, backend=backend)
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
    counter = _compile_counter()
    after: list[int] = []  # dynamo may begin anew within the first call, and counts that
    with _fresh_compiler():
        compiled = torch.compile(case.number, fullgraph=True, backend=counter, dynamic=True)
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
    with _fresh_compiler():
        compiled = torch.compile(case.number, fullgraph=True, backend="aot_eager")
        for along in case.directions(1):
            leaves = case.leaves()
            first = torch.autograd.grad(compiled(*leaves), leaves, create_graph=True)
            got = torch.autograd.grad(_dot(first, along), leaves)
            _same("second derivative", got, case.second(along), **case.tolerance)


def _compiled_per_sample(case: _Case) -> None:
    in_dims, inputs = next(_batches(case))
    transformed = vmap(grad(case.number, case.argnums), in_dims=in_dims)
    with _fresh_compiler():
        got = torch.compile(transformed, fullgraph=True, backend="aot_eager")(*inputs)
    each = [case.gradients(*one) for one in _one_by_one(in_dims, inputs)]
    _same("gradient", got, [torch.stack(of_input) for of_input in zip(*each, strict=True)])


def _compiled_hessian(case: _Case) -> None:
    transformed = hessian(case.number)  # by the first input; by several, PyTorch 2.11 cannot
    with _fresh_compiler():
        got = torch.compile(transformed, fullgraph=True, backend="aot_eager")(*case.inputs)
    _same("hessian", got, transformed(*case.inputs))


def _autocast(device: str, dtype: torch.dtype) -> "Check":
    """The numbers are those in full precision, nearly, and gradients have their leaves' dtype.

    With a reference the output has its dtype, and the first input may come in half precision.
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
        # All tensors are arguments: PyTorch before 2.9 exports none that a function closes over.
        exported = torch.export.export(_Module(case.number_of_tensors), case.tensors, strict=strict)
        _same("value", exported.module()(*case.tensors), case.plain(*case.inputs))


def _strides(case: _Case) -> None:
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "not contiguous": lambda t: torch.stack([t, -t], dim=-1)[..., 0],
        "columns first": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
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
    """Eight calls with inputs of their own, whose backwards run at once."""
    each = [[t / i for t in case.inputs] for i in range(1, 9)]
    leaves = [[t.clone().requires_grad_() for t in inputs] for inputs in each]
    outputs = [case.number(*inputs) for inputs in leaves]
    workers = [threading.Thread(target=output.backward) for output in outputs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for inputs, of_call in zip(each, leaves, strict=True):
        got = _zeros_for_none([leaf.grad for leaf in of_call], inputs)
        _same("gradient of one of eight threads", got, case.gradients(*inputs))


def _untouched(case: _Case) -> None:
    """Neither the inputs nor the upstream gradient are changed in place."""
    leaves = case.leaves()
    output = case.call(*leaves)
    _same("input after the call", leaves, case.inputs)
    upstream = _random(*output.shape, seed=3).to(output.dtype)
    before = upstream.clone()
    torch.autograd.grad(output, leaves, upstream, allow_unused=True)
    _same("upstream gradient after the backward", upstream, before)
    _same("input after the backward", leaves, case.inputs)


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
    """Whoever does not ask for a gradient gets none, and the others' are the same."""
    expected = case.gradients()
    for wanted in case.argnums:
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(case.inputs)]
        output = case.number(*leaves)
        if not output.requires_grad:
            if expected[wanted].any():
                raise _Differs(f"input {wanted} alone has no gradient")
            continue
        output.backward()
        got = _zeros_for_none([leaves[wanted].grad], [leaves[wanted]])
        _same(f"gradient of input {wanted} alone", got, (expected[wanted],))


def _meta(case: _Case) -> None:
    inputs = [t.to("meta").requires_grad_() for t in case.inputs]
    gradients = torch.autograd.grad(case.number(*inputs), inputs, allow_unused=True)
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
"""A check for each column."""


# --------------------------------------------------------------------- PyTorch's private parts


def _compile_counter() -> Any:
    """A backend that counts compilations, which PyTorch has for its own tests."""
    try:
        from torch._dynamo.testing import CompileCounterWithBackend
    except ImportError as error:
        raise _NotTried("this PyTorch has no torch._dynamo.testing") from error
    counter: Any = CompileCounterWithBackend
    return counter("aot_eager")


# ------------------------------------------------------------------------------ nnce's own rows


class Row(NamedTuple):
    """A function of nnce, what PyTorch has for it, and inputs for both."""

    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    """In float64; examples are rows."""
    examples: tuple[bool, ...]
    """Which of the inputs have a row for each example."""

    def check(self) -> Composability:
        """All cells of the row."""
        return check_composability(
            self.function, *self.inputs, reference=self.reference, examples=self.examples
        )


def rows() -> dict[str, Row]:
    """The four functions."""
    z, y = _random(5, 3, seed=0), _random(5, 3, seed=1).sigmoid()
    a_prev, W, b = _random(5, 4, seed=2), _random(3, 4, seed=3), _random(3, seed=4)
    return {
        "linear": Row(functional.linear, _F.linear, (a_prev, W, b), (True, False, False)),
        "sigmoid": Row(functional.sigmoid, torch.sigmoid, (z,), (True,)),
        "sigmoid_quadratic": Row(
            lambda z, y: functional.sigmoid_quadratic(z, y, reduction="sum"),
            lambda z, y: 0.5 * _F.mse_loss(z.sigmoid(), y, reduction="sum"),
            (z, y),
            (True, True),
        ),
        "sigmoid_cross_entropy": Row(
            lambda z, y: functional.sigmoid_cross_entropy(z, y, reduction="sum"),
            lambda z, y: _F.binary_cross_entropy_with_logits(z, y, reduction="sum"),
            (z, y),
            (True, True),
        ),
    }


def walked_rows() -> dict[str, Row]:
    """The two functions that go block by block, and refuse what they have no derivatives for."""
    x, W, b = _random(3, 2, seed=2), _random(4, 2, seed=3), _random(4, seed=4)
    scale, bias = _random(seed=5), _random(seed=6)

    def positives(x: Tensor) -> Tensor:
        # −1 and 0, 1 and 2, 3 and −1, …; not a constant, of which PyTorch before 2.9 exports none.
        return torch.arange(2 * len(x), device=x.device).view(-1, 2) % 5 - 1

    def targets(x: Tensor) -> Tensor:
        return _F.one_hot(positives(x) % 5, 5).sum(1)[:, :4].to(x.dtype)

    def all_pairs(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        z, positive = scale * x @ y.mT + bias, torch.eye(len(x), dtype=x.dtype, device=x.device)
        return _F.binary_cross_entropy_with_logits(z, positive, reduction="sum") / len(x)

    return {
        "linear_sigmoid_cross_entropy": Row(
            lambda x, W, b: linear_sigmoid_cross_entropy(
                x, W, positives(x), linear_bias=b, block=3, reduction="sum"
            ),
            lambda x, W, b: _F.binary_cross_entropy_with_logits(
                _F.linear(x, W, b), targets(x), reduction="sum"
            ),
            (x, W, b),
            (True, False, False),
        ),
        "pair_sigmoid_cross_entropy": Row(
            lambda x, y, scale, bias: pair_sigmoid_cross_entropy(x, y, scale, bias, block=2),
            all_pairs,
            (x, _random(3, 2, seed=7), scale, bias),
            (True, True, False, False),
        ),
    }


REFUSED = {
    **dict.fromkeys(
        ("double backward", "compile, double backward", "func.hessian", "compile(hessian)"),
        "no second derivatives",
    ),
    **dict.fromkeys(("func.jvp", "forward mode in forward mode"), "no forward mode"),
    **dict.fromkeys(("func.vmap", "per-sample vmap(grad)", "compile(vmap(grad))"), "no vmap"),
    "leading dimensions": "examples are rows",
}
"""Columns in which `walked_rows` fail, by intention, and why."""
INSIDE_PYTORCH = {
    "compile, double backward": "aot_autograd has no double backward",
}
"""Columns of nnce's own table where PyTorch itself stands in the way, and how."""
if torch.torch_version.TorchVersion(torch.__version__) >= "2.15":  # 2.6 to 2.14 could do these
    INSIDE_PYTORCH["compile(vmap(grad))"] = "dynamo's stand-in for a Function has no vmap rule"
    INSIDE_PYTORCH["compile(hessian)"] = "dynamo cannot trace forward mode over its stand-in"
