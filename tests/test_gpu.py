"""Runs on a GPU: captured, together, resumed, in other arithmetic. All skip where there is none.

TEST_DEVICE=cpu rehearses what of them a CPU can do.
"""

import os
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, signal_at, untrained_teacher, weights

from mdistiller_ext.engine import train, train_many

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(
    GPU and not torch.cuda.is_available(), reason="there is no GPU (TEST_DEVICE=cpu rehearses)"
)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU at most")
METHODS = ["vanilla", "kd", "dkd", "dkd_eat", "dkd_dat", "dkd_lp", "dkd_eat_dat_lp"]
CONTROLS = [
    ("dkd_dat", "DKD_DAT.GROUPS", "random"),
    ("dkd_lp", "DKD_LP.CLASSES", "random", "DKD_LP.RATIOS", "[0.4]"),
]


@pytest.fixture
def run(digits_cfg):
    """Trains a method of configs/digits on the device; returns its record and weights."""

    def run(name, method, *options, resume=False):
        record, folder = train(digits_cfg(method, *options), name, DEVICE, resume=resume)
        return record, weights(folder)

    return run


def assert_close(found, expected, rtol=1e-2, atol=1e-3):
    """The same run, to rounding; what convolutions add up by atomics differs from run to run."""
    (record, model), (other, others) = found, expected
    for before, after in zip(other["epochs"], record["epochs"], strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=rtol)
    for key, value in others.items():
        torch.testing.assert_close(model[key], value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("table", ["auto", "off"])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_captured_and_trains_as_it_does_eagerly(run, method, table):
    """At a small learning rate, at which rounding stays small."""
    options = ["SOLVER.LR", "0.001", "SOLVER.EPOCHS", "2"]
    if method != "vanilla":
        options += ["DISTILLER.TEACHER_TABLE", table]
    captured = run("captured", method, *options)
    eager = run("eager", method, *options, "SOLVER.CUDA_GRAPH", "False")
    assert captured[0]["environments"][0]["cuda_graph"] is GPU
    assert eager[0]["environments"][0]["cuda_graph"] is False
    assert_close(captured, eager)


@pytest.mark.parametrize(
    "options",
    [
        ["SOLVER.TF32", "True"],
        ["SOLVER.AMP", "bf16"],
        ["SOLVER.AMP", "bf16", "DISTILLER.TEACHER_TABLE", "off"],
        ["SOLVER.COMPILE", "True"],
    ],
    ids=lambda options: "-".join(options),
)
def test_other_arithmetic_trains(run, options):
    plain, _ = run("plain", "dkd_eat_dat_lp")
    other, model = run("other", "dkd_eat_dat_lp", *options)
    assert other["environments"][0]["cuda_graph"] is GPU
    assert other["epochs"][-1]["loss"] == pytest.approx(plain["epochs"][-1]["loss"], rel=0.1)
    assert all(value.isfinite().all() for value in model.values())


def test_twenty_runs_together_are_the_runs_alone(run, digits_cfg):
    """Eight at a time, among them one that fails and the controls that draw."""
    options = ["SOLVER.LR", "0.001", "SOLVER.EPOCHS", "2"]
    kinds = [*((method,) for method in METHODS), *CONTROLS]
    jobs = [
        (digits_cfg(*kinds[n % len(kinds)], *options, "SOLVER.SEED", str(n)), f"run{n}")
        for n in range(19)
    ]
    broken = digits_cfg("dkd", "SOLVER.LR", "1e30"), "broken"
    records = train_many([*jobs[:5], broken, *jobs[5:]], DEVICE, together=8)
    assert "not finite" in str(records.pop(5))
    for n in (0, 3, 7, 8, 18):
        name = f"alone{n}"
        alone = run(name, *kinds[n % len(kinds)], *options, "SOLVER.SEED", str(n))
        cfg, folder = jobs[n]
        there = Path(cfg.LOG.PREFIX, cfg.EXPERIMENT.PROJECT, folder)
        assert_close((records[n], weights(there)), alone)


@pytest.mark.parametrize("form", ["grouped", "vmap", "branches"])
def test_stacked_runs_are_the_runs_alone(run, digits_cfg, form):
    """One fails: a kernel that multiplies it with zeros would spoil its neighbours."""
    options = ["SOLVER.LR", "0.001", "SOLVER.EPOCHS", "2"]
    jobs = [
        (digits_cfg(method, *options, "SOLVER.STACK", form, "SOLVER.SEED", str(n)), f"run{n}")
        for n, method in enumerate(["dkd_eat_dat_lp", "dkd_dat", "kd", "kd"])
    ]
    more = *options, "SOLVER.STACK", form, "KD.LOSS.KD_WEIGHT", "1e37"
    jobs.insert(1, (digits_cfg("kd", *more), "broken"))
    records = train_many(jobs, DEVICE, together=3)
    assert "not finite" in str(records.pop(1))
    for record, (cfg, name) in zip(records, jobs[:1] + jobs[2:], strict=True):
        there = Path(cfg.LOG.PREFIX, cfg.EXPERIMENT.PROJECT, name)
        method = cfg.DISTILLER.TYPE.lower()
        alone = run(f"{name}-alone", method, *options, "SOLVER.SEED", str(cfg.SOLVER.SEED))
        assert_close((record, weights(there)), alone)


@pytest.mark.parametrize("method", ["dkd_eat_dat_lp", "dkd_dat"])
def test_a_run_stopped_within_an_epoch_goes_on(run, digits_cfg, method):
    options = ["SOLVER.LR", "0.001"]
    whole = run("whole", method, *options)
    with signal_at(2, 4):
        run("parts", method, *options)
    assert_close(run("parts", method, *options, resume=True), whole)


def test_two_runs_share_what_a_cold_table_lacks(digits_cfg, workdir, monkeypatch):
    monkeypatch.setenv("MDISTILLER_EXT_CACHE", str(workdir / "cache"))
    options = ["SOLVER.EPOCHS", "2", "DISTILLER.TEACHER_TABLE", "on"]
    cfgs = [digits_cfg("dkd", *options, "SOLVER.SEED", seed) for seed in "01"]
    records = train_many([(cfg, f"run{n}") for n, cfg in enumerate(cfgs)], DEVICE)
    warm, _ = train(cfgs[0], "warm", DEVICE)
    assert warm["epochs"][0]["teacher_table_hits"] == 100
    first, again = records[0]["epochs"][0], warm["epochs"][0]
    assert again["loss"] == pytest.approx(first["loss"], rel=1e-3)


def tool(*words):
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_a_bench_longer_than_an_epoch():
    names = runpy.run_path(str(ROOT / "tools" / "ladder.py"))
    args = {"student": "resnet8", "teacher": "resnet8", "method": "DKD", "root": None}
    args |= {"batch": 1024, "eager": True, "steps": 1, "tf32": False}
    bench = names["Bench"](Namespace(**args), DEVICE)
    with bench.folder:
        assert bench.exact(2)(120 if GPU else 4) >= 4  # an epoch of its 50,000 images has 49


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=two_gpus)])
def test_several_processes(workdir, device):
    """On the CPU beside a GPU, and on a GPU each."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += [str(ROOT / "tools" / "train.py"), "--device", device, "--cfg"]
    words += [str(ROOT / "configs" / "digits" / "dkd_eat_dat_lp.yaml"), "SOLVER.EPOCHS", "1"]
    words += ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir)), "SOLVER.SYNC_BN", "True"]
    assert "processes: 2" in tool(*words)


@two_gpus
def test_the_second_gpu_trains(digits_cfg):
    cfg = digits_cfg("dkd")
    (first, one), (second, two) = (
        (record, weights(folder))
        for n in (0, 1)
        for record, folder in [train(cfg, f"gpu{n}", torch.device(f"cuda:{n}"))]
    )
    assert_close((second, two), (first, one), rtol=0.1, atol=0.1)
