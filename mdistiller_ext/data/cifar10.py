"""CIFAR-10 (Krizhevsky, 2009), from the official archive in its Python form."""

import pickle
from pathlib import Path

import numpy as np
import torch

from ..errors import RunError
from ..files import download_folder
from .cifar100 import checked, tensors
from .views import ImageSet

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
FOLDER = "cifar-10-batches-py"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
# md5 of each file; it is a pickle: nothing but the official files is ever loaded.
FILES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


def load(root: Path) -> tuple[ImageSet, ImageSet]:
    """(train, test) from `root`, where it is downloaded to if it is not there.

    Raises:
        RunError: a file is damaged, or the download failed.
    """
    folder = root if root.name == FOLDER else root / FOLDER
    if not folder.is_dir():
        print(f"CIFAR-10 is not in {root}: downloading it from {URL}")
        try:
            download_folder(URL, FOLDER, root, ARCHIVE_MD5)
        except RunError as error:
            raise RunError(
                f"DATASET.ROOT {root}: holds no {FOLDER}/, and {error}; unpack the official "
                f"archive there or name another folder"
            ) from error
    parts = []
    for name in FILES:
        content = pickle.loads(checked(folder / name, FILES), encoding="latin1")
        parts.append(tensors(content["data"], np.asarray(content["labels"])))
    images, labels = (torch.cat(some) for some in zip(*parts[:-1], strict=True))
    train, test = (
        ImageSet.build(*split, MEAN, STD, padding=4, flips=True, names=NAMES.split())
        for split in ((images, labels), parts[-1])
    )
    return train, test
