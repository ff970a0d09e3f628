"""Evaluation of a restorer: `python -m models.evaluate configs/evaluate/sgen.yaml` writes its whole report.

Our table, the paper's and the difference, at the paper's protocol (models.protocols), judged by models.judges; and a
contact sheet. Each figure is the mean over images; intervals are of 95 % and redraw people. Pictures of people who may
not be shown go to a folder of their own, which git ignores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel

from models.dataset import Face
from models.evaluate_embedder import EmbedderEvaluateConfig, evaluate_embedder
from models.evaluate_guided import GuidedEvaluateConfig, evaluate_guided
from models.evaluate_real import RealEvaluateConfig, evaluate_real
from models.judges import psnr
from models.protocols import (
    PAPER_SGEN_PSNR,
    PAPER_SGEN_SSIM,
    PAPER_SISN,
    SGEN_NOISE,
    Noise,
    large_faces,
    protocol_faces,
    sgen_pair,
    sgen_size,
    sisn_pair,
)
from models.report import (
    CROPPED,
    TITLES,
    Case,
    Contest,
    JudgedConfig,
    Means,
    Method,
    bold,
    less,
    people_of,
    report_head,
    stated,
    table_cells,
    table_header,
    table_line,
    write_sheets,
)
from models.settings import RelativePath, read_settings

_TRAINED_Z = 6  # sizes z = 0 to 5 are SGEN's tables
_TRUTHS_Z = 8  # truths of 256 px reach z = 7
_LARGE_Z = 22  # photographs of 512 px reach z = 21
_FALL = 0.005  # dB: what two decimals do not show is no fall


class EvaluateConfig(JudgedConfig):
    """One evaluation of SGEN or SISN."""

    protocol: Literal["sgen", "sisn"]
    """Whose protocol and tables."""
    beyond: bool = False
    """SGEN: also at sizes beyond those of training (J Figure 14)."""
    large_truths: RelativePath | None = None
    """For `beyond`: photographs of 512 px, a tar with its CSV, which says who is a test person."""
    noise_table: bool = False
    """SGEN: also at other noise (J Table VII)."""


class _Kind(BaseModel):
    protocol: Literal["sgen", "sisn", "scgan", "gfrnet", "embedder"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--unshown", type=Path, default=Path("out"), help="folder for pictures of people who may not be shown (out)"
    )
    arguments = parser.parse_args()
    told = {"command": f"python -m models.evaluate {arguments.config}", "unshown": arguments.unshown}
    try:
        match read_settings(_Kind, arguments.config).protocol:
            case "gfrnet":
                print(evaluate_guided(read_settings(GuidedEvaluateConfig, arguments.config), **told))
            case "embedder":
                config = read_settings(EmbedderEvaluateConfig, arguments.config)
                print(evaluate_embedder(config, command=f"python -m models.evaluate {arguments.config}"))
            case "scgan":
                print(evaluate_real(read_settings(RealEvaluateConfig, arguments.config), **told))
            case _:
                print(evaluate(read_settings(EvaluateConfig, arguments.config), **told))
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
    cases, lines = _sgen(config, contest, faces) if config.protocol == "sgen" else _sisn(contest, faces)
    sheet = write_sheets(config, unshown, faces, cases)
    report = "\n".join([*report_head(contest, faces, command), *lines, *sheet])
    config.report.parent.mkdir(parents=True, exist_ok=True)
    config.report.write_text(report)
    return report


# SGEN's report: a column for each size


def _sgen(config: EvaluateConfig, contest: Contest, faces: list[Face]) -> tuple[list[Case], list[str]]:
    """Return the cases of SGEN's tables, and what the report says of them."""
    contest.scales(4)
    methods = contest.methods(4, noisy=True)
    cases = []
    for z in range(_TRAINED_Z):
        pairs = [sgen_pair(face, sgen_size(z), seed) for seed, face in enumerate(faces)]
        cases.append(contest.hold(_title(z), pairs, methods, shown=z == _TRAINED_Z - 1))
    lines = _sgen_tables(contest, faces, cases)
    if config.beyond:
        lines += _beyond(config, contest, faces, methods)
    if config.noise_table:
        lines += _noise_table(contest, faces, methods[contest.ours])
    return cases, lines


def _sgen_tables(contest: Contest, faces: list[Face], cases: list[Case]) -> list[str]:
    ours = contest.ours
    published = zip(PAPER_SGEN_PSNR[SGEN_NOISE], PAPER_SGEN_SSIM, strict=True)
    paper = [dict(zip(("PSNR", "SSIM"), figures, strict=True)) for figures in published]
    differences = [less(case.means(ours), figures) for case, figures in zip(cases, paper, strict=True)]
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


