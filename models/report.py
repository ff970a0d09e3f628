"""What the evaluations of all networks share: who is judged by what, the tables of a report, the contact sheets."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
from pydantic import BaseModel, ConfigDict

from models.dataset import Face
from models.judges import (
    FaceDetector,
    FaceEmbedder,
    Lpips,
    OnnxRestorer,
    bicubic,
    interval,
    mps,
    psnr,
    real_esrgan,
    ssim,
)
from models.protocols import Pair
from models.settings import RelativePath

CROPPED = "PSNR, border cut off"
TITLES = {"LPIPS": "LPIPS (AlexNet), less is better", "found": "share found again"}
SHOWN = "ldn_"  # only the London set (CC BY 4.0) may be shown
_SHOWN_ROWS = 6
_PAGE_ROWS = 24

Method = Callable[[np.ndarray], np.ndarray]
"""(h, w, 3) uint8 BGR -> the same enlarged by the scale it is made for."""
Scores = dict[str, np.ndarray]
"""Of one method: each measure's figures, one an image."""
Means = dict[str, float]
"""Of one method: each measure's mean."""


class JudgedConfig(BaseModel):
    """What every evaluation of a restorer names. In a YAML, paths are relative to the YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    protocol: str
    """Whose protocol and tables."""
    network: RelativePath
    """The restorer as ONNX, with its card."""
    truths: RelativePath
    """Faces that nobody trained on: a tar with its CSV."""
    rivals: dict[str, RelativePath] = {}
    """Restorers of others that enlarge 4 times by themselves, RGB 0..1, as ONNX (Real-ESRGAN)."""
    others: dict[str, RelativePath] = {}
    """Further restorers with our card, such as rivals that we trained, at the scales that they have."""
    lpips: RelativePath | None = None
    """LPIPS as ONNX, for LPIPS and MPS."""
    embedders: dict[str, RelativePath] = {}
    """Face recognisers as ONNX, for the identity."""
    detector: RelativePath | None = None
    """YuNet as ONNX, for the share of faces found again."""
    report: RelativePath
    """The Markdown file that is written."""
    sheet: RelativePath
    """The contact sheet that is written, of faces that may be shown."""
    limit: int | None = None
    """Only so many truths, for a test."""
    threads: int = 1
    """Of each network that runs."""


@dataclass(frozen=True, slots=True)
class Case:
    """One size or scale of a protocol, and how every method did there."""

    title: str
    pairs: list[Pair]
    restored: dict[str, list[np.ndarray]]
    """By method, ours last; empty if no sheet shows this case."""
    scores: dict[str, Scores]
    """By method; also of the truth, which can be found too."""

    def means(self, name: str) -> Means:
        return {measure: float(values.mean()) for measure, values in self.scores[name].items()}


class Contest:
    """All restorers of an evaluation, and who judges them."""

    def __init__(self, config: JudgedConfig) -> None:
        """Raises ValueError where two restorers share a name or one has no card."""
        self.config = config
        ours = OnnxRestorer(config.network, threads=config.threads)
        self.card, self.ours = ours.card, str(ours.card["name"])
        names = ["nearest", "bicubic", "NLM + bicubic", "truth", *config.rivals, *config.others, self.ours]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]} is the name of more than one restorer")
        self._restorers = {name: real_esrgan(path, threads=config.threads) for name, path in config.rivals.items()}
        self._restorers |= {name: OnnxRestorer(p, threads=config.threads) for name, p in config.others.items()}
        self._restorers[self.ours] = ours
        self._lpips = Lpips(config.lpips, threads=config.threads) if config.lpips else None
        self._embedders = {name: FaceEmbedder(p, threads=config.threads) for name, p in config.embedders.items()}
        self._detector = FaceDetector(config.detector) if config.detector else None

    def scales(self, *wanted: int) -> list[int]:
        """Return which of these scales our network has. Raises ValueError if it has none."""
        if found := [scale for scale in wanted if scale in self.card["scales"]]:
            return found
        asked = " or ".join(f"×{scale}" for scale in wanted)
        raise ValueError(f"{self.ours} does not restore {asked}; its card says {self.card['scales']}")

    def methods(self, scale: int, *, noisy: bool) -> dict[str, Method]:
        """Return all that enlarge `scale` times, by name, ours last; `noisy` brings in non-local means."""
        methods: dict[str, Method] = {
            "nearest": lambda low: cv2.resize(low, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST),
            "bicubic": lambda low: bicubic(low, scale),
        }
        if noisy:
            methods["NLM + bicubic"] = lambda low: bicubic(_denoise(low), scale)
        able = {name: each for name, each in self._restorers.items() if scale in each.card["scales"]}
        return methods | {name: partial(each.restore, scale=scale) for name, each in able.items()}

    def hold(
        self, title: str, pairs: list[Pair], methods: dict[str, Method], *, border: int = 0, shown: bool = True
    ) -> Case:
        """Let every method restore every pair and judge it; with a `border` PSNR also with so many pixels cut off."""
        print(f"{title}: {len(pairs)} faces", file=sys.stderr, flush=True)
        restored = {name: [method(pair.low) for pair in pairs] for name, method in methods.items()}
        truths, landmarks = [pair.truth for pair in pairs], [pair.landmarks for pair in pairs]
        clean = {name: embedder.embed(truths, landmarks) for name, embedder in self._embedders.items()}
        scores = {name: self._judge(images, pairs, clean, border) for name, images in restored.items()}
        if self._detector:
            scores["truth"] = {"found": self._found(truths, landmarks)}
        return Case(title, pairs, restored if shown else {}, scores)

    def _judge(self, images: list[np.ndarray], pairs: list[Pair], clean: dict[str, np.ndarray], border: int) -> Scores:
        truths, landmarks = [pair.truth for pair in pairs], [pair.landmarks for pair in pairs]
        scores = {"PSNR": judge_each(psnr, images, truths)}
        if border:
            inner = [[image[border:-border, border:-border] for image in each] for each in (images, truths)]
            scores[CROPPED] = judge_each(psnr, *inner)
        scores["SSIM"] = judge_each(ssim, images, truths)
        if self._lpips:
            scores["LPIPS"] = judge_each(self._lpips, images, truths)
            scores["MPS"] = mps(scores["SSIM"], scores["LPIPS"])
        for name, embedder in self._embedders.items():
            scores[f"identity, {name}"] = (embedder.embed(images, landmarks) * clean[name]).sum(axis=1)
        if self._detector:
            scores["found"] = self._found(images, landmarks)
        return scores

    def _found(self, images: list[np.ndarray], landmarks: list[np.ndarray]) -> np.ndarray:
        assert self._detector
        return judge_each(self._detector.finds, images, landmarks)


def judge_each(judge: Callable[..., float], images: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([judge(a, b) for a, b in zip(images, others, strict=True)], np.float64)


def report_head(contest: Contest, faces: list[Face], command: str) -> list[str]:
    scales = ", ".join(f"×{scale}" for scale in contest.card["scales"])
    return [
        f"# {contest.ours} at {contest.config.protocol.upper()}'s protocol",
        "",
        f"`{command}` on {platform.machine()}, ONNX Runtime {onnxruntime.__version__}, on the CPU. {len(faces)} faces "
        f"of {len(set(people_of(faces)))} people out of {contest.config.truths.name}. The network's card says: it "
        f"restores {scales}; it was trained on: {contest.card['trained_on'] or 'not said'}.",
        "",
        "Means over images. PSNR on RGB, full frame, 8 bit; SSIM on luma, 11×11 Gaussian; identity: cosine to the "
        "truth's embedding, both at the truth's landmarks; found again: a box of YuNet holds the centre of the truth's "
        "landmarks. In brackets: 95 % intervals, redrawing people.",
        "",
    ]


def stated(values: np.ndarray, faces: list[Face], measure: str) -> str:
    """Return the mean of one figure a face, with its interval."""
    low, high = interval(values, people_of(faces))
    mean, low_said, high_said = (as_figure(measure, value, "+") for value in (float(values.mean()), low, high))
    return f"{mean} ({low_said} to {high_said})"


def people_of(faces: list[Face]) -> list[str]:
    return [face.identity for face in faces]


def less(figures: Means, others: Means) -> Means:
    return {measure: figures[measure] - other for measure, other in others.items() if measure in figures}


def table_cells(figures: Means, measures: list[str], sign: str = "") -> list[str]:
    return [as_figure(measure, figures[measure], sign) if measure in figures else "" for measure in measures]


def as_figure(measure: str, value: float, sign: str = "") -> str:
    digits = 2 if measure.startswith("PSNR") else 3
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no -0.00


def bold(name: str, ours: str) -> str:
    return f"**{name}**" if name == ours else name


def table_header(title: str, columns: list[str]) -> list[str]:
    return [table_line(title, columns), "|---" * (len(columns) + 1) + "|"]


def table_line(title: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([title, *cells])} |"


def write_sheets(config: JudgedConfig, unshown: Path, faces: list[Face], cases: list[Case]) -> list[str]:
    """Write the sheets, a row for each face; return what the report says of the one that may be shown."""
    shown = [case for case in cases if case.restored]
    columns = [images for case in shown for images in case.restored.values()]
    columns.append([pair.truth for pair in shown[-1].pairs])
    rows = [np.concatenate(row, axis=1) for row in zip(*columns, strict=True)]
    free = [row for face, row in zip(faces, rows, strict=True) if face.identity.startswith(SHOWN)]
    others = [row for face, row in zip(faces, rows, strict=True) if not face.identity.startswith(SHOWN)]
    for page, first in enumerate(range(0, len(others), _PAGE_ROWS), start=1):
        write_sheet(unshown / f"{config.sheet.stem}.others{page}.jpg", others[first : first + _PAGE_ROWS])
    if not free:
        return []
    write_sheet(config.sheet, free[:_SHOWN_ROWS])
    names = "; ".join(f"{case.title}: {', '.join(case.restored)}" for case in shown)
    return [
        f"![Contact sheet]({config.sheet.name})",
        "",
        f"Columns: {names}; last the truth. Faces: Face Research Lab London Set, DeBruine & Jones 2017, CC BY 4.0.",
        "",
    ]


def write_sheet(path: Path, rows: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), np.concatenate(rows), [cv2.IMWRITE_JPEG_QUALITY, 90]):
        raise OSError(f"{path} cannot be written")


def _denoise(low: np.ndarray) -> np.ndarray:
    return cv2.fastNlMeansDenoisingColored(low, None, 20, 20, 3, 11)
