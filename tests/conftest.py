"""What several tests share: the real data and toolkit where they are, small configs on digits."""

import importlib
import json
import os
import runpy
import signal
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from itertools import islice, repeat
from pathlib import Path

import pytest

# The processes of pytest-xdist, and those that they start, share the cores. OpenMP reads this when
# torch is imported; threads that wait for each other on a busy core are many times slower.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import torch
import yaml
from tensorboardX.proto import event_pb2
from torch.utils._pytree import tree_leaves

from mdistiller_ext import cifar_model_dict, register
from mdistiller_ext.config import load_cfg
from mdistiller_ext.data import ImageSet, cifar100, digits
from mdistiller_ext.engine import train
from mdistiller_ext.engine.loop import Meter, train_step
from mdistiller_ext.errors import ConfigError, Stopped
from mdistiller_ext.policies import Context
from mdistiller_ext.seeding import seed_everything
from mdistiller_ext.teacher import load_into, load_weights
from mdistiller_ext.toolkit.locate import find_toolkit

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
CPU = torch.device("cpu")
# Metrics that depend on the machine, and on what its cache holds already.
TIMES = {"seconds", "images_per_s", "teacher_table_hits"}

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # pytest in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws does not depend on those before it."""
    seed_everything(0)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch) -> None:
    """Teacher tables land here, never in the user's cache."""
    monkeypatch.setenv("MDISTILLER_EXT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch) -> None:
    """No test ends the machine's power."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


read_once = cache(cifar100.load)
read_digits = digits.load


@cache
def few_to_test():
    """With 200 of the 1,258 test images, which take half of the time of a short run."""
    train, test = read_digits()
    return train, first(test, 200)


digits.load = few_to_test


@pytest.fixture
def all_digits(monkeypatch) -> None:
    """For what is compared with another process."""
    monkeypatch.setattr(digits, "load", read_digits)


@pytest.fixture
def shared(monkeypatch) -> Path:
    """The folder with the real CIFAR-100, read once in a session, and real teachers."""
    if not (SHARED / "cifar-100-binary").is_dir():
        pytest.skip("the real CIFAR-100 and its teachers are not in ../shared")
    monkeypatch.setattr(cifar100, "load", read_once)
    return SHARED


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, so that outputs and checkpoints land nowhere else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mdistiller_ext.teacher.weights.CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path


@pytest.fixture
def double(monkeypatch):
    """All in float64, so that a difference is no rounding."""
    live = ImageSet.batch

    def batch(self, index, view):
        found = live(self, index, view)
        return type(found)(found.image.double(), found.target, found.index, found.view)

    monkeypatch.setattr(ImageSet, "batch", batch)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def digits_cfg(workdir: Path):
    """Builds a config for the student alone, or for a method with an untrained teacher."""
    return partial(digits_config, workdir)


def digits_config(folder: Path, name: str = "vanilla", *options: str):
    extra = ["SOLVER.EPOCHS", "3", *options]
    if name != "vanilla":
        extra += ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(folder))]
    return load_cfg(ROOT / "configs" / "digits" / f"{name}.yaml", extra)


@pytest.fixture
def tool(workdir, monkeypatch, capfd):
    """Runs a tool in this process, which is much faster, and returns (status, stdout, stderr)."""

    def tool(name: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
        return (end.value.code, *capfd.readouterr())

    return tool


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Trains a run on digits as `digits_cfg` builds it, once in a session: its folder, to be read
    only."""
    home = tmp_path_factory.mktemp("trained")

    @cache
    def trained(*options: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(home)
            cfg = digits_config(home, *options)
            return home / train(cfg, ",".join(options), CPU)[1]

    return trained


def write_study(file: Path, *arms: str, **options: object) -> None:
    """A study of two seeds; each arm is called as its config under configs/digits is."""
    tree = {
        "name": "s",
        "students": {"resnet8": str(ROOT / "configs" / "digits")},
        "seeds": [0, 1],
        "baseline": arms[-1],
        "alone": arms[0],
        "arms": {arm: {"cfg": f"{arm}.yaml"} for arm in arms},
        "options": options,
    }
    file.write_text(yaml.safe_dump(tree))


def untrained_teacher(folder: Path) -> Path:
    """A file of random weights for the teacher of the digits configs."""
    file = folder / "teacher.pth"
    if not file.exists():
        torch.manual_seed(1)
        name = load_cfg(ROOT / "configs" / "digits" / "dkd.yaml").DISTILLER.TEACHER
        torch.save({"model": cifar_model_dict[name][0](num_classes=10).state_dict()}, file)
    return file


@pytest.fixture
def no_toolkit_imported(monkeypatch):
    """So that a test imports its own stand-in for mdistiller; what was imported comes back."""

    def imported():
        return [name for name in sys.modules if name.split(".")[0] == "mdistiller"]

    for name in imported():
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in imported():
        del sys.modules[name]


@pytest.fixture
def toolkit(monkeypatch) -> Path:
    """The folder of the real mdistiller, registered; its mends end with the test."""
    try:
        root = find_toolkit()
    except ConfigError:
        pytest.skip("mdistiller is neither installed nor named by MDISTILLER_ROOT")
    register()
    for cls in (torch.Tensor, torch.nn.Module):
        monkeypatch.setattr(cls, "cuda", cls.cuda)
    return root


def networks(shared, teacher="resnet56"):
    """A seeded ResNet-8 and a real teacher."""
    torch.manual_seed(0)
    student, net = (cifar_model_dict[name][0](num_classes=100) for name in ("resnet8", teacher))
    load_into(net, load_weights(shared / "teachers" / f"cifar100_{teacher}.pth"), teacher)
    return student, net


def first(data: ImageSet, count: int) -> ImageSet:
    """The first images of a data set."""
    return replace(data, padded=data.padded[:count], targets=data.targets[:count])


def batches(shared, count, size=64):
    """The first batches of a seeded epoch of the real CIFAR-100."""
    train, _ = cifar100.load(shared)
    return list(islice(train.epoch(size, torch.Generator().manual_seed(0)), count))


def theirs(name):
    """The toolkit's class of a method, and a copy of its config."""
    config = importlib.import_module("mdistiller.engine.cfg").CFG.clone()
    config.defrost()
    return importlib.import_module("mdistiller.distillers").distiller_dict[name], config


def train_on(batches, distiller, optimizer, meter, schedule=None, teacher=None):
    """The plain loop's steps with these batches, and the teacher's logits of each if given."""
    distiller.train()
    for batch, logits in zip(batches, teacher or repeat(None), strict=bool(teacher)):
        context = Context(schedule or {}, logits)
        train_step(distiller, optimizer, batch, meter.epoch, context, meter, nullcontext)
        meter.count(len(batch.target))


@contextmanager
def signal_at(epoch, step, signum=signal.SIGTERM):
    """Within it, a signal comes in the middle of a step, and stops what runs."""
    count, left = Meter.count, [signum]  # a second one would end the process

    def counted(self, images):
        if (self.epoch, self.step) == (epoch, step - 1) and left:
            os.kill(os.getpid(), left.pop())
        count(self, images)

    usual = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(signum, usual)  # in the background of a shell it may be ignored
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as stopped:
            patch.setattr(Meter, "count", counted)
            yield stopped
        assert stopped.value.signum == signum
        assert signal.getsignal(signum) == usual
    finally:
        signal.signal(signum, before)


# What waits for the device, if it is a GPU.
WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "__bool__")
WAITS += ("__float__", "__int__", "__index__", "__iter__")


@contextmanager
def reads():
    """The calls within it of what waits for a tensor's values, in order."""
    called = []

    def watched(name, live):
        def call(*args, **kwargs):
            called.append(name)
            return live(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in WAITS:
            patch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
        yield called


def weights(folder):
    return torch.load(folder / "student_last", weights_only=True)["model"]


def same_weights(folder, other) -> bool:
    one, two = weights(folder), weights(other)
    return one.keys() == two.keys() and all(
        torch.equal(value, two[key]) for key, value in one.items()
    )


def assert_same_run(folder, other):
    """Equal weights, average, optimizer, random states, metrics and events, whatever the clock
    said."""
    assert same_weights(folder, other)
    states = [torch.load(f / "latest", weights_only=True) for f in (folder, other)]
    for state in states:
        state["history"] = [
            {k: v for k, v in e.items() if k not in TIMES} for e in state["history"]
        ]
    assert states[0]["history"] == states[1]["history"]
    left = [tree_leaves([state["optimizer"]["state"], state["average"]]) for state in states]
    assert len(left[0]) == len(left[1]) and all(map(torch.equal, *left))
    assert torch.equal(states[0]["random"]["torch"], states[1]["random"]["torch"])
    records = [json.loads((f / "record.json").read_text()) for f in (folder, other)]
    for key in ("status", "seed", "method", "student", "last_epoch_top1", "best_epoch"):
        assert records[0][key] == records[1][key], key
    assert len(records[0]["epochs"]) == len(states[0]["history"])
    events = [scalars(f) for f in (folder, other)]
    assert events[0].keys() == events[1].keys()
    for key, value in events[0].items():
        assert value == events[1][key] or key[0] in TIMES, key


def scalars(folder) -> dict[tuple[str, int], float]:
    """(tag, step) -> value of all event files of a run; a doubled event fails."""
    found = {}
    for file in (folder / "train.events").iterdir():
        content = file.read_bytes()
        while content:  # length (8), its checksum (4), event, its checksum (4)
            length = int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
            content = content[16 + length :]
    return found
