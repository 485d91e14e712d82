"""Whole runs of one's own networks and images, from Python."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import load_cfg
from ..data import DATASETS, Source
from ..data.arrays import Split, as_sets, as_split
from ..models.zoo import OWN
from ..teacher import Weights, digest, load_into, load_weights
from .build import pick_device
from .training import train

STUDENT, TEACHER, DATA = "given:student", "given:teacher", "given"


def distill(
    student: nn.Module,
    teacher: nn.Module,
    train_images: Split,
    test_images: Split,
    *,
    method: str = "DKD",
    options: Sequence[Any] = (),
    name: str = "own",
    device: str | torch.device | None = None,
    resume: bool = False,
) -> tuple[dict[str, Any], Path]:
    """Train a student from a teacher as `mdistiller-ext train` does, with its record and folder.

    Args:
        student: gives logits (B, C), or (logits, features), for images (B, 3, side, side). Its
            weights are where training begins, and afterwards those of the last epoch.
        teacher: likewise; it is not changed.
        train_images, test_images: (images uint8 (N, 3, side, side), labels (N,)).
        method: DISTILLER.TYPE.
        options: KEY VALUE KEY VALUE ..., as on the command line.
        name: of the run's folder; empty: the default name.
        device: None takes a GPU where there is one.

    Returns:
        The record and the folder.

    Raises:
        ConfigError, RunError, Stopped: as `train`.
    """
    state = copy.deepcopy(teacher.state_dict())
    weights = Weights(state, Path(type(teacher).__name__), digest(state))
    given = {"DATASET.TYPE": DATA, "DISTILLER.TYPE": method, "DISTILLER.STUDENT": STUDENT}
    given |= {"DISTILLER.TEACHER": TEACHER}
    splits = as_split(*train_images, "train"), as_split(*test_images, "test")
    with _named(student, teacher, *splits):
        words = [word for pair in given.items() for word in pair]
        cfg = load_cfg(None, [*words, *options])
        on = device if isinstance(device, torch.device) else pick_device(device)
        record, folder = train(cfg, name, on, resume=resume, weights=weights)
    load_into(student, load_weights(folder / "student_last"), "the student")
    return record, folder


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
