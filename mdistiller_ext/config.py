"""The configuration: defaults, types, allowed values, and reading it from YAML and options."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode as CN

from .distillers import distiller_dict
from .errors import ConfigError
from .models import cifar_model_dict
from .pruning import pruned_count
from .toolkit.methods import toolkit_node

NUM_CLASSES = {"cifar100": 100, "digits": 10}


def get_cfg() -> CN:
    """A fresh config with the toolkit's sections, keys and defaults, and this project's.

    What differs from the toolkit: LOG.WANDB is off. Keys of this project alone: DATASET.ROOT,
    DISTILLER.TEACHER_CKPT, .TEACHER_CFG, .TEACHER_TABLE, .TEACHER_TABLE_DTYPE,
    .TEACHER_TABLE_ROOT, .SOURCE and .FIX_UPSTREAM, SOLVER.SEED, .AMP, .COMPILE, .SYNC_BN and
    .CUDA_GRAPH, and the nodes of its methods. DATASET.NUM_WORKERS and LOG.TENSORBOARD_FREQ are
    accepted and have no effect. The nodes of the toolkit's other methods are added by `load_cfg`
    where they are asked for.
    """
    cfg = CN()
    cfg.EXPERIMENT = CN({"PROJECT": "distill", "NAME": "", "TAG": "default"})
    cfg.DATASET = CN({"TYPE": "cifar100", "ROOT": "./data", "NUM_WORKERS": 2})
    cfg.DATASET.TEST = CN({"BATCH_SIZE": 64})
    cfg.DISTILLER = CN({"TYPE": "NONE", "TEACHER": "ResNet50", "STUDENT": "resnet32"})
    cfg.DISTILLER.TEACHER_CKPT = ""  # a file of weights; empty: look in the usual places
    cfg.DISTILLER.TEACHER_CFG = ""  # trains the teacher where no weights are found
    cfg.DISTILLER.TEACHER_TABLE = "auto"  # keep the teacher's logits; "on" and "off" insist
    cfg.DISTILLER.TEACHER_TABLE_DTYPE = "float32"  # "float16" halves its 3.24 GB
    cfg.DISTILLER.TEACHER_TABLE_ROOT = ""  # its folder; empty: in the user's cache folder
    cfg.DISTILLER.SOURCE = "auto"  # whose method: "ext", "mdistiller", or ours where we have it
    cfg.DISTILLER.FIX_UPSTREAM = False  # mend the known faults of the toolkit's methods
    cfg.SOLVER = CN({"TRAINER": "base", "TYPE": "SGD", "BATCH_SIZE": 64, "EPOCHS": 240})
    cfg.SOLVER.LR = 0.05
    cfg.SOLVER.LR_DECAY_STAGES = [150, 180, 210]
    cfg.SOLVER.LR_DECAY_RATE = 0.1
    cfg.SOLVER.WEIGHT_DECAY = 0.0001
    cfg.SOLVER.MOMENTUM = 0.9
    cfg.SOLVER.SEED = 0
    cfg.SOLVER.AMP = "none"
    cfg.SOLVER.COMPILE = False  # torch.compile for the student, of methods without features
    cfg.SOLVER.SYNC_BN = False  # on several devices: batch norm over the whole batch
    cfg.SOLVER.CUDA_GRAPH = True  # on a GPU, where the method allows it
    cfg.LOG = CN({"TENSORBOARD_FREQ": 500, "SAVE_CHECKPOINT_FREQ": 40})
    cfg.LOG.PREFIX = "./output"
    cfg.LOG.WANDB = False
    cfg.KD = CN({"TEMPERATURE": 4, "LOSS": CN({"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9})})
    cfg.DKD = CN({"CE_WEIGHT": 1.0, "ALPHA": 1.0, "BETA": 8.0, "T": 4.0, "WARMUP": 20})
    # BETA 2.0 is what the toolkit's own files set for every pair with a ResNet-110 teacher.
    ours = {**cfg.DKD, "BETA": 2.0}
    eat = {"RANGE": 0.4, "STEP_EPOCHS": 10}
    dat = {"RANGE": 0.05, "FRACTION": 0.1}
    lp = {"RATIOS": [0.0, 0.13, 0.27, 0.4], "STEP_EPOCHS": 20}
    cfg.DKD_EAT = CN({**ours, **eat})
    cfg.DKD_DAT = CN({**ours, **dat, "GROUPS": "hardest"})
    cfg.DKD_LP = CN({**ours, **lp, "CLASSES": "lowest"})
    cfg.DKD_EAT_DAT_LP = CN({**ours, "EAT": CN(eat), "DAT": CN(dat), "LP": CN(lp)})
    return cfg


def load_cfg(file: str | Path, options: Sequence[str] = ()) -> CN:
    """A checked, frozen config: the defaults, then a YAML file, then `KEY VALUE` pairs.

    DISTILLER.TEACHER_CFG is relative to the YAML file's folder.

    Raises:
        ConfigError: all faults at once, one a line.
    """
    if len(options) % 2:
        raise ConfigError(
            f"options come as KEY VALUE pairs, found {len(options)} words: {' '.join(options)}"
        )
    pairs = [*_read(Path(file)), *zip(options[::2], options[1::2], strict=True)]
    cfg, faults = get_cfg(), []
    method = {
        key: str(dict(pairs).get(f"DISTILLER.{key}", cfg.DISTILLER[key]))
        for key in ("TYPE", "SOURCE")
    }
    if source(method) == "mdistiller":
        name = method["TYPE"]
        try:
            cfg.update(toolkit_node(name))
        except ConfigError as error:
            ours = (
                ""
                if method["SOURCE"] == "mdistiller"
                else f"one of {', '.join(distiller_dict)} or "
            )
            faults.append(
                f"DISTILLER.TYPE: {name!r} is not allowed, expected {ours}a method of mdistiller "
                f"({error})"
            )
            pairs = [pair for pair in pairs if not pair[0].startswith(f"{name}.")]
    known = dict(leaves(cfg))
    for key, value in pairs:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            faults.append(f"{key}: no such key{hint}")
            continue
        try:
            cfg.merge_from_list([key, value])
        except ValueError:
            expected = type(known[key]).__name__
            hint = " (write 4.0 for 4)" if expected == "float" else ""
            faults.append(f"{key}: {value!r} is of the wrong type, expected {expected}{hint}")
    if cfg.DISTILLER.TEACHER_CFG:
        cfg.DISTILLER.TEACHER_CFG = str(Path(file).parent / cfg.DISTILLER.TEACHER_CFG)
    faults = faults or check(cfg)
    if faults:
        raise ConfigError("\n".join(faults))
    cfg.freeze()
    return cfg


def source(node: Mapping[str, str]) -> str:
    """Whose code a DISTILLER node's TYPE runs: "ext", ours, or "mdistiller", the toolkit's."""
    if node["SOURCE"] != "auto":
        return node["SOURCE"]
    return "ext" if node["TYPE"] in distiller_dict else "mdistiller"


def shown(cfg: CN) -> CN:
    """What a run depends on: the shared sections and the node of its method."""
    sections = ["EXPERIMENT", "DATASET", "DISTILLER", "SOLVER", "LOG"]
    if cfg.DISTILLER.TYPE in cfg:
        sections.append(cfg.DISTILLER.TYPE)
    return CN({section: cfg[section].clone() for section in sections})


def _read(file: Path) -> list[tuple[str, Any]]:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"--cfg {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--cfg {file}: no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--cfg {file}: found a {type(tree).__name__}, expected sections of keys")
    return list(leaves(tree))


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a tree of sections."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check(cfg: CN) -> list[str]:
    """The faults of a config's values, one line each: key, value found, values allowed."""
    faults = []
    for key, value in leaves(shown(cfg)):
        if key == "DISTILLER.TEACHER" and cfg.DISTILLER.TYPE == "NONE":
            continue  # without distillation nobody asks for it, and the default is not ours
        if key == "DISTILLER.TYPE" and source(cfg.DISTILLER) == "mdistiller":
            continue  # it is in the toolkit's registry, or its node would not be here
        allowed, text = _RULES.get(key) or _METHOD_RULES.get(key.rsplit(".", 1)[1], _ANY)
        if value is None or not allowed(value):
            faults.append(f"{key}: {value!r} is not allowed, expected {text}")
        elif key.endswith(".RATIOS") and cfg.DATASET.TYPE in NUM_CLASSES:
            try:
                pruned_count(max(value), NUM_CLASSES[cfg.DATASET.TYPE])
            except ValueError as error:
                faults.append(f"{key}: {value!r} is not allowed: {error}")
    return faults


