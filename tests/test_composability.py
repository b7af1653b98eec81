"""Every cell of the matrix of `nnce.composability` is earned here."""

import re
import sys

import pytest
import torch
from conftest import missing
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from nnce import composability, functional, rules
from nnce.composability import COLUMNS, INSIDE_PYTORCH, REFUSED, rows, walked_rows

ROWS = rows()
WALKED = walked_rows()


def case_of(row):
    """A row as `_Case` takes it."""
    return row.function, row.inputs, row.reference, row.examples


def cell(row, column):
    """What comes of one cell of nnce's own table."""
    return composability._try(COLUMNS[column], composability._Case(*case_of(ROWS[row])))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("column", [c for c in COLUMNS if c not in INSIDE_PYTORCH])
def test_cell(row, column):
    found = cell(row, column)
    if found.verdict == "not tried" and "inductor" in column:
        missing("compiler", found.detail)
    if found.verdict == "not tried" and "CUDA" in column and not torch.cuda.is_available():
        pytest.skip(found.detail)
    assert found.verdict == "works", found.detail


TARGETS = torch.tensor([[0, 1, -100], [1, 1, 0], [-100, -100, -100], [0, 0, 1], [1, -100, 0]])


def with_options(z, y):
    return functional.sigmoid_cross_entropy(
        z, y, label_smoothing=0.1, ignore_index=-100, reduction="mean"
    )


def with_options_by_pytorch(z, y):
    counts = y != -100
    y = y.where(counts, 0).to(z.dtype) * 0.9 + 0.05
    C = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none")
    return (C * counts).sum() / counts.sum()


@pytest.mark.parametrize("column", COLUMNS)
def test_the_losss_options_go_with_all_that_the_loss_goes_with(column):
    """But with vmap under torch.compile, where PyTorch wants nothing before a Function."""
    z = ROWS["sigmoid_cross_entropy"].inputs[0]
    if column in ("meta device", "autocast (CUDA)"):
        pytest.skip("the targets are on the CPU")
    case = composability._Case(with_options, (z, TARGETS), with_options_by_pytorch, None)
    found = composability._try(COLUMNS[column], case)
    if column in INSIDE_PYTORCH or column in ("compile(vmap(grad))", "compile(hessian)"):
        assert found.verdict == "fails"
    elif column in ("leading dimensions", "compile, dynamic shapes"):
        assert found.verdict == "not tried"  # the targets are of one shape
    elif found.verdict == "not tried" and "inductor" in column:
        missing("compiler", found.detail)
    else:
        assert found.verdict == "works", found.detail


@pytest.mark.parametrize("row", WALKED)
@pytest.mark.parametrize("column", COLUMNS)
def test_walked_cell(row, column):
    """Of the functions that go block by block: they work, or refuse by intention."""
    found = composability._try(COLUMNS[column], composability._Case(*case_of(WALKED[row])))
    if found.verdict == "not tried" and "inductor" in column:
        missing("compiler", found.detail)
    if found.verdict == "not tried" and "CUDA" in column and not torch.cuda.is_available():
        pytest.skip(found.detail)
    assert found.verdict == ("fails" if column in REFUSED else "works"), found.detail


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("column", INSIDE_PYTORCH)
def test_where_pytorch_stands_in_the_way(row, column):
    """Fails as soon as PyTorch is repaired: then the cell is to be moved to the others."""
    found = cell(row, column)
    assert found.verdict == "fails"
    assert re.search("double backward|vmap|Observed exception", found.detail)


def _detached(backward):
    """A backward that autograd cannot see through: second derivatives lose their terms."""

    def wrong(ctx, upstream):
        gradients = backward(ctx, upstream)
        if isinstance(gradients, torch.Tensor):
            return gradients.detach()
        return tuple(None if g is None else g.detach() for g in gradients)

    return staticmethod(wrong)


def _negated(jvp):
    return staticmethod(lambda ctx, *tangents: -jvp(ctx, *tangents))


