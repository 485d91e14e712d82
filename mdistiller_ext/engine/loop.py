"""The training loop."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data import Batch
from ..errors import RunError
from ..losses import widest
from ..models import Stack
from ..policies import Context

Held = tuple[Tensor, Tensor]


def learning_rate(epoch: int, base: float, stages: Sequence[int], rate: float) -> float:
    """base * rate^(number of stages that are over); an epoch in `stages` still has the old one."""
    return base * rate ** sum(epoch > stage for stage in stages)


class Meter:
    """Sums of an epoch, kept on the device and read as rarely as possible."""

    def __init__(self, epoch: int, steps: int) -> None:
        self.steps = steps
        self.names: list[str] = []
        self.totals: dict[str, Tensor] = {}
        self.start(epoch)

    def start(self, epoch: int) -> None:
        """Begin an epoch. The tensors stay where they are: a captured step writes into them."""
        self.epoch = epoch
        self.sizes: list[int] = []
        for tensor in self.tensors:
            tensor.zero_()

    @property
    def tensors(self) -> list[Tensor]:
        """What steps add to; none before the first."""
        return [self.terms, self.position, *self.totals.values()] if self.names else []

    @property
    def step(self) -> int:
        return len(self.sizes)

    @property
    def images(self) -> int:
        return sum(self.sizes)

    def state_dict(self) -> dict[str, Any]:
        """The epoch so far, if it has begun."""
        if not self.sizes:
            return {}
        tensors = {"terms": self.terms, "position": self.position, "totals": self.totals}
        return {"sizes": self.sizes, "names": self.names, **tensors}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on in the epoch that was started, where `state_dict` was taken.

        Raises:
            ValueError: it is of an epoch with another number of steps.
        """
        if not state:
            return
        if state["terms"].shape != (self.steps, len(state["names"])):
            raise ValueError(f"meter: terms of shape {tuple(state['terms'].shape)}")
        self.sizes = list(state["sizes"])
        if not self.names:
            self.names = list(state["names"])
            self.terms, self.position = state["terms"].to(device), state["position"].to(device)
            self.totals = {name: total.to(device) for name, total in state["totals"].items()}
            return
        self.terms.copy_(state["terms"])
        self.position.copy_(state["position"])
        for name, total in state["totals"].items():
            self.totals[name].copy_(total)

    def update(
        self, target: Tensor, logits: Tensor, losses: dict[str, Tensor], monitor: dict[str, Tensor]
    ) -> None:
        """Add a step's tensors; nothing waits for the device."""
        terms = torch.stack([loss.detach().float() for loss in losses.values()])
        sums = {"correct": (logits.detach().argmax(dim=1) == target).sum(), **monitor}
        if not self.names:
            self.names = list(losses)
            self.terms = terms.new_zeros(self.steps, len(terms))
            self.position = torch.zeros(1, dtype=torch.int64, device=terms.device)
            self.totals = {name: torch.zeros_like(value) for name, value in sums.items()}
        self.terms.index_copy_(0, self.position, terms[None])
        self.position += 1
        for name, value in sums.items():
            self.totals[name] += value

    def count(self, images: int) -> None:
        """Count a step that was launched."""
        self.sizes.append(images)

    def read(self) -> dict[str, float]:
        """Means over the images so far: `loss`, its terms, `train_top1` (percent); of monitors the
        sums, and of those called `mean_...` the means.

        Raises:
            RunError: a loss was not finite; it names the first such step and its terms.
        """
        # One transfer; counts stay exact in float64, and in float32 up to 2^24.
        parts = [self.terms.flatten(), *(total[None] for total in self.totals.values())]
        kind = widest(self.terms.device)
        read = torch.cat([part.to(kind) for part in parts]).cpu().double()
        terms = read[: self.terms.numel()].view_as(self.terms)[: self.step]
        bad = (~terms.isfinite().all(dim=1)).nonzero()
        if len(bad):
            step = int(bad[0])
            values = ", ".join(
                f"{n} {v:g}" for n, v in zip(self.names, terms[step].tolist(), strict=True)
            )
            raise RunError(
                f"the loss is not finite in epoch {self.epoch}, step {step + 1} of {self.steps}: "
                f"{values}"
            )
        weights = torch.tensor(self.sizes, dtype=torch.float64) / self.images
        means = dict(zip(self.names, (weights @ terms).tolist(), strict=True))
        totals = read[self.terms.numel() :].tolist()
        sums = {
            name: value if total.is_floating_point() else int(value)
            for (name, total), value in zip(self.totals.items(), totals, strict=True)
        }
        for name in sums:
            if name.startswith("mean_"):
                sums[name] /= self.images
        top1 = 100 * sums.pop("correct") / self.images
        return {"loss": math.fsum(means.values()), **means, "train_top1": top1, **sums}


