"""Training SCGAN, whose faces are no pairs: high-resolution ones on one side, low ones of other people on the other.

A step goes in the author code's order: both cycles, each discriminator by its own loss, then the branches by the sum of
their totals on the graph that is there already, so that the fakes are one step of the discriminators old. R_LS alone is
averaged, validated and shipped.

Before that a run may have two stages of our own, which are no part of the paper: R_LS alone by pairs, and R_LS by pairs
with H1, which judges it. They are many times cheaper than both cycles, and begin them with a restorer that restores.
"""

from __future__ import annotations

import math
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Literal

import cv2
import numpy as np
import torch
from pydantic import AfterValidator, Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from models import degradation
from models.batches import psnr
from models.dataset import IMAGE_SUFFIXES, Clean, FaceTensors, load_faces, load_names
from models.loop import (
    Learner,
    RunConfig,
    Task,
    TrainError,
    has_bf16,
    make_network,
    place,
    schedule,
    share_gradients,
)
from models.losses import FaceLikeness, Judges, Perceptual
from models.mine import judging
from models.scgan import (
    Cycles,
    ForwardCycle,
    ScganBranches,
    ScganFaces,
    ScganLosses,
    Share,
    discriminator_losses,
    frozen,
    generator_totals,
    make_discriminators,
)
from models.settings import RelativePath

_MOST_SHRUNK = 1.25  # a real low face that is shrunk by more has lost its damage
_MOST_ENLARGED = 1.1
_LEAST_CUT = 64  # px: FaceTensors keeps no levels from which smaller faces could be cut without aliasing
_SETS: dict[str, dict[str, Any]] = {
    "moderate": {},
    "paper": {"blur": (0.5, 8.0), "noise": (1.0, 25.0), "quality": (30, 95)},
}
_VALUES = {"": 0.2, "identity": 10.0, "lpips": -10.0}
_COUNT = 24


def _no_judge(source: Path) -> Path:
    if part := judging(source):
        raise ValueError(f"{part} is kept to judge restorers by, so nothing may learn from it")
    return source


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= ends[0] <= ends[1]:
        raise ValueError(f"from {ends[0]:g} to {ends[1]:g} is no range")
    return ends


Range = Annotated[tuple[float, float], AfterValidator(_rising)]
Quality = Annotated[int, Field(ge=1, le=100)]


