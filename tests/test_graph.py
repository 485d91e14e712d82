"""The step that a GPU captures, run as it is on a CPU: the same numbers as the plain loop."""

from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain

import pytest
import torch
from conftest import CPU, reads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdistiller_ext import cifar_model_dict, distiller_dict
from mdistiller_ext.config import get_cfg
from mdistiller_ext.data import ImageSet
from mdistiller_ext.distillers import RECIPES
from mdistiller_ext.engine.build import build_optimizer
from mdistiller_ext.engine.graph import DeviceSteps, Launches
from mdistiller_ext.engine.loop import Meter, learning_rate, train_epoch
from mdistiller_ext.losses import LOSSES
from mdistiller_ext.policies import POLICIES
from mdistiller_ext.seeding import epoch_generator
from mdistiller_ext.settings import leaves

IN_RECIPES = [(r.loss, policy) for r in RECIPES.values() for policy in (*r.policies, "")]
# A loss and policies, with their settings in LOGIT.
LOGIT = {
    "KD, LS and EAT's gradient": ("KD", ["LS", "EAT"], {"EAT": {"MODE": "gradient"}}),
    "DKD, NORM and LP's lump": ("DKD", ["NORM", "LP"], {"LP": {"MODE": "lump"}}),
    "DIST and EAT": ("DIST", ["EAT"], {}),
    "WTTM, EAT, DAT and LP": ("WTTM", ["LP", "DAT", "EAT"], {}),
    "TTM, any groups and classes": (
        "TTM",
        ["DAT", "LP"],
        {"DAT": {"GROUPS": "random", "MODE": "weight"}, "LP": {"CLASSES": "random"}},
    ),
    # What no recipe has.
    **{f"{p} alone": ("KD", [p], {}) for p in POLICIES.keys() - {p for _, p in IN_RECIPES}},
    **{
        f"{loss} alone": (loss, [], {}) for loss in LOSSES.keys() - {loss for loss, _ in IN_RECIPES}
    },
}
NAMES = [*distiller_dict, *LOGIT]
# How a step is made does not depend on the method.
WITH_TABLE = [(name, True) for name in NAMES] + [("NONE", False), ("DKD_EAT_DAT_LP", False)]


def parts(name, device=CPU):
    """A method on tiny images whose schedules change every epoch, its optimizer and data."""
    method, node, own = name, {}, {}
    if name in LOGIT:
        method, (loss, policies, own) = "LOGIT", LOGIT[name]
        node = {"LOSS": loss, "POLICIES": policies}
    cfg = get_cfg()
    there = dict(leaves(cfg[method])) if method != "NONE" else {}
    changing = {"WARMUP": 3, "STEP_EPOCHS": 1, "EAT.STEP_EPOCHS": 1, "LP.STEP_EPOCHS": 1}
    node |= {key: value for key, value in changing.items() if key in there} | dict(leaves(own))
    settings = {"DISTILLER.TYPE": method, "SOLVER.EPOCHS": 4, "SOLVER.LR_DECAY_STAGES": [2]}
    settings |= {f"{method}.{key}": value for key, value in node.items()}
    cfg.merge_from_list(list(chain.from_iterable(settings.items())))
    torch.manual_seed(0)
    student, teacher = (cifar_model_dict["resnet8"][0](num_classes=10) for _ in range(2))
    distiller = distiller_dict[cfg.DISTILLER.TYPE](student, teacher, cfg).to(device)
    images = torch.randint(256, (22, 3, 8, 8), dtype=torch.uint8)
    data = ImageSet.build(images, torch.arange(22) % 10, (0.5,) * 3, (0.25,) * 3, 1, False)
    return cfg, distiller, build_optimizer(cfg.SOLVER, distiller), data.to(device)


