"""CIFAR ResNets (He et al., CVPR 2016, section 4.2) with the toolkit's state-dict keys.

Differences from the paper, as in the toolkit: 1x1 convolutions with batch norm where a shortcut
changes shape, and convolutions initialised by fan-out.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"


class ResidualBlock(nn.Module):
    """conv-bn-relu-conv-bn plus the shortcut, *before* the closing ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.bn2(self.conv2(out)).add_(shortcut)


class ResNet(nn.Module):
    """A stem and three stages of (depth - 2) / 6 residual blocks, each stage half as large.

    Args:
        depth: 6n + 2 layers.
        widths: channels of the stem and of the three stages.
        num_classes: width of the output.

    A call maps images (B, 3, H, W) to `(logits, features)`: logits (B, C); features hold "feats"
    and "preact_feats", each a list of four maps (after the stem and each stage, after and before
    the last ReLU), and "pooled_feat" (B, widths[3]).
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int], num_classes: int = 10):
        super().__init__()
        stem, *stages = self.widths = widths
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(stem, stages[0], 1, blocks)
        self.layer2 = _stage(stages[0], stages[1], 2, blocks)
        self.layer3 = _stage(stages[1], stages[2], 2, blocks)
        self.fc = nn.Linear(stages[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_stage_channels(self) -> list[int]:
        """Channels of the maps in "feats"; methods of the toolkit ask for them."""
        return list(self.widths)

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The last batch norm of each stage; the toolkit's OFD reads its margins from them."""
        return [stage[-1].get_submodule("bn2") for stage in (self.layer1, self.layer2, self.layer3)]

    def forward(self, x: Tensor) -> tuple[Tensor, dict]:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        feats, preact_feats = [x], [x]
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                preact = block(x)
                x = F.relu(preact)
            feats.append(x)
            preact_feats.append(preact)
        pooled = x.mean(dim=(2, 3))
        features = {"feats": feats, "preact_feats": preact_feats, "pooled_feat": pooled}
        return self.fc(pooled), features

    def logits(self, x: Tensor, block: Callable[[ResidualBlock, Tensor], Tensor]) -> Tensor:
        """The logits alone, with `block` in place of `activated`."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for stage in (self.layer1, self.layer2, self.layer3):
            for each in stage:
                x = block(each, x)
        return self.fc(x.mean(dim=(2, 3)))


def activated(block: ResidualBlock, x: Tensor) -> Tensor:
    """A block with its closing ReLU."""
    return F.relu(block(x))


def folded(network: nn.Module) -> nn.Module:
    """A copy for inference with each batch norm folded into the convolution before it.

    Of networks that are not a `ResNet`, a plain copy.
    """
    network = copy.deepcopy(network).eval()
    if not isinstance(network, ResNet):
        return network
    for module in network.modules():
        if isinstance(module, (ResNet, ResidualBlock)):
            _fold(module, "conv1", "bn1")
        if isinstance(module, ResidualBlock):
            _fold(module, "conv2", "bn2")
            if module.downsample is not None:
                _fold(module.downsample, "0", "1")
    return network


def _fold(parent: nn.Module, conv: str, norm: str) -> None:
    pair: Any = parent.get_submodule(conv), parent.get_submodule(norm)
    setattr(parent, conv, fuse_conv_bn_eval(*pair))
    setattr(parent, norm, nn.Identity())


def _stage(in_channels: int, channels: int, stride: int, blocks: int) -> nn.ModuleList:
    return nn.ModuleList(
        ResidualBlock(in_channels if i == 0 else channels, channels, stride if i == 0 else 1)
        for i in range(blocks)
    )


# name -> (depth, channels of the stem and the three stages)
NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
ARCHITECTURES = {f"resnet{depth}": (depth, NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)}
ARCHITECTURES |= {f"resnet{depth}x4": (depth, WIDE) for depth in (8, 32)}


def _entry(name: str) -> tuple[Callable[..., nn.Module], str | None]:
    checkpoint = CHECKPOINTS / "cifar100" / f"{name}.pth"
    constructor = partial(ResNet, *ARCHITECTURES[name])
    return constructor, str(checkpoint) if checkpoint.exists() else None


cifar_model_dict = {name: _entry(name) for name in ARCHITECTURES}
