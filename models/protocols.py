"""The papers' protocols for evaluation: which truths, how they are damaged, and what the papers report of it.

Nothing here comes from training (models.degradation): OpenCV and Pillow do the damage as the papers say, so that what
training does on tensors is judged by something else. Images are (H, W, 3) uint8 BGR, sizes (width, height).
"""

from __future__ import annotations

import csv
import tarfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from models.dataset import Face, load_faces

_CENTRE = 217 / 256  # width over height of SGEN's faces


@dataclass(frozen=True, slots=True)
class Pair:
    """What a restorer gets, and what it should give back."""

    low: np.ndarray
    """(h, w, 3) uint8 BGR."""
    truth: np.ndarray
    """(H, W, 3) uint8 BGR."""
    landmarks: np.ndarray
    """(5, 2) in pixels of the truth; NaN where unknown."""


@dataclass(frozen=True, slots=True)
class Noise:
    """Noise that SGEN's protocol adds to the small image, the same for no two pixels."""

    level: float
    """In grey levels: sigma of Gaussian noise, or the upper end of uniform noise, which begins at 0."""
    uniform: bool = False

    def __str__(self) -> str:
        return f"uniform 0 to {self.level:g}" if self.uniform else f"σ {self.level:g}"

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.uniform(0, self.level, shape) if self.uniform else rng.normal(0, self.level, shape)


SGEN_NOISE = Noise(30)

PAPER_SGEN_SSIM = (0.6989, 0.7161, 0.7327, 0.7501, 0.7576, 0.7686)
"""SGEN-MSE at its six sizes, on CelebA's 20,000 test faces: J Table II. Its PSNR (J Table I) is below, at sigma 30."""
PAPER_SGEN_PSNR = {
    Noise(20): (23.99, 24.60, 25.08, 25.58, 26.02, 26.45),
    SGEN_NOISE: (23.00, 23.60, 24.12, 24.61, 24.98, 25.39),
    Noise(40): (22.29, 22.83, 23.25, 23.67, 24.04, 24.39),
    Noise(50): (21.52, 22.04, 22.44, 22.82, 23.20, 23.52),
    Noise(30, uniform=True): (24.27, 25.01, 25.56, 26.18, 26.72, 27.27),
}
"""PSNR at the six sizes by noise, each of a network trained for that noise alone: J Table VII."""
PAPER_SISN = {
    4: {"bicubic": (29.82, 0.8459, 0.3361, 0.7549), "SISN": (32.83, 0.9011, 0.1664, 0.8674)},
    8: {"bicubic": (25.99, 0.7313, 0.5594, 0.5860), "SISN": (28.37, 0.7999, 0.3230, 0.7385)},
}
"""PSNR, SSIM, LPIPS and MPS by scale on 50 faces of FFHQ at 256x256: SISN's Table 3."""


def protocol_faces(truths: Path) -> list[Face]:
    """Return the truths of both protocols: size 256, detail >= 0.09, yaw <= 0.5, the first two of each identity."""
    with truths.with_suffix(".csv").open(newline="") as file:
        rows = {f"{truths.stem}/{row['file']}": row for row in csv.DictReader(file)}
    taken: dict[str, int] = {}
    faces = []
    for face in sorted(load_faces(truths), key=lambda face: face.name):
        row = rows[face.name]
        good = row["size"] == "256" and float(row["detail"]) >= 0.09 and float(row["yaw"]) <= 0.5
        if good and taken.get(face.identity, 0) < 2:
            taken[face.identity] = taken.get(face.identity, 0) + 1
            faces.append(face)
    return faces


def large_faces(photos: Path) -> list[Face]:
    """Return the photographs of 512 px whose row says `split` test; they have no box and here no landmarks.

    The file also shows people of training, who are left out. Raises KeyError or ValueError for a file that is missing
    or no image.
    """
    with photos.with_suffix(".csv").open(newline="") as table:
        names = sorted(row["file"] for row in csv.DictReader(table) if row["split"] == "test")
    unknown = np.full((5, 2), np.nan, np.float32)
    faces = []
    with tarfile.open(photos) as tar:
        for name in names:
            stored = tar.extractfile(name)
            image = cv2.imdecode(np.frombuffer(stored.read() if stored else b"\0", np.uint8), cv2.IMREAD_COLOR)
            if image is None:
                raise ValueError(f"{photos}: {name} is no image")
            box = (0.0, 0.0, float(image.shape[1]), float(image.shape[0]))
            faces.append(Face(f"{photos.stem}/{name}", name.split("/")[0], image, box, unknown))
    return faces


def sgen_size(z: int) -> tuple[int, int]:
    """Return the z-th size of J Figure 14; z 0 to 5 are those of the tables and of training."""
    return 96 + 16 * z, 128 + 16 * z


def sgen_pair(face: Face, size: tuple[int, int], seed: int, noise: Noise = SGEN_NOISE) -> Pair:
    """SGEN: the centre at 217 to 256 brought to `size` by area, a quarter of it by cubic, noise, clipped to 8 bit.

    Each `seed` and size has noise of its own. Raises ValueError where the face would have to be enlarged.
    """
    height = face.image.shape[0]
    width = round(_CENTRE * height)
    if size[0] > width or size[1] > height:
        raise ValueError(f"{face.name}: its centre of {width}x{height} is too small for a truth of {size}")
    left = (face.image.shape[1] - width) // 2
    truth = cv2.resize(face.image[:, left : left + width], size, interpolation=cv2.INTER_AREA)
    low = cv2.resize(truth, (size[0] // 4, size[1] // 4), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    low += noise.draw(np.random.default_rng([7, seed, size[0]]), low.shape)
    shrunk = np.array(size) / (width, height)
    landmarks = (face.landmarks - (left, 0) + 0.5) * shrunk - 0.5
    return Pair(np.clip(np.rint(low), 0, 255).astype(np.uint8), truth, landmarks)


def sisn_pair(face: Face, scale: int) -> Pair:
    """SISN: the face itself, and 1/scale of it by Pillow's bicubic, which is anti-aliased; no noise."""
    height, width = face.image.shape[:2]
    low = Image.fromarray(face.image).resize((width // scale, height // scale), Image.Resampling.BICUBIC)
    return Pair(np.asarray(low), face.image, face.landmarks)