def train(name, on_device, with_table, device=CPU, steps=2):
    cfg, distiller, optimizer, data = parts(name, device)
    meter = Meter(1, 3)
    calls, draws = [], distiller.draws(10)
    distiller.teacher.register_forward_hook(lambda *args: calls.append(1))
    if on_device:
        classes = 10 if with_table else 0
        device_steps = DeviceSteps(
            distiller, optimizer, data, 8, meter, nullcontext, classes, draws, steps
        )
    history = []
    for epoch in range(1, 5):
        lr = learning_rate(epoch, cfg.SOLVER.LR, cfg.SOLVER.LR_DECAY_STAGES, 0.1)
        index, view = data.draw(epoch_generator(0, epoch))
        answers = torch.randn(22, 10, generator=epoch_generator(1, epoch)).to(device)
        drawn = torch.rand(22, draws, generator=epoch_generator(0, epoch, 2)).to(device)
        drawn = drawn if draws else None
        meter.start(epoch)
        if on_device:
            list(device_steps.epoch(lr, index, view, answers if with_table else None, drawn))
        else:
            for group in optimizer.param_groups:
                group["lr"] = lr
            batches = data.batches(index, view, 8)
            rows = answers.split(8) if with_table else [None] * 3
            batches, now = zip(batches, rows, strict=True), distiller.schedule(epoch)
            list(train_epoch(distiller, optimizer, batches, meter, nullcontext, now, drawn))
        history.append((meter.read(), meter.images, meter.step))
    return history, distiller.state_dict(), len(calls)


@pytest.mark.parametrize(("name", "with_table"), WITH_TABLE)
def test_device_steps_are_the_plain_loop(name, with_table):
    (plain, weights, calls), (device, others, on_device) = (
        train(name, on_device, with_table, steps=1 + with_table) for on_device in (False, True)
    )
    assert plain == device and plain[0][1:] == (22, 3)
    assert all(torch.equal(value, others[key]) for key, value in weights.items())
    assert calls == on_device == (0 if with_table or name == "NONE" else 12)


class OnDevice(TorchDispatchMode):
    """Refuses what brings tensors to a device while a step goes on, as it refuses all from it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        found = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        assert {tensor.device.type for tensor in found} <= {"meta"}, operation
        return result


@pytest.mark.parametrize(("name", "with_table"), WITH_TABLE)
def test_no_step_waits_for_its_device_or_brings_anything_there(name, with_table, monkeypatch):
    """On a device without values, where whatever asks for one is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which it has not
    _, distiller, optimizer, data = parts(name, torch.device("meta"))
    shapes = 10 if with_table else 0, distiller.draws(10)
    steps = DeviceSteps(distiller, optimizer, data, 8, Meter(1, 3), nullcontext, *shapes)
    for group in optimizer.param_groups:
        group["lr"] = 0.1  # SGD without a kernel of its own would ask for the tensor's value
    distiller.train()
    with OnDevice():
        steps.alone.take(8, 2)


