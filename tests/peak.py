"""The peak of memory of a loss and its backward, of a process of its own.

Hooks on saved tensors would not see what a Function keeps on its context, and a process that has
done other things has freed memory that does not show.
"""

import contextlib
import os
import subprocess
import sys

import torch
from torch.utils.checkpoint import checkpoint

from nnce import (
    linear_sigmoid_cross_entropy,
    linear_sigmoid_focal_loss,
    pair_sigmoid_cross_entropy,
)
from nnce.experiments import timing
from nnce.labels.function import SMALL


def labels(n, features, num_labels, dtype=torch.float32, autocast=None, walked=None):
    x = torch.randn(n, features).to(dtype).requires_grad_()
    W = torch.empty(num_labels, features).normal_(0, features**-0.5).to(dtype).requires_grad_()
    b = torch.zeros(num_labels, dtype=dtype, requires_grad=True)
    target = torch.randint(0, num_labels, (n, 5))

    def loss():
        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
            return (walked or linear_sigmoid_cross_entropy)(x, W, target, linear_bias=b)

    return (x, W, b), loss


def focal(*sizes):
    return labels(*sizes, walked=linear_sigmoid_focal_loss)


def checkpointed(*sizes):
    tensors, loss = labels(*sizes)
    return tensors, lambda: checkpoint(loss, use_reentrant=False)


def pairs(n, features):
    x, y = (torch.randn(n, features, requires_grad=True) for _ in range(2))
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (1.0, -10.0))
    return (x, y, scale, bias), lambda: pair_sigmoid_cross_entropy(x, y, scale, bias)


def measured(what, *options):
    """MB of 10⁶ bytes that a loss and its backward take beyond inputs, parameters and gradients."""
    problem = {"labels": labels, "focal": focal, "checkpointed": checkpointed, "pairs": pairs}[what]
    sizes = [int(option) for option in options if option.isdigit()]
    dtypes = [getattr(torch, option) for option in options if not option.isdigit()]
    # One label more than are computed without a walk, where there are more.
    *first, last = (min(size, 1024) for size in sizes)
    _, warm_up = problem(*first, last + (sizes[-1] > SMALL), *dtypes)
    warm_up().backward()  # libraries, threads and their packing buffers
    tensors, loss = problem(*sizes, *dtypes)
    _, bytes_more = timing.peak_memory(lambda: loss().backward(), torch.device("cpu"))
    gradients = sum(t.grad.numel() * t.grad.element_size() for t in tensors)
    return (bytes_more - gradients) / 1e6


@contextlib.contextmanager
def meter():
    """A function like `measured`, whose every call is done in a process of its own."""
    command = [sys.executable, __file__]
    # glibc gives large blocks back to the system at once only below a fixed threshold.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, bufsize=1, **pipes) as process:

        def measured(*arguments):
            print(*arguments, file=process.stdin)
            return float(process.stdout.readline())

        yield measured
        process.stdin.close()


if __name__ == "__main__":
    # A fork for each line. Only imports precede it, some of which happen in the first calls.
    tiny = ("2", "2", str(SMALL + 1))
    for arguments in ("labels", *tiny), ("checkpointed", *tiny), ("pairs", *tiny[:2]):
        measured(*arguments)
    for line in sys.stdin:
        if not os.fork():
            print(measured(*line.split()), flush=True)
            os._exit(0)
        os.wait()