class ScganRunConfig(RunConfig):
    """One run of SCGAN's training. `data` are the high faces, and those that are degraded for the low side."""

    measure: ClassVar[frozenset[str]] = RunConfig.measure | {"sides", "likeness", "perceptual"}

    network: Literal["scgan"] = "scgan"
    """What is trained: R_LS, with its degraders and discriminators."""
    low: list[Annotated[RelativePath, AfterValidator(_no_judge)]] = Field([])
    """Real low faces at their native size, framed at 1.6 times the box, as models.mine cuts them: folders, tars, or a
    folder of a tar (`faces.tar/street`). None of the clips that restorers are judged by."""
    sides: dict[PositiveInt, Annotated[float, Field(gt=0)]] = Field({64: 1.0}, min_length=1)
    """How often a batch's high faces have so many pixels a side, multiples of 16; the low ones have a quarter."""
    degraded_share: float = Field(0.5, ge=0, le=1)
    """The part of the low side that are other people's high faces, degraded; the rest is real."""
    blur: Range = (0.5, 2.5)
    """Range of the degraded faces' sigma in pixels, for a high face of 64 px; it grows with the side."""
    noise: Range = (1.0, 15.0)
    """Range of the degraded faces' sigma in grey levels."""
    quality: Annotated[tuple[Quality, Quality], AfterValidator(_rising)] = (40, 95)
    """Range of the degraded faces' JPEG quality."""

    warm_share: float = Field(0.0, ge=0, le=1)
    """The first part of the run, in which R_LS learns alone, by pairs: from high faces degraded by the ranges above
    back to the same faces, by the cycle loss (L1) and the embedder's. No degraders, no discriminators, no real low
    faces. The paper has no such stage; a step of it costs a tenth of one by both cycles."""
    paired_share: float = Field(0.0, ge=0, le=1)
    """The part of the run after that, in which H1 learns too, and judges the faces that R_LS restores from such pairs.
    The paper has no such stage either. What is left of the run is the paper's: both cycles."""

    share: Share = "none"
    """What D_HL and D_SL have in common: none (SCGAN), all (-fc), body (-SA), encoder (-SE), decoder (-SD) or middle
    (-SM)."""
    cycles: Cycles = "both"
    """Which cycles there are: both, forward (w/o-D_SL) or backward (w/o-D_HL)."""
    losses: ScganLosses = ScganLosses()
    """Weights and switches of all loss terms."""
    discriminator_width: int = Field(128, gt=0)
    """Channels of each discriminator's first blocks."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak of R_LS's. The author code's cosine (down from 1e-4 to 1e-5 in 10 epochs and up again in the next 10) is not
    followed: all rates warm up, hold and fall once, as in every run here."""
    degrader_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of D_HL and D_SL."""
    discriminator_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of the discriminators."""

    likeness: RelativePath | None = None
    """The face embedder (face-reidentification-retail-0095 as ONNX) that sees the forward cycle's restored face, whose
    truth is known; nothing is known of the backward cycle's. It validates too."""
    identity_weight: float = Field(0.1, ge=0)
    """Of 1 − cosine to the high face's embedding, in R_LS's total."""
    feature_weight: float = Field(0.05, ge=0)
    """Of the distance between the embedder's features of restored and high face, in R_LS's total."""
    matching_weight: float = Field(0.0, ge=0)
    """Of the distance between H1's features of restored and high face (feature matching), in R_LS's total, wherever H1
    learns. The paper has none."""
    likeness_batch: int = Field(4, gt=0)
    """So many faces of a batch are seen by the embedder."""
    perceptual: RelativePath | None = None
    """LPIPS as ONNX, to validate by, never to learn from. It wants sides of 64 px and more."""

    @model_validator(mode="after")
    def _stages(self) -> ScganRunConfig:
        if self.warm_share + self.paired_share > 1:
            raise ValueError(f"warm_share {self.warm_share:g}, paired_share {self.paired_share:g}: more than the run")
        losses, by_pairs = self.losses, self.warm_share + self.paired_share > 0
        if by_pairs and not (losses.cycle and losses.beta * losses.theta):
            raise ValueError("warm_share, paired_share: pairs are learned from by the cycle loss, whose weight is 0")
        if self.paired_share and not (losses.h1 and self.cycles != "backward"):
            raise ValueError("paired_share: there is no H1 to judge the pairs")
        if by_pairs and self.minutes:
            raise ValueError("minutes: a run's pace is measured on both cycles; with pairs before them give steps")
        return self


def make_branches(config: ScganRunConfig) -> ScganBranches:
    """Return the run's untrained R_LS, D_HL and D_SL. Raises TrainError where they cannot be."""
    described = make_network(config).config
    for side in config.sides:
        if side % 16:
            raise TrainError(f"sides: {side} is no multiple of 16")
        if described.noise == "fc" and side != described.side:
            raise TrainError(f"sides: {side}, but with noise fc this network degrades faces of {described.side} px")
    try:
        return ScganBranches(described, share=config.share, cycles=config.cycles)
    except ValueError as exc:
        raise TrainError(str(exc)) from None