def train_epoch(
    distiller: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Batch, Tensor | None]],
    meter: Meter,
    autocast: Callable[[], AbstractContextManager],
    now: Mapping[str, float],
    drawn: Tensor | None = None,
    held: Callable[[int], Held | None] = lambda step: None,
) -> Iterator[None]:
    """One pass over the batches, a step each time that the iterator is advanced.

    Args:
        batches: each with the teacher's logits (B, C), if they are known.
        now: what the method's `schedule` gives for the epoch.
        drawn: the epoch's random numbers for each image of the training set, (N, draws).
        held: images held out and their labels, of a step, counted from 0, that takes some.
    """
    distiller.train()
    for batch, answers in batches:
        own = None if drawn is None else drawn[batch.index]
        context = Context(now, answers, own, held=held(meter.step))
        train_step(Step(distiller, optimizer, batch, meter.epoch, context, meter, autocast))
        meter.count(len(batch.target))
        yield


class Step(NamedTuple):
    """What a run's step is taken with; its images are (B, 3, H, W)."""

    distiller: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Batch
    epoch: int | None
    context: Context
    meter: Meter
    autocast: Callable[[], AbstractContextManager]

    def forward(self, logits: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """(student's logits (B, C), losses ()), of these logits if they are known already."""
        with self.autocast():
            output, losses = self.distiller(
                image=self.batch.image,
                target=self.batch.target,
                index=self.batch.index,
                epoch=self.epoch,
                context=self.context._replace(logits=logits),
            )
        self.optimizer.zero_grad()
        return output, {name: loss.mean() for name, loss in losses.items()}

    def update(self, output: Tensor, losses: dict[str, Tensor]) -> None:
        self.optimizer.step()
        monitor = getattr(self.distiller, "monitor", {})
        self.meter.update(self.batch.target, output, losses, monitor)


def train_step(
    *steps: Step, stack: Stack | None = None, streams: Sequence[torch.cuda.Stream] = ()
) -> None:
    """Forward, the sum of all losses backward, one optimizer step; of several runs at once.

    None of their gradients depends on another run.

    Args:
        stack: of the students of these runs, which then need no forward pass of their own.
        streams: one for each, on which what is its own goes on beside the others'.
    """
    logits: Sequence[Tensor | None] = [None] * len(steps)
    if stack:
        with steps[0].autocast():
            logits = stack([step.batch.image for step in steps])
    forwards = [partial(step.forward, row) for step, row in zip(steps, logits, strict=True)]
    found = side_by_side(forwards, streams)
    torch.stack([loss for _, losses in found for loss in losses.values()]).sum().backward()
    if stack:
        stack.share_gradients()
    updates = [partial(step.update, *own) for step, own in zip(steps, found, strict=True)]
    side_by_side(updates, streams)


def side_by_side(
    works: Sequence[Callable[[], Any]], streams: Sequence[torch.cuda.Stream]
) -> list[Any]:
    """What each piece of work returns; on a stream each, if there are some, else in turn."""
    if not streams:
        return [work() for work in works]
    here, results = torch.cuda.current_stream(), []
    try:
        for work, stream in zip(works, streams, strict=True):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                results.append(work())
    finally:
        for stream in streams:
            here.wait_stream(stream)
    return results
