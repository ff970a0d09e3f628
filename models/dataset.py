"""Faces for training: whole sets in memory as uint8, cut out as each protocol wants them."""

from __future__ import annotations

import csv
import math
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.degradation import Kernel, resize, stored

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
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist")
    try:
        return list(_tar(source, exclude))
    except KeyError as exc:
        raise ValueError(f"{source.with_suffix('.csv')} has no column {exc}") from None
    except tarfile.TarError as exc:
        raise ValueError(f"{source} is no tar, or not a whole one") from exc


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


@dataclass(frozen=True, slots=True)
class Clean:
    """A batch of clean faces."""

    images: Tensor
    """(n, 3, h, w) float32 RGB in whole grey levels, 0..255."""
    landmarks: Tensor
    """(n, 5, 2) float32 in pixels of the images; NaN where unknown."""


class FaceTensors:
    """Whole sets of faces in the memory of a device, in groups by the size at which they are kept.

    OpenCV brings each face to the largest of `SIDES` that it reaches, and to 0.7, 0.5, 0.35 and 0.25 of that: a face is
    cut from the smallest level that need not be enlarged much, so that it is neither aliased nor soft.
    """

    SIDES = (256, 200, 144)
    _MOST = 1.2  # a clean face is enlarged by more only where none is large enough

    def __init__(self, faces: Sequence[Face], device: torch.device) -> None:
        """Raises ValueError where no face is large enough."""
        self.device = device
        kept: dict[int, list[Face]] = {side: [] for side in self.SIDES}
        for face in faces:
            if side := max((side for side in self.SIDES if side <= min(face.image.shape[:2])), default=0):
                kept[side].append(face)
        self.faces = [(face.name, face.identity) for members in kept.values() for face in members]
        """Name and identity of each face, in the order of rows: group after group."""
        self.groups = [_Group(members, side, device) for side, members in kept.items() if members]
        if not self.groups:
            largest = max((min(face.image.shape[:2]) for face in faces), default=0)
            raise ValueError(f"the largest of {len(faces)} faces has {largest} px, {self.SIDES[-1]} px are needed")

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    @property
    def side(self) -> int:
        """Side in pixels of the largest faces."""
        return self.groups[0].side

    def portraits(self, rng: np.random.Generator, n: int, size: tuple[int, int], *, vary: bool = True) -> Clean:
        """Return SGEN's faces: 217 of 256 columns, brought by area to `size` = (width, height).

        They are flipped, and the columns chosen, at random; without `vary` the first `n` as they are, from the centre.
        """
        width, height = size
        group, rows = self._draw(rng, n, max(height, math.ceil(width * 256 / 217)), vary=vary)
        side = group.side
        columns = round(217 / 256 * side)
        left = int(rng.integers(side - columns + 1)) if vary else (side - columns) // 2
        images = group.levels[0][rows][..., left : left + columns].float()
        landmarks = group.landmarks[rows] - torch.tensor([left, 0.0], device=self.device)
        scale = torch.tensor([width / columns, height / side], device=self.device)
        kernel: Kernel = "area" if width <= columns and height <= side else "cubic"
        clean = Clean(stored(resize(images, size, kernel)), (landmarks + 0.5) * scale - 0.5)
        return self._flipped(rng, clean, vary)

    def patches(self, rng: np.random.Generator, n: int, side: int, *, vary: bool = True) -> Clean:
        """Return windows of `side` px of the largest faces at their stored scale, each mirrored and turned at random.

        Without `vary` the centres of the first `n`. Landmarks are then known, else not, as a window may lack them.
        Raises ValueError where the faces are smaller than that.
        """
        if side > self.side:
            raise ValueError(f"windows of {side} px do not fit into faces of {self.side} px")
        group, rows = self._draw(rng, n, self.side, vary=vary)
        least = (group.side - side) // 2
        corners = rng.integers(group.side - side + 1, size=(n, 2)) if vary else np.full((n, 2), least)
        places = zip(rows.tolist(), corners.tolist(), strict=True)
        images = torch.stack([group.levels[0][row, :, y : y + side, x : x + side] for row, (y, x) in places]).float()
        if not vary:
            return Clean(images, group.landmarks[rows] - float(least))
        for turned in (lambda x: x.flip(3), lambda x: x.flip(2), lambda x: x.transpose(2, 3)):
            chosen = torch.from_numpy(rng.random(n) < 0.5).to(self.device)
            images = torch.where(chosen[:, None, None, None], turned(images), images)
        return Clean(images, torch.full_like(group.landmarks[rows], torch.nan))

    def crops(self, rng: np.random.Generator, n: int, side: int, *, vary: bool = True) -> Clean:
        """Return faces as the product crops them, `side` px: framed at 1.1 to 1.8 times the box, turned, shifted,
        mirrored. Without `vary` the first `n`, upright and framed at 1.6."""
        group, rows = self._draw(rng, n, side / 1.05, vary=vary)
        first = sum(len(other) for other in self.groups[: self.groups.index(group)])
        return self._flipped(rng, self.crops_of(rng, first + rows.cpu().numpy(), side, vary=vary), vary)

    def crops_of(self, rng: np.random.Generator, rows: np.ndarray, side: int, *, vary: bool = True) -> Clean:
        """Return the faces of these rows, counted through all groups, as `crops` does, but none is mirrored."""
        n = len(rows)
        boxes = np.concatenate([group.boxes.cpu().numpy() for group in self.groups])[rows]
        face = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
        least = np.minimum(np.maximum(1.1, side / (self._MOST * face)), 1.8)
        framing = rng.uniform(least, 1.8) if vary else np.full(n, 1.6)
        angle = np.radians(rng.normal(0, 6, n)) if vary else np.zeros(n)
        shift = rng.normal(0, 0.03, (n, 2)) if vary else np.zeros((n, 2))
        scale = framing * face / side  # pixels of the stored face for each of the crop

        centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + shift * (scale * side)[:, None]
        turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], axis=1).reshape(n, 2, 2)
        turn *= scale[:, None, None]
        offset = centre - turn.sum(axis=2) * ((side - 1) / 2)
        to_stored = torch.tensor(np.concatenate([turn, offset[:, :, None]], axis=2), dtype=torch.float32)

        images = torch.empty(n, 3, side, side, device=self.device)
        landmarks = torch.empty(n, 5, 2, device=self.device)
        first = 0
        for group in self.groups:
            here = np.flatnonzero((first <= rows) & (rows < first + len(group)))
            if len(here):
                places, own = (torch.from_numpy(each).to(self.device) for each in (here, rows[here] - first))
                number = self._level(group, float(scale[here].min()))
                images[places], landmarks[places] = group.cut(own, to_stored[here].to(self.device), side, number)
            first += len(group)
        return Clean(images, landmarks)

    def _draw(self, rng: np.random.Generator, n: int, side: float, *, vary: bool) -> tuple[_Group, Tensor]:
        """Return a group kept at `side` px at least, where there is one, and the rows of n of its faces."""
        fit = [group for group in self.groups if side <= group.side] or self.groups[:1]
        if not vary:
            return fit[0], torch.arange(n, device=self.device) % len(fit[0])
        sizes = np.array([len(group) for group in fit])
        group = fit[int(rng.choice(len(fit), p=sizes / sizes.sum()))]
        return group, torch.from_numpy(rng.integers(len(group), size=n)).to(self.device)

    def _level(self, group: _Group, least_scale: float) -> int:
        """Return the number of the smallest level from which no face is enlarged by more than `_MOST`."""
        fit = [
            i for i, level in enumerate(group.levels) if least_scale * level.shape[-1] / group.side >= 1 / self._MOST
        ]
        return max(fit, default=0)

    def _flipped(self, rng: np.random.Generator, clean: Clean, vary: bool) -> Clean:
        return mirrored(clean, torch.from_numpy(rng.random(len(clean.images)) < 0.5)) if vary else clean


