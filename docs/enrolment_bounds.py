"""Measures what an enrolment photo must reach: `python docs/enrolment_bounds.py DATA EMBEDDER`.

On people that nothing is trained on: faces_val and calibration.txt of the data. Photos are made worse in one way each;
the figures that the gate takes of them are set beside how often the person's other photos, untouched, are still found
by them, at the similarity that one pair of strangers in a thousand reaches. docs/results/enrolment-EMBEDDER.md tells
it; the bounds that were chosen by it are in streamer/enrolment.py.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from people import calibration_photos, load_samples

from engines.load import load_engine
from engines.store import default_store
from streamer.embedder import FaceEmbedder
from streamer.enrolment import cut_face, measure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/results"
SHARES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SETS = ("faces_val", "lfw_train", "faces_unlabelled")
A_PERSON = 4
"""Photos of one person that are looked at: else a few would stand for all."""
EDGES = {
    "eye_distance_px": (0, 7, 9, 11, 14, 18, 22, 28, 36, 48, 90),
    "sharpness": (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.01),
    "yaw": (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.01),
    "pitch": (-1.01, -0.6, -0.45, -0.3, -0.15, 0, 0.15, 0.3, 0.45, 0.6, 1.01),
    "brightness": (0, 4, 8, 12, 16, 24, 32, 48, 64, 128, 192, 208, 224, 232, 240, 248, 256),
    "contrast": (0, 4, 8, 12, 16, 24, 32, 48, 64, 96, 256),
}
MADE = {
    "eye_distance_px": ("small",), "sharpness": ("blurred",), "yaw": ("clean",), "pitch": ("clean",),
    "brightness": ("dark", "bright"), "contrast": ("flat",),
}  # fmt: skip
"""Which photos tell of which figure."""
SAVED_ANEW = ("jpeg", "resized", "cut anew")

Shot = tuple[np.ndarray, np.ndarray, np.ndarray]
"""An image, and in it a face's box and landmarks."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A photo as it is, or made worse."""

    set: str
    person: str
    file: str
    made: str
    quality: dict[str, float]
    embedding: np.ndarray


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("embedder", help="a name, a path or a URL")
    parser.add_argument("--worse", type=int, default=300, help="photos of each set that are made worse, at most")
    wanted = parser.parse_args()
    cv2.setNumThreads(1)
    engine = load_engine(default_store().find(wanted.embedder, task="embedding"), backend="onnxruntime", threads=1)
    embedder = FaceEmbedder(engine)
    samples = [sample for name in SETS for sample in sample_set(wanted, name, embedder)]
    text = report(samples, engine.card.name, wanted.worse)
    (RESULTS / f"enrolment-{engine.card.name}.md").write_text(text)
    print(text)


def sample_set(wanted: argparse.Namespace, name: str, embedder: FaceEmbedder) -> Iterator[Sample]:
    """Yield the photos of one set, and some of them made worse."""
    rng = random.Random(name)
    only = None if name == "faces_val" else set(calibration_photos(wanted.data))
    people = defaultdict(list)
    for photo in load_samples(wanted.data, name, only):
        people[photo.person].append(photo)
    chosen = [photo for photos in people.values() for photo in photos[:A_PERSON]]
    of_many = [photo.name for photo in chosen if len(people[photo.person]) > 1]
    worse = set(rng.sample(of_many, min(wanted.worse, len(of_many))))
    for photo in chosen:
        shot = photo.image, photo.box, photo.landmarks
        made = versions(shot, rng) if photo.name in worse else {"clean": shot}
        for how, each in made.items():
            embedding = embedder.embed([cut_face(*each)])[0]
            yield Sample(name, photo.person, photo.name, how, measure(*each), embedding)


def versions(shot: Shot, rng: random.Random) -> dict[str, Shot]:
    """Return a photo as it is, made worse in several ways by chance, and saved anew."""
    image, box, landmarks = shot
    height = float(box[3] - box[1])
    grey = image.astype(np.float32)
    blurred = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 6) * height / 150)
    moved = np.random.default_rng(rng.randrange(2**32)).normal(0, 0.01 * height, landmarks.shape)
    return {
        "clean": shot,
        "blurred": (blurred, box, landmarks),
        "small": shrunk(shot, rng.uniform(6, 40) / float(np.linalg.norm(landmarks[1] - landmarks[0]))),
        "dark": (whole(grey * 2 ** rng.uniform(-6, -1)), box, landmarks),
        "bright": (whole(grey * rng.uniform(1.3, 5)), box, landmarks),
        "flat": (whole((grey - grey.mean()) * 2 ** rng.uniform(-6, -1) + rng.uniform(60, 200)), box, landmarks),
        "jpeg": (jpeg(image, 60), box, landmarks),
        "resized": shrunk(shot, 0.7),
        "cut anew": (jpeg(whole(grey * 1.1 + 4), 75), box, (landmarks + moved).astype(np.float32)),
    }


