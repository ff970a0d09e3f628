"""What a track's face scores against enrolled identities, and the decision, which rests on the fused score alone.

Nothing that a guide changed comes in here: there is no parameter that could take it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from streamer.types import Crop, Embeddings, Match, Moment, Score

_MOST_HEIGHT_PX = 64.0  # a face that is larger tells no more
_HOUR_S = 3600.0
_ANEW_S = 60.0  # crops wait for some seconds: who is so much older is of a stream that began anew


class Found(Protocol):
    """An identity that an embedding is like: `streamer.gallery.Candidate`."""

    @property
    def identity(self) -> str: ...
    @property
    def photo(self) -> str: ...
    @property
    def similarity(self) -> float: ...


class Listed(Protocol):
    """A watch list: `streamer.gallery.WatchList`."""

    @property
    def id(self) -> str: ...
    @property
    def threshold(self) -> float: ...


class Enrolled(Protocol):
    """Who is looked for: `streamer.gallery.Snapshot`."""

    def search(self, embeddings: np.ndarray, top: int = ...) -> Sequence[Sequence[Found]]:
        """Return for each embedding the identities most like it, the most alike first."""
        ...

    def similarity(self, embedding: np.ndarray, identity: str) -> float:
        """Return how alike an embedding and the most alike photo of an identity are."""
        ...

    def lists_of(self, identity: str) -> Sequence[Listed]:
        """Return the lists in force that an identity is on, the highest priority first."""
        ...

    def photos_on(self, watch_list: str) -> int:
        """Return how many photos the identities on a list have."""
        ...


class Ratio(Protocol):
    """A log10 likelihood ratio with its 95 % interval: `streamer.calibration.Llr`."""

    @property
    def llr(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


class Calibrated(Protocol):
    """What similarities mean: `streamer.calibration.Calibration`."""

    def bin(self, face_height_px: float) -> int:
        """Return the number of the bin of a face's height."""
        ...

    def llr(self, similarity: float, face_height_px: float) -> Ratio:
        """Return the likelihood ratio of a similarity."""
        ...

    def expected_false_alarms(self, similarity: float, identities: int, passages_per_day: Mapping[int, float]) -> float:
        """Return how many strangers a day are so alike to one of so many identities, given passages by bin."""
        ...


FoundT = TypeVar("FoundT", bound=Found)


def fuse(embeddings: Embeddings) -> np.ndarray:
    """Return the unit mean of the raw and the blind embedding, (d,); the raw one where nothing was restored."""
    return embeddings.raw if embeddings.blind is None else _unit(embeddings.raw + embeddings.blind)


def decide(found: Sequence[FoundT], enrolled: Enrolled) -> tuple[FoundT, Listed] | None:
    """Return who is matched, by which list; None is the normal case.

    Of the candidates `found` by fused embedding only the first, the most alike, can be: where somebody else is more
    alike, nobody is accused. The list is the one of highest priority whose threshold is reached.
    """
    for first in found[:1]:
        for watch_list in enrolled.lists_of(first.identity):
            if first.similarity >= watch_list.threshold:
                return first, watch_list
    return None


@dataclass(frozen=True, slots=True)
class TrackFace:
    """What is known of a track's face so far."""

    embedding: np.ndarray
    """(d,) unit: the mean of the fused embeddings of its crops, weighted by their heights."""
    height_px: float
    """Of its largest crop's face."""
    crops: int
    """How many it rests on."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of one crop's track, for the event."""

    face: TrackFace
    scores: Mapping[str, Score]
    """By id of the identities on the short list, the most alike first."""
    match: Match | None


