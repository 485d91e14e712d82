"""Optimizers, schedules, clipping, smoothed labels, mixed images and the average of the weights."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from composed import AT_ONCE, OTHERWISE, composed, logits
from conftest import CPU, ROOT, assert_same_run, first, signal_at, weights
from torch import nn
from torch.optim import lr_scheduler

from mdistiller_ext import cifar_model_dict
from mdistiller_ext.config import load_cfg
from mdistiller_ext.data import ImageSet, digits
from mdistiller_ext.data.mixing import mixed
from mdistiller_ext.engine import World, predict, train
from mdistiller_ext.engine.fit import captured
from mdistiller_ext.engine.folder import plain
from mdistiller_ext.engine.record import read_record
from mdistiller_ext.errors import ConfigError, RunError
from mdistiller_ext.losses import LOSSES
from mdistiller_ext.policies import POLICIES, Context
from mdistiller_ext.sections import Solver
from mdistiller_ext.seeding import epoch_generator, seed_everything
from mdistiller_ext.solver import rates
from mdistiller_ext.study.plan import conditions_of, foreseen, read_study

STEPS, EPOCHS, WARM = 7, 6, 2  # steps of an epoch, epochs, epochs of warm-up


def schedulers(optimizer):
    """Of torch, by name."""
    warm, every = WARM * STEPS, EPOCHS * STEPS
    rising = lr_scheduler.LinearLR(optimizer, 1 / (warm + 1), total_iters=warm)
    stages = [3 * STEPS, 5 * STEPS]
    return {
        "step": lambda: [rising, lr_scheduler.MultiStepLR(optimizer, stages, gamma=0.3)],
        "cosine": lambda: [
            lr_scheduler.SequentialLR(
                optimizer,
                [rising, lr_scheduler.CosineAnnealingLR(optimizer, every - warm)],
                [warm],
            )
        ],
        "one_cycle": lambda: [
            lr_scheduler.OneCycleLR(
                optimizer,
                0.4,
                every,
                pct_start=warm / every,
                anneal_strategy="linear",
                cycle_momentum=False,
            )
        ],
    }


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR's own
@pytest.mark.parametrize("name", ["step", "cosine", "one_cycle"])
def test_each_step_has_the_rate_of_torchs_own_scheduler(name):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.4)
    theirs, expected = schedulers(optimizer)[name](), []
    for _ in range(EPOCHS * STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in theirs:
            scheduler.step()
    stages = {"LR_DECAY_STAGES": [3, 5], "LR_DECAY_RATE": 0.3}
    solver = Solver(LR=0.4, EPOCHS=EPOCHS, SCHEDULE=name, LR_WARMUP=WARM, **stages)
    found = [rate for epoch in range(1, EPOCHS + 1) for rate in rates(solver, epoch, STEPS)]
    assert found == pytest.approx(expected, rel=1e-9)
    assert len(set(found)) > 2 * STEPS


def test_without_warm_up_the_rate_falls_after_each_stage():
    solver = Solver(EPOCHS=80, LR_DECAY_STAGES=[50, 60, 70])
    found = {epoch: set(rates(solver, epoch, 9)) for epoch in (1, 50, 51, 60, 61, 71)}
    assert [*found.values()] == [{0.05 * 0.1**stages} for stages in (0, 0, 1, 1, 2, 3)]


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
@pytest.mark.parametrize(("epochs", "steps", "warm"), [(1, 1, 0.5), (1, 3, 0.9), (2, 1, 1.9)])
def test_short_runs_have_rates_too(schedule, epochs, steps, warm):
    solver = Solver(EPOCHS=epochs, SCHEDULE=schedule, LR_WARMUP=warm)
    found = [rate for epoch in range(1, epochs + 1) for rate in rates(solver, epoch, steps)]
    assert len(found) == epochs * steps and all(0 < rate <= solver.LR for rate in found)


@pytest.fixture
def few(monkeypatch):
    """Five steps of 32 images an epoch."""
    train_set, test_set = digits.load()
    sets = first(train_set, 150), first(test_set, 60)
    monkeypatch.setattr(digits, "load", lambda: sets)
    return sets[0]


SHORT = ["SOLVER.BATCH_SIZE", "32", "SOLVER.EPOCHS", "2", "SOLVER.LR_DECAY_STAGES", "[]"]
LIVE = ["DISTILLER.TEACHER_TABLE", "off"]
ALL = {
    "SOLVER.TYPE": "AdamW",
    "SOLVER.OPTIMIZER_ARGS": "betas=(0.8, 0.95)",
    "SOLVER.LR": "0.01",
    "SOLVER.SCHEDULE": "cosine",
    "SOLVER.LR_WARMUP": "0.6",
    "SOLVER.CLIP_NORM": "0.5",
    "SOLVER.LABEL_SMOOTHING": "0.1",
    "SOLVER.EMA_DECAY": "0.7",
}
MIXED = {"SOLVER.MIXUP": "0.8", "SOLVER.CUTMIX": "1.0"}


def words(options):
    return [word for pair in options.items() for word in pair]


def by_hand(cfg, data, teacher=None):
    """The student's weights and their average after the loop that one would write."""
    solver = cfg.SOLVER
    seed_everything(solver.SEED)
    net = cifar_model_dict[cfg.DISTILLER.STUDENT][0](num_classes=10)
    options = {"lr": solver.LR, "weight_decay": solver.WEIGHT_DECAY}
    if solver.TYPE == "AdamW":
        optimizer = torch.optim.AdamW(net.parameters(), betas=(0.8, 0.95), **options)
    else:
        nesterov = solver.OPTIMIZER_ARGS == "nesterov=True"
        options |= {"momentum": solver.MOMENTUM, "nesterov": nesterov}
        optimizer = torch.optim.SGD(net.parameters(), **options)
    average, steps = None, -(-len(data) // solver.BATCH_SIZE)
    for epoch in range(1, solver.EPOCHS + 1):
        batches = data.epoch(solver.BATCH_SIZE, epoch_generator(solver.SEED, epoch))
        for step, batch in enumerate(batches):
            image, labels = batch.image, F.one_hot(batch.target, 10).double()
            if solver.MIXUP:
                draws = np.random.default_rng([solver.SEED, epoch, 5, step])
                found = mixed(batch, 10, solver.MIXUP, solver.CUTMIX, draws)
                image, labels = found.image, found.target
            warm, done = 3, (epoch - 1) * steps + step
            if solver.SCHEDULE == "cosine":
                angle = math.pi * max(done - warm, 0) / (solver.EPOCHS * steps - warm)
                rate = solver.LR * min((done + 1) / (warm + 1), 1) * (1 + math.cos(angle)) / 2
                optimizer.param_groups[0]["lr"] = rate
            z = net(image)[0]
            loss = F.cross_entropy(z, labels, label_smoothing=solver.LABEL_SMOOTHING)
            if teacher is not None:
                log_p, p = F.log_softmax(z / 4, 1), F.softmax(teacher(image)[0] / 4, 1)
                kl = F.kl_div(log_p, p, reduction="batchmean")
                loss = 0.1 * loss + 0.9 * 4**2 * kl
            optimizer.zero_grad()
            loss.backward()
            if solver.CLIP_NORM:
                nn.utils.clip_grad_norm_(net.parameters(), solver.CLIP_NORM)
            optimizer.step()
            state = copy.deepcopy(net.state_dict())
            average = average or state
            for key, value in average.items():
                value.copy_(solver.EMA_DECAY * value + (1 - solver.EMA_DECAY) * state[key])
    return net, average


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "options",
    [
        {"SOLVER.OPTIMIZER_ARGS": "nesterov=True"},
        {key: ALL[key] for key in ("SOLVER.TYPE", "SOLVER.OPTIMIZER_ARGS", "SOLVER.LR")},
        {"SOLVER.CLIP_NORM": "0.5"},
        {"SOLVER.LABEL_SMOOTHING": "0.1"},
        {"SOLVER.EMA_DECAY": "0.7"},
        ALL,
    ],
    ids=["nesterov", "AdamW", "clipping", "smoothing", "average", "all"],
)
def test_a_run_has_the_weights_of_the_loop_by_hand(digits_cfg, few, options):
    cfg = digits_cfg("vanilla", *SHORT, *words(options))
    record, folder = train(cfg, "r", CPU)
    net, average = by_hand(cfg, few)
    torch.testing.assert_close(weights(folder), dict(net.state_dict()), rtol=1e-8, atol=1e-10)
    file = folder / "student_ema"
    assert file.exists() == ("SOLVER.EMA_DECAY" in options)
    if file.exists():
        found = torch.load(file, weights_only=True)["model"]
        counted = {key for key in found if key.endswith("num_batches_tracked")}  # whole numbers
        for key in found.keys() - counted:
            torch.testing.assert_close(found[key], average[key], rtol=1e-8, atol=1e-10)
        net.load_state_dict(found)
        test = digits.load()[1]
        right = (predict(net, test, 60).argmax(1) == test.targets).sum().item()
        assert record["last_epoch_ema_top1"] == 100 * right / 60
        assert record["epochs"][-1]["test_ema_top1"] == 100 * right / 60


