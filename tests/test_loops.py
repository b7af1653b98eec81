"""What is the loops' own; that they train as autograd does is in test_ensemble.py."""

import copy
import math
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from side_by_side import largest_difference

import nnce
from nnce import kernels, loops
from nnce.algorithm import Hyperparameters
from nnce.ensemble import Ensemble
from nnce.experiments.proof import precision
from nnce.experiments.proof.precision import ulp, ulp_distance

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def last_layer(z, y, has_sigmoid_prime):
    """a, σ(−z) and dz of the last layer for each z, by the compiled loop."""
    with loops._interrupts_wait():
        loops._compile()
    n, kind = len(z), DTYPES[z.dtype]
    width = -(-n // 32) * 32
    places = [np.zeros(width, dtype=kind) for _ in range(6)]
    places[0][:n] = z.numpy()
    sizes = [np.array([size], dtype=np.int64) for size in (n, width)]
    empty = np.zeros(0, dtype=kind)
    targets = np.full(n, y, dtype=kind)
    *in_front, db = places
    loops.example(*in_front, empty, *sizes, targets, has_sigmoid_prime, db, empty)
    return [torch.from_numpy(place[:n]) for place in (places[1], places[2], places[3])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "promised"), [("cross-entropy", 3.0), ("quadratic", 8.0)])
