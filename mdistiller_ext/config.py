"""The configuration: defaults, types, allowed values, and reading it from YAML and options."""

import os
import warnings
from ast import literal_eval
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import SequenceMatcher, get_close_matches
from functools import reduce
from operator import getitem
from pathlib import Path
from types import MappingProxyType
from typing import Any

from yacs.config import CfgNode as CN

from .data import Facts, facts
from .distillers import RECIPES, distiller_dict, source
from .distillers.recipes import Layout, keys_of
from .errors import ConfigError, RunError, bare, brief
from .plugins import MODULES, import_modules
from .sections import SECTIONS, SHARED
from .settings import Rule, Settings, leaves, only
from .solver import rules_beside as solver_rules
from .toolkit.forks import fork_hint
from .toolkit.methods import toolkit_node
from .toolkit.rules import rules_beside, toolkit_rule
from .yaml_file import read_yaml

TEMPERATURES = ("T", "TAU", "TEMP", "TEMPERATURE")  # what methods call the same setting
ANY: Rule = (lambda v: True, "a value")
# Paths in which ~ and $VARIABLES are what a shell makes of them.
HOMES = [("LOG", "PREFIX"), ("DATASET", "ROOT")]
HOMES += [("DISTILLER", key) for key in ("TEACHER_CKPT", "TEACHER_CFG", "TEACHER_TABLE_ROOT")]


FILES = [f"DISTILLER.{key}" for key in ("TEACHER_CKPT", "TEACHER_CFG", "ASSISTANTS")]
YAML = (".yaml", ".yml")
# Where things lie, not what they are.
PLACES = (
    "EXPERIMENT.",
    "LOG.",
    "DATASET.ROOT",
    "DATASET.NUM_WORKERS",
    "DISTILLER.TEACHER_CKPT",
    "DISTILLER.TEACHER_CFG",
    "DISTILLER.TEACHER_TABLE_ROOT",
)


def is_place(key: str) -> bool:
    """Whether a key may change between a run and its continuation: no number depends on it."""
    return key.startswith((*PLACES, "DATASET.TEST.BATCH_SIZE"))


def layout() -> Layout:
    """Every key of ours -> who declares it, by which name; also of what was registered."""
    nodes = {name: recipe.layout for name, recipe in RECIPES.items()}
    nodes |= {node: keys_of(part) for node, part in (SECTIONS | _own_methods()).items()}
    return {
        f"{node}.{place}": part for node, places in nodes.items() for place, part in places.items()
    }


def rules() -> dict[str, Rule]:
    """The rule of every key of ours."""
    places = layout()
    of_part = {part: part.rules() for part in {part for part, _ in places.values()}}
    return {key: of_part[part][name] for key, (part, name) in places.items()}


def _own_methods() -> dict[str, type[Settings]]:
    """The settings of methods that are no recipes."""
    found = {name: getattr(method, "SETTINGS", None) for name, method in distiller_dict.items()}
    return {name: part for name, part in found.items() if part}


def get_cfg() -> CN:
    """A fresh config with the toolkit's sections, keys and defaults, and this project's.

    What differs from the toolkit: LOG.WANDB is off. The nodes of the toolkit's other methods are
    added by `load_cfg` where they are asked for.
    """
    cfg = CN()
    for section, part in SECTIONS.items():
        *above, last = section.split(".")
        reduce(getitem, above, cfg)[last] = CN(part.defaults())
    for name, recipe in RECIPES.items():
        cfg[name] = recipe.node()
    for name, part in _own_methods().items():
        cfg[name] = CN(part.defaults())
    return cfg


def rule_of(key: str) -> Rule:
    """The rule of a key alone."""
    return rules().get(key) or toolkit_rule(key) or ANY


