"""Evaluation of GFRNet: `python -m models.evaluate configs/evaluate/gfrnet-small.yaml` writes its whole report.

Each face is damaged as the paper does it at 4 and at 8 times, and restored by guides of every kind: the person's own,
none, a stranger's, one that is covered in part, one in another light. Judged by models.judges. What counts: the gain
over the input, what the own guide brings over a stranger's, and how far a guide pulls a face towards itself. Pictures
of people who may not be shown go to a folder of their own, which git ignores.

Images are (side, side, 3) uint8 BGR; the side is the result's, which the network's card tells.
"""

from __future__ import annotations

import csv
import json
import math
import platform
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import cv2
import numpy as np
import onnxruntime
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from models import degradation
from models.checkpoint import build, load_checkpoint, shipped_weights
from models.dataset import Clean, Face, load_faces
from models.gfrnet import VARIANTS, Gfrnet
from models.guided import SCALES, GuidedFaces, covered, laid_onto, listed_pairs, next_person
from models.judges import FaceEmbedder, Lpips, as_planes, bicubic, interval, open_session, psnr, scaled_landmarks, ssim
from models.protocols import sisn_pair
from models.recognition import evenly
from models.report import (
    SHOWN,
    TITLES,
    Scores,
    judge_each,
    less,
    stated,
    table_cells,
    table_header,
    table_line,
    write_sheet,
)
from models.settings import RelativePath

PAPER_GFRNET = {
    "Full": {4: ((28.55, 0.947), (32.31, 0.973)), 8: ((24.10, 0.898), (27.21, 0.935))},
    "-W": {4: ((26.03, 0.923), (29.66, 0.934)), 8: ((23.29, 0.843), (25.20, 0.897))},
    "-WG": {4: ((25.97, 0.915), (28.73, 0.928)), 8: ((22.91, 0.838), (24.76, 0.884))},
    "R": {4: ((27.90, 0.943), (31.46, 0.962)), 8: ((24.05, 0.890), (26.88, 0.922))},
}
"""PSNR and SSIM by variant and scale on the paper's two sets, VggFace2 and WebFace: Table 1."""

_PAPER_SETS = ("VggFace2", "WebFace")
_AIMS = {4: (1.0, 0.8), 8: (0.8, 0.6)}  # dB over bicubic: of any network, of one trained on a CPU
_GUIDE_AIM, _IDENTITY_AIM = 0.15, 0.03  # dB and cosine, of the own guide over a stranger's
_MOST_PULL = 0.05
_INPUT, _OWN, _ABSENT, _STRANGER, _OCCLUDED = "input (bicubic)", "own", "absent (grey)", "a stranger's", "own, occluded"
_GREY = 128
_SHEET_SCALE = 8  # where the guide has most to give
_SHEET_HALF = 20  # pairs: the best and the worst
_SHEET_SIDE = 128  # px a picture


class GuidedEvaluateConfig(BaseModel):
    """One evaluation of a guided restorer."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    protocol: Literal["gfrnet"]
    """Whose protocol and table."""
    network: RelativePath
    """The guided restorer as ONNX, with its card: the paper's Full."""
    checkpoint: RelativePath | None = None
    """Its checkpoint, for warped guide and mask on the sheet, where the ONNX gives out the restored face alone."""
    variants: dict[Literal["-W", "-WG"], RelativePath] = {}
    """Checkpoints of the same training without warping, or without a guide, for their rows of the paper's table."""
    truths: RelativePath
    """Faces that nobody trained on: a tar with its CSV."""
    pairs: RelativePath
    """Lines `QUERY REFERENCE`: a face to be restored and its guide (guided_test.txt)."""
    pairs_limit: int | None = Field(None, ge=2)
    """Only so many of them, drawn by the seed: every person once before any twice."""
    lpips: RelativePath | None = None
    """LPIPS as ONNX."""
    embedders: dict[str, RelativePath] = {}
    """Face recognisers as ONNX, for the identity and for the pull."""
    seed: int = Field(20260, ge=0)
    """Of the choice of pairs, the damage and the covers; not one of training's."""
    report: RelativePath
    """The Markdown file that is written."""
    sheet: RelativePath
    """The contact sheet that is written, of faces that may be shown."""
    threads: int = Field(1, ge=1)
    """Of each network that runs as ONNX."""


