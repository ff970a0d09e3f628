"""Fits what similarities mean, to photos of known people: `streamer calibrate`.

A person's first photo stands for them as an enrolled one does. Their other photos are made into what cameras give, at
heights and with damage drawn by chance, and go through router, restorer and embedder as crops do. A probe and the photo
of the same person are mates, a probe and that of somebody else are strangers. Who has one photo is probe and enrolled
by the same one, but never compared with themselves. The ratios and their bounds (ELUB) are those of NFI's `lir`: by
logistic regression, a line, or by isotonic regression, in each bin what loses less on people it was not fitted to.
"""

from __future__ import annotations

import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby, islice
from pathlib import Path
from typing import Any, get_args

import numpy as np

from streamer import __version__, enrolment
from streamer.calibration import Calibration, CalibrationError, HeightBin, Kind, Network
from streamer.embedder import FaceEmbedder
from streamer.enrolment import EnrolmentError, Gate, Person, cut_face
from streamer.identify import Identifier
from streamer.metrics import Metrics
from streamer.photos import PhotoError, read_image
from streamer.probes import Damage, Sample, probe
from streamer.restorer import FaceRestorer
from streamer.router import NONE, Router
from streamer.scoring import fuse
from streamer.types import EventName

logger = logging.getLogger(__name__)

EDGES = (0.0, 16.0, 24.0, 48.0)
"""Where each bin of face heights begins, in pixels."""
DRAWN = ((12.0, 16.0), (16.0, 24.0), (24.0, 48.0), (48.0, 128.0))
"""Between which heights a bin's probes are drawn: nobody is identified below 12 px, and many photos end at 128."""
MIX = ((10.0, 40), (5.0, 60), (2.5, 80))
"""The damage of a probe, each as often: sigma of the noise in grey levels, and quality of the JPEG."""
LEAST_PEOPLE = 20
"""So many must be there with two photos in every bin."""
MOST_PEOPLE = 1500
MOST_PHOTOS = 4
"""Of one person: else a few would stand for all."""
SIMILARITIES = np.round(np.linspace(-1, 1, 201), 2)
REDRAWS = 200
"""How often people are redrawn for the intervals."""

_FITTED_ON = 20_000
"""Comparisons with strangers that the ratios and their bounds are fitted on, evenly picked by similarity: all of some
hundred people's have no more to tell, and would claim ratios that so few people do not support."""
_FITTED_ON_AGAIN = 4_000
"""The same, where people are redrawn."""
_REGULARISATION = 1e4
"""C of scikit-learn's logistic regression: with its own 1 the ratios of few people come out far too close to 1."""


@dataclass(frozen=True, slots=True)
class Faces:
    """Embedded faces of known people."""

    people: tuple[str, ...]
    references: np.ndarray
    """(people, d) float32: the photo that stands for each, as enrolment embeds it."""
    probes: np.ndarray
    """(n, d) float32: fused."""
    owners: np.ndarray
    """(n,): whose probe it is, as a row of `references`."""
    mates: np.ndarray
    """(n,) bool: whether it was made of another photo than the reference."""
    bins: np.ndarray
    """(n,): number of its bin."""
    routes: np.ndarray
    """(n,) of names: its restorer, or none."""

    def among(self, chosen: np.ndarray) -> Faces:
        """Return those of some people, told by a mask (people,)."""
        rows = np.cumsum(chosen) - 1
        own = chosen[self.owners]
        people = tuple(name for name, among in zip(self.people, chosen, strict=True) if among)
        return Faces(
            people, self.references[chosen], self.probes[own], rows[self.owners[own]], self.mates[own], self.bins[own],
            self.routes[own],
        )  # fmt: skip


# What a folder holds.


def gather(folder: Path) -> list[Person]:
    """Return the people of a folder that holds one of photos for each, those with two photos first.

    They are as many as are looked at, with the first MOST_PHOTOS photos each. Raises CalibrationError.
    """
    try:
        found = enrolment.gather(None, [], folder)
    except EnrolmentError as exc:
        first, *others = str(exc).removeprefix("--folder ").splitlines()
        more = f", and {len(others)} more" if others else ""
        raise CalibrationError(first + more) from exc
    people = [replace(person, photos=person.photos[:MOST_PHOTOS]) for person in found]
    return sorted(people, key=lambda person: len(person.photos) == 1)[:MOST_PEOPLE]