def mirrored(clean: Clean, chosen: Tensor) -> Clean:
    """Return the faces, of which those chosen, (n,) bool, are mirrored, left and right landmarks exchanged."""
    images, landmarks = clean.images, clean.landmarks
    chosen = chosen.to(images.device)[:, None, None]
    there = landmarks[:, [1, 0, 2, 4, 3]] * torch.tensor([-1.0, 1.0], device=images.device)
    there += torch.tensor([images.shape[3] - 1.0, 0.0], device=images.device)
    return Clean(torch.where(chosen[..., None], images.flip(3), images), torch.where(chosen, there, landmarks))


class _Group:
    """Faces kept at one size, with smaller levels of the same."""

    def __init__(self, faces: Sequence[Face], side: int, device: torch.device) -> None:
        self.side = side
        squares = [_square(face, side) for face in faces]
        sizes = [round(part * side) for part in (1, 0.7, 0.5, 0.35, 0.25)]
        self.levels = [_stack([_shrunk(image, size) for image, _, _ in squares]).to(device) for size in sizes]
        """(n, 3, s, s) uint8 RGB each."""
        self.boxes = torch.tensor(np.array([box for _, box, _ in squares]), dtype=torch.float32, device=device)
        self.landmarks = torch.tensor(
            np.stack([points for _, _, points in squares]), dtype=torch.float32, device=device
        )

    def __len__(self) -> int:
        return len(self.boxes)

    def cut(self, rows: Tensor, to_stored: Tensor, side: int, number: int) -> tuple[Tensor, Tensor]:
        """Return images and landmarks of faces cut from a level; matrices (n, 2, 3) take the result's pixels to those
        of level 0."""
        times = self.levels[number].shape[-1] / self.side
        to_level = to_stored * times
        to_level[:, :, 2] += (times - 1) / 2
        images = stored(cut_out(self.levels[number][rows].float(), to_level, side))
        inverse = torch.linalg.inv(to_stored[:, :, :2])
        return images, (self.landmarks[rows] - to_stored[:, None, :, 2]) @ inverse.transpose(1, 2)


