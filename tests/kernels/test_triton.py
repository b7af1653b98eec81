"""The CUDA kernels: compiled for two GPUs, interpreted on a CPU, and run on CUDA.

The tests of results run where there is a GPU. Without one, `test_interpreted` runs them in a
process of its own, in which Triton interprets the kernels.
"""

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fused import LOSSES, PLAIN, by_rules, drawn, exact, grid, sigma, targets, units

from nnce.kernels import fused
from nnce.kernels.fused import Options

triton = pytest.importorskip("triton")
from nnce.kernels import triton_losses  # noqa: E402  needs Triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs CUDA")
compiles = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted")
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def triton_does_the_work(monkeypatch):
    monkeypatch.setattr(fused, "backend", lambda z: "triton")
    if INTERPRETED:
        # An interpreted block takes as long as its number of operations.
        monkeypatch.setattr(triton_losses, "BLOCK", 2**15)
        with np.errstate(all="ignore"):
            yield
    else:
        yield


@compiles
@slow
def test_interpreted():
    """Every test of results, in a process in which Triton is imported as an interpreter."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"),
            *("-k", "not interpreted and not compiled and not device", "-m", "", __file__),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout


# ------------------------------------------------------------------------------- exact results

# Units in the last place of C and of dC/dz: of the cross-entropy, the quadratic loss and σ.
LIMITS = {
    torch.float32: ((2.5, 1.5), (0.51, 0.51), 2.8),
    # The quadratic loss in float64 is no worse than nnce.rules: 4.6 and 5.3.
    torch.float64: ((2.5, 1.5), (4, 5), 3),
    torch.float16: ((0.51, 0.51), (0.51, 0.51), 0.51),
    # Triton's interpreter cuts off digits where CUDA rounds.
    torch.bfloat16: ((1, 1), (1, 1), 1) if INTERPRETED else ((0.51, 0.51), (0.51, 0.51), 0.51),
}
THINNED = [1] if INTERPRETED else [7, pytest.param(1, marks=slow)]


def everywhere(dtype, thinned):
    z = grid(dtype)[::thinned]
    if INTERPRETED and dtype == torch.bfloat16:
        z = z[z.abs() < 40]  # its subnormal numbers of bfloat16 are wrong
    return z.to(DEVICE)


def numbers(z):
    return z.double().cpu().numpy().astype(np.longdouble)


@runs
@pytest.mark.parametrize("thinned", THINNED)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_exact_at_every_z(loss, dtype, thinned):
    z = everywhere(dtype, thinned)
    if loss == "quadratic":
        z = z[z.abs() < 350]  # beyond, σ² is subnormal in long double's reference, too
    limits = LIMITS[dtype][LOSSES.index(loss)]
    for y in (0.0, 1.0):
        target = torch.full_like(z, y)
        C, _ = fused.forward(z, target, PLAIN, "none", loss)
        dz = fused.backward(z, target, PLAIN, torch.tensor(1.0, device=DEVICE), loss=loss)
        expected = exact(loss, numbers(z), y)
        assert units(C.cpu(), expected[0], dtype) <= limits[0]
        assert units(dz.cpu(), expected[1], dtype) <= limits[1]


@runs
@pytest.mark.parametrize("thinned", THINNED)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_sigmoid_backward_is_exact_at_every_z(dtype, thinned):
    z = everywhere(dtype, thinned)
    a, not_a = sigma(numbers(z)), sigma(-numbers(z))
    dz = fused.sigmoid_backward(z, torch.full_like(z, -2))
    assert units(dz.cpu(), -2 * a * not_a, dtype) <= LIMITS[dtype][2]


@runs
@pytest.mark.parametrize("thinned", THINNED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_cost_less_than_a_unit_each(dtype, thinned):
    z = everywhere(dtype, thinned)
    y = targets(len(z), dtype=dtype).to(DEVICE)
    weight, pos_weight = (
        (drawn(len(z), seed=s, dtype=dtype).abs() + 0.1).to(DEVICE) for s in (2, 3)
    )
    options = Options(weight, pos_weight)
    C, _ = fused.forward(z, y, options, "none")
    dz = fused.backward(z, y, options, torch.tensor(1.0, device=DEVICE))
    found = [numbers(t) for t in (z, y, pos_weight, weight)]
    factor = found[3] * np.where(found[1] == 1, found[2], 1)
    expected = exact("cross-entropy", *found)
    assert units(C.cpu(), expected[0], dtype, factor) <= 4
    assert units(dz.cpu(), expected[1], dtype, factor) <= 3


# ------------------------------------------------------------------------------------- options


def check(z, y, options, reduction, loss="cross-entropy"):
    """Compare a value and a gradient with nnce.rules in float64."""
    upstream = drawn(*z.shape, seed=9) if reduction == "none" else torch.tensor(0.7)
    upstream = upstream.to(z.dtype)
    expected = by_rules(z, y, options, reduction, loss, upstream)
    there = [None if t is None else t.to(DEVICE) for t in (z, y, *options[:2], upstream)]
    there_options = Options(*there[2:4], *options[2:])
    C, divisor = fused.forward(*there[:2], there_options, reduction, loss)
    dz = fused.backward(*there[:2], there_options, there[4], divisor, loss)
    assert C.dtype == dz.dtype == z.dtype and C.device == dz.device == there[0].device
    info = torch.finfo(z.dtype)
    rtol = max(info.eps, {torch.float32: 1e-6, torch.float64: 4e-15}.get(z.dtype, 0))
    # With smoothing the terms of dC/dz cancel near z = 0.
    atol = 2 * info.eps if options.label_smoothing else info.tiny * info.eps
    torch.testing.assert_close(C.double().cpu(), expected[0], rtol=rtol, atol=1e-30)
    torch.testing.assert_close(dz.double().cpu(), expected[1], rtol=rtol, atol=atol)
    return divisor


SHAPES = {"full": (6, 700), "components": (700,), "one": (1,), "examples": (6, 1), "none": None}


PAIRS = [("full", "components"), ("components", "full"), ("one", "examples"), ("examples", "one")]
EVERY_REDUCTION = ("none", "sum", "mean", "batchmean")
OPTIONS = [
    *(
        (*pair, ignores, 0.1 * ignores, EVERY_REDUCTION)
        for pair in PAIRS
        for ignores in (False, True)
    ),
    # The others with one sum each, in turn.
    *(
        pytest.param(*case, ("none", reduction), marks=slow)
        for case, reduction in zip(
            itertools.product(SHAPES, SHAPES, (False, True), (0, 0.1)),
            itertools.cycle(EVERY_REDUCTION[1:]),
            strict=False,
        )
    ),
]


@runs
@pytest.mark.parametrize(("weights", "pos_weights", "ignores", "smoothing", "reductions"), OPTIONS)
def test_options_against_the_rules(
    weights, pos_weights, ignores, smoothing, reductions, monkeypatch
):
    monkeypatch.setattr(triton_losses, "BLOCK", 2048)  # three blocks, the last one not full
    z, y = 5 * drawn(6, 700), targets(6, 700)
    if ignores:
        y[drawn(6, 700, seed=7) > 0.5] = -100
        y[2] = -100
    weight, pos_weight = (
        None if SHAPES[name] is None else drawn(*SHAPES[name], seed=3 + i).abs()
        for i, name in enumerate((weights, pos_weights))
    )
    options = Options(weight, pos_weight, smoothing, -100 if ignores else None)
    for reduction in reductions:
        divisor = check(z, y, options, reduction)
        n = {"mean": int((y != -100).sum()), "batchmean": 5 if ignores else 6}.get(reduction, 1)
        assert divisor == n


Y_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *LIMITS,
]


@runs
@pytest.mark.parametrize("y_dtype", Y_DTYPES, ids=str)
@pytest.mark.parametrize(
    "z_dtype", [torch.float32, *(pytest.param(d, marks=slow) for d in list(LIMITS)[1:])], ids=str
)
def test_targets_of_every_dtype(z_dtype, y_dtype):
    z, y = (5 * drawn(3, 500)).to(z_dtype), targets(3, 500, dtype=y_dtype)
    ignore = 7 if y_dtype in (torch.bool, torch.uint8) else -100
    if y_dtype != torch.bool:
        y[1, :50] = ignore
    loss = "quadratic" if y_dtype == torch.uint8 else "cross-entropy"
    if INTERPRETED and z_dtype == torch.bfloat16:
        z = z.float()
    divisor = check(z, y, Options(ignore_index=ignore), "mean", loss)
    assert divisor == 1500 - 50 * (y_dtype != torch.bool)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_infinities_nan_and_zero_weights_as_the_rules(dtype):
    inf, nan = math.inf, math.nan
    each = itertools.product((-inf, -3, 0, 2, inf, nan), (0, 1, 2, nan), (0, 1, 3, nan))
    z, weight, pos_weight = (torch.tensor(t, dtype=dtype) for t in zip(*each, strict=True))
    for y, options in itertools.product(
        (0.0, 0.25, 1.0),
        (PLAIN, Options(weight), Options(None, pos_weight), Options(weight, pos_weight)),
    ):
        target = torch.full_like(z, y)
        expected = by_rules(z, target, options, "none", "cross-entropy", torch.ones(()))
        there = Options(*(None if t is None else t.to(DEVICE) for t in options[:2]))
        z_there, y_there = z.to(DEVICE), target.to(DEVICE)
        C, _ = fused.forward(z_there, y_there, there, "none")
        dz = fused.backward(z_there, y_there, there, torch.ones_like(z_there))
        for got, true in zip((C, dz), expected, strict=True):
            close = torch.finfo(dtype).eps * 4
            torch.testing.assert_close(got.double().cpu(), true, rtol=close, atol=0, equal_nan=True)


@runs
def test_empty_arrays_scalars_and_layouts():
    one = torch.tensor(1.0, device=DEVICE)
    for shape in ((0, 3), (3, 0), (0,)):
        z = torch.zeros(shape, device=DEVICE)
        assert fused.forward(z, z, PLAIN, "none")[0].shape == shape
        assert fused.forward(z, z, PLAIN, "sum")[0] == 0
        mean, n = fused.forward(z, z, PLAIN, "mean")
        assert mean.isnan() and fused.backward(z, z, PLAIN, one, n).shape == shape
        assert fused.sigmoid_backward(z, z).shape == shape
    z, y = torch.tensor(0.0, device=DEVICE), torch.tensor(True, device=DEVICE)
    C, n = fused.forward(z, y, PLAIN, "batchmean")
    assert C.item() == pytest.approx(math.log(2), rel=1e-7) and n == 1
    z, y = (t(40, 30).to(DEVICE) for t in (drawn, targets))
    expected = fused.backward(z, y, PLAIN, one, 1200)
    assert torch.equal(fused.backward(z.T.contiguous().T, y, PLAIN, one, 1200), expected)
    # The backward of sum() expands a scalar.
    assert torch.equal(fused.backward(z, y, PLAIN, one.expand(40, 30), 1200), expected)


@runs
def test_all_ignored():
    z = torch.full((2, 3), math.nan, device=DEVICE)
    y = torch.full((2, 3), -1, device=DEVICE)
    options = Options(ignore_index=-1)
    for reduction in ("mean", "batchmean"):
        C, n = fused.forward(z, y, options, reduction)
        assert C.isnan() and n == 0
        dz = fused.backward(z, y, options, torch.tensor(1.0, device=DEVICE), n)
        assert torch.equal(dz, torch.zeros_like(z))


@runs
def test_sums_of_many_blocks(monkeypatch):
    """Several blocks to a program, and more sums than the second stage takes at a time."""
    monkeypatch.setattr(triton_losses, "BLOCK", 8)
    monkeypatch.setattr(triton_losses, "PROGRAMS", 13)  # of 25 blocks
    z, y = 5 * drawn(9, 22), targets(9, 22)
    y[3] = -100
    check(z, y, Options(drawn(22, seed=3).abs(), ignore_index=-100), "mean")


@runs
def test_sums_beyond_the_dtype_are_infinite_and_means_are_not():
    z = torch.full((70, 1000), 10.0, dtype=torch.float16, device=DEVICE)
    y = torch.zeros_like(z)
    assert fused.forward(z, y, PLAIN, "sum")[0] == math.inf
    assert fused.forward(z, y, PLAIN, "mean")[0] == 10


# ----------------------------------------------------------------------------------- on CUDA only

on_cuda = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(), reason="needs CUDA, not interpreted"
)


@on_cuda
def test_compiled_and_run_on_cuda_without_waiting():
    z, y = drawn(300, 1001).cuda(), targets(300, 1001).long().cuda()
    options, one = Options(ignore_index=0), torch.tensor(1.0, device="cuda")

    def both():
        C, n = fused.forward(z, y, options, "mean")
        return C, fused.backward(z, y, options, one, n)

    first = both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@on_cuda
def test_compiled_and_run_on_cuda_beyond_32_bits(monkeypatch):
    monkeypatch.undo()
    n = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 16 * n:
        pytest.skip("needs 32 GB of free memory")
    z, y = (torch.zeros(n, dtype=d, device="cuda") for d in (torch.float16, torch.bool))
    z[-1], y[-1] = 5, True
    assert fused.fits(z, y)
    C, _ = fused.forward(z, y, PLAIN, "sum")
    assert C.item() == math.inf
    dz = fused.backward(z, y, PLAIN, torch.tensor(1.0, device="cuda"))
    assert (dz[:-1] == 0.5).all()
    assert dz[-1].item() == pytest.approx(-1 / (1 + math.exp(5)), rel=1e-3)


# --------------------------------------------------------------------------- ahead of time

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SCALARS = {
    **{torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16"},
    **{torch.bfloat16: "bf16", torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16"},
    **{torch.int32: "i32", torch.int64: "i64"},
}


@pytest.fixture
def launches(monkeypatch):
    """Kernels and arguments of the launches, which are not done."""
    found = []

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **named: found.append((self.kernel, arguments, named))

    for name in ("value", "finish", "gradient", "activation_gradient"):
        monkeypatch.setattr(triton_losses, name, Recorded(getattr(triton_losses, name)))
    return found


def compile_for(arch, kernel, arguments, named):
    """Compile a launch for a GPU; its PTX and cubin."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    named = dict(named)
    options = {"num_warps": named.pop("num_warps")}
    signature, constants, attributes = {}, {}, {}
    values = [*arguments, *named.values()]
    for place, (parameter, x) in enumerate(zip(kernel.params, values, strict=True)):
        if isinstance(x, torch.Tensor):
            signature[parameter.name] = f"*{SCALARS[x.dtype]}"
        elif parameter.is_constexpr or x is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = x
            continue
        else:
            signature[parameter.name] = "i32" if -(2**31) <= x < 2**31 else "i64"
        if isinstance(x, torch.Tensor) or parameter.name == "n":
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return made.asm["ptx"], made.asm["cubin"]


