import json
import math
import shutil
import sys

import pytest
import torch
from conftest import missing
from torch.profiler import ProfilerActivity, profile

from nnce import data, training
from nnce.experiments.benchmarks import labels, networks, peers

WORKS = (
    peers.Work((784, 5, 10), 10, (1, 3)),
    peers.Work((784, 5, 10), 10, (3,), own_orders=True),
)


@pytest.fixture
def benchmark(script, monkeypatch):
    """The script, with little to do."""
    monkeypatch.setattr(networks, "EXAMPLES", 1_000)
    monkeypatch.setattr(networks, "QUICK", WORKS)
    return script("benchmark")


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(1_000, 784, generator=generator)
    return x, torch.eye(10)[torch.randint(10, (1_000,), generator=generator)]


@pytest.mark.parametrize(
    "peer",
    [
        "nnce, loops",
        "nnce, products",
        "torch.func, vmap over networks",
        "JAX, vmap over networks",
        "torch.nn eager",
        pytest.param("torch.compile", marks=pytest.mark.slow),
        "nnce functions",
        "JAX jit + scan",
        "scikit-learn",
        "NumPy, vectorized",
        "NumPy, by example",
    ],
)
def test_every_peer_comes_to_the_same_loss(drawn, peer):
    """And has come a way: a comparison of speed is worth nothing where one does not learn."""
    if peer == "torch.compile" and not shutil.which("g++"):
        missing("compiler", "there is no g++")
    work, _ = WORKS
    ours = networks.check("nnce", work, *drawn, 1)
    try:
        theirs = networks.check(peer, work, *drawn, 1)
    except peers.Missing as reason:
        pytest.skip(str(reason))
    assert theirs == pytest.approx(ours, rel=networks.SAME_LOSS)
    start = networks.fresh_networks(work, 1, torch.device("cpu"))[0]
    before = training.evaluate(start, data.Split(*drawn), "cross-entropy")
    assert ours < 0.9 * before.loss


@pytest.mark.parametrize(
    "peer",
    ["nnce", "nnce, products", "torch.func, vmap over networks", "JAX, vmap over networks"],
)
def test_an_order_for_each_network(drawn, peer):
    """The first network's is that of one network alone, so it reaches the same loss."""
    one, own = WORKS
    alone = networks.check("nnce", one, *drawn, 1)
    try:
        together = networks.check(peer, own, *drawn, 3)
    except peers.Missing as reason:
        pytest.skip(str(reason))
    assert together == pytest.approx(alone, rel=networks.SAME_LOSS)
    with pytest.raises(peers.Missing, match="share no product"):
        peers.floor(own, *drawn, [])


@pytest.mark.parametrize("R", [1, 3])
def test_the_floor_is_five_products_a_step(drawn, R):
    work, _ = WORKS
    fresh = networks.fresh_networks(work, R, torch.device("cpu"))
    before = [p.clone() for p in fresh[0].parameters()]
    epoch, _ = peers.floor(work, *drawn, fresh)
    epoch(torch.arange(100))
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        epoch(torch.arange(100))
    products = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
    assert sum(event.name in products for event in profiled.events()) == 10 * 5
    assert not any("sigmoid" in event.name for event in profiled.events())
    assert all(torch.equal(a, b) for a, b in zip(before, fresh[0].parameters(), strict=True))


def test_the_answer_names_the_fastest_peer_and_its_factor(benchmark):
    def row(work, peer, ratio, outcome="right"):
        spread = {"ratio": ratio, "ratio_least": ratio - 0.1, "ratio_most": ratio + 0.1}
        return {"work": work, "peer": peer, "networks": 1, "outcome": outcome, **spread}

    rows = [
        row("small", "nnce", 1.0),
        row("small", "floor (dense products alone)", 0.5),
        row("small", "limit (estimate)", 0.1, "estimate"),
        row("small", "JAX", 3.0),
        row("small", "eager", 9.0),
        row("large", "nnce by loops", 0.7),
        row("large", "JAX", 0.95),
        row("large", "eager", 0.2, "wrong"),
    ]
    assert benchmark.answer(rows) == (
        "Fastest peer: JAX, 0.95 times nnce's time (0.85 to 1.05; large).\n"
        "nnce is faster than every peer in 1 of 2 workloads."
    )
    assert benchmark.answer(rows[:3]) == "No peer could be timed."


