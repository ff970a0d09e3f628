"""Looks for strangers and enrolled people: `python docs/identification.py DATA EMBEDDER.onnx [--cache FILE.npz]`.

DATA is the folder with lfw_test, faces_unlabelled, calibration.txt and videos. Enrolled is one photo of each person of
lfw_test who has two; their other photos, the persons with one photo, and the 1,000 whom docs/people.py holds out are
made into what cameras give, and looked up by the product's own parts. How often somebody enrolled is missed, and
somebody else taken for them; what routing gains; whether a guide leaks into a decision, and what would become of who
trusted the guided picture; what strangers in real clips set off; whether the calibration is true. Intervals redraw
people. All goes into docs/results/identification.md. With the cache, what was measured is not measured again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import math
import platform
import shlex
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
from fit_calibration import BANDS, FEWEST, Band
from people import load_held_out, load_samples

from engines.store import default_store
from streamer.assembly import Networks, load_restorers
from streamer.calibration import Calibration
from streamer.camera import Camera
from streamer.config import RestorerConfig
from streamer.detector import FaceDetector
from streamer.embedder import FaceEmbedder
from streamer.enrolment import cut_face
from streamer.gallery import Gallery, Snapshot, WatchList
from streamer.geometry import iou, scale_transform, transform_points
from streamer.guided import GuidedRestorer
from streamer.identify import Identifier, Search
from streamer.live_gallery import LiveGallery
from streamer.metrics import Metrics
from streamer.probes import Damage, Sample, probe
from streamer.restorer import FaceRestorer
from streamer.router import NONE, FittedRouter, Router, RouteTable
from streamer.scoring import Scored, Scorer, fuse
from streamer.selector import CropSelector
from streamer.tracker import FaceTracker
from streamer.types import Crop, Embeddings, EventName, FaceIdentified, Moment, Quality, Score, Track
from streamer.vault import Vault

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "docs/results/identification.md"
RESTORERS, SAMPLED = "sgen-small,sisn-small,sisn-x8", "scgan-x"
MAX_SIZE = RestorerConfig().max_size
GUIDED = "gfrnet-small"
DETECTOR, DETECTOR_SIZE = "centerface", 960

BINS = ((12.0, 16.0), (16.0, 24.0), (24.0, 48.0), (48.0, math.inf))
"""Between which heights of the face's box probes are drawn, in pixels; the last up to the photo's own."""
SMALL, LARGE = (0, 1), len(BINS) - 1
SEED = 20267
REDRAWS = 200
SHARES = (0.01, 0.03, 0.003)
"""FPIR. Of the last no claim is made: it rests on a handful of alarms."""
CLAIMED = SHARES[:2]
CARELESS = 0.05
MOST_LOSS = 0.02
RAW, ROUTED = "raw", "routed and fused"
ON_LARGE, POOLED = "raw, > 48 px", "all probes of raw and of routed and fused, pooled"
"""What a threshold for all is chosen on."""

SAMPLE, SAMPLED_BINS = (100, 200), (1, 2)
"""How many mates and non-mates slow restorers are tried on, and in which bins."""
FRAMES = (75, 75)
"""Of a bin, in which the detector looks for the face: mates' and non-mates'."""
FRAME = (540, 960)
LEAKED_BIN = 1
"""The bin of which all mates are identified with guides and without."""
LEAKED = (400, 1000)
"""So many mates of the other small bin, and non-mates of both."""
BATCH = 8
CLIPS = {
    "classroom_480x270": 1, "corridor_three_walk_480x270": 1, "carphone_qcif_pristine": 2,
    "carphone_qcif_lowbitrate": 2, "street_crowd_720p": 4, "arcade_walk_1080p": 2, "retail_ceiling_1080p": 2,
    "webcam_distance_400x300": 2,
}  # fmt: skip
"""Clips, and which frames of them are looked at: every one, every second, ..."""
EXPECTED = (0.1, 0.03, 0.01, 0.003)
"""Shares of searches with a false alarm that the calibration is asked for."""
HAIR = 1e-6
"""Thresholds lie so much above a non-mate's similarity: its last digits depend on the batch that it was embedded in."""
TERMS = (
    "LFW and All-Age-Faces, CelebAMask-HQ and SCUT-FBP5500: research only; clips: as videos/README.md says. The report "
    "holds no face and no template"
)


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("embedder", help="a path or a name")
    parser.add_argument("--restorers", default=RESTORERS, help=f"tried on all probes (default: {RESTORERS})")
    parser.add_argument("--sampled", default=SAMPLED, help=f"tried on some (default: {SAMPLED}); none: '' ")
    parser.add_argument("--routes", type=Path, help="default: what ships for the embedder, else all to sgen-small")
    parser.add_argument("--calibration", type=Path, help="default: what ships for the embedder")
    parser.add_argument("--rates-alone", action="store_true", help="no detector, no guides, no clips")
    parser.add_argument("--limit", type=int, help="people enrolled, and non-mates of each set, to try it")
    parser.add_argument("--cache", type=Path, help="an .npz: a second call takes a minute")
    parser.add_argument("--out", type=Path, default=REPORT)
    wanted = parser.parse_args()
    if wanted.rates_alone and wanted.out == REPORT:
        parser.error("--rates-alone wants --out: it is not the whole report")
    cv2.setNumThreads(1)
    parts = load_parts(wanted)
    cast = load_cast(wanted.data, wanted.limit)
    cache = Cache(wanted.cache)
    with tempfile.TemporaryDirectory() as folder:
        enrolled = enrol(cast, parts, cache, Path(folder) / "gallery")
        probes = measure(cast, parts, cache)
        rankings = rank(probes, enrolled)
        weights = redraws(len(cast.enrolled), len(cast.nonmates))
        rates = Rates.of(rankings, weights)
        lines: list[str] = []
        if wanted.rates_alone:
            lines += ["", "Neither faces in frames, nor guides, nor clips were looked at: --rates-alone."]
        else:
            lines += found_lines(detected(cast, parts, cache))
            lines += leak_lines(leaked(cast, enrolled, parts, cache, rates), weights)
            passages = watched(wanted.data / "videos", enrolled, parts, cache, wanted.limit)
            lines += passage_lines(passages, rates, parts.calibration, len(cast.enrolled))
    cache.save()
    lines = [
        *opening(shlex.join(["python", *sys.argv]), cast, parts, cache),
        *identified_lines(parts, probes, rankings, rates, weights),
        *lines,
    ]
    lines += calibration_lines(parts.calibration, probes, rankings, enrolled, weights)
    wanted.out.write_text("\n".join(lines) + "\n")
    print(f"{wanted.out}: written")


# What is looked at, and by what.


@dataclass(frozen=True, slots=True)
class Parts:
    """The product's parts, as a run has them."""

    embedder: FaceEmbedder
    router: Router
    routed: dict[str, FaceRestorer]
    """Those that the router may name."""
    tried: dict[str, FaceRestorer]
    sampled: dict[str, FaceRestorer]
    guided: GuidedRestorer
    detector: FaceDetector
    calibration: Calibration | None
    routes: str
    """What the router goes by."""

    @property
    def restorers(self) -> dict[str, FaceRestorer]:
        """All, by name."""
        return {**self.sampled, **self.tried, **self.routed}

    @property
    def digest(self) -> str:
        """Of all that decides about a face."""
        engines = [self.embedder.engine, *(each.engine for each in self.routed.values())]
        return _digest(self.routes, *(engine.sha256 for engine in engines))


