"""Logit losses, one a file. `LOSSES` has each by its name."""

from importlib import import_module
from pkgutil import iter_modules

from .base import LOSSES, Loss, Pair
from .divergence import at_least_float32, kl_divergence, widest
from .dkd import dkd_loss
from .kd import kd_loss

for module in iter_modules(__path__):
    import_module(f"{__name__}.{module.name}")

__all__ = [
    "LOSSES",
    "Loss",
    "Pair",
    "at_least_float32",
    "dkd_loss",
    "kd_loss",
    "kl_divergence",
    "widest",
]
