"""What per-sample losses are made of, in log space and in float32 or better.

Every function takes logits of shape (B, C) and returns one value for each sample, shape (B,), in
nats. A temperature is a positive float, or a tensor of shape () or (B,); the teacher may have one
of its own. A `pruned` mask, bool of shape (B, C), names classes that are taken out of both
softmaxes: their probability is exactly 0, and so is the gradient into their student logits.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Temperature = float | Tensor


def kl_divergence(
    logits_student: Tensor,
    logits_teacher: Tensor,
    temperature: Temperature = 1.0,
    pruned: Tensor | None = None,
    temperature_teacher: Temperature | None = None,
) -> Tensor:
    """KL(softmax(z_t / T_t) || softmax(z_s / T_s)) over the classes that are kept.

    Args:
        temperature: T_s, and T_t where `temperature_teacher` is None.

    Raises:
        ValueError: a shape does not fit, nothing is broadcast; or a temperature is not positive.
    """
    check_shapes(logits_student, logits_teacher, pruned=pruned)
    log_p_student = log_softmax(logits_student, temperature, pruned)
    log_p_teacher = log_softmax(
        logits_teacher, temperature if temperature_teacher is None else temperature_teacher, pruned
    )
    log_ratio = log_p_teacher - log_p_student
    if pruned is not None:
        log_ratio = log_ratio.masked_fill(pruned, 0.0)  # where both are log 0
    return (log_p_teacher.exp() * log_ratio).sum(dim=1)


def log_softmax(logits: Tensor, temperature: Temperature, pruned: Tensor | None = None) -> Tensor:
    """log softmax(z / T), (B, C); -inf where pruned."""
    return F.log_softmax(prune(scale(logits, temperature), pruned), dim=1)


def target_margin(
    logits: Tensor, target: Tensor, temperature: Temperature, not_others: Tensor
) -> Tensor:
    """log(p_y / (1 - p_y)), shape (B,), from differences of logits so that nothing cancels.

    Args:
        not_others: bool (B, C), the target and what is pruned.
    """
    logits = at_least_float32(logits)
    behind = scale(logits - logits.gather(1, target.unsqueeze(1)), temperature)
    return -prune(behind, not_others).logsumexp(dim=1)


def group_margin(logits: Tensor, temperature: Temperature, inside: Tensor, out: Tensor) -> Tensor:
    """log(p(inside) / p(out)), shape (B,), of two sets of classes, bool (B, C), none empty."""
    logits = at_least_float32(logits)
    largest = prune(logits, ~(inside | out)).detach().amax(dim=1, keepdim=True)
    behind = scale(logits - largest, temperature)
    one, other = (prune(behind, ~group).logsumexp(dim=1) for group in (inside, out))
    return one - other


def binary_kl(margin_student: Tensor, margin_teacher: Tensor) -> Tensor:
    """KL between Bernoulli distributions given by their log-odds; finite for all finite ones."""
    hit = F.logsigmoid(margin_teacher) - F.logsigmoid(margin_student)
    miss = F.logsigmoid(-margin_teacher) - F.logsigmoid(-margin_student)
    return margin_teacher.sigmoid() * hit + (-margin_teacher).sigmoid() * miss


def target_mask(target: Tensor, like: Tensor) -> Tensor:
    """True for each sample's label alone, bool of `like`'s shape (B, C)."""
    return torch.zeros_like(like, dtype=torch.bool).scatter(1, target.unsqueeze(1), True)


def scale(logits: Tensor, temperature: Temperature) -> Tensor:
    logits = at_least_float32(logits)
    return logits / scalars(temperature, logits[:, 0]).unsqueeze(1)


def prune(logits: Tensor, pruned: Tensor | None) -> Tensor:
    return logits if pruned is None else logits.masked_fill(pruned, float("-inf"))


def scalars(temperature: Temperature, like: Tensor) -> Tensor:
    """The temperature as shape (B,), so that a float and B equal ones give the same bits."""
    check_temperature(temperature, (), tuple(like.shape))
    if not isinstance(temperature, Tensor):
        return torch.full_like(like, temperature)
    return temperature.to(like).expand_as(like)


def check_temperature(temperature: Temperature, *shapes: tuple[int, ...]) -> None:
    """A tensor's values are not looked at: that would wait for its device.

    Raises:
        ValueError: a number that is not positive and finite, or a tensor of none of the shapes.
    """
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}, expected a positive number")
    elif temperature.shape not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"temperature has shape {tuple(temperature.shape)}, expected {expected}")


def check_shapes(logits_student: Tensor, logits_teacher: Tensor, **others: Tensor | None) -> None:
    """Shapes alone: to look at a tensor's values would wait for its device."""
    shape = logits_student.shape
    if len(shape) != 2:
        raise ValueError(f"logits_student has shape {tuple(shape)}, expected (B, C)")
    for name, tensor in {"logits_teacher": logits_teacher, **others}.items():
        expected = shape[:1] if name == "target" else shape
        if tensor is not None and tensor.shape != expected:
            found = tuple(tensor.shape)
            raise ValueError(f"{name} has shape {found}, expected {tuple(expected)}")


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none, as Apple's."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def at_least_float32(logits: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
