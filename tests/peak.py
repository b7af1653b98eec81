"""The peak of memory beyond inputs, parameters and gradients, of a process of its own.

Hooks on saved tensors would not see what a Function keeps on its context, and a process that has
done other things has memory at hand that does not show.
"""

import re
import sys
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from nnce import linear_sigmoid_cross_entropy, pair_sigmoid_cross_entropy


def resident(which):
    """VmRSS or VmHWM, its peak, in MB of 10⁶ bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{which}:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def labels(n, features, num_labels, k=5):
    x = torch.randn(n, features, requires_grad=True)
    W = torch.empty(num_labels, features).normal_(0, features**-0.5).requires_grad_()
    b = torch.zeros(num_labels, requires_grad=True)
    target = torch.randint(0, num_labels, (n, k))
    return (x, W, b), lambda: linear_sigmoid_cross_entropy(x, W, target, linear_bias=b)


def checkpointed(*sizes):
    tensors, loss = labels(*sizes)
    return tensors, lambda: checkpoint(loss, use_reentrant=False)


def pairs(n, features):
    x, y = (torch.randn(n, features, requires_grad=True) for _ in range(2))
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (1.0, -10.0))
    return (x, y, scale, bias), lambda: pair_sigmoid_cross_entropy(x, y, scale, bias)


if __name__ == "__main__":
    what, *sizes = sys.argv[1:]
    problem = {"labels": labels, "checkpointed": checkpointed, "pairs": pairs}[what]
    _, warm_up = problem(*(min(int(size), 1024) for size in sizes))
    warm_up().backward()  # libraries, threads and their packing buffers
    tensors, loss = problem(*map(int, sizes))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    loss().backward()
    gradients = sum(t.grad.numel() * t.grad.element_size() for t in tensors) / 1e6
    print(resident("VmHWM") - before - gradients)
