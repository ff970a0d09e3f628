"""The published restorers that ours are compared with, trained on the same data for as long: SRCNN, RED-Net, SRResNet
and a plain U-Net.

SRCNN, RED-Net and U-Net take an image that already has the result's size, as SGEN does; SRResNet enlarges by itself.
All take and give (n, 3, h, w) float RGB in about [-1, 1]. Of each config, `multiple` is what height and width of the
input are multiples of, and `scale` how many times larger the result is, None where the input has its size already.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class SrcnnConfig:
    """SRCNN. The defaults are the paper's 9-1-5, on RGB: 20,099 parameters."""

    width: int = 64
    """Channels after the first layer; half as many after the second."""
    kernels: tuple[int, int, int] = (9, 1, 5)
    """Of the three layers, odd."""
    residual: bool = False
    """Ours: predict the difference to the input instead of the image."""

    multiple: ClassVar[int] = 1
    scale: ClassVar[None] = None


@dataclass(frozen=True)
class RedNetConfig:
    """RED-Net. The defaults are the paper's RED30: 1,037,507 parameters."""

    width: int = 64
    """Channels of every layer."""
    depth: int = 15
    """Convolutions, and as many deconvolutions: 5, 10 or 15 in the paper."""
    kernel: int = 3
    """Of every layer, odd."""
    skip: int = 2
    """Every so many layers a skip, counted from the image."""
    stride: int = 1
    """Of the first convolution and the last deconvolution. 1 as published; with 2 a layer costs a quarter."""

    scale: ClassVar[None] = None

    @property
    def multiple(self) -> int:
        return self.stride


@dataclass(frozen=True)
class SrresnetConfig:
    """SRResNet. The defaults are the paper's x4: 1,547,350 parameters."""

    scale: int = 4
    """How many times larger the result is: 2, 4 or 8."""
    width: int = 64
    """Channels of every layer."""
    blocks: int = 16
    """Residual blocks in a row."""
    kernel: int = 9
    """Of the first and the last convolution; all others have 3."""
    norm: bool = True
    """Batch normalisation, as published."""
    residual: bool = False
    """Ours: predict the difference to the cubic enlargement."""

    multiple: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.scale not in (2, 4, 8):
            raise ValueError(f"scale {self.scale}: SRResNet enlarges 2, 4 or 8 times")


@dataclass(frozen=True)
class UnetConfig:
    """A plain U-Net. The defaults have the paper's widths: 31,031,875 parameters."""

    width: int = 64
    """Channels at full size; twice as many after each halving."""
    depth: int = 4
    """How often the size is halved."""
    residual: bool = False
    """Ours: predict the difference to the input instead of the image."""

    scale: ClassVar[None] = None

    @property
    def multiple(self) -> int:
        return 2**self.depth


RivalConfig = SrcnnConfig | RedNetConfig | SrresnetConfig | UnetConfig

# `small` costs what SGEN's `small` does on a 208x176 result, `sisn-small` what SISN's does on one of 256x256. Both have
# the help that ours have: training starts from the enlarged image.
PRESETS: dict[str, dict[str, RivalConfig]] = {
    "srcnn": {
        "paper": SrcnnConfig(),
        "small": SrcnnConfig(width=94, residual=True),
        "sisn-small": SrcnnConfig(width=58, residual=True),
    },
    "rednet": {
        "paper": RedNetConfig(),
        "small": RedNetConfig(width=22, stride=2),
        "sisn-small": RedNetConfig(width=17, stride=2),
    },
    "srresnet": {
        "paper": SrresnetConfig(),
        "small": SrresnetConfig(width=28, residual=True),
        "sisn-small": SrresnetConfig(width=21, residual=True),
    },
    "unet": {
        "paper": UnetConfig(),
        "small": UnetConfig(width=13, residual=True),
        "sisn-small": UnetConfig(width=10, residual=True),
    },
}


