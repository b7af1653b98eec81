"""Several processes, on one machine or many, that train one network or share many out.

`torchrun` starts them. Where one network is trained, each process takes its share of every
mini-batch. Gradients are sums over the examples of all shares, divided by how many there are in
all: shares need not be equal, and may be empty.
"""

import os
import re
import secrets
import sys
import time
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

import torch
from torch import Tensor, distributed

# Seconds that the first process waits for the others to come.
_PATIENCE = 300
# Seconds that the others wait for rank 0 to print the error.
_MOMENT = 10.0

Item = TypeVar("Item")


class World(NamedTuple):
    """The processes of a job, and which of them this one is.

    Each of the methods that wait must be called by all of them, in the same order.
    """

    rank: int = 0
    size: int = 1
    joined: bool = False
    """Whether there is a process group, possibly of one process."""

    def share(self, of: Tensor) -> Tensor:
        """This process's part of a mini-batch, as equal as can be, and empty where it is small."""
        return of.tensor_split(self.size)[self.rank]

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers; waits for them."""
        if self.size == 1:
            return number
        together = torch.tensor(number)
        distributed.all_reduce(together, distributed.ReduceOp.MAX)
        return int(together)

    def gather(self, one: Item) -> list[Item]:
        """Gather the values of all processes on rank 0, and wait for them; None on the others."""
        if self.size == 1:
            return [one]
        everyone = [one] * self.size if self.rank == 0 else None
        distributed.gather_object(one, everyone)
        return everyone or []

    def exchange(self, one: Item) -> list[Item]:
        """Gather the values of all processes on each of them, and wait for them."""
        everyone = [one] * self.size
        if self.size > 1:
            distributed.all_gather_object(everyone, one)
        return everyone

    def broadcast(self, one: Item | None) -> Item:
        """The value of rank 0; waits for it."""
        place = [one]
        if self.size > 1:
            distributed.broadcast_object_list(place)
        return cast(Item, place[0])


ALONE = World()


def under_torchrun() -> bool:
    """Whether `torchrun` has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """Whether this process is the first one, which speaks and writes, or the only one."""
    return not under_torchrun() or os.environ.get("RANK", "0") == "0"


def join() -> World:
    """The world that `torchrun` has started this process in; ALONE if it has not.

    Over gloo, and over NCCL for tensors on CUDA, where each process takes the GPU of its local
    rank.
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
    """A name that these processes agree on and that has not been used before.

    `torchrun` restarts processes with the store of those that are gone, and gloo would call at the
    addresses that these have left there. (Its count of restarts is not the same on all machines.)
    So each process says hello with a number of its own, and the first one answers that number.
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
                if number not in answered:  # or it is of one that is gone
                    store.set(f"welcome {number}", own)
                    answered.add(number)
        if time.monotonic() > patience:
            raise RuntimeError(f"{size - 1} other processes were expected, and not all came")
        time.sleep(0.02)
    return own


def lost(error: BaseException) -> bool:
    """Whether the error says that another process cannot be reached any more."""
    words = r"Connection (closed|reset|refused)|[Gg]loo|NCCL|Broken pipe|not all came|store"
    return (
        isinstance(error, RuntimeError) and under_torchrun() and bool(re.search(words, str(error)))
    )


def leave() -> None:
    """Leave the world, if there is one."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def processes_here() -> int:
    """How many of the job's processes are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else 1


def restarts_left() -> int:
    """How many times `torchrun` would still restart the job."""
    most, done = (
        int(os.environ.get(f"TORCHELASTIC_{name}", "0"))
        for name in ("MAX_RESTARTS", "RESTART_COUNT")
    )
    return max(0, most - done)


def processors() -> int:
    """How many of the machine's there are for each of them."""
    return max(1, (os.cpu_count() or 1) // processes_here())


def wait_for_rank0_error() -> None:
    """Wait, in a process that fails and is not the first, for that one to fail and say why.

    Else `torchrun` would end the first one before it has. It ends this one instead, in here. Where
    nothing is wrong with the first one, this one waits in vain, and has to say it itself.
    """
    if not is_first():
        time.sleep(_MOMENT)


def exit_at_once(status: int) -> NoReturn:
    """Leave the process without taking Python down, in which gloo's threads sometimes abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
