"""What test_parallel.py has several processes do."""

from pathlib import Path

import torch

from nnce import data, training
from nnce.training import Settings, parallel

# 100 steps of 7, of which the last one of an epoch has 2, fewer than three processes.
EXAMPLES, EPOCHS, BATCH_SIZE = 170, 4, 7
CASES = {
    f"{engine}, {loss}, {optimizer}, momentum {momentum}": Settings(
        hidden=(9, 8),
        loss=loss,
        engine=engine,
        optimizer=optimizer,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        momentum=momentum,
        lr=0.01 if optimizer == "adam" else 0.1 if momentum else 1.0,
        l2=1.0,
    )
    for engine in ("backprop", "products", "functions", "autograd")
    for loss in ("quadratic", "cross-entropy")
    for optimizer, momentum in (("sgd", 0.0), ("sgd", 0.9), ("adam", 0.0))
    if optimizer == "sgd" or engine in ("functions", "autograd")
}


def dataset():
    """Digits in float64, the training part short."""
    whole = data.load("digits", train_size=EXAMPLES, dtype=torch.float64)
    few = [data.Split(x[:20], y[:20]) for x, y in whole[1:]]
    return data.Dataset(whole.train, *few)


def trained(settings, world):
    state = training.initial_state(settings, dataset(), world)
    records = list(training.train(state, settings, dataset()))
    assert state.cursor.step == 100 and len(records) == EPOCHS + 1
    return dict(state.network.state_dict())


def train_all(folder):
    """Train the networks of all cases, and leave their parameters in a folder."""
    torch.set_num_threads(1)
    world = parallel.join()
    found = {name: trained(settings, world) for name, settings in CASES.items()}
    # Every process has the same network.
    everyone = world.exchange({name: state["0.weight"].tolist() for name, state in found.items()})
    assert all(one == everyone[0] for one in everyone)
    # An empty share: two examples for three processes, in the first mini-batch already.
    assert len(world.share(torch.arange(2))) == (1 if world.rank < 2 else 0)
    assert world.largest(world.rank) == world.size - 1
    assert world.broadcast(world.rank) == 0
    assert world.gather(world.rank) == (list(range(world.size)) if world.rank == 0 else [])
    if world.rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    parallel.leave()
