import math
import re

import numpy as np
import pytest
import torch
from conftest import slow_unless
from torch.autograd import Function, gradcheck, gradgradcheck
from zoo import LOW, ZOO, SinOnce, normal, rows

import nnce
from nnce.checks._derivatives import Derivatives
from nnce.checks._subject import Subject

# How many elements the functions of the zoo are tried with.
SOME_SIZES = (1, 6, 33)
SIZES = (1, 2, 3, 5, 7, 10, 16, 33, 64, 65)
SIZES += (100, 200, 300, 500, 800, 1000, 1500, 2000, 3000, 5000)
UNDECIDED = {
    "relu at its kink": "a kink",
    **{
        f"{dtype} both ways: layer norm": "second derivatives that change within a few units of x"
        for dtype in ("float16", "bfloat16")
    },
}
"""Right functions of which it cannot tell, and why."""
AT_SOME_POINTS = {
    **{
        f"{dtype} both ways: {of}": "a second derivative that rounding leaves uncertain by a tenth"
        for dtype in ("float16", "bfloat16")
        for of in ("softmax", "mean of tanh")
    },
    "bfloat16 both ways: product with a sum": "a second derivative, uncertain by a twelfth",
    "bfloat16 both ways: summed loss": "a first derivative that rounding leaves as uncertain",
    "bfloat16: next to float64": "an inflection where rounding hides that it is one",
    "float16: a mask alone": "a jump within 64 units of float16",
    "bfloat16: a mask alone": "a jump within 64 units of bfloat16",
}
"""Right functions of which it cannot tell at a few random points, and why."""


def verdict(report):
    return str(report).partition(":")[0]


def visit(animal, n, seed, elements=64, also=()):
    """The verdict on one of the zoo, as a whole."""
    inputs = animal.inputs(n, torch.Generator().manual_seed(seed))
    report = nnce.check_gradients(animal.function, *inputs, seed=seed, elements=elements)
    assert verdict(report) != ("wrong" if animal.right else "right"), f"{n}, seed {seed}\n{report}"
    if animal.right and report.first.probed == report.first.elements:
        known = animal.name in UNDECIDED or animal.name in also
        assert known or report.right, f"{n} elements, seed {seed}\n{report}"
    return verdict(report)


@pytest.mark.parametrize(
    "animal", [animal for animal in ZOO if animal not in LOW], ids=lambda animal: animal.name
)
def test_no_wrong_one_is_right_and_no_right_one_wrong(animal):
    for seed, n in enumerate(SOME_SIZES):
        visit(animal, n, seed, elements=6)  # of 33 elements some, where they depend on each other


@pytest.mark.parametrize(
    "animal",
    slow_unless(lambda animal: animal in LOW[::5], [(animal,) for animal in LOW]),
    ids=lambda animal: animal.name,
)
def test_no_wrong_one_in_low_precision_is_right_and_no_right_one_wrong(animal):
    visit(animal, 6, seed=0)


UNUSUAL = [
    ("bfloat16 both ways: softmax", 64, 8),  # some probabilities change by less than rounding
    ("float32: logsumexp", 800, 14),
    ("float16 both ways: mean of tanh", 500, 13),  # upstream gradients that underflow
    ("float32: what is saved", 800, 14),  # the derivative is almost 0 at one element
    ("float32: 1/x", 64, 8),  # close to the pole
    ("float32: a mask alone", 500, 13),  # close to a jump
    ("float16: next to float64", 800, 14),  # an inflection, at which the backward is 0
    ("bfloat16: next to float64", 2000, 17),
    ("clamp", 200, 11),  # crosses kinks where the precision is measured
    ("hard step", 2000, 17),
]


@pytest.mark.parametrize(
    "name, n, seed",
    slow_unless(lambda name, *_: not name.endswith(("softmax", "logsumexp")), UNUSUAL),
)
def test_right_functions_are_right_at_unusual_points(name, n, seed):
    animal = next(animal for animal in ZOO if animal.name == name)
    visit(animal, n, seed, elements=3 if "mean" in name else 64)


