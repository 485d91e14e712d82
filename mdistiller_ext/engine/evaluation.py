"""What is measured on a whole data set: how good a network is and how close to its teacher."""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Batch, ImageSet
from ..errors import RunError
from ..losses import kl_divergence, widest

BINS = 15  # of confidence, equally wide


def predict(model: nn.Module, images: ImageSet, batch_size: int) -> Tensor:
    """The logits of every image, not augmented, in order: (N, C), float32."""
    return logits_of(model, images.plain(batch_size)).float()


@torch.no_grad()
def logits_of(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """The logits of these images in evaluation mode, in order: (N, C)."""
    model.eval()
    return torch.cat([model(batch.image)[0] for batch in batches])


def unsteady(network: nn.Module, images: Tensor) -> str:
    """Why what a network answers cannot be reproduced, or "".

    Tried in evaluation mode with some images (B, 3, H, W): twice, and the first of them alone.
    """
    devices = [images.device] if images.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        network.eval()
        first, again, alone = (network(part)[0] for part in (images, images, images[:1]))
    limit = 1e-3 * first.abs().amax()
    if (first - again).abs().amax() > limit:
        return "answers an image differently each time in evaluation mode, as by dropout"
    if (first[:1] - alone).abs().amax() > limit:
        return "answers an image differently in another batch, as by a norm without statistics"
    return ""


def performance(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """top1 and top5 in percent, nll in nats, ece (calibration error, 15 bins) in [0, 1].

    Each is of shape () and on its device, for which nothing waits; `numbers` reads them.
    """
    hits = logits.argmax(dim=1) == targets
    nearest = logits.topk(min(5, logits.shape[1])).indices
    # From counts: a float32 mean would make equal accuracies differ in the last digits.
    return {
        "top1": _percent(hits, len(targets)),
        "top5": _percent(nearest == targets[:, None], len(targets)),
        # NaN where any logit is not finite.
        "nll": F.cross_entropy(logits, targets) + 0 * logits.abs().amax(),
        "ece": calibration_error(logits.softmax(dim=1).amax(dim=1), hits),
    }


def confusion(logits: Tensor, targets: Tensor) -> Tensor:
    """How many images of each label (rows) are taken for each class (columns): (C, C), int64."""
    classes = logits.shape[1]
    pairs = targets * classes + logits.argmax(dim=1)
    return pairs.bincount(minlength=classes**2).view(classes, classes)


def calibration_error(confidence: Tensor, hits: Tensor) -> Tensor:
    """The expected calibration error (Guo et al., ICML 2017): a scalar in [0, 1].

    The mean over the samples of |accuracy - mean confidence| of the bin that a sample is in.

    Args:
        confidence: the largest probability, in [0, 1], (N,).
        hits: whether its class is the label, bool, (N,).
    """
    bins = (confidence * BINS).long().clamp(max=BINS - 1)  # 1.0 is in the last one
    # A product, not a scatter, whose order of adding is not fixed on a GPU.
    inside = bins[:, None] == torch.arange(BINS, device=bins.device)
    kind = widest(confidence.device)
    gaps = (confidence.to(kind) - hits.to(kind)) @ inside.to(kind)
    return gaps.abs().sum() / len(hits)


def fidelity(logits_student: Tensor, logits_teacher: Tensor) -> dict[str, Tensor]:
    """How close a student is to its teacher, means over the samples, all at T = 1; for `numbers`.

    agreement: equal top-1 prediction, percent. kl: KL(teacher || student), nats. l2_probabilities
    and l2_logits: Euclidean distance between the softmax outputs and between the logits (the
    paper's Figure 3).
    """
    p_student, p_teacher = logits_student.softmax(dim=1), logits_teacher.softmax(dim=1)
    same = logits_student.argmax(dim=1) == logits_teacher.argmax(dim=1)
    return {
        "agreement": _percent(same, len(same)),
        "kl": kl_divergence(logits_student, logits_teacher).mean(),
        "l2_probabilities": (p_student - p_teacher).norm(dim=1).mean(),
        "l2_logits": (logits_student - logits_teacher).norm(dim=1).mean(),
    }


def numbers(measured: Mapping[str, Tensor]) -> dict[str, float]:
    """What was measured, read from its device at once.

    Raises:
        RunError: a figure, and so perhaps a logit, is not finite.
    """
    figures = [figure.to(widest(figure.device)) for figure in measured.values()]
    read = torch.stack(figures).tolist()
    values = dict(zip(measured, read, strict=True))
    bad = [f"{name} {value:g}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise RunError(f"evaluation: not finite: {', '.join(bad)}")
    return values


def _percent(hits: Tensor, samples: int) -> Tensor:
    return 100 * hits.sum().to(widest(hits.device)) / samples