def load_parts(wanted: argparse.Namespace) -> Parts:
    """Load what the command names."""
    networks = Networks(default_store(), backend="onnxruntime", threads=1)
    embedder = networks.embedder(wanted.embedder)
    assert embedder is not None
    if wanted.routes:
        table = RouteTable.read(wanted.routes, embedder_sha256=embedder.engine.sha256)
        routed = _restorers(networks, table.routed)
        scales = {name: each.engine.card.scales for name, each in routed.items()}
        router: Router = FittedRouter(table, scales, max_size=MAX_SIZE)
    else:
        table = networks.routes(wanted.embedder)
        router, routed = load_restorers(RestorerConfig(), networks, wanted.embedder)
    tried, sampled = (_restorers(networks, given.split(",")) for given in (wanted.restorers, wanted.sampled))
    return Parts(
        embedder, router, routed, tried, sampled, networks.guided_restorer(GUIDED),
        networks.detector(DETECTOR, size=DETECTOR_SIZE),
        networks.calibration(wanted.embedder, wanted.calibration),
        "one restorer: no routes are fitted for this embedder" if table is None
        else f"routes fitted on {table.data}, {table.fitted_on} (sha256 {_digest(table.model_dump_json())[:12]})",
    )  # fmt: skip


def _restorers(networks: Networks, names: Sequence[str]) -> dict[str, FaceRestorer]:
    loaded = [networks.restorer(name, max_size=MAX_SIZE) for name in names if name]
    return {each.engine.card.name: each for each in loaded if each is not None}


@dataclass(frozen=True)
class Cast:
    """Who takes part; each list is always in the same order."""

    enrolled: list[Sample]
    """One photo of each."""
    mates: list[Sample]
    """Their other photos."""
    nonmates: list[Sample]
    """One photo of each of others: those of LFW first."""

    @functools.cached_property
    def looked_up(self) -> list[Sample]:
        """All photos that probes are made of, mates first."""
        return [*self.mates, *self.nonmates]

    @functools.cached_property
    def owners(self) -> np.ndarray:
        """(n,): of whom each photo that is looked up is, as a row of `enrolled`; -1 of a non-mate."""
        rows = {sample.person: row for row, sample in enumerate(self.enrolled)}
        return np.array([rows.get(sample.person, -1) for sample in self.looked_up])

    @functools.cached_property
    def strangers(self) -> np.ndarray:
        """(n,): as a row of `nonmates`; -1 of a mate."""
        return np.concatenate([np.full(len(self.mates), -1), np.arange(len(self.nonmates))])

    @functools.cached_property
    def of_lfw(self) -> np.ndarray:
        """(n,) bool: which photos are mates, or non-mates of LFW."""
        return np.array([sample.name.startswith("lfw_") for sample in self.looked_up])


def load_cast(data: Path, limit: int | None = None) -> Cast:
    """Read the photos; with a limit so many people of each kind, chosen by the hash of their names."""
    people: dict[str, list[Sample]] = {}
    for sample in load_samples(data, "lfw_test"):
        people.setdefault(sample.person, []).append(sample)
    of_two = _some([photos for photos in people.values() if len(photos) > 1], limit)
    of_one = _some([photos for photos in people.values() if len(photos) == 1], limit)
    others = _some([[sample] for sample in load_held_out(data)], limit)
    return Cast(
        [photos[0] for photos in of_two],
        [photo for photos in of_two for photo in photos[1:]],
        [photos[0] for photos in (*of_one, *others)],
    )


def _some(people: list[list[Sample]], limit: int | None) -> list[list[Sample]]:
    if limit is not None:
        people = sorted(people, key=lambda photos: _digest(photos[0].person))[:limit]
    return sorted(people, key=lambda photos: photos[0].person)


class Shot:
    """A photo as a camera gives it in one bin: always the same."""

    def __init__(self, sample: Sample, number: int) -> None:
        least, most = BINS[number]
        self.sample, self.name, self.number = sample, f"{number} {sample.name}", number
        self.there = sample.height >= least
        """Whether the photo is large enough."""
        rng = np.random.default_rng([SEED, number, zlib.crc32(sample.name.encode())])
        self._height = rng.uniform(least, max(least, min(most, sample.height)))

    @functools.cached_property
    def crop(self) -> Crop:
        return probe(self.sample, Damage(self._height), SEED)


class Cache:
    """Keeps rows of numbers by what they are and of which photo, in one file; goes on where a run was ended."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._saved, self._spent = path, time.monotonic(), 0.0
        self._rows: dict[str, dict[str, np.ndarray]] = {}
        if path and path.exists():
            with np.load(path) as kept:
                self._spent = float(kept["spent"])
                for what in (key.removesuffix(" names") for key in kept if key.endswith(" names")):
                    self._rows[what] = dict(zip(kept[f"{what} names"].tolist(), kept[f"{what} rows"], strict=True))

    @property
    def spent_s(self) -> float:
        """Seconds of a core that all went into, over all calls."""
        return self._spent + time.process_time()

    def row(self, what: str, name: str, make: Callable[[], np.ndarray | Sequence[float]]) -> np.ndarray:
        """Return what is kept, or make it."""
        rows = self._rows.setdefault(what, {})
        if name not in rows:
            rows[name] = np.asarray(make())
            self.keep()
        return rows[name]

    def rows(self, what: str) -> dict[str, np.ndarray]:
        """Return all that is kept of one kind, by name; what is put there is kept."""
        return self._rows.setdefault(what, {})

    def keep(self) -> None:
        """Write the file, if that was long ago."""
        if time.monotonic() - self._saved > 120:
            self.save()

    def save(self) -> None:
        """Write the file."""
        self._saved = time.monotonic()
        if self._path:
            part = self._path.with_suffix(".part.npz")
            arrays: dict[str, np.ndarray] = {"spent": np.array(self.spent_s)}
            for what, rows in self._rows.items():
                if rows:
                    arrays[f"{what} names"], arrays[f"{what} rows"] = np.array([*rows]), np.stack([*rows.values()])
            np.savez(part, **arrays)
            part.replace(self._path)


class Progress:
    """Says now and then how far something is."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._began = self._told = time.monotonic()

    def step(self, count: int = 1) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._told > 15 or self._done == self._total:
            self._told = now
            left = (now - self._began) / self._done * (self._total - self._done)
            print(f"{self._what}: {self._done} of {self._total}, {left / 60:.1f} minutes left", flush=True)


# Enrolled and looked up.


@dataclass(frozen=True)
class Enrolled:
    """The gallery on disk, and what is searched."""

    folder: Path
    vault: Vault
    ids: tuple[str, ...]
    """Of the enrolled, in the order of the cast."""
    snapshot: Snapshot
    people: str
    """A digest of who they are."""

    @functools.cached_property
    def rows(self) -> dict[str, int]:
        """By id, which of the cast."""
        return {each: row for row, each in enumerate(self.ids)}

    def set_threshold(self, threshold: float) -> None:
        """Have the list match from there on."""
        with Gallery.open(self.folder, self.vault) as gallery, gallery.change("identification") as change:
            change.put_list(_watch_list(threshold))

    def identifier(self, parts: Parts, guided: GuidedRestorer | None = None) -> Identifier:
        """Return the product's, for which everybody is near somebody."""
        live = LiveGallery(Gallery.open(self.folder, self.vault), parts.embedder.engine.sha256)
        scorer = Scorer(parts.calibration, short_list_margin=2.0)  # cosines: nobody is farther
        nobody = EventName("", "", "")
        return Identifier(
            parts.router, parts.routed, parts.embedder, Search(live, scorer, Unwritten(), guided), metrics=Metrics(),
            name_of=lambda track: nobody,
        )  # fmt: skip