def cut_out(images: Tensor, matrices: Tensor, side: int, mode: str = "bicubic") -> Tensor:
    """Return (n, c, side, side): pixel p of the result is the image at `matrix @ (p, 1)`, matrices (n, 2, 3).

    Pixel centres lie at whole numbers; beyond the image its edge is replicated.
    """
    height, width = images.shape[2:]
    along = torch.arange(side, device=images.device, dtype=matrices.dtype)
    y, x = torch.meshgrid(along, along, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    places = torch.einsum("nij,hwj->nhwi", matrices, points)
    extent = torch.tensor([width, height], device=images.device, dtype=matrices.dtype)
    grid = (places + 0.5) / extent * 2 - 1
    return F.grid_sample(images, grid, mode=mode, padding_mode="border", align_corners=False)


def similarities(points: Tensor, landmarks: Tensor) -> Tensor:
    """Return the least-squares similarities (n, 2, 3) that take points (k, 2) or (n, k, 2) to landmarks (n, k, 2)."""
    points = points.expand_as(landmarks)
    middle, centre = points.mean(dim=1), landmarks.mean(dim=1)
    p, q = points - middle[:, None], landmarks - centre[:, None]
    size = p.square().sum(dim=(1, 2))
    a = (p * q).sum(dim=(1, 2)) / size
    b = (p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]).sum(dim=1) / size
    turn = torch.stack([torch.stack([a, -b], dim=1), torch.stack([b, a], dim=1)], dim=1)
    return torch.cat([turn, (centre - (turn @ middle[..., None])[..., 0])[..., None]], dim=2)


def _square(face: Face, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image, box and landmarks of the face's middle square, brought to `side`."""
    height, width = face.image.shape[:2]
    least = min(height, width)
    corner = np.array([(width - least) // 2, (height - least) // 2])
    image = face.image[corner[1] : corner[1] + least, corner[0] : corner[0] + least]
    scale = side / least
    box = (np.array(face.box) - np.tile(corner, 2)) * scale
    return _shrunk(image, side), box, (face.landmarks - corner + 0.5) * scale - 0.5


def _shrunk(image: np.ndarray, side: int) -> np.ndarray:
    return image if image.shape[0] == side else cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)


def _stack(images: Sequence[np.ndarray]) -> Tensor:
    """(h, w, 3) BGR each to (n, 3, h, w) RGB."""
    return torch.from_numpy(np.ascontiguousarray(np.stack(images)[..., ::-1].transpose(0, 3, 1, 2)))
