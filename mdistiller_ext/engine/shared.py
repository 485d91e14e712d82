"""What the runs of one process have in common."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Dataset, ImageSet, get_dataset
from ..data.arrays import SMALLER
from ..distillers import Distiller
from ..memory import check_memory
from ..sections import Parts
from ..teacher import TeacherTable, Weights, digest, load_weights
from .build import build_table
from .replicas import World
from .stop import StopSignals


class Shared:
    """What the runs of one process share: data on the device, teachers' answers, being stopped."""

    def __init__(self, device: torch.device, stop: StopSignals, world: World | None = None) -> None:
        self.device, self.stop, self.world = device, stop, world or World()
        self.sets: dict[str, tuple[ImageSet, ImageSet]] = {}
        self.fingerprints: dict[str, str] = {}
        self.tables: dict[tuple[str, ...], TeacherTable | None] = {}
        self.logits: dict[tuple[str, ...], Tensor] = {}
        self.teachers: dict[Path, Weights] = {}

    def data(self, parts: Parts) -> tuple[ImageSet, ImageSet]:
        """(train, test), on the device."""
        return self._data(parts.cfg.DATASET)

    def fingerprint(self, node: Mapping[str, Any]) -> str:
        """sha256 of the images and labels that a section DATASET gives, and their normalisation."""
        key = repr(Dataset.read(node))
        if key not in self.fingerprints:
            wholes = [data.whole or data for data in self._data(node)]
            tensors = [
                tensor
                for data in wholes
                for tensor in (data.padded, data.targets, data.mean, data.std)
            ]
            named = {str(number): tensor for number, tensor in enumerate(tensors)}
            self.fingerprints[key] = digest(named)
        return self.fingerprints[key]

    def _data(self, node: Mapping[str, Any]) -> tuple[ImageSet, ImageSet]:
        key = repr(Dataset.read(node))
        if key not in self.sets:
            train_set, test_set = get_dataset(node)
            if self.device.type == "cuda":
                sets = [train_set, test_set, *([train_set.whole] if train_set.whole else [])]
                size = sum(data.padded.nbytes for data in sets)
                check_memory(size, "the padded images", SMALLER, self.device)
            self.sets[key] = train_set.to(self.device), test_set.to(self.device)
        return self.sets[key]

    def weights(self, file: Path) -> Weights:
        """A teacher's, read once."""
        if file not in self.teachers:
            self.teachers[file] = load_weights(file)
        return self.teachers[file]

    def once(self, weights: Weights) -> Weights:
        """The first that was given of these weights."""
        return self.teachers.setdefault(Path(weights.sha256), weights)

    def table(
        self, parts: Parts, distiller: Distiller, weights: Weights, data: ImageSet
    ) -> TeacherTable | None:
        own = parts.networks
        kind = (own.TEACHER_TABLE, own.TEACHER_TABLE_DTYPE, str(own.TEACHER_TABLE_TF32))
        key = (weights.sha256, own.TEACHER, *kind, repr(parts.dataset), own.TEACHER_TABLE_ROOT)
        if key not in self.tables:
            self.tables[key] = build_table(own, distiller, data)
        return self.tables[key]

    def teacher_logits(
        self, parts: Parts, weights: Weights, evaluate: Callable[[], Tensor]
    ) -> Tensor:
        """The teacher's logits on the test set, (N, C), as `evaluate` computes them once."""
        key = (weights.sha256, parts.networks.TEACHER, repr(parts.dataset))
        if key not in self.logits:
            self.logits[key] = evaluate()
        return self.logits[key]
