import gzip
import json
import os
import subprocess
import sys

import killed
import numpy as np
import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchmetrics.functional.retrieval import retrieval_normalized_dcg, retrieval_precision

from nnce import Positives
from nnce.experiments import running, xmc

SMALL = ("--labels", "300", "--examples", "400", "--features", "16", "--epochs", "3")
FILE = b"""6 5 4
0,2 0:1 3:0.5
1 1:2
 4:1.5
3,0,1 0:1 1:1 2:1
2 3:1
0 0:0.25
"""


@pytest.fixture
def labels(script):
    return script("labels")


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_it_learns_what_was_planted(labels, tmp_path, capsys):
    assert labels.main([*SMALL, "--run-dir", str(tmp_path / "run")]) == 0
    frequent, *epochs = results(tmp_path / "run")["rows"]
    assert epochs[-1]["precision@1"] > 3 * frequent["precision@1"] > 0
    assert epochs[-1]["loss_train"] < epochs[0]["loss_train"]
    out = capsys.readouterr().out
    assert "at most" in out and "tensorboard --logdir" in out
    best, usual = (f"{100 * row['precision@1']:.2f} %" for row in (epochs[-1], frequent))
    before, _, after = out.partition("| epoch ")
    (line,) = [line for line in before.splitlines() if line.startswith("The top-ranked of ")]
    assert line in after.splitlines()[-6:]
    assert f"is right for {best} of the test examples after epoch " in line
    assert f"(most frequent label: {usual})" in line
    curves = EventAccumulator(str(tmp_path / "run")).Reload()
    assert {"loss/step", "test/precision@5", "test/nDCG@3"} <= set(curves.Tags()["scalars"])
    steps = [event.step for event in curves.Scalars("loss/step")]
    assert steps == list(range(3))


