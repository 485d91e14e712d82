"""LP: the teacher's lowest logits are pruned, more of them in later stages."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .temperature import stage_of_epoch


def epoch_ratio(epoch: int, ratios: Sequence[float], step_epochs: int) -> float:
    """The pruned share of the classes in an epoch, counted from 1; the last ratio stays.

    Raises:
        ValueError: `epoch` or `step_epochs` is below 1, or there is no ratio.
    """
    return ratios[stage_of_epoch(epoch, step_epochs, len(ratios))]


def pruned_count(ratio: float | Tensor, num_classes: int) -> int | Tensor:
    """The number of classes that a ratio prunes, rounded half up.

    Args:
        ratio: in [0, 1); a float64 tensor of shape () is not checked, and gives a tensor.

    Raises:
        ValueError: no class would be left beside the target.
    """
    if isinstance(ratio, Tensor):
        return (ratio * num_classes + 0.5).floor()
    count = math.floor(ratio * num_classes + 0.5)
    _check_count(count, num_classes, f"a pruning ratio of {ratio}")
    return count


def pruning_mask(logits_teacher: Tensor, target: Tensor, count: int | Tensor) -> Tensor:
    """True for the `count` classes of lowest teacher logit other than the target.

    Args:
        logits_teacher: shape (B, C). Equal logits are pruned in the order of their classes.
        target: class indices, shape (B,).
        count: 0 to C - 2; a tensor of shape () on the same device will do.

    Returns:
        Mask of shape (B, C).

    Raises:
        ValueError: an int `count` leaves no class beside the target, or a shape does not fit.
    """
    if logits_teacher.ndim != 2 or target.shape != logits_teacher.shape[:1]:
        raise ValueError(
            f"logits_teacher and target have shapes {tuple(logits_teacher.shape)} and "
            f"{tuple(target.shape)}, expected (B, C) and (B,)"
        )
    if not isinstance(count, Tensor):
        _check_count(count, logits_teacher.shape[1], "a mask")
    logits = logits_teacher.detach().scatter(1, target.unsqueeze(1), torch.inf)
    # Rank 0 is the lowest; stable, so that the target stays last beside an infinite logit too.
    rank = logits.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank < count).scatter(1, target.unsqueeze(1), False)


def _check_count(count: int, num_classes: int, what: str) -> None:
    if not 0 <= count <= num_classes - 2:
        raise ValueError(
            f"{what} takes {count} of {num_classes} classes away, "
            f"expected 0 to {num_classes - 2}: the target and one other class must stay"
        )
