"""The documents: what they link to is there, and the README begins with its commands."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "results").glob("*.md")]


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_what_a_document_links_to_is_there(file):
    prose = re.sub(r"```.*?```", "", file.read_text(), flags=re.S)
    links = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", prose)
    assert [link for link in links if not (file.parent / link).exists()] == []


def test_the_readme_lists_every_document_and_is_read_in_a_minute():
    text = (ROOT / "README.md").read_text()
    listed = set(re.findall(r"\]\(docs/(\w+\.md)\)", text))
    assert listed == {file.name for file in (ROOT / "docs").glob("*.md")}
    assert len(text.splitlines()) <= 133
    first = text.splitlines()[:45]
    assert sum(line.startswith("pip install -e") for line in first) == 2  # .ci/run runs them
    assert sum(line.startswith("![") for line in first) == 1


def test_every_study_is_described():
    text = (ROOT / "docs" / "studies.md").read_text()
    assert [file.name for file in (ROOT / "studies").iterdir() if file.name not in text] == []


def test_the_tests_that_reliability_names_are_there():
    named = re.findall(r"`(test_\w+)", (ROOT / "docs" / "reliability.md").read_text())
    files = list((ROOT / "tests").glob("*.py"))
    there = "\n".join([*(f"def {file.stem}" for file in files), *map(Path.read_text, files)])
    assert [name for name in named if f"def {name}" not in there] == []
