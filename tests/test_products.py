"""What is the matrix products' own; what both engines do is in test_ensemble.py."""

import contextlib

import pytest
import torch
from side_by_side import MIXED, largest_difference, make, train_alone
from torch.profiler import ProfilerActivity, profile

from nnce import data, memory, products
from nnce.training import Settings


def small():
    generator = torch.Generator().manual_seed(0)
    split = data.Split(
        torch.rand(60, 4, generator=generator), torch.rand(60, 2, generator=generator).round()
    )
    return data.Dataset(split, split, split)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_groups_change_nothing(digits, size, monkeypatch):
    dataset = data.Dataset(*(data.Split(x.double(), y.double()) for x, y in digits))
    settings = [Settings((9,), loss, lr=lr, seed=s) for s, (loss, lr) in enumerate(MIXED)]
    order = data.order(1_197, torch.Generator().manual_seed(5))
    bytes_of_one = memory.bytes_of((64, 9, 10), torch.float64)
    monkeypatch.setattr(products, "CACHE_BYTES", size * bytes_of_one)
    together = make(settings, dataset, engine="products")
    together.train_epoch(*dataset.train, order)
    (walk,) = together._trainer._walks
    assert max(group.size for group in walk._groups) == size
    for network, one in zip(together.networks, settings, strict=True):
        alone = make([one], dataset, engine="products")
        alone.train_epoch(*dataset.train, order)
        assert largest_difference(network, alone.networks[0]) <= 1e-12


@pytest.mark.parametrize("R", [1, 5])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_allocates_nothing_but_wrapped_scalars(digits, R, momentum):
    settings = [Settings(loss=MIXED[r][0], lr=0.1, momentum=momentum, l2=1.0) for r in range(R)]
    together = make(settings, digits, engine="products")
    order = data.order(1_197, torch.Generator().manual_seed(5))
    together.train_epoch(*digits.train, order)  # the places are made
    # A warm-up: the profiler's own start may allocate.
    for _ in range(2):
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profiled:
            together.train_epoch(*digits.train, order)
    sizes = [event.cpu_memory_usage for event in profiled.events() if event.name == "[memory]"]
    assert max(sizes, default=0) <= 16
    assert any(event.name == "aten::sigmoid_backward" for event in profiled.events())


@pytest.mark.parametrize("R", [1, 5])
def test_capturing_a_graph_moves_nothing(digits, R, monkeypatch):
    """Without CUDA: a graph that runs what it should have recorded, while it records and later."""
    blocks = []

    class Stream(contextlib.nullcontext):
        def wait_stream(self, other):
            pass

    class Graph(contextlib.nullcontext):
        def replay(self):
            blocks.pop(0)._run()

    for name, stand_in in (
        ("Stream", lambda device: Stream()),
        ("current_stream", lambda device: Stream()),
        ("stream", lambda stream: stream),
        ("CUDAGraph", Graph),
        ("graph", lambda graph: graph),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    settings = [
        Settings(loss=MIXED[r][0], lr=MIXED[r][1], momentum=0.5 * (r == 1), seed=r)
        for r in range(R)
    ]
    by_graph, eager = (
        make(settings, digits, engine="products"),
        make(settings, digits, engine="products"),
    )
    for together in (by_graph, eager):
        together._trainer_for(digits.train.x, torch.arange(10))
    (walk,) = by_graph._trainer._walks
    walk._graph = True
    run = products._Block.run

    def remember(block):
        if block._wants_graph:
            blocks.append(block)
        run(block)

    monkeypatch.setattr(products._Block, "run", remember)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        order = data.order(1_197, generator)
        by_graph.train_epoch(*digits.train, order)
        assert all(block._graph is not None for block in walk._blocks.values())
        eager.train_epoch(*digits.train, order)
    for a, b in zip(by_graph.networks, eager.networks, strict=True):
        assert largest_difference(a, b) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("R", [1, 5])
def test_cuda_graph_is_eager_and_allocates_nothing(digits, R):
    dataset = data.Dataset(*(data.Split(x.cuda().double(), y.cuda().double()) for x, y in digits))
    settings = [
        Settings(loss=MIXED[r][0], lr=MIXED[r][1], momentum=0.5 * (r == 1), seed=r)
        for r in range(R)
    ]
    order = data.order(1_197, torch.Generator().manual_seed(5), "cuda")
    by_graph, eager = (
        make(settings, dataset, engine="products"),
        make(settings, dataset, engine="products"),
    )
    eager._graph = False
    for epoch in range(3):
        if epoch == 1:
            torch.cuda.synchronize()
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
        by_graph.train_epoch(*dataset.train, order)
        if epoch == 2:
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    for _ in range(3):
        eager.train_epoch(*dataset.train, order)
    for a, b in zip(by_graph.networks, eager.networks, strict=True):
        assert largest_difference(a, b) <= 1e-12
    for network, one in zip(by_graph.networks, settings, strict=True):
        assert largest_difference(network, train_alone(one, dataset, 3 * [order])) <= 1e-12


def test_two_blocks_are_kept():
    """However many lengths of an order come by."""
    together = make([Settings((3,)), Settings((3,), seed=1)], small(), 2, engine="products")
    x, y = small().train
    for n in (*range(60, 0, -1), 60, 1):
        together.train_epoch(x, y, torch.arange(n))
    assert list(together._trainer._walks[0]._blocks) == [60, 1]
    kept = together._trainer._walks[0]._blocks[60]
    together.train_epoch(x, y, torch.arange(60))
    assert together._trainer._walks[0]._blocks[60] is kept


def test_own_orders_must_be_there_from_the_first_epoch(digits):
    together = make([Settings((3,)), Settings((3,), seed=1)], digits, engine="products")
    x, y = digits.train
    together.train_epoch(x, y, torch.arange(20))
    with pytest.raises(ValueError, match="expected one order for all networks, as at the first"):
        together.train_epoch(x, y, torch.arange(20).expand(2, -1))
