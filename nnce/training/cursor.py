"""Position of a run between two steps, and the orders of its examples, redrawn on resuming."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnce import data


def generators(seed: int) -> tuple[torch.Generator, torch.Generator]:
    """The random generators of a seed: for the initial parameters, and for the example order.

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


@dataclass
class Cursor:
    """Position of a run between two steps, for one network or for many side by side.

    Together with the parameters and the optimizer's state, it determines the rest of the run.

    >>> cursor = nnce.training.Cursor.at_start([0, 1])
    >>> sorted(cursor.orders(5, torch.device("cpu")))  # an order of 5 examples for each seed
    [0, 1]
    """

    generators: Mapping[int, torch.Generator]
    """For each seed, the generator of the example order."""
    epoch: int = 0
    """Number of finished epochs."""
    step: int = 0
    """Number of mini-batches so far, over all epochs."""
    recorded: int = -1
    """Last recorded epoch; −1 before the first record."""
    position: int = 0
    """Number of examples of the current epoch already trained on."""
    seconds: float = 0.0
    """Training time of the current epoch; between epochs, of the last one until it is recorded."""
    _drawn_from: Tensor | None = None
    """States of the generators before they drew the current epoch's orders, [seeds, …]."""

    @staticmethod
    def at_start(seeds: Iterable[int]) -> "Cursor":
        """A cursor before the first step, for networks with these seeds."""
        return Cursor({seed: generators(seed)[1] for seed in sorted(set(seeds))})

    def orders(self, n: int, device: torch.device) -> dict[int, Tensor]:
        """For each seed, the order of n examples in the current epoch; the same after resuming."""
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
            train_on: trains on the examples at positions [begin, end) of the epoch's order.
            between: called between steps, where the run may be saved or stopped; its time is not
                counted. None for no call.
            chunk: number of examples per call of train_on.
            batch_size: number of examples in a mini-batch.
            device: device of the examples.
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
        """The complete state of the cursor, for a checkpoint."""
        return {
            "generators": self._drawn_from if self.position else self._states(),
            **{name: getattr(self, name) for name in _NUMBERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned.

        Raises:
            KeyError: a value is missing.
            ValueError: a number has the wrong type or is inconsistent with the others.
        """
        self._restore(state["generators"])
        self._drawn_from = state["generators"]
        for name, kind in _NUMBERS.items():
            if type(state[name]) is not kind:
                raise ValueError(f"expected {name} to be {kind.__name__}, got {state[name]!r}")
            setattr(self, name, state[name])
        least = min(self.epoch, self.step, self.position, self.seconds)
        if least < 0 or not self.epoch - 1 <= self.recorded <= self.epoch:
            raise ValueError(
                f"expected epoch, step, position and seconds of at least 0, and recorded to be "
                f"epoch or epoch - 1, got { {name: getattr(self, name) for name in _NUMBERS} }"
            )

    def _states(self) -> Tensor:
        return torch.stack([generator.get_state() for generator in self.generators.values()])

    def _restore(self, states: Tensor | None) -> None:
        assert states is not None
        for generator, state in zip(self.generators.values(), states, strict=True):
            generator.set_state(state.clone())  # it crashes on a row of a tensor (PyTorch 2.14)


_NUMBERS: dict[str, type] = {
    **dict.fromkeys(("epoch", "step", "recorded", "position"), int),
    "seconds": float,
}
