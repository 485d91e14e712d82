"""Rows of numbers in files to which several processes append without a lock."""

import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

KEY = np.dtype([("position", "<i8"), ("sum", "<u4")])
SLICE = 100_000  # rows that are read at once
SEGMENT = 1 << 40  # more rows than a segment has


class Log:
    """Rows by position, in the order in which they were computed.

    Each process appends to a segment of its own: rows to `NAME.rows`, then their positions and
    checksums to `NAME.keys`. A row that does not match its checksum counts as missing. So a crash
    leaves nothing half written that is believed, and a flipped bit is computed again; of two rows
    of one position the later one counts.

    Args:
        rows, columns: how many rows there can be, and their numbers.
        dtype: of the numbers, float32 or float16.
    """

    def __init__(self, folder: Path, rows: int, columns: int, dtype: np.dtype) -> None:
        self.folder, self.columns, self.dtype = folder, columns, dtype
        self.where = np.full(rows, -1, np.int64)  # segment x SEGMENT + row in it
        self.sums = np.zeros(rows, np.uint32)
        self.segments: dict[str, int] = {}  # by name the keys read
        self.own = ""

    @property
    def count(self) -> int:
        """The positions that have a row."""
        return int(np.count_nonzero(self.where >= 0))

    def refresh(self) -> None:
        """See what has been appended, by whomever."""
        for name in sorted(file.stem for file in self.folder.glob("*.keys")):
            with suppress(OSError):  # another user's, perhaps
                known = self.segments.setdefault(name, 0)
                file = self.folder / f"{name}.keys"
                if file.stat().st_size // KEY.itemsize == known:
                    continue
                keys = np.fromfile(file, KEY, offset=known * KEY.itemsize)
                self.segments[name] = known + len(keys)
                first = list(self.segments).index(name) * SEGMENT + known
                valid = (keys["position"] >= 0) & (keys["position"] < len(self.where))
                position = keys["position"][valid]
                self.where[position] = first + np.flatnonzero(valid)
                self.sums[position] = keys["sum"][valid]

    def read(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows (M, columns) at positions (M,), whether each is there, and whether it is whole."""
        where = self.where[position]
        there = where >= 0
        rows = np.zeros((len(position), self.columns), self.dtype)
        number, row = np.divmod(where, SEGMENT)
        names = list(self.segments)
        for segment in np.unique(number[there]):
            with suppress(OSError, ValueError):  # it is gone, or empty
                # Not mapped for longer: each map would keep a file open.
                file = self.folder / f"{names[segment]}.rows"
                shape = file.stat().st_size // (self.columns * self.dtype.itemsize), self.columns
                kept = np.memmap(file, self.dtype, "r", shape=shape)
                of_it = np.flatnonzero((number == segment) & (row < len(kept)))
                rows[of_it] = kept[row[of_it]]
        return rows, there, there & (checksum(rows, position) == self.sums[position])

    def slices(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Positions (M,), checksums (M,) and rows (M, columns), all that there are, in order."""
        for name, count in self.segments.items():
            for start in range(0, count, SLICE):
                with suppress(OSError):
                    keys, rows = self._slice(name, start, min(SLICE, count - start))
                    valid = (keys["position"] >= 0) & (keys["position"] < len(self.where))
                    position, sums = keys["position"][valid], keys["sum"][valid].astype(np.int64)
                    yield (
                        torch.from_numpy(position),
                        torch.from_numpy(sums),
                        torch.from_numpy(rows[valid]),
                    )

    def _slice(self, name: str, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        keys = np.fromfile(self.folder / f"{name}.keys", KEY, count, offset=start * KEY.itemsize)
        offset = start * self.columns * self.dtype.itemsize
        file = self.folder / f"{name}.rows"
        rows = np.fromfile(file, self.dtype, count * self.columns, offset=offset)
        count = min(len(keys), len(rows) // self.columns)
        return keys[:count], rows[: count * self.columns].reshape(-1, self.columns)

    def append(self, position: np.ndarray, rows: np.ndarray) -> None:
        """Add rows (M, columns) at positions (M,).

        Raises:
            OSError: they cannot be written.
        """
        self.own = self.own or f"{len(self.segments):06d}-{secrets.token_hex(4)}"
        keys = np.empty(len(position), KEY)
        keys["position"], keys["sum"] = position, checksum(rows, position)
        for kind, content in (("rows", rows), ("keys", keys)):
            with (self.folder / f"{self.own}.{kind}").open("ab") as file:
                file.write(content.tobytes())


def checksum(rows: Any, position: Any) -> Any:
    """(M,), in [1, 2^32): a sum with odd weights, which any single changed bit changes.

    Args:
        rows: (M, columns), and `position`, (M,): both arrays or both tensors.
    """
    parts: Any
    number: Any
    if isinstance(rows, Tensor):
        parts = rows.view(torch.int16).long() & 0xFFFF
        number = torch.arange(parts.shape[1], device=parts.device)
    else:
        parts = rows.view(np.uint16).astype(np.int64)
        number = np.arange(parts.shape[1])
    weights = (number * 0x9E3779B2 + 1) & 0xFFFFFFFF
    sums = ((parts * weights).sum(1) + position * 0x85EBCA6B) & 0xFFFFFFFF  # one for each place
    return sums + (sums == 0)
