"""SISN, the Split-attention In Split-attention Network (Lu et al., ACM MM 2021): a face enlarged 4 or 8 times.

A trunk at the low resolution: G groups (ESAG) in a row, each the sum of a detail path (I split-attention blocks and a
convolution) and of a structure path (one split-attention block). Inside a block (ISAB) the feature is split, and an
attention drawn from all splits together says how much of each is kept. Numbers of equations are the paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Side = Literal["isab", "isa"]
Head = Literal["lr", "code"]
Tail = Literal["steps", "direct"]

_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, in the author code


@dataclass(frozen=True)
class SisnConfig:
    """What makes one SISN differ from another. The defaults are the paper's x4: 8,047,875 parameters."""

    scale: int = 4
    """How many times larger the result is: 2, 4 or 8."""
    groups: int = 10
    """ESAGs in a row."""
    blocks: int = 10
    """ISABs in the detail path of each."""
    width: int = 64
    """Channels of the trunk."""
    radix: int = 4
    """Splits of a feature."""
    structure: bool = True
    """Whether groups have their structure path (Table 1)."""
    detail: bool = True
    """Whether the blocks of the detail path have their split attention (Table 1)."""
    side: Side = "isab"
    """The structure path: an ISAB as in the author code, or a bare ISA as in eq. 9."""
    norm: bool = True
    """Batch normalisation, as in the author code; the paper does not mention it."""
    head: Head = "lr"
    """lr: one convolution of the low-resolution image. code: of its s*s copies, the same function with more weights."""
    range: float = 255.0
    """The span that pixel values have inside: 255 as in the author code, or 1."""
    tail: Tail = "steps"
    """steps: a convolution and a pixel shuffle for each doubling. direct (ours): one shuffle for all."""
    residual: bool = False
    """Ours: predict the difference to the cubic enlargement."""

    def __post_init__(self) -> None:
        if self.scale not in (2, 4, 8):
            raise ValueError(f"scale {self.scale}: SISN enlarges 2, 4 or 8 times")

    @property
    def multiple(self) -> int:
        """Height and width of the input are multiples of this."""
        return 1


PRESETS: dict[str, SisnConfig] = {
    "paper": SisnConfig(),
    "default": SisnConfig(norm=False, range=1.0, residual=True),
    "small": SisnConfig(groups=4, blocks=4, width=32, norm=False, range=1.0, tail="direct", residual=True),
}


class Sisn(nn.Module):
    """The network. Input: (n, 3, h, w) float in [-1, 1], any h and w. Output: (n, 3, scale h, scale w), about the same
    range."""

    def __init__(self, config: SisnConfig) -> None:
        super().__init__()
        self.config = config
        width, scale = config.width, config.scale
        copies = scale**2 if config.head == "code" else 1
        self.head = nn.Conv2d(3 * copies, width, 3, padding=1)
        self.trunk = nn.Sequential(*(Group(config) for _ in range(config.groups)))
        self.merge = nn.Conv2d(width, width, 3, padding=1)
        self.tail: nn.Module
        if config.tail == "steps":
            steps: list[nn.Module] = []
            for _ in range(int(math.log2(scale))):
                steps += [nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2)]
            self.tail = nn.Sequential(*steps, nn.Conv2d(width, 3, 3, padding=1))
        else:
            self.tail = nn.Sequential(nn.Conv2d(width, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1) * config.range, persistent=False)
        if not config.norm:
            self._calm()

    def forward(self, image: Tensor) -> Tensor:
        mean: Tensor = self.mean  # type: ignore[assignment]
        span = self.config.range
        low = (image + 1) * (span / 2) - mean
        copies = self.config.scale**2 if self.config.head == "code" else 1
        x = self.head(low.repeat(1, copies, 1, 1) if copies > 1 else low)
        out = self.tail(self.merge(self.trunk(x)) + x)
        if self.config.residual:
            out = out + F.interpolate(low, scale_factor=float(self.config.scale), mode="bicubic", align_corners=False)
        restored: Tensor = (out + mean) * (2 / span) - 1
        return restored

    def _calm(self) -> None:
        """Without normalisation every block begins as nothing, so that depth does not blow the signal up."""
        for block in (module for module in self.modules() if isinstance(module, Block)):
            nn.init.zeros_(block.last.weight)
        if self.config.residual:
            last = next(m for m in reversed(list(self.tail.modules())) if isinstance(m, nn.Conv2d))
            nn.init.zeros_(last.weight)
            if last.bias is not None:
                nn.init.zeros_(last.bias)


class Group(nn.Module):
    """ESAG: the detail path plus the structure path (eq. 8 to 10)."""

    def __init__(self, config: SisnConfig) -> None:
        super().__init__()
        width = config.width
        blocks = (Block(config, attentive=config.detail) for _ in range(config.blocks))
        self.detail = nn.Sequential(*blocks, nn.Conv2d(width, width, 3, padding=1))
        self.structure: nn.Module | None = None
        if config.structure:
            self.structure = Block(config, attentive=True) if config.side == "isab" else SplitAttention(config)

    def forward(self, x: Tensor) -> Tensor:
        detail: Tensor = self.detail(x)
        return detail if self.structure is None else detail + self.structure(x)


class Block(nn.Module):
    """ISAB: 1x1, split attention, 1x1, its own skip, ReLU."""

    def __init__(self, config: SisnConfig, *, attentive: bool) -> None:
        super().__init__()
        width = config.width
        self.first = nn.Conv2d(width, width, 1, bias=False)
        self.first_norm = _norm(width, config)
        self.attention: nn.Module = SplitAttention(config) if attentive else nn.Identity()
        self.last = nn.Conv2d(width, width, 1, bias=False)
        self.last_norm = _norm(width, config)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.attention(F.relu(self.first_norm(self.first(x))))
        return F.relu(x + self.last_norm(self.last(inner)))


class SplitAttention(nn.Module):
    """ISA: `radix` parts of the feature, weighted by a softmax over the parts for each channel (eq. 6 and 7).

    As ResNeSt's with cardinality 1: the parts are made by a grouped 3x3 convolution, each `width` wide.
    """

    def __init__(self, config: SisnConfig) -> None:
        super().__init__()
        width, radix = config.width, config.radix
        between = max(width * radix // 4, 32)
        self.radix, self.width = radix, width
        self.split = nn.Conv2d(width, width * radix, 3, padding=1, groups=radix, bias=False)
        self.split_norm = _norm(width * radix, config)
        self.squeeze = nn.Conv2d(width, between, 1)
        self.squeeze_norm = _norm(between, config)
        self.weigh = nn.Conv2d(between, width * radix, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = F.relu(self.split_norm(self.split(x))).split(self.width, dim=1)
        pooled = sum(parts[1:], start=parts[0]).mean(dim=(2, 3), keepdim=True)
        weights = self.weigh(F.relu(self.squeeze_norm(self.squeeze(pooled))))
        if self.radix == 1:
            return parts[0] * torch.sigmoid(weights)
        weights = weights.view(-1, self.radix, self.width, 1, 1).softmax(dim=1)
        weighted = [part * weights[:, i] for i, part in enumerate(parts)]
        return sum(weighted[1:], start=weighted[0])


def _norm(width: int, config: SisnConfig) -> nn.Module:
    return nn.BatchNorm2d(width) if config.norm else nn.Identity()
