"""A linear layer and its loss, label block by label block, against the whole tensor of logits."""

import itertools
import sys

import pytest
import torch
from conftest import slow_unless
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import nnce
from nnce import (
    LinearSigmoidCrossEntropyLoss,
    Positives,
    linear_sigmoid_cross_entropy,
    sampled_sigmoid_cross_entropy,
)
from nnce.experiments.proof.table import REFUSED

REDUCTIONS = ("batchmean", "mean", "sum", "none")


@pytest.fixture(autouse=True)
def walk(monkeypatch):
    """The walk for few labels, too; `test_at_once.py` has the other way."""
    monkeypatch.setattr("nnce.labels.function.SMALL", -1)


def eager(
    x, W, y, b=None, weight=None, example_weight=None, pos_weight=None, s=0.0, reduction="batchmean"
):
    """With PyTorch's own functions, all logits at once."""
    z = torch.nn.functional.linear(x, W, b)
    C = torch.nn.functional.binary_cross_entropy_with_logits(
        z, y * (1 - s) + s / 2, weight=weight, pos_weight=pos_weight, reduction="none"
    ).sum(1)
    if example_weight is not None:
        C = C * example_weight
    if reduction == "none":
        return C
    return C.sum() / {"batchmean": len(x), "mean": len(x) * len(W), "sum": 1}[reduction]


class Problem:
    """Inputs, and targets in every form, that say the same: all but the soft ones."""

    def __init__(self, n=7, features=5, labels=33, k=3, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=dtype)

        self.x, self.W, self.b = (
            t.requires_grad_() for t in (draw(n, features), draw(labels, features), draw(labels))
        )
        index = torch.randint(-1, labels, (n, k), generator=generator)
        index[0, 1:] = index[0, :1]  # one that stands more than once
        y = torch.zeros(n, labels + 1, dtype=dtype).scatter(1, index % (labels + 1), 1)[:, :-1]
        soft = y * torch.rand(n, labels, generator=generator, dtype=dtype)
        rows, columns = soft.nonzero().T
        self.targets = {
            "index": (index, y),
            "int32": (index.int(), y),
            "Positives": (Positives.from_coo(*y.nonzero().T, n), y),
            "soft": (Positives.from_coo(rows, columns, n, soft[rows, columns]), soft),
            "CSR": (y.to_sparse_csr(), y),
            "COO": (soft.to_sparse_coo(), soft),
            "hybrid COO": (soft.to_sparse(1), soft),
            "dense": (y, y),
            "dense soft": (soft, soft),
            "boolean": (y.bool(), y),
        }
        self.weight, self.pos_weight = draw(labels).abs(), draw(labels).abs() * 3
        self.example_weight = draw(n).abs()
        self.inputs = (self.x, self.W, self.b)


def hold(ours, theirs, inputs, tolerance=1e-12):
    """Value and gradients under an uneven upstream gradient, twice over one graph."""
    upstream = torch.linspace(-1, 2, ours.numel(), dtype=ours.dtype).view_as(ours)
    expected = torch.autograd.grad(theirs, inputs, upstream)
    for _ in range(2):
        got = torch.autograd.grad(ours, inputs, upstream, retain_graph=True)
        for a, b in zip((ours, *got), (theirs, *expected), strict=True):
            assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize(
    ("kind", "reduction"),
    slow_unless(  # test_any_shape draws from all
        lambda kind, reduction: kind == "index" or (kind, reduction) == ("dense soft", "mean"),
        itertools.product(Problem().targets, REDUCTIONS),
    ),
)
def test_value_and_gradients(kind, reduction):
    """Every combination of targets, weights, smoothing, bias, reduction and block."""
    problem = Problem()
    target, y = problem.targets[kind]
    x, W, b = problem.inputs
    for given_, s, block in itertools.product(
        itertools.product((False, True), repeat=4), (0, 0.2), (None, 1, 7)
    ):
        bias, *weights = (
            t if wanted else None
            for t, wanted in zip(
                (b, problem.weight, problem.example_weight, problem.pos_weight), given_, strict=True
            )
        )
        options = dict(zip(("weight", "example_weight", "pos_weight"), weights, strict=True))
        ours = linear_sigmoid_cross_entropy(
            x, W, target, linear_bias=bias, label_smoothing=s, reduction=reduction, block=block,
            **options,
        )  # fmt: skip
        theirs = eager(x, W, y, bias, s=s, reduction=reduction, **options)
        hold(ours, theirs, [t for t in (x, W, bias) if t is not None])


@pytest.mark.parametrize("kind", ["index", "soft", "dense soft"])
def test_examples_in_blocks_too(kind):
    problem = Problem(n=2_500)
    target, y = problem.targets[kind]
    for block, reduction in itertools.product((None, 7), ("batchmean", "none")):
        ours = linear_sigmoid_cross_entropy(
            *problem.inputs[:2], target, linear_bias=problem.b, label_smoothing=0.1,
            example_weight=problem.example_weight, block=block, reduction=reduction,
        )  # fmt: skip
        theirs = eager(
            *problem.inputs[:2], y, problem.b, s=0.1, reduction=reduction,
            example_weight=problem.example_weight,
        )  # fmt: skip
        hold(ours, theirs, problem.inputs)


@settings(max_examples=200)
@given(
    n=st.integers(1, 6), features=st.integers(1, 4), labels=st.integers(4, 40), k=st.integers(1, 3),
    block=st.integers(1, 50), s=st.sampled_from([0, 0.05, 0.5]), seed=st.integers(0, 2**31),
    kind=st.sampled_from(list(Problem().targets)), reduction=st.sampled_from(REDUCTIONS),
)  # fmt: skip
def test_any_shape(n, features, labels, k, block, s, seed, kind, reduction):
    problem = Problem(n, features, labels, k, seed=seed)
    target, y = problem.targets[kind]
    options = {"label_smoothing": s, "reduction": reduction, "block": block}
    ours = linear_sigmoid_cross_entropy(problem.x, problem.W, target, **options)
    hold(ours, eager(problem.x, problem.W, y, s=s, reduction=reduction), [problem.x, problem.W])


