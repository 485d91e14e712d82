"""Policies, one a file: what changes classes, temperatures and weights. `POLICIES` has each by its
name."""

from importlib import import_module
from pkgutil import iter_modules

from .base import POLICIES, SLOTS, Context, Policy, RunFacts

for module in iter_modules(__path__):
    import_module(f"{__name__}.{module.name}")

__all__ = ["POLICIES", "SLOTS", "Context", "Policy", "RunFacts"]
