"""Students stacked into one network: each is the run that it would be alone."""

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import CPU, TIMES, assert_same_run, first, signal_at

from mdistiller_ext.data import ImageSet, digits
from mdistiller_ext.engine import train, train_many
from mdistiller_ext.engine.build import build_distiller, build_optimizer
from mdistiller_ext.engine.loop import Meter, Step, train_step
from mdistiller_ext.engine.stacked import Stacked
from mdistiller_ext.errors import ConfigError
from mdistiller_ext.models import Stack, build_network
from mdistiller_ext.policies import Context
from mdistiller_ext.seeding import epoch_generator, seed_everything
from mdistiller_ext.teacher import load_weights

FORMS = ["grouped", "vmap"]


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


def three(name="resnet8"):
    """Networks of different weights, and images for each."""
    networks = []
    for seed in range(3):
        seed_everything(seed)
        networks.append(build_network(name, 10, 16, "cifar100", key="it"))
    return networks, torch.randn(3, 10, 3, 16, 16)


def stepped(forward, networks, images):
    """Logits and all tensors after two passes, whose gradients are subtracted."""
    target = torch.arange(10)
    for _ in range(2):
        logits = forward(images)
        for network in networks:
            network.zero_grad()
        sum(torch.nn.functional.cross_entropy(row, target) for row in logits).backward()
        if isinstance(forward, Stack):
            forward.share_gradients()
        for network in networks:
            for parameter in network.parameters():
                parameter.data -= 0.1 * parameter.grad
    return [row.detach() for row in logits], [network.state_dict() for network in networks]


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("form", "name", "layout"),
    [
        ("grouped", "resnet8", torch.contiguous_format),
        ("grouped", "resnet8", torch.channels_last),
        ("vmap", "resnet8", torch.channels_last),
        ("vmap", "torchvision:shufflenet_v2_x0_5", torch.contiguous_format),
    ],
)
def test_each_network_of_a_stack_is_trained_as_alone(form, name, layout):
    networks, images = three(name)
    for network in networks:
        network.to(memory_format=layout)
    others = copy.deepcopy(networks)

    def alone(images):
        return [net.train()(image)[0] for net, image in zip(others, images, strict=True)]

    expected = stepped(alone, others, images)
    assert_equal(stepped(Stack(networks, form), networks, images), expected)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("form", FORMS)
def test_a_network_of_a_stack_is_still_itself(form):
    """What is loaded into it the stack computes with; it can be used, and stacked anew."""
    networks, images = three()
    before = copy.deepcopy(networks)
    stack = Stack(networks, form)
    networks[1].load_state_dict(before[2].state_dict())
    assert_equal(stack(images)[1], before[2].train()(images[1])[0])
    assert_equal(networks[1].state_dict(), before[2].state_dict())
    assert_equal(networks[1].eval()(images[0])[0], before[2].eval()(images[0])[0])
    assert torch.equal(networks[0].conv1.weight, before[0].conv1.weight)
    left = Stack(networks[1:], form)
    assert_equal(left(images[1:])[1], before[2].train()(images[2])[0])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_in_one_network_is_in_no_other(form):
    networks, images = three()
    others = copy.deepcopy(networks)
    expected = stepped(Stack(others, form), others, images)
    with torch.no_grad():
        networks[1].conv1.weight[0, 0] = torch.nan
        networks[1].layer2[0].conv2.weight[3] = torch.inf
    found = stepped(Stack(networks, form), networks, images)
    assert found[0][1].isnan().all() and found[1][1]["fc.weight"].isnan().all()
    for row in (0, 2):
        assert torch.equal(found[0][row], expected[0][row])
        torch.testing.assert_close(found[1][row], expected[1][row], rtol=0, atol=0)


def test_networks_that_cannot_be_grouped_are_refused():
    networks, _ = three("torchvision:shufflenet_v2_x0_5")
    with pytest.raises(ConfigError, match="STACK: grouped is for the CIFAR ResNets"):
        Stack(networks, "grouped")


METHODS = {
    "NONE": "vanilla",
    "all": "dkd_eat_dat_lp DKD_EAT_DAT_LP.WARMUP 3",
    "learned": "logit LOGIT.LOSS KD LOGIT.POLICIES ['CTKD','EAT','LP'] LOGIT.EAT.MODE gradient",
    "drawing": "dkd_lp DKD_LP.CLASSES random DKD_LP.RATIOS [0.4]",
}


def built(cfg):
    """Gives the step of a run with its next batch of the digits."""
    data, _ = digits.load()
    teacher = cfg.DISTILLER.TEACHER_CKPT
    seed_everything(cfg.SOLVER.SEED)
    distiller = build_distiller(cfg, load_weights(Path(teacher)) if teacher else None, data)
    optimizer, meter = build_optimizer(cfg.SOLVER, distiller.train()), Meter(1, 17)
    batches = data.epoch(32, epoch_generator(cfg.SOLVER.SEED, 1))
    drawn = torch.rand(len(data), 10, generator=epoch_generator(cfg.SOLVER.SEED, 1, 2))

    def ask():
        batch = next(batches)
        meter.count(len(batch.target))
        own = drawn[batch.index] if distiller.draws(10) else None
        context = Context(distiller.schedule(1), drawn=own)
        return Step(distiller, optimizer, batch, 1, context, meter, nullcontext)

    return ask


