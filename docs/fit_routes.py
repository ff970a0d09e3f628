"""Fits the router to recognition: `python docs/fit_routes.py DATA EMBEDDER.onnx [--cache FOLDER]`.

DATA is the folder with faces_val; nobody else's faces are looked at. Its photos are made into what cameras give, sizes
and damage drawn by chance, and set against the people's other photos as they are. A crop's embedding is raw, or fused:
the unit mean of raw and of the crop restored. For each row of faces and each restorer it is measured how many more true
accepts fused gives than raw at 1 % false accepts, each at a threshold of its own. Intervals redraw people. The choice
goes into EMBEDDER.routes.json, beside the embedder, and all figures into docs/results/routes.md.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
from people import load_samples

from engines.engine import Engine
from engines.load import load_engine
from engines.store import Model, default_store
from streamer.embedder import FaceEmbedder
from streamer.geometry import scale_transform, transform_points
from streamer.probes import Damage, Sample, probe
from streamer.restorer import FaceRestorer, largest_scale
from streamer.router import NONE, Figure, Gain, RouteRow, RouteTable
from streamer.types import Crop

Bounds = dict[Figure, tuple[float | None, float | None]]

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "docs/results/routes.md"
RESTORERS = ("sgen-small", "sisn-small", "sisn-x8", "scgan", "scgan-x")
MAX_SIZE = 256
HEIGHTS, BLUR, NOISE, JPEG, PLAIN = (10.0, 64.0), (0.0, 2.0), (0.0, 25.0), (30, 95), 0.25
"""What damage is drawn from: heights evenly by their logarithm, the others evenly; a share of `PLAIN` has no JPEG."""
SEED = 20267
FIGURES: tuple[Figure, ...] = ("face_height_px", "eye_distance_px", "sharpness", "noise", "blockiness", "yaw")

BANDS = (10.0, 20.0, 40.0, 64.0)
"""Of face height. Up to 20 px a crop may become 8 times as large within `MAX_SIZE`, up to 40 px 4 times.

Of 600 probes five bands have too few: by three, people on whom nothing was fitted gained 0.045, by five 0.036.
"""
CUTS: dict[str, dict[Figure, tuple[float, ...]]] = {
    "nothing": {},
    "noise": {"noise": (3.0,)},
    "sharpness": {"sharpness": (0.5,)},
    "blockiness": {"blockiness": (0.25,)},
}
"""What each band may be cut in two by, and where: about in halves."""
FALSE_ACCEPTS = 0.01
TAIL = 5 * FALSE_ACCEPTS  # of the impostors, enough for the threshold of every redraw
REDRAWS, REDRAWS_A_FOLD = 500, 100
LEAST_PEOPLE = 8
"""With other photos, among whom a restorer is judged; with fewer it has no gain."""
FOLDS = 5
TERMS = "Of CelebA, non-commercial research only, and the Face Research Lab London Set, CC BY 4.0"


@dataclass(frozen=True, slots=True)
class Measured:
    """All that is known of the probes and references, as parallel arrays."""

    people: np.ndarray
    """(r,): number of the person of each reference; the photos are the references."""
    references: np.ndarray
    """(r, d)"""
    photos: np.ndarray
    """(p,): of which photo each probe is made."""
    quality: dict[str, np.ndarray]
    """By figure, (p,)."""
    raw: np.ndarray
    """(p, d)"""
    blind: dict[str, np.ndarray]
    """By restorer, (p, d); not a number where the result would be too large."""
    ms: dict[str, np.ndarray]
    """By restorer, (p,): milliseconds of one core for restoring; not a number likewise."""
    scales: dict[str, int]
    """By restorer, its smallest."""


@dataclass(frozen=True, slots=True)
class Effect:
    """A gain with what it came to in each redraw."""

    gain: Gain
    redrawn: np.ndarray
    """(n,)"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("embedder", help="a path or a name; the table goes beside its file")
    parser.add_argument("--restorers", nargs="+", default=RESTORERS, help="names or paths")
    parser.add_argument("--by", choices=CUTS, default="nothing", help="what bands of height are cut by (nothing)")
    parser.add_argument("--limit", type=int, default=2500, help="probes (default: 2500)")
    parser.add_argument("--cache", type=Path, help="a folder for embeddings: fitting again takes a minute")
    parser.add_argument("--out", type=Path, help="the table (default: beside the embedder)")
    parser.add_argument("--report", type=Path, default=REPORT)
    wanted = parser.parse_args()
    cv2.setNumThreads(1)
    store = default_store()
    model = store.find(wanted.embedder, task="embedding")
    restorers = [
        FaceRestorer(load(store.find(name, task="restoration")), max_size=MAX_SIZE) for name in wanted.restorers
    ]
    table_path = wanted.out or model.path.with_name(f"{model.path.stem}.routes.json")
    samples = load_samples(wanted.data, "faces_val")
    measured = measure(samples, wanted.limit, FaceEmbedder(load(model)), restorers, Cache(wanted.cache, samples))
    weights = redraws(measured.people.max() + 1)
    table = RouteTable(
        schema="streamer.routes/1",
        embedder=model.card.name,
        embedder_sha256=model.sha256,
        restorers={each.engine.card.name: each.engine.sha256 for each in restorers},
        max_size=MAX_SIZE,
        command=shlex.join(["python", *sys.argv]),
        fitted_on=datetime.now(UTC).date(),
        data=f"the {len(measured.people)} photos of {weights.shape[1]} people in faces_val",
        terms=TERMS,
        rows=tuple(fit(bounds, measured, weights) for bounds in row_bounds(wanted.by)),
    )
    text = report(table, wanted.by, measured, weights)
    table_path.write_text(table.model_dump_json(by_alias=True, indent=1) + "\n")
    wanted.report.write_text(text)
    print(text)


