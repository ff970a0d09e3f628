"""What a step of training sees, and what validation judges by: clean faces, and what their protocol makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models import degradation
from models.dataset import Clean, FaceTensors
from models.degradation import SGEN_SIZES, Damage, Generators, Shares, stored
from models.losses import Judges

T = TypeVar("T")
Protocol = Literal["sgen", "sisn", "surveillance", "untouched"]

REAL: frozenset[Protocol] = frozenset({"surveillance", "untouched"})
"""What a product meets; the others are papers'."""

_MILD: dict[str, Any] = {"blur": 0.5, "noise": 10.0, "quality": 60}
_CODED: dict[str, Any] = {"noise": 6.0, "grey": True, "crf": 28}


@dataclass(frozen=True, slots=True)
class Diet:
    """What batches are made of."""

    protocols: dict[Protocol, float]
    """Share of each: SGEN's (÷4, six sizes, noise), SISN's (windows of ÷scale, no noise), what cameras give;
    untouched: the same faces, only shrunk."""
    scales: dict[int, float]
    """How often the surveillance faces are so many times smaller than the result."""
    sides: dict[int, float]
    """How often a surveillance result has so many pixels a side."""
    sigma: tuple[float, float] | None
    """Range of SGEN's noise in grey levels; None: 30 in half of the batches, else 0 to 50."""
    noise: Literal["gauss", "uniform"]
    """Kind of SGEN's noise (Table VII)."""
    patch: int
    """Side of SISN's windows at the low resolution."""
    vary: bool
    """Whether exposure, contrast and tint of the clean faces are varied."""
    damage: Shares
    """How often surveillance faces suffer from what."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Images are (n, 3, h, w) float32 RGB in [-1, 1]."""

    low: Tensor
    """What the network is given: enlarged to the result's size, or for a network that enlarges by itself as it is;
    reflected at the lower and right edge where the network wants multiples: `cut_back` takes that off its result."""
    clean: Tensor
    """What it should give."""
    landmarks: Tensor
    """(n, 5, 2) in pixels of `clean`; NaN where unknown."""
    protocol: Protocol

    def cut_back(self, images: Tensor) -> Tensor:
        """Return images of a result's size, or larger, at the size of `clean`."""
        return images[..., : self.clean.shape[2], : self.clean.shape[3]]

    @property
    def person(self) -> Tensor:
        """Whose likeness the result should keep: the clean face's; that of the crop itself where nothing harmed it."""
        return self.cut_back(self.low) if self.protocol == "untouched" else self.clean


