"""Learning rate schedules, computed by `torch.optim.lr_scheduler`.

A schedule is an immutable value: PyTorch's scheduler is tabulated once, for a learning rate of 1,
and the rate of an epoch is the settings' rate times `factor(epoch)`. So it is the same for every
engine, and has no state to save.
"""

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.optim import lr_scheduler

from nnce._arguments import is_number, is_size, plain

Kind = Literal["constant", "step", "cosine"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Tabulating this many epochs takes a second.
_MOST_EPOCHS = 100_000


@dataclass(frozen=True)
class Schedule:
    """An optional warm-up (`LinearLR`), then a schedule whose epochs count from the warm-up's end.

    Raises:
        ValueError: a value is out of range, or does not belong to the kind of schedule.
    """

    kind: Kind = "constant"
    """"step" is `StepLR`; "cosine" is `CosineAnnealingLR`, falling to 0 (Loshchilov and Hutter,
    SGDR, ICLR 2017, without the restarts)."""
    step_size: int | None = None
    """For "step": number of epochs after which the rate is multiplied by gamma."""
    gamma: float | None = None
    """For "step": factor of the rate, in (0, 1]."""
    cosine_epochs: int | None = None
    """For "cosine": T_max, the number of epochs from the full rate down to 0."""
    warmup: int = 0
    """Number of epochs in which the rate rises linearly to its full value."""
    warmup_start: float = 0.1
    """Factor of the rate in the first warm-up epoch, in (0, 1]."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"expected schedule {' or '.join(KINDS)}, got {self.kind!r}")
        for name, kind in (("step_size", "step"), ("gamma", "step"), ("cosine_epochs", "cosine")):
            given = getattr(self, name) is not None
            if given != (self.kind == kind):
                what = name if self.kind == kind else f"no {name}"
                raise ValueError(
                    f"expected {what} for schedule {self.kind!r}, got {getattr(self, name)}"
                )
        for name, unused in (("step_size", None), ("cosine_epochs", None), ("warmup", 0)):
            value = getattr(self, name)
            if value != unused and not (is_size(value) and value <= _MOST_EPOCHS):
                raise ValueError(
                    f"expected {name} from 1 to {_MOST_EPOCHS:,}, a whole number of epochs, got "
                    f"{value!r}"
                )
        for name in ("gamma", "warmup_start"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 < value <= 1):
                raise ValueError(f"expected {name} in (0, 1], got {value!r}")
        for name in ("step_size", "gamma", "cosine_epochs", "warmup", "warmup_start"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, plain(value))  # a Python number, not NumPy's

    def factor(self, epoch: int) -> float:
        """Factor of the learning rate in an epoch, counted from 0.

        Raises:
            ValueError: the schedule is "step", and the epoch is 100,000 or more after the warm-up.
        """
        if epoch < self.warmup:
            warmup = (self.warmup_start, 1.0, self.warmup)
            return _tabulated(lr_scheduler.LinearLR, warmup, self.warmup)[epoch]
        epoch -= self.warmup
        if self.cosine_epochs is not None:
            if epoch >= self.cosine_epochs:  # PyTorch's rate would rise again
                return 0.0
            cosine = (self.cosine_epochs,)
            return _tabulated(lr_scheduler.CosineAnnealingLR, cosine, self.cosine_epochs)[epoch]
        if self.step_size is not None:
            if epoch >= _MOST_EPOCHS:
                raise ValueError(f"expected at most {_MOST_EPOCHS:,} epochs for schedule 'step'")
            length = max(1024, 1 << epoch.bit_length())
            return _tabulated(lr_scheduler.StepLR, (self.step_size, self.gamma), length)[epoch]
        return 1.0


CONSTANT = Schedule()
"""The default: a constant learning rate."""


class _NoParameters(torch.optim.Optimizer):
    """An optimizer of rate 1, without `Optimizer.__init__`, which imports dynamo (2 s)."""

    def __init__(self) -> None:
        self.param_groups = [{"lr": 1.0}]

    def step(self) -> None:  # type: ignore[override]
        """Do nothing."""


@functools.lru_cache(maxsize=256)
def _tabulated(
    scheduler: type[lr_scheduler.LRScheduler], arguments: tuple[object, ...], length: int
) -> tuple[float, ...]:
    """Factors of the first `length` epochs, from one of PyTorch's schedulers."""
    optimizer = _NoParameters()
    rates = scheduler(optimizer, *arguments)  # type: ignore[arg-type]
    optimizer.step()  # prevents PyTorch's warning about the order of the two steps
    factors = []
    for _ in range(length):
        factors.append(float(rates.get_last_lr()[0]))
        rates.step()
    return tuple(factors)


def check_schedule(value: object) -> None:
    """Raise ValueError unless value is a schedule or has a method `factor(epoch)`."""
    if isinstance(value, type) or not callable(getattr(value, "factor", None)):
        raise ValueError(f"expected an nnce.training.schedules.Schedule, got {value!r}")