@pytest.mark.usefixtures("double")
def test_a_mixed_run_has_the_weights_of_the_loop_by_hand(digits_cfg, few):
    """The live teacher sees the mixed images."""
    cfg = digits_cfg("kd", *SHORT, *LIVE, *words(MIXED))
    _, folder = train(cfg, "r", CPU)
    teacher = cifar_model_dict[cfg.DISTILLER.TEACHER][0](num_classes=10).eval()
    teacher.load_state_dict(torch.load(cfg.DISTILLER.TEACHER_CKPT, weights_only=True)["model"])
    net, _ = by_hand(cfg, few, teacher.requires_grad_(False))
    torch.testing.assert_close(weights(folder), dict(net.state_dict()), rtol=1e-8, atol=1e-10)


def tiny_batch():
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    data = ImageSet.build(images, torch.tensor([0, 1, 2, 1, 3]), (0.5,) * 3, (0.25,) * 3, 1, True)
    return data.batch(torch.arange(5), torch.arange(5))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixup_is_its_definition(smoothing):
    batch, net = tiny_batch(), nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    found = mixed(batch, 4, 0.7, 0.0, np.random.default_rng(3))
    share = np.random.default_rng(3).beta(0.7, 0.7)
    before = [4, 0, 1, 2, 3]
    z = net(share * batch.image + (1 - share) * batch.image[before])
    own, other = (
        F.cross_entropy(z, target, label_smoothing=smoothing)
        for target in (batch.target, batch.target[before])
    )
    loss = F.cross_entropy(net(found.image), found.target, label_smoothing=smoothing)
    torch.testing.assert_close(loss, share * own + (1 - share) * other)
    assert 0.1 < share < 0.9