def test_the_last_delta_is_exact_at_every_z(dtype, name, promised):
    (quantity,) = [q for q in precision.quantities() if q.name == f"{name}, dC/dz"]
    z = precision.grid(dtype)
    tiny = torch.finfo(dtype).smallest_normal
    least = math.exp(np.float32(loops._LEAST)) if dtype == torch.float32 else tiny
    for y in (0, 1):
        _, _, dz = last_layer(z, y, name == "quadratic")
        high, low = precision._exact(quantity, z, y)
        ulps = ((dz.double() - high) - low).abs() / ulp(high, dtype)
        normal = high.abs() >= tiny
        assert ulps[normal].max() <= promised
        # Below them: right in sign, and no larger than e^x is where it is kept from underflow.
        below = dz.double()[~normal] * high[~normal].sign()
        assert (below >= 0).all() and (below <= least * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_exponential_is_right_to_two_units(dtype):
    """From z = 20 on σ(−z) is e^(−z), up to a unit in the last place of float32."""
    least = 87.3 if dtype == torch.float32 else 700.0
    z = torch.linspace(37 if dtype == torch.float64 else 20, least, 20_000, dtype=torch.float64)
    z = z.to(dtype)
    _, not_a, _ = last_layer(z, 0, False)
    assert ulp_distance(not_a, torch.exp(-z.double())).max() <= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits(dtype):
    z = torch.tensor([-math.inf, math.inf, math.nan, 0.0], dtype=dtype)
    a, not_a, dz = last_layer(z, 0, False)
    assert a[1] == 1 and a[3] == 0.5 == not_a[3] and a[0] < 1e-37
    assert a[2].isnan() and not_a[2].isnan() and dz[2].isnan()


def networks(R=3, sizes=(12, 9, 3), dtype=torch.float32):
    return [
        nnce.MLP(sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        for seed in range(R)
    ]


def mixed(R=3):
    losses = ("cross-entropy", "quadratic", "cross-entropy")
    return [Hyperparameters(losses[r % 3], 0.5 + r, 0.3 * (r % 2), 0.01 * r) for r in range(R)]


def drawn(n=230, n_in=12, n_out=3, share=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, n_in, generator=generator) * (
        torch.rand(n, n_in, generator=generator) < share
    )
    return x, torch.rand(n, n_out, generator=generator).round()


def orders(R, n=230):
    generator = torch.Generator().manual_seed(7)
    return torch.stack([torch.randperm(n, generator=generator) for _ in range(R)])


def same_bits(one, two):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:threads=")  # of a machine that has fewer
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_bits_are_a_networks_own(share, monkeypatch):
    """Whatever it is trained beside, however many threads there are, and whatever the block."""
    x, y = drawn(share=share)
    alone = networks()
    for r, (network, h) in enumerate(zip(alone, mixed(), strict=True)):
        together = Ensemble([network], [h], batch_size=10, engine="loops")
        for _ in range(2):
            together.train_epoch(x, y, orders(3)[r])
    assert not same_bits(alone[0], networks()[0])
    for threads, block in ((1, 20), (2, 20), (5, 3), (2, 1)):
        monkeypatch.setattr(loops, "_BLOCK_STEPS", block)
        side_by_side = networks()
        together = Ensemble(side_by_side, mixed(), batch_size=10, engine="loops", threads=threads)
        for _ in range(2):
            together.train_epoch(x, y, orders(3))
        assert all(same_bits(a, b) for a, b in zip(alone, side_by_side, strict=True))


def test_dense_inputs_are_walked_as_sparse_ones_are():
    x, y = drawn(share=1.0)
    by_dense, by_sparse = networks(), networks()
    for some, dense in ((by_dense, True), (by_sparse, False)):
        trainer = loops.Loops(some, mixed(), 10, dense=dense)
        trainer.train(x, y, list(orders(3)), 1)
    assert max(map(largest_difference, by_dense, by_sparse)) <= 1e-5


def test_the_examples_are_made_once_and_again_if_x_changes(monkeypatch):
    made = []
    whole = loops.make_inputs
    monkeypatch.setattr(loops, "_kept", loops._Kept())
    monkeypatch.setattr(loops, "make_inputs", lambda *a, **k: (made.append(1), whole(*a, **k))[1])
    x, y = drawn()
    trainers = [Ensemble(networks(), mixed(), batch_size=10, engine="loops") for _ in range(2)]
    for _ in range(2):
        for trainer in trainers:
            trainer.train_epoch(x, y, orders(3))
    assert len(made) == 1
    x[0, 0] += 1
    trainers[0].train_epoch(x, y, orders(3))
    assert len(made) == 2
    changed, fresh = networks(1), networks(1)
    for network, inputs in zip((changed[0], fresh[0]), (x, x.clone()), strict=True):
        Ensemble([network], mixed(1), batch_size=10, engine="loops").train_epoch(
            inputs, y, orders(1)[0]
        )
    assert same_bits(changed[0], fresh[0])


def test_slices_of_a_data_set_are_its_own_and_inference_tensors_are_not_kept(monkeypatch):
    made = []
    whole = loops.make_inputs
    kept = loops._Kept()
    monkeypatch.setattr(loops, "make_inputs", lambda *a, **k: (made.append(1), whole(*a, **k))[1])
    x, _ = drawn()
    first = [kept.get(x[:50], dense=False) for _ in range(3)]
    other = kept.get(x[50:], dense=False)
    assert len(made) == 2 and first[0] is first[2]
    assert np.array_equal(other.values, whole(x[50:].clone(), dense=False).values)
    x[0, 0] += 1
    assert kept.get(x[:50], dense=False) is not first[0] and len(made) == 3
    with torch.inference_mode():
        x = x.clone()
    kept.get(x, dense=False)
    with torch.inference_mode():
        x[0, 0] = 7.0
    assert kept.get(x, dense=False).values[0] == 7.0


def test_a_weight_whose_input_is_0_is_not_touched():
    """Nor read: it may be NaN. An input that is NaN is one like any other."""
    x, y = drawn(n=20)
    x[:, 4] = 0.0
    (network,) = networks(1)
    with torch.no_grad():
        network[0].weight[:, 4] = math.nan
    h = [Hyperparameters("cross-entropy", 0.5)]
    Ensemble([network], h, batch_size=10, engine="loops").train_epoch(x, y, torch.arange(20))
    assert network[0].weight[:, 4].isnan().all()
    assert network[2].weight.isfinite().all()
    x[3, 5] = math.nan
    Ensemble([network], h, batch_size=10, engine="loops").train_epoch(x, y, torch.arange(20))
    assert network[2].weight.isnan().all()


@pytest.mark.filterwarnings("ignore:threads=")
@pytest.mark.skipif(os.name != "posix", reason="timers of POSIX")
@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_is_answered_soon_and_between_two_steps(threads):
    x, y = drawn(n=200_000, n_in=100)
    some = networks(2, (100, 30, 3))
    before = copy.deepcopy(some)
    order = orders(2, 200_000).repeat(1, 10)  # so long that no computer is through it too early
    h = 2 * [Hyperparameters("cross-entropy", 0.5)]
    together = Ensemble(some, h, batch_size=10, engine="loops", threads=threads)
    together.train_epoch(x, y, order[:, :10])  # compiled, and the examples made
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    pressed = []

    def press():
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    try:
        timer = threading.Timer(0.05, press)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            for _ in range(100):
                together.train_epoch(x, y, order)
        # An epoch takes seconds; this is for a computer that does something else for a while.
        assert time.monotonic() - pressed[0] < 1
    finally:
        timer.join()
        signal.signal(signal.SIGINT, handler)
    # A whole number of blocks of 20 steps: those very parameters are met again on the way.
    again = Ensemble(before, h, batch_size=10, engine="loops", threads=1)
    again.train_epoch(x, y, order[:, :10])
    met = [False, False]
    for begin in range(0, order.shape[1], 200):
        for r in (0, 1):
            met[r] = met[r] or same_bits(before[r], some[r])
        if all(met):
            break
        again.train_epoch(x, y, order[:, begin : begin + 200])
    assert all(met)


ONE_NETWORK = """
import sys, torch, nnce
from nnce import loops
from nnce.ensemble import Ensemble, Hyperparameters
network = nnce.MLP((4, 3, 2))
values = [Hyperparameters("cross-entropy", 0.5)]
together = Ensemble([network], values, batch_size=2, engine="loops")
data = torch.rand(4, 4), torch.rand(4, 2), torch.arange(4)
"""
CACHED = """
print(loops.is_cached())
together.train_epoch(*data)
print(sum(loops.train.stats.cache_hits.values()))
"""
INTERRUPTED = """
import os, signal, threading
before = [p.detach().clone() for p in network.parameters()]
loops._compile()
compiled = loops.train
def train(*arguments):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    loops.train = compiled
    return compiled(*arguments)  # compiles for seconds
loops.train = train
try:
    together.train_epoch(*data)
    print("lost")
except KeyboardInterrupt:
    print("answered", len(loops.train.signatures))
    print(all(map(torch.equal, before, network.parameters())))
together.train_epoch(*data)
print(any(map(torch.equal, before, network.parameters())))
"""


def in_a_process(code, begin=ONE_NETWORK, **environment):
    done = subprocess.run(
        [sys.executable, "-c", begin + code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_during_compilation_is_answered_when_that_ends_and_never_lost(tmp_path):
    """No step has been taken then, and training can go on."""
    said = in_a_process(INTERRUPTED, NUMBA_CACHE_DIR=str(tmp_path))
    assert said == ["answered", "1", "True", "False"]


def test_compiled_code_is_found_by_another_process(tmp_path):
    assert in_a_process(CACHED, NUMBA_CACHE_DIR=str(tmp_path)) == ["False", "0"]
    assert in_a_process(CACHED, NUMBA_CACHE_DIR=str(tmp_path)) == ["True", "1"]


DISABLED = """
together = Ensemble([network], values, batch_size=2)
together.train_epoch(*data)
print(together.engine)
try:
    Ensemble([network], values, batch_size=2, engine="loops")
except ValueError as error:
    print(error)
"""


def test_with_numbas_compiler_switched_off_products_are_used_and_loops_refused():
    disabled = {"NUMBA_DISABLE_JIT": "1"}
    said = in_a_process(DISABLED, begin=ONE_NETWORK.replace('"loops"', "None"), **disabled)
    assert " ".join(said) == (
        "products expected a working Numba for engine 'loops', but its compiler is switched off: "
        "unset NUMBA_DISABLE_JIT"
    )


@pytest.mark.parametrize("default", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("flushed", [False, True])
def test_flush_to_zero_is_left_as_it_was(default, flushed):
    """Whatever the default dtype and device."""
    if not torch.set_flush_denormal(flushed):
        pytest.skip("this processor does not flush to zero")
    x, y = drawn()
    before = torch.get_default_dtype()
    together = Ensemble(networks(1), mixed(1), batch_size=10, engine="loops", threads=1)
    order = orders(1)[0]
    least = torch.finfo(torch.float32).smallest_normal
    try:
        torch.set_default_dtype(default)
        with torch.device("meta"):
            together.train_epoch(x, y, order)
        tenth = torch.tensor(least, dtype=torch.float32) * torch.tensor(0.1, dtype=torch.float32)
        assert (tenth == 0) == flushed
    finally:
        torch.set_default_dtype(before)
        torch.set_flush_denormal(False)


def test_where_loops_cannot_be_had(monkeypatch):
    h = [Hyperparameters("cross-entropy", 0.5)]
    with pytest.raises(TypeError, match=r"float32 or float64 for engine 'loops', got torch.bfloat"):
        Ensemble(networks(1, dtype=torch.bfloat16), h, batch_size=2, engine="loops")
    with pytest.raises(ValueError, match="expected engine 'loops' or 'products', got 'loop'"):
        Ensemble(networks(1), h, batch_size=2, engine="loop")
    with pytest.raises(ValueError, match=r"on the CPU for engine 'loops', got meta"):
        Ensemble([networks(1)[0].to("meta")], h, batch_size=2, engine="loops")
    missing = "Numba is not installed: pip install 'nnce[fast]'"
    monkeypatch.setattr(kernels, "numba_problem", lambda: missing)
    with pytest.raises(ValueError, match=r"not installed: pip install 'nnce\[fast\]'"):
        Ensemble(networks(1), h, batch_size=2, engine="loops")
    together = Ensemble(networks(1), h, batch_size=2)
    x, y = drawn()
    together.train_epoch(x, y, orders(1)[0])
    assert together.engine == "products"