def refuse(ptx, cubin, folder):
    """Refuse instructions that are not exact, and memory outside registers."""
    for wrong in ("ex2.approx", "div.full", ".approx", ".ftz", ".atom", "red.global"):
        assert wrong not in ptx, wrong
    (folder / "kernel.cubin").write_bytes(cubin)
    usage = subprocess.run(
        [CUOBJDUMP, "-res-usage", folder / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.findall(r"(STACK|LOCAL):(\d+)", usage) == [("STACK", "0"), ("LOCAL", "0")]


EVERY = Options(torch.ones(16), torch.ones(1), 0.1, -1)
FEW = [
    (90, "cross-entropy", torch.float32, torch.float32, PLAIN, "mean"),
    (80, "cross-entropy", torch.float32, torch.int64, EVERY, "mean"),
    (90, "cross-entropy", torch.bfloat16, torch.bool, PLAIN, "none"),
    (80, "quadratic", torch.float32, torch.bool, PLAIN, "mean"),
    (90, "quadratic", torch.float64, torch.float64, EVERY, "none"),
]
MANY = zip(
    *zip(
        *itertools.product((80, 90), LOSSES, LIMITS, (PLAIN, EVERY), ("none", "mean")), strict=True
    ),
    itertools.cycle((torch.bool, torch.int64, torch.float32, torch.float64, torch.bfloat16)),
    strict=False,
)
CASES = [
    *FEW,
    *(pytest.param(arch, loss, z, y, *o, marks=slow) for arch, loss, z, *o, y in MANY),
]


@compiles
@pytest.mark.parametrize(("arch", "loss", "z_dtype", "y_dtype", "options", "reduction"), CASES)
def test_losses_are_compiled(arch, loss, z_dtype, y_dtype, options, reduction, launches, tmp_path):
    z, y = torch.zeros(64, 16, dtype=z_dtype), torch.zeros(64, 16, dtype=y_dtype)
    _, divisor = fused.forward(z, y, options, reduction, loss)
    upstream = torch.ones_like(z) if reduction == "none" else torch.ones((), dtype=z_dtype)
    fused.backward(z, y, options, upstream, divisor, loss)
    assert len(launches) == (2 if reduction == "none" else 3)
    for launch in launches:
        refuse(*compile_for(arch, *launch), tmp_path)


@compiles
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(d, marks=slow) for d in list(LIMITS)[1:])], ids=str
)
def test_sigmoid_backward_is_compiled(dtype, arch, launches, tmp_path):
    z = torch.zeros(64, dtype=dtype)
    fused.sigmoid_backward(z, z)
    for launch in launches:
        refuse(*compile_for(arch, *launch), tmp_path)


