"""The methods, one a file, and their registry."""

from collections.abc import Callable

from .base import Distiller, Vanilla
from .dkd import DKD
from .dkd_dat import DKD_DAT
from .dkd_eat import DKD_EAT
from .dkd_eat_dat_lp import DKD_EAT_DAT_LP
from .dkd_lp import DKD_LP
from .kd import KD

distiller_dict: dict[str, Callable[..., Distiller]] = {
    cls.TYPE: cls for cls in (Vanilla, KD, DKD, DKD_EAT, DKD_DAT, DKD_LP, DKD_EAT_DAT_LP)
}
