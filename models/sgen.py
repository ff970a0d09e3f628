"""SGEN, the Sequential Gating Ensemble Network (Chen et al., AAAI 2018 and the journal version).

An auto-encoder whose input already has the output's size. A chain of stride-2 convolutions makes the features
x_1..x_N; one big-stride convolution takes each to the common 1/2^(N+1) grid (the base-encoders X_k), where gates
merge them bottom-up; one big-stride deconvolution brings every merged feature back (the base-decoders Y_k), merged
top-down by gates. Numbers of equations are the journal version's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Ensemble = Literal["sgu", "max", "avg", "cat"]
Gate = Literal["sigmoid", "lrelu"]
Down = Literal["stride", "conv_pool", "fit"]
Up = Literal["stride", "resize_conv", "fit"]
Stem = Literal["conv", "unshuffle"]


@dataclass(frozen=True)
class SgenConfig:
    """What makes one SGEN differ from another. The defaults are the paper's: N = 3, 32,397,827 parameters."""

    n: int = 3
    """Number of base-encoders and of base-decoders (Table VI: 2, 3, 4)."""
    base: int = 64
    """Width of the stem; level k is `base * 2**k` wide, `cap` at most."""
    cap: int = 512
    """The widest any feature becomes."""
    kernel: int = 5
    """Kernel of every convolution outside the gates."""
    channels: int = 3
    """3 for RGB, 1 for the author code's grey."""
    ensemble: Ensemble = "sgu"
    """How two features become one: gated (SGEN), maximum (MEN), mean (AEN), concatenation (CEN)."""
    gate: Gate = "sigmoid"
    """Sigmoid as in the paper, or the author code's LeakyReLU."""
    down: Down = "stride"
    """stride: the author code's. conv_pool: convolution, then mean pooling. fit (ours): kernel stride + 2, so that a
    big stride leaves no position unread and the size divides without padding the output."""
    up: Up = "stride"
    """stride: the author code's deconvolution. resize_conv: nearest, then 3x3. fit (ours): kernel stride + 2."""
    stem: Stem = "conv"
    """conv: at full size, as published. unshuffle (ours): start from 2x2 blocks at half size."""
    residual: bool = False
    """Ours: predict the difference to the input instead of the image (then without tanh)."""
    blocks: int = 0
    """Ours: residual blocks after every feature at 1/4 size and coarser, in encoder and decoder."""

    detail: int = 0
    """Ours: width of a small path at full size beside the ensemble, 0 for none. All else goes through the 1/2^(N+1)
    grid, which has not room for every pixel: without it nothing that is sharp can be denoised at x1."""

    scale: ClassVar[None] = None
    """Its input already has the result's size."""

    @property
    def multiple(self) -> int:
        """Height and width of the input are multiples of this."""
        return 2 ** (self.n + 1)


PRESETS: dict[str, SgenConfig] = {
    "paper": SgenConfig(),
    "default": SgenConfig(base=28, down="fit", up="fit", stem="unshuffle", residual=True, blocks=1, detail=16),
    "small": SgenConfig(base=16, down="fit", up="fit", stem="unshuffle", residual=True, blocks=1, detail=12),
}


