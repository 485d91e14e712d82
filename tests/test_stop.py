"""Asked to stop, a run finishes its step, saves, says how to go on, and goes on to the same end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from conftest import CPU, ROOT, assert_same_run, signal_at, write_study

from mdistiller_ext.engine import StopSignals, train, train_many
from mdistiller_ext.engine.record import read_record
from mdistiller_ext.errors import Stopped
from mdistiller_ext.study.launch import state
from mdistiller_ext.study.plan import read_study
from mdistiller_ext.teacher import TeacherTable

TRAIN = [sys.executable, str(ROOT / "tools" / "train.py"), "--device", "cpu", "--cfg"]
ENDLESS = ["SOLVER.EPOCHS", "900000"]  # so that no signal comes too late
HANGS = 600  # seconds
COMPARE = [sys.executable, str(ROOT / "tools" / "compare.py"), "run"]


def status(folder):
    return json.loads((folder / "record.json").read_text())["status"]


@pytest.mark.parametrize(
    ("step", "signum"),
    [(1, signal.SIGTERM), (5, signal.SIGINT), (9, signal.SIGUSR1), (3, signal.SIGHUP)],
)
def test_a_stopped_run_goes_on_within_its_epoch(digits_cfg, trained, step, signum):
    cfg = digits_cfg("dkd_eat_dat_lp")
    with signal_at(2, step, signum) as stopped:
        train(cfg, "parts", CPU)
    parts = Path("output/digits/parts")
    assert str(stopped.value) == (
        f"stopped by {signum.name}; {parts} keeps the state after epoch 1 and step {step} of 9 "
        f"of the next; go on with --resume"
    )
    assert status(parts) == "interrupted"
    train(cfg, "parts", CPU, resume=True)
    assert status(parts) == "finished"
    assert_same_run(trained("dkd_eat_dat_lp"), parts)


def test_stopped_again_and_again(digits_cfg, trained):
    cfg = digits_cfg("dkd_lp")
    for epoch, step in ((1, 1), (1, 2), (1, 9), (2, 4), (3, 8)):
        with signal_at(epoch, step):
            train(cfg, "parts", CPU, resume=True)
    _, parts = train(cfg, "parts", CPU, resume=True)
    assert_same_run(trained("dkd_lp"), parts)


def test_of_many_runs_the_one_that_trains_stops(digits_cfg, trained):
    """On a CPU they follow each other."""
    jobs = [(digits_cfg(name), name) for name in ("dkd_lp", "dkd_dat", "vanilla")]
    alone = [trained(name) for _, name in jobs]
    with signal_at(2, 3):
        train_many(jobs, CPU)
    folders = [Path("output/digits", name) for _, name in jobs]
    assert status(folders[0]) == "interrupted" and not folders[1].exists()
    train_many(jobs, CPU, resume=True)
    for one, other in zip(folders, alone, strict=True):
        assert_same_run(one, other)


def test_stopped_while_the_table_is_filled(digits_cfg, monkeypatch):
    """The epoch is not begun; what the table holds is kept."""
    cfg = digits_cfg("kd", "DISTILLER.TEACHER_TABLE_ROOT", "tables")
    compute, calls = TeacherTable._compute, []

    def computed(self, position):
        calls.append(len(position))
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, position)

    with (
        monkeypatch.context() as patch,
        pytest.raises(Stopped, match="r keeps no state; go on"),
    ):
        patch.setattr(TeacherTable, "_compute", computed)
        train(cfg, "r", CPU)
    assert len(calls) == 4
    assert train(cfg, "r", CPU, resume=True)[0]["status"] == "finished"


def test_a_run_goes_on_where_there_is_no_room_for_a_table(digits_cfg, monkeypatch):
    cfg = digits_cfg("dkd")
    with signal_at(2, 3):
        train(cfg, "r", CPU)
    moved = digits_cfg("dkd", "DISTILLER.TEACHER_TABLE_ROOT", "elsewhere")
    full = shutil.disk_usage("/")._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    _, folder = train(moved, "r", CPU, resume=True)
    hits = [
        "teacher_table_hits" in epoch for epoch in read_record(folder / "record.json")["epochs"]
    ]
    assert hits == [True, False, False]
    assert train(moved, "r", CPU, resume=True)[0]["status"] == "finished"


def test_a_second_signal_has_its_usual_effect():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert not isinstance(interrupt.value, Stopped)
        with pytest.raises(Stopped, match="stopped by SIGINT"):
            stop.check()


def test_a_signal_before_a_teachers_training_stops_that_too():
    with StopSignals() as outer:
        os.kill(os.getpid(), signal.SIGTERM)
        with StopSignals() as inner, pytest.raises(Stopped, match="stopped by SIGTERM"):
            inner.check()
        assert outer.signum == signal.SIGTERM
    with StopSignals() as stop:
        stop.check()


@contextmanager
def started(*command):
    """A process that would go on for days; whatever happens, it does not outlive the test."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        family = [psutil.Process(process.pid)]
        try:
            yield process, family
        finally:
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()


def test_the_command_says_how_to_go_on(workdir):
    signum = signal.SIGINT  # SIGTERM is sent to the study below
    config = str(ROOT / "configs" / "digits" / "vanilla.yaml")
    with started(*TRAIN, config, *ENDLESS, "EXPERIMENT.NAME", "r") as (process, _):
        for line in process.stdout:
            if line.startswith("epoch   2/"):
                process.send_signal(signum)
                break
        _, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 128 + signum
    (line,) = errors.splitlines()
    assert f"error: stopped by {signum.name}; output/digits/r keeps the state after epoch" in line
    assert line.endswith("; go on with --resume")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_study_takes_its_processes_with_it(workdir, signum):
    """Killed, too: no process goes on for a study that is no more."""
    write_study(Path("s.yaml"), "vanilla")
    jobs = read_study(Path("s.yaml"), Path("output", "studies"), ENDLESS).jobs
    with started(*COMPARE, "s.yaml", "--jobs", "2", *ENDLESS) as (process, family):
        while any(state(job)[1] < 2 for job in jobs):
            assert process.poll() is None
            time.sleep(0.1)
        family += family[0].children(recursive=True)
        process.send_signal(signum)
        errors = process.communicate(timeout=HANGS)[1]
        if signum == signal.SIGTERM:
            assert process.returncode == 128 + signum and "stopped by SIGTERM" in errors
        end = time.monotonic() + HANGS
        while any(state(job)[0] == "running" for job in jobs):
            assert time.monotonic() < end
            time.sleep(0.1)
    for job in jobs:
        assert state(job)[0] == "interrupted"
        assert "stopped by SIGTERM" in (job.folder / "log.txt").read_text()
