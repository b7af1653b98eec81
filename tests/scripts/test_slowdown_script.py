import json
import math
import sys

import killed
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture
def slowdown(script):
    return script("slowdown")


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("slowdown") / "run"
    assert killed.loaded("slowdown").main(["--run-dir", str(run_dir)]) == 0
    results = json.loads((run_dir / "results.json").read_text())
    return {(row["w"], row["b"], row["rule"]): row for row in results["rows"]}


def test_the_story_of_the_notes(stories, capsys):
    """The worse the start, the longer the quadratic loss takes; the cross-entropy hardly cares."""
    assert len(stories) == 9
    half = {key: row["first_epoch_below_half"] for key, row in stories.items()}
    assert half[0.6, 0.9, "cross-entropy"] < half[0.6, 0.9, "quadratic"] < 50
    assert half[2, 2, "cross-entropy"] < 20 and half[2, 2, "quadratic"] > 200
    assert half[20, 20, "quadratic"] is None
    # The textbook's own figures: the outputs after 300 epochs.
    assert stories[0.6, 0.9, "quadratic"]["output_end"] == pytest.approx(0.09, abs=0.005)
    assert stories[2, 2, "quadratic"]["output_end"] == pytest.approx(0.20, abs=0.005)


def test_bceloss_never_moves_where_the_rule_learns(stories):
    blind = stories[20, 20, "BCELoss of σ(z)"]
    assert blind["dw_most"] == 0 and blind["output_end"] == 1 and blind["loss_end"] == 100
    exact = stories[20, 20, "cross-entropy"]
    assert exact["dw_start"] == 1 and exact["loss_start"] == 40
    # σ(40) is 1: z falls by 2 lr an epoch until it is near 0.
    assert exact["first_epoch_below_half"] == pytest.approx(40 / 0.3, abs=5)
    assert exact["output_end"] < 0.03


def test_a_neuron_by_hand(slowdown):
    """Three epochs in plain Python."""
    for rule in ("quadratic", "cross-entropy"):
        story = slowdown.learn(rule, 0.6, 0.9, 0.15, 3, torch.float64)
        w, b = 0.6, 0.9
        for output, dw in zip(story.output, story.dw, strict=True):
            a = 1 / (1 + math.exp(-(w + b)))
            dz = a * a * (1 - a) if rule == "quadratic" else a
            assert output == pytest.approx(a, rel=1e-12) and dw == pytest.approx(dz, rel=1e-12)
            w, b = w - 0.15 * dz, b - 0.15 * dz


def test_it_ends_with_the_answer(slowdown, tmp_path, capsys):
    """Of the start that is most wrong, wherever it stands among the others."""
    options = ["--start", "2", "2", "--start", "0.6", "0.9", "--epochs", "100"]
    assert slowdown.main([*options, "--run-dir", str(tmp_path)]) == 0
    answer = (
        "From w = 2, b = 2, epochs until the output is below ½: quadratic not within 100, "
        "cross-entropy 17, BCELoss of σ(z) 17."
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == lines[-4] == answer
    assert json.loads((tmp_path / "results.json").read_text())["answer"] == answer


def test_picture_and_curves(slowdown, tmp_path, capsys, drawn):
    run_dir = tmp_path / "run"
    options = ["--start", "1", "1", "--epochs", "5", "--run-dir", str(run_dir)]
    assert slowdown.main(options) == 0
    out = capsys.readouterr().out
    assert "| 1, 1       | quadratic " in out
    assert f"tensorboard --logdir {run_dir}\n" in out
    assert (run_dir / "single-neuron.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in run_dir.iterdir() if path.is_dir()}
    assert names == {"w1-b1-quadratic", "w1-b1-cross-entropy", "w1-b1-BCELoss"}
    results = json.loads((run_dir / "results.json").read_text())
    for name in names:
        events = EventAccumulator(str(run_dir / name)).Reload()
        assert set(events.Tags()["scalars"]) == {"neuron/output", "neuron/loss", "neuron/dC_dw"}
        if name.endswith("quadratic"):
            curve = [event.value for event in events.Scalars("neuron/output")]
            assert curve == pytest.approx(results["epochs"][0]["output"])
            assert [e.step for e in events.Scalars("neuron/dC_dw")] == list(range(6))
    assert EventAccumulator(str(run_dir)).Reload().Tags()["images"] == ["single neuron"]


def test_each_part_is_shown_on_a_terminal(slowdown, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert slowdown.main(["--epochs", "5", "--run-dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().err
    assert all(part in shown for part in ("training: ", "logging: ", "plotting …"))
    assert "/9 [" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "1 to 100,000 --epochs, got 0"),
        (["--lr", "-1"], "a positive --lr"),
        (["--lr", "nan"], "a positive --lr"),
        (["--start", "1", "inf"], "finite numbers for --start"),
        (["--start", "1"], "expected 2 arguments"),
        (["--start", "1", "2", "--start", "1.0", "2"], "value of --start once, got 1 2 again"),
    ],
)
def test_bad_input_is_one_line(slowdown, options, message, refused):
    assert message in refused(slowdown.main, *options)


def test_quiet_and_an_earlier_run_as_configuration(script, tmp_path, capsys):
    """Explicit starts replace the recorded ones."""
    main, first, second = script("slowdown").main, tmp_path / "first", tmp_path / "second"
    options = ["--start", "1", "2", "--start", "-1", "0.5", "--epochs", "3", "--quiet"]
    assert main([*options, "--run-dir", str(first)]) == 0
    answer = json.loads((first / "results.json").read_text())["answer"]
    assert capsys.readouterr().out == f"{answer}\nResults and single-neuron.png: {first}\n"
    options = ["--config", str(first / "results.json"), "--run-dir", str(second)]
    for more, starts in (([], [[1.0, 2.0], [-1.0, 0.5]]), (["--start", "3", "4"], [[3.0, 4.0]])):
        assert script("slowdown").parser().parse_args([*options, *more]).start == starts
    assert main([*options, "--start", "3", "4"]) == 0
    assert json.loads((second / "results.json").read_text())["config"]["epochs"] == 3
