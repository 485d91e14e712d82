"""DKD + LP, logits pruning."""

from functools import partial

from torch import nn
from yacs.config import CfgNode

from ..pruning import epoch_ratio
from .dkd import DKD, uniform


class DKD_LP(DKD):
    """DKD without the teacher's lowest logits: RATIOS[stage] of the classes, per sample.

    In stage min((epoch - 1) // STEP_EPOCHS, len(RATIOS) - 1) the floor(ratio C + 0.5) classes of
    lowest teacher logit leave both softmaxes; the target never does, and the cross-entropy stays
    whole. The paper (section 3.3) states only the ends, 0 and 0.4; the two ratios in between,
    0.13 and 0.27, are equal spacing and our assumption. RATIOS all 0 is DKD. CLASSES "random" is
    a control: as many classes, whichever.
    """

    TYPE = "DKD_LP"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CfgNode) -> None:
        super().__init__(student, teacher, cfg)
        self.epoch_ratio = lp(self.method)
        if self.method.CLASSES == "random":
            self.pruning_order = uniform

    def draws(self, classes: int) -> int:
        return classes if self.method.CLASSES == "random" else 0


def lp(node: CfgNode) -> partial[float]:
    """epoch -> pruned ratio, by the keys RATIOS and STEP_EPOCHS of a config node."""
    return partial(epoch_ratio, ratios=node.RATIOS, step_epochs=node.STEP_EPOCHS)
