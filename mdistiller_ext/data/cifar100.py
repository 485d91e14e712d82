"""CIFAR-100 (Krizhevsky, 2009), from the official archive in its binary or its Python form."""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import RunError
from ..files import download_folder, read
from .views import ImageSet

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
ARCHIVE_MD5 = "03b5dce01913d631647c71ecec9e9cb8"
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
# Of the fine labels, by their numbers.
NAMES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house
    kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
    mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
    plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
    shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table
    tank telephone television tiger tractor train trout tulip turtle wardrobe whale
    willow_tree wolf woman worm
"""
RECORD = 2 + 3 * 32 * 32  # coarse label, fine label, red, green and blue planes

FOLDERS = ("cifar-100-binary", "cifar-100-python")
# md5 of (train, test) in each form. The Python form is a pickle: nothing but the official files
# is ever loaded.
BINARY = {
    "train.bin": "6172c7755cfe09b2fe270c85cebc1b15",
    "test.bin": "4499cfba6c016c1be1438163640a0898",
}
PYTHON = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}


def load(root: Path) -> tuple[ImageSet, ImageSet]:
    """(train, test) from `root`, where it is downloaded to if it is not there.

    Raises:
        RunError: a file is damaged, or the download failed.
    """
    if root.name in FOLDERS and root.is_dir() and not any((root / n).is_dir() for n in FOLDERS):
        root = root.parent  # it names the data itself
    if (root / "cifar-100-binary").is_dir():
        splits = [read_binary(root / "cifar-100-binary" / name) for name in BINARY]
    elif (root / "cifar-100-python").is_dir():
        splits = [read_python(root / "cifar-100-python" / name) for name in PYTHON]
    else:
        fetch(root)
        return load(root)
    train, test = (
        ImageSet.build(images, targets, MEAN, STD, padding=4, flips=True, names=NAMES.split())
        for images, targets in splits
    )
    return train, test


def fetch(root: Path) -> None:
    """Download the official archive and unpack it as `root / cifar-100-binary`."""
    print(f"CIFAR-100 is not in {root}: downloading it from {URL}")
    try:
        download_folder(URL, "cifar-100-binary", root, ARCHIVE_MD5)
    except RunError as error:
        raise RunError(
            f"DATASET.ROOT {root}: holds neither cifar-100-binary/ nor cifar-100-python/, and "
            f"{error}; unpack the official archive there or name another folder"
        ) from error


def read_binary(file: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32), uint8, and fine labels (N,) of a file of the binary form."""
    records = np.frombuffer(checked(file, BINARY), np.uint8).reshape(-1, RECORD)
    return tensors(records[:, 2:], records[:, 1])


def read_python(file: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32), uint8, and fine labels (N,) of a file of the Python form."""
    content = pickle.loads(checked(file, PYTHON), encoding="latin1")
    return tensors(content["data"], np.asarray(content["fine_labels"]))


def tensors(pixels: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy())
    return images, torch.from_numpy(labels.astype(np.int64))


def checked(file: Path, official: Mapping[str, str]) -> bytes:
    """The content of an official file, whose md5 is known by its name."""
    content, md5 = read(file), official[file.name]
    found = hashlib.md5(content).hexdigest()
    if found != md5:
        raise RunError(
            f"{file}: not the official file ({len(content)} bytes, md5 {found}, expected {md5}); "
            f"remove {file.parent} to have it downloaded again"
        )
    return content
