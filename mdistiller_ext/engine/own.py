"""Whole runs of one's own networks and images, from Python."""

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from ..config import load_cfg
from ..data import DATASETS, Source
from ..data.arrays import Split, as_sets, as_split
from ..errors import ConfigError, RunError, Stopped, brief
from ..models.zoo import OWN
from ..settings import NAME, leaves
from ..teacher import Weights, digest, load_into, load_weights
from .build import pick_device
from .folder import is_place, plain
from .identity import GIVEN, network_hash
from .training import train

STUDENT, TEACHER, DATA = f"{GIVEN}student", f"{GIVEN}teacher", "given"
OPTIONS = {
    "--resume": "resume=True",
    "--fresh": "fresh=True",
    "--device ": "device ",
    "EXPERIMENT.NAME": "name",
}


def distill(
    student: nn.Module,
    teacher: nn.Module,
    train_images: Split,
    test_images: Split,
    *,
    method: str = "DKD",
    options: Sequence[Any] = (),
    name: str = "",
    device: str | torch.device | None = None,
    resume: bool = False,
    fresh: bool = False,
) -> tuple[dict[str, Any], Path]:
    """Train a student from a teacher as `mdistiller-ext train` does, with its record and folder.

    Args:
        student: gives logits (B, C), or (logits, features), for images (B, 3, side, side). Its
            weights are where training begins, and afterwards those of the last epoch.
        teacher: likewise; it is not changed.
        train_images, test_images: (images uint8 (N, 3, side, side), labels (N,)).
        method: DISTILLER.TYPE.
        options: KEY VALUE KEY VALUE ..., as on the command line.
        name: of the run's folder; empty: EXPERIMENT.NAME, or a name that holds a digest of
            networks, images and settings, so that each call has a folder of its own, and the same
            call finds its run.
        device: None takes a GPU where there is one.
        resume: go on with the same run where it stopped.
        fresh: begin anew; a run that is there is kept as NAME,old1.

    Returns:
        The record and the folder.

    Raises:
        ConfigError, RunError, Stopped: as `train`; the student is then as it was.
    """
    state = copy.deepcopy(teacher.state_dict())
    weights = Weights(state, Path(type(teacher).__name__), digest(state))
    given = {"DATASET.TYPE": DATA, "DISTILLER.TYPE": method, "DISTILLER.STUDENT": STUDENT}
    given |= {"DISTILLER.TEACHER": TEACHER, "EXPERIMENT.TAG": "own"}
    splits = as_split(*train_images, "train"), as_split(*test_images, "test")
    with _in_python(), _named(student, teacher, *splits):
        words = [word for pair in given.items() for word in pair]
        cfg = load_cfg(None, [*words, *options])
        if name and not NAME[0](name):
            raise ConfigError(f"name: {brief(name)} is not allowed, expected {NAME[1]}")
        on = device if isinstance(device, torch.device) else pick_device(device)
        record, folder = train(
            cfg,
            name or cfg.EXPERIMENT.NAME or _name(cfg, splits),
            on,
            resume=resume,
            weights=weights,
            fresh=fresh,
        )
    load_into(student, load_weights(folder / "student_last"), "the student")
    return record, folder


def _name(cfg: CfgNode, splits: Sequence[Split]) -> str:
    """Of a run without one: the tag, the method, the seed and a digest of all that it is of."""
    side = splits[0][0].shape[-1]
    networks = [network_hash(OWN[role](num_classes=0), side) for role in (STUDENT, TEACHER)]
    tensors = {str(n): tensor for n, tensor in enumerate(chain.from_iterable(splits))}
    settings = {k: v for k, v in leaves(plain(cfg)) if not is_place(k)}
    content = json.dumps([networks, digest(tensors), settings]).encode()
    own = hashlib.sha256(content).hexdigest()[:8]
    return f"{cfg.EXPERIMENT.TAG},{cfg.DISTILLER.TYPE},seed{cfg.SOLVER.SEED},{own}"


@contextmanager
def _in_python() -> Iterator[None]:
    """What messages call an option of the command is an argument here."""
    try:
        yield
    except (ConfigError, RunError, Stopped) as error:
        text = str(error)
        for option, argument in OPTIONS.items():
            text = text.replace(option, argument)
        error.args = (text, *error.args[1:])
        raise


@contextmanager
def _named(student: nn.Module, teacher: nn.Module, *splits: Split) -> Iterator[None]:
    """What a config names it by, for the time of a run."""
    sets = train, _ = as_sets(*splits)
    known = torch.bincount(train.targets.clamp_min(0)).tolist(), train.side
    OWN[STUDENT] = lambda num_classes: copy.deepcopy(student)
    OWN[TEACHER] = lambda num_classes: copy.deepcopy(teacher)
    DATASETS[DATA] = Source(lambda settings: sets, lambda settings: known)
    try:
        yield
    finally:
        del OWN[STUDENT], OWN[TEACHER], DATASETS[DATA]
