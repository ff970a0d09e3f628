"""Evaluation of SCGAN, a restorer of real faces: `python -m models.evaluate configs/evaluate/scgan.yaml`.

Part 1 has truths: sharp test faces, damaged moderately as half of the training's low side is. Part 2 has none: real
crops of the clips that restorers are judged by, 4 times as large as they are, judged by a face detector, by its
landmarks, by KID and by NIQE. Intervals are of 95 %; they redraw people in part 1 and tracks in part 2.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Literal

import cv2
import numpy as np
import torch
from insightface.model_zoo.scrfd import SCRFD
from pydantic import Field

from models import degradation
from models.dataset import Face
from models.judges import REDRAWS, interval, open_session
from models.losses import OnnxNetwork
from models.mine import JUDGES, LandmarkDetector, judging, overlap
from models.naturalness import Niqe
from models.protocols import Pair, protocol_faces
from models.report import (
    TITLES,
    Case,
    Contest,
    JudgedConfig,
    Method,
    as_figure,
    bold,
    people_of,
    report_head,
    table_header,
    table_line,
    write_sheet,
    write_sheets,
)
from models.settings import RelativePath
from models.train_scgan import archive_contents

_SCALE = 4
_KEY = 5005  # of the test faces' damage: trainings are seeded with less
_ON = 0.2  # a box that overlaps a track's last by more, intersection over union, is of the same track
_MOST = 256  # px: the clean faces have no more, so larger results are brought to it before KID and NIQE
_SHOWN_CLIPS = ("classroom", "corridor")  # CC BY 4.0
_CELL, _ACROSS = 160, 3  # px of a picture on the sheet of real crops, and crops in a row of it
_CANVAS = 640  # px: what SCRFD looks at
_AIM, _AIM_CPU = 0.15, 0.19  # LPIPS at 16 to 64 px; of networks that were trained on a CPU
_FOUND, _OFF, _KID, _NIQE = "found", "landmark error", "KID ×100", "NIQE"
_REAL_TITLES = {_FOUND: "share found", _OFF: "landmark error (crops)"}

_ERROR_TOLD = (
    "Landmark error: mean distance of YuNet's five landmarks from the truth's, in parts of the distance between the "
    "eyes, where it finds the face."
)
_PAPER = {
    "LPIPS": {
        "LS3D-W, bilinear ÷4": (0.343, 0.114, 0.068),
        "FFHQ, blur to 8 px, noise to 25, JPEG from 30": (0.927, 0.336, 0.197),
    },
    _FOUND: {"Widerface, HOG+SVM": (0.529, None, 0.969), "WebFace, HOG+SVM": (0.4805, None, 0.9669)},
    _KID: {"Widerface, Inception": (16.23, 2.77, 1.08), "WebFace, Inception": (18.02, 3.62, 1.39)},
    _NIQE: {"Widerface": (18.8702, 6.7595, 6.6192), "WebFace": (7.4657, 6.6773, 6.5835)},
}
"""The paper's figures of bicubic, Real-ESRGAN and SCGAN, by measure and set: its Tables 5 and 6."""

Draws = np.ndarray
"""A figure's values (REDRAWS,) when tracks are redrawn; NaN where it has none."""


class RealEvaluateConfig(JudgedConfig):
    """One evaluation of a restorer of real faces, ×4. Without `detector` nothing is said of faces found and landmarks;
    `sheet` shows the real crops, those of the truths lie beside it, with their side in the name; `limit` is of truths,
    and of crops of each clip."""

    protocol: Literal["scgan"]
    """Whose protocol and tables."""
    sides: list[Annotated[int, Field(ge=64, multiple_of=_SCALE)]] = Field([64], min_length=1)
    """Sides of the truths, in pixels; the faces that are damaged have a quarter."""
    crops: RelativePath
    """Real crops in folders by clip, a tar with its CSV of boxes. Only those of the clips that judge are taken."""
    clean: RelativePath
    """Sharp faces, a tar with its CSV: what KID compares with, and what NIQE is fitted to."""
    lpips: RelativePath
    """LPIPS (AlexNet) as ONNX: for LPIPS, and for KID's features, which run in torch."""
    features: str = "al6"
    """The value in LPIPS's network whose mean over all places is a picture's feature: AlexNet's last convolution."""
    reference: RelativePath | None = None
    """SCRFD as ONNX, for the landmarks of the real crops as they are. Without it they have no landmark error."""


