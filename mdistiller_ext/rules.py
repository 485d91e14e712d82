"""What each key of the config may be: alone, and beside the other keys."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from yacs.config import CfgNode

from .data import FACTS
from .distillers import distiller_dict
from .models import ARCHITECTURES
from .pruning import pruned_count

Rule = tuple[Callable[[Any], bool], str]  # is a value of the key's type allowed? what is allowed


def _number(low: float, high: float = 1e38, *, open_low: bool = False) -> Rule:
    # 1e38: no float32 is much larger.
    text = f"a number {'above' if open_low else 'at least'} {low:g} and below {high:g}"
    return lambda v: (low < v if open_low else low <= v) and v < high, text


def _count(low: int) -> Rule:
    return _number(low, 1e6)


def _number_to(low: float, high: float) -> Rule:
    return lambda v: low <= v <= high, f"a number from {low:g} to {high:g}"


def _one_of(*values: str) -> Rule:
    return lambda v: v in values, "one of " + ", ".join(values)


def _list_of(item: Rule, least: int, *, rising: bool = False) -> Rule:
    def allowed(values: Sequence) -> bool:
        return (
            least <= len(values)
            and all(type(v) in (int, float) and item[0](v) for v in values)
            and (not rising or all(a < b for a, b in pairwise(values)))
        )

    order = " and above the one before" if rising else ""
    return allowed, f"a list of at least {least}, each {item[1]}{order}"


def _sizes(count: int, least: int, most: int) -> Rule:
    return (
        lambda v: len(v) == count and all(type(n) is int and least <= n <= most for n in v),
        f"a list of {count}, each an int from {least} to {most}",
    )


def _only(value: Any, reason: str) -> Rule:
    return lambda v: v == value, f"{value!r}, {reason}"


def _or_empty(rule: Rule) -> Rule:
    return lambda v: v == "" or rule[0](v), f"{rule[1]}, or ''"


def _is_path(text: str) -> bool:
    if not text or not text.isprintable() or "://" in text:
        return False
    return len(text.encode()) <= 1000 and all(len(n.encode()) <= 255 for n in text.split("/"))


# What file systems take, with room for the names that a run adds.
PATH: Rule = (
    _is_path,
    "a path in printable characters and no URL, of at most 1000 bytes, each name in it 255",
)
NAME: Rule = (
    lambda v: (
        _is_path(v) and v not in (".", "..") and not {*"/\\"} & {*v} and len(v.encode()) <= 200
    ),
    "a folder's name in printable characters without / and \\, of at most 200 bytes",
)
_TEXT: Rule = (lambda v: v != "" and v.isprintable(), "printable characters on one line")
_SWITCH: Rule = (lambda v: True, "True or False")  # the type says it all

# By the whole key, or in the nodes of methods by its last part.
RULES: dict[str, Rule] = {
    "EXPERIMENT.PROJECT": NAME,
    "EXPERIMENT.NAME": _or_empty(NAME),
    "EXPERIMENT.TAG": _TEXT,
    "DATASET.TYPE": _one_of(*FACTS),
    "DATASET.ROOT": PATH,
    "DATASET.NUM_WORKERS": _count(0),
    "DATASET.TEST.BATCH_SIZE": _count(1),
    "DISTILLER.TYPE": _one_of(*distiller_dict),
    "DISTILLER.TEACHER": _one_of(*ARCHITECTURES),
    "DISTILLER.STUDENT": _one_of(*ARCHITECTURES),
    "DISTILLER.TEACHER_CKPT": _or_empty(PATH),
    "DISTILLER.TEACHER_CFG": _or_empty(PATH),
    "DISTILLER.TEACHER_TABLE": _one_of("auto", "on", "off"),
    "DISTILLER.TEACHER_TABLE_DTYPE": _one_of("float32", "float16"),
    "DISTILLER.TEACHER_TABLE_ROOT": _or_empty(PATH),
    "DISTILLER.SOURCE": _one_of("auto", "ext", "mdistiller"),
    "DISTILLER.FIX_UPSTREAM": _SWITCH,
    "SOLVER.TRAINER": _one_of("base", "crd"),  # for the toolkit; here one loop serves both
    "SOLVER.TYPE": _one_of("SGD"),
    "SOLVER.BATCH_SIZE": _count(1),
    "SOLVER.EPOCHS": _count(1),
    "SOLVER.LR": _number(0),
    "SOLVER.LR_DECAY_STAGES": _list_of(_number(0), least=0, rising=True),
    "SOLVER.LR_DECAY_RATE": _number_to(0, 1),
    "SOLVER.WEIGHT_DECAY": _number(0, 1),
    "SOLVER.MOMENTUM": _number(0, 1),
    "SOLVER.SEED": _number(0, 2**63),
    "SOLVER.AMP": _one_of("none", "bf16"),
    "SOLVER.TF32": _SWITCH,
    "SOLVER.COMPILE": _SWITCH,
    "SOLVER.SYNC_BN": _SWITCH,
    "SOLVER.CUDA_GRAPH": _SWITCH,
    "LOG.TENSORBOARD_FREQ": _count(1),
    "LOG.SAVE_CHECKPOINT_FREQ": _count(1),
    "LOG.EVAL_EVERY": _count(1),
    "LOG.PREFIX": PATH,
    "LOG.WANDB": _SWITCH,
    "CE_WEIGHT": _number(0),
    "KD_WEIGHT": _number(0),
    "ALPHA": _number(0),
    "BETA": _number(0),
    "T": _number(0.01, 1000),
    "TEMPERATURE": _number(0.01, 1000),
    "WARMUP": _count(1),
    "RANGE": _number(-1, 1, open_low=True),
    "STEP_EPOCHS": _count(1),
    "FRACTION": _number_to(0, 0.5),
    "RATIOS": _list_of(_number(0, 1), least=1),
    "GROUPS": _one_of("hardest", "random"),
    "CLASSES": _one_of("lowest", "random"),
    # Of the toolkit's methods, with limits where its code breaks, overflows or gives NaN.
    "FEAT_WEIGHT": _number(0),
    "REVIEWKD_WEIGHT": _number(0),
    "DISTANCE_WEIGHT": _number(0),
    "ANGLE_WEIGHT": _number(0),
    "WARMUP_EPOCHS": _count(1),
    "P": _number(1, 10),
    "EPSILON": _number(1e-30, 1),
    "SQUARED": _SWITCH,
    "HINT_LAYER": _number_to(0, 3),
    "INPUT_SIZE": _sizes(2, 8, 1000),
    "KERNEL_SIZE": _number(1, 32),
    "EPS": _number(0, 0.1, open_low=True),
    "INIT_PRED_VAR": _number(0.1, 80),
    "MODE": _one_of("exact", "relax"),
    "DIM": _number(1, 10_000),
    "STUDENT_DIM": _count(1),
    "TEACHER_DIM": _count(1),
    "K": _number(1, 100_000),
    "CRD.NCE.MOMENTUM": _number(0, 1),
    "CRD.NCE.TEMPERATURE": _number(0.02, 1000),
    "SHAPES": _sizes(4, 1, 10_000),
    "OUT_SHAPES": _sizes(4, 1, 10_000),
    "IN_CHANNELS": _sizes(4, 1, 10_000),
    "OUT_CHANNELS": _sizes(4, 1, 10_000),
    "MAX_MID_CHANNEL": _count(1),
    "STU_PREACT": _SWITCH,
}


def rule_of(key: str) -> Rule:
    """The rule of a key alone. A method that is new in the toolkit can have keys without one."""
    return RULES.get(key) or RULES.get(key.rsplit(".", 1)[-1]) or (lambda v: True, "a value")


def rules_beside(cfg: CfgNode) -> dict[str, Rule]:
    """The rules that data set, method and networks make for other keys; these four are allowed."""
    data, method = FACTS[cfg.DATASET.TYPE], cfg.DISTILLER.TYPE
    rules = dict.fromkeys(
        ("DKD_LP.RATIOS", "DKD_EAT_DAT_LP.LP.RATIOS"), _classes_stay(data.classes)
    )
    if method == "KDSVD":
        rules["KDSVD.K"] = _number_to(1, data.side // 4)  # the side of the last feature map
    if method in ("RKD", "REVIEWKD"):
        rules["SOLVER.BATCH_SIZE"] = (
            lambda size: (data.images - 1) % size > 0,
            f"a number that leaves no batch of one image of {data.images}, as {method} needs two",
        )
    if method in ("CRD", "REVIEWKD"):
        for side, role, lists in (("IN", "STUDENT", "SHAPES"), ("OUT", "TEACHER", "OUT_SHAPES")):
            network = cfg.DISTILLER[role]
            _, (_, *channels) = ARCHITECTURES[network]
            pooled, fits = channels[-1], f"as {network} has"
            rules[f"CRD.FEAT.{role}_DIM"] = _only(pooled, fits)
            rules[f"REVIEWKD.{side}_CHANNELS"] = _only([*channels, pooled], fits)
            sides = [1, data.side // 4, data.side // 2, data.side]
            rules[f"REVIEWKD.{lists}"] = _only(sides, f"as the images of {cfg.DATASET.TYPE} give")
    return rules


def _classes_stay(classes: int) -> Rule:
    def allowed(ratios: Sequence[float]) -> bool:
        try:
            pruned_count(max(ratios), classes)
        except ValueError:
            return False
        return True

    return allowed, f"ratios at which of {classes} classes the target and one other class must stay"
