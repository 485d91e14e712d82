"""A training step whose inputs all lie on the device, so that a CUDA graph can be one launch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import groupby, repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data import ImageSet
from ..distillers import Distiller
from ..losses import widest
from ..models import Stack
from ..policies import Context
from .loop import Meter, Step, train_step

if TYPE_CHECKING:
    from .stacked import Stacked

WARM_UP = 2  # steps of each size on a side stream before a capture, as torch.cuda.graph asks for
STEPS = 16  # of a launch: the host's part and the gaps between graphs become small


class DeviceSteps:
    """The steps of an epoch: gather, augment, forward, backward, SGD and the meter's sums.

    The epoch's order, views and teacher logits, its learning rate and what `schedule` gives are
    tensors that are filled before the epoch; a cursor on the device finds the batch. Nothing
    else changes from step to step, so on a GPU several are one replay of a graph that was captured
    once; on a CPU the same steps run as they are.

    Args:
        steps: how many are launched at once, where so many are left; a run stops between launches.
        classes: the number of the teacher table's logits; 0: the live teacher is part of the step.
        draws: the random numbers that the method needs for each image.
        stacked: with which runs the steps are taken; they are captured for all of them.

    Raises:
        Exception: whatever a method raises that cannot be captured; nothing was changed then.
    """

    def __init__(
        self,
        distiller: Distiller,
        optimizer: torch.optim.Optimizer,
        data: ImageSet,
        batch_size: int,
        meter: Meter,
        autocast: Callable[[], AbstractContextManager],
        classes: int,
        draws: int = 0,
        steps: int | None = None,
        stacked: "Stacked | None" = None,
    ) -> None:
        self.distiller, self.optimizer, self.data = distiller, optimizer, data
        self.meter, self.autocast, self.steps = meter, autocast, steps or STEPS
        device = data.targets.device
        self.sizes = [len(part) for part in torch.arange(len(data)).split(batch_size)]
        self.index = torch.zeros(len(data), dtype=torch.int64, device=device)
        self.view = torch.zeros_like(self.index)
        self.answers = torch.zeros(len(data), classes, device=device) if classes else None
        self.drawn = torch.zeros(len(data), draws, device=device) if draws else None
        self.cursor = torch.zeros((), dtype=torch.int64, device=device)
        # In float64, so that the device computes with the very numbers of the host.
        self.lr = torch.zeros((), dtype=torch.float64 if device.type == "cpu" else torch.float32)
        self.lr = self.lr.to(device)
        for group in optimizer.param_groups:
            group["lr"] = self.lr
        self.settings = {
            name: torch.tensor(float(value), dtype=widest(device), device=device)
            for name, value in distiller.schedule(1).items()
        }
        self.alone, self.stacked = Launches([self]), stacked
        if device.type == "cuda" and not stacked:
            distiller.train()
            with torch.cuda.device(device):
                self.alone.capture(device)

    def epoch(
        self,
        lr: float,
        index: Tensor,
        view: Tensor,
        answers: Tensor | None,
        drawn: Tensor | None = None,
    ) -> Iterator[None]:
        """The steps of the meter's epoch that it has not seen, a launch each time it is advanced.

        Args:
            index, view: the order and the views of the epoch's last M images, (M,).
            answers: the teacher's logits in that order, (M, C), where there is a table.
            drawn: the epoch's random numbers by image, (N, draws), where there are some.
        """
        self.distiller.train()
        first = len(self.index) - len(index)
        self.index[first:] = index
        self.view[first:] = view
        if self.answers is not None and answers is not None:
            self.answers[first:] = answers
        if self.drawn is not None and drawn is not None:
            self.drawn.copy_(drawn)
        self.cursor.fill_(first)
        self.lr.fill_(lr)
        for name, value in self.distiller.schedule(self.meter.epoch).items():
            self.settings[name].fill_(value)
        for launch in self.launches(self.meter.step):
            if self.stacked:
                yield from self.stacked.turn(self, launch)
            else:
                self.alone(*launch)
                yield

    def launches(self, first: int = 0) -> Iterator[tuple[int, int]]:
        """(batch size, steps) of each launch of an epoch, from its step `first` on."""
        for size, batches in groupby(self.sizes[first:]):
            together, alone = divmod(len(list(batches)), self.steps)
            yield from repeat((size, self.steps), together)
            yield from repeat((size, 1), alone)

    def ask(self, size: int) -> Step:
        """The step with the next `size` images of the epoch."""
        place = self.cursor + torch.arange(size, device=self.cursor.device)
        batch = self.data.batch(self.index[place], self.view[place])
        context = Context(
            self.settings,
            None if self.answers is None else self.answers[place],
            None if self.drawn is None else self.drawn[batch.index],
        )
        self.cursor += size
        # No epoch: a method that counts on it, rather than on its schedule, fails here and now
        # instead of training every epoch as the one that was captured.
        return Step(self.distiller, self.optimizer, batch, None, context, self.meter, self.autocast)


class Launches:
    """Steps of some runs at once, as CUDA graphs when they were captured."""

    def __init__(self, rows: Sequence[DeviceSteps], stack: Stack | None = None) -> None:
        self.rows, self.stack = rows, stack
        self.streams: list[torch.cuda.Stream] = []
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def __call__(self, size: int, count: int) -> None:
        """Take the next `count` steps of `size` images."""
        if self.graphs:
            self.graphs[size, count].replay()
        else:
            self.take(size, count)
        for row in self.rows:
            for _ in range(count):
                row.meter.count(size)

    def take(self, size: int, count: int) -> None:
        for _ in range(count):
            self.step(size)

    def step(self, size: int) -> None:
        steps = [row.ask(size) for row in self.rows]
        train_step(*steps, stack=self.stack, streams=self.streams)

    def capture(self, device: torch.device) -> None:
        """Capture a graph of each kind of launch; all that a step changes stays as it was.

        On the stream of the moment, which is the run's own: cuBLAS gives the graphs of one stream
        one workspace, and those of several runs are replayed side by side.

        Raises:
            Exception: whatever a method raises that cannot be captured; nothing was changed then.
        """
        kept = {tensor: tensor.detach().clone() for tensor in self._state()}
        meters = [(row, row.meter.epoch, row.meter.sizes) for row in self.rows]
        stream = torch.cuda.current_stream(device)
        if stream == torch.cuda.default_stream(device):  # on which nothing can be captured
            stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        if len(self.rows) > 1:
            self.streams = [torch.cuda.Stream(device) for _ in self.rows]
        # Single steps, too: a run may go on in the middle of an epoch.
        first = self.rows[0]
        kinds = dict.fromkeys([*first.launches(), *((size, 1) for size in first.sizes)])
        graphs = {}
        try:
            with torch.cuda.stream(stream):
                for size in WARM_UP * list(set(first.sizes)):
                    self._try(partial(self.step, size))
                # What waits for the device would fail in the capture, and leave it half made.
                with _no_synchronisation():
                    for size in set(first.sizes):
                        self._try(partial(self.step, size))
                for size, count in kinds:
                    graph = graphs[size, count] = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, stream=stream):
                        self.take(size, count)
                    self._try(graph.replay)
                    if any(row.cursor.item() != size * count for row in self.rows):
                        raise RuntimeError("the graph is empty")
        finally:
            torch.cuda.current_stream(device).wait_stream(stream)
            with torch.no_grad():
                for tensor in self._state():
                    if tensor in kept:
                        tensor.copy_(kept[tensor])
                    else:  # momentum, of which SGD begins with none, and the first sums
                        tensor.zero_()
            for row, epoch, sizes in meters:
                row.meter.epoch, row.meter.sizes = epoch, sizes
        self.graphs = graphs

    def _try(self, step: Callable[[], None]) -> None:
        """A step on the epoch's first images, as often as one likes."""
        for row in self.rows:
            row.cursor.zero_()
            row.meter.start(1)
        step()

    def _state(self) -> list[Tensor]:
        """What a step changes."""
        found: list[Tensor] = []
        for row in self.rows:
            found += [*row.distiller.parameters(), *row.distiller.buffers(), row.cursor]
            found += row.meter.tensors
            states = row.optimizer.state.values()
            found += [s["momentum_buffer"] for s in states if s.get("momentum_buffer") is not None]
        return found


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    """Within it, an operation that waits for the GPU raises a RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