def test_cutmix_puts_a_box_of_another_image_in_its_place():
    batch = tiny_batch()
    areas = set()
    for seed in range(40):
        found = mixed(batch, 4, 0.0, 1.0, np.random.default_rng(seed))
        draws = np.random.default_rng(seed)
        half = int(0.5 * math.sqrt(1 - draws.beta(1.0, 1.0)) * 8)
        y, x = draws.integers(8, size=2)
        inside = torch.zeros(8, 8, dtype=torch.bool)
        for row in range(8):
            for column in range(8):
                inside[row, column] = bool(-half <= row - y < half and -half <= column - x < half)
        other = batch.image[[4, 0, 1, 2, 3]]
        assert torch.equal(found.image, torch.where(inside, other, batch.image))
        area = inside.double().mean().item()
        labels = F.one_hot(batch.target, 4).float()
        expected = (1 - area) * labels + area * labels[[4, 0, 1, 2, 3]]
        torch.testing.assert_close(found.target, expected)
        areas.add(area)
    assert len(areas) > 5 and 0 in areas


def test_of_both_each_batch_takes_one():
    batch, draws = tiny_batch(), np.random.default_rng(0)
    images = [mixed(batch, 4, 1.0, 1.0, draws).image for _ in range(40)]
    other = batch.image.roll(1, 0)
    boxes = sum(bool(((image == batch.image) | (image == other)).all()) for image in images)
    assert 10 < boxes < 30


def loss_kd(distiller, z_s, z_t, target):
    """The distillation loss with these labels; what it draws does not depend on them."""
    torch.manual_seed(0)
    distiller = copy.deepcopy(distiller).train()
    context = Context(distiller.schedule(1), z_t, logits=z_s.detach().requires_grad_())
    context = context._replace(ahead=lambda: torch.ones_like(z_s))
    _, losses = distiller(image=z_s, target=target, context=context)
    assert all(value.shape == () for value in distiller.monitor.values())
    return losses["loss_kd"]


PARTS = [*((loss, []) for loss in LOSSES), *(("KD", [policy]) for policy in POLICIES)]


@pytest.mark.parametrize(("loss", "policies"), PARTS)
def test_what_needs_a_label_says_so_and_the_others_take_shares_of_labels(loss, policies):
    name = policies[0] if policies else loss
    part = POLICIES[name] if policies else LOSSES[name]
    settings = {"NUCLEUS": {"EPSILON": 0.5}, **AT_ONCE, **OTHERWISE}
    distiller = composed(loss, policies, 2, **{name: settings.get(name, {})})
    z_s, z_t, target = logits()
    found = loss_kd(distiller, z_s, z_t, target)
    others = loss_kd(distiller, z_s, z_t, (target + 1) % 10)
    assert torch.equal(found, others) == (not part.needs_label)
    if not part.needs_label:
        shares = F.one_hot(target, 10).double().lerp(torch.full((1, 10), 0.1).double(), 0.3)
        assert torch.equal(found, loss_kd(distiller, z_s, z_t, shares))


