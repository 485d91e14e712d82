"""The teacher table: a frozen network's logits for every view of every training image.

The augmentation has a finite number of views, 162 for CIFAR-100, and a teacher does not change:
what it answers is computed once and shared by all epochs, methods, students, seeds and processes.
"""

import errno
import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from ..data import ImageSet
from ..errors import RunError
from ..files import read, write_atomically
from ..memory import check_memory
from ..models import folded, set_layout

FORMAT = 1
DTYPES = {"float32": np.float32, "float16": np.float16}
# A chunk has one size, so that an entry has the same bits whoever computes it and when.
CHUNK = {"cpu": 128}
CHUNK_ON_GPU = 2048
BLOCK = 2048  # entries between two looks at what other processes have computed meanwhile
ROWS_A_SEEK = 1000  # checksums that are read at once in about the time of a single one
TOLERANCE = {"float32": 1e-3, "float16": 1e-2}  # relative to a sample's largest logit
Progress = Callable[[int], Any]  # called with a number of entries that are ready


class Unwritable(RunError):
    """There is no place for a table."""


class TeacherTable:
    """Logits by (index, view), kept in a folder under `root` and computed where they are missing.

    An entry is a row of the file `logits` and its checksum in the file `sums`. A row that does
    not match its checksum counts as missing: so processes share a table without a lock, a crash
    leaves nothing half written that is believed, and a flipped bit is computed again.

    Attributes:
        folder: `root` / the fingerprint of the network's weights, the images and their views.
        hits, misses: entries asked for that were there, or had to be computed.
        damaged: misses whose row did not match its checksum.
        problem: why entries are no longer kept, or "".
    """

    def __init__(self, root: Path, network: nn.Module, data: ImageSet, dtype: str = "float32"):
        """Open the table, or start an empty one; its files take disk space as they are filled.

        Args:
            network: in evaluation mode it answers alike every time; it is copied.
            data: the training set; entries are computed on its device.

        Raises:
            Unwritable: its folder cannot be made.
            RunError: the files are damaged, or a sample of the entries is not what the network
                answers.
        """
        # A part of a set shares the table of the whole.
        self.places = data.places
        self.data = data = data.whole or data
        self.dtype = dtype
        self.device = data.targets.device
        self.chunk = CHUNK.get(self.device.type, CHUNK_ON_GPU)
        self.network = folded(network).to(self.device)
        self.hits = self.misses = self.damaged = 0
        self.problem = ""
        self.resident: Tensor | None = None
        classes = self._laid_out()
        self.shape = (len(data), data.num_views, classes)
        facts = {
            "format": FORMAT,
            "network": digest(network.state_dict()),
            "images": digest({"padded": data.padded, "mean": data.mean, "std": data.std}),
            "padding": data.padding,
            "flips": data.flips,
            "shape": list(self.shape),
            "device": self.device.type,  # another kind's entries are equal to rounding only
            "dtype": dtype,
        }
        text = json.dumps(facts, indent=1)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:20]
        self.rows = len(data) * data.num_views
        self._files = [
            _File(self.folder / "logits", self.rows, np.dtype(DTYPES[dtype]), classes),
            _File(self.folder / "sums", self.rows, np.dtype(np.uint32), 1),
        ]
        try:
            check_memory(
                self._files[1].nbytes,
                f"teacher table: {self.rows:,} views of {len(data):,} images, whose checksums take",
                "take a smaller DATASET.PADDING, or DISTILLER.TEACHER_TABLE off",
            )
        except RunError as error:
            raise Unwritable(str(error)) from error
        try:
            self._create(text.encode())
            writable = [file.open() for file in self._files]
        except OSError as error:
            raise Unwritable(
                f"teacher table {self.folder}: {error.strerror or error}; name another folder "
                f"with DISTILLER.TEACHER_TABLE_ROOT, or set DISTILLER.TEACHER_TABLE off"
            ) from error
        if not all(writable):
            self.problem = "the folder is read-only"
        self._verify()

    @property
    def nbytes(self) -> int:
        """The size of the whole table on the disk, in bytes."""
        return sum(file.nbytes for file in self._files)

    @property
    def filled(self) -> int:
        """The number of entries that are there."""
        return int(np.count_nonzero(self._sums()))

    def facts(self) -> dict[str, Any]:
        """For the record."""
        return {
            "fingerprint": self.folder.name,
            "dtype": self.dtype,
            "bytes": self.nbytes,
            "entries": self.rows,
            "hits": self.hits,
            "misses": self.misses,
            "damaged": self.damaged,
            "problem": self.problem,
        }

    def logits(self, index: Tensor, view: Tensor, progress: Progress | None = None) -> Tensor:
        """The network's logits, (M, C), float32, of views (M,) of images (M,); on their device."""
        if self.places is not None:
            index = self.places[index]
        position, before = index * self.shape[1] + view, self.misses
        if self.resident is None:
            position = position.cpu()
            rows, there, whole = self._read(position.numpy())
            if count := int(np.count_nonzero(there & ~whole)):
                self.damaged += count
                print(f"teacher table {self.folder}: {count} damaged entries are computed again")
            found, present = torch.from_numpy(rows), torch.from_numpy(whole)
        else:
            present, found = self.present[position], self.resident[position]
        missing = (~present).nonzero().flatten()
        if progress:
            progress(len(position) - len(missing))
        # Runs of one seed ask for the same views at the same time: each process goes through the
        # missing ones in an order of its own, and looks again whether another was faster.
        blocks = list(missing.split(BLOCK)) if len(missing) else []
        random.Random().shuffle(blocks)
        for block in blocks:
            if self.resident is None:
                rows, _, whole = self._read(position[block].numpy())
                found[block] = torch.from_numpy(rows)
                block = block[torch.from_numpy(~whole)]
                if progress:
                    progress(int(whole.sum()))
            self.misses += len(block)
            for part in block.split(self.chunk) if len(block) else ():
                fresh = self._compute(position[part]).to(found)
                self._keep(position[part], fresh)
                found[part] = fresh
                if progress:
                    progress(len(part))
        self.hits += len(position) - (self.misses - before)
        return found.to(self.device, torch.float32)

    def fill(self, progress: Progress | None = None, images: int = 1024) -> None:
        """Compute every entry that is missing; `images` is how many are looked at at once."""
        views = torch.arange(self.shape[1], device=self.device)
        count = len(self.data if self.places is None else self.places)
        for block in torch.arange(count, device=self.device).split(images):
            index = block.repeat_interleave(len(views))
            self.logits(index, views.repeat(len(block)), progress)

    def hold(self) -> None:
        """Keep the entries on the device as well, for a look-up without the host."""
        kind = getattr(torch, self.dtype)
        resident = torch.empty(self.rows, self.shape[2], dtype=kind, device=self.device)
        self.present = torch.zeros(self.rows, dtype=torch.bool, device=self.device)
        there = np.flatnonzero(self._sums())
        for position in np.array_split(there, len(there) // 100_000 + 1):
            rows, _, whole = self._read(position)
            places = torch.from_numpy(position[whole]).to(self.device)
            resident[places] = torch.from_numpy(rows[whole]).to(self.device)
            self.present[places] = True
        self.resident = resident

    def _laid_out(self) -> int:
        """Lay the network out as it is faster, if it works so; returns its number of classes."""
        first = torch.zeros(1, dtype=torch.int64)
        if self.device.type == "cpu":  # where it helps; without tensor cores not on a GPU
            set_layout(self.network, torch.channels_last)
            with suppress(Exception):  # as of `x.view(B, -1)` over maps
                return self._compute(first).shape[1]
            set_layout(self.network, torch.contiguous_format)
        return self._compute(first).shape[1]

    def _compute(self, position: Tensor) -> Tensor:
        count, chunk = len(position), self.chunk
        position = torch.cat([position, position[-1:].expand(chunk - count)]).to(self.device)
        views = self.data.num_views
        # One arithmetic for all entries, whatever a run trains in.
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            batch = self.data.batch(position // views, position % views)
            return self.network(batch.image)[0][:count].float().clone()

    def _keep(self, position: Tensor, fresh: Tensor) -> None:
        if self.resident is not None:
            self.resident[position], self.present[position] = fresh, True
        if self.problem:
            return
        places, rows = position.cpu().numpy(), fresh.cpu().numpy()
        try:
            self._files[0].write(places, rows)
            self._files[1].write(places, _checksum(rows, places)[:, None])
        except OSError as error:
            self.problem = f"cannot be written: {error.strerror}"
            print(f"teacher table {self.folder}: {self.problem}; new entries are not kept")

    def _read(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, whether each is there, and whether it is whole as well."""
        few = len(position) * ROWS_A_SEEK < self.rows
        sums = self._sums_at(position) if few else self._sums()[position]
        there = sums != 0
        logits = self._files[0]
        rows = np.zeros((len(position), self.shape[2]), logits.dtype)
        rows[there] = logits.content[position[there]]
        whole = there & (_checksum(rows, position) == sums)
        return rows, there, whole

    def _sums(self) -> np.ndarray:
        """The checksum of every entry, 0 where there is none; none when the file is gone.

        Read, not mapped, and so are no rows that were never written: on a full tmpfs a look at
        a hole in a mapped file ends the process.
        """
        try:
            sums = np.fromfile(self._files[1].path, np.uint32)
        except OSError:
            sums = np.empty(0, np.uint32)
        return sums if len(sums) == self.rows else np.zeros(self.rows, np.uint32)

    def _sums_at(self, position: np.ndarray) -> np.ndarray:
        """The checksums of some entries, without those of all; 0 as `_sums` has it."""
        sums = np.zeros(len(position), np.uint32)
        with suppress(OSError), self._files[1].path.open("rb", buffering=0) as file:
            for place, number in enumerate(position.tolist()):
                file.seek(4 * number)
                sums[place] = int.from_bytes(file.read(4), sys.byteorder)
        return sums

    def _create(self, text: bytes) -> None:
        facts = self.folder / "table.json"
        if not facts.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "lock"):
                if not facts.exists():
                    for file in self._files:
                        file.create()
                    write_atomically(facts, lambda sink: sink.write(text))
        if read(facts) != text:
            raise RunError(f"{facts}: damaged: it is of another table; remove the folder")

    def _verify(self, count: int = 32) -> None:
        there = np.flatnonzero(self._sums())
        if not len(there):
            return
        some = np.random.default_rng().choice(there, min(count, len(there)), replace=False)
        rows, _, whole = self._read(some)
        kept = torch.from_numpy(rows[whole].astype(np.float32))
        if not len(kept):
            return
        fresh = self._compute(torch.from_numpy(some[whole])).cpu()
        error = (kept - fresh).abs().amax(1) / fresh.abs().amax(1)
        right = error <= TOLERANCE[self.dtype]  # a NaN is not
        if not right.all():
            raise RunError(
                f"teacher table {self.folder}: {int((~right).sum())} of "
                f"{len(kept)} entries are not what the teacher answers (relative difference up to "
                f"{error.max():.1e}): it is damaged, or of another network with these weights, or "
                f"the teacher answers an image differently each time: remove the folder, or set "
                f"DISTILLER.TEACHER_TABLE off"
            )


class _File:
    """A fixed number of rows: read through a memory map, written so that a full disk is an error.

    A write through the map would end the process there.
    """

    def __init__(self, path: Path, rows: int, dtype: np.dtype, columns: int) -> None:
        self.path, self.shape, self.dtype = path, (rows, columns), dtype
        self.row_bytes = columns * dtype.itemsize
        self.nbytes = rows * self.row_bytes

    def create(self) -> None:
        with self.path.open("wb") as file:
            file.truncate(self.nbytes)

    def open(self) -> bool:
        """Map the file; False when it cannot be written."""
        size = self.path.stat().st_size
        if size != self.nbytes:
            raise RunError(
                f"{self.path}: damaged: {size} bytes, expected {self.nbytes}; remove the folder"
            )
        self.content = np.asarray(np.memmap(self.path, self.dtype, "r", shape=self.shape))
        return os.access(self.path, os.W_OK)

    def write(self, position: np.ndarray, rows: np.ndarray) -> None:
        order = position.argsort()
        position, rows = position[order], np.ascontiguousarray(rows[order].astype(self.dtype))
        ends = [*(np.flatnonzero(np.diff(position) != 1) + 1), len(position)]
        with self.path.open("r+b", buffering=0) as file:
            start = 0
            for end in ends:  # rows that follow each other are one write
                file.seek(int(position[start]) * self.row_bytes)
                content = rows[start:end].tobytes()
                if file.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                start = end


def _checksum(rows: np.ndarray, position: np.ndarray) -> np.ndarray:
    """(M,), uint32, never 0: a sum with odd weights, which any single changed bit changes."""
    parts = np.ascontiguousarray(rows).view(np.uint16).astype(np.uint32)
    weights = np.arange(parts.shape[1], dtype=np.uint32) * np.uint32(0x9E3779B2) + np.uint32(1)
    sums = (parts * weights).sum(axis=1, dtype=np.uint32)
    sums += position.astype(np.uint32) * np.uint32(0x85EBCA6B)  # a row in another's place
    return np.where(sums == 0, np.uint32(1), sums)


def digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        content = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {content.dtype} {tuple(content.shape)}".encode())
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()
