"""GFRNet, the Guided Face Restoration Network (Li et al., ECCV 2018): a face restored by another photo of the person.

WarpNet looks at the degraded face and at the guide and says for every pixel of the result where in the guide its like
is found; the guide is warped so, and RecNet draws the restored face from the degraded face and the warped guide. Two
conditional discriminators judge it while it learns: one the whole face, one its landmarks' box.

Two designs: the paper's, and ours, in which WarpNet corrects the identity from coarse to fine, a mask lets RecNet
ignore the guide, nothing is normalised and the size is free. Sizes and readings are those of the specification.

A flow is (n, 2, h, w) float, x then y: where in the guide each pixel is read, absolutely, -1 and 1 being the centres of
the outermost pixels (`align_corners=True`). For ONNX it is a GridSample of opset 16 to 19.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.sgen import ResidualBlock

Design = Literal["paper", "modern"]
Norm = Literal["batch", "instance", "none"]
DiscriminatorNorm = Literal["batch", "spectral"]

_BANDS = (4, 16)  # px: where the bands of a guide's detail end


@dataclass(frozen=True)
class GfrnetConfig:
    """What makes one GFRNet differ from another.

    The defaults are the paper's, with the widths that the authors' figure gives WarpNet: 290,657,285 parameters.
    """

    design: Design = "paper"
    """paper: as published. modern (ours): a flow that corrects the identity, a mask over the guide, residual blocks."""
    base: int = 64
    """Width of the finest level (1/2 of the size; 1/8 in the modern WarpNet); each coarser one doubles it."""
    cap: int = 1024
    """The widest a level becomes; 1024, 512 and 256 are the specification's."""
    depth: int = 8
    """How often the size is halved; the paper's 8 take 256 to 1."""
    widen: int = 1
    """All widths times this: 2 in -W2 and -WG2."""
    guide: bool = True
    """Whether RecNet is shown a guide: not in -WG and -WG2."""
    warp: bool = True
    """Whether there is a WarpNet; without one (-W) RecNet is shown the guide as it is."""
    norm: Norm = "batch"
    """batch: the statistics of the batch while it trains (the paper's is 1), of each face by itself thereafter, as the
    author code does, which never leaves training. instance: of each face, always. none: the modern design's."""
    dropout: float = 0.5
    """How much of the first three features of RecNet's decoder is dropped in training: pix2pix's, not in the paper."""
    blocks: int = 0
    """Residual blocks on each level, down and up; the modern design has at least one, the paper's none."""
    laid: bool = False
    """Whether a guide comes laid onto the face: shifted, turned and scaled so that its five landmarks meet the face's
    (`models.guided.laid_onto`). WarpNet then has only pose and expression to mend."""
    smooth: int = 1
    """The flow's correction, found at 1/8 of the size, is a mean of so many by so many of its pixels, taken twice: a
    guide is then bent as a whole. At 1, no mean, eyes and noses swell round the landmarks that teach the flow."""
    trust: float = 1.0
    """The most that the mask gives to any guide. What the own guide brings shrinks with it, and so does the pull of a
    stranger's."""
    warp_grad: bool = True
    """Whether what RecNet is trained for reaches WarpNet too, as in the paper."""

    scale: ClassVar[None] = None
    """Its input already has the result's size."""

    def __post_init__(self) -> None:
        if self.base < 1 or self.cap < self.base:
            raise ValueError(f"base {self.base}, cap {self.cap}: base is 1 or more, cap is not below it")
        if self.depth < 2:
            raise ValueError(f"depth {self.depth}: the size is halved twice at least")
        if self.widen < 1:
            raise ValueError(f"widen {self.widen}: widths are multiplied by 1 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout}: a part, from 0 to below 1")
        if self.smooth < 1 or self.smooth % 2 == 0:
            raise ValueError(f"smooth {self.smooth}: an odd number of pixels, 1 or more")
        if not 0 < self.trust <= 1:
            raise ValueError(f"trust {self.trust}: a part, above 0 and at most 1")
        if self.warp and not self.guide:
            raise ValueError("warp without guide: there is nothing to warp; set warp to false too")
        if self.design == "paper" and self.blocks:
            raise ValueError(f"blocks {self.blocks}: the paper's design has none")
        if self.design == "paper" and (self.smooth != 1 or self.trust != 1):
            raise ValueError("smooth and trust are the modern design's")
        if self.design == "modern" and (self.blocks < 1 or self.norm != "none" or self.dropout):
            raise ValueError("the modern design wants blocks of 1 at least, norm none and dropout 0")

    @property
    def multiple(self) -> int:
        """Height and width of the input are multiples of this."""
        if self.design == "paper":
            return int(2**self.depth)
        halved = int(2 ** (self.depth + self.warp))  # its WarpNet sees half the size
        return max(halved, _BANDS[-1]) if self.guide else halved


