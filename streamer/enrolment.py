"""Enrolment: which photos may stand for a person, and how they get into the gallery.

A photo is looked at alone first, by `Gate.examine`; then, by `judge`, beside the person's other photos and beside
everybody else's. What is wrong with it is a `Refusal`, which an operator may let through, or a PhotoError, which nobody
can. Nothing is written until all photos of a call are judged, and then all of it or nothing.
"""

from __future__ import annotations

import hashlib
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import platformdirs

from streamer import photos
from streamer.audit import AuditLog, Details
from streamer.detector import FaceDetector
from streamer.embedder import FaceEmbedder
from streamer.evidence import EvidenceStore
from streamer.gallery import Change, Gallery, GalleryError, Identity, Photo, WatchList
from streamer.geometry import CROP_FACTOR, MOST_TURN_DEG, UPRIGHT, cut_crop, similarity, transform_points
from streamer.photos import PhotoError
from streamer.quality import measure_quality, measure_sharpness
from streamer.types import Detections
from streamer.vault import KEY_VARIABLE, Vault, key_file, load_key, new_key

MOST_CROP_PX = 512
"""Longest side of a crop that is kept: twice what a guide is used at. A larger one is shrunk."""
_SEEN_PX = 150
"""Height of a face as embedders see it: a larger one is shrunk to it before its sharpness and light are measured."""
_NOSE_LEVEL = float((UPRIGHT[2, 1] - UPRIGHT[0, 1]) / (UPRIGHT[3, 1] - UPRIGHT[0, 1]))
"""Where the nose of a level, upright face is on the way from the eyes to the mouth."""
_NOSE_DEPTH = 0.39
"""How far the nose stands out, in units of that way: 0.9 of half the eyes' distance, as in quality.py."""
_OVAL = np.array(
    [(0.36 * x, 0.5 * y) for x in np.linspace(-1, 1, 41) for y in np.linspace(-1, 1, 41) if x * x + y * y <= 1]
)
"""Points spread over a face, in units of its height from its middle, as those of UPRIGHT are."""
_PHOTO_SUFFIXES = photos.SUFFIXES | {".heic", ".heif", ".avif", ".gif"}
"""In a folder: what is no photo is passed over, but a photo that cannot be read is told."""
_MOST_NAME = 200
_UNPRINTED = {"Cc", "Cs", "Zl", "Zp"}


class EnrolmentError(ValueError):
    """What was asked for cannot be enrolled; one line per mistake."""


# What a photo must reach.


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the picture must reach. Measured where a reason has figures: docs/results/enrolment-*.md tell how.

    "Found" is how many of the person's other photos such a photo finds, where an untouched one finds 0.99.
    """

    bystander_height: float = 1 / 3
    """A second face counts as background if it is lower than this share of the first one and outside of its crop."""
    least_inside: float = 0.85
    """Share of the face's oval that lies in the photo; a forehead may be cut, an eye may not."""
    least_eye_distance_px: float = 20
    """From 18 px on nothing is lost (found 1.00, at 7 to 9 px 0.76); guides and probes with faults want some room."""
    least_sharpness: float = 0.15
    """Below it found falls to 0.90, then 0.82; one in a thousand untouched photos is below 0.17."""
    most_yaw: float = 0.7
    """Sine of the turn. Up to 0.8 nothing is lost, and beyond there is nearly nothing to measure."""
    most_pitch: float = 0.7
    """Sine of the nod. Beyond 0.6 found is 0.96; one in a hundred untouched photos is beyond 0.62."""
    most_roll_deg: float = MOST_TURN_DEG
    """Beyond it a crop is not turned upright."""
    least_brightness: float = 20
    """Mean grey level. From 12 up nothing is lost, below 8 everything; untouched photos have 66 or more."""
    most_brightness: float = 208
    """Mean grey level. From here up found is 0.77 and less; untouched photos have 187 at most."""
    least_contrast: float = 24
    """Grey levels between the face's darkest and brightest twentieth. Below found is 0.80 and less, above it 1.00."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """What the similarities of one embedder mean."""

    strangers: tuple[tuple[float, float], ...]
    """Which similarity so small a share of pairs of different persons reaches: (share, similarity), falling shares."""
    duplicate: float
    """From here up two photos are one, saved or cut anew."""
    unlike: float
    """Hardly a photo is less like the best of the person's others."""

    def collision(self, identities: int) -> float:
        """Return the similarity that a stranger's photo reaches with a chance of 1 % among so many identities.

        Among few it is that of one pair in a thousand; among more than the pairs measured can tell, that of the last.
        """
        shares, similarities = zip(*self.strangers, strict=True)
        share = min(1e-3, 0.01 / max(1, identities))
        return float(np.interp(-math.log(share), [-math.log(each) for each in shares], similarities))

    @property
    def alarm(self) -> float:
        """The similarity that one pair of strangers in 100,000 reaches: a list's threshold unless one is given."""
        return dict(self.strangers)[1e-5]


