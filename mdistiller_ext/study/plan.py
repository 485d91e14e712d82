"""A study file: which arms, students and seeds are compared, and what is claimed about them."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from itertools import chain, groupby, product
from math import prod
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from ..config import FILES, acts, as_pairs, load_cfg, located, rule_of
from ..engine.environment import imported
from ..errors import ConfigError, bare, brief, counted
from ..inert import effect, inert
from ..packaged import beside
from ..sections import SECTIONS, SHARED
from ..settings import NAME, PATH, leaves
from ..yaml_file import read_yaml

KEYS = {
    "name": str,
    "note": str,
    "students": dict,
    "seeds": list,
    "arms": dict,
    "baseline": str,
    "alone": str,
    "options": dict,
    "claims": dict,
}
OPTIONAL = {"note", "baseline", "alone", "options", "claims"}
ARM_KEYS = {"cfg", "options", "seeds", "grid"}
SEEDS = "different integers"
PRINTABLE = "a name in printable characters"
MOST_CELLS = 1000  # of a grid
KINDS = {str: "text", list: "a list", dict: "entries NAME: VALUE"}
# Settings that the study makes for each run.
RESERVED = {
    "SOLVER.SEED": "`seeds` lists them",
    "EXPERIMENT.NAME": "a run's name is its student, arm and seed",
    "EXPERIMENT.PROJECT": "a study's runs are in one folder",
    "LOG.PREFIX": "--output names the folder of all studies",
}
RUNS = "runs"  # the folder of the runs, in the study's


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Attributes:
        student, arm: as the study file names them.
        cfg: its complete config; the run's folder is LOG.PREFIX/EXPERIMENT.PROJECT/name.
    """

    student: str
    arm: str
    seed: int
    name: str
    cfg: CfgNode

    @property
    def folder(self) -> Path:
        return Path(self.cfg.LOG.PREFIX, self.cfg.EXPERIMENT.PROJECT, self.name)


@dataclass(frozen=True)
class Study:
    """A study file with all its jobs.

    Attributes:
        arms: a grid's cells in its place.
        grids: arm with a grid -> cell -> the settings that it has of the grid.
        baseline, alone: the arms that the others are compared with; each may be "", none.
        claims: student -> arm -> claimed points over the baseline; together they are the family
            that the p values are corrected for.
        note: what a reader of the report must know, or "".
        jobs: in the order in which they run: seed by seed, so that what is finished at any time
            is a smaller study. Arms that follow each other with the same `seeds` of their own run
            so together, after those before them.
        folder: where its runs and its report are.
        file: the study file, as it was named; file_sha256: of its bytes.
    """

    name: str
    note: str
    students: list[str]
    arms: list[str]
    grids: dict[str, dict[str, dict[str, Any]]]
    baseline: str
    alone: str
    claims: dict[str, dict[str, float]]
    jobs: list[Job]
    folder: Path
    file: Path
    file_sha256: str


