"""The notebook scripts/tour.ipynb: it runs, and the outputs in the file are those of its code."""

import json

import pytest
from conftest import ROOT, missing

PATH = ROOT / "scripts" / "tour.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def pictures(cells):
    """How many each cell has."""
    return [sum("image/png" in out.get("data", {}) for out in cell["outputs"]) for cell in cells]


def verdicts(cells):
    """What check_gradients says, line by line, up to the numbers."""
    lines = [
        line
        for cell in cells
        for output in cell["outputs"]
        for line in "".join(output.get("text", "")).splitlines()
    ]
    starts = ("wrong:", "right:", "value ", "first ", "forward mode ", "second ")
    return [line.split(" largest ")[0] for line in lines if line.startswith(starts)]


def test_the_file_is_small_and_has_its_pictures():
    assert PATH.stat().st_size <= 1_500_000
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert sum(pictures(CODE)) == 5
    assert all(output.get("name") != "stderr" for cell in CODE for output in cell["outputs"])
    found = [verdict.split()[0] for verdict in verdicts(CODE)]
    assert found == [*("wrong:", "value", "first", "forward", "second"), "right:", *found[1:5]]


@pytest.mark.recipes
@pytest.mark.slow
# The client's and the kernel's own, on their way to newer protocols and loops.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_runs_to_the_outputs_in_the_file():
    try:
        import ipykernel  # noqa: F401  tests whether it is installed
        import nbformat
        from nbclient import NotebookClient
    except ImportError as error:
        missing("recipes", f"{error}; pip install -e '.[recipes]'")
    notebook = nbformat.read(PATH, as_version=4)
    folder = {"metadata": {"path": str(PATH.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(output.get("name") != "stderr" for cell in code for output in cell["outputs"])
    assert pictures(code) == pictures(CODE)
    assert verdicts(code) == verdicts(CODE)