class Unwritten:
    """Keeps no evidence: a `Witness` for a measurement."""

    def prune(self) -> None:
        """Do nothing: there is none."""

    def keep(self, name: EventName, face: FaceIdentified, scored: Scored, gallery_version: int) -> str:
        """Keep nothing."""
        return ""


def enrol(cast: Cast, parts: Parts, cache: Cache, folder: Path) -> Enrolled:
    """Make a gallery of one photo of each, embedded as enrolment does."""
    embedder, vault, ids = parts.embedder, Vault(bytes(range(32))), []
    sha256, watch_list = embedder.engine.sha256, _watch_list(1.0)

    def template(shown: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return embedder.embed([shown])[0]

    progress = Progress("enrolled", len(cast.enrolled))
    with Gallery.open(folder, vault, create=True) as gallery:
        with gallery.change("identification") as change:
            change.use_embedder(embedder.engine.card.name, sha256)
            change.put_list(watch_list)
            for sample in cast.enrolled:
                face = cut_face(sample.image, sample.box, sample.landmarks)
                vector = cache.row(f"enrolled {sha256}", sample.name, functools.partial(template, face))
                identity = change.add_identity(sample.person)
                photo = change.add_photo(identity, cv2.imencode(".png", face[0])[1].tobytes(), face[1], quality={})
                change.add_template(photo, sha256, vector)
                change.join(identity, watch_list.name)
                ids.append(identity)
                progress.step()
        snapshot = gallery.snapshot(sha256)
    return Enrolled(folder, vault, tuple(ids), snapshot, _digest(*(sample.name for sample in cast.enrolled)))


def _watch_list(threshold: float) -> WatchList:
    return WatchList("identification", "a measurement", "none", threshold=threshold)


@dataclass(frozen=True, slots=True)
class Probes:
    """The probes of one bin, as parallel arrays."""

    owners: np.ndarray
    """(n,): whose, as a row of the enrolled; -1 of a non-mate."""
    strangers: np.ndarray
    """(n,): as a row of the non-mates; -1 of a mate."""
    of_lfw: np.ndarray
    """(n,) bool."""
    heights: np.ndarray
    """(n,): of the face's box, in pixels."""
    routes: np.ndarray
    """(n,) of names."""
    embeddings: dict[str, np.ndarray]
    """By method, (n, d). Of a restorer alone; of it, fused; and of what the product does. Where a result would be too
    large, there is none: raw stands there. Not a number where it was not tried."""
    restored: dict[str, int]
    """By restorer: of how many."""


@dataclass(frozen=True, slots=True)
class Row:
    """One probe."""

    place: int
    """Among those that are looked up."""
    height_px: float
    route: str
    raw: np.ndarray
    blind: dict[str, np.ndarray | None]
    """By restorer; None where it would be too large."""
    tried: set[str]
    """The restorers that are compared by it."""


def measure(cast: Cast, parts: Parts, cache: Cache) -> list[Probes]:
    """Embed all probes in every way that is tried; return them by bin."""
    slow = evenly(cast, *SAMPLE)
    progress = Progress("probes", len(cast.looked_up))
    rows: list[list[Row]] = [[] for _ in BINS]
    for place, sample in enumerate(cast.looked_up):
        for shot in shots(sample):
            crop = _judged(shot, cache)
            route = parts.router.route(crop).restorer
            sampled = parts.sampled if place in slow and shot.number in SAMPLED_BINS else {}
            tried = {*parts.tried, *sampled, route} - {NONE}
            raw = cache.row(
                f"raw {parts.embedder.engine.sha256}", shot.name, functools.partial(_raw, shot, parts.embedder)
            )
            blind = {name: _blind(shot, crop, parts.restorers[name], parts.embedder, cache) for name in sorted(tried)}
            rows[shot.number].append(
                Row(place, crop.quality.face_height_px, route, raw, blind, {*parts.tried, *sampled})
            )
        progress.step()
    return [_probes(cast, parts, of_bin) for of_bin in rows]


def shots(sample: Sample) -> Iterator[Shot]:
    """Yield what is made of a photo, bin after bin."""
    for number in range(len(BINS)):
        if (shot := Shot(sample, number)).there:
            yield shot


def evenly(cast: Cast, mates: int, nonmates: int) -> set[int]:
    """Choose places among those that are looked up: of mates every person once before any twice."""
    taken: Counter[int] = Counter()
    rounds = []
    for place in np.random.default_rng(SEED).permutation(len(cast.mates)).tolist():
        taken[cast.owners[place]] += 1
        rounds.append((taken[cast.owners[place]], len(rounds), place))
    others = np.random.default_rng(SEED).permutation(len(cast.nonmates))[:nonmates] + len(cast.mates)
    return {*(place for _, _, place in sorted(rounds)[:mates]), *others.tolist()}


def _judged(shot: Shot, cache: Cache) -> Crop:
    """Return a crop for the router, which goes by quality and side: its pixels are not there."""
    names = list(Quality.__dataclass_fields__)

    def judge() -> list[float]:
        return [shot.crop.image.shape[0], *(getattr(shot.crop.quality, name) for name in names)]

    side, *figures = cache.row(f"quality {SEED}", shot.name, judge).tolist()
    moment = Moment("probe", 0, 0.0, datetime.fromtimestamp(0, UTC), "file")
    track = Track(1, moment, np.zeros(4, np.float32), np.zeros((5, 2), np.float32), 1.0)
    image = np.broadcast_to(np.uint8(0), (int(side), int(side), 3))
    return Crop(track, image, np.eye(2, 3), Quality(**dict(zip(names, figures, strict=True))))


def _raw(shot: Shot, embedder: FaceEmbedder) -> np.ndarray:
    return embedder.embed([(shot.crop.image, shot.crop.landmarks)])[0]


def _blind(shot: Shot, judged: Crop, restorer: FaceRestorer, embedder: FaceEmbedder, cache: Cache) -> np.ndarray | None:
    """Return the embedding of the restored crop, None where it would be too large."""
    engine = restorer.engine
    if min(engine.card.scales) * judged.image.shape[0] > restorer.max_size:
        return None

    def make() -> np.ndarray:
        ((image, scale),) = restorer.restore([shot.crop.image])
        landmarks = transform_points(scale_transform(np.eye(2, 3), scale), shot.crop.landmarks)
        return embedder.embed([(image, landmarks)])[0]

    return cache.row(f"{engine.card.name} {engine.sha256} {embedder.engine.sha256}", shot.name, make)


def _probes(cast: Cast, parts: Parts, rows: Sequence[Row]) -> Probes:
    places = np.array([row.place for row in rows])
    raws = np.stack([row.raw for row in rows])
    embeddings, restored = {RAW: raws}, {}
    for name in dict.fromkeys([*parts.tried, *parts.sampled]):
        alone, fused = np.full_like(raws, np.nan), np.full_like(raws, np.nan)
        for number, row in enumerate(rows):
            if name in row.tried:
                found = row.blind[name]
                alone[number] = row.raw if found is None else found
                fused[number] = fuse(Embeddings(row.raw, found))
        embeddings[name], embeddings[fused_name(name)] = alone, fused
        restored[name] = sum(name in row.tried and row.blind[name] is not None for row in rows)
    embeddings[ROUTED] = np.stack([fuse(Embeddings(row.raw, row.blind.get(row.route))) for row in rows])
    return Probes(
        cast.owners[places], cast.strangers[places], cast.of_lfw[places], np.array([row.height_px for row in rows]),
        np.array([row.route for row in rows]), embeddings, restored,
    )  # fmt: skip


def fused_name(restorer: str) -> str:
    return f"{restorer} + raw"


# How often people are missed, and others taken for them.


@dataclass(frozen=True, slots=True)
class Ranking:
    """Who came out on top for some probes, by one method."""

    tops: np.ndarray
    """(n,): the identity that each is most like, as a row of the enrolled."""
    similarities: np.ndarray
    """(n,): how much."""
    owners: np.ndarray
    """(n,): of whom it is; -1 of a non-mate."""
    strangers: np.ndarray
    """(n,): as a row of the non-mates; -1 of a mate."""

    def among(self, chosen: np.ndarray) -> Ranking:
        """Return that of some probes."""
        return Ranking(self.tops[chosen], self.similarities[chosen], self.owners[chosen], self.strangers[chosen])

    @property
    def mates(self) -> np.ndarray:
        """(n,) bool."""
        return np.asarray(self.owners >= 0)

    @staticmethod
    def joined(rankings: Sequence[Ranking]) -> Ranking:
        """Return several as one."""
        columns = ("tops", "similarities", "owners", "strangers")
        return Ranking(*(np.concatenate([getattr(each, column) for each in rankings]) for column in columns))


@dataclass(frozen=True, slots=True)
class Weights:
    """How often each person counts: once in the first row, then as chance redraws them."""

    enrolled: np.ndarray
    """(1 + redraws, identities)"""
    strangers: np.ndarray
    """(1 + redraws, non-mates)"""

    def of(self, probes: Ranking | Probes) -> np.ndarray:
        """Return how often each probe is there, (1 + redraws, n): as often as its person."""
        mates = probes.owners >= 0
        counted = np.empty((len(self.enrolled), len(mates)))
        counted[:, mates] = self.enrolled[:, probes.owners[mates]]
        counted[:, ~mates] = self.strangers[:, probes.strangers[~mates]]
        return counted


def redraws(identities: int, nonmates: int, count: int = REDRAWS) -> Weights:
    """Redraw the enrolled and the non-mates."""
    rng = np.random.default_rng(SEED)
    enrolled, strangers = (
        np.concatenate([np.ones((1, size)), rng.multinomial(size, np.full(size, 1 / size), count)])
        for size in (identities, nonmates)
    )
    return Weights(enrolled, strangers)


def rank(probes: Sequence[Probes], enrolled: Enrolled) -> dict[tuple[int, str], Ranking]:
    """Search by every method; return it by bin and method."""
    rankings = {}
    for number, of_bin in enumerate(probes):
        for method, embeddings in of_bin.embeddings.items():
            there = np.isfinite(embeddings[:, 0])
            if there.any():
                found = [first for (first,) in enrolled.snapshot.search(embeddings[there], 1)]
                rankings[number, method] = Ranking(
                    np.array([enrolled.rows[each.identity] for each in found]),
                    np.array([each.similarity for each in found]), of_bin.owners[there], of_bin.strangers[there],
                )  # fmt: skip
        print(f"searched: {height(number)}", flush=True)
    return rankings


def thresholds(ranking: Ranking, weights: Weights, share: float) -> np.ndarray:
    """Return the similarity above which at most this share of the non-mates lies: as they are, and in each redraw.

    An alarm counts as often as the non-mate and the identity that caused it were drawn: an identity drawn twice stands
    for two persons whom others are taken for as readily.
    """
    others = ranking.among(~ranking.mates)
    order = np.argsort(-others.similarities, kind="stable")
    counted = weights.of(others)
    added = np.cumsum((counted * weights.enrolled[:, others.tops])[:, order], axis=1)
    limits = share * counted.sum(1) + 1e-9
    places = [np.searchsorted(row, limit, side="right") for row, limit in zip(added, limits, strict=True)]
    return others.similarities[order][np.minimum(places, len(order) - 1)] + HAIR


def alarms(ranking: Ranking, weights: Weights, above: np.ndarray) -> np.ndarray:
    """Return FPIR, the share of non-mates whose top lies above the threshold: as they are, and in each redraw."""
    others = ranking.among(~ranking.mates)
    counted = weights.of(others)
    alarming = (others.similarities > above[:, None]) * weights.enrolled[:, others.tops]
    return np.asarray((counted * alarming).sum(1) / counted.sum(1))


def misses(ranking: Ranking, weights: Weights, above: np.ndarray) -> np.ndarray:
    """Return FNIR, the share of mates whose own identity is not on top and above the threshold: likewise."""
    mates = ranking.among(ranking.mates)
    counted = weights.of(mates)
    hit = (mates.tops == mates.owners) & (mates.similarities > above[:, None])
    return np.asarray(1 - (counted * hit).sum(1) / np.maximum(counted.sum(1), 1))


@dataclass(frozen=True, slots=True)
class Rates:
    """Each as it is, then in each redraw: (1 + redraws,). By bin, method and FPIR."""

    thresholds: dict[tuple[int, str, float], np.ndarray]
    own: dict[tuple[int, str, float], np.ndarray]
    """FNIR at the method's own threshold in this bin."""
    common: dict[str, dict[tuple[int, str, float], np.ndarray]]
    """FNIR at one threshold for all, by where that is chosen."""
    common_alarms: dict[str, dict[tuple[int, str, float], np.ndarray]]
    """FPIR there."""
    common_thresholds: dict[str, dict[float, np.ndarray]]

    @classmethod
    def of(cls, rankings: Mapping[tuple[int, str], Ranking], weights: Weights) -> Rates:
        """Judge all rankings."""
        own, own_thresholds = {}, {}
        for cell, ranking in rankings.items():
            for share in (*SHARES, CARELESS):
                above = thresholds(ranking, weights, share)
                own_thresholds[*cell, share], own[*cell, share] = above, misses(ranking, weights, above)
        judged = {cell: each for cell, each in rankings.items() if cell[1] in (RAW, ROUTED)}
        chosen_on = {
            ON_LARGE: rankings[LARGE, RAW],
            POOLED: Ranking.joined([*judged.values()]),
        }
        chosen = {
            where: {share: thresholds(ranking, weights, share) for share in CLAIMED}
            for where, ranking in chosen_on.items()
        }
        common, common_alarms = (
            {
                where: {
                    (*cell, share): rate(ranking, weights, above)
                    for cell, ranking in judged.items()
                    for share, above in by_share.items()
                }
                for where, by_share in chosen.items()
            }
            for rate in (misses, alarms)
        )
        return cls(own_thresholds, own, common, common_alarms, chosen)


@dataclass(frozen=True, slots=True)
class Loss:
    """How many more mates are missed than by raw, as a share, with one-sided 95 % bounds."""

    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, rates: Mapping[tuple[int, str, float], np.ndarray], number: int, share: float) -> Loss:
        """Compare what the product does with raw, both in the same redraws."""
        differences = rates[number, ROUTED, share] - rates[number, RAW, share]
        least, most = np.quantile(differences[1:], (0.05, 0.95))
        return cls(float(differences[0]), float(least), float(most))

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.least:+.3f} to {self.most:+.3f})"


