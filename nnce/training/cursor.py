"""Where a run stands between two steps, and the orders of the examples, drawn again on resuming."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnce import data


def generators(seed: int) -> tuple[torch.Generator, torch.Generator]:
    """The generators of a seed: of the start, and of the order of the mini-batches.

    Args:
        seed: the seed of `Settings`.

    Returns:
        Two generators on the CPU, independent of each other.

    >>> start, order = nnce.training.generators(0)
    >>> start.initial_seed() == order.initial_seed()
    False
    """
    start, order = (torch.Generator().manual_seed(data.stream(seed, number)) for number in (0, 1))
    return start, order


def restore_generator(generator: torch.Generator, state: Tensor) -> None:
    """`generator.set_state`, which crashes on a row of a larger tensor (PyTorch 2.14)."""
    generator.set_state(state.clone())


@dataclass
class Cursor:
    """Position of a run between two steps, for one network or for many side by side.

    Together with the parameters and the optimizer's state it determines the rest of the run.

    >>> cursor = nnce.training.Cursor.at_start([0, 1])
    >>> sorted(cursor.orders(5, torch.device("cpu")))  # an order of 5 examples for each seed
    [0, 1]
    """

    generators: Mapping[int, torch.Generator]
    """Generator of the order of the examples, by seed."""
    epoch: int = 0
    """Finished epochs."""
    step: int = 0
    """Mini-batches so far, in all epochs."""
    recorded: int = -1
    """Last epoch that there is a record of."""
    position: int = 0
    """Examples of the current epoch that have been trained on."""
    seconds: float = 0.0
    """Training time of the current epoch or, until that is recorded, of the last one."""
    _drawn_from: Tensor | None = None
    """States of the generators before they drew the current epoch's orders, [seeds, …]."""

    @staticmethod
    def at_start(seeds: Iterable[int]) -> "Cursor":
        """A cursor before the first step of networks from these seeds."""
        return Cursor({seed: generators(seed)[1] for seed in sorted(set(seeds))})

    def orders(self, n: int, device: torch.device) -> dict[int, Tensor]:
        """The order of n examples in the current epoch, by seed; the same after resuming."""
        if self.position == 0:
            self._drawn_from = self._states()
        else:
            self._restore(self._drawn_from)
        return {seed: data.order(n, drawn, device) for seed, drawn in self.generators.items()}

    def run_epoch(
        self,
        n: int,
        train_on: Callable[[int, int], None],
        between: Callable[[], None] | None,
        *,
        chunk: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        """Train on the rest of the current epoch.

        Args:
            n: number of training examples.
            train_on: trains on the examples from one place in the epoch's order to another.
            between: called between steps, where the run may be saved or stopped; its time does not
                count. None for nothing.
            chunk: examples for each call of train_on.
            batch_size: examples in a mini-batch.
            device: where the examples are.
        """
        began = time.perf_counter() - self.seconds
        while self.position < n:
            end = min(self.position + chunk, n)
            train_on(self.position, end)
            self.step += -(-(end - self.position) // batch_size)
            self.position = end
            paused = time.perf_counter()
            self.seconds = paused - began
            if end < n and between is not None:
                between()
            began += time.perf_counter() - paused
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds = time.perf_counter() - began
        self.epoch += 1
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything in it, for a checkpoint."""
        return {
            "generators": self._drawn_from if self.position else self._states(),
            **{name: getattr(self, name) for name in _NUMBERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there.

        Raises:
            ValueError: a number is missing, of the wrong kind, or does not fit the others.
        """
        self._restore(state["generators"])
        self._drawn_from = state["generators"]
        for name, kind in _NUMBERS.items():
            if type(state[name]) is not kind:
                raise ValueError(f"expected {name} to be {kind.__name__}, got {state[name]!r}")
            setattr(self, name, state[name])
        least = min(self.epoch, self.step, self.position, self.seconds)
        if least < 0 or not self.epoch - 1 <= self.recorded <= self.epoch:
            raise ValueError(f"expected a record of epoch {self.epoch}, got {self.recorded}")

    def _states(self) -> Tensor:
        return torch.stack([generator.get_state() for generator in self.generators.values()])

    def _restore(self, states: Tensor | None) -> None:
        assert states is not None
        for generator, state in zip(self.generators.values(), states, strict=True):
            restore_generator(generator, state)


_NUMBERS: dict[str, type] = {
    **dict.fromkeys(("epoch", "step", "recorded", "position"), int),
    "seconds": float,
}