def test_float32_is_as_near_to_float64_as_eager():
    for seed in range(5):
        exact, problem = (
            Problem(512, 64, 3_000, dtype=dtype, seed=seed)
            for dtype in (torch.float64, torch.float32)
        )
        with torch.no_grad():
            for rounded, whole in zip(problem.inputs, exact.inputs, strict=True):
                rounded.copy_(whole.div_(8))
                whole.copy_(rounded)
        index, y = exact.targets["index"]
        true = torch.autograd.grad(eager(*exact.inputs[:2], y, exact.b), exact.inputs)
        eager_C = eager(*problem.inputs[:2], y.float(), problem.b)
        ours_C = linear_sigmoid_cross_entropy(*problem.inputs[:2], index, linear_bias=problem.b)
        ours, theirs = (torch.autograd.grad(C, problem.inputs) for C in (ours_C, eager_C))
        for a, b, t in zip(ours, theirs, true, strict=True):
            assert (a - t).norm() <= 1.1 * (b - t).norm()
        assert abs(ours_C - eager(*exact.inputs[:2], y, exact.b)) <= 1e-6 * ours_C


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("z", [20.0, 40.0, 80.0])
def test_dz_is_exact_where_the_neuron_is_nearly_right(z, sign):
    """dC/dz of a positive is −σ(−z), of a negative σ(z), where a − y rounds to 0."""
    W, x = torch.zeros(2, 1), torch.zeros(1, 1)
    b = torch.tensor([sign * z, -sign * z], requires_grad=True)
    target = torch.tensor([0 if sign > 0 else 1])
    C = linear_sigmoid_cross_entropy(x, W, target, linear_bias=b)
    C.backward()
    small = torch.tensor(-z, dtype=torch.float64).sigmoid()
    torch.testing.assert_close(
        b.grad.double(), small * torch.tensor([-sign, sign]), rtol=3e-7, atol=0
    )
    torch.testing.assert_close(
        C.double(), 2 * torch.tensor(-z).double().exp().log1p(), rtol=3e-7, atol=0
    )


def test_infinite_logits_that_are_right_cost_nothing():
    b = torch.tensor([torch.inf, -torch.inf, 1.0], requires_grad=True)
    for target in (torch.tensor([0]), torch.tensor([[True, False, False]])):
        C = linear_sigmoid_cross_entropy(
            torch.zeros(1, 1), torch.zeros(3, 1), target, linear_bias=b
        )
        (gradient,) = torch.autograd.grad(C, b)
        torch.testing.assert_close(C, torch.tensor(1.0).exp().log1p())
        torch.testing.assert_close(
            gradient, torch.tensor([0, 0, 1.0]).where(b != 1, torch.tensor(1.0).sigmoid())
        )


def test_a_tiny_loss_keeps_its_digits():
    """With smoothing and pos_weight 0 all that is left is what z costs as a negative."""
    b = torch.full((3,), -90.0, dtype=torch.float64)
    for s in (0, 0.1):
        C = linear_sigmoid_cross_entropy(
            torch.zeros(1, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64),
            torch.tensor([1]), linear_bias=b, pos_weight=torch.zeros(3), label_smoothing=s,
        )  # fmt: skip
        torch.testing.assert_close(C, b.exp()[0] * (2 + s / 2 - s), rtol=1e-12, atol=0)


def test_no_examples_and_no_positives():
    W = torch.randn(4, 3, requires_grad=True)
    for target in (torch.zeros(0, 2, dtype=torch.int64), Positives.from_lists([])):
        C = linear_sigmoid_cross_entropy(torch.zeros(0, 3), W, target, reduction="sum")
        assert C == 0
        assert torch.equal(torch.autograd.grad(C, W)[0], torch.zeros(4, 3))
        assert linear_sigmoid_cross_entropy(torch.zeros(0, 3), W, target).isnan()
    x, none = torch.randn(5, 3), torch.full((5, 2), -1)
    C = linear_sigmoid_cross_entropy(x, W, none)
    torch.testing.assert_close(C, eager(x, W, torch.zeros(5, 4)))


# ------------------------------------------------------------------------------------- the work