FUNCTIONS = {
    "linear": (functional.LinearFunction, functional.LinearWithJvp),
    "sigmoid": (functional.SigmoidFunction, functional.SigmoidWithJvp),
    "sigmoid_quadratic": (
        functional.SigmoidQuadraticFunction,
        functional.SigmoidQuadraticWithJvp,
    ),
    "sigmoid_cross_entropy": (
        functional.SigmoidCrossEntropyFunction,
        functional.SigmoidCrossEntropyWithJvp,
    ),
}
WRONG_RULES = {
    "linear": ("da_prev", lambda dz, W: -(dz @ W), ("linear", lambda a, W, b=None: a @ W.T)),
    "sigmoid": (
        "dz_hidden",
        lambda da, z, sigmoid: da * sigmoid(z),
        ("sigmoid", lambda z: 1 - z.sigmoid()),
    ),
    "sigmoid_quadratic": (
        "dz_quadratic",
        lambda z, y, sigmoid: sigmoid(z) - y,
        ("quadratic", lambda z, y, sigmoid=None: (z.sigmoid() - y) ** 2),
    ),
    "sigmoid_cross_entropy": (
        "dz_cross_entropy",
        lambda z, y, sigmoid, pos_weight: y - sigmoid(z),
        ("cross_entropy", lambda z, y, pos_weight, softplus=None: -y * z.sigmoid().log()),
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_planted_wrong_second_derivative_is_refused(row, monkeypatch):
    function = FUNCTIONS[row][0]
    monkeypatch.setattr(function, "backward", _detached(function.backward))
    assert cell(row, "double backward").verdict in ("wrong", "fails")
    assert cell(row, "func.hessian").verdict == "wrong"


@pytest.mark.parametrize("row", ROWS)
def test_planted_wrong_jvp_is_refused(row, monkeypatch):
    function = FUNCTIONS[row][1]
    monkeypatch.setattr(function, "jvp", _negated(function.jvp))
    found = cell(row, "func.jvp")
    assert found.verdict == "wrong" and found.detail.startswith("tangent: ")


@pytest.mark.parametrize("row", ROWS)
def test_a_jvp_inside_forward_mode_is_refused(row, monkeypatch):
    """PyTorch loses the outer tangent of a Function's jvp, in silence; so no Function is used."""
    monkeypatch.setattr(functional, "_forward_mode_levels", lambda: 1)
    assert cell(row, "forward mode in forward mode").verdict == "wrong"


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    "column",
    ["func.grad", "func.vjp", "per-sample vmap(grad)", "compile (aot_eager)", "checkpoint"],
)
def test_planted_wrong_backward_is_refused(row, column, monkeypatch):
    name, wrong, _ = WRONG_RULES[row]
    monkeypatch.setattr(rules, name, wrong)
    found = cell(row, column)
    assert found.verdict == "wrong" and found.detail.startswith("gradient")


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("column", ["func.vmap", "compile (aot_eager)", "export"])
def test_planted_wrong_forward_is_refused(row, column, monkeypatch):
    name, wrong = WRONG_RULES[row][2]
    monkeypatch.setattr(rules, name, wrong)
    found = cell(row, column)
    assert found.verdict == "wrong" and found.detail.startswith("value")


class CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("row", [row for row in ROWS if len(ROWS[row].inputs) > 1])
def test_a_gradient_nobody_asked_for_costs_nothing(row):
    """Fewer operations run for one of them than for all."""
    function, _, inputs, _ = ROWS[row]

    def operations(wanted):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        output = function(*leaves).sum()
        with CountOperations() as counter:
            output.backward()
        return counter.count

    everything = operations(range(len(inputs)))
    assert all(operations((one,)) < everything for one in range(len(inputs)))


# ------------------------------------------------------------------- everyone's own Functions


class Square(Function):
    """z², as it should be."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z):
        return z * z

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        (z,) = ctx.saved_tensors
        return 2 * z * upstream

    @staticmethod
    def jvp(ctx, dz):
        (z,) = ctx.saved_tensors
        return 2 * z * dz


class SavesWhatItMade(Square):
    """2z is kept from the forward, where nothing is differentiated: no second derivative."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        (z,) = inputs
        ctx.save_for_backward((2 * z).detach())
        ctx.save_for_forward(z)

    @staticmethod
    def backward(ctx, upstream):
        (twice,) = ctx.saved_tensors
        return twice * upstream


class WrongTangent(Square):
    @staticmethod
    def jvp(ctx, dz):
        (z,) = ctx.saved_tensors
        return z * dz


class NoTangent(Square):
    @staticmethod
    def jvp(ctx, dz):
        return torch.zeros_like(dz)


class WrongSecond(Square):
    """Right first derivatives; of 2z only half can be differentiated again."""

    @staticmethod
    def backward(ctx, upstream):
        (z,) = ctx.saved_tensors
        return (z + z.detach()) * upstream


class OnceOnly(Square):
    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (z,) = ctx.saved_tensors
        return 2 * z * upstream


class MixesExamples(Square):
    """By the mean over the first dimension of what it sees, which under vmap is another one."""

    generate_vmap_rule = False

    @staticmethod
    def vmap(info, in_dims, z):
        return MixesExamples.apply(z - z.mean(0)), 0


class TakesTheFirstDimension(Square):
    """For the batch's, whatever vmap says."""

    generate_vmap_rule = False

    @staticmethod
    def vmap(info, in_dims, z):
        return TakesTheFirstDimension.apply(z), 0


class NoVmap(Square):
    generate_vmap_rule = False


class ForgetsStrides(Square):
    """Right for inputs that are contiguous: the rows of memory are not those of another layout."""

    @staticmethod
    def backward(ctx, upstream):
        (z,) = ctx.saved_tensors
        return 2 * z.as_strided(z.shape, torch.empty(z.shape).stride()) * upstream


class OfOneShape(Square):
    @staticmethod
    def backward(ctx, upstream):
        (z,) = ctx.saved_tensors
        return (2 * z * upstream).reshape(3, 2)


class Mutates(Square):
    """What it is given, and says nothing to autograd."""

    @staticmethod
    def forward(z):
        with torch.no_grad():
            output = z * z
            z.detach().add_(1)
        return output


class MutatesUpstream(Square):
    @staticmethod
    def backward(ctx, upstream):
        (z,) = ctx.saved_tensors
        return upstream.detach().mul_(2 * z)


class KeepsInAClass(Square):
    """The last call's z, whichever is differentiated."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        Square.setup_context(ctx, inputs, output)
        KeepsInAClass.z = inputs[0]

    @staticmethod
    def backward(ctx, upstream):
        return 2 * KeepsInAClass.z * upstream


class LooksAtValues(Square):
    @staticmethod
    def forward(z):
        return z * z if z.sum().item() > -1e9 else z


class ByNumPy(Square):
    @staticmethod
    def forward(z):
        return torch.from_numpy(z.detach().numpy() ** 2)


class Product(Function):
    """Of two inputs, right."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        return a * b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        a, b = ctx.saved_tensors
        return upstream * b, upstream * a

    @staticmethod
    def jvp(ctx, da, db):
        a, b = ctx.saved_tensors
        return da * b + a * db


class OnlyBoth(Product):
    """Gradients for both inputs, or for none."""

    @staticmethod
    def backward(ctx, upstream):
        a, b = ctx.saved_tensors
        return (upstream * b, upstream * a) if all(ctx.needs_input_grad) else (0 * a, 0 * b)


def otherwise_without_gradients(z):
    return z * z if torch.is_grad_enabled() else z * z + 1


def otherwise_compiled(z):
    return z * z * z if torch.compiler.is_compiling() else z * z


class OldStyle(Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z * z

    @staticmethod
    def backward(ctx, upstream):
        (z,) = ctx.saved_tensors
        return 2 * z * upstream


Z = torch.tensor([[0.3, -1.2], [0.7, 2.0], [-0.4, 1.1]])


def found(function, **options):
    return composability.check_composability(function, Z, examples=[True], **options)


def test_what_is_right_works_without_a_reference():
    """What PyTorch's compiler makes of a jvp it says itself."""
    report = found(Square.apply)
    verdicts = {name: cell.verdict for name, cell in report.items()}
    assert "wrong" not in verdicts.values() or set(report.wrong) <= {"forward mode in forward mode"}
    for name in COLUMNS:
        if "compile" not in name and name not in (
            "autocast (CUDA)",
            "export",
            "forward mode in forward mode",
        ):
            assert verdicts[name] == "works", (name, report[name])


def test_plain_code_works_everywhere():
    report = found(lambda z: torch.tanh(z) * z)
    assert report and report.right
    failing = {name for name, cell in report.items() if cell.verdict == "fails"}
    assert failing <= {"compile, double backward"}
    assert report["autocast (CUDA)"].verdict in ("works", "not tried")
    assert "there is no CUDA device" in str(report) or torch.cuda.is_available()


def twice(function):
    """A function of two inputs, of one."""
    return lambda z: function(z, z.flip(0))


NESTED = "forward mode in forward mode"  # silently wrong for whatever has a jvp: pytorch #192985
WRONG = [
    (SavesWhatItMade.apply, "double backward", "second derivative: "),
    (SavesWhatItMade.apply, "func.hessian", "hessian: "),
    (WrongSecond.apply, "double backward", "second derivative: "),
    (WrongTangent.apply, "func.jvp", "tangent: "),
    (NoTangent.apply, "func.jvp", "tangent: "),
    (Square.apply, NESTED, "hessian: "),
    (MixesExamples.apply, "func.vmap", "value: "),
    (TakesTheFirstDimension.apply, "func.vmap", "value: "),
    (ForgetsStrides.apply, "strides", "gradient, inputs "),
    (Mutates.apply, "inputs untouched", "input after the call: "),
    (MutatesUpstream.apply, "inputs untouched", "upstream gradient after the backward: "),
    (KeepsInAClass.apply, "several threads", "gradient of one of eight threads: "),
    (otherwise_without_gradients, "inference_mode", "value: "),
    (otherwise_compiled, "compile (aot_eager)", "value: "),
]
FAILING = [
    (OnceOnly.apply, "double backward", "once_differentiable"),
    (NoVmap.apply, "func.vmap", "vmap"),
    (OfOneShape.apply, "leading dimensions", "shape"),
    (LooksAtValues.apply, "meta device", "meta"),
    (ByNumPy.apply, "meta device", "meta"),
    (OldStyle.apply, "func.grad", "setup_context"),
]
RIGHT = [
    Square.apply,
    twice(Product.apply),
    torch.tanh,
    lambda z: torch.tanh(z) * z,
    lambda z: z.softmax(-1),
    lambda z: z.logsumexp(-1),
    lambda z: z @ torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=z.dtype, device=z.device),
    functional.sigmoid,
]


def only(monkeypatch, *columns):
    monkeypatch.setattr(composability, "COLUMNS", {name: COLUMNS[name] for name in columns})


@pytest.mark.parametrize(("function", "column", "detail"), WRONG)
def test_what_is_silently_wrong_is_said_with_where_and_by_how_much(
    function, column, detail, monkeypatch
):
    only(monkeypatch, column)
    report = found(function)
    assert report[column].verdict == "wrong" and not report and report.wrong == [column]
    assert report[column].detail.startswith(detail)
    assert re.search(r"expected at \(.*\), got |expected shape", report[column].detail)
    assert f"{column:<30}wrong      {detail}" in str(report)


@pytest.mark.parametrize(("function", "column", "reason"), FAILING)
def test_what_fails_is_said_with_pytorchs_reason(function, column, reason, monkeypatch):
    only(monkeypatch, column)
    report = found(function)
    assert report[column].verdict == "fails" and reason in report[column].detail
    assert report.right  # nothing is silently wrong


@pytest.mark.parametrize("function", RIGHT)
def test_what_is_right_is_not_called_wrong(function, monkeypatch):
    only(monkeypatch, *(name for name in COLUMNS if "compile" not in name))
    assert set(found(function).wrong) <= {NESTED}


def test_inputs_frozen_one_by_one(monkeypatch):
    only(monkeypatch, "frozen inputs")
    right = composability.check_composability(Product.apply, Z, Z + 1)
    wrong = composability.check_composability(OnlyBoth.apply, Z, Z + 1)
    assert right["frozen inputs"].verdict == "works"
    assert wrong["frozen inputs"].verdict == "wrong"
    assert wrong["frozen inputs"].detail.startswith("gradient of input 0 alone: ")


def test_a_reference_decides():
    wrong = composability.check_composability(
        lambda z: z.sigmoid(), Z, reference=lambda z: z.sigmoid() * (1 + 1e-6), examples=[True]
    )
    assert wrong["func.grad"].verdict == "wrong"


def test_what_is_no_tensor_is_handed_on_and_examples_may_be_unknown():
    report = composability.check_composability(lambda z, n: z**n, Z, 3)
    assert report["func.hessian"].verdict == "works"
    for name in ("leading dimensions", "compile, dynamic shapes"):
        assert report[name].verdict == "not tried"
        assert "which inputs have a row for each example" in report[name].detail


def test_private_parts_that_are_missing_are_not_tried(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo.testing", None)
    report = cell("sigmoid", "compile, dynamic shapes")
    assert report == ("not tried", "this PyTorch has no torch._dynamo.testing")


@pytest.mark.parametrize(
    ("function", "inputs", "error", "sentence"),
    [
        (3, (Z,), TypeError, "expected a function of tensors, got int"),
        (torch.exp, (), TypeError, "to differentiate by, got no inputs"),
        (torch.exp, (Z.long(),), TypeError, "to differentiate by, got torch.int64"),
        (torch.exp, (Z[:0],), ValueError, "to differentiate by, got an empty tensor"),
        (torch.argmax, (Z,), TypeError, "floating-point tensor for output, got torch.int64"),
        (lambda z: 1.0, (Z,), TypeError, "floating-point tensor for output, got float"),
        (torch.detach, (Z,), ValueError, "depends differentiably on its inputs"),
        (lambda z: z * torch.rand(1), (Z,), ValueError, "gives the same each time, got two"),
        (torch.mm, (Z, Z), ValueError, "a function of these inputs, got RuntimeError: mat1"),
    ],
)
def test_bad_input_is_one_sentence(function, inputs, error, sentence):
    with pytest.raises(error, match=sentence):
        composability.check_composability(function, *inputs)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"examples": [True, True]}, r"examples for each of the 1 inputs, got \[True, True\]"),
        ({"examples": 3}, "examples for each of the 1 inputs, got 3"),
        ({"reference": 3}, "a reference of these inputs, got TypeError: 'int' object is not"),
        ({"reference": torch.sum}, "of the function's shape, .*, got ()"),
        ({"reference": torch.argmax}, "of the function's shape, .*, got torch.int64"),
    ],
)
def test_bad_options_are_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        composability.check_composability(torch.exp, Z, **options)
