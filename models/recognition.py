"""Recognition, the figure that counts: `python -m models.recognition configs/evaluate/recognition.yaml`.

Does restoring a face help to recognise it? One side of each pair, the probe, is reduced to a box height of 12 to 32 px
(Pillow's anti-aliased bicubic, then noise, then JPEG) and cut out as the product cuts it; the other side stays clean at
its stored size. True accepts at 1 % false accepts, by two recognisers, for the probe as it is (raw), enlarged by
bicubic, restored, and fused: the unit mean of the embeddings of raw and restored. Landmarks are the truth's. Intervals
redraw people, and with them the threshold. A second part asks what a restorer does to clean crops.
"""

from __future__ import annotations

import argparse
import io
import math
import platform
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import onnxruntime
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from models.dataset import Face, load_faces
from models.judges import (
    REDRAWS,
    FaceEmbedder,
    OnnxRestorer,
    Preparation,
    bicubic,
    interval,
    psnr,
    real_esrgan,
    scaled_landmarks,
)
from models.settings import RelativePath, read_settings

FALSE_ACCEPTS = 0.01
CROP_FACTOR = 1.6
MAX_SIZE = 256  # of a restored crop: what would be larger is not routed to the restorer
_TAIL = 5 * FALSE_ACCEPTS  # of the impostors, enough for the threshold of every redraw
_AIM, _AIM_HEIGHTS, _NO_LOSS_HEIGHTS, _MOST_FALSE_ACCEPTS = 0.04, (16, 24), (32,), 0.015
_LEAST_COSINE, _LEAST_PSNR_GAIN = 0.97, 1.0
_RESTORED_SIDES = {2: (64, 96, 128), 1: (128, 192, 256)}  # crop sides at which x2 and x1 are tried

T = TypeVar("T")


class FaceSet(BaseModel):
    """Faces with their pairs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    truths: RelativePath
    """Faces that nobody trained on: a tar with its CSV."""
    pairs: RelativePath
    """Lines `file_a file_b 1|0`: of one person or of two."""
    mates: int | None = Field(None, ge=1)
    """Only so many pairs of one person: drawn by the seed, every person once before any twice."""
    others: int | None = Field(None, ge=0)
    """Only so many pairs of two. As all combinations count, they bring no more than their people."""


class CleanSet(BaseModel):
    """Clean crops."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    truths: RelativePath
    """Faces that nobody trained on, stored as crops of 1.6 times the box: a tar with its CSV."""
    faces: int = Field(60, ge=1)
    """Only so many, of those that are large enough; every person once before any twice."""
    sides: tuple[int, ...] = (64, 96, 128, 192, 256)
    """Sides of the crops in pixels."""


class ProbeConfig(BaseModel):
    """What an evaluation by degraded probes has, whatever it judges."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    heights: tuple[int, ...] = (12, 16, 24, 32)
    """Heights of the face's box in pixels to which probes are reduced."""
    noise: float = Field(10.0, ge=0)
    """Sigma in grey levels of the Gaussian noise on probes."""
    jpeg: int = Field(40, ge=1, le=100)
    """Quality of the JPEG after it."""
    seed: int = Field(20260, ge=0)
    """Of noise, of the choice of pairs and of the redraws; not one of training's."""
    threads: int = Field(1, ge=1)
    """Of each network."""
    report: RelativePath
    """The Markdown file that is written."""


class RecognitionConfig(ProbeConfig):
    """One evaluation of recognition."""

    restorers: dict[str, RelativePath]
    """Restorers as ONNX with their cards, by the name that the report gives them."""
    real_esrgan: RelativePath | None = None
    """Real-ESRGAN x4 as ONNX, which has no card, to be measured beside them."""
    recognisers: dict[str, RelativePath]
    """Face recognisers as ONNX, by the name that the report gives them."""
    preparations: dict[str, Preparation] = {}
    """How a recogniser wants a face, by its name here; not needed for those that `models.judges` knows by file."""
    sets: dict[str, FaceSet]
    """Faces with their pairs, by the name that the report gives them."""
    clean: CleanSet | None = None
    """Clean crops, which a restorer must not harm."""