@pytest.mark.parametrize(
    "function, n, seed",
    [
        (lambda x: x.float().relu().sum().double(), 500, 2),
        (lambda x: x.float().relu().sum().double(), 1500, 0),
        (lambda x: x.float().abs().mean().double(), 3000, 1),
    ],
)
def test_a_smooth_curve_through_many_kinks_proves_nothing(function, n, seed):
    x = normal(n, torch.Generator().manual_seed(seed))
    assert verdict(nnce.check_gradients(function, x, seed=seed, elements=8)) == "cannot tell"


def test_changes_of_the_order_are_not_taken_for_low_precision():
    x = normal(1500, torch.Generator().manual_seed(16))
    assert Derivatives(Subject(lambda x: x.sort().values, [x], "sort")).dtype == torch.float64


@pytest.mark.parametrize("step", [0.03, 2.0**-13])
def test_a_kink_that_is_crossed_is_not_taken_for_low_precision(step):
    x = torch.tensor([1 - step / 2, 0.3, 5.0], dtype=torch.float64)
    assert Derivatives(Subject(lambda x: x.clamp(-1, 1), [x], "clamp")).dtype == torch.float64


def test_the_zoo_is_large():
    assert len(ZOO) == len({animal.name for animal in ZOO}) >= 120


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(len(SIZES)))
def test_the_whole_zoo_over_20_seeds(seed, capsys):
    """Each seed with a size of its own, and with 6 elements; prints of which it cannot tell."""
    faults = []
    for n in (SIZES[seed], 6):
        undecided = []
        for animal in ZOO:
            try:
                # Of more elements only some are probed one by one; 16 of them take less time.
                probed = 64 if n <= 65 else 16
                if visit(animal, n, seed, probed, also=AT_SOME_POINTS) == "cannot tell":
                    undecided.append(animal.name)
            except AssertionError as fault:
                faults.append(f"{animal.name}: {fault}")
        with capsys.disabled():
            print(
                f"\nseed {seed}, {n} elements: {len(ZOO)} visits, cannot tell:",
                *undecided,
                sep="\n  ",
            )
    assert not faults, "\n".join(faults)