EMBEDDER = "embedder"
"""The one that ships: what a new gallery's templates are made with, unless somebody says otherwise."""
BOUNDS = Bounds()
LIKENESS = {
    # 454,581 pairs of strangers; the last share, of half a pair, continues the line of the others. A photo saved anew
    # keeps 0.98 in 99 of 100 cases, cut anew 0.97 in 90; two of one sitting reach 0.95 (London set). Of other photos
    # 5 in 1,000 are less than 0.31 like the best of the person's others; so are 998 in 1,000 pairs of strangers.
    "face-reidentification-retail-0095": Likeness(
        strangers=((1e-3, 0.34), (1e-4, 0.42), (1e-5, 0.48), (1e-6, 0.53)), duplicate=0.97, unlike=0.3
    ),
    # 856,600 pairs of strangers that nothing is trained on. A photo saved anew keeps 0.99, cut anew 0.95 in 90 of 100
    # cases, and other photos of a person reach 0.97 in 1 of 1,000. Of them 5 in 1,000 are less than 0.14 like the best.
    EMBEDDER: Likeness(strangers=((1e-3, 0.66), (1e-4, 0.75), (1e-5, 0.81), (1e-6, 0.83)), duplicate=0.98, unlike=0.14),
}
"""By the name on the embedder's card."""
LIKENESS_OF_OTHERS = LIKENESS["face-reidentification-retail-0095"]
"""For embedders that nobody has measured."""


def likeness_of(embedder: str) -> Likeness:
    """Return what the similarities of an embedder mean, by the name on its card."""
    return LIKENESS.get(embedder, LIKENESS_OF_OTHERS)


# What comes out.


@dataclass(frozen=True, slots=True)
class Refusal:
    """One thing that is wrong with a photo."""

    check: str
    """Its name: what the gallery and the audit log keep where an operator let it through."""
    reason: str
    """One sentence, with the figure and its bound."""
    figure: float
    bound: float


@dataclass(frozen=True, slots=True)
class Face:
    """The face of a photo, as far as it is judged."""

    path: Path
    sha256: str
    """Of the photo's file."""
    box: np.ndarray
    """(4,) float32 in pixels of the photo."""
    landmarks: np.ndarray
    """(5, 2) float32 in pixels of the photo."""
    quality: dict[str, float]
    embedding: np.ndarray
    """(d,) float32, of unit length: of the crop that the gallery keeps."""
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody to be enrolled."""

    name: str
    photos: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """A photo that was not enrolled."""

    path: Path
    refusals: tuple[Refusal, ...]
    """Empty where nothing can let it through."""
    line: str
    """The path and all that is wrong, in one line."""


@dataclass(frozen=True, slots=True)
class Enrolled:
    """Somebody who was enrolled, or got more photos."""

    identity: str
    name: str
    new: bool
    photos: tuple[tuple[str, Face], ...]
    """With their ids."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one call."""

    enrolled: tuple[Enrolled, ...]
    refused: tuple[Refused, ...]
    made_key: Path | None = None
    """Where the key lies that was made."""

    def lines(self) -> list[str]:
        """Return what to tell of those who were enrolled."""
        return [
            f"{each.identity}  {each.name}: {_counted(len(each.photos))} {'enrolled' if each.new else 'added'}"
            for each in self.enrolled
        ]

    def as_json(self) -> dict[str, object]:
        """Return all of it for programs."""
        return {
            "enrolled": [
                {
                    "identity": each.identity, "name": each.name, "new": each.new,
                    "photos": [_face_json(photo, face) for photo, face in each.photos],
                }
                for each in self.enrolled
            ],
            "refused": [
                {
                    "path": str(each.path), "line": each.line, "can_be_forced": bool(each.refusals),
                    "refusals": [asdict(refusal) for refusal in each.refusals],
                }
                for each in self.refused
            ],
        }  # fmt: skip


# The gate.


class Gate:
    """Looks at one photo: is there one face in it, and is it good enough to be recognised by."""

    def __init__(self, detector: FaceDetector, embedder: FaceEmbedder, bounds: Bounds = BOUNDS) -> None:
        self.embedder = embedder
        self._detector = detector
        self._bounds = bounds

    @property
    def likeness(self) -> Likeness:
        """What the embedder's similarities mean."""
        return likeness_of(self.embedder.engine.card.name)

    def examine(self, path: Path) -> Face:
        """Return the face of a photo with what is wrong with it. Raises PhotoError where there is none to be had."""
        content = photos.read_bytes(path)
        photo = photos.decode_image(content, str(path))
        found = self._detector.detect([photo])[0]
        found = found[found.scores >= self._detector.threshold]
        if not len(found):
            raise PhotoError(f"{path}: no face found")
        first = int(np.argmax(found.boxes[:, 3] - found.boxes[:, 1]))
        box, landmarks = found.boxes[first], found.landmarks[first]
        quality = measure(photo, box, landmarks)
        refusals = [*_refuse_faces(found, first, self._bounds), *_refuse_quality(quality, self._bounds)]
        embedding = self.embedder.embed([cut_face(photo, box, landmarks)])[0]
        return Face(path, hashlib.sha256(content).hexdigest(), box, landmarks, quality, embedding, tuple(refusals))