def evaluate_guided(config: GuidedEvaluateConfig, *, command: str, unshown: Path) -> str:
    """Write the report and the contact sheets, and return the report.

    The sheet of all people who may not be shown goes to the folder `unshown`. Raises OSError or ValueError, in one
    line, for a file that is missing or is not what it should be.
    """
    network = GuidedRestorer(config.network, threads=config.threads)
    drawing = GuidedCheckpoint(config.checkpoint) if config.checkpoint and network.outputs == ["restored"] else network
    variants = {name: _variant(name, path) for name, path in config.variants.items()}
    judges = _Judges(config)
    trials = choose_trials(config, network.side, laid=network.laid)
    judges.know(trials)
    contests = [_contest(scale, real, trials, network, variants, judges, config.seed)
                for real in (True, False) for scale in SCALES]  # fmt: skip
    subsets, age_said = _subsets(config, trials)
    real = {contest.scale: contest for contest in contests if contest.real}
    lines = [
        *_head(config, network, trials, age_said, command),
        *_aims(real, trials, judges.names),
        *_paper_lines(real, network.name, [*variants]),
        *(line for contest in contests for line in _contest_lines(contest, trials, subsets if contest.real else {})),
        *_pull_lines(real, trials, judges),
        *_write_sheets(config, unshown, trials, real[_SHEET_SCALE], drawing),
    ]
    report = "\n".join(lines)
    config.report.parent.mkdir(parents=True, exist_ok=True)
    config.report.write_text(report)
    return report


# Restorers


@dataclass(frozen=True, slots=True)
class Restored:
    """A restored face, and how the guide came into it as far as that is given out; all uint8 BGR."""

    image: np.ndarray
    warped: np.ndarray | None
    mask: np.ndarray | None
    """White where the guide counted."""


class Restorer(Protocol):
    def restore(self, image: np.ndarray, guide: np.ndarray) -> Restored: ...


class GuidedRestorer:
    """A guided restorer as ONNX with our card."""

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        """Raises OSError, or ValueError for what is no guided restorer."""
        self._session = open_session(path, threads)
        text = self._session.get_modelmeta().custom_metadata_map.get("streamer.card")
        self.card: dict[str, Any] = json.loads(text) if text else {}
        if self.card.get("task") != "guided-restoration":
            raise ValueError(f"{path} has no card of a guided restorer: export a GFRNet with models.export")
        self.name, self.side = str(self.card["name"]), int(self.card["result_size"])
        if self.side % self.card["size_multiple"]:
            raise ValueError(f"{path}: its card's result_size {self.side} is no multiple of its size_multiple")
        self.laid = bool(self.card.get("guide_laid"))
        self.outputs = [value.name for value in self._session.get_outputs()]
        self._inputs = [value.name for value in self._session.get_inputs()]

    def restore(self, image: np.ndarray, guide: np.ndarray) -> Restored:
        """Return the image restored; both are `side` px."""
        card, rgb = self.card, self.card["color"] == "RGB"
        mean, std = card["mean"], card["std"]
        given = [as_planes(each[..., ::-1] if rgb else each, mean, std)[None] for each in (image, guide)]
        out = self._session.run(None, dict(zip(self._inputs, given, strict=True)))
        found = {name: array[0] for name, array in zip(self.outputs, out, strict=True)}
        return _restored(found, tuple(card["output_range"]), rgb=rgb)


class GuidedCheckpoint:
    """A GFRNet from a checkpoint."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, or ValueError if it is none."""
        state = load_checkpoint(path)
        network = build(state["network"])
        if not isinstance(network, Gfrnet):
            raise ValueError(f"{path} is a checkpoint of {state['network']['name']}, not of a GFRNet")
        network.load_state_dict(shipped_weights(state))
        self.network = network.eval()

    @torch.inference_mode()
    def restore(self, image: np.ndarray, guide: np.ndarray) -> Restored:
        """Return the image restored; a variant without a guide does not look at it."""
        given = (torch.from_numpy(as_planes(each[..., ::-1], 127.5, 127.5))[None] for each in (image, guide))
        parts = self.network.parts(*given)
        found = {name: getattr(parts, name) for name in ("restored", "warped", "mask")}
        return _restored({name: each[0].numpy() for name, each in found.items() if each is not None}, (-1.0, 1.0))


