"""Temperatures: EAT's of the epoch and DAT's of the sample."""

import math

from torch import Tensor


def stage_of_epoch(epoch: int, step_epochs: int, stages: int) -> int:
    """0 for epochs 1 to `step_epochs`, then one more every `step_epochs`, at most stages - 1."""
    return min((epoch - 1) // step_epochs, stages - 1)


def epoch_temperature(
    epoch: int, temperature: float, spread: float, step_epochs: int, epochs: int
) -> float:
    """EAT: the temperature falls in equal steps from T (1 + spread) to T (1 - spread).

    Args:
        epoch: counted from 1.
        temperature: T, positive.
        spread: RANGE, in (-1, 1); 0 gives T in every epoch, a negative one a rising temperature.
        step_epochs: length of a stage in epochs.
        epochs: length of the whole run, which gives ceil(epochs / step_epochs) stages.
    """
    stages = math.ceil(epochs / step_epochs)
    if stages == 1:
        return temperature
    stage = stage_of_epoch(epoch, step_epochs, stages)
    return temperature * (1 + spread - 2 * spread * stage / (stages - 1))


def sample_temperature(
    divergence: Tensor, temperature: float | Tensor, spread: float, fraction: float
) -> Tensor:
    """DAT: T (1 + spread) for the hardest samples of the batch, T (1 - spread) for the easiest.

    The floor(fraction * B) samples of largest divergence are the hardest, as many of smallest
    the easiest; equal ones rank by their place in the batch.

    Args:
        divergence: KL(teacher || student) of each sample, shape (B,); no gradient flows into it.
        temperature: T, positive; a float or a tensor of shape ().
        spread: RANGE, in (-1, 1).
        fraction: in [0, 0.5].

    Returns:
        Temperatures, shape (B,).
    """
    divergence = divergence.detach()
    size = len(divergence)
    count = math.floor(fraction * size)
    rank = divergence.argsort(stable=True).argsort()
    side = (rank >= size - count).to(divergence) - (rank < count).to(divergence)
    return temperature * (1 + spread * side)
