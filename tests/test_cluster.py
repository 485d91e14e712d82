"""A study on a Ray cluster of two nodes of this machine."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, untrained_teacher, write_study

from mdistiller_ext.study.launch import state
from mdistiller_ext.study.plan import read_study

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed")
ours = pytest.importorskip("mdistiller_ext.study.cluster")

OPTIONS = {"SOLVER.EPOCHS": 30, "DISTILLER.TEACHER_TABLE": "off"}
TIME = 240.0  # seconds for the whole study


@pytest.fixture
def cluster():
    handler = signal.getsignal(signal.SIGTERM)  # Ray puts its own in place
    nodes = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield nodes
    nodes.shutdown()
    signal.signal(signal.SIGTERM, handler)


def two_seeds(options):
    write_study(Path("two.yaml"), "vanilla", "dkd", **OPTIONS)
    return read_study(Path("two.yaml"), Path("output", "studies"), options)


def run(address, *options):
    command = [sys.executable, ROOT / "tools" / "compare.py", "run", "two.yaml", *options]
    command += ["--launcher", "ray", "--address", address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_node_that_dies_costs_its_unfinished_runs_only(cluster, workdir):
    second = cluster.add_node(num_cpus=1)
    teacher = ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
    study = two_seeds(teacher)
    process, end = run(cluster.address, *teacher), time.monotonic() + TIME

    while True:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        states = [state(job) for job in study.jobs]
        finished = [n for n, (status, _) in enumerate(states) if status == "finished"]
        if finished and sum(1 < epochs < 15 for _, epochs in states) == 2:
            break
        time.sleep(0.1)
    before = {n: (study.jobs[n].folder / "record.json").read_bytes() for n in finished}
    cluster.remove_node(second, allow_graceful=False)
    output, _ = process.communicate(timeout=TIME)
    assert process.returncode == 0, output
    assert "all runs are finished" in output
    gone_on = 0
    for n, job in enumerate(study.jobs):
        content = (job.folder / "record.json").read_bytes()
        assert content == before.get(n, content)  # a finished run is left alone
        record = json.loads(content)
        assert record["status"] == "finished" and len(record["epochs"]) == 30
        gone_on += "going on after epoch" in (job.folder / "log.txt").read_text()
    assert gone_on == 1


def test_records_come_home_from_a_node_with_a_disk_of_its_own(workdir, monkeypatch):
    teacher = ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
    job = two_seeds(teacher).jobs[0]
    job.cfg.defrost()
    job.cfg.SOLVER.EPOCHS = 1
    files = ours.on_node([job], "cpu", str(workdir / "elsewhere"))
    monkeypatch.chdir(workdir)
    assert state(job) == ("new", 0)
    ours.bring_home(files)
    assert state(job) == ("finished", 1)
    assert "epoch   1/1" in (job.folder / "log.txt").read_text()


def test_no_cluster(workdir):
    two_seeds([])
    process = run("127.0.0.1:1")
    assert "no Ray cluster" in process.communicate(timeout=TIME)[0] and process.returncode == 1
