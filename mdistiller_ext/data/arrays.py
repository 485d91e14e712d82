"""One's own images: a file of arrays, or folders of image files."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from ..errors import ConfigError, RunError, brief
from ..files import default_cache, write_atomically
from ..memory import check_memory
from .views import ImageSet

SPLITS, WHAT = ("train", "test"), ("images", "labels")
TESTS = ("val", "test")  # folders of which the first that is there has the test images
SMALLER = "take fewer images, or a smaller DATASET.SIDE or DATASET.PADDING"
Split = tuple[Tensor, Tensor]  # images (N, 3, side, side), uint8, and labels (N,)
Files = list[tuple[Path, int]]  # (file, label)
Listed = tuple[list[str], list[Files], str]  # classes; the files of each split; what is left out
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def read_arrays(file: Path) -> list[tuple[Tensor, Tensor]]:
    """(images, labels) of train and test: train_images, train_labels, test_images, test_labels.

    Images are uint8, (N, side, side), (N, 3, side, side) or (N, side, side, 3); labels are integers
    from 0. The file is .npz, or .pt with a dict of tensors.

    Raises:
        ConfigError: something is missing or of another shape or type.
    """
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as content:
                arrays: dict[str, Any] = {k: torch.from_numpy(v) for k, v in content.items()}
        else:
            arrays = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # of either reader
        raise ConfigError(f"DATASET.ROOT {file}: cannot be read: {brief(str(error))}") from error
    found = {name: [_array(file, arrays, f"{name}_{what}") for what in WHAT] for name in SPLITS}
    try:
        return [as_split(images, labels, name) for name, (images, labels) in found.items()]
    except ConfigError as error:
        raise ConfigError(f"DATASET.ROOT {file}: {error}") from error


def _array(file: Path, arrays: Any, name: str) -> Tensor:
    found = arrays.get(name) if isinstance(arrays, dict) else None
    if not isinstance(found, Tensor):
        names = ", ".join(map(str, arrays)) if isinstance(arrays, dict) else type(arrays).__name__
        raise ConfigError(f"DATASET.ROOT {file}: holds no array {name}, found {names}")
    return found


def as_split(images: Any, labels: Any, name: str) -> Split:
    """Images and their labels as a data set has them.

    Raises:
        ConfigError: they are of another shape or type; it names them `name`_images, `name`_labels.
    """
    for what, found in zip(WHAT, (images, labels), strict=True):
        if not isinstance(found, Tensor):
            raise ConfigError(f"{name}_{what} is a {type(found).__name__}, expected a tensor")
    if images.dtype != torch.uint8:
        raise ConfigError(f"{name}_images is {images.dtype}, expected uint8")
    shape = tuple(images.shape)
    if images.ndim == 3:
        images = images[:, None].expand(-1, 3, -1, -1)
    elif images.ndim == 4 and images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ConfigError(
            f"{name}_images has shape {shape}, expected (N, side, side), (N, 3, side, side) or "
            f"(N, side, side, 3)"
        )
    if labels.is_floating_point() or labels.shape != images.shape[:1]:
        raise ConfigError(
            f"{name}_labels has shape {tuple(labels.shape)} and type {labels.dtype}, expected an "
            f"integer for each of the {len(images)} images"
        )
    return images.contiguous(), labels.long()


def load_file(file: Path) -> tuple[ImageSet, ImageSet]:
    """(train, test) of a file of arrays; normalised as the training images are distributed."""
    return as_sets(*read_arrays(file))


def load_folder(root: Path, side: int, held_out: bool) -> tuple[ImageSet, ImageSet]:
    """(train, test) of the folders train/ and val/ or test/ with a folder a class.

    Args:
        held_out: whether training images take the test set's place. Then there need be none, and
            `root` itself may have the folders of the classes: both sets are all of its images.
    """
    classes, splits, left_out = _listed(root, side, held_out)
    if left_out:
        print(f"DATASET.ROOT {root}: {left_out}")
    if len(splits) == 1:
        print(f"DATASET.ROOT {root}: holds no test set: DATASET.HOLDOUT takes its place")
    return as_sets(*read_splits(splits, side, padding=side // 8), names=classes)


def folder_facts(root: Path, side: int, held_out: bool) -> tuple[list[int], int]:
    """The training images of each class and their side, from a folder's listing."""
    classes, (train, *_), _ = _listed(root, side, held_out)
    count = Counter(label for _, label in train)
    return [count[label] for label in range(len(classes))], side