def load(model: Model) -> Engine:
    """Return an engine of one thread."""
    return load_engine(model, backend="onnxruntime", threads=1)


def draw(photos: int, limit: int) -> list[tuple[int, Damage]]:
    """Return which photo is damaged how: each once before any twice. A larger `limit` only adds some."""
    rng = np.random.default_rng(SEED)
    drawn: list[tuple[int, Damage]] = []
    while len(drawn) < limit:
        for photo in rng.permutation(photos):
            height = float(np.exp(rng.uniform(*np.log(HEIGHTS))))
            blur, noise, quality = rng.uniform(*BLUR), rng.uniform(*NOISE), int(rng.integers(JPEG[0], JPEG[1] + 1))
            drawn.append((int(photo), Damage(height, blur, noise, None if rng.random() < PLAIN else quality)))
    return drawn[:limit]


def measure(
    samples: Sequence[Sample], limit: int, embedder: FaceEmbedder, restorers: Sequence[FaceRestorer], cache: Cache
) -> Measured:
    """Embed all references and probes, the latter raw and restored."""
    drawn = draw(len(samples), limit)

    def made(index: int) -> Crop:
        photo, damage = drawn[index]
        return probe(samples[photo], damage, SEED)

    def reference(index: int) -> np.ndarray:
        return embedder.embed([(samples[index].image, samples[index].landmarks)])[0]

    def raw(index: int) -> np.ndarray:
        crop = made(index)
        figures = [getattr(crop.quality, figure) for figure in FIGURES]
        return np.concatenate([figures, embedder.embed([(crop.image, crop.landmarks)])[0]])

    references = cache.rows("references", embedder, len(samples), reference)
    rows = cache.rows("raw", embedder, limit, raw)
    quality = {figure: rows[:, place] for place, figure in enumerate(FIGURES)}
    blind, ms = {}, {}
    for restorer in restorers:

        def restored(index: int, restorer: FaceRestorer = restorer) -> np.ndarray:
            crop = made(index)
            side = max(crop.image.shape[:2])
            if side * largest_scale(restorer.engine.card, side, MAX_SIZE) > MAX_SIZE:
                return np.full(1 + references.shape[1], np.nan, np.float32)
            began = time.process_time()
            image, scale = restorer.restore([crop.image])[0]
            spent = 1000 * (time.process_time() - began)
            landmarks = transform_points(scale_transform(np.eye(2, 3), scale), crop.landmarks)
            return np.concatenate([[spent], embedder.embed([(image, landmarks)])[0]])

        name = restorer.engine.card.name
        found = cache.rows(f"{name} {restorer.engine.sha256} {MAX_SIZE}", embedder, limit, restored)
        ms[name], blind[name] = found[:, 0], found[:, 1:]
    numbers = {person: number for number, person in enumerate(sorted({sample.person for sample in samples}))}
    people = np.array([numbers[sample.person] for sample in samples])
    photos = np.array([photo for photo, _ in drawn])
    scales = {each.engine.card.name: min(each.engine.card.scales) for each in restorers}
    return Measured(people, references, photos, quality, rows[:, len(FIGURES) :], blind, ms, scales)


