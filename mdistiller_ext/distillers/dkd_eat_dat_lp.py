"""DKD with all three techniques, the paper's future work."""

from torch import nn
from yacs.config import CfgNode

from .dkd import DKD
from .dkd_dat import dat
from .dkd_eat import eat
from .dkd_lp import lp


class DKD_EAT_DAT_LP(DKD):
    """DKD whose classes LP prunes, whose temperature EAT lowers and whose samples DAT spreads.

    DAT ranks by the KL over the kept classes at the epoch's temperature. Each technique is
    configured in its own node, EAT, DAT and LP, with the keys it has alone.
    """

    TYPE = "DKD_EAT_DAT_LP"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CfgNode) -> None:
        super().__init__(student, teacher, cfg)
        self.epoch_ratio = lp(self.method.LP)
        self.epoch_temperature = eat(self.method.EAT, self.method.T, cfg.SOLVER.EPOCHS)
        self.sample_temperature = dat(self.method.DAT)