def evaluate_real(config: RealEvaluateConfig, *, command: str, unshown: Path) -> str:
    """Write the report and the contact sheets, and return the report.

    Pictures of people who may not be shown go to the folder `unshown`. Raises OSError, or ValueError in one line.
    """
    faces, clean = protocol_faces(config.truths)[: config.limit], protocol_faces(config.clean)
    for chosen, source in ((faces, config.truths), (clean, config.clean)):
        if not chosen:
            raise ValueError(f"{source}: no face is 256 px, sharp (detail 0.09) and turned by no more than yaw 0.5")
    crops = judged_crops(config.crops, config.limit)
    detector = LandmarkDetector(config.detector, score=0.6) if config.detector else None
    contest = Contest(config)
    contest.scales(_SCALE)
    methods = contest.methods(_SCALE, noisy=False)
    del methods["nearest"]
    lines, cases = [], []
    for side in config.sides:
        pairs = [moderate_pair(face, side, number) for number, face in enumerate(faces)]
        case = contest.hold(f"{side // _SCALE} → {side} px", pairs, methods)
        apart = config.model_copy(update={"sheet": config.sheet.with_stem(f"{config.sheet.stem}-{side}")})
        lines += _paired_tables(contest, faces, case, detector)
        lines += write_sheets(apart, unshown, faces, [case])
        cases.append(case)
    real = RealCase.hold(config, crops, clean, methods, detector)
    report = "\n".join(
        [
            *report_head(contest, faces, command),
            *lines,
            *_real_tables(contest, real),
            *_real_sheets(config, unshown, real, contest.ours),
            *_beside_the_paper(contest, cases, real),
        ]
    )
    config.report.parent.mkdir(parents=True, exist_ok=True)
    config.report.write_text(report)
    return report


# Part 1: faces with truths


def moderate_pair(face: Face, side: int, number: int) -> Pair:
    """Return the face brought to `side` px by area, and a quarter of it, damaged moderately as in SCGAN's training.

    Each number and side is damaged in its own way. Raises ValueError where the face would have to be enlarged.
    """
    if side > min(face.image.shape[:2]):
        raise ValueError(f"{face.name}: a face of {min(face.image.shape[:2])} px is too small for a truth of {side} px")
    truth = cv2.resize(face.image, (side, side), interpolation=cv2.INTER_AREA)
    clean = torch.from_numpy(np.ascontiguousarray(truth[..., ::-1].transpose(2, 0, 1))).float()[None]
    damaged = degradation.scgan(clean, degradation.generators(_KEY, side, number), factor=_SCALE)[0]
    low = np.ascontiguousarray(damaged.numpy().transpose(1, 2, 0)[..., ::-1]).astype(np.uint8)
    shrunk = side / np.array(face.image.shape[1::-1])
    return Pair(low, truth, (face.landmarks + 0.5) * shrunk - 0.5)


def _paired_tables(contest: Contest, faces: list[Face], case: Case, detector: LandmarkDetector | None) -> list[str]:
    ours, people = contest.ours, people_of(faces)
    columns = {name: dict(case.scores[name]) for name in case.restored}
    for name, measures in columns.items():
        del measures["MPS"]
        if detector:
            landmarks = [pair.landmarks for pair in case.pairs]
            found = [_found(detector, *each) for each in zip(case.restored[name], landmarks, strict=True)]
            measures[_OFF] = np.array([landmark_error(*each) for each in zip(found, landmarks, strict=True)])
    measures = list(columns[ours])
    titles = [TITLES.get(measure, _REAL_TITLES.get(measure, measure)) for measure in measures]
    gains = [
        table_line(name, [_said(columns[ours][m] - columns[name][m], people, m, "+") for m in measures])
        for name in columns
        if name != ours
    ]
    return [
        f"## With truths, moderately damaged: {case.title}",
        "",
        *([_verdict(case, ours, people), ""] if case.pairs[0].truth.shape[0] == 64 else []),
        "Test faces by area to the larger size; blur σ 0.5 to 2.5 (at 64 px), ÷4 by cubic or linear, noise σ 1 to 15, "
        "JPEG 40 to 95: the training's own code, with seeds that no training has.",
        *([_ERROR_TOLD] if detector else []),
        "",
        *table_header(case.title, titles),
        *(
            table_line(bold(name, ours), [_said(own[measure], people, measure) for measure in measures])
            for name, own in columns.items()
        ),
        "",
        *table_header(f"gain of {ours} over", titles),
        *gains,
        "",
    ]


