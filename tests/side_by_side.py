"""What the tests of networks side by side share: a mixture of settings, and the same alone."""

import dataclasses

from nnce import reference, training
from nnce.algorithm import Hyperparameters
from nnce.ensemble import Ensemble

MIXED = [
    ("quadratic", 3.0),
    ("cross-entropy", 0.5),
    ("cross-entropy", 0.1),
    ("quadratic", 1.0),
    ("cross-entropy", 0.5),
]


def make(settings, dataset, batch_size=10, engine=None):
    """An ensemble of networks with these settings, each from its own seed."""
    states = [training.initial_state(one, dataset) for one in settings]
    n = len(dataset.train.x)
    values = [Hyperparameters(s.loss, s.rate, s.momentum, s.l2 / n) for s in settings]
    return Ensemble(
        [state.network for state in states], values, batch_size=batch_size, engine=engine
    )


def train_alone(settings, dataset, orders):
    """The network trained by autograd, on mini-batches in a given order."""
    state = training.initial_state(dataclasses.replace(settings, engine="autograd"), dataset)
    twin, criterion = reference.torch_twin(state.network), reference.BUILT_IN_LOSSES[settings.loss]
    x, y = dataset.train
    for order in orders:
        for batch in order.split(settings.batch_size):
            state.optimizer.zero_grad()
            criterion(twin(x[batch]), y[batch]).backward()
            state.optimizer.step()
    return state.network


def largest_difference(one, two):
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)
