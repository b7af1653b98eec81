"""The generated pages are those of the JSON next to them."""

import json
import shutil

import pytest
from conftest import ROOT

from nnce.experiments import pages
from nnce.experiments.published import TABLES

RUNS = ROOT / "runs"


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(RUNS / "reproduced", tmp_path / "reproduced")
    return tmp_path


def test_the_page_of_published_tables_is_generated(script, copy):
    (copy / "reproduced" / "README.md").unlink()
    command = script("reproduce")
    command.RUNS = copy
    assert command.main(["--page"]) == 0
    page = (copy / "reproduced" / "README.md").read_text(encoding="utf-8")
    assert page == (RUNS / "reproduced" / "README.md").read_text(encoding="utf-8")


def test_it_has_every_row_and_candidate():
    page = (RUNS / "reproduced" / "README.md").read_text(encoding="utf-8")
    for name, table in TABLES.items():
        found = json.loads((RUNS / "reproduced" / f"{name}.json").read_text(encoding="utf-8"))
        assert [row["row"] for row in found["rows"]] == [row.name for row in table.rows]
        for row in found["rows"]:
            assert f"| {row['row']} " in page and row["test, last epoch"] in page
    for path in (RUNS / "reproduced").glob("*-candidates.json"):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            assert f"| {row['row']} " in page and row["validation, chosen epoch"] in page


def test_another_figure_is_another_page(copy):
    path = copy / "reproduced" / "simard-candidates.json"
    path.write_text(path.read_text(encoding="utf-8").replace("1.41 ± 0.04", "1.99 ± 0.04"))
    pages.write_reproduced(copy)
    page = (copy / "reproduced" / "README.md").read_text(encoding="utf-8")
    assert page.count("1.99 ± 0.04") == 2  # the choice and the list of all candidates


ROW = {"work": "[8]", "outcome": "right", "note": "", "seconds": 0.5, "peak_bytes": 2e6}
FOUND = {
    "date": "2030-01-02",
    "machine": "8 × Some processor (AVX2)",
    "versions": {"torch": "9.9"},
    "config": {"repetitions": 7},
    "answer": "Fastest peer: it.",
    "rows": [
        {**ROW, "peer": "nnce", "ratio": 1.0, "ratio_least": 1.0, "ratio_most": 1.0, "ulps": 2.5},
        {**ROW, "peer": "it", "ratio": 3.14, "ratio_least": 3.0, "ratio_most": 4.0},
        {**ROW, "peer": "other", "outcome": "not installed", "ratio": None},
        {**ROW, "peer": "limit", "outcome": "estimate", "ratio": 0.5, "ratio_least": None},
        {**ROW, "work": "[9]", "networks": 4, "peer": "nnce", "peak_bytes": None, "ulps": None},
    ],
}


def test_a_page_of_benchmarks(script, tmp_path):
    command = script("benchmark")
    (tmp_path / "benchmarks").mkdir()
    for name in command.BENCHMARKS:
        (tmp_path / "benchmarks" / f"{name}.json").write_text(json.dumps(FOUND))
    command.RUNS = tmp_path
    assert command.main(["--page"]) == 0
    page = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert page.count("## Benchmark of ") == len(command.BENCHMARKS)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert ["work", "**nnce**, s", "it", "limit", "peak, MB", "error, units"] in lines
    assert ["[8]", "0.5", "3.14 (3.00–4.00)", "0.50", "2", "2.5"] in lines
    assert ["[9], 4 networks", "0.5", "", "", "", ""] in lines
    assert page.count("Not measured: other (not installed).") == len(command.BENCHMARKS)
    assert "2030-01-02, 8 × Some processor (AVX2), torch 9.9, 7 turns" in page
