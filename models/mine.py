"""Real low-resolution faces out of one's own footage: `python -m models.mine --detector YUNET --out FOLDER SOURCE...`.

A source is a video, a picture, or a folder: all that lies in it, but not in its folders. Faces are found by YuNet, on
enlarged pictures where they may be tiny, and cut out at their native size, square, at 1.6 times the box: nothing is
scaled, so the camera's damage is what it was. They go to FOLDER/SOURCE/FRAME_INDEX.png, and their boxes and landmarks,
in pixels of the crop, to FOLDER/faces.csv. SCGAN learns from such a folder (`low` in configs/train/scgan.yaml).
Look through it first: among tiny faces are things that are none.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import av
import av.error
import cv2
import numpy as np

from models.dataset import IMAGE_SUFFIXES
from models.judges import FaceDetector

JUDGES = ("classroom", "corridor", "carphone")
"""Clips that restorers are judged by: nothing is mined from them, and nothing learns from them."""

_VIDEO_SUFFIXES = {".avi", ".mkv", ".mov", ".mp4", ".ts", ".webm"}
_FRAMING = 1.6  # side of a crop in sides of its box, as in all our sets
_SEEN = 20  # px: smaller faces YuNet often misses
_SAME = 0.3  # boxes that overlap by more, intersection over union, are one place
_LOOKS = 3  # frames that are looked at for each crop of a place: the sharpest is kept
_COLUMNS = (
    "file", "face_x1", "face_y1", "face_x2", "face_y2",
    *(f"{point}_{axis}" for point in ("le", "re", "nose", "lm", "rm") for axis in "xy"),
)  # fmt: skip


class MineError(ValueError):
    """Nothing can be mined. The message is one line."""


@dataclass(frozen=True, slots=True)
class MinedFace:
    """A face in a frame."""

    frame: int
    """Number of the frame; 0 for a picture."""
    box: np.ndarray
    """(4,) x1, y1, x2, y2 in pixels of the frame."""
    landmarks: np.ndarray
    """(5, 2) in pixels of the frame: left eye, right eye, nose, left and right mouth corner."""
    corner: np.ndarray
    """(2,) int: x, y of the crop's upper left pixel in the frame."""
    crop: np.ndarray
    """(side, side, 3) uint8 BGR."""

    @property
    def sharpness(self) -> float:
        """Variance of the Laplacian: less for a blurred crop of the same face."""
        return float(cv2.Laplacian(cv2.cvtColor(self.crop, cv2.COLOR_BGR2GRAY), cv2.CV_64F).var())