class Products(TorchDispatchMode):
    """Counts multiplications of matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mv"):
            a, b = [t for t in args if isinstance(t, torch.Tensor) and t.dim() == 2][-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


def products(compute):
    """In n × features × labels."""
    with Products() as counter:
        compute()
    return counter.count / (7 * 5 * 33)


@pytest.mark.parametrize("block", [None, 7])
def test_three_products_and_four_where_the_walk_is_made_anew(block):
    problem = Problem()
    index, _ = problem.targets["index"]

    def loss(**options):
        return linear_sigmoid_cross_entropy(problem.x, problem.W, index, block=block, **options)

    assert products(lambda: loss().backward()) == 3
    assert products(lambda: loss(reduction="none").sum().backward()) == 4
    C = loss()
    assert products(lambda: C.backward(retain_graph=True)) == 0
    assert products(lambda: C.backward()) == 3
    assert products(lambda: loss(reduction="none")) == 1
    with torch.no_grad():
        assert products(loss) == 1


def test_no_work_for_what_nobody_asked_for():
    problem = Problem()
    index, y = problem.targets["index"]
    for frozen in itertools.product((False, True), repeat=3):
        inputs = [
            t.detach().requires_grad_(not f) for t, f in zip(problem.inputs, frozen, strict=True)
        ]
        x, W, b = inputs

        def loss(x=x, W=W, b=b):
            return linear_sigmoid_cross_entropy(x, W, index, linear_bias=b)

        wanted = [t for t in inputs if t.requires_grad]
        if not wanted:
            assert not loss().requires_grad
            continue
        assert products(lambda: loss().backward()) == 1 + x.requires_grad + W.requires_grad
        for t in inputs:
            t.grad = None
        hold(loss(), eager(x, W, y, b), wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("what", "sizes", "MB"),
    [
        # 2 % of what eager PyTorch takes, 1,600 MB at least.
        pytest.param("labels", (1024, 128, 131_072), 32, marks=pytest.mark.slow),
        pytest.param("focal", (1024, 128, 131_072), 32, marks=pytest.mark.slow),
        # The gradient of W, made twice, would be 67 MB more.
        pytest.param("checkpointed", (1024, 128, 131_072), 32, marks=pytest.mark.slow),
        # Eager PyTorch takes over 4 GB.
        pytest.param("labels", (512, 256, 1_000_000), 100, marks=pytest.mark.exhaustive),
    ],
)
def test_memory_is_flat(what, sizes, MB, peak_memory):
    """The peak beyond inputs, parameters and gradients, of a forward and a backward."""
    assert peak_memory(what, *sizes) < MB


# -------------------------------------------------------------------- together with all of PyTorch


def test_second_derivatives_are_refused():
    problem = Problem()
    C = linear_sigmoid_cross_entropy(problem.x, problem.W, problem.targets["index"][0])
    (gradient,) = torch.autograd.grad(C, problem.x, create_graph=True)
    for other in (problem.x, problem.W):
        with pytest.raises(RuntimeError, match="block by block has no second derivatives"):
            torch.autograd.grad(gradient.sum(), other, retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.func.grad(
            lambda x: torch.func.grad(
                lambda x: linear_sigmoid_cross_entropy(x, problem.W, problem.targets["index"][0])
            )(x).sum()
        )(problem.x)


def test_gradients_accumulate_and_are_no_one_elses():
    problem = Problem()
    target, y = problem.targets["CSR"]
    for _ in range(3):
        linear_sigmoid_cross_entropy(problem.x, problem.W, target).backward()
    (expected,) = torch.autograd.grad(eager(problem.x, problem.W, y), problem.W)
    torch.testing.assert_close(problem.W.grad, 3 * expected)


def test_a_loss_among_others():
    """More follows its value, the upstream gradient is not 1, and x is the output of a layer."""
    problem = Problem()
    target, y = problem.targets["index"]
    (x, W, b), layer = problem.inputs, torch.nn.Linear(5, 5, dtype=torch.float64)
    both = []
    for loss in (
        lambda z: linear_sigmoid_cross_entropy(z, W, target, linear_bias=b),
        lambda z: eager(z, W, y, b),
    ):
        C = loss(layer(x).tanh())
        total = C.square() + 3 * C.sin() + W.square().sum()
        both.append(torch.autograd.grad(total, (x, W, b, *layer.parameters())))
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_checkpoints(reentrant, reduction, dtype):
    problem = Problem()
    target, _ = problem.targets["index"]
    inputs = [t.detach().to(dtype).requires_grad_() for t in problem.inputs]

    def loss(x, W, b):
        return linear_sigmoid_cross_entropy(x, W, target, linear_bias=b, reduction=reduction)

    C = checkpoint.checkpoint(loss, *inputs, use_reentrant=reentrant)
    upstream = torch.linspace(-1, 2, C.numel(), dtype=C.dtype).view_as(C)
    plain = loss(*inputs)
    plain.backward(upstream)
    expected = [t.grad for t in inputs]
    assert torch.equal(C, plain)
    for _ in range(1 if reentrant else 2):  # over one graph
        for t in inputs:
            t.grad = None
        C.backward(upstream, retain_graph=not reentrant)
        for t, gradient in zip(inputs, expected, strict=True):
            assert torch.equal(t.grad, gradient)


def test_a_checkpoint_makes_the_gradients_once():
    problem = Problem()
    target, _ = problem.targets["index"]

    def loss():
        return checkpoint.checkpoint(
            linear_sigmoid_cross_entropy, problem.x, problem.W, target, use_reentrant=False
        )

    assert products(loss) == 1
    C = loss()
    assert products(C.backward) == 3


def test_an_unknown_checkpoint_makes_the_gradients_twice(monkeypatch):
    """Where PyTorch's hooks have other names, all is right but not sparing."""
    problem = Problem()
    target, y = problem.targets["index"]
    monkeypatch.setattr("nnce.labels.function.checkpoint_stage", lambda: None)
    C = checkpoint.checkpoint(
        linear_sigmoid_cross_entropy, problem.x, problem.W, target, use_reentrant=False
    )
    hold(C, eager(problem.x, problem.W, y), (problem.x, problem.W))


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_hooks_unpack_each_saved_tensor_once_a_backward(reduction):
    problem, unpacked = Problem(), []

    def unpack(tensor):
        unpacked.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        C = linear_sigmoid_cross_entropy(
            problem.x, problem.W, problem.targets["index"][0], reduction=reduction
        ).sum()
    for _ in range(2):
        C.backward(retain_graph=True)
        assert len(unpacked) == 2  # x and W
        unpacked.clear()


CHANGED = ("index", "column", "dense", "soft", "weight", "pos_weight", "example_weight")


@pytest.mark.parametrize(
    ("changed", "backend", "create_graph"),
    slow_unless(
        lambda changed, backend, create_graph: backend is None or changed == "index",
        [(changed, *form) for form in ((None, 0), (None, 1), ("eager", 0)) for changed in CHANGED],
    ),
)
def test_what_changed_in_place_is_not_read_again(changed, backend, create_graph):
    """It raises where the blocks are walked again, and only there."""

    def loss(reduction):
        problem = Problem()
        kind = changed if changed in problem.targets else "index"
        target, y = problem.targets[kind]
        options = {name: getattr(problem, name) for name in CHANGED[-3:]}
        if changed == "column":  # a part of the tensor that is changed
            target = target[:, 1]
            y = torch.eye(34, 33, dtype=y.dtype)[target % 34]

        def compute(x, W):
            return linear_sigmoid_cross_entropy(x, W, target, reduction=reduction, **options)

        inputs = (problem.x, problem.W)
        expected = torch.autograd.grad(eager(*inputs, y, reduction="sum", **options), inputs)
        compute = torch.compile(compute, backend=backend) if backend else compute
        C = compute(*inputs)
        if changed in options:
            options[changed].mul_(2)
        elif changed == "soft":
            target.values.mul_(0.5)
        else:
            problem.targets["index" if changed == "column" else changed][0].zero_()
        return C, inputs, expected

    C, inputs, expected = loss("sum")
    got = torch.autograd.grad(C, inputs, retain_graph=True, create_graph=create_graph)
    torch.testing.assert_close(got, expected)
    with pytest.raises(RuntimeError, match="changed in place after the forward"):
        torch.autograd.grad(C, inputs)
    C, inputs, _ = loss("none")
    with pytest.raises(RuntimeError, match="changed in place after the forward"):
        torch.autograd.grad(C.sum(), inputs)


def test_targets_of_inference_mode():
    with torch.inference_mode():
        target = torch.arange(7)
    problem = Problem()
    C = linear_sigmoid_cross_entropy(problem.x, problem.W, target, reduction="none")
    hold(
        C,
        eager(problem.x, problem.W, torch.eye(7, 33).double(), reduction="none"),
        problem.inputs[:2],
    )


