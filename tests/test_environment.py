"""With which code, on what and how a run was made, and what a report makes of it."""

import shlex
import shutil
import sys
from datetime import datetime
from functools import partial

import pytest
import torch
from conftest import CPU, signal_at
from test_study import SESSION, edit, stub_runs, study  # noqa: F401

from mdistiller_ext.engine import environment as module
from mdistiller_ext.engine import train
from mdistiller_ext.engine.build import set_arithmetic
from mdistiller_ext.engine.environment import CODE, CONDITIONS, PACKAGE, changes, environment
from mdistiller_ext.errors import ConfigError
from mdistiller_ext.files import code_hash
from mdistiller_ext.study.records import check_conditions, collect
from mdistiller_ext.toolkit.methods import toolkit_hash


def test_an_environment_names_code_command_versions_and_arithmetic():
    found = environment(CPU)
    assert found["code"] == CODE and len(CODE) == 64
    assert shlex.split(found["command"]) == sys.argv
    assert datetime.fromisoformat(found["started"]).utcoffset().total_seconds() == 0
    assert found["tf32"] is False and found["threads"] >= 1 and found["cuda"] is None
    # What a run adds to it apart, every condition is there.
    assert set(CONDITIONS) - set(found) == {"toolkit", "imported", "data", "processes"}


@pytest.mark.parametrize("tf32", [False, True])
def test_the_arithmetic_of_a_gpu_is_chosen(tf32):
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    try:
        set_arithmetic(CPU, not before)
        assert cudnn.allow_tf32 == before
        set_arithmetic(torch.device("cuda"), tf32)
        assert cudnn.allow_tf32 == tf32
    finally:
        cudnn.allow_tf32 = before


def test_the_code_hash_is_of_every_file_that_trains_and_of_no_other(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(PACKAGE, copy)
    trains = partial(code_hash, copy, but=("study", "commands"))
    assert trains() == CODE
    (copy / "results.txt").write_text("untracked")
    for file in ("study/report.py", "commands/show.py"):
        (copy / file).write_text("another = 1")
    losses = copy / "losses" / "dkd.py"
    text = losses.read_text()
    losses.write_text(f"# said differently\n\n{text}\n")
    assert trains() == CODE
    losses.write_text(text + "pass")
    assert trains() != CODE
    losses.rename(copy / "other.py")
    renamed = trains()
    (copy / "other.py").rename(losses)
    assert renamed != trains()


def test_of_code_only_comments_and_blank_lines_do_not_count(tmp_path):
    def sha256(text):
        (tmp_path / "a.py").write_text(text)
        return code_hash(tmp_path)

    code = 'def f(x):\n    y = "#  1"\n    return """\n\n  # {} """, x, y\n'
    said = '# why\ndef f(x):  # what\n\n    y = "#  1"  \n    return """\n\n  # {} """, x, y\n'
    assert sha256(said) == sha256(code)
    for one, other in (("1", "2"), ("\n\n  #", "\n  #"), ("  # {}", "  # {} "), ("return", "y =")):
        assert sha256(code.replace(one, other)) != sha256(code)
    assert sha256("no python (") != sha256("no python")


def test_only_the_package_makes_a_checkout_dirty(monkeypatch, tmp_path):
    """Results beside the code do not."""
    asked = []
    monkeypatch.setattr(module, "_git", lambda *words: asked.append(words) or "")
    assert environment(CPU)["git_dirty"] is False
    assert ("status", "--porcelain", "--", str(PACKAGE)) in asked


def test_a_resumed_run_names_each_of_its_sessions(digits_cfg, monkeypatch, capsys):
    cfg = digits_cfg()
    with signal_at(2, 3):
        train(cfg, "r", CPU)
    monkeypatch.setattr(module, "CODE", "edited")
    record, _ = train(cfg, "r", CPU, resume=True)
    first, second = record["environments"]
    assert (first["first_epoch"], first["code"]) == (1, CODE)
    assert (second["first_epoch"], second["code"]) == (2, "edited")
    assert f"other conditions, so that a study leaves it out: code {CODE} -> edited" in (
        capsys.readouterr().out
    )


def test_a_run_whose_code_changed_between_its_sessions_is_left_out(study):  # noqa: F811
    built = study()
    stub_runs(built)
    sessions = [{**SESSION, "code": "a"}, {**SESSION, "code": "b", "first_epoch": 2}]
    for job in built.jobs:
        edit(job, environments=sessions[:1])
    edit(built.jobs[0], environments=sessions)
    records, left_out = collect(built)
    assert left_out == [
        f"{built.jobs[0].name}: left out: its sessions differ: code a -> b in epoch 2"
    ]
    assert len(records) == 31
    assert len(collect(built, ["code"])[0]) == 32


def test_a_loss_that_changed_between_two_seeds_is_refused(study):  # noqa: F811
    """With one commit and a checkout that was dirty before: the hash is what tells them apart."""
    built = study(seeds=[0, 1])
    stub_runs(built)
    for job in built.jobs:
        edit(job, environments=[{**SESSION, "code": "ab"[job.seed], "git_dirty": True}])
    message = r'resnet8: code differs between runs: "a" in 4 runs, .*"b" in 4 runs.*--allow code'
    with pytest.raises(ConfigError, match=message):
        check_conditions(built, collect(built)[0], [])
    check_conditions(built, collect(built)[0], ["code"])
    with pytest.raises(ConfigError, match="--allow: 'nonsense' is no condition, expected one of"):
        check_conditions(built, collect(built)[0], ["nonsense"])


def test_the_toolkits_code_is_a_condition_of_its_methods_alone(study):  # noqa: F811
    built = study(seeds=[0, 1])
    stub_runs(built)
    for job in built.jobs:
        toolkit = f"{job.seed}" if job.arm == "DKD" else None
        edit(job, environments=[{**SESSION, "toolkit": toolkit}])
    with pytest.raises(ConfigError, match=r'toolkit differs between runs: "0" in 1 run, as'):
        check_conditions(built, collect(built)[0], [])


def test_a_toolkit_whose_method_is_edited_has_another_hash(toolkit, tmp_path, monkeypatch):
    before = toolkit_hash()
    copy = tmp_path / "mdistiller"
    shutil.copytree(toolkit / "mdistiller", copy)
    assert code_hash(copy) == before
    file = copy / "distillers" / "KD.py"
    file.write_text(file.read_text() + "pass\n")
    assert code_hash(copy) != before


def test_changes_are_those_of_conditions():
    assert changes({"torch": "2", "host": "a"}, {"torch": "3", "host": "b"}) == ["torch 2 -> 3"]