class Cache:
    """Keeps what is slow in a folder, a file for each thing that is measured; it goes on where a run was ended."""

    def __init__(self, folder: Path | None, samples: Sequence[Sample]) -> None:
        self._folder = folder
        names = " ".join(sample.name for sample in samples)
        self._of = f"{names} {SEED} {HEIGHTS} {BLUR} {NOISE} {JPEG} {PLAIN} {FIGURES}"

    def rows(self, what: str, embedder: FaceEmbedder, count: int, row: Callable[[int], np.ndarray]) -> np.ndarray:
        """Return `row` of 0 to `count` - 1, (count, k) float32: what is kept, and the rest now."""
        told = what.split()[0]
        digest = hashlib.sha256(f"{self._of} {what} {embedder.engine.sha256}".encode()).hexdigest()
        path = self._folder and self._folder / f"{told}-{digest[:12]}.npz"
        rows: list[np.ndarray] = []
        if path and path.exists():
            with np.load(path) as kept:
                rows = list(kept["rows"][:count])
        for index in range(len(rows), count):
            rows.append(np.asarray(row(index), np.float32))
            if (index + 1) % 100 == 0 or index + 1 == count:
                print(f"{told}: {index + 1} of {count}, {time.process_time():.0f} s", flush=True)
                if path:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    part = path.with_suffix(".part.npz")
                    np.savez(part, rows=np.stack(rows))
                    part.replace(path)
        return np.stack(rows)


def row_bounds(by: str) -> list[Bounds]:
    """Return the bounds of each row, where bands are cut by this."""
    cuts: list[list[tuple[Figure, tuple[float | None, float | None]]]] = [
        [("face_height_px", each) for each in itertools.pairwise(BANDS)]
    ]
    for figure, edges in CUTS[by].items():
        cuts.append([(figure, each) for each in itertools.pairwise((None, *edges, None))])
    return [dict(each) for each in itertools.product(*cuts)]


def fit(bounds: Bounds, measured: Measured, weights: np.ndarray) -> RouteRow:
    """Return a row with its gains and routes."""
    chosen = inside(bounds, measured)
    effects = {}
    for name, blind in measured.blind.items():
        small = chosen[np.isfinite(measured.ms[name][chosen])]
        if 2 * len(small) > len(chosen):  # else it is not of this row that its gain would tell
            ms = float(measured.ms[name][small].mean())
            found = effect(fused(measured.raw, blind), small, measured, weights, ms)
            effects |= {name: found} if found else {}
    raw = Accepts(measured.raw[chosen], measured.photos[chosen], measured) if len(chosen) else None
    return RouteRow(
        bounds=bounds,
        faces=len(chosen),
        people=raw.people if raw else 0,
        raw=round(raw.share(weights[0]), 4) if raw and raw.people else 0.0,
        gains={name: each.gain for name, each in effects.items()},
        routes=ranked(effects, measured.scales),
    )


def ranked(effects: dict[str, Effect], scales: dict[str, int]) -> tuple[str, ...]:
    """Return the restorers whose gain is above zero with its interval, best first.

    Where one leads another by less than the lead's own standard error, the cheaper comes first. One that can never
    stand in for those before it, as its smallest scale is no smaller than theirs, is left out.
    """
    left = {name: each for name, each in effects.items() if each.gain.low > 0}
    order: list[str] = []
    while left:
        best = max(left.values(), key=lambda each: each.gain.mean)
        level = [
            name
            for name, each in left.items()
            if best.gain.mean - each.gain.mean <= np.nanstd(best.redrawn - each.redrawn)
        ]
        order.append(min(level, key=lambda name: left[name].gain.ms))
        left = {name: each for name, each in left.items() if scales[name] < scales[order[-1]]}
    return tuple(order)


def effect(
    embeddings: np.ndarray, chosen: np.ndarray, measured: Measured, weights: np.ndarray, ms: float = 0.0
) -> Effect | None:
    """Return what embeddings (p, d) gain over raw on the probes `chosen` (n,); None where people are too few.

    `weights` (1 + n, people) say how often people count: first as they are, then in each redraw.
    """
    photos = measured.photos[chosen]
    ours, raw = (Accepts(each[chosen], photos, measured) for each in (embeddings, measured.raw))
    if ours.people < LEAST_PEOPLE:
        return None
    gains = np.array([ours.share(each) - raw.share(each) for each in weights])
    low, high = np.nanpercentile(gains[1:], (2.5, 97.5))
    told = Gain(
        mean=round(float(gains[0]), 4), low=round(float(low), 4), high=round(float(high), 4),
        faces=len(chosen), people=ours.people, ms=round(ms, 1),
    )  # fmt: skip
    return Effect(told, gains[1:])