class ZeroInSaturation(Function):
    """A sigmoid whose backward is 0 from |z| = 12 on."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.sigmoid()

    @staticmethod
    def backward(ctx, da):
        (z,) = ctx.saved_tensors
        return da * torch.where(z.abs() < 12, z.sigmoid() * (-z).sigmoid(), 0 * z)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_right_ones_are_right():
    z, y = column(-3.0, -0.5, 0.3, 1.0, 4.0), column(0.0, 1.0, 0.5, 0.2, 1.0)
    W, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    for function, inputs in (
        (nnce.sigmoid, (z,)),
        (nnce.sigmoid_cross_entropy, (z, y)),
        (nnce.sigmoid_quadratic, (z, y)),
        (lambda a, W, b: nnce.linear(a, W, b).sin(), (z, W, b)),
        (lambda z, y: nnce.sigmoid_cross_entropy(z, y, reduction="none"), (z, y)),
    ):
        report = nnce.check_gradients(function, *inputs)
        assert report.right, str(report)
        assert report.forward_mode.verdict == "right"


@pytest.mark.parametrize("z", [(12.0,), (-12.0, 14.0), (0.5, 13.0, -1.0)])
def test_zero_in_saturation_is_refused_where_gradcheck_lets_it_pass(z):
    leaf = column(*z).requires_grad_()
    assert gradcheck(ZeroInSaturation.apply, leaf)  # the blindness is real
    report = nnce.check_gradients(ZeroInSaturation.apply, leaf)
    assert report.first.verdict == "wrong" and not report.right


def test_a_derivative_that_is_0_is_right_where_the_values_show_it():
    """To 0 no relative error can be given; but at every step f(x + h) − f(x − h) is 0, too."""
    W = torch.randn(3, 5, dtype=torch.float64)
    for function, x in (
        (nnce.sigmoid, column(0.0)),  # σ''(0) = 0
        (lambda z: 2 * z, column(1.0, 2.0)),
        (lambda z: z**2, column(0.0)),
        (lambda z: nnce.linear(z, W), torch.randn(2, 5)),
        (lambda z: 0 * z + 3, column(1.0)),
    ):
        report = nnce.check_gradients(function, x)
        assert report.right, str(report)


def test_a_0_that_may_be_saturation_is_not_right():
    """The values of σ(300) and its computed derivative do not move either; but σ does, far off."""
    report = nnce.check_gradients(ZeroInSaturation.apply, column(300.0))
    assert report.first.verdict == "cannot tell"


def test_one_wrong_element_among_many():
    """Elements that do not depend on one another are probed all; of others it says how many."""
    generator = torch.Generator().manual_seed(0)
    z = 5 * torch.randn(2000, generator=generator, dtype=torch.float64)
    assert z.abs().max() > 12
    report = nnce.check_gradients(ZeroInSaturation.apply, z)
    assert report.first.verdict == "wrong"
    assert report.first.probed == report.first.elements == 2000

    def coupled(z):
        return z.softmax(-1)

    few = nnce.check_gradients(coupled, z[:100].clamp(-3, 3))
    assert few.first.verdict == "cannot tell" and not few.right
    assert (few.first.probed, few.first.elements) == (64, 100)
    assert "elements='all'" in few.first.detail and "; 64 of 100 elements probed" in str(few)
    every = nnce.check_gradients(coupled, z[:100].clamp(-3, 3), elements="all")
    assert every.first.verdict == "right" and every.first.probed == 100
    some = nnce.check_gradients(coupled, z[:20].clamp(-3, 3), elements=5)
    assert some.first.probed == 5 and some.first.verdict == "cannot tell"


class UpstreamHidden(Function):
    """sin z, whose backward hides from autograd that it depends on the upstream gradient."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.sin()

    @staticmethod
    def backward(ctx, dC):
        (z,) = ctx.saved_tensors
        return dC.detach() * z.cos()


def test_a_double_backward_wrong_by_the_upstream_gradient_is_seen():
    for reference in (None, torch.sin):
        report = nnce.check_gradients(UpstreamHidden.apply, column(1.0, 2.0), reference=reference)
        assert report.first.verdict == "right" and report.second.verdict == "wrong"


def test_a_second_derivative_that_is_refused_is_unsupported():
    for reference in (None, torch.sin):
        report = nnce.check_gradients(SinOnce.apply, column(1.0, 2.0), reference=reference)
        assert report.second.verdict == "unsupported" and "once_differentiable" in str(report)
        assert report.right


@pytest.mark.parametrize("reference", [None, torch.sin])
def test_a_jvp_that_fails_is_wrong_and_none_at_all_is_not(reference):
    def jvp(rule):
        class Sine(WrongJvp):
            pass

        Sine.jvp = staticmethod(rule)
        return Sine.apply

    def raises(ctx, dz):
        raise NotImplementedError("jvp, one day")

    for rule, words in (
        (raises, "the jvp of the function failed: NotImplementedError: jvp, one day"),
        (lambda ctx, dz: torch.zeros(7, dtype=torch.float64), "the jvp of the function failed"),
        (lambda ctx, dz: None, "the jvp of the function failed"),
    ):
        report = nnce.check_gradients(jvp(rule), column(1.0, 2.0), reference=reference)
        assert report.forward_mode.verdict == "wrong" and words in report.forward_mode.detail
        assert not report.right
    report = nnce.check_gradients(ZeroInSaturation.apply, column(1.0), reference=_exact_sigmoid)
    assert report.forward_mode.verdict == "unsupported" and report.right


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x: 1 / x, 0.003),
        (torch.tan, 1.57),
        (lambda x: torch.tanh(1000 * x), 0.001),
        (lambda x: torch.sin(100 * x), 0.3),
        (lambda x: torch.sin(512 * math.pi * x) + x**3, 0.5),
        (torch.log, 0.01),
    ],
    ids=["1/x", "tan", "tanh(1000x)", "sin(100x)", "sin(512 pi x)", "log"],
)
def test_curvature_at_any_scale(function, x):
    for seed in range(5):
        report = nnce.check_gradients(function, column(x, 1.001 * x), seed=seed)
        assert report.right, str(report)