def test_autocast_multiplies_in_its_dtype_and_keeps_float32():
    problem = Problem(dtype=torch.float32)
    target, y = problem.targets["index"]
    x, W, b = problem.inputs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        C = linear_sigmoid_cross_entropy(x, W, target, linear_bias=b)
        half = linear_sigmoid_cross_entropy(x.bfloat16(), W, target, linear_bias=b)
    assert C.dtype == torch.float32 and torch.equal(C, half)
    gradients = torch.autograd.grad(C, (x, W, b))
    assert all(g.dtype == torch.float32 for g in gradients)
    # The products' inputs are bfloat16's: 8 bits each.
    expected = torch.autograd.grad(eager(x, W, y, b), (x, W, b))
    torch.testing.assert_close(gradients, expected, rtol=0.05, atol=0.02)
    z = (x.bfloat16() @ W.bfloat16().T).float() + b
    torch.testing.assert_close(
        C, nnce.sigmoid_cross_entropy(z, y, reduction="sum") / len(x), rtol=1e-6, atol=0
    )


def test_float16_keeps_small_gradients():
    """dz / n is 2e-9 here, below all of float16's numbers; its products are right all the same."""
    x, W = torch.rand(1500, 4) + 1, torch.zeros(3, 4, requires_grad=True)
    b = torch.full((3,), -12.8, requires_grad=True)
    none = torch.full((1500,), -1)
    with torch.autocast("cpu", dtype=torch.float16):
        C = linear_sigmoid_cross_entropy(x, W, none, linear_bias=b)
    got = torch.autograd.grad(C, (W, b))
    expected = torch.autograd.grad(eager(x, W, torch.zeros(1500, 3), b), (W, b))
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=0)  # PyTorch 2.6 sums in float16


