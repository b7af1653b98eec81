"""One test for each use of PyTorch's private API: it says what it is taken to say."""

import pickle
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from nnce import _torch_private


def test_forward_mode_levels():
    seen = []

    def f(x):
        seen.append(_torch_private.forward_mode_levels())
        return x * x

    def jvp(x):
        return torch.func.jvp(f, (x,), (torch.ones(()),))[1]

    x = torch.tensor(3.0)
    f(x), jvp(x), torch.func.jvp(jvp, (x,), (torch.ones(()),)), torch.func.grad(f)(x)
    assert seen == [0, 1, 2, 0]


def test_in_functorch_transform():
    seen = []

    def f(x):
        seen.append(_torch_private.in_functorch_transform())
        return x.sum()

    f(torch.ones(2)), torch.func.grad(f)(torch.ones(2)), torch.func.vmap(f)(torch.ones(2, 2))
    assert seen == [False, True, True]


def test_is_functorch_tensor():
    seen = []

    def f(x):
        seen.append(_torch_private.is_functorch_tensor(x))
        return x.sum()

    f(torch.ones(2)), torch.func.vmap(f)(torch.ones(2, 2)), torch.func.grad(f)(torch.ones(2))
    assert seen == [False, True, True]


def test_is_batched_gradient():
    seen = []
    x = torch.ones(3, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda g: seen.append(_torch_private.is_batched_gradient(g)))
    torch.autograd.grad(y, x, torch.ones(3), retain_graph=True)
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True)
    assert seen == [False, True]


