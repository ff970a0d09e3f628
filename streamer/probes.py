"""Faces of known people made into what cameras give: for `streamer calibrate` and for measuring recognition."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from datetime import UTC, datetime

import cv2
import numpy as np

from streamer.geometry import cut_crop
from streamer.quality import measure_quality
from streamer.types import Crop, Moment, Track


@dataclass(frozen=True, slots=True)
class Sample:
    """A photo of somebody known."""

    person: str
    name: str
    """Of the photo, unlike any other's."""
    image: np.ndarray
    """(H, W, 3) uint8 BGR."""
    box: np.ndarray
    """(4,) float32 in pixels of the image."""
    landmarks: np.ndarray
    """(5, 2) float32 in pixels of the image."""

    @property
    def height(self) -> float:
        """Of the face's box, in pixels."""
        return float(self.box[3] - self.box[1])


@dataclass(frozen=True, slots=True)
class Damage:
    """What a camera does to a face, in this order."""

    height: float
    """Of the face's box in pixels, to which the photo is reduced (by area); never enlarged."""
    blur: float = 0.0
    """Sigma of a Gaussian, in pixels of the reduced photo."""
    noise: float = 10.0
    """Sigma of Gaussian noise, in grey levels."""
    jpeg: int | None = 40
    """Quality; None: not compressed."""


def probe(sample: Sample, damage: Damage, seed: int = 0) -> Crop:
    """Return the crop that the product would cut of the face as a camera gives it: the same each time.

    The landmarks are the photo's own, reduced.
    """
    factor = min(1.0, damage.height / sample.height)
    height, width = sample.image.shape[:2]
    size = max(1, round(width * factor)), max(1, round(height * factor))
    ratio = np.array(size) / (width, height)  # not quite `factor`: sides are whole
    image = cv2.resize(sample.image, size, interpolation=cv2.INTER_AREA) if factor < 1 else sample.image
    if damage.blur:
        image = cv2.GaussianBlur(image, (0, 0), damage.blur, borderType=cv2.BORDER_REPLICATE)
    if damage.noise:
        rng = np.random.default_rng([seed, round(damage.height * 100), zlib.crc32(sample.name.encode())])
        noisy = image + rng.normal(0, damage.noise, image.shape)
        image = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    if damage.jpeg is not None:
        _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, damage.jpeg])
        image = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR_BGR))
    box = (((sample.box.reshape(2, 2) + 0.5) * ratio) - 0.5).astype(np.float32).ravel()
    landmarks = ((sample.landmarks + 0.5) * ratio - 0.5).astype(np.float32)
    track = Track(1, Moment("probe", 0, 0.0, datetime.fromtimestamp(0, UTC), "file"), box, landmarks, 1.0)
    crop, transform = cut_crop(image, box, landmarks)
    return Crop(track, crop, transform, measure_quality(image, box, landmarks))