# What the detector finds.


def detected(cast: Cast, parts: Parts, cache: Cache) -> list[tuple[int, int]]:
    """Return by bin how many faces the detector finds, and of how many."""
    chosen = [shot for place in sorted(evenly(cast, *FRAMES)) for shot in shots(cast.looked_up[place])]
    progress = Progress("frames", len(chosen))
    counts = [[0, 0] for _ in BINS]
    for shot in chosen:
        make = functools.partial(_found, shot, parts.detector)
        (found,) = cache.row(f"found {parts.detector.engine.sha256} {DETECTOR_SIZE}", shot.name, make)
        counts[shot.number][0] += int(found)
        counts[shot.number][1] += 1
        progress.step()
    return [(found, of) for found, of in counts]


def _found(shot: Shot, detector: FaceDetector) -> list[float]:
    """Tell whether the face is found where it is, in a grey frame with the crop as it is in its middle."""
    crop = shot.crop
    side = crop.image.shape[0]
    frame = np.full((*FRAME, 3), 128, np.uint8)
    top, left = (np.array(FRAME) - side) // 2
    frame[top : top + side, left : left + side] = crop.image
    detections = detector.detect([frame])[0]
    detections = detections[detections.scores >= detector.threshold]
    box = crop.track.box
    half = (box[2:] - box[:2]) / 2
    middle = transform_points(crop.transform, (box[None, :2] + box[None, 2:]) / 2)[0] + (left, top)
    alike = iou(np.concatenate([middle - half, middle + half])[None], detections.boxes)
    return [float(alike.size > 0 and alike.max() >= 0.4)]