LP = ["DISTILLER.TYPE", "LOGIT", "LOGIT.LOSS", "KD", "LOGIT.POLICIES", "['LP']"]


@pytest.mark.parametrize(
    ("method", "options", "line"),
    [
        ("vanilla", ["SOLVER.TYPE", "LBFGS"], "SOLVER.TYPE: 'LBFGS' .* one of SGD, Ada"),
        ("vanilla", ["SOLVER.OPTIMIZER_ARGS", "0.9"], "OPTIMIZER_ARGS: '0.9' .* NAME=VALUE"),
        ("vanilla", ["SOLVER.OPTIMIZER_ARGS", "lr=1"], "optim.SGD: dampening, differentiable"),
        ("vanilla", ["SOLVER.OPTIMIZER_ARGS", "f(1)=1"], "expected arguments NAME=VALUE"),
        ("vanilla", ["SOLVER.OPTIMIZER_ARGS", "eps=f(1)"], "expected arguments NAME=VALUE"),
        ("vanilla", ["SOLVER.OPTIMIZER_ARGS", "betas=(0.9, 1)"], "optim.SGD: .*, nesterov$"),
        (
            "vanilla",
            ["SOLVER.TYPE", "AdamW", "SOLVER.OPTIMIZER_ARGS", "betas=(0.9, 2)"],
            "optim.AdamW: amsgrad, betas, .*Invalid beta parameter at index 1: 2",
        ),
        (
            "vanilla",
            ["SOLVER.OPTIMIZER_ARGS", "nesterov=True", "SOLVER.MOMENTUM", "0.0"],
            "Nesterov momentum requires a momentum",
        ),
        ("vanilla", ["SOLVER.SCHEDULE", "linear"], "one of step, cosine, one_cycle"),
        ("vanilla", ["SOLVER.SCHEDULE", "one_cycle"], "LR_WARMUP: 0.0 .* above 0 and below 3"),
        ("vanilla", ["SOLVER.LR_WARMUP", "3"], "LR_WARMUP: 3.0 .* at least 0 and below 3"),
        ("vanilla", ["SOLVER.CLIP_NORM", "-1"], "CLIP_NORM: -1.0 .* at least 0"),
        ("vanilla", ["SOLVER.EMA_DECAY", "1.0"], "EMA_DECAY: 1.0 .* below 1"),
        ("vanilla", ["SOLVER.LABEL_SMOOTHING", "1.0"], "LABEL_SMOOTHING: 1.0 .* below 1"),
        ("vanilla", ["SOLVER.MIXUP", "1e-9"], "MIXUP: 1e-09 .* 0 or a number from 0.01 to 100"),
        ("kd", ["SOLVER.MIXUP", "1.0"], "TEACHER_TABLE: 'auto' .*'off', as no table .*R.MIXUP m"),
        ("dkd", [*LIVE, "SOLVER.CUTMIX", "1.0"], "CUTMIX: 1.0 .* as DKD needs one label"),
        (
            "kd",
            [*LIVE, *LP, "SOLVER.MIXUP", "1.0", "SOLVER.CUTMIX", "1.0"],
            "MIXUP: 1.0 .* as LP needs one label for each image",
        ),
    ],
)
def test_what_is_refused_before_anything_is_loaded(digits_cfg, method, options, line):
    with pytest.raises(ConfigError, match=line):
        digits_cfg(method, *options)


def test_mixed_images_are_for_one_process(digits_cfg, monkeypatch):
    monkeypatch.setattr(World, "tell", lambda self, content: content)
    with pytest.raises(ConfigError, match=r"SOLVER\.CUTMIX: takes one process: the image that"):
        train(digits_cfg("vanilla", "SOLVER.CUTMIX", "1.0"), "r", CPU, world=World(0, 2))


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "Adagrad"])
def test_a_run_stopped_within_an_epoch_has_the_bits_of_one_never_stopped(digits_cfg, few, name):
    """Of optimizers with a state of their own kind; with AdamW beside all else."""
    options = ALL | MIXED if name == "AdamW" else {"SOLVER.TYPE": name, "SOLVER.LR": "0.001"}
    cfg = digits_cfg("kd", *SHORT, *LIVE, *words(options))
    _, whole = train(cfg, "whole", CPU)
    with signal_at(2, 3):
        train(cfg, "parts", CPU)
    _, parts = train(cfg, "parts", CPU, resume=True)
    assert_same_run(whole, parts)
    if name == "AdamW":
        one, other = (torch.load(f / "student_ema", weights_only=True) for f in (whole, parts))
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        records = [read_record(folder / "record.json") for folder in (whole, parts)]
        assert records[0]["last_epoch_ema_top1"] == records[1]["last_epoch_ema_top1"]


