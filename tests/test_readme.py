"""What the pages say in code runs, and what they name exists."""

import importlib
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
    for name in ("README.md", "nnce/README.md", "scripts/README.md", "runs/README.md")
}
README, INSIDE, SCRIPTS = (PAGES[n] for n in ("README.md", "nnce/README.md", "scripts/README.md"))
EXAMPLES = [
    (f"{name}, {title}", code)
    for name, page in PAGES.items()
    for title, code in re.findall(
        r"\n#+ ([^\n]+)\n(?:(?!\n#).)*?```python\n(.*?)```", page, re.DOTALL
    )
]
TEN_LINES = re.search(r"ten lines:\n\n```python\n(.*?)```", README, re.DOTALL)[1]
COMMANDS = [
    (name, shlex.split(command))
    for page in PAGES.values()
    for name, command in re.findall(r"(?<!tests/)scripts/(\w+)\.py([^\n`|]*)", page)
]


def execute(code):
    namespace = {}
    exec(compile(code, "README.md", "exec"), namespace)
    return namespace


def test_the_front_page_fits_on_two_screens():
    assert len(README.encode()) <= 10_000


def test_every_example_is_run():
    assert len(EXAMPLES) == sum(page.count("```python") for page in PAGES.values())


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
def test_every_command_is_one_of_a_scripts(name, options, script):
    options = ["10" if option == "N" else option for option in options]
    script(name).parser().parse_args(options)


def test_commands_that_begin_with_a_word_are_among_them():
    positional = {name for name, options in COMMANDS if options and options[0].isalpha()}
    assert positional == {"benchmark", "reproduce"}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]*)#?[^)]*\)", PAGES[name]):
        if target and not target.startswith("http"):
            assert (ROOT / name).parent.joinpath(target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", PAGES[name]):
        page = (ROOT / name).parent.joinpath(target).resolve() if target else ROOT / name
        titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in [title.lower().replace(" ", "-") for title in titles], anchor


def test_what_is_named_beside_the_textbooks_code_exists():
    table = INSIDE[INSIDE.index("## If you come from") :]
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


def test_convolutional_example_trains_as_with_pytorchs_loss():
    code = dict(EXAMPLES)["README.md, In place of `BCEWithLogitsLoss`"]
    ours = "= nnce.BCEWithLogitsLoss()"
    assert ours in code
    gradients = []
    for variant in (code, code.replace(ours, "= nn.BCEWithLogitsLoss()")):
        torch.manual_seed(0)
        network = execute(variant)["network"]
        gradients.append([p.detach() for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


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
        r"^\| ([^|]+) \|((?: (?:works|no .|not tried ³) \|){6})$", SCRIPTS, re.MULTILINE
    )
    assert [name for name, _ in rows] == list(composability.COLUMNS)
    # What the newest PyTorch cannot do; older ones can do some of it.
    not_possible = {"compile, double backward", "compile(vmap(grad))", "compile(hessian)"}
    assert set(table.INSIDE_PYTORCH) <= not_possible
    for name, cells in rows:
        assert ("works" in cells) == (name not in not_possible and "CUDA" not in name)


def test_every_promise_is_held_by_a_test():
    table = SCRIPTS[SCRIPTS.index("### What survives what") :]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)` \|$", table, re.MULTILINE)
    assert len(named) == len(re.findall(r"\| `tests/", table)) >= 17
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), test


def test_the_zoo_has_so_many():
    (count,) = re.findall(r"On (\d+) functions, right ones", INSIDE)
    assert int(count) == len(ZOO)