Rule = tuple[Callable[[Any], bool], str]
_ANY: Rule = (lambda value: True, "a value")


def _number(low: float, high: float = float("inf"), *, open_low: bool = False) -> Rule:
    left = "above" if open_low else "at least"
    text = f"a number {left} {low:g}" + ("" if high == float("inf") else f" and below {high:g}")
    return lambda v: (low < v if open_low else low <= v) and v < high, text


def _one_of(*values: str) -> Rule:
    return lambda v: v in values, "one of " + ", ".join(values)


def _list_of(item: Rule, least: int) -> Rule:
    def allowed(values: Sequence) -> bool:
        numbers = all(type(v) in (int, float) for v in values)
        return numbers and len(values) >= least and all(map(item[0], values))

    return allowed, f"a list of at least {least}, each {item[1]}"


_RULES: dict[str, Rule] = {
    "DATASET.TYPE": _one_of(*NUM_CLASSES),
    "DATASET.TEST.BATCH_SIZE": _number(1),
    "DISTILLER.TYPE": _one_of(*distiller_dict),
    "DISTILLER.TEACHER_TABLE": _one_of("auto", "on", "off"),
    "DISTILLER.TEACHER_TABLE_DTYPE": _one_of("float32", "float16"),
    "DISTILLER.SOURCE": _one_of("auto", "ext", "mdistiller"),
    "DISTILLER.TEACHER": _one_of(*cifar_model_dict),
    "DISTILLER.STUDENT": _one_of(*cifar_model_dict),
    "SOLVER.TRAINER": _one_of("base", "crd"),  # for the toolkit; here one loop serves both
    "SOLVER.TYPE": _one_of("SGD"),
    "SOLVER.AMP": _one_of("none", "bf16"),
    "SOLVER.BATCH_SIZE": _number(1),
    "SOLVER.EPOCHS": _number(1),
    "SOLVER.LR": _number(0),
    "SOLVER.LR_DECAY_STAGES": _list_of(_number(0), least=0),
    "SOLVER.LR_DECAY_RATE": _number(0),
    "SOLVER.WEIGHT_DECAY": _number(0),
    "SOLVER.MOMENTUM": _number(0, 1),
    "SOLVER.SEED": _number(0, 2**63),
    "LOG.SAVE_CHECKPOINT_FREQ": _number(1),
}
_METHOD_RULES: dict[str, Rule] = {
    "CE_WEIGHT": _number(0),
    "KD_WEIGHT": _number(0),
    "ALPHA": _number(0),
    "BETA": _number(0),
    "T": _number(0, open_low=True),
    "TEMPERATURE": _number(0, open_low=True),
    "WARMUP": _number(1),
    "RANGE": _number(-1, 1, open_low=True),
    "STEP_EPOCHS": _number(1),
    "FRACTION": (lambda v: 0 <= v <= 0.5, "a number from 0 to 0.5"),
    "RATIOS": _list_of(_number(0, 1), least=1),
    "GROUPS": _one_of("hardest", "random"),
    "CLASSES": _one_of("lowest", "random"),
    # Of the toolkit's methods.
    "FEAT_WEIGHT": _number(0),
    "REVIEWKD_WEIGHT": _number(0),
    "DISTANCE_WEIGHT": _number(0),
    "ANGLE_WEIGHT": _number(0),
    "WARMUP_EPOCHS": _number(1),
    "HINT_LAYER": (lambda v: 0 <= v <= 3, "a number from 0 to 3"),
    "MODE": _one_of("exact", "relax"),
    "K": _number(1),
}
