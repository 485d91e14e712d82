"""A teacher table's entries on a GPU, looked up and computed while the training goes on."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .log import checksum


class Resident:
    """What is missing is computed on a stream of its own, beside the training's steps, and written
    by a thread, which gets copies in the host's memory and never asks the GPU for anything. All
    methods are for the training's thread and stream.

    Args:
        shape: (positions, classes).
        chunk: the entries that are computed at once.
        compute: the logits (M, classes) at positions (M,).
        keep: writes rows (M, classes) at positions (M,), both in the host's memory.
        slices: positions, checksums and rows that there are already.

    Attributes:
        rows: (positions, classes).
        claimed: (positions,), whether a row is there, or will be when `finish` has been called.
        damaged: slices' rows that did not match their checksums.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        chunk: int,
        compute: Callable[[Tensor], Tensor],
        keep: Callable[[Tensor, Tensor], None],
        slices: Iterable[tuple[Tensor, Tensor, Tensor]],
    ) -> None:
        self.chunk, self.compute, self.keep = chunk, compute, keep
        self.rows = torch.empty(shape, dtype=dtype, device=device)
        self.claimed = torch.zeros(shape[0], dtype=torch.bool, device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.missing: deque[Tensor] = deque()
        self.fresh: list[tuple[Tensor, Tensor, Tensor]] = []
        self.pool, self.writing = ThreadPoolExecutor(1), Future[None]()
        self.writing.set_result(None)
        self.damaged = 0
        for of_slice in slices:
            position, sums, rows = (part.to(device) for part in of_slice)
            whole = checksum(rows, position) == sums
            self.damaged += len(whole) - int(whole.sum())
            self.rows[position[whole]] = rows[whole]
            self.claimed[position[whole]] = True

    @property
    def count(self) -> int:
        """The positions that have a row."""
        return int(self.claimed.sum()) - sum(map(len, self.missing))

    def claim(self, position: Tensor) -> int:
        """Plan what is missing at positions (M,), all different; returns how much that is."""
        missing = position[~self.claimed[position]]
        self.claimed[missing] = True
        self.missing += missing.split(self.chunk) if len(missing) else ()
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.rows.device))
        return len(missing)

    def work(self) -> int:
        """Compute a chunk of what is missing; returns its size, 0 if there is none."""
        if not self.missing:
            return 0
        position = self.missing[0]
        with self._beside():
            fresh = self.compute(position).to(self.rows)
            self.rows[position] = fresh
            place, row = (part.to("cpu", non_blocking=True) for part in (position, fresh))
            # The position itself is kept as long as the stream may read it.
            self.fresh.append((position, place, row))
        self.missing.popleft()
        return len(position)

    def finish(self, progress: Callable[[int], Any] | None = None) -> None:
        """Compute all that was claimed, by whomever; then write it while the training goes on."""
        while count := self.work():
            if progress:
                progress(count)
        self._write()

    def flush(self) -> None:
        """Wait until all that was computed is written."""
        self._write()
        self.writing.result()

    def _write(self) -> None:
        if not self.fresh:
            return
        if self.stream:
            torch.cuda.current_stream(self.rows.device).wait_stream(self.stream)
            self.stream.synchronize()  # the copies to the host, too
        _, position, rows = zip(*self.fresh, strict=True)
        self.fresh = []
        self.writing.result()
        self.writing = self.pool.submit(self.keep, torch.cat(position), torch.cat(rows))

    def _beside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()
