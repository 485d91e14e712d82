"""What a method is made of, and the methods by name: a loss, policies, defaults."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from yacs.config import CfgNode

from ..losses import LOSSES, Loss
from ..policies import POLICIES, SLOTS, Policy
from ..settings import Rule, Settings, count, leaves, names_of, number, one_of, setting


@dataclass(frozen=True)
class Weights(Settings):
    """What every method has, beside its loss and its policies."""

    T: float = setting(4.0, number(0.01, 1000), "base temperature")
    CE_WEIGHT: float = setting(1.0, number(0), "of the cross-entropy")
    KD_WEIGHT: float = setting(1.0, number(0), "of the distillation loss")
    WARMUP: int = setting(1, count(1), "epochs in which the distillation loss comes to its weight")


class Composition(NamedTuple):
    """A method with its settings; policies in the order in which they act."""

    weights: Weights
    loss: Loss
    policies: tuple[Policy, ...]

    @property
    def conflict(self) -> str:
        """Why the parts do not go together, or ""."""
        name, owners = type(self.loss).__name__, dict.fromkeys(SLOTS, "")
        for policy in self.policies:
            own, slot = type(policy).__name__, policy.slot
            if slot in self.loss.OWNS:
                return f"{own} sets {SLOTS[slot]}, and {name} {self.loss.OWNS[slot]}"
            if slot == "classes" and self.loss.unprunable:
                return f"{own} prunes classes, and {name} {self.loss.unprunable}"
            if policy.per_sample and self.loss.coupled:
                return (
                    f"{own} gives each sample a factor of its own, and {name} compares samples "
                    f"with each other"
                )
            if owners[slot] and slot != "weight":
                return f"{owners[slot]} and {own} both set {SLOTS[slot]}"
            owners[slot] = own
        return ""


# In a node: where a setting stands -> who reads it, by which key.
Layout = dict[str, tuple[type[Settings], str]]


def keys_of(part: type[Settings], prefix: str = "") -> Layout:
    return {prefix + key: (part, key) for key in part.rules()}


@dataclass(frozen=True)
class Recipe:
    """A published method: one loss, some policies, and their settings in a node of its own.

    The settings of the loss stand beside the weights, those of the policies too where there is one;
    several have a node each.

    Attributes:
        defaults: where they differ, by place in the node.
        fixed: weights that are no settings of this method.
        places: weights that stand elsewhere in the node.
        source: where the method and its settings come from.
    """

    loss: str
    policies: Sequence[str] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    @cached_property
    def layout(self) -> Layout:
        layout = {
            self.places.get(key, key): part
            for key, part in keys_of(Weights).items()
            if key not in self.fixed
        }
        layout |= keys_of(LOSSES[self.loss])
        for name in self.policies:
            layout |= keys_of(POLICIES[name], f"{name}." if len(self.policies) > 1 else "")
        return layout

    def node(self) -> CfgNode:
        """The defaults."""
        tree = CfgNode()  # built in place: of a dict it makes a deep copy at each level
        of_part = {part: part.defaults() for part in {part for part, _ in self.layout.values()}}
        for place, (part, key) in self.layout.items():
            *sections, last = place.split(".")
            inner = tree
            for section in sections:
                inner = inner.setdefault(section, CfgNode())
            inner[last] = copy(self.defaults.get(place, of_part[part][key]))
        return tree

    def chosen(self, node: Mapping[str, Any]) -> tuple[str, Sequence[str]]:
        """The names of the loss and of the policies."""
        return self.loss, self.policies

    def place(self, policy: str) -> str:
        """Of a policy's settings, in the node: its section, or "" where they stand beside all."""
        return policy if len(self.policies) > 1 else ""

    def acting(self, node: Mapping[str, Any]) -> set[str]:
        """The places of the settings that a node's choice of parts uses."""
        return set(self.layout)

    def rules_beside(self, node: Mapping[str, Any], classes: int) -> dict[str, Rule]:
        """What the number of classes allows, by place in the node."""
        found = {}
        for name in self.chosen(node)[1]:
            section = self.place(name)
            for key, rule in POLICIES[name].rules_beside(classes).items():
                found[f"{section}.{key}" if section else key] = rule
        return found

    def read(self, node: Mapping[str, Any]) -> Composition:
        values = dict(leaves(node))
        by_part: dict[type[Settings], dict[str, Any]] = {Weights: dict(self.fixed)}
        for place, (part, key) in self.layout.items():
            by_part.setdefault(part, {})[key] = values[place]
        loss, policies = self.chosen(node)
        parts = [POLICIES[name].read(by_part.get(POLICIES[name], {})) for name in policies]
        return Composition(
            Weights.read(by_part[Weights]),
            LOSSES[loss].read(by_part.get(LOSSES[loss], {})),
            tuple(sorted(parts, key=lambda policy: list(SLOTS).index(policy.slot))),
        )


@dataclass(frozen=True)
class Parts(Settings):
    """What the general method is made of."""

    LOSS: str = setting("DKD", lambda: one_of(*sorted(LOSSES)), "what is compared")
    POLICIES: list = setting(
        [], lambda: names_of(*sorted(POLICIES)), "which classes, temperatures, weights"
    )


@dataclass(frozen=True)
class General(Recipe):
    """Any loss with any policies, by name; each has a section of its own for its settings."""

    loss: str = ""

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        layout = keys_of(Parts) | keys_of(Weights)
        for name, part in sorted({**LOSSES, **POLICIES}.items()):
            layout |= keys_of(part, f"{name}.")
        return layout

    def chosen(self, node: Mapping[str, Any]) -> tuple[str, Sequence[str]]:
        return node["LOSS"], node["POLICIES"]

    def place(self, policy: str) -> str:
        return policy

    def acting(self, node: Mapping[str, Any]) -> set[str]:
        loss, policies = self.chosen(node)
        return {p for p in self.layout if "." not in p or p.split(".")[0] in (loss, *policies)}


