"""What cameras and papers do to a face: from a clean crop to the low-resolution one that a restorer gets.

Everything works on (H, W, 3) uint8 BGR images with OpenCV and a real H.264 encoder, and draws from the generator it is
given: the same seed gives the same damage.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
import cv2
import numpy as np

SGEN_SIZES = tuple((96 + 16 * z, 128 + 16 * z) for z in range(6))
"""The six (width, height) of SGEN's protocol."""

NoiseKind = Literal["gauss", "uniform"]


def sgen_degrade(
    clean: np.ndarray, rng: np.random.Generator, *, sigma: float = 30.0, kind: NoiseKind = "gauss", factor: int = 4
) -> np.ndarray:
    """Return the face as SGEN's protocol gives it: cubic to 1/factor (no anti-aliasing), noise, clipped to 8 bit.

    `sigma` is the standard deviation of Gaussian noise in grey levels; with kind "uniform" noise is drawn from
    0 to `sigma` (Table VII).
    """
    height, width = clean.shape[:2]
    low = cv2.resize(clean, (width // factor, height // factor), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    if kind == "gauss":
        low += rng.normal(0, sigma, low.shape)
    else:
        low += rng.uniform(0, sigma, low.shape)
    return np.clip(np.rint(low), 0, 255).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class CameraDamage:
    """What one batch of faces suffers from; drawn once a batch, as one camera would do it."""

    blur: float
    """Sigma of the defocus in pixels of the low-resolution crop."""
    motion: float
    """Length of the motion blur in pixels of the low-resolution crop."""
    motion_angle: float
    noise: float
    """Sigma in grey levels."""
    noise_grey: bool
    """The same noise in all three colours, as at low light after chroma denoising."""
    kernel: int
    """OpenCV's interpolation that shrinks the face."""
    jpeg: int | None
    h264: int | None
    """The CRF, or None."""


def draw_damage(rng: np.random.Generator) -> CameraDamage:
    """Draw what a surveillance camera does: noise from 0 up, half with blur before it, half with a codec after it."""
    blurred = rng.random() < 0.5
    moved = blurred and rng.random() < 0.3
    coded = rng.random() < 0.5
    by_h264 = coded and rng.random() < 0.5
    kernels = (cv2.INTER_AREA, cv2.INTER_CUBIC, cv2.INTER_LINEAR)
    return CameraDamage(
        blur=float(rng.uniform(0.2, 1.4)) if blurred and not moved else 0.0,
        motion=float(rng.uniform(1.5, 5.0)) if moved else 0.0,
        motion_angle=float(rng.uniform(0, 180)),
        noise=float(30 * rng.random() ** 1.5) if rng.random() < 0.85 else 0.0,
        noise_grey=bool(rng.random() < 0.3),
        kernel=kernels[int(rng.integers(len(kernels)))],
        jpeg=int(rng.integers(30, 96)) if coded and not by_h264 else None,
        h264=int(rng.integers(18, 43)) if by_h264 else None,
    )


def camera_degrade(
    clean: Sequence[np.ndarray], rng: np.random.Generator, damage: CameraDamage, *, factor: int
) -> list[np.ndarray]:
    """Return the faces as a camera gives them, at 1/factor: blur, shrink, noise, codec, in this order.

    All faces have one size, a multiple of `factor`.
    """
    low = [_optics(face, damage, factor) for face in clean]
    if damage.noise > 0:
        low = [_noise(face, rng, damage) for face in low]
    if damage.jpeg is not None:
        return [jpeg(face, damage.jpeg) for face in low]
    if damage.h264 is not None:
        return h264(low, rng, crf=damage.h264)
    return low


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Return the image after JPEG compression at this quality, 1..100."""
    _, coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(coded, cv2.IMREAD_COLOR)


def h264(images: Sequence[np.ndarray], rng: np.random.Generator, *, crf: int) -> list[np.ndarray]:
    """Return images of one size after x264: as one mosaic that moves a little, the last of three frames.

    So the damage is that of predicted frames, not only of still pictures.
    """
    height, width = images[0].shape[:2]
    columns = int(np.ceil(np.sqrt(len(images))))
    rows = -(-len(images) // columns)
    gap = 8
    mosaic = np.full((_even(rows * (height + gap) + gap), _even(columns * (width + gap) + gap), 3), 110, np.uint8)
    places = [(gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)) for i in range(len(images))]
    for image, (y, x) in zip(images, places, strict=True):
        mosaic[y : y + height, x : x + width] = image
    steps = rng.integers(-2, 3, (3, 2))
    steps[-1] = 0
    frames = [np.roll(mosaic, tuple(step), (0, 1)) for step in steps]
    last = _encode_decode(frames, crf)
    return [last[y : y + height, x : x + width].copy() for y, x in places]


def _encode_decode(frames: Sequence[np.ndarray], crf: int) -> np.ndarray:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "preset": "veryfast", "bf": "0", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "bgr24")))
        container.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer) as container:
        container.streams.video[0].thread_count = 1
        decoded = list(container.decode(video=0))
    return decoded[-1].to_ndarray(format="bgr24", threads=1)


def _optics(clean: np.ndarray, damage: CameraDamage, factor: int) -> np.ndarray:
    height, width = clean.shape[:2]
    if damage.blur > 0:
        clean = cv2.GaussianBlur(clean, (0, 0), damage.blur * factor)
    if damage.motion > 0:
        clean = cv2.filter2D(clean, -1, _motion_kernel(damage.motion * factor, damage.motion_angle))
    if factor == 1:
        return clean.copy()
    return cv2.resize(clean, (width // factor, height // factor), interpolation=damage.kernel)


def _noise(image: np.ndarray, rng: np.random.Generator, damage: CameraDamage) -> np.ndarray:
    channels = 1 if damage.noise_grey else 3
    noisy = image + rng.normal(0, damage.noise, (*image.shape[:2], channels))
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def _motion_kernel(length: float, angle: float) -> np.ndarray:
    size = int(np.ceil(length)) | 1
    kernel = np.zeros((size, size), np.float32)
    kernel[size // 2] = 1
    centre = (size / 2 - 0.5, size / 2 - 0.5)
    kernel = cv2.warpAffine(kernel, cv2.getRotationMatrix2D(centre, angle, length / size), (size, size))
    return kernel / kernel.sum()


def _even(value: int) -> int:
    return value + value % 2
