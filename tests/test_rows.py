"""Runs as rows of one program: each is the run that it would be alone."""

import gc
import os
import signal
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, TIMES, first, signal_at
from methods import ALONE, NAMES, parts
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdistiller_ext.data import digits
from mdistiller_ext.engine import train, train_many
from mdistiller_ext.engine.loop import Epoch, Meter, train_epoch
from mdistiller_ext.engine.record import read_record
from mdistiller_ext.engine.rows import Rows
from mdistiller_ext.engine.run import Run
from mdistiller_ext.errors import ConfigError, Stopped
from mdistiller_ext.models import FORMS
from mdistiller_ext.seeding import epoch_generator

BATCH, CLASSES = 8, 10
VIEWS = "detach view unsqueeze squeeze expand permute transpose t slice select unfold alias split"
VIEWS += " as_strided unbind _unsafe_view _reshape_alias empty empty_like chunk"


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def row(name, seed=0, device=CPU):
    """A run's part of a program, whose initial weights depend on the seed."""
    _, distiller, optimizer, data = parts(name, device)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in distiller.get_learnable_parameters() if device == CPU else ():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    own = {"meter": Meter(1, 3), "draws": distiller.draws(CLASSES)}
    return SimpleNamespace(distiller=distiller, optimizer=optimizer, **own), data


def planned(row, data, epoch, seed):
    """An epoch of a row: the rate of each step, the order and all that is random are its own."""
    draw, other = epoch_generator(seed, epoch), epoch_generator(seed, epoch, 1)
    index, view = data.draw(draw)
    sizes = [len(part) for part in index.split(BATCH)]
    teacher = 3 * torch.randn(len(data), CLASSES, generator=other)
    uniforms = torch.rand(len(data), row.draws, generator=other) if row.draws else None
    schedule = row.distiller.schedule(epoch)
    rates = [0.05 / (seed + 1 + step) for step in range(len(sizes))]
    return Epoch(epoch, rates, schedule, index, view, sizes, teacher, uniforms)


def train_rows(program, rows, epochs):
    program.start()
    for number, (own, epoch) in enumerate(zip(rows, epochs, strict=True)):
        own.meter.start(epoch.number)
        program.load(number, epoch)
    for size, count in program.launches():
        program.launch((size, count))
        for own in rows:
            for _ in range(count):
                own.meter.count(size)


def left(row):
    """All that a run leaves."""
    momenta = [state["momentum_buffer"] for state in row.optimizer.state_dict()["state"].values()]
    return row.distiller.state_dict(), momenta


def assert_rows_are_the_runs_alone(names, form, epochs=(1, 3)):
    rows, alone = ([row(name, n)[0] for n, name in enumerate(names)] for _ in range(2))
    data = row(names[0])[1]
    program = Rows(rows, data, BATCH, CLASSES, form, nullcontext)
    for number in epochs:
        plans = [planned(own, data, number, seed) for seed, own in enumerate(alone)]
        train_rows(program, rows, plans)
        for own, epoch in zip(alone, plans, strict=True):
            own.meter.start(number)
            train_epoch(own.distiller, own.optimizer, data, epoch, own.meter, nullcontext)
        for found, expected in zip(rows, alone, strict=True):
            assert_equal(left(found), left(expected))
            assert found.meter.read() == pytest.approx(expected.meter.read(), rel=1e-5)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", NAMES)
def test_each_method_alone_in_a_program_is_the_plain_loop(name):
    assert_rows_are_the_runs_alone([name], "none")


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ALONE])
def test_each_method_in_rows_is_the_plain_loop(name):
    """Two of one method beside another method's."""
    assert_rows_are_the_runs_alone([name, name, "DKD_LP" if name == "KD" else "KD"], "grouped")


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_stack_is_the_plain_loop(form):
    """With six runs dense64 has 3, 2 and 1 of them in a convolution."""
    names = ["NONE", "KD", "KD", "DKD_EAT_DAT_LP", "DKD_EAT_DAT_LP", "DKD_LP"]
    assert_rows_are_the_runs_alone(names, form, epochs=[2])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("count", [1, 2])
def test_frozen_weights_stay_as_they_are(count):
    rows, alone = ([row("DKD", n)[0] for n in range(count)] for _ in range(2))
    for own in (*rows, *alone):
        own.distiller.student.conv1.weight.requires_grad_(False)
    data = row("DKD")[1]
    program = Rows(rows, data, BATCH, CLASSES, "grouped", nullcontext)
    plans = [planned(own, data, 1, seed) for seed, own in enumerate(alone)]
    train_rows(program, rows, plans)
    for own, found, epoch in zip(alone, rows, plans, strict=True):
        train_epoch(own.distiller, own.optimizer, data, epoch, own.meter, nullcontext)
        assert_equal(found.distiller.state_dict(), own.distiller.state_dict())


