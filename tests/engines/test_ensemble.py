"""Networks trained side by side are the networks trained alone, nearly to the bit."""

import copy
import itertools

import pytest
import torch
from conftest import slow_unless
from side_by_side import MIXED, largest_difference, make, train_alone
from torch import nn
from torch.nn.utils import parametrizations, prune

import nnce
from nnce import data, training
from nnce.algorithm import Hyperparameters
from nnce.engines import ensemble
from nnce.engines.ensemble import ENGINES, Ensemble
from nnce.losses import LOSSES
from nnce.training import Settings, twin

HIDDEN, BATCH_SIZES = ((), (30,), (20, 15), (12, 16, 14)), (1, 10, 128)


@pytest.mark.parametrize(
    ("hidden", "batch_size", "zeros"),
    slow_unless(  # each number of layers, each size of a mini-batch, and inputs without zeros once
        lambda *case: (
            case
            in (((), 1, True), ((30,), 10, True), ((20, 15), 10, False), ((12, 16, 14), 128, True))
        ),
        itertools.product(HIDDEN, BATCH_SIZES, (True, False)),
    ),
)
def test_every_engine_trains_as_autograd_does(mnist_like, hidden, batch_size, zeros):
    """200 steps in float64, the last of a shorter mini-batch; losses, rates, momentum and decay
    mixed; an example that is all zeros among the inputs that have some.

    At rates where it can be told: autograd itself must move by at most 1e-13 if its numbers move by
    one unit in the last place, at the start and after each step. A tenth or a hundredth of the
    textbook's rate is taken where training amplifies more (up to 2e-7 at mini-batch 1 without a
    hidden layer).
    """
    (x, y), *others = mnist_like
    if not zeros:
        x = 0.05 + 0.9 * x
    else:
        x = x.clone()
        x[0] = 0.0
    dataset = data.Dataset(data.Split(x, y), *others)
    generator = torch.Generator().manual_seed(5)
    n = 199 * batch_size + (batch_size + 1) // 2
    order = torch.randint(len(x), (n,), generator=generator)
    order[:1] = 0
    settings, alone = [], []
    for seed, (loss, momentum, l2) in enumerate(
        [("quadratic", 0.9, 5.0), ("cross-entropy", 0.0, 5.0), ("cross-entropy", 0.0, 0.0)]
    ):
        for share in (1.0, 0.1, 0.01):
            one = Settings(
                hidden,
                loss,
                lr=share * LOSSES[loss].textbook_lr,
                momentum=momentum,
                l2=l2,
                seed=seed,
                batch_size=batch_size,
            )
            by_autograd = train_alone(one, dataset, [order])
            nudged = train_alone(one, dataset, [order], nudged=True)
            if largest_difference(by_autograd, nudged) <= 1e-13:
                break
        else:
            pytest.fail(f"autograd's own rounding is amplified at every rate: {one}")
        settings.append(one)
        alone.append(by_autograd)
        start = training.initial_state(one, dataset).network
        assert largest_difference(by_autograd, start) > 1e-4  # it has learnt something
        by_functions = train_alone(one, dataset, [order], engine="functions")
        assert largest_difference(by_functions, by_autograd) <= 1e-12
    for engine in ENGINES:
        together = make(settings, dataset, batch_size, engine=engine)
        assert together.train_epoch(*dataset.train, order) == 200
        for network, by_autograd in zip(together.networks, alone, strict=True):
            assert largest_difference(network, by_autograd) <= 1e-12


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("hidden", [(), (12,), (12, 8)])
def test_each_network_has_its_own_momentum_and_decay(digits, engine, hidden):
    """And a last mini-batch that is shorter, twice: 1,197 = 119 · 10 + 7."""
    dataset = data.Dataset(*(data.Split(x.double(), y.double()) for x, y in digits))
    settings = [
        Settings(hidden, loss, lr=lr / 10, momentum=momentum, l2=l2, seed=seed)
        for seed, ((loss, lr), momentum, l2) in enumerate(
            zip(MIXED, (0.9, 0.0, 0.5, 0.3, 0.0), (0.0, 5.0, 1.0, 0.0, 0.0), strict=True)
        )
    ]
    together = make(settings, dataset, engine=engine)
    generator = torch.Generator().manual_seed(5)
    orders = [data.order(1_197, generator) for _ in range(2)]
    for order in orders:
        assert together.train_epoch(*dataset.train, order) == 120
    for network, alone in zip(together.networks, settings, strict=True):
        assert largest_difference(network, train_alone(alone, dataset, orders)) <= 1e-12