def load_cfg(
    file: str | Path | None,
    options: Sequence[Any] = (),
    shared: Mapping[str, Any] = MappingProxyType({}),
) -> CN:
    """A checked, frozen config: the defaults, then a YAML file if any, then `KEY VALUE` pairs.

    Of pairs with the same key the last one counts. A relative path of TEACHER_CKPT, TEACHER_CFG or
    ASSISTANTS is looked for where it was written, beside the YAML file or for an option in the
    working folder, then in the other of the two; found in neither, it is the working folder's.

    Args:
        shared: what several configs are given, between the file and the options. Keys of methods
            and of parts of methods that are not this config's are passed over; in the file or the
            options they are faults.

    Raises:
        ConfigError: all faults at once, one a line.
    """
    over = as_pairs(options)
    tree = read_yaml(Path(file), f"--cfg {file}") if file else over
    if tree is None or tree == {}:
        raise ConfigError(f"--cfg {file}: sets nothing, expected sections of keys")
    if not isinstance(tree, dict):
        raise ConfigError(f"--cfg {file}: found a {type(tree).__name__}, expected sections of keys")
    pairs = list(leaves(tree))
    counts = Counter(key for key, _ in pairs)
    faults = {key: f"{key}: is given {n} times in {file}" for key, n in counts.items() if n > 1}
    modules = _as_type({**dict(pairs), **shared, **over}.get("EXPERIMENT.IMPORT", []), list)
    import_modules(modules if type(modules) is list and MODULES[0](modules) else [])
    cfg = get_cfg()
    method = _text("TYPE", {**dict(pairs), **shared, **over}, cfg)
    own = dict(pairs) | over
    values = dict(pairs) | {k: v for k, v in shared.items() if _is_of(k, method)} | over
    faults |= _add_toolkit_node(values, cfg)
    faults = check(cfg, faults | _merge(values, cfg))
    if "DISTILLER.TYPE" not in faults:
        faults |= _unused(own, cfg)
    if faults:
        raise ConfigError("\n".join(faults.values()))
    for section, key in HOMES:
        cfg[section][key] = os.path.expandvars(os.path.expanduser(cfg[section][key]))
    folders = [Path(), Path(file).parent] if file else [Path()]
    for key in FILES:
        written = key in values and key not in {**shared, **over}
        node, name = cfg.DISTILLER, key.split(".")[1]
        node[name] = located(node[name], folders[::-1] if written else folders)
    cfg.freeze()
    return cfg


def located(value: Any, folders: Sequence[Path]) -> Any:
    """A path, or each YAML file of a list of names, in the first of these folders that has it."""
    if isinstance(value, list):
        files = {name: located(name, folders) for name in value if str(name).endswith(YAML)}
        return [files.get(name, name) for name in value]
    places = (folder / str(value) for folder in folders)
    return next((str(place) for place in places if value and place.is_file()), value)


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


def acts(key: str, cfg: CN) -> bool:
    """Whether a key is one of the shared sections or of the method, of parts that it is made of."""
    return _is_of(key, cfg.DISTILLER.TYPE) and key not in _idle(cfg)


def _is_of(key: str, method: str) -> bool:
    return key.split(".")[0] in SHARED or key.split(".")[0] == method


def _idle(cfg: CN) -> set[str]:
    """The method's keys of parts that it could be made of and is not."""
    method = cfg.DISTILLER.TYPE
    if source(cfg.DISTILLER) != "ext" or method not in RECIPES:
        return set()
    recipe = RECIPES[method]
    return {f"{method}.{place}" for place in recipe.layout.keys() - recipe.acting(cfg[method])}


def shown(cfg: CN) -> CN:
    """What a run depends on: the shared sections and the node of its method."""
    sections = (*SHARED, cfg.DISTILLER.TYPE)
    return CN({section: cfg[section].clone() for section in sections if section in cfg})


def altered(cfg: CN) -> CN:
    """Of what a run depends on, what is not the default."""
    usual, tree = dict(leaves(get_cfg())), CN()
    for key, value in leaves(shown(cfg)):
        if key not in usual or usual[key] != value:
            *sections, last = key.split(".")
            inner = tree
            for section in sections:
                inner = inner.setdefault(section, CN())
            inner[last] = value
    return tree


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

    ours = rules()
    alone = {key: ours.get(key) or toolkit_rule(key) or ANY for key in values}
    if cfg.DISTILLER.TYPE == "NONE":  # nobody asks for a teacher, and the default is not ours
        del alone["DISTILLER.TEACHER"]
    if source(cfg.DISTILLER) == "mdistiller":  # its registry has been asked already
        del alone["DISTILLER.TYPE"]
    apply(alone)
    names = ["DATASET.TYPE", "DATASET.HOLDOUT", "DATASET.LIMIT", "DISTILLER.TYPE"]
    names += ["DISTILLER.STUDENT", "DISTILLER.TEACHER"]
    if not faults.keys() & set(names):
        try:
            data = facts(cfg.DATASET)
        except (ConfigError, RunError) as error:
            faults["DATASET.ROOT"] = str(error)
            return faults
        apply(rules_beside(cfg, data))
        _check_method(cfg, data, faults, apply)
        if not {key.split(".")[0] for key in faults} & {"SOLVER", cfg.DISTILLER.TYPE}:
            apply(solver_rules(cfg, *_own_labels(cfg)))
    return faults


