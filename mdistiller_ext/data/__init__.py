"""The data sets, by the name in DATASET.TYPE."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, counted
from ..memory import check_memory
from ..plugins import check_free
from ..seeding import epoch_generator
from ..settings import PATH, Rule, Settings, count, number, number_to, one_of, setting
from . import arrays, cifar10, cifar100, digits, tiny_imagenet
from .arrays import SMALLER, nbytes
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
        known: its settings -> the training images of each class and their side, without loading
            them; or None.
        own: the images are other ones where DATASET.ROOT is another.
    """

    load: Callable[["Dataset"], Splits]
    known: Callable[["Dataset"], tuple[Sequence[int], int]] | None = None
    own: bool = True


DATASETS: dict[str, Source] = {}
LOADED: dict[Any, Facts] = {}  # of what had to be loaded to know
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
    LIMIT: int = setting(
        0, count(0), "training images of each class, the first so many, for a quick try; 0: all"
    )
    NUM_WORKERS: int = setting(2, count(0), "the toolkit's; no effect here")


def register_dataset(name: str) -> Callable[[Callable[[Dataset], Splits]], Any]:
    """A decorator: `load(settings)` gives (train, test) where DATASET.TYPE is this name.

    Raises:
        ValueError: another data set has the name.
    """

    def add(load: Callable[[Dataset], Splits]) -> Callable[[Dataset], Splits]:
        check_free(name, DATASETS[name].load if name in DATASETS else None, load)
        DATASETS[name] = Source(load)
        return load

    return add


def facts(node: Mapping[str, Any]) -> Facts:
    """Of the training set that a section DATASET describes.

    Raises:
        ConfigError: its files are not as they should be.
    """
    settings = Dataset.read(node)
    source = DATASETS[settings.TYPE]
    if source.known:
        of_class, side = source.known(settings)
        return Facts(sum(_left(of_class, settings)), len(of_class), side)
    file = Path(settings.ROOT)
    key = source, repr(settings), file.stat().st_mtime_ns if file.exists() else 0
    if key not in LOADED:  # a study asks for each of its runs
        train, _ = get_dataset(node)
        LOADED[key] = Facts(len(train), train.classes, train.side)
    return LOADED[key]


def is_own(kind: str) -> bool:
    """Whether the images of a DATASET.TYPE are other ones where DATASET.ROOT is another."""
    return kind not in DATASETS or DATASETS[kind].own


def identity(node: Mapping[str, Any]) -> str:
    """A name for the images that a section DATASET gives: the TYPE, and of one's own images what
    tells them from others."""
    if not is_own(node["TYPE"]):
        return node["TYPE"]
    facts = [str(Path(node["ROOT"]).resolve()), *(node[key] for key in ("SIDE", "MEAN", "STD"))]
    return f"{node['TYPE']}_{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]}"


def trained_on(node: Mapping[str, Any]) -> str:
    """A name for the images that a section DATASET trains on: `identity`, and what is left out."""
    held = f"_holdout{node['HOLDOUT']}_seed{node['HOLDOUT_SEED']}" if node["HOLDOUT"] else ""
    return identity(node) + held + (f"_limit{node['LIMIT']}" if node["LIMIT"] else "")


def get_dataset(node: Mapping[str, Any]) -> Splits:
    """(train, test) of a section DATASET, on the CPU; with a HOLDOUT, test are training images.

    Raises:
        ConfigError, RunError: its files are not as they should be, or cannot be had.
    """
    settings = Dataset.read(node)
    train, test = _checked(DATASETS[settings.TYPE].load(settings), settings.TYPE)
    changes: dict[str, Any] = {
        name: value for name, value in {"mean": settings.MEAN, "std": settings.STD}.items() if value
    }
    if settings.PADDING >= 0:
        changes["padding"] = settings.PADDING
    if settings.FLIPS != "auto":
        changes["flips"] = settings.FLIPS == "on"
    if changes:
        padding = changes.get("padding", train.padding)
        size = nbytes(len(train) + len(test), train.side + 2 * padding)
        check_memory(size, f"images padded by {padding} pixels", "take a smaller DATASET.PADDING")
        train, test = train.changed(**changes), test.changed(**changes)
    if settings.HOLDOUT or settings.LIMIT:
        _left(train.targets.bincount().tolist(), settings)
        check_memory(train.padded.nbytes, "the images without those left out", SMALLER)
        kept, held = stratified(train.targets, settings.HOLDOUT, settings.HOLDOUT_SEED)
        if settings.HOLDOUT:
            test = train.subset(held, alone=True)
        train = train.subset(first_of_each(train.targets, kept, settings.LIMIT))
    return train, test


