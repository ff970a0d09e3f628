"""GuidedRestorer: a crop restored with photos of the same person as guides.

What comes out is drawn towards the guide. It is for the human eye: nothing that recognises takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from engines.card import CardError
from engines.engine import Engine, EngineError
from streamer.geometry import scale_transform, similarity, transform_points


@dataclass(frozen=True, slots=True)
class Guide:
    """A face crop of the person."""

    name: str
    """Of its file."""
    image: np.ndarray
    """(H, W, 3) uint8 BGR."""
    landmarks: np.ndarray
    """(5, 2) float32 in pixels of the image."""


@dataclass(frozen=True, slots=True)
class GuidedFace:
    """A restoration, and what the guide did to it; all of one size."""

    guide: Guide
    restored: np.ndarray
    """(S, S', 3) uint8 BGR, the longer side `result_size`."""
    warped: np.ndarray | None
    """The guide, brought into the crop's pose; None where the network does not tell."""
    mask: np.ndarray | None
    """(S, S') float32, 0..1: how far the network looked at the guide; None where it does not tell."""


class GuidedRestorer:
    """Restores one crop with one guide, or with several."""

    def __init__(self, engine: Engine) -> None:
        """Raises CardError for a network that takes no guide."""
        card = engine.card
        if card.task != "guided-restoration" or {spec.name for spec in card.inputs} != {"image", "guide"}:
            raise CardError(f"{card.name} is a network for {card.task}; --guide needs one for guided-restoration")
        if card.result_size is None:
            raise CardError(f"{card.name}: its card does not say the size of its result")
        self.engine, self.side = engine, card.result_size
        self._mean, self._std = (np.array(v, np.float32).reshape(3, 1, 1) for v in (card.mean, card.std))
        self._black, self._white = card.output_range or (0.0, 255.0)
        self._told = {spec.name for spec in card.outputs}

    def restore(self, crop: np.ndarray, landmarks: np.ndarray, guides: Sequence[Guide]) -> list[GuidedFace]:
        """Return the crop, HWC uint8 BGR, restored with each of the guides; `landmarks` (5, 2) are the face's, in
        pixels of the crop. Raises EngineError."""
        image = self._prepare(crop)
        scale = self.side / max(crop.shape[:2])
        height, width = (min(self.side, round(side * scale)) for side in crop.shape[:2])
        wanted = transform_points(scale_transform(np.eye(2, 3), scale), landmarks)
        faces = []
        for guide in guides:
            shown = self._laid(guide, wanted) if self.engine.card.guide_laid else guide.image
            out = self.engine.run(image=image, guide=self._prepare(shown))
            if not all(np.isfinite(out[name]).all() for name in self._told):
                raise EngineError(f"{self.engine.card.name} on {self.engine.backend} gave numbers that are no picture")
            pictures = {name: self._finish(out[name][0])[:height, :width] for name in self._told - {"mask"}}
            mask = out["mask"][0, 0, :height, :width].clip(0, 1) if "mask" in self._told else None
            faces.append(GuidedFace(guide, pictures["restored"], pictures.get("warped"), mask))
        return faces

    def _laid(self, guide: Guide, wanted: np.ndarray) -> np.ndarray:
        """Return the guide shifted, turned and scaled until its landmarks meet these of the result, (S, S, 3)."""
        transform = similarity(guide.landmarks, wanted)
        smaller = np.hypot(*transform[:, 0])
        image = guide.image
        if smaller < 1:  # first by area, so that nothing aliases
            size = [max(1, round(side * smaller)) for side in image.shape[1::-1]]
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            landmarks = transform_points(scale_transform(np.eye(2, 3), smaller), guide.landmarks)
            transform = similarity(landmarks, wanted)
        return cv2.warpAffine(
            image, transform, (self.side, self.side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )

    def _prepare(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 BGR to (1, 3, S, S) float32: enlarged by cubic, its shorter side reflected to a square."""
        scale = self.side / max(image.shape[:2])
        size = tuple(min(self.side, max(1, round(side * scale))) for side in (image.shape[1], image.shape[0]))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
        right, bottom = self.side - size[0], self.side - size[1]
        image = cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_REFLECT)
        if self.engine.card.color == "RGB":
            image = image[..., ::-1]
        return np.ascontiguousarray(((image.transpose(2, 0, 1).astype(np.float32) - self._mean) / self._std)[None])

    def _finish(self, out: np.ndarray) -> np.ndarray:
        pixels = (out - self._black) * (255 / (self._white - self._black))
        image = np.clip(np.rint(pixels), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        return np.ascontiguousarray(image[..., ::-1] if self.engine.card.color == "RGB" else image)


def best_by_pose(landmarks: np.ndarray, guides: Sequence[Guide]) -> Guide:
    """Return the guide whose landmarks lie most like the face's: by pose alone, never by who it looks like."""
    return min(guides, key=lambda guide: pose_distance(landmarks, guide.landmarks))


def pose_distance(some: np.ndarray, others: np.ndarray) -> float:
    """Return how far landmarks (5, 2) lie from others, once shifted, turned and scaled onto them, as the root mean
    square in parts of the distance between the others' eyes: what is left is pose and expression."""
    laid = transform_points(similarity(some, others), some)
    return float(np.sqrt(((laid - others) ** 2).sum(1).mean()) / np.linalg.norm(others[0] - others[1]))


def fused(faces: Sequence[GuidedFace]) -> np.ndarray:
    """Return the restorations of several guides as one: each pixel their mean, weighted by their masks."""
    weights = np.stack([np.ones(face.restored.shape[:2]) if face.mask is None else face.mask + 1e-3 for face in faces])
    pictures = np.stack([face.restored for face in faces]).astype(np.float32)
    mean = (weights[..., None] * pictures).sum(0) / weights.sum(0)[..., None]
    return np.asarray(np.rint(mean), np.uint8)


def parts_picture(crop: np.ndarray, face: GuidedFace) -> np.ndarray:
    """Return crop | guide | warped guide | mask | restored side by side, uint8 BGR; what the network does not tell is
    left out."""
    height, width = face.restored.shape[:2]
    columns = [cv2.resize(crop, (width, height), interpolation=cv2.INTER_NEAREST)]
    guide = face.guide.image
    scale = height / guide.shape[0]
    shown = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    columns.append(cv2.resize(guide, (max(1, round(guide.shape[1] * scale)), height), interpolation=shown))
    if face.warped is not None:
        columns.append(face.warped)
    if face.mask is not None:
        columns.append(cv2.cvtColor(np.rint(255 * face.mask).astype(np.uint8), cv2.COLOR_GRAY2BGR))
    return cv2.hconcat([*columns, face.restored])