class Scorer:
    """Scores crops as they come, and keeps what a track's earlier crops gave. Used by one thread."""

    candidates = 5
    """The short list is at most so long."""

    def __init__(
        self, calibration: Calibrated | None = None, *, short_list_margin: float = 0.1, faces_per_day: float = 1000.0
    ) -> None:
        """An identity is on the short list from `short_list_margin` below the least threshold of its lists on.

        `faces_per_day` is what is assumed of each camera's traffic; it weighs as much as one hour of looking.
        """
        self._calibration, self._margin = calibration, short_list_margin
        self._tracks: dict[tuple[str, int], _Sum] = {}
        self._traffic: defaultdict[str, _Traffic] = defaultdict(lambda: _Traffic(faces_per_day))

    def score(self, crops: Sequence[Crop], embeddings: Sequence[Embeddings], enrolled: Enrolled) -> list[Scored]:
        """Score each crop's track, with what came of it before, against who is enrolled."""
        faces = [self._add(crop, fuse(each)) for crop, each in zip(crops, embeddings, strict=True)]
        found = enrolled.search(np.stack([face.embedding for face in faces]), self.candidates) if faces else []
        return [self._scored(*each, enrolled) for each in zip(crops, embeddings, faces, found, strict=True)]

    def end(self, moment: Moment, track: int) -> None:
        """Forget a track that has ended, and count it as one that passed."""
        known = self._tracks.pop((moment.camera, track), None)
        if known is not None:
            traffic = self._traffic[moment.camera]
            traffic.look(moment.pts)
            traffic.passed[self._bin(known.height_px)] += 1

    def _add(self, crop: Crop, fused: np.ndarray) -> TrackFace:
        moment = crop.track.moment
        self._traffic[moment.camera].look(moment.pts)
        known = self._tracks.setdefault((moment.camera, crop.track.id), _Sum(np.zeros(len(fused))))
        known.add(fused, crop.quality.face_height_px)
        return TrackFace(_unit(known.total), known.height_px, known.crops)

    def _scored(
        self, crop: Crop, embeddings: Embeddings, face: TrackFace, found: Sequence[Found], enrolled: Enrolled
    ) -> Scored:
        near = [each for each in found if self._is_near(each, enrolled)]
        scores = {each.identity: self._score(each, embeddings, face, enrolled) for each in near}
        decided = decide(found, enrolled)
        return Scored(face, scores, self._match(*decided, found, crop, face, enrolled) if decided else None)

    def _is_near(self, candidate: Found, enrolled: Enrolled) -> bool:
        thresholds = [each.threshold for each in enrolled.lists_of(candidate.identity)]
        return bool(thresholds) and candidate.similarity >= min(thresholds) - self._margin

    def _score(self, candidate: Found, embeddings: Embeddings, face: TrackFace, enrolled: Enrolled) -> Score:
        raw, blind = (
            None if each is None else enrolled.similarity(each, candidate.identity)
            for each in (embeddings.raw, embeddings.blind)
        )
        assert raw is not None
        if self._calibration is None:
            return Score(raw, blind, candidate.similarity)
        ratio = self._calibration.llr(candidate.similarity, face.height_px)
        return Score(raw, blind, candidate.similarity, None, ratio.llr, ratio.low, ratio.high)

    def _match(
        self, matched: Found, watch_list: Listed, found: Sequence[Found], crop: Crop, face: TrackFace,
        enrolled: Enrolled,
    ) -> Match:  # fmt: skip
        alarms = None
        if self._calibration is not None:
            passages = self._traffic[crop.track.moment.camera].per_day(self._bin(face.height_px))
            photos = enrolled.photos_on(watch_list.id)  # a stranger may be taken for any of them
            alarms = self._calibration.expected_false_alarms(matched.similarity, photos, passages)
        runner_up = next(((each.identity, each.similarity) for each in found[1:]), None)
        return Match(
            matched.identity, matched.photo, watch_list.id, matched.similarity, watch_list.threshold, alarms, runner_up
        )

    def _bin(self, height_px: float) -> int:
        return 0 if self._calibration is None else self._calibration.bin(height_px)


@dataclass(slots=True)
class _Sum:
    """The fused embeddings of a track's crops, added up."""

    total: np.ndarray
    height_px: float = 0.0
    crops: int = 0

    def add(self, fused: np.ndarray, height_px: float) -> None:
        self.total = self.total + min(height_px, _MOST_HEIGHT_PX) * fused
        self.height_px = max(self.height_px, height_px)
        self.crops += 1


@dataclass(slots=True)
class _Traffic:
    """How many faces pass a camera."""

    assumed_per_day: float
    passed: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    """By bin of their largest height."""
    _looked_s: float = 0.0
    _last_pts: float | None = None

    def look(self, pts: float) -> None:
        """Count the time since the latest look. A crop may be older than another track's, and then counts for none;
        so does a leap back, by which a stream begins anew."""
        last = pts if self._last_pts is None else self._last_pts
        self._looked_s += max(0.0, pts - last)
        self._last_pts = pts if pts < last - _ANEW_S else max(pts, last)

    def per_day(self, here: int) -> dict[int, float]:
        """Return passages a day by bin; `here` is the bin of the face that asks, which counts as one that passed."""
        seen = sum(self.passed.values())
        rate = 24 * (seen + self.assumed_per_day / 24) / (self._looked_s / _HOUR_S + 1)
        bins = {*self.passed, here}
        return {each: rate * (self.passed[each] + (each == here)) / (seen + 1) for each in bins}


def _unit(vector: np.ndarray) -> np.ndarray:
    length = float(np.linalg.norm(vector))
    return (vector / length).astype(np.float32) if length else vector.astype(np.float32)
