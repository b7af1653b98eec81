"""What the pages say in code runs, and what they name exists."""

import importlib
import json
import re
import shlex

import pytest
import torch
from conftest import ROOT
from zoo import ZOO

import nnce
from nnce import rules
from nnce.checks import composability
from nnce.experiments.proof import table

PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        *("README.md", "nnce/README.md", "scripts/README.md", "runs/README.md", "tests/README.md"),
        *("runs/benchmarks.md", "runs/reproduced/README.md", "CHANGELOG.md"),
        *(".github/CONTRIBUTING.md", ".github/SECURITY.md"),
    )
}
README, INSIDE, SCRIPTS = (PAGES[n] for n in ("README.md", "nnce/README.md", "scripts/README.md"))
EXAMPLES = [
    (f"{name}, {title}", code)
    for name, page in PAGES.items()
    for title, code in re.findall(
        r"\n#+ ([^\n]+)\n(?:(?!\n#).)*?```python\n(.*?)```", page, re.DOTALL
    )
]
TEN_LINES = dict(EXAMPLES)["README.md, Ten lines"]
COMMANDS = [
    (name, shlex.split(command))
    for title, page in PAGES.items()
    if title not in ("CHANGELOG.md", ".github/SECURITY.md")  # options without their values
    for name, command in re.findall(r"(?<!tests/)scripts/(\w+)\.py([^\n`|]*)", page)
]


def execute(code):
    namespace = {}
    exec(compile(code, "README.md", "exec"), namespace)
    return namespace


def test_the_pages_are_short():
    assert len(README.encode()) <= 9_000
    assert len(SCRIPTS.splitlines()) <= 170


def test_every_example_is_run():
    assert len(EXAMPLES) == sum(page.count("```python") for page in PAGES.values())


def test_the_speed_on_the_front_page_is_the_benchmarks():
    rows = json.loads((ROOT / "runs" / "benchmarks" / "losses.json").read_text())["rows"]
    of = {(row["work"], row["peer"]): row for row in rows}
    large, compiled = (of["[1024, 1000]", peer] for peer in ("built-in", "torch.compile of it"))
    no_numba = large["ratio"] / of["[1024, 1000]", "nnce without Numba"]["ratio"]
    small = of["[32, 10]", "built-in"]["ratio"]
    assert (
        f"{large['ratio']:.1f} ({large['ratio_least']:.1f} to {large['ratio_most']:.1f}) times as "
        f"fast as the built-in at [1024, 1000] in float32, and {compiled['ratio']:.1f} times as "
        f"fast as `torch.compile` of it; at [32, 10] it has {small:.2f} of its speed, without "
        f"Numba {no_numba:.2f} at [1024, 1000]."
    ) in README


def test_ten_lines():
    code = TEN_LINES.strip().splitlines()
    names = execute(TEN_LINES)
    assert len([line for line in code if line]) == 10
    a = names["nnce"].sigmoid(names["network"](names["x"]))
    assert ((a > 0.5) == (names["y"] > 0.5)).all()


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_example(name, code, script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "runs/digits" in code:
        (options,) = [of for name, of in COMMANDS if name == "train" and "runs/digits" in of]
        script("train").main(options)
    execute(code)


@pytest.mark.parametrize(
    ("name", "options"), COMMANDS, ids=[" ".join([n, *o]) for n, o in COMMANDS]
)
def test_every_command_is_one_of_a_scripts(name, options, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--config" in options:
        path = tmp_path / options[options.index("--config") + 1]
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    options = ["10" if option == "N" else option for option in options]
    script(name).parser().parse_args(options)


def test_commands_that_begin_with_a_word_are_among_them():
    positional = {name for name, options in COMMANDS if options and options[0].isalpha()}
    assert positional == {"benchmark", "predict", "reproduce"}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]*)#?[^)]*\)", PAGES[name]):
        if target and not target.startswith("http"):
            assert (ROOT / name).parent.joinpath(target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", PAGES[name]):
        page = (ROOT / name).parent.joinpath(target).resolve() if target else ROOT / name
        titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        # As GitHub makes them: punctuation is left out.
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert anchor in anchors, anchor


def test_equivalents_of_nielsens_code_exist():
    table = INSIDE[INSIDE.index("## Equivalents of Nielsen") :]
    named = set(re.findall(r"`(?:nnce\.)?((?:nnce|data|training|rules|losses)\.\w+)", table))
    named |= {f"nnce.{name}" for name in re.findall(r"nnce\.(\w+)\(", table)}
    assert len(named) > 10
    for name in named:
        module, attribute = name.split(".")
        home = nnce if module == "nnce" else importlib.import_module(f"nnce.{module}")
        assert hasattr(home, attribute), name


def test_every_file_and_package_is_in_the_table_of_the_layout():
    listed = re.findall(r"^\| \[`([\w/.]+)`\]", INSIDE, re.MULTILINE)
    package = ROOT / "nnce"
    files = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert sorted(listed) == sorted(files | {f"{p.parent.name}/" for p in package.glob("*/*.py")})


def test_the_drop_in_example_has_pytorchs_value_and_gradient():
    code = dict(EXAMPLES)["README.md, Replace `BCEWithLogitsLoss`"]
    ours, integers = "= nnce.BCEWithLogitsLoss()", "torch.randint(2, (32, 10))"
    assert ours in code and integers in code
    gradients = []
    pytorchs = code.replace(ours, "= torch.nn.BCEWithLogitsLoss()")
    for variant in (code, pytorchs.replace(integers, f"{integers}.float()")):
        torch.manual_seed(0)
        gradients.append(execute(variant)["z"].grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


def test_the_two_commands_name_what_exists():
    first, second = re.findall(r"```sh\n(python3 -m venv .*)\n```", README)
    assert first.endswith("&& .venv/bin/python scripts/compare.py")
    assert second.endswith("&& .venv/bin/python -m pytest")


def test_every_rule_named_in_the_table_exists():
    table = INSIDE[INSIDE.index("## The equations") : INSIDE.index("## Package layout")]
    names = [
        name
        for row in re.findall(r"^\| \d .*\|([^|]*)\|$", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    ]
    assert len(names) == 10 and all(hasattr(rules, name) for name in names)


def test_the_matrix_is_the_one_that_is_tested():
    rows = re.findall(
        r"^\| ([^|]+) \|((?: (?:works|no .|not tried ³) \|){6})$", INSIDE, re.MULTILINE
    )
    assert [name for name, _ in rows] == list(composability.COLUMNS)
    # What the newest PyTorch cannot do; older ones can do some of it.
    not_possible = {"compile, double backward", "compile(vmap(grad))", "compile(hessian)"}
    assert set(table.INSIDE_PYTORCH) <= not_possible
    for name, cells in rows:
        assert ("works" in cells) == (name not in not_possible and "CUDA" not in name)


def test_every_outcome_is_tested():
    table = PAGES["tests/README.md"]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)` \|$", table, re.MULTILINE)
    assert len(named) == len(re.findall(r"\| `tests/", table)) >= 17
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), test


def test_the_zoo_has_so_many():
    (count,) = re.findall(r"On (\d+) functions, right ones", INSIDE)
    assert int(count) == len(ZOO)
