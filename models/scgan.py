"""SCGAN, the Semi-Cycled GAN (Hou et al., IEEE TIP 2023): a real face enlarged 4 times, learnt without pairs.

Two cycles share one restorer. Forward: D_HL degrades a real high face, R_LS restores it. Backward: R_LS restores a real
low face, D_SL degrades it again. R_LS alone ships. All images are (n, 3, height, width) float RGB in [-1, 1]. The
author code's are BGR: that matters only to its own weights, whose input and output must be flipped.

A training step, discriminators first; one Adam for all discriminators and one for all branches is the same as the
author code's seven:

    faces = branches(high, low, branches.noise(high), detach=losses.detach_cycles)
    judged = discriminator_losses(faces, discriminators, losses)
    if judged:
        sum(judged.values()).backward()
        ...step and clear the discriminators
    totals = generator_totals(faces, discriminators, losses)
    sum(totals.values()).backward()
    ...step and clear the branches
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from models.discriminators import (
    ScganDiscriminator,
    ScganDiscriminatorConfig,
    hinge_discriminator_loss,
    hinge_generator_loss,
)

Skip = Literal["plain", "rectified"]
Tail = Literal["author", "paper"]
Noise = Literal["fc", "direct"]
Share = Literal["none", "all", "body", "encoder", "decoder", "middle"]
"""What D_HL and D_SL have in common: nothing (SCGAN), all (-fc, fully cycled), all but their first and last layers
(-SA), the encoder (-SE), the decoder (-SD), or the decoder and the last two levels of the encoder (-SM)."""
Cycles = Literal["both", "forward", "backward"]
"""Which cycles there are: forward is the paper's w/o-D_SL, backward its w/o-D_HL."""

_NOISE = 64  # numbers in z, with noise fc


def _check_choices(**choices: tuple[str, object]) -> None:
    for name, (value, known) in choices.items():
        if value not in get_args(known):
            raise ValueError(f"{name} {value!r} is unknown; known: {', '.join(get_args(known))}")


@dataclass(frozen=True)
class ScganConfig:
    """What makes one SCGAN differ from another. The defaults are the author code's: R_LS has 15,463,939 parameters,
    D_HL and D_SL 12,291,896 each."""

    width: int = 256
    """Channels of R_LS at the low size; half as many at twice that size, 3/8 at the end."""
    blocks: int = 12
    """Residual blocks of R_LS at the low size."""
    late: int = 3
    """Residual blocks of R_LS at twice the low size."""
    base: int = 32
    """Channels where D_HL and D_SL are narrowest; the levels of their encoder have 3, 4, 8 and 16 times as many."""
    skip: Skip = "rectified"
    """What goes round a residual block and round R_LS's groups of them: plain, the feature; rectified, its ReLU, as an
    in-place ReLU in the author code has it."""
    spectral_norm: bool = False
    """Spectral normalisation of every branch's first convolution and blocks: the paper's, not the author code's."""
    norm: bool = True
    """Batch normalisation after each enlargement in R_LS, as in the author code."""
    align_corners: bool = True
    """Whether enlargement maps corner pixels onto each other, as in the author code, or whole images, as all else in
    this project does."""
    noise: Noise = "fc"
    """z of D_HL and D_SL: fc, 64 numbers made a map by a linear layer, as in the author code. direct: the map itself,
    as in the paper, for faces of any size."""
    side: int = 64
    """With noise fc: height and width of the high faces."""
    tail: Tail = "author"
    """How R_LS ends, at the full size: author, three convolutions; paper, a third group of two blocks and one
    convolution (15,728,227 parameters)."""
    residual: bool = False
    """Ours: R_LS predicts the difference to the cubic enlargement (then without tanh)."""

    scale: ClassVar[int] = 4
    """How many times larger the result is."""
    multiple: ClassVar[int] = 1
    """Height and width of R_LS's input are multiples of this."""

    def __post_init__(self) -> None:
        for name, step in (("width", 8), ("blocks", 1), ("late", 1), ("base", 4), ("side", 16)):
            value = getattr(self, name)
            if value < 1 or value % step:
                raise ValueError(f"{name} {value}: SCGAN wants a positive multiple of {step}")
        _check_choices(skip=(self.skip, Skip), noise=(self.noise, Noise), tail=(self.tail, Tail))