def shrunk(shot: Shot, scale: float) -> Shot:
    """Return a photo made smaller, by area; never larger."""
    image, box, landmarks = shot
    height, width = image.shape[:2]
    size = max(1, round(width * min(1, scale))), max(1, round(height * min(1, scale)))
    ratio = np.array(size) / (width, height)
    corners = (box.reshape(2, 2) + 0.5) * ratio - 0.5
    points = (landmarks + 0.5) * ratio - 0.5
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return small, corners.reshape(4).astype(np.float32), points.astype(np.float32)


def whole(grey: np.ndarray) -> np.ndarray:
    """Return grey levels as a camera would have them: whole, 0 to 255."""
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Return an image as JPEG leaves it."""
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def report(samples: list[Sample], embedder: str, worse: int) -> str:
    """Return the report."""
    clean = [sample for sample in samples if sample.made == "clean"]
    strangers = strangers_of(clean)
    threshold = float(np.quantile(strangers, 1 - 1e-3))
    others = defaultdict(list)
    for sample in clean:
        others[sample.set, sample.person].append(sample)
    lines = [
        f"# What an enrolment photo must reach, by {embedder}",
        "",
        f"`python docs/enrolment_bounds.py DATA {embedder} --worse {worse}` over {len(clean)} photos of {len(others)} "
        "persons that nothing is trained on. Bins of less than 20 pairs are left out. Landmarks are those of the data.",
        f"One pair of strangers in a thousand reaches a similarity of {threshold:.3f}.",
        "",
        f"## Strangers: {len(strangers)} pairs, one photo a person",
        "",
        "| share of pairs | similarity |",
        "|---|---|",
        *(f"| {share:g} | {np.quantile(strangers, 1 - share):.3f} |" for share in SHARES),
        "",
    ]
    for figure, edges in EDGES.items():
        lines += [
            f"## {figure} ({', '.join(MADE[figure])} photos)", "",
            "| from | to | photos | other photos of the person found | mean similarity |", "|---|---|---|---|---|",
        ]  # fmt: skip
        told = [sample for sample in samples if sample.made in MADE[figure]]
        for low, high in pairwise(edges):
            within = [each for each in told if low <= value(each, figure) < high]
            genuine = np.array([like for each in within for like in to_others(each, others)])
            if genuine.size >= 20:
                found = (genuine >= threshold).mean()
                lines.append(f"| {low:g} | {high:g} | {len(within)} | {found:.3f} | {genuine.mean():.3f} |")
        lines.append("")
    lines += ["## Clean photos: the share of them below or above", "", "| figure | 0.1 % | 1 % | 99 % | 99.9 % |"]
    lines.append("|---|---|---|---|---|")
    for figure in EDGES:
        spread = np.quantile([each.quality[figure] for each in clean], (0.001, 0.01, 0.99, 0.999))
        lines.append(f"| {figure} | {' | '.join(f'{each:.2f}' for each in spread)} |")
    best = np.array([max(likes) for each in clean if (likes := to_others(each, others))])
    lines += [
        "",
        "## The best similarity of a photo to the person's others",
        "",
        "| share of photos below | similarity |",
    ]
    lines += ["|---|---|", *(f"| {share:g} | {np.quantile(best, share):.3f} |" for share in (0.001, 0.005, 0.01, 0.02))]
    lines += [f"| {share:g} | {np.quantile(best, share):.3f} |" for share in (0.98, 0.99, 0.995, 0.999)]
    originals = {(each.set, each.file): each for each in clean}
    lines += ["", "## The same photo, saved anew", "", "| how | 0.1 % | 1 % | 10 % | median |", "|---|---|---|---|---|"]
    for how in SAVED_ANEW:
        same = [each.embedding @ originals[each.set, each.file].embedding for each in samples if each.made == how]
        spread = np.quantile(same, (0.001, 0.01, 0.1, 0.5))
        lines.append(f"| {how} | {' | '.join(f'{each:.3f}' for each in spread)} |")
    return "\n".join(lines) + "\n"


def value(sample: Sample, figure: str) -> float:
    """Return a figure; of a turn, how large it is."""
    return abs(sample.quality[figure]) if figure == "yaw" else sample.quality[figure]


def to_others(sample: Sample, others: dict[tuple[str, str], list[Sample]]) -> list[float]:
    """Return how like a photo is to each other photo of the person."""
    return [
        float(sample.embedding @ other.embedding)
        for other in others[sample.set, sample.person]
        if other.file != sample.file
    ]


def strangers_of(clean: list[Sample]) -> np.ndarray:
    """Return the similarities of the first photos of any two persons of a set: the sets may share persons."""
    pairs = []
    for name in sorted({sample.set for sample in clean}):
        firsts = {sample.person: sample.embedding for sample in reversed(clean) if sample.set == name}
        matrix = np.stack(list(firsts.values()))
        pairs.append((matrix @ matrix.T)[np.triu_indices(len(matrix), 1)])
    return np.concatenate(pairs)


if __name__ == "__main__":
    main()