@pytest.mark.parametrize(
    "slip",
    [
        lambda logits: logits.sum().item(),
        lambda logits: logits.cpu(),
        lambda logits: logits[logits > 0],
        lambda logits: torch.tensor([1.0], device=logits.device),
        lambda logits: logits + torch.ones(10).to(logits.device),
    ],
)
def test_a_step_that_waits_or_brings_something_is_seen(slip):
    _, distiller, *others = parts("DKD", torch.device("meta"))
    live = distiller.value
    distiller.value = lambda pair: slip(pair.student) and live(pair)
    steps = DeviceSteps(distiller, *others, 8, Meter(1, 3), nullcontext, 10)
    with OnDevice(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        steps.alone.step(8)


def test_launches_are_of_several_steps_where_so_many_are_left():
    _, distiller, optimizer, data = parts("DKD")
    steps = DeviceSteps(distiller, optimizer, data, 4, Meter(1, 6), nullcontext, 0, steps=2)
    assert list(steps.launches()) == [(4, 2), (4, 2), (4, 1), (2, 1)]
    assert list(steps.launches(3)) == [(4, 2), (2, 1)]
    turns = steps.epoch(0.1, *data.draw(torch.Generator()), None)
    assert [steps.meter.step for _ in turns] == [2, 4, 5, 6]
    assert steps.meter.images == steps.cursor == 22


def test_a_meter_is_read_at_once():
    """Counts come back as whole numbers."""
    meter = Meter(1, 2)
    losses = {"loss_ce": torch.tensor(1.5), "loss_kd": torch.tensor(0.25)}
    monitor = {"dat_kl": torch.tensor(0.5), "dat_images": torch.tensor(3)}
    meter.update(torch.tensor([0, 1, 1]), torch.eye(3), losses, monitor)
    meter.count(3)
    with reads() as waited:
        found = meter.read()
    assert waited.count("cpu") == 1
    means = {"loss": 1.75, "loss_ce": 1.5, "loss_kd": 0.25, "train_top1": 100 * 2 / 3}
    assert found == {**means, "dat_kl": 0.5, "dat_images": 3}
    assert type(found["dat_images"]) is int


def test_a_method_that_counts_on_the_epoch_is_refused():
    _, distiller, optimizer, data = parts("DKD")
    forward = distiller.forward_train
    distiller.forward_train = lambda *, epoch, **more: forward(epoch=epoch + 1, **more)
    steps = DeviceSteps(distiller, optimizer, data, 8, Meter(1, 3), nullcontext, 0)
    with pytest.raises(TypeError):
        list(steps.epoch(0.1, *data.draw(torch.Generator()), None))


class Gpu:
    """A stand-in for torch.cuda, whose graphs run the step: what is called, in order."""

    def __init__(self, monkeypatch, empty=False):
        self.calls, self.mode, self.steps = [], "default", []
        gpu = self

        class Stream:
            def __init__(self, name):
                self.name = name

            def wait_stream(self, other):
                gpu.calls.append(f"{self} waits for {other}")

            def __repr__(self):
                return self.name

        self.own, default, made = Stream("own stream"), Stream("default stream"), []
        self.current = default

        def stream(device):
            made.append(Stream(f"stream {len(made)}") if made else self.own)  # which captures
            return made[-1]

        class CUDAGraph:
            def replay(self):
                gpu.calls.append("replay")
                for step in [] if empty else self.steps:
                    step()

        @contextmanager
        def on(stream):
            before, gpu.current = gpu.current, stream
            try:
                yield
            finally:
                gpu.current = before

        @contextmanager
        def graph(captured, stream):
            gpu.calls.append(f"capture on {stream}, mode {gpu.mode}")
            captured.steps = gpu.steps = []
            yield

        for name, value in {
            "Stream": stream,
            "current_stream": lambda device=None: self.current,
            "default_stream": lambda device: default,
            "stream": on,
            "graph": graph,
            "CUDAGraph": CUDAGraph,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def capture(monkeypatch, gpu, fail_at=None):
    """DeviceSteps that "captured" on the stand-in, and its weights before."""
    _, distiller, optimizer, data = parts("DKD_EAT_DAT_LP")
    steps = DeviceSteps(distiller, optimizer, data, 8, Meter(1, 3), nullcontext, 0, steps=2)
    before = {key: value.clone() for key, value in distiller.state_dict().items()}
    count, live = iter(range(100)), steps.alone.step

    def step(size):
        gpu.calls.append(f"step of {size} on {gpu.current}, mode {gpu.mode}")
        gpu.steps.append(partial(live, size))
        live(size)
        if next(count) == fail_at:
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(steps.alone, "step", step)
    distiller.train()
    return steps, before


def is_as_before(steps, before):
    momenta = [state["momentum_buffer"] for state in steps.optimizer.state.values()]
    now = steps.distiller.state_dict()
    return (
        all(torch.equal(value, now[key]) for key, value in before.items())
        and all(not momentum.any() for momentum in momenta)
        and steps.cursor.item() == 0
    )


def test_a_capture_tries_the_step_first_and_leaves_no_trace(monkeypatch):
    gpu = Gpu(monkeypatch)
    steps, before = capture(monkeypatch, gpu)
    steps.alone.capture(CPU)
    assert sorted(steps.alone.graphs) == [(6, 1), (8, 1), (8, 2)] and is_as_before(steps, before)
    first_capture = next(i for i, call in enumerate(gpu.calls) if call.startswith("capture"))
    tried = gpu.calls[:first_capture]
    assert tried[0] == "own stream waits for default stream"
    # Every size is tried under the mode that refuses what waits for the device, and all on the
    # stream that captures.
    for size in (6, 8):
        assert f"step of {size} on own stream, mode default" in tried
        assert f"step of {size} on own stream, mode error" in tried
    assert gpu.calls.count("capture on own stream, mode default") == 3
    assert gpu.calls.count("replay") == 3
    assert gpu.calls[-1] == "default stream waits for own stream" and gpu.mode == "default"


def test_a_capture_of_several_runs_leaves_no_trace(monkeypatch):
    """One has begun already: its momentum, its sums and its place are as they were."""
    gpu, rows = Gpu(monkeypatch), []
    for name in ("DKD", "KD"):
        _, distiller, optimizer, data = parts(name)
        rows.append(DeviceSteps(distiller, optimizer, data, 8, Meter(1, 3), nullcontext, 0))
    begun = rows[1]
    begun.meter.start(3)
    next(begun.epoch(0.1, *data.draw(torch.Generator()), None))
    launches = Launches(rows)
    before = [tensor.detach().clone() for tensor in launches._state()]
    first, last = len(Launches(rows[:1])._state()), len(before)
    live = launches.step

    def step(size):
        gpu.steps.append(partial(live, size))
        gpu.calls.append("step")
        live(size)

    monkeypatch.setattr(launches, "step", step)
    launches.capture(CPU)
    after = launches._state()
    # The first has sums and a momentum for each parameter now, as a step without a trace leaves.
    added = after[first : len(after) - (last - first)]
    assert not any(tensor.any() for tensor in added)
    assert all(map(torch.equal, [*after[:first], *after[first + len(added) :]], before))
    assert (begun.meter.epoch, begun.meter.sizes, begun.cursor.item()) == (3, [8], 8)
    assert (rows[0].meter.epoch, rows[0].meter.sizes, rows[0].cursor.item()) == (1, [], 0)
    # In each step both forward passes fork off and are joined, and then both updates.
    turn = [f"stream {n} waits for own stream" for n in (1, 2)]
    turn += [f"own stream waits for stream {n}" for n in (1, 2)]
    at = gpu.calls.index("step") + 1
    assert gpu.calls[at : at + 8] == 2 * turn
    assert gpu.calls[-1] == "default stream waits for own stream"


@pytest.mark.parametrize("step", [0, 5])
def test_a_step_that_cannot_be_captured_leaves_no_trace(monkeypatch, step):
    gpu = Gpu(monkeypatch)
    steps, before = capture(monkeypatch, gpu, fail_at=step)
    with pytest.raises(RuntimeError, match="synchronizing"):
        steps.alone.capture(CPU)
    assert steps.alone.graphs == {} and is_as_before(steps, before)
    assert not any(call.startswith("capture") for call in gpu.calls)
    assert gpu.calls[-1] == "default stream waits for own stream" and gpu.mode == "default"


def test_an_empty_graph_is_refused(monkeypatch):
    """As when the capture's stream is of another device than the step's kernels."""
    gpu = Gpu(monkeypatch, empty=True)
    steps, before = capture(monkeypatch, gpu)
    with pytest.raises(RuntimeError, match="the graph is empty"):
        steps.alone.capture(CPU)
    assert steps.alone.graphs == {} and is_as_before(steps, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", NAMES)
def test_captured_steps_are_the_eager_ones(name):
    """Over four epochs, in which every schedule moves: to rounding."""
    device = torch.device("cuda")
    (eager, weights, _), (captured, others, _) = (
        train(name, on_device, True, device) for on_device in (False, True)
    )
    for before, after in zip(eager, captured, strict=True):
        assert after[0] == pytest.approx(before[0], rel=1e-3)
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=1e-2, atol=1e-4)