def test_dispatches_plainly_in_no_other_context():
    seen = {}

    def f(x, name):
        seen[name] = _torch_private.dispatches_plainly([])
        return 2 * x

    x = torch.ones(2, 2, requires_grad=True)
    f(x, "plain")
    with torch.no_grad():
        f(x, "no_grad")
    with torch.inference_mode():
        f(x, "inference_mode")
    with torch.device("meta"):
        f(x, "a default device")
    with FlopCounterMode(display=False):
        f(x, "dispatch mode")
    with torch.autograd.forward_ad.dual_level():
        f(x, "forward mode")
    make_fx(lambda x: f(x, "make_fx"))(x)
    torch.func.vmap(lambda x: f(x, "vmap"))(x)
    torch.func.grad(lambda x: f(x, "grad").sum())(x)
    torch.func.functionalize(lambda x: f(x, "functionalize"))(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        torch.jit.trace(lambda x: f(x, "jit.trace"), x, check_trace=False)
    y = x.sum(0)
    y.register_hook(lambda g: f(g, "is_grads_batched"))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    f(x, "plain afterwards")
    plain = {"plain", "no_grad", "inference_mode", "a default device", "plain afterwards"}
    assert {name for name, nothing in seen.items() if nothing} == plain and len(seen) == 13


def test_dispatches_plainly_for_no_other_tensor():
    x = torch.ones(2, 2)
    with torch.inference_mode():
        inference = torch.ones(2)
    for tensor in (x, x[0], x.T, torch.nn.Parameter(x), (2 * x.requires_grad_()), inference):
        assert _torch_private.dispatches_plainly([tensor])
    seen = []
    torch.func.vmap(lambda t: seen.append(t) or t)(x)
    torch.func.grad(lambda t: seen.append(t) or t.sum())(x)
    y = x.sum(0)
    y.register_hook(lambda g: seen.append(g))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    with FakeTensorMode() as mode:
        seen.append(mode.from_tensor(torch.ones(2)))
    seen += [torch.complex(x, x).conj().imag, x.to("meta"), x.detach().to_sparse()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        seen += [torch.quantize_per_tensor(x.detach(), 1, 0, torch.qint8)]
    assert len(seen) == 8 and not any(_torch_private.dispatches_plainly([x, t]) for t in seen)


def test_single_level_apply():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    x = torch.tensor(3.0, requires_grad=True)
    y = _torch_private.single_level_apply(Square)(x)
    y.backward()
    assert y == 9 and x.grad == 6


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_optimizers_without_dynamo(kind, monkeypatch):
    """The bits of their steps are in test_training.py; here, that all else is PyTorch's."""
    breaks, hooks = [], []
    monkeypatch.setattr(torch._dynamo, "graph_break", lambda: breaks.append(1))
    w = torch.ones(2, requires_grad=True)
    optimizer, theirs = getattr(_torch_private, kind)([w], lr=0.5), getattr(torch.optim, kind)
    assert isinstance(optimizer, theirs)
    optimizer.register_step_pre_hook(lambda *_: hooks.append("pre"))
    optimizer.register_step_post_hook(lambda *_: hooks.append("post"))
    w.grad = torch.ones(2)
    optimizer.step()
    assert hooks == ["pre", "post"] and torch.allclose(w, torch.full((2,), 0.5))
    optimizer.zero_grad(set_to_none=False)
    assert (w.grad == 0).all()
    optimizer.zero_grad()
    assert w.grad is None and not breaks
    theirs([w], lr=0.5).step()
    assert breaks
    again = pickle.loads(pickle.dumps(getattr(_torch_private, kind)([w], lr=0.25)))
    (group,) = again.param_groups
    assert group["lr"] == 0.25 and torch.equal(group["params"][0], w)


def test_assert_later():
    _torch_private.assert_later(torch.tensor(True))
    with pytest.raises(RuntimeError):  # on a CPU at once
        _torch_private.assert_later(torch.tensor(False))


def test_below_autograd():
    x = torch.ones(2, requires_grad=True)
    with _torch_private.below_autograd():
        assert not (2 * x).requires_grad
    assert (2 * x).requires_grad


def test_version():
    x = torch.zeros(2)
    before = _torch_private.version(x)
    x[0] = 1
    assert _torch_private.version(x) > before


def test_owner():
    x = torch.zeros(4)
    assert _torch_private.owner(x) is x and _torch_private.owner(x[1:][1:]) is x


def test_uncoalesced():
    """Pairs that stand twice are given as they are, which `indices()` refuses."""
    rows, values = torch.tensor([[0, 0], [1, 1]]), torch.tensor([1.0, 2.0])
    target = torch.sparse_coo_tensor(rows, values, (2, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match="uncoalesced"):
        target.indices()
    found = _torch_private.uncoalesced(target)
    assert torch.equal(found[0], rows) and torch.equal(found[1], values)


def test_register_collate():
    class Example:
        pass

    _torch_private.register_collate(Example, lambda batch, *, collate_fn_map=None: len(batch))
    assert default_collate([Example(), Example()]) == 2


def test_keeps_missing():
    class Scaled(_torch_private.KeepsMissing):
        may_be_missing = ("scale", "shift")

        def __init__(self, scale):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.register_buffer("scale", torch.tensor(scale))
            self.register_buffer("shift", None)

    nested = torch.nn.Sequential(Scaled(2.0), Scaled(3.0))
    nested.load_state_dict(given := {f"{i}.weight": torch.tensor([5.0]) for i in range(2)})
    assert len(given) == 2
    assert [m.scale.item() for m in nested] == [2, 3] and (nested[1].weight == 5).all()
    nested[0].load_state_dict({"weight": torch.zeros(1), "scale": torch.tensor(4.0)})
    assert nested[0].scale == 4
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        nested[0].load_state_dict({})


def test_hooks():
    module, parameter = torch.nn.Linear(2, 1), torch.nn.Parameter(torch.ones(1))
    assert _torch_private.hooks_of(module) == _torch_private.tensor_hooks_of(parameter) == []
    hooks = [lambda *_: None for _ in range(6)]
    module.register_forward_hook(hooks[0])
    module.register_forward_pre_hook(hooks[1])
    module.register_full_backward_hook(hooks[2])
    module.register_full_backward_pre_hook(hooks[3])
    assert _torch_private.hooks_of(module) == hooks[:4]
    parameter.register_hook(hooks[4])
    parameter.register_post_accumulate_grad_hook(hooks[5])
    assert _torch_private.tensor_hooks_of(parameter) == hooks[4:]


def test_checkpoint_stage():
    seen = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(_torch_private.checkpoint_stage())
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    x = torch.tensor(3.0, requires_grad=True)
    Square.apply(x)
    checkpoint(Square.apply, x, use_reentrant=False).backward()
    assert seen == [None, "forward", "recomputation"]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        Square.apply(x)
    assert seen[-1] is None and x.grad == 6
