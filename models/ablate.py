"""Ablations: `python -m models.ablate configs/ablate/sgen-n.yaml` trains the variants of a paper's table, and judges.

Every variant has the same budget: steps, batch, faces and seeds; a seed's batches are the same for all. Each run is
judged on test faces at the paper's protocol (models.protocols), and the report says of every ordering that the paper
claims whether it holds here. A command that was killed goes on where it was: runs that are done, and their scores, are
kept in the folder of runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, field_validator, model_validator
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from models.checkpoint import NETWORKS, build, load_checkpoint
from models.dataset import Face
from models.degradation import SGEN_SIZES
from models.judges import REDRAWS, Lpips, mps, psnr, ssim
from models.protocols import Pair, protocol_faces, sgen_pair, sisn_pair
from models.settings import RelativePath, read_settings
from models.train import TrainConfig, train

Height = Literal[128, 144, 160, 176, 192, 208]
Name = Annotated[str, Field(pattern=r"^\w[\w.=+ -]*$")]
"""A variant's name, which is that of its folder too."""
Verdict = Literal["holds", "does not hold", "too close"]

_WIDTHS = {height: width for width, height in SGEN_SIZES} | {256: 256}
_FACTOR = 4  # of both protocols, for a network that does not enlarge by itself
_TOGETHER = 8  # so many faces go through a network at a time
_MEASURES = {"PSNR": 1, "SSIM": 1, "LPIPS": -1, "MPS": 1}  # -1: less is better
_OURS_ALONE = {"out", "seed", "minutes"}


class Variant(BaseModel):
    """What makes a variant differ from the base run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    network: str | None = None
    """Another network; then the base's `override` does not count."""
    preset: str | None = None
    """Another preset."""
    override: dict[str, Any] = {}
    """Fields of the network's config, beside the base's."""
    adversarial: float | None = Field(None, ge=0)
    """Another weight of SGEN's adversarial loss."""
    paper: dict[Literal["PSNR", "SSIM", "LPIPS", "MPS"], float] = {}
    """The paper's figures."""


class AblateConfig(BaseModel):
    """One ablation. In a YAML, paths are relative to the YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    title: str
    """The report's heading."""
    paper: str
    """Where the paper's figures are from: table, data, what they are means of."""
    smaller: str
    """What is smaller here than in the paper."""
    base: TrainConfig
    """The run that variants differ from; `protocols` names the one protocol, sgen or sisn, that also judges."""
    variants: dict[Name, Variant] = Field(min_length=1)
    """By name."""
    claims: list[tuple[str, str]] = []
    """Pairs of variants of which the first should be better."""
    seeds: list[NonNegativeInt] = Field([0, 1, 2], min_length=1)
    """A run of each variant for each of them."""
    truths: RelativePath
    """Faces that nobody trained on: a tar with its CSV."""
    sizes: list[Height] = Field([128, 144, 160, 176, 192, 208], min_length=1)
    """Heights of SGEN's truths; SISN's are 256 px."""
    limit: int | None = Field(None, gt=0)
    """Only so many truths."""
    lpips: RelativePath | None = None
    """LPIPS as ONNX, for LPIPS and MPS."""
    runs: RelativePath
    """The folder of runs: `VARIANT/seedN` for each."""
    report: RelativePath
    """The Markdown file that is written."""

    @field_validator("base", mode="before")
    @classmethod
    def _given_out(cls, base: Any) -> Any:
        if not isinstance(base, dict):
            return base
        if taken := _OURS_ALONE & base.keys():
            raise ValueError(f"{', '.join(sorted(taken))}: set by the ablation, whose budget is in steps")
        return {**base, "out": "."}

    @model_validator(mode="after")
    def _possible(self) -> AblateConfig:
        """Every run can be built and judged, and claims speak of variants: found now, not after hours."""
        if len(self.base.protocols) != 1 or self.protocol == "surveillance":
            raise ValueError("base.protocols: give one alone, sgen or sisn; it also judges")
        if self.truths in (*self.base.data, self.base.validation):
            raise ValueError("truths: the base run sees them")
        if unknown := {name for claim in self.claims for name in claim} - self.variants.keys():
            raise ValueError(f"claims: no variant is called {', '.join(sorted(unknown))}")
        wanted = _FACTOR if self.protocol == "sgen" else None
        for name in self.variants:
            try:
                scale = _factor(_described(self.run(name, self.seeds[0])))
            except (TypeError, ValueError) as exc:
                raise ValueError(f"variants.{name}: {' '.join(str(exc).split())}") from None
            wanted = wanted or scale
            if scale != wanted:
                raise ValueError(f"variants.{name}: it enlarges {scale} times, not {wanted} as it should")
        return self

    @property
    def protocol(self) -> str:
        return next(iter(self.base.protocols))

    @property
    def heights(self) -> list[int]:
        """Of the truths, in pixels."""
        return [256] if self.protocol == "sisn" else [*self.sizes]

    @property
    def scale(self) -> int:
        """How many times the protocol shrinks."""
        return _factor(_described(self.run(next(iter(self.variants)), self.seeds[0])))

    def run(self, name: str, seed: int) -> TrainConfig:
        """Return the run of this variant and seed."""
        variant = self.variants[name]
        changes = variant.model_dump(exclude_none=True, exclude={"paper"})
        if variant.network in (None, self.base.network):
            changes["override"] = self.base.override | variant.override
        return self.base.model_copy(update={**changes, "seed": seed, "out": self.runs / name / f"seed{seed}"})


