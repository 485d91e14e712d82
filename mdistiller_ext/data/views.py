"""A data set as one tensor on the training device, and the augmented views of its images."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images with their labels and the key of every image's view.

    Attributes:
        image: normalised, (B, 3, H, W), float32.
        target: (B,), int64.
        index: place in the data set, (B,), int64.
        dy, dx: offset of the crop in the padded image, 0 to 2 * padding, (B,), int64.
        flip: mirrored after the crop, (B,), bool.
    """

    image: Tensor
    target: Tensor
    index: Tensor
    dy: Tensor
    dx: Tensor
    flip: Tensor


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, zero-padded, with the distribution of their augmentation.

    Attributes:
        padded: (N, 3, H + 2 * padding, W + 2 * padding), uint8.
        targets: (N,), int64.
        mean, std: per channel, for pixels in [0, 1], (3,).
        padding: zero pixels on each side, of the raw image.
        flips: whether views are mirrored with probability 1/2.
    """

    padded: Tensor
    targets: Tensor
    mean: Tensor
    std: Tensor
    padding: int
    flips: bool

    @classmethod
    def build(
        cls,
        images: Tensor,
        targets: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        padding: int,
        flips: bool,
    ) -> "ImageSet":
        """From raw images (N, 3, H, W), uint8, and labels (N,)."""
        padded = F.pad(images, (padding,) * 4)
        return cls(padded, targets.long(), torch.tensor(mean), torch.tensor(std), padding, flips)

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> "ImageSet":
        tensors = (self.padded, self.targets, self.mean, self.std)
        padded, targets, mean, std = (tensor.to(device) for tensor in tensors)
        return ImageSet(padded, targets, mean, std, self.padding, self.flips)

    def view(self, index: Tensor, dy: Tensor, dx: Tensor, flip: Tensor) -> Batch:
        """One view of each image: crop at (dy, dx), mirror, normalise. One gather."""
        height, width = (side - 2 * self.padding for side in self.padded.shape[2:])
        device = self.padded.device
        rows = dy[:, None] + torch.arange(height, device=device)
        columns = torch.arange(width, device=device)
        columns = dx[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)
        pixels = self.padded[
            index[:, None, None, None],
            torch.arange(3, device=device)[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]
        # In torchvision's order of operations, so that every pixel has the same bits.
        image = pixels.float().div_(255)
        image.sub_(self.mean[:, None, None]).div_(self.std[:, None, None])
        return Batch(image, self.targets[index], index, dy, dx, flip)

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Every image once, in random order and in a random view; the last batch may be smaller.

        All draws are made on the CPU, so that a seed means the same on every device.
        """
        count, offsets = len(self), 2 * self.padding + 1
        draws = (
            torch.randperm(count, generator=generator),
            torch.randint(offsets, (count,), generator=generator),
            torch.randint(offsets, (count,), generator=generator),
            torch.randint(2 if self.flips else 1, (count,), generator=generator).bool(),
        )
        chunks = (draw.to(self.padded.device).split(batch_size) for draw in draws)
        return (self.view(*keys) for keys in zip(*chunks, strict=True))

    def plain(self, batch_size: int) -> Iterator[Batch]:
        """Every image once, in order, not augmented."""
        for index in torch.arange(len(self), device=self.padded.device).split(batch_size):
            centre = torch.full_like(index, self.padding)
            yield self.view(index, centre, centre, torch.zeros_like(index, dtype=torch.bool))
