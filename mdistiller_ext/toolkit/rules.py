"""What the keys of the toolkit's methods may be, with limits where its code breaks, overflows or
gives NaN."""

from yacs.config import CfgNode

from ..data import Facts
from ..models import ARCHITECTURES
from ..settings import SWITCH, Rule, count, number, number_to, one_of, only, sizes

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
    "INPUT_SIZE": sizes(2, 8, 1000),
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
    "SHAPES": sizes(4, 1, 10_000),
    "OUT_SHAPES": sizes(4, 1, 10_000),
    "IN_CHANNELS": sizes(4, 1, 10_000),
    "OUT_CHANNELS": sizes(4, 1, 10_000),
    "MAX_MID_CHANNEL": count(1),
    "STU_PREACT": SWITCH,
}


def toolkit_rule(key: str) -> Rule | None:
    """The rule of a key alone. A method that is new in the toolkit can have keys without one."""
    return RULES.get(key) or RULES.get(key.rsplit(".", 1)[-1])


def rules_beside(cfg: CfgNode, data: Facts) -> dict[str, Rule]:
    """The rules that data set, method and networks make for other keys; these four are allowed."""
    method, rules = cfg.DISTILLER.TYPE, {}
    if method == "KDSVD":
        rules["KDSVD.K"] = number_to(1, data.side // 4)  # the side of the last feature map
    if method in ("RKD", "REVIEWKD"):
        rules["SOLVER.BATCH_SIZE"] = (
            lambda size: (data.images - 1) % size > 0,
            f"a number that leaves no batch of one image of {data.images}, as {method} needs two",
        )
    if method in ("CRD", "REVIEWKD"):
        for side, role, lists in (("IN", "STUDENT", "SHAPES"), ("OUT", "TEACHER", "OUT_SHAPES")):
            network = cfg.DISTILLER[role]
            if network not in ARCHITECTURES:
                continue
            _, (_, *channels) = ARCHITECTURES[network]
            pooled, fits = channels[-1], f"as {network} has"
            rules[f"CRD.FEAT.{role}_DIM"] = only(pooled, fits)
            rules[f"REVIEWKD.{side}_CHANNELS"] = only([*channels, pooled], fits)
            sides = [1, data.side // 4, data.side // 2, data.side]
            rules[f"REVIEWKD.{lists}"] = only(sides, f"as the images of {cfg.DATASET.TYPE} give")
    return rules
