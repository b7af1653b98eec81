"""Training in several processes, on one machine or many, started by `torchrun`.

A single network is trained by all processes: each takes its share of every mini-batch, and
gradients are summed over all shares and divided by the size of the mini-batch. Shares may differ in
size and may be empty. Many networks are divided among the processes.
"""

import os
import re
import secrets
import sys
import time
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
from torch import Tensor, distributed

# Seconds that rank 0 waits for the other processes to join.
_PATIENCE = 300
# Seconds that the others wait for rank 0 to print the error.
_MOMENT = 10.0

Item = TypeVar("Item")


class World(NamedTuple):
    """The processes of a job, and the rank of this one.

    `largest`, `gather`, `exchange` and `broadcast` are collective: all processes must call them, in
    the same order.
    """

    rank: int = 0
    """Rank of this process."""
    size: int = 1
    """Number of processes."""
    joined: bool = False
    """Whether there is a process group, possibly of one process."""

    def share(self, of: Tensor) -> Tensor:
        """This process's share of a mini-batch: as equal as possible, and possibly empty."""
        return of.tensor_split(self.size)[self.rank]

    def largest(self, number: int) -> int:
        """The largest number over all processes."""
        if self.size == 1:
            return number
        together = torch.tensor(number)
        distributed.all_reduce(together, distributed.ReduceOp.MAX)
        return int(together)

    def gather(self, one: Item) -> list[Item]:
        """Gather the values of all processes on rank 0; return [] on the other ranks."""
        if self.size == 1:
            return [one]
        everyone = [one] * self.size if self.rank == 0 else None
        distributed.gather_object(one, everyone)
        return everyone or []

    def exchange(self, one: Item) -> list[Item]:
        """Gather the values of all processes on every process."""
        everyone = [one] * self.size
        if self.size > 1:
            distributed.all_gather_object(everyone, one)
        return everyone

    def broadcast(self, one: Item | None) -> Item:
        """Return rank 0's value on every process."""
        place = [one]
        if self.size > 1:
            distributed.broadcast_object_list(place)
        return cast(Item, place[0])


ALONE = World()


def under_torchrun() -> bool:
    """Whether `torchrun` has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """Whether this process is rank 0, which does all output, or the only one."""
    return not under_torchrun() or os.environ.get("RANK", "0") == "0"


def join() -> World:
    """Join the process group if `torchrun` started this process; otherwise return ALONE.

    CPU tensors are exchanged over gloo, CUDA tensors over NCCL. Each process uses the GPU of its
    local rank.
    """
    if not under_torchrun():
        return ALONE
    if not distributed.is_initialized():
        gpus = torch.cuda.device_count()
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
        store, rank, size = next(distributed.rendezvous("env://"))  # type: ignore[attr-defined]
        name = _agreed_name(store, rank, size)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            store=distributed.PrefixStore(name, store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=size,
        )
    return World(distributed.get_rank(), distributed.get_world_size(), joined=True)


def _agreed_name(store: Any, rank: int, size: int) -> str:  # PyTorch has no public type for it
    """A new name for the process group, agreed on by all processes.

    After a restart, `torchrun` reuses the store, in which gloo would find the addresses of the
    previous processes. A new prefix avoids these. (The restart count is no such prefix: it can
    differ between machines.) Each process registers a random number, and rank 0 replies to it with
    its own number, which is the name.
    """
    own = secrets.token_hex(8)
    if rank:
        store.set(f"hello {rank}", own)
        name = str(store.get(f"welcome {own}"), "ascii")  # waits
        store.set(f"{name} {rank}", "here")
        return name
    others, answered = range(1, size), set()
    patience = time.monotonic() + _PATIENCE
    while not all(store.check([f"{own} {other}"]) for other in others):
        for other in others:
            if store.check([f"hello {other}"]):
                number = str(store.get(f"hello {other}"), "ascii")
                # An answered number may be of a previous process, until its successor replaces it.
                if number not in answered:
                    store.set(f"welcome {number}", own)
                    answered.add(number)
        if time.monotonic() > patience:
            raise RuntimeError(
                f"expected {size - 1} other processes, but not all joined within {_PATIENCE} s"
            )
        time.sleep(0.02)
    return own


def lost(error: BaseException) -> bool:
    """Whether the error means that another process cannot be reached."""
    words = r"Connection (closed|reset|refused)|[Gg]loo|NCCL|Broken pipe|not all joined|store"
    return (
        isinstance(error, RuntimeError) and under_torchrun() and bool(re.search(words, str(error)))
    )


def leave() -> None:
    """Leave the process group, if there is one."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def processes_here() -> int:
    """Number of the job's processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else 1


def restarts_left() -> int:
    """Number of times that `torchrun` would still restart the job."""
    most, done = (
        int(os.environ.get(f"TORCHELASTIC_{name}", "0"))
        for name in ("MAX_RESTARTS", "RESTART_COUNT")
    )
    return max(0, most - done)


def processors() -> int:
    """Number of this machine's processors per process of the job."""
    return max(1, (os.cpu_count() or 1) // processes_here())


def wait_for_rank0_error() -> None:
    """On ranks other than 0, wait before reporting an error, so that rank 0 can report it first.

    `torchrun` ends all processes when one exits. While this one waits, rank 0 reports the error and
    exits, and `torchrun` ends this one. If the error did not occur on rank 0, the wait times out,
    and this process must report it.
    """
    if not is_first():
        time.sleep(_MOMENT)


def exit_at_once(status: int) -> NoReturn:
    """Exit without Python's shutdown, during which gloo's threads sometimes abort the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