def test_a_state_of_another_optimizer_is_one_line(digits_cfg, few):
    cfg = digits_cfg("vanilla", *SHORT, "SOLVER.TYPE", "AdamW")
    with signal_at(2, 3):
        train(cfg, "r", CPU)
    file = Path("output/digits/r/latest")
    state = torch.load(file, weights_only=True)
    state["optimizer"]["state"][0].pop("exp_avg")
    torch.save(state, file)
    with pytest.raises(RunError, match=r"latest: does not fit .* step, exp_avg_sq of a"):
        train(cfg, "r", CPU, resume=True)


def test_a_run_stopped_within_its_first_epoch_goes_on_at_the_same_rates_alone(digits_cfg, few):
    def cfg(epochs, schedule):
        return digits_cfg("vanilla", *SHORT, "SOLVER.EPOCHS", epochs, "SOLVER.SCHEDULE", schedule)

    for schedule in ("cosine", "step"):
        with signal_at(1, 3):
            train(cfg("2", schedule), schedule, CPU)
    with pytest.raises(ConfigError, match="cannot go on: in a run of so many epochs the lr of ep"):
        train(cfg("4", "cosine"), "cosine", CPU, resume=True)
    record, _ = train(cfg("4", "step"), "step", CPU, resume=True)
    assert len(record["epochs"]) == 4


@pytest.mark.parametrize("key", ["TYPE", "OPTIMIZER_ARGS", "CLIP_NORM", "EMA_DECAY", "MIXUP"])
def test_on_a_gpu_what_no_program_takes_goes_by_the_plain_loop_and_says_so(key, capsys):
    solver = Solver(**{key: (ALL | MIXED)[f"SOLVER.{key}"]})
    trainer = SimpleNamespace(replica=None, held_every=0)
    networks = SimpleNamespace(TYPE="KD")
    parts, device = SimpleNamespace(networks=networks), torch.device("cuda")
    run = SimpleNamespace(trainer=trainer, parts=parts, device=device, solver=solver)
    assert captured(run) is None
    assert f"KD runs without a CUDA graph: SOLVER.{key} " in capsys.readouterr().out


def test_a_study_tells_arms_of_other_solvers(workdir):
    arms = {"plain": {"cfg": "kd.yaml", "options": dict(zip(LIVE[::2], LIVE[1::2], strict=True))}}
    for key, value in (ALL | MIXED).items():
        options = {key: value, **arms["plain"]["options"]}
        if key == "SOLVER.OPTIMIZER_ARGS":
            options[key] = "nesterov=True"
        arms[key] = {"cfg": "kd.yaml", "options": options}
    tree = {"name": "s", "students": {"resnet8": str(ROOT / "configs" / "digits")}}
    tree |= {"seeds": [0], "arms": arms, "baseline": "plain"}
    Path("s.yaml").write_text(yaml.safe_dump(tree))
    study = read_study(Path("s.yaml"), Path("out"))
    told = [line for line in foreseen(study, []) if line.startswith("report will refuse")]
    assert sorted(line.split(": ")[2].split()[0] for line in told) == sorted(ALL | MIXED)
    assert not any("refuse" in line for line in foreseen(study, ALL | MIXED))


def test_a_run_older_than_a_setting_had_its_default(digits_cfg):
    config = plain(digits_cfg("vanilla"))
    older = config | {"SOLVER": {k: v for k, v in config["SOLVER"].items() if k != "EMA_DECAY"}}
    assert conditions_of(older) == conditions_of(config)


def test_settings_in_a_yaml_file(workdir):
    Path("c.yaml").write_text(
        "SOLVER: {TYPE: AdamW, OPTIMIZER_ARGS: 'betas=(0.9, 0.95), eps=1e-6', EMA_DECAY: 0.999}\n"
        "DISTILLER: {TYPE: NONE}\n"
    )
    assert load_cfg("c.yaml").SOLVER.OPTIMIZER_ARGS == "betas=(0.9, 0.95), eps=1e-6"
