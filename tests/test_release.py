"""What a release consists of: one version everywhere, and the page of a package index."""

import importlib.util
import re

import pytest
from conftest import ROOT

import nnce

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
HERE = "https://example.org/nnce"


@pytest.fixture(scope="module")
def metadata():
    pytest.importorskip("hatchling", reason="hatchling builds the distributions: see .ci/package")
    spec = importlib.util.spec_from_file_location("metadata", ROOT / ".ci" / "metadata.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (version, date), *_ = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", CHANGELOG, re.MULTILINE
    )
    assert version == nnce.__version__
    assert f"\nversion: {version}\n" in citation and f"\ndate-released: {date}\n" in citation


def test_the_changelog_has_every_kind_of_change_by_its_name():
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", CHANGELOG, re.MULTILINE)) <= kinds


def test_the_public_modules_are_named_in_the_changelog():
    (public,) = re.findall(r"^\*\*Public\*\* are .*$", CHANGELOG, re.MULTILINE)
    named = set(re.findall(r"`(nnce\.\w+)`", public)) - {"nnce.experiments"}
    assert named == set(re.findall(r"`(nnce\.\w+)`", nnce.__doc__)) - {
        *("nnce.checks", "nnce.monitoring"),
    }


def relative(page):
    """The relative links and pictures of a page, outside its code."""
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    return [t for t in re.findall(r"\]\(([^)\s]+)\)", prose) if not t.startswith(("http", "#"))]


def test_without_an_address_the_index_has_no_relative_links(metadata):
    page = metadata.page(README, "", "1.2.3")
    assert relative(README) and not relative(page)
    assert "![" not in page and "badge" not in page and not metadata.urls("")
    assert re.findall(r"```python.*?```", page, re.DOTALL) == re.findall(
        r"```python.*?```", README, re.DOTALL
    )


def test_with_an_address_links_are_absolute_at_the_versions_tag(metadata):
    page = metadata.page(README, HERE, "1.2.3")
    assert not relative(page) and f"]({HERE}/blob/v1.2.3/LICENSE)" in page
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert f"]({HERE}/raw/v1.2.3/{picture})" in page
    assert page.startswith(f"[![Tests]({HERE}/actions/workflows/ci.yml/badge.svg)]")
    assert metadata.urls(HERE)["Issues"] == f"{HERE}/issues"


def test_code_in_a_page_is_left_alone(metadata):
    page = "[a](b.md) `c` [`d`](e.md)\n```python\nx[0](y)\n```\n![p](q.png)\n[w](https://w)\n"
    assert metadata.page(page, "", "1") == "a `c` `d`\n```python\nx[0](y)\n```\n\n[w](https://w)\n"