class ScganTraining(Task):
    """R_LS learns together with D_HL and D_SL (`degraders`) and the discriminators L1, H1, L2 and H2."""

    def __init__(self, config: ScganRunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.branches = make_branches(config).to(device, memory_format=torch.channels_last)
        self.discriminators = make_discriminators(
            config.losses,
            cycles=config.cycles,
            low_side=min(config.sides) // 4,
            width=config.discriminator_width,
        ).to(device, memory_format=torch.channels_last)

        self.network = self.branches.r_ls
        self.optimizer = _adam(self.network, config.learning_rate)
        # one Adam for both: they may share layers
        degraders = nn.ModuleDict({name: net for name, net in self.branches.named_children() if name != "r_ls"})
        self.degraders = Learner(degraders, _adam(degraders, config.degrader_rate))
        self.judging = {
            name: Learner(judge, _adam(judge, config.discriminator_rate)) for name, judge in self.discriminators.items()
        }
        self.others = {"degraders": self.degraders, **self.judging}

    def load(self, rank: int) -> int:
        config = self.config
        with place("likeness"):
            likeness = FaceLikeness(config.likeness).to(self.device) if config.likeness else None
        with place("perceptual"):
            perceptual = Perceptual(config.perceptual).to(self.device) if config.perceptual else None
        self.judges = Judges(likeness, perceptual)
        with place("low"):
            lows = [side // 4 for side in config.sides] if config.degraded_share < 1 else []
            real = RealFaces([image for source in config.low for image in load_low(source)], lows, self.device)
        sides = _two_sides(config, self.device)
        self.batches = ScganBatches(sides, real, config, rank, self.branches.noise)
        self.pairs = ScganPairBatches(sides, config, rank)
        with place(f"validation: {config.validation}"):
            best = {face.identity: face for face in reversed(load_faces(config.validation))}  # the first is the best
            kept = FaceTensors(list(best.values()), self.device)
        self.validation = ScganValidation(kept, real, sorted(config.sides), self.judges)
        return sum(map(len, sides))

    def learn(self, network: nn.Module, step: int, config: RunConfig) -> dict[str, float]:
        """Not through `network`: R_LS may see two batches before its step, and processes share its gradients below."""
        self._set_rates(schedule(step, config))
        part, warm = step / config.steps, self.config.warm_share
        if part < warm + self.config.paired_share:
            return self._by_pairs(self.pairs[step], judged=part >= warm)
        return self._by_cycles(self.batches[step])

    def _by_pairs(self, pairs: ScganPairs, *, judged: bool) -> dict[str, float]:
        """Let R_LS restore faces whose truth is known, in the place of the forward cycle; H1 judges if `judged`."""
        with self._bf16():
            cycle = ForwardCycle(pairs.low, self.network(pairs.low))
        losses = replace(self.config.losses, l1=False, h1=judged)
        parts = self._step(ScganFaces(pairs.high, pairs.low, cycle, None), pairs.landmarks, losses, degraders=False)
        del parts["D_HL"]  # what the fixed damage has in the place of a loss
        return parts

    def _by_cycles(self, batch: ScganBatch) -> dict[str, float]:
        losses = self.config.losses
        with self._bf16():
            faces = self.branches(batch.high, batch.low, batch.z, detach=losses.detach_cycles)
        return self._step(faces, batch.landmarks, losses, degraders=True)

    def _step(self, faces: ScganFaces, landmarks: Tensor, losses: ScganLosses, *, degraders: bool) -> dict[str, float]:
        """Step the discriminators, then R_LS, and the degraders where they take part; return what they minimised."""
        with self._bf16():
            judged = discriminator_losses(faces, self.discriminators, losses)
        parts = {name: self.judging[name].step(loss) for name, loss in judged.items()}
        with self._bf16():
            totals = generator_totals(
                faces,
                self.discriminators,
                losses,
                identity=lambda faces: self._identity(faces, landmarks, parts) + self._matching(faces, losses, parts),
            )
        learners = [(self.network, self.optimizer)]
        if degraders:
            learners.append((self.degraders.network, self.degraders.optimizer))
        for _, optimizer in learners:
            optimizer.zero_grad(set_to_none=True)
        torch.stack([*totals.values()]).sum().backward()
        for each, optimizer in learners:
            share_gradients(each)
            nn.utils.clip_grad_norm_(each.parameters(), self.config.clip)
            optimizer.step()
        return parts | {name: float(total.detach()) for name, total in totals.items()}

    def score(self, network: nn.Module) -> tuple[dict[str, float], np.ndarray]:
        return self.validation.score(network)

    def value(self, scores: dict[str, float]) -> float:
        """Return 0.2 × the mean gain in dB + 10 × that in identity − 10 × the change of LPIPS.

        A GAN draws detail that is not the truth's pixel by pixel, so its dB fall while its faces become better: what
        decides is how like a face, and like the person, the result is, and dB only where those two are even. Without
        both judges dB alone chooses, which is a poor choice.
        """
        return sum(weight * _mean_of(scores, kind) for kind, weight in _VALUES.items())

    def outdated(self, changes: set[str]) -> set[str]:
        built = {f"network.{name}" for name in ("base", "skip", "spectral_norm", "noise", "side")}
        degraders = {"degraders"} if changes & (built | {"share", "cycles"}) else set()
        judges = set(self.judging) if changes & {"discriminator_width", "sides"} else set()
        return degraders | judges

    def _set_rates(self, part: float) -> None:
        """Give the others their part of their peak; the loop does so for R_LS."""
        rates = {"degraders": self.config.degrader_rate}
        for name, learner in self.others.items():
            for group in learner.optimizer.param_groups:
                group["lr"] = rates.get(name, self.config.discriminator_rate) * part

    def _bf16(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=has_bf16(self.device))

    def _matching(self, faces: ScganFaces, losses: ScganLosses, parts: dict[str, float]) -> Tensor:
        """Return the weighted distance of H1's features of the forward cycle's faces, in parts of the high face's mean
        absolute feature; tell it in `parts`."""
        zero, weight = faces.high.new_zeros(()), self.config.matching_weight
        if not (weight and losses.h1 and faces.forward):
            return zero
        judge = self.discriminators["H1"]
        with torch.no_grad():
            truth = _features(judge, faces.high)
        with frozen(judge):
            found = _features(judge, faces.forward.recovered)
        distances = [(a - b).abs().mean() / b.abs().mean() for a, b in zip(found, truth, strict=True)]
        distance = torch.stack(distances).mean()
        parts["matching"] = float(distance.detach())
        return weight * distance

    def _identity(self, faces: ScganFaces, landmarks: Tensor, parts: dict[str, float]) -> Tensor:
        """Return the weighted identity loss of the forward cycle; tell the cosine in `parts`."""
        config, likeness = self.config, self.judges.likeness
        zero = faces.high.new_zeros(())
        if likeness is None or faces.forward is None or not config.identity_weight + config.feature_weight:
            return zero
        known = torch.isfinite(landmarks).flatten(1).all(dim=1).nonzero().flatten()[: config.likeness_batch]
        if not len(known):
            return zero
        with torch.autocast(self.device.type, enabled=False):
            restored = faces.forward.recovered[known].float()
            cosine, distance = likeness(restored, faces.high[known], landmarks[known])
        parts["cosine"] = float(cosine.detach().mean())
        share = len(known) / len(faces.high)
        return share * (config.identity_weight * (1 - cosine).mean() + config.feature_weight * distance.mean())


def _features(judge: nn.Module, image: Tensor) -> list[Tensor]:
    """Return what each block of a discriminator gives."""
    features = [image]
    for block in judge.blocks:  # type: ignore[union-attr]
        features.append(block(features[-1]))
    return features[1:]


# The two sides


@dataclass(frozen=True, slots=True)
class ScganPairs:
    """Images are (n, 3, height, width) float32 RGB in [-1, 1]."""

    high: Tensor
    """Real high faces (n, 3, H, W)."""
    landmarks: Tensor
    """(n, 5, 2) in pixels of `high`; NaN where unknown."""
    low: Tensor
    """The same faces degraded (n, 3, H / 4, W / 4)."""


@dataclass(frozen=True, slots=True)
class ScganBatch(ScganPairs):
    """High faces with low ones that are not theirs."""

    low: Tensor
    """Low faces of other people (n, 3, H / 4, W / 4): first the real ones, then those that were degraded."""
    z: Tensor
    """What D_HL and D_SL draw from, as `ScganBranches.noise` gives it."""


class ScganBatches:
    """Batch `step` is a function of seed, rank and step, whatever came before.

    High faces come from one half of the people and degraded ones from the other; which from which is drawn each time.
    """

    def __init__(
        self,
        sides: tuple[FaceTensors, FaceTensors],
        real: RealFaces,
        config: ScganRunConfig,
        rank: int,
        noise: Callable[[Tensor, torch.Generator], Tensor],
    ) -> None:
        self.sides, self.real, self.config, self.rank, self.noise = sides, real, config, rank, noise

    def __getitem__(self, step: int) -> ScganBatch:
        config = self.config
        rng, draws, side = _drawing(config, self.rank, step, self.sides[0].device)
        here = int(rng.integers(2))
        clean = high_faces(self.sides[here], rng, config.batch, side)
        degraded = int(config.degraded_share * config.batch + rng.random())  # a half of odd batches in the mean too
        low = [self.real.crops(rng, config.batch - degraded, side // 4)] if degraded < config.batch else []
        if degraded:
            low.append(_degraded(high_faces(self.sides[1 - here], rng, degraded, side), draws, config))
        high = _centred(clean.images)
        return ScganBatch(high, clean.landmarks, _centred(torch.cat(low)), self.noise(high, draws.noise))


class ScganPairBatches:
    """Batch `step` of pairs is a function of seed, rank and step, too: of either half of the people."""

    def __init__(self, sides: tuple[FaceTensors, FaceTensors], config: ScganRunConfig, rank: int) -> None:
        self.sides, self.config, self.rank = sides, config, rank

    def __getitem__(self, step: int) -> ScganPairs:
        rng, draws, side = _drawing(self.config, self.rank, step, self.sides[0].device)
        clean = high_faces(self.sides[int(rng.integers(2))], rng, self.config.batch, side)
        low = _degraded(clean, draws, self.config)
        return ScganPairs(_centred(clean.images), clean.landmarks, _centred(low))


def _drawing(
    config: ScganRunConfig, rank: int, step: int, device: torch.device
) -> tuple[np.random.Generator, degradation.Generators, int]:
    """Return the generators of a batch, and the side of its high faces."""
    key = (config.seed, rank, step)
    rng, shares = np.random.default_rng(key), np.array(list(config.sides.values()))
    side = list(config.sides)[int(rng.choice(len(shares), p=shares / shares.sum()))]
    return rng, degradation.generators(*key, device=device), side


def _degraded(clean: Clean, draws: degradation.Generators, config: ScganRunConfig) -> Tensor:
    """Return the faces (n, 3, H / 4, W / 4) in 0..255, degraded as the run says."""
    return degradation.scgan(clean.images, draws, blur=config.blur, noise=config.noise, quality=config.quality)


class RealFaces:
    """Real low faces at their native size, drawn for a side from those that need be shrunk by 1.25 at most, and
    enlarged by 1.1 at most."""

    def __init__(self, images: Sequence[np.ndarray], sides: Sequence[int], device: torch.device) -> None:
        """`images` are (h, w, 3) uint8 BGR, `sides` those that are asked for. Raises ValueError where a side has no
        face."""
        self.device = device
        self.serving = {side: [image for image in images if _serves(min(image.shape[:2]), side)] for side in sides}
        for side, fit in self.serving.items():
            if not fit:
                least, most = math.ceil(side / _MOST_ENLARGED), int(side * _MOST_SHRUNK)
                raise ValueError(
                    f"of {len(images)} real faces none has {least} to {most} px, for low faces of {side} px: "
                    "mine some (models.mine), or set degraded_share to 1"
                )

    def crops(self, rng: np.random.Generator, n: int, side: int) -> Tensor:
        """Return n faces (n, 3, side, side), RGB of 0..255, float32: each cut at random inside its margin, mirrored."""
        fit = self.serving[side]
        crops = [_cut(rng, fit[row], side) for row in rng.integers(len(fit), size=n)]
        images = np.ascontiguousarray(np.stack(crops)[..., ::-1].transpose(0, 3, 1, 2))
        return torch.from_numpy(images).to(self.device).float()


def high_faces(faces: FaceTensors, rng: np.random.Generator, n: int, side: int, *, vary: bool = True) -> Clean:
    """Return faces of `side` px as `FaceTensors.crops` does; small ones are cut larger and shrunk by area."""
    times = max(1, _LEAST_CUT // side)
    clean = faces.crops(rng, n, side * times, vary=vary)
    if times == 1:
        return clean
    images = degradation.stored(degradation.resize(clean.images, (side, side), "area"))
    return Clean(images, (clean.landmarks + 0.5) / times - 0.5)


def load_low(source: Path) -> list[np.ndarray]:
    """Load the pictures, (h, w, 3) uint8 BGR, of a folder with its folders, a tar, or a folder of a tar.

    Raises FileNotFoundError, or ValueError for what is no picture or may judge restorers only.
    """
    images = []
    for name, content in archive_contents(source):
        if part := judging(PurePath(name)):
            raise ValueError(
                f"{source} holds {part}, which is kept to judge restorers by: name the folders in it that are not, "
                f"such as {source.name}/street"
            )
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise ValueError(f"{source}: {name} is no picture")
        images.append(image)
    if not images:
        raise ValueError(f"{source} holds no pictures")
    return images


def archive_contents(source: Path) -> Iterator[tuple[str, bytes]]:
    if source.is_dir():
        for path in sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES):
            yield str(path.relative_to(source)), path.read_bytes()
        return
    archive, folder = (source.parent, f"{source.name}/") if source.parent.is_file() else (source, "")
    if not archive.exists():
        raise FileNotFoundError(f"{source} does not exist")
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                wanted = member.name.startswith(folder) and PurePath(member.name).suffix.lower() in IMAGE_SUFFIXES
                if wanted and (file := tar.extractfile(member)):
                    yield member.name, file.read()
    except tarfile.TarError:
        raise ValueError(f"{archive} is no tar, or not a whole one") from None


def _two_sides(config: ScganRunConfig, device: torch.device) -> tuple[FaceTensors, FaceTensors]:
    """Load the high faces, half of the people each. Raises TrainError."""
    with place("exclude"):
        excluded = load_names(config.exclude) if config.exclude else frozenset()
    with place(f"data: {', '.join(map(str, config.data))}"):
        faces = [face for source in config.data for face in load_faces(source, exclude=excluded)]
        first = set(sorted({face.identity for face in faces})[::2])
        halves = [[face for face in faces if (face.identity in first) == half] for half in (True, False)]
        if not all(halves):
            raise ValueError(f"{len(first)} person: the faces of one side are other people's than those of the other")
        return FaceTensors(halves[0], device), FaceTensors(halves[1], device)


def _serves(native: int, side: int) -> bool:
    return side <= native * _MOST_ENLARGED and native <= side * _MOST_SHRUNK


def _cut(rng: np.random.Generator, image: np.ndarray, side: int) -> np.ndarray:
    """Return (side, side, 3): a square of the image, anywhere in it, of no less than `side` px where it has them."""
    height, width = image.shape[:2]
    least = min(height, width)
    window = int(rng.integers(min(side, least), least + 1))
    y, x = int(rng.integers(height - window + 1)), int(rng.integers(width - window + 1))
    cut = image[y : y + window, x : x + window]
    if rng.random() < 0.5:
        cut = cut[:, ::-1]
    if window == side:
        return cut
    return cv2.resize(cut, (side, side), interpolation=cv2.INTER_AREA if window > side else cv2.INTER_CUBIC)


# Validation


class ScganValidation:
    """Fixed pairs of each side, whose low face is degraded moderately or as the paper's test set, and real faces."""

    def __init__(self, faces: FaceTensors, real: RealFaces, sides: Sequence[int], judges: Judges) -> None:
        self.judges = judges
        self.sets: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        """Low faces, truths, and the truths' landmarks."""
        self.real = [_centred(real.crops(np.random.default_rng(1), 3, side)) for side in sorted(real.serving)]
        count = min(_COUNT, len(faces.groups[0]))
        for side in sides:
            clean = high_faces(faces, np.random.default_rng(1), count, side, vary=False)
            for name, ranges in _SETS.items():
                low = degradation.scgan(clean.images, degradation.generators(1, side, device=faces.device), **ranges)
                self.sets[f"{name}{side}"] = (_centred(low), _centred(clean.images), clean.landmarks)

    @torch.inference_mode()
    def score(self, network: nn.Module) -> tuple[dict[str, float], np.ndarray]:
        """Return the gain in dB over the cubic enlargement by set, and a picture: low, restored and truth of each set,
        then low, enlarged and restored of real faces.

        With a face embedder a set also has `NAME.identity`, its gain in cosine to the truth; with LPIPS `NAME.lpips`,
        its change, less is better.
        """
        scores, rows = {}, []
        for name, (low, truth, landmarks) in self.sets.items():
            restored, before = _restored(network, low), _enlarged(low)
            scores[name] = float((psnr(restored, truth) - psnr(before, truth)).mean())
            if self.judges.likeness is not None and torch.isfinite(landmarks).all():
                found = [self.judges.likeness(images, truth, landmarks)[0].mean() for images in (restored, before)]
                scores[f"{name}.identity"] = float(found[0] - found[1])
            if self.judges.perceptual is not None:
                far = [self.judges.perceptual(images, truth).mean() for images in (restored, before)]
                scores[f"{name}.lpips"] = float(far[0] - far[1])
            rows.append(_row([_pixels(low), restored, truth]))
        rows += [_row([_pixels(low), _enlarged(low), _restored(network, low)]) for low in self.real]
        return scores, np.concatenate(rows)


def _restored(network: nn.Module, low: Tensor) -> Tensor:
    return torch.cat([network(part) for part in low.split(8)]).float().clamp(-1, 1)


def _enlarged(low: Tensor) -> Tensor:
    return degradation.resize(low, (4 * low.shape[3], 4 * low.shape[2]), "cubic").clamp(-1, 1)


def _pixels(low: Tensor) -> Tensor:
    """Return the low faces at 4 times their size, every pixel to be seen."""
    return F.interpolate(low, scale_factor=4.0, mode="nearest")


def _row(columns: Sequence[Tensor], shown: int = 3) -> np.ndarray:
    """Return (128, 1152, 3) uint8 RGB: the first faces, each as all columns side by side; fewer leave grey."""
    picture = np.full((128, 128 * shown * len(columns), 3), 128, np.uint8)
    for index in range(min(shown, len(columns[0]))):
        joined = torch.cat([images[index] for images in columns], dim=2)
        face = ((joined + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        width = 128 * len(columns)
        picture[:, index * width : (index + 1) * width] = cv2.resize(face, (width, 128), interpolation=cv2.INTER_AREA)
    return picture


def _mean_of(scores: dict[str, float], kind: str) -> float:
    values = [value for name, value in scores.items() if name.partition(".")[2] == kind]
    return float(np.mean(values)) if values else 0.0


def _centred(images: Tensor) -> Tensor:
    """0..255 to [-1, 1], channels last in memory."""
    return (images / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _adam(network: nn.Module, rate: float) -> torch.optim.Adam:
    """The author code's; PyTorch's defaults are beta 0.9 and 0.999."""
    return torch.optim.Adam(network.parameters(), lr=rate)
