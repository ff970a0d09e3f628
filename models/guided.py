"""What a step of guided training sees, and what its validation judges by: a face, what damage made of it, a guide.

Images of a batch are (n, 3, side, side) float32 RGB in [-1, 1], channels last in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from models import degradation
from models.batches import psnr
from models.dataset import Clean, Face, FaceTensors, cut_out, mirrored, similarities
from models.degradation import Damage, Generators, Shares, stored
from models.gfrnet import Gfrnet, Guided
from models.gfrnet_losses import POINTS, GuidedBatch, landmark_loss
from models.losses import FaceLikeness, Judges, Perceptual

SCALES = (4, 8)
"""How many times as small the faces of the validation once were."""

_ONE_PERSON = {"c_07320": "c_07312", "c_07393": "c_07392"}  # CelebA has two people under two numbers each
_FACTOR = 4  # of surveillance faces
_TOGETHER = 8  # so many faces of the validation go through a network at a time
_VALUES = {"": 1.0, "identity": 10.0, "lpips": -8.0}  # what blind restorers weigh a dB, a cosine and LPIPS by
_SHOWN = 128  # px a face in the picture


class GuidedFaces(FaceTensors):
    """Faces of people who have several: soft ones stay too, as any pair of one person's faces is one to learn from."""

    SIDES = (256, 200, 144, 112)

    def __init__(self, faces: Sequence[Face], device: torch.device) -> None:
        """A name that comes twice is kept once. Raises ValueError where no person has two faces."""
        super().__init__(list({face.name: face for face in faces}.values()), device)
        self.names = [name for name, _ in self.faces]
        self.identities = [identity for _, identity in self.faces]
        self.persons = np.array([_ONE_PERSON.get(identity, identity) for identity in self.identities])
        self.pairs = ordered_pairs(self.identities)
        """(p, 2): rows of a face to be restored and of its guide."""
        if not len(self.pairs):
            raise ValueError(f"none of {len(self)} faces has a second of the same identity, so there is no guide")

    def strangers(self, rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        """Return for each row one of another person."""
        return np.array([rng.choice(np.flatnonzero(self.persons != self.persons[row])) for row in rows])


def ordered_pairs(identities: Sequence[str]) -> np.ndarray:
    """Return (p, 2): all places of two different members of one identity, in both orders."""
    members: dict[str, list[int]] = {}
    for place, identity in enumerate(identities):
        members.setdefault(identity, []).append(place)
    pairs = [(query, guide) for own in members.values() for query in own for guide in own if query != guide]
    return np.array(pairs, np.int64).reshape(-1, 2)


def listed_pairs(path: Path, faces: GuidedFaces, part: str) -> np.ndarray:
    """Return the pairs (p, 2) of a list such as guided_val.txt, one `QUERY REFERENCE` a line, inside the set `part`.

    Raises OSError, or ValueError with the line.
    """
    rows = {name: row for row, name in enumerate(faces.names)}
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        names = [f"{part}/{name}" for name in line.split()]
        if len(names) != 2:
            raise ValueError(f"{path}: line {number} is no pair `QUERY REFERENCE`")
        if unknown := [name for name in names if name not in rows]:
            raise ValueError(f"{path}: line {number}: {unknown[0]} is none of the faces")
        pairs.append([rows[name] for name in names])
    if not pairs:
        raise ValueError(f"{path} lists no pair")
    return np.array(pairs, np.int64)


def first_pairs(faces: GuidedFaces) -> np.ndarray:
    """Return pairs (p, 2) in which the first face of each identity, by name, guides all others of it."""
    first: dict[str, int] = {}
    for row in np.argsort(faces.names):
        first.setdefault(faces.identities[row], int(row))
    return np.array([(query, guide) for query, guide in faces.pairs if first[faces.identities[query]] == guide])


@dataclass(frozen=True, slots=True)
class GuidedDiet:
    """What batches are made of."""

    side: int
    """Of all images, in pixels; a multiple of 4."""
    surveillance_share: float
    """Batches of what cameras give at 1/4, enlarged by cubic; the others are GFRNet's own protocol."""
    stranger_share: float
    """Faces whose guide is of another person, so that the network learns to leave it out."""
    occluded_share: float
    """Faces whose guide is covered in part."""
    vary: bool
    """Whether exposure, contrast and tint are varied, of face and guide each on its own."""
    damage: Shares
    """How often surveillance faces suffer from what."""
    laid: bool = False
    """Whether guides are laid onto their faces by landmarks, as the network wants them (`GfrnetConfig.laid`)."""
    astray: float = 0.03
    """How far off the face's landmarks are then, as a detector's on a degraded face would be: a standard deviation, in
    parts of the distance between the eyes."""


class GuidedBatches:
    """Batch `step` is a function of seed, rank and step, whatever came before."""

    def __init__(self, faces: GuidedFaces, diet: GuidedDiet, *, batch: int, seed: int, rank: int) -> None:
        """Raises ValueError where the diet does not suit the faces."""
        if diet.stranger_share and len(set(faces.persons)) < 2:
            raise ValueError("stranger_share: all faces are of one person")
        self.faces, self.diet, self.batch, self.seed = faces, diet, batch, [seed, rank]

    def __getitem__(self, step: int) -> GuidedBatch:
        rng = np.random.default_rng([*self.seed, step])
        draws = degradation.generators(*self.seed, step, device=self.faces.device)
        n = self.batch
        # Both are framed, turned and shifted on their own, but mirrored alike: a mirrored face is another one.
        both = self.faces.crops_of(rng, self.rows(rng).T.reshape(-1), self.diet.side)
        both = mirrored(both, torch.from_numpy(np.tile(rng.random(n) < 0.5, 2)))
        images = _varied(rng, both.images) if self.diet.vary else both.images
        degraded, clean = self._damaged(rng, draws, images[:n])
        guide = Clean(covered(rng, images[n:], self.diet.occluded_share), both.landmarks[n:])
        if self.diet.laid:
            guide = laid_onto(_astray(rng, both.landmarks[:n], self.diet.astray), guide)
        return GuidedBatch(
            _centred(degraded), _centred(guide.images), _centred(clean), both.landmarks[:n], guide.landmarks
        )

    def rows(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the rows of a batch's faces and guides: (n, 2)."""
        drawn = self.faces.pairs[rng.integers(len(self.faces.pairs), size=self.batch)]
        strange = np.flatnonzero(rng.random(self.batch) < self.diet.stranger_share)
        drawn[strange, 1] = self.faces.strangers(rng, drawn[strange, 0])
        return drawn

    def _damaged(self, rng: np.random.Generator, draws: Generators, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Return the faces as the network gets them, and as it should give them back."""
        if rng.random() >= self.diet.surveillance_share:
            kernel: Literal["cubic", "pillow"] = "cubic" if rng.random() < 0.5 else "pillow"  # the paper does not say
            return degradation.gfrnet(clean, draws, kernel=kernel), clean
        damage = degradation.draw_damage(len(clean), draws, self.diet.damage)
        # a face in low light stays in it: a restorer mends what the camera did, not what it saw
        return _filmed(clean, damage, draws), stored(degradation.low_light(clean, damage.gain, damage.gamma))


def covered(rng: np.random.Generator, images: Tensor, share: float) -> Tensor:
    """Return the images, 0..255, in a share of which an ellipse or a box of one colour covers a part of the face."""
    n, side = len(images), images.shape[3]
    chosen = rng.random(n) < share
    centre, reach = rng.uniform(0.25, 0.75, (n, 2)), rng.uniform(0.12, 0.35, (n, 2))
    power, colour = np.where(rng.random(n) < 0.5, 2, 16), rng.integers(256, size=(n, 3))
    if not chosen.any():
        return images
    along = (np.arange(side) + 0.5) / side
    x, y = (np.abs(along - centre[:, i : i + 1]) / reach[:, i : i + 1] for i in (0, 1))  # (n, side) each
    inside = (x ** power[:, None])[:, None, :] + (y ** power[:, None])[:, :, None] < 1
    hidden = torch.from_numpy(inside & chosen[:, None, None]).to(images.device)[:, None]
    filling = torch.tensor(colour, dtype=images.dtype, device=images.device)[:, :, None, None]
    return torch.where(hidden, filling, images)


def laid_onto(landmarks: Tensor, guide: Clean) -> Clean:
    """Return guides, in grey levels, shifted, turned and scaled so that their landmarks meet these, (n, 5, 2), by least
    squares; a guide stays as it is where either is not known."""
    known = torch.isfinite(landmarks).flatten(1).all(dim=1) & torch.isfinite(guide.landmarks).flatten(1).all(dim=1)
    images, own = guide.images.clone(), guide.landmarks.clone()
    if known.any():
        back = similarities(landmarks[known], own[known])
        images[known] = cut_out(images[known], back, images.shape[3], "bilinear").round()
        turned = torch.linalg.inv(back[..., :2])
        own[known] = (own[known] - back[:, None, :, 2]) @ turned.mT
    return Clean(images, own)


def _astray(rng: np.random.Generator, landmarks: Tensor, share: float) -> Tensor:
    eyes = (landmarks[:, :1] - landmarks[:, 1:2]).norm(dim=2, keepdim=True)
    off = torch.from_numpy(rng.normal(0, share, landmarks.shape)).to(landmarks)
    return landmarks + off * eyes


class GuidedValidation:
    """Fixed pairs, damaged by GFRNet's protocol at the two scales of its tables, whose gains choose the best weights.

    A stranger's guide is that of the next pair of another person.
    """

    def __init__(
        self,
        faces: GuidedFaces,
        pairs: np.ndarray,
        judges: Judges,
        *,
        side: int,
        stranger: bool = False,
        laid: bool = False,
    ) -> None:
        """With `stranger` every face is restored by a stranger's guide (the paper's R); with `laid` guides are laid
        onto the faces. Raises ValueError where all faces are of one person."""
        self.judges = judges
        rng = np.random.default_rng(1)
        strange = pairs[next_person(faces.persons[pairs[:, 0]]), 1]
        shown = [faces.crops_of(rng, rows, side, vary=False) for rows in (pairs[:, 0], pairs[:, 1], strange)]
        if laid:
            shown[1:] = [laid_onto(shown[0].landmarks, each) for each in shown[1:]]
        truth, guide, self.stranger = (Clean(_centred(clean.images), clean.landmarks) for clean in shown)
        guide = self.stranger if stranger else guide
        self.sets: dict[str, GuidedBatch] = {}
        for scale in SCALES:
            draws = degradation.generators(1, 1, scale, device=faces.device)
            degraded = _centred(degradation.gfrnet(shown[0].images, draws, scale=scale))
            self.sets[f"x{scale}"] = GuidedBatch(degraded, guide.images, truth.images, truth.landmarks, guide.landmarks)

    @torch.inference_mode()
    def score(self, network: Gfrnet) -> tuple[dict[str, float], np.ndarray]:
        """Return scores by scale, and a picture: degraded, guide, warped, mask, restored, truth.

        `x4`: gain in dB over the input; `x4.guide`: in dB over the same network with a stranger's guide; `x4.warp`: how
        far off the flow is at the landmarks, in pixels. With a face embedder also `x4.identity`: gain in cosine to the
        truth; `x4.pull`: how much nearer the face restored by a stranger's guide is to that stranger than the input,
        in cosine, less is better. With LPIPS `x4.lpips`: its change, less is better.
        """
        scores, rows = {}, []
        for name, batch in self.sets.items():
            own = _through(network, batch.degraded, batch.guide)
            gained = psnr(own.restored, batch.clean)
            scores[name] = float((gained - psnr(batch.degraded, batch.clean)).mean())
            seen = [(own, batch.guide, range(3))]
            strange = None
            if network.config.guide:
                strange = _through(network, batch.degraded, self.stranger.images)
                scores[f"{name}.guide"] = float((gained - psnr(strange.restored, batch.clean)).mean())
                seen.append((strange, self.stranger.images, range(1)))
            if own.flow is not None and torch.isfinite(batch.landmarks).any():
                lost = landmark_loss(own.flow, batch.landmarks, batch.guide_landmarks) / POINTS
                scores[f"{name}.warp"] = float(lost.sqrt()) * (batch.clean.shape[3] - 1) / 2
            scores |= {f"{name}.{kind}": value for kind, value in self._judged(batch, own, strange).items()}
            rows += [_row(batch, parts, guide, i) for parts, guide, shown in seen for i in shown if i < len(gained)]
        return scores, np.concatenate(rows)

    def value(self, scores: dict[str, float]) -> float:
        """Return the one figure that chooses: the mean gain in dB, and what was gained in identity and LPIPS."""

        def mean(kind: str) -> float:
            return float(np.mean([v for k, v in scores.items() if k.partition(".")[2] == kind] or 0.0))

        return sum(weight * mean(kind) for kind, weight in _VALUES.items())

    def _judged(self, batch: GuidedBatch, own: Guided, strange: Guided | None) -> dict[str, float]:
        found = {}
        likeness, perceptual = self.judges.likeness, self.judges.perceptual
        if likeness is not None and torch.isfinite(batch.landmarks).all():
            seen = {
                name: _embedded(likeness, images, batch.landmarks)
                for name, images in {"before": batch.degraded, "own": own.restored, "truth": batch.clean}.items()
            }
            found["identity"] = _nearer(seen["own"], seen["before"], seen["truth"])
            if strange is not None and torch.isfinite(self.stranger.landmarks).all():
                guide = _embedded(likeness, self.stranger.images, self.stranger.landmarks)
                drawn = _embedded(likeness, strange.restored, batch.landmarks)
                found["pull"] = _nearer(drawn, seen["before"], guide)
        if perceptual is not None:
            far = [_distance(perceptual, images, batch.clean) for images in (own.restored, batch.degraded)]
            found["lpips"] = far[0] - far[1]
        return found


def _filmed(clean: Tensor, damage: Damage, draws: Generators) -> Tensor:
    low = degradation.surveillance(clean, damage, draws, factor=_FACTOR)
    return stored(degradation.resize(low, (clean.shape[3], clean.shape[2]), "cubic"))


def _varied(rng: np.random.Generator, images: Tensor) -> Tensor:
    """Change exposure, contrast and tint of each image a little; one in twenty becomes grey."""
    n = len(images)
    gain = rng.uniform(0.75, 1.15, (n, 1)) * rng.uniform(0.94, 1.06, (n, 3))
    grey = torch.from_numpy(rng.random(n) < 0.05).to(images.device)[:, None, None, None]
    gain, shift = (
        torch.tensor(each, dtype=torch.float32, device=images.device)[:, :, None, None]
        for each in (gain, rng.uniform(-12, 12, (n, 1)))
    )
    images = images * gain + shift
    return stored(torch.where(grey, images.mean(dim=1, keepdim=True), images))


def next_person(persons: np.ndarray) -> np.ndarray:
    """Return for each place the nearest later one, round the end, that has another person."""
    if len(set(persons)) < 2:
        raise ValueError("all faces are of one person: what a stranger's guide does cannot be seen")
    n = len(persons)
    return np.array([next(j % n for j in range(i + 1, i + n) if persons[j % n] != persons[i]) for i in range(n)])


def _through(network: Gfrnet, degraded: Tensor, guide: Tensor) -> Guided:
    """Run the network on all faces; the restored ones are clipped."""
    parts = [network.parts(*part) for part in zip(degraded.split(_TOGETHER), guide.split(_TOGETHER), strict=True)]

    def joined(pieces: list[Tensor | None]) -> Tensor | None:
        present = [piece.float() for piece in pieces if piece is not None]
        return torch.cat(present) if present else None

    return Guided(
        torch.cat([part.restored.float() for part in parts]).clamp(-1, 1),
        *(joined([getattr(part, name) for part in parts]) for name in ("warped", "flow", "mask")),
    )


def _embedded(likeness: FaceLikeness, images: Tensor, landmarks: Tensor) -> Tensor:
    """Return what the embedder makes of faces aligned by these landmarks: (n, d)."""
    aligned = cut_out(images, likeness.placed(landmarks), likeness.side, "bilinear")
    bgr = ((aligned.flip(1) + 1) * 127.5).clamp(0, 255)
    return torch.cat([likeness.embedder(part)[0].flatten(1) for part in bgr.split(_TOGETHER)])


def _distance(perceptual: Perceptual, images: Tensor, truths: Tensor) -> float:
    parts = zip(images.split(_TOGETHER), truths.split(_TOGETHER), strict=True)
    return float(torch.cat([perceptual(*part) for part in parts]).mean())


def _nearer(after: Tensor, before: Tensor, wanted: Tensor) -> float:
    """Return how much nearer to the embeddings wanted those after are than those before: mean difference in cosine."""
    cosine = nn.functional.cosine_similarity
    return float((cosine(after, wanted) - cosine(before, wanted)).mean())


def _centred(images: Tensor) -> Tensor:
    return (images / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _row(batch: GuidedBatch, parts: Guided, guide: Tensor, i: int) -> np.ndarray:
    """Return (128, 768, 3) uint8 RGB: one face and all that became of it; what the network does not have is black."""
    black = torch.full_like(batch.clean[i], -1.0)
    warped = black if parts.warped is None else parts.warped[i]
    mask = black if parts.mask is None else (2 * parts.mask[i] - 1).expand_as(black)
    columns = [batch.degraded[i], guide[i], warped, mask, parts.restored[i], batch.clean[i]]
    picture = ((torch.cat(columns, dim=2) + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    return cv2.resize(picture, (len(columns) * _SHOWN, _SHOWN), interpolation=cv2.INTER_AREA)
