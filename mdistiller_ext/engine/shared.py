"""What the runs of one process have in common."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

from ..data import Dataset, ImageSet, get_dataset
from ..data.arrays import SMALLER
from ..distillers import Distiller
from ..memory import check_memory
from ..teacher import TeacherTable, Weights, load_weights
from .build import build_table
from .replicas import World
from .stacked import Stacked
from .stop import StopSignals


class Shared:
    """What the runs of one process share: data on the device, teachers' answers, being stopped."""

    def __init__(
        self,
        device: torch.device,
        stop: StopSignals,
        world: World | None = None,
        together: int = 1,
    ) -> None:
        self.device, self.stop, self.world = device, stop, world or World()
        self.together = together  # how many runs they are
        self.sets: dict[str, tuple[ImageSet, ImageSet]] = {}
        self.tables: dict[tuple[str, ...], TeacherTable | None] = {}
        self.logits: dict[tuple[str, ...], Tensor] = {}
        self.teachers: dict[Path, Weights] = {}
        self.stacks: dict[str, Stacked] = {}

    def data(self, cfg: CfgNode) -> tuple[ImageSet, ImageSet]:
        """(train, test), on the device."""
        key = repr(Dataset.read(cfg.DATASET))
        if key not in self.sets:
            train_set, test_set = get_dataset(cfg.DATASET)
            if self.device.type == "cuda":
                parts = [train_set, test_set, *([train_set.whole] if train_set.whole else [])]
                size = sum(part.padded.nbytes for part in parts)
                check_memory(size, "the padded images", SMALLER, self.device)
            self.sets[key] = train_set.to(self.device), test_set.to(self.device)
        return self.sets[key]

    def stacked(self, cfg: CfgNode) -> Stacked | None:
        """With which runs one takes its steps, as SOLVER.STACK says; alone with none."""
        solver = cfg.SOLVER
        if solver.STACK == "none" or self.together == 1:
            return None
        apart = {key: value for key, value in solver.items() if key != "SEED"}
        key = repr((cfg.DISTILLER.STUDENT, Dataset.read(cfg.DATASET), apart))
        return self.stacks.setdefault(key, Stacked(solver.STACK, solver.COMPILE))

    def weights(self, file: Path) -> Weights:
        """A teacher's, read once."""
        if file not in self.teachers:
            self.teachers[file] = load_weights(file)
        return self.teachers[file]

    def once(self, weights: Weights) -> Weights:
        """The first that was given of these weights."""
        return self.teachers.setdefault(Path(weights.sha256), weights)

    def table(
        self, cfg: CfgNode, distiller: Distiller, weights: Weights, data: ImageSet
    ) -> TeacherTable | None:
        node = cfg.DISTILLER
        where = (repr(Dataset.read(cfg.DATASET)), node.TEACHER_TABLE_ROOT)
        key = (weights.sha256, node.TEACHER, node.TEACHER_TABLE, node.TEACHER_TABLE_DTYPE, *where)
        if key not in self.tables:
            self.tables[key] = build_table(cfg, distiller, data)
        return self.tables[key]

    def teacher_logits(
        self, cfg: CfgNode, weights: Weights, evaluate: Callable[[], Tensor]
    ) -> Tensor:
        """The teacher's logits on the test set, (N, C), as `evaluate` computes them once."""
        key = (weights.sha256, cfg.DISTILLER.TEACHER, repr(Dataset.read(cfg.DATASET)))
        if key not in self.logits:
            self.logits[key] = evaluate()
        return self.logits[key]
