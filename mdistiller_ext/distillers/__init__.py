"""The methods and their registry."""

from collections.abc import Callable, Mapping

from ..plugins import check_free
from .base import Distiller, Vanilla
from .logit import Logit, method
from .recipes import RECIPES, Composition, Recipe

METHODS = {name: method(name, recipe) for name, recipe in RECIPES.items()}
distiller_dict: dict[str, Callable[..., Distiller]] = {"NONE": Vanilla, **METHODS}


def register_method(name: str) -> Callable[[type[Distiller]], type[Distiller]]:
    """A decorator: DISTILLER.TYPE of this name runs the class, and `SETTINGS` is its node.

    Raises:
        ValueError: another method has the name.
    """

    def add(method: type[Distiller]) -> type[Distiller]:
        check_free(name, distiller_dict.get(name), method)
        distiller_dict[name], method.TYPE = method, name
        return method

    return add


def source(node: Mapping[str, str]) -> str:
    """Whose code a DISTILLER node's TYPE runs: "ext", ours, or "mdistiller", the toolkit's."""
    if node["SOURCE"] in ("ext", "mdistiller"):
        return node["SOURCE"]
    return "ext" if node["TYPE"] in distiller_dict else "mdistiller"


__all__ = [
    "METHODS",
    "RECIPES",
    "Composition",
    "Distiller",
    "Logit",
    "Recipe",
    "Vanilla",
    "distiller_dict",
    "register_method",
    "source",
]