# Whether a guide leaks.


@dataclass(frozen=True, slots=True)
class Leak:
    """Probes of one bin that were identified with guides."""

    number: int
    compared: np.ndarray
    """(n,): 1 where all but `guided` was the same without guides, 0 where not; not a number: not compared."""
    matched: np.ndarray
    """(n,) bool."""
    fused: Ranking
    guided: Ranking
    """The similarity of the guided picture to the same identity, whose photo guided it."""
    above: np.ndarray
    """(1 + redraws,): the threshold of fused, of all probes of the bin."""


def leaked(cast: Cast, enrolled: Enrolled, parts: Parts, cache: Cache, rates: Rates) -> list[Leak]:
    """Identify probes of the small bins with guides, and those of one bin without."""
    leaks = []
    for number in SMALL:
        mates, nonmates = LEAKED
        places = sorted(evenly(cast, len(cast.mates) if number == LEAKED_BIN else mates, nonmates))
        wanted = [(place, Shot(cast.looked_up[place], number)) for place in places]
        wanted = [(place, shot) for place, shot in wanted if shot.there]
        above = rates.thresholds[number, ROUTED, CARELESS]
        rows = _leak_rows(wanted, enrolled, parts, cache, float(above[0]), compare=number == LEAKED_BIN)
        places = [place for place, _ in wanted]
        told = np.stack([rows[shot.name] for _, shot in wanted])
        compared, matched, fused, guided, tops = told.T
        owners, strangers = cast.owners[places], cast.strangers[places]
        leaks.append(
            Leak(
                number, compared, matched > 0, Ranking(tops.astype(int), fused, owners, strangers),
                Ranking(tops.astype(int), guided, owners, strangers), above,
            )
        )  # fmt: skip
    return leaks


