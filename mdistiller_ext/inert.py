"""What a config sets and its run never does, so that no number passes for what it is not."""

from typing import Any

from torch import nn
from yacs.config import CfgNode

from .config import is_place, shown
from .data import facts, identity
from .distillers import RECIPES, Composition, distiller_dict, source
from .policies import RunFacts
from .policies.lp import pruned_count
from .settings import leaves


def inert(cfg: CfgNode) -> list[str]:
    """One line for each setting or technique that never acts in a run of this config."""
    solver, lines = cfg.SOLVER, []
    epochs = solver.EPOCHS
    late = [stage for stage in solver.LR_DECAY_STAGES if stage >= epochs]
    if solver.SCHEDULE != "step" and solver.LR_DECAY_STAGES:
        lines.append(f"SOLVER.LR_DECAY_STAGES: never act: SOLVER.SCHEDULE is {solver.SCHEDULE}")
    elif late:
        lines.append(f"SOLVER.LR_DECAY_STAGES: {late} never act: SOLVER.EPOCHS is {epochs}")
    for key, value in leaves(shown(cfg)):
        if key.endswith((".WARMUP", ".WARMUP_EPOCHS")) and value > epochs:
            lines.append(
                f"{key}: {value} epochs never end: SOLVER.EPOCHS is {epochs}, the distillation "
                f"loss comes to {epochs / value:.0%} of its weight"
            )
    if solver.TYPE != "SGD" and solver.MOMENTUM:
        lines.append(f"SOLVER.MOMENTUM: never acts: SOLVER.TYPE is {solver.TYPE}")
    if composed := _composition(cfg):
        run, recipe = _facts(cfg, composed), RECIPES[cfg.DISTILLER.TYPE]
        for policy in composed.policies:
            name, section = type(policy).__name__, recipe.place(type(policy).__name__)
            key = f"{cfg.DISTILLER.TYPE}.{section}" if section else cfg.DISTILLER.TYPE
            if reason := policy.idle(run):
                plain = "" if section else f", this is {type(composed.loss).__name__}"
                lines.append(f"{key}: {name} never acts{plain}: {reason}")
                continue
            for setting, (values, why) in policy.unreached(run).items():
                lines.append(
                    f"{key}.{setting}: {values} are never reached: SOLVER.EPOCHS is {epochs}, {why}"
                )
    return lines


def weak_teacher(name: str, top1: float, classes: int) -> str:
    """A line on a teacher whose test top-1, in percent, is hardly that of chance, or "": below
    twice of it, and of few classes below the middle between it and 100."""
    chance = 100 / classes
    if top1 >= min(2 * chance, (100 + chance) / 2):
        return ""
    return f"the teacher {name} has {top1:.2f} % top-1 on the test set, chance has {chance:g} %"


def below_claim(name: str, top1: float, claim: tuple[float, str] | None) -> str:
    """A line on a network whose test top-1, in percent, is more than a point below what its file or
    record claims, or "".

    Args:
        claim: (top-1 in percent, what says it), or None.
    """
    if claim is None or top1 >= claim[0] - 1:
        return ""
    return (
        f"{name} has {top1:.2f} % top-1 here, {claim[1]} says {claim[0]:.2f} %: expected the "
        f"images, DATASET.MEAN, .STD and side that it was trained with"
    )


def effect(cfg: CfgNode) -> dict[str, Any]:
    """What the numbers of a run come from, beside its seed: equal where two runs are the same.

    Names and what never acts are not in it; EAT with a single stage, say, gives what DKD gives.
    """
    node, solver = cfg.DISTILLER, cfg.SOLVER
    found = {k: v for k, v in leaves(shown(cfg)) if not is_place(k)}
    found["DATASET.TYPE"] = identity(cfg.DATASET)
    found["DISTILLER.TEACHER_CKPT"] = node.TEACHER_CKPT
    found["DISTILLER.SOURCE"] = source(node)
    found["SOLVER.LR_DECAY_STAGES"] = [s for s in solver.LR_DECAY_STAGES if s < solver.EPOCHS]
    idle = {"SOLVER.SEED"} | ({"SOLVER.MOMENTUM"} if solver.TYPE != "SGD" else set())
    if solver.SCHEDULE != "step":
        idle |= {"SOLVER.LR_DECAY_STAGES", "SOLVER.LR_DECAY_RATE"}
    found = {key: value for key, value in found.items() if key not in idle}
    if node.TYPE == "NONE":
        return {k: v for k, v in found.items() if not k.startswith("DISTILLER.TEACHER")}
    if composed := _composition(cfg):
        run = _facts(cfg, composed)
        found = {k: v for k, v in found.items() if not k.startswith(f"{node.TYPE}.")}
        found["DISTILLER.TYPE"] = "LOGIT"
        found["weights"] = composed.weights.CE_WEIGHT, composed.weights.KD_WEIGHT
        found["loss"] = repr(composed.loss)
        schedule = distiller_dict[node.TYPE](nn.Identity(), nn.Identity(), cfg).schedule
        found["schedule"] = [
            {
                **now,
                "warmup": now.get("warmup", 1.0),
                "pruned_ratio": pruned_count(now.get("pruned_ratio", 0.0), run.classes),
            }
            for now in map(schedule, range(1, solver.EPOCHS + 1))
        ]
        # What no schedule shows.
        found["policies"] = {
            type(policy).__name__: {
                key: getattr(policy, key) for key in policy.rules() if key not in policy.SCHEDULED
            }
            for policy in composed.policies
            if not policy.idle(run)
        }
    return found


def _composition(cfg: CfgNode) -> Composition | None:
    """What a method of ours is made of."""
    name = cfg.DISTILLER.TYPE
    if source(cfg.DISTILLER) != "ext" or name not in RECIPES:
        return None
    return RECIPES[name].read(cfg[name])


def _facts(cfg: CfgNode, composed: Composition) -> RunFacts:
    solver, data = cfg.SOLVER, facts(cfg.DATASET)
    return RunFacts(solver.EPOCHS, solver.BATCH_SIZE, composed.weights.T, data.classes, data.images)
