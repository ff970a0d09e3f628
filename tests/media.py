"""Small videos for tests, made with PyAV. Every picture carries its number: a test can tell which one it has."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from skimage.data import astronaut

BITS = 12


def picture(number: int, *, width: int = 160, height: int = 120) -> np.ndarray:
    """Return a (height, width, 3) BGR picture: its number in black and white blocks above, a square moving below."""
    image = np.full((height, width, 3), (40, 90, 140), np.uint8)
    block, third = width // BITS, height // 3
    for bit in range(BITS):
        image[:third, bit * block : (bit + 1) * block] = 255 if number >> bit & 1 else 0
    left = number * 3 % (width - third)
    image[third + 10 : 2 * third + 10, left : left + third] = (200, 60, 220)
    return image


def number_in(image: np.ndarray) -> int:
    """Return the number that `picture` wrote into it."""
    block, middle = image.shape[1] // BITS, image.shape[0] // 6
    return sum(1 << bit for bit in range(BITS) if image[middle, bit * block + block // 2].mean() > 127)


def write_video(
    path: Path,
    images: Iterable[np.ndarray] | None = None,
    *,
    frames: int = 50,
    width: int = 160,
    height: int = 120,
    rate: int = 25,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    b_frames: int = 0,
    created: datetime | None = None,
    rotation: int = 0,
    audio_s: float = 0,
    options: dict[str, str] | None = None,
) -> Path:
    """Write `images`, or as many numbered pictures as `frames` says; the path's suffix chooses the container.

    `rotation`: degrees, counter-clockwise, that a player turns it by. `audio_s`: seconds of silence beside it.
    """
    if images is None:
        images = (picture(number, width=width, height=height) for number in range(frames))
    else:
        images = list(images)
        height, width = images[0].shape[:2]
    with av.open(str(path), "w", options=options or {}) as container:
        if created:
            container.metadata["creation_time"] = created.isoformat()
        video = container.add_stream(codec, rate=rate)
        if codec == "libx264":
            video.options = {"preset": "ultrafast", "x264-params": f"keyint={rate}:bframes={b_frames}"}
        video.width, video.height = width, height
        video.pix_fmt = pixel_format
        if rotation:
            video.set_display_rotation(rotation)
        if audio_s:
            sound = container.add_stream("aac", rate=16000, layout="mono")
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="bgr24")
            frame.pts, frame.time_base = index, Fraction(1, rate)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio_s:
            for start in range(0, int(audio_s * 16000), 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.rate, silence.pts, silence.time_base = 16000, start, Fraction(1, 16000)
                container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
    return path


def walk(frames: int, *, seed: int = 0) -> list[np.ndarray]:
    """Return (256, 448, 3) pictures of a person who crosses a grey wall; the face is about 50 px high."""
    person = np.ascontiguousarray(astronaut()[0:300, 90:390, ::-1])
    person = cv2.resize(person, (150, 150), interpolation=cv2.INTER_AREA)
    wall = np.random.default_rng(seed).normal(120, 3, (256, 448, 3)).clip(0, 255).astype(np.uint8)
    images = []
    for index in range(frames):
        image, left = wall.copy(), 20 + 4 * (index % 60)
        image[50:200, left : left + 150] = person
        images.append(image)
    return images
