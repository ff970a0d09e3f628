"""Fits the table that ships beside an embedder: `python docs/fit_calibration.py DATA EMBEDDER.onnx [--cache FILE]`.

DATA is the folder with faces_val and calibration.txt; the 1,000 persons whom docs/people.py holds out are not looked
at. The table goes into EMBEDDER.calibration.json. What it is worth goes into docs/results/calibration.md: there the
people are halved, and each half is judged by a table fitted to the other. Intervals redraw people. With the cache, what
was embedded is not embedded again.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations_with_replacement, groupby
from pathlib import Path

import cv2
import numpy as np
from lir.data.models import LLRData
from lir.metrics import cllr, cllr_min
from people import load_people

from engines.store import default_store
from streamer.assembly import Networks, load_restorers
from streamer.calibrate import (
    DRAWN,
    MIX,
    MOST_PHOTOS,
    SIMILARITIES,
    Comparisons,
    Faces,
    embed,
    fit_faces,
    make_identifier,
    networks,
)
from streamer.calibration import Calibration
from streamer.config import RestorerConfig
from streamer.identify import Identifier
from streamer.probes import Sample

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "docs/results/calibration.md"
DATA = "faces_val and the persons of calibration.txt (LFW, All-Age-Faces, CelebAMask-HQ, SCUT-FBP5500) not held out"
TERMS = "photographs of the research sets named: research only; the table holds no face and no template"
SHARES = (1e-1, 1e-2, 1e-3, 1e-4)
BANDS = (-9.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 9.0)
REDRAWS = 200
FEWEST = 5
"""Mates, and strangers, of a band whose ratio is told."""
COLOURS = ("#b2182b", "#ef8a62", "#4393c3", "#2166ac")


def main() -> None:
    """Fit, check and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("embedder", help="a path")
    parser.add_argument("--restorer", default="auto", help="as restorer.name in a config")
    parser.add_argument("--out", type=Path, help="the table")
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--cache", type=Path, help="an .npz for embeddings")
    parser.add_argument("--limit", type=int, help="people with two photos, and people with one, to try it")
    wanted = parser.parse_args()
    cv2.setNumThreads(1)
    identifier = load_identifier(wanted.embedder, wanted.restorer)
    faces = embedded(list(load_people(wanted.data)), identifier, wanted.limit, wanted.cache)
    told = {**networks(identifier, faces), "data": DATA, "terms": TERMS}
    told["command"] = shlex.join(["python", "docs/fit_calibration.py", "DATA", Path(wanted.embedder).name])
    table = fit_faces(faces, **told)
    table.write(wanted.out or Path(wanted.embedder).with_suffix(".calibration.json"))
    halves = halved(faces, told)
    picture = wanted.report.with_suffix(".svg")
    bands = [reliability(halves, number) for number in range(len(DRAWN))]
    picture.write_text(drawn(bands))
    lines = [report(table, halves, bands, picture.name), *strangers_by_set(faces)]
    wanted.report.write_text("\n".join(lines) + "\n")
    print("\n".join(table.lines()))


def load_identifier(model: str, restorer: str) -> Identifier:
    """Return what makes embeddings, as a run with this embedder and `restorer.name` does."""
    networks_here = Networks(default_store(), backend="onnxruntime", threads=1)
    embedder = networks_here.embedder(model)
    assert embedder is not None
    router, restorers = load_restorers(RestorerConfig(name=restorer), networks_here, model)
    return make_identifier(router, restorers, embedder)


# Embeddings, person after person: what was done is in the cache.


def embedded(samples: list[Sample], identifier: Identifier, limit: int | None, cache: Path | None) -> Faces:
    """Return the faces of all people, or of some; those in the cache as they are there."""
    people = [list(group) for _, group in groupby(samples, key=lambda sample: sample.person)]
    people.sort(key=lambda group: hashlib.sha256(group[0].person.encode()).hexdigest())
    several, ones = ([group for group in people if (len(group) > 1) == more] for more in (True, False))
    wanted = several[:limit] + ones[:limit]
    assert identifier.embedder is not None
    made_by = [identifier.embedder, *identifier.restorers.values()]
    of = f"{' '.join(each.engine.sha256 for each in made_by)} {DRAWN} {MIX} {MOST_PHOTOS}"
    known = load_cache(cache, of)
    for number, group in enumerate(wanted, start=1):
        person = group[0].person
        if person not in known:
            known[person] = embed(group, identifier)
        if number % 20 == 0 or number == len(wanted):
            print(f"{number} of {len(wanted)} people", flush=True)
            save_cache(cache, of, known)
    return joined([known[group[0].person] for group in wanted])


