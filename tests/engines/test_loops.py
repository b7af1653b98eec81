"""What is the loops' own; that they train as autograd does is in test_ensemble.py."""

import copy
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import mpmath
import numpy as np
import pytest
import torch
from conftest import ROOT
from side_by_side import largest_difference

import nnce
from nnce import kernels
from nnce.algorithm import Hyperparameters
from nnce.engines import loops
from nnce.engines.ensemble import Ensemble
from nnce.experiments.proof import precision

# And their digits.
DTYPES = {torch.float32: 24, torch.float64: 53}


def last_delta(z, y, loss):
    """dC/dz of the last layer for each z, as trained with: the first velocity of its biases.

    One example whose only input is 1; z is W + b, where W is 0 unless z is infinite. With a rate of
    1 the velocity is −dC/dz.
    """
    network = nnce.MLP((1, len(z)), dtype=z.dtype)
    largest = torch.finfo(z.dtype).max
    with torch.no_grad():
        network[0].bias.copy_(z.clamp(-largest, largest))
        network[0].weight.copy_((network[0].bias * z.isinf())[:, None].nan_to_num())
    together = Ensemble([network], [Hyperparameters(loss, 1.0, 0.5)], batch_size=1, engine="loops")
    x, target = torch.ones(1, 1, dtype=z.dtype), torch.full((1, len(z)), y, dtype=z.dtype)
    together.train_epoch(x, target, torch.arange(1))
    _, velocity = together.state_dict()["velocities"]
    return -velocity[0]


def exact_delta(z, y, loss):
    """The same by mpmath."""
    s, t = 1 / (1 + mpmath.exp(-z)), 1 / (1 + mpmath.exp(z))
    delta = -t if y else s
    return delta * s * t if loss == "quadratic" else delta


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("loss", "promised"), [("cross-entropy", 3.0), ("quadratic", 8.0)])
def test_the_last_delta_is_exact_at_every_z(dtype, loss, promised):
    """Up to some units in the last place."""
    z = precision.grid(dtype)
    tiny, digits = torch.finfo(dtype).smallest_normal, DTYPES[dtype]
    for y in (0, 1):
        with mpmath.workdps(60):
            for value, dz in zip(z.tolist(), last_delta(z, y, loss).tolist(), strict=True):
                exact = exact_delta(mpmath.mpf(value), y, loss)
                if abs(exact) >= tiny:
                    _, exponent = mpmath.frexp(exact)
                    assert abs(dz - exact) <= promised * mpmath.ldexp(1, exponent - digits)
                else:  # right in sign, and no larger than e^x where it is kept from underflow
                    assert 0 <= dz * mpmath.sign(exact) <= 1.001 * tiny


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_exponential_is_right_to_two_units(dtype):
    """From z = 20 on σ(−z) is e^(−z), up to a unit in the last place of float32."""
    least = 87.3 if dtype == torch.float32 else 700.0
    z = torch.linspace(37 if dtype == torch.float64 else 20, least, 20_000, dtype=torch.float64)
    z = z.to(dtype)
    not_a = -last_delta(z, 1, "cross-entropy")
    exact = torch.exp(-z.double())
    # The distance to the next smaller number, which is the smaller of its two neighbors'.
    unit = exact.to(dtype) - exact.to(dtype).nextafter(torch.zeros_like(z))
    assert ((not_a.double() - exact).abs() / unit.double()).max() <= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limits(dtype):
    z = torch.tensor([-math.inf, math.inf, math.nan, 0.0], dtype=dtype)
    a, not_a = last_delta(z, 0, "cross-entropy"), -last_delta(z, 1, "cross-entropy")
    assert a[1] == 1 and a[3] == 0.5 == not_a[3] and a[0] < 1e-37
    assert not_a[0] == 1 and not_a[1] < 1e-37
    assert a[2].isnan() and not_a[2].isnan()


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
def test_bits_are_a_networks_own(share):
    """Whatever it is trained with, however many threads there are, and call by call or at once."""
    x, y = drawn(share=share)
    alone = networks()
    for r, (network, h) in enumerate(zip(alone, mixed(), strict=True)):
        together = Ensemble([network], [h], batch_size=10, engine="loops")
        for _ in range(2):
            together.train_epoch(x, y, orders(3)[r])
    assert not same_bits(alone[0], networks()[0])
    for threads, chunk in ((1, 230), (2, 230), (5, 30), (2, 10)):
        side_by_side = networks()
        together = Ensemble(side_by_side, mixed(), batch_size=10, engine="loops", threads=threads)
        for _ in range(2):
            for part in orders(3).split(chunk, dim=1):
                together.train_epoch(x, y, part)
        assert all(same_bits(a, b) for a, b in zip(alone, side_by_side, strict=True))


