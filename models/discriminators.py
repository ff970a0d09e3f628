"""Discriminators, which judge whether a face is real while a restorer learns; none of them ships.

Here: SGEN's, in its two readings, and its adversarial losses in the form for logits. SISN has none: it learns from
pixels alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

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