class Sgen(nn.Module):
    """The generator.

    Input and output: (n, channels, H, W) float in [-1, 1], H and W multiples of `config.multiple`. The input is the
    low-resolution face enlarged to the size of the result. With `residual` the output may leave [-1, 1] a little.
    """

    def __init__(self, config: SgenConfig) -> None:
        super().__init__()
        self.config = config
        n, base, cap = config.n, config.base, config.cap
        width = [min(base * 2**k, cap) for k in range(n + 1)]  # of x_k; x_0 is the stem
        common = width[n]  # of every X_k
        level = [
            0,
            *(min(base * 2 ** (n - k), cap) for k in range(1, n + 1)),
            base // 2,
        ]  # of Y_k; the last: of the end

        if config.stem == "conv":
            self.stem: nn.Module = _conv(config.channels, base, config)
            self.first = _down(base, width[1], 2, config)
        else:
            self.stem = nn.PixelUnshuffle(2)
            self.first = nn.Sequential(nn.Conv2d(4 * config.channels, width[1], 3, padding=1), nn.LeakyReLU(0.2))
        self.chain = nn.ModuleList(
            nn.Sequential(_down(width[k - 1], width[k], 2, config), *_blocks(width[k], config)) for k in range(2, n + 1)
        )
        self.encoders = nn.ModuleList(_down(width[k], common, 2 ** (n - k + 1), config) for k in range(1, n + 1))
        self.encoder_merges = nn.ModuleList(_merge(common, config) for _ in range(2, n + 1))
        self.decoders = nn.ModuleList(_up(common, level[k], 2**k, config) for k in range(1, n + 1))
        self.decoder_merges = nn.ModuleList(_merge(level[k], config) for k in range(2, n + 1))
        self.rises = nn.ModuleList(
            nn.Sequential(
                _up(level[k], level[k + 1], 2, config), *(_blocks(level[k + 1], config) if k <= n - 2 else [])
            )
            for k in range(1, n + 1)
        )
        self.last = nn.Conv2d(level[n + 1], config.channels, config.kernel, padding=config.kernel // 2)
        self.detail = Detail(level[n + 1], config) if config.detail else None
        self.apply(_initialise)
        for convolution in (m.second for m in self.modules() if isinstance(m, ResidualBlock)):
            nn.init.zeros_(convolution.weight)
        if config.residual:
            nn.init.zeros_(self.last.weight)
        if self.detail is not None:
            nn.init.zeros_(self.detail.last.weight)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(self.stem(image))  # x_1
        merged = [self.encoders[0](x)]  # X̂_1 = X_1
        for deeper, encoder, merge in zip(self.chain, self.encoders[1:], self.encoder_merges, strict=True):
            x = deeper(x)  # x_k
            merged.append(merge(encoder(x), merged[-1]))  # eq. 5

        y = self.rises[0](self.decoders[0](merged[-1]))  # Ŷ_1
        for k, merge in enumerate(self.decoder_merges, start=1):
            y = self.rises[k](merge(self.decoders[k](merged[-1 - k]), y))  # Ŷ_k

        out = self.last(y)
        if self.detail is not None:
            out = out + self.detail(y, image)
        return image + out if self.config.residual else torch.tanh(out)


class SequentialGatingUnit(nn.Module):
    """f = g_a(x_a) * x_a + g_p(x_a) * x_p: both gates look at the active input only (eq. 3)."""

    def __init__(self, channels: int, gate: Gate) -> None:
        super().__init__()
        self.active = nn.Conv2d(channels, channels, 3, padding=1)
        self.passive = nn.Conv2d(channels, channels, 3, padding=1)
        self.gate = nn.Sigmoid() if gate == "sigmoid" else nn.LeakyReLU(0.2)

    def forward(self, active: Tensor, passive: Tensor) -> Tensor:
        return self.gate(self.active(active)) * active + self.gate(self.passive(active)) * passive


class Maximum(nn.Module):
    """MEN: the element-wise maximum in the place of the gates."""

    def forward(self, active: Tensor, passive: Tensor) -> Tensor:
        return torch.maximum(active, passive)


class Average(nn.Module):
    """AEN: the element-wise mean in the place of the gates."""

    def forward(self, active: Tensor, passive: Tensor) -> Tensor:
        return (active + passive) / 2


class Concatenation(nn.Module):
    """CEN: concatenation, brought back to the width by a 1x1 convolution (our reading)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, active: Tensor, passive: Tensor) -> Tensor:
        mixed: Tensor = self.mix(torch.cat([active, passive], dim=1))
        return mixed


class ResidualBlock(nn.Module):
    """x + conv(lrelu(conv(x))), 3x3, no normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.leaky_relu(self.first(x), 0.2))


class Detail(nn.Module):
    """What the common grid has no room for: the image itself, seen through the ensemble's last feature."""

    def __init__(self, channels: int, config: SgenConfig) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + config.channels, config.detail, 3, padding=1)
        self.second = nn.Conv2d(config.detail, config.detail, 3, padding=1)
        self.last = nn.Conv2d(config.detail, config.channels, 3, padding=1)

    def forward(self, feature: Tensor, image: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(torch.cat([feature, image], dim=1)), 0.2)
        out: Tensor = self.last(F.leaky_relu(self.second(x), 0.2))
        return out


def _initialise(module: nn.Module) -> None:
    """He et al.'s, which keeps the strength of the signal through every layer.

    PyTorch's own counts a deconvolution's inputs as if its stride were 1: after a stride of 8 next to nothing is left.
    """
    if isinstance(module, nn.ConvTranspose2d):
        taps = math.prod(kernel / stride for kernel, stride in zip(module.kernel_size, module.stride, strict=True))
        nn.init.normal_(module.weight, 0, math.sqrt(2 / (module.in_channels * taps)))
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, a=0.2)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _merge(channels: int, config: SgenConfig) -> nn.Module:
    if config.ensemble == "sgu":
        return SequentialGatingUnit(channels, config.gate)
    if config.ensemble == "cat":
        return Concatenation(channels)
    return Maximum() if config.ensemble == "max" else Average()


def _conv(channels_in: int, channels_out: int, config: SgenConfig) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, config.kernel, padding=config.kernel // 2), nn.LeakyReLU(0.2)
    )


def _down(channels_in: int, channels_out: int, stride: int, config: SgenConfig) -> nn.Module:
    """The size divided by `stride`, then LeakyReLU."""
    kernel, half = config.kernel, config.kernel // 2
    if config.down == "stride":
        return nn.Sequential(nn.Conv2d(channels_in, channels_out, kernel, stride, half), nn.LeakyReLU(0.2))
    if config.down == "conv_pool":
        return nn.Sequential(
            nn.Conv2d(channels_in, channels_out, kernel, 1, half), nn.LeakyReLU(0.2), nn.AvgPool2d(stride)
        )
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, stride + 2, stride, 1), nn.LeakyReLU(0.2))


def _up(channels_in: int, channels_out: int, stride: int, config: SgenConfig) -> nn.Module:
    """The size multiplied by exactly `stride`, then ReLU."""
    if config.up == "stride":
        deconv = nn.ConvTranspose2d(channels_in, channels_out, config.kernel, stride, config.kernel // 2, stride - 1)
        return nn.Sequential(deconv, nn.ReLU())
    if config.up == "resize_conv":
        return nn.Sequential(
            nn.Upsample(scale_factor=stride), nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU()
        )
    return nn.Sequential(nn.ConvTranspose2d(channels_in, channels_out, stride + 2, stride, 1), nn.ReLU())


def _blocks(channels: int, config: SgenConfig) -> list[nn.Module]:
    return [ResidualBlock(channels) for _ in range(config.blocks)]