def in_float16(mode, n, features, labels, prior=-9.0):
    """Inputs and targets: autocast from float32, autocast with a float16 x, or all in float16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=generator).half()
    W = (torch.randn(labels, features, generator=generator) / features**0.5).half()
    b = torch.full((labels,), prior).half()
    if mode != "half":
        W, b = W.float(), b.float()
    if mode == "autocast":
        x = x.float()
    index = torch.randint(-1, labels, (n, 5), generator=generator)
    return [t.requires_grad_() for t in (x, W, b)], index


def autocast(mode):
    return torch.autocast("cpu", torch.float16, enabled=mode != "half")


@pytest.mark.parametrize(
    ("n", "labels", "reduction", "scales"),
    [
        (16, 20_000, "mean", (2.0**16, 2.0**22, 1e6)),
        (16, 20_000, "none", (2.0,)),
        (1500, 20, "batchmean", (1024.0, 65536.0)),
    ],
)
@pytest.mark.parametrize(
    ("mode", "compiled"),
    slow_unless(
        lambda mode, compiled: not compiled,
        itertools.product(("autocast", "autocast, x in half", "half"), (False, True)),
    ),
)
def test_float16_gradients_at_every_loss_scale(compiled, mode, n, labels, reduction, scales):
    """Off by at most 2⁻¹⁰ of the norm, where products in float16 alone cost 2⁻¹²."""
    torch.compiler.reset()  # each case compiles the same function once more
    inputs, index = in_float16(mode, n, 16, labels)

    def loss(x, W, b):
        return linear_sigmoid_cross_entropy(x, W, index, linear_bias=b, reduction=reduction).sum()

    exact = [t.detach().double().requires_grad_() for t in inputs]
    true = torch.autograd.grad(loss(*exact), exact)
    compute = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    for scale in scales:
        with autocast(mode):
            C = compute(*inputs)
        got = torch.autograd.grad(C * scale, inputs)
        for g, t, like in zip(got, true, inputs, strict=True):
            assert g.dtype == like.dtype
            assert (g.double() / scale - t).norm() <= 2**-10 * t.norm()


def test_a_gradient_scaler_grows_as_with_the_built_in_loss():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 12, generator=generator)
    y = torch.randint(500, (32, 2), generator=generator)
    dense = torch.zeros(32, 500).scatter(1, y, 1)
    scales = {}
    for name in ("ours", "built-in"):
        torch.manual_seed(0)
        encoder = torch.nn.Linear(12, 8)
        last = LinearSigmoidCrossEntropyLoss(8, 500, prior=0.004)
        parameters = [*encoder.parameters(), *last.parameters()]
        steps = torch.optim.SGD(parameters, lr=0.01)
        scaler = torch.amp.GradScaler("cpu", growth_interval=20)
        for _ in range(200):
            steps.zero_grad()
            with torch.autocast("cpu", torch.float16):
                h = encoder(x)
                C = last(h, y) if name == "ours" else eager(h, last.weight, dense, last.bias)
            scaler.scale(C).backward()
            scaler.step(steps)
            scaler.update()
        assert all(p.isfinite().all() for p in parameters)
        scales[name] = scaler.get_scale()
    assert scales["ours"] >= scales["built-in"] > 65536


@pytest.mark.parametrize("n", [7, 1500])
def test_half_precision_gradients_are_summed_in_float32(n):
    exact = Problem(n, dtype=torch.float32)
    target, y = exact.targets["index"]
    low = [t.detach().bfloat16().requires_grad_() for t in exact.inputs]
    for t, rounded in zip(exact.inputs, low, strict=True):
        t.data.copy_(rounded)
    C = linear_sigmoid_cross_entropy(low[0], low[1], target, linear_bias=low[2], block=8)
    assert C.dtype == torch.float32
    got = torch.autograd.grad(C, low)
    expected = torch.autograd.grad(eager(*exact.inputs[:2], y, exact.b), exact.inputs)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == torch.bfloat16
        assert (g.float() - e).norm() < 0.01 * e.norm()


@pytest.mark.parametrize(
    ("kind", "reduction"),
    slow_unless(
        lambda kind, reduction: (kind, reduction) in (("index", "batchmean"), ("dense", "none")),
        itertools.product(("index", "soft", "dense"), ("batchmean", "none")),
    ),
)
def test_compiled_models_have_the_same_numbers(kind, reduction):
    problem = Problem(dtype=torch.float32)
    target, _ = problem.targets[kind]
    layer = LinearSigmoidCrossEntropyLoss(5, 33, block=8, reduction=reduction)
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh())

    def loss(x):
        return layer(model(x), target)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = (problem.x, *model.parameters(), *layer.parameters())
    both = []
    for compute in (loss, compiled):
        C = compute(problem.x)
        both.append(
            (C, *torch.autograd.grad(C, inputs, torch.linspace(1, 2, C.numel()).view_as(C)))
        )
    torch.testing.assert_close(*both, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "backend"),
    slow_unless(
        lambda kind, backend: (kind, backend) == ("COO", "eager"),
        itertools.product(("CSR", "COO", "hybrid COO"), ("eager", "aot_eager")),
    ),
)
def test_sparse_targets_of_compiled_models(kind, backend):
    """Of which PyTorch makes a break in the graph."""
    problem = Problem()
    target, y = problem.targets[kind]
    compiled = torch.compile(linear_sigmoid_cross_entropy, backend=backend)
    C = compiled(problem.x, problem.W, target)
    hold(C, eager(problem.x, problem.W, y), (problem.x, problem.W))


class Layer(torch.nn.Module):
    """A loss over its own targets."""

    def __init__(self, reduction="batchmean"):
        super().__init__()
        problem = Problem()
        index, self.y = problem.targets["index"]
        self.layer = LinearSigmoidCrossEntropyLoss(
            5, 33, weight=problem.weight, reduction=reduction, dtype=torch.float64
        )
        self.register_buffer("target", index)

    def forward(self, x):
        return self.layer(x, self.target)

    def by_pytorch(self, x):
        layer = self.layer
        return eager(
            x, layer.weight, self.y, layer.bias, layer.label_weight, reduction=layer.reduction
        )

    def operator(self, x, version=2):
        """Through torch.ops."""
        rows = torch.arange(7).repeat_interleave(3)
        layer = self.layer
        return torch.ops.nnce.linear_sigmoid_cross_entropy(
            x, layer.weight, layer.bias, None, rows, self.target.reshape(21), None, False,
            layer.label_weight, None, 0.0, None, layer.reduction, None, torch.float64, None,
            version,
        )  # fmt: skip


def exported(layer, needs_gradient):
    x = torch.zeros(7, 5, dtype=torch.float64, requires_grad=needs_gradient)
    return torch.export.export(layer, (x,)).module()


FORMS = {
    "compiled": lambda layer: torch.compile(layer, backend="eager"),
    "exported": lambda layer: exported(layer, False),
    "exported for a gradient": lambda layer: exported(layer, True),
    "operator": lambda layer: layer.operator,
}


@pytest.mark.parametrize(
    ("form", "reduction"),
    slow_unless(
        lambda form, reduction: reduction == "batchmean" or form == "operator",
        itertools.product(FORMS, ("batchmean", "none")),
    ),
)
def test_every_form_has_the_first_derivatives(form, reduction):
    layer = Layer(reduction)
    compute = FORMS[form](layer)
    for needs_gradient in (True, False):
        x = Problem().x.detach().requires_grad_(needs_gradient)
        inputs = [*([x] if needs_gradient else []), layer.layer.weight, layer.layer.bias]
        hold(compute(x), layer.by_pytorch(x), inputs)
    with torch.no_grad():
        assert not compute(x).requires_grad


@pytest.mark.parametrize(
    ("form", "reduction", "frozen"),
    slow_unless(
        lambda form, reduction, frozen: (
            form in ("plain", "operator")
            or (form, reduction, frozen) == ("compiled", "none", False)
        ),
        itertools.product(["plain", *FORMS], ("batchmean", "none"), (False, True)),
    ),
)
def test_every_form_refuses_the_other_derivatives(form, reduction, frozen):
    layer = Layer(reduction)
    layer.layer.requires_grad_(not frozen)
    compute = layer if form == "plain" else FORMS[form](layer)
    x = Problem().x.detach().requires_grad_()
    factor = torch.tensor(2.0, dtype=x.dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad((factor * compute(x)).sum(), x, create_graph=True)
    for other in (x, factor, *([] if frozen else layer.layer.parameters())):
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(gradient.square().sum(), other, retain_graph=True)
    x = x.detach()
    with pytest.raises(RuntimeError, match=r"forward-mode|the jvp function"):
        torch.func.jvp(compute, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"forward-mode|the jvp func"):
        compute(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("form", ["eager", "operator"])
def test_no_derivatives_by_weights_and_targets(form):
    layer = Layer()
    W, weight, x = layer.layer.weight, layer.layer.label_weight, Problem().x.detach()

    def compute(weight):
        if form == "eager":
            return linear_sigmoid_cross_entropy(x, W, layer.target, weight=weight)
        layer.layer.label_weight = weight
        return layer.operator(x)

    with pytest.raises(ValueError, match=r"need.* no gradient"):
        compute(weight.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        torch.func.jvp(compute, (weight,), (weight,))


def test_export():
    problem = Problem(dtype=torch.float32)
    layer = LinearSigmoidCrossEntropyLoss(5, 33)
    arguments = (problem.x.detach(), problem.targets["index"][0])
    program = torch.export.export(layer, arguments)
    for form in (program, program.run_decompositions()):
        assert torch.equal(form.module()(*arguments), layer(*arguments))


def test_models_of_an_older_export_are_refused():
    """Their calls have no version: PyTorch reads a file's arguments by name, the known ones."""
    layer = Layer()
    with pytest.raises(RuntimeError, match="an older nnce exported: export it again"):
        layer.operator(Problem().x, version=0)