class Batches:
    """Batch `step` is a function of seed, rank and step, whatever came before."""

    def __init__(
        self,
        faces: FaceTensors,
        diet: Diet,
        *,
        batch: int,
        seed: int,
        rank: int,
        scale: int | None,
        enlarge: Literal["nearest", "cubic"],
        multiple: int = 1,
    ) -> None:
        """`scale` is that of a network which enlarges by itself, else None: then `enlarge` says how it is done.

        Sides of what the network is given are multiples of `multiple`. Raises ValueError where the diet does not suit.
        """
        self.faces, self.diet, self.batch, self.scale, self.enlarge = faces, diet, batch, scale, enlarge
        self.seed, self.multiple = [seed, rank], multiple
        window = diet.patch * (scale or 4)
        if "sisn" in diet.protocols and window > faces.side:
            raise ValueError(f"patch: its windows of {window} px do not fit into the largest faces, of {faces.side} px")
        if scale and (odd := [side for side in diet.sides if side % scale]):
            raise ValueError(f"sides: {odd[0]} is no multiple of the network's scale, {scale}")

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([*self.seed, step])
        draws = degradation.generators(*self.seed, step, device=self.faces.device)
        protocol = _pick(rng, self.diet.protocols)
        make = {"sgen": self._sgen, "sisn": self._sisn}.get(protocol) or partial(self._surveillance, protocol)
        low, clean = make(rng, draws)
        return Batch(_centred(self._given(low, clean)), _centred(clean.images), clean.landmarks, protocol)

    def _sgen(self, rng: np.random.Generator, draws: Generators) -> tuple[Tensor, Clean]:
        size = SGEN_SIZES[int(rng.integers(len(SGEN_SIZES)))]
        clean = self._varied(rng, self.faces.portraits(rng, self.batch, size))
        if self.diet.sigma is None:
            sigma = 30.0 if rng.random() < 0.5 else float(rng.uniform(0, 50))
        else:
            sigma = float(rng.uniform(*self.diet.sigma))
        return degradation.sgen(clean.images, draws, sigma=sigma, kind=self.diet.noise, factor=self.scale or 4), clean

    def _sisn(self, rng: np.random.Generator, draws: Generators) -> tuple[Tensor, Clean]:
        scale = self.scale or 4
        clean = self._varied(rng, self.faces.patches(rng, self.batch, self.diet.patch * scale))
        return degradation.sisn(clean.images, scale=scale), clean

    def _surveillance(self, protocol: Protocol, rng: np.random.Generator, draws: Generators) -> tuple[Tensor, Clean]:
        factor = self.scale or _pick(rng, self.diet.scales)
        clean = self._varied(rng, self.faces.crops(rng, self.batch, _pick(rng, self.diet.sides)))
        untouched = protocol == "untouched"
        damage = Damage.same(self.batch) if untouched else degradation.draw_damage(self.batch, draws, self.diet.damage)
        low = degradation.surveillance(clean.images, damage, draws, factor=factor)
        # a face in low light stays in it: a restorer mends what the camera did, not what it saw
        dark = stored(degradation.low_light(clean.images, damage.gain, damage.gamma))
        return low, Clean(dark, clean.landmarks)

    def _given(self, low: Tensor, clean: Clean) -> Tensor:
        height, width = clean.images.shape[2:]
        given = low if self.scale else stored(degradation.resize(low, (width, height), self.enlarge))
        bottom, right = (-side % self.multiple for side in given.shape[2:])
        return F.pad(given, (0, right, 0, bottom), mode="reflect")  # as FaceRestorer does

    def _varied(self, rng: np.random.Generator, clean: Clean) -> Clean:
        """Change exposure, contrast and tint a little; one in twenty becomes grey."""
        if not self.diet.vary:
            return clean
        n = len(clean.images)
        gain = rng.uniform(0.75, 1.15, (n, 1)) * rng.uniform(0.94, 1.06, (n, 3))
        grey = torch.from_numpy(rng.random(n) < 0.05).to(clean.images.device)[:, None, None, None]
        gain, shift = (torch.tensor(v, dtype=torch.float32, device=clean.images.device)
                       for v in (gain, rng.uniform(-12, 12, (n, 1))))  # fmt: skip
        images = clean.images * gain[:, :, None, None] + shift[:, :, None, None]
        images = torch.where(grey, images.mean(dim=1, keepdim=True).expand_as(images), images)
        return Clean(stored(images), clean.landmarks)


