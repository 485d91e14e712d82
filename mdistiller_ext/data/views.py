"""A data set as one tensor on the training device, and the augmented views of its images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENTATION = ("mean", "std", "padding", "flips")


@dataclass(frozen=True)
class Batch:
    """Images with their labels and the key of every image's view.

    Attributes:
        image: normalised, (B, 3, H, W), float32.
        target: labels (B,), int64; of mixed images the share of each class, (B, C).
        index: place in the data set, (B,), int64.
        view: 0 to num_views - 1, (B,), int64.
    """

    image: Tensor
    target: Tensor
    index: Tensor
    view: Tensor


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, zero-padded, with the distribution of their augmentation.

    Attributes:
        padded: (N, 3, H + 2 * padding, W + 2 * padding), uint8.
        targets: (N,), int64.
        mean, std: per channel, for pixels in [0, 1], (3,).
        padding: zero pixels on each side, of the raw image.
        flips: whether views are mirrored with probability 1/2.
        whole, places: of a part of a set, the set and where its images are in it, (N,).
        names: of the classes, by label; empty: their numbers.
    """

    padded: Tensor
    targets: Tensor
    mean: Tensor
    std: Tensor
    padding: int
    flips: bool
    whole: "ImageSet | None" = None
    places: Tensor | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def build(
        cls,
        images: Tensor,
        targets: Tensor,
        mean: Sequence[float] | Tensor,
        std: Sequence[float] | Tensor,
        padding: int,
        flips: bool,
        names: Sequence[str] = (),
    ) -> "ImageSet":
        """From raw images (N, 3, H, W), uint8, and labels (N,)."""
        padded = F.pad(images, (padding,) * 4)
        mean, std = (torch.as_tensor(values, dtype=torch.float32) for values in (mean, std))
        return cls(padded, targets.long(), mean, std, padding, flips, names=tuple(names))

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> "ImageSet":
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, part in parts.items():
            if isinstance(part, (Tensor, ImageSet)):
                parts[name] = part.to(device)
        return ImageSet(**parts)

    @property
    def side(self) -> int:
        """Of an image, in pixels."""
        return self.padded.shape[3] - 2 * self.padding

    @property
    def classes(self) -> int:
        """Of a part of a set, those of the whole."""
        return int((self.whole or self).targets.max()) + 1

    @property
    def class_names(self) -> list[str]:
        return [*self.names] or [*map(str, range(self.classes))]

    def changed(self, **changes: Any) -> "ImageSet":
        """The same images with another `mean`, `std`, `padding` or `flips`."""
        pad = self.padding
        raw = self.padded[:, :, pad : pad + self.side, pad : pad + self.side]
        own: dict[str, Any] = {name: getattr(self, name) for name in (*AUGMENTATION, "names")}
        return ImageSet.build(raw, self.targets, **(own | changes))

    def subset(self, places: Tensor, alone: bool = False) -> "ImageSet":
        """The images in these places, (N,), which remember them unless they are `alone`."""
        part = replace(self, padded=self.padded[places], targets=self.targets[places])
        return part if alone else replace(part, whole=self, places=places)

    @property
    def num_views(self) -> int:
        """How many views an image has: (2 * padding + 1)^2 crops, each mirrored or not."""
        return self._offsets**2 * self._mirrors

    @property
    def _offsets(self) -> int:
        return 2 * self.padding + 1

    @property
    def _mirrors(self) -> int:
        return 2 if self.flips else 1

    def batch(self, index: Tensor, view: Tensor) -> Batch:
        """One view of each image: crop, mirror, normalise.

        Args:
            index: (B,), int64.
            view: (dy * (2 * padding + 1) + dx) * (2 if flips else 1) + mirrored, (B,), int64, for
                the crop at (dy, dx) of the padded image.
        """
        height, width = (side - 2 * self.padding for side in self.padded.shape[2:])
        # Strides only, nothing is copied: (N, 3, dy, dx, height, width).
        windows = self.padded.unfold(2, height, 1).unfold(3, width, 1)
        place, flip = view // self._mirrors, (view % self._mirrors).bool()
        pixels = windows.permute(0, 2, 3, 1, 4, 5)[
            index, place // self._offsets, place % self._offsets
        ]
        pixels = torch.where(flip[:, None, None, None], pixels.flip(3), pixels)
        # In torchvision's order of operations, so that every pixel has the same bits.
        image = pixels.float().div_(255)
        image.sub_(self.mean[:, None, None]).div_(self.std[:, None, None])
        return Batch(image, self.targets[index], index, view)

    def batches(self, index: Tensor, view: Tensor, batch_size: int | list[int]) -> Iterator[Batch]:
        """The views of the images in this order; of one size, the last may be smaller."""
        keys = zip(index.split(batch_size), view.split(batch_size), strict=True)
        return (self.batch(*key) for key in keys)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(index, view) of an epoch: every image once, in random order and in a random view.

        All draws are made on the CPU, so that a seed means the same on every device.
        """
        index = torch.randperm(len(self), generator=generator)
        view = torch.randint(self.num_views, (len(self),), generator=generator)
        return index.to(self.padded.device), view.to(self.padded.device)

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """The batches of an epoch as `draw` gives it."""
        return self.batches(*self.draw(generator), batch_size)

    def plain(self, batch_size: int) -> Iterator[Batch]:
        """Every image once, in order, not augmented."""
        index = torch.arange(len(self), device=self.padded.device)
        centre = (self.padding * self._offsets + self.padding) * self._mirrors
        return self.batches(index, torch.full_like(index, centre), batch_size)
