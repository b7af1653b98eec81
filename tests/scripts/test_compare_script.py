import contextlib
import csv
import io
import json
import math
import re
import sys

import killed
import pytest
import undrawn
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nnce import data
from nnce.experiments import estimates
from nnce.monitoring.saturation import LayerFigures
from nnce.training import checkpoints

VARIANTS = {f"{loss}-lr{lr}" for loss in ("quadratic", "cross-entropy") for lr in ("0.5", "3")}
EPOCHS = 3


@pytest.fixture(scope="module")
def compare(request):
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("compare", ROOT / "scripts" / "compare.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(compare, tmp_path_factory):
    """A small comparison, its directory and its results."""
    run_dir = tmp_path_factory.mktemp("compare") / "run"
    options = ["--seeds", "3", "--lrs", "0.5", "3", "--epochs", str(EPOCHS)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), undrawn.drawn():
        assert compare.main([*options, "--run-dir", str(run_dir)]) == 0
    (run_dir / "out").write_text(out.getvalue(), encoding="utf-8")
    return run_dir, json.loads((run_dir / "results.json").read_text())


def test_each_part_of_the_end_is_shown_on_a_terminal(compare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    options = ["--seeds", "1", "--lrs", "3", "--epochs", "1", "--run-dir", str(tmp_path / "run")]
    assert compare.main(options) == 0
    shown = capsys.readouterr().err
    for part in (
        *("2 networks together", "control, by autograd", "comparing all engines with autograd …"),
        *("plotting learning curves …", "plotting images for TensorBoard …"),
    ):
        assert part in shown


def test_results(finished):
    _, results = finished
    rows = {(row["loss"], row["lr"], row["engine"]): row for row in results["rows"]}
    best = results["best_lrs"]
    assert set(rows) == {
        (loss, lr, "backprop") for loss in ("quadratic", "cross-entropy") for lr in (0.5, 3.0)
    } | {(loss, lr, "autograd") for loss, lr in best.items()}
    for (loss, lr, engine), row in rows.items():
        assert row["chosen"] == (engine == "backprop" and best[loss] == lr)
        assert row["networks"] == (3 if engine == "backprop" else 1)
        assert row["diverged"] == 0 and row["epochs"] == EPOCHS
        for when in ("first epoch", "last epoch", "best validation epoch"):
            mean, low, high = (
                row[f"test accuracy, {when}, {what}"] for what in ("mean", "low", "high")
            )
            assert 0 < mean < 1
            assert (low is None) if engine == "autograd" else low <= mean <= high
        assert len(row["epochs to 90% validation accuracy"]) == row["networks"]
        assert row["seconds a network"] > 0
    slow, fast = best["quadratic"], best["cross-entropy"]
    at = {f"both {lr}" for lr in ("0.5", "3") if not slow == fast == float(lr)}
    at.add(f"best: {slow:g} and {fast:g}")
    assert {difference["at"] for difference in results["differences"]} == at
    assert len(results["differences"]) == 3 * len(at)
    assert all(engine["difference"] < 1e-12 for engine in results["engines"])
    assert not results["interrupted"] and results["command"].startswith("scripts/compare.py")
    assert len(results["control"]) == 2


def test_the_table_is_what_the_csv_says(finished):
    """The statistics, once more from the epochs of every network."""
    run_dir, results = finished
    with (run_dir / "epochs.csv").open(newline="") as file:
        epochs = list(csv.DictReader(file))
    assert len(epochs) == (4 * 3 + 2) * (EPOCHS + 1)
    for row in results["rows"]:
        last = [
            float(epoch["accuracy/test"])
            for epoch in epochs
            if epoch["loss"] == row["loss"]
            and float(epoch["lr"]) == row["lr"]
            and epoch["engine"] == row["engine"]
            and int(epoch["epoch"]) == EPOCHS
        ]
        assert len(last) == row["networks"]
        expected = estimates.estimate(last, estimates.SHARE)
        assert row["test accuracy, last epoch, mean"] == pytest.approx(expected.mean)
        if len(last) > 1:
            assert row["test accuracy, last epoch, high"] == pytest.approx(expected.high)


def events_of(folder):
    return EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    ).Reload()


def runs_in(folder):
    return {path.name for path in folder.iterdir() if path.is_dir()}


CURVES = [
    *(f"{what}/layer{n}" for what in LayerFigures._fields for n in (1, 2)),
    *(f"{what}/{of}" for what in ("loss", "accuracy") for of in ("train", "validation", "test")),
    *(f"first_epochs/{w}/{of}" for w in ("loss", "accuracy") for of in ("validation", "test")),
]


def test_every_tag_has_its_points(finished):
    run_dir, results = finished
    controls = {f"{loss}-lr{lr:g}-autograd" for loss, lr in results["best_lrs"].items()}
    assert runs_in(run_dir) == {"best-rates", "all-rates"}
    folders = runs_in(run_dir / "all-rates")
    assert folders == VARIANTS | controls  # no stray runs
    chosen = {f"{loss}-lr{lr:g}" for loss, lr in results["best_lrs"].items()}
    for name in folders:
        events = events_of(run_dir / "all-rates" / name)
        ends = {f"upper_and_lower/{t}/{end}" for t in CURVES for end in ("lower", "upper")}
        expected = {*CURVES, *ends}
        assert set(events.Tags()["scalars"]) == expected
        for tag in expected:
            points = events.Scalars(tag)
            assert [event.step for event in points] == list(range(EPOCHS + 1)), (name, tag)
            assert all(math.isfinite(event.value) for event in points)
        assert set(events.Tags()["histograms"]) == {"output/z", "output/a", "output/dz"}
        for tag in events.Tags()["histograms"]:
            assert [event.step for event in events.Histograms(tag)] == [0, 1, 2, 3]
        images = {"weights/layer1", "wrong", "confusion"} if name in chosen else set()
        assert set(events.Tags()["images"]) - {"learning curves"} == images
        for tag in images:
            assert [event.step for event in events.Images(tag)] == [EPOCHS]
        assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert (run_dir / "learning-curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_folder_of_the_best_rates_is_four_of_the_runs(finished):
    """With the same points, and the options, the tables and the picture once among them."""
    run_dir, results = finished
    best = {f"{loss}-lr{lr:g}" for loss, lr in results["best_lrs"].items()}
    expected = best | {f"{name}-autograd" for name in best}
    assert len(expected) == 4 and runs_in(run_dir / "best-rates") == expected
    texts, pictures = [], []
    for name in sorted(expected):
        folders = [run_dir / folder / name for folder in ("best-rates", "all-rates")]
        assert killed.differences(*map(killed.curves, folders)) == []
        events = events_of(folders[0])
        texts += [tag for tag in events.Tags()["tensors"] if tag.endswith("text_summary")]
        pictures += [tag for tag in events.Tags()["images"] if tag == "learning curves"]
        if "results/text_summary" in events.Tags()["tensors"]:
            (page,) = events.Tensors("results/text_summary")
    assert sorted(texts) == ["config/text_summary", "results/text_summary"]
    assert pictures == ["learning curves"]
    text = page.tensor_proto.string_val[0].decode()
    assert "Made by `scripts/compare.py --seeds 3" in text
    assert "| cross-entropy | 0.5 " in text and "best on validation" in text
    assert (run_dir / "results.md").read_text(encoding="utf-8").startswith(text)


ANSWER = re.compile(
    r"cross-entropy − quadratic, each at its best rate \(\S+ and \S+\): [+−]\d+\.\d\d points of "
    r"test accuracy after 3 epochs \(95 % [+−]\d+\.\d\d to [+−]\d+\.\d\d†?, n = 3\): \w+"
)


def test_it_begins_and_ends_with_the_answer_and_has_one_table(finished):
    run_dir, results = finished
    lines = (run_dir / "out").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    (first,) = [line for line in lines[:8] if ANSWER.match(line)]
    assert first in lines[-8:]
    assert results["answer"].splitlines()[0] == first
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 2 and max(map(len, table)) <= 100
    mean, low, high = (
        next(
            d[key]
            for d in results["differences"]
            if d["at"].startswith("best") and d["test accuracy"] == "last epoch"
        )
        for key in ("mean", "low", "high")
    )
    for number in (mean, low, high):
        assert f"{100 * number:+.2f}".replace("-", "−") in first
    assert any("results.md" in line and str(run_dir) in line for line in lines[-8:])
    assert [line.split()[-1] for line in lines if "--logdir" in line] == [
        str(run_dir / "best-rates"),
        str(run_dir / "all-rates"),
    ]
    page = (run_dir / "results.md").read_text(encoding="utf-8")
    for text in (
        *first.split("\n"),
        "p, Holm",
        "epochs to 90 %",
        "s/network",
        "control",
        " s: tra",
    ):
        assert text in page


def test_bands_are_the_interval_over_seeds(finished):
    run_dir, results = finished
    for row in results["rows"]:
        if row["engine"] == "backprop":
            events = events_of(run_dir / "all-rates" / f"{row['loss']}-lr{row['lr']:g}")
            ends = "upper_and_lower/accuracy/test/"
            tags = {"mean": "accuracy/test", "low": f"{ends}lower", "high": f"{ends}upper"}
            for key, tag in tags.items():
                seen = events.Scalars(tag)[-1].value
                assert seen == pytest.approx(row[f"test accuracy, last epoch, {key}"])


def test_custom_scalars_are_three_groups_of_margin_charts(finished):
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    run_dir, _ = finished
    layouts = []
    for folder in (run_dir / "best-rates").iterdir():
        (event,) = events_of(folder).Tensors("custom_scalars__config__")
        layouts.append(Layout.FromString(event.tensor_proto.string_val[0]))
    assert all(layout == layouts[0] for layout in layouts)  # TensorBoard merges equal ones
    well, fast, slow = layouts[0].category
    assert "How well" in well.title and "How fast" in fast.title and "slowdown" in slow.title
    assert any("ratio of dz, quadratic to cross-entropy" in chart.title for chart in slow.chart)
    values = []
    for category in (well, fast, slow):
        for chart in category.chart:
            (series,) = chart.margin.series
            values.append(series.value)
            ends = (series.lower, series.upper)
            assert ends == tuple(
                f"upper_and_lower/{series.value}/{end}" for end in ("lower", "upper")
            )
    assert len(values) == len(set(values)) and set(values) < set(CURVES)
    # TensorBoard shows a group's last chart first.
    assert well.chart[-1].margin.series[0].value == "accuracy/test"
    assert slow.chart[-1].margin.series[0].value == "slowdown/layer2"


def test_hyper_parameters_are_in_the_runs_themselves(finished):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams import metadata

    run_dir, _ = finished
    for name in VARIANTS:
        (path,) = (run_dir / "all-rates" / name).glob("events.out.tfevents.*.closing")
        sessions = [
            metadata.parse_session_start_info_plugin_data(value.metadata.plugin_data.content)
            for event in EventFileLoader(str(path)).Load()
            for value in event.summary.value
            if value.tag == metadata.SESSION_START_INFO_TAG
        ]
        (session,) = sessions
        assert set(session.hparams) == {"loss", "rate", "start", "λ", "engine", "epochs"}
        assert (
            f"{session.hparams['loss'].string_value}-lr{session.hparams['rate'].number_value:g}"
            == name
        )
        assert session.hparams["epochs"].number_value == EPOCHS  # not the usual number


def test_one_seed_says_that_there_is_no_interval(compare, tmp_path, capsys):
    options = ["--seeds", "1", "--lrs", "quadratic=3", "cross-entropy=0.5", "--epochs", "1"]
    assert compare.main([*options, "--control-seeds", "0", "--run-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "With one seed there are no intervals and p-values" in out
    assert "no interval from one seed: use --seeds 8" in out
    assert "(" not in out.splitlines()[9] and "nan" not in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["test accuracy, last epoch, low"] for row in results["rows"]] == [None, None]


def test_a_diverging_rate_is_reported_and_the_rest_goes_on(compare, tmp_path, capsys):
    options = ["--seeds", "2", "--lrs", "1", "1e38", "--epochs", "2", "--run-dir", str(tmp_path)]
    assert compare.main(options) == 0
    out = capsys.readouterr().out
    assert "| diverged " in out and "2 of 2 (cross-entropy-lr1e+38)" in out
    assert "DIVERGED: 2 of 2" in (tmp_path / "results.md").read_text(encoding="utf-8")
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["loss"], row["lr"]): row for row in results["rows"] if row["engine"] == "backprop"}
    assert rows["cross-entropy", 1e38]["diverged"] == 2
    assert rows["cross-entropy", 1e38]["test accuracy, last epoch, mean"] is None
    assert rows["cross-entropy", 1.0]["test accuracy, last epoch, n"] == 2
    assert results["best_lrs"]["cross-entropy"] == 1.0


def test_when_everything_diverges_it_is_said(compare, tmp_path, capsys):
    options = ["--seeds", "2", "--lrs", "cross-entropy=1e38", "quadratic=1", "--epochs", "1"]
    assert compare.main([*options, "--run-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "No usable rate for cross-entropy: all diverged." in out
    assert out.count("No comparison: cross-entropy diverged at every rate.") == 2
    assert runs_in(tmp_path / "best-rates") == {"quadratic-lr1", "quadratic-lr1-autograd"}


def test_when_all_of_both_losses_diverge_there_is_a_picture_all_the_same(
    compare, tmp_path, capsys, monkeypatch, drawn
):
    figures = []
    whole = compare.report.write_figure
    monkeypatch.setattr(
        compare.report,
        "write_figure",
        lambda path, figure, dpi: (figures.append(figure), whole(path, figure, dpi)),
    )
    options = ["--seeds", "2", "--lrs", "1e38", "--l2", "1e30", "--epochs", "1"]
    assert compare.main([*options, "--run-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for loss in ("quadratic", "cross-entropy"):
        assert f"No usable rate for {loss}: all diverged." in out
    assert "nan" not in out
    (figure,) = figures
    assert [panel.texts[0].get_text() for panel in figure.axes] == ["all diverged"] * 3
    assert (tmp_path / "learning-curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_keeps_what_is_finished_and_says_so(
    compare, tmp_path, monkeypatch, capsys
):
    whole = data.order
    calls = []

    def third_epoch_is_stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 5:  # two seeds, an order each
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(data, "order", third_epoch_is_stopped)
    run_dir = tmp_path / "run"
    options = ["--seeds", "2", "--lrs", "1", "--epochs", "5", "--run-dir", str(run_dir)]
    with pytest.raises(KeyboardInterrupt):
        compare.main(options)
    out, err = capsys.readouterr()
    assert "**Interrupted after epoch 2.**" in out
    first, second = err.splitlines()
    assert first == "Interrupted; epochs 0 to 2 are in the table; resume with:"
    assert second.endswith(f" --resume {run_dir}")
    results = json.loads((run_dir / "results.json").read_text())
    assert results["interrupted"] and {row["epochs"] for row in results["rows"]} == {2}
    (page,) = events_of(run_dir / "best-rates" / "quadratic-lr1").Tensors("results/text_summary")
    assert b"Interrupted after epoch 2" in page.tensor_proto.string_val[0]


def test_interrupted_in_the_first_epoch_there_is_no_table_yet(
    compare, tmp_path, monkeypatch, capsys
):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "order", stopped)
    run_dir = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        compare.main(["--run-dir", str(run_dir)])
    out, err = capsys.readouterr()
    assert (
        "test %" not in out
        and "cross-entropy −" not in out
        and not (run_dir / "results.json").exists()
    )
    assert err.splitlines()[0] == "Interrupted; resume with:"
    assert checkpoints.latest_checkpoint(run_dir).content["side by side"]["cursor"]["epoch"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1000000000"], "14,000,000,000 networks of sizes 64-30-10 would need"),
        (
            ["--seeds", "0", "--control-seeds", "0"],
            "expected an integer number of --seeds, at least 1, got 0",
        ),
        (["--control-seeds", "9"], "0 to 8 --control-seeds, at most --seeds, got 9"),
        (["--lrs", "fast"], "expected numbers in --lrs, got 'fast'"),
        (["--lrs", "hinge=1"], "--lrs for 'quadratic' or 'cross-entropy', got 'hinge=1'"),
        (["--lrs", "quadratic=1"], "at least one --lrs for loss 'cross-entropy', got none"),
        (["--lrs", "1", "3", "1.0"], "expected each value of --lrs once, got 1 again"),
        (["--lrs", "1", "quadratic=1"], "expected each value of --lrs once, got 1 again"),
        (["--lrs", "0"], "expected a positive --lrs, got 0.0"),
        (["--epochs", "0"], "expected --epochs of at least 1"),
        (["--hidden", "1000000000000"], "would need"),
        (["--engine", "functions"], "unrecognized arguments: --engine functions"),
    ],
)
def test_bad_input_is_one_line(compare, options, message, refused):
    assert message in refused(compare.main, *options)


def test_a_used_run_directory_is_refused(compare, tmp_path, refused):
    (tmp_path / "results.json").write_text("{}")
    assert "already used; choose a new one" in refused(compare.main, "--run-dir", str(tmp_path))


@pytest.mark.slow
def test_the_default_comparison_stays_small(compare, tmp_path, capsys, drawn):
    """Under 20 MB in all; what logging costs is in results.json."""
    assert compare.main(["--run-dir", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert " points of test accuracy after 30 epochs (95 % " in out and err == ""
    assert len(out.splitlines()) <= 60
    size = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert size < 20e6
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    parts = results["seconds_of"]
    assert list(parts) == ["training", "evaluation", "logging", "tables and pictures", "control"]
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(results["seconds"])