class Validation:
    """A fixed set of damaged faces for each protocol in use, whose gains choose the best weights."""

    def __init__(
        self,
        faces: FaceTensors,
        batches: Batches,
        judges: Judges,
        *,
        identity_weight: float,
        perceptual_weight: float,
        count: int = 24,
    ) -> None:
        self.likeness, self.perceptual = judges.likeness, judges.perceptual
        self.weights = {"identity": identity_weight, "lpips": -perceptual_weight}
        self.sets: dict[str, Batch] = {}
        rng, diet, scale = np.random.default_rng(1), batches.diet, batches.scale
        factors = [scale] if scale else sorted(diet.scales, reverse=True)

        def add(name: str, protocol: Protocol, clean: Clean, low: Tensor) -> None:
            given = _centred(batches._given(low, clean))
            self.sets[name] = Batch(given, _centred(clean.images), clean.landmarks, protocol)

        for number, protocol in enumerate(diet.protocols):
            draws = degradation.generators(1, 1, number, device=faces.device)
            if protocol == "sgen":
                sigma = 30.0 if diet.sigma is None else sum(diet.sigma) / 2
                for size in SGEN_SIZES[::2]:
                    clean = faces.portraits(rng, count, size, vary=False)
                    low = degradation.sgen(clean.images, draws, sigma=sigma, kind=diet.noise, factor=scale or 4)
                    add(f"sgen{size[1]}", protocol, clean, low)
            elif protocol == "sisn":
                side = min(256, faces.side)
                clean = faces.patches(rng, count, side, vary=False)
                add(f"sisn{side}", protocol, clean, degradation.sisn(clean.images, scale=scale or 4))
            else:
                for factor in factors:
                    side, how = (192, _CODED) if factor == 2 else (160, _MILD)
                    untouched = protocol == "untouched"
                    clean = faces.crops(rng, count, side, vary=False)
                    damage = Damage.same(count, **({} if untouched else how))
                    low = degradation.surveillance(clean.images, damage, draws, factor=factor)
                    add(f"{protocol}{factor}" if untouched else f"x{factor}", protocol, clean, low)

    @torch.inference_mode()
    def score(self, network: torch.nn.Module) -> tuple[dict[str, float], np.ndarray]:
        """Return the gain in dB over the input, enlarged by cubic, by set of faces that were harmed, and a picture of
        input, restored and truth.

        With a face embedder a set also has `NAME.identity`, its gain in cosine to the person (`Batch.person`); where
        LPIPS is trained for, sets of the product's kind have `NAME.lpips`, its change, less is better.
        """
        scores, rows = {}, []
        for name, batch in self.sets.items():
            restored = torch.cat([batch.cut_back(network(part)).float().clamp(-1, 1) for part in batch.low.split(8)])
            height, width = batch.clean.shape[2:]
            before = batch.cut_back(batch.low)
            if before.shape != batch.clean.shape:
                before = degradation.resize(before, (width, height), "cubic").clamp(-1, 1)
            if batch.protocol != "untouched":  # there the input may be the truth itself
                scores[name] = float((psnr(restored, batch.clean) - psnr(before, batch.clean)).mean())
            if self.likeness is not None and torch.isfinite(batch.landmarks).all():
                person = before if batch.protocol == "untouched" else batch.clean
                found = [self.likeness(images, person, batch.landmarks)[0].mean() for images in (restored, before)]
                scores[f"{name}.identity"] = float(found[0] - found[1])
            if self.perceptual is not None and batch.protocol in REAL:
                far = [self.perceptual(images, batch.clean).mean() for images in (restored, before)]
                scores[f"{name}.lpips"] = float(far[0] - far[1])
            rows.append(_row([before, restored, batch.clean]))
        return scores, np.concatenate(rows)

    def value(self, scores: dict[str, float]) -> float:
        """Return the one figure that chooses: the mean gain in dB, and the others by their weight in the loss."""

        def mean(kind: str) -> float:
            return float(np.mean([v for k, v in scores.items() if k.partition(".")[2] == kind] or 0.0))

        return mean("") + sum(weight * mean(kind) for kind, weight in self.weights.items())


def psnr(images: Tensor, truths: Tensor) -> Tensor:
    """Return the PSNR in dB of each image, (n,), both in [-1, 1] and brought to 8 bit."""
    error = (((images - truths) * 127.5).round() ** 2).mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error.clamp(min=1e-6))


def _pick(rng: np.random.Generator, shares: Mapping[T, float]) -> T:
    weights = np.array(list(shares.values()), float)
    return list(shares)[int(rng.choice(len(weights), p=weights / weights.sum()))]


def _centred(images: Tensor) -> Tensor:
    """0..255 to [-1, 1], channels last in memory."""
    return (images / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _row(columns: list[Tensor], shown: int = 3) -> np.ndarray:
    """Return (128, 1152, 3) uint8 RGB: the first faces, each as all columns side by side."""
    joined = torch.cat([torch.cat([images[i] for images in columns], dim=2) for i in range(shown)], dim=2)
    picture = ((joined + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return cv2.resize(picture, (1152, 128), interpolation=cv2.INTER_AREA)
