"""What never acts is said, and only that; runs that would be the same are known as the same."""

import pytest
import torch
from conftest import CPU, ROOT, untrained_teacher, weights

from mdistiller_ext.config import load_cfg
from mdistiller_ext.engine import train
from mdistiller_ext.inert import effect, inert, weak_teacher

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def cfg(method, *options, dataset="digits"):
    return load_cfg(ROOT / "configs" / dataset / f"{method}.yaml", options)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: str(f.relative_to(ROOT / "configs")))
def test_everything_acts_in_the_configs(file, request):
    if "toolkit" in file.parts:
        request.getfixturevalue("toolkit")
    assert inert(load_cfg(file)) == []


@pytest.mark.parametrize(
    ("method", "options", "lines"),
    [
        (
            "vanilla",
            ["SOLVER.EPOCHS", "45"],
            ["SOLVER.LR_DECAY_STAGES: [45, 52] never act: SOLVER.EPOCHS is 45"],
        ),
        ("vanilla", ["SOLVER.EPOCHS", "53"], []),
        (
            "vanilla",
            ["SOLVER.EPOCHS", "45", "SOLVER.SCHEDULE", "cosine", "SOLVER.TYPE", "AdamW"],
            [
                "SOLVER.LR_DECAY_STAGES: never act: SOLVER.SCHEDULE is cosine",
                "SOLVER.MOMENTUM: never acts: SOLVER.TYPE is AdamW",
            ],
        ),
        (
            "dkd",
            ["SOLVER.EPOCHS", "5", "SOLVER.LR_DECAY_STAGES", "[]"],
            [
                "DKD.WARMUP: 15 epochs never end: SOLVER.EPOCHS is 5, the distillation loss comes "
                "to 33% of its weight"
            ],
        ),
        ("dkd", ["DKD.WARMUP", "60"], []),
        (
            "dkd_eat",
            ["DKD_EAT.RANGE", "0.0"],
            ["DKD_EAT: EAT never acts, this is DKD: RANGE is 0"],
        ),
        (
            "dkd_eat",
            ["DKD_EAT.STEP_EPOCHS", "60"],
            ["DKD_EAT: EAT never acts, this is DKD: STEP_EPOCHS is 60, SOLVER.EPOCHS 60"],
        ),
        ("dkd_eat", ["DKD_EAT.STEP_EPOCHS", "59"], []),
        (
            "dkd_dat",
            ["DKD_DAT.RANGE", "0.0"],
            ["DKD_DAT: DAT never acts, this is DKD: RANGE is 0"],
        ),
        (
            "dkd_dat",
            ["SOLVER.BATCH_SIZE", "9"],
            ["DKD_DAT: DAT never acts, this is DKD: FRACTION 0.1 of a batch of 9 is not one image"],
        ),
        ("dkd_dat", ["SOLVER.BATCH_SIZE", "10"], []),
        (
            "dkd_dat",
            ["SOLVER.BATCH_SIZE", "10000", "DKD_DAT.FRACTION", "0.001"],  # 539 images
            [
                "DKD_DAT: DAT never acts, this is DKD: FRACTION 0.001 of a batch of 539 is not one "
                "image"
            ],
        ),
        (
            "dkd_lp",
            ["DKD_LP.RATIOS", "[0.0, 0.04]"],
            ["DKD_LP: LP never acts, this is DKD: RATIOS [0.0, 0.04] prune not one of 10 classes"],
        ),
        (
            "dkd_lp",
            ["DKD_LP.STEP_EPOCHS", "60"],
            ["DKD_LP: LP never acts, this is DKD: STEP_EPOCHS is 60, SOLVER.EPOCHS 60"],
        ),
        (
            "dkd_lp",
            ["DKD_LP.STEP_EPOCHS", "20"],
            [
                "DKD_LP.RATIOS: [0.4] are never reached: SOLVER.EPOCHS is 60, with STEP_EPOCHS 20 "
                "all take 61"
            ],
        ),
        ("dkd_lp", ["DKD_LP.STEP_EPOCHS", "19"], []),
        ("dkd_lp", ["DKD_LP.RATIOS", "[0.2]", "DKD_LP.STEP_EPOCHS", "100"], []),
        (
            "dkd_eat_dat_lp",
            ["DKD_EAT_DAT_LP.EAT.RANGE", "0.0", "DKD_EAT_DAT_LP.LP.STEP_EPOCHS", "60"],
            [
                "DKD_EAT_DAT_LP.EAT: EAT never acts: RANGE is 0",
                "DKD_EAT_DAT_LP.LP: LP never acts: STEP_EPOCHS is 60, SOLVER.EPOCHS 60",
            ],
        ),
    ],
)
def test_what_never_acts_is_said(method, options, lines):
    assert inert(cfg(method, *options)) == lines


def test_the_methods_of_the_toolkit(toolkit):
    options = ["SOLVER.EPOCHS", "5", "SOLVER.LR_DECAY_STAGES", "[]"]
    assert inert(cfg("toolkit/kd", *options, dataset="cifar100")) == []
    (line,) = inert(cfg("toolkit/reviewkd", *options, dataset="cifar100"))
    assert line.startswith("REVIEWKD.WARMUP_EPOCHS: 20 epochs never end: SOLVER.EPOCHS is 5")


