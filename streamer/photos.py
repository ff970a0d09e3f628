"""Restores photos and face crops that lie in files: `streamer restore`."""

from __future__ import annotations

import logging
import os
import re
import stat
import struct
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from streamer.detector import FaceDetector
from streamer.geometry import cut_crop, transform_points, upright_landmarks
from streamer.guided import Guide, GuidedRestorer, best_by_pose, fused, parts_picture
from streamer.quality import measure_quality
from streamer.restorer import FaceRestorer
from streamer.router import NONE, RestorerRouter
from streamer.types import Crop, Moment, Quality, Route, Track

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
MOST_BYTES = 200 * 2**20
MOST_PIXELS = 100_000_000
"""Of a photo: 300 MB when decoded. What claims more is a decompression bomb, or wants shrinking."""
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
"""No others: one of Pillow's readers starts a program."""
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, TypeError, AttributeError, LookupError, ArithmeticError,
    RuntimeError, MemoryError,
)  # fmt: skip
"""What Pillow raises where a file is not what it says."""
_FEATHER = 0.1  # of the crop's side: how wide its edge fades into the photo


class PhotoError(ValueError):
    """Inputs cannot be restored; one line per mistake."""


@dataclass(frozen=True, slots=True)
class PhotoStages:
    """What restores a photo. `detector` is None for crops; `router` None where a restorer is forced by name."""

    detector: FaceDetector | None
    router: RestorerRouter | None
    restorer: FaceRestorer | None
    guiding: Guiding | None = None


@dataclass(frozen=True, slots=True)
class Guiding:
    """Photos of the person, and what restores with them, in place of a blind restorer."""

    restorer: GuidedRestorer
    guides: Sequence[Guide]
    fuse: bool = False
    """Whether all of them guide; else the one of the most similar pose."""
    parts: bool = False
    """Whether what each guide did is written as a picture too."""


def gather(inputs: Sequence[Path]) -> list[Path]:
    """Return the images of files and folders. Raises PhotoError for what is missing and for two of one stem."""
    mistakes, photos = [], []
    for path in inputs:
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not path.exists():
            mistakes.append(f"{path}: no such file or folder")
        elif not found:
            mistakes.append(f"{path}: no image in this folder")
        else:
            photos += found
    stems = Counter(photo.stem for photo in photos)
    mistakes += [f"{photo}: another input is named {photo.stem} too" for photo in photos if stems[photo.stem] > 1]
    if mistakes:
        raise PhotoError("\n".join(mistakes))
    return photos


def refuse_overwriting(photos: Sequence[Path], folder: Path, *, crops: bool) -> None:
    """Raise PhotoError where a result that goes to `folder` would overwrite one of the photos."""
    inputs = {photo.resolve(): photo for photo in photos}
    stems = {photo.stem for photo in photos}
    folder = folder.resolve()
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    overwritten = [
        inputs[path.resolve()] for path in there if path.resolve() in inputs and stems & _sources(path.name, crops)
    ]
    if overwritten:
        others = f" and {len(overwritten) - 1} more inputs" if len(overwritten) > 1 else ""
        raise PhotoError(f"{overwritten[0]}{others} would be overwritten: choose another folder for --out")


