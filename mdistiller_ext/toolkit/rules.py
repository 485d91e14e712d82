"""What the keys of the toolkit's methods may be, with limits where its code breaks, overflows or
gives NaN."""

from yacs.config import CfgNode

from ..data import Facts
from ..models import feature_shapes
from ..settings import SWITCH, Rule, count, number, number_to, one_of, only, sizes

STAGES = sizes(range(2, 10), 1, 10_000)
# By the whole key, or by its last part.
RULES: dict[str, Rule] = {
    "CE_WEIGHT": number(0),
    "FEAT_WEIGHT": number(0),
    "REVIEWKD_WEIGHT": number(0),
    "DISTANCE_WEIGHT": number(0),
    "ANGLE_WEIGHT": number(0),
    "WARMUP_EPOCHS": count(1),
    "P": number(1, 10),
    "EPSILON": number(1e-30, 1),
    "SQUARED": SWITCH,
    "HINT_LAYER": number_to(0, 3),
    "INPUT_SIZE": sizes(range(2, 3), 8, 1000),
    "KERNEL_SIZE": number(1, 32),
    "EPS": number(0, 0.1, open_low=True),
    "INIT_PRED_VAR": number(0.1, 80),
    "MODE": one_of("exact", "relax"),
    "DIM": number(1, 10_000),
    "STUDENT_DIM": count(1),
    "TEACHER_DIM": count(1),
    "K": number(1, 100_000),
    "CRD.NCE.MOMENTUM": number(0, 1),
    "CRD.NCE.TEMPERATURE": number(0.02, 1000),
    "SHAPES": STAGES,
    "OUT_SHAPES": STAGES,
    "IN_CHANNELS": STAGES,
    "OUT_CHANNELS": STAGES,
    "MAX_MID_CHANNEL": count(1),
    "STU_PREACT": SWITCH,
}


def toolkit_rule(key: str) -> Rule | None:
    """The rule of a key alone. A method that is new in the toolkit can have keys without one."""
    return RULES.get(key) or RULES.get(key.rsplit(".", 1)[-1])


def rules_beside(cfg: CfgNode, data: Facts) -> dict[str, Rule]:
    """The rules that data set, method and networks make for other keys; these four are allowed."""
    method, rules = cfg.DISTILLER.TYPE, {}
    if method in ("RKD", "REVIEWKD"):
        rules["SOLVER.BATCH_SIZE"] = (
            lambda size: (data.images - 1) % size > 0,
            f"a number that leaves no batch of one image of {data.images}, as {method} needs two",
        )
    if method not in ("CRD", "KDSVD", "REVIEWKD"):
        return rules
    names = cfg.DISTILLER.STUDENT, cfg.DISTILLER.TEACHER
    fits = [f"as {name} has" for name in names]
    student, teacher = (
        feature_shapes(name, data.classes, data.side, cfg.DATASET.TYPE) for name in names
    )
    if not student or not teacher:
        return rules  # a step is tried before training
    pooled = [features["pooled_feat"] for features in (student, teacher)]
    if method == "KDSVD":
        last = min(features["feats"][-1][-1] for features in (student, teacher))
        rules["KDSVD.K"] = number_to(1, last)  # the side of the last feature map
    elif method == "CRD":
        for role, (channels, *_), fit in zip(("STUDENT", "TEACHER"), pooled, fits, strict=True):
            rules[f"CRD.FEAT.{role}_DIM"] = only(channels, fit)
    elif "preact_feats" in teacher:
        # As ReviewKD pairs them: the teacher's stages and what is pooled, and of the student's as
        # many, from the last one on.
        key = "preact_feats" if cfg.REVIEWKD.STU_PREACT else "feats"
        maps = [[*teacher["preact_feats"][1:], (*pooled[1], 1)]]
        maps.insert(0, [*student.get(key, []), (*pooled[0], 1)][-len(maps[0]) :])
        lists = ("IN_CHANNELS", "SHAPES"), ("OUT_CHANNELS", "OUT_SHAPES")
        for (channels, sides), some, fit in zip(lists, maps, fits, strict=True):
            rules[f"REVIEWKD.{channels}"] = only([shape[0] for shape in some], fit)
            rules[f"REVIEWKD.{sides}"] = only([shape[-1] for shape in some][::-1], fit)
    return rules