def _restored(found: dict[str, np.ndarray], extent: tuple[float, float], *, rgb: bool = True) -> Restored:
    """Return pictures of what a network gave out, (c, h, w) each; faces from `extent`, the mask from 0 to 1."""
    spans = {"restored": extent, "warped": extent, "mask": (0.0, 1.0)}
    pictures: dict[str, np.ndarray] = {}
    for name, (black, white) in spans.items():
        if name in found:
            planes = np.rint((found[name] - black) * (255 / (white - black))).clip(0, 255).astype(np.uint8)
            planes = np.broadcast_to(planes, (3, *planes.shape[1:]))
            pictures[name] = np.ascontiguousarray((planes[::-1] if rgb else planes).transpose(1, 2, 0))
    return Restored(pictures["restored"], pictures.get("warped"), pictures.get("mask"))


def _variant(name: str, path: Path) -> GuidedCheckpoint:
    restorer, wanted = GuidedCheckpoint(path), VARIANTS[name]
    config = restorer.network.config
    if (config.guide, config.warp) != (wanted.guide, wanted.warp):
        raise ValueError(f"{path} is not {name}: its guide is {config.guide}, its warp {config.warp}")
    return restorer


# Trials


@dataclass(frozen=True, slots=True)
class Trial:
    """A face to be restored, and its guides, all brought to one side."""

    truth: Face
    guide: Face
    """Another photo of the same person."""
    stranger: Face
    """The guide of another person's trial."""
    enlarged: bool
    """Whether the truth was stored smaller, so is softer than its size."""


def choose_trials(config: GuidedEvaluateConfig, side: int, *, laid: bool = False) -> list[Trial]:
    """Return the chosen pairs, people spread evenly; with `laid` guides are laid onto their faces, by the landmarks of
    the truth. Raises OSError or ValueError with the place."""
    faces = load_faces(config.truths)
    known = GuidedFaces(faces, torch.device("cpu"))
    part = config.truths.stem if config.truths.is_file() else config.truths.name
    listed = [*listed_pairs(config.pairs, known, part)]
    rows = np.array(evenly(listed, lambda pair: known.persons[pair[0]], config.pairs_limit, config.seed))
    by_name = {face.name: face for face in faces}
    pairs = [[by_name[known.names[row]] for row in pair] for pair in rows]
    strangers = [pairs[place][1] for place in next_person(known.persons[rows[:, 0]])]
    trials = []
    for (truth, guide), stranger in zip(pairs, strangers, strict=True):
        face, *guides = (brought(each, side) for each in (truth, guide, stranger))
        if laid:
            guides = [_laid(face, each) for each in guides]
        trials.append(Trial(face, *guides, enlarged=len(truth.image) < side))
    return trials


def brought(face: Face, side: int) -> Face:
    """Return the whole stored face, framed as it is, at `side` px by Pillow's bicubic. Raises ValueError if it is not
    square."""
    height, width = face.image.shape[:2]
    if height != width:
        raise ValueError(f"{face.name} is {width}x{height}, not square")
    image = np.asarray(Image.fromarray(face.image).resize((side, side), Image.Resampling.BICUBIC))
    times = side / width
    x1, y1, x2, y2 = (times * edge for edge in face.box)
    return replace(face, image=image, box=(x1, y1, x2, y2), landmarks=scaled_landmarks(face.landmarks, times))


def _laid(face: Face, guide: Face) -> Face:
    """Return the guide laid onto the face by landmarks; its box is where that of the face is."""
    wanted, own = (torch.from_numpy(np.asarray(each.landmarks, np.float32))[None] for each in (face, guide))
    laid = laid_onto(wanted, Clean(_tensor(guide.image), own))
    return replace(guide, image=_image(laid.images), landmarks=laid.landmarks[0].numpy(), box=face.box)


def damaged(face: Face, scale: int, seed: int) -> np.ndarray:
    """Return the face damaged by GFRNet's protocol, the same each time: s is `scale`, all else drawn from its set."""
    draws = degradation.generators(seed, scale, zlib.crc32(face.name.encode()))
    return _image(degradation.gfrnet(_tensor(face.image), draws, scale=scale))


def reduced(face: Face, scale: int) -> np.ndarray:
    """Return the face reduced to 1/scale and enlarged again, both by Pillow's bicubic, and nothing else."""
    return bicubic(sisn_pair(face, scale).low, scale)


def occluded(face: Face, seed: int) -> np.ndarray:
    """Return the face covered in part by an ellipse or a box of one colour, the same each time."""
    rng = np.random.default_rng([seed, zlib.crc32(face.name.encode())])
    return _image(covered(rng, _tensor(face.image), 1.0))