_OURS = GfrnetConfig(design="modern", depth=5, norm="none", dropout=0.0, blocks=1, laid=True, smooth=5, trust=0.4)
PRESETS: dict[str, GfrnetConfig] = {
    "paper": GfrnetConfig(),
    "default": replace(_OURS, base=32, cap=144, blocks=2),
    "small": replace(_OURS, base=24, cap=128),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of the paper's ablation (Table 1, below)."""

    guide: bool = True
    """As in GfrnetConfig."""
    warp: bool = True
    """As in GfrnetConfig."""
    widen: int = 1
    """As in GfrnetConfig."""
    flow_loss: bool = True
    """Whether landmark and total variation loss teach WarpNet, and pre-train it."""
    stranger: bool = False
    """Whether the guide, in the test alone, is of another person."""

    def config(self, full: GfrnetConfig) -> GfrnetConfig:
        """Return the variant's config, given that of Full."""
        return replace(full, guide=self.guide, warp=self.warp, widen=self.widen)


VARIANTS: dict[str, Variant] = {
    "Full": Variant(),
    "-F": Variant(flow_loss=False),
    "-W": Variant(warp=False),
    "-WG": Variant(guide=False, warp=False),
    "-W2": Variant(warp=False, widen=2),
    "-WG2": Variant(guide=False, warp=False, widen=2),
    "R": Variant(stranger=True),
}


@dataclass(frozen=True, slots=True)
class Guided:
    """A restored face and how the guide came into it."""

    restored: Tensor
    """(n, 3, h, w) RGB, about [-1, 1]."""
    warped: Tensor | None
    """The guide as RecNet is shown it, before the mask: (n, 3, h, w); None without a guide."""
    flow: Tensor | None
    """(n, 2, h, w); None without WarpNet."""
    mask: Tensor | None
    """(n, 1, h, w) from 0, guide ignored, to 1; None in the paper's design and without a guide."""


class Gfrnet(nn.Module):
    """The network. Degraded face and guide: (n, 3, h, w) RGB float in [-1, 1], both of the result's size, h and w
    multiples of `config.multiple`. With `guide` off the guide is not looked at."""

    def __init__(self, config: GfrnetConfig) -> None:
        super().__init__()
        self.config = config
        modern = config.design == "modern"
        self.warp_net: WarpNet | ResidualWarpNet | None = None
        if config.warp:
            self.warp_net = ResidualWarpNet(config) if modern else WarpNet(config)
        self.rec_net = MaskedRecNet(config) if modern else RecNet(config)

    def forward(self, degraded: Tensor, guide: Tensor) -> Tensor:
        return self.parts(degraded, guide).restored

    def parts(self, degraded: Tensor, guide: Tensor) -> Guided:
        """Return the restored face with the warped guide, the flow and the mask."""
        if not self.config.guide:
            restored, _ = self.rec_net(degraded, None)
            return Guided(restored, None, None, None)
        flow = None if self.warp_net is None else self.flow(degraded, guide)
        warped = guide if flow is None else warp(guide, flow)
        restored, mask = self.rec_net(degraded, warped if self.config.warp_grad else warped.detach())
        return Guided(restored, warped, flow, mask)

    def flow(self, degraded: Tensor, guide: Tensor) -> Tensor:
        """Return the flow alone, which pre-training needs; raises ValueError without WarpNet."""
        if self.warp_net is None:
            raise ValueError("this variant has no WarpNet, so no flow")
        flow: Tensor = self.warp_net(degraded, guide)
        return flow


def warp(guide: Tensor, flow: Tensor) -> Tensor:
    """Return the guide read where the flow says (eq. 2), (n, c, h, w); beyond its edge the edge is replicated."""
    places = flow.permute(0, 2, 3, 1)
    return F.grid_sample(guide, places, mode="bilinear", padding_mode="border", align_corners=True)


def identity_flow(flow: Tensor) -> Tensor:
    """Return the flow (1, 2, h, w) that leaves a guide as it is, for flows like this one."""
    height, width = flow.shape[2:]
    x = torch.arange(width, device=flow.device, dtype=flow.dtype) * (2 / (width - 1)) - 1
    y = torch.arange(height, device=flow.device, dtype=flow.dtype) * (2 / (height - 1)) - 1
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])[None]


# The paper's design