@pytest.mark.usefixtures("double")
def test_a_program_goes_on_from_what_runs_were_before():
    """Weights, momenta and the sums of an epoch that has begun."""
    rows, alone = ([row("DKD", n)[0] for n in range(2)] for _ in range(2))
    data = row("DKD")[1]
    for seed, own in enumerate((*rows, *alone)):
        epoch = planned(own, data, 1, seed % 2)
        begun = Epoch(1, epoch.rates, epoch.schedule, epoch.index[:8], epoch.view[:8], [8])
        train_epoch(own.distiller, own.optimizer, data, begun, own.meter, nullcontext)
    program = Rows(rows, data, BATCH, CLASSES, "grouped", nullcontext)
    rest = []
    for seed, own in enumerate(alone):
        epoch = planned(own, data, 1, seed)
        keys = epoch.index[8:], epoch.view[8:], [8, 6], epoch.teacher[8:]
        rest.append(Epoch(1, epoch.rates, epoch.schedule, *keys))
        train_epoch(own.distiller, own.optimizer, data, rest[-1], own.meter, nullcontext)
    program.start(1)
    for number, epoch in enumerate(rest):
        program.load(number, epoch)
    for size, count in program.launches(1):
        program.launch((size, count))
        for own in rows:
            own.meter.count(size)
    for found, expected in zip(rows, alone, strict=True):
        assert_equal(left(found), left(expected))
        assert found.meter.read() == pytest.approx(expected.meter.read(), rel=1e-5)


@pytest.mark.usefixtures("double")
def test_what_is_not_finite_in_a_row_is_in_no_other_of_a_grouped_stack():
    def trained(broken):
        rows = [row("DKD", n)[0] for n in range(3)]
        data = row("DKD")[1]
        if broken:
            with torch.no_grad():
                rows[1].distiller.student.conv1.weight[0, 0] = torch.nan
                rows[1].distiller.student.layer2[0].conv2.weight[3] = torch.inf
        program = Rows(rows, data, BATCH, CLASSES, "grouped", nullcontext)
        train_rows(program, rows, [planned(own, data, 1, n) for n, own in enumerate(rows)])
        return [left(own) for own in rows]

    found, expected = trained(True), trained(False)
    assert found[1][0]["student.fc.weight"].isnan().all()
    for number in (0, 2):
        torch.testing.assert_close(found[number], expected[number], rtol=0, atol=0)


class Count(TorchDispatchMode):
    """Counts what a GPU would have a kernel for."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation).removeprefix("aten.").split(".")[0]
        self.operations += not operation.is_view and name not in VIEWS.split()
        return operation(*args, **(kwargs or {}))


def test_a_step_of_eight_runs_is_few_operations():
    rows = [row("DKD", n)[0] for n in range(8)]
    program = Rows(rows, row("DKD")[1], BATCH, CLASSES, "grouped", nullcontext)
    program.start()
    program.step(BATCH)
    with Count() as count:
        program.step(BATCH)
    assert count.operations / 8 <= 40


class OnDevice(TorchDispatchMode):
    """Refuses what brings tensors to a device while a step goes on, as it refuses all from it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        found = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        # A number is no tensor of the device, and none becomes one.
        host = [t for t in found if t.device.type != "meta"]
        assert all(tensor.ndim == 0 for tensor in host), operation
        assert "copy" not in str(operation) or len(host) in (0, len(found)), operation
        return result


def on_meta(names, classes=CLASSES):
    """A program on a device without values, where whatever asks for one is an error."""
    rows = [row(name, device=torch.device("meta"))[0] for name in names]
    data = row("NONE", device=torch.device("meta"))[1]
    program = Rows(rows, data, BATCH, classes, "dense64", nullcontext)
    program.start()
    return program, rows


@pytest.fixture
def no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # not on that device


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits_for_its_device_or_brings_anything_there(name, count):
    if count > 1 and name in ALONE:
        pytest.skip("alone in a program")
    program, _ = on_meta([name] * count)
    with OnDevice():
        program.launch((BATCH, 2))