def _verdict(case: Case, ours: str, people: list[str]) -> str:
    lpips = {name: case.scores[name]["LPIPS"] for name in case.restored}
    reached = float(lpips[ours].mean())
    met = f"meets {_AIM}" if reached <= _AIM else f"meets {_AIM_CPU} alone" if reached <= _AIM_CPU else "meets neither"
    beside = ", ".join(f"{name} {_said(values, people, 'LPIPS')}" for name, values in lpips.items() if name != ours)
    return (
        f"**{ours}: LPIPS (AlexNet) {_said(lpips[ours], people, 'LPIPS')} at 16 → 64 px**, less is better; {beside}. "
        f"The aim is {_AIM}, or {_AIM_CPU} for a network trained on a CPU: it {met}."
    )


# Part 2: real crops, of which nobody knows the truth


@dataclass(frozen=True, slots=True)
class RealCrop:
    """A face as a camera gave it."""

    name: str
    """`FOLDER/FILE`."""
    clip: str
    """The one of JUDGES that it is from."""
    track: str
    """Which face of the clip it is: crops whose boxes overlap from one frame to the next are of one."""
    image: np.ndarray
    """(h, w, 3) uint8 BGR, at its native size."""


def judged_crops(source: Path, limit: int | None = None) -> list[RealCrop]:
    """Load the crops of the clips that restorers are judged by, in the order of their names; `limit` of each clip.

    Raises OSError, or ValueError in one line.
    """
    table = source.with_suffix(".csv")
    with table.open(newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file) if judging(PurePath(row["file"]))}
    tracks = _tracks(rows)
    crops: list[RealCrop] = []
    for name, content in sorted(archive_contents(source)):
        if not judging(PurePath(name)):
            continue
        if name not in rows:
            raise ValueError(f"{table} has no row of {name}")
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise ValueError(f"{source}: {name} is no picture")
        crops.append(RealCrop(name, _clip(name), tracks[name], image))
    if not crops:
        raise ValueError(f"{source}: no crop is of the clips that judge, {', '.join(JUDGES)}")
    return [crop for clip in JUDGES for crop in [each for each in crops if each.clip == clip][:limit]]


def _clip(name: str) -> str:
    part = str(judging(PurePath(name))).lower()
    return next(clip for clip in JUDGES if clip in part)