def _listed(root: Path, side: int, held_out: bool) -> Listed:
    if not side:
        raise ConfigError("DATASET.SIDE: 0 is not allowed, expected the pixels to scale images to")
    train, tests = (root / "train").is_dir(), [n for n in TESTS if (root / n).is_dir()]
    if train and tests:
        return list_folder(root, ("train", tests[0]))
    if held_out and root.is_dir() and not tests:
        return list_folder(root, ("train" if train else "",))
    raise ConfigError(
        f"DATASET.ROOT {root}: holds no folder {'val/ or test/' if train else 'train/'}: expected "
        f"train/ and val/ or test/, or DATASET.HOLDOUT, as 0.2, where it has no test set"
    )


def as_sets(*splits: Split, names: Sequence[str] = ()) -> tuple[ImageSet, ImageSet]:
    """(train, test), normalised by the mean and the deviation of each channel of the training
    images; of a single split both are that."""
    total, square, count = torch.zeros(3).double(), torch.zeros(3).double(), 0
    for part in splits[0][0].split(1024):
        pixels = part.double().div_(255).transpose(0, 1).flatten(1)
        total += pixels.sum(dim=1)
        square += pixels.square().sum(dim=1)
        count += pixels.shape[1]
    mean = total / count
    std = (square / count - mean**2).clamp_min(1e-8).sqrt()  # of one colour, anything will do
    padding = splits[0][0].shape[2] // 8
    sets = [
        ImageSet.build(*split, tuple(mean.tolist()), tuple(std.tolist()), padding, True, names)
        for split in splits
    ]
    return sets[0], sets[-1]


def list_folder(root: Path, names: Sequence[str]) -> Listed:
    """(classes, [(file, label) of train, of test], a line on what is left out) of a folder with a
    folder a class in each split.

    Left out are, at every level, entries that begin with a dot and `__MACOSX`; and in the folders
    of classes files of other formats than SUFFIXES and linked folders.

    Raises:
        ConfigError: a split is missing or empty, or has classes that the training set has not.
    """
    classes: list[str] = []
    splits = []
    left_out: Counter[str] = Counter()
    for name in names:
        folder = root / name
        if not folder.is_dir():
            raise ConfigError(f"DATASET.ROOT {root}: holds no folder {name}/")
        entries = _entries(folder, left_out)
        found = [entry.name for entry in entries if entry.is_dir()]
        beside = [entry for entry in entries if not entry.is_dir() and _is_image(entry.name)]
        left_out["images beside the folders of classes"] += len(beside)
        classes = classes or found
        if strange := sorted(set(found) - set(classes)):
            raise ConfigError(
                f"{folder}: has classes that {names[0]}/ has not: {', '.join(strange[:5])}"
            )
        files = [
            (file, label)
            for label, of_class in enumerate(classes)
            if of_class in found
            for file in sorted(_images(folder / of_class, left_out))
        ]
        empty = set(range(len(classes))) - {label for _, label in files}
        if empty and name == names[0] and files:
            raise ConfigError(_no_images(folder / classes[min(empty)], "", left_out))
        if not files:
            raise ConfigError(_no_images(folder, " in folders of classes", left_out))
        splits.append(files)
    if len(classes) < 2:
        raise ConfigError(f"{root / names[0]}: has {len(classes)} classes, expected two or more")
    return classes, splits, _told(left_out)


