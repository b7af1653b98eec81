"""The training loop over epochs and steps, shared by all engines."""

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from nnce import data
from nnce.engines.ensemble import Ensemble
from nnce.training.evaluation import Record, records
from nnce.training.settings import Settings
from nnce.training.state import State, is_finite
from nnce.training.steppers import Stepper, make_stepper


class Diverged(ArithmeticError):
    """The loss or a parameter is not finite.

    >>> issubclass(nnce.training.Diverged, ArithmeticError)
    True
    """


def train(
    state: State,
    settings: Settings,
    dataset: data.Dataset,
    *,
    measured: Mapping[str, data.Split] | None = None,
    between: Callable[[], None] | None = None,
    patience: int | None = None,
) -> Iterator[Record]:
    """Train up to `settings.epochs`, yielding a record before the first step and after each epoch.

    `state.best` is the network with the highest validation accuracy so far.

    Args:
        state: from `initial_state`; changed in place, so `state.network` is the trained network.
        settings: the settings that the state was made with.
        dataset: training data, on one device, in one floating-point dtype.
        measured: splits to evaluate, by name; "validation" is required. None for all splits of the
            dataset.
        between: called between steps, when the state is consistent: after each step with engines in
            PyTorch's graph, otherwise every few tenths of a second. It may save the state, or
            raise.
        patience: number of epochs without a higher validation accuracy after which training stops,
            at least 1; None for no limit.

    Returns:
        An iterator over the records; training advances as it is consumed.

    Raises:
        Diverged: the loss of a step, or a loss or a parameter at the end of an epoch, is infinite
            or NaN. Engines without a graph, and several processes, do not compute the losses of
            steps, and raise at the end of the epoch.

    >>> settings = nnce.training.Settings(hidden=(8,), epochs=2, engine="products")
    >>> digits = nnce.data.load("digits", train_size=50)
    >>> state = nnce.training.initial_state(settings, digits)
    >>> [record.epoch for record in nnce.training.train(state, settings, digits)]
    [0, 1, 2]
    """
    measured = dataset.splits() if measured is None else measured
    stepper, cursor = make_stepper(state, settings), state.cursor
    while True:
        if cursor.recorded < cursor.epoch:
            yield _record(state, settings, measured)
        if state.is_over(settings.epochs, patience):
            return
        _train_epoch(state, settings, dataset.train, stepper, between)
        _check_losses(state, settings)
        if between is not None:
            between()


def _record(state: State, settings: Settings, measured: Mapping[str, data.Split]) -> Record:
    cursor = state.cursor
    (record,) = records(
        [state.network],
        [settings.loss],
        measured,
        epoch=cursor.epoch,
        step=cursor.step,
        seconds=cursor.seconds,
    )
    finite = all(map(math.isfinite, record.loss.values())) and is_finite(state.network)
    if cursor.epoch and not finite:
        raise Diverged(_diverged(f"after epoch {cursor.epoch}", settings))
    state.keep_if_best(record.accuracy["validation"])
    cursor.recorded, cursor.seconds = cursor.epoch, 0.0
    return record


def _train_epoch(
    state: State,
    settings: Settings,
    split: data.Split,
    stepper: Stepper,
    between: Callable[[], None] | None,
) -> None:
    """Train for one epoch, or for the rest of it after resuming."""
    x, y = split
    cursor = state.cursor
    (order,) = cursor.orders(len(x), x.device).values()
    _set_rate(state.optimizer, settings.rate_of(cursor.epoch))
    images = None
    if settings.distortion is not None:
        images = data.Distorted(x, order, settings.distortion, settings.seed, cursor.epoch)

    def train_on(begin: int, end: int) -> None:
        rows = order[begin:end]
        if images is None:
            loss = stepper.step(x, y, rows)
        else:
            every = torch.arange(len(rows), device=x.device)
            loss = stepper.step(images[begin:end], y[rows], every)
        if loss is not None:
            state.losses.append(loss)

    cursor.run_epoch(
        len(x),
        train_on,
        between,
        chunk=stepper.chunk,
        batch_size=settings.batch_size,
        device=x.device,
    )


def _set_rate(optimizer: torch.optim.Optimizer | Ensemble, rate: float) -> None:
    if isinstance(optimizer, Ensemble):
        optimizer.set_lrs([rate] * len(optimizer.networks))
    else:
        for group in optimizer.param_groups:
            group["lr"] = rate


def _check_losses(state: State, settings: Settings) -> None:
    """Raise Diverged if the loss of one of the epoch's steps is not finite."""
    losses, state.losses = state.losses, []
    if losses and len(wrong := (~torch.stack(losses).isfinite()).nonzero()):
        step = state.cursor.step - len(losses) + int(wrong[0]) + 1
        raise Diverged(_diverged(f"in epoch {state.cursor.epoch}, step {step}", settings))


def _diverged(when: str, settings: Settings) -> str:
    return (
        f"the loss is no longer a finite number {when}, with loss={settings.loss}, "
        f"lr={settings.lr}, momentum={settings.momentum}, l2={settings.l2}, "
        f"init={settings.init}, seed={settings.seed}; try a smaller learning rate"
    )