class WarpNet(nn.Module):
    """The paper's WarpNet: degraded face and guide, through 1/2^depth of their size and back, to the flow."""

    def __init__(self, config: GfrnetConfig) -> None:
        super().__init__()
        widths = _widths(config, config.depth)
        self.down = _encoder(6, widths, config)
        self.up = nn.ModuleList(
            _up(narrow, wide, config) for narrow, wide in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.last = nn.ConvTranspose2d(widths[0], 2, 4, 2, 1)
        self.apply(_initialise)

    def forward(self, degraded: Tensor, guide: Tensor) -> Tensor:
        x = torch.cat([degraded, guide], dim=1)
        for layer in (*self.down, *self.up):
            x = layer(x)
        return torch.tanh(self.last(F.relu(x)))


class RecNet(nn.Module):
    """The paper's RecNet, pix2pix's U-Net: degraded face and warped guide to the restored face, and no mask."""

    def __init__(self, config: GfrnetConfig) -> None:
        super().__init__()
        widths = _widths(config, config.depth)
        self.down = _encoder(6 if config.guide else 3, widths, config)
        self.up = nn.ModuleList(
            _up(wide if k == 0 else 2 * wide, narrow, config, dropout=config.dropout if k < 3 else 0)
            for k, (wide, narrow) in enumerate(zip(widths[:0:-1], widths[-2::-1], strict=True))
        )
        self.last = nn.ConvTranspose2d(2 * widths[0], 3, 4, 2, 1)
        self.apply(_initialise)

    def forward(self, degraded: Tensor, guide: Tensor | None) -> tuple[Tensor, None]:
        x = degraded if guide is None else torch.cat([degraded, guide], dim=1)
        features: list[Tensor] = []
        for layer in self.down:
            x = layer(x)
            features.append(x)
        for layer, skipped in zip(self.up, features[-2::-1], strict=True):
            x = torch.cat([layer(x), skipped], dim=1)
        return torch.tanh(self.last(F.relu(x))), None


class FaceNorm(nn.BatchNorm2d):
    """Batch normalisation without a memory: in training by the batch, else each face by itself.

    With the paper's batch of 1 both are the same, and a face's result never depends on those beside it.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)


def _widths(config: GfrnetConfig, levels: int) -> list[int]:
    return [min(config.base * 2**k, config.cap) * config.widen for k in range(levels)]


def _encoder(channels: int, widths: list[int], config: GfrnetConfig) -> nn.ModuleList:
    """Convolutions that halve the size; neither the first nor the last, which may come to 1x1, is normalised."""
    layers = [nn.Sequential(nn.Conv2d(channels, widths[0], 4, 2, 1))]
    for k in range(1, len(widths)):
        norm = _norm(widths[k], config) if k < len(widths) - 1 else nn.Identity()
        layers.append(nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(widths[k - 1], widths[k], 4, 2, 1), norm))
    return nn.ModuleList(layers)


def _up(channels_in: int, channels_out: int, config: GfrnetConfig, *, dropout: float = 0) -> nn.Module:
    layers = [nn.ReLU(), nn.ConvTranspose2d(channels_in, channels_out, 4, 2, 1), _norm(channels_out, config)]
    return nn.Sequential(*layers, nn.Dropout(dropout)) if dropout else nn.Sequential(*layers)


def _norm(width: int, config: GfrnetConfig) -> nn.Module:
    if config.norm == "batch":
        return FaceNorm(width)
    return nn.InstanceNorm2d(width, affine=True) if config.norm == "instance" else nn.Identity()


def _initialise(module: nn.Module) -> None:
    """pix2pix's, which the paper follows."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d | nn.InstanceNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)


# The modern design


class ResidualWarpNet(nn.Module):
    """Our WarpNet: a correction of the identity, found at 1/2^(depth + 1) of the size and refined up to 1/8.

    It sees both at half their size: a warp is smooth. On the way up every level is shown the degraded face beside the
    guide as far as it is warped. Untrained, the flow is the identity.
    """

    reach = 0.1
    """A correction is this times what its layer says: at 1, training leaps over small ones (measured: the landmarks
    came to lie further off than the identity's)."""

    def __init__(self, config: GfrnetConfig) -> None:
        super().__init__()
        self.smooth = config.smooth
        widths = _widths(config, config.depth - 1)
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(16 * 6, widths[0], 3, padding=1))
        self.down = _residual_encoder(widths, config)
        self.rise = _rises(widths)
        self.look = nn.ModuleList(nn.Conv2d(6, width, 3, padding=1) for width in widths[:-1])
        self.refine = nn.ModuleList(_blocks(width, config) for width in widths[:-1])
        self.corrections = nn.ModuleList(nn.Conv2d(width, 2, 3, padding=1) for width in widths)
        self.apply(_calm)
        for correction in self.corrections:
            nn.init.zeros_(correction.weight)

    def forward(self, degraded: Tensor, guide: Tensor) -> Tensor:
        degraded, guide = (F.avg_pool2d(image, 2) for image in (degraded, guide))
        x = self.stem(torch.cat([degraded, guide], dim=1))
        features: list[Tensor] = []
        for level in self.down:
            x = level(x)
            features.append(x)
        residual = self.reach * self.corrections[-1](x)
        for k in range(len(features) - 2, -1, -1):
            residual = _doubled(residual)
            small_degraded, small_guide = (F.avg_pool2d(image, 4 * 2**k) for image in (degraded, guide))
            seen = torch.cat([small_degraded, _shifted(small_guide, residual)], dim=1)
            x = self.refine[k](_doubled(self.rise[k](x)) + features[k] + self.look[k](seen))
            residual = residual + self.reach * self.corrections[k](x)
        if self.smooth > 1:
            for _ in range(2):
                residual = F.avg_pool2d(residual, self.smooth, 1, self.smooth // 2, count_include_pad=False)
        residual = F.interpolate(residual, scale_factor=8.0, mode="bilinear", align_corners=False)
        return identity_flow(residual) + residual


class MaskedRecNet(nn.Module):
    """Our RecNet: what is to be added to the degraded face, from 1/2 of the size downwards and back.

    It is shown the guide times a mask, and the mask: where the mask is 0 the guide does not count. It also says, pixel
    by pixel, how much of the guide's own detail is to be added (`details`), times the mask: that is learnt in a few
    hundred steps, while to draw it from what it is shown takes it far longer (measured: until then the guide is but
    noise to it, and the mask shuts). Untrained, it gives the degraded face back.
    """

    held_open: bool = False
    """Whether the mask counts as 1 everywhere, as while training begins."""

    def __init__(self, config: GfrnetConfig) -> None:
        super().__init__()
        widths = _widths(config, config.depth)
        self.mask = Mask(widths[0], config) if config.guide else None
        channels = 7 if config.guide else 3
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * channels, widths[0], 3, padding=1))
        self.down = _residual_encoder(widths, config)
        self.rise = _rises(widths)
        self.refine = nn.ModuleList(_blocks(width, config) for width in widths[:-1])
        self.last = nn.Conv2d(widths[0], 4 * (3 + (len(_BANDS) if config.guide else 0)), 3, padding=1)
        self.apply(_calm)
        nn.init.zeros_(self.last.weight)
        if self.mask is not None:
            nn.init.zeros_(self.mask.last.weight)
            nn.init.constant_(self.mask.last.bias, 4)  # begins open, at 0.9

    def forward(self, degraded: Tensor, guide: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x, mask = degraded, None
        if self.mask is not None and guide is not None:
            mask = torch.ones_like(degraded[:, :1]) if self.held_open else self.mask(degraded, guide)
            x = torch.cat([degraded, mask * guide, mask], dim=1)
        x = self.stem(x)
        features: list[Tensor] = []
        for level in self.down:
            x = level(x)
            features.append(x)
        for k in range(len(features) - 2, -1, -1):
            x = self.refine[k](_doubled(self.rise[k](x)) + features[k])
        out = F.pixel_shuffle(self.last(x), 2)
        restored = degraded + out[:, :3]
        if guide is not None and mask is not None:
            for k, detail in enumerate(details(guide), start=3):
                restored = restored + mask * out[:, k : k + 1] * detail
        return restored, mask


def details(guide: Tensor) -> list[Tensor]:
    """Return what lies in a guide between its means over 1 and 4, and over 4 and 16 pixels: (n, 3, h, w) each, h and w
    multiples of 16."""
    means = [guide]
    for side in _BANDS:
        small = F.avg_pool2d(guide, side)
        means.append(F.interpolate(small, scale_factor=float(side), mode="bilinear", align_corners=False))
    return [fine - coarse for fine, coarse in pairwise(means)]


class Mask(nn.Module):
    """How far the warped guide is to be trusted, pixel by pixel: (n, 1, h, w) in [0, `trust`], seen at 1/4 of the size.

    By softsign, which learns even where it is all but shut. A sigmoid did not: an hour's training by guides that did
    not meet their faces brought it to 1e-13, and no guide counted from then on.
    """

    def __init__(self, width: int, config: GfrnetConfig) -> None:
        super().__init__()
        self.trust = config.trust
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(16 * 6, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            _blocks(width, config),
        )
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, degraded: Tensor, warped: Tensor) -> Tensor:
        seen = self.last(self.layers(torch.cat([degraded, warped], dim=1)))
        half = self.trust / 2
        shown: Tensor = half + half * F.softsign(seen)
        return F.interpolate(shown, scale_factor=4.0, mode="bilinear", align_corners=False)


