"""One run by several processes: the run of one process, to rounding."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import CPU, ROOT, signal_at, untrained_teacher

from mdistiller_ext.engine import World, run, train
from mdistiller_ext.engine.loop import Meter
from mdistiller_ext.engine.replicas import SyncedBatchNorm2d
from mdistiller_ext.errors import ConfigError

CONFIG = ROOT / "configs" / "digits" / "dkd_eat_dat_lp.yaml"


def command(workdir, name, *options):
    options = [
        *("SOLVER.EPOCHS", "2", "SOLVER.LR", "0.0001", "EXPERIMENT.NAME", name),
        *("DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir)), *options),
    ]
    return [str(ROOT / "tools" / "train.py"), "--device", "cpu", "--cfg", str(CONFIG), *options]


def torchrun(*words, processes=2, status=0):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*start, f"--nproc_per_node={processes}", *words], capture_output=True, text=True
    )
    assert (result.returncode != 0) == bool(status), result.stderr[-2000:]
    return result.stdout + result.stderr


def record(name):
    return json.loads(Path("output", "digits", name, "record.json").read_text())


def test_two_processes_train_as_one_does(workdir):
    """With DAT's ranking, the last smaller batch, and batch norm over the whole batch.

    At a small learning rate: rounding grows with each step, as in any two runs.
    """
    subprocess.run([sys.executable, *command(workdir, "one")], check=True, capture_output=True)
    output = torchrun(*command(workdir, "two", "SOLVER.SYNC_BN", "True"))
    assert output.count("epoch   2/2") == 1 and "processes: 2" in output
    one, two = record("one"), record("two")
    for before, after in zip(one["epochs"], two["epochs"], strict=True):
        for key in ("loss", "loss_ce", "loss_kd", "train_top1", "test_nll"):
            assert after[key] == pytest.approx(before[key], rel=5e-6), key
        for key in ("lr", "temperature", "pruned_ratio", "dat_raised", "dat_lowered"):
            assert after[key] == before[key]
    assert two["epochs"][0]["dat_raised"] > 0
    first, second = (
        torch.load(f"output/digits/{name}/student_last", weights_only=True)["model"]
        for name in ("one", "two")
    )
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-3, atol=1e-5)


def test_without_synchronised_batch_norm_it_is_another_run(workdir):
    torchrun(*command(workdir, "synced", "SOLVER.SYNC_BN", "True", "SOLVER.EPOCHS", "1"))
    torchrun(*command(workdir, "apart", "SOLVER.EPOCHS", "1"))
    losses = [record(name)["epochs"][0]["loss"] for name in ("synced", "apart")]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_two_processes_resume(workdir):
    synced = ("SOLVER.SYNC_BN", "True")
    torchrun(*command(workdir, "whole", *synced, "SOLVER.EPOCHS", "4"))
    words = command(workdir, "parts", *synced, "SOLVER.EPOCHS", "4")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with subprocess.Popen(
        [*start, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("epoch   2/4"):
                process.terminate()
                break
    torchrun(*words, "--resume")
    whole, parts = record("whole"), record("parts")
    assert [e["epoch"] for e in parts["epochs"]] == [1, 2, 3, 4]
    assert whole["last_epoch_top1"] == parts["last_epoch_top1"]
    assert [e["loss"] for e in whole["epochs"]] == [e["loss"] for e in parts["epochs"]]


def test_each_image_is_in_one_process_and_batches_keep_their_order():
    keys = torch.randperm(53)
    parts = [World(rank, 3).divide([keys], 16) for rank in range(3)]
    assert [sizes for _, sizes in parts] == [[6, 6, 6, 2], [5, 5, 5, 2], [5, 5, 5, 1]]
    steps = zip(*(part.split(sizes) for (part,), sizes in parts), strict=True)
    assert torch.equal(torch.cat([torch.cat(step) for step in steps]), keys)


def test_a_batch_too_small_to_share_is_refused_by_all():
    for rank in range(3):
        message = r"BATCH_SIZE: 16 .* a batch of 2 images for 3 processes"
        with pytest.raises(ConfigError, match=message):
            World(rank, 3).divide([torch.arange(50)], 16)


def test_alone_nothing_is_divided():
    (keys,), sizes = World().divide([torch.arange(50)], 16)
    assert keys.tolist() == list(range(50)) and sizes == [16, 16, 16, 2]
    World().merge(Meter(1, 4))
    assert World().tell("x") == "x" and World().first


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_synchronised_batch_norm_keeps_its_statistics_in_float32(process_group, dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5).to(dtype)
    ours, theirs = (torch.nn.BatchNorm2d(3) for _ in range(2))
    if dtype == torch.float64:
        ours, theirs = ours.double(), theirs.double()
    ours.__class__ = SyncedBatchNorm2d
    y = ours(x)
    assert y.dtype == dtype and ours.running_mean.dtype == theirs.running_mean.dtype
    expected = theirs(x.to(theirs.weight.dtype))
    tolerance = {torch.bfloat16: 1e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(y.to(expected), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_what_one_process_stopped_within_an_epoch_is_not_for_two(digits_cfg, monkeypatch):
    cfg = digits_cfg()
    with signal_at(2, 3):
        train(cfg, "r", CPU)
    world = World(0, 2)
    monkeypatch.setattr(world, "tell", lambda content: content)
    monkeypatch.setattr(run, "Replica", lambda *parts: None)
    with pytest.raises(ConfigError, match="one process stopped it within epoch 2: expected one"):
        train(cfg, "r", CPU, resume=True, world=world)
