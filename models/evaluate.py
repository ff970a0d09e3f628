"""Evaluation of a restorer: `python -m models.evaluate configs/evaluate/sgen.yaml` writes a report with its tables.

SGEN's protocol: truths of 256 px, sharp and not in profile, the first two by file name of each identity; their
centre 217x256 brought by area to each of six sizes, a quarter of it by cubic, noise of sigma 30, clipped to 8 bit. PSNR
on RGB, SSIM on luma, each the mean over images; intervals redraw identities. Pictures of people who may not be shown go
to a folder of their own, which git ignores.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import yaml
from PIL import Image
from pydantic import BaseModel, ConfigDict
from skimage.metrics import structural_similarity

from models.dataset import Face, load_faces
from models.degradation import SGEN_SIZES, sgen_degrade

PAPER_SGEN_MSE = (23.00, 23.60, 24.12, 24.61, 24.98, 25.39)
"""PSNR of SGEN-MSE at the six sizes, J Table I, on CelebA's 20,000 test faces."""
_SIGMA = 30.0
_REDRAWS = 1000
_SHOWN = "ldn_"  # only the London set (CC BY 4.0) may be shown
_SHOWN_ROWS = 6
_PAGE_ROWS = 24

Method = Callable[[np.ndarray, tuple[int, int]], np.ndarray]
"""(low uint8 BGR, (width, height)) -> restored uint8 BGR."""


class EvaluateConfig(BaseModel):
    """One evaluation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    network: Path
    """The restorer as ONNX, with its card."""
    truths: Path
    """Faces that nobody trained on: a tar with its CSV."""
    rivals: dict[str, Path] = {}
    """Restorers that enlarge 4 times by themselves, RGB 0..1, as ONNX."""
    lpips: Path | None = None
    """LPIPS as ONNX: two images, RGB in [-1, 1], to a distance."""
    report: Path
    """The Markdown file that is written."""
    sheet: Path
    """The contact sheet that is written, of faces that may be shown."""
    limit: int | None = None
    """Only so many truths, for a test."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one method at one size, by image."""

    psnr: np.ndarray
    ssim: np.ndarray
    lpips: np.ndarray | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--unshown", type=Path, default=Path("out"), help="folder for pictures of people who may not be shown (out)"
    )
    arguments = parser.parse_args()
    path = arguments.config
    folder = path.resolve().parent
    config = EvaluateConfig(**yaml.safe_load(path.read_text()))
    config = config.model_copy(
        update={
            "network": folder / config.network,
            "truths": folder / config.truths,
            "rivals": {name: folder / rival for name, rival in config.rivals.items()},
            "lpips": folder / config.lpips if config.lpips else None,
            "report": folder / config.report,
            "sheet": folder / config.sheet,
        }
    )
    print(evaluate(config, command=f"python -m models.evaluate {path}", unshown=arguments.unshown))


def evaluate(config: EvaluateConfig, *, command: str, unshown: Path) -> str:
    """Write the report and the contact sheets, and return the report.

    Sheets of all people who may not be shown go to the folder `unshown`. Raises ValueError if no truth fits.
    """
    faces = protocol_faces(config.truths)[: config.limit]
    if not faces:
        raise ValueError(f"{config.truths}: no face is 256 px, sharp (detail 0.09) and turned by no more than yaw 0.5")
    methods: dict[str, Method] = {
        "nearest": lambda low, size: cv2.resize(low, size, interpolation=cv2.INTER_NEAREST),
        "bicubic": _bicubic,
        "NLM + bicubic": lambda low, size: _bicubic(cv2.fastNlMeansDenoisingColored(low, None, 20, 20, 3, 11), size),
        **{name: _rival(path) for name, path in config.rivals.items()},
    }
    card, ours = _restorer(config.network)
    methods[card["name"]] = ours
    distance = _lpips(config.lpips) if config.lpips else None

    results: dict[str, list[Scores]] = {name: [] for name in methods}
    for size in SGEN_SIZES:
        pairs = [_pair(face, size, seed) for seed, face in enumerate(faces)]
        columns = []
        for name, method in methods.items():
            columns.append([method(low, size) for low, _ in pairs])
            results[name].append(_score(columns[-1], [truth for _, truth in pairs], distance))
        columns.append([truth for _, truth in pairs])
    rows = [np.concatenate(row, axis=1) for row in zip(*columns, strict=True)]  # of the largest size
    shown = [row for face, row in zip(faces, rows, strict=True) if face.identity.startswith(_SHOWN)]
    if shown:
        _write_sheet(config.sheet, shown[:_SHOWN_ROWS])
    others = [row for face, row in zip(faces, rows, strict=True) if not face.identity.startswith(_SHOWN)]
    for page, first in enumerate(range(0, len(others), _PAGE_ROWS), start=1):
        _write_sheet(unshown / f"{config.sheet.stem}.others{page}.jpg", others[first : first + _PAGE_ROWS])
    report = _report(config, card, faces, results, command, sheet=bool(shown))
    config.report.parent.mkdir(parents=True, exist_ok=True)
    config.report.write_text(report)
    return report


