"""Learning rates that change from epoch to epoch, in `torch.optim.lr_scheduler`'s words.

A schedule is a value, not an object that counts: the rate of an epoch is the settings' rate times
`factor(epoch)`. So it is the same for every engine, and nothing of it needs to be saved.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from nnce._arguments import is_number, is_size, plain


class Schedule(Protocol):
    """What each of them can say."""

    def factor(self, epoch: int) -> float:
        """By what the rate of the epoch after so many finished ones is multiplied."""


@dataclass(frozen=True)
class ConstantLR:
    """The rate stays as it is. (PyTorch's changes once, unless its factor is 1.)"""

    def factor(self, epoch: int) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class StepLR:
    """Every `step_size` epochs the rate is multiplied by `gamma`, as by PyTorch's StepLR.

    Raises ValueError where a value makes no sense.
    """

    step_size: int
    """Epochs, at least 1."""
    gamma: float = 0.1
    """In (0, 1]."""

    def __post_init__(self) -> None:
        """Check the values."""
        _keep(self, step_size=_check_epochs("step_size", self.step_size))
        _keep(self, gamma=_check_factor("gamma", self.gamma))

    def factor(self, epoch: int) -> float:
        """gamma ^ ⌊epoch / step_size⌋."""
        return float(self.gamma ** (epoch // self.step_size))


@dataclass(frozen=True)
class CosineAnnealingLR:
    """The rate falls to 0 along half a cosine, as by PyTorch's CosineAnnealingLR; there it stays.

    Source: Loshchilov and Hutter, SGDR, ICLR 2017, without the restarts. (PyTorch's rate rises
    again after T_max.) Raises ValueError where a value makes no sense.
    """

    T_max: int
    """Epochs, at least 1; as many as are trained, so that no epoch has rate 0."""

    def __post_init__(self) -> None:
        """Check the values."""
        _keep(self, T_max=_check_epochs("T_max", self.T_max))

    def factor(self, epoch: int) -> float:
        """(1 + cos(π epoch / T_max)) / 2."""
        return (1 + math.cos(math.pi * min(epoch / self.T_max, 1.0))) / 2


@dataclass(frozen=True)
class LinearLR:
    """A warm-up: the rate rises evenly to what it should be, as by PyTorch's LinearLR.

    Raises ValueError where a value makes no sense.
    """

    start_factor: float = 1 / 3
    """Of the first epoch, in (0, 1]."""
    total_iters: int = 5
    """After so many epochs it is 1."""

    def __post_init__(self) -> None:
        """Check the values."""
        _keep(self, total_iters=_check_epochs("total_iters", self.total_iters))
        _keep(self, start_factor=_check_factor("start_factor", self.start_factor))

    def factor(self, epoch: int) -> float:
        """start_factor + (1 − start_factor) epoch / total_iters, 1 at most."""
        done = min(epoch / self.total_iters, 1.0)
        return self.start_factor + (1 - self.start_factor) * done


@dataclass(frozen=True)
class SequentialLR:
    """One schedule after the other, each from its own beginning, as by PyTorch's SequentialLR.

    Raises ValueError where a value makes no sense.
    """

    schedules: tuple[Schedule, ...]
    """Two or more: a warm-up and what follows it, say."""
    milestones: tuple[int, ...]
    """The epochs at which the second and later ones begin."""

    def __post_init__(self) -> None:
        """Check the values, and make tuples of lists."""
        for name in ("schedules", "milestones"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple):
                raise ValueError(f"expected a tuple of {name}, got {value!r}")
        for schedule in self.schedules:
            check_schedule(schedule)
        milestones = tuple(_check_epochs("each milestone", m) for m in self.milestones)
        _keep(self, schedules=tuple(self.schedules), milestones=milestones)
        rising = sorted(set(self.milestones)) == list(self.milestones)
        if not (rising and len(self.milestones) == len(self.schedules) - 1 >= 1):
            raise ValueError(
                f"expected two schedules at least and a rising milestone between any two, got "
                f"{len(self.schedules)} and {self.milestones}"
            )

    def factor(self, epoch: int) -> float:
        """That of the schedule whose turn it is, after so many of its own epochs."""
        begins = max((m for m in self.milestones if m <= epoch), default=0)
        turn = self.milestones.index(begins) + 1 if begins else 0
        return self.schedules[turn].factor(epoch - begins)


CONSTANT = ConstantLR()
"""What there is if no schedule is asked for."""
SCHEDULES = (ConstantLR, StepLR, CosineAnnealingLR, LinearLR, SequentialLR)


def check_schedule(value: object) -> None:
    """Raise ValueError unless it is a schedule."""
    if isinstance(value, type) or not callable(getattr(value, "factor", None)):
        raise ValueError(f"expected a schedule out of nnce.training.schedules, got {value!r}")


def _keep(schedule: object, **values: object) -> None:
    """Set fields of a frozen dataclass to their checked values."""
    for name, value in values.items():
        object.__setattr__(schedule, name, value)


def _check_epochs(name: str, value: object) -> int:
    if not is_size(value):
        raise ValueError(f"expected {name} of at least 1, a whole number of epochs, got {value!r}")
    return int(value)


def _check_factor(name: str, value: object) -> float:
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"expected {name} in (0, 1], got {value!r}")
    return plain(value)
