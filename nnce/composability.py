"""Where the Functions work: with what else of PyTorch they can be put together.

A matrix: the four functions are its rows, PyTorch's transformations and settings its columns, and a
cell is a check that computes something both ways and raises if the two differ. The tests run every
cell, and `scripts/check_gradients.py` prints what came of it.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nnce import functional

_F = torch.nn.functional


class Row(NamedTuple):
    """A function of nnce, what PyTorch has for it, and inputs for both."""

    function: Callable[..., Tensor]
    """Its output summed to one number, over a first dimension of examples or one example."""
    reference: Callable[..., Tensor]
    """The same number by PyTorch's own functions."""
    inputs: tuple[Tensor, ...]
    """In float64; examples are rows."""
    per_example: tuple[bool, ...]
    """Which of the inputs have a row for each example."""


def _random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rows() -> dict[str, Row]:
    """The four functions."""
    z, y = _random(5, 3, seed=0), _random(5, 3, seed=1).sigmoid()
    a_prev, W, b = _random(5, 4, seed=2), _random(3, 4, seed=3), _random(3, seed=4)
    return {
        "linear": Row(
            lambda a, W, b: functional.linear(a, W, b).pow(3).sum(),
            lambda a, W, b: _F.linear(a, W, b).pow(3).sum(),
            (a_prev, W, b),
            (True, False, False),
        ),
        "sigmoid": Row(
            lambda z: functional.sigmoid(z).pow(3).sum(),
            lambda z: torch.sigmoid(z).pow(3).sum(),
            (z,),
            (True,),
        ),
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


# ----------------------------------------------------------------------------------- the cells


def _leaves(row: Row) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in row.inputs]


def _gradients(function: Callable[..., Tensor], row: Row, **options: Any) -> tuple[Tensor, ...]:
    leaves = _leaves(row)
    return torch.autograd.grad(function(*leaves), leaves, **options)


def _same(got: Any, expected: Any, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def _everywhere(row: Row) -> tuple[int, ...]:
    return tuple(range(len(row.inputs)))


def _second_derivatives(function: Callable[..., Tensor], row: Row) -> tuple[Tensor, ...]:
    leaves = _leaves(row)
    first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum((g.pow(2).sum() for g in first), torch.tensor(0.0)), leaves)


def _double_backward(row: Row) -> None:
    _same(_second_derivatives(row.function, row), _second_derivatives(row.reference, row))


def _func_grad(row: Row) -> None:
    argnums = _everywhere(row)
    _same(grad(row.function, argnums)(*row.inputs), _gradients(row.reference, row))


def _func_vjp(row: Row) -> None:
    pull_back = vjp(row.function, *row.inputs)[1]
    upstream = torch.tensor(1.7, dtype=torch.float64)
    _same(pull_back(upstream), tuple(1.7 * g for g in _gradients(row.reference, row)))


def _func_jvp(row: Row) -> None:
    tangents = tuple(_random(*t.shape, seed=9 + i) for i, t in enumerate(row.inputs))
    got: Any = jvp(row.function, row.inputs, tangents)
    expected = sum(
        ((g * t).sum() for g, t in zip(_gradients(row.reference, row), tangents, strict=True)),
        torch.tensor(0.0, dtype=torch.float64),
    )
    _same(got, (row.reference(*row.inputs), expected))


def _in_dims(row: Row) -> tuple[int | None, ...]:
    return tuple(0 if each else None for each in row.per_example)


def _one_by_one(function: Callable[..., Any], row: Row) -> list[Any]:
    return [
        function(
            *(t[i] if each else t for t, each in zip(row.inputs, row.per_example, strict=True))
        )
        for i in range(len(row.inputs[0]))
    ]


def _func_vmap(row: Row) -> None:
    got = vmap(row.function, in_dims=_in_dims(row))(*row.inputs)
    _same(got, torch.stack(_one_by_one(row.reference, row)))


def _func_jacrev(row: Row) -> None:
    _same(jacrev(row.function, _everywhere(row))(*row.inputs), _gradients(row.reference, row))


