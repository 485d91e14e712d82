"""DAT, data adaptive temperature."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..losses import Pair, kl_divergence
from ..losses.divergence import Temperature, check_temperature
from ..settings import number, number_to, one_of, setting
from .base import Context, Policy, RunFacts, check_spread


@dataclass(frozen=True)
class DAT(Policy):
    """`T (1 + RANGE)` for a batch's hardest samples and `T (1 - RANGE)` for its easiest.

    *The 2024 paper, sections 3.2 and 4.2.*

    In each batch of B samples, `KL(softmax(z_t / T) ‖ softmax(z_s / T))` over the classes that are
    compared is measured without gradient. The `k = floor(FRACTION B)` samples where it is largest
    get `T (1 + RANGE)`, the k where it is smallest get `T (1 - RANGE)`; equal ones rank by their
    place in the batch. The paper: FRACTION 0.1, RANGE 0.05: 6 of 64 each way. RANGE 0 changes
    nothing.

    Two controls: GROUPS `random` takes as many samples, whichever; MODE `weight` leaves the
    temperatures and changes the factor T² alone.
    """

    RANGE: float = setting(0.05, number(-1, 1, open_low=True), "share of T above and below it")
    FRACTION: float = setting(0.1, number_to(0, 0.5), "share of the batch in each group")
    GROUPS: str = setting("hardest", one_of("hardest", "random"), "who is in the groups")
    MODE: str = setting("temperature", one_of("temperature", "weight"), "what changes")

    @property
    def slot(self) -> str:
        return "spread"

    @property
    def per_sample(self) -> bool:
        return True

    def draws(self, classes: int) -> int:
        return 1 if self.GROUPS == "random" else 0

    def __call__(self, pair: Pair, context: Context) -> Pair:
        with torch.no_grad():
            now = pair.settled()
            divergence = kl_divergence(now.student, now.teacher, now.tau_s, now.pruned, now.tau_t)
        order = divergence if self.GROUPS == "hardest" else context.uniform(divergence)
        whole, own = context.whole(order)
        by = sample_temperature(whole, 1.0, self.RANGE, self.FRACTION)[own]
        raised, lowered = by > 1, by < 1
        seen = {
            "dat_raised": raised.sum(),
            "dat_lowered": lowered.sum(),
            "dat_raised_kl": (divergence * raised).sum(),
            "dat_lowered_kl": (divergence * lowered).sum(),
            "dat_kl": divergence.sum(),
            "dat_images": torch.full_like(raised.sum(), len(raised)),
        }
        spread = pair.spread(by)
        if self.MODE == "weight":
            spread = replace(pair, tau=spread.tau)
        return replace(spread, seen=pair.seen | seen)

    def idle(self, run: RunFacts) -> str:
        if self.RANGE == 0:
            return "RANGE is 0"
        size = min(run.batch_size, run.images)
        none = math.floor(self.FRACTION * size) == 0
        return f"FRACTION {self.FRACTION} of a batch of {size} is not one image" if none else ""


def sample_temperature(
    divergence: Tensor, temperature: Temperature, spread: float, fraction: float
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
    check_spread(spread)
    if not 0 <= fraction <= 0.5:
        raise ValueError(f"fraction is {fraction}, expected 0 to 0.5: a sample is hard or easy")
    divergence = divergence.detach()
    size = len(divergence)
    count = math.floor(fraction * size)
    rank = divergence.argsort(stable=True).argsort()
    side = (rank >= size - count).to(divergence) - (rank < count).to(divergence)
    return temperature * (1 + spread * side)
