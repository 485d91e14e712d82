"""Students of one architecture side by side: K forward passes as one."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .resnet import ResNet

FORMS = ("grouped", "dense64", "dense128")


class Stack(nn.Module):
    """K CIFAR ResNets whose forward passes are one.

    The weights and buffers of the K networks move into tensors with K times the rows, and each
    network keeps views of its own. So whatever reads or writes a network reads or writes the stack,
    and the network's own forward pass still works. Gradients arrive at the stack's parameters only.

    Args:
        networks: of equal shapes, on one device.
        form: how a convolution of the K networks is computed; all forms give the same numbers.
            "grouped": one convolution with K groups.
            "denseN": a group of about N channels holds several networks, with zeros between them,
            because tensor cores want 64 channels or more.
            A value that is not finite in one network then reaches those that share its
            convolutions.

    Raises:
        ConfigError: the networks are no CIFAR ResNets.
    """

    def __init__(self, networks: Sequence[nn.Module], form: str) -> None:
        super().__init__()
        if not all(isinstance(network, ResNet) for network in networks):
            raise ConfigError(
                f"SOLVER.STACK: {form} stacks CIFAR ResNets, the student is a "
                f"{type(networks[0]).__name__}: expected none"
            )
        self.networks = list(networks)
        self.whole = _merged(networks, form)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (K, B, C) of images (K, B, 3, H, W)."""
        logits, _ = self.whole(images.transpose(0, 1).flatten(1, 2))
        return logits

    def rows(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Of tensors shaped like the stack's parameters, what belongs to each network's."""
        shapes = [parameter.shape for parameter in self.networks[0].parameters()]
        chunks = [tensor.chunk(len(self.networks)) for tensor in tensors]
        return [
            [chunk[number].view(shape) for chunk, shape in zip(chunks, shapes, strict=True)]
            for number in range(len(self.networks))
        ]


def _merged(networks: Sequence[nn.Module], form: str) -> nn.Module:
    """A network whose convolutions have the channels of all of these; they get views of it."""
    count = len(networks)
    whole = copy.deepcopy(networks[0])
    whole.__dict__.pop("forward", None)  # that of a compiled student
    for parent in list(whole.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, nn.Conv2d):
                setattr(parent, name, _Convolution(module, count, _shared(form, count, module)))
            if isinstance(module, nn.Linear):
                setattr(parent, name, _Linear(module, count))
    for mine, *parts in zip(*map(_tensors, (whole, *networks)), strict=True):
        mine.data = torch.cat([part.data.view(-1, *part.shape[1:]) for part in parts])
        for part, row in zip(parts, mine.data.chunk(count), strict=True):
            part.data = row.view_as(part)
    return whole


def _shared(form: str, count: int, conv: nn.Conv2d) -> int:
    """How many of the networks share a dense convolution."""
    if form == "grouped":
        return 1
    most = max(1, int(form.removeprefix("dense")) // conv.out_channels)
    return max(m for m in range(1, count + 1) if count % m == 0 and m <= most)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


class _Convolution(nn.Module):
    """A convolution of K networks: images (B, K I, H, W) -> (B, K O, H', W').

    It has K / m groups, each a dense convolution of m networks with zeros between them. The zeros
    cost m times the arithmetic, and no memory traffic between layers.
    """

    def __init__(self, one: nn.Conv2d, count: int, m: int) -> None:
        super().__init__()
        self.weight, self.stride, self.padding = one.weight, one.stride, one.padding
        self.m, self.groups = m, count // m
        # No buffer: the stack's buffers are those of the networks.
        self.own = torch.eye(m, dtype=torch.bool, device=one.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self._dense(), None, self.stride, self.padding, 1, self.groups)

    def _dense(self) -> Tensor:
        """The weights (K O, I, kh, kw) as (K O, m I, kh, kw), channels-last."""
        if self.m == 1:
            return self.weight
        rows = self.weight.permute(0, 2, 3, 1).unflatten(0, (self.groups, self.m, -1))
        own = self.own.view(1, self.m, 1, 1, 1, self.m, 1)
        # No product with zeros: a NaN would spread within the weights.
        dense = torch.where(own, rows.unsqueeze(5), rows.new_zeros(()))
        return dense.flatten(5).flatten(0, 2).permute(0, 3, 1, 2)


class _Linear(nn.Module):
    """A linear layer of each of K networks: features (B, K F) -> (K, B, C)."""

    def __init__(self, one: nn.Linear, count: int) -> None:
        super().__init__()
        self.weight, self.bias, self.count = one.weight, one.bias, count

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (self.count, -1)).transpose(0, 1)
        weight = self.weight.unflatten(0, (self.count, -1))
        return torch.baddbmm(self.bias.view(self.count, 1, -1), x, weight.mT)
