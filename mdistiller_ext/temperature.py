"""Temperatures: EAT's of the epoch and DAT's of the sample."""

import math

from torch import Tensor


def stage_of_epoch(epoch: int, step_epochs: int, stages: int) -> int:
    """0 for epochs 1 to `step_epochs`, then one more every `step_epochs`, at most stages - 1.

    Raises:
        ValueError: an argument is below 1; epochs count from 1.
    """
    _at_least_one(epoch=epoch, step_epochs=step_epochs, stages=stages)
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

    Raises:
        ValueError: an argument is outside its range.
    """
    _at_least_one(epoch=epoch, step_epochs=step_epochs, epochs=epochs)
    check_temperature(temperature, ())
    _check_spread(spread)
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

    Raises:
        ValueError: an argument is outside its range, or a tensor of another shape.
    """
    if divergence.ndim != 1:
        raise ValueError(f"divergence has shape {tuple(divergence.shape)}, expected (B,)")
    check_temperature(temperature, ())
    _check_spread(spread)
    if not 0 <= fraction <= 0.5:
        raise ValueError(f"fraction is {fraction}, expected 0 to 0.5: a sample is hard or easy")
    divergence = divergence.detach()
    size = len(divergence)
    count = math.floor(fraction * size)
    rank = divergence.argsort(stable=True).argsort()
    side = (rank >= size - count).to(divergence) - (rank < count).to(divergence)
    return temperature * (1 + spread * side)


def check_temperature(temperature: float | Tensor, *shapes: tuple[int, ...]) -> None:
    """A tensor's values are not looked at: that would wait for its device.

    Raises:
        ValueError: a number that is not positive and finite, or a tensor of none of the shapes.
    """
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}, expected a positive number")
    elif temperature.shape not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"temperature has shape {tuple(temperature.shape)}, expected {expected}")


def _check_spread(spread: float) -> None:
    if not -1 < spread < 1:
        raise ValueError(f"spread is {spread}, expected above -1 and below 1")


def _at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}, expected at least 1")
