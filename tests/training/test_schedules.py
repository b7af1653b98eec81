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
from nnce.training.schedules import (
    CONSTANT,
    SCHEDULES,
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    SequentialLR,
    StepLR,
)


def torchs(schedule, optimizer):
    """PyTorch's scheduler of the same name."""
    if isinstance(schedule, SequentialLR):
        return lr_scheduler.SequentialLR(
            optimizer,
            [torchs(one, optimizer) for one in schedule.schedules],
            list(schedule.milestones),
        )
    if schedule == CONSTANT:
        return lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return getattr(lr_scheduler, type(schedule).__name__)(optimizer, **vars(schedule))


EVERY = [
    ConstantLR(),
    StepLR(step_size=3, gamma=0.3),
    StepLR(4),
    CosineAnnealingLR(T_max=25),
    LinearLR(),
    LinearLR(start_factor=0.01, total_iters=7),
    SequentialLR((LinearLR(0.1, 5), CosineAnnealingLR(20)), (5,)),
    SequentialLR((LinearLR(0.5, 3), StepLR(4, 0.5), CosineAnnealingLR(12)), (3, 13)),
]


@pytest.mark.parametrize("schedule", EVERY, ids=str)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
def test_rates_are_pytorchs(schedule):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.7)
    scheduler = torchs(schedule, optimizer)
    for epoch in range(25):
        expected = optimizer.param_groups[0]["lr"]
        assert 0.7 * schedule.factor(epoch) == pytest.approx(expected, rel=1e-12, abs=1e-16)
        optimizer.step()
        scheduler.step()


def test_every_schedule_is_tried():
    assert {type(schedule) for schedule in EVERY} == set(SCHEDULES)


def test_torchs_spelling_is_understood():
    lists = SequentialLR([LinearLR(), StepLR(2)], [5])
    assert lists == SequentialLR((LinearLR(), StepLR(2)), (5,)) and hash(lists)


def test_where_a_cosine_ends_it_stays():
    assert CosineAnnealingLR(5).factor(5) == CosineAnnealingLR(5).factor(9) == 0


SCHEDULE = SequentialLR((LinearLR(0.25, 2), StepLR(1, 0.5)), (2,))


@pytest.mark.parametrize("engine", training.ENGINES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_engine_trains_at_pytorchs_rates(engine, momentum, digits):
    """Plain PyTorch with its own scheduler comes to the same parameters in float64."""
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
        (lambda: StepLR(0), "step_size of at least 1"),
        (lambda: StepLR(2.0), "step_size of at least 1"),
        (lambda: StepLR(1, 0.0), r"gamma in \(0, 1\], got 0.0"),
        (lambda: StepLR(1, 1.1), r"gamma in \(0, 1\], got 1.1"),
        (lambda: CosineAnnealingLR(-1), "T_max of at least 1"),
        (lambda: LinearLR(0.0), r"start_factor in \(0, 1\], got 0.0"),
        (lambda: LinearLR(0.5, True), "total_iters of at least 1"),
        (lambda: SequentialLR((StepLR(1),), ()), "two schedules at least"),
        (lambda: SequentialLR((StepLR(1), StepLR(2)), (5, 7)), "two schedules at least"),
        (lambda: SequentialLR((StepLR(1),) * 3, (5, 5)), "a rising milestone between"),
        (
            lambda: SequentialLR((StepLR(1), 0.5), (5,)),
            "a schedule out of nnce.training.schedules, got 0.5",
        ),
        (lambda: SequentialLR((StepLR(1), StepLR(2)), (0,)), "each milestone of at least 1"),
        (lambda: SequentialLR((StepLR(1), StepLR(2)), 5), "expected a tuple of milestones, got 5"),
        (lambda: SequentialLR(StepLR(1), (5,)), "expected a tuple of schedules, got StepLR"),
        (
            lambda: Settings(schedule=StepLR),
            "a schedule out of nnce.training.schedules, got <class",
        ),
        (lambda: Settings(schedule=0.5), "a schedule out of nnce.training.schedules, got 0.5"),
        (
            lambda: Settings(epochs=9, schedule=CosineAnnealingLR(5)),
            "leaves a positive rate for all 9 epochs",
        ),
        (
            lambda: Settings(
                epochs=9, schedule=SequentialLR((CosineAnnealingLR(3), StepLR(1)), (5,))
            ),
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