OVER_DKD: dict[str, Any] = {"WARMUP": 20, "BETA": 2.0}
NO_WEIGHT = {"KD_WEIGHT": 1.0}
# BETA 2.0 is what the toolkit's own files set for every pair with a ResNet-110 teacher.
PAPER = "the 2024 paper; ALPHA, BETA, WARMUP as the toolkit's for pairs with a ResNet-110 teacher"
FOUND = "nowhere: what the paper leaves to be found while training"
RECIPES: dict[str, Recipe] = {
    "KD": Recipe(
        "KD",
        defaults={"TEMPERATURE": 4, "LOSS.CE_WEIGHT": 0.1, "LOSS.KD_WEIGHT": 0.9},
        fixed={"WARMUP": 1},
        places={"T": "TEMPERATURE", "CE_WEIGHT": "LOSS.CE_WEIGHT", "KD_WEIGHT": "LOSS.KD_WEIGHT"},
        source="the toolkit",
    ),
    "DKD": Recipe("DKD", [], {"WARMUP": 20}, NO_WEIGHT, source="the toolkit"),
    "DKD_EAT": Recipe("DKD", ["EAT"], OVER_DKD, NO_WEIGHT, source=PAPER),
    "DKD_DAT": Recipe("DKD", ["DAT"], OVER_DKD, NO_WEIGHT, source=PAPER),
    "DKD_LP": Recipe("DKD", ["LP"], OVER_DKD, NO_WEIGHT, source=PAPER),
    "DKD_EAT_DAT_LP": Recipe("DKD", ["EAT", "DAT", "LP"], OVER_DKD, NO_WEIGHT, source=PAPER),
    "LOGIT": General(),
    "KD_LS": Recipe(
        "KD",
        ["LS"],
        {"T": 2.0, "CE_WEIGHT": 0.1, "KD_WEIGHT": 9.0},
        source="the authors' code and logs, ResNet-56 → 20; 110 → 20 has T 4, KD_WEIGHT 12",
    ),
    "DKD_LS": Recipe(
        "DKD",
        ["LS"],
        {"T": 2.0, "KD_WEIGHT": 15.0, "BETA": 2.0, "WARMUP": 20},
        source="the authors' logs, ResNet-110 → 20; 56 → 20 has T 3, KD_WEIGHT 18",
    ),
    "NORMKD": Recipe(
        "KD",
        ["NORM"],
        {"T": 2.0, "CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9},
        source="the authors' code",
    ),
    "DKD_NORM": Recipe(
        "DKD",
        ["NORM"],
        {"T": 2.0, "ALPHA": 7.0, "BETA": 2.0, "WARMUP": 20},
        source="the authors' code, ResNet-56 → 20",
    ),
    "DIST": Recipe("DIST", defaults={"KD_WEIGHT": 2.0}, source="the authors' code"),
    "TTM": Recipe(
        "TTM", defaults={"T": 5.0, "KD_WEIGHT": 8.0}, source="the paper, ResNet-110 → 20"
    ),
    "WTTM": Recipe(
        "WTTM", defaults={"T": 5.0, "KD_WEIGHT": 2.0}, source="the paper, ResNet-110 → 20"
    ),
    "RLD": Recipe("RLD", defaults={"WARMUP": 20}, source="the command of the authors' README"),
    "LDRLD": Recipe("LDRLD", source="the authors' README, 32x4 → 8x4"),
    "ABKD": Recipe(
        "ABKD", defaults={"KD_WEIGHT": 32.0}, source="the authors' README, ResNet-56 → 20"
    ),
    "DTKD": Recipe(
        "DTKD",
        defaults={"WARMUP": 20},
        source="the authors' code, 32x4 → 8x4; ResNet-56 → 20 and 110 → 32 have ALPHA 1, BETA 0.5",
    ),
    "NKD": Recipe("NKD", defaults={"T": 1.0}, source="the authors' code, for ImageNet"),
    "GDKD": Recipe(
        "GDKD",
        defaults={"W2": 1.0, "WARMUP": 20},
        source="the authors' code, ResNet-56 → 20 and 110 → 32; 32x4 → 8x4 has W1 2, W2 8",
    ),
    "MLKD": Recipe(
        "MLKD",
        defaults={"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.45},
        source="the code of RLD, which has this form",
    ),
    "CTKD": Recipe(
        "KD", ["CTKD"], {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9}, source="the authors' script"
    ),
    "EAKD": Recipe(
        "KD", ["EAKD"], {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9}, source="the authors' code"
    ),
    "DKD_BEST_FIT": Recipe("DKD", ["BEST_FIT"], OVER_DKD, NO_WEIGHT, source=FOUND),
    "DKD_ENTROPY": Recipe("DKD", ["ENTROPY"], OVER_DKD, NO_WEIGHT, source=FOUND),
    "DKD_NUCLEUS": Recipe("DKD", ["NUCLEUS"], OVER_DKD, NO_WEIGHT, source=FOUND),
    "DKD_HYPERGRADIENT": Recipe("DKD", ["HYPERGRADIENT"], OVER_DKD, NO_WEIGHT, source=FOUND),
    "DKD_EAKD": Recipe("DKD", ["EAKD"], {"WARMUP": 20}, source="the authors' code"),
}
