"""The wall: what may import what, and what must do without the extras."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "nnce"
# Whoever stands here may import what stands above it.
ORDER = (
    *(
        "rules",
        "losses",
        "functional",
        "positives",
        "blocks",
        "labels",
        "pairs",
        "modules",
        "memory",
        "algorithm",
        "loops",
        "products",
    ),
    *("ensemble", "checkpoint", "parallel"),
    *(f"checks.{name}" for name in ("_torch_private", "_subject", "_derivatives", "_numerical")),
    "checks._lines",
    *("checks._variations", "checks.gradients", "checks.composability", "checks.__init__"),
    *("reference", "data", "saturation", "watching"),
    *("schedules", "dropout", "training"),
    *(f"experiments.{name}" for name in ("__init__", "command_line", "estimates", "comparison")),
    *(f"experiments.proof.{name}" for name in ("__init__", "contenders", "precision", "table")),
    "experiments.figures",
    *("experiments.benchmarks.__init__", "experiments.benchmarks.checks"),
    *("experiments.tensorboard", "experiments.report", "experiments.resuming"),
    *("experiments.published", "experiments.reproduction"),
    "__init__",
)
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
OUTSIDE = [name for name in ORDER if not name.startswith("experiments")]


def imported(path):
    """The files of nnce that a file imports, and the names that it imports from the package."""
    modules, names = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {a.name for a in node.names if a.name.split(".")[0] == "nnce"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the order"
            if node.module and node.module.split(".")[0] == "nnce":
                for alias in node.names:
                    name = f"{node.module}.{alias.name}".removeprefix("nnce.")
                    if name in FILES or f"{name}.__init__" in FILES:
                        modules.add(f"nnce.{name}")
                    elif node.module != "nnce" and f"{node.module[5:]}.__init__" in FILES:
                        modules.add(f"{node.module}.__init__")
                    elif node.module == "nnce":
                        names.add(alias.name)
                    else:
                        modules.add(node.module)
    return {module.removeprefix("nnce.") for module in modules}, names


def test_the_order_names_every_file():
    assert set(ORDER) == set(FILES) and len(ORDER) == len(FILES)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_what_stands_above_it(name):
    modules, names = imported(FILES[name])
    above = ORDER[: ORDER.index(name)]
    assert modules - {"experiments", "experiments.benchmarks", "experiments.proof"} <= set(above)
    assert not names, "a name of nnce/__init__.py"


def test_the_checks_import_nothing_of_nnce():
    for name, path in FILES.items():
        if name.startswith("checks."):
            modules, names = imported(path)
            assert all(module.startswith("checks.") for module in modules) and not names


def test_an_import_from_below_is_seen(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text(
        "from nnce import training, MLP\nfrom nnce.data import load\nimport nnce.memory"
    )
    assert imported(path) == ({"training", "data", "memory"}, {"MLP"})


def required(distribution, seen):
    """The distributions that one requires, and those that they require."""
    name = re.sub(r"[-_.]+", "-", distribution).lower()
    if name in seen:
        return
    try:
        requirements = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:  # for another platform
        return
    seen.add(name)
    for requirement in requirements:
        if "extra ==" not in requirement:
            required(re.match(r"[\w.-]+", requirement)[0], seen)


ALONE = """
import importlib, os, sys, warnings

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

allowed = set(sys.argv[1].split(",")) | set(sys.stdlib_module_names) | {"nnce"}
sys.meta_path.insert(0, Wall())
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch
for module in sys.argv[2:]:
    child = os.fork()  # from a process that has imported torch, and nothing of nnce
    if child == 0:
        importlib.import_module(module)
        for name in ("numpy", "matplotlib", "scipy", "tensorboard", "sklearn", "torchvision"):
            assert name not in sys.modules, name
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, module
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process for each file is forked")
def test_torch_is_all_that_is_needed():
    """Where nothing can be imported but torch and what torch itself requires."""
    distributions = set()
    required("torch", distributions)
    assert "mpmath" in distributions and "numpy" not in distributions
    # Not packages_distributions(): in Python 3.10 it knows no package without a top_level.txt.
    allowed = {
        file.parts[0].partition(".")[0]
        for distribution in distributions
        for file in importlib.metadata.files(distribution) or ()
    }
    modules = ["nnce" if name == "__init__" else f"nnce.{name}" for name in OUTSIDE]
    modules = [module.removesuffix(".__init__") for module in modules]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, ",".join(sorted(allowed)), *modules],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_wall_holds():
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "nnce.experiments.figures", "torch"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "No module named" in done.stderr


def test_every_file_has_its_test():
    """test_X.py for nnce/X.py, test_X_script.py for scripts/X.py."""
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    names = {name.split(".")[-1] for name in FILES if not name.split(".")[-1].startswith("_")}
    assert {f"test_{name}" for name in names} <= tests
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"startup"}
    assert {f"test_{name}_script" for name in scripts} <= tests


def test_a_function_of_the_face_shadows_no_file():
    import nnce

    public = {name for name in vars(nnce) if callable(getattr(nnce, name))}
    assert not public & set(FILES)
    assert importlib.metadata.version("nnce") == nnce.__version__
