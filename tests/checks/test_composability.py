import re
import sys

import pytest
import torch
from companions import COMPANIONS, NESTED
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nnce import functional
from nnce.checks import check_composability
from nnce.checks.composability import COLUMNS


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
    return check_composability(function, Z, examples=[True], **options)


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
    (Mutates.apply, "inputs untouched", "input 0 after the call: "),
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


@pytest.mark.parametrize(("function", "column", "detail"), WRONG)
def test_what_is_silently_wrong_is_said_with_where_and_by_how_much(function, column, detail):
    report = found(function, only=[column])
    assert report[column].verdict == "wrong" and not report and report.wrong == [column]
    assert report[column].detail.startswith(detail)
    assert re.search(r"expected at \(.*\), got |expected shape", report[column].detail)
    assert f"{column:<30}wrong      {detail}" in str(report)


@pytest.mark.parametrize(("function", "column", "reason"), FAILING)
def test_what_fails_is_said_with_pytorchs_reason(function, column, reason):
    report = found(function, only=[column])
    assert report[column].verdict == "fails" and reason in report[column].detail
    assert report.right  # nothing is silently wrong


@pytest.mark.parametrize("function", RIGHT)
def test_what_is_right_is_not_called_wrong(function):
    columns = [name for name in COLUMNS if "compile" not in name]
    assert set(found(function, only=columns).wrong) <= {NESTED}


def test_inputs_frozen_one_by_one():
    right = check_composability(Product.apply, Z, Z + 1, only=["frozen inputs"])
    wrong = check_composability(OnlyBoth.apply, Z, Z + 1, only=["frozen inputs"])
    assert right["frozen inputs"].verdict == "works"
    assert wrong["frozen inputs"].verdict == "wrong"
    assert wrong["frozen inputs"].detail.startswith("gradient of input 0 alone: ")


def test_a_reference_decides():
    wrong = check_composability(
        lambda z: z.sigmoid(), Z, reference=lambda z: z.sigmoid() * (1 + 1e-6), examples=[True]
    )
    assert wrong["func.grad"].verdict == "wrong"


def test_what_is_no_tensor_is_handed_on_and_examples_may_be_unknown():
    report = check_composability(lambda z, n: z**n, Z, 3)
    assert report["func.hessian"].verdict == "works"
    for name in ("leading dimensions", "compile, dynamic shapes"):
        assert report[name].verdict == "not tried"
        assert "which inputs have a row for each example" in report[name].detail


def test_private_parts_that_are_missing_are_not_tried(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._dynamo.testing", None)
    report = found(torch.sin, only=["compile, dynamic shapes"])
    assert report["compile, dynamic shapes"] == (
        "not tried",
        "this PyTorch has no torch._dynamo.testing",
    )


@pytest.mark.parametrize(
    ("function", "inputs", "error", "sentence"),
    [
        (3, (Z,), TypeError, "expected the function to be callable, got int"),
        (torch.exp, (), TypeError, "differentiate with respect to, got no inputs"),
        (torch.exp, (Z.long(),), TypeError, "with respect to, got torch.int64"),
        (torch.exp, (Z[:0],), ValueError, "with respect to, got empty tensors"),
        (torch.argmax, (Z,), TypeError, "return a floating-point tensor, got torch.int64"),
        (lambda z: 1.0, (Z,), TypeError, "return a floating-point tensor, got float"),
        (torch.detach, (Z,), ValueError, "in a way that autograd can follow"),
        (lambda z: z * torch.rand(1), (Z,), ValueError, "to be deterministic, got two"),
        (torch.mm, (Z, Z), ValueError, "the function failed in float64: RuntimeError: mat1"),
    ],
)
def test_bad_input_is_one_sentence(function, inputs, error, sentence):
    with pytest.raises(error, match=sentence):
        check_composability(function, *inputs)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"examples": [True, True]},
            ValueError,
            r"examples for each of the 1 inputs, got \[True, True\]",
        ),
        ({"examples": 3}, ValueError, "examples for each of the 1 inputs, got 3"),
        ({"reference": 3}, TypeError, "expected the reference to be callable, got int"),
        ({"reference": torch.sum}, ValueError, r"has the function's shape, .*, got \(\)"),
        ({"reference": torch.argmax}, TypeError, "the reference to return .*, got torch.int64"),
        ({"only": ["func.gard"]}, ValueError, r"only names of checks .*, got \['func.gard'\]"),
    ],
)
def test_bad_options_are_one_sentence(options, error, sentence):
    with pytest.raises(error, match=sentence):
        check_composability(torch.exp, Z, **options)


EAGER = [name for name in COLUMNS if "compile" not in name and name != "export"]


@pytest.mark.parametrize("companion", COMPANIONS, ids=lambda companion: companion.name)
def test_companions(companion):
    """Those that are silently wrong in one way are, and no others; what needs no compiler."""
    columns = [*EAGER, companion.wrong] if companion.wrong in COLUMNS else EAGER
    examples = [True for _ in companion.inputs]
    report = check_composability(
        companion.function, *companion.inputs, examples=examples, only=columns
    )
    silently = set(report.wrong) - {NESTED}
    assert companion.wrong in silently if companion.wrong else not silently, str(report)


@pytest.mark.exhaustive
@pytest.mark.parametrize("companion", COMPANIONS, ids=lambda companion: companion.name)
def test_companions_with_the_compiler(companion):
    examples = [True for _ in companion.inputs]
    report = check_composability(companion.function, *companion.inputs, examples=examples)
    silently = set(report.wrong) - {NESTED}
    assert bool(silently) == bool(companion.wrong), str(report)


def test_there_are_many_companions():
    assert len(COMPANIONS) == len({companion.name for companion in COMPANIONS}) >= 60


def test_the_callers_tensors_are_left_alone():
    z, labels = Z.double(), torch.tensor([1, 2, 3])
    before = z.clone(), labels.clone()

    def overwrites(z, labels):
        output = z * labels.double().unsqueeze(1)
        z.data.zero_()
        labels.zero_()
        return output

    report = check_composability(overwrites, z, labels, only=EAGER)
    assert torch.equal(z, before[0]) and torch.equal(labels, before[1])
    assert "inputs untouched" in report.wrong
    assert report["inputs untouched"].detail.startswith("input 0 after the call: ")


def test_a_function_that_says_that_it_works_in_place_may():
    (companion,) = (c for c in COMPANIONS if c.name == "in place, marked dirty")
    report = check_composability(companion.function, Z, only=EAGER)
    assert report["inputs untouched"].verdict == report["frozen inputs"].verdict == "works"


def test_the_report_begins_with_the_verdict():
    right = str(found(torch.sin, only=["func.grad", "func.vmap"])).splitlines()[0]
    assert right == "right: 2 work"
    some = str(found(OnceOnly.apply, only=["func.grad", "double backward"])).splitlines()[0]
    assert some == "right where it works: 1 work, 1 fail"
    wrong = str(found(NoTangent.apply, only=["func.jvp", "func.vmap"])).splitlines()[0]
    assert wrong == "wrong: func.jvp; 1 work"
