"""The configuration: defaults, types, allowed values, and reading it from YAML and options."""

import os
import warnings
from ast import literal_eval
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import reduce
from operator import getitem
from pathlib import Path
from types import MappingProxyType
from typing import Any

from yacs.config import CfgNode as CN

from .data import FACTS
from .distillers import distiller_dict
from .errors import ConfigError, bare, brief
from .rules import Rule, rule_of, rules_beside
from .toolkit.methods import toolkit_node
from .yaml_file import read_yaml

# Paths in which ~ and $VARIABLES are what a shell makes of them.
HOMES = [("LOG", "PREFIX"), ("DATASET", "ROOT")]
HOMES += [("DISTILLER", key) for key in ("TEACHER_CKPT", "TEACHER_CFG", "TEACHER_TABLE_ROOT")]
NUM_CLASSES = {name: facts.classes for name, facts in FACTS.items()}
SECTIONS = ("EXPERIMENT", "DATASET", "DISTILLER", "SOLVER", "LOG")  # what all methods share


def get_cfg() -> CN:
    """A fresh config with the toolkit's sections, keys and defaults, and this project's.

    What differs from the toolkit: LOG.WANDB is off. Keys of this project alone: DATASET.ROOT,
    DISTILLER.TEACHER_CKPT, .TEACHER_CFG, .TEACHER_TABLE, .TEACHER_TABLE_DTYPE,
    .TEACHER_TABLE_ROOT, .SOURCE and .FIX_UPSTREAM, SOLVER.SEED, .AMP, .TF32, .COMPILE, .SYNC_BN and
    .CUDA_GRAPH, LOG.EVAL_EVERY, and the nodes of its methods. DATASET.NUM_WORKERS and
    LOG.TENSORBOARD_FREQ are accepted and have no effect. The nodes of the toolkit's other methods
    are added by `load_cfg` where they are asked for.
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
    cfg.SOLVER.TF32 = False  # on a GPU: convolutions of float32 on tensor cores, as the toolkit's
    cfg.SOLVER.COMPILE = False  # torch.compile for the student, of methods without features
    cfg.SOLVER.SYNC_BN = False  # on several devices: batch norm over the whole batch
    cfg.SOLVER.CUDA_GRAPH = True  # on a GPU, where the method allows it
    cfg.LOG = CN({"TENSORBOARD_FREQ": 500, "SAVE_CHECKPOINT_FREQ": 40})
    cfg.LOG.EVAL_EVERY = 1  # epochs from one evaluation to the next; the last epoch always has one
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


def load_cfg(
    file: str | Path, options: Sequence[Any] = (), shared: Mapping[str, Any] = MappingProxyType({})
) -> CN:
    """A checked, frozen config: the defaults, then a YAML file, then `KEY VALUE` pairs.

    Of pairs with the same key the last one counts. DISTILLER.TEACHER_CFG is relative to the YAML
    file's folder.

    Args:
        shared: what several configs are given, between the file and the options. Keys of methods
            that are not this config's are passed over; in the file or the options they are faults.

    Raises:
        ConfigError: all faults at once, one a line.
    """
    over = as_pairs(options)
    tree = read_yaml(Path(file), f"--cfg {file}")
    if tree is None or tree == {}:
        raise ConfigError(f"--cfg {file}: sets nothing, expected sections of keys")
    if not isinstance(tree, dict):
        raise ConfigError(f"--cfg {file}: found a {type(tree).__name__}, expected sections of keys")
    pairs = list(leaves(tree))
    counts = Counter(key for key, _ in pairs)
    faults = {key: f"{key}: is given {n} times in {file}" for key, n in counts.items() if n > 1}
    cfg = get_cfg()
    method = _text("TYPE", {**dict(pairs), **shared, **over}, cfg)
    values = dict(pairs) | {k: v for k, v in shared.items() if acts(k, method)} | over
    faults |= _add_toolkit_node(values, cfg)
    faults = check(cfg, faults | _merge(values, cfg))
    if "DISTILLER.TYPE" not in faults:
        faults |= _unused(values, cfg)
    if faults:
        raise ConfigError("\n".join(faults.values()))
    for section, key in HOMES:
        cfg[section][key] = os.path.expandvars(os.path.expanduser(cfg[section][key]))
    if cfg.DISTILLER.TEACHER_CFG:
        cfg.DISTILLER.TEACHER_CFG = str(Path(file).parent / cfg.DISTILLER.TEACHER_CFG)
    cfg.freeze()
    return cfg


def as_pairs(options: Sequence[Any]) -> dict[str, Any]:
    """The words KEY VALUE KEY VALUE ... as key -> value, the last one of a key.

    Raises:
        ConfigError: the last key has no value.
    """
    if len(options) % 2:
        words = " ".join(map(str, options))
        raise ConfigError(
            f"options come as KEY VALUE pairs, found {len(options)} words: {brief(words)}"
        )
    return {str(key): value for key, value in zip(options[::2], options[1::2], strict=True)}


def acts(key: str, method: str) -> bool:
    """Whether a key is one of the shared sections or of this method's node."""
    return key.split(".")[0] in (*SECTIONS, method)