@dataclass(frozen=True, slots=True)
class Run:
    """One variant trained with one seed, and judged."""

    parameters: int
    gmac: float
    """10^9 multiply-accumulates of the largest truth."""
    seconds: float | None
    """Of a step of training, the median: processor time on a CPU, of all threads; None where none was seen."""
    device: str
    scores: dict[str, list[float]]
    """By measure, one figure a face: the mean over the sizes."""


@dataclass(frozen=True, slots=True)
class Finding:
    """By how much one variant is better than another in one measure; more is better, of LPIPS too."""

    gain: float
    low: float
    high: float
    """The 95 % interval."""
    by_seed: list[float]
    verdict: Verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--only", metavar="VARIANT", action="append", help="train this variant alone; may be repeated")
    parser.add_argument("--seeds", type=int, metavar="N", help="the first N seeds alone")
    arguments = parser.parse_args()
    try:
        config = read_settings(AblateConfig, arguments.config)
        command = f"python -m models.ablate {arguments.config}"
        print(ablate(config, command=command, only=arguments.only, seeds=arguments.seeds))
    except (OSError, ValueError) as exc:
        parser.exit(2, f"{exc}\n")


def ablate(config: AblateConfig, *, command: str, only: Sequence[str] | None = None, seeds: int | None = None) -> str:
    """Train and judge what is missing, write the report and return it.

    With `only` these variants alone, with `seeds` the first so many; the report also tells of runs that are kept.
    Raises ValueError or OSError, in one line, where the truths, the choice, or a run that is there do not suit.
    """
    if unknown := set(only or ()) - config.variants.keys():
        raise ValueError(f"no variant is called {', '.join(sorted(unknown))}; there are {', '.join(config.variants)}")
    faces = protocol_faces(config.truths)[: config.limit]
    if not faces:
        raise ValueError(f"{config.truths}: no face is 256 px, sharp (detail 0.09) and turned by no more than yaw 0.5")
    if seeds is not None and seeds < 1:
        raise ValueError(f"{seeds} seeds: there must be one at least")
    lpips = Lpips(config.lpips) if config.lpips else None
    runs: dict[str, dict[int, Run]] = {name: {} for name in config.variants}
    for seed in config.seeds:  # all variants of a seed before the next, so that a part of the table is a whole one
        for name in config.variants:
            wanted = seed in config.seeds[:seeds] and name in (only or config.variants)
            if run := _obtain(config, name, seed, faces, lpips, wanted=wanted):
                runs[name][seed] = run
    report = "\n".join(_report(config, faces, runs, command))
    config.report.parent.mkdir(parents=True, exist_ok=True)
    config.report.write_text(report)
    return report


