"""From a config to the parts of a run: device, distiller, optimizer."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from yacs.config import CfgNode

from ..config import NUM_CLASSES, source
from ..distillers import Distiller, distiller_dict
from ..errors import ConfigError
from ..models import cifar_model_dict
from ..teacher import Weights, load_into
from ..toolkit.methods import build_toolkit_distiller


def pick_device(name: str | None) -> torch.device:
    """The named device; None takes a GPU where there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {name}: not usable here: {str(error).splitlines()[0]}"
        ) from error
    return device


def build_distiller(cfg: CfgNode, weights: Weights | None, targets: Tensor) -> Distiller:
    """The student, the teacher with its weights, and the method between them.

    Args:
        targets: labels of the training set, (N,), for a contrastive method of the toolkit.

    Raises:
        RunError: the weights do not fit the teacher.
    """
    num_classes = NUM_CLASSES[cfg.DATASET.TYPE]
    # The student draws first: with one seed it starts from the same weights in every method.
    student = cifar_model_dict[cfg.DISTILLER.STUDENT][0](num_classes=num_classes)
    teacher = None
    if weights:
        teacher = cifar_model_dict[cfg.DISTILLER.TEACHER][0](num_classes=num_classes)
        load_into(teacher, weights, cfg.DISTILLER.TEACHER)
    if source(cfg.DISTILLER) == "mdistiller":
        return build_toolkit_distiller(cfg, student, teacher, targets)
    return distiller_dict[cfg.DISTILLER.TYPE](student, teacher, cfg)


def build_optimizer(cfg: CfgNode, distiller: Distiller) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        distiller.get_learnable_parameters(),
        lr=cfg.SOLVER.LR,
        momentum=cfg.SOLVER.MOMENTUM,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
    )


def build_autocast(amp: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """A context for the forward pass: SOLVER.AMP "bf16" or "none"."""
    if amp == "none":
        return nullcontext
    return partial(torch.autocast, device.type, dtype=torch.bfloat16)