def light(face: Face) -> np.ndarray:
    """Return in what light the face's box is: its mean luma, and that of its left half less its right half."""
    x1, y1, x2, y2 = np.clip(np.rint(face.box), 0, len(face.image)).astype(int)
    luma = cv2.cvtColor(face.image, cv2.COLOR_BGR2GRAY)[y1:y2, x1:x2].astype(np.float64)
    half = luma.shape[1] // 2
    return np.array([luma.mean(), luma[:, :half].mean() - luma[:, -half:].mean()])


def _tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))).float()[None]


def _image(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor[0].byte().numpy().transpose(1, 2, 0)[..., ::-1])


def _subsets(config: GuidedEvaluateConfig, trials: list[Trial]) -> tuple[dict[str, np.ndarray], str]:
    """Return the places of the trials whose guides differ most in a way, and what the report says of age."""
    lights = [np.linalg.norm(light(trial.truth) - light(trial.guide)) for trial in trials]
    subsets = {"own, another light": _upper_quarter(lights)}
    ages = _ages(config.truths)
    if not ages:
        return subsets, f"Age is no column of {config.truths.stem}.csv: a guide of another age is not measured."
    apart = [abs(ages[trial.truth.name] - ages[trial.guide.name]) for trial in trials]
    subsets["own, another age"] = _upper_quarter(apart)
    return subsets, f"Another age: the quarter that is furthest apart by the column `age` of {config.truths.stem}.csv."


def _upper_quarter(differences: Sequence[float]) -> np.ndarray:
    return np.argsort(-np.asarray(differences), kind="stable")[: math.ceil(len(differences) / 4)]


def _ages(truths: Path) -> dict[str, float]:
    """Return the age by name; none where the CSV does not tell."""
    if truths.is_dir():
        return {}
    with truths.with_suffix(".csv").open(newline="") as table:
        return {f"{truths.stem}/{row['file']}": float(row["age"]) for row in csv.DictReader(table) if "age" in row}


# Judging


@dataclass(frozen=True, slots=True)
class Contest:
    """All trials damaged in one way, and how they came out by each guide."""

    scale: int
    real: bool
    """Whether there was blur, noise and JPEG too."""
    inputs: list[np.ndarray]
    scores: dict[str, Scores]
    """By guide, the input first; of variants PSNR and SSIM alone."""

    @property
    def title(self) -> str:
        return f"×{self.scale}, {'blur, noise and JPEG drawn from their sets' if self.real else 'bicubic alone'}"

    def gain(self, measure: str, after: str, before: str) -> np.ndarray:
        """Return one figure a trial: what one guide, or the input, has more than another."""
        return self.scores[after][measure] - self.scores[before][measure]


class _Judges:
    """Who judges, and what they know of the trials."""

    def __init__(self, config: GuidedEvaluateConfig) -> None:
        self._lpips = Lpips(config.lpips, threads=config.threads) if config.lpips else None
        self._embedders = {name: FaceEmbedder(p, threads=config.threads) for name, p in config.embedders.items()}
        self.names = [*self._embedders]

    def know(self, trials: list[Trial]) -> None:
        self._truths = [trial.truth.image for trial in trials]
        self._landmarks = [trial.truth.landmarks for trial in trials]
        kinds = {"identity": "truth", "own guide": "guide", "stranger": "stranger"}
        self._wanted = {kind: self._embedded([getattr(trial, field) for trial in trials])
                        for kind, field in kinds.items()}  # fmt: skip

    def pixels(self, images: list[np.ndarray]) -> Scores:
        return {"PSNR": judge_each(psnr, images, self._truths), "SSIM": judge_each(ssim, images, self._truths)}

    def judge(self, images: list[np.ndarray]) -> Scores:
        """Return all measures; cosines to truth, own guide and stranger, each face at its truth's landmarks."""
        scores = self.pixels(images)
        if self._lpips:
            scores["LPIPS"] = judge_each(self._lpips, images, self._truths)
        seen = {name: embedder.embed(images, self._landmarks) for name, embedder in self._embedders.items()}
        for kind, wanted in self._wanted.items():
            scores |= {f"{kind}, {name}": (each * wanted[name]).sum(axis=1) for name, each in seen.items()}
        return scores

    def nature(self, name: str, kind: str) -> np.ndarray:
        """Return the truths' own cosines to the guides of this kind."""
        return (self._wanted["identity"][name] * self._wanted[kind][name]).sum(axis=1)

    def _embedded(self, faces: list[Face]) -> dict[str, np.ndarray]:
        images, landmarks = [face.image for face in faces], [face.landmarks for face in faces]
        return {name: embedder.embed(images, landmarks) for name, embedder in self._embedders.items()}


