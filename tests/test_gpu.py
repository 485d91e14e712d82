"""Runs on a GPU: captured, together, resumed, in other arithmetic. All skip where there is none.

TEST_DEVICE=cpu rehearses what of them a CPU can do.
"""

import os
import runpy
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, signal_at, untrained_teacher, weights
from methods import NAMES, parts

from mdistiller_ext.engine import train, train_many
from mdistiller_ext.engine.loop import Epoch, Meter
from mdistiller_ext.engine.rows import Rows
from mdistiller_ext.models import FORMS
from mdistiller_ext.seeding import epoch_generator

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


@pytest.fixture(autouse=True)
def deterministic():
    """Convolutions without atomics, whose sums differ from run to run, and without trials."""
    if GPU:
        torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False


EXACT = ["SOLVER.EPOCHS", "1", "SOLVER.LR", "0.0009765625"]  # 2 ** -10, which float32 holds


def assert_close(found, expected, rtol=1e-4, atol=1e-5):
    """The same run, to rounding."""
    (record, model), (other, others) = found, expected
    for before, after in zip(other["epochs"], record["epochs"], strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=rtol)
    for key, value in others.items():
        torch.testing.assert_close(model[key], value, rtol=rtol, atol=atol)


@pytest.mark.skipif(not GPU, reason="nothing is captured")
@pytest.mark.parametrize("name", NAMES)
def test_captured_steps_have_the_bits_of_the_same_steps(name):
    """Two epochs of all methods, without and with a graph."""
    left = []
    for captured in (False, True):
        _, distiller, optimizer, data = parts(name, DEVICE)
        draws = distiller.draws(10)
        own = {"meter": Meter(1, 3), "draws": draws}
        row = SimpleNamespace(distiller=distiller, optimizer=optimizer, **own)
        program = Rows([row], data, 8, 10, "none", nullcontext)
        if captured:
            program.capture()
        for number in (1, 2):
            index, view = data.draw(epoch_generator(0, number))
            generator = epoch_generator(1, number)
            teacher = torch.randn(22, 10, generator=generator).to(DEVICE)
            uniforms = torch.rand(22, draws, generator=generator).to(DEVICE) if draws else None
            schedule = distiller.schedule(number)
            sizes = program.sizes
            row.meter.start(number)
            program.start()
            rates = [2**-5] * len(sizes)
            program.load(0, Epoch(number, rates, schedule, index, view, sizes, teacher, uniforms))
            for launch in program.launches():
                program.launch(launch)
        program.close()
        left.append(distiller.state_dict())
    for key, value in left[0].items():
        torch.testing.assert_close(left[1][key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("table", ["auto", "off"])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_captured_and_trains_as_by_the_plain_loop(run, method, table):
    options = [*EXACT, *(["DISTILLER.TEACHER_TABLE", table] if method != "vanilla" else [])]
    captured = run("captured", method, *options)
    plain = run("plain", method, *options, "SOLVER.CUDA_GRAPH", "False")
    assert captured[0]["environments"][0]["cuda_graph"] is GPU
    assert plain[0]["environments"][0]["cuda_graph"] is False
    assert_close(captured, plain)


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


@pytest.mark.parametrize("form", FORMS)
def test_runs_at_once_are_the_runs_alone(run, digits_cfg, form):
    """Eight at a time, among them one that fails and the controls that draw."""
    kinds = [*((method,) for method in METHODS), *CONTROLS]
    options = [*EXACT, "SOLVER.STACK", form]
    jobs = [
        (digits_cfg(*kinds[n % len(kinds)], *options, "SOLVER.SEED", str(n)), f"run{n}")
        for n in range(12)
    ]
    broken = digits_cfg("kd", *options, "KD.LOSS.KD_WEIGHT", "1e37"), "broken"
    records = train_many([*jobs[:5], broken, *jobs[5:]], DEVICE, together=8)
    assert "not finite" in str(records.pop(5))
    for n in (0, 3, 7, 11):
        alone = run(f"alone{n}", *kinds[n % len(kinds)], *EXACT, "SOLVER.SEED", str(n))
        cfg, folder = jobs[n]
        there = Path(cfg.LOG.PREFIX, cfg.EXPERIMENT.PROJECT, folder)
        assert_close((records[n], weights(there)), alone)


@pytest.mark.parametrize("method", ["dkd_eat_dat_lp", "dkd_dat"])
def test_a_run_stopped_within_an_epoch_goes_on(run, digits_cfg, method):
    options = [*EXACT, "SOLVER.EPOCHS", "2"]
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
        # An epoch of its 50,000 images has 49 steps.
        assert bench.exact(2, form="grouped")(120 if GPU else 4) >= 4


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
