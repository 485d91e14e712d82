"""The data sets, by the name in DATASET.TYPE."""

from pathlib import Path
from typing import NamedTuple

from yacs.config import CfgNode

from . import cifar100, digits
from .views import Batch, ImageSet


class Facts(NamedTuple):
    """What a config must fit: training images, classes, and the side of an image in pixels."""

    images: int
    classes: int
    side: int


FACTS = {"cifar100": Facts(50_000, 100, 32), "digits": Facts(539, 10, 8)}


def get_dataset(cfg: CfgNode) -> tuple[ImageSet, ImageSet]:
    """(train, test) of DATASET.TYPE, on the CPU."""
    if cfg.DATASET.TYPE == "digits":
        return digits.load()
    return cifar100.load(Path(cfg.DATASET.ROOT))