class LandmarkDetector(FaceDetector):
    """YuNet with its landmarks, for faces from `least` px of height on."""

    def __init__(self, path: Path, *, least: float = _SEEN, score: float = 0.7) -> None:
        """Faces of a lower score are left. Raises MineError if the file is no YuNet."""
        if not path.is_file():
            raise MineError(f"{path} does not exist: --detector wants YuNet as ONNX")
        try:
            super().__init__(path, threshold=score)
        except cv2.error:
            raise MineError(f"{path} is no YuNet") from None
        self.times = max(1, math.ceil(_SEEN / least))
        """How many times pictures are enlarged before they are looked at."""

    def find(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return boxes (n, 4) and landmarks (n, 5, 2) in pixels of the image, the surest face first."""
        height, width = (side * self.times for side in image.shape[:2])
        self._yunet.setInputSize((width, height))
        found = self._yunet.detect(cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC))[1]
        if found is None:
            return np.empty((0, 4)), np.empty((0, 5, 2))
        found = found[np.argsort(-found[:, 14], kind="stable")].astype(np.float64)
        boxes = np.hstack([found[:, :2], found[:, :2] + found[:, 2:4]]) / self.times
        return boxes, (found[:, 4:14].reshape(-1, 5, 2) + 0.5) / self.times - 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="videos, pictures, folders of them")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the crops and faces.csv")
    parser.add_argument("--detector", type=Path, required=True, help="YuNet as ONNX")
    parser.add_argument("--least", type=float, default=8, help="px of the lowest face that is kept (8)")
    parser.add_argument("--most", type=float, default=80, help="px of the highest face that is kept (80)")
    parser.add_argument("--score", type=float, default=0.7, help="lowest score of a face that is kept (0.7)")
    parser.add_argument("--every", type=float, default=1, help="seconds of a video of which a place gives one crop (1)")
    arguments = parser.parse_args()
    try:
        if not 0 < arguments.least <= arguments.most:
            raise MineError(f"--least {arguments.least:g}, --most {arguments.most:g}: that is no range of heights")
        if not arguments.every > 0:
            raise MineError(f"--every {arguments.every:g}: seconds are more than 0")
        paths = footage(arguments.sources)
        detector = LandmarkDetector(arguments.detector, least=arguments.least, score=arguments.score)
        mine(paths, arguments.out, detector, least=arguments.least, most=arguments.most, every=arguments.every)
    except (MineError, OSError) as exc:
        parser.exit(2, f"{exc}\n")


def judging(path: PurePath) -> str | None:
    """Return the part of a path that names one of JUDGES, or None."""
    return next((part for part in path.parts if any(name in part.lower() for name in JUDGES)), None)


def footage(sources: Sequence[Path]) -> list[Path]:
    """Return the videos and pictures of all sources. Raises MineError for one that judges, that is not there, or that
    has the name of another."""
    paths = [path for source in sources for path in _inside(source)]
    if not paths:
        raise MineError(f"{', '.join(map(str, sources))}: no videos, no pictures")
    named: dict[str, Path] = {}
    for path in paths:
        if part := judging(path):
            raise MineError(f"{path}: {part} is kept to judge restorers by, nothing is mined from it")
        if path.stem in named:
            raise MineError(f"{named[path.stem]} and {path} would both be mined into {path.stem}: rename one")
        named[path.stem] = path
    return paths


def _inside(source: Path) -> list[Path]:
    if source.is_dir():
        return sorted(path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES | _VIDEO_SUFFIXES)
    if not source.exists():
        raise MineError(f"{source} does not exist")
    return [source]


def mine(
    paths: Sequence[Path], out: Path, detector: LandmarkDetector, *, least: float, most: float, every: float
) -> int:
    """Write the faces of videos and pictures that are `least` to `most` px high; return how many.

    Of each `every` seconds of a video a place gives one crop, the sharpest of a few. Raises MineError for what cannot
    be read, and for a source that has been mined into `out` before.
    """
    for path in paths:
        if (out / path.stem).exists():
            raise MineError(
                f"{out / path.stem} exists: {path.name} has been mined; delete it, or mine into another --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    listed, total = out / "faces.csv", 0
    new = not listed.exists()
    with listed.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(_COLUMNS)
        for path in paths:
            count = 0
            for face in faces_of(path, detector, least=least, most=most, every=every):
                name = f"{path.stem}/{face.frame:06d}_{count:03d}.png"
                (out / path.stem).mkdir(exist_ok=True)
                if not cv2.imwrite(str(out / name), face.crop):
                    raise MineError(f"{out / name} cannot be written")
                places = np.concatenate([face.box.reshape(2, 2), face.landmarks]) - face.corner
                writer.writerow([name, *(f"{place:.2f}" for place in places.ravel())])
                count += 1
            print(f"{path.name}: {count} faces", flush=True)
            total += count
    return total


def faces_of(path: Path, detector: LandmarkDetector, *, least: float, most: float, every: float) -> Iterator[MinedFace]:
    """Yield the faces of a video or picture, as `mine` says. Raises MineError for what cannot be read."""
    places: list[MinedFace] = []
    until = -math.inf
    for number, seconds, image in _looks(path, every / _LOOKS):
        if seconds >= until:
            yield from places
            places, until = [], seconds + every
        for box, landmarks in zip(*detector.find(image), strict=True):
            face = _cut(number, image, box, landmarks)
            if face is None or not least <= box[3] - box[1] <= most:
                continue
            same = next((i for i, kept in enumerate(places) if overlap(kept.box, box) > _SAME), None)
            if same is None:
                places.append(face)
            elif face.sharpness > places[same].sharpness:
                places[same] = face
    yield from places


def _looks(path: Path, interval: float) -> Iterator[tuple[int, float, np.ndarray]]:
    """Yield number, time in seconds and image, (H, W, 3) uint8 BGR, of a frame every `interval` seconds."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is None:
            raise MineError(f"{path} is no picture")
        yield 0, 0.0, image
        return
    due = -math.inf
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MineError(f"{path} has no video")
            rate = float(container.streams.video[0].average_rate or 25)
            for number, frame in enumerate(container.decode(video=0)):
                seconds = number / rate if frame.time is None else frame.time
                if seconds >= due:
                    due = seconds + interval
                    yield number, seconds, frame.to_ndarray(format="bgr24")
    except av.error.FFmpegError as exc:
        raise MineError(f"{path}: {exc.strerror}") from None


def _cut(number: int, image: np.ndarray, box: np.ndarray, landmarks: np.ndarray) -> MinedFace | None:
    """Cut a face out; None where its crop would reach beyond the frame, whose edge may cut the face too."""
    side = round(_FRAMING * float((box[2:] - box[:2]).max()))
    corner = np.round((box[:2] + box[2:] - side) / 2).astype(int)
    x, y = corner
    if corner.min() < 0 or x + side > image.shape[1] or y + side > image.shape[0]:
        return None
    return MinedFace(number, box, landmarks, corner, image[y : y + side, x : x + side].copy())


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over union of two boxes."""
    inner = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    return float(inner / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner))


if __name__ == "__main__":
    sys.exit(main())
