"""Tiny-ImageNet: 200 classes, 100,000 training and 10,000 validation images of 64 x 64 pixels."""

from pathlib import Path

from ..errors import ConfigError
from .arrays import list_folder, read_splits
from .views import ImageSet

FOLDER = "tiny-imagenet-200"
# The toolkit's. It also turns images by up to 20 degrees, where views here are shifted crops.
MEAN, STD = (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)


def load(root: Path) -> tuple[ImageSet, ImageSet]:
    """(train, validation) from the unpacked archive, with val/ as it comes or a folder a class.

    Raises:
        ConfigError: the archive is not there.
    """
    root = root if root.name == FOLDER else root / FOLDER
    if not (root / "train").is_dir():
        raise ConfigError(
            f"DATASET.ROOT: {root} holds no train/: unpack tiny-imagenet-200.zip of Stanford's "
            f"CS231n there"
        )
    notes = root / "val" / "val_annotations.txt"
    classes, splits, _ = list_folder(root, ("train",) if notes.exists() else ("train", "val"))
    if notes.exists():
        lines = [line.split("\t") for line in notes.read_text().splitlines()]
        splits.append([(root / "val/images" / name, classes.index(of)) for name, of, *_ in lines])
    train, test = (
        ImageSet.build(*split, MEAN, STD, padding=8, flips=True, names=classes)
        for split in read_splits(splits, 64, padding=8)
    )
    return train, test
