"""Teacher assistants (Mirzadeh et al., AAAI 2020): a chain of runs from a large teacher to a small
student, each link a run of its own, whose last epoch's weights teach the next."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from ..config import load_cfg
from ..errors import ConfigError
from ..inert import effect
from ..settings import leaves
from .folder import content_digest, plain
from .record import read_record

# What every link has from the config at the end of the chain.
SHARED = ("DATASET", "LOG", "EXPERIMENT")
TEACHER = ("TEACHER", "TEACHER_CKPT", "TEACHER_CFG", "TEACHER_TABLE", "TEACHER_TABLE_ROOT")


def link(cfg: CfgNode) -> CfgNode:
    """The config of the run that trains the last of DISTILLER.ASSISTANTS.

    An assistant that is a network is trained as the config says; one that is a YAML file as that
    says, with the chain's data, teacher, seed and folders.

    Raises:
        ConfigError: a file does not fit.
    """
    cfg = cfg.clone()
    cfg.defrost()
    *before, last = cfg.DISTILLER.ASSISTANTS
    if last.endswith((".yaml", ".yml")):
        data = [word for pair in leaves(cfg.DATASET, "DATASET.") for word in pair]
        own = load_cfg(last, data)
        if own.DISTILLER.ASSISTANTS or own.DISTILLER.TYPE == "NONE":
            raise ConfigError(f"DISTILLER.ASSISTANTS: {last}: expected one link, with a teacher")
        own.defrost()
        own.update({section: cfg[section] for section in SHARED})
        own.DISTILLER.update({key: cfg.DISTILLER[key] for key in TEACHER})
        own.SOLVER.SEED = cfg.SOLVER.SEED
    else:
        own = cfg
        own.DISTILLER.STUDENT = last
    own.DISTILLER.ASSISTANTS = before
    own.EXPERIMENT.NAME = name(own)
    own.freeze()
    return own


def name(cfg: CfgNode) -> str:
    """Of a link's folder: equal for links that are the same run, which chains then share.

    A file of weights counts by its content, the links before by their own names.
    """
    node, facts = cfg.DISTILLER, effect(cfg)
    if node.TEACHER_CKPT and Path(node.TEACHER_CKPT).is_file():
        facts["DISTILLER.TEACHER_CKPT"] = content_digest(Path(node.TEACHER_CKPT))
    if node.ASSISTANTS:
        facts["DISTILLER.ASSISTANTS"] = link(cfg).EXPERIMENT.NAME
    content = json.dumps(facts, sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    student = node.STUDENT.replace(":", "_").replace("/", "_")
    return f"assistant,{student},{node.TYPE},{digest},seed{cfg.SOLVER.SEED}"


def assistant(cfg: CfgNode, device: torch.device) -> Path:
    """The file of the last assistant's weights, which is trained if it has not been yet.

    Another process that trains it is waited for.
    """
    from .training import train

    own = link(cfg)
    _, folder = train(own, own.EXPERIMENT.NAME, device, resume=True, patience=math.inf)
    return folder / "student_last"


def folder(cfg: CfgNode) -> Path:
    """Of the run that trains the last assistant."""
    own = link(cfg)
    return Path(own.LOG.PREFIX, own.EXPERIMENT.PROJECT, own.EXPERIMENT.NAME)


def links(cfg: CfgNode) -> list[CfgNode]:
    """The configs of the runs that train the assistants, in order."""
    found: list[CfgNode] = []
    while cfg.DISTILLER.ASSISTANTS:
        cfg = link(cfg)
        found.insert(0, cfg)
    return found


def facts(cfg: CfgNode) -> list[dict[str, Any]]:
    """For the record: the runs before this one, in order."""
    if not cfg.DISTILLER.ASSISTANTS:
        return []
    own = link(cfg)
    record = read_record(folder(cfg) / "record.json")
    return [
        *record["chain"],
        {
            "name": record["name"],
            "student": own.DISTILLER.STUDENT,
            "method": own.DISTILLER.TYPE,
            "epochs": len(record["epochs"]),
            "last_epoch_top1": record["last_epoch_top1"],
            "config": plain(own),
        },
    ]
