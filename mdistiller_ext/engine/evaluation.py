"""What is measured on a whole data set: how good a network is and how close to its teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageSet
from ..errors import RunError
from ..losses import kl_divergence

BINS = 15  # of confidence, equally wide


@torch.inference_mode()
def predict(model: nn.Module, images: ImageSet, batch_size: int) -> Tensor:
    """The logits of every image, not augmented, in order: (N, C), float32.

    Raises:
        RunError: a logit is not finite.
    """
    model.eval()
    logits = torch.cat([model(batch.image)[0] for batch in images.plain(batch_size)]).float()
    if not logits.isfinite().all():
        raise RunError("evaluation: the network's logits are not finite")
    return logits


def performance(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """top1 and top5 in percent, nll in nats, ece (calibration error, 15 bins) in [0, 1]."""
    hits = logits.argmax(dim=1) == targets
    nearest = logits.topk(min(5, logits.shape[1])).indices
    # From counts: a float32 mean would make equal accuracies differ in the last digits.
    return {
        "top1": 100 * hits.sum().item() / len(targets),
        "top5": 100 * (nearest == targets[:, None]).sum().item() / len(targets),
        "nll": F.cross_entropy(logits, targets).item(),
        "ece": calibration_error(logits.softmax(dim=1).amax(dim=1), hits).item(),
    }


def calibration_error(confidence: Tensor, hits: Tensor) -> Tensor:
    """The expected calibration error (Guo et al., ICML 2017): a scalar in [0, 1].

    The mean over the samples of |accuracy - mean confidence| of the bin that a sample is in.

    Args:
        confidence: the largest probability, in [0, 1], (N,).
        hits: whether its class is the label, bool, (N,).
    """
    bins = (confidence * BINS).long().clamp(max=BINS - 1)  # 1.0 is in the last one
    # A product, not a scatter, whose order of adding is not fixed on a GPU.
    gaps = (confidence.double() - hits.double()) @ F.one_hot(bins, BINS).double()
    return gaps.abs().sum() / len(hits)


def fidelity(logits_student: Tensor, logits_teacher: Tensor) -> dict[str, float]:
    """How close a student is to its teacher, means over the samples, all at T = 1.

    agreement: equal top-1 prediction, percent. kl: KL(teacher || student), nats. l2_probabilities
    and l2_logits: Euclidean distance between the softmax outputs and between the logits (the
    paper's Figure 3).
    """
    p_student, p_teacher = logits_student.softmax(dim=1), logits_teacher.softmax(dim=1)
    same = logits_student.argmax(dim=1) == logits_teacher.argmax(dim=1)
    return {
        "agreement": 100 * same.sum().item() / len(same),
        "kl": kl_divergence(logits_student, logits_teacher).mean().item(),
        "l2_probabilities": (p_student - p_teacher).norm(dim=1).mean().item(),
        "l2_logits": (logits_student - logits_teacher).norm(dim=1).mean().item(),
    }