def read_study(file: Path, output: Path, options: Sequence[str] = ()) -> Study:
    """Read a study file; `options` (KEY VALUE pairs) hold for every run, but an arm's own win.

    They and the file's own `options` may have keys of methods and of parts of them: those hold for
    the arms that have these, of which there must be one.

    Raises:
        ConfigError: the file is no study, or a config of it is wrong; all faults at once.
    """
    tree = read_yaml(file, str(file))
    faults = _faults(tree)
    if faults:
        raise ConfigError("\n".join(f"{file}: {fault}" for fault in faults))
    grids = {arm: _cells(arm, node) for arm, node in tree["arms"].items() if "grid" in node}
    tree["arms"] = _expanded(tree["arms"])
    common = _options(tree, file) | as_pairs(options)
    jobs, wrong = [], [f"{file}: {fault}" for fault in _reserved(tree, common)]
    alike: dict[tuple[str, str], CfgNode] = {}  # reading a config takes its time
    is_seed = rule_of("SOLVER.SEED")[0]
    for student, arm, seed in _in_order(tree):
        node = tree["arms"][arm]
        name = slug(f"{student},{arm},seed{seed}")
        own = {"SOLVER.SEED": seed, "EXPERIMENT.NAME": name, "EXPERIMENT.PROJECT": RUNS}
        own |= {"LOG.PREFIX": str(output / slug(tree["name"]))}
        settings = _options(node, file) | own
        cfg_file = beside(file, tree["students"][student]) / node["cfg"]
        try:
            cfg = alike.get((student, arm))
            if cfg is None or not is_seed(seed):
                cfg = load_cfg(cfg_file, [*chain.from_iterable(settings.items())], common)
            cfg = alike[student, arm] = _seeded(cfg, seed, name)
        except ConfigError as error:
            wrong += [f"{file}: {arm}: {line}" for line in str(error).splitlines()]
            continue
        if student != cfg.DISTILLER.STUDENT:
            wrong.append(
                f"{file}: students: {student}: is not what runs: DISTILLER.STUDENT is "
                f"{cfg.DISTILLER.STUDENT}; call it so, or name a folder of its configs"
            )
        jobs.append(Job(student, arm, seed, name, cfg))
    wrong += [
        f"{file}: arms: {arm}: grid: is chosen on held-out images, never on the test set: "
        f"DATASET.HOLDOUT is 0, expected a share of the training images, as 0.1"
        for arm, cells in grids.items()
        if any(cfg.DATASET.HOLDOUT == 0 for (_, cell), cfg in alike.items() if cell in cells)
    ]
    idle = [key for key in common if not any(acts(key, cfg) for cfg in alike.values())]
    if idle and not wrong:
        known = ", ".join(dict.fromkeys((*sorted(SHARED), *(j.cfg.DISTILLER.TYPE for j in jobs))))
        wrong = [f"{file}: {key}: no arm uses it; they have {known}" for key in idle]
    if wrong:
        raise ConfigError("\n".join(dict.fromkeys(wrong)))
    return Study(
        tree["name"],
        tree.get("note", ""),
        list(tree["students"]),
        list(tree["arms"]),
        grids,
        tree.get("baseline", ""),
        tree.get("alone", ""),
        tree.get("claims", {}),
        jobs,
        output / slug(tree["name"]),
        file,
        hashlib.sha256(file.read_bytes()).hexdigest(),
    )


