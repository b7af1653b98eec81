import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import math
import pickle
import threading
import weakref

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter

import nnce
from nnce import rules
from nnce.algorithm import backprop
from nnce.monitoring import saturation
from nnce.monitoring.watching import watch

FIGURES = ("dz_norm", "sigmoid_prime", "saturated", "slowdown")


class Functional(nn.Module):
    """Two layers of sigmoids without a module of theirs."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return torch.sigmoid(self.two(nn.functional.sigmoid(self.one(x))))


def sequential():
    return nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3), nn.Sigmoid())


def logits():
    return nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3))


def mlp():
    return nnce.MLP((4, 6, 3))


def half_squares(a, y):
    return 0.5 * (a - y).square().sum() / len(a)


def cross_entropy(a, y):
    return nn.functional.binary_cross_entropy(a, y, reduction="sum") / len(a)


MODELS = {
    "torch.nn, quadratic": (sequential, half_squares, "quadratic", None),
    "torch.nn, BCELoss": (sequential, cross_entropy, "cross-entropy", None),
    "functional": (Functional, half_squares, "quadratic", None),
    "logits": (logits, nnce.sigmoid_cross_entropy, "cross-entropy", True),
    "MLP": (mlp, nnce.sigmoid_cross_entropy, "cross-entropy", None),
    "MLP, quadratic": (mlp, nnce.sigmoid_quadratic, "quadratic", None),
}


@pytest.fixture
def examples(generator):
    x = 3 * torch.randn(20, 4, generator=generator)
    return x, torch.randint(2, (20, 3), generator=generator).float()


@pytest.fixture
def logged(tmp_path):
    """A writer, and a function that reads what it wrote."""
    writer = SummaryWriter(str(tmp_path))

    def read():
        writer.flush()
        events = EventAccumulator(str(tmp_path)).Reload()
        return {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        }

    yield writer, read
    writer.close()


def step(model, loss, x, y):
    model.zero_grad()
    loss(model(x), y).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_watch_sees_what_backprop_sees(name, examples, logged):
    """The figures of a watched model are those of the revised algorithm on the same parameters."""
    make, loss, kind, with_logits = MODELS[name]
    torch.manual_seed(0)
    model = make()
    writer, read = logged
    with watch(model, writer, every=1, logits=with_logits):
        step(model, loss, *examples)
    x, y = examples
    parameters = list(model.parameters())
    one_pass = backprop(list(zip(parameters[::2], parameters[1::2], strict=True)), x, y, loss=kind)
    with torch.no_grad():
        wrong = ((one_pass.a[-1] - y).abs() > 0.5).any(-1)
        assert 0 < wrong.sum() < len(x)
        da = rules.da_prev(one_pass.dz[1], parameters[2])
        slow, fast = (
            rule(one_pass.z[-1], y)[wrong] for rule in (rules.dz_quadratic, rules.dz_cross_entropy)
        )
    meters = (one_pass.dz[0].norm() / da.norm(), slow.norm() / fast.norm())
    scalars = read()
    assert set(scalars) == {f"{what}/layer{n}" for what in FIGURES for n in (1, 2)}
    for number, (z, dz, meter) in enumerate(
        zip(one_pass.z, one_pass.dz, meters, strict=True), start=1
    ):
        prime = rules.sigmoid_prime(z)
        expected = {
            "dz_norm": dz.norm(dim=-1).mean() / len(x),  # of C as the code averages it
            "sigmoid_prime": prime.mean(),
            "saturated": (prime < saturation.SATURATED).float().mean(),
            "slowdown": meter,
        }
        for what, value in expected.items():
            ((at, seen),) = scalars[f"{what}/layer{number}"]
            assert at == 0 and seen == pytest.approx(value.item(), rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_watch_does_not_change_the_gradients_and_goes_without_a_trace(name, examples, logged):
    make, loss, _, with_logits = MODELS[name]
    torch.manual_seed(0)
    model = make()
    before = step(model, loss, *examples)
    watcher = watch(model, logged[0], every=1, logits=with_logits)
    watched = step(model, loss, *examples)
    watcher.remove()
    after = step(model, loss, *examples)
    for a, b, c in zip(before, watched, after, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._forward_hooks_always_called and not module._backward_hooks
    assert torch.overrides._len_torch_function_stack() == 0
    assert watcher.step == 1


def test_watch_logs_every_so_many_training_steps(examples, logged):
    writer, read = logged
    model = sequential()
    watcher = watch(model, writer, every=3)
    x, y = examples
    for _ in range(7):
        step(model, half_squares, x, y)
        with torch.no_grad():
            model(x)
        model.eval()
        model(x)
        model.train()
    assert watcher.step == 7
    assert [at for at, _ in read()["dz_norm/layer1"]] == [0, 3, 6]


def test_a_pass_without_backward_leaves_a_gap(examples, logged):
    writer, read = logged
    model = sequential()
    with watch(model, writer, every=1):
        model(examples[0])
        step(model, half_squares, *examples)
    assert [at for at, _ in read()["slowdown/layer2"]] == [1]


def test_watch_survives_a_forward_that_raises(examples, logged):
    model = sequential()
    with watch(model, logged[0], every=1):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.ones(2, 5))
        assert torch.overrides._len_torch_function_stack() == 0
        step(model, half_squares, *examples)


def test_watch_tells_saturation_where_bceloss_is_blind(logged):
    """A neuron that is wrong at z = 40 has no gradient left, but da still says which way."""
    writer, read = logged
    model = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid())
    with torch.no_grad():
        model[0].weight.fill_(20.0)
        model[0].bias.fill_(20.0)
    with watch(model, writer, every=1):
        step(model, cross_entropy, torch.ones(1, 1), torch.zeros(1, 1))
    scalars = read()
    assert scalars["dz_norm/layer1"] == [(0, 0.0)] and scalars["saturated/layer1"] == [(0, 1.0)]
    ((_, meter),) = scalars["slowdown/layer1"]
    assert meter == pytest.approx(math.exp(-40), rel=1e-5)


def test_a_binary_classifier_that_returns_one_number_an_example(examples, logged):
    """Squeezed before or after the sigmoid, the output layer is the same."""

    class Binary(nn.Module):
        def __init__(self, early):
            super().__init__()
            self.linear, self.early = nn.Linear(4, 1), early

        def forward(self, x):
            z = self.linear(x)
            return torch.sigmoid(z.squeeze(-1)) if self.early else torch.sigmoid(z).squeeze(-1)

    writer, read = logged
    x, y = examples[0], examples[1][:, 0]
    for step_, early in enumerate((True, False)):
        torch.manual_seed(0)
        model = Binary(early)
        watcher = watch(model, writer, every=1)
        watcher.step = step_
        step(model, cross_entropy, x, y)
    z = model.linear(x).detach()
    a = z.sigmoid()
    wrong = ((a - y[:, None]).abs() > 0.5).squeeze()
    dz = a - y[:, None]
    meter = (dz * a * (1 - a))[wrong].norm() / dz[wrong].norm()
    scalars = read()
    assert [value for _, value in scalars["slowdown/layer1"]] == pytest.approx([meter.item()] * 2)
    norm = dz.abs().mean().item() / len(x)
    assert [value for _, value in scalars["dz_norm/layer1"]] == pytest.approx([norm] * 2)


def test_an_output_among_others_is_the_output_layer(examples, logged):
    class Several(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.layers, self.kind = sequential(), kind

        def forward(self, x):
            a = self.layers(x)
            return {"a": a, "x": x} if self.kind is dict else (x, a)

    writer, read = logged
    x, y = examples
    for at, kind in enumerate((dict, tuple)):
        torch.manual_seed(0)
        model = Several(kind)
        watch(model, writer, every=1).step = at
        output = model(x)
        half_squares(output["a"] if kind is dict else output[1], y).backward()
    torch.manual_seed(0)
    model = sequential()
    watch(model, writer, every=1).step = 2
    step(model, half_squares, x, y)
    several, other, alone = (value for _, value in read()["slowdown/layer2"])
    assert several == other == alone


def test_transforms_and_compiled_passes_go_by_unwatched(examples, logged):
    writer, read = logged
    model = sequential()
    x, y = examples
    parameters = dict(model.named_parameters())

    def loss(parameters, x, y):
        return half_squares(torch.func.functional_call(model, parameters, (x,)), y)

    expected = torch.func.grad(loss)(parameters, x, y)
    with watch(model, writer, every=1):
        gradients = torch.func.grad(loss)(parameters, x, y)
        torch.func.vmap(model)(x)
        torch.compile(model, backend="eager")(x)
    assert all(torch.equal(gradients[name], expected[name]) for name in parameters)
    assert read() == {}


def test_a_copy_of_a_watched_model_is_not_watched(examples, logged):
    writer, read = logged
    model = mlp()
    with watch(model, writer, every=1):
        step(model, nnce.sigmoid_cross_entropy, *examples)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            step(again, nnce.sigmoid_cross_entropy, *examples)
        step(model, nnce.sigmoid_cross_entropy, *examples)
    assert [at for at, _ in read()["dz_norm/layer1"]] == [0, 1]


def test_watch_holds_no_graph_after_the_backward_pass(examples, logged):
    model = sequential()
    seen = []
    for layer in model:
        layer.register_forward_hook(lambda module, x, value: seen.append(weakref.ref(value)))
    with watch(model, logged[0], every=100):
        step(model, half_squares, *examples)
        assert len(seen) == 4 and not any(value() is not None for value in seen)


def test_watch_refuses_a_model_without_sigmoids(examples, logged):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    watch(model, logged[0])
    with pytest.raises(ValueError, match=r"expected a model with sigmoids, .* logits=True"):
        model(examples[0])
    assert model(examples[0]).shape == (20, 3)  # nothing is left of the watcher


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model", "writer", {"every": 0}), ValueError, "at least 1, got 0"),
        (("model", "writer", {"every": 2.5}), ValueError, "whole number of at least 1, got 2.5"),
        ((lambda x: x, "writer", {}), TypeError, "torch.nn.Module to watch, got function"),
        (("model", "writer", {"name": 3}), TypeError, "name to be a string or None, got int"),
        (("model", "runs/mine", {}), TypeError, "expected a writer with add_scalar, got str"),
    ],
)
def test_bad_arguments_of_watch(arguments, error, message, logged):
    model, writer, options = arguments
    with pytest.raises(error, match=message):
        watch(
            sequential() if model == "model" else model,
            logged[0] if writer == "writer" else writer,
            **options,
        )


def test_watch_refuses_a_compiled_model(logged):
    with pytest.raises(ValueError, match="a model that is not compiled"):
        watch(torch.compile(sequential(), backend="eager"), logged[0])


def test_watch_refuses_logits_that_are_no_tensor(logged):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x), x

    model = Pair()
    with watch(model, logged[0], logits=True), pytest.raises(TypeError, match="got tuple"):
        model(torch.ones(2, 4))


# ----------------------------------------------- odd models, against an ordinary one of the same C


class Recorder:
    """Stands for a SummaryWriter: each point of each curve, as often as it was written."""

    def __init__(self):
        self.curves = {}

    def add_scalar(self, tag, value, at):
        self.curves.setdefault(tag, []).append((at, value))

    def steps(self, tag):
        return [at for at, _ in self.curves[tag]]


class Model(nn.Module):
    """What a function of the module and x makes of two linear layers, the same in every model."""

    def __init__(self, forward):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.one, self.two, self.sigmoid = nn.Linear(4, 6), nn.Linear(6, 3), nnce.Sigmoid()
        self._forward = forward

    def forward(self, *arguments):
        return self._forward(self, *arguments)


def ordinary(model, x):
    return torch.sigmoid(model.two(torch.sigmoid(model.one(x))))


def curves(forward, x, loss, every=1, steps=1):
    """The curves of a watched model, and its gradients; its hooks and PyTorch's stack are clean."""
    model, recorder = Model(forward), Recorder()
    watcher = watch(model, recorder, every=every)
    for _ in range(steps):
        model.zero_grad()
        loss(model(x)).backward()
    assert watcher.step == steps
    watcher.remove()
    assert_clean(model)
    return recorder.curves, [p.grad for p in model.parameters()]