def _check_method(
    cfg: CN, data: Facts, faults: dict[str, str], apply: Callable[[Mapping[str, Rule]], None]
) -> None:
    """Add what is wrong with the settings of a method of ours beside each other."""
    method = cfg.DISTILLER.TYPE
    if source(cfg.DISTILLER) != "ext" or method not in RECIPES:
        return
    recipe, node = RECIPES[method], cfg[method]
    if any(key.startswith(f"{method}.") for key in faults):
        return
    beside = recipe.rules_beside(node, data.classes)
    apply({f"{method}.{place}": rule for place, rule in beside.items()})
    composed = recipe.read(node)
    if reason := composed.conflict:
        faults[method] = f"{method}: this combination is not allowed: {reason}"
    for name in (type(policy).__name__ for policy in composed.policies if policy.held_every):
        share = (lambda v: v > 0, f"a share above 0, as {name} takes images held out")
        apply({"DATASET.HOLDOUT": share})
        apply({"SOLVER.COMPILE": only(False, f"as {name} takes the student at other weights")})


def _own_labels(cfg: CN) -> tuple[str, str]:
    """Why a method needs one label for each image, and why its cross-entropy with the labels is not
    ours; each or ""."""
    method = cfg.DISTILLER.TYPE
    if method == "NONE":
        return "", ""
    if source(cfg.DISTILLER) != "ext" or method not in RECIPES:
        reason = f"{method} has a loss of its own with the labels"
        return reason, reason
    _, loss, policies = RECIPES[method].read(cfg[method])
    parts: tuple[Any, ...] = (loss, *policies)
    for part in parts:
        name = type(part).__name__
        if not type(part).__module__.startswith("mdistiller_ext."):
            return f"{name} is no part of mdistiller-ext", ""  # it may need one
        if part.needs_label:
            return f"{name} needs one label for each image", ""
    return "", ""


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
    method, known, idle = cfg.DISTILLER.TYPE, dict(leaves(cfg)), _idle(cfg)
    faults = {}
    for key in keys:
        if key in idle:
            faults[key] = f"{key}: does nothing, {key.split('.')[1]} is not in {method}"
        elif key in known and not _is_of(key, method):
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
                faults[key] = f"{bare(key)}: no such key{_hint(key, known) or fork_hint(key)}"
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
            faults[key] = (
                f"{key}: {brief(given)} is of the wrong type, expected "
                f"{'text' if kind is str else kind.__name__}: {rule_of(key)[1]}"
            )
    return faults


def _as_type(value: Any, kind: type) -> Any:
    """A value as yacs reads it: text that is a Python literal is that, lists and tuples are one.

    Beyond yacs, where text is expected a number is text too: a run may be named 5; and where a
    float is, an integer is one.
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
    if type(value) is int and kind is float:
        with suppress(OverflowError):
            value = float(value)
    return value


def _hint(key: str, known: Mapping[str, Any]) -> str:
    """ "; did you mean KEY?" of one that is called the same in its section, or of one like it."""
    word = key.upper()
    section, _, last = word.rpartition(".")
    names = {last, *(TEMPERATURES if last in TEMPERATURES else ())}
    own = [k for k in known if k.startswith(f"{section}." if section else "")]
    same = [k for k in own if k.rpartition(".")[2] in names]
    near = next(iter(same), "") or (section if section in known else _nearest(word, known))
    return f"; did you mean {near}?" if near else ""


def _nearest(word: str, keys: Iterable[str]) -> str:
    """The key most like a word whose section and name are each like the word's; or ""."""

    def alike(one: str, other: str) -> bool:
        near = SequenceMatcher(None, one, other).ratio() >= 0.6
        return near or one[:-1] == other or other[:-1] == one

    section, _, last = word.rpartition(".")
    for key in get_close_matches(word, keys, n=5):
        of_key, _, name = key.rpartition(".")
        if alike(last, name) and (not section or alike(section, of_key)):
            return key
    return ""
