"""What every distiller is: a student, a frozen teacher, and the losses between them."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import at_least_float32


class Distiller(nn.Module):
    """Base of all methods, with the toolkit's contract.

    Built as `cls(student, teacher, cfg)`. In training mode a call returns
    `(student_logits, losses)`, where the trainer sums *all* values of `losses`; in evaluation
    mode it returns the student's logits. The teacher gets no gradient and stays in eval mode.
    Beside `image`, `target`, `index` and `epoch` a call gets `drawn`: uniform random numbers in
    [0, 1) for each image, (B, draws), the same for a seed and an epoch wherever it is trained.

    Attributes:
        TYPE: the method's name, in the registry and in the config.
        monitor: of the last training step, what is worth logging and must not be trained on:
            name -> tensor of shape () that sums over an epoch.
        settings: what `schedule` gives, as tensors of shape () on the device, where a captured
            step must find a new epoch's values without being captured again; else None.
    """

    TYPE: str
    monitor: dict[str, Tensor]
    settings: dict[str, Tensor] | None

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        nn.Module.__init__(self)  # not super(): registered in the toolkit, its base comes next
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.monitor = {}
        self.settings = None

    def train(self, mode: bool = True) -> "Distiller":
        super().train(mode)
        self.teacher.eval()
        return self

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """The parameters the optimizer steps; a method with layers of its own adds them."""
        return list(self.student.parameters())

    def get_extra_parameters(self) -> int:
        """Number of parameters that the method adds to the student's."""
        return 0

    def schedule(self, epoch: int) -> dict[str, float]:
        """The settings that depend on the epoch, counted from 1, as the step uses them."""
        return {}

    def scheduled(self, epoch: int) -> Mapping[str, float | Tensor]:
        """What a step takes its settings from: `settings` where they are, else `schedule`."""
        return self.settings or self.schedule(epoch)

    def draws(self, classes: int) -> int:
        """How many random numbers a step needs for each image; it finds them in `drawn`."""
        return 0

    def global_batch(self, values: Tensor) -> tuple[Tensor, slice]:
        """A value (B,) of each sample of the whole batch, and where this process's samples are.

        Here the batch is in one process; of several, the engine puts what gathers it in place.
        """
        return values, slice(None)

    def logits(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(student's, teacher's) of images (B, 3, H, W), each (B, C), in float32 or better.

        The teacher computes in float32 whatever the student does, as its table has it.
        """
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            logits_teacher, _ = self.teacher(image)
        logits_student, _ = self.student(image)
        return at_least_float32(logits_student), at_least_float32(logits_teacher)

    def forward_train(
        self, *, image: Tensor, target: Tensor, epoch: int, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def forward(self, **kwargs: Any) -> Any:
        if self.training:
            return self.forward_train(**kwargs)
        return self.student(kwargs["image"])[0]


class Vanilla(Distiller):
    """The student alone: cross-entropy with the labels."""

    TYPE = "NONE"

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None, cfg: Any = None):
        super().__init__(student, nn.Identity() if teacher is None else teacher)

    def forward_train(self, *, image: Tensor, target: Tensor, **kwargs: Any):
        logits, _ = self.student(image)
        return logits, {"loss_ce": F.cross_entropy(at_least_float32(logits), target)}