def measure(photo: np.ndarray, box: np.ndarray, landmarks: np.ndarray) -> dict[str, float]:
    """Return the quality of a face in a photo: named numbers, those of the wire and what else is asked of a photo.

    Sharpness and light are those of the face as an embedder sees it, _SEEN_PX high, so that a soft photo of a large
    face is not held against it.
    """
    part, inner = _seen(photo, box)
    grey = cv2.cvtColor(_inside(part, inner), cv2.COLOR_BGR2GRAY)
    dark, bright = np.percentile(grey, (5, 95)) if grey.size else (0, 0)
    quality = measure_quality(photo, box, landmarks)
    return {
        "face_height_px": quality.face_height_px,
        "eye_distance_px": quality.eye_distance_px,
        "inside": _share_inside(photo, landmarks),
        "sharpness": measure_sharpness(part, inner),
        "noise": quality.noise,
        "blockiness": quality.blockiness,
        "yaw": quality.yaw,
        "pitch": measure_pitch(landmarks),
        "roll_deg": quality.roll_deg,
        "brightness": float(grey.mean()) if grey.size else 0.0,
        "contrast": float(bright - dark),
    }


def measure_pitch(landmarks: np.ndarray) -> float:
    """Return about the sine of the head's nod: 0 level, positive down.

    It is told by how far the nose is on the way from the eyes to the mouth; faces differ by ±0.2 in that.
    """
    eyes, mouth = landmarks[:2].mean(0), landmarks[3:].mean(0)
    down = (mouth - eyes).astype(np.float64)
    length = float(down @ down)
    if length == 0:
        return 0.0
    tangent = (float((landmarks[2] - eyes) @ down) / length - _NOSE_LEVEL) / _NOSE_DEPTH
    return tangent / math.hypot(1, tangent)


