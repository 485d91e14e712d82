"""What a student's answers to some images would become if it learned from others."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..losses import at_least_float32

LENGTH = 0.01  # of the step in the weights whose effect is measured


def ahead(student: nn.Module, image: Tensor, held: Tensor, target: Tensor) -> Tensor:
    """How the logits of `image` change along the gradient of the cross-entropy of `held`, (B, C).

    By the gradient of all weights that train, and by central differences; batch norms normalise
    each batch by itself, as in training, and their running statistics stay. Takes three forwards
    and a backward.

    Args:
        image: (B, 3, H, W).
        held, target: images (M, 3, H, W) and labels (M,).
    """
    named = student.named_parameters()
    weights: dict[str, Tensor] = {name: weight for name, weight in named if weight.requires_grad}

    def logits(of: Tensor, step: Sequence[Tensor] | None = None, share: float = 0.0) -> Tensor:
        here = weights
        if step is not None:
            moved = zip(weights.items(), step, strict=True)
            here = {name: weight + share * change for (name, weight), change in moved}
        buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
        return at_least_float32(functional_call(student, {**here, **buffers}, (of,))[0])

    loss = F.cross_entropy(logits(held), target)
    # A weight that the logits do not depend on has the gradient 0.
    gradient = torch.autograd.grad(
        loss, list(weights.values()), allow_unused=True, materialize_grads=True
    )
    with torch.no_grad():
        norm = torch.stack([g.norm() for g in gradient]).norm()
        norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)
        step = [g * (LENGTH / norm) for g in gradient]
        change = logits(image, step, 1.0) - logits(image, step, -1.0)
        return change * (norm / (2 * LENGTH))