def inside(bounds: Bounds, measured: Measured) -> np.ndarray:
    """Return the probes within, (n,)."""
    within = np.ones(len(measured.raw), bool)
    for figure, (low, high) in bounds.items():
        values = measured.quality[figure]
        within &= (values >= (-np.inf if low is None else low)) & (values < (np.inf if high is None else high))
    return np.flatnonzero(within)


def fused(raw: np.ndarray, blind: np.ndarray) -> np.ndarray:
    """Return the unit means, (n, d)."""
    mean = raw + blind
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


class Accepts:
    """The true accepts of some embeddings at 1 % false accepts, however often each person counts."""

    def __init__(self, embeddings: np.ndarray, photos: np.ndarray, measured: Measured) -> None:
        """`embeddings` (n, d) are of probes that were made of `photos` (n,)."""
        similarities, people = embeddings @ measured.references.T, measured.people
        same = people[photos][:, None] == people[None]
        impostors = np.argwhere(~same)
        values = similarities[~same]
        kept = math.ceil(TAIL * len(values))
        top = np.argpartition(-values, kept - 1)[:kept]
        top = top[np.argsort(-values[top], kind="stable")]
        self._tail = values[top]
        self._tail_people = people[photos[impostors[top, 0]]], people[impostors[top, 1]]
        mates = same & (photos[:, None] != np.arange(len(people))[None])
        self._mates = similarities[mates]
        self._mate_people = people[photos[np.nonzero(mates)[0]]]
        self._shares = np.repeat(1 / np.maximum(mates.sum(1), 1), mates.sum(1))  # each probe counts once
        self._probes = np.bincount(people[photos], minlength=people.max() + 1)
        self._references = np.bincount(people)

    @property
    def people(self) -> int:
        """How many there are of whom another photo can be accepted."""
        return len(np.unique(self._mate_people))

    def share(self, weights: np.ndarray) -> float:
        """Return it where each person counts `weights` times; not a number where nobody is left."""
        probes, references = weights * self._probes, weights * self._references
        impostors = probes.sum() * references.sum() - probes @ references
        above = np.cumsum(weights[self._tail_people[0]] * weights[self._tail_people[1]])
        first = min(np.searchsorted(above, FALSE_ACCEPTS * impostors, side="right"), len(above) - 1)
        counted = weights[self._mate_people] * self._shares
        total = counted.sum()
        return float(counted[self._mates > self._tail[first]].sum() / total) if total else math.nan


def redraws(people: int) -> np.ndarray:
    """Return how often each person counts, (1 + n, people): first as they are."""
    drawn = np.random.default_rng(SEED).multinomial(people, np.full(people, 1 / people), REDRAWS)
    return np.concatenate([np.ones((1, people), int), drawn])