PRESETS: dict[str, ScganConfig] = {
    "paper": ScganConfig(),
    "default": ScganConfig(
        width=192, blocks=11, skip="plain", norm=False, align_corners=False, noise="direct", residual=True
    ),
    "small": ScganConfig(
        width=64, blocks=8, base=16, skip="plain", norm=False, align_corners=False, noise="direct", residual=True
    ),
}  # fmt: skip


class Restoration(nn.Module):
    """R_LS. Input: (n, 3, h, w) float in [-1, 1], any h and w. Output: (n, 3, 4 h, 4 w), about the same range."""

    def __init__(self, config: ScganConfig) -> None:
        super().__init__()
        self.config = config
        width, half, end = config.width, config.width // 2, config.width * 3 // 8
        self.head = _conv(3, width, config)
        self.trunk = Group(width, width, config.blocks, config)
        self.first_rise = Rise(width, config)
        self.middle = Group(width, half, config.late, config)
        self.second_rise = Rise(half, config)
        last = nn.Conv2d(end, 3, 1)
        if config.tail == "author":
            first = nn.Conv2d(half, end, 3, padding=1, bias=False)
            self.tail = nn.Sequential(first, nn.ReLU(), nn.Conv2d(end, end, 1), nn.ReLU(), last)
        else:
            self.tail = nn.Sequential(Group(half, end, 2, config), last)
        if config.residual:
            self.apply(_begin)
            nn.init.zeros_(last.weight)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first_rise(self.trunk(self.head(image)))
        out = self.tail(self.second_rise(self.middle(x)))
        return out + self.enlarged(image) if self.config.residual else torch.tanh(out)

    def enlarged(self, image: Tensor) -> Tensor:
        """Return the image's cubic enlargement, 4 times as large."""
        factor = float(self.config.scale)
        return F.interpolate(image, scale_factor=factor, mode="bicubic", align_corners=self.config.align_corners)


