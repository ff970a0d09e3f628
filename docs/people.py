"""People of the data pack: their photos as samples, and who of them is kept for the 1:N test alone."""

from __future__ import annotations

import csv
import hashlib
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import cv2
import numpy as np

from streamer.probes import Sample

HELD_OUT = 1000


def load_samples(data: Path, name: str, only: Collection[str] | None = None) -> list[Sample]:
    """Return the photos of a set, `name`.tar with its CSV, those of one person together and in the order of the files.

    A person is `SET/IDENTITY`, or `SET/FILE` where identities are not known, and a photo `SET/FILE`; `only` those are
    read. Photos of UTKFace are left out: their persons are not known to be different.
    """
    with (data / f"{name}.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("source") != "UTKFace"]
    with tarfile.open(data / f"{name}.tar") as tar:
        samples = [_sample(row, name, tar) for row in rows if only is None or f"{name}/{row['file']}" in only]
    return sorted(samples, key=lambda sample: (sample.person, sample.name))


def calibration_photos(data: Path) -> list[str]:
    """Return the photos, `SET/FILE`, that nothing is trained on."""
    lines = (data / "calibration.txt").read_text().splitlines()
    return ["/".join(line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]


def held_out(data: Path) -> frozenset[str]:
    """Return the 1,000 persons of calibration.txt on whom nothing is fitted either: non-mates of the 1:N test.

    They are chosen by the sha256 of their names among those of one photo, of faces_unlabelled first, then of lfw_train:
    everybody with two photos is left to fit on.
    """
    photos = Counter(_person(photo) for photo in calibration_photos(data))
    ones = [person for person, count in photos.items() if count == 1]
    ones.sort(key=lambda person: (person.startswith("lfw_train/"), hashlib.sha256(person.encode()).hexdigest()))
    return frozenset(ones[:HELD_OUT])


def load_people(data: Path) -> Iterator[Sample]:
    """Yield whom scores are fitted on: faces_val, and of calibration.txt those who are not held out."""
    left_out = held_out(data)
    only = {photo for photo in calibration_photos(data) if _person(photo) not in left_out}
    for name in ("faces_val", "lfw_train", "faces_unlabelled"):
        yield from load_samples(data, name, None if name == "faces_val" else only)


def load_held_out(data: Path) -> list[Sample]:
    """Return the photos of those whom `held_out` names, one each."""
    persons = held_out(data)
    only = {photo for photo in calibration_photos(data) if _person(photo) in persons}
    names = sorted({photo.partition("/")[0] for photo in only})
    return [sample for name in names for sample in load_samples(data, name, only)]


def _person(photo: str) -> str:
    """Return whose photo `SET/FILE` is: in sets with identities the file lies in a folder of that name."""
    return photo.rpartition("/")[0] if photo.count("/") > 1 else photo


def _sample(row: dict[str, str], name: str, tar: tarfile.TarFile) -> Sample:
    stored = tar.extractfile(row["file"])
    assert stored is not None
    image = cv2.imdecode(np.frombuffer(stored.read(), np.uint8), cv2.IMREAD_COLOR_BGR)
    box = [float(row[f"face_{side}"]) for side in ("x1", "y1", "x2", "y2")]
    points = [[float(row[f"{point}_{axis}"]) for axis in "xy"] for point in ("le", "re", "nose", "lm", "rm")]
    photo = f"{name}/{row['file']}"
    person = f"{name}/{row['identity']}" if "identity" in row else photo
    return Sample(person, photo, image, np.array(box, np.float32), np.array(points, np.float32))
