"""Learning rates that change, held against PyTorch's own schedulers, for every engine."""

import math

import pytest
import torch
from torch.optim import lr_scheduler

from nnce import data, training
from nnce.algorithm import Hyperparameters
from nnce.engines.ensemble import ENGINES, Ensemble
from nnce.modules import MLP
from nnce.training import Settings
from nnce.training.schedules import KINDS, Schedule


def torchs(schedule, optimizer):
    """PyTorch's own schedulers, one after the other."""
    after = {
        "constant": lambda: lr_scheduler.ConstantLR(optimizer, factor=1.0),
        "step": lambda: lr_scheduler.StepLR(optimizer, schedule.step_size, schedule.gamma),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, schedule.cosine_epochs),
    }[schedule.kind]
    if not schedule.warmup:
        return after()
    start, epochs = schedule.warmup_start, schedule.warmup
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=start, total_iters=epochs)
    return lr_scheduler.SequentialLR(optimizer, [warmup, after()], [epochs])


def closed(schedule, epoch):
    """The factor as a formula."""
    if epoch < schedule.warmup:
        start = schedule.warmup_start
        return start + (1 - start) * epoch / schedule.warmup
    epoch -= schedule.warmup
    if schedule.kind == "step":
        return schedule.gamma ** (epoch // schedule.step_size)
    if schedule.kind == "cosine":
        return (1 + math.cos(math.pi * min(epoch / schedule.cosine_epochs, 1.0))) / 2
    return 1.0


EVERY = [
    Schedule(),
    Schedule("step", step_size=3, gamma=0.3),
    Schedule("cosine", cosine_epochs=25),
    Schedule(warmup=7, warmup_start=0.01),
    Schedule("cosine", cosine_epochs=20, warmup=5),
    Schedule("step", step_size=4, gamma=0.5, warmup=3, warmup_start=0.5),
]


@pytest.mark.parametrize("schedule", EVERY, ids=str)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
def test_rates_are_pytorchs(schedule):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.7)
    scheduler = torchs(schedule, optimizer)
    for epoch in range(25):
        expected = optimizer.param_groups[0]["lr"]
        assert 0.7 * schedule.factor(epoch) == pytest.approx(expected, rel=1e-12, abs=1e-16)
        assert schedule.factor(epoch) == pytest.approx(closed(schedule, epoch), rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", EVERY, ids=str)
def test_rates_of_late_epochs_are_the_formulas(schedule):
    for epoch in (1023, 1024, 5000):
        expected = closed(schedule, epoch)
        assert schedule.factor(epoch) == pytest.approx(expected, rel=1e-9, abs=1e-16)


def test_every_schedule_is_tried():
    assert {schedule.kind for schedule in EVERY} == set(KINDS)


def test_where_a_cosine_ends_it_stays():
    assert Schedule("cosine", cosine_epochs=5).factor(5) == 0
    assert Schedule("cosine", cosine_epochs=5).factor(9) == 0


def test_another_object_with_a_factor_is_a_schedule(digits):
    class Halved:
        def factor(self, epoch):
            return 0.5

    short = digits._replace(train=data.Split(*(part[:100] for part in digits.train)))
    networks = []
    for more in ({"schedule": Halved(), "lr": 1.0}, {"lr": 0.5}):
        settings = Settings(hidden=(5,), epochs=2, **more)
        state = training.initial_state(settings, short)
        list(training.train(state, settings, short))
        networks.append(state.network)
    for a, b in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(a, b)


SCHEDULE = Schedule("step", step_size=1, gamma=0.5, warmup=2, warmup_start=0.25)


@pytest.mark.parametrize("engine", training.ENGINES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_engine_trains_at_pytorchs_rates(engine, momentum, digits):
    """Plain PyTorch with its own scheduler reaches the same parameters in float64."""
    n, lr = 205, 0.1 if momentum else 0.5
    x, y = (part[:n].double() for part in digits.train)
    dataset = digits._replace(train=data.Split(x, y))
    dataset = data.Dataset(*(data.Split(*(part.double() for part in s)) for s in dataset))
    settings = Settings(
        *((12,), "cross-entropy", engine),
        epochs=5,
        lr=lr,
        momentum=momentum,
        l2=3.0,
        schedule=SCHEDULE,
        seed=1,
    )
    state = training.initial_state(settings, dataset)
    twin = training.initial_state(settings, dataset).network
    list(training.train(state, settings, dataset))
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in twin.parameters() if p.dim() == 2], "weight_decay": 3.0 / n},
            {"params": [p for p in twin.parameters() if p.dim() == 1]},
        ],
        lr=lr,
        momentum=momentum,
    )
    scheduler = torchs(SCHEDULE, optimizer)
    generator = training.generators(1)[1]
    for _ in range(5):
        for batch in data.order(n, generator).split(10):
            optimizer.zero_grad()
            z = twin(x[batch])
            loss = torch.nn.functional.binary_cross_entropy_with_logits(z, y[batch])
            (loss * y.shape[1]).backward()
            optimizer.step()
        scheduler.step()
    for ours, theirs in zip(state.network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ENGINES)
