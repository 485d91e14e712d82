"""One run by several processes: the run of one process, to rounding."""

import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import CPU, ROOT, TIMES, signal_at, untrained_teacher, weights

from mdistiller_ext.config import load_cfg
from mdistiller_ext.engine import World, run, train
from mdistiller_ext.engine.loop import Meter
from mdistiller_ext.engine.replicas import SyncedBatchNorm2d
from mdistiller_ext.errors import ConfigError

CONFIG = ROOT / "configs" / "digits" / "dkd_eat_dat_lp.yaml"
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# A run whose batch norms are apart, and one that the first process is told to stop in its first
# epoch, and that goes on. The words are those of tools/train.py.
OTHERS = """
import os, signal, sys
from mdistiller_ext.config import load_cfg
from mdistiller_ext.engine import World, pick_device, train
from mdistiller_ext.engine.loop import Meter
from mdistiller_ext.errors import Stopped

config, *options = sys.argv[1:]
device, count = pick_device("cpu"), Meter.count
world = World.join(device)

def run(name, synced, resume=False):
    cfg = load_cfg(config, [*options, "SOLVER.SYNC_BN", synced])
    return train(cfg, name, device, world=world, resume=resume)

def counted(self, images):
    if world.first and (self.epoch, self.step) == (1, 4):
        os.kill(os.getpid(), signal.SIGTERM)
    count(self, images)

run("apart", "False")
Meter.count = counted
try:
    run("parts", "True")
except Stopped:
    Meter.count = count
    run("parts", "True", resume=True)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The epochs and the weights of a run by one process and of three by two, and what one said.

    At a small learning rate: rounding grows with each step, as in any two runs.
    """
    home = tmp_path_factory.mktemp("replicas")
    options = ["SOLVER.EPOCHS", "2", "SOLVER.LR", "0.0001"]
    options += ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(home))]
    folder = home / "output" / "digits"
    train(load_cfg(CONFIG, [*options, "LOG.PREFIX", str(home / "output")]), "one", CPU)
    (home / "others.py").write_text(OTHERS)

    def call(*command):
        result = subprocess.run(command, cwd=home, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    words = ["--device", "cpu", "--cfg", str(CONFIG), *options, "EXPERIMENT.NAME", "two"]
    said = call(*TWO, str(ROOT / "tools" / "train.py"), *words, "SOLVER.SYNC_BN", "True")
    others = call(*TWO, "others.py", str(CONFIG), *options)
    assert others.count("parts: going on after epoch 1") == 2
    epochs = {
        name: json.loads((folder / name / "record.json").read_text())["epochs"]
        for name in ("one", "two", "apart", "parts")
    }
    return epochs, {name: weights(folder / name) for name in epochs}, said


def test_two_processes_train_as_one_does(runs):
    """With DAT's ranking, the last smaller batch, and batch norm over the whole batch."""
    epochs, states, said = runs
    assert said.count("epoch   2/2") == 1 and "processes: 2" in said
    for before, after in zip(epochs["one"], epochs["two"], strict=True):
        for key in ("loss", "loss_ce", "loss_kd", "train_top1", "test_nll"):
            assert after[key] == pytest.approx(before[key], rel=5e-6), key
        for key in ("lr", "temperature", "pruned_ratio", "dat_raised", "dat_lowered"):
            assert after[key] == before[key]
    assert epochs["two"][0]["dat_raised"] > 0
    assert states["one"].keys() == states["two"].keys()
    for key, value in states["one"].items():
        torch.testing.assert_close(states["two"][key], value, rtol=1e-3, atol=1e-5)


def test_without_synchronised_batch_norm_it_is_another_run(runs):
    synced, apart = (runs[0][name][0]["loss"] for name in ("two", "apart"))
    assert synced != pytest.approx(apart, rel=1e-4)


def test_two_processes_stop_together_and_go_on(runs):
    """To the same bits: a sum of two terms has no order."""
    epochs, states, _ = runs
    for before, after in zip(epochs["two"], epochs["parts"], strict=True):
        assert {k: v for k, v in after.items() if k not in TIMES} == {
            k: v for k, v in before.items() if k not in TIMES
        }
    assert all(torch.equal(value, states["parts"][key]) for key, value in states["two"].items())


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
