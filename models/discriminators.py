"""Discriminators, which judge whether a face is real while a restorer learns; none of them ships.

Here: SGEN's, in its two readings, and its adversarial losses in the form for logits; SCGAN's, and the hinge losses.
SISN has none: it learns from pixels alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

Reading = Literal["code", "journal"]


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """−(E[log D(t)] + E[log(1 − D(G(s)))]) of the logits (n,) of real and restored faces: what D minimises.

    The negative of the journal's l_GAN. `fake` comes from restored faces that were detached from G.
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """−E[log D(G(s))] of the logits (n,) of restored faces: what G minimises, beside the pixel loss.

    l_GAN has E[log(1 − D(G(s)))] here; this non-saturating form is the author code's, and still pulls where D is sure.
    The author code adds 0.1 of it to the mean squared error of images in [-1, 1].
    """
    return F.softplus(-fake).mean()


@dataclass(frozen=True)
class SgenDiscriminatorConfig:
    """What SGEN's discriminator is made of."""

    reading: Reading = "code"
    """code: the author code's, 1,560,129 parameters. journal: the text's, in our sizes, 4,307,073."""
    width: int = 64
    """Channels after the first convolution; each of the three that follow doubles them."""
    channels: int = 3
    """3 for RGB, 1 for the author code's grey."""


class SgenDiscriminator(nn.Module):
    """Images (n, channels, H, W) float in [-1, 1], H and W of 4 at least, to logits (n,): above 0 is real.

    D(t) of the paper is the sigmoid of a logit. In training the reading `code` judges by the batch, which it
    normalises: real and restored faces go through one after the other, as in the author code.
    """

    def __init__(self, config: SgenDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        width = [config.channels, *(config.width * 2**k for k in range(4))]
        layer = _code_layer if config.reading == "code" else _journal_layer
        self.layers = nn.Sequential(*(layer(width[k], width[k + 1], first=k == 0) for k in range(4)))
        self.judge = nn.Linear(width[-1], 1)
        self.apply(_initialise)

    def forward(self, image: Tensor) -> Tensor:
        pooled = self.layers(image).mean(dim=(2, 3))
        logits: Tensor = self.judge(pooled).squeeze(1)
        return logits


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """E[max(0, 1 − D(real))] + E[max(0, 1 + D(fake))] of the logits (n,): what SCGAN's discriminators minimise.

    The negative of SCGAN's eq. 3, 9, 10 and 13. `fake` comes from faces that were detached from their generator.
    """
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """−E[D(fake)] of the logits (n,): what SCGAN's generators minimise, as the author code has it."""
    return -fake.float().mean()


@dataclass(frozen=True)
class ScganDiscriminatorConfig:
    """What one of SCGAN's discriminators is made of."""

    downs: int = 4
    """How many of the six blocks, the last ones, halve the size: 4 for D_H at 64 px, 15,456,641 parameters; 2 for D_L
    at 16 px, 15,390,849. For larger faces more, so that 4x4 remain."""
    width: int = 128
    """Channels of the first two blocks; twice as many in the next two, and again in the last."""

    def __post_init__(self) -> None:
        if not 0 <= self.downs <= 6:
            raise ValueError(f"downs {self.downs}: SCGAN's discriminators have six blocks")
        if self.width < 1:
            raise ValueError(f"width {self.width}: SCGAN's discriminators want one channel at least")


class ScganDiscriminator(nn.Module):
    """Images (n, 3, H, W) float in [-1, 1], H and W of 2**downs at least, to logits (n,): above 0 is real.

    All layers have spectral normalisation, with one power iteration for each forward pass in training. The linear
    layers see 4x4 features: what other sizes leave is averaged to that.
    """

    def __init__(self, config: ScganDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        width = [3, *(config.width * factor for factor in (1, 1, 2, 2, 4, 4))]
        self.blocks = nn.Sequential(
            *(SpectralBlock(width[k], width[k + 1], down=k >= 6 - config.downs) for k in range(6))
        )
        self.squeeze = spectral_norm(nn.Linear(16 * width[-1], width[-1]))
        self.judge = spectral_norm(nn.Linear(width[-1], 1))

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(image)
        if x.shape[2:] != (4, 4):
            x = F.adaptive_avg_pool2d(x, 4)
        logits: Tensor = self.judge(F.relu(self.squeeze(x.flatten(1)))).squeeze(1)
        return logits


class SpectralBlock(nn.Module):
    """ReLU, 3x3, ReLU, 3x3, and its skip. `down`: of each 2x2 the greatest goes into the second 3x3 and the skip."""

    def __init__(self, channels_in: int, channels_out: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.first = spectral_norm(nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False))
        self.second = spectral_norm(nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False))
        bent = down or channels_in != channels_out
        self.skip = spectral_norm(nn.Conv2d(channels_in, channels_out, 1)) if bent else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.first(F.relu(x)))
        if self.down:
            inner, x = F.max_pool2d(inner, 2), F.max_pool2d(x, 2)
        out: Tensor = self.second(inner) + self.skip(x)
        return out


def _code_layer(channels_in: int, channels_out: int, *, first: bool) -> nn.Module:
    if first:
        convolution: nn.Module = nn.Conv2d(channels_in, channels_out, 7, padding=3, padding_mode="reflect", bias=False)
    else:
        convolution = nn.Conv2d(channels_in, channels_out, 3, 2, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


def _journal_layer(channels_in: int, channels_out: int, *, first: bool) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 5, 2, 2), nn.LeakyReLU(0.2))


def _initialise(module: nn.Module) -> None:
    """The author code's; biases and the judge keep PyTorch's."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)