class Degradation(nn.Module):
    """D_HL and D_SL. Input: a high face (n, 3, H, W) float in [-1, 1], H and W multiples of 16, and z ~ N(0, 1):
    (n, 64) with noise fc, (n, 1, H, W) with noise direct. Output: (n, 3, H / 4, W / 4) in [-1, 1].

    Raises ValueError for a face of another size.
    """

    def __init__(self, config: ScganConfig) -> None:
        super().__init__()
        self.config = config
        base = config.base
        levels = (3 * base, 3 * base, 4 * base, 8 * base, 16 * base)
        self.noise = nn.Linear(_NOISE, config.side**2) if config.noise == "fc" else None
        self.head = _conv(4, levels[0], config)
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(
                    ResidualBlock(levels[k], levels[k + 1], config, down=True),
                    ResidualBlock(levels[k + 1], levels[k + 1], config),
                )
                for k in range(4)
            )
        )
        self.decoder = nn.Sequential(
            *(
                nn.Sequential(nn.PixelShuffle(2), *(ResidualBlock(width, width, config) for _ in range(2)))
                for width in (4 * base, base)
            )
        )
        self.out = nn.Sequential(
            nn.Conv2d(base, base // 4, 3, padding=1, bias=False), nn.ReLU(),
            nn.Conv2d(base // 4, 3, 3, padding=1, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, image: Tensor, z: Tensor) -> Tensor:
        size, side = image.shape[2:], self.config.side
        if size[0] % 16 or size[1] % 16:
            raise ValueError(f"a face of {size[1]}x{size[0]}: SCGAN degrades faces whose sides are multiples of 16")
        if self.noise is not None:
            if tuple(size) != (side, side):
                raise ValueError(f"a face of {size[1]}x{size[0]}: its noise was built for {side}x{side}")
            z = self.noise(z).view(-1, 1, side, side)
        low: Tensor = self.out(self.decoder(self.encoder(self.head(torch.cat([image, z], dim=1)))))
        return low


class Group(nn.Module):
    """Residual blocks in a row, and a skip round them all."""

    def __init__(self, channels_in: int, channels_out: int, count: int, config: ScganConfig) -> None:
        super().__init__()
        self.rectified = config.skip == "rectified"
        widths = (channels_in, *[channels_out] * count)
        self.blocks = nn.Sequential(*(ResidualBlock(widths[k], widths[k + 1], config) for k in range(count)))
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x) + self.skip(F.relu(x) if self.rectified else x)
        return out


class ResidualBlock(nn.Module):
    """ReLU, 3x3, ReLU, 3x3, and its skip; no normalisation. With `down` the size is halved before the second 3x3."""

    def __init__(self, channels_in: int, channels_out: int, config: ScganConfig, *, down: bool = False) -> None:
        super().__init__()
        self.rectified, self.down = config.skip == "rectified", down
        self.first = _conv(channels_in, channels_out, config)
        self.second = _conv(channels_out, channels_out, config)
        bent = down or channels_in != channels_out
        self.skip = _normed(nn.Conv2d(channels_in, channels_out, 1), config) if bent else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        lit = F.relu(x)
        inner = F.relu(self.first(lit))
        kept = lit if self.rectified else x
        if self.down:
            inner, kept = F.avg_pool2d(inner, 2), F.avg_pool2d(kept, 2)
        out: Tensor = self.second(inner) + self.skip(kept)
        return out


class Rise(nn.Module):
    """Twice the size, linearly; batch normalisation, ReLU, 1x1 (the author code's deconvolution of one pixel)."""

    def __init__(self, channels: int, config: ScganConfig) -> None:
        super().__init__()
        self.align_corners = config.align_corners
        self.norm = nn.BatchNorm2d(channels) if config.norm else nn.Identity()
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=self.align_corners)
        out: Tensor = self.mix(F.relu(self.norm(x)))
        return out


@dataclass(frozen=True, slots=True)
class ForwardCycle:
    """What became of the real high faces."""

    degraded: Tensor
    """I_sL, by D_HL."""
    recovered: Tensor
    """I_sS, by R_LS from `degraded`."""


@dataclass(frozen=True, slots=True)
class BackwardCycle:
    """What became of the real low faces."""

    restored: Tensor
    """I_rS, by R_LS."""
    returned: Tensor
    """Î_rL, by D_SL from `restored`."""
    enlarged: Tensor
    """The low faces enlarged cubically, which the pixel loss compares `restored` with."""


@dataclass(frozen=True, slots=True)
class ScganFaces:
    """A batch on its way through the cycles."""

    high: Tensor
    """Real high faces I_rH (n, 3, H, W)."""
    low: Tensor
    """Real low faces I_rL (n, 3, H / 4, W / 4), of other people."""
    forward: ForwardCycle | None
    """None where there is no D_HL."""
    backward: BackwardCycle | None
    """None where there is no D_SL."""


class ScganBranches(nn.Module):
    """The branches that are trained together: R_LS, D_HL and D_SL.

    Of w/o-D_SL and w/o-D_HL the one that is left out is None. Raises ValueError where there is nothing to share.
    """

    def __init__(self, config: ScganConfig, *, share: Share = "none", cycles: Cycles = "both") -> None:
        super().__init__()
        _check_choices(share=(share, Share), cycles=(cycles, Cycles))
        if share != "none" and cycles != "both":
            raise ValueError(f"share {share}: with the {cycles} cycle alone there is no second branch to share with")
        self.config = config
        self.r_ls = Restoration(config)
        self.d_hl = Degradation(config) if cycles != "backward" else None
        self.d_sl = Degradation(config) if cycles != "forward" else None
        if self.d_hl is not None and self.d_sl is not None:
            self.d_sl = _sharing(self.d_hl, self.d_sl, share)

    def noise(self, high: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw z ~ N(0, 1) for a batch of high faces; D_HL and D_SL are given the same."""
        n, _, rows, columns = high.shape
        shape = (n, _NOISE) if self.config.noise == "fc" else (n, 1, rows, columns)
        return torch.randn(shape, generator=generator, device=high.device)

    def forward(self, high: Tensor, low: Tensor, z: Tensor, *, detach: bool = True) -> ScganFaces:
        """Send real high faces (n, 3, H, W) and real low faces (n, 3, H / 4, W / 4) through their cycles.

        With `detach` no gradient flows from a cycle's second face to its first. Raises ValueError for other sizes.
        """
        scale = self.config.scale
        if high.shape != (*low.shape[:2], scale * low.shape[2], scale * low.shape[3]):
            sizes = f"high faces {tuple(high.shape)}, low faces {tuple(low.shape)}"
            raise ValueError(f"{sizes}: as many are wanted of both, the high ones {scale} times as large")
        forward = backward = None
        if self.d_hl is not None:
            degraded = self.d_hl(high, z)
            forward = ForwardCycle(degraded, self.r_ls(degraded.detach() if detach else degraded))
        if self.d_sl is not None:
            restored = self.r_ls(low)
            returned = self.d_sl(restored.detach() if detach else restored, z)
            backward = BackwardCycle(restored, returned, self.r_ls.enlarged(low))
        return ScganFaces(high, low, forward, backward)


@dataclass(frozen=True)
class ScganLosses:
    """What the branches are trained for. The defaults are the author code's; the paper prints alpha and beta the other
    way round, 1 and 0.05."""

    alpha: float = 0.05
    """Weight of the adversarial terms."""
    beta: float = 1.0
    """Weight of the pixel and cycle terms."""
    theta: float = 1.0
    """Weight of the forward cycle in R_LS's total."""
    gamma: float = 0.05
    """Weight of the backward cycle in R_LS's total; counts as 1 where there is no forward cycle."""
    l1: bool = True
    """D_L1, which tells D_HL's faces from real low ones."""
    h1: bool = True
    """D_H1, which tells faces that R_LS restored from D_HL's from real high ones."""
    l2: bool = True
    """D_L2, which tells D_SL's faces from real low ones."""
    h2: bool = True
    """D_H2, which tells faces that R_LS restored from real low ones from real high ones."""
    pixel: bool = True
    """Whether D_HL's face is compared with the high face shrunk, and the restored face with the low one enlarged."""
    cycle: bool = True
    """Whether the face at the end of a cycle is compared with that at its beginning."""
    detach_cycles: bool = True
    """Whether each branch learns from its own total alone, as in the author code; if not, R_LS's total trains D_HL
    too, and D_SL's trains R_LS."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "theta", "gamma"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: a weight is 0 or more")
        if not (self.adversarial or self.pixel or self.cycle):
            raise ValueError("l1, h1, l2, h2, pixel, cycle: all are false, so nothing would be learnt")

    @property
    def adversarial(self) -> tuple[str, ...]:
        """The discriminators that there are, of L1, H1, L2 and H2."""
        return tuple(name for name in ("L1", "H1", "L2", "H2") if getattr(self, name.lower()))


def make_discriminators(
    losses: ScganLosses, *, cycles: Cycles = "both", low_side: int = 16, width: int = 128
) -> nn.ModuleDict:
    """Return the discriminators that the losses and the cycles ask for, by their names: L1, H1, L2, H2.

    They halve the face until 4 to 7 px are left, six times at most: the specification's at low faces of 16 px.
    """
    _check_choices(cycles=(cycles, Cycles))
    if low_side < 4:
        raise ValueError(f"low_side {low_side}: SCGAN's discriminators want 4 px at least")
    left_out = {"both": (), "forward": ("L2", "H2"), "backward": ("L1", "H1")}[cycles]
    halvings = int(math.log2(low_side / 4))
    downs = {"L": min(halvings, 6), "H": min(halvings + 2, 6)}
    return nn.ModuleDict(
        {
            name: ScganDiscriminator(ScganDiscriminatorConfig(downs=downs[name[0]], width=width))
            for name in losses.adversarial
            if name not in left_out
        }
    )


def discriminator_losses(faces: ScganFaces, discriminators: nn.ModuleDict, losses: ScganLosses) -> dict[str, Tensor]:
    """Return what each discriminator minimises (eq. 3, 9, 10, 13), by its name; no gradient reaches a branch."""
    return {
        name: hinge_discriminator_loss(discriminators[name](real), discriminators[name](fake.detach()))
        for name, (real, fake) in _judged(faces, losses).items()
    }


def generator_totals(
    faces: ScganFaces,
    discriminators: nn.ModuleDict,
    losses: ScganLosses,
    *,
    identity: Callable[[ScganFaces], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return what each branch minimises (eq. 2, 6, 12), by its name, D_HL, R_LS and D_SL in this order; no gradient
    reaches a discriminator.

    Add them up for one backward pass: where the cycles are not detached, or branches share layers, none may be stepped
    before all gradients are there. `identity` is any further term of R_LS's total, weighted.
    """
    zero = faces.high.new_zeros(())
    adversarial = {"L1": zero, "H1": zero, "L2": zero, "H2": zero}
    for name, (_, fake) in _judged(faces, losses).items():
        with frozen(discriminators[name]):
            adversarial[name] = losses.alpha * hinge_generator_loss(discriminators[name](fake))
    pixel, cycle = losses.beta * losses.pixel, losses.beta * losses.cycle
    totals = {"R_LS": zero if identity is None else identity(faces)}
    if forward := faces.forward:
        totals["D_HL"] = adversarial["L1"] + pixel * F.l1_loss(forward.degraded, F.avg_pool2d(faces.high, 4))
        first = adversarial["H1"] + cycle * F.l1_loss(forward.recovered, faces.high)
        totals["R_LS"] = totals["R_LS"] + losses.theta * first
    if backward := faces.backward:
        second = adversarial["H2"] + pixel * F.l1_loss(backward.restored, backward.enlarged)
        totals["R_LS"] = totals["R_LS"] + (losses.gamma if forward else 1.0) * second
        totals["D_SL"] = adversarial["L2"] + cycle * F.l1_loss(backward.returned, faces.low)
    return {name: totals[name] for name in ("D_HL", "R_LS", "D_SL") if name in totals}


def _judged(faces: ScganFaces, losses: ScganLosses) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the real and the fake faces of each discriminator that there is."""
    pairs = {}
    if faces.forward:
        pairs |= {"L1": (faces.low, faces.forward.degraded), "H1": (faces.high, faces.forward.recovered)}
    if faces.backward:
        pairs |= {"L2": (faces.low, faces.backward.returned), "H2": (faces.high, faces.backward.restored)}
    return {name: pair for name, pair in pairs.items() if name in losses.adversarial}


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """In here no gradient reaches the network's weights."""
    learning = [p for p in network.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _sharing(first: Degradation, second: Degradation, share: Share) -> Degradation:
    """Return the second branch with what it shares in the place of its own."""
    if share == "all":
        return first
    if share in ("body", "encoder"):
        second.encoder = first.encoder
    if share == "middle":
        second.encoder[2], second.encoder[3] = first.encoder[2], first.encoder[3]
    if share in ("body", "decoder", "middle"):
        second.decoder = first.decoder
    return second


def _begin(module: nn.Module) -> None:
    """He's first weights, and blocks that add a tenth. PyTorch's own lose half of a signal in each convolution, so that
    what the last one has to learn from is next to nothing."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, ResidualBlock) and isinstance(module.second, nn.Conv2d):
        with torch.no_grad():
            module.second.weight.mul_(0.1)


def _conv(channels_in: int, channels_out: int, config: ScganConfig) -> nn.Module:
    return _normed(nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), config)


def _normed(convolution: nn.Module, config: ScganConfig) -> nn.Module:
    return spectral_norm(convolution) if config.spectral_norm else convolution