def _func_hessian(row: Row) -> None:
    argnums = _everywhere(row)
    _same(
        hessian(row.function, argnums)(*row.inputs),
        torch.autograd.functional.hessian(row.reference, row.inputs),
    )


def _nested_forward_mode(row: Row) -> None:
    """Second and third derivatives, mixed ones too, with one forward mode inside another."""
    argnums = _everywhere(row)

    def forward(derivative: Callable[..., Any]) -> Callable[..., Any]:
        transformed: Callable[..., Any] = jacfwd(derivative, argnums)
        return transformed

    def backward(derivative: Callable[..., Any]) -> Callable[..., Any]:
        transformed: Callable[..., Any] = jacrev(derivative, argnums)
        return transformed

    second = backward(backward(row.reference))
    third = backward(second)(*row.inputs)
    _same(forward(forward(row.function))(*row.inputs), second(*row.inputs))
    for transformed in (
        forward(forward(backward(row.function))),
        forward(backward(forward(row.function))),
    ):
        _same(transformed(*row.inputs), third)


def _per_sample(row: Row) -> None:
    argnums = _everywhere(row)
    got = vmap(grad(row.function, argnums), in_dims=_in_dims(row))(*row.inputs)
    each = _one_by_one(grad(row.reference, argnums), row)
    _same(got, tuple(torch.stack(gradients) for gradients in zip(*each, strict=True)))


def _compiled(backend: str, **options: Any) -> Callable[[Row], None]:
    def cell(row: Row) -> None:
        torch.compiler.reset()
        compiled = torch.compile(row.function, fullgraph=True, backend=backend, **options)
        leaves = _leaves(row)
        output = compiled(*leaves)
        _same(output, row.reference(*leaves))
        _same(torch.autograd.grad(output, leaves), _gradients(row.reference, row))

    return cell


def _dynamic_shapes(row: Row) -> None:
    """One compilation serves batches of every size, and there is no graph break."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(row.function, fullgraph=True, backend=counter, dynamic=True)
    for n in (5, 3, 4):
        inputs = tuple(
            t[:n] if each else t for t, each in zip(row.inputs, row.per_example, strict=True)
        )
        small = row._replace(inputs=inputs)
        _same(_gradients(compiled, small), _gradients(row.reference, small))
    if counter.frame_count != 1:
        raise AssertionError(f"compiled {counter.frame_count} times for batches of three sizes")


def _compiled_double_backward(row: Row) -> None:
    torch.compiler.reset()
    compiled = torch.compile(row.function, fullgraph=True, backend="aot_eager")
    _same(_second_derivatives(compiled, row), _second_derivatives(row.reference, row))


def _compiled_per_sample(row: Row) -> None:
    torch.compiler.reset()
    transformed = vmap(grad(row.function, _everywhere(row)), in_dims=_in_dims(row))
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    _same(compiled(*row.inputs), transformed(*row.inputs))


def _compiled_hessian(row: Row) -> None:
    torch.compiler.reset()
    transformed = hessian(row.function)  # by the first input; by several, 2.11 cannot
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    _same(compiled(*row.inputs), transformed(*row.inputs))


def _autocast(device: str, dtype: torch.dtype) -> Callable[[Row], None]:
    """Under autocast the dtypes are those of PyTorch's own functions, and so are the numbers."""

    def cell(row: Row) -> None:
        results = []
        for function in (row.function, row.reference):
            leaves = [t.to(device, torch.float32).requires_grad_() for t in row.inputs]
            with torch.autocast(device, dtype):
                output = function(*leaves)
            gradients = torch.autograd.grad(output, leaves)
            results.append((output, *gradients))
        ours, theirs = results
        _same(ours, theirs, rtol=0.02, atol=0.02)  # bfloat16 has 8 bits

        leaves = [t.to(device, torch.float32) for t in row.inputs]
        with torch.autocast(device, dtype):
            half = row.function(*(t.to(dtype) for t in leaves[:1]), *leaves[1:])
        _same(half.float(), row.reference(*leaves), rtol=0.05, atol=0.05)

    return cell