def _cells(arm: str, node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> settings of each cell of an arm's grid; without one it is the arm itself."""
    grid = dict(leaves(node.get("grid", {})))
    cells = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    return {
        " ".join([arm, *(f"{key.rpartition('.')[2]} {value}" for key, value in cell.items())]): cell
        for cell in cells
    }


def _expanded(arms: dict[str, Any]) -> dict[str, Any]:
    """The arms that run: those of a grid are its cells."""
    return {
        name: {
            **{key: value for key, value in node.items() if key != "grid"},
            "options": dict(leaves(node.get("options", {}))) | cell,
        }
        for arm, node in arms.items()
        for name, cell in _cells(arm, node).items()
    }


def _options(node: dict[str, Any], file: Path) -> dict[str, Any]:
    """The options that a study file or an arm of it has; of files that lie beside it, where."""
    options = dict(leaves(node.get("options", {})))
    return options | {k: located(options[k], [file.parent]) for k in FILES if k in options}


def _seeded(cfg: CfgNode, seed: int, name: str) -> CfgNode:
    """The config of another seed's run of the same arm; the two share what they have in common."""
    cfg = copy(cfg)
    cfg.defrost()
    cfg.SOLVER, cfg.EXPERIMENT = cfg.SOLVER.clone(), cfg.EXPERIMENT.clone()
    cfg.SOLVER.SEED, cfg.EXPERIMENT.NAME = seed, name
    cfg.freeze()
    return cfg


def _in_order(tree: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """(student, arm, seed) of every run, in the order in which they run."""
    own = {arm: node.get("seeds") for arm, node in tree["arms"].items()}
    for seeds, arms in groupby(own, own.get):
        together = list(arms)
        for seed in seeds or tree["seeds"]:
            yield from ((student, arm, seed) for student in tree["students"] for arm in together)


def inert_arms(study: Study) -> list[str]:
    """One line for each thing in a study that never acts, and for arms that are the same run."""
    cfgs = {(job.student, job.arm): job.cfg for job in study.jobs}
    idle: dict[tuple[str, str], list[str]] = defaultdict(list)
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (student, arm), cfg in cfgs.items():
        for line in inert(cfg):
            idle[student, line].append(arm)
        alike[student, json.dumps(effect(cfg), sort_keys=True)].append(arm)
    lines = [f"{student}: {', '.join(arms)}: {line}" for (student, line), arms in idle.items()]
    return lines + [
        f"{student}: {', '.join(arms)}: are the same run, for nothing that acts differs"
        for (student, _), arms in alike.items()
        if len(arms) > 1
    ]


def conditions_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's config says and two runs that are compared must have in common. A key that did
    not exist when the run was made had its default's effect."""
    apart = ("SOLVER.SEED", "DATASET.ROOT", "DATASET.NUM_WORKERS")
    sections = (
        leaves(SECTIONS[section].defaults() | config[section], f"{section}.")
        for section in ("SOLVER", "DATASET")
    )
    found = {key: value for key, value in chain(*sections) if key not in apart}
    found["LOG.EVAL_EVERY"] = config["LOG"].get("EVAL_EVERY", 1)  # new, and once 1
    return found


def mixed(
    study: Study, conditions: Mapping[str, Mapping[str, Any]], allowed: Iterable[str]
) -> list[str]:
    """One line for each condition that differs between runs of a student and is not allowed to.

    Args:
        conditions: by the name of a run.
    """
    lines = []
    # What a grid of the solver compares differs on purpose.
    swept = {key for cells in study.grids.values() for cell in cells.values() for key in cell}
    allowed = {*allowed, *(key for key in swept if key.startswith("SOLVER."))}
    for student in study.students:
        seen: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for job in study.jobs:
            if job.student == student and job.name in conditions:
                for key, value in conditions[job.name].items():
                    seen[key][json.dumps(value)].append(job.name)
        for key, values in seen.items():
            if len(values) > 1 and key not in allowed:
                text = "; ".join(
                    f"{v} in {counted(len(n), 'run')}, as {n[0]}" for v, n in values.items()
                )
                lines.append(f"{student}: {key} differs between runs: {text}; --allow {key} mixes")
    return lines


def foreseen(study: Study, allowed: Iterable[str]) -> list[str]:
    """What a report would object to and the configs tell: one line for each thing."""
    of_arms = {(job.student, job.arm): _planned(job.cfg) for job in study.jobs}
    planned = {job.name: of_arms[job.student, job.arm] for job in study.jobs}
    lines = [f"report will refuse these runs: {line}" for line in mixed(study, planned, allowed)]
    seeds: dict[str, set[int]] = defaultdict(set)
    for job in study.jobs:
        seeds[job.arm].add(job.seed)
    claimed = [(student, arm) for student, arms in study.claims.items() for arm in arms]
    few: dict[int, list[str]] = defaultdict(list)
    for student, arm in claimed:
        common = seeds[arm] & seeds[study.baseline]
        if not common or arm == study.baseline:
            lines.append(f"{student}, {arm}: no seed has both it and {study.baseline}")
        else:
            few[len(common)].append(f"{student}, {arm}")
    with suppress(ImportError):  # scipy, which only a report needs
        from .statistics import too_few

        lines += [
            f"{'; '.join(names)}: {reason}"
            for pairs, names in few.items()
            if (reason := too_few(pairs, len(claimed)))
        ]
    return lines


def _planned(cfg: CfgNode) -> dict[str, Any]:
    """The conditions of a run, as far as its config tells."""
    node, found = cfg.DISTILLER, conditions_of(cfg)
    if (modules := imported(cfg)) is not None:
        found["imported"] = modules
    if node.TYPE != "NONE":
        parts = [node.TEACHER, node.TEACHER_CKPT, *node.ASSISTANTS]
        found["teacher"] = ", ".join(filter(None, parts))
    return found


def _reserved(tree: dict[str, Any], common: dict[str, Any]) -> list[str]:
    """The options that the study itself sets."""
    given = {"options": common}
    for arm, node in tree["arms"].items():
        given[f"arms: {arm}: options"] = dict(leaves(node.get("options", {})))
    return [
        f"{place}: {key}: is the study's own: {reason}"
        for place, options in given.items()
        for key, reason in RESERVED.items()
        if key in options
    ]


def _faults(tree: Any) -> list[str]:
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"found a {type(tree).__name__}"
        return [f"{found}, expected {', '.join(KEYS)}"]
    faults = [
        f"{bare(key)}: no such key, expected {', '.join(KEYS)}" for key in tree if key not in KEYS
    ]
    for key, kind in KEYS.items():
        if key not in tree:
            faults += [] if key in OPTIONAL else [f"{key}: is missing"]
        elif not isinstance(tree[key], kind) or (key not in OPTIONAL and not tree[key]):
            faults.append(_wrong(key, tree[key], KINDS[kind]))
        elif key in ("students", "arms"):
            names = [name for name in tree[key] if not _is_text(name)]
            faults += [_wrong(key, name, PRINTABLE) for name in names]
    if faults:
        return faults
    if not NAME[0](slug(tree["name"])):
        faults.append(_wrong("name", tree["name"], "1 to 200 letters and digits"))
    if not _are_seeds(tree["seeds"]):
        faults.append(_wrong("seeds", tree["seeds"], SEEDS))
    for student, folder in tree["students"].items():
        if not _is_path(folder):
            faults.append(_wrong(f"students: {student}", folder, PATH[1]))
    for arm, node in tree["arms"].items():
        if not isinstance(node, dict) or not {"cfg"} <= set(node) <= ARM_KEYS:
            faults.append(_wrong(f"arms: {arm}", node, "cfg, options, seeds and grid"))
        elif not _is_path(node["cfg"]):
            faults.append(_wrong(f"arms: {arm}: cfg", node["cfg"], PATH[1]))
        elif not isinstance(node.get("options", {}), dict):
            faults.append(_wrong(f"arms: {arm}: options", node["options"], "entries KEY: VALUE"))
        elif not _are_seeds(node.get("seeds", [0])):
            faults.append(_wrong(f"arms: {arm}: seeds", node["seeds"], SEEDS))
        elif "grid" in node:
            faults += _grid_faults(f"arms: {arm}: grid", node)
    if faults:
        return faults
    single = [arm for arm, node in tree["arms"].items() if "grid" not in node]
    for key in ("baseline", "alone"):
        if key in tree and tree[key] not in single:
            faults.append(f"{key}: {_no_arm(tree[key], tree)}")
    if tree.get("claims") and "baseline" not in tree:
        faults.append("claims: are over a baseline, and `baseline` is missing")
    for student, claims in tree.get("claims", {}).items():
        if student not in tree["students"]:
            faults.append(f"claims: {brief(student)} is no student")
            continue
        if not isinstance(claims, dict):
            faults.append(_wrong(f"claims: {student}", claims, "arm: points"))
            continue
        for arm, points in claims.items():
            if arm not in single:
                faults.append(f"claims: {_no_arm(arm, tree)}")
            elif type(points) not in (int, float) or not -100 <= points <= 100:
                faults.append(_wrong(f"claims: {arm}", points, "points from -100 to 100"))
    names = [name for arm, node in tree["arms"].items() for name in _cells(arm, node)]
    faults += [_wrong("arms", name, PRINTABLE) for name in names if not _is_text(name)]
    for key, taken in (("students", list(tree["students"])), ("arms", names)):
        if len(set(map(slug, taken))) < len(taken):
            faults.append(f"{key}: two names differ by special characters only")
    return faults


def _grid_faults(place: str, node: dict[str, Any]) -> list[str]:
    if not isinstance(node["grid"], dict) or not node["grid"]:
        return [_wrong(place, node["grid"], "entries KEY: [VALUE, VALUE, ...]")]
    faults, options = [], dict(leaves(node.get("options", {})))
    for key, values in leaves(node["grid"]):
        different = isinstance(values, list) and len(values) == len(set(map(str, values)))
        if not different or not values:
            faults.append(_wrong(f"{place}: {key}", values, "a list of different values"))
        elif key in options:
            faults.append(f"{place}: {key}: is in `options` too")
    if not faults and prod(len(values) for _, values in leaves(node["grid"])) > MOST_CELLS:
        faults.append(f"{place}: has more than {MOST_CELLS} cells, expected fewer values")
    return faults


def _no_arm(name: Any, tree: dict[str, Any]) -> str:
    grid = isinstance(name, str) and name in tree["arms"]
    return f"{brief(name)} is {'a grid, expected a single arm' if grid else 'no arm'}"


def _wrong(key: str, value: Any, expected: str) -> str:
    return f"{key}: {brief(value)} is not allowed, expected {expected}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _are_seeds(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) == len(set(map(str, value)))
        and all(type(seed) is int for seed in value)
    )


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and PATH[0](value)


def slug(text: str) -> str:
    """A name as a file name."""
    return re.sub(r"[^\w.,=+-]+", "_", text).strip("_")