def compare(better: np.ndarray, worse: np.ndarray, identities: Sequence[str]) -> Finding:
    """Say whether `better` is more than `worse`, both (seeds, faces) with the seeds and faces in the same order.

    The interval redraws seeds and identities together; it holds if all of it is above 0, does not if all is below.
    """
    difference = np.asarray(better, np.float64) - worse
    names, places = np.unique(np.asarray(identities), return_inverse=True)
    sums = np.stack([np.bincount(places, weights=row) for row in difference])  # (seeds, people)
    counts = np.bincount(places)
    rng = np.random.default_rng(0)
    seeds, people = (rng.multinomial(n, np.full(n, 1 / n), REDRAWS) for n in (len(difference), len(names)))
    means = ((seeds @ sums) * people).sum(axis=1) / (len(difference) * (people @ counts))
    low, high = (float(value) for value in np.percentile(means, (2.5, 97.5)))
    verdict: Verdict = "holds" if low > 0 else "does not hold" if high < 0 else "too close"
    return Finding(float(difference.mean()), low, high, difference.mean(axis=1).tolist(), verdict)


# One run


def _obtain(
    config: AblateConfig, name: str, seed: int, faces: list[Face], lpips: Lpips | None, *, wanted: bool
) -> Run | None:
    """Return the run judged: kept, or trained and judged now if it is `wanted`."""
    settings = config.run(name, seed)
    asked = {
        "truths": config.truths.name, "faces": len(faces), "heights": config.heights,
        "lpips": config.lpips.name if config.lpips else None,
    }  # fmt: skip
    done = _is_done(settings)
    if not (done or wanted):
        return None
    print(f"{name}, seed {seed}", flush=True)
    with _timed() as begun:
        train(settings)  # what is done is only compared: a changed config is refused
    path = settings.out / "scores.json"
    kept = json.loads(path.read_text()) if done and path.exists() else {}
    if kept.get("asked") == asked:
        return Run(**kept["run"])
    if not wanted:
        return None
    seconds = float(np.median(np.diff(begun))) if len(begun) > 1 else kept.get("run", {}).get("seconds")
    run = _judge(config, settings, faces, lpips, seconds)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"asked": asked, "run": asdict(run)}))
    partial.replace(path)
    return run


def _is_done(settings: TrainConfig) -> bool:
    """Say whether the run has all its steps. Raises ValueError if it was planned for another number of them."""
    last = settings.out / "last.pt"
    if not last.exists():
        return False
    state = load_checkpoint(last)
    if (planned := state["config"]["steps"]) != settings.steps:
        raise ValueError(f"{last} was planned for {planned} steps, not {settings.steps}: delete it, or change `runs`")
    return bool(state["step"] >= settings.steps)


def _judge(
    config: AblateConfig, settings: TrainConfig, faces: list[Face], lpips: Lpips | None, seconds: float | None
) -> Run:
    """Judge the weights that validated best."""
    state = load_checkpoint(settings.out / "best.pt")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build(state["network"])
    network.load_state_dict(state["weights"])
    network = network.to(device, memory_format=torch.channels_last).eval()
    found: dict[str, list[list[float]]] = {}
    for height in config.heights:
        pairs = _pairs(config, faces, height)
        images = torch.stack([_given(network, pair.low, settings.enlarge) for pair in pairs])
        restored = _restore(network, images.to(device), pairs[0].truth.shape[:2])
        for measure, figures in _measured(restored, pairs, lpips).items():
            found.setdefault(measure, []).append(figures)
    largest = _pairs(config, faces[:1], max(config.heights))[0].low
    return Run(
        parameters=sum(p.numel() for p in network.parameters()),
        gmac=_gmac(network, _given(network, largest, settings.enlarge)[None].to(device)),
        seconds=seconds,
        device=torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()})",
        scores={measure: np.mean(figures, axis=0).tolist() for measure, figures in found.items()},
    )


def _pairs(config: AblateConfig, faces: list[Face], height: int) -> list[Pair]:
    if config.protocol == "sisn":
        return [sisn_pair(face, config.scale) for face in faces]
    return [sgen_pair(face, (_WIDTHS[height], height), seed) for seed, face in enumerate(faces)]


def _given(network: nn.Module, low: np.ndarray, enlarge: str) -> Tensor:
    """Return what the network is given of a small image, (3, h, w) RGB in [-1, 1].

    It is enlarged, if the network does not by itself, and reflected at the lower and right edge to its multiple.
    """
    if network.config.scale is None:
        how = cv2.INTER_NEAREST if enlarge == "nearest" else cv2.INTER_CUBIC
        low = cv2.resize(low, None, fx=_FACTOR, fy=_FACTOR, interpolation=how)
    bottom, right = (-side % network.config.multiple for side in low.shape[:2])
    low = cv2.copyMakeBorder(low, 0, bottom, 0, right, cv2.BORDER_REFLECT_101)
    return torch.from_numpy(np.ascontiguousarray(low[..., ::-1].transpose(2, 0, 1))).float() / 127.5 - 1


