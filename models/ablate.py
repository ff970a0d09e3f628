"""Ablations: `python -m models.ablate configs/ablate/sgen-n.yaml` trains the variants of a paper's table, and judges.

Every variant has the same budget: steps, batch, faces and seeds; a seed's batches are the same for all. Each run is
judged on test faces (models.ablate_judges), and the report says of every ordering that the paper claims whether it
holds here. A command that was killed goes on where it was: runs that are done, and their scores, are kept in the folder
of runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from models.ablate_judges import FACTOR, BlindJudge, GuidedJudge, Judge, ScganJudge
from models.checkpoint import build, load_checkpoint
from models.gfrnet import VARIANTS
from models.judges import REDRAWS
from models.loop import RunConfig, Task
from models.settings import RelativePath, read_settings
from models.train import BlindRestoration, TrainConfig, train
from models.train_gfrnet import GfrnetRunConfig, GuidedRestoration
from models.train_scgan import ScganRunConfig, ScganTraining, make_branches

Height = Literal[128, 144, 160, 176, 192, 208]
Name = Annotated[str, Field(pattern=r"^-?[^\W_][\w.=+ -]*$")]
"""A variant's name, and its folder's; one that begins with - (the papers' -F) lies in a folder that begins with _."""
Verdict = Literal["holds", "does not hold", "too close"]

_OURS_ALONE = {"out", "seed", "minutes"}


class _Kind(NamedTuple):
    config: type[RunConfig]
    task: Callable[[Any, torch.device], Task]
    measures: tuple[str, ...]


_BLIND = _Kind(TrainConfig, BlindRestoration, BlindJudge.measures)
_KINDS = {
    "scgan": _Kind(ScganRunConfig, ScganTraining, ScganJudge.measures),
    "gfrnet": _Kind(GfrnetRunConfig, GuidedRestoration, GuidedJudge.measures),
}
"""Networks that are trained and judged otherwise than by pairs of a damaged and a clean face."""


class Variant(BaseModel):
    """What makes a variant differ from the base run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    network: str | None = None
    """Another network; then the base's `override` does not count."""
    preset: str | None = None
    """Another preset."""
    override: dict[str, Any] = {}
    """Fields of the network's config, beside the base's."""
    adversarial: float | None = None
    """Another weight of SGEN's adversarial loss."""
    variant: str | None = None
    """Another row of GFRNet's table. R, which differs from Full in the test alone, is judged on Full's weights."""
    share: str | None = None
    """What else SCGAN's degraders share."""
    cycles: str | None = None
    """Which of SCGAN's cycles there are instead."""
    losses: dict[str, Any] = {}
    """Fields of SCGAN's losses, beside the base's."""
    paper: dict[str, float] = {}
    """The paper's figures, by the measure's name in the report."""


class AblateConfig(BaseModel):
    """One ablation. In a YAML, paths are relative to the YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    title: str
    """The report's heading."""
    paper: str
    """Where the paper's figures are from: table, data, what they are means of."""
    smaller: str
    """What is smaller here than in the paper."""
    base: RunConfig
    """The run that variants differ from, of the kind that its `network` wants. A blind one names in `protocols` the one
    protocol, sgen or sisn, that also judges; the side and the damage of others do."""
    variants: dict[Name, Variant] = Field(min_length=1)
    """By name."""
    claims: list[tuple[str, str]] = []
    """Pairs of variants of which the first should be better."""
    seeds: list[NonNegativeInt] = Field([0, 1, 2], min_length=1)
    """A run of each variant for each of them."""
    truths: RelativePath
    """Faces that nobody trained on: a tar with its CSV."""
    pairs: RelativePath | None = None
    """Pairs of them, one `QUERY REFERENCE` a line (guided_test.txt), that GFRNet is judged by."""
    sizes: list[Height] = Field([128, 144, 160, 176, 192, 208], min_length=1)
    """Heights of SGEN's truths; SISN's are 256 px."""
    limit: int | None = Field(None, gt=0)
    """Only so many truths, or pairs."""
    lpips: RelativePath | None = None
    """LPIPS as ONNX, for LPIPS and MPS."""
    runs: RelativePath
    """The folder of runs: `VARIANT/seedN` for each."""
    report: RelativePath
    """The Markdown file that is written."""

    @field_validator("base", mode="before")
    @classmethod
    def _of_its_kind(cls, base: Any, info: ValidationInfo) -> Any:
        if not isinstance(base, dict):
            return base
        if taken := _OURS_ALONE & base.keys():
            raise ValueError(f"{', '.join(sorted(taken))}: set by the ablation, whose budget is in steps")
        kind = _KINDS.get(str(base.get("network")), _BLIND)
        return kind.config.model_validate({**base, "out": "."}, context=info.context)

    @model_validator(mode="after")
    def _possible(self) -> AblateConfig:
        """Every run can be built and judged, and claims speak of variants: found now, not after hours."""
        base = self.base
        if isinstance(base, TrainConfig) and (len(base.protocols) != 1 or self.protocol == "surveillance"):
            raise ValueError("base.protocols: give one alone, sgen or sisn; it also judges")
        if self.truths in (*base.data, base.validation):
            raise ValueError("truths: the base run sees them")
        if isinstance(base, GfrnetRunConfig) != (self.pairs is not None):
            raise ValueError("pairs: GFRNet is judged by listed pairs (guided_test.txt), other networks by none")
        if unknown := {name for claim in self.claims for name in claim} - self.variants.keys():
            raise ValueError(f"claims: no variant is called {', '.join(sorted(unknown))}")
        wanted = FACTOR if self.protocol == "sgen" else None
        for name, variant in self.variants.items():
            if strange := variant.paper.keys() - set(self.kind.measures):
                raise ValueError(f"variants.{name}.paper: {', '.join(sorted(strange))} is not measured here")
            try:
                scale = self._scale(name)
            except (TypeError, ValueError) as exc:
                raise ValueError(f"variants.{name}: {_told(exc)}") from None
            wanted = wanted or scale
            if scale != wanted:
                raise ValueError(f"variants.{name}: it enlarges {scale} times, not {wanted} as it should")
        return self

    @property
    def kind(self) -> _Kind:
        return _KINDS.get(self.base.network, _BLIND)

    @property
    def protocol(self) -> str | None:
        """Of blind runs."""
        return next(iter(self.base.protocols)) if isinstance(self.base, TrainConfig) else None

    def run(self, name: str, seed: int) -> RunConfig:
        """Return the run of this variant and seed. Raises ValueError where the variant does not suit the base."""
        base, variant = self.base, self.variants[name]
        changes = variant.model_dump(exclude_defaults=True, exclude={"paper"})
        if _KINDS.get(variant.network or base.network, _BLIND) is not self.kind:
            raise ValueError(f"network {variant.network!r} is not trained as {base.network!r}, so they do not compare")
        another = variant.network not in (None, base.network)
        changes["override"] = variant.override if another else base.override | variant.override
        fields = base.model_dump()
        if variant.losses:
            changes["losses"] = fields.get("losses", {}) | variant.losses
        folder = f"_{name}" if name.startswith("-") else name
        return type(base).model_validate({**fields, **changes, "seed": seed, "out": self.runs / folder / f"seed{seed}"})

    def trained(self, name: str, seed: int) -> RunConfig:
        """Return the run that trains this variant's weights: its own, but of R that of Full."""
        run = self.run(name, seed)
        if not (isinstance(run, GfrnetRunConfig) and VARIANTS[run.variant].stranger):
            return run
        full = run.model_copy(update={"variant": "Full"})
        others = (self.run(other, seed) for other in self.variants)
        return next((other for other in others if other.model_copy(update={"out": full.out}) == full), full)

    def judge(self) -> Judge:
        """Load the test faces. Raises OSError or ValueError where they do not suit."""
        base = self.base
        if isinstance(base, GfrnetRunConfig) and self.pairs is not None:
            return GuidedJudge(self.truths, self.pairs, side=base.side, limit=self.limit, lpips=self.lpips)
        if isinstance(base, ScganRunConfig):
            return ScganJudge(self.truths, base, limit=self.limit, lpips=self.lpips)
        return BlindJudge(
            self.truths,
            self.protocol or "",
            heights=[256] if self.protocol == "sisn" else [*self.sizes],
            scale=self._scale(next(iter(self.variants))),
            limit=self.limit,
            lpips=self.lpips,
        )

    def _scale(self, name: str) -> int:
        """Return how many times larger the variant's result is. Raises TypeError or ValueError if it cannot be."""
        run, nowhere = self.trained(name, self.seeds[0]), torch.device("meta")
        with nowhere:
            if isinstance(run, ScganRunConfig):  # without its discriminators: they take seconds
                network: Any = make_branches(run).r_ls
            else:
                network = self.kind.task(run, nowhere).network
        return network.config.scale or FACTOR


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
    """By measure, one figure a face."""


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
    arguments = parser.parse_args(_bound(sys.argv[1:]))
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
    if seeds is not None and seeds < 1:
        raise ValueError(f"{seeds} seeds: there must be one at least")
    judge = config.judge()
    runs: dict[str, dict[int, Run]] = {name: {} for name in config.variants}
    for seed in config.seeds:  # all variants of a seed before the next, so that a part of the table is a whole one
        for name in config.variants:
            wanted = seed in config.seeds[:seeds] and name in (only or config.variants)
            if run := _obtain(config, name, seed, judge, wanted=wanted):
                runs[name][seed] = run
    report = "\n".join(_report(config, judge, runs, command))
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


def _bound(arguments: Sequence[str]) -> list[str]:
    """Bind every --only to its variant: argparse would take -F for an option."""
    bound: list[str] = []
    for argument in arguments:
        if bound and bound[-1] == "--only":
            bound[-1] = f"--only={argument}"
        else:
            bound.append(argument)
    return bound


def _told(error: Exception) -> str:
    """Return what is wrong in one line."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return " ".join(str(error).split())


# One run


def _obtain(config: AblateConfig, name: str, seed: int, judge: Judge, *, wanted: bool) -> Run | None:
    """Return the run judged: kept, or trained and judged now if it is `wanted`."""
    run, trained = config.run(name, seed), config.trained(name, seed)
    asked, done = judge.asked(run), _is_done(trained)
    if not (done or wanted):
        return None
    print(f"{name}, seed {seed}", flush=True)
    with _timed() as begun:
        train(trained)  # what is done is only compared: a changed config is refused
    path = trained.out / ("scores.json" if trained.out == run.out else f"scores-{name}.json")
    kept = json.loads(path.read_text()) if done and path.exists() else {}
    if kept.get("asked") == asked:
        return Run(**kept["run"])
    if not wanted:
        return None
    steps = max(begun.values(), key=len, default=[])
    seconds = float(np.median(np.diff(steps))) if len(steps) > 1 else kept.get("run", {}).get("seconds")
    judged = _judged(run, trained, judge, seconds)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"asked": asked, "run": asdict(judged)}))
    partial.replace(path)
    return judged


def _is_done(settings: RunConfig) -> bool:
    """Say whether the run has all its steps. Raises ValueError if it was planned for another number of them."""
    last = settings.out / "last.pt"
    if not last.exists():
        return False
    state = load_checkpoint(last)
    if (planned := state["config"]["steps"]) != settings.steps:
        raise ValueError(f"{last} was planned for {planned} steps, not {settings.steps}: delete it, or change `runs`")
    return bool(state["step"] >= settings.steps)


def _judged(run: RunConfig, trained: RunConfig, judge: Judge, seconds: float | None) -> Run:
    """Judge the weights that validated best."""
    state = load_checkpoint(trained.out / "best.pt")
    network = build(state["network"])
    network.load_state_dict(state["weights"])
    network = network.to(judge.device, memory_format=torch.channels_last).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*judge.inputs(network, run))
    return Run(
        parameters=sum(p.numel() for p in network.parameters()),
        gmac=counter.get_total_flops() / 2e9,
        seconds=seconds,
        device=torch.cuda.get_device_name() if judge.device.type == "cuda" else f"CPU ({platform.machine()})",
        scores=judge.scores(network, run),
    )


@contextmanager
def _timed() -> Iterator[dict[int, list[float]]]:
    """While it is entered, note when each optimiser steps: in processor time on a CPU, which others share."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    begun: dict[int, list[float]] = {}

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        begun.setdefault(id(optimizer), []).append(clock())

    with register_optimizer_step_pre_hook(note):
        yield begun


# The report


def _report(config: AblateConfig, judge: Judge, runs: dict[str, dict[int, Run]], command: str) -> list[str]:
    known = [run for of_seed in runs.values() for run in of_seed.values()]
    missing = [f"{name} seed {seed}" for name in runs for seed in config.seeds if seed not in runs[name]]
    base = config.base
    pixel = f"pixel loss {base.pixel}, " if isinstance(base, TrainConfig) else ""
    return [
        f"# {config.title}",
        "",
        f"`{command}`, trained on: {', '.join(sorted({run.device for run in known})) or 'nothing yet'}. Every run: "
        f"{base.steps} steps of {base.batch} faces of {', '.join(path.stem for path in base.data)}, {pixel}"
        f"learning rate {base.learning_rate:g}; a seed's batches are the same for all. "
        f"{len(config.seeds)} seeds. Judged are the averaged weights that validated best, on {judge.said}.",
        "",
        f"Smaller than in the paper: {config.smaller}",
        "",
        *([f"**Not complete.** Not run yet: {', '.join(missing)}.", ""] if missing else []),
        *_table(config, judge, runs),
        "",
        *_claims(config, judge, runs),
    ]


def _table(config: AblateConfig, judge: Judge, runs: dict[str, dict[int, Run]]) -> list[str]:
    """Return a row for each variant, and the paper's beneath it."""
    measures = _of_all(judge, runs)
    titles = [f"{measure}, less is better" if _sign(measure) < 0 else measure for measure in measures]
    lines = _header("variant", ["seeds", "parameters", "GMAC", "s a step", *titles])
    if before := judge.before():
        figures = [_figure(measure, float(np.mean(before[measure]))) for measure in measures]
        lines.append(_line("not restored, enlarged", ["", "", "", "", *figures]))
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
        f"± is the standard deviation over seeds. GMAC: 10⁹ multiply-accumulates of one result of {judge.size}. "
        "s a step: the median of training, on a CPU seconds of processor time. PSNR on RGB, full frame, 8 bit; SSIM on "
        f"luma, 11×11 Gaussian. The paper's figures: {config.paper}",
    ]