def compare_with_sgd(sizes, batch_size, R, seed, engine, own):
    """Train a mixture of networks both ways: soft targets, epochs of different lengths, float64.

    Returns how many networks were compared.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    x, y = draw(23, sizes[0]), draw(23, sizes[-1])
    if seed % 2:
        x = x * (draw(23, sizes[0]) < 0.3)
        x[3] = 0.0
    orders = [
        torch.stack([torch.randperm(23, generator=generator)[:n] for _ in range(R)])
        if own
        else torch.randperm(23, generator=generator)[:n].expand(R, -1)
        for n in (23, 7, 23, 1)
    ]
    networks = [nnce.MLP(sizes, generator=generator, dtype=torch.float64) for _ in range(R)]
    values = []
    for r in range(R):
        lr, momentum, decay = draw(3).tolist()
        moves = r % 3 != 1
        loss = MIXED[r % 5][0]
        values.append(Hyperparameters(loss, lr, 0.9 * momentum * moves, 0.1 * decay * moves))
    alone = copy.deepcopy(networks)
    together = Ensemble(networks, values, batch_size=batch_size, engine=engine)
    for order in orders:
        together.train_epoch(x, y, order if own else order[0])
    for r, (network, copied, h) in enumerate(zip(networks, alone, values, strict=True)):
        built_in, criterion = twin.torch_twin(copied), twin.BUILT_IN_LOSSES[h.loss]
        weights = [linear.weight for linear in copied.linears()]
        biases = [linear.bias for linear in copied.linears()]
        groups = [{"params": weights, "weight_decay": h.weight_decay}, {"params": biases}]
        optimizer = torch.optim.SGD(groups, lr=h.lr, momentum=h.momentum)
        for order in orders:
            for batch in order[r].split(batch_size):
                optimizer.zero_grad()
                criterion(built_in(x[batch]), y[batch]).backward()
                optimizer.step()
        assert largest_difference(network, copied) <= 1e-13
    return R


SIZES = ((5, 3), (1, 1), (5, 7, 3), (20, 17, 16, 3), (5, 4, 6, 7, 2))


@pytest.mark.parametrize(
    ("sizes", "batch_size", "R", "engine", "own"),
    slow_unless(
        lambda sizes, batch_size, R, engine, own: batch_size == 3 and R != 2,
        itertools.product(SIZES, (1, 3, 100), (1, 2, 7), ENGINES, (False, True)),
    ),
)
def test_any_mixture_is_sgd_on_autograds_gradients(sizes, batch_size, R, engine, own):
    """Odd sizes, and mini-batches larger than the data; with zeros among the inputs and without."""
    compare_with_sgd(sizes, batch_size, R, 1_000 * batch_size + R, engine, own)


@pytest.mark.exhaustive
def test_2_011_random_networks_are_sgd_on_autograds_gradients():
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    compared = 0
    while compared < 2_011:
        sizes = tuple(draw(1, 20) for _ in range(draw(2, 5)))
        engine, own = ENGINES[draw(0, 1)], bool(draw(0, 1))
        compared += compare_with_sgd(sizes, draw(1, 25), draw(1, 8), compared, engine, own)
    assert compared >= 2_011


def test_one_step_in_float32_is_right_within_rounding(digits):
    settings = [Settings((9,), loss, lr=lr, seed=s) for s, (loss, lr) in enumerate(MIXED)]
    together = make(settings, digits)
    order = torch.arange(10)
    together.train_epoch(*digits.train, order)
    for network, one in zip(together.networks, settings, strict=True):
        alone = make([one], digits)
        alone.train_epoch(*digits.train, order)
        for a, b in zip(network.parameters(), alone.networks[0].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_saturated_neurons_learn_as_the_rules_say():
    """float32 σ(z) is 1 at z = 20, where a (1−a) and a − 1 are 0 and the rules are not."""
    for loss, y in itertools.product(("quadratic", "cross-entropy"), (0.0, 1.0)):
        network = nnce.MLP((1, 1))
        with torch.no_grad():
            network[0].weight.fill_(0.0)
            network[0].bias.fill_(20.0)
        gradient = nnce.backprop(
            network, torch.ones(1, 1), torch.full((1, 1), y), loss=loss
        ).gradients["0.weight"]
        assert gradient.item() != 0
        alone = Ensemble([network], [Hyperparameters(loss, 1.0)], batch_size=1)
        alone.train_epoch(torch.ones(1, 1), torch.full((1, 1), y), torch.tensor([0]))
        torch.testing.assert_close(network[0].weight.detach(), -gradient, rtol=1e-6, atol=0)


def test_networks_remain_ordinary(digits, tmp_path):
    """They can be saved small, loaded, differentiated, and put into another ensemble."""
    settings = [Settings((9,), seed=seed) for seed in range(40)]
    first = make(settings, digits, engine="products")
    networks = first.networks
    first.train_epoch(*digits.train, torch.arange(10))
    path = tmp_path / "network.pt"
    nnce.save(networks[3], path)
    alone = tmp_path / "alone.pt"
    nnce.save(nnce.MLP((64, 9, 10)), alone)
    assert path.stat().st_size <= alone.stat().st_size + 1_000
    assert largest_difference(nnce.load(path), networks[3]) == 0
    nnce.sigmoid_cross_entropy(networks[3](digits.train.x), digits.train.y).backward()
    assert networks[3][0].weight.grad is not None
    values = 2 * [Hyperparameters("quadratic", 1.0)]
    again = Ensemble(networks[3:5], values, batch_size=10, engine="products")
    again.train_epoch(*digits.train, torch.arange(10))
    with pytest.raises(ValueError, match=r"moved, by \.to\(\) or by another ensemble"):
        first.train_epoch(*digits.train, torch.arange(10))
    assert largest_difference(nnce.load(path), networks[3]) > 0


def test_threads_by_size():
    all_threads = torch.get_num_threads()
    assert ensemble.threads((784, 30, 10), 10) == 1
    assert ensemble.threads((784, 100, 10), 10) == 1
    assert ensemble.threads((784, 800, 10), 128) == all_threads


def test_mismatch_is_value_error_is_refused(digits):
    network, other = nnce.MLP((64, 9, 10)), nnce.MLP((64, 8, 10))
    one = Hyperparameters("cross-entropy", 0.5)
    frozen = nnce.MLP((64, 9, 10)).requires_grad_(False)
    for networks, values, message in (
        ([frozen], [one], "parameters that are frozen"),
        ([], [], "at least one network, got none"),
        ([network, other], [one, one], "one shape, dtype and device, got 64-8-10 .*; 64-9-10"),
        ([network, nnce.MLP((64, 9, 10)).double()], [one, one], "in torch.float32 .*float64"),
        ([network, network], [one, one], "one occurs twice"),
        ([network], [one, one], "each of the 1 networks, got 2"),
        ([network], [one._replace(loss="hinge")], "'quadratic' or 'cross-entropy', got 'hinge'"),
        ([network], [one._replace(lr=float("nan"))], "expected lr > 0"),
        ([network], [one._replace(momentum=1.0)], r"momentum in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Ensemble(networks, values, batch_size=10)
    with pytest.raises(ValueError, match="batch_size of at least 1, a whole number, got 0"):
        Ensemble([network], [one], batch_size=0)
    for wrong in (0.5, one._replace(lr="0.5")):
        with pytest.raises(TypeError, match="expected Hyperparameters of numbers"):
            Ensemble([network], [wrong], batch_size=10)
    with pytest.raises(TypeError, match=r"nnce\.MLPs, got Linear"):
        Ensemble([torch.nn.Linear(3, 2)], [one], batch_size=10)
    (x, y), order = digits.train, torch.arange(10)
    together = Ensemble([network], [one], batch_size=10)
    with pytest.raises(ValueError, match=r"x of shape \(n, 64\), got \(1197, 10\)"):
        together.train_epoch(y, y, order)
    with pytest.raises(
        TypeError, match=r"x of dtype torch.float32 like the parameters, got torch."
    ):
        together.train_epoch(x.double(), y, order)
    with pytest.raises(ValueError, match=r"y on device cpu like the parameters, got meta"):
        together.train_epoch(x, y.to("meta"), order)
    with pytest.raises(ValueError, match="as many targets as inputs, got 1197 and 5"):
        together.train_epoch(x, y[:5], order)
    with pytest.raises(TypeError, match="x to be a tensor, got list"):
        together.train_epoch(x.tolist(), y, order)
    with pytest.raises(TypeError, match=r"whole numbers \(int64\), got torch.float32"):
        together.train_epoch(x, y, torch.rand(10))
    with pytest.raises(IndexError, match="indices from 0 to 1196, got 1197"):
        together.train_epoch(x, y, torch.tensor([1_197]))
    with pytest.raises(ValueError, match="at least one index"):
        together.train_epoch(x, y, order[:0])


@pytest.mark.parametrize("sizes", [(5, 3), (5, 4, 3), (6, 5, 4, 2)])
@pytest.mark.parametrize("R", [1, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_are_those_of_each_network(sizes, R, engine, generator):
    networks = [nnce.MLP(sizes, generator=generator, dtype=torch.float64) for _ in range(R)]
    # In another order than they are grouped in.
    losses = ["quadratic", "cross-entropy", "quadratic"][:R]
    values = [Hyperparameters(loss, lr=0.1) for loss in losses]
    together = Ensemble(networks, values, batch_size=4, engine=engine)
    x = torch.rand(7, sizes[0], generator=generator, dtype=torch.float64)
    y, order = torch.rand(7, sizes[-1], generator=generator, dtype=torch.float64), torch.arange(7)
    for _ in range(2):  # before it is trained, and after
        for number, network in enumerate(networks):
            z = together.outputs(number, x)
            torch.testing.assert_close(z, network(x), rtol=0, atol=1e-14)
        together.train_epoch(x, y, order)


def pair(sizes=(4, 3, 2)):
    return [nnce.MLP(sizes, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]


def together_of(networks, **options):
    values = [Hyperparameters("cross-entropy", 0.5)] * len(networks)
    return Ensemble(networks, values, batch_size=2, **options)


def prune_l1(layer):
    prune.l1_unstructured(layer, "weight", amount=0.5)


def old_weight_norm(layer):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layer)


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize(
    "change",
    [parametrizations.weight_norm, parametrizations.spectral_norm, prune_l1, old_weight_norm],
)
def test_reparametrised_and_pruned_networks_are_refused(change, index):
    """Their W is computed from other parameters in each forward pass."""
    networks = pair()
    change(networks[1][index])
    message = "expected layers with a weight and a bias of their own, but one has been reparam"
    with pytest.raises(ValueError, match=message):
        together_of(networks)
    with pytest.raises(ValueError, match=message):
        nnce.backprop(networks[1], torch.rand(2, 4), torch.rand(2, 2))


def test_other_forwards_are_refused():
    networks = pair()
    networks[1][0].forward = lambda a: 2 * a
    with pytest.raises(ValueError, match="expected a Linear whose forward is its own"):
        together_of(networks)

    class Doubled(nnce.Sigmoid):
        def forward(self, z):
            return 2 * super().forward(z)

    networks = pair()
    networks[0][1] = Doubled()
    with pytest.raises(ValueError, match="expected a Sigmoid whose forward is its own"):
        together_of(networks)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("index", [None, 0, 1])
def test_hooks_which_would_not_be_called_are_refused(kind, index):
    networks = pair()
    module = networks[1] if index is None else networks[1][index]
    getattr(module, f"register_{kind}_hook")(lambda *arguments: None)
    name = type(module).__name__
    with pytest.raises(ValueError, match=f"expected no hooks, .* but a {name} has some"):
        together_of(networks)
    networks = pair()
    networks[0][2].weight.register_hook(lambda dW: 2 * dW)
    with pytest.raises(ValueError, match=r"expected no hooks, .* but a parameter has some"):
        together_of(networks)


def set_weight(network):
    network[0].weight = nn.Parameter(network[0].weight.detach().clone())


def assign_state(network):
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(state, assign=True)


def set_layer(network):
    network[0] = nnce.Linear(4, 3)


def set_data(network):
    network[2].bias.data = torch.zeros(2)


@pytest.mark.parametrize(
    ("engine", "change"),
    [
        *(
            (engine, change)
            for engine in ENGINES
            for change in (set_weight, assign_state, set_layer)
        ),
        # Loops read what is in a parameter at each epoch, wherever that lies.
        ("products", set_data),
    ],
)
def test_parameters_that_have_been_replaced_are_noticed(engine, change):
    """They would silently not be trained."""
    networks = pair()
    together = together_of(networks, engine=engine)
    x, y, order = torch.rand(4, 4), torch.rand(4, 2), torch.arange(4)
    together.train_epoch(x, y, order)
    change(networks[1])
    for use in (lambda: together.train_epoch(x, y, order), lambda: together.outputs(1, x)):
        with pytest.raises(ValueError, match=r"some have been (replaced|moved)"):
            use()


def test_a_network_frozen_later_is_noticed():
    networks = pair()
    together = together_of(networks)
    networks[1][0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="parameters that are frozen"):
        together.train_epoch(torch.rand(4, 4), torch.rand(4, 2), torch.arange(4))


@pytest.mark.parametrize("sizes", [(4, 2), (4, 3, 2)])
@pytest.mark.parametrize("R", [1, 2])
def test_a_loss_from_before_cannot_be_differentiated_after(sizes, R):
    """As after optimizer.step(): its gradient would be neither the old nor the new."""
    networks = pair(sizes)[:R]
    together = together_of(networks)
    x, y, order = torch.rand(4, 4, requires_grad=True), torch.rand(4, 2), torch.arange(4)
    losses = [nnce.sigmoid_cross_entropy(network(x), y) for network in networks]
    together.train_epoch(x.detach(), y, order)
    for network, loss in zip(networks, losses, strict=True):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        nnce.sigmoid_cross_entropy(network(x), y).backward()


def test_what_was_said_at_the_making_cannot_be_changed():
    together = together_of(pair())
    for name, value in (("batch_size", 3), ("networks", pair()), ("hyperparameters", [])):
        with pytest.raises(AttributeError, match=name):
            setattr(together, name, value)
    with pytest.raises(TypeError, match="does not support item assignment"):
        together.networks[0] = pair()[0]


def test_under_inference_mode():
    """Networks made before can be differentiated afterwards; networks made there are refused."""
    networks = pair()
    with torch.inference_mode():
        together = together_of(networks)
        made_there = pair()
    x, y = torch.rand(4, 4), torch.rand(4, 2)
    together.train_epoch(x, y, torch.arange(4))
    nnce.sigmoid_cross_entropy(networks[0](x), y).backward()
    assert networks[0][0].weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="one was made under inference_mode"):
        together_of(made_there)


@pytest.mark.parametrize("wrong", [-1, 100])
def test_a_wrong_index_at_the_end_is_seen_before_any_step(wrong):
    networks = pair((700, 3, 2))
    together = together_of(networks)
    before = copy.deepcopy(networks)
    order = torch.cat([torch.arange(100).repeat(20), torch.tensor([wrong])])
    first, last = min(0, wrong), max(99, wrong)
    with pytest.raises(IndexError, match=f"indices from 0 to 99, got {first} to {last}"):
        together.train_epoch(torch.rand(100, 700), torch.rand(100, 2), order)
    assert all(largest_difference(a, b) == 0 for a, b in zip(networks, before, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mini_batch_larger_than_any_number_of_examples(engine):
    """All examples, once: the same as a mini-batch of that size."""
    networks = pair()
    values = 2 * [Hyperparameters("cross-entropy", 0.5)]
    again = copy.deepcopy(networks)
    x, y, order = torch.rand(5, 4), torch.rand(5, 2), torch.arange(5)
    assert Ensemble(networks, values, batch_size=2**63, engine=engine).train_epoch(x, y, order) == 1
    Ensemble(again, values, batch_size=5, engine=engine).train_epoch(x, y, order)
    assert all(largest_difference(a, b) == 0 for a, b in zip(networks, again, strict=True))


@pytest.mark.parametrize(
    ("sizes", "batch_size", "density", "suits"),
    [
        ((784, 30, 10), 10, 0.19, True),
        ((784, 30, 10), 1, 1.0, True),
        ((784, 100, 10), 10, 0.19, True),
        ((64, 30, 10), 10, 0.5, True),
        ((784, 300, 10), 10, 1.0, False),
        ((784, 300, 10), 128, 0.19, False),
        ((784, 800, 10), 128, 0.19, False),
        ((784, 1000, 1000, 10), 512, 0.19, False),
    ],
)
def test_loops_where_they_were_measured_to_be_faster(sizes, batch_size, density, suits):
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.float64):
        assert ensemble.suits_loops(sizes, batch_size, dtype, cpu, density) == suits
    assert not ensemble.suits_loops(sizes, batch_size, torch.bfloat16, cpu, density)
    assert not ensemble.suits_loops(sizes, batch_size, dtype, torch.device("cuda"), density)


def test_the_choice_is_made_at_the_first_epoch_and_kept():
    together = together_of(pair((40, 9, 3)))
    assert together.engine is None
    x, y = torch.rand(20, 40), torch.rand(20, 3)
    together.train_epoch(x, y, torch.arange(20))
    assert together.engine == "loops"
    wide = together_of(pair((400, 300, 3)))
    wide.train_epoch(torch.rand(20, 400), y, torch.arange(20))
    chosen = wide.engine
    wide.train_epoch(torch.zeros(20, 400), y, torch.arange(20))
    assert wide.engine == chosen


def test_orders_that_do_not_fit():
    together = together_of(pair())
    x, y = torch.rand(4, 4), torch.rand(4, 2)
    for order in (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(1, 2, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"of shape \(n,\) or \(2, n\), on cpu, got \("):
            together.train_epoch(x, y, order)
    with pytest.raises(IndexError, match="indices from 0 to 3, got 0 to 4"):
        together.train_epoch(x, y, torch.tensor([[0, 1], [3, 4]]))
    with pytest.warns(UserWarning, match=r"threads=100000: this machine has \d+ processors"):
        together_of(pair(), threads=100_000)
    for threads in (0, 1.5, "2"):
        with pytest.raises(ValueError, match="threads to be a whole number of at least 1, got"):
            together_of(pair(), threads=threads)


def test_what_is_no_list_of_networks_and_no_input():
    with pytest.raises(TypeError, match=r"a sequence of networks, got one nnce\.MLP"):
        Ensemble(pair()[0], [], batch_size=2)
    together = together_of(pair())
    with pytest.raises(ValueError, match=r"x of shape \(n, 4\), got \(3, 5\)"):
        together.outputs(0, torch.rand(3, 5))
    with pytest.raises(TypeError, match="x to be a tensor, got list"):
        together.outputs(0, [[1.0] * 4])
    for number in (2, -1, True, 0.0):
        with pytest.raises(IndexError, match=r"number of a network, 0 to 1, got "):
            together.outputs(number, torch.rand(3, 4))


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_networks_can_be_evaluated(engine):
    networks = pair()
    together = together_of(networks, engine=engine)
    networks[0].requires_grad_(False)
    x = torch.rand(3, 4)
    torch.testing.assert_close(together.outputs(0, x), networks[0](x))
