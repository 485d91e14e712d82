"""What is published is what the runs in `results/` give."""

import re
from pathlib import Path

import pytest
from conftest import ROOT
from test_report import section, write  # noqa: F401

from mdistiller_ext.study.pack import unpack
from mdistiller_ext.study.plan import read_study

PUBLISHED = ROOT / "results" / "paper_table1_cpu"
FIGURE = re.compile(r"[+-]?\d+\.\d+")


def words(report, heading):
    return [word for word in section(report, heading).split() if word.strip("|:-")]


def test_the_published_report_is_that_of_the_published_runs(workdir, write):  # noqa: F811
    study = read_study(ROOT / "studies" / "paper_table1_cpu.yaml", Path("studies"), [])
    unpack(PUBLISHED / "records.tar.xz", study.folder)
    _, folder = write(study, "device_name")
    written, published = ((at / "report.md").read_text() for at in (folder, PUBLISHED))
    for heading in ("Accuracy", "Claims", "Differences to DKD", "What each arm set"):
        assert words(written, heading) == words(published, heading)
    verdicts = [section(text, "Verdicts").split("\n- ") for text in (written, published)]
    assert verdicts[0][:5] == verdicts[1][:5]  # what git tells comes after these


@pytest.mark.parametrize(
    ("file", "heading"), [("README.md", "Do the claims hold?"), ("docs/upstream.md", "Numbers")]
)
def test_each_figure_of_a_document_is_in_the_report(file, heading):
    report = FIGURE.findall((PUBLISHED / "report.md").read_text())
    figures = FIGURE.findall(section((ROOT / file).read_text(), heading))
    assert len(figures) > 20
    assert set(figures) <= set(report)
