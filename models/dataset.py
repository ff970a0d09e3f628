"""Faces for training: whole sets in memory as uint8, cut out at the framing asked for."""

from __future__ import annotations

import csv
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True, slots=True)
class Face:
    """One photograph of one face."""

    name: str
    """`PART/FILE`, unique over all sets."""
    identity: str
    image: np.ndarray
    """(H, W, 3) uint8 BGR."""
    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels of the image."""
    landmarks: np.ndarray
    """(5, 2) float32: left eye, right eye, nose, mouth left, mouth right; NaN where unknown."""


def load_faces(source: Path, *, exclude: frozenset[str] = frozenset()) -> list[Face]:
    """Load every face of a tar with its CSV beside it (`faces_train.tar`, `faces_train.csv`), or of a folder of crops.

    In a folder each image is a square crop at 1.6 times the face's box, and its subfolder the identity.
    `exclude` holds names `PART/FILE` to leave out. Raises FileNotFoundError or ValueError with the place.
    """
    if source.is_dir():
        return list(_folder(source, exclude))
    return list(_tar(source, exclude))


def load_names(path: Path) -> frozenset[str]:
    """Return the names `PART/FILE` that a list such as calibration.txt holds, one `PART FILE` a line."""
    lines = path.read_text().splitlines()
    return frozenset("/".join(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#"))


def _tar(path: Path, exclude: frozenset[str]) -> Iterator[Face]:
    with path.with_suffix(".csv").open(newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    with tarfile.open(path) as tar:
        for member in tar:
            row = rows.get(member.name)
            name = f"{path.stem}/{member.name}"
            if row is None or name in exclude or row.get("source") == "UTKFace":
                continue
            extracted = tar.extractfile(member)
            if extracted is None:
                raise ValueError(f"{path}: {member.name} is no file")
            image = cv2.imdecode(np.frombuffer(extracted.read(), np.uint8), cv2.IMREAD_COLOR)
            if image is None:
                raise ValueError(f"{path}: {member.name} is no image")
            box = (float(row["face_x1"]), float(row["face_y1"]), float(row["face_x2"]), float(row["face_y2"]))
            points = [[float(row[f"{p}_x"]), float(row[f"{p}_y"])] for p in ("le", "re", "nose", "lm", "rm")]
            yield Face(name, row.get("identity", member.name), image, box, np.array(points, np.float32))


def _folder(folder: Path, exclude: frozenset[str]) -> Iterator[Face]:
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES):
        name = f"{folder.name}/{path.relative_to(folder)}"
        if name in exclude:
            continue
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is None:
            raise ValueError(f"{path} is no image")
        height, width = image.shape[:2]
        side = max(height, width) / 1.6
        centre = (width / 2, height / 2)
        box = (centre[0] - side / 2, centre[1] - side / 2, centre[0] + side / 2, centre[1] + side / 2)
        identity = path.parent.name if path.parent != folder else path.stem
        yield Face(name, identity, image, box, np.full((5, 2), np.nan, np.float32))


def cut(
    face: Face,
    size: tuple[int, int],
    *,
    framing: float,
    angle: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    flip: bool = False,
) -> np.ndarray:
    """Return the face cut out as (height, width, 3) uint8 BGR at `size` = (width, height).

    `framing` is the crop's longer side over the box's larger side, `angle` in degrees, `shift` in parts of the side.
    Beyond the image its edge is replicated. Shrinking is done by area, so that the result is not aliased.
    """
    x1, y1, x2, y2 = face.box
    width, height = size
    side = framing * max(x2 - x1, y2 - y1)
    scale = max(width, height) / side
    image = face.image
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        x1, y1, x2, y2 = (v * scale for v in (x1, y1, x2, y2))
        side *= scale
        scale = 1.0
    centre = ((x1 + x2) / 2 + shift[0] * side, (y1 + y2) / 2 + shift[1] * side)
    matrix = cv2.getRotationMatrix2D(centre, angle, scale)
    matrix[:, 2] += (width / 2 - centre[0], height / 2 - centre[1])
    if flip:
        matrix[0] = -matrix[0]
        matrix[0, 2] += width - 1
    return cv2.warpAffine(image, matrix, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
