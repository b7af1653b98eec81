"""What the tests of networks side by side share: a mixture of settings, and the same alone."""

import dataclasses
import itertools
import math

import torch

from nnce import training
from nnce.algorithm import Hyperparameters
from nnce.engines.ensemble import Ensemble

MIXED = [
    ("quadratic", 3.0),
    ("cross-entropy", 0.5),
    ("cross-entropy", 0.1),
    ("quadratic", 1.0),
    ("cross-entropy", 0.5),
]


def make(settings, dataset, batch_size=10, engine=None, **more):
    """An ensemble of networks with these settings, each from its own seed."""
    states = [training.initial_state(one, dataset) for one in settings]
    n = len(dataset.train.x)
    values = [Hyperparameters(s.loss, s.rate, s.momentum, s.l2 / n) for s in settings]
    return Ensemble(
        [state.network for state in states], values, batch_size=batch_size, engine=engine, **more
    )


def train_alone(settings, dataset, orders, engine="autograd", nudged=False):
    """The network trained by one of PyTorch's engines, on mini-batches in a given order.

    nudged: each number is the next larger one at the start, and the next smaller or larger one by
    turns after each step, as rounding has it: the start's alone can miss what is amplified later.
    """
    settings = dataclasses.replace(settings, engine=engine)
    state = training.initial_state(settings, dataset)
    sides = itertools.cycle((math.inf, -math.inf))
    if nudged:
        _nudge(state.network, next(sides))
    forward, criterion = training.with_graph(state.network, settings)
    x, y = dataset.train
    for order in orders:
        for batch in order.split(settings.batch_size):
            state.optimizer.zero_grad()
            criterion(forward(x[batch]), y[batch]).backward()
            state.optimizer.step()
            if nudged:
                _nudge(state.network, next(sides))
    return state.network


def _nudge(network, side):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.nextafter(torch.full_like(parameter, side)))


def largest_difference(one, two):
    pairs = zip(one.parameters(), two.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)
