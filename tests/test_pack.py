"""Studies that travel: packed, taken on elsewhere, brought home."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from conftest import CPU, signal_at, untrained_teacher
from filelock import FileLock
from test_study import stub_runs, study  # noqa: F401

from mdistiller_ext import files
from mdistiller_ext.engine import train
from mdistiller_ext.engine.record import read_record
from mdistiller_ext.errors import ConfigError, RunError
from mdistiller_ext.study.launch import processes, run_jobs
from mdistiller_ext.study.pack import pack, unpack

OUT = Path("out/stub")


@pytest.fixture
def under_way(study, workdir):  # noqa: F811
    """A study of two runs of two epochs: one finished, one stopped in its second epoch."""
    words = ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir)), "SOLVER.EPOCHS", "2"]
    arms = {"DKD": {"cfg": "dkd.yaml"}, "student alone": {"cfg": "vanilla.yaml"}}
    jobs = study(*words, arms=arms, seeds=[0], claims={}).jobs
    train(jobs[0].cfg, jobs[0].name, CPU)
    with signal_at(2, 3):
        train(jobs[1].cfg, jobs[1].name, CPU)
    return jobs


def test_a_packed_study_goes_on_elsewhere_and_comes_home(under_way, tool):
    done, stopped = under_way
    before = (done.folder / "record.json").read_bytes()
    status, output, _ = tool("pack", "pack", str(OUT), "p.tar.xz", "--unfinished")
    assert status == 0 and "p.tar.xz: 1 finished run, 1 unfinished," in output
    shutil.move("out", "there")
    status, output, _ = tool("pack", "unpack", "p.tar.xz", str(OUT))
    assert status == 0 and "2 runs taken from p.tar.xz, 0 left as they were" in output
    assert {file.name for file in done.folder.iterdir()} == {"record.json"}
    assert run_jobs(under_way, partial(processes, device=CPU, count=1)) == {}
    assert (done.folder / "record.json").read_bytes() == before
    log = (stopped.folder / "log.txt").read_text()
    assert "going on after epoch 1 and step 3 of 9 of the next" in log
    # Home again: the study that sent them has the one that was finished meanwhile.
    pack(OUT, Path("q.tar.xz"))
    finished = (stopped.folder / "record.json").read_bytes()
    shutil.rmtree("out")
    shutil.move("there", "out")
    assert "1 run taken from q.tar.xz, 1 left as they were" in unpack(Path("q.tar.xz"), OUT)
    assert (stopped.folder / "record.json").read_bytes() == finished
    assert {file.name for file in stopped.folder.iterdir()} == {"record.json", "log.txt"}
    assert (done.folder / "student_last").exists() and not list(OUT.glob(".*"))
    assert "0 runs taken from q.tar.xz, 2 left as they were" in unpack(Path("q.tar.xz"), OUT)


def test_what_is_written_is_read_whatever_its_size(under_way, monkeypatch):
    """What is downloaded has a limit, here of 1,000 bytes; a user's own files have none."""
    monkeypatch.setattr(files, "LIMIT", 1000)
    done, stopped = under_way
    pack(OUT, Path("p.tar.xz"), unfinished=True)
    shutil.rmtree("out")
    assert "2 runs taken" in unpack(Path("p.tar.xz"), OUT)
    record, _ = train(stopped.cfg, stopped.name, CPU, resume=True)
    assert record["status"] == "finished" and read_record(done.folder / "record.json")


def test_what_is_further_here_is_not_replaced(under_way):
    _, stopped = under_way
    pack(OUT, Path("p.tar.xz"), unfinished=True)
    train(stopped.cfg, stopped.name, CPU, resume=True)
    unpack(Path("p.tar.xz"), OUT)
    record = json.loads((stopped.folder / "record.json").read_text())
    assert record["status"] == "finished" and (stopped.folder / "student_last").exists()


def test_a_run_in_use_is_not_replaced(study):  # noqa: F811
    built = study(seeds=[0])
    stub_runs(built)
    pack(OUT, Path("p.tar.xz"))
    folder = built.jobs[0].folder
    (folder / "record.json").unlink()
    with FileLock(folder / "lock"), pytest.raises(RunError, match="seed0 is in use by another pro"):
        unpack(Path("p.tar.xz"), OUT)
    assert not (folder / "record.json").exists()


def test_nothing_is_overwritten_unasked_and_nothing_is_not_packed(study, tool):  # noqa: F811
    built = study(seeds=[0])
    with pytest.raises(RunError, match="out/stub: no finished runs of a study in runs/"):
        pack(OUT, Path("p.tar.xz"))
    stub_runs(built)
    Path("precious.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"precious.txt: is there already: .* --overwrite"):
        pack(OUT, Path("precious.txt"))
    assert Path("precious.txt").read_text() == "precious"
    pack(OUT, Path("precious.txt"), overwrite=True)
    assert "4 runs taken" in unpack(Path("precious.txt"), Path("elsewhere"))
    status, _, error = tool("pack", "unpack", "precious.txt", "elsewhere", "--overwrite")
    assert status == 2 and "--overwrite: has no effect with unpack" in error
