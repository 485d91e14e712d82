"""docs/own_loop.md does what it says."""

import re

import pytest
import torch
from conftest import ROOT

TEXT = (ROOT / "docs" / "own_loop.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)


def test_it_has_a_run_and_a_loop():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("code", BLOCKS, ids=["run", "own", "loop"])
def test_the_code_of_the_document_runs_as_written(workdir, code):
    (workdir / "configs").symlink_to(ROOT / "configs")
    torch.manual_seed(0)
    names: dict = {}
    exec(code, names)
    if "record" in names:
        assert names["record"]["status"] == "finished"
        assert (names["folder"] / "student_last").exists()
    else:
        student, teacher = names["student"], names["teacher"]
        images = torch.randn(500, 20)
        agree = (student(images).argmax(1) == teacher(images).argmax(1)).float().mean()
        assert agree > 0.3  # of ten classes: it has learnt from the teacher