def test_networks_may_have_rates_of_their_own(how, digits):
    """Each is as it would be alone, and one whose rate does not change is not touched."""
    x, y = (part[:200].double() for part in digits.train)
    order = torch.arange(200)

    def trained(lrs):
        networks = [
            MLP((64, 8, 10), generator=torch.Generator().manual_seed(3), dtype=x.dtype) for _ in lrs
        ]
        values = [Hyperparameters("cross-entropy", before, 0.5) for before, _ in lrs]
        ensemble = Ensemble(networks, values, batch_size=10, engine=how)
        ensemble.train_epoch(x, y, order)
        ensemble.set_lrs([after for _, after in lrs])
        assert [h.lr for h in ensemble.hyperparameters] == [after for _, after in lrs]
        ensemble.train_epoch(x, y, order)
        return [torch.cat([p.flatten() for p in network.parameters()]) for network in networks]

    together = trained([(0.1, 0.3), (0.2, 0.2), (0.3, 0.05)])
    for one, alone in zip(together, [(0.1, 0.3), (0.2, 0.2), (0.3, 0.05)], strict=True):
        torch.testing.assert_close(one, trained([alone])[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("lrs", "error", "sentence"),
    [
        ([0.1], ValueError, "expected a rate for each of the 2 networks, got 1"),
        ([0.1] * 3, ValueError, "expected a rate for each of the 2 networks, got 3"),
        ([0.1, 0.0], ValueError, "expected lr > 0"),
        ([0.1, math.nan], ValueError, "expected lr > 0"),
        ([0.1, "0.1"], TypeError, "expected Hyperparameters of numbers"),
    ],
)
def test_wrong_rates_are_named(lrs, error, sentence):
    networks = [MLP((3, 2)) for _ in range(2)]
    ensemble = Ensemble(networks, [Hyperparameters("quadratic", 1.0)] * 2, batch_size=1)
    with pytest.raises(error, match=sentence):
        ensemble.set_lrs(lrs)
    assert [h.lr for h in ensemble.hyperparameters] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Schedule("linear"), "schedule constant or step or cosine, got 'linear'"),
        (lambda: Schedule("step", 0, 0.5), "step_size from 1 to 100,000, a whole number"),
        (lambda: Schedule("step", 2.0, 0.5), "step_size from 1 to 100,000"),
        (lambda: Schedule("step", 200_000, 0.5), "step_size from 1 to 100,000"),
        (lambda: Schedule("step", 1, 0.0), r"gamma in \(0, 1\], got 0.0"),
        (lambda: Schedule("step", 1, 1.1), r"gamma in \(0, 1\], got 1.1"),
        (lambda: Schedule("step", gamma=0.1), "expected step_size for schedule 'step', got None"),
        (lambda: Schedule("cosine", gamma=0.1), "expected no gamma for schedule 'cosine', got 0.1"),
        (lambda: Schedule("cosine"), "expected cosine_epochs for schedule 'cosine', got None"),
        (lambda: Schedule("cosine", cosine_epochs=-1), "cosine_epochs from 1 to 100,000"),
        (lambda: Schedule(cosine_epochs=5), "no cosine_epochs for schedule 'constant', got 5"),
        (lambda: Schedule(warmup=3, warmup_start=0.0), r"warmup_start in \(0, 1\], got 0.0"),
        (lambda: Schedule(warmup=-1), "warmup from 1 to 100,000"),
        (lambda: Schedule(warmup=True), "warmup from 1 to 100,000"),
        (lambda: Settings(schedule=Schedule), "an nnce.training.schedules.Schedule, got <class"),
        (lambda: Settings(schedule=0.5), "an nnce.training.schedules.Schedule, got 0.5"),
        (
            lambda: Settings(epochs=10**6, schedule=Schedule("step", 1, 1.0)),
            "at most 100,000 epochs for schedule 'step'",
        ),
        (
            lambda: Settings(epochs=9, schedule=Schedule("cosine", cosine_epochs=5, warmup=3)),
            "leaves a positive rate for all 9 epochs",
        ),
    ],
)
def test_what_makes_no_sense_is_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_network_that_has_been_moved_is_not_taken_up_again():
    network = MLP((3, 2))
    ensemble = Ensemble(
        [network], [Hyperparameters("quadratic", 1.0)], batch_size=1, engine="products"
    )
    x = torch.rand(4, 3)
    ensemble.train_epoch(x, torch.rand(4, 2), torch.arange(4))
    network[0].weight = torch.nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="some have been replaced; make a new Ensemble"):
        ensemble.set_lrs([0.5])