@pytest.mark.usefixtures("no_autocast")
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
    program, (own,) = on_meta(["DKD"])
    live = own.distiller.value
    own.distiller.value = lambda pair: slip(pair.student) and live(pair)
    with OnDevice(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        program.step(BATCH)


def test_a_method_that_counts_on_the_epoch_is_refused():
    own, data = row("DKD")
    forward = own.distiller.forward_train
    own.distiller.forward_train = lambda *, epoch, **more: forward(epoch=epoch + 1, **more)
    program = Rows([own], data, BATCH, 0, "none", nullcontext)
    program.start()
    with pytest.raises(TypeError):
        program.step(BATCH)


def test_launches_are_of_several_steps_where_so_many_are_left():
    own, data = row("DKD")
    program = Rows([own], data, 1, 0, "none", nullcontext)
    assert list(program.launches()) == [(1, 16), *[(1, 1)] * 6]
    assert list(program.launches(7)) == [(1, 1)] * 15
    assert list(Rows([own], data, BATCH, 0, "none", nullcontext).launches()) == [(8, 1)] * 2 + [
        (6, 1)
    ]


@pytest.mark.parametrize("name", ["NONE", "DKD", "KD, LS and EAT's gradient"])
def test_no_step_outlives_itself(name):
    """What a cycle of references kept alive would be freed at any time, in a capture, too."""
    own, data = row(name)
    epoch = planned(own, data, 1, 0)
    gc.collect()
    gc.disable()
    try:
        train_epoch(own.distiller, own.optimizer, data, epoch, own.meter, nullcontext)
        own.optimizer.zero_grad()
        own.distiller.monitor = {}
        tensors = [it for it in gc.get_objects() if type(it) is torch.Tensor]
        assert not [tensor.shape for tensor in tensors if tensor.grad_fn is not None]
    finally:
        gc.enable()


@pytest.fixture
def few(monkeypatch):
    """Five steps an epoch."""
    train_set, test_set = digits.load()
    sets = first(train_set, 150), first(test_set, 60)
    monkeypatch.setattr(digits, "load", lambda: sets)


@pytest.fixture
def stacked(digits_cfg, few, double, request):
    """Builds configs of few steps; with the live teacher, as a table is in float32."""
    options = ["SOLVER.BATCH_SIZE", "32", "SOLVER.EPOCHS", "2", "DISTILLER.TEACHER_TABLE", "off"]
    options += ["SOLVER.SCHEDULE", "cosine", "SOLVER.LR_WARMUP", "0.5"]
    options += ["SOLVER.LABEL_SMOOTHING", "0.1"]
    form = getattr(request, "param", "grouped")
    return lambda method, seed, *more: digits_cfg(
        method, *options, "SOLVER.STACK", form, "SOLVER.SEED", str(seed), *more
    )


def assert_same(folder, other):
    """To float64's rounding."""
    states = [torch.load(file / "latest", weights_only=True) for file in (folder, other)]
    for after, before in zip(*([s["model"], s["optimizer"]["state"]] for s in states), strict=True):
        assert_equal(after, before)
    for after, before in zip(*(state["history"] for state in states), strict=True):
        names = before.keys() - TIMES
        assert {key: after[key] for key in names} == pytest.approx(
            {key: before[key] for key in names}, rel=1e-6
        )


@pytest.mark.parametrize("stacked", ["grouped", "dense64"], indirect=True)
def test_runs_at_once_are_the_runs_alone(stacked):
    """One goes on within its second epoch, one fails, and others take their places."""
    jobs = [
        (stacked(method, seed), f"run{seed}")
        for seed, method in enumerate(["dkd_dat", "vanilla", "kd", "kd"])
    ]
    # It learns a temperature beside the student.
    learned = ["DISTILLER.TYPE", "CTKD", "DISTILLER.TEACHER", "resnet20"]
    learned += ["DISTILLER.TEACHER_CKPT", jobs[0][0].DISTILLER.TEACHER_CKPT]
    jobs[1] = stacked("vanilla", 1, *learned), "run1"
    alone = [train(cfg, f"{name}-alone", CPU)[1] for cfg, name in jobs]
    with signal_at(2, 3):
        train(*jobs[1], CPU)
    broken = stacked("kd", 4, "KD.LOSS.KD_WEIGHT", "1e37"), "broken"
    records = train_many([*jobs[:2], broken, *jobs[2:]], CPU, resume=True, together=3)
    assert "not finite" in str(records.pop(2))
    for record, (_, name), folder in zip(records, jobs, alone, strict=True):
        assert record["status"] == "finished"
        session = record["environments"][-1]
        assert session["stack"] == record["config"]["SOLVER"]["STACK"] and session["together"] == 3
        assert_same(folder.parent / name, folder)


def test_runs_at_once_stop_together_and_go_on_alone_or_at_once(stacked):
    jobs = [(stacked("kd", seed), f"run{seed}") for seed in range(3)]
    alone = [train(cfg, f"{name}-alone", CPU)[1] for cfg, name in jobs]
    with signal_at(2, 3):
        train_many(jobs, CPU)
    for (_, name), folder in zip(jobs, alone, strict=True):
        state = torch.load(folder.parent / name / "latest", weights_only=True)
        assert state["epoch"] == 1 and 0 < len(state["meter"]["sizes"]) < 5
    train(*jobs[0], CPU, resume=True)
    train_many(jobs[1:], CPU, resume=True)
    for (_, name), folder in zip(jobs, alone, strict=True):
        assert_same(folder.parent / name, folder)


def test_runs_that_lack_only_their_last_record_train_no_more(stacked):
    jobs = [(stacked("kd", seed), f"run{seed}") for seed in range(2)]
    train_many(jobs, CPU)
    for _, name in jobs:
        Path("output/digits", name, "record.json").unlink()
    records = train_many(jobs, CPU, resume=True)
    assert [(record["status"], len(record["epochs"])) for record in records] == [
        ("finished", 2)
    ] * 2


def test_an_error_of_a_program_ends_its_runs_and_no_others(stacked, monkeypatch):
    """As full memory in a step; nothing of its runs' networks is kept with the error."""
    jobs = [(stacked("kd", seed), f"run{seed}") for seed in range(3)]
    other = stacked("vanilla", 0, "SOLVER.LR", "0.01"), "other"
    trainers = []

    def launch(self, launch):
        trainers.extend(weakref.ref(row) for row in self.rows)
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.50 GiB")

    monkeypatch.setattr(Rows, "launch", launch)
    *failed, record = train_many([*jobs, other], CPU, together=2)
    assert record["status"] == "finished"
    assert all("out of memory" in str(error) for error in failed)
    for name in ("run0", "run1"):
        assert read_record(Path("output/digits", name, "record.json"))["status"] == "failed"
    gc.collect()
    assert len(trainers) == 2 and not any(trainer() for trainer in trainers)


def test_an_epoch_that_a_program_cannot_take_is_taken_run_by_run(stacked, monkeypatch):
    """As where the loss of one of them raises; so the fault is its own."""
    jobs = [(stacked("kd", seed), f"run{seed}") for seed in range(2)]
    alone = [train(cfg, f"{name}-alone", CPU)[1] for cfg, name in jobs]

    def launch(self, launch):
        raise ValueError("a loss of one's own")

    monkeypatch.setattr(Rows, "launch", launch)
    broken = stacked("kd", 4, "KD.LOSS.KD_WEIGHT", "1e37"), "broken"
    *records, error = train_many([*jobs, broken], CPU)
    assert [record["status"] for record in records] == ["finished"] * 2
    assert "not finite" in str(error)
    for (_, name), folder in zip(jobs, alone, strict=True):
        assert_same(folder.parent / name, folder)


def test_a_signal_while_the_last_epoch_is_evaluated_stops_the_queue(stacked, monkeypatch):
    jobs = [(stacked("vanilla", seed, "SOLVER.EPOCHS", "1"), f"run{seed}") for seed in range(3)]
    evaluate = Run._evaluate

    def evaluated(self):
        if self.folder.name == "run1":
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self)

    monkeypatch.setattr(Run, "_evaluate", evaluated)
    with pytest.raises(Stopped):
        train_many(jobs, CPU, together=2)
    folder = Path("output/digits")
    assert read_record(folder / "run1" / "record.json")["status"] == "finished"
    assert not (folder / "run2" / "record.json").exists()


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("dkd", ["DISTILLER.STUDENT", "torchvision:resnet18"], "is no CIFAR ResNet"),
        (
            "vanilla",
            ["DISTILLER.TYPE", "DKD_HYPERGRADIENT", "DATASET.HOLDOUT", "0.2"],
            "takes images that are held out",
        ),
        ("kd", ["SOLVER.TYPE", "AdamW"], "SOLVER.TYPE AdamW is for the plain loop alone"),
    ],
)
def test_what_cannot_be_a_row_is_refused_or_trained_alone(digits_cfg, method, options, reason):
    options = [*options, "SOLVER.EPOCHS", "1"]
    named = digits_cfg(method, *options, "SOLVER.STACK", "grouped")
    with pytest.raises(ConfigError, match=f"SOLVER.STACK: grouped is not allowed: .*{reason}"):
        train_many([(named, "a"), (named, "b")], CPU)