def _tracks(rows: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return a name for the track of each file, by its boxes in the frames."""
    last: dict[str, np.ndarray] = {}
    tracks = {}
    for file, row in sorted(rows.items(), key=lambda item: (int(item[1]["frame"]), item[0])):
        clip, box = _clip(file), np.array([float(row[end]) for end in ("x1", "y1", "x2", "y2")])
        near = {track: overlap(at, box) for track, at in last.items() if track.startswith(f"{clip}/")}
        best = max(near, key=lambda track: near[track], default="")
        tracks[file] = best if best and near[best] > _ON else f"{clip}/{len(near)}"
        last[tracks[file]] = box
    return tracks


@dataclass(frozen=True, slots=True)
class RealCase:
    """What became of the real crops, and what the judges say."""

    crops: list[RealCrop]
    restored: dict[str, list[np.ndarray]]
    """By method, ours last: pictures 4 times as large as the crops."""
    scores: dict[str, dict[str, np.ndarray]]
    """By method and measure, one figure a crop; NaN where there is none."""
    kid: dict[str, tuple[float, Draws]]
    """By method: KID ×100, and the same with tracks redrawn."""
    clean: list[Face]
    """What KID compares with, and what NIQE is fitted to."""
    clean_niqe: np.ndarray
    """Their own NIQE (n,)."""

    @classmethod
    def hold(
        cls,
        config: RealEvaluateConfig,
        crops: list[RealCrop],
        clean: list[Face],
        methods: dict[str, Method],
        detector: LandmarkDetector | None,
    ) -> RealCase:
        """Let every method restore every crop, and judge it."""
        print(f"real crops: {len(crops)}", file=sys.stderr, flush=True)
        tracks = [crop.track for crop in crops]
        restored = {name: [method(crop.image) for crop in crops] for name, method in methods.items()}
        compared = {name: [_at_most(image, _MOST) for image in images] for name, images in restored.items()}
        sizes = [image.shape[1::-1] for image in compared["bicubic"]]
        # each clean face is brought to the size of a restored one, so that size tells no set from the other
        sharp = [
            cv2.resize(face.image, sizes[number % len(sizes)], interpolation=cv2.INTER_AREA)
            for number, face in enumerate(clean)
        ]
        niqe, features = Niqe(sharp), PooledFeatures(config.lpips, config.features)
        scores = {name: {_NIQE: np.array([niqe(image) for image in images])} for name, images in compared.items()}
        if detector:
            centres = [np.array(crop.image.shape[1::-1]) * (_SCALE / 2) - 0.5 for crop in crops]
            known = (
                scrfd_landmarks(config.reference, restored["bicubic"], threads=config.threads)
                if config.reference
                else None
            )
            for name, images in restored.items():
                found = [_found(detector, image, centre[None]) for image, centre in zip(images, centres, strict=True)]
                scores[name][_FOUND] = np.array([points is not None for points in found], np.float64)
                if known is not None:
                    scores[name][_OFF] = np.array([landmark_error(*each) for each in zip(found, known, strict=True)])
        truth = features(sharp)
        kids = {name: _kid_redrawn(features(images), truth, tracks) for name, images in compared.items()}
        return cls(crops, restored, scores, kids, clean, np.array([niqe(image) for image in sharp]))

    @property
    def tracks(self) -> list[str]:
        return [crop.track for crop in self.crops]


class PooledFeatures:
    """What a network that compares two pictures sees of each, as mean over all places."""

    def __init__(self, network: Path, value: str) -> None:
        """Raises OSError, or ValueError where the network has no such value."""
        self.network, self.value = OnnxNetwork(network).eval(), value
        if value not in [output for _, _, output, _ in self.network.nodes]:
            raise ValueError(f"{network} has no value {value} to take features from")

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Return (n, d) float64 of pictures (H, W, 3) uint8 BGR, 64 px at least, each of its own size."""
        found = []
        for image in images:
            rgb = torch.from_numpy(np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))).float()[None] / 127.5 - 1
            found.append(self.network(rgb, rgb, also=[self.value])[1].mean(dim=(2, 3))[0].numpy())
        return np.array(found, np.float64)


def kid(features: np.ndarray, others: np.ndarray) -> float:
    """Return the kernel distance (Bińkowski et al., ICLR 2018) of two sets of features (n, d) and (m, d).

    It is the unbiased estimate of the squared maximum mean discrepancy under the kernel (x · y / d + 1)³: about 0 for
    two samples of one distribution, and below 0 as often as above. Raises ValueError for a set of less than 2.
    """
    each = np.arange(len(features))
    return float(_kids(features, others, each, np.ones((1, len(each))))[0])


def _kid_redrawn(features: np.ndarray, others: np.ndarray, tracks: Sequence[str]) -> tuple[float, Draws]:
    """Return KID ×100, and its values as `interval` redraws; NaN where one crop alone was drawn."""
    names, places = np.unique(tracks, return_inverse=True)
    drawn = np.random.default_rng(0).integers(len(names), size=(REDRAWS, len(names)))
    times = np.stack([(drawn == track).sum(axis=1) for track in range(len(names))], axis=1)
    return 100 * kid(features, others), 100 * _kids(features, others, places, times.astype(np.float64))


