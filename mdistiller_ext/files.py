"""Files that are complete or not there: written, read without trust, downloaded, unpacked."""

import errno
import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
import textwrap
import tokenize
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import RunError
from .memory import check_memory

CHUNK = 1 << 20
LIMIT = 1 << 30  # bytes; nothing that this project downloads comes near
FOLDER = 0x10  # such a member of a zip archive torch.load leaves as it finds the memory
ADVICE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EACCES: "make its folder writable, or name another",
    errno.EROFS: "make its folder writable, or name another",
    errno.ENOENT: "its folder is gone",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure into one line: which file cannot be written, why, and what to do.

    Raises:
        RunError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        advice = ADVICE.get(error.errno or 0)
        raise RunError(
            f"{path}: cannot be written: {error.strerror or error}"
            + (f"; {advice}" if advice else "")
        ) from error


def write_atomically(
    path: Path, write: Callable[[BinaryIO], Any], previous: Path | None = None
) -> None:
    """Write a file beside `path`, flush it to the disk and put it in place in one step.

    Args:
        previous: keeps the file that was at `path`, without copying it. At every moment one of
            the two is there and complete.

    Raises:
        RunError: it cannot be written; what was there stays as it was.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            with part.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if previous and path.exists():
                previous.unlink(missing_ok=True)
                try:
                    previous.hardlink_to(path)
                except OSError:  # not every file system has hard links
                    path.replace(previous)
            part.replace(path)
    finally:
        with suppress(OSError):  # it must not hide what happened first
            part.unlink(missing_ok=True)


def discard_parts(folder: Path) -> None:
    """Remove what killed processes left of files; for a folder where no other process writes."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def save(content: dict[str, Any], *paths: Path, previous: Path | None = None) -> None:
    """Write it as each of these files, as `write_atomically` does."""
    buffer = io.BytesIO()  # torch.save would not say that a disk is full
    torch.save(content, buffer)
    for path in paths:
        write_atomically(path, lambda file: file.write(buffer.getbuffer()), previous)


def read(path: Path) -> bytes:
    """The content of a file.

    Raises:
        RunError: it is missing, a device, a pipe or a folder, or larger than the free memory.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise RunError(f"{path}: cannot be read: it is no regular file")
        if size > LIMIT:  # of a smaller one it need not be asked
            check_memory(size, f"{path}: holds {size:,} bytes", "free some, or take a smaller file")
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from error


def load(path: Path) -> Any:
    """Read what `torch.save` wrote, tensors and plain types only: none of its code is run.

    Raises:
        RunError: the file is missing, damaged, or holds anything else.
    """
    return parse(path, read(path))


def parse(path: Path, raw: bytes) -> Any:
    """What `load` gives of a file whose content was read already.

    Raises:
        RunError: it is damaged, or holds anything else than tensors and plain types.
    """
    file = io.BytesIO(raw)
    try:
        if zipfile.is_zipfile(file):  # PyTorch's format since 1.6; the one before has no checksums
            _check_sums(file, len(raw))
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True)
        for name, value in entries(content):
            if isinstance(value, Tensor) and not _is_dense(value):
                raise ValueError(f"{name} is no tensor with a real number for each element")
    except Exception as error:  # an untrusted file can raise anything
        raise RunError(f"{path}: not a readable checkpoint: {_unreadable(error)}") from error
    return content


def entries(content: Any) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in nested dicts, lists and tuples, each of these once.

    What is loaded may hold itself, or one list a billion times.
    """
    seen, left = set(), [("", content)]
    while left:
        name, value = left.pop()
        if not isinstance(value, (dict, list, tuple)):
            yield name, value
        elif id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{name}.{key}" if name else str(key), item) for key, item in items]


def check_finite(path: Path, content: Any) -> None:
    """Refuse a NaN or an infinity anywhere in what was loaded from `path`.

    Raises:
        RunError: it names the entry.
    """
    for name, value in entries(content):
        if isinstance(value, (float, Tensor)) and not torch.as_tensor(value).isfinite().all():
            raise RunError(f"{path}: {name} holds values that are not finite")


def download(url: str, path: Path, md5: str | None = None) -> None:
    """Fetch a URL into a file; an interrupted or wrong download leaves nothing behind.

    Raises:
        RunError: the server cannot be reached, answers with an error or with other content, or
            the file cannot be written.
    """
    digest = hashlib.md5()

    def keep(sink: BinaryIO) -> None:
        for chunk in _received(url, path.name):
            sink.write(chunk)
            digest.update(chunk)
        if md5 and digest.hexdigest() != md5:
            raise RunError(f"{url}: md5 {digest.hexdigest()}, expected {md5}; nothing was kept")

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, keep)


def download_folder(url: str, folder: str, into: Path, md5: str | None = None) -> None:
    """Fetch a tar archive and unpack one of its folders as `into / folder`; nothing else is left.

    Raises:
        RunError: as `download` and `extract`.
    """
    archive = into / url.rsplit("/", 1)[1]
    try:
        download(url, archive, md5)
        extract(archive, folder, into, LIMIT)
    finally:
        with suppress(OSError):
            archive.unlink(missing_ok=True)


