"""What every distiller is: a student, a frozen teacher, and the losses between them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from ..losses import at_least_float32
from ..policies import Context
from ..settings import Settings


class Distiller(nn.Module):
    """Base of all methods, with the toolkit's contract.

    Built as `cls(student, teacher, cfg)`. In training mode a call returns
    `(student_logits, losses)`, where the trainer sums *all* values of `losses`; in evaluation
    mode it returns the student's logits. The teacher gets no gradient and stays in eval mode.
    Beside `image`, `target`, `index` and `epoch` a training step gives a `context`; the toolkit's
    own trainer does not, and `schedule` says then what the epoch's settings are.

    Attributes:
        TYPE: the method's name, in the registry and in the config.
        monitor: of the last training step, what is worth logging and must not be trained on:
            name -> tensor of shape () that sums over an epoch; of names that begin with `mean_`
            the sum is then divided by the number of images.
        coupled: why the batch must be in one process, or "".
        held_every: in every how manieth step it wants images that are held out, or 0.
        smoothing: of the labels in `cross_entropy`.
        SETTINGS: of a registered method, the keys of its node in the config.
    """

    TYPE: str
    SETTINGS: type[Settings] | None = None
    monitor: dict[str, Tensor]
    coupled = ""
    held_every = 0

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any = None) -> None:
        nn.Module.__init__(self)  # not super(): registered in the toolkit, its base comes next
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.monitor = {}
        # The toolkit's own config has no such key.
        self.smoothing = getattr(cfg.SOLVER, "LABEL_SMOOTHING", 0.0) if cfg else 0.0

    def train(self, mode: bool = True) -> "Distiller":
        super().train(mode)
        self.teacher.eval()
        return self

    def get_learnable_parameters(self) -> list[nn.Parameter]:
        """The parameters the optimizer steps; a method with layers of its own adds them."""
        return list(self.student.parameters())

    def get_undecayed_parameters(self) -> list[nn.Parameter]:
        """Those of them that weight decay leaves alone."""
        return []

    def get_extra_parameters(self) -> int:
        """Number of parameters that the method adds to the student's."""
        return 0

    def schedule(self, epoch: int) -> dict[str, float]:
        """The settings that depend on the epoch, counted from 1, as the step uses them."""
        return {}

    def planned(self, epoch: int) -> dict[str, float]:
        """What of them is what the record says of the epoch."""
        return self.schedule(epoch)

    def draws(self, classes: int) -> int:
        """How many random numbers a step needs for each image; it finds them in the context."""
        return 0

    def logits(self, image: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(student's, teacher's) of images (B, 3, H, W), each (B, C), in float32 or better.

        The teacher computes in float32 whatever the student does, as its table has it.
        """
        logits_teacher = context.answers
        if logits_teacher is None:
            with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
                logits_teacher, _ = self.teacher(image)
        return self.student_logits(image, context), at_least_float32(logits_teacher)

    def student_logits(self, image: Tensor, context: Context) -> Tensor:
        """The student's alone."""
        logits = self.student(image)[0] if context.logits is None else context.logits
        return at_least_float32(logits)

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Of the student's logits (B, C) with the labels (B,), or shares of classes (B, C)."""
        return F.cross_entropy(logits, target, label_smoothing=self.smoothing)

    def forward_train(
        self, *, image: Tensor, target: Tensor, context: Context, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError

    def forward(self, **kwargs: Any) -> Any:
        if not self.training:
            return self.student(kwargs["image"])[0]
        if "context" not in kwargs:
            kwargs["context"] = Context(self.schedule(kwargs["epoch"]))
        logits, losses = self.forward_train(**kwargs)
        for name, loss in losses.items():
            learns = isinstance(loss, Tensor) and loss.requires_grad
            if torch.is_grad_enabled() and logits.requires_grad and not learns:
                raise ConfigError(
                    f"{self.TYPE}: {name} is a {type(loss).__name__} without a gradient, expected "
                    f"a tensor that the student learns from; monitor takes what is only logged"
                )
        return logits, losses


class Vanilla(Distiller):
    """The student alone: cross-entropy with the labels."""

    TYPE = "NONE"

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None, cfg: Any = None):
        super().__init__(student, nn.Identity() if teacher is None else teacher, cfg)

    def forward_train(self, *, image: Tensor, target: Tensor, context: Context, **kwargs: Any):
        logits = self.student_logits(image, context)
        return logits, {"loss_ce": self.cross_entropy(logits, target)}
