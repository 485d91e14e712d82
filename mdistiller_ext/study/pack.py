"""A study's runs in one small file, and back into a study."""

import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ..engine.folder import LATEST
from ..engine.record import read_record
from ..errors import ConfigError, RunError, counted
from ..files import extract, write_atomically, writing
from .launch import LOG
from .plan import RUNS


def pack(study: Path, target: Path, *, unfinished: bool = False, overwrite: bool = False) -> str:
    """Write a study folder's finished runs, record and log of each, into an archive.

    Args:
        unfinished: with the other runs too, and the states from which they go on.

    Returns:
        What was packed.

    Raises:
        ConfigError: the target exists and is not to be overwritten.
        RunError: there is nothing to pack, or the target cannot be written.
    """
    if target.exists() and not overwrite:
        raise ConfigError(f"{target}: is there already: name another file, or give --overwrite")
    files: list[Path] = []
    count = Counter[bool]()
    for folder in sorted((study / RUNS).glob("*/")):
        finished, _ = _progress(folder)
        if finished or (unfinished and (folder / LATEST).exists()):
            names = ["record.json", LOG] if finished else ["record.json", LOG, LATEST]
            files += [folder / name for name in names if (folder / name).exists()]
            count[finished] += 1
    if not files:
        raise RunError(f"{study}: no {'' if unfinished else 'finished '}runs of a study in {RUNS}/")

    def write(sink: BinaryIO) -> None:
        with tarfile.open(fileobj=sink, mode="w:xz", dereference=True) as archive:
            for file in files:
                archive.add(file, file.relative_to(study))

    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, write)
    runs, size = counted(count[True], "finished run"), target.stat().st_size
    return f"{target}: {runs}, {count[False]} unfinished, {size / 1e3:,.0f} kB"


def unpack(archive: Path, study: Path) -> str:
    """Put an archive's runs into a study folder, where each is further than what is there.

    Returns:
        What was taken, and what was left as it was.

    Raises:
        RunError: the archive is damaged, or a run that it has is in use.
    """
    runs = study / RUNS
    with writing(runs):
        runs.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=study, prefix=".unpack-")
    taken = kept = 0
    with temporary as place:
        extract(archive, RUNS, Path(place))
        for new in sorted(Path(place, RUNS).glob("*/")):
            old = runs / new.name
            if _progress(old) >= _progress(new):
                kept += 1
                continue
            with writing(old):
                old.mkdir(exist_ok=True)
                try:
                    with FileLock(old / "lock", timeout=0):
                        old.rename(Path(place, f"{new.name}.old"))
                        new.rename(old)
                except Timeout:
                    raise RunError(f"{old} is in use by another process") from None
            taken += 1
    return f"{study}: {counted(taken, 'run')} taken from {archive}, {kept} left as they were"


def _progress(folder: Path) -> tuple[bool, int]:
    """(has it come to its end, epochs) of a run; less than anything where there is none."""
    try:
        record: dict[str, Any] = read_record(folder / "record.json")
    except RunError:
        return False, -1
    return record["status"] == "finished", len(record["epochs"])
