"""The samples that a contrastive method compares an image with, drawn as tensors."""

import torch
from torch import Tensor, nn

from ..losses import widest


class ContrastiveSampler(nn.Module):
    """Draws, for each image of a batch, one positive and `count` negatives.

    The distribution is that of the toolkit's data set for CRD (Tian et al., ICLR 2020): negatives
    are uniform over the images of other classes, without replacement, or with it where these are
    fewer than `count`.

    Args:
        targets: labels of the whole training set, (N,).
        count: number of negatives.
        mode: the positive is the image itself ("exact") or any of its class ("relax").
    """

    targets: Tensor
    by_class: Tensor
    sizes: Tensor
    starts: Tensor
    scarce: Tensor

    def __init__(self, targets: Tensor, count: int, mode: str) -> None:
        super().__init__()
        self.count, self.relax = count, mode == "relax"
        sizes = torch.bincount(targets)
        scarce = len(targets) - sizes < count
        for name, tensor in {
            "targets": targets,
            "by_class": targets.argsort(stable=True),
            "sizes": sizes,
            "starts": sizes.cumsum(0) - sizes,
            "scarce": scarce,
        }.items():
            self.register_buffer(name, tensor, persistent=False)
        self.cases = set(scarce[targets].tolist())

    def forward(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """(B, 1 + count), int64, the positive first. `generator` lives where `index` does."""
        label = self.targets[index]
        positive = index[:, None]
        if self.relax:
            place = self._uniform(len(index), 1, generator) * self.sizes[label, None]
            positive = self.by_class[self.starts[label, None] + place.long()]
        draw = {True: self._with_replacement, False: self._without_replacement}
        draws = {scarce: draw[scarce](label, generator) for scarce in self.cases}
        if len(draws) == 2:
            negatives = torch.where(self.scarce[label, None], draws[True], draws[False])
        else:
            (negatives,) = draws.values()
        return torch.cat([positive, negatives], dim=1)

    def _with_replacement(self, label: Tensor, generator: torch.Generator) -> Tensor:
        start, size = self.starts[label, None], self.sizes[label, None]
        draws = self._uniform(len(label), self.count, generator)
        place = (draws * (len(self.targets) - size)).long()
        return self.by_class[place + torch.where(place >= start, size, 0)]

    def _without_replacement(self, label: Tensor, generator: torch.Generator) -> Tensor:
        keys = self._uniform(len(label), len(self.targets), generator)
        keys.masked_fill_(self.targets == label[:, None], 2.0)  # behind all others
        count = min(self.count, len(self.targets))
        return keys.topk(count, largest=False, sorted=False).indices

    def _uniform(self, rows: int, columns: int, generator: torch.Generator) -> Tensor:
        # float64: in float32 some of 50,000 numbers are equal, and topk would prefer the first.
        place = generator.device
        return torch.rand(rows, columns, dtype=widest(place), generator=generator, device=place)