def read_image(path: Path) -> np.ndarray:
    """Return the image of a file, upright by its EXIF, as HWC uint8 BGR; what is transparent is white.

    Colours of any kind and depth become 8 bits each. Raises PhotoError for what is no photo, is damaged or cut off,
    holds several pictures, or would not fit into memory; of those nothing is decoded.
    """
    return decode_image(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """Return what a photo's file holds. Raises PhotoError, also for what is no file: a pipe would never end."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PhotoError(f"{path}: not a file")
            if status.st_size > MOST_BYTES:
                raise PhotoError(f"{path}: {status.st_size / 2**20:.0f} MiB; a photo has {MOST_BYTES >> 20} at most")
            return file.read()
    except OSError as exc:
        raise PhotoError(f"{path}: {exc.strerror}") from exc


def decode_image(content: bytes, name: str) -> np.ndarray:
    """Return the image of a file's bytes, as `read_image` does; `name` is what errors call it. Raises PhotoError."""
    if not content:
        raise PhotoError(f"{name}: the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of much that an operator can do nothing about
        try:
            with Image.open(BytesIO(content), formats=_FORMATS) as picture:
                _refuse_size_and_number(picture, name)
                return _pixels(ImageOps.exif_transpose(picture), name)
        except PhotoError:
            raise
        except Image.DecompressionBombError as exc:
            most = MOST_PIXELS // 10**6
            raise PhotoError(f"{name}: more than the {most} million pixels that are decoded at most") from exc
        except _DAMAGED as exc:
            raise PhotoError(f"{name}: {_why(content, exc)}") from exc


def restore_photo(path: Path, folder: Path, stages: PhotoStages) -> list[Route]:
    """Write `STEM.faceK.crop.png`, `STEM.faceK.restored.png` and, with the faces put back, `STEM.restored.png`.

    Return the route of each face; where there is none, nothing is written. Raises PhotoError.
    """
    photo = read_image(path)
    assert stages.detector is not None
    detections = stages.detector.detect([photo])[0]
    detections = detections[detections.scores >= stages.detector.threshold]
    if stages.guiding and len(detections) > 1:
        raise PhotoError(f"{path}: {len(detections)} faces, a guide is of one person: cut it out and use --crops")
    whole, routes = photo.copy(), []
    for index in range(len(detections)):
        box, landmarks = detections.boxes[index], detections.landmarks[index]
        image, transform = cut_crop(photo, box, landmarks)
        crop = _crop(image, transform, box, landmarks, measure_quality(photo, box, landmarks))
        stem = f"{path.stem}.face{index + 1}"
        restored, route = _restore(crop, stages, folder, stem)
        routes.append(route)
        write_image(folder / f"{stem}.crop.png", image)
        write_image(folder / f"{stem}.restored.png", restored)
        if route.restorer != NONE:
            whole = put_back(whole, restored, transform, image.shape[0])
    if routes:
        write_image(folder / f"{path.stem}.restored.png", whole)
    return routes


def restore_crop(path: Path, folder: Path, stages: PhotoStages) -> Route:
    """Take the image as the crop itself and write it restored as `STEM.png`. Raises PhotoError."""
    crop = _whole(read_image(path))
    restored, route = _restore(crop, stages, folder, path.stem)
    write_image(folder / f"{path.stem}.png", restored)
    return route


def read_guides(paths: Sequence[Path], detector: FaceDetector | None) -> list[Guide]:
    """Return the one face of each photo, or without a detector each image as the crop itself. Raises PhotoError."""
    guides, mistakes = [], []
    for path in paths:
        try:
            guides.append(_guide(path, detector))
        except PhotoError as exc:
            mistakes.append(f"--guide {exc}")
    if mistakes:
        raise PhotoError("\n".join(mistakes))
    return guides


def put_back(photo: np.ndarray, restored: np.ndarray, transform: np.ndarray, side: int) -> np.ndarray:
    """Return the photo with a restored crop in its place, its edge faded in.

    `transform` (2, 3) takes photo pixels to pixels of the crop, which has `side`.
    """
    scale = restored.shape[0] / side
    fade = max(1, round(side * _FEATHER))
    mask = np.zeros((side, side), np.float32)
    mask[fade : side - fade, fade : side - fade] = 1
    faded = cv2.blur(mask, (2 * fade + 1, 2 * fade + 1), borderType=cv2.BORDER_ISOLATED)
    shrunk = cv2.resize(restored, (side, side), interpolation=cv2.INTER_AREA) if scale > 1 else restored
    back = cv2.invertAffineTransform(transform)
    left, top, right, bottom = _bounds(back, side, photo)
    whole = photo.copy()
    if left >= right or top >= bottom:
        return whole
    back[:, 2] -= left, top
    size = right - left, bottom - top
    placed = cv2.warpAffine(shrunk, back, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    weight = cv2.warpAffine(faded, back, size, flags=cv2.INTER_LINEAR)[..., None]
    part = whole[top:bottom, left:right]
    part[:] = np.rint(part * (1 - weight) + placed * weight)
    return whole


def write_image(path: Path, image: np.ndarray) -> None:
    """Write a PNG. Raises PhotoError."""
    try:
        path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    except OSError as exc:
        raise PhotoError(f"{path}: {exc.strerror}") from exc


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe that nobody writes to opens at once."""
    return os.open(path, flags | os.O_NONBLOCK)


def _refuse_size_and_number(picture: Image.Image, name: str) -> None:
    """Raise PhotoError by what a file's header says: nothing is decoded yet."""
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise PhotoError(f"{name}: {width}x{height} pixels; {MOST_PIXELS // 10**6} million are decoded at most")
    number = getattr(picture, "n_frames", 1)
    if number > 1 and picture.format != "MPO":  # a camera's JPEG with a preview or a map of depths behind the photo
        raise PhotoError(f"{name}: {number} pictures in one file; give the one that is meant as a file of its own")


def _pixels(picture: Image.Image, name: str) -> np.ndarray:
    """Decode. Raises PhotoError for pixels that are no colours."""
    if picture.mode == "F":
        raise PhotoError(f"{name}: its pixels are floating-point numbers; save it as JPEG or PNG")
    if picture.mode.startswith("I"):
        deep = np.asarray(picture)
        grey = (deep.clip(0, 65535) >> 8).astype(np.uint8)
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture.convert("RGBA"))
        picture = white
    return np.ascontiguousarray(np.asarray(picture.convert("RGB"))[..., ::-1])


def _why(content: bytes, exc: Exception) -> str:
    if content[4:8] == b"ftyp" and any(brand in content[8:40] for brand in (b"hei", b"hev")):
        return "HEIC, which is not decoded here: save it as JPEG or PNG"
    if isinstance(exc, UnidentifiedImageError):
        return "not an image that can be decoded"
    return "damaged or cut off: it cannot be decoded to its end"


def _sources(name: str, crops: bool) -> set[str]:
    """Return the stems of the photos of which a file of this name may be a result."""
    patterns = [r"(.+)\.png"] if crops else [r"(.+)\.restored\.png", r"(.+)\.face\d+\.(?:crop|restored)\.png"]
    patterns.append(r"(.+?)(?:\.face\d+)?\.guide\d+\.png")
    return {match[1] for pattern in patterns if (match := re.fullmatch(pattern, name))}


def _bounds(back: np.ndarray, side: int, photo: np.ndarray) -> tuple[int, int, int, int]:
    """Return the part of the photo in which a crop lies, as left, top, right and bottom; `back` leads there."""
    corners = np.array([[-1, -1], [side, -1], [-1, side], [side, side]])
    lying = transform_points(back, corners)
    height, width = photo.shape[:2]
    left, top = np.floor(lying.min(0)).clip(0, (width, height)).astype(int).tolist()
    right, bottom = (np.ceil(lying.max(0)) + 1).clip(0, (width, height)).astype(int).tolist()
    return left, top, right, bottom


def _crop(image: np.ndarray, transform: np.ndarray, box: np.ndarray, landmarks: np.ndarray, quality: Quality) -> Crop:
    moment = Moment("photo", 0, 0.0, datetime.now(UTC), "file")
    track = Track(1, moment, box, landmarks, 1.0)
    return Crop(track, image, transform, quality)


def _whole(image: np.ndarray) -> Crop:
    """Take an image as the crop itself, with a face as upright and frontal as a crop's is."""
    height, width = image.shape[:2]
    side = max(height, width) / 1.6
    x, y = (width - 1) / 2, (height - 1) / 2
    box = np.array([x - side / 2, y - side / 2, x + side / 2, y + side / 2], np.float32)
    landmarks = upright_landmarks(box)
    return _crop(image, np.eye(2, 3), box, landmarks, measure_quality(image, box, landmarks))


def _guide(path: Path, detector: FaceDetector | None) -> Guide:
    photo = read_image(path)
    if detector is None:
        crop = _whole(photo)
        return Guide(path.name, crop.image, crop.landmarks)
    detections = detector.detect([photo])[0]
    detections = detections[detections.scores >= detector.threshold]
    if len(detections) != 1:
        raise PhotoError(f"{path}: {len(detections) or 'no'} face{'s' * (len(detections) > 1)}; a guide has one")
    landmarks = detections.landmarks[0]
    image, transform = cut_crop(photo, detections.boxes[0], landmarks)
    return Guide(path.name, image, np.asarray(transform_points(transform, landmarks), np.float32))


def _restore(crop: Crop, stages: PhotoStages, folder: Path, stem: str) -> tuple[np.ndarray, Route]:
    if stages.guiding:
        return _restore_guided(crop, stages.guiding, folder, stem)
    route = stages.router.route(crop) if stages.router else Route(_forced(stages.restorer), "asked for by name")
    if stages.restorer is None or route.restorer == NONE:
        return crop.image, route
    image, _ = stages.restorer.restore([crop.image])[0]
    return image, route


def _restore_guided(crop: Crop, guiding: Guiding, folder: Path, stem: str) -> tuple[np.ndarray, Route]:
    guides = guiding.guides if guiding.fuse else [best_by_pose(crop.landmarks, guiding.guides)]
    faces = guiding.restorer.restore(crop.image, crop.landmarks, guides)
    if guiding.parts:
        for number, face in enumerate(faces, start=1):
            write_image(folder / f"{stem}.guide{number}.png", parts_picture(crop.image, face))
    restored = faces[0].restored if len(faces) == 1 else fused(faces)
    told = f"guided by {', '.join(face.guide.name for face in faces)}: drawn towards it, so no proof of who it is"
    return restored, Route(guiding.restorer.engine.card.name, told)


def _forced(restorer: FaceRestorer | None) -> str:
    return NONE if restorer is None else restorer.engine.card.name
