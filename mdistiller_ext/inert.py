"""What a config sets and its run never does, so that no number passes for what it is not."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from yacs.config import CfgNode

from .config import leaves, shown, source
from .data import FACTS
from .distillers import distiller_dict
from .pruning import pruned_count


def inert(cfg: CfgNode) -> list[str]:
    """One line for each setting or technique that never acts in a run of this config."""
    epochs, lines = cfg.SOLVER.EPOCHS, []
    late = [stage for stage in cfg.SOLVER.LR_DECAY_STAGES if stage >= epochs]
    if late:
        lines.append(f"SOLVER.LR_DECAY_STAGES: {late} never act: SOLVER.EPOCHS is {epochs}")
    for key, value in leaves(shown(cfg)):
        if key.endswith((".WARMUP", ".WARMUP_EPOCHS")) and value > epochs:
            lines.append(
                f"{key}: {value} epochs never end: SOLVER.EPOCHS is {epochs}, the distillation "
                f"loss comes to {epochs / value:.0%} of its weight"
            )
    for name, (key, node) in _techniques(cfg).items():
        if reason := IDLE[name](node, cfg):
            plain = "" if key.endswith(f".{name}") else ", this is DKD"
            lines.append(f"{key}: {name} never acts{plain}: {reason}")
        elif name == "LP" and (unreached := node.RATIOS[_stages(node, cfg) :]):
            lines.append(
                f"{key}.RATIOS: {unreached} are never reached: SOLVER.EPOCHS is {epochs}, with "
                f"STEP_EPOCHS {node.STEP_EPOCHS} all take "
                f"{node.STEP_EPOCHS * (len(node.RATIOS) - 1) + 1}"
            )
    return lines


def weak_teacher(name: str, top1: float, dataset: str) -> str:
    """A line on a teacher whose test top-1, in percent, is below twice that of chance, or ""."""
    chance = 100 / FACTS[dataset].classes
    if top1 >= 2 * chance:
        return ""
    return f"the teacher {name} has {top1:.2f} % top-1 on the test set, chance has {chance:g} %"


def effect(cfg: CfgNode) -> dict[str, Any]:
    """What the numbers of a run come from, beside its seed: equal where two runs are the same.

    Names and what never acts are not in it; EAT with a single stage, say, gives what DKD gives.
    """
    node, solver = cfg.DISTILLER, cfg.SOLVER
    found = {k: v for k, v in leaves(shown(cfg)) if not k.startswith(("EXPERIMENT.", "LOG."))}
    found["DISTILLER.SOURCE"] = source(node)
    found["SOLVER.LR_DECAY_STAGES"] = [s for s in solver.LR_DECAY_STAGES if s < solver.EPOCHS]
    del found["SOLVER.SEED"], found["DATASET.NUM_WORKERS"]
    if node.TYPE == "NONE":
        return {k: v for k, v in found.items() if not k.startswith("DISTILLER.TEACHER")}
    techniques = _techniques(cfg)
    if techniques or (source(node), node.TYPE) == ("ext", "DKD"):
        found = {k: v for k, v in found.items() if not k.startswith(f"{node.TYPE}.")}
        method = cfg[node.TYPE]
        found |= {"DISTILLER.TYPE": "DKD", "loss": (method.CE_WEIGHT, method.ALPHA, method.BETA)}
        schedule = distiller_dict[node.TYPE](nn.Identity(), nn.Identity(), cfg).schedule
        found["schedule"] = [
            {**now, "pruned_ratio": _pruned(now.get("pruned_ratio", 0), cfg)}
            for now in map(schedule, range(1, solver.EPOCHS + 1))
        ]
        # What no schedule has.
        acting = {name: own for name, (_, own) in techniques.items() if not IDLE[name](own, cfg)}
        dat, lp = acting.get("DAT"), acting.get("LP")
        found["groups"] = dat and (dat.RANGE, dat.FRACTION, dat.get("GROUPS", "hardest"))
        found["classes"] = lp and lp.get("CLASSES", "lowest")
    return found


def _techniques(cfg: CfgNode) -> dict[str, tuple[str, CfgNode]]:
    """EAT, DAT and LP as far as the method has them: name -> (key, node) of its settings."""
    method, names = cfg.DISTILLER.TYPE, ("EAT", "DAT", "LP")
    if source(cfg.DISTILLER) != "ext":
        return {}
    if method == "DKD_EAT_DAT_LP":
        return {name: (f"{method}.{name}", cfg[method][name]) for name in names}
    return {name: (method, cfg[method]) for name in names if method == f"DKD_{name}"}


def _eat(node: CfgNode, cfg: CfgNode) -> str:
    if node.RANGE == 0:
        return "RANGE is 0"
    one = cfg.SOLVER.EPOCHS <= node.STEP_EPOCHS
    return f"STEP_EPOCHS is {node.STEP_EPOCHS}, SOLVER.EPOCHS {cfg.SOLVER.EPOCHS}" if one else ""


def _dat(node: CfgNode, cfg: CfgNode) -> str:
    if node.RANGE == 0:
        return "RANGE is 0"
    size = min(cfg.SOLVER.BATCH_SIZE, FACTS[cfg.DATASET.TYPE].images)
    none = math.floor(node.FRACTION * size) == 0
    return f"FRACTION {node.FRACTION} of a batch of {size} is not one image" if none else ""


def _lp(node: CfgNode, cfg: CfgNode) -> str:
    if not any(_pruned(ratio, cfg) for ratio in node.RATIOS):
        return f"RATIOS {node.RATIOS} prune not one of {FACTS[cfg.DATASET.TYPE].classes} classes"
    if any(_pruned(ratio, cfg) for ratio in node.RATIOS[: _stages(node, cfg)]):
        return ""
    return f"STEP_EPOCHS is {node.STEP_EPOCHS}, SOLVER.EPOCHS {cfg.SOLVER.EPOCHS}"


# Why a technique never acts, or "".
IDLE: dict[str, Callable[[CfgNode, CfgNode], str]] = {"EAT": _eat, "DAT": _dat, "LP": _lp}


def _stages(node: CfgNode, cfg: CfgNode) -> int:
    """How many of LP's stages a run begins."""
    return math.ceil(cfg.SOLVER.EPOCHS / node.STEP_EPOCHS)


def _pruned(ratio: float, cfg: CfgNode) -> Any:
    return pruned_count(ratio, FACTS[cfg.DATASET.TYPE].classes)