def _residual_encoder(widths: list[int], config: GfrnetConfig) -> nn.ModuleList:
    steps = (nn.Conv2d(wide, narrow, 4, 2, 1) for wide, narrow in pairwise(widths))
    return nn.ModuleList(
        [_blocks(widths[0], config)]
        + [nn.Sequential(step, _blocks(width, config)) for step, width in zip(steps, widths[1:], strict=True)]
    )


def _rises(widths: list[int]) -> nn.ModuleList:
    return nn.ModuleList(nn.Conv2d(coarse, fine, 1) for fine, coarse in pairwise(widths))


def _blocks(width: int, config: GfrnetConfig) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(width) for _ in range(config.blocks)))


def _calm(module: nn.Module) -> None:
    """Every convolution keeps the strength of the signal, and every block begins as nothing."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    elif isinstance(module, ResidualBlock):  # comes after its convolutions
        nn.init.kaiming_normal_(module.first.weight, a=0.2)
        nn.init.zeros_(module.second.weight)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def _shifted(image: Tensor, residual: Tensor) -> Tensor:
    """Return a picture made small by means, warped by a correction of the identity.

    Its outermost centres lie further in than the full picture's, so here -1 and 1 are the edges: a correction then
    moves both by the same part of the face, but for 1 in 256.
    """
    height, width = residual.shape[2:]
    x = (torch.arange(width, device=residual.device, dtype=residual.dtype) * 2 + 1) / width - 1
    y = (torch.arange(height, device=residual.device, dtype=residual.dtype) * 2 + 1) / height - 1
    places = torch.stack([x.expand(height, width), y[:, None].expand(height, width)])[None] + residual
    where = places.permute(0, 2, 3, 1)
    return F.grid_sample(image, where, mode="bilinear", padding_mode="border", align_corners=False)


# The discriminators


@dataclass(frozen=True)
class GfrnetDiscriminatorConfig:
    """What GFRNet's two discriminators are made of. The defaults are the paper's: 2,772,673 parameters each."""

    base: int = 64
    """Channels after the first convolution; the three that follow double them."""
    norm: DiscriminatorNorm = "batch"
    """batch: pix2pix's, by the batch in training, else each face by itself. spectral (ours): no statistics at all."""
    guide: bool = True
    """Whether they are shown the guide; where the restorer has none (-WG) neither have they."""

    def __post_init__(self) -> None:
        if self.base < 1:
            raise ValueError(f"base {self.base}: at least one channel")