def _entries(folder: Path, left_out: Counter[str]) -> list[os.DirEntry[str]]:
    """What a folder holds, by name, but for what the system put there."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    kept = [e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX"]
    left_out["hidden entries"] += len(entries) - len(kept)
    return kept


def _images(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """The image files in a folder and in those within it."""
    for entry in _entries(folder, left_out):
        if entry.is_dir(follow_symlinks=False):
            yield from _images(Path(entry.path), left_out)
        elif entry.is_dir():
            left_out["linked folders"] += 1
        elif _is_image(entry.name):
            yield Path(entry.path)
        else:
            suffix = Path(entry.name).suffix.lower()
            left_out[f"{suffix} files" if suffix else "files without a suffix"] += 1


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _told(left_out: Counter[str]) -> str:
    """One line, or "": "left out: hidden entries (3), .jfif files (2)"."""
    parts = [f"{kind} ({count:,})" for kind, count in left_out.most_common() if count]
    rest = [f"{len(parts) - 6} more kinds"] if len(parts) > 6 else []
    return f"left out: {', '.join(parts[:6] + rest)}" if parts else ""


def _no_images(folder: Path, where: str, left_out: Counter[str]) -> str:
    return "; ".join(filter(None, [f"{folder}: holds no images{where}", _told(left_out)]))


def read_splits(splits: list[Files], side: int, padding: int) -> list[Split]:
    """What `read_files` gives of train and test.

    Raises:
        RunError: they are too large, or a file is no image.
    """
    count = sum(map(len, splits))
    size = nbytes(count, side) + nbytes(count, side + 2 * padding)
    check_memory(size, f"{count:,} images of {side} x {side}, and padded", SMALLER)
    return [read_files(files, side, name) for files, name in zip(splits, SPLITS, strict=False)]


def nbytes(images: int, side: int) -> int:
    return images * 3 * side**2


def read_files(files: Files, side: int, what: str) -> tuple[Tensor, Tensor]:
    """(images (N, 3, side, side) uint8, labels (N,)) of image files, decoded once and kept.

    An image is turned as its EXIF orientation says and scaled so that its shorter side fits, and
    its middle is taken.

    Raises:
        RunError: a file is no image.
    """
    labels = torch.tensor([label for _, label in files])
    digest = hashlib.sha256(f"4 {side}".encode())
    for file, _ in files:
        stat = file.stat()
        digest.update(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} ".encode())
        digest.update(str(stat.st_ctime_ns).encode())  # files of one date that change places
    kept = default_cache() / "images" / f"{digest.hexdigest()[:20]}.npy"
    with ExitStack() as stack:
        with suppress(OSError):  # where nothing can be kept each process decodes for itself
            kept.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(kept.with_suffix(".lock")))
        with suppress(OSError, ValueError, EOFError):  # it is not there, or damaged
            images = np.load(kept)
            if images.shape == (len(files), 3, side, side):
                return torch.from_numpy(images), labels
        images = _decoded([file for file, _ in files], side, what)
        try:
            write_atomically(kept, lambda sink: np.save(sink, images))
        except RunError as error:
            print(f"the decoded images are not kept: {error}")
    return torch.from_numpy(images), labels


def _decoded(files: list[Path], side: int, what: str) -> np.ndarray:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ConfigError(
            "images are decoded by Pillow: pip install 'mdistiller-ext[zoo]'"
        ) from error

    def decode(file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                if image.mode.startswith(("I", "F")):  # which would turn white
                    raise ValueError(f"{image.mode}, more than 8 bits a channel")
                image.load()
                upright: Image.Image = image
                with suppress(Exception):  # EXIF that cannot be read says nothing
                    upright = ImageOps.exif_transpose(image)
                colours = upright.convert("RGB")
                fitted = ImageOps.fit(colours, (side, side), Image.Resampling.BICUBIC)
            return np.asarray(fitted).transpose(2, 0, 1)
        except Exception as error:  # whatever a damaged file leads to
            raise RunError(f"{file}: no image that can be read: {brief(str(error))}") from error

    images = np.empty((len(files), 3, side, side), np.uint8)
    with ThreadPool(torch.get_num_threads()) as pool:
        decoded = tqdm(
            pool.imap(decode, files), what, len(files), unit=" images", leave=False, disable=None
        )
        for place, image in enumerate(decoded):
            images[place] = image
    return images