def assert_clean(model):
    assert torch.overrides._len_torch_function_stack() == 0
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def assert_alike(seen, expected):
    """Curves to the last bit, and gradients too."""
    assert seen[0] == expected[0] and "slowdown/layer2" in seen[0]
    for one, other in zip(seen[1], expected[1], strict=True):
        assert torch.equal(one, other)


def in_place(model, x):
    return model.two(model.one(x).sigmoid_()).sigmoid_()


def in_place_function(model, x):
    return torch.sigmoid_(input=model.two(torch.sigmoid_(model.one(x))))


def in_place_on_views(model, x):
    hidden = model.one(x)
    hidden.view(-1, 6).sigmoid_()
    return model.two(hidden).squeeze().sigmoid_()


def overwritten_later(model, x):
    """In both layers z is another by the time that the forward pass is over."""
    z1 = model.one(x)
    z2 = model.two(torch.sigmoid(z1))
    a2 = torch.sigmoid(z2)
    with torch.no_grad():
        z1.add_(5)
    z2.zero_()
    return a2


def checkpointed(model, x):
    hidden = checkpoint(lambda x: model.one(x).sigmoid_(), x, use_reentrant=False)
    return torch.sigmoid(model.two(hidden))


def with_gradients_off(model, x):
    z = model.one(x)
    with torch.no_grad():
        torch.sigmoid(z)
        model.sigmoid(z)
    return torch.sigmoid(model.two(torch.sigmoid(z)))