def joined(parts: Sequence[Faces]) -> Faces:
    """Return the faces of several as one."""
    firsts = np.cumsum([0, *(len(part.people) for part in parts)])
    columns = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(Faces)
        if field.name not in ("people", "owners")
    }
    owners = np.concatenate([part.owners + first for part, first in zip(parts, firsts, strict=False)])
    return Faces(people=tuple(name for part in parts for name in part.people), owners=owners, **columns)


def load_cache(path: Path | None, of: str) -> dict[str, Faces]:
    """Return the faces of each person in the cache, if these networks made it."""
    if path is None or not path.exists():
        return {}
    with np.load(path) as stored:
        if stored["of"] != of:
            sys.exit(f"{path} was made by other networks, or of other probes: name another file")
        columns = {field.name: stored[field.name] for field in fields(Faces)}
    faces = Faces(**{**columns, "people": tuple(columns["people"].tolist())})
    return {name: faces.among(np.arange(len(faces.people)) == row) for row, name in enumerate(faces.people)}


def save_cache(path: Path | None, of: str, known: dict[str, Faces]) -> None:
    """Write the faces of all people that are known."""
    if path is not None:
        faces = joined(list(known.values()))
        part = path.with_suffix(".part.npz")
        np.savez(part, of=of, **{field.name: getattr(faces, field.name) for field in fields(Faces)})
        part.replace(path)


# What the tables are worth for people whom they were not fitted to.


@dataclass(frozen=True, slots=True)
class Half:
    """The table of one half of the people, and the comparisons of the other half."""

    table: Calibration
    compared: tuple[Comparisons, ...]
    """By bin."""


def halved(faces: Faces, told: dict[str, object]) -> list[Half]:
    """Fit a table to each half of the people and compare those of the other."""
    odd = np.array([hashlib.sha256(name.encode()).digest()[0] % 2 == 1 for name in faces.people])
    halves = []
    for fitted in (odd, ~odd):
        others = faces.among(~fitted)
        compared = tuple(Comparisons.of(others, number) for number in range(len(DRAWN)))
        halves.append(Half(fit_faces(faces.among(fitted), **told), compared))
    return halves


@dataclass(frozen=True, slots=True)
class Band:
    """Comparisons of about one ratio. All ratios are log10."""

    mates: int
    strangers: int
    told: float
    """What the tables said."""
    found: float
    """The share of mates that are in the band against that of strangers."""
    low: float
    high: float


def reliability(halves: Sequence[Half], number: int) -> list[Band]:
    """Return the bands of a bin that hold enough to be told."""
    rng = np.random.default_rng(number)
    ratios = [ratios_of(half, number) for half in halves]
    counts = np.array([[shares(mates), shares(strangers)] for mates, strangers in ratios]).sum(0)
    likely = np.array([shares(strangers, 10**strangers) for _, strangers in ratios]).sum(0)
    redrawn = np.log10([found(halves, ratios, number, rng) for _ in range(REDRAWS)])
    bands = []
    for band in range(len(BANDS) - 1):
        mates, strangers = counts[:, band]
        if min(mates, strangers) >= FEWEST:
            share = counts[:, band] / counts.sum(1)
            low, high = np.quantile(redrawn[:, band], (0.025, 0.975))
            told = float(np.log10(likely[band] / strangers))
            bands.append(Band(int(mates), int(strangers), told, float(np.log10(share[0] / share[1])), low, high))
    return bands