def _leak_rows(
    wanted: Sequence[tuple[int, Shot]], enrolled: Enrolled, parts: Parts, cache: Cache, threshold: float, *,
    compare: bool,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return of each probe: whether it is the same without guides, matched, fused, guided, and who is on top."""
    calibration = parts.calibration.sha256 if parts.calibration else ""
    made_by = _digest(parts.digest, parts.guided.engine.sha256, enrolled.people, calibration, f"{threshold:.6f}")
    rows = cache.rows(f"leak {compare} {made_by}")
    left = [each for each in wanted if each[1].name not in rows]
    if not left:
        return rows
    progress = Progress(f"guided, {height(wanted[0][1].number)}", len(left))
    enrolled.set_threshold(threshold)
    ours = enrolled.identifier(parts, parts.guided)
    plain = enrolled.identifier(parts) if compare else None
    for start in range(0, len(left), BATCH):
        batch = left[start : start + BATCH]
        crops = [replace(shot.crop, track=replace(shot.crop.track, id=place + 1)) for place, shot in batch]
        faces = ours.identify(crops)
        others = plain.identify(crops) if plain else [None] * len(crops)
        for (_, shot), face, other in zip(batch, faces, others, strict=True):
            rows[shot.name] = _leak_row(face, other, enrolled)
        for crop in crops:
            ours.left(crop.track)
            if plain:
                plain.left(crop.track)
        progress.step(len(batch))
        cache.keep()
    for each in (ours, plain):
        if each and each.search:
            each.search.close()
    return rows


def _leak_row(face: FaceIdentified, other: FaceIdentified | None, enrolled: Enrolled) -> np.ndarray:
    assert face.scores
    top, score = next(iter(face.scores.items()))
    assert score.guided is not None
    same = math.nan if other is None else float(same_but_guided(face, other))
    return np.array([same, face.match is not None, score.fused, score.guided, enrolled.rows[top]])


def same_but_guided(face: FaceIdentified, other: FaceIdentified) -> bool:
    """Tell whether all that was decided and measured is the same to the last bit, but for what a guide drew."""
    assert face.embeddings and other.embeddings and face.scores is not None and other.scores is not None

    def unguided(scores: Mapping[str, Score]) -> list[tuple[str, Score]]:
        return [(identity, replace(score, guided=None)) for identity, score in scores.items()]

    return (
        face.route == other.route
        and face.match == other.match
        and unguided(face.scores) == unguided(other.scores)
        and np.array_equal(face.embeddings.raw, other.embeddings.raw)
        and (face.embeddings.blind is None) == (other.embeddings.blind is None)
        and np.array_equal(face.embeddings.blind, other.embeddings.blind)  # type: ignore[arg-type]  # of None too
    )


# Strangers in real clips.


@dataclass(frozen=True, slots=True)
class Passage:
    """A track of a clip."""

    height_px: float
    """Of its largest crop's face."""
    similarity: float
    """The highest fused one, over all its looks."""
    looks: int


def watched(
    clips: Path, enrolled: Enrolled, parts: Parts, cache: Cache, limit: int | None
) -> dict[str, list[Passage]]:  # fmt: skip
    """Return the passages of all clips, or of the first."""
    made_by = _digest(parts.digest, parts.detector.engine.sha256, enrolled.people)
    passages = {}
    for clip, every in [*CLIPS.items()][: 1 if limit else None]:
        kept = cache.rows(f"clip {clip} {every} {made_by}")
        if not kept:
            found = _watch(clips / f"{clip}.mp4", every, enrolled, parts)
            kept |= {str(number): np.array(row, np.float64) for number, row in enumerate(found)}
            kept["end"] = np.zeros(3)  # there, even where nobody passes
            print(f"watched: {clip}, {len(found)} passages", flush=True)
        rows = [row for name, row in kept.items() if name != "end"]
        passages[clip] = [Passage(height_px, similarity, int(looks)) for height_px, similarity, looks in rows]
    return passages


def _watch(path: Path, every: int, enrolled: Enrolled, parts: Parts) -> list[tuple[float, float, int]]:
    """Run a clip through detector, tracker, selector and identifier; return height, similarity and looks by track."""
    detector, selector = parts.detector, CropSelector()
    tracker = FaceTracker(threshold=detector.threshold, weak_threshold=detector.weak_threshold)
    identifier = enrolled.identifier(parts)
    found: dict[int, tuple[float, float, int]] = {}
    for number, frame in enumerate(Camera("clip", str(path), stop=threading.Event()).frames()):
        if number % every:
            continue
        update = tracker.update(frame.moment, detector.detect([frame.image])[0])
        for face in identifier.identify(selector.select(frame, update.tracks)):
            assert face.scores
            fused, crop = next(iter(face.scores.values())).fused, face.crop
            height_px, similarity, looks = found.get(crop.track.id, (0.0, -1.0, 0))
            found[crop.track.id] = max(height_px, crop.quality.face_height_px), max(similarity, fused), looks + 1
        for track in update.left:
            identifier.left(track)
    assert identifier.search is not None
    identifier.search.close()
    return [*found.values()]


# Whether the calibration is true.


@dataclass(frozen=True, slots=True)
class Alarms:
    """What the calibration expects of a threshold, and what was seen."""

    similarity: float
    expected: float
    """The share of searches with a false alarm."""
    bound: float
    """What the product says it is at most."""
    seen: int
    of: int
    low: float
    high: float


def expected_alarms(
    calibration: Calibration, heights: np.ndarray, ranking: Ranking, weights: Weights, identities: int
) -> list[Alarms]:
    """Return thresholds by which the calibration expects few alarms, and what came of them.

    `heights` (n,) are those of the non-mates' faces.
    """
    bins = Counter(calibration.bin(each) for each in heights.tolist())
    shares = {number: count / len(heights) for number, count in bins.items()}
    above = sum(
        share * (1 - (1 - np.array(calibration.bins[number].strangers_above)) ** identities)
        for number, share in shares.items()
    )
    told = []
    for share in EXPECTED:
        step = int(np.argmax(above <= share))
        similarity = calibration.similarities[step]
        seen = alarms(ranking, weights, np.full(len(weights.enrolled), np.nextafter(similarity, -2)))
        low, high = np.quantile(seen[1:], (0.025, 0.975))
        bound = calibration.expected_false_alarms(similarity, identities, shares)
        of = int((~ranking.mates).sum())
        high = max(high, 1 - 0.025 ** (1 / of))  # Clopper and Pearson's of none among so many
        told.append(
            Alarms(similarity, float(above[step]), bound, round(seen[0] * of), of, float(low), float(high))
        )  # fmt: skip
    return told


def reliability(calibration: Calibration, probes: Probes, templates: np.ndarray, weights: Weights) -> list[Band]:
    """Compare each probe with each enrolled (`templates`, in the order of the cast); return the bands that tell."""
    ratios = probes.embeddings[ROUTED] @ templates.T  # (n, identities): similarities, then ratios
    numbers = np.array([calibration.bin(each) for each in probes.heights])
    for number in np.unique(numbers):
        rows = numbers == number
        ratios[rows] = np.interp(ratios[rows], calibration.similarities, calibration.bins[number].llr)
    mates = probes.owners >= 0
    owners = probes.owners[mates]
    own = ratios[mates, owners]
    ratios[mates, owners] = np.nan
    counted = weights.of(probes)
    sums = []
    for low, high in itertools.pairwise(BANDS):
        inside = (ratios >= low) & (ratios < high)
        of_mates = (own >= low) & (own < high)
        others = ((counted.astype(np.float32) @ inside.astype(np.float32)) * weights.enrolled).sum(1)
        told = math.log10(float(np.mean(10 ** ratios[inside]))) if inside.any() else math.nan
        sums.append((int(of_mates.sum()), int(inside.sum()), told, counted[:, mates] @ of_mates, others))
    all_mates, all_others = (sum(each[place] for each in sums) for place in (3, 4))
    bands = []
    for of_mates, of_others, told, with_mates, with_others in sums:
        if min(of_mates, of_others) >= FEWEST:
            held = np.maximum(with_mates, 0.5) / all_mates, np.maximum(with_others, 0.5) / all_others
            found = np.log10(held[0] / held[1])
            low, high = np.quantile(found[1:], (0.025, 0.975))
            bands.append(Band(of_mates, of_others, told, float(found[0]), float(low), float(high)))
    return bands


# The report.


def opening(command: str, cast: Cast, parts: Parts, cache: Cache) -> list[str]:
    """Return what was looked at, by what, and how."""
    most = Counter(cast.owners[: len(cast.mates)].tolist()).most_common(1)[0][1]
    of_lfw = int(cast.of_lfw.sum()) - len(cast.mates)
    networks = [parts.embedder.engine, *(each.engine for each in parts.restorers.values()), parts.guided.engine]
    told = ", ".join(f"{engine.card.name} ({engine.sha256[:12]})" for engine in [*networks, parts.detector.engine])
    return [
        f"# One face among many, by {parts.embedder.engine.card.name}",
        "",
        f"`{command}`, {datetime.now(UTC).date()}, on one core of {platform.machine()} ({_processor()}), ONNX Runtime "
        f"{onnxruntime.__version__}, {cache.spent_s / 60:.0f} minutes of it. Networks, with the first digits of their "
        f"sha256: {told}. Router: {parts.routes}.",
        "",
        f"Enrolled: one photo, the first by name, of each of the {len(cast.enrolled)} persons of lfw_test who have "
        f"two. Mates: their other {len(cast.mates)} photos ({most} of one person). Non-mates: one photo of each of "
        f"the {of_lfw} others of lfw_test, and of {len(cast.nonmates) - of_lfw} persons of calibration.txt on whom "
        "nothing was trained or fitted. The embedder was trained on, says its card: "
        f"{parts.embedder.engine.card.trained_on or 'not said'}. Terms: {TERMS}.",
        "",
        "Probes: every photo once in each bin, its face's box reduced by area to a height drawn in the bin (in the "
        f"last from 48 px up to its own), then noise σ {Damage(0).noise:g}, then JPEG {Damage(0).jpeg}. Landmarks are "
        "given: the photo's own, reduced. raw is the crop as it came; a restorer's name is its restoration alone; "
        "+ raw is both, fused by the product; routed and fused is what the product does. Where a restoration would be "
        f"larger than {MAX_SIZE} px, none is made, and the crop stands for itself.",
        "",
        "FPIR is the share of non-mates whose top similarity lies above the threshold, FNIR that of mates whose own "
        "identity is not the one on top, or not above it. Every probe counts once. Intervals are by "
        f"{REDRAWS} redraws of the enrolled and of the non-mates, in which an alarm counts as often as the one and the "
        "other are drawn, and the threshold is drawn anew; 95 %, two-sided where not said otherwise.",
    ]  # fmt: skip


def _processor() -> str:
    """Return what the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def identified_lines(
    parts: Parts, probes: Sequence[Probes], rankings: Mapping[tuple[int, str], Ranking], rates: Rates, weights: Weights
) -> list[str]:
    """Return what was found of 1:N."""
    methods = [RAW, *(each for name in parts.tried for each in (name, fused_name(name))), ROUTED]
    lines = ["", "## What holds", "", *verdicts(rates)]
    lines += ["", "## Probes and routes", "", *_table("", [height(n) for n in range(len(BINS))], {
        "mates": [str(int((each.owners >= 0).sum())) for each in probes],
        "non-mates": [str(int((each.owners < 0).sum())) for each in probes],
        "routes": [", ".join(f"{route} {count}" for route, count in Counter(each.routes.tolist()).most_common())
                   for each in probes],
        **{f"restored by {name}": [str(each.restored[name]) for each in probes] for name in parts.tried},
    })]  # fmt: skip
    for share in SHARES:
        title = f"FNIR at FPIR {_percent(share)}"
        allowed = [math.floor(share * (each.owners < 0).sum() + 1e-9) for each in probes]
        note = "" if share in CLAIMED else " So few tell little: no claim is made."
        told = ", ".join(f"{height(number)}: {count}" for number, count in enumerate(allowed))
        lines += ["", f"## {title}", "", f"Alarms that this allows: {told}.{note}", ""]
        lines += _table(title, [height(number) for number in range(len(BINS))], {
            method: [_rate(rates.own.get((number, method, share))) for number in range(len(BINS))] for method in methods
        })  # fmt: skip
    lines += ["", "Thresholds of these, at FPIR 1 % and 3 %:", "", *_table("", [height(n) for n in range(len(BINS))], {
        method: [" / ".join(f"{rates.thresholds[number, method, share][0]:.3f}" for share in CLAIMED)
                 for number in range(len(BINS))]
        for method in methods
    })]  # fmt: skip
    lines += ["", *_loss_lines(rates), "", *_lfw_lines(probes, rankings, weights)]
    for name in parts.sampled:
        lines += ["", *_sampled_lines(name, probes, rankings, weights)]
    return lines


def verdicts(rates: Rates) -> list[str]:
    """Return the aims, and whether they are met."""
    lines = []
    for kind, of_kind in {"its own threshold": rates.own, **rates.common}.items():
        where = kind if of_kind is rates.own else f"one threshold for all (chosen on {kind})"
        for share in CLAIMED:
            losses = [Loss.of(of_kind, number, share) for number in range(len(BINS))]
            missed = [f"{height(n)}: {each.most:+.3f}" for n, each in enumerate(losses) if each.most > MOST_LOSS]
            gains = [f"{height(n)}: {round(-losses[n].most, 3) + 0.0:+.3f}" for n in SMALL]
            gained = any(losses[number].most < 0 for number in SMALL)
            lines += [
                f"- FPIR {_percent(share)}, {where}: that routed and fused loses at most {MOST_LOSS} against raw in "
                f"every bin (one-sided 95 % bound) **{'does not hold' if missed else 'holds'}**"
                f"{' (' + ', '.join(missed) + ')' if missed else ''}; that it gains in {height(0)} or {height(1)} "
                f"(one-sided 95 % bound above 0) **{'holds' if gained else 'does not hold'}** ({', '.join(gains)}).",
            ]
    return lines


def _loss_lines(rates: Rates) -> list[str]:
    lines = [
        "## Routed and fused against raw",
        "",
        "How much more FNIR is than raw's: below 0 is a gain. In brackets the one-sided 95 % bounds, lower and upper. "
        "At one threshold for all bins and both methods, FPIR is no longer alike: it stands in the second table, raw's "
        "first.",
        "",
    ]
    columns = [height(number) for number in range(len(BINS))]
    kinds = {"own threshold": rates.own, **{f"threshold of {where}": each for where, each in rates.common.items()}}
    lines += _table("FNIR, less raw's", columns, {
        f"FPIR {_percent(share)}, {kind}": [str(Loss.of(of_kind, number, share)) for number in range(len(BINS))]
        for kind, of_kind in kinds.items() for share in CLAIMED
    })  # fmt: skip
    lines += ["", *_table("FPIR, and FNIR: raw / routed and fused", columns, {
        f"FPIR {_percent(share)}, threshold of {where} ({rates.common_thresholds[where][share][0]:.3f})": [
            ", ".join(f"{rate[number, RAW, share][0]:.3f} / {rate[number, ROUTED, share][0]:.3f}"
                      for rate in (rates.common_alarms[where], rates.common[where]))
            for number in range(len(BINS))
        ]
        for where in rates.common for share in CLAIMED
    })]  # fmt: skip
    return lines


def _lfw_lines(probes: Sequence[Probes], rankings: Mapping[tuple[int, str], Ranking], weights: Weights) -> list[str]:
    """Return what comes out where only LFW's own persons are non-mates: they are the more like those enrolled."""
    share = CLAIMED[0]
    cells: dict[str, list[str]] = {RAW: [], ROUTED: []}
    for number, of_bin in enumerate(probes):
        for method, told in cells.items():
            ranking = rankings[number, method].among(of_bin.of_lfw)
            told.append(_rate(misses(ranking, weights, thresholds(ranking, weights, share))))
    return [
        "With the non-mates of LFW alone, whose photos are the more like those enrolled, FNIR at FPIR "
        f"{_percent(share)}:", "",
        *_table("", [height(number) for number in range(len(BINS))], cells),
    ]  # fmt: skip


def _sampled_lines(
    name: str, probes: Sequence[Probes], rankings: Mapping[tuple[int, str], Ranking], weights: Weights
) -> list[str]:
    """Return what a slow restorer does, beside raw on the same probes."""
    share = CLAIMED[1]
    cells: dict[str, list[str]] = {RAW: [], name: [], fused_name(name): []}
    for number, of_bin in enumerate(probes):
        for method, told in cells.items():
            there = np.isfinite(of_bin.embeddings[name][:, 0])
            ranking = rankings[number, method]
            ranking = ranking.among(there) if method == RAW else ranking
            rate = misses(ranking, weights, thresholds(ranking, weights, share))
            told.append(_rate(rate) if of_bin.restored[name] else "")
    tried = [np.isfinite(each.embeddings[name][:, 0]) & (each.owners >= 0) for each in probes]
    restored = ", ".join(f"{height(number)} {each.restored[name]}" for number, each in enumerate(probes))
    return [
        f"{name} on a sample of {int(tried[0].sum())} mates and as many non-mates a bin at most, FNIR at FPIR "
        f"{_percent(share)} (so few alarms that it is a hint); restored: {restored}.",
        "",
        *_table("", [height(number) for number in range(len(BINS))], cells),
    ]


def found_lines(found: Sequence[tuple[int, int]]) -> list[str]:
    """Return what the detector finds."""
    return [
        "", "## Faces that the detector finds", "",
        f"{DETECTOR} at {DETECTOR_SIZE}, the degraded crop as it is in the middle of a grey frame of "
        f"{FRAME[1]}×{FRAME[0]}; found: a score above the threshold where the face is (IoU 0.4).", "",
        *_table("", [height(number) for number in range(len(BINS))], {
            "found": [f"{part / of:.2f} ({part} of {of})" if of else "" for part, of in found]
        }),
    ]  # fmt: skip


def leak_lines(leaks: Sequence[Leak], weights: Weights) -> list[str]:
    """Return whether a guide leaks, and what the guided picture is worth."""
    lines = ["", "## Guides decide nothing", ""]
    for leak in leaks:
        compared, mates = np.isfinite(leak.compared), leak.fused.mates
        if compared.any():
            same = leak.compared == 1
            lines += [
                f"{height(leak.number)}, identified with guides and without, in the same batches, everybody guided by "
                f"the photo of their top candidate: route, match, scores but `guided`, and embeddings are the same to "
                f"the last bit for {int((same & ~mates).sum())} of {int((compared & ~mates).sum())} non-mates and "
                f"{int((same & mates).sum())} of {int((compared & mates).sum())} mates "
                f"(matched: {int((leak.matched & ~mates).sum())} and {int((leak.matched & mates).sum())}). That guides "
                f"decide nothing **{'holds' if same[compared].all() else 'does not hold'}**.",
                "",
            ]
    lines += [
        "## Who would trust the guided picture", "",
        f"A careless consumer embeds the guided picture ({GUIDED}), which was drawn by the photo of the probe's own "
        "top candidate, and compares it with that candidate, at the threshold of routed and fused at FPIR "
        f"{_percent(CARELESS)}, of all probes of the bin. Alerts by fused itself stand beside: so many there are "
        "without the guided picture. The last row gives the guided picture a threshold of its own.", "",
    ]  # fmt: skip
    rows: dict[str, list[str]] = {}
    for leak in leaks:
        mates = leak.fused.mates
        rows.setdefault("mates, non-mates", []).append(f"{int(mates.sum())}, {int((~mates).sum())}")
        for method, ranking in (("fused", leak.fused), ("guided picture", leak.guided)):
            rows.setdefault(f"non-mates alerted, {method}", []).append(_rate(alarms(ranking, weights, leak.above)))
            right = 1 - misses(ranking, weights, leak.above)
            rows.setdefault(f"mates alerted as themselves, {method}", []).append(_rate(right))
            wrong = _alerted(ranking, weights, leak.above) - right
            rows.setdefault(f"mates alerted as somebody else, {method}", []).append(_rate(wrong))
        own = thresholds(leak.guided, weights, CARELESS)
        rows.setdefault("mates alerted as themselves, guided picture, own threshold", []).append(
            _rate(1 - misses(leak.guided, weights, own))
        )
    return lines + _table("", [height(leak.number) for leak in leaks], rows)


def _alerted(ranking: Ranking, weights: Weights, above: np.ndarray) -> np.ndarray:
    """Return the share of mates above the threshold, whoever they are taken for."""
    mates = ranking.among(ranking.mates)
    counted = weights.of(mates)
    return np.asarray((counted * (mates.similarities > above[:, None])).sum(1) / np.maximum(counted.sum(1), 1))


def passage_lines(
    passages: Mapping[str, Sequence[Passage]], rates: Rates, calibration: Calibration | None, identities: int
) -> list[str]:
    """Return what strangers in clips set off, by passage."""
    share = CLAIMED[0]
    pooled = float(rates.common_thresholds[POOLED][share][0])
    lines = [
        "", "## Strangers who pass, in real clips", "",
        f"The {identities} enrolled looked for in clips where none of them is, by detector ({DETECTOR} at "
        f"{DETECTOR_SIZE}), tracker, selector and identifier. A passage is a track; it alarms where the fused "
        "similarity of any of its looks lies above the threshold: that of its bin, routed and fused, at FPIR "
        f"{_percent(share)}, and the one of all probes pooled ({pooled:.3f}). Expected: what the calibration says at "
        "most of one look at each.", "",
    ]  # fmt: skip
    rows: dict[str, list[str]] = {}
    for clip, here in {**passages, "all": [each for of_clip in passages.values() for each in of_clip]}.items():
        own = [float(rates.thresholds[bin_of(each.height_px), ROUTED, share][0]) for each in here]
        heights = [each.height_px for each in here]
        told = [str(len(here)), str(sum(each.looks for each in here))]
        told.append(f"{min(heights):.0f} to {max(heights):.0f}" if here else "")
        for above in (own, [pooled] * len(here)):
            seen = sum(each.similarity > limit for each, limit in zip(here, above, strict=True))
            expected = "" if calibration is None else f", {_expected(calibration, here, above, identities):.2f}"
            told.append(f"{seen}{expected}")
        rows[clip] = told
    columns = ["passages", "looks", "face px", "alarms, expected: own", "alarms, expected: pooled"]
    return lines + _table("clip", columns, rows)


def _expected(calibration: Calibration, passages: Sequence[Passage], above: Sequence[float], identities: int) -> float:
    return sum(
        calibration.expected_false_alarms(limit, identities, {calibration.bin(each.height_px): 1.0})
        for each, limit in zip(passages, above, strict=True)
    )


def bin_of(height_px: float) -> int:
    """Return the number of the bin that a face of this height belongs to."""
    return max(0, sum(height_px >= least for least, _ in BINS) - 1)


def calibration_lines(
    calibration: Calibration | None, probes: Sequence[Probes], rankings: Mapping[tuple[int, str], Ranking],
    enrolled: Enrolled, weights: Weights,
) -> list[str]:  # fmt: skip
    """Return whether the calibration is true of these people."""
    lines = ["", "## Whether the calibration is true of these people", ""]
    if calibration is None:
        return [*lines, "There is no calibration for this embedder: nothing was measured of it."]
    identities, snapshot = len(enrolled.ids), enrolled.snapshot
    lines += [
        f"Fitted on {calibration.data}: none of them is here. Thresholds at which it expects the shares of searches "
        f"among {identities} with a false alarm that are told, by what it saw of strangers; the bound is what the "
        "product says. Seen: non-mates at or above the threshold, routed and fused.", "",
        "| faces | similarity | expected | bound | seen | interval | expected lies within | seen below bound |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for number, of_bin in enumerate(probes):
        ranking = rankings[number, ROUTED]
        heights = of_bin.heights[of_bin.owners < 0]
        lines += [
            f"| {height(number)} | {each.similarity:.2f} | {each.expected:.3f} | {each.bound:.3f} | "
            f"{each.seen / each.of:.3f} ({each.seen} of {each.of}) | {each.low:.3f} to {each.high:.3f} | "
            f"{_yes(each.low <= each.expected <= each.high)} | {_yes(each.seen / each.of <= each.bound)} |"
            for each in expected_alarms(calibration, heights, ranking, weights, identities)
        ]
    lines += [
        "",
        "Comparisons of each probe, routed and fused, with each enrolled, by the log10 ratio that the calibration "
        "told, and the ratio that was found: how much larger a share of mates than of others is among them. Bands with "
        f"fewer than {FEWEST} of either are left out.", "",
        "| faces | mates | others | told | found | interval | told lies within |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    templates = snapshot.templates[[snapshot.identities.index(each) for each in enrolled.ids]]
    for number, of_bin in enumerate(probes):
        lines += [
            f"| {height(number)} | {band.mates} | {band.strangers} | {band.told:.2f} | {band.found:.2f} | "
            f"{band.low:.2f} to {band.high:.2f} | {_yes(band.low <= band.told <= band.high)} |"
            for band in reliability(calibration, of_bin, templates, weights)
        ]
    return lines


def height(number: int) -> str:
    """Return what a bin is called."""
    least, most = BINS[number]
    return f"> {least:g} px" if math.isinf(most) else f"{least:g} to {most:g} px"


def _rate(rate: np.ndarray | None) -> str:
    """Return a rate with its interval."""
    if rate is None:
        return ""
    low, high = np.quantile(rate[1:], (0.025, 0.975))
    mean, low, high = (round(float(each), 3) + 0.0 for each in (rate[0], low, high))  # no -0.000
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _table(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join([title, *columns])} |", "|---" * (len(columns) + 1) + "|",
        *(f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()),
    ]  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


if __name__ == "__main__":
    main()
