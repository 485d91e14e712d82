"""Files that are complete or not there: written, read without trust, downloaded, unpacked."""

import hashlib
import os
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from .errors import RunError

CHUNK = 1 << 20


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file beside `path`, flush it to the disk and put it in place in one step."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def discard_parts(folder: Path) -> None:
    """Remove what killed processes left of files; for a folder where no other process writes."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def save(content: dict[str, Any], path: Path) -> None:
    write_atomically(path, lambda file: torch.save(content, file))


def load(path: Path) -> Any:
    """Read what `torch.save` wrote, tensors and plain types only: none of its code is run.

    Raises:
        RunError: the file is missing, damaged, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an untrusted file can raise anything
        reason = str(error).split("\n", 1)[0]
        raise RunError(f"{path}: not a readable checkpoint: {reason}") from error


def download(url: str, path: Path, md5: str | None = None) -> None:
    """Fetch a URL into a file; an interrupted or wrong download leaves nothing behind.

    Raises:
        RunError: the server cannot be reached, answers with an error or with other content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    digest = hashlib.md5()
    try:
        with urllib.request.urlopen(url, timeout=30) as source, part.open("wb") as sink:
            size = int(source.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := source.read(CHUNK):
                    sink.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
                received = bar.n
        if size and received != size:
            raise RunError(f"{url}: broke off after {received} of {size} bytes")
        if md5 and digest.hexdigest() != md5:
            raise RunError(f"{url}: md5 {digest.hexdigest()}, expected {md5}; nothing was kept")
        part.replace(path)
    except (OSError, HTTPException, ValueError) as error:
        raise RunError(f"{url}: download failed: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def extract(archive: Path, folder: str, into: Path) -> None:
    """Unpack one top-level folder of a tar archive as `into / folder`, complete or not at all.

    Raises:
        RunError: a member would land outside, is a device or a link to outside, or the archive
            is damaged or lacks the folder.
    """
    with tempfile.TemporaryDirectory(dir=into, prefix=".extract-") as temporary:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
            Path(temporary, folder).replace(into / folder)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise RunError(f"{archive}: cannot be unpacked: {error}") from error
