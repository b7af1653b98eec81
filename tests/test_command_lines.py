"""Wrong command lines, made from the options' types: one line and status 2, or a valid run."""

import argparse
import contextlib
import io
import re
import urllib.request
import warnings
from collections import Counter

import killed
import pytest
from conftest import ROOT, slow_unless
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nnce
from nnce import data

NAMES = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "startup")
# So that a valid run is short; whatever is drawn overrides it.
SMALL = {
    "train": ["--epochs", "1", "--train-size", "20"],
    "compare": ["--epochs", "1", "--train-size", "20", "--seeds", "1", "--lrs", "1"],
    "labels": ["--labels", "60", "--examples", "50", "--features", "4", "--epochs", "1"],
    "slowdown": ["--epochs", "3"],
    "reproduce": ["--data", "digits"],
    "predict": ["network.pt", "--index", "3"],
}
# Where the work begins that takes too long for a thousand of them.
WORK = {
    "compare": ("run", "train_sweep"),
    "labels": ("learn",),
    "check_gradients": ("measure_everywhere",),
    "benchmark": ("measure",),
    "reproduce": ("run",),
}
JUNK = ("", " ", "-", "--", "nan", "-inf", "1e400", "0x10", "½", "七", "a\nb", "1,2", "None", "%s")
WHOLE = (
    "1",
    "2",
    "3",
    "0",
    "-1",
    "5",
    "16",
    "1000000",
    "1" + 30 * "0",
    "2.5",
    "1e3",
    "4294967296",
)
NUMBERS = ("0.5", "1", "0", "-1", "1e-30", "1e38", "1e300", "1e400", "inf", "nan", "0.999")
PLACES = ("nowhere/at/all", "file", "folder", "empty", "file/in", "\udcff", "x" * 300, ".")
MORE = {
    # A million hidden neurons are valid, and take minutes.
    "hidden": ("1", "3", "50", "0", "-1", "2.5", "1" + 30 * "0"),
    "lrs": ("0.5", "1", "quadratic=1,3", "cross-entropy=0.5", "hinge=1", "quadratic=", "0", "-1"),
    "sweep": (
        "lr=0.1,1",
        "l2=0,5",
        "hidden=3,4-2",
        "init=scaled,0.1",
        "lr",
        "x=1",
        "l2=-1",
        "l2=a",
    ),
    "patience": ("1", "3", "0", "-1"),
    "checkpoint_every": ("1", "3", "30s", "0", "0s", "s", "-1", "1.5", "infs"),
    "start": ("1", "-1", "0.6", "nan"),
    "table": ("nielsen", "nielsen", "neilsen", "simard"),
    "rows": ("N1", "N8", "n8b", "N9"),
    "data": (*data.DATASETS, "digits", "folder", "file", "nowhere"),
    "init": ("scaled", "large", "small", "0.05", "0", "-1", "inf"),
    **dict.fromkeys(
        ("rotation", "scaling", "shear", "translation", "elastic", "elastic_sigma"), NUMBERS
    ),
}


class Valid(BaseException):
    """The options were fine: the work would begin."""


def values(action):
    """What may stand behind an option, right or wrong."""
    right = {int: WHOLE, float: NUMBERS}.get(action.type, PLACES)
    right = MORE.get(action.dest, action.choices or right)
    return st.one_of(st.sampled_from([str(value) for value in right]), st.sampled_from(JUNK))


@st.composite
def command_lines(draw, parser):
    """Some of the options, in any order, with any number of values."""
    actions = [
        action
        for action in parser._actions
        if action.dest != "help" and action.help is not argparse.SUPPRESS
    ]
    line = []
    for action in draw(st.lists(st.sampled_from(actions), max_size=3)):
        if action.option_strings:
            line.append(draw(st.sampled_from(action.option_strings)))
        takes = {0: 0, None: 1}.get(action.nargs, draw(st.integers(0, 3)))
        if draw(st.integers(0, 19)) == 0:
            takes = draw(st.integers(0, 2))  # too few, or too many
        line += [draw(values(action)) for _ in range(takes)]
    if draw(st.integers(0, 9)) == 0:
        line.insert(draw(st.integers(0, len(line))), draw(st.sampled_from(["--epoch", "-x", "--"])))
    return line


def outcome(module, name, line, folder):
    """What becomes of a command line: "valid", "refused" or "failed"; anything else fails."""
    before = sorted(folder.rglob("*"))
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            with warnings.catch_warnings():
                # More threads than there are processors is said, and is not wrong.
                warnings.filterwarnings("ignore", message="threads=")
                status = module.main([*SMALL.get(name, ()), *line])
        except Valid:
            return "valid"
        except SystemExit as stop:
            status = stop.code
    said = err.getvalue()
    assert "Traceback" not in said
    if status == 2:
        assert said.count("\n") == 1 and ": error: " in said, said
        assert sorted(folder.rglob("*")) == before, "something was left behind"
        return "refused"
    if status == 1:  # a rate that is too large
        assert "no longer a finite number" in said, said
        return "failed"
    assert status == 0
    return "valid"


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder with some things in it, and no network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("precious")
    (tmp_path / "empty").mkdir()
    nnce.save(nnce.MLP((64, 10)), tmp_path / "network.pt")

    def nowhere(*arguments, **more):
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", nowhere)
    monkeypatch.delenv("NNCE_DATA", raising=False)
    return tmp_path


# These begin their work in earnest, and may be told to make large networks.
LONG = ("train", "slowdown")


@pytest.mark.parametrize(
    ("name", "trials"),
    [
        *slow_unless(lambda name, trials: name not in LONG, [(name, 25) for name in NAMES]),
        *(pytest.param(name, 300, marks=pytest.mark.exhaustive) for name in NAMES),
    ],
)
def test_a_wrong_command_line_is_one_line(name, trials, somewhere, monkeypatch, record_property):
    module = killed.loaded(name)

    def begins(*arguments, **more):
        raise Valid

    for function in WORK.get(name, ()):
        monkeypatch.setattr(module, function, begins)
    found = Counter()

    @settings(max_examples=trials, suppress_health_check=list(HealthCheck))
    @given(line=command_lines(module.parser()))
    def tried(line):
        found[outcome(module, name, line, somewhere)] += 1

    tried()
    assert found["refused"] >= trials / 4 and found["valid"] >= 1, found
    assert (somewhere / "folder" / "thesis.tex").read_text() == "precious"
    record_property("trials", dict(found))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("train", ["--epochs", "3", "--patience", "1", "--lr", "1e-9", "--train-size", "20"]),
        ("compare", ["--seeds", "1", "--lrs", "1", "--epochs", "1", "--train-size", "20"]),
        ("compare", ["--seeds", "1", "--sweep", "lr=1", "--epochs", "1", "--train-size", "20"]),
        ("labels", ["--labels", "1", "--examples", "1", "--positives", "1", "--epochs", "1"]),
        ("reproduce", ["nielsen", "N1", "--seeds", "1", "--max-epochs", "1", "--train-size", "20"]),
    ],
)
def test_one_is_singular(name, line, tmp_path, capsys):
    """Counts of 1 are followed by a singular noun in everything that a script prints."""
    where = ["--run-dir", str(tmp_path / "run")]
    where += ["--data", "digits"] if name == "reproduce" else []
    assert killed.loaded(name).main([*line, *where]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\b1 [a-z]+\b", out)
    assert not re.findall(r"(?<![\d,.])1 (?:\w+ )?[a-z]+[^s\W]s\b", out)
