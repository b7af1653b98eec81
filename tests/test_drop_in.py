"""`nnce.BCEWithLogitsLoss` takes the place of PyTorch's, whose results are the oracle."""

import copy
import inspect
import itertools
import warnings

import pytest
import torch
from torch.nn import functional as F

import nnce
from nnce import functional

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = [(6,), (4, 6), (2, 3, 6), ()]
REDUCTIONS = ("none", "sum", "mean")
ours = functional.binary_cross_entropy_with_logits
theirs = F.binary_cross_entropy_with_logits


@pytest.fixture(params=["fused", "composed"], autouse=True)
def way(request, monkeypatch):
    if request.param == "composed":
        monkeypatch.setattr(functional, "is_plain", lambda *_, **__: False)
    return request.param


def _uniform(*shape, seed=0, dtype=torch.float64):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype)


def _example(shape, z_dtype, y_dtype):
    z = (6 * _uniform(*shape, seed=1) - 3).to(z_dtype).requires_grad_()
    return z, _uniform(*shape, seed=2).to(y_dtype)


def _weights(shape, dtype):
    """All shapes of weights that PyTorch accepts, negative numbers included."""
    kinds = {(), shape, *(shape[i:] for i in range(len(shape)))}
    kinds |= {(1,) * len(shape), (*shape[:-1], 1) if shape else ()}
    for kind in sorted(kinds):
        values = 4 * _uniform(*kind, seed=3) - 1
        yield values.to(dtype) if dtype.is_floating_point else values.round().to(dtype)


def _same(found, z, wanted, oracle_z, z_dtype, y_dtype):
    """Value and gradient are those of the oracle, in float64, within the rounding of the dtypes."""
    coarse = max(torch.finfo(z_dtype).eps, torch.finfo(y_dtype).eps)
    assert found.dtype == y_dtype and found.shape == wanted.shape
    upstream = (_uniform(*found.shape, seed=4) - 0.3).to(y_dtype)
    (dz,) = torch.autograd.grad(found, z, upstream)
    (oracle_dz,) = torch.autograd.grad(wanted, oracle_z, upstream.double())
    assert dz.dtype == z_dtype
    options = {"rtol": 4 * coarse, "atol": 4 * coarse, "check_dtype": False}
    torch.testing.assert_close(found.double(), wanted, **options)
    torch.testing.assert_close(dz.double(), oracle_dz, **options)