def calibrate(
    people: Sequence[Person],
    gate: Gate,
    identifier: Identifier,
    *,
    data: str,
    command: str,
    terms: str = "the operator's own",
    tell: Callable[[Person, Path], None] = lambda person, path: None,
) -> Calibration:
    """Return the table fitted to photos that lie in files. `tell` hears of each photo as it begins.

    A photo that could not be enrolled is left out, with a line in the log. Raises CalibrationError and EngineError.
    """
    _lir()  # before the work
    with_two = sum(len(person.photos) > 1 for person in people)
    if with_two < LEAST_PEOPLE:
        raise CalibrationError(f"{with_two} people with two photos or more; at least {LEAST_PEOPLE} are needed")
    return fit(_samples(people, gate, tell), identifier, data=data, terms=terms, command=command)


def make_identifier(router: Router, restorers: Mapping[str, FaceRestorer], embedder: FaceEmbedder) -> Identifier:
    """Return what makes embeddings of crops as a run does, and searches nothing."""
    nobody = EventName("", "", "")
    return Identifier(router, restorers, embedder, None, metrics=Metrics(), name_of=lambda track: nobody)


def _samples(people: Sequence[Person], gate: Gate, tell: Callable[[Person, Path], None]) -> Iterator[Sample]:
    for person in people:
        for path in person.photos:
            tell(person, path)
            try:
                face = gate.examine(path)
                photo = read_image(path)
            except PhotoError as exc:
                logger.warning("left out: %s", exc)
                continue
            if face.refusals:
                logger.warning("left out: %s: %s", path, "; ".join(refusal.reason for refusal in face.refusals))
                continue
            yield Sample(person.name, str(path), photo, face.box, face.landmarks)


# What is measured.


def fit(
    samples: Iterable[Sample], identifier: Identifier, *, data: str, terms: str, command: str, seed: int = 0
) -> Calibration:
    """Return the table of an identifier's embedder, fitted to samples in the order that `embed` wants.

    Raises CalibrationError where there are too few people, and EngineError.
    """
    faces = embed(samples, identifier, seed=seed)
    return fit_faces(faces, **networks(identifier, faces), data=data, terms=terms, command=command, seed=seed)


def networks(identifier: Identifier, faces: Faces) -> dict[str, Any]:
    """Return what `fit_faces` is told of the networks: the embedder and the restorers that were used."""
    assert identifier.embedder is not None
    engine = identifier.embedder.engine
    used = sorted({*faces.routes} - {NONE})
    return {
        "embedder": Network(name=engine.card.name, sha256=engine.sha256),
        "restorers": tuple(Network(name=name, sha256=identifier.restorers[name].engine.sha256) for name in used),
    }


def embed(samples: Iterable[Sample], identifier: Identifier, *, seed: int = 0) -> Faces:
    """Return the samples embedded: as references, and as probes in each bin that their photos are large enough for.

    Samples of one person follow each other; the first is the reference. Raises EngineError.
    """
    assert identifier.embedder is not None
    people, references = [], []
    probes: list[tuple[np.ndarray, int, bool, int, str]] = []
    for row, (person, group) in enumerate(groupby(samples, key=lambda sample: sample.person)):
        first, *others = islice(group, MOST_PHOTOS)
        people.append(person)
        references += identifier.embedder.embed([cut_face(first.image, first.box, first.landmarks)])
        drawn = [(sample, number, damage) for sample in others or [first] for number, damage in _damage(sample, seed)]
        crops = [probe(sample, damage, seed) for sample, _, damage in drawn]
        for (_, number, _), face in zip(drawn, identifier.identify(crops), strict=True):
            assert face.embeddings is not None
            probes.append((fuse(face.embeddings), row, bool(others), number, face.route.restorer))
    if not probes:
        raise CalibrationError("no face to calibrate by")
    embedded, owners, mates, bins, routes = (np.array(column) for column in zip(*probes, strict=True))
    return Faces(tuple(people), np.array(references), embedded, owners, mates, bins, routes)


def _damage(sample: Sample, seed: int) -> Iterator[tuple[int, Damage]]:
    """Yield what is done to a photo for each bin; always the same."""
    for number, (least, most) in enumerate(DRAWN):
        if sample.height >= least:
            rng = np.random.default_rng([seed, number, zlib.crc32(sample.name.encode())])
            noise, quality = MIX[rng.integers(len(MIX))]
            yield number, Damage(rng.uniform(least, min(most, sample.height)), 0.0, noise, quality)


