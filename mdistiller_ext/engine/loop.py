"""The training loop."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..data import Batch
from ..errors import RunError


def learning_rate(epoch: int, base: float, stages: Sequence[int], rate: float) -> float:
    """base * rate^(number of stages that are over); an epoch in `stages` still has the old one."""
    return base * rate ** sum(epoch > stage for stage in stages)


class Meter:
    """Sums of an epoch, kept on the device and read as rarely as possible."""

    def __init__(self, epoch: int, steps: int) -> None:
        self.epoch, self.steps = epoch, steps
        self.images = self.step = 0
        self.names: list[str] = []
        self.sizes: list[int] = []
        self.totals: dict[str, Tensor] = {}

    def update(
        self, target: Tensor, logits: Tensor, losses: dict[str, Tensor], monitor: dict[str, Tensor]
    ) -> None:
        terms = torch.stack([loss.detach().float() for loss in losses.values()])
        if not self.step:
            self.names = list(losses)
            self.terms = terms.new_zeros(self.steps, len(terms))
        self.terms[self.step] = terms
        correct = (logits.detach().argmax(dim=1) == target).sum()
        for name, value in {"correct": correct, **monitor}.items():
            self.totals[name] = self.totals.get(name, 0) + value
        self.sizes.append(len(target))
        self.images += len(target)
        self.step += 1

    def read(self) -> dict[str, float]:
        """Means over the images so far: `loss`, its terms, `train_top1` (percent); monitors' sums.

        Raises:
            RunError: a loss was not finite; it names the first such step and its terms.
        """
        terms = self.terms[: self.step].double().cpu()
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
        sums = {name: total.item() for name, total in self.totals.items()}
        top1 = 100 * sums.pop("correct") / self.images
        return {"loss": math.fsum(means.values()), **means, "train_top1": top1, **sums}


def train_epoch(
    distiller: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    meter: Meter,
    autocast: Callable[[], AbstractContextManager],
    progress: Callable[[Meter], None],
) -> None:
    """One pass over the batches: forward, the sum of all losses backward, one optimizer step each.

    `progress` is called with the meter after each step and may read it, which raises RunError when
    a loss was not finite.
    """
    distiller.train()
    for batch in batches:
        with autocast():
            logits, losses = distiller(
                image=batch.image, target=batch.target, index=batch.index, epoch=meter.epoch
            )
        losses = {name: loss.mean() for name, loss in losses.items()}
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        meter.update(batch.target, logits, losses, getattr(distiller, "monitor", {}))
        progress(meter)
