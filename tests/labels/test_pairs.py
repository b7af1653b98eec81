"""All pairs of two embeddings, against the whole n × n tensor."""

import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nnce import pair_sigmoid_cross_entropy


def siglip(x, y, scale, bias, reduction="batchmean"):
    """As in open_clip's SigLipLoss, with labels ±1."""
    z = scale * x @ y.T
    if bias is not None:
        z = z + bias
    labels = 2 * torch.eye(len(x), dtype=x.dtype) - 1
    C = -torch.nn.functional.logsigmoid(labels * z)
    if reduction == "none":
        return C.sum(1)
    return C.sum() / {"batchmean": len(x), "mean": len(x) ** 2, "sum": 1}[reduction]


def problem(n, features=6):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, features, generator=generator, dtype=torch.float64) for _ in range(2))
    scale, bias = torch.tensor(2.5, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    return [t.requires_grad_() for t in (x, y, scale, bias)]


@pytest.mark.parametrize("n", [1, 2, 9, 1500])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_value_and_gradients(n, reduction):
    inputs = problem(n)
    for block in (None, 4):
        ours = pair_sigmoid_cross_entropy(*inputs, reduction=reduction, block=block)
        theirs = siglip(*inputs, reduction=reduction)
        upstream = torch.linspace(-1, 2, ours.numel(), dtype=ours.dtype).view_as(ours)
        for _ in range(2):
            got = torch.autograd.grad(ours, inputs, upstream, retain_graph=True)
            expected = torch.autograd.grad(theirs, inputs, upstream, retain_graph=True)
            for a, b in zip((ours, *got), (theirs, *expected), strict=True):
                assert (a - b).norm() <= 1e-12 * b.norm()


def test_plain_numbers_and_no_bias():
    x, y, _, _ = problem(5)
    torch.testing.assert_close(pair_sigmoid_cross_entropy(x, y, 3.0), siglip(x, y, 3.0, None))
    torch.testing.assert_close(pair_sigmoid_cross_entropy(x, y, 3, -1), siglip(x, y, 3.0, -1.0))


def test_its_parameters_may_be_vectors_of_one():
    x, y, scale, bias = problem(5)
    one = scale.detach().reshape(1).requires_grad_()
    pair_sigmoid_cross_entropy(x, y, one, bias).backward()
    siglip(x, y, scale, bias).backward()
    torch.testing.assert_close(one.grad[0], scale.grad)


@pytest.mark.slow
def test_many_processes_do_what_one_does(processes_found):
    from processes import PAIRS, pairs_problem

    x, y, scale, bias, upstream = pairs_problem()
    inputs = [t.requires_grad_() for t in (x, y, scale.clone(), bias.clone())]
    for reduction in ("batchmean", "mean", "sum", "none"):
        C = siglip(*inputs, reduction=reduction)
        pulled = upstream if reduction == "none" else None
        by_x, by_y, *both = torch.autograd.grad(C, inputs, pulled)
        for rank, found in enumerate(processes_found):
            begin = sum(PAIRS[:rank])
            mine = slice(begin, begin + PAIRS[rank])
            expected = (C[mine] if reduction == "none" else C, by_x[mine], by_y[mine], *both)
            for time in ("first", "second"):
                torch.testing.assert_close(found["pairs", reduction, time], expected)


def half_pairs():
    """float16 inputs, and the true gradients at a loss scale of 2¹⁶."""
    from processes import half_pairs_problem

    inputs = half_pairs_problem()
    exact = [t.double().requires_grad_() for t in inputs]
    return inputs, torch.autograd.grad(siglip(*exact) * 2.0**16, exact)


@pytest.mark.parametrize(
    ("mode", "compiled"),
    [
        ("autocast", False),
        ("half", False),
        ("half", True),
        pytest.param("autocast", True, marks=pytest.mark.slow),
    ],
)
def test_float16(mode, compiled):
    """With scale and bias in float32, whose gradients are beyond float16 at a usual loss scale."""
    torch.compiler.reset()
    inputs, true = half_pairs()
    if mode == "autocast":
        inputs = [t.float() for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    compute = pair_sigmoid_cross_entropy
    if compiled:
        compute = torch.compile(compute, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.float16, enabled=mode == "autocast"):
        C = compute(*inputs)
    got = torch.autograd.grad(C * 2.0**16, inputs)
    for g, t, like in zip(got, true, inputs, strict=True):
        assert g.dtype == like.dtype
        assert (g.double() - t).norm() <= 2**-10 * t.norm()


@pytest.mark.slow
def test_float16_over_many_processes(processes_found):
    from processes import PAIRS

    _, (by_x, by_y, *both) = half_pairs()
    for rank, found in enumerate(processes_found):
        begin = 100 * sum(PAIRS[:rank])
        mine = slice(begin, begin + 100 * PAIRS[rank])
        true = (by_x[mine], by_y[mine], *both)
        for g, t in zip(found["half pairs"], true, strict=True):
            assert (g.double() - t).norm() <= 2**-10 * t.norm()


@pytest.fixture
def group(tmp_path):
    """A group of this process alone, for which the pairs go around the ring once."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_checkpoint_twice_over_one_graph(group, grouped, reduction):
    inputs = problem(9)
    options = {"reduction": reduction, "group": group if grouped else None}
    C = checkpoint(pair_sigmoid_cross_entropy, *inputs, use_reentrant=False, **options)
    upstream = torch.linspace(-1, 2, C.numel(), dtype=C.dtype).view_as(C)
    expected = torch.autograd.grad(siglip(*inputs, reduction=reduction), inputs, upstream)
    for _ in range(2):
        got = torch.autograd.grad(C, inputs, upstream, retain_graph=True)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("grouped", [False, True])
def test_hooks_unpack_each_saved_tensor_once(group, grouped):
    inputs, unpacked = problem(9), []

    def unpack(tensor):
        unpacked.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.view_as(t), unpack):
        C = pair_sigmoid_cross_entropy(*inputs, reduction="none", group=group if grouped else None)
    C.sum().backward()
    assert len({id(t) for t in unpacked}) == len(unpacked)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    "n",
    [
        pytest.param(10_000, marks=pytest.mark.slow),  # one n × n tensor would be 400 MB
        pytest.param(32_768, marks=pytest.mark.exhaustive),  # and here 4 GB
    ],
)
def test_memory_is_linear_in_n(n, peak_memory):
    assert peak_memory("pairs", n, 64) < 200


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"x": torch.ones(4, 6)}, ValueError, r"one shape, got \(4, 6\) and \(5, 6\)"),
        ({"x": torch.ones(5, 6, dtype=torch.int64)}, TypeError, "x of a floating-point dtype"),
        (
            {"y": torch.ones(5, 6, dtype=torch.float64)},
            TypeError,
            "y of dtype torch.float32 like x",
        ),
        ({"scale": None}, TypeError, "scale to be a number or a tensor, got NoneType"),
        ({"scale": torch.ones(2)}, ValueError, "scale to be one floating-point number"),
        ({"bias": torch.ones(1).long()}, ValueError, "bias to be one floating-point number"),
        ({"bias": "0"}, TypeError, "bias to be a number or a tensor, got str"),
        ({"block": 0}, ValueError, "block to be a whole number of at least 1, got 0"),
        ({"reduction": "max"}, ValueError, "expected reduction"),
        ({"x": torch.ones(5), "y": torch.ones(5)}, ValueError, r"x of shape \(n, features\)"),
    ],
)
def test_bad_input_is_one_sentence(change, error, sentence):
    arguments = {"x": torch.ones(5, 6), "y": torch.ones(5, 6), "scale": 1.0, "bias": 0.0} | change
    with pytest.raises(error, match=sentence):
        pair_sigmoid_cross_entropy(**arguments)