@pytest.mark.parametrize(
    ("dataset", "top1", "warned"),
    [("digits", 19.99, True), ("digits", 20.0, False), ("cifar100", 1.0, True)],
)
def test_a_teacher_at_chance(dataset, top1, warned):
    line = weak_teacher("resnet20", top1, {"digits": 10, "cifar100": 100}[dataset])
    assert bool(line) == warned
    chance = {"digits": "10", "cifar100": "1"}[dataset]
    assert not warned or line == (
        f"the teacher resnet20 has {top1:.2f} % top-1 on the test set, chance has {chance} %"
    )


WARM = ["SOLVER.EPOCHS", "2", "SOLVER.LR_DECAY_STAGES", "[]"]  # one stage of EAT and of LP
ALIKE = [
    (("dkd_eat", *WARM), ("dkd", *WARM)),
    (("dkd_lp", *WARM), ("dkd", *WARM)),
    (("dkd_dat", "DKD_DAT.RANGE", "0.0"), ("dkd",)),
    (("dkd_dat", "DKD_DAT.FRACTION", "0.01", "DKD_DAT.GROUPS", "random"), ("dkd",)),
    (("dkd_lp", "DKD_LP.RATIOS", "[0.0]", "DKD_LP.CLASSES", "random"), ("dkd",)),
    (("dkd_lp", "DKD_LP.RATIOS", "[0.2, 0.2]"), ("dkd_lp", "DKD_LP.RATIOS", "[0.22]")),
    (
        ("dkd_eat_dat_lp", "DKD_EAT_DAT_LP.DAT.RANGE", "0.0", "DKD_EAT_DAT_LP.LP.RATIOS", "[0.0]"),
        ("dkd_eat",),
    ),
    (("vanilla", "DISTILLER.TEACHER", "resnet14"), ("vanilla",)),
    (("vanilla", "SOLVER.LR_DECAY_STAGES", "[38, 45, 52, 60]"), ("vanilla",)),
    (
        ("vanilla", "SOLVER.SCHEDULE", "cosine", "SOLVER.LR_DECAY_STAGES", "[9]"),
        ("vanilla", "SOLVER.SCHEDULE", "cosine"),
    ),
    (
        ("vanilla", "SOLVER.TYPE", "AdamW", "SOLVER.MOMENTUM", "0.5"),
        ("vanilla", "SOLVER.TYPE", "AdamW"),
    ),
    (("dkd", "EXPERIMENT.TAG", "x", "SOLVER.SEED", "3", "DISTILLER.SOURCE", "ext"), ("dkd",)),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_runs_that_are_the_same_are_known(one, other):
    assert effect(cfg(*one)) == effect(cfg(*other))


DIFFERENT = [
    ("vanilla",),
    ("vanilla", "SOLVER.MOMENTUM", "0.5"),
    ("vanilla", "SOLVER.TYPE", "AdamW"),
    ("vanilla", "SOLVER.SCHEDULE", "cosine"),
    ("vanilla", "SOLVER.EMA_DECAY", "0.9"),
    ("kd",),
    ("kd", "KD.TEMPERATURE", "2"),
    ("dkd",),
    ("dkd", "DKD.T", "2.0"),
    ("dkd", "DKD.BETA", "8.0"),
    ("dkd", "DKD.WARMUP", "14"),
    ("dkd", "SOLVER.EPOCHS", "59"),
    ("dkd", "SOLVER.LR_DECAY_STAGES", "[38, 45]"),
    ("dkd", "DISTILLER.TEACHER_CKPT", "other.pth"),
    ("dkd_eat",),
    ("dkd_eat", "DKD_EAT.RANGE", "-0.4"),
    ("dkd_dat",),
    ("dkd_dat", "DKD_DAT.GROUPS", "random"),
    ("dkd_dat", "DKD_DAT.FRACTION", "0.2"),
    ("dkd_lp",),
    ("dkd_lp", "DKD_LP.CLASSES", "random"),
    ("dkd_lp", "DKD_LP.RATIOS", "[0.0, 0.13, 0.27]"),
    ("dkd_eat_dat_lp",),
]


def test_runs_that_are_not_the_same_are_not():
    effects = [effect(cfg(*words)) for words in DIFFERENT]
    for number, one in enumerate(effects):
        assert [other for other, found in enumerate(effects) if found == one] == [number]


@pytest.mark.parametrize(("one", "other"), [ALIKE[0], ALIKE[5]])
def test_and_they_are_the_same_in_truth(workdir, one, other):
    """To the bit."""
    more = ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
    if "SOLVER.EPOCHS" not in one:
        more += ["SOLVER.EPOCHS", "1"]
    runs = [train(cfg(*words, *more), f"r{n}", CPU) for n, words in enumerate((one, other))]
    kept = [weights(folder) for _, folder in runs]
    assert all(torch.equal(value, kept[1][key]) for key, value in kept[0].items())
    losses = [[epoch["loss"] for epoch in record["epochs"]] for record, _ in runs]
    assert losses[0] == losses[1]


def test_it_is_said_at_the_start_of_a_run(workdir, capsys):
    options = ["SOLVER.EPOCHS", "1", "DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
    config = cfg("dkd_lp", *options)
    train(config, "r", CPU)
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    expected = [*inert(config), "the teacher resnet20 has "]
    assert len(expected) == 4
    for line, text in zip(warnings, expected, strict=True):
        assert line.startswith(f"warning: {text}")
    assert lines.index(warnings[-1]) < next(n for n, x in enumerate(lines) if "epoch   1/1" in x)
