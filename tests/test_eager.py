"""Plain eager code uses the fast Functions and the fused passes, and no other context does.

A context that is not recognized gives a silently wrong result at worst: a constant in a trace, a
lost tangent. Each context has a test, which must fail if the context is not recognized.
"""

import contextlib
import warnings

import pytest
import torch
from conftest import slow_unless
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad, grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import nnce
from nnce import functional
from nnce.kernels import fused


def _random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = _random(4, 3, seed=0), _random(4, 5, seed=1).sigmoid()
B, PER_COMPONENT = _random(5, seed=2), _random(5, seed=3).abs()
W0, W1, V = _random(5, 3, seed=4), _random(5, 3, seed=5), _random(5, 3, seed=6)


def f(W):
    """A layer and all losses, one with every option."""
    z = nnce.linear(X.to(W), W, B.to(W))
    y, weight = Y.to(W), PER_COMPONENT.to(W)
    options = {"weight": weight, "pos_weight": weight, "label_smoothing": 0.1, "ignore_index": -100}
    C = nnce.sigmoid_cross_entropy(z, y, **options) + nnce.sigmoid_quadratic(nnce.sigmoid(z), y)
    return C + nnce.functional.binary_cross_entropy_with_logits(z, y)


@contextlib.contextmanager
def composed():
    """Without the fast Functions: the values to compare with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "is_plain", lambda *_, **__: False)
        yield


def reference(function, *arguments):
    with composed():
        return function(*arguments)


FAST = [
    *((functional, name) for name in ("_apply_linear", "_apply_sigmoid", "_apply_loss")),
    *((fused, name) for name in ("forward", "backward", "sigmoid_backward")),
]


@contextlib.contextmanager
def recorded():
    """The names of the fast functions that are called."""
    called = set()

    def recording(name, function):
        def record(*arguments):
            called.add(name)
            return function(*arguments)

        return record

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in FAST:
            patch.setattr(owner, name, recording(name, getattr(owner, name)))
        yield called


@contextlib.contextmanager
def without_fast():
    with recorded() as called:
        yield
    assert not called, called


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def leaf(W=W0):
    return W.clone().requires_grad_()


# ------------------------------------------------------------------- contexts of a forward


def compile_():
    W = leaf()
    C = torch.compile(f, backend="aot_eager", fullgraph=True)(W)
    close(C, reference(f, W0))
    close(grad(C, W)[0], reference(lambda W: grad(f(W), W)[0], leaf()))


def export():
    class Module(torch.nn.Module):
        def forward(self, W):
            return f(W)

    program = torch.export.export(Module(), (W0,))
    close(program.module()(W1), reference(f, W1))


def jit_trace():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated; and the checks of shapes are constants
        traced = torch.jit.trace(f, W0, check_trace=False)
    same(traced(W1), reference(f, W1))


def dual_tensors():
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(W0, V))).tangent
    with composed():
        close(tangent, (grad(f(W := leaf()), W)[0] * V).sum())


class Subclass(torch.Tensor):
    pass


def subclasses():
    with without_fast():
        C = f(W0.as_subclass(Subclass))
    assert type(C) is Subclass
    same(C.as_subclass(torch.Tensor), reference(f, W0))


def fake_tensors():
    with FakeTensorMode() as mode:
        W = mode.from_tensor(W0).requires_grad_()
        with without_fast():
            z = nnce.linear(W, W)
            C = nnce.sigmoid_cross_entropy(nnce.sigmoid(z), z)
            (dW,) = grad(C, W)
    assert type(C) is type(dW) is FakeTensor and dW.shape == W.shape


def meta_tensors():
    with without_fast():
        W = W0.to("meta").requires_grad_()
        C = f(W)
        assert C.is_meta and grad(C, W)[0].shape == W.shape


def autocast():
    W = W0.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), without_fast():
        assert nnce.linear(X.float(), W).dtype == torch.bfloat16
        assert nnce.sigmoid_cross_entropy(*2 * (W.bfloat16(),)).dtype == torch.float32
        C = f(W)
    with torch.autocast("cpu", torch.bfloat16):
        same(C, reference(f, W))


def negative_views():
    negative = torch.complex(W0, -W0).conj().imag
    assert negative.is_neg()
    for function in (
        nnce.sigmoid,
        lambda z: nnce.linear(X, z),
        lambda z: nnce.sigmoid_cross_entropy(z, W1.sigmoid()),
        lambda z: nnce.sigmoid_quadratic(W1, z),
    ):
        with without_fast():
            C = function(negative)
        same(C, reference(function, W0))


def make_fx_with_real_tensors():
    same(make_fx(f)(W0)(W1), reference(f, W1))


def make_fx_over_both():
    def gradient(W):
        return grad(f(W), W)[0]

    same(make_fx(gradient)(leaf())(leaf(W1)), reference(gradient, leaf(W1)))


def flop_counter_mode():
    with without_fast(), FlopCounterMode(display=False) as counter:
        grad(f(W := leaf()), W)
    assert counter.get_total_flops() == 2 * 2 * X.numel() * len(B)


def vmap():
    both = torch.stack([W0, W1])
    close(torch.func.vmap(f)(both), torch.stack([reference(f, W0), reference(f, W1)]))


def func_grad():
    close(torch.func.grad(f)(W0), reference(lambda W: grad(f(W), W)[0], leaf()))


def func_jvp():
    found = torch.func.jvp(f, (W0,), (V,))[1]
    close(found, (reference(lambda W: grad(f(W), W)[0], leaf()) * V).sum())


def func_hessian():
    close(torch.func.hessian(f)(W0), reference(torch.autograd.functional.hessian, f, W0))


FORWARD = [
    *(compile_, export, jit_trace, dual_tensors, subclasses, fake_tensors, meta_tensors),
    *(autocast, negative_views, make_fx_with_real_tensors, make_fx_over_both),
    *(flop_counter_mode, vmap, func_grad, func_jvp, func_hessian),
]


@pytest.mark.parametrize("context", FORWARD)
def test_a_context_of_the_forward(context):
    context()


@pytest.mark.parametrize("context", FORWARD)
def test_an_unrecognized_context_of_the_forward_is_noticed(context, monkeypatch):
    monkeypatch.setattr(functional, "is_plain", lambda *_, **__: True)
    if context is export:  # it replaces min and max, and Numba would keep the replacements
        monkeypatch.setattr(fused, "_compiled", None)
    with pytest.raises(Exception):  # noqa: B017  an AssertionError or an error of PyTorch
        context()


# ------------------------------------- contexts of a backward, whose forward was plain


def per_component(W):
    """Losses and activations without a reduction."""
    z = nnce.linear(X, W, B)
    C = nnce.sigmoid_cross_entropy(z, Y, weight=PER_COMPONENT, reduction="none")
    return C + nnce.sigmoid_quadratic(z, Y, reduction="none") + nnce.sigmoid(z)


UPSTREAM = _random(4, 5, seed=7)


def plain_forward(W=W0):
    W = leaf(W)
    with recorded() as called:
        C = per_component(W)
    assert {"_apply_linear", "_apply_sigmoid", "_apply_loss", "forward"} == called
    return C, W


def backward_by_hand(upstream):
    with composed():
        return grad(per_component(W := leaf()), W, upstream)[0]


def dual_upstream_gradient():
    C, W = plain_forward()
    direction = _random(4, 5, seed=8)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(UPSTREAM, direction)
        primal, tangent = forward_ad.unpack_dual(grad(C, W, upstream)[0])
    close(primal, backward_by_hand(UPSTREAM))
    close(tangent, backward_by_hand(direction))


def make_fx_over_a_backward():
    C, W = plain_forward()
    graph = make_fx(lambda upstream: grad(C, W, upstream, retain_graph=True)[0])(UPSTREAM)
    close(graph(2 * UPSTREAM.flip(0)), backward_by_hand(2 * UPSTREAM.flip(0)))


def is_grads_batched():
    C, W = plain_forward()
    both = torch.stack([UPSTREAM, UPSTREAM.flip(0)])
    found = grad(C, W, both, is_grads_batched=True)[0]
    close(found, torch.stack([backward_by_hand(u) for u in both]))


def vmap_over_a_backward():
    C, W = plain_forward()
    both = torch.stack([UPSTREAM, UPSTREAM.flip(0)])
    found = torch.func.vmap(lambda upstream: grad(C, W, upstream, retain_graph=True)[0])(both)
    close(found, torch.stack([backward_by_hand(u) for u in both]))


def jacobian_vectorized():
    found = torch.autograd.functional.jacobian(per_component, W0, vectorize=True)
    close(found, reference(torch.autograd.functional.jacobian, per_component, W0))


def create_graph():
    for function in (f, lambda W: (per_component(W) * UPSTREAM).sum()):

        def second(W, function=function):
            (first,) = grad(function(W), W, create_graph=True)
            return first.detach(), grad((first * V).sum(), W)[0]

        for found, wanted in zip(second(leaf()), reference(second, leaf()), strict=True):
            close(found, wanted)


def create_graph_where_y_is_computed_from_z():
    """The gradient with respect to z, not that by way of y."""

    def second(z):
        C = nnce.sigmoid_cross_entropy(z, z.detach().sigmoid(), pos_weight=PER_COMPONENT)
        (first,) = grad(C, z, create_graph=True)
        return grad(first.square().sum(), z)[0]

    close(second(leaf(Y)), reference(second, leaf(Y)))


def flop_counter_mode_over_a_backward():
    C, W = plain_forward()
    with without_fast(), FlopCounterMode(display=False):
        found = grad(C, W, UPSTREAM)[0]
    close(found, backward_by_hand(UPSTREAM))


def subclass_upstream():
    C, W = plain_forward()
    with recorded() as called:
        found = grad(C, W, UPSTREAM.as_subclass(Subclass))[0]
    assert not called & {"backward", "sigmoid_backward"}
    close(found.as_subclass(torch.Tensor), backward_by_hand(UPSTREAM))


def compiled_autograd():
    """A backward that dynamo compiles; its name is not public."""
    C, W = plain_forward()
    whole = f(V1 := leaf())
    compiled = torch.compile(backend="aot_eager")
    with warnings.catch_warnings(), without_fast():
        warnings.simplefilter("ignore")  # of PyTorch's own look at the .grad of each tensor
        with torch._dynamo.compiled_autograd._enable(compiled):
            C.backward(UPSTREAM)
            whole.backward()
    close(W.grad, backward_by_hand(UPSTREAM))
    close(V1.grad, reference(lambda W: grad(f(W), W)[0], leaf()))


BACKWARD = [
    *(dual_upstream_gradient, make_fx_over_a_backward, is_grads_batched, vmap_over_a_backward),
    *(
        compiled_autograd,
        jacobian_vectorized,
        create_graph,
        create_graph_where_y_is_computed_from_z,
    ),
    *(flop_counter_mode_over_a_backward, subclass_upstream),
]


@pytest.mark.parametrize("context", BACKWARD)
def test_a_context_of_the_backward(context):
    context()


@pytest.mark.parametrize(
    ("context",),
    slow_unless(lambda context: context is not compiled_autograd, [(one,) for one in BACKWARD]),
)
def test_an_unrecognized_context_of_the_backward_is_noticed(context, monkeypatch):
    monkeypatch.setattr(functional, "_is_plain_backward", lambda *_, **__: True)
    with pytest.raises(Exception):  # noqa: B017  an AssertionError or an error of PyTorch
        context()


# ------------------------------------------------------- contexts that keep the fast path


def _check_fast(step, W):
    """A step gives the gradients of the composed form, by the fast functions alone."""
    with recorded() as called:
        found = step(W)
    assert called == {name for _, name in FAST}, called
    close(found, reference(lambda W: grad(f(W), W)[0], leaf(W.detach())))


def saved_tensors_hooks():
    packed = []

    def pack(t):
        packed.append(t)
        return t.clone()

    def step(W):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            C = f(W)
        return grad(C, W)[0]

    _check_fast(step, leaf())
    assert len(packed) >= 8


def autocast_around_a_backward():
    """The forward has chosen the dtypes, and the kernels of a backward compute in them."""

    def step(W):
        C = f(W)
        with torch.autocast("cpu", torch.bfloat16):
            return grad(C, W)[0]

    _check_fast(step, leaf())


def non_reentrant_checkpoint():
    _check_fast(lambda W: grad(checkpoint(f, W, use_reentrant=False), W)[0], leaf())


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.W = torch.nn.Parameter(W0.clone())

    def forward(self, _):
        return f(self.W)


def functional_call():
    network = Network()
    _check_fast(lambda W: grad(torch.func.functional_call(network, {"W": W}, X), W)[0], leaf())


def data_parallel(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("PyTorch without torch.distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        network = Network()
        parallel = torch.nn.parallel.DistributedDataParallel(network)

        def step(W):
            parallel(X).backward()
            return W.grad

        _check_fast(step, network.W)
    finally:
        torch.distributed.destroy_process_group()


def parameters():
    _check_fast(lambda W: grad(f(W), W)[0], torch.nn.Parameter(W0.clone()))


@pytest.mark.parametrize(
    "context",
    [
        saved_tensors_hooks,
        autocast_around_a_backward,
        non_reentrant_checkpoint,
        functional_call,
        data_parallel,
        parameters,
    ],
)
@pytest.mark.parametrize("mistake", [None, "forward", "backward"])
def test_contexts_that_stay_fast(context, mistake, monkeypatch, tmp_path):
    run = (lambda: context(tmp_path)) if context is data_parallel else context
    if mistake is None:
        return run()
    name = {"forward": "is_plain", "backward": "_is_plain_backward"}[mistake]
    monkeypatch.setattr(functional, name, lambda *_, **__: False)
    with pytest.raises(AssertionError):
        run()


def test_without_gradients_a_pass_is_called_directly():
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), recorded() as called:
            found = nnce.sigmoid_cross_entropy(W0, W1.sigmoid())
        assert called == {"forward"}
        close(found, reference(nnce.sigmoid_cross_entropy, W0, W1.sigmoid()))


def test_values_are_on_the_device_of_the_logits_whatever_the_default_is():
    z, y = torch.tensor([0.5, -1.0], requires_grad=True), torch.tensor([1.0, -7.0])
    expected = nnce.sigmoid_cross_entropy(z, y, ignore_index=-7)
    with torch.device("meta"):
        C = nnce.sigmoid_cross_entropy(z, y, ignore_index=-7)
        C.backward()
    assert C.device == z.grad.device == z.device and torch.equal(C, expected)