def _contest(
    scale: int,
    real: bool,
    trials: list[Trial],
    network: Restorer,
    variants: dict[str, GuidedCheckpoint],
    judges: _Judges,
    seed: int,
) -> Contest:
    """Restore all trials by all guides; where the damage is bicubic alone, by the own and a stranger's."""
    inputs = [damaged(trial.truth, scale, seed) if real else reduced(trial.truth, scale) for trial in trials]
    own = [trial.guide.image for trial in trials]
    guides = {_OWN: own, _STRANGER: [trial.stranger.image for trial in trials]}
    if real:
        guides[_ABSENT] = [np.full_like(image, _GREY) for image in own]
        guides[_OCCLUDED] = [occluded(trial.guide, seed) for trial in trials]
    contest = Contest(scale, real, inputs, {_INPUT: judges.judge(inputs)})
    for name, each in guides.items():
        print(f"×{scale}, guide {name}: {len(trials)} faces", file=sys.stderr, flush=True)
        contest.scores[name] = judges.judge(_through(network, inputs, each))
    for name, restorer in variants.items() if real else ():
        contest.scores[name] = judges.pixels(_through(restorer, inputs, own))
    return contest


def _through(restorer: Restorer, inputs: list[np.ndarray], guides: list[np.ndarray]) -> list[np.ndarray]:
    return [restorer.restore(image, guide).image for image, guide in zip(inputs, guides, strict=True)]


# The report


def _head(
    config: GuidedEvaluateConfig, network: GuidedRestorer, trials: list[Trial], age_said: str, command: str
) -> list[str]:
    people = {trial.truth.identity for trial in trials}
    side = f"{network.side}×{network.side}"
    return [
        f"# {network.name} at GFRNet's protocol",
        "",
        f"`{command}` on {platform.machine()}, ONNX Runtime {onnxruntime.__version__}, on the CPU. {len(trials)} pairs "
        f"of {len(people)} people out of {config.pairs.name} and {config.truths.name}. The network's card says: it was "
        f"trained on: {network.card['trained_on'] or 'not said'}.",
        "",
        f"Face and guide are framed as stored and brought to {side} by Pillow's bicubic; "
        f"{sum(trial.enlarged for trial in trials)} of {len(trials)} truths were stored smaller. The face is damaged: "
        "Gaussian blur, Pillow's bicubic to 1/s, noise, JPEG, each value drawn from its set in the paper and s fixed, "
        f"then enlarged by bicubic to {side}: that is the input. Guides: the person's own; none, for which a uniformly "
        f"grey picture ({_GREY}) stands; a stranger's, which is the own guide of another pair; the own one of which an "
        "ellipse or a box covers a part. In another light: the quarter of the pairs whose faces differ most, inside "
        "the face's box, by the root of the sum of two squares in grey levels: the difference of mean luma, and the "
        f"difference of the left half's less the right half's. {age_said}",
        "",
        "Means over pairs. PSNR on RGB, full frame, 8 bit; SSIM on luma, 11×11 Gaussian; identity: cosine to the "
        "truth's embedding, own guide: to the guide's, as it is uncovered, in every row; restored faces are aligned by "
        "the truth's landmarks. In brackets: 95 % intervals, redrawing people.",
        "",
    ]


