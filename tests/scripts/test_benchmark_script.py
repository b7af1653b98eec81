import json
import shutil
import sys

import pytest
import torch
from conftest import missing
from torch.profiler import ProfilerActivity, profile

from nnce import data, training


@pytest.fixture
def benchmark(script, monkeypatch):
    """The script, with little to do."""
    module = script("benchmark")
    monkeypatch.setattr(module, "EXAMPLES", 1_000)
    works = (
        module.Work((784, 5, 10), 10, (1, 3)),
        module.Work((784, 5, 10), 10, (3,), own_orders=True),
    )
    monkeypatch.setattr(module, "QUICK", works)
    return module


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
        "torch.compile",
        "nnce functions",
        "JAX jit + scan",
        "scikit-learn",
        "NumPy, vectorised",
        "NumPy, by example",
    ],
)
def test_every_peer_comes_to_the_same_loss(benchmark, drawn, peer):
    """And has come a way: a comparison of speed is worth nothing where one does not learn."""
    if peer == "torch.compile" and not shutil.which("g++"):
        missing("compiler", "there is no g++")
    work, _ = benchmark.QUICK
    ours = benchmark.check("nnce", work, *drawn, 1)
    try:
        theirs = benchmark.check(peer, work, *drawn, 1)
    except benchmark.Missing as reason:
        pytest.skip(str(reason))
    assert theirs == pytest.approx(ours, rel=benchmark.SAME_LOSS)
    start = benchmark.fresh_networks(work, 1, torch.device("cpu"))[0]
    before = training.evaluate(start, data.Split(*drawn), "cross-entropy")
    assert ours < 0.9 * before.loss


@pytest.mark.parametrize(
    "peer",
    ["nnce", "nnce, products", "torch.func, vmap over networks", "JAX, vmap over networks"],
)
def test_an_order_for_each_network(benchmark, drawn, peer):
    """The first network's is that of one network alone, so it comes to the same loss."""
    one, own = benchmark.QUICK
    alone = benchmark.check("nnce", one, *drawn, 1)
    try:
        beside = benchmark.check(peer, own, *drawn, 3)
    except benchmark.Missing as reason:
        pytest.skip(str(reason))
    assert beside == pytest.approx(alone, rel=benchmark.SAME_LOSS)
    with pytest.raises(benchmark.Missing, match="share no product"):
        benchmark.floor(own, *drawn, [])


@pytest.mark.parametrize("R", [1, 3])
def test_the_floor_is_five_products_a_step(benchmark, drawn, R):
    work, _ = benchmark.QUICK
    networks = benchmark.fresh_networks(work, R, torch.device("cpu"))
    before = [p.clone() for p in networks[0].parameters()]
    epoch, _ = benchmark.floor(work, *drawn, networks)
    epoch(torch.arange(100))
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        epoch(torch.arange(100))
    products = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
    assert sum(event.name in products for event in profiled.events()) == 10 * 5
    assert not any("sigmoid" in event.name for event in profiled.events())
    assert all(torch.equal(a, b) for a, b in zip(before, networks[0].parameters(), strict=True))


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
    assert "| torch.nn eager " in capsys.readouterr().out


def test_a_peer_that_goes_wrong_is_said(benchmark, tmp_path, capsys, monkeypatch):
    def too_far(work, x, y, networks):
        epoch, parameters = benchmark.eager(work, x, y, networks)
        return epoch, lambda: [1.1 * p.detach() for p in parameters()]

    monkeypatch.setitem(benchmark.PEERS, "torch.nn eager", too_far)
    options = ["--quick", "--repetitions", "1", "--run-dir", str(tmp_path / "run")]
    assert benchmark.main(options) == 1
    assert "torch.nn eager: WRONG: C is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repetitions", "0"], "1 to 1,000 repetitions, got 0"),
        (["--threads", "0"], "1 to 1,024 --threads, got 0"),
    ],
)
def test_bad_input_is_one_line(benchmark, options, message, refused):
    assert message in refused(benchmark.main, *options)


@pytest.mark.parametrize(
    "peer", ["nnce, dense targets", "PyTorch compiled", "PyTorch checkpointed"]
)
def test_peers_of_many_labels_come_to_the_same_gradients(benchmark, peer):
    problem = benchmark.LabelProblem(benchmark.LabelWork(64, 16, 9_000), torch.device("cpu"))
    found = []
    for name in ("nnce", "PyTorch eager", peer):
        benchmark.LABEL_PEERS[name](problem)()
        found.append(benchmark.label_gradients(problem))
    for gradients in found[1:]:
        assert benchmark._difference(gradients, found[0]) < 1e-6
    wrong = [found[0][0] * 1.1, *found[0][1:]]
    assert benchmark._difference(wrong, found[0]) > benchmark.SAME_GRADIENTS


def test_many_labels(benchmark, monkeypatch, tmp_path, capsys):
    peers = {name: benchmark.LABEL_PEERS[name] for name in ("nnce", "PyTorch eager")}
    monkeypatch.setattr(benchmark, "LABEL_PEERS", peers)
    monkeypatch.setattr(benchmark, "QUICK_LABEL_WORKS", [benchmark.LabelWork(256, 8, 40_000)])
    run = tmp_path / "run"
    options = ["labels", "--quick", "--repetitions", "1", "--run-dir", str(run)]
    assert benchmark.main(options) == 0
    ours, theirs = json.loads((run / "results.json").read_text())["rows"]
    assert ours["ratio"] == 1 and theirs["difference"] < benchmark.SAME_GRADIENTS
    if sys.platform == "linux":
        assert theirs["peak_bytes"] > 80e6 > 40e6 > ours["peak_bytes"]


def test_distortions(benchmark, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["distortions", "--quick", "--repetitions", "1", "--run-dir", str(run)]
    assert benchmark.main(options) == 0
    rows = {row["work"]: row for row in json.loads((run / "results.json").read_text())["rows"]}
    assert rows[benchmark.TRAINING]["ratio"] == 1
    assert {"nnce, affine", "nnce, elastic", "nnce, both"} < set(rows)
    assert all(row["seconds"] > 0 for row in rows.values())
    assert "| nnce, elastic" in capsys.readouterr().out
