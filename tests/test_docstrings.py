"""Docstrings of the public objects: sections they must have, and examples that run."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import itertools
import pathlib
import re
import tempfile

import pytest
import torch

import nnce

PUBLIC_MODULES = (
    *("nnce", "nnce.rules", "nnce.losses", "nnce.functional", "nnce.modules", "nnce.algorithm"),
    *("nnce.data", "nnce.training", "nnce.labels"),
)
# Their docstrings have a formula, and its number in the notes or its source.
COMPUTE = ("nnce.rules", "nnce.functional", "nnce.modules", "nnce.algorithm", "nnce.labels")
# No errors of their own.
RAISE_NOTHING = {
    *("best_record", "confusion", "deltas", "ensemble_engine", "evaluate", "generators"),
    *("hyperparameters", "is_finite", "order", "pack", "records", "sizes", "stream", "unpack"),
    *("with_dropout", "with_graph"),
}


def documentation(module, name):
    """The docstring of a public object, or the string below a constant."""
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        return inspect.cleandoc(vars(value).get("__doc__") or value.__doc__ or "")
    path = pathlib.Path(module.__file__)
    files = path.parent.glob("*.py") if path.name == "__init__.py" else [path]
    for file in files:
        body = ast.parse(file.read_text(encoding="utf-8")).body
        for assignment, below in itertools.pairwise(body):
            targets = getattr(assignment, "targets", [getattr(assignment, "target", None)])
            if getattr(targets[0], "id", None) == name and isinstance(below, ast.Expr):
                return inspect.cleandoc(below.value.value)
    return ""


def undocumented_fields(value):
    """The fields of a dataclass or NamedTuple without a string below them."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(value)).body)
    return [
        field.target.id
        for field, below in zip(body, [*body[1:], None], strict=True)
        if isinstance(field, ast.AnnAssign)
        and not field.target.id.startswith("_")
        and not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant))
    ]


def public_objects():
    """Every public object once, under its longest path, with its docstring."""
    found = {}
    for path in sorted(PUBLIC_MODULES):
        module = importlib.import_module(path)
        for name in module.__all__:
            value = getattr(module, name)
            key = (name, id(value)) if callable(value) else (path, name)
            found[key] = (path, name, value, documentation(module, name))
    return [
        pytest.param(*of_one, id=f"{of_one[0]}.{of_one[1]}")
        for of_one in sorted(found.values(), key=lambda of_one: of_one[:2])
    ]


OBJECTS = public_objects()


def missing(path, name, value, text):
    """The parts that a docstring should have and does not."""
    prose = re.sub(r"^>>> .*(\n.+)*", "", text, flags=re.MULTILINE)
    absent = []
    if ">>> " not in text:
        absent.append("an example")
    if not re.match(r"\S.{8,}\S", text):
        absent.append("a first line")
    is_function = inspect.isfunction(value)
    takes, returns = [], None
    if dataclasses.is_dataclass(value) or hasattr(value, "_fields"):
        absent += [f"a string below {field}" for field in undocumented_fields(value)]
    elif is_function or (inspect.isclass(value) and "__init__" in vars(value)):
        signature = inspect.signature(value)
        takes = [p for p in signature.parameters if not p.startswith("_")]
        returns = signature.return_annotation
    words = set(re.findall(r"\w+", prose))
    # The arguments of the rules are the letters of the notes, explained once, in their module.
    if path != "nnce.rules":
        absent += [f"argument {p}" for p in takes if p not in words]
        if is_function and returns is not None and "Returns:" not in prose:
            absent.append("Returns:")
        if is_function and name not in RAISE_NOTHING and "Raises:" not in prose:
            absent.append("Raises:")
    tensors = "Tensor" in str(inspect.signature(value)) if takes else False
    if tensors and not re.search(r"\[[\w. ,²]+\]|[Ss]hape", prose):
        absent.append("shapes")
    if path in COMPUTE and is_function and not re.search(r"\S = \S|equation \d", prose):
        absent.append("a formula")
    is_module = inspect.isclass(value) and issubclass(value, torch.nn.Module)
    if path in COMPUTE and is_module and not re.search(r"[Ee]quations? \d|Source:", prose):
        absent.append("equation or Source:")
    return absent


@pytest.mark.parametrize(("path", "name", "value", "text"), OBJECTS)
def test_docstring_is_complete(path, name, value, text):
    assert missing(path, name, value, text) == []


@pytest.mark.parametrize(("path", "name", "value", "text"), OBJECTS)
def test_example_runs(path, name, value, text):
    torch.manual_seed(0)
    names = {"nnce": nnce, "torch": torch, "tempfile": tempfile}
    examples = doctest.DocTestParser().get_doctest(text, names, f"{path}.{name}", None, None)
    options = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    report = []
    doctest.DocTestRunner(optionflags=options).run(examples, out=report.append)
    assert examples.examples and not report, "".join(report)


def test_an_incomplete_docstring_is_seen():
    def product(z: torch.Tensor, factor: float) -> torch.Tensor:
        """Multiply."""

    absent = missing("nnce.functional", "product", product, inspect.getdoc(product))
    assert absent == [
        *("an example", "a first line", "argument z", "argument factor", "Returns:", "Raises:"),
        *("shapes", "a formula"),
    ]


def test_every_public_module_is_named_on_the_front_page():
    """.ci/docs makes a page for each: of these, and of the reports of nnce's functions."""
    named = re.findall(r"`(nnce\.\w+)`", nnce.__doc__)
    assert sorted(named) == sorted([*PUBLIC_MODULES[1:], "nnce.checks", "nnce.monitoring"])