class PeriodForgotten(Function):
    """x³ + sin(512πx), whose second term is 0 at every whole multiple of 2⁻⁹."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3 + torch.sin(512 * math.pi * x)

    @staticmethod
    def backward(ctx, upstream):
        (x,) = ctx.saved_tensors
        return upstream * 3 * x**2


def test_steps_are_no_powers_of_2():
    for seed in range(20):
        report = nnce.check_gradients(PeriodForgotten.apply, column(0.5, 1.0), seed=seed)
        assert report.first.verdict == "wrong"


def test_kinks():
    """Undecided at the kink, decided next to it."""
    report = nnce.check_gradients(torch.relu, column(1.0, 0.0))
    assert report.first.verdict == "cannot tell"
    assert "a kink at input 0, element (1): from below the derivative is 0, from above" in str(
        report
    )
    for seed in range(10):
        x = torch.randn(1000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        report = nnce.check_gradients(torch.relu, x, seed=seed)
        assert report.first.verdict == "right", str(report)
        assert "wrong" not in [finding.verdict for finding in report]


class NoNumber(Function):
    @staticmethod
    def forward(ctx, z, number):
        ctx.number = number
        ctx.save_for_backward(z)
        return z.exp()

    @staticmethod
    def backward(ctx, upstream):
        (z,) = ctx.saved_tensors
        return upstream * z.exp() * torch.tensor([1.0, ctx.number]), None


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_number_from_the_backward_alone_is_wrong(number):
    report = nnce.check_gradients(NoNumber.apply, column(1.0, 2.0), number)
    assert report.first.verdict == "wrong"
    # Of a function that is infinite itself, it cannot tell.
    report = nnce.check_gradients(torch.log, column(1.0, 0.0))
    assert report.first.verdict == "cannot tell"


def test_functions_that_work_in_place():
    report = nnce.check_gradients(lambda z: z.mul_(2).sigmoid_(), column(1.0, -2.0))
    assert report.right, str(report)


def test_a_reference_that_rounding_moves():
    """Where terms cancel, two right ways differ by more than rtol, and it says so."""

    def one_way(z):
        return (z[0] + z[1]) + z[2]

    def another(z):
        return (z[0] + z[2]) + z[1]

    report = nnce.check_gradients(one_way, column(1e9, 1e-3, -1e9), reference=another)
    assert report.value.verdict == "cannot tell" and "rounding" in report.value.detail
    assert report.first.verdict == "right"


@pytest.mark.parametrize("function", [ZeroInSaturation.apply, nnce.sigmoid])
def test_where_there_are_no_digits_it_cannot_tell(function):
    report = nnce.check_gradients(function, column(40.0, 45.0))
    assert report.first.verdict == "cannot tell" and not report.right
    mixed = nnce.check_gradients(function, column(0.5, 45.0))
    assert mixed.first.verdict == "cannot tell" and not mixed.right


@pytest.mark.parametrize("z", [5.0, 12.0, 40.0, 300.0, -700.0])
def test_a_reference_decides_at_any_z(z):
    right = nnce.check_gradients(nnce.sigmoid, column(z), reference=_exact_sigmoid)
    assert right.right, str(right)
    wrong = nnce.check_gradients(ZeroInSaturation.apply, column(z), reference=_exact_sigmoid)
    assert wrong.first.verdict == ("right" if abs(z) < 12 else "wrong")
    assert wrong.value.verdict == "right"


def _exact_sigmoid(z):
    """σ by exponentials of negative numbers alone: exact derivatives at any z."""
    e = torch.exp(-z.abs())
    return torch.where(z > 0, 1 / (1 + e), e / (1 + e))


class WrongSecond(Function):
    """z², whose backward autograd cannot see: the second derivative would be 0."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**2

    @staticmethod
    def backward(ctx, dC):
        (z,) = ctx.saved_tensors
        return dC * (2 * z).detach()