def test_the_signature_is_pytorchs():
    for mine, built_in in (
        (ours, theirs),
        (nnce.BCEWithLogitsLoss.__init__, torch.nn.BCEWithLogitsLoss.__init__),
        (nnce.BCEWithLogitsLoss.forward, torch.nn.BCEWithLogitsLoss.forward),
    ):
        wanted = list(inspect.signature(built_in).parameters.values())
        found = list(inspect.signature(mine).parameters.values())
        assert [(p.name, p.default, p.kind) for p in found[: len(wanted)]] == [
            (p.name, p.default, p.kind) for p in wanted
        ]
        assert all(p.kind is p.KEYWORD_ONLY for p in found[len(wanted) :])
    assert issubclass(nnce.BCEWithLogitsLoss, torch.nn.BCEWithLogitsLoss)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("z_dtype", "y_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_value_gradient_and_dtype(shape, z_dtype, y_dtype):
    z, y = _example(shape, z_dtype, y_dtype)
    assert theirs(z, y).dtype == y_dtype  # the built-in's own rule
    for reduction in REDUCTIONS:
        oracle_z = z.detach().double().requires_grad_()
        wanted = theirs(oracle_z, y.double(), reduction=reduction)
        _same(ours(z, y, reduction=reduction), z, wanted, oracle_z, z_dtype, y_dtype)


@pytest.mark.parametrize("which", [("weight",), ("pos_weight",), ("weight", "pos_weight")])
@pytest.mark.parametrize("w_dtype", [*DTYPES, torch.int64])
@pytest.mark.parametrize(
    ("z_dtype", "y_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float32, torch.float16),
    ],
)
def test_weights(which, w_dtype, z_dtype, y_dtype):
    for shape in SHAPES[:3]:
        for weight, reduction in itertools.product(_weights(shape, w_dtype), REDUCTIONS):
            z, y = _example(shape, z_dtype, y_dtype)
            oracle_z = z.detach().double().requires_grad_()
            weights, wide = dict.fromkeys(which, weight), dict.fromkeys(which, weight.double())
            assert theirs(z, y, **weights).dtype == y_dtype
            wanted = theirs(oracle_z, y.double(), **wide, reduction=reduction)
            found = ours(z, y, **weights, reduction=reduction)
            _same(found, z, wanted, oracle_z, z_dtype, y_dtype)


@pytest.mark.parametrize("which", ["target", "weight", "pos_weight"])
def test_gradients_with_respect_to_targets_and_weights(which):
    """PyTorch's has none with respect to weights; the formula has."""

    def formula(z, target, weight, pos_weight):
        C = pos_weight * target * F.softplus(-z) + (1 - target) * F.softplus(z)
        return (weight * C).mean()

    for z_dtype, other in itertools.product((torch.float32, torch.float64), repeat=2):
        z, y = _example((4, 6), z_dtype, other)
        tensors = {"target": y, "weight": _uniform(6).to(other), "pos_weight": _uniform(6, seed=5)}
        tensors[which].requires_grad_()
        found = torch.autograd.grad(ours(z, **tensors), (z, tensors[which]))
        wanted = torch.autograd.grad(formula(z, **tensors), (z, tensors[which]))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("positional", list(itertools.product([None, True, False], repeat=2)))
def test_size_average_and_reduce(positional):
    z, y = _example((4, 6), torch.float32, torch.float32)
    makers = [
        (ours, theirs),
        *[
            (lambda z, y, weight, *flags, C=C: C(weight, *flags)(z, y))
            for C in (nnce.BCEWithLogitsLoss, torch.nn.BCEWithLogitsLoss)
        ],
    ]
    for mine, built_in in (makers[0], makers[1:]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = mine(z, y, None, *positional)
            number = len(caught)
            wanted = built_in(z, y, None, *positional)
        torch.testing.assert_close(found, wanted)
        first, second = caught[:number], caught[number:]
        assert [str(w.message) for w in first] == [str(w.message) for w in second]
        assert [w.category for w in first] == [w.category for w in second]
        assert positional == (None, None) or len(first) == 1
        assert all(w.filename == __file__ for w in first) or mine is not ours


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_integers_and_booleans_are_targets_too(dtype):
    z, y = _example((4, 6), torch.float32, torch.float64)
    y = y.round().to(dtype)
    oracle_z = z.detach().double().requires_grad_()
    wanted = theirs(oracle_z, y.double())
    _same(ours(z, y), z, wanted, oracle_z, torch.float32, torch.float32)


@pytest.mark.parametrize("y_dtype", [torch.float32, torch.float64, torch.float16])
def test_smoothing_and_ignored_targets(y_dtype):
    z, y = _example((4, 6), torch.float32, y_dtype)
    counts = _uniform(4, 6, seed=7) < 0.7
    y = torch.where(counts, y, torch.tensor(-100, dtype=y_dtype))
    for reduction in ("sum", "mean"):
        oracle_z = z.detach().double().requires_grad_()
        smooth = y.double()[counts] * 0.9 + 0.05
        wanted = theirs(oracle_z[counts], smooth, reduction=reduction)
        found = ours(z, y, reduction=reduction, label_smoothing=0.1, ignore_index=-100)
        _same(found, z, wanted, oracle_z, torch.float32, y_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_better_where_the_built_in_is_nan_or_infinite(dtype):
    z, y = torch.tensor([torch.inf, -torch.inf], dtype=dtype), torch.tensor([1.0, 0.0], dtype=dtype)
    assert theirs(z, y).isnan()
    leaf = z.requires_grad_()
    C = ours(leaf, y)
    assert C == 0 and torch.equal(torch.autograd.grad(C, leaf)[0], torch.zeros_like(z))


def test_a_mean_whose_sum_is_beyond_float16():
    z = torch.full((4000,), 40.0, dtype=torch.float16, requires_grad=True)
    y = torch.zeros_like(z)
    assert ours(z, y) == 40 and ours(z, y, reduction="sum").isinf()
    assert ours(z, y.float(), reduction="sum") == 160_000


def test_digits_of_half_logits_are_kept_until_the_end():
    """Computed in float32 at least: correctly rounded but for a few in a thousand."""
    z = (8 * _uniform(1000, seed=8) - 4).half()
    y = _uniform(1000, seed=9).round().half()
    exact = theirs(z.double(), y.double(), reduction="none").half()
    wrong = (ours(z, y, reduction="none") != exact).float().mean()
    assert wrong < 0.01 < (theirs(z, y, reduction="none") != exact).float().mean()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives(reduction):
    z, y = _example((4, 6), torch.float64, torch.float64)
    w = _uniform(6, seed=6)

    def second(function):
        C = function(z, y, w, pos_weight=w, reduction=reduction)
        (dz,) = torch.autograd.grad(C, z, torch.ones_like(C), create_graph=True)
        return torch.autograd.grad(dz.square().sum(), z)[0]

    torch.testing.assert_close(second(ours), second(theirs))


def test_second_derivatives_of_mixed_dtypes():
    z, y = _example((4, 6), torch.bfloat16, torch.bfloat16)
    w = _uniform(6, seed=6, dtype=torch.float32)
    (dz,) = torch.autograd.grad(ours(z, y, w, pos_weight=w), z, create_graph=True)
    (found,) = torch.autograd.grad(dz.sum(), z)
    wide = z.detach().double().requires_grad_()
    C = theirs(wide, y.double(), w.double(), pos_weight=w.double())
    (dz,) = torch.autograd.grad(C, wide, create_graph=True)
    (wanted,) = torch.autograd.grad(dz.sum(), wide)
    torch.testing.assert_close(found.double(), wanted, rtol=2**-6, atol=2**-12)


def test_state_and_copies():
    weights = {"weight": torch.rand(6), "pos_weight": torch.rand(6)}
    built_in = torch.nn.BCEWithLogitsLoss(**weights)
    module = nnce.BCEWithLogitsLoss(weight=torch.zeros(6), pos_weight=torch.zeros(6))
    module.load_state_dict(built_in.state_dict())
    assert list(module.state_dict()) == list(built_in.state_dict())
    z, y = _example((4, 6), torch.float32, torch.float32)
    for loss in (module, copy.deepcopy(module)):
        torch.testing.assert_close(loss(z, y), built_in(z, y))
    assert nnce.BCEWithLogitsLoss().state_dict() == {}
    module.to(torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    shown = nnce.BCEWithLogitsLoss(label_smoothing=0.1, ignore_index=-1)
    assert repr(shown) == (
        "BCEWithLogitsLoss(reduction='mean', label_smoothing=0.1, ignore_index=-1)"
    )


def test_a_float32_module_under_bfloat16_logits():
    w = torch.rand(6)
    z, y = _example((4, 6), torch.bfloat16, torch.bfloat16)
    C = nnce.BCEWithLogitsLoss(w, pos_weight=w)(z, y)
    oracle_z = z.detach().double().requires_grad_()
    wanted = theirs(oracle_z, y.double(), w.double(), pos_weight=w.double())
    _same(C, z, wanted, oracle_z, torch.bfloat16, torch.bfloat16)


def test_autocast_computes_in_float32():
    z, y = _example((4, 6), torch.bfloat16, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = ours(z, y), theirs(z, y)
    assert found.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(found, wanted)


def test_bad_arguments():
    z, y = torch.zeros(4, 6), torch.zeros(4, 6)
    for call, error, sentence in (
        (lambda: ours(z, y[0]), ValueError, r"expected target of shape \(4, 6\) like input"),
        (lambda: ours(z, [0.0]), TypeError, "expected target to be a tensor, got list"),
        (lambda: ours([0.0], y), TypeError, "expected input to be a tensor, got list"),
        (lambda: ours(z.long(), y), TypeError, "expected input of a floating-point dtype"),
        (lambda: ours(z, y + 0j), TypeError, "expected target of a real dtype"),
        (lambda: ours(z, y, 2.0), TypeError, "expected weight to be a tensor, got float"),
        (lambda: ours(z, y, torch.ones(5)), ValueError, "expected weight of a shape that"),
        (lambda: ours(z, y, pos_weight=torch.ones(2, 4, 6)), ValueError, "expected pos_weight of"),
        (lambda: ours(z, y.to("meta")), ValueError, "expected target on device cpu"),
        (lambda: ours(z, y.to_sparse()), TypeError, "expected target to be dense"),
        (lambda: ours(z, y, reduction="batchmean"), ValueError, "expected reduction"),
        (lambda: ours(z, y, reduction="median"), ValueError, "expected reduction"),
        (lambda: ours(z, y, label_smoothing=1), ValueError, "expected label_smoothing in"),
        (lambda: ours(z, y, label_smoothing="a"), TypeError, "expected label_smoothing to be"),
        (lambda: ours(z, y, ignore_index=1), ValueError, "expected ignore_index other than"),
        (lambda: ours(z, y, ignore_index=0.5), TypeError, "expected ignore_index to be"),
        (lambda: nnce.BCEWithLogitsLoss(ignore_index=0), ValueError, "expected ignore_index"),
        (lambda: nnce.BCEWithLogitsLoss(label_smoothing=2), ValueError, "expected label_smoo"),
    ):
        with pytest.raises(error, match=f"^{sentence}"):
            call()


def test_the_built_in_refuses_other_reductions_too():
    z = torch.zeros(2)
    with pytest.raises(ValueError, match="batchmean"):
        theirs(z, z, reduction="batchmean")


def test_compile_and_torch_func(way):
    z, y = _example((4, 6), torch.float32, torch.float64)
    w = _uniform(6, seed=6, dtype=torch.float32)

    def mean(z):
        return ours(z, y, w, pos_weight=w, label_smoothing=0.1)

    compiled = torch.compile(mean, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(z), mean(z))
    (wanted,) = torch.autograd.grad(mean(z), z)
    torch.testing.assert_close(torch.autograd.grad(compiled(z), z)[0], wanted)
    torch.testing.assert_close(torch.func.grad(mean)(z.detach()), wanted)


def test_a_target_that_is_not_a_tensor_is_a_type_error():
    with pytest.raises(TypeError, match="expected target to be a tensor, got NoneType"):
        nnce.BCEWithLogitsLoss()(torch.zeros(3), None)
