"""The plain loop: what a run is. Any method, any network, one device or several."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch, ImageSet
from ..errors import RunError
from ..losses import widest
from ..policies import Context

HeldOut = tuple[Tensor, Tensor]


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
        self.clear()

    def clear(self) -> None:
        """Forget the epoch's steps."""
        self.sizes: list[int] = []
        if self.names:
            for tensor in (self.terms, *self.totals.values()):
                tensor.zero_()

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
        own = {"names": self.names, "terms": self.terms, "totals": self.totals}
        return {"sizes": self.sizes, **own}

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
            self.terms = state["terms"].to(device)
            self.totals = {name: total.to(device) for name, total in state["totals"].items()}
            return
        self.terms.copy_(state["terms"])
        for name, total in state["totals"].items():
            self.totals[name].copy_(total)

    def update(
        self, target: Tensor, logits: Tensor, losses: dict[str, Tensor], monitor: dict[str, Tensor]
    ) -> None:
        """Add a step's tensors; nothing waits for the device. A mixed image counts as one of the
        class that has the largest share in it."""
        target = target if target.ndim == 1 else target.argmax(dim=1)
        terms = torch.stack([loss.detach().float() for loss in losses.values()])
        sums = {"correct": (logits.detach().argmax(dim=1) == target).sum(), **monitor}
        if not self.names:
            self.names = list(losses)
            self.terms = terms.new_zeros(self.steps, len(terms))
            self.totals = {name: torch.zeros_like(value) for name, value in sums.items()}
        self.terms[self.step] = terms
        for name, value in sums.items():
            self.totals[name] += value

    def adopt(self, names: list[str], terms: Tensor, totals: dict[str, Tensor]) -> None:
        """Take these tensors for its own, with what it has summed so far."""
        if self.names:
            terms.copy_(self.terms)
            for name, total in self.totals.items():
                totals[name].copy_(total)
        self.names, self.terms, self.totals = list(names), terms, totals

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


@dataclass(frozen=True)
class Epoch:
    """What an epoch is trained with, from the first of its steps that is left.

    Attributes:
        rates: the learning rate of each step of the whole epoch.
        schedule: what the method's `schedule` gives for the epoch.
        index, view: the order of this process's images and their views, (M,).
        sizes: of this process's batches.
        teacher: the teacher's logits in that order, (M, C), if they are known.
        uniforms: random numbers in [0, 1) by image, (N, draws), if the method takes some.
        held_out: step, counted from 0 -> images that nothing is trained on, with their labels.
        mix: step, batch -> what is trained on in its place.
    """

    number: int
    rates: Sequence[float]
    schedule: Mapping[str, float]
    index: Tensor
    view: Tensor
    sizes: list[int]
    teacher: Tensor | None = None
    uniforms: Tensor | None = None
    held_out: Callable[[int], HeldOut | None] = lambda step: None
    mix: Callable[[int, Batch], Batch] = lambda step, batch: batch


@contextmanager
def searching(whether: bool) -> Iterator[None]:
    """Within it, cuDNN finds its algorithms by trial, which pays for shapes of most steps only."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = whether
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def train_epoch(
    distiller: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ImageSet,
    epoch: Epoch,
    meter: Meter,
    autocast: Callable[[], AbstractContextManager],
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """The plain loop: one pass over the epoch's batches.

    Args:
        data: the training set.
        meter: knows the steps that were taken before.
        after_step: called when a step is complete; what it raises ends the epoch there.
    """
    distiller.train()
    batch_size = max(epoch.sizes, default=0)
    batches = data.batches(epoch.index, epoch.view, epoch.sizes)
    rows = [None] * len(epoch.sizes) if epoch.teacher is None else epoch.teacher.split(epoch.sizes)
    for batch, teacher in zip(batches, rows, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = epoch.rates[meter.step]
        uniforms = None if epoch.uniforms is None else epoch.uniforms[batch.index]
        held_out = epoch.held_out(meter.step)
        context = Context(epoch.schedule, teacher, uniforms, held=held_out)
        batch = epoch.mix(meter.step, batch)
        with searching(len(batch.target) == batch_size):
            train_step(distiller, optimizer, batch, epoch.number, context, meter, autocast)
        meter.count(len(batch.target))
        after_step()


def train_step(
    distiller: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    epoch: int,
    context: Context,
    meter: Meter,
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """Forward, the sum of all losses backward, one step of the optimizer and what hooks on it:
    before it the clipping of gradients, after it the average of the weights."""
    with autocast():
        logits, losses = distiller(
            image=batch.image,
            target=batch.target,
            index=batch.index,
            epoch=epoch,
            context=context,
        )
    optimizer.zero_grad()
    losses = {name: loss.mean() for name, loss in losses.items()}
    torch.stack([*losses.values()]).sum().backward()
    optimizer.step()
    meter.update(batch.target, logits, losses, getattr(distiller, "monitor", {}))