# What is fitted.


def fit_faces(
    faces: Faces,
    *,
    embedder: Network,
    restorers: Sequence[Network],
    data: str,
    terms: str,
    command: str,
    seed: int = 0,
) -> Calibration:
    """Return the table fitted to embedded faces. Raises CalibrationError where there are too few people."""
    rng = np.random.default_rng(seed)
    bins = [_fit_bin(Comparisons.of(faces, number), number, rng) for number in range(len(EDGES))]
    return Calibration(
        schema="streamer.calibration/1", embedder=embedder, restorers=tuple(restorers),
        routes=dict(Counter(faces.routes.tolist())), data=data, terms=terms, people=len(faces.people),
        pairs=sum(each.mates + each.strangers for each in bins), command=command, fitted_on=datetime.now(UTC).date(),
        streamer=__version__, similarities=tuple(SIMILARITIES.tolist()), bins=tuple(bins),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparisons:
    """The probes of one bin beside the references. Strangers rise by similarity."""

    people: int
    """How many there are, with probes in this bin or not."""
    mates: np.ndarray
    """(m,): similarities."""
    mate_owners: np.ndarray
    """(m,): whose."""
    strangers: np.ndarray
    """(s,): similarities."""
    owners: np.ndarray
    references: np.ndarray
    """(s,): of whom the probe is, and of whom the reference."""
    shares: np.ndarray
    """(s,): what a comparison counts, so that all probes of a person count as one."""

    @classmethod
    def of(cls, faces: Faces, number: int) -> Comparisons:
        """Compare the probes of a bin with all references."""
        here = faces.bins == number
        owners, mates = faces.owners[here], faces.mates[here]
        similarities = faces.probes[here] @ faces.references.T  # (probes, people)
        counts = np.bincount(owners, minlength=len(faces.people))
        probes, others = np.nonzero(owners[:, None] != np.arange(len(faces.people)))
        strangers = similarities[probes, others]
        order = np.argsort(strangers)
        probes, others = probes[order], others[order]
        own = similarities[np.arange(len(owners)), owners]
        return cls(
            len(faces.people), own[mates], owners[mates], strangers[order], owners[probes], others,
            1 / counts[owners[probes]],
        )  # fmt: skip

    @property
    def pairs(self) -> int:
        """How many pairs of a probe's person and somebody else there are."""
        return len(np.unique(self.owners)) * (self.people - 1)

    def weighed(self, weights: np.ndarray) -> np.ndarray:
        """Return the weights of the strangers added up, (s,), where each person is there `weights` (people,) times."""
        return np.cumsum(self.shares * weights[self.owners] * weights[self.references])

    def above(self, added: np.ndarray) -> np.ndarray:
        """Return the share of strangers at least as alike as each of SIMILARITIES, given their weights added up."""
        first = np.searchsorted(self.strangers, SIMILARITIES)
        return np.asarray(1 - np.concatenate([[0], added])[first] / added[-1])

    def labelled(self, weights: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return similarities of mates and of `count` strangers, evenly picked, and labels: 1 for mates, 0 for
        strangers, where each person is there `weights` (people,) times, whole numbers."""
        added = self.weighed(weights)
        steps = (np.arange(count) + 0.5) / count * added[-1]
        strangers = self.strangers[np.searchsorted(added, steps).clip(max=len(added) - 1)]
        mates = np.repeat(self.mates, weights[self.mate_owners])
        similarities = np.concatenate([mates, strangers]).astype(np.float64)
        return similarities, np.repeat([1, 0], [len(mates), len(strangers)])


def _fit_bin(compared: Comparisons, number: int, rng: np.random.Generator) -> HeightBin:
    with_two = len(np.unique(compared.mate_owners))
    if with_two < LEAST_PEOPLE:
        raise CalibrationError(
            f"faces from {DRAWN[number][0]:g} px: {with_two} people with two photos that can be used; "
            f"at least {LEAST_PEOPLE} are needed"
        )
    everybody = np.ones(compared.people, int)
    above = compared.above(compared.weighed(everybody))
    labelled = compared.labelled(everybody, min(_FITTED_ON, compared.pairs))
    kind = _choose(compared, rng)
    curve = _curve(kind, *labelled)
    least, most = _bounds(curve, *labelled)
    llr = curve.clip(least, most)

    curves, rates = [], []
    for _ in range(REDRAWS):
        weights = np.bincount(rng.integers(compared.people, size=compared.people), minlength=compared.people)
        rates.append(compared.above(compared.weighed(weights)))
        if weights[compared.mate_owners].any():
            curves.append(_curve(kind, *compared.labelled(weights, min(_FITTED_ON_AGAIN, compared.pairs))))
    low, high = np.quantile(curves, (0.025, 0.975), axis=0).clip(least, most)
    highest = np.maximum(_most_share(above, compared.pairs), np.quantile(rates, 0.95, axis=0))
    return HeightBin(
        least_px=EDGES[number], mates=len(compared.mates), strangers=len(compared.strangers),
        people=len(np.unique(compared.owners)), calibrator=kind, llr_bounds=(least, most), llr=_rounded(llr),
        llr_low=_rounded(np.minimum(low, llr)), llr_high=_rounded(np.maximum(high, llr)),
        strangers_above=_rounded(above, 9), strangers_above_high=_rounded(highest.clip(max=1), 9),
    )  # fmt: skip


def _choose(compared: Comparisons, rng: np.random.Generator) -> Kind:
    """Return what loses less (Cllr), where each half of the people is judged by what was fitted to the other."""
    lir = _lir()
    half = rng.permutation(compared.people) % 2
    labelled = [compared.labelled(weights, min(_FITTED_ON_AGAIN, compared.pairs // 4)) for weights in (half, 1 - half)]

    def cost(kind: Kind) -> float:
        lost = 0.0
        for fitted, (similarities, labels) in zip(labelled, reversed(labelled), strict=True):
            curve = _curve(kind, *fitted)
            ratios = np.interp(similarities, SIMILARITIES, curve.clip(*_bounds(curve, *fitted)))
            lost += lir.cllr(lir.data(features=ratios, labels=labels))
        return lost

    return min(get_args(Kind), key=cost)


def _curve(kind: Kind, similarities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the log10 ratios at SIMILARITIES, which rise; 0 where mates are not the more alike."""
    lir = _lir()
    calibrator = lir.logistic(C=_REGULARISATION) if kind == "logistic" else lir.isotonic(add_misleading=1)
    curve = np.asarray(calibrator.fit(similarities, labels).transform(SIMILARITIES))
    return curve if curve[-1] > curve[0] else np.zeros_like(curve)


def _bounds(curve: np.ndarray, similarities: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return the empirical lower and upper bound of the ratios, log10."""
    lir = _lir()
    ratios = np.interp(similarities, SIMILARITIES, curve)
    fitted = lir.bounder().fit(lir.data(features=ratios, labels=labels))
    return round(float(fitted.lower_llr_bound), 2), round(float(fitted.upper_llr_bound), 2)


def _most_share(shares: np.ndarray, pairs: int) -> np.ndarray:
    """Return the upper 95 % bound of shares seen among so many pairs (Clopper and Pearson): 3 / pairs for none."""
    from scipy.stats import beta  # comes with lir

    seen = (shares * pairs).clip(0, pairs - 1e-6)
    return np.asarray(beta.ppf(0.95, seen + 1, pairs - seen))


def _rounded(column: np.ndarray, digits: int = 4) -> tuple[float, ...]:
    return tuple(np.round(column, digits).tolist())


@dataclass(frozen=True, slots=True)
class _Lir:
    """What is used of lir."""

    logistic: Any
    isotonic: Any
    bounder: Any
    data: Any
    cllr: Any


def _lir() -> _Lir:
    """Raises CalibrationError where it is not installed."""
    try:
        from lir.algorithms.bayeserror import ELUBBounder
        from lir.algorithms.isotonic_regression import IsotonicCalibrator
        from lir.algorithms.logistic_regression import LogitCalibrator
        from lir.data.models import LLRData
        from lir.metrics import cllr
    except ImportError as exc:
        raise CalibrationError("fitting needs lir: pip install 'streamer[train]'") from exc
    return _Lir(LogitCalibrator, IsotonicCalibrator, ELUBBounder, LLRData, cllr)