@torch.inference_mode()
def _restore(network: nn.Module, images: Tensor, size: tuple[int, int]) -> list[np.ndarray]:
    """(n, 3, h, w) RGB in [-1, 1] to (H, W, 3) uint8 BGR each, of this height and width."""
    restored = torch.cat([network(part) for part in images.split(_TOGETHER)])[..., : size[0], : size[1]]
    pixels = ((restored + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [np.ascontiguousarray(image[..., ::-1]) for image in pixels]


def _measured(restored: list[np.ndarray], pairs: list[Pair], lpips: Lpips | None) -> dict[str, list[float]]:
    """Return each measure's figures, one an image."""
    both = [(image, pair.truth) for image, pair in zip(restored, pairs, strict=True)]
    scores = {"PSNR": [psnr(*each) for each in both], "SSIM": [ssim(*each) for each in both]}
    if lpips:
        scores["LPIPS"] = [lpips(*each) for each in both]
        scores["MPS"] = [mps(*each) for each in zip(scores["SSIM"], scores["LPIPS"], strict=True)]
    return scores


def _gmac(network: nn.Module, image: Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    return counter.get_total_flops() / 2e9


@contextmanager
def _timed() -> Iterator[list[float]]:
    """While it is entered, note when each step of training begins: in processor time on a CPU, which others share."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    networks = tuple(known.network for known in NETWORKS.values())
    begun: list[float] = []

    def note(module: nn.Module, _: Any) -> None:
        if module.training and isinstance(module, networks):
            begun.append(clock())

    with register_module_forward_pre_hook(note):
        yield begun


def _described(run: TrainConfig) -> dict[str, Any]:
    """Return the description of the run's network. Raises ValueError for a network or preset that is unknown."""
    known = NETWORKS.get(run.network)
    if known is None:
        raise ValueError(f"network {run.network!r} is unknown; known: {', '.join(NETWORKS)}")
    if run.preset not in known.presets:
        raise ValueError(f"{run.network} has no preset {run.preset!r}; it has {', '.join(known.presets)}")
    return {"name": run.network, **asdict(known.presets[run.preset]), **run.override}


def _factor(description: dict[str, Any]) -> int:
    """Return how many times larger the result is than the small face. Raises TypeError or ValueError for bad fields."""
    return build(description, untrained=True).config.scale or _FACTOR  # type: ignore[union-attr, return-value]


# The report


def _report(config: AblateConfig, faces: list[Face], runs: dict[str, dict[int, Run]], command: str) -> list[str]:
    known = [run for of_seed in runs.values() for run in of_seed.values()]
    missing = [f"{name} seed {seed}" for name in runs for seed in config.seeds if seed not in runs[name]]
    people = [face.identity for face in faces]
    base = config.base
    return [
        f"# {config.title}",
        "",
        f"`{command}`, trained on: {', '.join(sorted({run.device for run in known})) or 'nothing yet'}. Every run: "
        f"{base.steps} steps of {base.batch} faces of {', '.join(path.stem for path in base.data)}, pixel loss "
        f"{base.pixel}, learning rate {base.learning_rate:g}; a seed's batches are the same for all. "
        f"{len(config.seeds)} seeds. Judged are the averaged weights that validated best, on {len(faces)} faces of "
        f"{len(set(people))} people out of {config.truths.name}: {_judged_at(config)}.",
        "",
        f"Smaller than in the paper: {config.smaller}",
        "",
        *([f"**Not complete.** Not run yet: {', '.join(missing)}.", ""] if missing else []),
        *_table(config, runs),
        "",
        *_claims(config, runs, people),
    ]


def _judged_at(config: AblateConfig) -> str:
    if config.protocol == "sisn":
        return f"÷{config.scale} by Pillow's anti-aliased bicubic, no noise, 256×256"
    return f"÷4 by cubic, Gaussian noise σ 30, 8 bit; means over the sizes {', '.join(map(_size, config.heights))}"


def _size(height: int) -> str:
    return f"{height}×{_WIDTHS[height]}"


def _table(config: AblateConfig, runs: dict[str, dict[int, Run]]) -> list[str]:
    """Return a row for each variant, and the paper's beneath it."""
    measures = _of_all(runs)
    titles = [f"{measure}, less is better" if _MEASURES[measure] < 0 else measure for measure in measures]
    lines = _header("variant", ["seeds", "parameters", "GMAC", "s a step", *titles])
    for name, variant in config.variants.items():
        found = list(runs[name].values())
        if not found:
            continue
        seconds = [run.seconds for run in found if run.seconds is not None]
        cells = [
            f"{len(found)}", f"{found[0].parameters:,}", f"{found[0].gmac:.3f}",
            f"{np.mean(seconds):.3f}" if seconds else "",
        ]  # fmt: skip
        lines.append(_line(f"**{name}**", [*cells, *(_spread(measure, found) for measure in measures)]))
        if variant.paper:
            figures = [f"*{_figure(m, variant.paper[m])}*" if m in variant.paper else "" for m in measures]
            lines.append(_line("*paper*", ["", "", "", "", *figures]))
    return [
        *lines,
        "",
        f"± is the standard deviation over seeds. GMAC: 10⁹ multiply-accumulates of one result of "
        f"{_size(max(config.heights))}. s a step: the median of training, on a CPU seconds of processor time. PSNR on "
        f"RGB, full frame, 8 bit; SSIM on luma, 11×11 Gaussian. The paper's figures: {config.paper}",
    ]


def _claims(config: AblateConfig, runs: dict[str, dict[int, Run]], people: list[str]) -> list[str]:
    lines = []
    for better, worse in config.claims:
        seeds = sorted(runs[better].keys() & runs[worse].keys())
        for measure in _of_all(runs) if seeds else []:
            a, b = (np.array([runs[name][seed].scores[measure] for seed in seeds]) for name in (better, worse))
            sign = _MEASURES[measure]
            finding = compare(sign * a, sign * b, people)
            theirs = [config.variants[name].paper.get(measure) for name in (better, worse)]
            paper = "" if None in theirs else _gain(measure, sign * (theirs[0] - theirs[1]))  # type: ignore[operator]
            low, high = (_gain(measure, value) for value in (finding.low, finding.high))
            by_seed = ", ".join(_gain(measure, value) for value in finding.by_seed)
            ours = f"{_gain(measure, finding.gain)} ({low} to {high})"
            lines.append(_line(f"{better} over {worse}", [measure, paper, ours, by_seed, f"**{finding.verdict}**"]))
    if not lines:
        return []
    return [
        "## Do the claims hold?",
        "",
        *_header("claim", ["in", "paper", "here", "by seed", ""]),
        *lines,
        "",
        "By how much the first is better, of LPIPS too. In brackets: the 95 % interval, redrawing seeds and people "
        "together. A claim holds if the whole interval is above 0, does not hold if all of it is below, and is too "
        "close otherwise. Redrawing a few seeds cannot tell of others: the interval is rather too narrow, so look at "
        "the seeds beside it. Where the paper's column is empty, the paper does not compare the two in this.",
        "",
    ]


def _of_all(runs: dict[str, dict[int, Run]]) -> list[str]:
    """Return the measures that there are."""
    found = {measure for of_seed in runs.values() for run in of_seed.values() for measure in run.scores}
    return [measure for measure in _MEASURES if measure in found]


def _spread(measure: str, runs: list[Run]) -> str:
    means = [float(np.mean(run.scores[measure])) for run in runs]
    mean = _figure(measure, float(np.mean(means)))
    return f"{mean} ± {_figure(measure, float(np.std(means, ddof=1)))}" if len(means) > 1 else mean


def _figure(measure: str, value: float) -> str:
    return f"{value:.{2 if measure == 'PSNR' else 4}f}"


def _gain(measure: str, value: float) -> str:
    digits = 3 if measure == "PSNR" else 4
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # + 0.0: no -0.000


def _header(title: str, columns: list[str]) -> list[str]:
    return [_line(title, columns), "|---" * (len(columns) + 1) + "|"]


def _line(title: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([title, *cells])} |"


if __name__ == "__main__":
    main()