def extract(archive: Path, folder: str, into: Path, room: int | None = None) -> None:
    """Unpack one top-level folder of a tar archive as `into / folder`, complete or not at all.

    Args:
        room: bytes that all members together may take; by default what is free on the disk.

    Raises:
        RunError: a member would land outside, is no file or folder, or declares more bytes than
            there is room; or the archive is damaged or lacks the folder.
    """
    try:
        room = shutil.disk_usage(into).free if room is None else room
        with tempfile.TemporaryDirectory(
            dir=into, prefix=".extract-", ignore_cleanup_errors=True
        ) as temporary:
            with tarfile.open(archive) as tar:
                for member in tar:
                    _check_member(member, room)
                    room -= member.size
                    # By hand: the filters of `extractall` are newer than Python 3.11.2.
                    place = Path(temporary, member.name.lstrip("/"))
                    if member.isdir():
                        place.mkdir(parents=True, exist_ok=True)
                    elif content := tar.extractfile(member):
                        place.parent.mkdir(parents=True, exist_ok=True)
                        with place.open("wb") as file:
                            shutil.copyfileobj(content, file)
            if not Path(temporary, folder).is_dir():
                raise ValueError(f"it has no folder {folder}")
            Path(temporary, folder).replace(into / folder)
    except Exception as error:  # an untrusted archive can raise anything
        raise RunError(f"{archive}: cannot be unpacked: {_brief(error)}") from error


def _check_member(member: tarfile.TarInfo, room: int) -> None:
    if not (member.isreg() or member.isdir()):
        raise ValueError(f"{member.name!r} is neither a file nor a folder")
    if not 0 <= member.size <= room:
        raise ValueError(f"{member.name!r} declares {member.size:,} bytes, too many")
    if ".." in Path(member.name).parts:
        raise ValueError(f"{member.name!r} is outside the archive")


def _received(url: str, name: str) -> Iterator[bytes]:
    """The content at a URL, part by part, with a progress bar."""
    received = 0
    try:
        with urllib.request.urlopen(url, timeout=30) as source:
            size = int(source.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=name) as bar:
                while chunk := source.read(CHUNK):
                    received += len(chunk)
                    if max(size, received) > LIMIT:
                        raise RunError(
                            f"{url}: sends {max(size, received):,} bytes or more, expected at "
                            f"most {LIMIT:,}; nothing was kept"
                        )
                    bar.update(len(chunk))
                    yield chunk
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        raise RunError(f"{url}: download failed: {_brief(error)}") from error
    if size and received != size:
        raise RunError(f"{url}: broke off after {received} of {size} bytes")


def _check_sums(file: io.BytesIO, size: int) -> None:
    """torch.load takes no notice of the checksums that torch.save has written."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.external_attr & FOLDER:
                raise ValueError(f"{member.filename} is a folder")
        declared = sum(member.file_size for member in archive.infolist())
        if declared > size:
            raise ValueError(f"it declares {declared:,} bytes, more than it has")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{damaged} does not match its checksum")


def _is_dense(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_quantized or tensor.is_complex())
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def _unreadable(error: Exception) -> str:
    """Why torch.load gave up, without its advice to trust the file."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"it holds a {found[1]}, and only tensors and plain types are loaded: all else could "
            f"run code; save its state_dict()"
        )
    if type(error) is ValueError:  # our own
        return _brief(error)
    return "it is empty, cut short, or nothing that torch.save wrote"


def _brief(error: Exception) -> str:
    """An error's text in one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return textwrap.shorten(text, 300, placeholder=" ...") or type(error).__name__


def default_cache() -> Path:
    """The cache folder: MDISTILLER_EXT_CACHE, or mdistiller_ext in the user's cache folder."""
    own = os.environ.get("MDISTILLER_EXT_CACHE")
    users = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own).expanduser() if own else Path(users) / "mdistiller_ext" / "teacher_tables"


def code_hash(root: Path, but: Collection[str] = ()) -> str:
    """sha256 over the names and the code of all Python files under `root`, as `file_hash` has it.

    Args:
        but: folders of `root` that are left out.
    """
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if name.parts[0] not in but:
            digest.update(f"{name.as_posix()} {file_hash(file)}\n".encode())
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    """sha256 of a Python file's code: comments, blank lines and spaces at a line's end apart."""
    stat = file.stat()
    return _file_hash(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=1 << 12)  # a study asks for each of its runs
def _file_hash(file: Path, mtime_ns: int, size: int) -> str:
    content = file.read_bytes()
    with suppress(SyntaxError, tokenize.TokenError, ValueError):  # no Python, as it seems
        content = bare_code(content.decode()).encode()
    return hashlib.sha256(content).hexdigest()


def bare_code(text: str) -> str:
    """Python code without comments, blank lines and spaces at the ends of lines.

    Raises:
        SyntaxError, tokenize.TokenError: it is none.
    """
    text = text.replace("\r\n", "\n")
    lines, inside = text.split("\n"), set[int]()  # that end within a string, where spaces count
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        (row, column), (end, _) = token.start, token.end
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
        elif end > row and token.type not in (tokenize.NEWLINE, tokenize.NL):
            inside |= set(range(row - 1, end - 1))
    kept = (line if n in inside else line.rstrip() for n, line in enumerate(lines))
    return "\n".join(line for n, line in enumerate(kept) if line or n in inside)