@dataclass(frozen=True, slots=True)
class Trials:
    """Whom to compare with whom: pairs of one person, and every probe with every reference of another person."""

    probes: list[Face]
    references: list[Face]
    mates: np.ndarray
    """(m, 2): a probe and a reference of one person, from the list of pairs."""
    probe_people: np.ndarray
    """(p,): number of the person of each probe."""
    reference_people: np.ndarray
    """(r,): number of the person of each reference."""
    impostors: np.ndarray
    """Places in the flattened (p, r) of all combinations of different people."""

    @property
    def people(self) -> int:
        return int(max(self.probe_people.max(), self.reference_people.max())) + 1

    def impostor_weight(self, weights: np.ndarray) -> float:
        """Return how many combinations of different people there are, where each person counts `weights` times."""
        probes = weights * np.bincount(self.probe_people, minlength=self.people)
        references = weights * np.bincount(self.reference_people, minlength=self.people)
        return float(probes.sum() * references.sum() - probes @ references)


@dataclass(frozen=True, slots=True)
class Ranking:
    """What counts of all similarities of one method."""

    mates: np.ndarray
    """(m,)"""
    tail: np.ndarray
    """The highest similarities of impostors, from the highest down."""
    tail_people: np.ndarray
    """(2, tail): the people they belong to."""


@dataclass(frozen=True, slots=True)
class Gain:
    """Of one method over the better of raw and bicubic."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True, slots=True)
class Cell:
    """One set, one recogniser, one height."""

    faces: str
    recogniser: str
    height: int
    accepts: dict[str, float]
    """By method: the share of mates accepted at 1 % false accepts."""
    false_accepts: dict[str, float]
    """By method: the share of impostors accepted at the threshold that accepts 1 % of them on clean probes."""
    gains: dict[str, Gain]
    """By method, of those with a restorer."""

    def __str__(self) -> str:
        return f"{self.faces} {self.recogniser} {self.height} px"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One set by one recogniser."""

    faces: str
    recogniser: str
    trials: Trials
    clean_accepts: float
    clean_threshold: float
    cells: list[Cell]


