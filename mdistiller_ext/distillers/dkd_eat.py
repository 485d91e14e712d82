"""DKD + EAT, epoch adaptive temperature."""

from functools import partial

from torch import nn
from yacs.config import CfgNode

from ..temperature import epoch_temperature
from .dkd import DKD


class DKD_EAT(DKD):
    """DKD whose temperature falls step by step from T (1 + RANGE) to T (1 - RANGE).

    T(epoch) = T (1 + RANGE - 2 RANGE i / (n - 1)) in stage i of n = ceil(EPOCHS / STEP_EPOCHS).
    With T = 4, RANGE = 0.4, 80 epochs and steps of 10: 5.6, 5.143, ..., 2.4. The paper (section
    3.1) finds RANGE 0.4 best for ResNet-8 and 0.2 for ResNet-20. RANGE = 0 is DKD.
    """

    TYPE = "DKD_EAT"

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: CfgNode) -> None:
        super().__init__(student, teacher, cfg)
        self.epoch_temperature = eat(self.method, self.method.T, cfg.SOLVER.EPOCHS)


def eat(node: CfgNode, temperature: float, epochs: int) -> partial[float]:
    """epoch -> temperature, by the keys RANGE and STEP_EPOCHS of a config node."""
    return partial(
        epoch_temperature,
        temperature=temperature,
        spread=node.RANGE,
        step_epochs=node.STEP_EPOCHS,
        epochs=epochs,
    )