def source(node: Mapping[str, str]) -> str:
    """Whose code a DISTILLER node's TYPE runs: "ext", ours, or "mdistiller", the toolkit's."""
    if node["SOURCE"] in ("ext", "mdistiller"):
        return node["SOURCE"]
    return "ext" if node["TYPE"] in distiller_dict else "mdistiller"


def shown(cfg: CN) -> CN:
    """What a run depends on: the shared sections and the node of its method."""
    sections = (*SECTIONS, cfg.DISTILLER.TYPE)
    return CN({section: cfg[section].clone() for section in sections if section in cfg})


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a tree of sections; an empty section is a leaf too."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check(cfg: CN, before: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """The faults of a config: key -> a line with the value found and the values allowed.

    Args:
        before: faults found already. They come first, and hide what else is wrong with their keys.
    """
    faults, values = dict(before), dict(leaves(cfg))

    def apply(rules: Mapping[str, Rule]) -> None:
        for key, (allowed, text) in rules.items():
            if key in values and key not in faults and not allowed(values[key]):
                faults[key] = f"{key}: {brief(values[key])} is not allowed, expected {text}"

    alone = {key: rule_of(key) for key in values}
    if cfg.DISTILLER.TYPE == "NONE":  # nobody asks for a teacher, and the default is not ours
        del alone["DISTILLER.TEACHER"]
    if source(cfg.DISTILLER) == "mdistiller":  # its registry has been asked already
        del alone["DISTILLER.TYPE"]
    apply(alone)
    names = ("DATASET.TYPE", "DISTILLER.TYPE", "DISTILLER.STUDENT", "DISTILLER.TEACHER")
    if not faults.keys() & set(names):
        apply(rules_beside(cfg))
    return faults


def _add_toolkit_node(values: dict[str, Any], cfg: CN) -> dict[str, str]:
    """Add the node of the toolkit's method that the values ask for, if they do.

    Returns:
        The fault of DISTILLER.TYPE if there is no such method; its settings leave `values` then.
    """
    method = {key: _text(key, values, cfg) for key in ("TYPE", "SOURCE")}
    name = method["TYPE"]
    if source(method) != "mdistiller":
        return {}
    try:
        cfg.update(toolkit_node(name))
    except ConfigError as error:
        if name not in cfg:
            for key in [key for key in values if key.startswith(f"{name}.")]:
                del values[key]
        ours = "" if method["SOURCE"] == "mdistiller" else f"one of {', '.join(distiller_dict)} or "
        fault = (
            f"DISTILLER.TYPE: {brief(name)} is not allowed, expected {ours}a method of "
            f"mdistiller ({error})"
        )
        return {"DISTILLER.TYPE": fault}
    return {}


def _text(key: str, values: Mapping[str, Any], cfg: CN) -> str:
    """DISTILLER.TYPE or .SOURCE as they will be."""
    return str(_as_type(values.get(f"DISTILLER.{key}", cfg.DISTILLER[key]), str))


def _unused(keys: Iterable[str], cfg: CN) -> dict[str, str]:
    """The keys of methods that do not run: key -> a line that names what does instead."""
    method, known = cfg.DISTILLER.TYPE, dict(leaves(cfg))
    faults = {}
    for key in keys:
        if key in known and not acts(key, method):
            name = key.rsplit(".", 1)[1]
            near = [k for k in known if k.startswith(f"{method}.") and k.endswith(f".{name}")]
            instead = f"; {', '.join(near)} {'does' if len(near) == 1 else 'do'}" if near else ""
            faults[key] = f"{key}: does nothing with DISTILLER.TYPE {method}{instead}"
    return faults


def _merge(values: Mapping[str, Any], cfg: CN) -> dict[str, str]:
    """Put values into a config, as far as they have the type of the default there.

    Returns:
        key -> what is wrong with it.
    """
    faults, known = {}, dict(leaves(cfg))
    for key, given in values.items():
        if key not in known:
            inside = [k for k in known if k.startswith(f"{key}.")]
            if not inside:
                faults[key] = f"{bare(key)}: no such key{_hint(key, known)}"
            elif given != {}:
                faults[key] = (
                    f"{key}: {brief(given)} is not allowed, expected keys in it, as {inside[0]}"
                )
            continue
        kind = type(known[key])
        value = _as_type(given, kind)
        if type(value) is kind:
            *sections, last = key.split(".")
            reduce(getitem, sections, cfg)[last] = value
        else:
            hint = f" (write {brief(value)}.0)" if type(value) is int and kind is float else ""
            faults[key] = (
                f"{key}: {brief(given)} is of the wrong type, expected "
                f"{'text' if kind is str else kind.__name__}: "
                f"{rule_of(key)[1]}{hint}"
            )
    return faults


def _as_type(value: Any, kind: type) -> Any:
    """A value as yacs reads it: text that is a Python literal is that, lists and tuples are one.

    Beyond yacs, where text is expected a number is text too: a run may be named 5.
    """
    if isinstance(value, str):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of text that is nearly a literal
                literal = literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return value  # no literal: plain text, as all names and paths
        if kind is not str or isinstance(literal, str):
            value = literal
    if isinstance(value, (list, tuple)) and kind in (list, tuple):
        value = kind(value)
    return value


def _hint(key: str, known: Iterable[str]) -> str:
    near = get_close_matches(key.upper(), known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