@pytest.mark.parametrize(
    "forward",
    [
        in_place,
        in_place_function,
        in_place_on_views,
        overwritten_later,
        checkpointed,
        with_gradients_off,
    ],
)
def test_layers_are_those_of_the_ordinary_model(forward, examples):
    x, y = examples
    expected = curves(ordinary, x, lambda a: half_squares(a, y))
    assert_alike(curves(forward, x, lambda a: half_squares(a, y)), expected)


def test_a_part_of_z_is_overwritten_in_place(examples):
    x, y = examples

    def overwritten(model, x):
        z = model.two(torch.sigmoid(model.one(x)))
        z[:, :2].sigmoid_()
        return z

    def joined(model, x):
        z = model.two(torch.sigmoid(model.one(x)))
        return torch.cat([torch.sigmoid(z[:, :2]), z[:, 2:]], 1)

    seen, expected = (
        curves(forward, x, lambda a: half_squares(a, y)) for forward in (overwritten, joined)
    )
    assert_alike(seen, expected)


def test_the_error_of_an_in_place_operation_is_pytorchs_own():
    model = Model(lambda model, x: model.one.weight.sigmoid_())
    with watch(model, Recorder()), pytest.raises(RuntimeError, match="a leaf Variable"):
        model(torch.ones(2, 4))
    assert_clean(model)