def _claims(config: AblateConfig, judge: Judge, runs: dict[str, dict[int, Run]]) -> list[str]:
    lines = []
    for better, worse in config.claims:
        seeds = sorted(runs[better].keys() & runs[worse].keys())
        for measure in _of_all(judge, runs) if seeds else []:
            a, b = (np.array([runs[name][seed].scores[measure] for seed in seeds]) for name in (better, worse))
            sign = _sign(measure)
            finding = compare(sign * a, sign * b, judge.people)
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


def _of_all(judge: Judge, runs: dict[str, dict[int, Run]]) -> list[str]:
    """Return the measures that there are."""
    found = {measure for of_seed in runs.values() for run in of_seed.values() for measure in run.scores}
    return [measure for measure in judge.measures if measure in found]


def _sign(measure: str) -> int:
    return -1 if measure.startswith("LPIPS") else 1


def _spread(measure: str, runs: list[Run]) -> str:
    means = [float(np.mean(run.scores[measure])) for run in runs]
    mean = _figure(measure, float(np.mean(means)))
    return f"{mean} ± {_figure(measure, float(np.std(means, ddof=1)))}" if len(means) > 1 else mean


def _figure(measure: str, value: float) -> str:
    return f"{value:.{2 if measure.startswith('PSNR') else 4}f}"


def _gain(measure: str, value: float) -> str:
    digits = 3 if measure.startswith("PSNR") else 4
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # + 0.0: no -0.000


def _header(title: str, columns: list[str]) -> list[str]:
    return [_line(title, columns), "|---" * (len(columns) + 1) + "|"]


def _line(title: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([title, *cells])} |"


if __name__ == "__main__":
    main()