class PatchDiscriminator(nn.Module):
    """pix2pix's PatchGAN under conditions: is this the face of which that is the degraded one, and the guide?

    Degraded face, guide and the face to judge are (n, 3, h, w) in [-1, 1], h and w of 24 at least; the guide is not
    warped. Gives logits (n, 1, rows, columns), one for each patch of 70 pixels: above 0 is real.
    """

    def __init__(self, config: GfrnetDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [9 if config.guide else 6, *(config.base * 2**k for k in range(4))]
        layers: list[nn.Module] = []
        for k in range(4):
            convolution = nn.Conv2d(widths[k], widths[k + 1], 4, 2 if k < 3 else 1, 1)
            layers.append(convolution)
            if k > 0 and config.norm == "batch":
                layers.append(FaceNorm(widths[k + 1]))
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[4], 1, 4, 1, 1))
        self.apply(_initialise)
        if config.norm == "spectral":
            for convolution in (m for m in self.layers if isinstance(m, nn.Conv2d)):
                nn.utils.parametrizations.spectral_norm(convolution)

    def forward(self, degraded: Tensor, guide: Tensor, face: Tensor) -> Tensor:
        shown = [degraded, guide, face] if self.config.guide else [degraded, face]
        logits: Tensor = self.layers(torch.cat(shown, dim=1))
        return logits


class GfrnetDiscriminators(nn.Module):
    """The two: `whole` judges faces, `local` the box of their landmarks (`gfrnet_losses.landmark_crops`)."""

    def __init__(self, config: GfrnetDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.whole = PatchDiscriminator(config)
        self.local = PatchDiscriminator(config)
