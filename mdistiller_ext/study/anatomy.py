"""What EAT, DAT and LP assume of a teacher and its student, measured without training anything."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..distillers import Logit
from ..losses import kl_divergence
from ..policies import Context
from .statistics import Summary, summarise

GRID = torch.logspace(-10, 3, 131, base=2.0, dtype=torch.float64)  # inverse temperatures
TENTHS = 10


def best_inverse_temperature(student: Tensor, teacher: Tensor, steps: int = 40) -> Tensor:
    """What brings the teacher nearest, per sample: argmin_γ KL(softmax(γ z_t) ‖ softmax(z_s)).

    Its derivative is γ Var_p(z_t) - Cov_p(z_t, z_s) with p = softmax(γ z_t), so that
    γ = Cov_p(z_t, z_s) / Var_p(z_t) is iterated, from the best of a grid and damped.

    Args:
        student, teacher: logits (N, C).

    Returns:
        (N,), float64, within the grid's ends, 1/1024 and 8.
    """
    student, teacher = student.double(), teacher.double()
    distance = torch.stack([_distance(student, teacher, gamma) for gamma in GRID])
    gamma = GRID[distance.argmin(dim=0)]
    for _ in range(steps):
        p = (gamma[:, None] * teacher).softmax(dim=1)
        centred = teacher - (p * teacher).sum(dim=1, keepdim=True)
        variance = (p * centred**2).sum(dim=1).clamp_min(1e-300)
        wanted = ((p * centred * student).sum(dim=1) / variance).clamp(GRID[0], GRID[-1])
        new = gamma + 0.5 * (wanted - gamma)
        better = _distance(student, teacher, new) <= _distance(student, teacher, gamma)
        gamma = torch.where(better, new, gamma)
    return gamma


def _distance(student: Tensor, teacher: Tensor, gamma: Tensor) -> Tensor:
    log_p = (gamma.reshape(-1, 1) * teacher).log_softmax(dim=1)
    return (log_p.exp() * (log_p - student.log_softmax(dim=1))).sum(dim=1)


class Fit(NamedTuple):
    """log2 of the best-fit temperatures of a student: of all images, and of DAT's groups."""

    all: Summary
    easiest: Summary
    hardest: Summary
    difference: Summary  # hardest minus the mean of the easiest


def fit(student: Tensor, teacher: Tensor, temperature: float) -> Fit:
    """How soft a teacher would have to be to look like its student, and for which images.

    Args:
        temperature: at which DAT ranks by KL; the tenths of largest and of least KL are its groups.
    """
    log_t = -best_inverse_temperature(student, teacher).log2()
    order = kl_divergence(student, teacher, temperature).argsort()
    tenth = len(order) // TENTHS
    easiest, hardest = log_t[order[:tenth]], log_t[order[-tenth:]]
    groups = (log_t, easiest, hardest, hardest - easiest.mean())
    return Fit(*(summarise(values.tolist()) for values in groups))


class Bin(NamedTuple):
    """Of the classes in a tenth of each image's ranking by its mean logit over the views.

    Attributes:
        spread: the standard deviation of a class's row-centred logit over the views.
        distance: of its mean from the image's median logit.
        signal: the ratio of the two, per class.
    """

    spread: Summary
    distance: Summary
    signal: Summary


def by_rank(views: Tensor, target: Tensor) -> list[Bin]:
    """From the lowest tenth of the classes other than the label to the highest; each over images.

    Args:
        views: a teacher's logits (N, V, C) of V views of N images.
        target: labels (N,).
    """
    mean, spread = _over_views(views)
    mean, spread = _others(mean, target), _others(spread, target)
    distance = (mean - mean.median(dim=1, keepdim=True).values).abs()
    order = mean.argsort(dim=1)
    bins = []
    for places in order.tensor_split(min(TENTHS, order.shape[1]), dim=1):
        parts = (x.gather(1, places) for x in (spread, distance, distance / spread))
        bins.append(Bin(*(summarise(part.mean(dim=1).tolist()) for part in parts)))
    return bins


class Ranks(NamedTuple):
    """Mean rank correlation (Spearman) among the classes of a part of the ranking, over images."""

    lowest: Summary
    rest: Summary


def agreement(views: Tensor, others: Tensor, target: Tensor, ratio: float) -> Ranks:
    """How far a second answer ranks classes as the first does, within parts of them.

    The parts are the lowest `ratio` of the classes other than the label and the rest, chosen by
    half of the first answers, so that choosing them makes no correlation.

    Args:
        views: a teacher's logits (N, V, C), whose first half chooses and second half is compared.
        others: logits (N, W, C) to compare their mean with: of other views, or another teacher.
    """
    half = views.shape[1] // 2
    parts = views[:, :half], views[:, half:], others
    chooser, one, other = (_others(part.double().mean(dim=1), target) for part in parts)
    order, count = chooser.argsort(dim=1), round(ratio * chooser.shape[1])
    places = (order[:, :count], order[:, count:])
    return Ranks(
        *(summarise(_spearman(one.gather(1, p), other.gather(1, p)).tolist()) for p in places)
    )


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    """Of each row, (N,)."""
    a, b = (x.argsort(dim=1).argsort(dim=1).double() for x in (a, b))
    a, b = (x - x.mean(dim=1, keepdim=True) for x in (a, b))
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))


def _over_views(views: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the views of row-centred logits, each (N, C)."""
    centred = views.double() - views.double().mean(dim=2, keepdim=True)
    return centred.mean(dim=1), centred.std(dim=1)


def _others(values: Tensor, target: Tensor) -> Tensor:
    """Without the label's column: (N, C - 1)."""
    keep = torch.ones_like(values, dtype=torch.bool).scatter(1, target[:, None], False)
    return values[keep].view(len(values), -1)


class Gradient(NamedTuple):
    """A method's distillation gradient by the student's logits beside the baseline's, over batches.

    Attributes:
        length: of it, as a share of the baseline's.
        cosine: of the two; 1 where the method is another weight and nothing else.
    """

    length: Summary
    cosine: Summary


def gradient(
    method: Logit, baseline: Logit, epoch: int, batches: Iterator[tuple[Tensor, Tensor, Tensor]]
) -> Gradient:
    """Compare at an epoch's settings.

    Args:
        batches: (student's logits, teacher's logits, labels) of each.
    """
    lengths, cosines = [], []
    for student, teacher, target in batches:
        one, other = (
            _gradient(m, epoch, student, teacher, target).flatten() for m in (method, baseline)
        )
        lengths.append((one.norm() / other.norm()).item())
        cosines.append((one @ other / (one.norm() * other.norm())).item())
    return Gradient(summarise(lengths), summarise(cosines))


def _gradient(
    method: Logit, epoch: int, student: Tensor, teacher: Tensor, target: Tensor
) -> Tensor:
    logits = student.detach().double().requires_grad_()
    context = Context(method.schedule(epoch))
    value = method.value(method.pair(logits, teacher.double(), target, context)).mean()
    return torch.autograd.grad(value, logits)[0]
