"""A study on a Ray cluster of two nodes of this machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, untrained_teacher, write_study
from filelock import FileLock, Timeout

from mdistiller_ext.study.launch import state
from mdistiller_ext.study.plan import read_study

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed")
ours = pytest.importorskip("mdistiller_ext.study.cluster")

HANGS = 600  # seconds
# Stands in for wandb, which every run tells of its epochs: a run waits after its third one.
WAITS = """
import sys
import time
from pathlib import Path

def init(**settings):
    return sys.modules[__name__]

def log(epoch, step):
    while step == 3 and Path("hold").exists():
        time.sleep(0.05)

def finish(exit_code):
    pass
"""


@pytest.fixture
def cluster(workdir, monkeypatch):
    """A node of one core, whose runs find that module."""
    (workdir / "wandb.py").write_text(WAITS)
    (workdir / "hold").touch()
    path = [str(workdir), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    handler = signal.getsignal(signal.SIGTERM)  # Ray puts its own in place
    nodes = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield nodes
    nodes.shutdown()
    signal.signal(signal.SIGTERM, handler)


def two_seeds(options):
    """Of the student alone, which is done before it would wait, and of DKD."""
    settings = {"SOLVER.EPOCHS": 5, "DISTILLER.TEACHER_TABLE": "off", "LOG.WANDB": True}
    write_study(Path("two.yaml"), "vanilla", "dkd", **settings)
    tree = yaml.safe_load(Path("two.yaml").read_text())
    short = {"cfg": "vanilla.yaml", "options": {"SOLVER.EPOCHS": 2}}
    tree["arms"] = {"vanilla": short, "dkd": tree["arms"]["dkd"]}  # in the order of their start
    Path("two.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return read_study(Path("two.yaml"), Path("output", "studies"), options)


def run(address, *options):
    command = [sys.executable, ROOT / "tools" / "compare.py", "run", "two.yaml", *options]
    command += ["--launcher", "ray", "--address", address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until(condition, process):
    end = time.monotonic() + HANGS
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.1)


def is_free(job):
    """No process works in its folder."""
    try:
        with FileLock(job.folder / "lock", timeout=0):
            return True
    except Timeout:
        return False


@pytest.mark.slow
def test_a_node_that_dies_costs_its_unfinished_runs_only(cluster, workdir):
    second = cluster.add_node(num_cpus=1)
    teacher = ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
    jobs = sorted(two_seeds(teacher).jobs, key=lambda job: job.arm == "dkd")
    process = run(cluster.address, *teacher)
    at_three = [("finished", 2), ("finished", 2), ("running", 3), ("running", 3)]
    wait_until(lambda: [state(job) for job in jobs] == at_three, process)
    before = [(job.folder / "record.json").read_bytes() for job in jobs[:2]]
    cluster.remove_node(second, allow_graceful=False)
    wait_until(lambda: any(is_free(job) for job in jobs[2:]), process)
    Path("hold").unlink()
    output, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 0, output
    assert "all runs are finished" in output
    assert [state(job) for job in jobs] == [("finished", 2)] * 2 + [("finished", 5)] * 2
    # A finished run is left alone, and of the others that of the node goes on elsewhere.
    assert before == [(job.folder / "record.json").read_bytes() for job in jobs[:2]]
    logs = [(job.folder / "log.txt").read_text() for job in jobs]
    assert sum("going on after epoch 3\n" in log for log in logs) == 1


def test_records_come_home_from_a_node_with_a_disk_of_its_own(workdir, monkeypatch):
    teacher = ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
    job = two_seeds(teacher).jobs[0]
    job.cfg.defrost()
    job.cfg.SOLVER.EPOCHS, job.cfg.LOG.WANDB = 1, False
    files = ours.on_node([job], "cpu", str(workdir / "elsewhere"))
    monkeypatch.chdir(workdir)
    assert state(job) == ("new", 0)
    ours.bring_home(files)
    assert state(job) == ("finished", 1)
    assert "epoch   1/1" in (job.folder / "log.txt").read_text()


def test_no_cluster(workdir):
    two_seeds([])
    process = run("127.0.0.1:1")
    assert "no Ray cluster" in process.communicate(timeout=HANGS)[0] and process.returncode == 1