@dataclass(frozen=True, slots=True)
class Harm:
    """What one restorer does to clean crops of one side."""

    side: int
    scale: int | None
    """The product's; None where even the smallest scale exceeds its largest result."""
    cosines: dict[str, np.ndarray]
    """By recogniser: of each restored crop to the crop itself."""
    gains: dict[int, np.ndarray]
    """By scale: PSNR in dB of each noisy crop restored, less that of the noisy crop enlarged by bicubic."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    path = parser.parse_args().config
    try:
        config = read_settings(RecognitionConfig, path)
        print(evaluate(config, command=f"python -m models.recognition {path}"))
    except (OSError, ValueError) as exc:
        parser.exit(2, f"{exc}\n")


def evaluate(config: RecognitionConfig, *, command: str) -> str:
    """Write the report and return it. Raises ValueError where pairs or clean faces do not suffice."""
    started = time.monotonic()
    restorers = {name: OnnxRestorer(path, threads=config.threads) for name, path in config.restorers.items()}
    if config.real_esrgan:
        restorers["Real-ESRGAN x4"] = real_esrgan(config.real_esrgan, threads=config.threads)
    recognisers = {
        name: FaceEmbedder(path, config.preparations.get(name), threads=config.threads)
        for name, path in config.recognisers.items()
    }
    comparisons = [
        comparison
        for name, face_set in config.sets.items()
        for comparison in _compare(name, load_trials(face_set, config.seed), restorers, recognisers, config)
    ]
    cells = [cell for comparison in comparisons for cell in comparison.cells]
    clean = _clean_lines(config.clean, restorers, recognisers, config) if config.clean else []
    lines = _opening(config, comparisons, command, time.monotonic() - started)
    for name, restorer in restorers.items():
        lines += [
            "",
            *verdict(name, cells),
            f"- trained on, says its card: {restorer.card['trained_on'] or 'not said'}.",
        ]
    for comparison in comparisons:
        lines += ["", *_comparison_lines(comparison)]
    report = "\n".join([*lines, *clean, ""])
    config.report.parent.mkdir(parents=True, exist_ok=True)
    config.report.write_text(report)
    return report


def load_trials(face_set: FaceSet, seed: int) -> Trials:
    """Read the pairs and the faces they name. Raises ValueError where a file is missing or people are fewer than 2."""
    lines = [line.split() for line in face_set.pairs.read_text().splitlines() if line and not line.startswith("#")]
    stored = {face.name.removeprefix(f"{face_set.truths.stem}/"): face for face in load_faces(face_set.truths)}
    if missing := {name for line in lines for name in line[:2]} - stored.keys():
        raise ValueError(f"{face_set.pairs} names {min(missing)}, which {face_set.truths} does not hold")
    chosen = [
        pair
        for same, limit in (("1", face_set.mates), ("0", face_set.others))
        for pair in evenly(
            [line for line in lines if line[2] == same], lambda line: stored[line[0]].identity, limit, seed
        )
    ]
    probes, references = (list(dict.fromkeys(pair[side] for pair in chosen)) for side in (0, 1))
    places = [{name: place for place, name in enumerate(side)} for side in (probes, references)]
    mates = [(places[0][a], places[1][b]) for a, b, same, *_ in chosen if same == "1"]
    people = {name: stored[name].identity for name in (*probes, *references)}
    numbers = {identity: number for number, identity in enumerate(sorted(set(people.values())))}
    probe_people, reference_people = (np.array([numbers[people[n]] for n in side]) for side in (probes, references))
    if len({probe_people[probe] for probe, _ in mates}) < 2:
        raise ValueError(f"{face_set.pairs}: pairs of at least two people are needed")
    return Trials(
        [stored[name] for name in probes],
        [stored[name] for name in references],
        np.array(mates),
        probe_people,
        reference_people,
        np.flatnonzero(probe_people[:, None] != reference_people[None]),
    )


def reduced_crop(face: Face, height: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the product's crop of the face, as if its box were `height` px high in the frame, and its landmarks there.

    A square of 1.6 times the box's larger side, (side, side, 3) uint8 BGR, not turned; beyond the image the edge is
    replicated; reduced by Pillow's anti-aliased bicubic.
    """
    x1, y1, x2, y2 = face.box
    factor = height / (y2 - y1)
    side = max(2, round(CROP_FACTOR * max(x2 - x1, y2 - y1) * factor))
    span = side / factor
    corner = np.array([x1 + x2 - span + 1, y1 + y2 - span + 1]) / 2  # from the first pixel's outer edge
    size = np.array(face.image.shape[1::-1])
    margin = max(0, math.ceil(max(*-corner, *(corner + span - size)))) + math.ceil(2 / factor)  # and bicubic's reach
    padded = cv2.copyMakeBorder(face.image, margin, margin, margin, margin, cv2.BORDER_REPLICATE)
    box = (*(corner + margin), *(corner + margin + span))
    low = np.asarray(Image.fromarray(padded).resize((side, side), Image.Resampling.BICUBIC, box=box))
    return low, (face.landmarks + 0.5 - corner) * factor - 0.5


