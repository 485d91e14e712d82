"""Every method, and compositions that no method has, on tiny images."""

from itertools import chain

import torch
from conftest import CPU

from mdistiller_ext import cifar_model_dict, distiller_dict
from mdistiller_ext.config import get_cfg
from mdistiller_ext.data import ImageSet
from mdistiller_ext.distillers import RECIPES
from mdistiller_ext.engine.build import build_optimizer
from mdistiller_ext.losses import LOSSES
from mdistiller_ext.policies import POLICIES
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
# What takes one run alone in a program.
ALONE = {"DKD_HYPERGRADIENT"}


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