def test_any_optimiser_trains_it():
    problem = Problem(n=40, labels=8, k=1)
    target, _ = problem.targets["index"]
    for optimiser in (torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS):
        layer = LinearSigmoidCrossEntropyLoss(
            5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        steps = optimiser(layer.parameters(), lr=0.1)

        def closure(layer=layer, steps=steps):
            steps.zero_grad()
            C = layer(problem.x.detach(), target)
            C.backward()
            return C

        first = steps.step(closure)
        for _ in range(20):
            last = steps.step(closure)
        assert last < 0.8 * first


def index_of(x):
    # Not a constant, of which PyTorch before 2.9 exports none.
    return torch.arange(2 * len(x), device=x.device).view(-1, 2) % 5 - 1


def of_problem(x, W, b):
    return linear_sigmoid_cross_entropy(x, W, index_of(x), linear_bias=b, block=2)


def of_problem_by_pytorch(x, W, b):
    y = torch.nn.functional.one_hot(index_of(x) % 5, 5).sum(1)
    return eager(x, W, y[:, :4].to(x.dtype), b)


def test_check_gradients_finds_them_right():
    inputs = [t.detach() for t in Problem(3, 2, 4).inputs]
    assert nnce.check_gradients(of_problem, *inputs)
    report = nnce.check_gradients(of_problem, *inputs, reference=of_problem_by_pytorch)
    assert report and report.second.verdict == "unsupported"


def test_check_composability_finds_nothing_wrong():
    inputs = [t.detach() for t in Problem(3, 2, 4).inputs]
    report = nnce.check_composability(
        of_problem, *inputs, reference=of_problem_by_pytorch, examples=(True, False, False)
    )
    assert not report.wrong
    failures = {name for name, found in report.items() if found.verdict == "fails"}
    assert failures == set(REFUSED)


def test_the_meta_device():
    layer = LinearSigmoidCrossEntropyLoss(5, 33, device="meta")
    x = torch.empty(7, 5, device="meta", requires_grad=True)
    C = layer(x, torch.empty(7, 2, dtype=torch.int64, device="meta"))
    C.backward()
    assert C.shape == () and layer.weight.grad.shape == (33, 5) and x.grad.is_meta


# ----------------------------------------------------------------------------------- the module


def test_the_module_is_the_function():
    problem = Problem()
    target, _ = problem.targets["index"]
    layer = LinearSigmoidCrossEntropyLoss(
        5, 33, weight=problem.weight, pos_weight=problem.pos_weight, label_smoothing=0.1,
        reduction="sum", dtype=torch.float64,
    )  # fmt: skip
    expected = linear_sigmoid_cross_entropy(
        problem.x, layer.weight, target, linear_bias=layer.bias, weight=problem.weight,
        pos_weight=problem.pos_weight, label_smoothing=0.1, reduction="sum",
        example_weight=problem.example_weight,
    )  # fmt: skip
    assert torch.equal(layer(problem.x, target, problem.example_weight), expected)
    assert {"weight", "bias"} == {name for name, _ in layer.named_parameters()}
    linear = torch.nn.Linear(5, 33, dtype=torch.float64)
    layer.load_state_dict(linear.state_dict())
    assert torch.equal(layer.label_weight, problem.weight)
    again = LinearSigmoidCrossEntropyLoss(
        5, 33, weight=problem.weight + 1, pos_weight=problem.pos_weight + 1, dtype=torch.float64
    )
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.label_weight, problem.weight)
    assert torch.equal(again.pos_weight, problem.pos_weight)
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        layer.load_state_dict({"weight": linear.weight})
    torch.testing.assert_close(layer.logits(problem.x), linear(problem.x))


def test_its_start():
    drawn = [
        LinearSigmoidCrossEntropyLoss(
            400, 300, prior=0.01, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0].weight, drawn[1].weight)
    assert not torch.equal(drawn[0].weight, drawn[2].weight)
    assert abs(drawn[0].weight.std() * 20 - 1) < 0.02
    torch.testing.assert_close(drawn[0].bias.sigmoid(), torch.full((300,), 0.01))
    assert LinearSigmoidCrossEntropyLoss(4, 3, bias=False).bias is None
    assert repr(drawn[0]).endswith("bias=True, reduction='batchmean', prior=0.01)")


@pytest.mark.parametrize("block", [None, 1, 64, 1000])
@pytest.mark.parametrize("nan", [False, True])
def test_topk_is_in_order_among_ties_too(block, nan):
    generator = torch.Generator().manual_seed(0)
    layer = LinearSigmoidCrossEntropyLoss(4, 300, block=block)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-1, 2, (300, 4), generator=generator))
    x = torch.randint(-1, 2, (1100, 4), generator=generator).float()
    if nan:
        layer.bias.data[[3, 100, 299]] = torch.nan
    expected, order = layer.logits(x).sort(dim=1, descending=True, stable=True)
    for k in (1, 5, 117, 300):
        z, labels = layer.topk(x, k)
        torch.testing.assert_close(z, expected[:, :k], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(labels, order[:, :k])
    assert not z.requires_grad
    assert [t.shape for t in layer.topk(x[:0], 3)] == [(0, 3), (0, 3)]
    for k in (0, 301, 1.0, True):
        with pytest.raises(ValueError, match="k from 1 to the 300 labels"):
            layer.topk(x, k)


# ---------------------------------------------------------------------------------- some labels


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("log_q", [False, True])
def test_sampled(reduction, shared, sparse, log_q):
    problem = Problem()
    x, W, b = problem.inputs
    positives, _ = problem.targets["index"]
    negatives = torch.randint(33, (6,) if shared else (7, 6), generator=torch.Generator())
    log_q = -problem.weight if log_q else None
    ours = sampled_sigmoid_cross_entropy(
        x, W, positives, negatives, linear_bias=b, log_q=log_q, sparse=sparse, reduction=reduction
    )
    z = torch.nn.functional.linear(x, W, b) - (0 if log_q is None else log_q)
    C = [
        sum(torch.nn.functional.softplus(-z[i, label]) for label in positives[i] if label >= 0)
        + torch.nn.functional.softplus(z[i, negatives if shared else negatives[i]]).sum()
        for i in range(7)
    ]
    named = (positives >= 0).sum() + 42
    divided = {"mean": named, "batchmean": 7}.get(reduction, 1)
    theirs = torch.stack(C) if reduction == "none" else torch.stack(C).sum() / divided
    upstream = torch.linspace(-1, 2, ours.numel(), dtype=ours.dtype).view_as(ours)
    got = torch.autograd.grad(ours, (x, W, b), upstream)
    expected = torch.autograd.grad(theirs, (x, W, b), upstream)
    torch.testing.assert_close(ours, theirs)
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a.to_dense() if a.is_sparse else a, e)
    assert [g.is_sparse for g in got] == [False, sparse, sparse]
    if sparse:
        touched = torch.cat([positives.clamp(min=0).flatten(), negatives.flatten()]).unique()
        assert torch.equal(got[1].coalesce().indices()[0], touched)


