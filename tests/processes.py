"""What test_labels.py and test_pairs.py have several processes do, over gloo."""

import torch
from torch import distributed

from nnce import (
    LinearSigmoidCrossEntropyLoss,
    linear_sigmoid_cross_entropy,
    pair_sigmoid_cross_entropy,
)

WORLD = 3
SHARDS = (5, 0, 12)  # labels of each process
PAIRS = (4, 0, 6)  # pairs of each process
N, FEATURES = 7, 4


def drawn(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def part(tensor, sizes, rank):
    begin = sum(sizes[:rank])
    return tensor[begin : begin + sizes[rank]].clone().requires_grad_()


def labels_problem():
    """x, W, b, target, weights, and the upstream gradient of "none"."""
    labels = sum(SHARDS)
    target = torch.randint(-1, labels, (N, 2), generator=torch.Generator().manual_seed(3))
    return (
        drawn(N, FEATURES, seed=0),
        drawn(labels, FEATURES, seed=1),
        drawn(labels, seed=2),
        target,
        drawn(labels, seed=4).abs(),
        drawn(N, seed=5),
    )


def x_of(rank):
    return drawn(N, FEATURES, seed=20 + rank)


def target_of(rank):
    return torch.arange(N) + rank


def pairs_problem():
    """x, y, scale, bias, and the upstream gradient of "none"."""
    n = sum(PAIRS)
    numbers = torch.tensor([2.0, -1.0], dtype=torch.float64)
    return drawn(n, 3, seed=6), drawn(n, 3, seed=7), numbers[0], numbers[1], drawn(n, seed=8)


def half_pairs_problem():
    """x and y in float16, each with a direction that all share: dz/n is below float16's numbers."""
    n = 100 * sum(PAIRS)
    x, y = (
        torch.nn.functional.normalize(drawn(n, 16, seed=seed) + sign, dim=1).half()
        for seed, sign in ((9, 0.5), (10, -0.5))
    )
    return x, y, torch.tensor(10.0), torch.tensor(-10.0)


def sharded_parameters(rank):
    """topk and logits of a layer after fully_shard, and the parameters' whole gradients."""
    from torch.distributed.fsdp import fully_shard

    _, W, b, *_ = labels_problem()
    layer = LinearSigmoidCrossEntropyLoss(FEATURES, len(W), dtype=torch.float64)
    layer.load_state_dict({"weight": W, "bias": b})
    fully_shard(layer, mesh=distributed.init_device_mesh("cpu", (WORLD,)))
    x = x_of(rank)
    z = layer.logits(x)
    z.square().sum().backward()
    gradients = [p.grad.full_tensor() for p in (layer.weight, layer.bias)]
    return z.detach(), *layer.topk(x, 4), *gradients


def in_one_process(rank, folder):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    group = distributed.group.WORLD
    found = {}

    x, W, b, target, weight, upstream = labels_problem()
    for reduction in ("batchmean", "mean", "sum", "none"):
        for dense in (False, True):
            x = x.detach().requires_grad_()
            mine = [part(t, SHARDS, rank) for t in (W, b)]
            y = target
            if dense:
                y = torch.zeros(N, sum(SHARDS) + 1, dtype=torch.float64)
                y = y.scatter(1, target % (sum(SHARDS) + 1), 1)[:, :-1]
            C = linear_sigmoid_cross_entropy(
                x,
                mine[0],
                y,
                linear_bias=mine[1],
                weight=part(weight, SHARDS, rank).detach(),
                reduction=reduction,
                block=2,
                group=group,
            )
            pulled = upstream if reduction == "none" else None
            for time in ("first", "second"):
                gradients = torch.autograd.grad(C, (x, *mine), pulled, retain_graph=True)
                found["labels", reduction, dense, time] = (C.detach(), *gradients)

    layer = LinearSigmoidCrossEntropyLoss(
        FEATURES, max(SHARDS[rank], 1), group=group, dtype=torch.float64
    )
    layer.weight.data = part(W, SHARDS, rank).detach().round()
    layer.bias.data = part(b, SHARDS, rank).detach().round()
    layer.num_labels = SHARDS[rank]
    for k in (1, 6, sum(SHARDS)):
        found["topk", k] = layer.topk(x.detach().round(), k)

    x, y, scale, bias, upstream = pairs_problem()
    for reduction in ("batchmean", "mean", "sum", "none"):
        mine = [part(t, PAIRS, rank) for t in (x, y)]
        both = [t.clone().requires_grad_() for t in (scale, bias)]
        C = pair_sigmoid_cross_entropy(*mine, *both, reduction=reduction, block=2, group=group)
        pulled = part(upstream, PAIRS, rank).detach() if reduction == "none" else None
        for time in ("first", "second"):
            gradients = torch.autograd.grad(C, (*mine, *both), pulled, retain_graph=True)
            found["pairs", reduction, time] = (C.detach(), *gradients)
    x, y, scale, bias = half_pairs_problem()
    inputs = [part(t, [100 * size for size in PAIRS], rank) for t in (x, y)]
    inputs += [t.requires_grad_() for t in (scale, bias)]
    C = pair_sigmoid_cross_entropy(*inputs, group=group)
    found["half pairs"] = torch.autograd.grad(C * 2.0**16, inputs)
    # Data-parallel, each process with its own examples, and nothing said of unused parameters.
    layer = LinearSigmoidCrossEntropyLoss(FEATURES, sum(SHARDS), dtype=torch.float64)
    layer.load_state_dict({"weight": W, "bias": b})
    parallel = torch.nn.parallel.DistributedDataParallel(layer)
    for _ in range(2):
        parallel(x_of(rank), target_of(rank)).backward()
    found["parallel"] = (layer.weight.grad, layer.bias.grad)
    found["sharded"] = sharded_parameters(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