def _aims(real: dict[int, Contest], trials: list[Trial], recognisers: list[str]) -> list[str]:
    faces = _truths(trials)
    lines = ["## What was aimed at", ""]
    for scale, contest in real.items():
        gain = contest.gain("PSNR", _OWN, _INPUT)
        aim, floor = _AIMS[scale]
        lines.append(
            f"- ×{scale}: {stated(gain, faces, 'PSNR')} dB over bicubic. The aim of {aim:g} dB is "
            f"{_met(gain.mean() >= aim)}; the floor of {floor:g} dB for a network trained on a CPU is "
            f"{_met(gain.mean() >= floor)}."
        )
    for scale, contest in real.items():
        wanted = [("PSNR", " dB", _GUIDE_AIM), *((f"identity, {name}", "", _IDENTITY_AIM) for name in recognisers)]
        for measure, unit, aim in wanted:
            gain = contest.gain(measure, _OWN, _STRANGER)
            lines.append(
                f"- ×{scale}, own guide over a stranger's, {measure}: {stated(gain, faces, measure)}{unit}. The aim "
                f"of {aim:g}{unit} with its interval above zero is {_proven(gain, faces, aim)}."
            )
    for scale, contest in real.items():
        for name in recognisers:
            pull = contest.gain(f"stranger, {name}", _STRANGER, _INPUT)
            held = "holds" if pull.mean() <= _MOST_PULL else "does not hold"
            lines.append(
                f"- ×{scale}, pull of a stranger's guide, {name}: {stated(pull, faces, 'pull')} cosine nearer to the "
                f"stranger than bicubic. That it is at most {_MOST_PULL:g} {held}."
            )
    return [*lines, ""]


def _proven(gain: np.ndarray, faces: list[Face], aim: float) -> str:
    above = interval(gain, [face.identity for face in faces])[0] > 0
    if gain.mean() >= aim and above:
        return "met"
    return "not met, though it is above zero" if above else "not met, and that there is any gain is unproven"


def _met(held: bool) -> str:
    return "met" if held else "not met"


def _paper_lines(real: dict[int, Contest], ours: str, variants: list[str]) -> list[str]:
    rows = {"Full": _OWN, **{name: name for name in variants}, "R": _STRANGER}
    lines = [
        "## Beside the paper's Table 1",
        "",
        f"Full is {ours} with the own guide, R the same with a stranger's. The paper's faces are others (VggFace2, "
        "WebFace), and so is its training, 20,273 pairs and two million steps: bicubic itself is not in its table. So "
        "compare what one row has more than another rather than rows. Rows that are empty were not measured here.",
        "",
    ]
    measures = ["PSNR", "SSIM"]
    for scale, contest in real.items():
        lines += table_header(
            f"×{scale}: PSNR / SSIM",
            ["ours", *(column for name in _PAPER_SETS for column in (f"paper, {name}", f"ours − {name}"))],
        )
        for variant, paper in PAPER_GFRNET.items():
            scores = contest.scores.get(rows.get(variant, ""), {})
            found = {measure: float(scores[measure].mean()) for measure in measures if scores}
            cells = [" / ".join(table_cells(found, measures)) if found else ""]
            for figures in paper[scale]:
                published = dict(zip(measures, figures, strict=True))
                apart = less(found, published)
                cells.append(" / ".join(table_cells(published, measures)))
                cells.append(" / ".join(table_cells(apart, measures, "+")) if found else "")
            lines.append(table_line(variant, cells))
        own = f"{contest.gain('PSNR', _OWN, _STRANGER).mean():+.2f}"
        theirs = [f"{a[0] - b[0]:+.2f}" for a, b in zip(*(PAPER_GFRNET[v][scale] for v in ("Full", "R")), strict=True)]
        lines += [table_line("*Full − R, PSNR*", [own, theirs[0], "", theirs[1], ""]), ""]
    return lines


def _contest_lines(contest: Contest, trials: list[Trial], subsets: dict[str, np.ndarray]) -> list[str]:
    """Return the tables of one damage: all measures by guide, gains over the input, the own guide over others."""
    faces = _truths(trials)
    measures = [measure for measure in contest.scores[_OWN] if not measure.startswith("stranger")]
    titles = [TITLES.get(measure, measure) for measure in measures]
    guides = [name for name in contest.scores if name not in (_INPUT, "-W", "-WG")]

    def row(title: str, after: str, before: str, places: np.ndarray) -> str:
        chosen = [faces[place] for place in places]
        return table_line(title, [stated(contest.gain(m, after, before)[places], chosen, m) for m in measures])

    everywhere = np.arange(len(trials))
    means = {name: {m: float(contest.scores[name][m].mean()) for m in measures} for name in (_INPUT, *guides)}
    return [
        f"## {contest.title}",
        "",
        *table_header("guide", titles),
        *(table_line(name, table_cells(each, measures)) for name, each in means.items()),
        "",
        *table_header("gain over the input, by guide", titles),
        *(row(guide, guide, _INPUT, everywhere) for guide in guides),
        *(row(f"{name} ({len(places)} pairs)", _OWN, _INPUT, places) for name, places in subsets.items()),
        "",
        *table_header("gain of the own guide over", titles),
        *(row(guide, _OWN, guide, everywhere) for guide in guides if guide != _OWN),
        *(row(f"{_STRANGER}, where it is {name}", _OWN, _STRANGER, places) for name, places in subsets.items()),
        "",
    ]