def test_a_wrong_second_derivative_is_seen():
    report = nnce.check_gradients(WrongSecond.apply, column(1.0, 2.0))
    assert report.first.verdict == "right"
    assert report.second.verdict == "wrong"
    assert report.forward_mode.verdict == "unsupported"
    against = nnce.check_gradients(WrongSecond.apply, column(1.0, 2.0), reference=lambda z: z**2)
    assert against.first.verdict == "right" and against.second.verdict == "wrong"


class WrongJvp(Function):
    @staticmethod
    def forward(z):
        return z.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, dC):
        (z,) = ctx.saved_tensors
        return dC * z.cos()

    @staticmethod
    def jvp(ctx, dz):
        (z,) = ctx.saved_tensors
        return -dz * z.cos()


def test_a_wrong_jvp_is_seen():
    for reference in (None, torch.sin):
        report = nnce.check_gradients(WrongJvp.apply, column(1.0, 2.0), reference=reference)
        assert report.first.verdict == report.second.verdict == "right"
        assert report.forward_mode.verdict == "wrong" and not report.right


def test_a_wrong_value_is_seen():
    report = nnce.check_gradients(lambda z: z.sin() + 1, column(1.0, 2.0), reference=torch.sin)
    assert report.value.verdict == "wrong" and report.first.verdict == "right"
    assert not report.right


class WrongNumber(Function):
    @staticmethod
    def forward(ctx, z, y):
        return z * y

    @staticmethod
    def backward(ctx, dC):
        return dC


def test_bad_functions_are_named():
    z = column(1.0, 2.0)
    with pytest.raises(ValueError, match=r"backward of the function failed.*number of gradients"):
        nnce.check_gradients(WrongNumber.apply, z, z)
    with pytest.raises(TypeError, match=r"with respect to, got torch.int64"):
        nnce.check_gradients(nnce.sigmoid, torch.tensor([1, 2]))
    with pytest.raises(TypeError, match=r"return a floating-point tensor, got torch.int64"):
        nnce.check_gradients(lambda z: z.long(), z)
    with pytest.raises(ValueError, match="got empty tensors"):
        nnce.check_gradients(nnce.sigmoid, column())
    with pytest.raises(TypeError, match=r"return a floating-point tensor, got tuple"):
        nnce.check_gradients(lambda z: (z, z), z)
    with pytest.raises(ValueError, match="in a way that autograd can follow"):
        nnce.check_gradients(lambda z: z.detach().sin(), z)
    with pytest.raises(ValueError, match=r"^the function failed in float64: RuntimeError: mat1"):
        nnce.check_gradients(torch.nn.Linear(2, 3), z)
    with pytest.raises(ValueError, match=r"to be deterministic, got two different"):
        nnce.check_gradients(lambda z: z * torch.rand_like(z), z)
    for elements in (0, -1, 2.0, True, "some"):
        with pytest.raises(ValueError, match=r"^expected elements 'all' or a number of at least 1"):
            nnce.check_gradients(torch.sin, z, elements=elements)
    for rtol in (0.0, 1.0, -1e-3, math.nan):
        with pytest.raises(ValueError, match=r"^expected rtol between 0 and 1, got"):
            nnce.check_gradients(torch.sin, z, rtol=rtol)


def test_other_inputs_are_handed_on():
    y = torch.tensor([0, 1])
    report = nnce.check_gradients(
        lambda z, y, reduction: nnce.sigmoid_cross_entropy(z, y.double(), reduction=reduction),
        column(1.0, -2.0),
        y,
        "sum",
    )
    assert report.right


def test_a_report_is_true_only_if_all_is_right():
    assert nnce.check_gradients(nnce.sigmoid, column(1.0))
    assert not nnce.check_gradients(ZeroInSaturation.apply, column(14.0))
    assert not nnce.check_gradients(nnce.sigmoid, column(45.0))  # it cannot tell


