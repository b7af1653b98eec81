import copy
import math
import pickle
import weakref

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import nnce
from nnce import rules, training
from nnce.backprop import backprop
from nnce.monitor import watch

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
    found = backprop(list(zip(parameters[::2], parameters[1::2], strict=True)), x, y, loss=kind)
    with torch.no_grad():
        wrong = training.is_wrong(found.a[-1], y)
        assert 0 < wrong.sum() < len(x)
        da = rules.da_prev(found.dz[1], parameters[2])
        slow, fast = (
            rule(found.z[-1], y)[wrong] for rule in (rules.dz_quadratic, rules.dz_cross_entropy)
        )
    meters = (found.dz[0].norm() / da.norm(), slow.norm() / fast.norm())
    scalars = read()
    assert set(scalars) == {f"{what}/layer{n}" for what in FIGURES for n in (1, 2)}
    for number, (z, dz, meter) in enumerate(zip(found.z, found.dz, meters, strict=True), start=1):
        prime = rules.sigmoid_prime(z)
        expected = {
            "dz_norm": dz.norm(dim=-1).mean() / len(x),  # of C as the code averages it
            "sigmoid_prime": prime.mean(),
            "saturated": (prime < training.SATURATED).float().mean(),
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
        found = model(x)
        half_squares(found["a"] if kind is dict else found[1], y).backward()
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
        found = torch.func.grad(loss)(parameters, x, y)
        torch.func.vmap(model)(x)
        torch.compile(model, backend="eager")(x)
    assert all(torch.equal(found[name], expected[name]) for name in parameters)
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
        (("model", "runs/mine", {}), TypeError, "expected a SummaryWriter, got str"),
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
