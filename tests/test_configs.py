"""Every YAML of our own methods: it loads, its method builds and trains two steps."""

from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT

from mdistiller_ext.config import load_cfg
from mdistiller_ext.data import ImageSet
from mdistiller_ext.engine.build import build_distiller, build_optimizer
from mdistiller_ext.engine.loop import Epoch, Meter, train_epoch
from mdistiller_ext.models import cifar_model_dict
from mdistiller_ext.teacher import Weights

FILES = sorted(f for f in (ROOT / "configs").rglob("*.yaml") if "toolkit" not in f.parts)
METHODS = {"vanilla", "kd", "dkd", "dkd_eat", "dkd_dat", "dkd_lp", "dkd_eat_dat_lp"}


def test_each_pair_has_each_method():
    for folder, more in {
        "cifar100": {"logit"},
        "cifar100/res110_res20": set(),
        "digits": {"logit"},
    }.items():
        names = {file.stem for file in (ROOT / "configs" / folder).glob("*.yaml")}
        assert {name for name in names if not name.startswith("teacher_")} == METHODS | more


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT / "configs")))
def test_config(file):
    command = f"# python tools/train.py --cfg {file.relative_to(ROOT)}\n"
    assert file.read_text().startswith(command)
    cfg = load_cfg(file)
    assert file.stem == cfg.DISTILLER.TYPE.lower() or cfg.DISTILLER.TYPE == "NONE"
    classes, side = (10, 8) if cfg.DATASET.TYPE == "digits" else (100, 32)
    weights = None
    if cfg.DISTILLER.TYPE != "NONE":
        teacher = cifar_model_dict[cfg.DISTILLER.TEACHER][0](num_classes=classes)
        weights = Weights(teacher.state_dict(), file, "")
    images = torch.randint(256, (16, 3, side, side), dtype=torch.uint8)
    targets = torch.arange(classes - 16, classes) % classes
    data = ImageSet.build(images, targets, (0.5,) * 3, (0.25,) * 3, 1, True)
    distiller = build_distiller(cfg, weights, data)
    before = [p.clone() for p in distiller.get_learnable_parameters()]
    meter = Meter(1, 2)
    optimizer = build_optimizer(cfg.SOLVER, distiller)
    epoch = Epoch(1, [0.05] * 2, distiller.schedule(1), *data.draw(torch.Generator()), [8, 8])
    train_epoch(distiller, optimizer, data, epoch, meter, nullcontext)
    assert meter.step == 2 and meter.read()["loss"] > 0
    after = distiller.get_learnable_parameters()
    assert not any(map(torch.equal, before, after))


def test_paper_settings():
    cfg = load_cfg(ROOT / "configs/cifar100/dkd_eat_dat_lp.yaml")
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.LR_DECAY_STAGES) == (80, [50, 60, 70])
    assert (cfg.DISTILLER.TEACHER, cfg.DISTILLER.STUDENT) == ("resnet110", "resnet8")
    node = cfg.DKD_EAT_DAT_LP
    assert (node.T, node.BETA, node.WARMUP, node.EAT.RANGE, node.EAT.STEP_EPOCHS) == (
        4,
        2,
        20,
        0.4,
        10,
    )
    assert node.LP.RATIOS == [0.0, 0.13, 0.27, 0.4]
    small = load_cfg(ROOT / "configs/cifar100/res110_res20/dkd_eat.yaml")
    assert (small.DISTILLER.STUDENT, small.DKD_EAT.RANGE) == ("resnet20", 0.2)