def _pull_lines(real: dict[int, Contest], trials: list[Trial], judges: _Judges) -> list[str]:
    """Return how much nearer to its guide a face comes by it, than the input is."""
    faces = _truths(trials)
    if not judges.names:
        return []
    whose = (
        ("mates: own guide", "own guide", _OWN),
        ("mates: no guide, nearer to the own one", "own guide", _ABSENT),
        ("strangers: a stranger's guide", "stranger", _STRANGER),
        ("strangers: no guide, nearer to the stranger", "stranger", _ABSENT),
    )
    lines = [
        "## The pull towards the guide",
        "",
        "Cosine of the restored face to the guide less that of the input. A mate should come nearer to the guide, as "
        "its truth is near; a stranger should not. Without a guide only restoring is at work, so the difference of two "
        "rows is what the guide did.",
        "",
    ]
    for scale, contest in real.items():
        for name in judges.names:
            lines += table_header(f"×{scale}, {name}", ["input", "restored", "pull", "truth"])
            for title, kind, guide in whose:
                measure = f"{kind}, {name}"
                means = [contest.scores[each][measure].mean() for each in (_INPUT, guide)]
                pull = stated(contest.gain(measure, guide, _INPUT), faces, "pull")
                cells = [*(f"{mean:.3f}" for mean in means), pull, f"{judges.nature(name, kind).mean():.3f}"]
                lines.append(table_line(title, cells))
            lines.append("")
    return lines


def _truths(trials: list[Trial]) -> list[Face]:
    return [trial.truth for trial in trials]


# Contact sheets


def sheet_places(gains: np.ndarray) -> np.ndarray:
    """Return the places of the 20 best and the 20 worst gains, best first; of 40 or fewer all."""
    order = np.argsort(-gains, kind="stable")
    return order if len(order) <= 2 * _SHEET_HALF else np.concatenate([order[:_SHEET_HALF], order[-_SHEET_HALF:]])


def _write_sheets(
    config: GuidedEvaluateConfig, unshown: Path, trials: list[Trial], contest: Contest, drawing: Restorer
) -> list[str]:
    """Write the sheets, a row for each pair; return what the report says of the one that may be shown."""
    gains = contest.gain("PSNR", _OWN, _INPUT)
    may = np.array([trial.truth.identity.startswith(SHOWN) for trial in trials])
    said = []
    for places, path in (
        (np.flatnonzero(may), config.sheet),
        (np.flatnonzero(~may), unshown / f"{config.sheet.stem}.others.jpg"),
    ):
        if not len(places):
            continue
        chosen = places[sheet_places(gains[places])]
        rows = [_pictures(trials[place], contest.inputs[place], drawing) for place in chosen]
        write_sheet(path, [np.concatenate([_small(each) for each in row.values()], axis=1) for row in rows])
        if path == config.sheet:
            said = [
                f"![Contact sheet]({path.name})",
                "",
                f"Columns: {', '.join(rows[0])}. {contest.title}, own guide. {len(chosen)} of {len(places)} pairs of "
                f"people who may be shown, by what they gain over the input, from {gains[chosen[0]]:+.2f} dB to "
                f"{gains[chosen[-1]]:+.2f} dB: the best {_SHEET_HALF} and the worst {_SHEET_HALF}, or all where there "
                "are fewer. Faces: Face Research Lab London Set, DeBruine & Jones 2017, CC BY 4.0.",
                "",
            ]
    return said


def _pictures(trial: Trial, image: np.ndarray, drawing: Restorer) -> dict[str, np.ndarray]:
    """Return a row of the sheet by column; what the network does not give out has none."""
    restored = drawing.restore(image, trial.guide.image)
    columns = {
        "input": image,
        "guide": trial.guide.image,
        "warped guide": restored.warped,
        "mask": restored.mask,
        "restored": restored.image,
        "truth": trial.truth.image,
    }
    return {name: picture for name, picture in columns.items() if picture is not None}


def _small(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, (_SHEET_SIDE, _SHEET_SIDE), interpolation=cv2.INTER_AREA)
