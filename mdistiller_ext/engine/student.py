"""The student that a run has left: its file, its record, and a network that takes plain images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, RunError
from ..models import build_network
from ..plugins import import_modules
from ..teacher import load_into, load_weights
from .identity import GIVEN
from .record import read_record


class Student(nn.Module):
    """A network in evaluation mode with its normalisation in front.

    A call maps RGB images (B, 3, side, side), float32 in [0, 1], to logits (B, C).

    Attributes:
        network: takes normalised images and gives (logits, features).
        mean, std: per channel, of pixels in [0, 1], (3,).
        side: of an image, in pixels.
        class_names: by label.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float] | Tensor,
        std: Sequence[float] | Tensor,
        side: int,
        class_names: Sequence[str],
    ) -> None:
        super().__init__()
        self.network, self.side, self.class_names = network, side, [*class_names]
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32))
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        normalised = (image - self.mean[:, None, None]) / self.std[:, None, None]
        return self.network(normalised)[0]


def load_student(place: str | Path) -> Student:
    """The student of a run, on the CPU; its images need not be there.

    Args:
        place: the run's folder, of which `student_last` is taken, or a file in it, as
            `student_best`.

    Raises:
        ConfigError: the network was given to `distill`, or cannot be built here.
        RunError: the folder holds no run, or the file does not fit its record.
    """
    file, record = left_by(Path(place))
    config, data = record["config"], record.get("data")
    if not data:  # new
        raise RunError(f"{file}: the record of its run is too old to say what its images are")
    import_modules(config["EXPERIMENT"]["IMPORT"])
    name, classes = config["DISTILLER"]["STUDENT"], data["classes"]
    network = build_network(name, classes, data["side"], config["DATASET"]["TYPE"])
    load_into(network, load_weights(file), name)
    names = data.get("class_names") or [*map(str, range(classes))]
    return Student(network, data["mean"], data["std"], data["side"], names)


def left_by(place: Path) -> tuple[Path, dict[str, Any]]:
    """The file of a run's weights, and its record.

    Args:
        place: the run's folder, or a file in it.

    Raises:
        ConfigError: the network was given to `distill` as an object.
        RunError: there is no record, or it is damaged.
    """
    file = place / "student_last" if place.is_dir() else place
    record = read_record(file.with_name("record.json"))
    if record["config"]["DISTILLER"]["STUDENT"].startswith(GIVEN):
        raise ConfigError(
            f"{file}: its network was given to distill(), and no name says how to build it: load "
            f"the file's entry 'model' into one with load_state_dict"
        )
    return file, record
