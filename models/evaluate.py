"""Evaluation of a restorer: `python -m models.evaluate configs/evaluate/sgen.yaml` writes its whole report.

Our table, the paper's and the difference, at the paper's protocol (models.protocols), judged by models.judges; and a
contact sheet. Each figure is the mean over images; intervals are of 95 % and redraw people. Pictures of people who may
not be shown go to a folder of their own, which git ignores.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Literal

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
from models.protocols import (
    PAPER_SGEN_PSNR,
    PAPER_SGEN_SSIM,
    PAPER_SISN,
    SGEN_NOISE,
    Noise,
    Pair,
    large_faces,
    protocol_faces,
    sgen_pair,
    sgen_size,
    sisn_pair,
)
from models.settings import RelativePath, read_settings

_TRAINED_Z = 6  # sizes z = 0 to 5 are SGEN's tables
_TRUTHS_Z = 8  # truths of 256 px reach z = 7
_LARGE_Z = 22  # photographs of 512 px reach z = 21
_FALL = 0.005  # dB: what two decimals do not show is no fall
_CROPPED = "PSNR, border cut off"
_TITLES = {"LPIPS": "LPIPS (AlexNet), less is better", "found": "share found again"}
_SHOWN = "ldn_"  # only the London set (CC BY 4.0) may be shown
_SHOWN_ROWS = 6
_PAGE_ROWS = 24

Method = Callable[[np.ndarray], np.ndarray]
"""(h, w, 3) uint8 BGR -> the same enlarged by the scale it is made for."""
Scores = dict[str, np.ndarray]
"""Of one method: each measure's figures, one an image."""
Means = dict[str, float]
"""Of one method: each measure's mean."""


class EvaluateConfig(BaseModel):
    """One evaluation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    protocol: Literal["sgen", "sisn"]
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
    beyond: bool = False
    """SGEN: also at sizes beyond those of training (J Figure 14)."""
    large_truths: RelativePath | None = None
    """For `beyond`: photographs of 512 px, a tar with its CSV, which says who is a test person."""
    noise_table: bool = False
    """SGEN: also at other noise (J Table VII)."""
    report: RelativePath
    """The Markdown file that is written."""
    sheet: RelativePath
    """The contact sheet that is written, of faces that may be shown."""
    limit: int | None = None
    """Only so many truths, for a test."""
    threads: int = 1
    """Of each network that runs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--unshown", type=Path, default=Path("out"), help="folder for pictures of people who may not be shown (out)"
    )
    arguments = parser.parse_args()
    try:
        config = read_settings(EvaluateConfig, arguments.config)
        print(evaluate(config, command=f"python -m models.evaluate {arguments.config}", unshown=arguments.unshown))
    except (OSError, ValueError) as exc:
        parser.exit(2, f"{exc}\n")


def evaluate(config: EvaluateConfig, *, command: str, unshown: Path) -> str:
    """Write the report and the contact sheets, and return the report.

    Sheets of all people who may not be shown go to the folder `unshown`. Raises ValueError if no truth fits, or if the
    network does not restore at a scale of the protocol.
    """
    faces = protocol_faces(config.truths)[: config.limit]
    if not faces:
        raise ValueError(f"{config.truths}: no face is 256 px, sharp (detail 0.09) and turned by no more than yaw 0.5")
    contest = Contest(config)
    cases, lines = (_sgen if config.protocol == "sgen" else _sisn)(contest, faces)
    sheet = _write_sheets(config, unshown, faces, cases)
    report = "\n".join([*_head(contest, faces, command), *lines, *sheet])
    config.report.parent.mkdir(parents=True, exist_ok=True)
    config.report.write_text(report)
    return report


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

    def __init__(self, config: EvaluateConfig) -> None:
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
        scores = {"PSNR": _each(psnr, images, truths)}
        if border:
            inner = [[image[border:-border, border:-border] for image in each] for each in (images, truths)]
            scores[_CROPPED] = _each(psnr, *inner)
        scores["SSIM"] = _each(ssim, images, truths)
        if self._lpips:
            scores["LPIPS"] = _each(self._lpips, images, truths)
            scores["MPS"] = mps(scores["SSIM"], scores["LPIPS"])
        for name, embedder in self._embedders.items():
            scores[f"identity, {name}"] = (embedder.embed(images, landmarks) * clean[name]).sum(axis=1)
        if self._detector:
            scores["found"] = self._found(images, landmarks)
        return scores

    def _found(self, images: list[np.ndarray], landmarks: list[np.ndarray]) -> np.ndarray:
        assert self._detector
        return _each(self._detector.finds, images, landmarks)