def cut_face(photo: np.ndarray, box: np.ndarray, landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the crop that the gallery keeps, at most MOST_CROP_PX wide, and the landmarks in its pixels."""
    crop, transform = cut_crop(photo, box, landmarks)
    points = transform_points(transform, landmarks)
    side = crop.shape[0]
    if side <= MOST_CROP_PX:
        return crop, points
    shrunk = cv2.resize(crop, (MOST_CROP_PX, MOST_CROP_PX), interpolation=cv2.INTER_AREA)
    return shrunk, np.asarray((points + 0.5) * (MOST_CROP_PX / side) - 0.5, np.float32)


def judge(
    faces: Sequence[Face], own: np.ndarray, strangers: Sequence[tuple[float, str]], likeness: Likeness, *,
    identities: int,
) -> list[Face]:  # fmt: skip
    """Return one person's faces with what is wrong with them beside others.

    `own` (n, d): the templates that the person has already. `strangers`: for each face the greatest similarity to
    somebody else, -1 where there is nobody, and who that is; `identities` are there to be mistaken for. That the photos
    of a call are alike does not tell them from somebody else's: only what is enrolled already does.
    """
    new = np.array([face.embedding for face in faces])
    to_own, to_each_other = new @ own.T.reshape(new.shape[1], -1), new @ new.T
    judged: list[Face] = []
    for index, face in enumerate(faces):
        first_ones = [other for other in range(index) if not judged[other].refusals]
        enrolled = float(to_own[index].max(initial=-1)) if to_own.size else None
        others = np.concatenate([to_own[index], np.delete(to_each_other[index], index)])
        earlier = np.concatenate([to_own[index], to_each_other[index, first_ones]])
        refusals = [
            *_refuse_duplicate(float(earlier.max()) if earlier.size else None, likeness.duplicate),
            *_refuse_unlike(float(others.max()) if others.size else None, likeness.unlike),
            *_refuse_collision(enrolled, strangers[index], likeness.collision(identities)),
        ]
        judged.append(replace(face, refusals=(*face.refusals, *refusals)))
    return judged


def _refuse_faces(found: Detections, first: int, bounds: Bounds) -> Iterable[Refusal]:
    box = found.boxes[first]
    side = CROP_FACTOR * float(np.max(box[2:] - box[:2]))
    middle = (box[:2] + box[2:]) / 2
    crop = np.concatenate([middle - side / 2, middle + side / 2])
    height = float(box[3] - box[1])
    rivals = [
        other
        for index, other in enumerate(found.boxes)
        if index != first and not (_apart(other, crop) and other[3] - other[1] < bounds.bystander_height * height)
    ]
    if rivals:
        yield Refusal(
            "faces",
            f"{len(rivals) + 1} faces; a photo shows 1 person, and others at most small in the background "
            "(if forced, the largest is taken)",
            len(rivals) + 1, 1,
        )  # fmt: skip


def _refuse_quality(quality: dict[str, float], bounds: Bounds) -> Iterable[Refusal]:
    inside, eyes, sharpness = quality["inside"], quality["eye_distance_px"], quality["sharpness"]
    yaw, pitch, roll = (abs(quality[name]) for name in ("yaw", "pitch", "roll_deg"))
    brightness, contrast = quality["brightness"], quality["contrast"]
    checks = [
        (inside < bounds.least_inside, "cut", inside, bounds.least_inside,
         f"cut off by the edge: {inside:.0%} of the face is in the photo, at least {bounds.least_inside:.0%}"),
        (eyes < bounds.least_eye_distance_px, "size", eyes, bounds.least_eye_distance_px,
         f"too small: {eyes:.0f} px between the eyes, at least {bounds.least_eye_distance_px:.0f}"),
        (sharpness < bounds.least_sharpness, "sharpness", sharpness, bounds.least_sharpness,
         f"blurred: sharpness {sharpness:.2f}, at least {bounds.least_sharpness:.2f}"),
        (yaw > bounds.most_yaw, "pose", yaw, bounds.most_yaw,
         f"turned aside: by {_degrees(yaw):.0f}°, at most {_degrees(bounds.most_yaw):.0f}°"),
        (pitch > bounds.most_pitch, "pose", pitch, bounds.most_pitch,
         f"looks up or down: by {_degrees(pitch):.0f}°, at most {_degrees(bounds.most_pitch):.0f}°"),
        (roll > bounds.most_roll_deg, "pose", roll, bounds.most_roll_deg,
         f"lies on its side: turned by {roll:.0f}°, at most {bounds.most_roll_deg:.0f}°"),
        (brightness < bounds.least_brightness, "exposure", brightness, bounds.least_brightness,
         f"too dark: mean grey level {brightness:.0f} of 255, at least {bounds.least_brightness:.0f}"),
        (brightness > bounds.most_brightness, "exposure", brightness, bounds.most_brightness,
         f"too bright: mean grey level {brightness:.0f} of 255, at most {bounds.most_brightness:.0f}"),
        (contrast < bounds.least_contrast, "exposure", contrast, bounds.least_contrast,
         f"too little contrast: {contrast:.0f} of 255 grey levels, at least {bounds.least_contrast:.0f}"),
    ]  # fmt: skip
    return (Refusal(check, reason, figure, bound) for wrong, check, figure, bound, reason in checks if wrong)


def _refuse_duplicate(nearest: float | None, bound: float) -> Iterable[Refusal]:
    if nearest is not None and nearest >= bound:
        reason = f"all but the same photo as another of this person: similarity {nearest:.3f}, below {bound:.3f}"
        yield Refusal("duplicate", reason, nearest, bound)


def _refuse_unlike(within: float | None, bound: float) -> Iterable[Refusal]:
    if within is not None and within < bound:
        reason = f"unlike all other photos of this person: similarity at most {within:.2f}, at least {bound:.2f}"
        yield Refusal("unlike", reason, within, bound)


def _refuse_collision(within: float | None, stranger: tuple[float, str], bound: float) -> Iterable[Refusal]:
    similarity, who = stranger
    if similarity < bound or (within is not None and within > similarity):
        return
    beside = "" if within is None else f" and {within:.2f} to the person's own photos"
    reason = f"looks like somebody else: similarity {similarity:.2f} to {who}{beside}, below {bound:.2f}"
    yield Refusal("collision", reason, similarity, bound)


def _seen(photo: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the square round a face, as far as it is in the photo, at most _SEEN_PX of face high; the box in it."""
    half = CROP_FACTOR * float(np.max(box[2:] - box[:2])) / 2
    middle = (box[:2] + box[2:]) / 2
    square = np.concatenate([middle - half, middle + half])
    left, top, right, bottom = _clipped(photo, square)
    part, inner = photo[top:bottom, left:right], box - np.array([left, top, left, top])
    scale = _SEEN_PX / float(box[3] - box[1])
    if scale >= 1 or not part.size:
        return part, inner
    height, width = part.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    ratio = np.array(size) / (width, height)
    return cv2.resize(part, size, interpolation=cv2.INTER_AREA), inner * np.tile(ratio, 2)


def _inside(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    left, top, right, bottom = _clipped(image, box)
    return image[top:bottom, left:right]


def _clipped(image: np.ndarray, box: np.ndarray) -> list[int]:
    height, width = image.shape[:2]
    return [int(side) for side in np.clip(np.rint(box), 0, (width, height, width, height))]


def _share_inside(photo: np.ndarray, landmarks: np.ndarray) -> float:
    """Return how much of the oval of the face is in the photo: a detector's box ends where the photo does."""
    height, width = photo.shape[:2]
    oval = transform_points(similarity(UPRIGHT, landmarks), _OVAL)
    return float(((oval > -0.5) & (oval < (width - 0.5, height - 0.5))).all(1).mean())


def _apart(one: np.ndarray, other: np.ndarray) -> bool:
    return bool((one[2:] <= other[:2]).any() or (other[2:] <= one[:2]).any())


def _degrees(sine: float) -> float:
    return math.degrees(math.asin(min(1.0, sine)))


# The work.


def gather(name: str | None, inputs: Sequence[Path], folder: Path | None) -> list[Person]:
    """Return one person with photos, or the persons of a folder with a folder of photos for each, named as they are.

    Raises EnrolmentError for both or neither, for what is missing or holds no photo, and for names that are none.
    """
    if folder is not None and name is None:
        return _people_in(folder)
    if folder is not None or name is None or not inputs:
        raise EnrolmentError("give NAME and PHOTO..., or --folder DIR")
    return [Person(clean_name(name), _photos_of(inputs))]


def _photos_of(inputs: Sequence[Path]) -> tuple[Path, ...]:
    mistakes, found = [], []
    for path in inputs:
        inside = _listed(path, lambda each: each.suffix.lower() in _PHOTO_SUFFIXES) if path.is_dir() else [path]
        found += inside
        if not inside:
            mistakes.append(f"{path}: no photo in this folder")
        elif not path.exists():
            mistakes.append(f"{path}: no such file or folder")
    if mistakes:
        raise EnrolmentError("\n".join(mistakes))
    return tuple(found)


def _people_in(folder: Path) -> list[Person]:
    if not folder.is_dir():
        raise EnrolmentError(f"--folder {folder}: no such folder")
    people, mistakes = [], []
    for each in _listed(folder, Path.is_dir):
        try:
            people.append(Person(clean_name(each.name), _photos_of([each])))
        except EnrolmentError as exc:
            mistakes.append(str(exc))
    names = Counter(person.name for person in people)
    mistakes += [f"--folder {folder}: {count} folders are named alike" for count in names.values() if count > 1]
    if not people and not mistakes:
        mistakes.append(f"--folder {folder}: no folder of a person in it")
    if mistakes:
        raise EnrolmentError("\n".join(mistakes))
    return people


def _listed(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and wanted(path))
    except OSError as exc:
        raise EnrolmentError(f"{folder}: {exc.strerror}") from exc


def clean_name(name: str) -> str:
    """Return a name as the gallery keeps it: one way to write accents, no space round it. Raises EnrolmentError."""
    name = unicodedata.normalize("NFC", name).strip()
    if not 0 < len(name) <= _MOST_NAME or any(unicodedata.category(each) in _UNPRINTED for each in name):
        raise EnrolmentError(f"a name has 1 to {_MOST_NAME} characters, all of them printable")
    return name


def list_details(watch_list: WatchList, changed: Sequence[str]) -> Details:
    """Return what the audit log says of a list that was changed: which of its fields, and the figures as they are."""
    ends = watch_list.expires_at
    return {
        "changed": changed, "threshold": watch_list.threshold, "priority": watch_list.priority,
        "expires_at": ends.isoformat() if ends else "never",
    }  # fmt: skip


def default_gallery() -> Path:
    """Return the folder of the gallery unless somebody says otherwise: the user's own for data."""
    return platformdirs.user_data_path("streamer") / "gallery"


def is_gallery(folder: Path) -> bool:
    """Tell whether there is a gallery in a folder."""
    return (folder / "gallery.db").exists()


class Desk:
    """An open gallery with its audit log: what is done to it here is in the log before it is done."""

    def __init__(self, folder: Path, vault: Vault, *, create: bool = False) -> None:
        """Raise GalleryError as `Gallery.open` does."""
        self.gallery = Gallery.open(folder, vault, create=create)
        self.log = AuditLog(folder / "audit.jsonl", vault)
        self._vault = vault

    @classmethod
    def open(cls, folder: Path) -> Desk:
        """Open the gallery in a folder with its key. Raises GalleryError or VaultError."""
        if not is_gallery(folder):
            raise GalleryError(f"no gallery in {folder}: the first `streamer enrol` makes one")
        return cls(folder, load_key())

    @classmethod
    def open_or_make(cls, folder: Path) -> tuple[Desk, Path | None]:
        """Open the gallery in a folder, or make it; return also the place of its key where that was made too.

        Raises GalleryError, VaultError, and EnrolmentError where the key would lie in the folder that it locks.
        """
        if is_gallery(folder):
            return cls.open(folder), None
        place = key_file()
        if KEY_VARIABLE in os.environ or place.exists():
            return cls(folder, load_key(), create=True), None
        if place.resolve().is_relative_to(folder.resolve()):
            raise EnrolmentError(f"{place} lies in the gallery's folder: a key is kept apart from what it locks")
        return cls(folder, new_key(place), create=True), place

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *_: object) -> None:
        self.gallery.close()

    def evidence(self, *, keep_days: float) -> EvidenceStore:
        """Return what is kept of the gallery's matches."""
        return EvidenceStore(self.gallery.folder / "evidence", self._vault, keep_days=keep_days)

    def remove(self, identity: Identity, *, who: str) -> None:
        """Remove somebody for good."""
        with self.gallery.change(who) as change:
            change.remove_identity(identity.id)
            self.log.append(who, "identity.removed", [identity.id], {"photos": len(identity.photos)})

    def remove_photo(self, identity: Identity, photo: str, *, who: str) -> None:
        """Remove a photo of somebody for good. Raises EnrolmentError for another's, and for the only one."""
        with self.gallery.change(who) as change:
            there = self.gallery.identity(identity.id).photos  # now, whatever was removed meanwhile
            if photo not in there:
                raise EnrolmentError(f"identity {identity.id} has no photo {photo}")
            if len(there) == 1:
                raise EnrolmentError(f"photo {photo} is the only one of identity {identity.id}: remove the person")
            change.remove_photo(photo)
            self.log.append(who, "photo.removed", [identity.id, photo])

    def embed(
        self, embedder: FaceEmbedder, source: str, *, who: str, tell: Callable[[float], None] = lambda share: None
    ) -> int:
        """Make the templates of all photos by this embedder; return of how many. From then on they are searched.

        Those of an earlier embedder stay: what it matched can still be explained. `tell` hears which share is done.
        Raises GalleryError, PhotoError, EngineError or AuditError; nothing has changed then.
        """
        sha256 = embedder.engine.sha256
        with self.gallery.change(who) as change:
            ids = [photo for identity in self.gallery.identities() for photo in identity.photos]
            for number, photo in enumerate(map(self.gallery.photo, ids), start=1):
                image = photos.decode_image(photo.image, f"photo {photo.id}")
                change.add_template(photo.id, sha256, embedder.embed([(image, photo.landmarks)])[0])
                tell(number / len(ids))
            change.use_embedder(source, sha256)
            self.log.append(who, "gallery.embedded", (), {"photos": len(ids), "embedder": sha256})
        return len(ids)

    def export(self, path: Path, passphrase: str, *, who: str) -> int:
        """Write everything to one file; return how many persons. Raises GalleryError, VaultError or AuditError."""
        self.log.append(who, "gallery.export-begun")  # killed half way, a copy of everybody may be out all the same
        count = self.gallery.export(path, passphrase)
        self.log.append(who, "gallery.exported", (), {"identities": count})
        return count

    def import_(self, path: Path, passphrase: str, *, who: str) -> int:
        """Add everything that a file holds; return how many persons. Raises as `export` does."""
        before = {identity.id for identity in self.gallery.identities()}
        self.log.append(who, "gallery.import-begun")
        count = self.gallery.import_(path, passphrase, who=who)
        added = [identity.id for identity in self.gallery.identities() if identity.id not in before]
        self.log.append(who, "gallery.imported", added, {"identities": count})
        return count


def enrol(
    people: Sequence[Person],
    folder: Path,
    load_gate: Callable[[str], Gate],
    *,
    who: str,
    embedder: str | None = None,
    wish: ListWish | None = None,
    force: bool = False,
    keep_going: bool = False,
    tell: Callable[[Person, Path], None] = lambda person, path: None,
) -> Outcome:
    """Judge the photos of some people and write them to the gallery in a folder: all, or nothing where one is refused.

    With `keep_going` those that pass are written. Where there is no gallery, it and its key are made as soon as there
    is something to write. `who` is the operator, `embedder` what the gallery's templates are made with, by default
    what it knows; `load_gate` is given it. `force` lets refusals through. `tell` hears of each photo as it begins.
    Raises EnrolmentError, GalleryError, VaultError or AuditError, and what `load_gate` raises.
    """
    with ExitStack() as stack:
        desk = stack.enter_context(Desk.open(folder)) if is_gallery(folder) else None
        gallery = desk.gallery if desk else None
        source = embedder_of(gallery, embedder)
        if wish:
            wish.check(gallery)
        gate = load_gate(source)
        _refuse_other_embedder(gallery, gate, source)
        call = _Call(gate, gallery, force=force)
        passed, refused = call.judge(people, tell)
        if not passed or (refused and not keep_going):
            return Outcome((), tuple(refused))
        made_key = None
        if desk is None:
            desk, made_key = Desk.open_or_make(folder)
            stack.enter_context(desk)
        enrolled = call.write(passed, desk, who=who, embedder=source, wish=wish)
        return Outcome(tuple(enrolled), tuple(refused), made_key)


@dataclass(frozen=True, slots=True)
class ListWish:
    """The watch list that people are put on, and what it is like should it have to be made."""

    name: str
    purpose: str | None = None
    legal_basis: str | None = None
    threshold: float | None = None

    @classmethod
    def of(
        cls, name: str | None, *, purpose: str | None, legal_basis: str | None, threshold: float | None
    ) -> ListWish | None:
        """Return what is asked for, None where it is no list. Raises EnrolmentError for properties of none."""
        if name is None and {purpose, legal_basis, threshold} != {None}:
            raise EnrolmentError("--purpose, --legal-basis and --threshold are a list's: give --list")
        return None if name is None else cls(clean_name(name), purpose, legal_basis, threshold)

    def check(self, gallery: Gallery | None) -> None:
        """Raise EnrolmentError where the list is neither there nor can be made."""
        there = gallery is not None and any(each.name == self.name for each in gallery.lists())
        given = {self.purpose, self.legal_basis, self.threshold} != {None}
        if there and given:
            raise EnrolmentError("--list: it is there already; `streamer watchlist set` changes it")
        if not there and not (self.purpose and self.legal_basis):
            raise EnrolmentError("--list: there is none of this name; --purpose and --legal-basis make it")


def identity_json(identity: Identity, photos_of: Sequence[Photo] | None = None) -> dict[str, object]:
    """Return a person for programs, with the photos' quality where they are given."""
    fields: dict[str, object] = {
        "id": identity.id, "name": identity.name, "lists": identity.lists, "added_at": identity.added_at.isoformat(),
        "photos": identity.photos,
    }  # fmt: skip
    if photos_of is not None:
        fields["photos"] = [
            {"id": photo.id, "added_at": photo.added_at.isoformat(), "quality": photo.quality, "forced": photo.forced}
            for photo in photos_of
        ]
    return fields


def photo_line(photo: Photo) -> str:
    """Return what to tell of an enrolled photo."""
    quality = photo.quality
    forced = f"; forced in spite of: {', '.join(photo.forced)}" if photo.forced else ""
    return (
        f"{photo.id}  {photo.added_at:%Y-%m-%d}  eyes {quality['eye_distance_px']:.0f} px apart, "
        f"sharpness {quality['sharpness']:.2f}, turned {math.degrees(math.asin(quality['yaw'])):+.0f}°{forced}"
    )


def save_photo(photo: Photo, folder: Path) -> None:
    """Write an enrolled crop. Raises EnrolmentError."""
    suffix = "png" if photo.image.startswith(b"\x89PNG") else "jpg"
    path = folder / f"{photo.id}.{suffix}"
    try:
        path.write_bytes(photo.image)
    except OSError as exc:
        raise EnrolmentError(f"--save {path}: {exc.strerror}") from exc


def embedder_of(gallery: Gallery | None, named: str | None) -> str:
    """Return what a gallery is embedded by: what is named, else what it knows, else the one that ships."""
    known = gallery.embedder() if gallery else None
    if named is None:
        return known[0] if known else EMBEDDER
    path = Path(named).expanduser()
    return str(path.resolve()) if path.is_file() else named  # the next call may come from another folder


def _refuse_other_embedder(gallery: Gallery | None, gate: Gate, source: str) -> None:
    known = gallery.embedder() if gallery else None
    sha256 = gate.embedder.engine.sha256
    if known and known[1] != sha256:
        raise EnrolmentError(
            f"--embedder {source} (sha256 {sha256[:12]}) is not what this gallery's templates were made with: "
            f"{known[0]} (sha256 {known[1][:12]}); templates of two embedders cannot be compared: "
            "`streamer gallery embed` makes all anew"
        )


class _Call:
    """The photos of one call beside a gallery."""

    def __init__(self, gate: Gate, gallery: Gallery | None, *, force: bool) -> None:
        self._gate = gate
        self._force = force
        self._gallery = gallery
        self._version = gallery.version() if gallery else 0
        self._ids: dict[str, list[str]] = {}
        for identity in gallery.identities() if gallery else ():
            self._ids.setdefault(identity.name, []).append(identity.id)
        # as if no list had ever expired: who was on it is still somebody else
        long_ago = datetime.min.replace(tzinfo=UTC)
        self._snapshot = gallery.snapshot(gate.embedder.engine.sha256, now=long_ago) if gallery else None

    def judge(
        self, people: Sequence[Person], tell: Callable[[Person, Path], None]
    ) -> tuple[list[tuple[Person, list[Face]]], list[Refused]]:
        """Return by person the faces that pass, and the photos that do not."""
        for person in people:
            self._identity_of(person)  # before the work
        refused: list[Refused] = []
        examined = [(person, list(self._examine(person, refused, tell))) for person in people]
        everybody = [face for _, faces in examined for face in faces]
        if not everybody:
            return [], refused
        embeddings = np.array([face.embedding for face in everybody])
        passed, first = [], 0
        for person, faces in examined:
            strangers = self._enrolled_strangers(person, faces)
            beside = embeddings[first : first + len(faces)] @ embeddings.T
            beside[:, first : first + len(faces)] = -1  # the person's own
            for index, nearest in enumerate(beside.argmax(1) if len(everybody) > len(faces) else ()):
                strangers[index] = max(strangers[index], (float(beside[index, nearest]), str(everybody[nearest].path)))
            first += len(faces)
            judged = self._judge(person, faces, strangers, len(people))
            passed.append((person, [face for face in judged if self._force or not face.refusals]))
            refused += [_refused(face) for face in judged if face.refusals and not self._force]
        return [(person, faces) for person, faces in passed if faces], refused

    def write(
        self, passed: Sequence[tuple[Person, Sequence[Face]]], desk: Desk, *, who: str, embedder: str,
        wish: ListWish | None,
    ) -> list[Enrolled]:  # fmt: skip
        """Write all of it and log it, or nothing."""
        with desk.gallery.change(who) as change:
            if desk.gallery.version() != self._version:
                raise EnrolmentError("the gallery was changed by somebody else meanwhile: nothing was enrolled")
            change.use_embedder(embedder, self._gate.embedder.engine.sha256)
            if wish and wish.purpose and wish.legal_basis:
                threshold = self._gate.likeness.alarm if wish.threshold is None else wish.threshold
                made = WatchList(wish.name, wish.purpose, wish.legal_basis, threshold)
                desk.log.append(who, "list.changed", [change.put_list(made)], list_details(made, ["made"]))
            enrolled = [self._write_person(change, person, faces, wish) for person, faces in passed]
            for each in enrolled:
                forced = [f"{photo}:{check}" for photo, face in each.photos for check in _forced(face)]
                subjects = [each.identity, *(photo for photo, _ in each.photos)]
                what = "identity.enrolled" if each.new else "photos.enrolled"
                desk.log.append(who, what, subjects, {"forced": forced})
            if wish:
                lists = [each.id for each in desk.gallery.lists() if each.name == wish.name]
                desk.log.append(who, "list.joined", [*lists, *(each.identity for each in enrolled)])
        return enrolled

    def _identity_of(self, person: Person) -> str | None:
        ids = self._ids.get(person.name, [])
        if len(ids) > 1:
            raise EnrolmentError(f"{len(ids)} persons in the gallery have this name: which is meant cannot be told")
        return ids[0] if ids else None

    def _examine(self, person: Person, refused: list[Refused], tell: Callable[[Person, Path], None]) -> Iterator[Face]:
        for path in person.photos:
            tell(person, path)
            try:
                yield self._gate.examine(path)
            except PhotoError as exc:
                refused.append(Refused(path, (), str(exc)))

    def _enrolled_strangers(self, person: Person, faces: Sequence[Face]) -> list[tuple[float, str]]:
        """Return for each face the greatest similarity to somebody else who is enrolled, and who that is."""
        nobody = -1.0, ""
        if self._snapshot is None or not faces:
            return [nobody] * len(faces)
        identity = self._identity_of(person)
        strangers = []
        for found in self._snapshot.search(np.array([face.embedding for face in faces]), top=2):
            others = [(each.similarity, f"identity {each.identity}") for each in found if each.identity != identity]
            strangers.append(max(others, default=nobody))
        return strangers

    def _judge(self, person: Person, faces: list[Face], strangers: list[tuple[float, str]], people: int) -> list[Face]:
        if not faces:
            return []
        identity = self._identity_of(person)
        own = self._templates_of(identity) if identity else np.empty((0, len(faces[0].embedding)), np.float32)
        identities = people + sum(map(len, self._ids.values())) - (2 if identity else 1)
        return judge(faces, own, strangers, self._gate.likeness, identities=identities)

    def _templates_of(self, identity: str) -> np.ndarray:
        assert self._gallery is not None
        enrolled = map(self._gallery.photo, self._gallery.identity(identity).photos)
        sha256 = self._gate.embedder.engine.sha256
        templates = [photo.templates[sha256] for photo in enrolled if sha256 in photo.templates]
        return np.array(templates, np.float32)

    def _write_person(self, change: Change, person: Person, faces: Sequence[Face], wish: ListWish | None) -> Enrolled:
        known = self._identity_of(person)
        identity = known or change.add_identity(person.name)
        if wish:
            change.join(identity, wish.name)
        written = []
        for face in faces:
            image, landmarks = _cut_again(face)
            photo = change.add_photo(
                identity, cv2.imencode(".png", image)[1].tobytes(), landmarks, quality=face.quality,
                forced=_forced(face),
            )  # fmt: skip
            change.add_template(photo, self._gate.embedder.engine.sha256, face.embedding)
            written.append((photo, face))
        return Enrolled(identity, person.name, known is None, tuple(written))


def _refused(face: Face) -> Refused:
    reasons = "; ".join(refusal.reason for refusal in face.refusals)
    return Refused(face.path, face.refusals, f"{face.path}: {reasons}")


def _cut_again(face: Face) -> tuple[np.ndarray, np.ndarray]:
    """Return the crop of a face and its landmarks in it: crops of thousands of photos would fill the memory."""
    content = photos.read_bytes(face.path)
    if hashlib.sha256(content).hexdigest() != face.sha256:
        raise PhotoError(f"{face.path}: changed while it was looked at; nothing was enrolled")
    return cut_face(photos.decode_image(content, str(face.path)), face.box, face.landmarks)


def _face_json(photo: str, face: Face) -> dict[str, object]:
    return {
        "id": photo, "path": str(face.path), "sha256": face.sha256, "quality": face.quality,
        "forced": _forced(face),
    }  # fmt: skip


def _forced(face: Face) -> list[str]:
    return sorted({refusal.check for refusal in face.refusals})


def _counted(photos_of: int) -> str:
    return f"{photos_of} photo{'s' * (photos_of != 1)}"
