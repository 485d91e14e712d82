"""The teacher table: a frozen network's logits for every view of every training image.

The augmentation has a finite number of views, 162 for CIFAR-100, and a teacher does not change:
what it answers is computed once and shared by all epochs, methods, students, seeds and processes.
"""

import hashlib
import json
import os
import random
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
from .log import KEY, Log
from .resident import Resident

FORMAT = 2
DTYPES = {"float32": np.float32, "float16": np.float16}
# A chunk has one size, so that an entry has the same bits whoever computes it and when.
CHUNK = {"cpu": 128}
CHUNK_ON_GPU = 2048
BLOCK = 2048  # entries between two looks at what other processes have computed meanwhile
TOLERANCE = {"float32": 1e-3, "float16": 1e-2}  # relative to a sample's largest logit
Progress = Callable[[int], Any]  # called with a number of entries that are ready


class Unwritable(RunError):
    """There is no place for a table."""


class TeacherTable:
    """Logits by (index, view), kept in a folder under `root` and computed where they are missing.

    Processes share a table without a lock (`Log`).

    Args:
        root: the folder of all tables.
        network: in evaluation mode it answers alike every time; it is copied.
        data: the training set; entries are computed on its device.
        dtype: of the entries, float32 or float16.
        tf32: whether a GPU computes them in TF32.

    Attributes:
        folder: `root` / the fingerprint of the network's weights, the images and their views.
        hits, misses: entries asked for that were there, or had to be computed.
        damaged: misses whose row did not match its checksum.
        problem: why entries are no longer kept, or "".
        resident: the entries on the GPU, after `hold`.

    Raises:
        Unwritable: its folder cannot be made.
        RunError: the files are damaged, or a sample of the entries is not what the network answers.
    """

    def __init__(
        self,
        root: Path,
        network: nn.Module,
        data: ImageSet,
        dtype: str = "float32",
        tf32: bool = False,
    ) -> None:
        # A part of a set shares the table of the whole.
        self.places = data.places
        self.data = data = data.whole or data
        self.dtype, self.tf32 = dtype, tf32
        self.device = data.targets.device
        self.chunk = CHUNK.get(self.device.type, CHUNK_ON_GPU)
        self.network = folded(network).to(self.device)
        self.hits = self.misses = self.damaged = 0
        self.problem = ""
        self.resident: Resident | None = None
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
            "tf32": tf32,
            "dtype": dtype,
        }
        text = json.dumps(facts, indent=1)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:20]
        self.rows = len(data) * data.num_views
        try:
            check_memory(
                self.rows * KEY.itemsize,
                f"teacher table: {self.rows:,} views of {len(data):,} images, whose keys take",
                "take a smaller DATASET.PADDING, or DISTILLER.TEACHER_TABLE off",
            )
        except RunError as error:
            raise Unwritable(str(error)) from error
        try:
            self._create(text.encode())
            writable = os.access(self.folder, os.W_OK)
        except OSError as error:
            raise Unwritable(
                f"teacher table {self.folder}: {error.strerror or error}; name another folder "
                f"with DISTILLER.TEACHER_TABLE_ROOT, or set DISTILLER.TEACHER_TABLE off"
            ) from error
        if not writable:
            self.problem = "the folder is read-only"
        self.log = Log(self.folder, self.rows, classes, np.dtype(DTYPES[dtype]))
        self.log.refresh()
        self._verify()

    @property
    def nbytes(self) -> int:
        """The size of the whole table on the disk, in bytes."""
        row = self.shape[2] * np.dtype(DTYPES[self.dtype]).itemsize
        return self.rows * (row + KEY.itemsize)

    @property
    def filled(self) -> int:
        """The number of entries that are there."""
        if self.resident:
            return self.resident.count
        self.log.refresh()
        return self.log.count

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
        position = self._position(index, view)
        if self.resident:
            lacking = self.resident.claim(position)
            self.misses, self.hits = self.misses + lacking, self.hits + len(position) - lacking
            if progress:
                progress(len(position) - lacking)
            self.resident.finish(progress)
            return self.resident.rows[position].float()
        position = position.cpu()
        self.log.refresh()
        rows, there, whole = self.log.read(position.numpy())
        if count := int(np.count_nonzero(there & ~whole)):
            self.damaged += count
            print(f"teacher table {self.folder}: {count} damaged entries are computed again")
        if progress:
            progress(int(whole.sum()))
        found, before = torch.from_numpy(rows), self.misses
        missing = torch.from_numpy(~whole).nonzero().flatten()
        # Runs of one seed ask for the same views at the same time: each process goes through the
        # missing ones in an order of its own, and looks again whether another was faster.
        blocks = list(missing.split(BLOCK)) if len(missing) else []
        random.Random().shuffle(blocks)
        for block in blocks:
            self.log.refresh()
            rows, _, whole = self.log.read(position[block].numpy())
            found[block] = torch.from_numpy(rows)
            block = block[torch.from_numpy(~whole)]
            if progress:
                progress(int(whole.sum()))
            self.misses += len(block)
            for part in block.split(self.chunk) if len(block) else ():
                found[part] = self._compute(position[part]).to(found)
                self._keep(position[part], found[part])
                if progress:
                    progress(len(part))
        self.hits += len(position) - (self.misses - before)
        return found.to(self.device, torch.float32)

    def prefetch(self, index: Tensor, view: Tensor) -> int:
        """Let `work` compute what of the next epoch is missing; returns how much that is.

        Nothing without `hold`: on a CPU it would take the steps' cores.
        """
        missing = self.resident.claim(self._position(index, view)) if self.resident else 0
        self.misses += missing
        return missing

    def work(self) -> None:
        """Between two launches: a chunk of what `prefetch` was asked for."""
        if self.resident:
            with suppress(torch.OutOfMemoryError):  # then it is computed before the next epoch
                self.resident.work()

    def flush(self) -> None:
        """Wait until all that was computed is written."""
        if self.resident:
            self.resident.flush()

    def _position(self, index: Tensor, view: Tensor) -> Tensor:
        if self.places is not None:
            index = self.places[index]
        return index * self.shape[1] + view

    def fill(self, progress: Progress | None = None, images: int = 1024) -> None:
        """Compute every entry that is missing; `images` is how many are looked at at once."""
        views = torch.arange(self.shape[1], device=self.device)
        count = len(self.data if self.places is None else self.places)
        for block in torch.arange(count, device=self.device).split(images):
            index = block.repeat_interleave(len(views))
            self.logits(index, views.repeat(len(block)), progress)

    def hold(self) -> None:
        """Keep the entries on the device as well, for a look-up without the host."""
        kind, shape = getattr(torch, self.dtype), (self.rows, self.shape[2])
        self.resident = Resident(
            shape, kind, self.device, self.chunk, self._compute, self._keep, self.log.slices()
        )
        self.damaged += self.resident.damaged

    def hold_on_gpu(self) -> None:
        """`hold` where a GPU has twice the memory for it."""
        if self.device.type == "cuda" and torch.cuda.mem_get_info(self.device)[0] > 2 * self.nbytes:
            self.hold()

    def _laid_out(self) -> int:
        """Lay the network out as it is faster, if it works so; returns its number of classes."""
        first = torch.zeros(1, dtype=torch.int64)
        if self.device.type == "cpu" or self.tf32:  # where it helps
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
            torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=self.tf32),
        ):
            batch = self.data.batch(position // views, position % views)
            return self.network(batch.image)[0][:count].float().clone()

    def _keep(self, position: Tensor, rows: Tensor) -> None:
        if self.problem or not len(position):
            return
        try:
            self.log.append(position.numpy(), rows.numpy())
        except OSError as error:
            self.problem = f"cannot be written: {error.strerror}"
            print(f"teacher table {self.folder}: {self.problem}; new entries are not kept")

    def _create(self, text: bytes) -> None:
        facts = self.folder / "table.json"
        if not facts.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "lock"):
                if not facts.exists():
                    write_atomically(facts, lambda sink: sink.write(text))
        if read(facts) != text:
            raise RunError(f"{facts}: damaged: it is of another table; remove the folder")

    def _verify(self, count: int = 32) -> None:
        there = np.flatnonzero(self.log.where >= 0)
        if not len(there):
            return
        some = np.random.default_rng().choice(there, min(count, len(there)), replace=False)
        rows, _, whole = self.log.read(some)
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


def digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        content = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {content.dtype} {tuple(content.shape)}".encode())
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()
