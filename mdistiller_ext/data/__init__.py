"""The data sets, by the name in DATASET.TYPE."""

from pathlib import Path

from yacs.config import CfgNode

from . import cifar100, digits
from .views import Batch, ImageSet


def get_dataset(cfg: CfgNode) -> tuple[ImageSet, ImageSet]:
    """(train, test) of DATASET.TYPE, on the CPU."""
    if cfg.DATASET.TYPE == "digits":
        return digits.load()
    return cifar100.load(Path(cfg.DATASET.ROOT))