INEXACT = """
@triton.jit
def kernel(z, a, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(z + i)
    tl.store(a + i, {})
"""


@compiles
@pytest.mark.parametrize("formula", ["tl.exp(x)", "1.0 / x"])
def test_inexact_code_is_refused_when_compiled(formula, tmp_path):
    (tmp_path / "inexact.py").write_text(
        "import triton\nimport triton.language as tl\n" + INEXACT.format(formula)
    )
    sys.path.insert(0, str(tmp_path))
    try:
        sys.modules.pop("inexact", None)
        import inexact
    finally:
        sys.path.remove(str(tmp_path))
    z = torch.zeros(1024)
    launch = inexact.kernel, (z, z), {"BLOCK": 1024, "num_warps": 8}
    with pytest.raises(AssertionError, match=r"approx|full"):
        refuse(*compile_for(80, *launch), tmp_path)


# ------------------------------------------------------------------------------------- dispatch


@compiles
def test_the_device_chooses(monkeypatch):
    monkeypatch.undo()
    assert fused.backend(torch.zeros(1)) == ("numba" if fused.uses_numba() else "chunked")
    assert fused.backend(torch.zeros(1, device="meta")) == "chunked"
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        chosen = "triton" if fused.uses_triton(device) else "chunked"
        z = torch.zeros(1, device=device)
        assert fused.backend(z) == chosen and fused.fits(z, z) == (chosen == "triton")
        assert not fused.fits(z, z.cpu()) and not fused.fits(z.cpu(), z)
    else:
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert fused.uses_triton.__wrapped__("cuda")
        monkeypatch.setitem(sys.modules, "triton", None)
        assert not fused.uses_triton.__wrapped__("cuda")
