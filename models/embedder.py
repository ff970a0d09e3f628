"""The face embedder that ships: an aligned face in, its embedding out.

Made to learn on a CPU core: the first convolution goes straight to a quarter of the side, and blocks are of two plain
3x3 convolutions. MobileFaceNet's inverted residuals (`block: inverted`) have fewer multiplications, but on a CPU their
depthwise convolutions learn fewer faces a second. What follows the features is MobileFaceNet's: wider, then one
weight for each place of each channel (its global depthwise convolution), then linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class EmbedderConfig:
    """What makes one embedder differ from another."""

    widths: tuple[int, ...] = (40, 80, 160)
    """Channels of each stage; the first works at 1/4 of the side, each further one at half of that before."""
    depths: tuple[int, ...] = (1, 2, 2)
    """Blocks of each stage."""
    block: Literal["residual", "inverted"] = "residual"
    """residual: two 3x3 convolutions. inverted: MobileFaceNet's, of which the 3x3 is depthwise."""
    expansion: int = 2
    """Of inverted blocks: how many times wider their middle is."""
    features: int = 128
    """Channels of what the stages end in, and the embedding is made of; a teacher's hints have as many."""
    head: int = 512
    """Channels of the global depthwise convolution."""
    embedding: int = 256
    """Length of the embedding."""
    side: int = 112
    """Of the aligned face, in pixels."""
    mirrored: bool = False
    """Whether its mirror image is looked at too: twice the work, fewer faces missed (docs/training.md)."""

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.depths):
            raise ValueError(f"widths, depths: {len(self.widths)} and {len(self.depths)} stages")
        if self.side % self.stride:
            raise ValueError(
                f"side: {self.side} is no multiple of {self.stride}, the stride of {len(self.widths)} stages"
            )

    @property
    def stride(self) -> int:
        """How many pixels of the side one place of the features stands for."""
        return 4 * 2 ** (len(self.widths) - 1)


PRESETS: dict[str, EmbedderConfig] = {
    "default": EmbedderConfig(mirrored=True),
    "small": EmbedderConfig(widths=(32, 64, 128), depths=(1, 2, 2), mirrored=True),
    "mobilefacenet": EmbedderConfig(widths=(64, 128, 128), depths=(5, 7, 2), block="inverted", mirrored=True),
}


class Embedder(nn.Module):
    """Input: (n, 3, side, side) float RGB in [-1, 1], aligned. Output: (n, embedding) float, not of unit length."""

    def __init__(self, config: EmbedderConfig) -> None:
        super().__init__()
        self.config = config
        first = config.widths[0]
        self.stem = nn.Sequential(nn.Conv2d(3, first, 7, 4, 2, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        stages = [_stage(first, first, 1, config.depths[0], config)]
        for (before, width), depth in zip(pairwise(config.widths), config.depths[1:], strict=True):
            stages.append(_stage(before, width, 2, depth, config))
        self.stages = nn.Sequential(*stages)
        self.bottleneck = nn.Sequential(
            nn.Conv2d(config.widths[-1], config.features, 1, bias=False), nn.BatchNorm2d(config.features)
        )
        head, places = config.head, config.side // config.stride
        self.head = nn.Sequential(
            nn.Conv2d(config.features, head, 1, bias=False), nn.BatchNorm2d(head), nn.ReLU(),
            nn.Conv2d(head, head, places, groups=head, bias=False), nn.BatchNorm2d(head),
            nn.Conv2d(head, config.embedding, 1),
        )  # fmt: skip

    def forward(self, face: Tensor) -> Tensor:
        """Return the embeddings; of a face and its mirror image together, where `mirrored`."""
        if not self.config.mirrored:
            return self.embed(self.features(face))
        both = self.embed(self.features(torch.cat([face, face.flip(3)])))
        return F.normalize(both, dim=1).unflatten(0, (2, -1)).sum(dim=0)

    def features(self, face: Tensor) -> Tensor:
        """Return what the embedding is made of, (n, features, side / stride, side / stride)."""
        features: Tensor = self.bottleneck(self.stages(self.stem(face)))
        return features

    def embed(self, features: Tensor) -> Tensor:
        """Return the embedding of features, (n, embedding)."""
        embedding: Tensor = self.head(features).flatten(1)
        return embedding


class Residual(nn.Module):
    """relu(shortcut(x) + two 3x3 convolutions of x)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        nn.init.zeros_(self.convolutions[-1].weight)  # a block begins as its shortcut
        self.shortcut = nn.Identity() if before == width and stride == 1 else _projection(before, width, stride)
        self.end = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.end(self.shortcut(x) + self.convolutions(x))
        return out


class Inverted(nn.Module):
    """Wider, a depthwise 3x3, narrow again; with x itself where the size stays."""

    def __init__(self, before: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = before * expansion
        self.convolutions = nn.Sequential(
            nn.Conv2d(before, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU(),
            nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False), nn.BatchNorm2d(middle), nn.ReLU(),
            nn.Conv2d(middle, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.stays = before == width and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.convolutions(x)
        return x + out if self.stays else out


def _projection(before: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.AvgPool2d(stride) if stride > 1 else nn.Identity(),
        nn.Conv2d(before, width, 1, bias=False),
        nn.BatchNorm2d(width),
    )


def _stage(before: int, width: int, stride: int, depth: int, config: EmbedderConfig) -> nn.Module:
    def block(before: int, stride: int) -> nn.Module:
        if config.block == "inverted":
            return Inverted(before, width, stride, config.expansion * stride)  # twice as wide where the size halves
        return Residual(before, width, stride)

    return nn.Sequential(block(before, stride), *(block(width, 1) for _ in range(depth - 1)))
