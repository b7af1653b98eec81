"""What is the matrix products' own; what both engines do is in test_ensemble.py."""

import contextlib
import functools

import pytest
import torch
from side_by_side import MIXED, largest_difference, make, train_alone
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from nnce import data
from nnce.engines import products
from nnce.training import Settings


def small():
    generator = torch.Generator().manual_seed(0)
    split = data.Split(
        torch.rand(60, 4, generator=generator), torch.rand(60, 2, generator=generator).round()
    )
    return data.Dataset(split, split, split)


class Recorded(TorchFunctionMode):
    """PyTorch's functions as they are called, to be looked at or called again."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls.append(functools.partial(function, *args, **(kwargs or {})))
        return self.calls[-1]()

    def of(self, function):
        return [call for call in self.calls if call.func is function]


@pytest.fixture
def side_by_side(monkeypatch):
    """As on CUDA: each call is for all networks."""
    monkeypatch.setattr(products, "batches_networks", lambda device: True)


@pytest.mark.parametrize("own_orders", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_networks_side_by_side_are_trained_as_each_alone(
    digits, own_orders, momentum, side_by_side
):
    dataset = data.Dataset(*(data.Split(x.double(), y.double()) for x, y in digits))
    settings = [
        Settings((9,), loss, lr=lr, momentum=momentum, l2=float(s), seed=s)
        for s, (loss, lr) in enumerate(MIXED)
    ]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(settings))]
    orders = torch.stack([data.order(1_197, generator) for generator in generators])
    if not own_orders:
        orders = orders[:1].expand(len(settings), -1)
    together = make(settings, dataset, engine="products")
    with Recorded() as calls:
        together.train_epoch(*dataset.train, orders if own_orders else orders[0])
    products_of = {call.args[0].shape[0] for call in calls.of(torch.baddbmm)}
    assert products_of == {len(settings)}  # each is one call for all networks
    for network, one, order in zip(together.networks, settings, orders, strict=True):
        assert largest_difference(network, train_alone(one, dataset, [order])) <= 1e-12


def test_one_order_may_follow_own_orders(digits, side_by_side):
    dataset = data.Dataset(*(data.Split(x.double(), y.double()) for x, y in digits))
    settings = [Settings((3,)), Settings((3,), seed=1)]
    together = make(settings, dataset, engine="products")
    x, y = dataset.train
    orders = torch.stack([torch.arange(20), torch.arange(20).flip(0)])
    for order in (orders[0], orders, orders[1]):
        together.train_epoch(x, y, order)
    for r, network in enumerate(together.networks):
        alone = train_alone(settings[r], dataset, [orders[0], orders[r], orders[1]])
        assert largest_difference(network, alone) <= 1e-12


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
def test_capturing_a_graph_moves_nothing(digits, R, monkeypatch, side_by_side):
    """Without CUDA: a graph that runs what it should have recorded, while it records and later."""
    graphs = []

    class Stream(contextlib.nullcontext):
        def wait_stream(self, other):
            pass

    class Graph(Recorded):
        def __init__(self):
            super().__init__()
            self.replays = 0
            graphs.append(self)

        def replay(self):
            self.replays += 1
            for call in self.calls:
                call()

    for name, stand_in in (
        ("Stream", lambda device: Stream()),
        ("current_stream", lambda device: Stream()),
        ("stream", lambda stream: stream),
        ("CUDAGraph", Graph),
        ("graph", lambda graph: graph),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(products, "captures_graphs", lambda device: True)
    settings = [
        Settings(loss=MIXED[r][0], lr=MIXED[r][1], momentum=0.5 * (r == 1), seed=r)
        for r in range(R)
    ]
    by_graph = make(settings, digits, engine="products")
    eager = make(settings, digits, engine="products", graph=False)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        order = data.order(1_197, generator)
        by_graph.train_epoch(*digits.train, order)
        eager.train_epoch(*digits.train, order)
    assert [graph.replays for graph in graphs] == [2]  # an epoch of digits is one block
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
    by_graph = make(settings, dataset, engine="products")
    eager = make(settings, dataset, engine="products", graph=False)
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
    """However many lengths of an order come by: memory for the two that were used last."""
    together = make([Settings((3,)), Settings((3,), seed=1)], small(), 2, engine="products")
    x, y = small().train

    def allocates(n):
        with Recorded() as calls:
            together.train_epoch(x, y, torch.arange(n))
        return bool(calls.of(torch.Tensor.new_empty))

    for n in (60, 7):
        assert allocates(n)
    assert not allocates(60) and not allocates(7)
    assert allocates(5) and not allocates(7) and not allocates(5)
    assert allocates(60) and not allocates(5)