def test_the_report_is_readable():
    lines = str(nnce.check_gradients(nnce.sigmoid, column(40.0))).splitlines()
    assert lines[0] == (
        "cannot tell: first and second derivatives, forward mode; 1 of 1 elements probed"
    )
    assert lines[2].startswith("first        cannot tell saturation at input 0, element (0): ")
    assert lines[-1] == "Derivatives are of Σ u f, with a random upstream gradient u."
    x = torch.randn(4, 3, dtype=torch.float64)
    right = str(nnce.check_gradients(torch.tanh, x, reference=torch.tanh)).splitlines()[0]
    assert right == (
        "right: values, first and second derivatives, forward mode; 12 of 12 elements probed"
    )
    once = str(nnce.check_gradients(SinOnce.apply, x)).splitlines()[0]
    assert once == (
        "right: first derivatives; unsupported: second derivatives, forward mode; 12 of 12 "
        "elements probed"
    )


CONDITIONS = {
    "second backward: accumulates on ctx": "at the second backward over one graph",
    "two forwards: the last call's z": "after a second forward",
    "zeros: g g / g": "upstream gradient with zeros",
    "tiny: cut below 1e-7": "upstream gradient 1e-08 times as large",
    "large: clipped at 1000": "upstream gradient -1e+06 times as large",
    "ones: a shortcut that is off": "upstream gradient of ones",
    "upstream expanded along dimension 0": "upstream gradient expanded along dimension 0",
    "upstream expanded along dimension 1": "upstream gradient expanded along dimension 1",
    "upstream expanded along all": "upstream gradient expanded along all dimensions",
    "upstream at an offset": "upstream gradient offset",
    "upstream channels_last": "upstream gradient channels_last",
    "upstream strided": "upstream gradient strided",
    "input at an offset": "inputs offset",
    "input channels_last": "inputs channels_last",
    "input with stride 0": "inputs expanded along dimension 0",
    "input transposed": "inputs strided",
    "x y: wrong where both are the same tensor": "inputs 0 and 1 the same tensor",
    "value: 1e-3 more where a gradient is requested": "when a gradient is requested",
    "jvp: 0 where a tangent is None": "one input with a tangent at a time",
    "jvp clipped": "tangent -1e+06 times as large",
    "wrong where one input is frozen": "input 0 frozen",
    "gradient under create_graph differs": "under create_graph=True",
    "a gradient in shared memory": "after a second forward",
    "a tangent in shared memory": "after a second call",
    "cosines by address": "after a change of the inputs in place",
    "input padded": "inputs padded",
    "upstream padded": "upstream gradient padded",
    "second derivative: 0 if an input is frozen": "input 1 frozen",
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_failure_names_input_element_numbers_and_condition(name):
    (animal,) = (animal for animal in ZOO if animal.name == name)
    inputs = animal.inputs(6, torch.Generator().manual_seed(0))
    report = str(nnce.check_gradients(animal.function, *inputs))
    number = r"(-?[\d.]+(e[-+]\d+)?|nan)"
    condition = re.escape(CONDITIONS[name])
    place = r"(input \d|output), element \([\d, ]+\)"
    assert re.search(
        rf"{place}: {number}, expected {number} \({condition}\)$", report, re.MULTILINE
    )


def test_an_operation_without_a_second_derivative_is_judged_by_its_first():
    report = nnce.check_gradients(torch.nn.functional.hardsigmoid, column(0.5, -1.0))
    assert report.first.verdict == "right" and report.second.verdict == "unsupported"


def test_the_callers_tensors_are_left_alone():
    """A function that overwrites its input is passed copies, of labels too."""

    def overwrites(z, labels):
        output = z * labels.double().unsqueeze(1)
        z.data.zero_()
        labels.add_(1)
        return output

    z, labels = torch.randn(3, 2, dtype=torch.float64), torch.tensor([1, 2, 3])
    before = z.clone(), labels.clone()
    nnce.check_gradients(overwrites, z, labels)
    assert torch.equal(z, before[0]) and torch.equal(labels, before[1])


def test_only_inputs_that_require_a_gradient_are_differentiated():
    x, mask = torch.randn(3, 2, requires_grad=True), torch.ones(3, 2)

    def masked(mask, x):
        return x.sin() * mask.round()  # whose derivative with respect to the mask is 0

    assert nnce.check_gradients(masked, mask, x).first.elements == 6
    assert nnce.check_gradients(masked, mask, x.detach()).first.elements == 12


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ((torch.ones(0),), "^expected elements to differentiate with respect to, got empty"),
        ((torch.ones(3).to_sparse(),), "^expected dense inputs, got input 0 of layout"),
        ((1, torch.ones(3).to("meta")), "^expected inputs with data, got input 1 on the meta"),
    ],
)
def test_inputs_outside_of_the_domain(inputs, sentence):
    for check in (nnce.check_gradients, nnce.check_composability):
        with pytest.raises(ValueError, match=sentence):
            check(lambda *inputs: inputs[-1].sin(), *inputs)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients(context):
    sentence = rf"^expected gradients to be enabled, got a call under torch.{context.__name__}\(\)"
    for check in (nnce.check_gradients, nnce.check_composability):
        with context(), pytest.raises(ValueError, match=sentence):
            check(torch.sin, column(1.0))
        with pytest.raises(ValueError, match=r"to return elements, got shape \(0,\)"):
            check(lambda z: z[:0], column(1.0))
        with pytest.raises(ValueError, match="to return a dense tensor with data, got layout"):
            check(lambda z: (z * 2).to_sparse(), column(1.0))