@pytest.mark.parametrize(
    ("reduction", "scale"),  # at which the gradients are within float16's range
    [("batchmean", 2.0**8), ("mean", 2.0**16), ("sum", 2.0**-4), ("none", 2.0**-4)],
)
def test_sampled_in_float16_sums_in_float32(reduction, scale):
    generator = torch.Generator().manual_seed(0)
    inputs, index = in_float16("half", 1024, 8, 50, prior=0.0)
    negatives = torch.randint(50, (1000,), generator=generator)

    def loss(x, W, b):
        return sampled_sigmoid_cross_entropy(
            x, W, index, negatives, linear_bias=b, reduction=reduction
        ).sum()

    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected, C = loss(*exact), loss(*inputs)
    assert C.dtype == torch.float32
    torch.testing.assert_close(C.double(), expected, rtol=1e-4, atol=0)
    got = torch.autograd.grad(C * scale, inputs)
    for g, t in zip(got, torch.autograd.grad(expected * scale, exact), strict=True):
        assert (g.double() - t).norm() <= 2**-9 * t.norm()  # PyTorch adds up rows of W in float16


def test_sparse_gradients_are_for_sparse_optimisers():
    problem = Problem()
    W, b = (torch.nn.Parameter(t.detach().clone()) for t in (problem.W, problem.b))
    optimiser = torch.optim.SparseAdam([W, b], lr=0.1)
    before = W.detach().clone()
    sampled_sigmoid_cross_entropy(
        problem.x, W, torch.tensor([1] * 7), torch.tensor([2]), linear_bias=b, sparse=True
    ).backward()
    optimiser.step()
    assert torch.equal((before != W).any(1).nonzero()[:, 0], torch.tensor([1, 2]))


# --------------------------------------------------------------------------------- many processes


@pytest.mark.slow
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dense", [False, True])
def test_sharded_labels_are_as_in_one_process(processes_found, reduction, dense):
    from processes import SHARDS, labels_problem

    x, W, b, target, weight, upstream = labels_problem()
    inputs = [t.requires_grad_() for t in (x, W, b)]
    labels = sum(SHARDS)
    y = torch.zeros(len(x), labels + 1, dtype=x.dtype).scatter(1, target % (labels + 1), 1)[:, :-1]
    C = eager(x, W, y, b, weight=weight, reduction=reduction)
    by_x, by_W, by_b = torch.autograd.grad(C, inputs, upstream if reduction == "none" else None)
    for rank, found in enumerate(processes_found):
        begin = sum(SHARDS[:rank])
        own = slice(begin, begin + SHARDS[rank])
        for time in ("first", "second"):
            got = found["labels", reduction, dense, time]
            torch.testing.assert_close(got, (C.detach(), by_x, by_W[own], by_b[own]))


@pytest.mark.slow
def test_data_parallel(processes_found):
    from processes import WORLD, labels_problem, target_of, x_of

    _, W, b, *_ = labels_problem()
    W.requires_grad_(), b.requires_grad_()
    losses = [
        linear_sigmoid_cross_entropy(x_of(rank), W, target_of(rank), linear_bias=b)
        for rank in range(WORLD)
    ]
    expected = torch.autograd.grad(2 * sum(losses) / WORLD, (W, b))
    for found in processes_found:
        torch.testing.assert_close(found["parallel"], expected)


@pytest.mark.slow
def test_topk_merges_the_shards(processes_found):
    from processes import SHARDS, labels_problem

    x, W, b, *_ = labels_problem()
    z, order = (x.round() @ W.round().T + b.round()).sort(dim=1, descending=True, stable=True)
    for found in processes_found:
        for k in (1, 6, sum(SHARDS)):
            got, labels = found["topk", k]
            assert torch.equal(got, z[:, :k]) and torch.equal(labels, order[:, :k])


@pytest.mark.slow
def test_topk_and_logits_after_fully_shard(processes_found):
    """The gradients are the processes' mean, as after a forward."""
    from processes import WORLD, labels_problem, x_of

    _, W, b, *_ = labels_problem()
    W.requires_grad_(), b.requires_grad_()
    z = [x_of(rank) @ W.T + b for rank in range(WORLD)]
    gradients = torch.autograd.grad(sum(each.square().sum() for each in z) / WORLD, (W, b))
    for mine, found in zip(z, processes_found, strict=True):
        best, labels = mine.detach().topk(4)
        expected = (mine.detach(), best, labels, *gradients)
        torch.testing.assert_close(found["sharded"], expected)


# ------------------------------------------------------------------------------------- bad input

X, W = torch.ones(3, 2), torch.ones(5, 2)
T = torch.tensor


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"target": T([0, 5, 1])}, ValueError, r"labels from 0 to 4, or -1 for none, got \[5\]"),
        ({"target": T([0, -2, 1])}, ValueError, r"labels from 0 to 4, or -1 for none, got \[-2\]"),
        ({"target": Positives.from_lists([[7], [], []])}, ValueError, r"from 0 to 4, .* got \[7\]"),
        ({"target": torch.ones(3, 4)}, ValueError, r"dense target of shape \(3, 5\), got \(3, 4\)"),
        ({"target": torch.ones(3, 5).long()}, ValueError, "holds label numbers, never zeros and"),
        ({"target": Positives.from_lists([[0], [1]])}, ValueError, "input's 3 examples, got crow"),
        ({"target": T([0, 1])}, ValueError, r"of shape \(3,\) or \(3, k\), got \(2,\)"),
        (
            {"target": T([0, 1, 2]).to("meta")},
            ValueError,
            "target on device cpu like input, got meta",
        ),
        (
            {"target": [[0], [1], [2]]},
            TypeError,
            "target to be a tensor or nnce.Positives, got list",
        ),
        ({"target": torch.ones(2, 5).to_sparse_csr()}, ValueError, r"sparse target of shape"),
        ({"target": torch.ones(3, 5, requires_grad=True)}, ValueError, "target that needs no grad"),
        ({"target": torch.ones(3, 5) * 1j}, TypeError, "a real target, got torch.complex64"),
        ({"target": torch.ones(3, 5).to_sparse_csc()}, TypeError, "dense, CSR or COO target, got"),
        (
            {"target": T([[0, 0.5, 1, 0, 0]] * 2 + [[0, 1.5, 0, -0.1, 1]])},
            ValueError,
            r"^expected target in \[0, 1\], got \[1.5, -0.1",
        ),
        (
            {"target": torch.full((3, 5), torch.nan).half()},
            ValueError,
            r"target in \[0, 1\], got \[nan, nan, nan, nan, …\]",
        ),
        ({"group": "world"}, TypeError, "group to be a process group, got str"),
        ({"block": 0}, ValueError, "block to be a whole number of at least 1, got 0"),
        ({"block": 2.0}, ValueError, "block to be a whole number"),
        (
            {"example_weight": T([1.0, -1, 1])},
            ValueError,
            r"example_weight of at least 0, got \[-1",
        ),
        (
            {"example_weight": torch.ones(2)},
            ValueError,
            r"example_weight of shape \(3,\), got \(2,\)",
        ),
        ({"weight": torch.ones(3)}, ValueError, r"weight of shape \(5,\), got \(3,\)"),
        (
            {"weight": -torch.ones(5)},
            ValueError,
            r"weight of at least 0, got \[-1.0, -1.0, -1.0, -1.0, …",
        ),
        ({"weight": torch.full((5,), torch.nan)}, ValueError, "weight of at least 0, got .nan"),
        ({"pos_weight": torch.ones(5).long()}, TypeError, "pos_weight of a floating-point dtype"),
        ({"pos_weight": 2.0}, TypeError, "pos_weight to be a tensor, got float"),
        ({"pos_weight": torch.ones(5, requires_grad=True)}, ValueError, "needs no gradient"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing in \[0, 1\)"),
        ({"reduction": "max"}, ValueError, "expected reduction"),
        ({"input": torch.ones(2)}, ValueError, r"input of shape \(n, features\), got \(2,\)"),
        ({"linear_weight": torch.ones(5, 3)}, ValueError, r"linear_weight of shape \(labels, 2\)"),
        ({"linear_weight": W.double()}, TypeError, "linear_weight of dtype torch.float32"),
        ({"linear_bias": torch.ones(4)}, ValueError, r"linear_bias of shape \(5,\)"),
    ],
)
def test_bad_input_is_one_sentence(change, error, sentence):
    arguments = {"input": X, "linear_weight": W, "target": T([0, 1, 4])} | change
    with pytest.raises(error, match=sentence) as raised:
        linear_sigmoid_cross_entropy(**arguments)
    assert "\n" not in str(raised.value)