Pair = collections.namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Answer:
    value: object
    text: str = "none"


OUTPUTS = {
    "clamped": (lambda a: a.clamp(1e-7, 1 - 1e-7), lambda out: out),
    "clamped by two": (lambda a: a.clip(min=1e-7).clamp_max(1.0), lambda out: out),
    "sliced": (lambda a: (a[:, :1], a[:, 1:]), lambda out: torch.cat(out, 1)),
    "taken apart": (lambda a: a.unbind(1), lambda out: torch.stack(out, 1)),
    "indexed": (lambda a: a[:, [0, 1, 2]], lambda out: out),
    "split": (lambda a: list(a.split(1, 1)), lambda out: torch.cat(out, 1)),
    "reshaped": (lambda a: a.T.reshape(3, 1, -1)[:, 0].contiguous().T, lambda out: out),
    "cast": (lambda a: a.double(), lambda out: out.float()),
    "joined": (lambda a: torch.cat([a, torch.zeros_like(a)], 1), lambda out: out[:, :3]),
    "copied": (lambda a: torch.empty_like(a).copy_(a), lambda out: out),
    "nested": (lambda a: {"it": [("x", {"a": a})]}, lambda out: out["it"][0][1]["a"]),
    "namedtuple": (lambda a: Pair(None, a), lambda out: out.second),
    "dataclass": (lambda a: Answer([Answer(a)]), lambda out: out.value[0].value),
    "detached": (lambda a: Pair(a.sum(), (1 * a, a.detach())), lambda out: out.second[0]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_in_another_form_is_the_output_layer(name, examples):
    form, back = OUTPUTS[name]
    x, y = examples
    expected = curves(ordinary, x, lambda a: half_squares(a, y))
    seen = curves(
        lambda model, x: form(ordinary(model, x)), x, lambda out: half_squares(back(out), y)
    )
    assert seen[0].keys() == expected[0].keys()
    for tag, points in expected[0].items():
        ((_, value),), ((_, one),) = points, seen[0][tag]
        assert one == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    "gate",
    [
        lambda a, z: a * z.tanh(),  # as in an LSTM
        lambda a, z: 1 - a,
        lambda a, z: nn.functional.linear(a, torch.eye(3)),
    ],
)
def test_a_layer_that_the_output_is_only_computed_from_is_hidden(gate, examples):
    """The slowdown of a hidden layer is that of the gradient, whatever its examples' errors."""
    came = {}

    def forward(model, x):
        z = model.two(torch.sigmoid(model.one(x)))
        a = torch.sigmoid(z)
        a.register_hook(lambda da: came.update(da=da))
        came["z"] = z.detach()
        return gate(a, came["z"])

    seen, _ = curves(forward, examples[0], lambda a: half_squares(a, examples[1]))
    expected = saturation.slowdown(came["da"], came["z"])
    assert seen["slowdown/layer2"] == [(0, pytest.approx(expected, rel=1e-6))]


def test_reentrant_checkpointing_is_passed_over_as_the_docstring_says(examples):
    x, y = examples

    def forward(model, x):
        hidden = checkpoint(lambda x: torch.sigmoid(model.one(x)), x, use_reentrant=True)
        return torch.sigmoid(model.two(hidden))

    def loss(a):
        return half_squares(a, y)

    expected, gradients = curves(ordinary, x, loss)
    seen = curves(forward, x.clone().requires_grad_(), loss)
    assert seen[0] == {f"{what}/layer1": expected[f"{what}/layer2"] for what in FIGURES}
    assert all(torch.equal(one, other) for one, other in zip(seen[1], gradients, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_that_is_checkpointed_as_a_whole_is_seen(reentrant, examples):
    x, y = examples
    expected, _ = curves(ordinary, x, lambda a: half_squares(a, y))
    model, recorder = Model(ordinary), Recorder()
    with watch(model, recorder, every=1) as watcher:
        out = checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)
        half_squares(out, y).backward()
    assert_clean(model)
    assert recorder.curves == expected and watcher.step == (1 if reentrant else 2)


def test_a_model_that_calls_itself_makes_one_pass(examples):
    x, y = examples

    def calls_itself(model, x, outermost=True):
        if not outermost:
            return torch.sigmoid(model.one(x))
        return torch.sigmoid(model.two(model(x, False)))

    def loss(a):
        return half_squares(a, y)

    for every in (1, 2):
        expected = curves(ordinary, x, loss, every=every, steps=3)
        assert_alike(curves(calls_itself, x, loss, every=every, steps=3), expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_model_that_calls_itself_and_raises(error, examples):
    """Caught by the model, it leaves one pass; uncaught, none. KeyboardInterrupt calls no hooks."""
    x, y = examples

    def catches(model, x, outermost=True):
        if not outermost:
            raise error
        a = torch.sigmoid(model.one(x))
        with contextlib.suppress(error):
            model(x, False)
        return torch.sigmoid(model.two(a))

    def raises(model, x, outermost=True):
        if not outermost:
            raise error
        return torch.sigmoid(model(x, False))

    model, recorder = Model(catches), Recorder()
    with watch(model, recorder, every=1):
        half_squares(model(x), y).backward()
    assert_clean(model)
    if error is ValueError:
        assert recorder.curves == curves(ordinary, x, lambda a: half_squares(a, y))[0]
    model = Model(raises)
    with watch(model, Recorder()), contextlib.suppress(error):
        model(x)
    assert_clean(model)


def test_ctrl_c_in_a_forward_pass_does_not_end_the_watch(examples):
    x, y = examples
    model, recorder = Model(ordinary), Recorder()

    def interrupt(*_):
        raise KeyboardInterrupt

    with watch(model, recorder, every=2) as watcher:
        for _ in range(2):  # at a step that is logged, and at one that is not
            handle = model.two.register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(x)
            handle.remove()
            step(model, half_squares, x, y)
            assert torch.overrides._len_torch_function_stack() == 0
            watcher.step += 1
    assert recorder.steps("dz_norm/layer2") == [4]  # 0 and 3 were interrupted, 1 is odd
    assert_clean(model)


@pytest.mark.parametrize("raises", [False, True])
def test_the_watch_ends_within_a_forward_pass(raises, examples):
    x, _ = examples

    def forward(model, x):
        watchers[0].remove()
        if raises:
            raise ValueError("mine")
        return ordinary(model, x)

    model, recorder = Model(forward), Recorder()
    watchers = [watch(model, recorder)]
    for _ in range(2):
        with pytest.raises(ValueError, match="mine") if raises else contextlib.nullcontext():
            model(x).sum().backward()
        assert torch.overrides._len_torch_function_stack() == 0
    assert_clean(model)
    assert recorder.curves == {}


def in_threads(functions):
    """Call them at once, each in a thread, and raise what they raise."""
    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        for future in [pool.submit(function) for function in functions]:
            future.result()


def test_threads_that_share_a_model_make_a_pass_each(generator):
    """All are in the forward pass at once, and all are before any goes backward."""
    together = threading.Barrier(3, timeout=60)

    def meeting(model, x):
        together.wait()
        a = torch.sigmoid(model.one(x))
        together.wait()
        a = torch.sigmoid(model.two(a))
        together.wait()
        return a

    model, recorder = Model(meeting), Recorder()
    inputs = [3 * torch.randn(20, 4, generator=generator) for _ in range(3)]
    y = torch.randint(2, (20, 3), generator=generator).float()

    def train(x):
        for _ in range(4):
            loss = half_squares(model(x), y)
            together.wait()
            torch.autograd.grad(loss, list(model.parameters()))
        assert torch.overrides._len_torch_function_stack() == 0

    with watch(model, recorder, every=1) as watcher:
        in_threads([lambda x=x: train(x) for x in inputs])
    assert watcher.step == 12
    assert_clean(model)
    expected = [curves(ordinary, x, lambda a: half_squares(a, y))[0] for x in inputs]
    by_step = [
        {tag: [(0, dict(points)[at])] for tag, points in recorder.curves.items()}
        for at in range(12)
    ]
    assert [by_step.count(one) for one in expected] == [4, 4, 4]


def test_the_watch_ends_while_another_thread_is_in_a_forward_pass(examples):
    begun, ended = threading.Event(), threading.Event()

    def waiting(model, x):
        begun.set()
        assert ended.wait(60)
        return ordinary(model, x)

    model, recorder = Model(waiting), Recorder()
    watcher = watch(model, recorder, every=1)

    def train():
        model(examples[0]).sum().backward()
        assert torch.overrides._len_torch_function_stack() == 0

    def end():
        assert begun.wait(60)
        watcher.remove()
        ended.set()

    in_threads([train, end])
    assert_clean(model)
    assert recorder.curves == {}


def test_two_passes_before_one_backward_pass_are_both_logged(examples):
    x, y = examples
    expected = [curves(ordinary, each, lambda a: half_squares(a, y))[0] for each in (x, 2 * x)]
    model, recorder = Model(ordinary), Recorder()
    with watch(model, recorder, every=1):
        (half_squares(model(x), y) + half_squares(model(2 * x), y)).backward()
    for tag, points in recorder.curves.items():
        assert dict(points) == {at: expected[at][tag][0][1] for at in (0, 1)}


def test_a_sigmoid_of_a_parameter_leaves_no_hook_on_it(examples):
    model, recorder = (
        Model(lambda model, x: model.one(x) * torch.sigmoid(model.one.bias)),
        Recorder(),
    )
    with watch(model, recorder, every=1):
        for _ in range(3):
            model(examples[0])
            model(examples[0]).sum().backward()
    assert recorder.steps("dz_norm/layer1") == [1, 3, 5]
    assert not any(p._backward_hooks for p in model.parameters())


def test_two_watches_of_one_model_see_the_same(examples):
    x, y = examples
    model, recorders = Model(in_place), (Recorder(), Recorder())
    with watch(model, recorders[0], every=1), watch(model, recorders[1], every=1):
        step(model, half_squares, x, y)
    assert_clean(model)
    expected, _ = curves(ordinary, x, lambda a: half_squares(a, y))
    assert recorders[0].curves == recorders[1].curves == expected


def test_two_models_on_one_writer_have_names(examples, logged):
    x, y = examples
    writer, read = logged
    models = {"student": Model(ordinary), "teacher": Model(in_place)}
    for scale, model in enumerate(models.values(), start=1):
        for p in model.parameters():
            p.data.mul_(scale)
    expected = []
    for model in models.values():
        alone, recorder = copy.deepcopy(model), Recorder()
        with watch(alone, recorder, every=1):
            step(alone, half_squares, x, y)
        expected.append(recorder.curves)
    assert expected[0] != expected[1]
    with contextlib.ExitStack() as stack:
        for name, model in models.items():
            stack.enter_context(watch(model, writer, every=1, name=name))
        for model in models.values():
            step(model, half_squares, x, y)
    found = read()
    assert len(found) == 2 * len(expected[0])
    for name, curves_of_model in zip(models, expected, strict=True):
        for tag, ((at, value),) in curves_of_model.items():
            figure, layer = tag.split("/")
            assert found[f"{figure}/{name}/{layer}"] == [(at, pytest.approx(value, rel=1e-6))]


@pytest.mark.parametrize("name", [None, "one"])
def test_a_second_model_under_the_same_name_is_refused(name):
    recorder = Recorder()
    held = watch(Model(ordinary), recorder, name=name)
    assert held.step == 0  # its model is gone
    model = Model(ordinary)
    with watch(model, recorder, name=name):
        with pytest.raises(ValueError, match=f"a different name .* with name={name!r}"):
            watch(Model(ordinary), recorder, name=name)
        with watch(Model(ordinary), recorder, name="another"), watch(model, Recorder(), name=name):
            pass
    watch(Model(ordinary), recorder, name=name).remove()


def test_two_backward_passes_through_one_forward_pass_log_two_points(examples):
    """As the docstring says: each is the figure of its own gradient."""
    x, y = examples
    once, _ = curves(ordinary, x, lambda a: half_squares(a, y))
    model, recorder = Model(ordinary), Recorder()
    with watch(model, recorder, every=1) as watcher:
        C = half_squares(model(x), y)
        C.backward(retain_graph=True)
        (3 * C).backward()
    assert watcher.step == 1
    ((_, first),) = once["dz_norm/layer1"]
    assert recorder.curves["dz_norm/layer1"] == [(0, first), (0, pytest.approx(3 * first))]


def test_a_sigmoid_module_alone_can_be_watched(examples):
    model, recorder = nnce.Sigmoid(), Recorder()
    with watch(model, recorder, every=1) as watcher:
        model(examples[0].clone().requires_grad_()).sum().backward()
    assert watcher.step == 1 and recorder.steps("dz_norm/layer1") == [0]


def test_gradients_of_a_batch_of_upstreams_go_by(examples):
    model, recorder = Model(ordinary), Recorder()
    x = examples[0][:2].clone().requires_grad_()
    with watch(model, recorder, every=1):
        out = model(x)
        every = torch.eye(6).view(6, 2, 3)
        (rows,) = torch.autograd.grad(out, x, every, is_grads_batched=True, retain_graph=True)
        assert recorder.curves == {}
        (row,) = torch.autograd.grad(out, x, every[0])
    assert torch.allclose(rows[0], row) and recorder.steps("dz_norm/layer2") == [0]


def test_sigmoids_without_a_neuron_or_of_complex_numbers_are_not_logged(examples):
    def forward(model, x):
        z = model.one(x)
        torch.sigmoid(z[:, :0])
        return torch.sigmoid(z[:, :0]), torch.view_as_real(torch.sigmoid(torch.complex(z, z)))

    seen, _ = curves(forward, examples[0], lambda out: out[0].sum() + out[1].sum())
    assert seen == {}