@pytest.mark.slow
def test_a_run(benchmark, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert benchmark.main(["--quick", "--repetitions", "2", "--run-dir", str(run_dir)]) == 0
    results = json.loads((run_dir / "results.json").read_text())
    one_order, own_orders = (
        [row for row in results["rows"] if row["work"] == f"784-5-10, batch 10{ending}"]
        for ending in ("", ", own orders")
    )
    assert {row["peer"] for row in own_orders} >= {"nnce", "torch.nn eager", "limit (estimate)"}
    rows = {(row["peer"], row["networks"]): row for row in one_order}
    floor = "floor (dense products alone)"
    assert {(peer, n) for peer in ("nnce", floor, "torch.nn eager") for n in (1, 3)} <= set(rows)
    for (peer, _), row in rows.items():
        if row["outcome"] == "estimate":
            assert "multiplications and" in row["note"] and row["seconds"] > 0
            continue
        if row["outcome"] != "right":
            assert peer.startswith("JAX") and row["outcome"] == "missing"
            assert "not installed" in row["note"]
            continue
        assert row["work"] == "784-5-10, batch 10" and row["repetitions"] == 2
        assert row["seconds"] > 0 and row["ratio_least"] <= row["ratio"] <= row["ratio_most"]
        assert row["examples_per_second"] == pytest.approx(1_000 / row["seconds"])
    assert rows["nnce", 1]["ratio"] == 1
    out = capsys.readouterr().out
    assert "| torch.nn eager " in out and "Fastest peer: " in out.splitlines()[-3]


@pytest.mark.slow
def test_a_peer_that_goes_wrong_is_said(benchmark, tmp_path, capsys, monkeypatch):
    def too_far(work, x, y, fresh):
        epoch, parameters = peers.eager(work, x, y, fresh)
        return epoch, lambda: [1.1 * p.detach() for p in parameters()]

    monkeypatch.setitem(peers.PEERS, "torch.nn eager", too_far)
    options = ["--quick", "--repetitions", "1", "--run-dir", str(tmp_path / "run")]
    assert benchmark.main(options) == 1
    assert "torch.nn eager: WRONG: C is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repetitions", "0"], "1 to 1,000 --repetitions, got 0"),
        (["--threads", "0"], "1 to 1,024 --threads, got 0"),
    ],
)
def test_bad_input_is_one_line(benchmark, options, message, refused):
    assert message in refused(benchmark.main, *options)


@pytest.mark.parametrize(
    "peer",
    [
        "nnce, dense targets",
        pytest.param("PyTorch compiled", marks=pytest.mark.slow),
        "PyTorch checkpointed",
    ],
)
def test_peers_of_many_labels_come_to_the_same_gradients(peer):
    problem = labels.Problem(labels.Work(64, 16, 9_000), torch.device("cpu"))
    found = []
    for name in ("nnce", "PyTorch eager", peer):
        labels.PEERS[name](problem)()
        found.append(labels.gradients(problem))
    for gradients in found[1:]:
        assert labels.difference(gradients, found[0]) < 1e-6
    wrong = [found[0][0] * 1.1, *found[0][1:]]
    assert labels.difference(wrong, found[0]) > labels.SAME_GRADIENTS
    labels.products(problem)()
    assert not labels.gradients(problem) and math.isnan(labels.difference([], found[0]))
    (x, *_), (x_wrong, *_) = found[0], wrong
    expected = (x_wrong - x).norm() / torch.cat([t.flatten() for t in found[0]]).norm()
    assert labels.difference(wrong, found[0]) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
def test_many_labels(benchmark, monkeypatch, tmp_path, capsys):
    chosen = {name: labels.PEERS[name] for name in ("nnce", "PyTorch eager")}
    monkeypatch.setattr(labels, "PEERS", chosen)
    monkeypatch.setattr(labels, "QUICK", [labels.Work(256, 8, 40_000)])
    run = tmp_path / "run"
    options = ["labels", "--quick", "--repetitions", "2", "--run-dir", str(run)]
    assert benchmark.main(options) == 0
    ours, theirs = json.loads((run / "results.json").read_text())["rows"]
    assert ours["ratio"] == 1 and theirs["difference"] < labels.SAME_GRADIENTS
    for row in (ours, theirs):
        assert row["repetitions"] == 2
        assert row["ratio_least"] <= row["ratio"] <= row["ratio_most"]
    if sys.platform == "linux":
        assert theirs["peak_bytes"] > 80e6 > 40e6 > ours["peak_bytes"]
    lines = capsys.readouterr().out.splitlines()
    header, _, first, *_ = [line for line in lines if line.startswith("|")]
    columns = ["work", "peer", "seconds", "ratio", "peak MB", "difference"]
    assert [cell.strip() for cell in header.split("|")[1:-1]] == columns
    assert "| 1.00 (1.00–1.00) |" in first


def test_a_wrong_gradient_is_said(benchmark, monkeypatch, tmp_path, capsys):
    def doubled(problem):
        return problem.step(lambda *inputs: 2 * labels.by_nnce(*inputs), problem.index)

    monkeypatch.setattr(labels, "peak_in_a_process", lambda *_: math.nan)
    chosen = {"nnce": labels.PEERS["nnce"], "PyTorch eager": doubled}
    monkeypatch.setattr(labels, "PEERS", chosen)
    monkeypatch.setattr(labels, "QUICK", [labels.Work(16, 4, 100)])
    options = ["labels", "--quick", "--repetitions", "1", "--run-dir", str(tmp_path / "run")]
    assert benchmark.main(options) == 1
    assert "PyTorch eager: WRONG: gradients differ by" in capsys.readouterr().err
