"""EAT, DAT and LP on top of DKD, for the toolkit mdistiller and without it."""

from .config import get_cfg
from .distillers import distiller_dict
from .models import cifar_model_dict
from .toolkit.registration import register

__all__ = ["cifar_model_dict", "distiller_dict", "get_cfg", "register"]
