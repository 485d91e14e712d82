"""EAT, DAT and LP on top of DKD, for the toolkit mdistiller and without it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import get_cfg
    from .distillers import distiller_dict
    from .models import cifar_model_dict
    from .toolkit.registration import register

__version__ = "0.1.0"
_HOMES = {
    "cifar_model_dict": ".models",
    "distiller_dict": ".distillers",
    "get_cfg": ".config",
    "register": ".toolkit.registration",
}
__all__ = ["cifar_model_dict", "distiller_dict", "get_cfg", "register"]


def __getattr__(name: str) -> Any:
    """The public names, imported when asked for: a command's --help does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