def test_dense_targets_are_looked_at_when_asked_and_of_any_dtype():
    wrong = torch.zeros(3, 5)
    wrong[1, 2] = 2
    C = linear_sigmoid_cross_entropy(X, W, wrong, check_values=False)
    assert torch.equal(C, eager(X, W, wrong, torch.zeros(5)))
    with pytest.raises(ValueError, match=r"^expected target in \[0, 1\], got \[2.0\]$"):
        torch.compile(linear_sigmoid_cross_entropy, backend="aot_eager")(X, W, wrong)
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float64, torch.bool):
        for target in (torch.eye(3, 5).to(dtype), torch.eye(5, 3).to(dtype).t()):
            assert torch.equal(linear_sigmoid_cross_entropy(X, W, target), C_of_eye())


def C_of_eye():
    return linear_sigmoid_cross_entropy(X, W, T([0, 1, 2]))


def test_sentences_name_what_was_given():
    layer = LinearSigmoidCrossEntropyLoss(2, 5)
    with pytest.raises(ValueError, match=r"^expected weight of shape \(labels, 3\) .* with input"):
        layer.topk(torch.ones(1, 3), 1)
    layer.bias = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"^expected bias of shape \(5,\) to go with weight of"):
        layer.topk(X, 1)
    with torch.autocast("cpu", torch.bfloat16):
        sentence = "^expected y on device cpu like x, got meta$"
        with pytest.raises(ValueError, match=sentence):
            nnce.pair_sigmoid_cross_entropy(X, X.to("meta"), 1.0)
    with pytest.raises(ValueError, match=r"^expected scale on device cpu like x, got meta$"):
        nnce.pair_sigmoid_cross_entropy(X, X, torch.ones((), device="meta"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"in_features": 0}, "in_features to be a whole number of at least 1, got 0"),
        ({"num_labels": 2.0}, "num_labels to be a whole number"),
        ({"prior": 1.0}, "prior between 0 and 1, got 1.0"),
        ({"weight": torch.ones(3)}, r"^expected weight of shape \(5,\)"),
        ({"weight": -torch.ones(5)}, r"^expected weight of at least 0"),
        (
            {"weight": torch.ones(5, device="meta")},
            "^expected weight on device cpu like the parameters, got meta",
        ),
        ({"pos_weight": -torch.ones(5)}, "pos_weight of at least 0"),
        ({"block": -1}, "block to be"),
        ({"label_smoothing": 2}, "label_smoothing in"),
        ({"reduction": "max"}, "expected reduction"),
    ],
)
def test_bad_options_are_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LinearSigmoidCrossEntropyLoss(**({"in_features": 2, "num_labels": 5} | options))


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            {"positives": T([0, 1, 5])},
            ValueError,
            r"positives from 0 to 4, or -1 for none, got \[5\]",
        ),
        ({"negatives": T([-2])}, ValueError, r"negatives from 0 to 4, or -1 for none, got \[-2\]"),
        ({"positives": T([0.0, 1, 2])}, TypeError, "positives to be a tensor of whole numbers"),
        ({"positives": T([0, 1])}, ValueError, "positives of the 3 examples"),
        ({"negatives": T([[0, 1]])}, ValueError, "negatives of the 3 examples"),
        ({"log_q": torch.ones(4)}, ValueError, r"log_q of shape \(5,\)"),
        ({"log_q": torch.ones(5, requires_grad=True)}, ValueError, "log_q that needs no gradient"),
        ({"reduction": "max"}, ValueError, "expected reduction"),
    ],
)
def test_bad_samples_are_one_sentence(change, error, sentence):
    arguments = {"input": X, "linear_weight": W, "positives": T([0, 1, 2]), "negatives": T([3, 4])}
    with pytest.raises(error, match=sentence):
        sampled_sigmoid_cross_entropy(**arguments | change)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", Problem().targets)
def test_cuda(kind):
    problem = Problem(n=1500)
    target, y = problem.targets[kind]
    inputs = [t.detach().cuda().requires_grad_() for t in problem.inputs]
    ours = linear_sigmoid_cross_entropy(
        inputs[0], inputs[1], target.to("cuda"), linear_bias=inputs[2], block=8, check_values=True
    )
    hold(ours, eager(inputs[0], inputs[1], y.cuda(), inputs[2]), inputs)
