"""The data sets, by the name in DATASET.TYPE."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..plugins import check_free
from ..seeding import epoch_generator
from ..settings import PATH, Rule, Settings, count, number, number_to, one_of, setting
from . import arrays, cifar10, cifar100, digits, tiny_imagenet
from .views import Batch, ImageSet

Splits = tuple[ImageSet, ImageSet]


class Facts(NamedTuple):
    """What a config must fit: training images, classes, and the side of an image in pixels."""

    images: int
    classes: int
    side: int


class Source(NamedTuple):
    """A data set.

    Attributes:
        load: its settings -> (train, test), on the CPU, as they usually are.
        facts: its settings -> what is known of the training set before it is loaded; or None, and
            it is loaded to know.
    """

    load: Callable[["Dataset"], Splits]
    facts: Callable[["Dataset"], Facts] | None


DATASETS: dict[str, Source] = {}
LOADED: dict[str, Facts] = {}  # of what had to be loaded to know, by its settings
CHANNELS: Rule = (
    lambda v: len(v) in (0, 3) and all(type(x) in (int, float) and 0 < x < 1 for x in v),
    "three numbers above 0 and below 1, or none",
)


@dataclass(frozen=True)
class Dataset(Settings):
    """The section DATASET."""

    TYPE: str = setting("cifar100", lambda: one_of(*DATASETS))
    ROOT: str = setting("./data", PATH, "where its files are, or are downloaded to")
    SIDE: int = setting(0, number(0, 10_000), "pixels, to which the images of a folder are scaled")
    MEAN: list = setting([], CHANNELS, "of pixels in [0, 1]; empty: the data set's own")
    STD: list = setting([], CHANNELS, "as MEAN")
    PADDING: int = setting(-1, number(-1, 1000), "zero pixels for crops; -1: its own")
    FLIPS: str = setting("auto", one_of("auto", "on", "off"), "whether views are mirrored")
    HOLDOUT: float = setting(
        0.0, number_to(0, 0.9), "share of the training images that takes the test set's place"
    )
    HOLDOUT_SEED: int = setting(0, number(0, 2**63), "which images these are")
    NUM_WORKERS: int = setting(2, count(0), "the toolkit's; no effect here")


def register_dataset(name: str) -> Callable[[Callable[[Dataset], Splits]], Any]:
    """A decorator: `load(settings)` gives (train, test) where DATASET.TYPE is this name.

    Raises:
        ValueError: another data set has the name.
    """

    def add(load: Callable[[Dataset], Splits]) -> Callable[[Dataset], Splits]:
        check_free(name, DATASETS[name].load if name in DATASETS else None, load)
        DATASETS[name] = Source(load, None)
        return load

    return add


def facts(node: Mapping[str, Any]) -> Facts:
    """Of the training set that a section DATASET describes.

    Raises:
        ConfigError: its files are not as they should be.
    """
    settings = Dataset.read(node)
    source = DATASETS[settings.TYPE]
    if source.facts is None:
        key = repr(settings)
        if key not in LOADED:
            train, _ = get_dataset(node)
            LOADED[key] = Facts(len(train), train.classes, train.side)
        return LOADED[key]
    found = source.facts(settings)
    # Of each class a share, rounded; to about this.
    return found._replace(images=found.images - round(settings.HOLDOUT * found.images))


def get_dataset(node: Mapping[str, Any]) -> Splits:
    """(train, test) of a section DATASET, on the CPU; with a HOLDOUT, test are training images.

    Raises:
        ConfigError, RunError: its files are not as they should be, or cannot be had.
    """
    settings = Dataset.read(node)
    train, test = DATASETS[settings.TYPE].load(settings)
    changes: dict[str, Any] = {
        name: value for name, value in {"mean": settings.MEAN, "std": settings.STD}.items() if value
    }
    if settings.PADDING >= 0:
        changes["padding"] = settings.PADDING
    if settings.FLIPS != "auto":
        changes["flips"] = settings.FLIPS == "on"
    if changes:
        train, test = train.changed(**changes), test.changed(**changes)
    if settings.HOLDOUT:
        kept, held = stratified(train.targets, settings.HOLDOUT, settings.HOLDOUT_SEED)
        train, test = train.subset(kept), train.subset(held, alone=True)
    return train, test


def stratified(targets: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The places of the images that stay and of those that are held out, of each class a share.

    Args:
        targets: labels (N,).
    """
    generator, held = epoch_generator(seed, 0, 3), torch.zeros(len(targets), dtype=torch.bool)
    for label in targets.unique():
        places = (targets == label).nonzero().flatten()
        chosen = torch.randperm(len(places), generator=generator)
        held[places[chosen[: round(share * len(places))]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _fixed(images: int, classes: int, side: int) -> Callable[[Dataset], Facts]:
    return lambda settings: Facts(images, classes, side)


DATASETS |= {
    "cifar100": Source(lambda s: cifar100.load(Path(s.ROOT)), _fixed(50_000, 100, 32)),
    "cifar10": Source(lambda s: cifar10.load(Path(s.ROOT)), _fixed(50_000, 10, 32)),
    "digits": Source(lambda s: digits.load(), _fixed(539, 10, 8)),
    "tiny_imagenet": Source(lambda s: tiny_imagenet.load(Path(s.ROOT)), _fixed(100_000, 200, 64)),
    "arrays": Source(lambda s: arrays.load_file(Path(s.ROOT)), None),
    "folder": Source(
        lambda s: arrays.load_folder(Path(s.ROOT), s.SIDE),
        lambda s: Facts(*arrays.folder_facts(Path(s.ROOT), s.SIDE)),
    ),
}
