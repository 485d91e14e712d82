"""One run by several processes: the run of one process, to rounding."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from composed import composed
from conftest import CPU, ROOT, TIMES, signal_at, untrained_teacher, weights
from torch import nn

from mdistiller_ext import distiller_dict
from mdistiller_ext.config import load_cfg
from mdistiller_ext.data import ImageSet
from mdistiller_ext.distillers import Distiller
from mdistiller_ext.engine import World, pick_device, train, trainer
from mdistiller_ext.engine.build import build_distiller, few
from mdistiller_ext.engine.loop import Meter
from mdistiller_ext.engine.record import read_record
from mdistiller_ext.engine.replicas import Replica, SyncedBatchNorm2d, compares_samples
from mdistiller_ext.errors import ConfigError, RunError
from mdistiller_ext.models import cifar_model_dict
from mdistiller_ext.teacher import Weights

TOOLKIT = ROOT / "configs" / "cifar100" / "toolkit"
CONFIG, KD = (ROOT / "configs" / "digits" / f"{n}.yaml" for n in ("dkd_eat_dat_lp", "kd"))
# What else looks at the whole batch: DAT's ranking of any divergence, the gradient's length of EAT.
LOGIT = """
DATASET: {TYPE: digits}
DISTILLER: {TYPE: LOGIT, TEACHER: resnet20, STUDENT: resnet8}
SOLVER: {SCHEDULE: cosine, CLIP_NORM: 0.5, EMA_DECAY: 0.5}
LOGIT:
  {LOSS: WTTM, POLICIES: [EAT, DAT], EAT: {MODE: gradient, STEP_EPOCHS: 1}, DAT: {RANGE: 0.5}}
EXPERIMENT: {PROJECT: digits}
"""
# In each of two processes: a run whose batch norms are apart; one that the second process is told
# to stop in its first epoch, and that goes on; two of other methods; and tools/train.py, which
# leaves the group.
RUNS = """
import os, runpy, signal, sys

tests, tool, config, *options = sys.argv[1:]
sys.path.insert(0, tests)
import conftest  # few images to test
import test_replicas

from mdistiller_ext import distiller_dict
from mdistiller_ext.config import load_cfg
from mdistiller_ext.engine import World, pick_device, train
from mdistiller_ext.engine.loop import Meter
from mdistiller_ext.engine.record import read_record
from mdistiller_ext.errors import Stopped

device, count = pick_device("cpu"), Meter.count
world = World.join(device)

def run(name, synced, *more, resume=False, file=config):
    cfg = load_cfg(file, [*options, "SOLVER.SYNC_BN", synced, *more])
    record, folder = train(cfg, name, device, world=world, resume=resume)
    assert record == read_record(folder / "record.json")

def counted(self, images):
    if world.rank == 1 and (self.epoch, self.step) == (1, 4):
        os.kill(os.getpid(), signal.SIGTERM)
    count(self, images)

run("apart", "False", "SOLVER.EPOCHS", "1")
Meter.count = counted
try:
    run("parts", "True")
except Stopped:
    Meter.count = count
    run("parts", "True", resume=True)
run("logit two", "True", file="logit.yaml")
with test_replicas.pytest.MonkeyPatch.context() as patch:
    patch.setitem(distiller_dict, "KD", test_replicas.Linked)
    run("linked two", "True", file=test_replicas.KD)
if world.first:
    print("the tool", flush=True)
sys.argv = [tool, "--device", "cpu", "--cfg", config, *options]
sys.argv += ["EXPERIMENT.NAME", "two", "SOLVER.SYNC_BN", "True"]
runpy.run_path(tool, run_name="__main__")
"""


class Linked(distiller_dict["KD"]):
    """With a batch norm of its own."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.link = nn.BatchNorm2d(3)

    def get_learnable_parameters(self):
        return [*super().get_learnable_parameters(), *self.link.parameters()]

    def forward_train(self, *, image, **kwargs):
        logits, losses = super().forward_train(image=image, **kwargs)
        hint = logits.mean(dim=1) - (self.link(image) ** 3).mean(dim=(1, 2, 3))
        return logits, {**losses, "loss_link": hint.square().mean()}