def _kids(features: np.ndarray, others: np.ndarray, places: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return KID (r,) for each row of `times` (r, t): how often each track was drawn; `places` (n,) are the features'.

    Two copies of a track are no pair: they are alike, so redrawing alone would raise the distance.
    """
    if min(len(features), len(others)) < 2:
        raise ValueError(f"KID wants two pictures on each side: there are {len(features)} and {len(others)}")
    own, across, theirs = _kernel(features, features), _kernel(features, others), _kernel(others, others)
    np.fill_diagonal(own, 0)
    np.fill_diagonal(theirs, 0)
    member = np.equal.outer(np.arange(times.shape[1]), places).astype(np.float64)  # (t, n)
    counts = member.sum(axis=1)

    def drawn(blocks: np.ndarray) -> np.ndarray:
        """Sum blocks (t, t) of pairs over what was drawn: (r,)."""
        inside = np.diag(blocks)
        return times @ inside + ((times @ (blocks - np.diag(inside))) * times).sum(axis=1)

    pairs = drawn(np.outer(counts, counts) - np.diag(counts))
    within = np.full(len(times), np.nan)
    np.divide(drawn(member @ own @ member.T), pairs, out=within, where=pairs > 0)
    between = times @ member @ across.mean(axis=1) / (times @ counts)
    return within + theirs.sum() / (len(others) * (len(others) - 1)) - 2 * between


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _found(detector: LandmarkDetector, image: np.ndarray, points: np.ndarray) -> np.ndarray | None:
    """Return the landmarks (5, 2) of the surest face whose box holds the centre of `points` (n, 2), or None."""
    centre = points.mean(axis=0)
    boxes, landmarks = detector.find(image)
    inside = np.flatnonzero(((boxes[:, :2] <= centre) & (centre <= boxes[:, 2:])).all(axis=1))
    return landmarks[inside[0]] if len(inside) else None


def landmark_error(found: np.ndarray | None, known: np.ndarray) -> float:
    """Return the mean distance of found landmarks from those known, in parts of that between the eyes; or NaN."""
    if found is None:
        return np.nan
    return float(np.linalg.norm(found - known, axis=1).mean() / np.linalg.norm(known[0] - known[1]))


def scrfd_landmarks(network: Path, images: Sequence[np.ndarray], *, threads: int = 1) -> list[np.ndarray]:
    """Return the landmarks (5, 2) of the surest face that SCRFD finds in each image; NaN where it finds none."""
    scrfd = SCRFD(session=open_session(network, threads))
    return [_by_scrfd(scrfd, image) for image in images]


def _by_scrfd(scrfd: SCRFD, image: np.ndarray) -> np.ndarray:
    # not enlarged to the whole canvas: SCRFD misses faces as large as that
    canvas = np.zeros((*(max(_CANVAS, side) for side in image.shape[:2]), 3), np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    boxes, landmarks = scrfd.detect(canvas, input_size=(_CANVAS, _CANVAS))
    return landmarks[np.argmax(boxes[:, 4])] if len(boxes) else np.full((5, 2), np.nan)


def _at_most(image: np.ndarray, side: int) -> np.ndarray:
    """Return the image, shrunk by area where its longer side has more than `side` px."""
    times = side / max(image.shape[:2])
    if times >= 1:
        return image
    size = (round(image.shape[1] * times), round(image.shape[0] * times))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _real_tables(contest: Contest, real: RealCase) -> list[str]:
    ours, crops = contest.ours, real.crops
    measures = [measure for measure in (_FOUND, _OFF, _NIQE) if measure in real.scores[ours]]
    titles = [*(_REAL_TITLES.get(measure, measure) for measure in measures), _KID]
    counted = {clip: sum(crop.clip == clip for crop in crops) for clip in JUDGES}
    sides = [min(crop.image.shape[:2]) for crop in crops]
    clean = (
        f"{len(real.clean)} sharp faces of {len(set(people_of(real.clean)))} people out of {contest.config.clean.name}"
    )
    own = [_said(real.clean_niqe, people_of(real.clean), _NIQE) if measure == _NIQE else "" for measure in measures]
    return [
        f"## Real crops: {', '.join(f'{clip} {count}' for clip, count in counted.items())}",
        "",
        *(_found_told(real, ours) if _FOUND in measures else []),
        f"{len(crops)} crops of {len(set(real.tracks))} tracks, {min(sides)} to {max(sides)} px (median "
        f"{np.median(sides):g}), enlarged 4 times. Nothing was mined from these clips, nothing learnt from them, and "
        "nobody knows the truth. In brackets: 95 % intervals, redrawing tracks (crops whose boxes overlap from frame "
        "to frame), as nobody has a name here. There are few tracks, so the intervals are rough.",
        "",
        *table_header("real crops ×4", titles),
        *(table_line(bold(name, ours), _real_cells(real, name, measures)) for name in real.scores),
        table_line("*clean faces*", [*own, ""]),
        "",
        *table_header(f"gain of {ours} over", titles),
        *(table_line(name, _real_gains(real, ours, name, measures)) for name in real.scores if name != ours),
        "",
        *(_by_clip(real, ours, counted) if _FOUND in measures else []),
        "- Share found: a box of YuNet, score 0.6, holds the middle of the picture.",
        *_landmarks_told(measures),
        "- KID: unbiased, kernel (x·y/d + 1)³, times 100; features: AlexNet's (LPIPS's network, its value "
        f"`{contest.config.features}`, mean over all places), not Inception's, which is not to be had. Compared with "
        f"{clean}, each brought to a result's size. The crops are of few people, which raises every row alike.",
        f"- NIQE, fitted to faces: to the same {clean}, not to landscapes, in patches of 32 px. Less is better; "
        "its figures compare only among themselves.",
        f"- For KID and NIQE results larger than {_MOST} px were brought to that by area.",
        "",
    ]


def _found_told(real: RealCase, ours: str) -> list[str]:
    found = {name: real.scores[name][_FOUND] for name in (ours, "bicubic")}
    gain = _said(found[ours] - found["bicubic"], real.tracks, _FOUND, "+")
    said = f"{ours} {_said(found[ours], real.tracks, _FOUND)}, bicubic {_said(found['bicubic'], real.tracks, _FOUND)}"
    return [f"**Share of crops in which a face is found: {said}; difference {gain}.**", ""]


def _real_cells(real: RealCase, name: str, measures: list[str]) -> list[str]:
    own = real.scores[name]
    cells = {measure: _said(own[measure], real.tracks, measure) for measure in measures}
    if _OFF in cells:
        cells[_OFF] += f" ({np.isfinite(own[_OFF]).sum()})"
    return [*cells.values(), _kid_said(*real.kid[name])]


def _real_gains(real: RealCase, ours: str, name: str, measures: list[str]) -> list[str]:
    less = [_said(real.scores[ours][each] - real.scores[name][each], real.tracks, each, "+") for each in measures]
    (kid_ours, draws_ours), (kid_other, draws) = real.kid[ours], real.kid[name]
    return [*less, _kid_said(kid_ours - kid_other, draws_ours - draws, "+")]


def _by_clip(real: RealCase, ours: str, counted: dict[str, int]) -> list[str]:
    clips = np.array([crop.clip for crop in real.crops])
    rows = [
        table_line(
            bold(name, ours), [f"{own[_FOUND][clips == clip].mean():.3f}" for clip, count in counted.items() if count]
        )
        for name, own in real.scores.items()
    ]
    return [*table_header("share found", [f"{clip} ({count})" for clip, count in counted.items() if count]), *rows, ""]


def _landmarks_told(measures: list[str]) -> list[str]:
    if _OFF not in measures:
        return []
    return [
        "- Landmark error: of YuNet's five on the result from SCRFD's on the crop as bicubic enlarges it, in parts of "
        "the distance between the eyes, where both find a face; in the last brackets how many that are. No human "
        "set these points, and SCRFD sees what bicubic shows: this favours bicubic. The error from known truths is in "
        "the tables above."
    ]


def _real_sheets(config: RealEvaluateConfig, unshown: Path, real: RealCase, ours: str) -> list[str]:
    """Write all crops of the clips that may be shown on one sheet, and all others on one in `unshown`."""
    columns = ["bicubic", *config.rivals, ours]
    free: list[np.ndarray] = []
    others: list[np.ndarray] = []
    for number, crop in enumerate(real.crops):
        row = np.concatenate([_cell(real.restored[name][number]) for name in columns], axis=1)
        (free if crop.clip in _SHOWN_CLIPS else others).append(row)
    if others:
        write_sheet(unshown / f"{config.sheet.stem}.others.jpg", _in_rows(others))
    if not free:
        return []
    write_sheet(config.sheet, _in_rows(free))
    return [
        f"![Real crops]({config.sheet.name})",
        "",
        f"All {len(free)} crops of {' and '.join(_SHOWN_CLIPS)}, none left out, {_ACROSS} in a row; of each: "
        f"{', '.join(columns)}. Clips: intel-iot-devkit/sample-videos, Intel, CC BY 4.0 (previews of 480×270 px).",
        "",
    ]


def _cell(image: np.ndarray) -> np.ndarray:
    how = cv2.INTER_AREA if min(image.shape[:2]) > _CELL else cv2.INTER_CUBIC
    return cv2.resize(image, (_CELL, _CELL), interpolation=how)


def _in_rows(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Return rows of `_ACROSS` pictures with gaps; the last is filled with white."""
    gap = np.full((_CELL, 8, 3), 255, np.uint8)
    filled = pictures + [np.full_like(pictures[0], 255)] * (-len(pictures) % _ACROSS)
    rows = [filled[start : start + _ACROSS] for start in range(0, len(filled), _ACROSS)]
    return [np.concatenate([part for picture in row for part in (picture, gap)][:-1], axis=1) for row in rows]


# Beside the paper


def _beside_the_paper(contest: Contest, cases: list[Case], real: RealCase) -> list[str]:
    """Return the paper's tables with our figures of the same measures above its own."""
    rival = next((name for name in contest.config.rivals if name.startswith("Real-ESRGAN")), None)
    methods = ["bicubic", rival, contest.ours]

    def means(scores: dict[str, dict[str, np.ndarray]], measure: str) -> list[float | None]:
        return [float(scores[name][measure].mean()) if name else None for name in methods]

    ours: dict[str, dict[str, list[float | None]]] = {
        "LPIPS": {f"test faces, {case.title}": means(case.scores, "LPIPS") for case in cases},
        _KID: {"real crops, AlexNet": [real.kid[name][0] if name else None for name in methods]},
        _NIQE: {"real crops, fitted to faces": means(real.scores, _NIQE)},
    }
    if _FOUND in real.scores[contest.ours]:
        ours[_FOUND] = {"real crops, YuNet": means(real.scores, _FOUND)}
    lines = []
    for measure, own in ours.items():
        title = _REAL_TITLES.get(measure, measure)
        lines += [_row(f"{title}: ours, {where}", measure, figures) for where, figures in own.items()]
        lines += [_row(f"*{title}: paper, {where}*", measure, figures) for where, figures in _PAPER[measure].items()]
    return [
        "## Beside the paper (its Tables 5 and 6, 16 → 64 px)",
        "",
        *table_header("less is better, but of the share", ["bicubic", "Real-ESRGAN", f"{contest.ours} / *SCGAN*"]),
        *lines,
        "",
        "Only the order of methods in a row compares, not the figures. The paper's faces are others (1,000 of LS3D-W, "
        "2,500 of FFHQ, 2,000 of Widerface, 1,028 of WebFace, all at 16 px; ours are moderately damaged test faces, "
        "and real crops at their native size). Its KID uses Inception and is printed times 100 as we read it, its NIQE "
        "is presumably fitted to landscapes, its faces are found by HOG+SVM. Its SCGAN saw 20,000 faces of FFHQ and "
        "4,000 of Widerface in 200 epochs, and its code stretches each result's contrast before it is judged; nothing "
        "is stretched here.",
        "",
    ]


def _row(title: str, measure: str, figures: Sequence[float | None]) -> str:
    return table_line(title, ["" if each is None else as_figure(measure, each) for each in figures])


def _said(values: np.ndarray, groups: Sequence[str], measure: str, sign: str = "") -> str:
    """Return the mean of the figures that there are, with its interval."""
    known = np.isfinite(values)
    if not known.any():
        return ""
    low, high = interval(values[known], np.asarray(groups)[known])
    mean, low_said, high_said = (as_figure(measure, each, sign) for each in (float(values[known].mean()), low, high))
    return f"{mean} ({low_said} to {high_said})"


def _kid_said(figure: float, draws: Draws, sign: str = "") -> str:
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    told, least, most = (as_figure(_KID, float(each), sign) for each in (figure, low, high))
    return f"{told} ({least} to {most})"