def test_each_part_of_the_start_is_shown_on_a_terminal(labels, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert labels.main([*SMALL, "--run-dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().err
    assert "drawing examples …" in shown and "creating the classifier …" in shown


@pytest.mark.slow
def test_memory_stays_within_what_was_stated(tmp_path):
    """In a process of its own, since a peak is a whole process's."""
    options = ("--labels", "50000", "--examples", "1024", "--features", "128", "--epochs", "1")
    command = [sys.executable, "scripts/labels.py", *options, "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "within the" in done.stdout
    memory = results(tmp_path / "run")["memory"]
    assert memory["before_MB"] < memory["peak_MB"] <= memory["bound_MB"]
    command = [sys.executable, "scripts/labels.py", "--resume", str(tmp_path / "run")]
    done = subprocess.run([*command, "--epochs", "2"], cwd=ROOT, capture_output=True, text=True)
    assert "within the" in done.stdout, done.stderr


def test_the_same_seed_is_the_same_run(labels, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        labels.main([*SMALL, "--seed", str(seed), "--run-dir", str(tmp_path / name)])
    a, b, c = (results(tmp_path / name)["rows"] for name in "abc")
    assert a == b != c


def same(alone, run):
    return killed.differences(killed.outcome(alone), killed.outcome(run)) == []


SEVERAL = (*SMALL, "--batch-size", "50", "--checkpoint-every", "2")


@pytest.mark.parametrize("calls", [0, 3, 8, 9, 20])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(
    labels, tmp_path, monkeypatch, capsys, calls
):
    """Within an epoch, after its last step, and after it is evaluated; stopped twice."""
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert labels.main([*SEVERAL, "--run-dir", str(alone)]) == 0
    arguments = [*SEVERAL, "--run-dir", str(run)]
    for more in (calls, 1):
        killed.stopped_after(monkeypatch, more)
        with pytest.raises(KeyboardInterrupt):
            labels.main(arguments)
        arguments = ["--resume", str(run)]
        assert capsys.readouterr().err.endswith(f" --resume {run}\n")
        assert len(list(run.glob("state-*.npz"))) <= 3
    (run / "model.npz").unlink(missing_ok=True)
    assert labels.main(arguments) == 0
    assert same(alone, run)
    assert len(list(run.glob("state-*.npz"))) == 2


def test_more_epochs_may_be_asked_for(labels, tmp_path):
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert labels.main([*SEVERAL, "--run-dir", str(alone)]) == 0
    assert labels.main([*SEVERAL, "--epochs", "1", "--run-dir", str(run)]) == 0
    assert labels.main(["--resume", str(run), "--epochs", "3"]) == 0
    alone, run = killed.outcome(alone), killed.outcome(run)
    assert killed.differences(alone, run) == []


def test_what_cannot_be_resumed_is_one_sentence(labels, tmp_path, refused, monkeypatch):
    path, run = tmp_path / "data.txt", tmp_path / "run"
    path.write_bytes(FILE)
    options = ("--data-file", str(path), "--features", "3", "--seed", "1")
    assert labels.main([*options, "--epochs", "1", "--run-dir", str(run)]) == 0
    resume = ("--resume", str(run))
    assert "--lr 2.0: the run in" in refused(labels.main, *resume, "--lr", "2")
    path.write_bytes(FILE.replace(b"0:0.25", b"0:0.75").replace(b"3:0.5", b"3:0.625"))
    assert "the data have changed since the run was started" in refused(labels.main, *resume)
    path.write_bytes(FILE)
    (state,) = run.glob("state-*.npz")
    content = bytearray(state.read_bytes())
    content[300] ^= 1
    state.write_bytes(content)
    assert f"{state} cannot be read: " in refused(labels.main, *resume)
    state.unlink()
    assert f"{state} cannot be read: " in refused(labels.main, *resume)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_model_loads_again(labels, tmp_path, capsys, sparse):
    path, run = tmp_path / "data.txt", tmp_path / "run"
    path.write_bytes(FILE)
    options = ("--data-file", str(path), "--features", "3", "--seed", "1") if sparse else SMALL
    assert labels.main([*options, "--run-dir", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"Model: labels.load_model('{run / 'model.npz'}')" in out
    model = labels.load_model(run / "model.npz")
    options = labels.parser().parse_args([*options])
    data = labels.load(options, torch.Generator().manual_seed(options.seed))
    found = labels.evaluate(model, data.test, data.num_labels, options.batch_size)
    last = results(run)["rows"][-1]
    assert found["loss"] == last["loss_test"]
    assert found["precision@1"] == last["precision@1"]


def test_figures_are_torchmetrics(labels):
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(50, 30, generator=generator) < 0.1
    z = torch.rand(50, 30, generator=generator)
    positives = Positives.from_coo(*y.nonzero().T, 50)
    best = z.topk(5).indices
    found = labels.figures(labels.relevance(best, positives, 30), positives.crow.diff())
    there = [i for i in range(50) if y[i].any()]
    assert len(there) < 50
    for k in (1, 3, 5):
        for name, theirs in (
            ("precision", retrieval_precision),
            ("nDCG", retrieval_normalized_dcg),
        ):
            expected = torch.stack([theirs(z[i], y[i].long(), top_k=k) for i in there]).mean()
            assert found[f"{name}@{k}"] == pytest.approx(expected.item(), abs=1e-6)


def test_the_most_frequent_labels(labels):
    positives = Positives.from_lists([[3], [3, 1], [1, 3], [0]])
    examples = xmc.Examples(torch.zeros(4, 1), positives)
    found = labels.most_frequent(examples, examples, 4)
    assert found["precision@1"] == 3 / 4 and found["precision@3"] == 6 / 12


@pytest.mark.parametrize("zipped", [False, True])
def test_a_file(labels, tmp_path, zipped):
    path = tmp_path / ("data.txt.gz" if zipped else "data.txt")
    path.write_bytes(gzip.compress(FILE) if zipped else FILE)
    examples, features, num_labels = xmc.read(path)
    assert (features, num_labels) == (5, 4)
    dense = np.array([[1, 0, 0, 0.5, 0], [0, 2, 0, 0, 0], [0, 0, 0, 0, 1.5]])
    assert (examples.features.toarray()[:3] == dense).all()
    expected = [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0]]
    assert examples.positives.to_dense(4).tolist() == expected
    for more in ((), ("--test-file", str(path))):
        run = tmp_path / f"run{len(more)}"
        # With seed 0 the test set would be the one example that has no label.
        options = ("--features", "3", "--batch-size", "2", "--epochs", "2", "--seed", "1")
        assert labels.main(["--data-file", str(path), *more, *options, "--run-dir", str(run)]) == 0
        assert len(results(run)["rows"]) == 3


def plain(content):
    examples, *sizes = content
    x, y = examples
    of_x = (x.indptr.tolist(), x.indices.tolist(), x.data.tobytes())
    return of_x, y.crow.tolist(), y.col.tolist(), sizes


def test_a_binary_copy_is_read_in_place_of_the_text(labels, tmp_path, monkeypatch):
    path, cache = tmp_path / "data.gz", tmp_path / "data.gz.cache.npz"
    path.write_bytes(gzip.compress(FILE))
    options = ("--data-file", str(path), "--features", "3", "--epochs", "1", "--seed", "1")
    assert labels.main([*options, "--run-dir", str(tmp_path / "a")]) == 0
    parsed, copied = xmc.read(path), xmc.read_cached(path)
    assert plain(copied) == plain(parsed)
    assert copied[0].features.dtype == parsed[0].features.dtype == np.float32
    with monkeypatch.context() as patched:
        patched.setattr(xmc, "read", None)  # nothing is parsed
        assert labels.main([*options, "--run-dir", str(tmp_path / "b")]) == 0
    a, b = (results(tmp_path / name)["rows"] for name in "ab")
    assert a == b
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", path.name, cache.name]

    # Another text of the same length and date.
    status = path.stat()
    changed = gzip.compress(FILE.replace(b"0:0.25", b"0:0.75"))
    path.write_bytes(changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert xmc.read_cached(path) is None
    assert labels.main([*options, "--run-dir", str(tmp_path / "c")]) == 0
    assert plain(xmc.read_cached(path)) == plain(xmc.read(path)) != plain(parsed)
    whole = cache.read_bytes()
    for damage in (whole[:-50], whole[:200] + b"?" + whole[201:], b"", b"text"):
        cache.write_bytes(damage)
        assert xmc.read_cached(path) is None
    os.utime(path)  # as a copy has: the content counts
    cache.write_bytes(whole)
    assert xmc.read_cached(path) is not None


def test_a_binary_copy_that_cannot_be_written_is_one_line(labels, tmp_path, monkeypatch, capsys):
    path, run = tmp_path / "data.txt", tmp_path / "run"
    path.write_bytes(FILE)
    (tmp_path / "data.txt.cache.npz").mkdir()
    options = ("--data-file", str(path), "--features", "3", "--epochs", "1", "--seed", "1")
    assert labels.main([*options, "--run-dir", str(run)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"no binary copy of {path} written, the next run will parse it again: ")


def test_a_test_set_whose_loss_is_not_a_number(labels, tmp_path):
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text("2 2 2\n0 0:1\n1 1:1\n")
    test.write_text("1 2 2\n0 0:3e38 1:3e38\n")
    options = ("--features", "64", "--epochs", "1", "--run-dir", str(tmp_path / "run"))
    with pytest.raises(running.Failed, match=r"loss of the test examples is (nan|inf) in"):
        labels.main(["--data-file", str(train), "--test-file", str(test), *options])


def test_sparse_features_are_a_sum_of_embeddings(labels, tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes(FILE)
    examples, features, num_labels = xmc.read(path)
    model = labels.Classifier(features, 3, num_labels, 0.1)
    ((x, _),) = examples.batches(6, torch.arange(6))
    dense = torch.from_numpy(examples.features.toarray()).float()
    torch.testing.assert_close(model.encode(x), dense @ model.embedding.weight)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "line 1: expected three integers from 1 to 2,147,483,647, the numbers of "),
        (b"6 5\n", "line 1: expected three integers"),
        (b"6 5 4 3\n", "line 1: expected three integers"),
        (b"0 5 4\n", "line 1: expected three integers"),
        (b"1_0 5 4\n", "line 1: expected three integers"),
        (b"2 5 99999999999999999999\n0 0:1\n1 1:1\n", "line 1: expected three integers"),
        (b"2 -5 4\n0 0:1\n1 1:1\n", "line 1: expected three integers"),
        (b"2 5 4\n0 1:1\n", "line 2: expected 2 examples, but the file ends after 1"),
        (b"2 5 4\n0 1:1\n\n0 2:1\n", "line 4: expected the file to end after 2 examples"),
        (b"1 5 4\n9 1:1\n", "line 2: expected label numbers from 0 to 3, got 9"),
        (b"2 5 4\n\n0.5 1:1\n", "line 3: expected integer label numbers, got '0.5'"),
        (b"1 5 4\n1e0 1:1\n", "line 2: expected integer label numbers, got '1e0'"),
        (b"1 5 20\n1_0 1:1\n", "line 2: expected integer label numbers, got '1_0'"),
        (b"1 5 4\n-1 1:1\n", "line 2: expected integer label numbers, got '-1'"),
        (b"1 5 4\n0, 1:1\n", "line 2: expected integer label numbers, got ''"),
        (b"1 5 4\nx 1:1\n", "line 2: expected integer label numbers, got 'x'"),
        (b"2 5 4\ninf 1:1\n1 1:1\n", "line 2: expected integer label numbers, got 'inf'"),
        (b"1 5 4\n0,1,0 1:1\n", "line 2: expected each label once, got label 0 twice"),
        (b"2 5 4\n1 0:1\n0 7:1\n", "line 3: expected feature numbers from 0 to 4, got 7"),
        (b"1 5 4\n0 3:1 1:1 3:2\n", "line 2: expected each feature once, got feature 3 twice"),
        (b"1 5 4\n0 4294967296:1\n", "line 2: expected feature numbers from 0 to 4, got 4,294"),
        (b"1 5 4\n0 " + b"9" * 5_000 + b":1\n", "line 2: expected feature:value, got '99999"),
        (b"1 5 4\n0 -1:1\n", "line 2: expected feature:value, got '-1:1'"),
        (b"1 5 4\n0 1:nan\n", "line 2: expected feature:value, got '1:nan'"),
        (b"1 5 4\n0 1:inf\n", "line 2: expected feature:value, got '1:inf'"),
        (b"1 5 4\n0 1:1_0\n", "line 2: expected feature:value, got '1:1_0'"),
        (b"1 5 4\n0 1:0x1\n", "line 2: expected feature:value, got '1:0x1'"),
        (b"1 5 4\n0 1:1e400\n", "line 2: expected values within float32's range, got inf"),
        (b"1 5 4\n0 1:-1e39\n", "line 2: expected values within float32's range, got -1e+39"),
        (b"1 5 4\n0 qid:7 1:1\n", "line 2: expected feature:value, got 'qid:7'"),
        (b"1 5 4\n0 1:1 # a note\n", "line 2: expected feature:value, got '#'"),
        (b"1 5 4\n0 1 2:1\n", "line 2: expected feature:value, got '1'"),
        (b"1 5 4\n0 1:1\n", "expected at least two examples"),
        (
            b"9 5 4\n" + b"0:1\n" * 9,
            "expected test examples with labels, found none in the tenth of ",
        ),
    ],
)
def test_a_bad_file_is_one_sentence(labels, refused, tmp_path, content, sentence):
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    assert sentence in refused(labels.main, "--data-file", str(path))


def test_a_test_file_without_labels_is_one_sentence(labels, refused, tmp_path):
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_bytes(FILE)
    test.write_text("2 5 4\n0:1\n\n")
    line = refused(labels.main, "--data-file", str(train), "--test-file", str(test))
    assert f"expected test examples with labels, found none in {test}" in line


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda whole: whole[:-12], "cannot be read: Compressed file ended before"),
        (lambda whole: whole[:10] + b"\xff" * 20, "cannot be read: Error -3 while decompressing"),
        (lambda whole: b"no gzip", "cannot be read: Not a gzipped file"),
    ],
)
def test_a_bad_gzip_file_is_one_sentence(labels, refused, tmp_path, spoil, sentence):
    path = tmp_path / "data.gz"
    path.write_bytes(spoil(gzip.compress(b"2 5 4\n0 1:1\n1 1:1\n", mtime=0)))
    assert sentence in refused(labels.main, "--data-file", str(path))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--labels", "0"), "expected a positive --labels, got 0"),
        (("--lr", "nan"), "expected a positive --lr, got nan"),
        (("--seed", str(2**32)), "--seed: expected a seed from 0 to 2**32 - 1, got '4294967296'"),
        (("--test-file", "t.txt"), "--test-file requires --data-file"),
        (("--labels", str(2**24 + 1)), "expected at most 16,777,216 --labels, got 16,777,217"),
        (("--features", str(10**15)), "not enough memory"),
        (("--threads", "1024", "--lr", "0"), "expected a positive --lr"),
        (("--data-file", "none.txt"), "none.txt cannot be read: No such file or directory"),
    ],
)
def test_bad_options_are_one_sentence(labels, refused, options, sentence):
    assert sentence in refused(labels.main, *options)