def stratified(targets: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The places of the images that stay and of those that are held out, of each class a share,
    but not its last image.

    Args:
        targets: labels (N,).
    """
    generator, held = epoch_generator(seed, 0, 3), torch.zeros(len(targets), dtype=torch.bool)
    for label in targets.unique():
        places = (targets == label).nonzero().flatten()
        chosen = torch.randperm(len(places), generator=generator)
        held[places[chosen[: _held(len(places), share)]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def first_of_each(targets: Tensor, places: Tensor, limit: int) -> Tensor:
    """Of these places in a data set the first `limit` of each class, in order; 0: all.

    Args:
        targets: labels (N,).
    """
    if not limit:
        return places
    labels = targets[places]
    return torch.cat([places[labels == label][:limit] for label in labels.unique()]).sort().values


def _held(count: int, share: float) -> int:
    return max(0, min(round(share * count), count - 1))


def _left(of_class: Sequence[int], settings: Dataset) -> list[int]:
    """How many of the training images of each class are trained on.

    Raises:
        ConfigError: HOLDOUT or LIMIT leaves out no image.
    """
    share, limit = settings.HOLDOUT, settings.LIMIT
    left = [count - _held(count, share) for count in of_class]
    if share > 0 and left == [*of_class]:
        most = counted(max(of_class), "training image")
        raise ConfigError(
            f"DATASET.HOLDOUT: {share:g} holds out no image: a class has at most {most}; expected "
            f"a larger share, or 0"
        )
    if limit >= max(left):
        most = counted(max(left), "training image")
        raise ConfigError(
            f"DATASET.LIMIT: {limit} leaves out no image: a class has at most {most}; expected "
            f"fewer, or 0"
        )
    return [min(count, limit) for count in left] if limit else left


def empty_classes(train: ImageSet, test: ImageSet) -> list[str]:
    """A line for each of the two sets that has no image of some class."""
    classes = train.classes
    trained, tested = (torch.bincount(d.targets, minlength=classes) > 0 for d in (train, test))
    renumber = "if labels count from 1 or have a gap, number them from 0"
    lines = []
    for name, empty, effect in (
        ("training", ~trained, f"have no image; {renumber}"),
        ("test", trained & ~tested, "are not tested"),
    ):
        if labels := empty.nonzero().flatten().tolist():
            some = ", ".join(map(str, labels[:5])) + (", ..." if len(labels) > 5 else "")
            share = f"{len(labels)} of {classes} classes {effect}"
            lines.append(f"no {name} image has label {some}: {share}")
    return lines


def _checked(sets: Any, kind: str) -> Splits:
    """What a data set's `load` gives, if it is one.

    Raises:
        ConfigError: it is not.
    """
    fault, expected = "", "expected (train, test), each an ImageSet"
    if not isinstance(sets, Sequence) or [*map(type, sets)] != [ImageSet, ImageSet]:
        raise ConfigError(f"DATASET.TYPE {kind}: gives a {type(sets).__name__}, {expected}")
    train, test = sets
    if not len(train) or not len(test):
        fault = f"{len(train)} training and {len(test)} test images, expected some of each"
    elif train.side != test.side:
        fault = f"training images of {train.side} pixels and test images of {test.side}"
    elif min(train.targets.min(), test.targets.min()) < 0:
        fault = "labels below 0"
    elif train.classes < 2:
        fault = "training images of one class, expected two or more"
    elif train.names and len(train.names) != train.classes:
        fault = f"{len(train.names)} class names, and labels of {train.classes} classes"
    elif test.classes > train.classes:
        most, least = train.classes - 1, test.classes - 1
        fault = f"a label {least} in the test set, in the training set at most {most}"
    if fault:
        raise ConfigError(f"DATASET.TYPE {kind}: has {fault}")
    return train, test


def _official(load: Callable[[Path], Splits], *known: Any) -> Source:
    """A data set that is the same wherever it lies, and its images of each class and their side."""
    return Source(lambda settings: load(Path(settings.ROOT)), lambda settings: known, own=False)


DATASETS |= {
    "cifar100": _official(lambda root: cifar100.load(root), [500] * 100, 32),
    "cifar10": _official(lambda root: cifar10.load(root), [5000] * 10, 32),
    "digits": _official(lambda root: digits.load(), digits.TRAINING, 8),
    "tiny_imagenet": _official(lambda root: tiny_imagenet.load(root), [500] * 200, 64),
    "arrays": Source(lambda s: arrays.load_file(Path(s.ROOT))),
    "folder": Source(
        lambda s: arrays.load_folder(Path(s.ROOT), s.SIDE, s.HOLDOUT > 0),
        lambda s: arrays.folder_facts(Path(s.ROOT), s.SIDE, s.HOLDOUT > 0),
    ),
}
