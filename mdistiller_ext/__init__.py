"""EAT, DAT and LP on top of DKD, for the toolkit mdistiller and without it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import get_cfg, load_cfg
    from .data import register_dataset
    from .distillers import distiller_dict, register_method
    from .engine import distill, load_student, train
    from .losses import dkd_loss, kl_divergence
    from .models import cifar_model_dict, register_network
    from .policies.dat import sample_temperature
    from .policies.eat import epoch_temperature
    from .policies.lp import epoch_ratio, pruned_count, pruning_mask
    from .toolkit.registration import register

__version__ = "0.1.0"
_HOMES = {
    "cifar_model_dict": ".models",
    "distill": ".engine",
    "distiller_dict": ".distillers",
    "dkd_loss": ".losses",
    "epoch_ratio": ".policies.lp",
    "epoch_temperature": ".policies.eat",
    "get_cfg": ".config",
    "kl_divergence": ".losses",
    "load_cfg": ".config",
    "load_student": ".engine",
    "pruned_count": ".policies.lp",
    "pruning_mask": ".policies.lp",
    "register": ".toolkit.registration",
    "register_dataset": ".data",
    "register_method": ".distillers",
    "register_network": ".models",
    "sample_temperature": ".policies.dat",
    "train": ".engine",
}
__all__ = [
    "cifar_model_dict",
    "distill",
    "distiller_dict",
    "dkd_loss",
    "epoch_ratio",
    "epoch_temperature",
    "get_cfg",
    "kl_divergence",
    "load_cfg",
    "load_student",
    "pruned_count",
    "pruning_mask",
    "register",
    "register_dataset",
    "register_method",
    "register_network",
    "sample_temperature",
    "train",
]


def __getattr__(name: str) -> Any:
    """The public names, imported when asked for: a command's --help does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