def degraded_probe(
    face: Face, height: float, *, noise: float, quality: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the face's reduced crop after Gaussian noise and JPEG, the same each time, and its landmarks."""
    low, landmarks = reduced_crop(face, height)
    rng = np.random.default_rng([seed, round(height), zlib.crc32(face.name.encode())])
    return _jpeg(_noisy(low, noise, rng), quality), landmarks


def rank(similarities: np.ndarray, trials: Trials) -> Ranking:
    """Keep what counts of the similarities (p, r) of all probes to all references."""
    impostors = similarities.ravel()[trials.impostors]
    kept = min(len(impostors), max(1000, math.ceil(_TAIL * len(impostors))))
    top = np.argpartition(-impostors, kept - 1)[:kept]
    top = top[np.argsort(-impostors[top], kind="stable")]
    probes, references = np.divmod(trials.impostors[top], len(trials.references))
    people = np.stack([trials.probe_people[probes], trials.reference_people[references]])
    return Ranking(similarities[tuple(trials.mates.T)], impostors[top], people)


def threshold(ranking: Ranking, trials: Trials, weights: np.ndarray) -> float:
    """Return the similarity above which at most 1 % of the impostors lie; each person counts `weights` times."""
    above = np.cumsum(weights[ranking.tail_people[0]] * weights[ranking.tail_people[1]])
    first = np.searchsorted(above, FALSE_ACCEPTS * trials.impostor_weight(weights), side="right")
    return float(ranking.tail[min(first, len(ranking.tail) - 1)])


def true_accepts(ranking: Ranking, trials: Trials, weights: np.ndarray) -> float:
    """Return the share of mates above the threshold; each person counts `weights` times."""
    counted = weights[trials.probe_people[trials.mates[:, 0]]]
    return float(counted @ (ranking.mates > threshold(ranking, trials, weights)) / counted.sum())


def redraws(trials: Trials, seed: int) -> list[np.ndarray]:
    """Return how often each person is drawn when as many are drawn as there are, many times: the 95 % intervals.

    A draw without mates or without two people is drawn again.
    """
    rng = np.random.default_rng(seed)
    mated = trials.probe_people[trials.mates[:, 0]]
    drawn: list[np.ndarray] = []
    while len(drawn) < REDRAWS:
        weights = np.bincount(rng.integers(trials.people, size=trials.people), minlength=trials.people)
        if weights[mated].any() and trials.impostor_weight(weights) > 0:
            drawn.append(weights)
    return drawn


def clean_faces(clean: CleanSet, seed: int) -> list[Face]:
    """Return square crops at least as large as the largest side asked for. Raises ValueError if there is none."""
    least = max(clean.sides)
    faces = [
        face
        for face in load_faces(clean.truths)
        if face.image.shape[0] == face.image.shape[1] >= least and np.isfinite(face.landmarks).all()
    ]
    if not faces:
        raise ValueError(f"{clean.truths} holds no square crop of {least} px")
    return evenly(faces, lambda face: face.identity, clean.faces, seed)


def verdict(restorer: str, cells: Sequence[Cell]) -> list[str]:
    """Say plainly whether a restorer raises or lowers recognition, fused and alone, and which aims it misses."""
    fused = fused_name(restorer)
    at_aim = {str(cell): cell.gains[fused] for cell in cells if cell.height in _AIM_HEIGHTS}
    at_no_loss = {str(cell): cell.gains[fused] for cell in cells if cell.height in _NO_LOSS_HEIGHTS}
    false_accepts = {str(cell): cell.false_accepts[fused] for cell in cells}
    aims = [
        _held(
            f"fused gains at least {_AIM:+.2f} at {_and(_AIM_HEIGHTS)} px, its interval above zero",
            {cell: gain.mean >= _AIM and gain.low > 0 for cell, gain in at_aim.items()},
        ),
        _held(
            f"fused loses nothing at {_and(_NO_LOSS_HEIGHTS)} px",
            {cell: gain.mean >= 0 for cell, gain in at_no_loss.items()},
        ),
        _held(
            f"fused accepts at most {100 * _MOST_FALSE_ACCEPTS:g} % of impostors at the threshold of clean probes",
            {cell: share <= _MOST_FALSE_ACCEPTS for cell, share in false_accepts.items()},
        ),
    ]
    return [
        f"**{restorer}, fused with the crop as it came, {_effect(cells, fused)}.** "
        f"Restored alone, it {_effect(cells, restorer)}.",
        "",
        *(f"- {aim}" for aim in aims if aim),
    ]


def fused_name(method: str) -> str:
    return f"{method} + raw"


def _effect(cells: Sequence[Cell], method: str) -> str:
    raised = [cell for cell in cells if cell.gains[method].low > 0]
    lowered = [cell for cell in cells if cell.gains[method].high < 0]
    if raised and not lowered:
        head = "raises recognition"
    elif lowered and not raised:
        head = "lowers recognition"
    elif raised:
        head = "raises recognition in some cases and lowers it in others"
    else:
        head = "neither raises nor lowers recognition by more than chance"
    close = len(cells) - len(raised) - len(lowered)
    mean = np.mean([cell.gains[method].mean for cell in cells])
    where = f": lowered at {'; '.join(f'{cell} {cell.gains[method]}' for cell in lowered)}" if lowered else ""
    return (
        f"{head}: of {len(cells)} cases {len(raised)} higher, {len(lowered)} lower, {close} too close to tell, "
        f"{mean:+.3f} on average{where}"
    )


def _held(claim: str, cases: dict[str, bool]) -> str:
    if not cases:
        return ""
    missed = [case for case, held in cases.items() if not held]
    told = f" (not {'; '.join(missed)})" if missed else ""
    return f"{claim}: {len(cases) - len(missed)} of {len(cases)}{told}."


def _compare(
    name: str,
    trials: Trials,
    restorers: dict[str, OnnxRestorer],
    recognisers: dict[str, FaceEmbedder],
    config: RecognitionConfig,
) -> list[Comparison]:
    """One comparison a recogniser."""
    started = time.monotonic()
    comparisons, references = {}, {}
    for recogniser, embedder in recognisers.items():
        clean, references[recogniser] = (_embedded(embedder, faces) for faces in (trials.probes, trials.references))
        ranking, once = rank(clean @ references[recogniser].T, trials), np.ones(trials.people)
        accepts, clean_threshold = true_accepts(ranking, trials, once), threshold(ranking, trials, once)
        comparisons[recogniser] = Comparison(name, recogniser, trials, accepts, clean_threshold, [])
    drawn = redraws(trials, config.seed)
    for height in config.heights:
        embeddings = _probe_embeddings(trials.probes, height, restorers, recognisers, config)
        for recogniser, comparison in comparisons.items():
            similarities = {method: e @ references[recogniser].T for method, e in embeddings[recogniser].items()}
            comparison.cells.append(
                _cell((name, recogniser, height), similarities, trials, comparison.clean_threshold, drawn, restorers)
            )
        print(f"{name}: {len(trials.probes)} probes of {height} px, {time.monotonic() - started:.0f} s", flush=True)
    return list(comparisons.values())


def _embedded(embedder: FaceEmbedder, faces: Sequence[Face]) -> np.ndarray:
    return embedder.embed([face.image for face in faces], [face.landmarks for face in faces])


def _probe_embeddings(
    faces: Sequence[Face],
    height: int,
    restorers: dict[str, OnnxRestorer],
    recognisers: dict[str, FaceEmbedder],
    config: RecognitionConfig,
) -> dict[str, dict[str, np.ndarray]]:
    """By recogniser and method, (p, d)."""
    rows: dict[str, dict[str, list[np.ndarray]]] = {recogniser: {} for recogniser in recognisers}
    for face in faces:
        low, landmarks = degraded_probe(face, height, noise=config.noise, quality=config.jpeg, seed=config.seed)
        seen = {"raw": low, "bicubic": bicubic(low, 4)}
        seen |= {name: restorer.restore(low) for name, restorer in restorers.items()}
        points = [scaled_landmarks(landmarks, len(image) // len(low)) for image in seen.values()]
        for recogniser, embedder in recognisers.items():
            for method, row in zip(seen, embedder.embed([*seen.values()], points), strict=True):
                rows[recogniser].setdefault(method, []).append(row)
    return {recogniser: _with_fused({m: np.array(r) for m, r in each.items()}) for recogniser, each in rows.items()}


def _with_fused(embeddings: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add to every method but raw the unit mean of its embedding and raw's."""
    every = {}
    for method, rows in embeddings.items():
        every[method] = rows
        if method != "raw":
            mean = rows + embeddings["raw"]
            every[fused_name(method)] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return every


def _cell(
    place: tuple[str, str, int],
    similarities: dict[str, np.ndarray],
    trials: Trials,
    clean_threshold: float,
    drawn: list[np.ndarray],
    restorers: Iterable[str],
) -> Cell:
    rankings = {method: rank(matrix, trials) for method, matrix in similarities.items()}
    accepts = {method: true_accepts(ranking, trials, np.ones(trials.people)) for method, ranking in rankings.items()}
    false_accepts = {
        method: float(np.mean(matrix.ravel()[trials.impostors] > clean_threshold))
        for method, matrix in similarities.items()
    }
    judged = [method for name in restorers for method in (name, fused_name(name))]
    redrawn = {
        method: np.array([true_accepts(rankings[method], trials, weights) for weights in drawn])
        for method in ("raw", "bicubic", *judged)
    }
    better = np.maximum(redrawn["raw"], redrawn["bicubic"])
    gains = {}
    for method in judged:
        low, high = np.percentile(redrawn[method] - better, (2.5, 97.5))
        gains[method] = Gain(accepts[method] - max(accepts["raw"], accepts["bicubic"]), float(low), float(high))
    return Cell(*place, accepts, false_accepts, gains)


def _clean_lines(
    clean: CleanSet, restorers: dict[str, OnnxRestorer], recognisers: dict[str, FaceEmbedder], config: RecognitionConfig
) -> list[str]:
    faces = clean_faces(clean, config.seed)
    identities = [face.identity for face in faces]
    lines = [
        "",
        f"## Clean crops: {len(faces)} of {len(set(identities))} people out of {clean.truths.name}",
        "",
        "What a restorer would do if a clean crop were routed to it; the router sends most of these out untouched. "
        f"Cosine of the restored crop, at the product's scale, to the crop itself: mean / what 5 % of the faces fall "
        f"below. PSNR gained in dB over the crop with noise σ {config.noise:g} enlarged by bicubic (×1: as it is): "
        "mean (95 % interval).",
    ]
    for name, restorer in restorers.items():
        harms = [_harm(faces, side, restorer, recognisers, config) for side in clean.sides]
        lines += ["", *_harm_lines(name, harms, identities)]
        print(f"{name}: {len(faces)} clean faces", flush=True)
    return lines


def _harm_lines(name: str, harms: list[Harm], identities: list[str]) -> list[str]:
    """A sentence and a table."""
    cosines = {f"{harm.side} px {r}": found.mean() >= _LEAST_COSINE
               for harm in harms for r, found in harm.cosines.items()}  # fmt: skip
    gains = {f"{harm.side} px ×{scale}": found.mean() >= _LEAST_PSNR_GAIN
             for harm in harms for scale, found in harm.gains.items()}  # fmt: skip
    lines = [
        f"**{name}**: {_held(f'mean cosine at least {_LEAST_COSINE}', cosines)} "
        f"{_held(f'PSNR gained at least {_LEAST_PSNR_GAIN:g} dB', gains)}".strip(),
        "",
        *_table_head(f"{name}, side of the crop", [f"{harm.side} px" for harm in harms]),
        _row("scale", (f"×{harm.scale}" if harm.scale else "too large" for harm in harms)),
    ]
    for recogniser in dict.fromkeys(r for harm in harms for r in harm.cosines):
        cells = (_spread(harm.cosines.get(recogniser)) for harm in harms)
        lines.append(_row(f"cosine, {recogniser}", cells))
    for scale in dict.fromkeys(scale for harm in harms for scale in harm.gains):
        lines.append(_row(f"dB, ×{scale}", (_gained(harm.gains.get(scale), identities) for harm in harms)))
    return lines


def _spread(cosines: np.ndarray | None) -> str:
    return "" if cosines is None else f"{cosines.mean():.3f} / {np.percentile(cosines, 5):.3f}"


def _gained(gains: np.ndarray | None, identities: list[str]) -> str:
    if gains is None:
        return ""
    low, high = interval(gains, identities)
    return f"{gains.mean():+.2f} ({low:+.2f} to {high:+.2f})"


def _harm(
    faces: Sequence[Face],
    side: int,
    restorer: OnnxRestorer,
    recognisers: dict[str, FaceEmbedder],
    config: RecognitionConfig,
) -> Harm:
    scale = restorer.product_scale(faces[0].image[:side, :side])
    routed = scale * side <= MAX_SIZE
    least = min(len(face.image) for face in faces)
    cosines: dict[str, list[float]] = {name: [] for name in recognisers} if routed else {}
    tried = [each for each, sides in _RESTORED_SIDES.items() if side in sides and each in restorer.card["scales"]]
    gains: dict[int, list[float]] = {each: [] for each in tried if each * side <= least}
    for face in faces:
        clean, landmarks = _resized(face, side)
        if routed:
            both = [clean, restorer.restore(clean, scale)]
            for name, embedder in recognisers.items():
                a, b = embedder.embed(both, [landmarks, scaled_landmarks(landmarks, scale)])
                cosines[name].append(float(a @ b))
        rng = np.random.default_rng([config.seed, side, zlib.crc32(face.name.encode())])
        noisy = _noisy(clean, config.noise, rng)
        for each, found in gains.items():
            truth, _ = _resized(face, each * side)
            found.append(psnr(restorer.restore(noisy, each), truth) - psnr(bicubic(noisy, each), truth))
    return Harm(
        side,
        scale if routed else None,
        {name: np.array(found) for name, found in cosines.items()},
        {each: np.array(found) for each, found in gains.items()},
    )


def _resized(face: Face, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The stored square crop, reduced by Pillow's bicubic, and its landmarks."""
    image = np.asarray(Image.fromarray(face.image).resize((side, side), Image.Resampling.BICUBIC))
    return image, scaled_landmarks(face.landmarks, side / len(face.image))


def _noisy(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.rint(image + rng.normal(0, sigma, image.shape)), 0, 255).astype(np.uint8)


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    coded = io.BytesIO()
    Image.fromarray(image[..., ::-1]).save(coded, "JPEG", quality=quality)  # 4:2:0
    return np.array(Image.open(coded))[..., ::-1].copy()


def evenly(items: Sequence[T], person: Callable[[T], str], limit: int | None, seed: int) -> list[T]:
    """Draw `limit` of the items in an order of the seed's, every person once before any twice."""
    taken: dict[str, int] = {}
    rounds: list[tuple[int, int, int]] = []
    for index in np.random.default_rng(seed).permutation(len(items)):
        name = person(items[index])
        taken[name] = taken.get(name, 0) + 1
        rounds.append((taken[name], len(rounds), int(index)))
    return [items[index] for _, _, index in sorted(rounds)[:limit]]


def _opening(config: RecognitionConfig, comparisons: Sequence[Comparison], command: str, seconds: float) -> list[str]:
    probed = {each.faces: each.trials for each in comparisons}
    sets = "; ".join(
        f"{name}: {len(trials.mates)} pairs of one person, {len(trials.probes)} probes and {len(trials.references)} "
        f"references of {trials.people} people, {len(trials.impostors)} combinations of different people"
        for name, trials in probed.items()
    )
    return [
        "# Recognition",
        "",
        f"`{command}` on {platform.machine()}, ONNX Runtime {onnxruntime.__version__}, on the CPU, in "
        f"{seconds / 60:.0f} minutes.",
        "",
        f"Of each pair the first file is the probe: reduced to a box {_and(config.heights)} px high by Pillow's "
        f"anti-aliased bicubic, then Gaussian noise σ {config.noise:g}, then JPEG {config.jpeg}, cut out at "
        f"{CROP_FACTOR:g} times the box. The second file is the reference, clean at its stored size. {sets}.",
        "",
        "raw is aligned straight from the crop; bicubic is Pillow's, ×4; “+ raw” is the unit mean of both embeddings. "
        "Landmarks are the truth's. The threshold is each column's own, where 1 % of all combinations of a probe with "
        "a reference of another person are accepted. Gains are over the better of raw and bicubic; their 95 % "
        "intervals redraw people, and with them threshold and which of both is better.",
    ]


def _comparison_lines(comparison: Comparison) -> list[str]:
    cells = comparison.cells
    heights = [f"{cell.height} px" for cell in cells]
    return [
        f"## {comparison.faces}, {comparison.recogniser}",
        "",
        f"Clean probes: {comparison.clean_accepts:.3f} accepted above {comparison.clean_threshold:.3f}.",
        "",
        *_table_head(f"True accepts at {100 * FALSE_ACCEPTS:g} % false accepts", heights),
        *(_row(method, (f"{cell.accepts[method]:.3f}" for cell in cells)) for method in cells[0].accepts),
        *(_row(f"gain of {method}", (str(cell.gains[method]) for cell in cells)) for method in cells[0].gains),
        "",
        *_table_head("False accepts at the threshold of clean probes", heights),
        *(_row(method, (f"{cell.false_accepts[method]:.2%}" for cell in cells)) for method in cells[0].accepts),
    ]


def _table_head(title: str, columns: Sequence[str]) -> list[str]:
    return [_row(title, columns), "|---" * (len(columns) + 1) + "|"]


def _row(title: str, cells: Iterable[str]) -> str:
    return "| " + " | ".join([title, *cells]) + " |"


def _and(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


if __name__ == "__main__":
    main()
