"""Images of a batch mixed with each other, and their labels likewise."""

import math
from dataclasses import replace

import numpy as np
import torch.nn.functional as F

from .views import Batch


def mixed(
    batch: Batch, classes: int, mixup: float, cutmix: float, draws: np.random.Generator
) -> Batch:
    """Mix each image of a batch with the one before it, the first with the last.

    An image keeps a share λ of Beta(α, α), one for the whole batch. mixup averages the two images
    with the weights λ and 1 - λ; CutMix puts a box of the other image, of 1 - λ of its area and
    with its centre anywhere, in the same place: λ is then what is left outside of the box.

    Args:
        mixup, cutmix: α of each, 0 where it is off; where both are on, one is drawn for the batch.
        draws: three or four random numbers are taken from it.

    Returns:
        The batch with new images and as `target` the share of each class, (B, C), float32.

    References:
        Zhang, Cisse, Dauphin, Lopez-Paz: mixup, arXiv:1710.09412; Yun, Han, Oh, Chun, Choe, Yoo:
        CutMix, arXiv:1905.04899, its algorithm A1.
    """
    averages = bool(mixup) and (not cutmix or draws.random() < 0.5)
    alpha = mixup if averages else cutmix
    share = float(draws.beta(alpha, alpha))
    image, other = batch.image, batch.image.roll(1, 0)
    if averages:
        image = other.lerp(image, share)
    else:
        side = image.shape[-1]
        half = int(side * math.sqrt(1 - share) / 2)
        rows, columns = (
            slice(max(centre - half, 0), centre + half) for centre in draws.integers(side, size=2)
        )
        image = image.clone()
        image[..., rows, columns] = other[..., rows, columns]
        share = 1 - len(range(side)[rows]) * len(range(side)[columns]) / side**2
    label = F.one_hot(batch.target, classes).to(image)
    return replace(batch, image=image, target=label.roll(1, 0).lerp(label, share))
