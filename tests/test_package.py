"""Package layout: which package may import which, and what runs with torch alone."""

import ast
import graphlib
import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

PACKAGE = ROOT / "nnce"
_BASE = {"_arguments", "_memory", "_torch_private"}
_NOTES = {*_BASE, "rules", "losses", "functional", "modules", "algorithm", "saving", "kernels"}
# Imports that a file or package may have, in addition to itself. Kernels are imported on first use.
ALLOWED = {
    "_arguments": set(),
    "_memory": set(),
    "_torch_private": set(),
    "rules": set(),
    "losses": {"rules"},
    "kernels": {*_BASE, "rules", "losses"},
    "functional": {*_BASE, "rules", "losses", "kernels"},
    "modules": {*_BASE, "rules", "losses", "functional"},
    "algorithm": {*_BASE, "rules", "losses", "functional", "modules"},
    "saving": {*_BASE, "modules"},
    "engines": _NOTES,
    "labels": _NOTES,
    "checks": set(),
    "monitoring": _NOTES,
    "data": _NOTES,
    "training": {*_NOTES, "engines", "monitoring", "data"},
    "experiments": {
        *(*_NOTES, "engines", "monitoring", "data", "training", "labels", "checks", "nnce"),
    },
    "__init__": {*_NOTES, "engines", "monitoring", "labels", "checks"},
}
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Experiments need nnce[scripts]; these kernels need Numba or Triton. All are imported on first use.
NEED_A_COMPILER = {
    *("kernels._numba", "kernels.training", "kernels.losses", "kernels.triton_losses"),
}


def part(name):
    """The file or package of nnce that a module belongs to."""
    return name.split(".")[0]


OUTSIDE = [name for name in FILES if part(name) != "experiments" and name not in NEED_A_COMPILER]


def imported(path):
    """The modules of nnce that a file imports, anywhere in it, by name without "nnce."."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {a.name for a in node.names if part(a.name) == "nnce"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the direction"
            if node.module and part(node.module) == "nnce":
                for alias in node.names:
                    name = f"{node.module}.{alias.name}".removeprefix("nnce.")
                    if name in FILES or f"{name}.__init__" in FILES:
                        modules.add(f"nnce.{name}")
                    else:
                        modules.add(node.module)
    return {module.removeprefix("nnce.") for module in modules}


def test_every_part_has_its_place():
    assert {part(name) for name in FILES} == set(ALLOWED)


def test_the_architecture_fits_on_one_screen():
    entries = [path for path in PACKAGE.iterdir() if not path.name.startswith("__")]
    assert len([path for path in entries if path.suffix == ".py"]) <= 9
    assert len([path for path in entries if path.is_dir()]) <= 8


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    others = {part(module) for module in imported(FILES[name])} - {part(name)}
    assert others <= ALLOWED[part(name)]


def test_no_two_files_import_each_other():
    graph = {}
    for name, path in FILES.items():
        found = imported(path)
        graph[name] = {
            module if module in FILES else f"{module}.__init__" for module in found - {"nnce"}
        }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_an_import_from_above_is_seen(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text(
        "from nnce import training, MLP\ndef f():\n    from nnce.data import load\n"
        "import nnce._memory"
    )
    assert imported(path) == {"training", "nnce", "data", "_memory"}


PRIVATE = {
    name
    for of in (torch.Tensor, torch.nn.Module(), torch.optim.SGD([torch.zeros(1)]))
    for name in dir(of)
    if re.match("_[^_]", name)
}


def private_uses(path):
    """The uses of PyTorch's private API in a file."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    names = {node.attr for node in attributes if not isinstance(node.ctx, ast.Store)} & PRIVATE
    names -= {node.attr for node in attributes if isinstance(node.ctx, ast.Store)}  # its own
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            names |= {getattr(member, "name", None) for member in node.body} & PRIVATE
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    names |= {ast.unparse(node) for node in attributes}
    return {
        name for name in names if name in PRIVATE or re.fullmatch(r"torch[\w.]*\._[^_][\w.]*", name)
    }


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("_torch_private")])
def test_pytorchs_private_api_is_used_in_one_file(name):
    assert not private_uses(FILES[name])


def test_a_use_of_pytorchs_private_api_is_seen(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(
        "from torch._dynamo import reset\nimport torch._C\ntorch.utils._pytree.tree_map\n"
        "x._version\nself._base = self._base\n"
        "class Module:\n    def _save_to_state_dict(self): self._modules"
    )
    assert private_uses(path) == {
        *("torch._dynamo.reset", "torch._C", "torch.utils._pytree.tree_map"),
        *("torch.utils._pytree", "_version", "_save_to_state_dict", "_modules"),
    }


def test_every_exception_from_ruff_has_its_reason():
    files = [
        path for folder in ("nnce", "scripts", "tests") for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    exceptions = [line for line in lines if re.search("# noqa: [A-Z]", line)]
    assert exceptions
    assert not [line for line in exceptions if not re.search("# noqa: [A-Z0-9, ]+  \\w", line)]


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
import nnce  # whose __init__ precedes any module of it
for module in sys.argv[2:]:
    child = os.fork()
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


def test_every_part_has_its_tests():
    """tests/test_X.py for nnce/X.py, tests/X/ for nnce/X/, test_X_script.py for scripts/X.py."""
    tests = ROOT / "tests"
    parts = {part(name) for name in FILES} - {"__init__", "_torch_private"}
    for name in parts:
        if (PACKAGE / name).is_dir():
            assert list((tests / name).glob("test_*.py")), name
        else:
            assert (tests / f"test_{name.lstrip('_')}.py").exists(), name
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"startup"}
    found = {path.stem for path in (tests / "scripts").glob("test_*.py")}
    assert {f"test_{name}_script" for name in scripts} <= found


def test_a_function_of_the_face_shadows_no_file():
    import nnce

    public = {name for name in vars(nnce) if callable(getattr(nnce, name))}
    assert not public & set(FILES)
    assert importlib.metadata.version("nnce") == nnce.__version__


def test_every_library_that_is_imported_is_in_an_extra():
    """But for those that torch, Numba, scikit-learn and torchvision require themselves."""
    names = {"sklearn": "scikit-learn", "open_clip": "open_clip_torch"}
    implied = {"torch", "mpmath", "triton", "llvmlite", "numpy", "PIL", "nnce", "startup"}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    there = set(re.findall(r'"([\w-]+)', extras))
    for folder in (PACKAGE, ROOT / "scripts"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                found = [node.module] if isinstance(node, ast.ImportFrom) else []
                found = [a.name for a in node.names] if isinstance(node, ast.Import) else found
                for name in {part(one) for one in found} - implied - sys.stdlib_module_names:
                    assert names.get(name, name) in there, f"{path.name} imports {name}"