def _each(judge: Callable[..., float], images: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([judge(a, b) for a, b in zip(images, others, strict=True)], np.float64)


def _denoise(low: np.ndarray) -> np.ndarray:
    return cv2.fastNlMeansDenoisingColored(low, None, 20, 20, 3, 11)


def _head(contest: Contest, faces: list[Face], command: str) -> list[str]:
    scales = ", ".join(f"×{scale}" for scale in contest.card["scales"])
    return [
        f"# {contest.ours} at {contest.config.protocol.upper()}'s protocol",
        "",
        f"`{command}` on {platform.machine()}, ONNX Runtime {onnxruntime.__version__}, on the CPU. {len(faces)} faces "
        f"of {len(set(_people(faces)))} people out of {contest.config.truths.name}. The network's card says: it "
        f"restores {scales}; it was trained on: {contest.card['trained_on'] or 'not said'}.",
        "",
        "Means over images. PSNR on RGB, full frame, 8 bit; SSIM on luma, 11×11 Gaussian; identity: cosine to the "
        "truth's embedding, both at the truth's landmarks; found again: a box of YuNet holds the centre of the truth's "
        "landmarks. In brackets: 95 % intervals, redrawing people.",
        "",
    ]


# SGEN's report: a column for each size


def _sgen(contest: Contest, faces: list[Face]) -> tuple[list[Case], list[str]]:
    """Return the cases of SGEN's tables, and what the report says of them."""
    contest.scales(4)
    methods = contest.methods(4, noisy=True)
    cases = []
    for z in range(_TRAINED_Z):
        pairs = [sgen_pair(face, sgen_size(z), seed) for seed, face in enumerate(faces)]
        cases.append(contest.hold(_title(z), pairs, methods, shown=z == _TRAINED_Z - 1))
    lines = _sgen_tables(contest, faces, cases)
    if contest.config.beyond:
        lines += _beyond(contest, faces, methods)
    if contest.config.noise_table:
        lines += _noise_table(contest, faces, methods[contest.ours])
    return cases, lines


def _sgen_tables(contest: Contest, faces: list[Face], cases: list[Case]) -> list[str]:
    ours = contest.ours
    published = zip(PAPER_SGEN_PSNR[SGEN_NOISE], PAPER_SGEN_SSIM, strict=True)
    paper = [dict(zip(("PSNR", "SSIM"), figures, strict=True)) for figures in published]
    differences = [_less(case.means(ours), figures) for case, figures in zip(cases, paper, strict=True)]
    methods = [name for name in cases[0].scores if name not in (ours, "truth")]
    means = {name: np.mean([case.means(name)["PSNR"] for case in cases]) for name in methods}
    best = max((name for name in methods if name not in contest.config.others), key=lambda name: means[name])
    lines = [
        f"**{ours}: {_gain(faces, cases, ours, best, 'PSNR')} dB against the best rival, {best}**, as mean over the "
        f"{len(cases)} sizes.",
        "",
        "## At the sizes of its tables",
        "",
        f"Centre 217×256 of the face, by area to each size; ÷4 by cubic, Gaussian noise {SGEN_NOISE}, 8 bit.",
        "",
        *_by_size(cases, ours, ["PSNR", "SSIM"]),
        _sizes("*paper's SGEN-MSE (base 64, for this protocol alone; CelebA's test faces: other faces)*", paper),
        _sizes(f"*{ours} − paper*", differences, sign="+"),
        "",
    ]
    identities = [measure for measure in cases[0].scores[ours] if measure.startswith("identity")]
    for measures in (["LPIPS", "MPS"], identities, ["found"]):
        if measures and measures[0] in cases[0].scores[ours]:
            lines += [*_by_size(cases, ours, measures), ""]
    return [*lines, *_gains(faces, cases, ours)]


def _beyond(contest: Contest, faces: list[Face], methods: dict[str, Method]) -> list[str]:
    """J Figure 14: PSNR at sizes beyond those of training, of the truths and of larger photographs."""
    large = large_faces(contest.config.large_truths)[: contest.config.limit] if contest.config.large_truths else []
    curves: dict[str, list[np.ndarray]] = {}  # at each z one figure a face
    verdicts = []
    for chosen, count in ((faces, _TRUTHS_Z), (large, _LARGE_Z)):
        if not chosen:
            continue
        stem = chosen[0].name.split("/")[0]
        print(f"{stem}: up to {_title(count - 1)}", file=sys.stderr, flush=True)
        for name in ("bicubic", contest.ours):
            curves[f"{name}, {stem}"] = curve = [_psnr_at(methods[name], chosen, z) for z in range(count)]
        verdicts.append(f"On {stem}, {len(chosen)} faces of {len(set(_people(chosen)))} people: {_fall(chosen, curve)}")
    rows = [
        _line(f"{z}", [_title(z), *("" if values is None else f"{values.mean():.2f}" for values in row)])
        for z, row in enumerate(zip_longest(*curves.values()))
    ]
    return [
        "## Beyond the sizes of training (J Figure 14)",
        "",
        f"PSNR; z = 0 to {_TRAINED_Z - 1} are the sizes above. {' '.join(verdicts)} The paper has a plot alone: there "
        "PSNR goes on rising up to z = 27.",
        "",
        *_header("z", ["size", *curves]),
        *rows,
        "",
    ]


def _fall(faces: list[Face], curve: list[np.ndarray]) -> str:
    """Say whether PSNR falls from one size to the next beyond those of training."""
    steps = np.diff([values.mean() for values in curve])[_TRAINED_Z - 1 :]
    falls = [f"{z}" for z, step in enumerate(steps, start=_TRAINED_Z) if step < -_FALL]
    said = f"PSNR falls at z = {', '.join(falls)}, by {-steps.min():.2f} dB at most" if falls else "PSNR does not fall"
    change = _stated(curve[-1] - curve[_TRAINED_Z - 1], faces, "PSNR")
    return f"{said}; from z = {_TRAINED_Z - 1} to z = {len(curve) - 1} it changes by {change} dB."


def _noise_table(contest: Contest, faces: list[Face], ours: Method) -> list[str]:
    """J Table VII: PSNR by noise."""
    lines = [
        "## Other noise (J Table VII)",
        "",
        f"PSNR. One network, {contest.ours}, for all noise; the paper trained one for each. Uniform noise from 0 to 30 "
        "also brightens by 15 grey levels: left in, these alone hold PSNR below 24.6 dB.",
        "",
        *_header("PSNR", [*(_title(z) for z in range(_TRAINED_Z)), "mean"]),
    ]
    for noise, paper in PAPER_SGEN_PSNR.items():
        print(f"noise {noise}", file=sys.stderr, flush=True)
        found = [_psnr_at(ours, faces, z, noise).mean() for z in range(_TRAINED_Z)]
        lines += [
            _sizes(f"**{contest.ours}, {noise}**", [{"PSNR": value} for value in found]),
            _sizes(f"*paper, {noise}*", [{"PSNR": value} for value in paper]),
            _sizes("*difference*", [{"PSNR": a - b} for a, b in zip(found, paper, strict=True)], sign="+"),
        ]
    return [*lines, ""]


def _psnr_at(method: Method, faces: list[Face], z: int, noise: Noise = SGEN_NOISE) -> np.ndarray:
    pairs = (sgen_pair(face, sgen_size(z), seed, noise) for seed, face in enumerate(faces))
    return np.array([psnr(method(pair.low), pair.truth) for pair in pairs])


# SISN's report: a table for each scale


def _sisn(contest: Contest, faces: list[Face]) -> tuple[list[Case], list[str]]:
    """Return a case for each scale, and what the report says of them."""
    cases, lines = [], []
    for scale in contest.scales(4, 8):
        pairs = [sisn_pair(face, scale) for face in faces]
        # the author code cuts off 6 + s pixels on each side before it measures
        case = contest.hold(f"×{scale}", pairs, contest.methods(scale, noisy=False), border=6 + scale)
        lines += _sisn_tables(contest, faces, case, scale)
        cases.append(case)
    return cases, lines


def _sisn_tables(contest: Contest, faces: list[Face], case: Case, scale: int) -> list[str]:
    ours, measures = contest.ours, list(case.scores[contest.ours])
    paper = {
        name: dict(zip(("PSNR", "SSIM", "LPIPS", "MPS"), figures, strict=True)) | {_CROPPED: figures[0]}
        for name, figures in PAPER_SISN[scale].items()
    }
    apart = _less(case.means("bicubic"), paper["bicubic"])["PSNR"]
    return [
        f"## ×{scale}: from {256 // scale}×{256 // scale} to 256×256",
        "",
        f"**{ours}: {_gain(faces, [case], ours, 'bicubic', 'PSNR')} dB over bicubic.** In the paper SISN gains "
        f"{paper['SISN']['PSNR'] - paper['bicubic']['PSNR']:+.2f} dB over bicubic. ÷{scale} by Pillow's anti-aliased "
        "bicubic, no noise.",
        "",
        *_header(case.title, [_TITLES.get(measure, measure) for measure in measures]),
        *(_line(_bold(name, ours), _cells(case.means(name), measures)) for name in case.scores),
        _line("*paper's bicubic (FFHQ)*", _cells(paper["bicubic"], measures)),
        _line("*paper's SISN (FFHQ, Table 3)*", _cells(paper["SISN"], measures)),
        _line(f"*{ours} − paper's SISN*", _cells(_less(case.means(ours), paper["SISN"]), measures, sign="+")),
        "",
        "The paper does not say how it measures; its code cuts off a border before PSNR: its PSNR stands under both. "
        "Its figures are of 50 faces of FFHQ and of a network trained on 850 others. Our test faces and our training "
        f"are different ones; bicubic alone stands {apart:+.2f} dB from the paper's bicubic. So compare the gains.",
        "",
        *_gains(faces, [case], ours),
    ]


# Tables


def _by_size(cases: list[Case], ours: str, measures: list[str]) -> list[str]:
    """Return a table with a column for each case, of all who have these measures."""
    rows = [
        _sizes(_bold(name, ours), [{measure: case.means(name)[measure] for measure in measures} for case in cases])
        for name, scores in cases[0].scores.items()
        if set(measures) <= set(scores)
    ]
    titles = " / ".join(_TITLES.get(measure, measure) for measure in measures)
    return [*_header(titles, [*(case.title for case in cases), "mean"]), *rows]


def _sizes(title: str, columns: Sequence[Means], sign: str = "") -> str:
    """Return a row with a cell for each column, and their mean."""
    mean = {measure: float(np.mean([column[measure] for column in columns])) for measure in columns[0]}
    return _line(title, [" / ".join(_cells(column, list(column), sign)) for column in [*columns, mean]])


def _gains(faces: list[Face], cases: list[Case], ours: str) -> list[str]:
    """Return the table of what our network gains over each method, as mean over the cases."""
    known = cases[0].scores[ours]
    measures = [measure for measure in known if measure in ("PSNR", "LPIPS") or measure.startswith("identity")]
    return [
        *_header(f"gain of {ours} over", [_TITLES.get(measure, measure) for measure in measures]),
        *(
            _line(name, [_gain(faces, cases, ours, name, measure) for measure in measures])
            for name in cases[0].scores
            if name not in (ours, "truth")
        ),
        "",
    ]


def _gain(faces: list[Face], cases: list[Case], ours: str, rival: str, measure: str) -> str:
    return _stated(np.mean([c.scores[ours][measure] - c.scores[rival][measure] for c in cases], axis=0), faces, measure)


def _stated(values: np.ndarray, faces: list[Face], measure: str) -> str:
    """Return the mean of one figure a face, with its interval."""
    low, high = interval(values, _people(faces))
    mean, low_said, high_said = (_figure(measure, value, "+") for value in (float(values.mean()), low, high))
    return f"{mean} ({low_said} to {high_said})"


def _people(faces: list[Face]) -> list[str]:
    return [face.identity for face in faces]


def _less(figures: Means, others: Means) -> Means:
    return {measure: figures[measure] - other for measure, other in others.items() if measure in figures}


def _cells(figures: Means, measures: list[str], sign: str = "") -> list[str]:
    return [_figure(measure, figures[measure], sign) if measure in figures else "" for measure in measures]


def _figure(measure: str, value: float, sign: str = "") -> str:
    digits = 2 if measure.startswith("PSNR") else 3
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no -0.00


def _bold(name: str, ours: str) -> str:
    return f"**{name}**" if name == ours else name


def _header(title: str, columns: list[str]) -> list[str]:
    return [_line(title, columns), "|---" * (len(columns) + 1) + "|"]


def _line(title: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([title, *cells])} |"


def _title(z: int) -> str:
    width, height = sgen_size(z)
    return f"{height}×{width}"


# Contact sheets


def _write_sheets(config: EvaluateConfig, unshown: Path, faces: list[Face], cases: list[Case]) -> list[str]:
    """Write the sheets, a row for each face; return what the report says of the one that may be shown."""
    shown = [case for case in cases if case.restored]
    columns = [images for case in shown for images in case.restored.values()]
    columns.append([pair.truth for pair in shown[-1].pairs])
    rows = [np.concatenate(row, axis=1) for row in zip(*columns, strict=True)]
    free = [row for face, row in zip(faces, rows, strict=True) if face.identity.startswith(_SHOWN)]
    others = [row for face, row in zip(faces, rows, strict=True) if not face.identity.startswith(_SHOWN)]
    for page, first in enumerate(range(0, len(others), _PAGE_ROWS), start=1):
        _write_sheet(unshown / f"{config.sheet.stem}.others{page}.jpg", others[first : first + _PAGE_ROWS])
    if not free:
        return []
    _write_sheet(config.sheet, free[:_SHOWN_ROWS])
    names = "; ".join(f"{case.title}: {', '.join(case.restored)}" for case in shown)
    return [
        f"![Contact sheet]({config.sheet.name})",
        "",
        f"Columns: {names}; last the truth. Faces: Face Research Lab London Set, DeBruine & Jones 2017, CC BY 4.0.",
        "",
    ]


def _write_sheet(path: Path, rows: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), np.concatenate(rows), [cv2.IMWRITE_JPEG_QUALITY, 90]):
        raise OSError(f"{path} cannot be written")


if __name__ == "__main__":
    main()