def test_dense_inputs_are_walked_as_sparse_ones_are():
    x, y = drawn(share=1.0)
    by_dense, by_sparse = networks(), networks()
    for some, dense in ((by_dense, True), (by_sparse, False)):
        trainer = loops.Loops(some, mixed(), 10, dense=dense)
        trainer.train(x, y, list(orders(3)), 1)
    assert max(map(largest_difference, by_dense, by_sparse)) <= 1e-5


def test_inputs_are_made_once_and_again_if_x_changes():
    x, y = drawn()
    cache = loops.InputCache()
    first = cache.get(x, dense=False)
    assert cache.get(x, dense=False) is first
    x[0, 0] += 1
    again = cache.get(x, dense=False)
    assert again is not first and cache.get(x, dense=False) is again
    ensembles = [Ensemble(networks(1), mixed(1), batch_size=10, engine="loops") for _ in range(3)]
    for ensemble in ensembles[:2]:  # both read what is kept of x
        ensemble.train_epoch(x, y, orders(1)[0])
    kept = loops.INPUTS.get(x, dense=False)
    ensembles[2].train_epoch(x.clone(), y, orders(1)[0])
    assert loops.INPUTS.get(x, dense=False) is kept
    x[:, 1] = 1.0
    for ensemble, inputs in zip(ensembles[1:], (x, x.clone()), strict=True):
        ensemble.train_epoch(inputs, y, orders(1)[0])
    assert same_bits(ensembles[1].networks[0], ensembles[2].networks[0])


def test_slices_of_a_data_set_are_its_own_and_inference_tensors_are_not_kept():
    cache = loops.InputCache()
    x, _ = drawn()
    first = [cache.get(x[:50], dense=False) for _ in range(3)]
    other = cache.get(x[50:], dense=False)
    assert first[0] is first[1] is first[2] is not other
    fresh = loops.make_inputs(x[50:].clone(), dense=False)
    assert all(map(np.array_equal, other, fresh))
    x[0, 0] += 1
    assert cache.get(x[:50], dense=False) is not first[0]
    with torch.inference_mode():
        x = x.clone()
    cache.get(x, dense=False)
    with torch.inference_mode():
        x[0, 0] = 7.0
    assert cache.get(x, dense=False).values[0] == 7.0


def test_few_data_sets_are_kept_and_none_that_is_gone():
    cache = loops.InputCache()
    tensors = [drawn(n=10, seed=seed)[0] for seed in range(9)]
    made = [weakref.ref(cache.get(x, dense=False).values) for x in tensors]
    assert sum(values() is not None for values in made) < len(made)
    assert made[-1]() is not None
    tensors.clear()
    cache.get(drawn(n=10)[0], dense=False)
    assert made[-1]() is None


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
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
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
from nnce.algorithm import Hyperparameters
from nnce.engines import loops
from nnce.engines.ensemble import Ensemble
network = nnce.MLP((4, 3, 2))
values = [Hyperparameters("cross-entropy", 0.5)]
together = Ensemble([network], values, batch_size=2, engine="loops")
data = torch.rand(4, 4), torch.rand(4, 2), torch.arange(4)
"""
CACHED = """
print(loops.is_cached())
together.train_epoch(*data)
from nnce.kernels import training
print(sum(training.train.stats.cache_hits.values()))
"""
INTERRUPTED = """
import os, signal, threading
before = [p.detach().clone() for p in network.parameters()]
from nnce.kernels import training
compiled = training.train
def train(*arguments):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    training.train = compiled
    return compiled(*arguments)  # compiles for seconds
training.train = train
try:
    together.train_epoch(*data)
    print("lost")
except KeyboardInterrupt:
    print("answered", len(training.train.signatures))
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


@pytest.mark.slow  # compiles everything again
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_during_compilation_is_answered_when_that_ends_and_never_lost(tmp_path):
    """No step has been taken then, and training can go on."""
    said = in_a_process(INTERRUPTED, NUMBA_CACHE_DIR=str(tmp_path))
    assert said == ["answered", "1", "True", "False"]


@pytest.mark.slow
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


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_signal_that_has_waited_is_one_signal():
    """A second Ctrl-C exits at once, and a single one must not be taken for it."""
    program = """
import os, signal, time
from nnce.engines import loops
from nnce.experiments import running
def main():
    with running.undisturbed():
        with loops.interrupts_wait():
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        print("saved", flush=True)
running.run_script(main)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (130, "saved\n")
