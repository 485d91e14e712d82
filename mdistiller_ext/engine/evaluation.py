"""What is measured on a whole data set: how good a network is and how close to its teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multiclass_stat_scores,
)

from ..data import ImageSet
from ..errors import RunError
from ..losses import kl_divergence


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
    classes = logits.shape[1]

    def accuracy(k: int) -> float:
        # From the count: a float32 mean would make equal accuracies differ in the last digits.
        hits = multiclass_stat_scores(
            logits, targets, classes, top_k=min(k, classes), average="micro"
        )[0]
        return 100 * hits.item() / len(targets)

    return {
        "top1": accuracy(1),
        "top5": accuracy(5),
        "nll": F.cross_entropy(logits, targets).item(),
        "ece": multiclass_calibration_error(logits.softmax(1), targets, classes, n_bins=15).item(),
    }


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
