"""A study file: which arms, students and seeds are compared, and what is claimed about them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from ..config import load_cfg
from ..errors import ConfigError

KEYS = {
    "name": str,
    "students": dict,
    "seeds": list,
    "arms": dict,
    "baseline": str,
    "alone": str,
    "options": dict,
    "claims": dict,
}
OPTIONAL = {"options", "claims"}
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
        baseline, alone: the arms that the others are compared with.
        claims: student -> arm -> claimed points over the baseline; together they are the family
            that the p values are corrected for.
        folder: where its runs and its report are.
    """

    name: str
    students: list[str]
    arms: list[str]
    seeds: list[int]
    baseline: str
    alone: str
    claims: dict[str, dict[str, float]]
    jobs: list[Job]
    folder: Path


def read_study(file: Path, output: Path, options: Sequence[str] = ()) -> Study:
    """Read a study file; `options` (KEY VALUE pairs) come last in the config of every run.

    Raises:
        ConfigError: the file is no study, or a config of it is wrong; all faults at once.
    """
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: no valid YAML: {' '.join(str(error).split())}") from error
    faults = _faults(tree)
    if faults:
        raise ConfigError("\n".join(f"{file}: {fault}" for fault in faults))
    common = [*_pairs(tree.get("options", {})), *options]
    jobs, wrong = [], []
    for student, folder in tree["students"].items():
        for arm, node in tree["arms"].items():
            cfg_file = file.parent / folder / node["cfg"]
            for seed in tree["seeds"]:
                name = slug(f"{student},{arm},seed{seed}")
                own = ["SOLVER.SEED", seed, "EXPERIMENT.NAME", name, "EXPERIMENT.PROJECT", RUNS]
                own += ["LOG.PREFIX", str(output / slug(tree["name"]))]
                try:
                    cfg = load_cfg(cfg_file, [*common, *_pairs(node.get("options", {})), *own])
                except ConfigError as error:
                    wrong += [f"{file}: {arm}: {line}" for line in str(error).splitlines()]
                    break
                jobs.append(Job(student, arm, seed, name, cfg))
    if wrong:
        raise ConfigError("\n".join(dict.fromkeys(wrong)))
    return Study(
        tree["name"],
        list(tree["students"]),
        list(tree["arms"]),
        tree["seeds"],
        tree["baseline"],
        tree["alone"],
        tree.get("claims", {}),
        jobs,
        output / slug(tree["name"]),
    )


def _faults(tree: Any) -> list[str]:
    if not isinstance(tree, dict):
        return [f"found a {type(tree).__name__}, expected {', '.join(KEYS)}"]
    faults = [f"{key}: no such key, expected {', '.join(KEYS)}" for key in tree if key not in KEYS]
    for key, kind in KEYS.items():
        if key not in tree:
            faults += [] if key in OPTIONAL else [f"{key}: is missing"]
        elif not isinstance(tree[key], kind) or (key not in OPTIONAL and not tree[key]):
            faults.append(f"{key}: {tree[key]!r} is not allowed, expected a {kind.__name__}")
    if faults:
        return faults
    seeds = tree["seeds"]
    if not all(type(seed) is int for seed in seeds) or len(set(seeds)) < len(seeds):
        faults.append(f"seeds: {seeds!r} is not allowed, expected different integers")
    for arm, node in tree["arms"].items():
        if not isinstance(node, dict) or not {"cfg"} <= set(node) <= {"cfg", "options"}:
            faults.append(f"arms: {arm}: {node!r} is not allowed, expected cfg and options")
    for key in ("baseline", "alone"):
        if tree[key] not in tree["arms"]:
            faults.append(f"{key}: {tree[key]!r} is no arm")
    for student, claims in tree.get("claims", {}).items():
        if student not in tree["students"]:
            faults.append(f"claims: {student!r} is no student")
        elif not isinstance(claims, dict):
            faults.append(f"claims: {student}: {claims!r} is not allowed, expected arm: points")
        else:
            faults += [f"claims: {arm!r} is no arm" for arm in claims if arm not in tree["arms"]]
    slugs = [slug(str(arm)) for arm in tree["arms"]]
    if len(set(slugs)) < len(slugs):
        faults.append("arms: two names differ by special characters only")
    return faults


def _pairs(options: dict[str, Any]) -> list[Any]:
    return [word for pair in options.items() for word in pair]


def slug(text: str) -> str:
    """A name as a file name."""
    return re.sub(r"[^\w.,=+-]+", "_", text).strip("_")