def _beyond(config: EvaluateConfig, contest: Contest, faces: list[Face], methods: dict[str, Method]) -> list[str]:
    """J Figure 14: PSNR at sizes beyond those of training, of the truths and of larger photographs."""
    large = large_faces(config.large_truths)[: config.limit] if config.large_truths else []
    curves: dict[str, list[np.ndarray]] = {}  # at each z one figure a face
    verdicts = []
    for chosen, count in ((faces, _TRUTHS_Z), (large, _LARGE_Z)):
        if not chosen:
            continue
        stem = chosen[0].name.split("/")[0]
        print(f"{stem}: up to {_title(count - 1)}", file=sys.stderr, flush=True)
        for name in ("bicubic", contest.ours):
            curves[f"{name}, {stem}"] = curve = [_psnr_at(methods[name], chosen, z) for z in range(count)]
        verdicts.append(
            f"On {stem}, {len(chosen)} faces of {len(set(people_of(chosen)))} people: {_fall(chosen, curve)}"
        )
    rows = [
        table_line(f"{z}", [_title(z), *("" if values is None else f"{values.mean():.2f}" for values in row)])
        for z, row in enumerate(zip_longest(*curves.values()))
    ]
    return [
        "## Beyond the sizes of training (J Figure 14)",
        "",
        f"PSNR; z = 0 to {_TRAINED_Z - 1} are the sizes above. {' '.join(verdicts)} The paper has a plot alone: there "
        "PSNR goes on rising up to z = 27.",
        "",
        *table_header("z", ["size", *curves]),
        *rows,
        "",
    ]


def _fall(faces: list[Face], curve: list[np.ndarray]) -> str:
    """Say whether PSNR falls from one size to the next beyond those of training."""
    steps = np.diff([values.mean() for values in curve])[_TRAINED_Z - 1 :]
    falls = [f"{z}" for z, step in enumerate(steps, start=_TRAINED_Z) if step < -_FALL]
    said = f"PSNR falls at z = {', '.join(falls)}, by {-steps.min():.2f} dB at most" if falls else "PSNR does not fall"
    change = stated(curve[-1] - curve[_TRAINED_Z - 1], faces, "PSNR")
    return f"{said}; from z = {_TRAINED_Z - 1} to z = {len(curve) - 1} it changes by {change} dB."


def _noise_table(contest: Contest, faces: list[Face], ours: Method) -> list[str]:
    """J Table VII: PSNR by noise."""
    lines = [
        "## Other noise (J Table VII)",
        "",
        f"PSNR. One network, {contest.ours}, for all noise; the paper trained one for each. Uniform noise from 0 to 30 "
        "also brightens by 15 grey levels: left in, these alone hold PSNR below 24.6 dB.",
        "",
        *table_header("PSNR", [*(_title(z) for z in range(_TRAINED_Z)), "mean"]),
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
        name: dict(zip(("PSNR", "SSIM", "LPIPS", "MPS"), figures, strict=True)) | {CROPPED: figures[0]}
        for name, figures in PAPER_SISN[scale].items()
    }
    apart = less(case.means("bicubic"), paper["bicubic"])["PSNR"]
    return [
        f"## ×{scale}: from {256 // scale}×{256 // scale} to 256×256",
        "",
        f"**{ours}: {_gain(faces, [case], ours, 'bicubic', 'PSNR')} dB over bicubic.** In the paper SISN gains "
        f"{paper['SISN']['PSNR'] - paper['bicubic']['PSNR']:+.2f} dB over bicubic. ÷{scale} by Pillow's anti-aliased "
        "bicubic, no noise.",
        "",
        *table_header(case.title, [TITLES.get(measure, measure) for measure in measures]),
        *(table_line(bold(name, ours), table_cells(case.means(name), measures)) for name in case.scores),
        table_line("*paper's bicubic (FFHQ)*", table_cells(paper["bicubic"], measures)),
        table_line("*paper's SISN (FFHQ, Table 3)*", table_cells(paper["SISN"], measures)),
        table_line(f"*{ours} − paper's SISN*", table_cells(less(case.means(ours), paper["SISN"]), measures, sign="+")),
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
        _sizes(bold(name, ours), [{measure: case.means(name)[measure] for measure in measures} for case in cases])
        for name, scores in cases[0].scores.items()
        if set(measures) <= set(scores)
    ]
    titles = " / ".join(TITLES.get(measure, measure) for measure in measures)
    return [*table_header(titles, [*(case.title for case in cases), "mean"]), *rows]


def _sizes(title: str, columns: Sequence[Means], sign: str = "") -> str:
    """Return a row with a cell for each column, and their mean."""
    mean = {measure: float(np.mean([column[measure] for column in columns])) for measure in columns[0]}
    return table_line(title, [" / ".join(table_cells(column, list(column), sign)) for column in [*columns, mean]])


def _gains(faces: list[Face], cases: list[Case], ours: str) -> list[str]:
    """Return the table of what our network gains over each method, as mean over the cases."""
    known = cases[0].scores[ours]
    measures = [measure for measure in known if measure in ("PSNR", "LPIPS") or measure.startswith("identity")]
    return [
        *table_header(f"gain of {ours} over", [TITLES.get(measure, measure) for measure in measures]),
        *(
            table_line(name, [_gain(faces, cases, ours, name, measure) for measure in measures])
            for name in cases[0].scores
            if name not in (ours, "truth")
        ),
        "",
    ]


def _gain(faces: list[Face], cases: list[Case], ours: str, rival: str, measure: str) -> str:
    return stated(np.mean([c.scores[ours][measure] - c.scores[rival][measure] for c in cases], axis=0), faces, measure)


def _title(z: int) -> str:
    width, height = sgen_size(z)
    return f"{height}×{width}"


# Contact sheets


if __name__ == "__main__":
    main()