class _Module(torch.nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def _export(row: Row) -> None:
    for strict in (False, True):
        exported = torch.export.export(_Module(row.function), row.inputs, strict=strict)
        _same(exported.module()(*row.inputs), row.reference(*row.inputs))


def _strides(row: Row) -> None:
    for change in (
        lambda t: torch.stack([t, -t], dim=-1)[..., 0],  # non-contiguous
        lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,  # columns first
        lambda t: t[:1].expand(t.shape),  # stride 0
    ):
        changed = row._replace(inputs=tuple(change(t) for t in row.inputs))
        leaves = [t.detach().requires_grad_() for t in changed.inputs]
        _same(
            torch.autograd.grad(row.function(*leaves), leaves),
            torch.autograd.grad(row.reference(*leaves), leaves),
        )


def _leading_dimensions(row: Row) -> None:
    for leading in ((), (2,), (2, 1), (2, 1, 5, 3)):
        inputs = tuple(
            _random(*leading, *t.shape[1:], seed=i).sigmoid() if each else t
            for i, (t, each) in enumerate(zip(row.inputs, row.per_example, strict=True))
        )
        shaped = row._replace(inputs=inputs)
        _same(_gradients(row.function, shaped), _gradients(row.reference, shaped))


def _threads(row: Row) -> None:
    leaves = _leaves(row)
    outputs = [row.function(*leaves) for _ in range(8)]
    workers = [threading.Thread(target=output.backward) for output in outputs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    expected = tuple(8 * g for g in _gradients(row.reference, row))
    _same(tuple(leaf.grad for leaf in leaves), expected)


def _checkpoint(row: Row) -> None:
    def recomputed(*inputs: Tensor) -> Tensor:
        output: Tensor = checkpoint(row.function, *inputs, use_reentrant=False)
        return output

    _same(_gradients(recomputed, row), _gradients(row.reference, row))


def _inference_mode(row: Row) -> None:
    with torch.inference_mode():
        output = row.function(*(t.clone() for t in row.inputs))
    if not output.is_inference():
        raise AssertionError("the output is no inference tensor")
    _same(output.clone(), row.reference(*row.inputs))


class _CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _frozen(row: Row) -> None:
    """No work for a gradient nobody asked for: fewer operations run than for all of them."""

    def operations(wanted: tuple[int, ...]) -> int:
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(row.inputs)]
        output = row.function(*leaves)
        counter = _CountOperations()  # type: ignore[no-untyped-call]
        with counter:
            output.backward()
        return counter.count

    everything = operations(_everywhere(row))
    for wanted in _everywhere(row):
        alone = operations((wanted,))
        if len(row.inputs) > 1 and not alone < everything:
            raise AssertionError(f"{alone} operations for input {wanted}, {everything} for all")


def _meta(row: Row) -> None:
    inputs = tuple(t.to("meta").requires_grad_() for t in row.inputs)
    gradients = torch.autograd.grad(row.function(*inputs), inputs)
    if [g.shape for g in gradients] != [t.shape for t in row.inputs]:
        raise AssertionError("the shapes of the gradients are not those of the inputs")


Cell = Callable[[Row], None]
COLUMNS: dict[str, Cell] = {
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
    "meta device": _meta,
}
"""A check for each column, which raises on a row it does not hold for."""

INSIDE_PYTORCH = {
    "compile, double backward": "aot_autograd has no double backward",
}
"""Columns where PyTorch itself stands in the way, and how."""
if torch.torch_version.TorchVersion(torch.__version__) >= "2.15":  # 2.11 and 2.14 could do these
    INSIDE_PYTORCH["compile(vmap(grad))"] = "dynamo's stand-in for a Function has no vmap rule"
    INSIDE_PYTORCH["compile(hessian)"] = "dynamo cannot trace forward mode over its stand-in"