def left(step):
    """All that a run leaves."""
    momenta = [state["momentum_buffer"] for state in step.optimizer.state.values()]
    return step.distiller.state_dict(), momenta, step.meter.read()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("form", ["grouped", pytest.param("vmap", marks=pytest.mark.slow)])
def test_each_method_of_a_stack_trains_as_alone(digits_cfg, form):
    """Methods, seeds and images differ; the runs have begun alone, and one is taken out again."""
    cfgs = [
        digits_cfg(*words.split(), "SOLVER.SEED", str(seed))
        for seed, words in enumerate(METHODS.values())
    ]
    alone, rows = ([built(cfg) for cfg in cfgs] for _ in range(2))
    for number in range(4):
        expected = [ask() for ask in alone]
        for step in expected:
            train_step(step)
        found = [ask() for ask in rows]
        apart = found if number == 0 else found[:1] if number == 3 else []
        for step in apart:
            train_step(step)
        members = found[len(apart) :]
        if number in (1, 3):
            stack = Stack([step.distiller.student for step in members], form)
        if members:
            train_step(*members, stack=stack)
    for name, row, step in zip(METHODS, found, expected, strict=True):
        for after, before in zip(left(row), left(step), strict=True):
            torch.testing.assert_close(after, before, rtol=1e-8, atol=1e-10, msg=name)


def assert_same(folder, other, form):
    """To the bit where nothing is stacked, else to float64's rounding."""
    if form == "branches":
        return assert_same_run(folder, other)
    states = [torch.load(file / "latest", weights_only=True) for file in (folder, other)]
    for after, before in zip(*([s["model"], s["optimizer"]["state"]] for s in states), strict=True):
        assert_equal(after, before)
    for after, before in zip(*(state["history"] for state in states), strict=True):
        names = before.keys() - TIMES
        assert {key: after[key] for key in names} == pytest.approx(
            {key: before[key] for key in names}, rel=1e-6
        )


@pytest.fixture
def few(monkeypatch):
    """Five steps an epoch."""
    train_set, test_set = digits.load()
    sets = first(train_set, 150), first(test_set, 60)
    monkeypatch.setattr(digits, "load", lambda: sets)


@pytest.fixture(
    params=["grouped", *(pytest.param(f, marks=pytest.mark.slow) for f in ("branches", "vmap"))]
)
def stacked(digits_cfg, few, request):
    """Builds configs of few steps; in float64 with the live teacher, as a table is in float32."""
    options = ["SOLVER.STACK", request.param, "SOLVER.BATCH_SIZE", "32", "SOLVER.EPOCHS", "2"]
    options += ["DISTILLER.TEACHER_TABLE", "auto" if request.param == "branches" else "off"]
    if request.param != "branches":
        request.getfixturevalue("double")
    return lambda method, seed, *more: digits_cfg(method, *options, "SOLVER.SEED", str(seed), *more)


def test_runs_that_are_stacked_are_the_runs_alone(stacked, monkeypatch):
    """One goes on within its second epoch, one fails, and others take their places."""
    jobs = [
        (stacked(method, seed), f"run{seed}")
        for seed, method in enumerate(["dkd_dat", "dkd_lp", "kd", "kd"])
    ]
    alone = [train(cfg, f"{name}-alone", CPU)[1] for cfg, name in jobs]
    with signal_at(2, 3):
        train(*jobs[1], CPU)
    broken = stacked("kd", 4, "KD.LOSS.KD_WEIGHT", "1e37"), "broken"
    sizes, together = [], Stacked._together
    monkeypatch.setattr(
        Stacked, "_together", lambda self, runs: sizes.append(len(runs)) or together(self, runs)
    )
    records = train_many([*jobs[:2], broken, *jobs[2:]], CPU, resume=True, together=3)
    assert "not finite" in str(records.pop(2)) and set(sizes) == {2, 3}
    for record, (cfg, name), folder in zip(records, jobs, alone, strict=True):
        assert record["status"] == "finished"
        assert record["environments"][-1]["stack"] == cfg.SOLVER.STACK
        assert_same(folder.parent / name, folder, cfg.SOLVER.STACK)


def test_stacked_runs_stop_together_and_go_on_alone(stacked):
    jobs = [(stacked("kd", seed), f"run{seed}") for seed in range(2)]
    alone = [train(cfg, f"{name}-alone", CPU)[1] for cfg, name in jobs]
    with signal_at(2, 3):
        train_many(jobs, CPU)
    for (cfg, name), folder in zip(jobs, alone, strict=True):
        state = torch.load(folder.parent / name / "latest", weights_only=True)
        assert state["epoch"] == 1 and 0 < len(state["meter"]["sizes"]) < 5
        train(cfg, name, CPU, resume=True)
        assert_same(folder.parent / name, folder, cfg.SOLVER.STACK)