def protocol_faces(truths: Path) -> list[Face]:
    """Return the truths of the protocol: size 256, detail >= 0.09, yaw <= 0.5, two of each identity."""
    with truths.with_suffix(".csv").open(newline="") as file:
        rows = {f"{truths.stem}/{row['file']}": row for row in csv.DictReader(file)}
    taken: dict[str, int] = {}
    faces = []
    for face in sorted(load_faces(truths), key=lambda face: face.name):
        row = rows[face.name]
        good = row["size"] == "256" and float(row["detail"]) >= 0.09 and float(row["yaw"]) <= 0.5
        if good and taken.get(face.identity, 0) < 2:
            taken[face.identity] = taken.get(face.identity, 0) + 1
            faces.append(face)
    return faces


def _pair(face: Face, size: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(low, truth) of the protocol; every face has its own noise."""
    left = (256 - 217) // 2
    truth = cv2.resize(face.image[:, left : left + 217], size, interpolation=cv2.INTER_AREA)
    return sgen_degrade(truth, np.random.default_rng([7, seed, size[0]]), sigma=_SIGMA), truth


def _score(restored: list[np.ndarray], truths: list[np.ndarray], distance: Any) -> Scores:
    return Scores(
        np.array([_psnr(a, b) for a, b in zip(restored, truths, strict=True)]),
        np.array([_ssim(a, b) for a, b in zip(restored, truths, strict=True)]),
        np.array([distance(a, b) for a, b in zip(restored, truths, strict=True)]) if distance else None,
    )


def _psnr(image: np.ndarray, truth: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((image.astype(np.float64) - truth) ** 2)))


def _ssim(image: np.ndarray, truth: np.ndarray) -> float:
    grey = [cv2.cvtColor(each, cv2.COLOR_BGR2GRAY) for each in (image, truth)]
    return float(
        structural_similarity(*grey, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
    )


def _bicubic(low: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(low).resize(size, Image.Resampling.BICUBIC))


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _restorer(path: Path) -> tuple[dict[str, Any], Method]:
    """Return our network's card and what restores with it."""
    session = _session(path)
    card = json.loads(session.get_modelmeta().custom_metadata_map["streamer.card"])
    how = cv2.INTER_NEAREST if card["enlarge"] == "nearest" else cv2.INTER_CUBIC
    name = card["inputs"][0]["name"]

    def run(low: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        enlarged = cv2.resize(low, size, interpolation=how)[..., ::-1].transpose(2, 0, 1)[None]
        out = session.run(None, {name: enlarged.astype(np.float32) / 127.5 - 1})[0][0]
        return np.clip(np.rint((out + 1) * 127.5), 0, 255).astype(np.uint8).transpose(1, 2, 0)[..., ::-1]

    return card, run


def _rival(path: Path) -> Method:
    session = _session(path)
    name = session.get_inputs()[0].name

    def run(low: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        out = session.run(None, {name: low[..., ::-1].transpose(2, 0, 1)[None].astype(np.float32) / 255})[0][0]
        return np.clip(np.rint(out * 255), 0, 255).astype(np.uint8).transpose(1, 2, 0)[..., ::-1]

    return run


def _lpips(path: Path) -> Callable[[np.ndarray, np.ndarray], float]:
    session = _session(path)
    names = [value.name for value in session.get_inputs()]

    def distance(image: np.ndarray, truth: np.ndarray) -> float:
        both = [each[..., ::-1].transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1 for each in (image, truth)]
        return float(np.ravel(session.run(None, dict(zip(names, both, strict=True)))[0])[0])

    return distance


def _interval(values: np.ndarray, identities: list[str]) -> tuple[float, float]:
    """The 95 % interval of the mean when identities are drawn anew."""
    names = sorted(set(identities))
    sums = np.array([sum(v for v, i in zip(values, identities, strict=True) if i == name) for name in names])
    counts = np.array([identities.count(name) for name in names])
    rng = np.random.default_rng(0)
    draws = rng.integers(len(names), size=(_REDRAWS, len(names)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _write_sheet(path: Path, rows: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), np.concatenate(rows), [cv2.IMWRITE_JPEG_QUALITY, 90]):
        raise OSError(f"{path} cannot be written")


def _report(
    config: EvaluateConfig,
    card: dict[str, Any],
    faces: list[Face],
    results: dict[str, list[Scores]],
    command: str,
    *,
    sheet: bool,
) -> str:
    identities = [face.identity for face in faces]
    ours = card["name"]
    means = {name: np.array([scores.psnr.mean() for scores in by_size]) for name, by_size in results.items()}
    best = max((name for name in means if name != ours), key=lambda name: means[name].mean())
    gains = np.mean([a.psnr - b.psnr for a, b in zip(results[ours], results[best], strict=True)], axis=0)
    low, high = _interval(gains, identities)
    sizes = [f"{height}×{width}" for width, height in SGEN_SIZES]

    def table(title: str, cells: Callable[[Scores], str], last: Callable[[list[Scores]], str]) -> list[str]:
        lines = [f"| {title} | " + " | ".join(sizes) + " | mean |", "|---" * (len(sizes) + 2) + "|"]
        for name, by_size in results.items():
            shown = f"**{name}**" if name == ours else name
            lines.append(f"| {shown} | " + " | ".join(cells(s) for s in by_size) + f" | {last(by_size)} |")
        return lines

    lines = [
        f"# {ours} at SGEN's protocol",
        "",
        f"`{command}` on {platform.machine()}, ONNX Runtime {onnxruntime.__version__}, on the CPU. {len(faces)} faces "
        f"of {len(set(identities))} people out of {config.truths.name}; ÷4, Gaussian noise σ {_SIGMA:g}, 8 bit.",
        "",
        f"**{ours}: {gains.mean():+.2f} dB against the best rival, {best}** (mean over the {len(sizes)} sizes; 95 % "
        f"interval, redrawing people: {low:+.2f} to {high:+.2f}). Its card says: it restores "
        f"{', '.join(f'×{scale}' for scale in card['scales'])}; it was trained on: {card['trained_on'] or 'not said'}.",
        "",
        *table("PSNR / SSIM", lambda s: f"{s.psnr.mean():.2f} / {s.ssim.mean():.3f}",
               lambda by_size: f"{np.mean([s.psnr for s in by_size]):.2f} / {np.mean([s.ssim for s in by_size]):.3f}"),
        _paper_row("paper's SGEN-MSE (base 64, for this protocol alone; CelebA's test faces: other faces)",
                   np.array(PAPER_SGEN_MSE), "{:.2f}"),
        _paper_row(f"{ours} − paper", means[ours] - PAPER_SGEN_MSE, "{:+.2f}"),
        "",
    ]  # fmt: skip
    if config.lpips:

        def lpips(scores: Scores) -> float:
            return float(np.nan if scores.lpips is None else scores.lpips.mean())

        lines += [
            *table("LPIPS (AlexNet), less is better", lambda s: f"{lpips(s):.3f}",
                   lambda by_size: f"{np.mean([lpips(s) for s in by_size]):.3f}"),
            "",
        ]  # fmt: skip
    if sheet:
        lines += [
            f"![Contact sheet]({config.sheet.name})",
            "",
            f"Columns: {', '.join(results)}, truth; {sizes[-1]}. Faces: Face Research Lab London Set, DeBruine & Jones "
            "2017, CC BY 4.0.",
            "",
        ]
    return "\n".join(lines)


def _paper_row(title: str, values: np.ndarray, form: str) -> str:
    cells = (title, *(form.format(value) for value in values), form.format(values.mean()))
    return "| " + " | ".join(f"*{cell}*" for cell in cells) + " |"


if __name__ == "__main__":
    main()