class Srcnn(nn.Module):
    """Dong et al., "Image Super-Resolution Using Deep Convolutional Networks" (2014): three convolutions, eq. 1 to 3.

    Padded, so that the size stays.
    """

    def __init__(self, config: SrcnnConfig) -> None:
        super().__init__()
        self.config = config
        widths = (3, config.width, config.width // 2, 3)
        self.first, self.second, self.last = (
            nn.Conv2d(widths[i], widths[i + 1], kernel, padding=kernel // 2) for i, kernel in enumerate(config.kernels)
        )
        _initialise(self, begin=self.last if config.residual else None)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.last(F.relu(self.second(F.relu(self.first(image)))))
        return image + out if self.config.residual else out


class RedNet(nn.Module):
    """Mao et al., "Image Restoration Using Very Deep Convolutional Encoder-Decoder Networks with Symmetric Skip
    Connections" (2016): what a convolution gives is added to what its mirrored deconvolution gives, before the ReLU.

    The image itself is added to the result, as in the author code.
    """

    def __init__(self, config: RedNetConfig) -> None:
        super().__init__()
        self.config = config
        width, kernel, half, stride = config.width, config.kernel, config.kernel // 2, config.stride
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(3, width, kernel, stride, half)]
            + [nn.Conv2d(width, width, kernel, padding=half) for _ in range(config.depth - 1)]
        )
        last = nn.ConvTranspose2d(width, 3, kernel, stride, half, stride - 1)
        self.deconvolutions = nn.ModuleList(
            [nn.ConvTranspose2d(width, width, kernel, padding=half) for _ in range(config.depth - 1)] + [last]
        )
        _initialise(self, begin=last)

    def forward(self, image: Tensor) -> Tensor:
        features = [image]
        for convolution in self.convolutions:
            features.append(F.relu(convolution(features[-1])))
        x = features.pop()
        for deconvolution in self.deconvolutions:
            level, feature = len(features) - 1, features.pop()
            x = deconvolution(x)
            if level % self.config.skip == 0:
                x = x + feature
            if level > 0:
                x = F.relu(x)
        return x


class Srresnet(nn.Module):
    """Ledig et al., "Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial Network" (2017),
    Figure 4: residual blocks at the small size, then a pixel shuffle for each doubling.

    Gives (n, 3, scale h, scale w).
    """

    def __init__(self, config: SrresnetConfig) -> None:
        super().__init__()
        self.config = config
        width, kernel = config.width, config.kernel
        self.first = nn.Sequential(nn.Conv2d(3, width, kernel, padding=kernel // 2), nn.PReLU())
        self.blocks = nn.Sequential(*(_Block(config) for _ in range(config.blocks)))
        self.merge = nn.Sequential(*_normed(config))
        self.enlarge = nn.Sequential()
        for _ in range(int(math.log2(config.scale))):
            self.enlarge.extend([nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.PReLU()])
        self.last = nn.Conv2d(width, 3, kernel, padding=kernel // 2)
        _initialise(self, begin=self.last if config.residual else None)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image)
        out: Tensor = self.last(self.enlarge(x + self.merge(self.blocks(x))))
        if self.config.residual:
            out = out + F.interpolate(image, scale_factor=float(self.config.scale), mode="bicubic", align_corners=False)
        return out


class Unet(nn.Module):
    """Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation" (2015).

    Padded, so that the size stays.
    """

    def __init__(self, config: UnetConfig) -> None:
        super().__init__()
        self.config = config
        width = [config.width * 2**k for k in range(config.depth + 1)]
        self.first = _twice(3, width[0])
        self.downs = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), _twice(above, below)) for above, below in pairwise(width)
        )
        levels = list(reversed(range(config.depth)))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(width[k + 1], width[k], 2, 2) for k in levels)
        self.merges = nn.ModuleList(_twice(2 * width[k], width[k]) for k in levels)
        self.last = nn.Conv2d(width[0], 3, 1)
        _initialise(self, begin=self.last if config.residual else None)

    def forward(self, image: Tensor) -> Tensor:
        features = [self.first(image)]
        for down in self.downs:
            features.append(down(features[-1]))
        x = features.pop()
        for up, merge in zip(self.ups, self.merges, strict=True):
            x = merge(torch.cat([features.pop(), up(x)], dim=1))
        out: Tensor = self.last(x)
        return image + out if self.config.residual else out


NETWORKS: dict[str, type[Srcnn | RedNet | Srresnet | Unet]] = {
    "srcnn": Srcnn,
    "rednet": RedNet,
    "srresnet": Srresnet,
    "unet": Unet,
}


class _Block(nn.Module):
    """SRResNet's: x + norm(conv(prelu(norm(conv(x)))))."""

    def __init__(self, config: SrresnetConfig) -> None:
        super().__init__()
        self.inner = nn.Sequential(*_normed(config), nn.PReLU(), *_normed(config))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out


def _normed(config: SrresnetConfig) -> list[nn.Module]:
    convolution = nn.Conv2d(config.width, config.width, 3, padding=1, bias=not config.norm)
    return [convolution, nn.BatchNorm2d(config.width)] if config.norm else [convolution]


def _twice(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU(),
        nn.Conv2d(channels_out, channels_out, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


def _initialise(network: nn.Module, *, begin: nn.Module | None) -> None:
    """He et al.'s for all; `begin` gives nothing at first, nor does a residual block that nothing normalises."""
    silent = [begin, *(module.inner[-1] for module in network.modules() if isinstance(module, _Block))]
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            if module in silent:
                nn.init.zeros_(module.weight)
            else:
                nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