@pytest.mark.parametrize("function", [torch.sum, torch.trace, lambda x: 2 * x, torch.sin])
def test_a_smooth_function_is_called_about_as_often_as_by_gradcheck(function):
    """Also one whose values do not depend on most elements, and one that is linear."""
    calls = 0

    def counted(x):
        nonlocal calls
        calls += 1
        return function(x)

    # Fixed: a sum that almost cancels, as of one x in 200, takes more calls.
    x = normal(12, torch.Generator().manual_seed(0)).view(4, 3).requires_grad_()
    assert gradcheck(counted, x) and gradgradcheck(counted, x)
    theirs, calls = calls, 0
    assert nnce.check_gradients(counted, x).right
    assert calls <= 2.5 * theirs


def test_digits_that_float32_leaves():
    """Of a function in float32 an error of 1e-3 is seen, and one of 1e-4 where nothing cancels."""
    x = column(-1.5, -0.3, 0.4, 1.0, 2.5)
    for factor, expected in ((1.0, "right"), (1 + 1e-4, "wrong"), (1 + 1e-3, "wrong")):

        class Exp(Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x.float().exp().double()

            @staticmethod
            def backward(ctx, upstream, factor=factor):
                (x,) = ctx.saved_tensors
                return factor * upstream * x.float().exp()

        report = nnce.check_gradients(Exp.apply, x)
        assert report.first.verdict == expected, str(report)


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float32, 1e-4), (torch.float16, 0.03), (torch.bfloat16, 0.03)]
)
@pytest.mark.parametrize("seed", range(4))
def test_a_low_precision_sigmoid_is_right_to_its_resolution(dtype, share, seed):
    """Forward and backward cast; an upstream gradient of 1e-8 underflows in float16."""
    x = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for factor in (1.0, 1 + share):

        class Sigmoid(Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x.to(dtype).sigmoid().double()

            @staticmethod
            def backward(ctx, upstream, factor=factor):
                a = ctx.saved_tensors[0].to(dtype).sigmoid()
                return factor * (upstream.to(dtype) * a * (1 - a)).double()

        report = nnce.check_gradients(Sigmoid.apply, x, seed=seed)
        if factor == 1:
            assert report.right, str(report)
            assert 0 < report.first.resolution < 16 * torch.finfo(dtype).eps + 2e-5
            assert "; in low precision, to " in str(report).splitlines()[0]
        else:
            assert report.first.verdict == "wrong", str(report)


def test_any_integer_and_any_number_will_do():
    report = nnce.check_gradients(
        torch.sin, column(1.0, 2.0), rtol=np.float32(1e-4), elements=np.int64(3), seed=np.int32(1)
    )
    assert report.right
    for options in ({"seed": 1.5}, {"seed": True}, {"elements": np.float64(3)}, {"rtol": True}):
        with pytest.raises(ValueError, match=r"^expected"):
            nnce.check_gradients(torch.sin, column(1.0), **options)


@torch.library.custom_op("nnce_tests::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def _square_backward(ctx, upstream):
    return 2 * ctx.saved_tensors[0] * upstream


square.register_autograd(
    _square_backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.parametrize("reference", [None, torch.square])
def test_an_operator_whose_tangent_pytorch_ignores(reference):
    report = nnce.check_gradients(square, column(1.0, -2.0), reference=reference)
    assert report.right and report.forward_mode.verdict == "unsupported"
    assert "PyTorch ignores the tangent of this operator" in report.forward_mode.detail
    assert "nnce_tests::square" in report.forward_mode.detail
    cell = nnce.check_composability(square, column(1.0, -2.0), only=["func.jvp"])["func.jvp"]
    assert cell.verdict == "fails" and "nnce_tests::square" in cell.detail


@pytest.mark.parametrize("z", [(40.0, 0.3), (20.0,), (300.0,), (-800.0,)])
def test_saturation_stays_undecided_with_any_backward(z):
    for f in (torch.sigmoid, torch.tanh, torch.exp):

        class Zero(Function):
            @staticmethod
            def forward(ctx, z, f=f):
                return f(z)

            @staticmethod
            def backward(ctx, upstream):
                return 0 * upstream

        assert not nnce.check_gradients(Zero.apply, column(*z)).right


def test_a_gradient_that_is_rounding_noise_is_not_taken_for_half_precision():
    """Under an upstream gradient of ones, that of a normalization has but a few bits."""
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for function in (lambda x: torch.nn.functional.layer_norm(x, (3,)), lambda x: x.softmax(-1)):
        subject = Subject(function, (x,), "the function")
        assert Derivatives(subject).dtype == torch.float64


class _Overwrites(torch.autograd.Function):
    """A right gradient, written into the upstream gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g.mul_(ctx.saved_tensors[0].cos())


@pytest.mark.parametrize("reference", [None, torch.sin])
def test_a_backward_that_overwrites_its_upstream_gradient_is_told_so(reference):
    x = torch.tensor([[0.3, -1.0], [2.0, 0.7]])
    report = nnce.check_gradients(_Overwrites.apply, x, reference=reference)
    assert report.first.verdict == "wrong"
    assert report.first.detail.startswith("the backward overwrites its upstream gradient")
    # It matters where another part of the graph has the same upstream gradient.
    x.requires_grad_()
    shared = _Overwrites.apply(x) + x
    shared.backward(torch.ones(2, 2))
    assert not torch.allclose(x.grad, x.detach().cos() + 1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_in_float8_there_is_nothing_to_compare(dtype):
    x = normal(6, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="expected a function in float16 or more precise, got"):
        nnce.check_gradients(lambda x: x.sin() + x.to(dtype).double(), x)


def test_a_module_with_parameters_is_checked_without_a_warning():
    x = rows(15, torch.Generator().manual_seed(0))
    assert nnce.check_gradients(torch.nn.BatchNorm1d(3).double(), x)


def test_a_function_that_fails_without_a_graph_is_said_to():
    def hooked(x):
        y = 2 * x
        y.register_hook(lambda gradient: gradient)
        return y

    with pytest.raises(ValueError, match=r"failed under torch\.no_grad\(\): RuntimeError"):
        nnce.check_gradients(hooked, torch.ones(3))


def test_where_rounding_hides_a_derivative_the_error_is_relative_to_the_largest():
    x = normal(12, torch.Generator().manual_seed(0))
    report = nnce.check_gradients(lambda x: (10 * x.float()).logsumexp(0).double(), x)
    assert report.first.verdict == "right" and report.first.error < 1e-3
