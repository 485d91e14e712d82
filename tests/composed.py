"""Any loss with any policies on given logits, without networks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdistiller_ext import distiller_dict, get_cfg
from mdistiller_ext.distillers import Logit
from mdistiller_ext.losses import Pair
from mdistiller_ext.policies import Context
from mdistiller_ext.settings import leaves


class Result(NamedTuple):
    """Of each sample the loss, (B,), with factor and weights; its gradient by the student's logits,
    (B, C), for the sum over the batch; and what was compared."""

    value: Tensor
    gradient: Tensor
    pair: Pair


def composed(
    loss: str = "KD", policies: Sequence[str] = (), epochs: int = 80, **settings: Any
) -> Logit:
    """LOGIT with settings, as `LP={"MODE": "lump"}`."""
    cfg = get_cfg()
    cfg.SOLVER.EPOCHS = epochs
    node = {"LOSS": loss, "POLICIES": list(policies), **settings}
    for key, value in leaves({"LOGIT": {k: v for k, v in node.items() if v != {}}}):
        cfg.merge_from_list([key, value])
    distiller = distiller_dict["LOGIT"](nn.Identity(), nn.Identity(), cfg)
    assert isinstance(distiller, Logit)
    return distiller


def logits(
    batch: int = 16, classes: int = 10, scale: float = 3.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's, which take gradients, the teacher's and labels, half of them its top class."""
    generator = torch.Generator().manual_seed(batch)
    student, teacher = scale * torch.randn(2, batch, classes, generator=generator, dtype=dtype)
    target = torch.randint(classes, (batch,), generator=generator)
    target = torch.where(torch.arange(batch) % 2 == 0, teacher.argmax(dim=1), target)
    return student.requires_grad_(), teacher, target


def apply(
    distiller: Logit, batch: tuple[Tensor, Tensor, Tensor], epoch: int = 1, **context: Any
) -> Result:
    now: Mapping[str, float] = distiller.schedule(epoch)
    pair = distiller.pair(*batch, Context(now, **context))
    value = distiller.value(pair)
    (gradient,) = torch.autograd.grad(value.sum(), batch[0], retain_graph=True)
    return Result(value.detach(), gradient, pair)
