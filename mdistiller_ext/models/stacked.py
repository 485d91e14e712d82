"""Several networks of one architecture as one, for devices that one of them leaves idle."""

import copy
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ConfigError
from .resnet import ResNet


class Stack:
    """K networks whose forward passes are one; each stays the module that it was.

    Their weights and buffers are moved to lie side by side, and each network has views of its
    part. So what is read from a network, copied into it or added to it by an optimizer is read
    from, copied into or added to the stack, and a network's own forward pass works as before. Only
    gradients come back by `share_gradients`. No network sees anything of another: not even a NaN.

    Args:
        networks: of equal shapes, on one device.
        form: "grouped": convolutions of K groups over images (B, 3 K, H, W), for `ResNet`s.
            "vmap": the network of a row, vectorised over rows by PyTorch, for most networks.
        compiled: whether the pass is compiled.

    Raises:
        ConfigError: the form is not for these networks.
    """

    def __init__(self, networks: Sequence[nn.Module], form: str, compiled: bool = False) -> None:
        self.networks = list(networks)
        self.whole = copy.deepcopy(self.networks[0]).train()
        self.whole.__dict__.pop("forward", None)  # that of a compiled student
        if form == "grouped":
            self.forward = self._grouped
            _group(self.whole, len(self.networks))
        else:
            self.forward = self._vectorised
        for mine, *parts in zip(*map(_tensors, (self.whole, *self.networks)), strict=True):
            mine.data = torch.cat([part.data.view(-1, *part.shape[1:]) for part in parts])
            for part, row in zip(parts, mine.data.chunk(len(parts)), strict=True):
                part.data = row.view_as(part)
        if compiled:
            self.forward = torch.compile(self.forward, dynamic=False)

    def __call__(self, images: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The logits (B, C) of each network, in training mode, for its images (B, 3, H, W)."""
        self.whole.zero_grad()
        return self.forward(images).unbind()

    def share_gradients(self) -> None:
        """Give each network what a backward pass left of its part."""
        rows = zip(*(network.parameters() for network in self.networks), strict=True)
        for mine, parts in zip(self.whole.parameters(), rows, strict=True):
            if mine.grad is not None:
                for part, row in zip(parts, mine.grad.chunk(len(parts)), strict=True):
                    part.grad = row

    def _grouped(self, images: Sequence[Tensor]) -> Tensor:
        return self.whole(torch.cat(list(images), dim=1))[0]

    def _vectorised(self, images: Sequence[Tensor]) -> Tensor:
        first = self.networks[0]
        names = [name for name, _ in chain(first.named_parameters(), first.named_buffers())]
        parts = zip(_tensors(self.whole), _tensors(first), strict=True)
        state = {
            name: mine.view(-1, *part.shape)
            for name, (mine, part) in zip(names, parts, strict=True)
        }

        def row(state: dict[str, Tensor], image: Tensor) -> Tensor:
            return functional_call(self.whole, state, image)[0]

        return torch.vmap(row)(state, torch.stack(list(images)))


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _group(network: nn.Module, count: int) -> None:
    """Make of a network what takes and gives `count` times the channels, when its weights do."""
    if not isinstance(network, ResNet):
        raise ConfigError(
            "SOLVER.STACK: grouped is for the CIFAR ResNets as students: expected vmap or branches"
        )
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.groups *= count
    network.add_module("fc", _Linears(network.fc, count))


class _Linears(nn.Module):
    """A linear layer for each of K groups of features (B, K F): (K, B, C)."""

    def __init__(self, one: nn.Linear, count: int) -> None:
        super().__init__()
        self.weight, self.bias, self.count = one.weight, one.bias, count

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (self.count, -1)).transpose(0, 1)
        weight = self.weight.unflatten(0, (self.count, -1))
        return torch.baddbmm(self.bias.view(self.count, 1, -1), x, weight.mT)