def test_two_processes_train_as_one_does_stop_together_and_go_on(workdir, monkeypatch):
    """With DAT's ranking, the last smaller batch, and batch norm over the whole batch, or apart.

    At a small learning rate: rounding grows with each step, as in any two runs.
    """
    options = ["SOLVER.EPOCHS", "2", "SOLVER.LR", "0.0001"]
    options += ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
    Path("logit.yaml").write_text(LOGIT)
    train(load_cfg(CONFIG, options), "one", CPU)
    train(load_cfg("logit.yaml", options), "logit one", CPU)
    with monkeypatch.context() as patch:
        patch.setitem(distiller_dict, "KD", Linked)
        train(load_cfg(KD, options), "linked one", CPU)
    Path("runs.py").write_text(RUNS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["runs.py", str(ROOT / "tests"), str(ROOT / "tools" / "train.py"), str(CONFIG)]
    command += options
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    output, by_tool = result.stdout.split("the tool\n")
    assert by_tool.count("epoch   2/2") == 1 and "processes: 2" in by_tool
    assert output.count("parts: going on after epoch 1") == 2
    names = ("one", "two", "logit one", "logit two", "linked one", "linked two", "apart", "parts")
    folders = {name: Path("output", "digits", name) for name in names}
    epochs = {name: read_record(f / "record.json")["epochs"] for name, f in folders.items()}
    two, apart, parts = (epochs[name] for name in ("two", "apart", "parts"))

    settings = ["lr", "temperature", "pruned_ratio", "eat_temperature", "dat_raised", "dat_lowered"]
    for alone, shared in (("one", "two"), ("logit one", "logit two"), ("linked one", "linked two")):
        for before, after in zip(epochs[alone], epochs[shared], strict=True):
            for key in ("loss", "loss_ce", "loss_kd", "train_top1", "test_nll"):
                assert after[key] == pytest.approx(before[key], rel=5e-6), key
            assert [after.get(key) for key in settings] == [before.get(key) for key in settings]
        assert epochs[shared][0].get("dat_raised", 1) > 0
        assert_close(*(weights(folders[name]) for name in (alone, shared)))
    assert_close(
        *(
            torch.load(folders[name] / "student_ema", weights_only=True)["model"]
            for name in ("logit one", "logit two")
        )
    )
    assert epochs["logit two"][0]["mean_kd_weight"] > 1

    assert two[0]["loss"] != pytest.approx(apart[0]["loss"], rel=1e-4)

    # The same bits: a sum of two terms has no order.
    assert untimed(two) == untimed(parts)
    second, third = (weights(folders[name]) for name in ("two", "parts"))
    assert all(torch.equal(value, third[key]) for key, value in second.items())


def assert_close(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-3, atol=1e-5)


def test_what_compares_samples_with_each_other_is_for_one_process():
    distiller = composed("DIST", ["LS"])
    with pytest.raises(ConfigError, match="LOGIT takes one process: DIST compares samples"):
        Replica(distiller, World(0, 2), False)


def test_a_method_that_does_so_without_saying_it_is_found_out(digits_cfg, monkeypatch):
    class Ranked(Distiller):
        TYPE = "KD"

        def __init__(self, student, teacher, cfg):
            super().__init__(student, teacher)

        def forward_train(self, *, image, context, **kwargs):
            student, teacher = self.logits(image, context)
            apart = student @ student.T - teacher @ teacher.T
            return student, {"loss_pairs": apart.square().mean()}

    monkeypatch.setitem(distiller_dict, "KD", Ranked)
    monkeypatch.setattr(World, "tell", lambda self, content: content)
    message = "KD takes one process: its loss_pairs of a batch, .* not the mean of those of its h"
    with pytest.raises(ConfigError, match=message):
        train(digits_cfg("kd"), "r", CPU, world=World(0, 2))


@pytest.mark.filterwarnings("default")  # the toolkit's, on a recent PyTorch
@pytest.mark.parametrize("method", sorted(f.stem for f in TOOLKIT.glob("*.yaml")))
def test_which_methods_of_the_toolkit_are_for_one_process(toolkit, method):
    cfg = load_cfg(TOOLKIT / f"{method}.yaml", ["DISTILLER.TEACHER", "resnet8"])
    weights = Weights(cifar_model_dict["resnet8"][0](num_classes=100).state_dict(), CONFIG, "")
    images = torch.randint(256, (200, 3, 32, 32), dtype=torch.uint8)
    data = ImageSet.build(images, torch.arange(200) % 100, (0.5,) * 3, (0.25,) * 3, 4, True)
    distiller = build_distiller(cfg, weights, data)
    assert bool(compares_samples(distiller, few(data))) == (method in ("crd", "pkt", "rkd", "sp"))


def untimed(epochs):
    return [{k: v for k, v in epoch.items() if k not in TIMES} for epoch in epochs]


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
    monkeypatch.setattr(trainer, "Replica", lambda *parts: None)
    with pytest.raises(ConfigError, match="one process stopped it within epoch 2: expected one"):
        train(cfg, "r", CPU, resume=True, world=world)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, RANK=, MASTER_ADDR=, .* RANK expected"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2, RANK=0, MASTER_ADDR=, "),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc, .* 'abc'"),
    ],
)
def test_what_torchrun_would_not_set_is_refused(monkeypatch, given, named):
    for key in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=named):
        World.join(CPU)


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_tensors_go_by_what_their_device_has(monkeypatch, device, backend):
    """Also on a machine with a GPU where training is on the CPU."""
    joined = []
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda name, timeout: joined.append(name))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    world = World.join(torch.device(device))
    assert joined == [backend] and (world.rank, world.size) == (1, 2)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    """What names no GPU, as a broadcast, means that one."""
    chosen, live = [], torch.zeros
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: live(*shape))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [pick_device("cuda"), pick_device("cuda:3")] == chosen
    assert [str(device) for device in chosen] == ["cuda:1", "cuda:3"]


def test_a_process_says_that_the_first_has_ended(monkeypatch):
    def lost(*_, **__):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:1] Connection closed by peer")

    monkeypatch.setattr(dist, "broadcast_object_list", lost)
    with pytest.raises(RunError, match=r"^process 1: the first process has ended$"):
        World(1, 2).tell(None)