def ratios_of(half: Half, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the log10 ratios of a bin's mates and strangers."""
    table, compared = half.table.bins[number], half.compared[number]
    mates, strangers = (np.interp(each, SIMILARITIES, table.llr) for each in (compared.mates, compared.strangers))
    return mates, strangers


def shares(ratios: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return how many ratios, or how much weight of them, each band holds."""
    return np.histogram(ratios, BANDS, weights=weights)[0]


def found(
    halves: Sequence[Half], ratios: Sequence[tuple[np.ndarray, np.ndarray]], number: int, rng: np.random.Generator
) -> np.ndarray:
    """Return by band how much more of the mates than of the strangers it holds, where people are redrawn."""
    held = np.zeros((2, len(BANDS) - 1))
    for half, (mates, strangers) in zip(halves, ratios, strict=True):
        compared = half.compared[number]
        weights = np.bincount(rng.integers(compared.people, size=compared.people), minlength=compared.people)
        held[0] += shares(mates, weights[compared.mate_owners])
        held[1] += shares(strangers, weights[compared.owners] * weights[compared.references])
    held = np.maximum(held, 0.5)  # nothing is impossible
    return (held[0] / held[0].sum()) / (held[1] / held[1].sum())


@dataclass(frozen=True, slots=True)
class Alarms:
    """Strangers above a threshold."""

    similarity: float
    told: float
    """The share of strangers that the tables expected."""
    bound: float
    """What they said it is at most: the upper 95 % bound."""
    found: float
    low: float
    high: float


def alarms(halves: Sequence[Half], number: int, share: float) -> Alarms:
    """Return how many strangers of a bin pass the thresholds that, as the tables say, so small a share passes."""
    rng = np.random.default_rng(number)
    steps = [int(np.argmax(np.array(half.table.bins[number].strangers_above) <= share)) for half in halves]

    def mean(column: Sequence[Sequence[float] | np.ndarray]) -> float:
        return float(np.mean([each[step] for each, step in zip(column, steps, strict=True)]))

    def above(redraw: bool) -> float:
        weights = [
            np.bincount(rng.integers(each.people, size=each.people), minlength=each.people)
            if redraw
            else np.ones(each.people)
            for each in (half.compared[number] for half in halves)
        ]
        compared = [half.compared[number] for half in halves]
        return mean([each.above(each.weighed(weight)) for each, weight in zip(compared, weights, strict=True)])

    low, high = np.quantile([above(True) for _ in range(REDRAWS)], (0.025, 0.975))
    tables = [half.table.bins[number] for half in halves]
    return Alarms(
        mean([SIMILARITIES] * len(halves)), mean([each.strangers_above for each in tables]),
        mean([each.strangers_above_high for each in tables]), above(False), float(low), float(high),
    )  # fmt: skip


# The report.


def strangers_by_set(faces: Faces) -> list[str]:
    """Return how alike strangers are, by the sets that both are of."""
    sets = np.array([name.partition("/")[0] for name in faces.people])
    one, other = np.triu_indices(len(sets), 1)
    similarities = (faces.references @ faces.references.T)[one, other]
    bar = float(np.quantile(similarities, 0.999))
    lines = [
        "## Strangers are not alike everywhere",
        "",
        f"Of all pairs of two persons' enrolled photos one in a thousand reaches a similarity of {bar:.2f}. By the "
        "sets that the two are of:",
        "",
        "| sets | pairs | share that reaches it |",
        "|---|---|---|",
    ]
    for first, second in combinations_with_replacement(sorted(set(sets)), 2):
        both = ((sets[one] == first) & (sets[other] == second)) | ((sets[one] == second) & (sets[other] == first))
        if both.sum() >= 1000:
            lines.append(f"| {first}, {second} | {both.sum()} | {np.mean(similarities[both] >= bar):.5f} |")
    return [
        *lines,
        "",
        "faces_unlabelled is of All-Age-Faces, CelebAMask-HQ and SCUT-FBP5500, lfw_train of LFW. The table is fitted "
        "to all together: where those who pass are of many kinds, it expects more false alarms than there are; where "
        "they are all of a kind that the embedder finds alike, fewer.",
    ]


def report(table: Calibration, halves: Sequence[Half], bands: Sequence[Sequence[Band]], picture: str) -> str:
    """Return the report."""
    restorers = ", ".join(f"{each.name} (sha256 {each.sha256[:12]})" for each in table.restorers) or "none"
    routes = ", ".join(f"{name} {count}" for name, count in sorted(table.routes.items()))
    lines = [
        f"# What a similarity by {table.embedder.name} is worth",
        "",
        f"`{table.command}` on {table.fitted_on} with streamer {table.streamer}: {table.people} people, "
        f"{table.pairs} comparisons of fused embeddings. Embedder: sha256 {table.embedder.sha256[:12]}. "
        f"Restorers: {restorers}. Faces by route: {routes}.",
        "",
        f"Fitted on {table.data}. Terms: {table.terms}.",
        "",
        "The figures below are of people whom the table that judges them was not fitted to: the people are halved, and "
        "each half is judged by the other's. The table that ships is fitted to both. All intervals are 95 %, by "
        "redrawing people. Ratios are log10.",
        "",
        "## How much the scores tell",
        "",
        "Cllr is what is lost by the ratios as they are, in bits: 0 is perfect, 1 is what a coin tells. The least is "
        "what would be lost if their order stayed and they were calibrated perfectly. ELUB are the bounds beyond which "
        "the data support no ratio, of the table that ships.",
        "",
        "| faces | people | mates | comparisons with strangers | fitted by | Cllr | least Cllr | ELUB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number, each in enumerate(table.bins):
        ratios = [np.concatenate(column) for column in zip(*(ratios_of(half, number) for half in halves), strict=True)]
        judged = LLRData(features=np.concatenate(ratios), labels=np.repeat([1, 0], [len(part) for part in ratios]))
        lines.append(
            f"| {_height(number)} | {each.people} | {each.mates} | {each.strangers} | {each.calibrator} | "
            f"{cllr(judged):.3f} | {cllr_min(judged):.3f} | {each.llr_bounds[0]:.2f} to {each.llr_bounds[1]:.2f} |"
        )
    lines += [
        "",
        "## Whether a ratio is what it says",
        "",
        f"![told against found]({picture})",
        "",
        "Comparisons with about the same ratio, the ratio that the table told and the one that was found: how much "
        f"larger a share of mates than of strangers is among them. Bands with fewer than {FEWEST} of either are left "
        "out.",
        "",
        "| faces | mates | strangers | told | found | interval | told lies within |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, of_bin in enumerate(bands):
        lines += [
            f"| {_height(number)} | {band.mates} | {band.strangers} | {band.told:.2f} | {band.found:.2f} | "
            f"{band.low:.2f} to {band.high:.2f} | {_yes(band.low <= band.told <= band.high)} |"
            for band in of_bin
        ]
    lines += [
        "",
        "## Strangers above a threshold",
        "",
        "Thresholds that, as one half says, a small share of comparisons with strangers reaches, and the share of the "
        "other half's that does. The bound is what the product tells: an upper one, so more often too high than too "
        "low.",
        "",
        "| faces | similarity | expected | upper bound | found | interval | expected lies within | found below bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for number in range(len(table.bins)):
        for share in SHARES:
            each = alarms(halves, number, share)
            lines.append(
                f"| {_height(number)} | {each.similarity:.2f} | {each.told:.2g} | {each.bound:.2g} | {each.found:.2g} "
                f"| {each.low:.2g} to {each.high:.2g} | {_yes(each.low <= each.told <= each.high)} | "
                f"{_yes(each.found <= each.bound)} |"
            )
    lines += [
        "",
        "## What it does not say",
        "",
        "A comparison is one look at one face with one enrolled photo. Landmarks are the photo's own, reduced: a "
        "detector's on small faces are worse. The damage is made (area reduction, noise, JPEG), not a camera's. "
        "People who look like those enrolled by family or origin are more alike than these strangers: "
        "`streamer calibrate` fits the table to the people of a place.",
    ]
    return "\n".join(lines) + "\n"


def drawn(bands: Sequence[Sequence[Band]]) -> str:
    """Return the reliability diagram as SVG: told to the right, found upwards."""
    low, high, side, edge = -3.0, 5.0, 420, 48

    def x(value: float) -> str:
        return f"{edge + (min(max(value, low), high) - low) / (high - low) * side:.1f}"

    def y(value: float) -> str:
        return f"{edge + side - (min(max(value, low), high) - low) / (high - low) * side:.1f}"

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side + 2 * edge} {side + 2 * edge}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for value in range(int(low), int(high) + 1):
        lines += [
            f'<line x1="{x(value)}" y1="{y(low)}" x2="{x(value)}" y2="{y(high)}" stroke="#ddd"/>',
            f'<line x1="{x(low)}" y1="{y(value)}" x2="{x(high)}" y2="{y(value)}" stroke="#ddd"/>',
            f'<text x="{x(value)}" y="{edge + side + 16}" text-anchor="middle">{value}</text>',
            f'<text x="{edge - 8}" y="{y(value)}" text-anchor="end" dominant-baseline="middle">{value}</text>',
        ]
    lines += [
        f'<line x1="{x(low)}" y1="{y(low)}" x2="{x(high)}" y2="{y(high)}" stroke="#888"/>',
        f'<text x="{edge + side / 2}" y="{edge + side + 36}" text-anchor="middle">log10 ratio told</text>',
        f'<text x="14" y="{edge + side / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {edge + side / 2})">log10 ratio found</text>',
    ]
    for number, (of_bin, colour) in enumerate(zip(bands, COLOURS, strict=True)):
        shift = 0.03 * (number - 1.5)
        for band in of_bin:
            at = x(band.told + shift)
            lines.append(
                f'<line x1="{at}" y1="{y(band.low)}" x2="{at}" y2="{y(band.high)}" stroke="{colour}"/>'
                f'<circle cx="{at}" cy="{y(band.found)}" r="3" fill="{colour}"/>'
            )
        lines.append(f'<text x="{edge + 8}" y="{edge + 16 + 16 * number}" fill="{colour}">{_height(number)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _height(number: int) -> str:
    least, most = DRAWN[number]
    return f"{least:g} to {most:g} px"


def _yes(true: bool) -> str:
    return "yes" if true else "no"


if __name__ == "__main__":
    main()