def routed(by: str, measured: Measured, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Return each probe's embedding by a table that was fitted without its person, (p, d), and the share restored."""
    embeddings, restored = measured.raw.copy(), 0
    counts = np.bincount(measured.people)
    fold_of = np.empty(len(counts), int)
    fold_of[np.argsort(counts, kind="stable")] = np.arange(len(counts)) % FOLDS
    folds = fold_of[measured.people[measured.photos]]  # (p,)
    for fold, bounds in itertools.product(range(FOLDS), row_bounds(by)):
        left = inside(bounds, measured)
        left = left[folds[left] == fold]
        for name in fit(bounds, measured, weights * (fold_of != fold)).routes:
            small = np.isfinite(measured.ms[name][left])
            embeddings[left[small]] = fused(measured.raw[left[small]], measured.blind[name][left[small]])
            restored += int(small.sum())
            left = left[~small]
    return embeddings, restored / len(embeddings)


def always(name: str, measured: Measured) -> np.ndarray:
    """Return the embeddings, (p, d), where every crop goes to one restorer that is not too large for it."""
    small = np.isfinite(measured.ms[name])[:, None]
    return np.where(small, fused(measured.raw, measured.blind[name]), measured.raw)


def report(table: RouteTable, by: str, measured: Measured, weights: np.ndarray) -> str:
    """Return the report."""
    return "\n".join([
        f"# Routes, by {table.embedder}",
        "",
        f"`{table.command}`, {table.fitted_on}: {len(measured.raw)} probes made of {table.data}, the people's other "
        f"photos as references. {table.terms}.",
        "",
        f"Drawn by chance: face heights of {HEIGHTS[0]:g} to {HEIGHTS[1]:g} px, blur σ {BLUR[0]:g} to {BLUR[1]:g} px, "
        f"noise σ {NOISE[0]:g} to {NOISE[1]:g}, JPEG {JPEG[0]} to {JPEG[1]}, or none for {PLAIN:.0%}. Landmarks are "
        "the photo's own. Rows go by what is measured on the crop.",
        "",
        f"Raw: true accepts of the crop alone at {FALSE_ACCEPTS:.0%} false accepts in this row. Gains are those of "
        f"fused, the unit mean of crop and restoration; their 95 % intervals are by {REDRAWS} redraws of people. "
        "Chosen is the highest gain of those whose interval lies above zero, but the cheapest of those that it leads "
        f"by less than the lead's standard error. Results of more than {table.max_size} px are not made; fewer than "
        f"{LEAST_PEOPLE} people tell nothing.",
        "",
        *_rows(table),
        "",
        "## On people it was not fitted on",
        "",
        f"Each of {FOLDS} parts of the people is routed by a table that was fitted to the others, its bands cut by "
        f"what is named (the table above: {by}); beside it, every crop to one restorer that does not make it too "
        "large. Gain in true accepts over raw: in each band of face height, and in all at one threshold.",
        "",
        *_elsewhere(list(table.restorers), measured, weights),
        "",
    ])  # fmt: skip


def _rows(table: RouteTable) -> list[str]:
    """Return the gains and choices, and what restoring takes, as tables."""
    names = list(table.restorers)
    figures = list(dict.fromkeys(figure for row in table.rows for figure in row.bounds))
    bounds = [[_range(row.bounds.get(figure, (None, None))) for figure in figures] for row in table.rows]
    gains = [
        [
            *(str(row.faces), str(row.people), f"{row.raw:.3f}"),
            *(str(row.gains.get(name, "")) for name in names),
            ", then ".join(row.routes) or NONE,
        ]
        for row in table.rows
    ]
    spent = [[f"{row.gains[name].ms:.0f}" if name in row.gains else "" for name in names] for row in table.rows]
    return [
        *_head([*figures, "faces", "people", "raw", *names, "chosen"]),
        *(_line([*each, *told]) for each, told in zip(bounds, gains, strict=True)),
        "",
        "Milliseconds of one core for a restoration:",
        "",
        *_head([*figures, *names]),
        *(_line([*each, *told]) for each, told in zip(bounds, spent, strict=True)),
    ]


def _elsewhere(names: Sequence[str], measured: Measured, weights: np.ndarray) -> list[str]:
    """Return what routes gain on people that they were not fitted on, beside restoring all, as a table."""
    bands = [f"{_range(band)} px" for band in itertools.pairwise(BANDS)]
    lines = _head(["bands cut by", "restored", *bands, "all"])
    for by in CUTS:
        embeddings, share = routed(by, measured, weights[: 1 + REDRAWS_A_FOLD])
        lines.append(_line([by, f"{share:.0%}", *_gains(embeddings, measured, weights)]))
    for name in names:
        share = float(np.isfinite(measured.ms[name]).mean())
        lines.append(_line([f"all to {name}", f"{share:.0%}", *_gains(always(name, measured), measured, weights)]))
    return lines


def _gains(embeddings: np.ndarray, measured: Measured, weights: np.ndarray) -> list[str]:
    bands: list[Bounds] = [{"face_height_px": band} for band in itertools.pairwise(BANDS)]
    found = [effect(embeddings, inside(each, measured), measured, weights) for each in (*bands, {})]
    return [str(each.gain) if each else "" for each in found]


def _range(bounds: tuple[float | None, float | None]) -> str:
    low, high = bounds
    if low is None:
        return "any" if high is None else f"below {high:g}"
    return f"from {low:g}" if high is None else f"{low:g} to {high:g}"


def _head(columns: list[str]) -> list[str]:
    return [_line(columns), "|---" * len(columns) + "|"]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
