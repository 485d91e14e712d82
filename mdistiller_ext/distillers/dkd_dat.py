"""DKD + DAT, data adaptive temperature."""

from functools import partial

from torch import Tensor, nn
from yacs.config import CfgNode

from ..temperature import sample_temperature
from .dkd import DKD, uniform


class DKD_DAT(DKD):
    """DKD with T (1 + RANGE) for a batch's hardest samples and T (1 - RANGE) for its easiest.

    Hard is a large KL(softmax(z_t/T) || softmax(z_s/T)), measured without gradient; k =
    floor(FRACTION B) samples are raised and k lowered. The paper (section 3.2): FRACTION 0.1,
    RANGE 0.05. RANGE = 0 is DKD. GROUPS "random" is a control: as many samples, whichever.
    """

    TYPE = "DKD_DAT"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CfgNode) -> None:
        super().__init__(student, teacher, cfg)
        self.sample_temperature = dat(self.method)
        if self.method.GROUPS == "random":
            self.sample_order = uniform

    def draws(self, classes: int) -> int:
        return 1 if self.method.GROUPS == "random" else 0


def dat(node: CfgNode) -> partial[Tensor]:
    """(divergence, temperature) -> temperatures, by the keys RANGE and FRACTION of a node."""
    return partial(sample_temperature, spread=node.RANGE, fraction=node.FRACTION)
