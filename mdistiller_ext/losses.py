"""Per-sample distillation losses, in log space and in float32 or better.

Every function takes logits of shape (B, C) and returns one loss per sample, shape (B,), in nats;
the caller reduces. `temperature` is a positive float, or a tensor of shape () or (B,).
A `pruned` mask, bool of shape (B, C), names classes that are taken out of both softmaxes: their
probability is exactly 0, and so is the gradient into their student logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .temperature import check_temperature


def kl_divergence(
    logits_student: Tensor,
    logits_teacher: Tensor,
    temperature: float | Tensor = 1.0,
    pruned: Tensor | None = None,
) -> Tensor:
    """KL(softmax(z_t / T) || softmax(z_s / T)) over the classes that are kept.

    Raises:
        ValueError: a shape does not fit, nothing is broadcast; or a temperature is not positive.
    """
    _check_shapes(logits_student, logits_teacher, pruned=pruned)
    log_p_student, log_p_teacher = (
        F.log_softmax(_prune(_scale(logits, temperature), pruned), dim=1)
        for logits in (logits_student, logits_teacher)
    )
    log_ratio = log_p_teacher - log_p_student
    if pruned is not None:
        log_ratio = log_ratio.masked_fill(pruned, 0.0)  # where both are log 0
    return (log_p_teacher.exp() * log_ratio).sum(dim=1)


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float | Tensor) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)) (Hinton et al., arXiv:1503.02531).

    Raises:
        ValueError: as `kl_divergence`.
    """
    divergence = kl_divergence(logits_student, logits_teacher, temperature)
    return _scalars(temperature, divergence) ** 2 * divergence


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float | Tensor,
    pruned: Tensor | None = None,
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD) (Zhao et al., CVPR 2022, eq. 7).

    TCKD is the KL divergence between the binary distributions (p_y, 1 - p_y), NCKD the one
    between the softmaxes over the classes other than the target.

    Args:
        target: class indices, shape (B,). The target itself is never pruned.
        pruned: at least one class other than the target must be kept in every row.

    Raises:
        ValueError: as `kl_divergence`.
    """
    _check_shapes(logits_student, logits_teacher, target=target, pruned=pruned)
    not_others = torch.zeros_like(logits_student, dtype=torch.bool).scatter(
        1, target.unsqueeze(1), True
    )
    if pruned is not None:
        not_others = not_others | pruned
    tckd = _binary_kl(
        _target_margin(logits_student, target, temperature, not_others),
        _target_margin(logits_teacher, target, temperature, not_others),
    )
    nckd = kl_divergence(logits_student, logits_teacher, temperature, not_others)
    return _scalars(temperature, tckd) ** 2 * (alpha * tckd + beta * nckd)


def _target_margin(
    logits: Tensor, target: Tensor, temperature: float | Tensor, not_others: Tensor
) -> Tensor:
    """log(p_y / (1 - p_y)), shape (B,), from differences of logits so that nothing cancels."""
    logits = at_least_float32(logits)
    behind = _scale(logits - logits.gather(1, target.unsqueeze(1)), temperature)
    return -_prune(behind, not_others).logsumexp(dim=1)


def _binary_kl(margin_student: Tensor, margin_teacher: Tensor) -> Tensor:
    """KL between Bernoulli distributions given by their log-odds; finite for all finite ones."""
    hit = F.logsigmoid(margin_teacher) - F.logsigmoid(margin_student)
    miss = F.logsigmoid(-margin_teacher) - F.logsigmoid(-margin_student)
    return margin_teacher.sigmoid() * hit + (-margin_teacher).sigmoid() * miss


def _scale(logits: Tensor, temperature: float | Tensor) -> Tensor:
    logits = at_least_float32(logits)
    return logits / _scalars(temperature, logits[:, 0]).unsqueeze(1)


def _prune(logits: Tensor, pruned: Tensor | None) -> Tensor:
    return logits if pruned is None else logits.masked_fill(pruned, float("-inf"))


def _scalars(temperature: float | Tensor, like: Tensor) -> Tensor:
    """The temperature as shape (B,), so that a float and B equal ones give the same bits."""
    check_temperature(temperature, (), tuple(like.shape))
    if not isinstance(temperature, Tensor):
        return torch.full_like(like, temperature)
    return temperature.to(like).expand_as(like)


def _check_shapes(logits_student: Tensor, logits_teacher: Tensor, **others: Tensor | None) -> None:
    """Shapes alone: to look at a tensor's values would wait for its device."""
    shape = logits_student.shape
    if len(shape) != 2:
        raise ValueError(f"logits_student has shape {tuple(shape)}, expected (B, C)")
    for name, tensor in {"logits_teacher": logits_teacher, **others}.items():
        expected = shape[:1] if name == "target" else shape
        if tensor is not None and tensor.shape != expected:
            found = tuple(tensor.shape)
            raise ValueError(f"{name} has shape {found}, expected {tuple(expected)}")


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
