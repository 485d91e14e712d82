"""A training step whose inputs all lie on the device, so that a CUDA graph can be one launch."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import groupby, repeat

import torch
from torch import Tensor

from ..data import ImageSet
from ..distillers import Distiller
from ..policies import Context
from .loop import Meter, train_step

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
        self.lr = torch.zeros((), dtype=torch.float32 if device.type == "cuda" else torch.float64)
        self.lr = self.lr.to(device)
        for group in optimizer.param_groups:
            group["lr"] = self.lr
        self.settings = {
            name: torch.tensor(float(value), dtype=torch.float64, device=device)
            for name, value in distiller.schedule(1).items()
        }
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        if device.type == "cuda":
            distiller.train()
            with torch.cuda.device(device):
                self.capture(device)

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
        for size, count in self.launches(self.meter.step):
            if self.graphs:
                self.graphs[size, count].replay()
            else:
                self.take(size, count)
            for _ in range(count):
                self.meter.count(size)
            yield

    def launches(self, first: int = 0) -> Iterator[tuple[int, int]]:
        """(batch size, steps) of each launch of an epoch, from its step `first` on."""
        for size, batches in groupby(self.sizes[first:]):
            together, alone = divmod(len(list(batches)), self.steps)
            yield from repeat((size, self.steps), together)
            yield from repeat((size, 1), alone)

    def take(self, size: int, count: int) -> None:
        for _ in range(count):
            self.step(size)

    def step(self, size: int) -> None:
        """The next `size` images of the epoch."""
        place = self.cursor + torch.arange(size, device=self.cursor.device)
        batch = self.data.batch(self.index[place], self.view[place])
        context = Context(
            self.settings,
            None if self.answers is None else self.answers[place],
            None if self.drawn is None else self.drawn[batch.index],
        )
        # No epoch: a method that counts on it, rather than on its schedule, fails here and now
        # instead of training every epoch as the one that was captured.
        train_step(self.distiller, self.optimizer, batch, None, context, self.meter, self.autocast)
        self.cursor += size

    def capture(self, device: torch.device) -> None:
        """Capture a graph of each kind of launch; weights and optimizer stay as they were.

        On the stream of the moment, which is the run's own: cuBLAS gives the graphs of one stream
        one workspace, and those of several runs are replayed side by side.
        """
        kept = [tensor.clone() for tensor in self._state()]
        stream = torch.cuda.current_stream(device)
        if stream == torch.cuda.default_stream(device):  # on which nothing can be captured
            stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        # Single steps, too: a run may go on in the middle of an epoch.
        kinds = dict.fromkeys([*self.launches(), *((size, 1) for size in self.sizes)])
        graphs = {}
        try:
            with torch.cuda.stream(stream):
                for size in WARM_UP * list(set(self.sizes)):
                    self._try(partial(self.step, size))
                # What waits for the device would fail in the capture, and leave it half made.
                with _no_synchronisation():
                    for size in set(self.sizes):
                        self._try(partial(self.step, size))
                for size, count in kinds:
                    graph = graphs[size, count] = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, stream=stream):
                        self.take(size, count)
                    self._try(graph.replay)
                    if self.cursor.item() != size * count:
                        raise RuntimeError("the graph is empty")
        finally:
            torch.cuda.current_stream(device).wait_stream(stream)
            tensors = self._state()
            for tensor, before in zip(tensors, kept, strict=False):
                tensor.copy_(before)
            for tensor in tensors[len(kept) :]:  # momentum, of which SGD begins with none
                tensor.zero_()
            self.cursor.zero_()
        self.graphs = graphs

    def _try(self, step: Callable[[], None]) -> None:
        """A step on the epoch's first images, as often as one likes."""
        self.cursor.zero_()
        self.meter.start(1)
        step()

    def _state(self) -> list[Tensor]:
        """What a step changes, the optimizer's buffers last."""
        model = [*self.distiller.parameters(), *self.distiller.buffers()]
        states = (self.optimizer.state[p] for g in self.optimizer.param_groups for p in g["params"])
        momenta = (state.get("momentum_buffer") for state in states)
        tensors = [tensor.detach() for tensor in model]
        return [*tensors, *(momentum for momentum in momenta if momentum is not None)]


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    """Within it, an operation that waits for the GPU raises a RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
