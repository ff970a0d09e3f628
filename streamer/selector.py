"""CropSelector: which faces are worth identifying now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streamer.geometry import cut_crop
from streamer.quality import measure_quality, measure_sharpness, measure_yaw
from streamer.types import Crop, Frame, Track

_ENOUGH_PX = 128.0  # height of a face that gains nothing by being larger


@dataclass(slots=True)
class _Sent:
    """What went out of a track, and what waits."""

    best: float
    """Score of the best crop that was sent."""
    pts: float
    """When the last one was sent."""
    waiting: Crop | None = None
    """The best crop since, none clearly better."""
    waiting_score: float = 0.0


class CropSelector:
    """Sends a crop of each track at first sight; then at once what is clearly better, by the margin, than all before;
    and after `retry_s` without any the best since.

    It counts in pts, so that a file gives the same crops twice. One selector serves all cameras.
    """

    def __init__(self, *, min_size_px: float = 12.0, retry_s: float = 2.0, margin: float = 0.15) -> None:
        """Faces lower than `min_size_px` are never sent; `margin` is a share of the score."""
        self._min_size_px = min_size_px
        self._retry_s = retry_s
        self._clearly_better = 1 + margin
        self._sent: dict[tuple[str, int], _Sent] = {}

    def select(self, frame: Frame, tracks: Sequence[Track]) -> list[Crop]:
        """Return the crops that go out now, at most one of each of the tracks seen in this frame."""
        chosen = (self._choose(frame.image, track) for track in tracks if _height(track) >= self._min_size_px)
        return [crop for crop in chosen if crop is not None]

    def forget(self, camera: str, track: int) -> None:
        """Drop what is kept of a track that has ended."""
        self._sent.pop((camera, track), None)

    def _choose(self, image: np.ndarray, track: Track) -> Crop | None:
        key, pts = (track.moment.camera, track.id), track.moment.pts
        sent = self._sent.get(key)
        least = min(sent.waiting_score, sent.best) * self._clearly_better if sent else 0.0
        score = _score(image, track, least=least)
        if sent is None or score > sent.best * self._clearly_better:
            self._sent[key] = _Sent(score, pts)
            return _cut(image, track)

        if score > least:
            sent.waiting, sent.waiting_score = _cut(image, track), score
        if sent.waiting is None or pts - sent.pts < self._retry_s:
            return None
        self._sent[key] = _Sent(max(sent.best, sent.waiting_score), pts)
        return sent.waiting


def _score(image: np.ndarray, track: Track, *, least: float) -> float:
    """Weigh size, sharpness and frontality: half the score is lost to blur, half in profile.

    Sharpness takes the time. It is not measured, and the score is 0, where no sharpness could lift it above `least`.
    """
    ceiling = min(_height(track), _ENOUGH_PX) * (1 - abs(measure_yaw(track.landmarks)) / 2)
    return ceiling * (1 + measure_sharpness(image, track.box)) / 2 if ceiling > least else 0.0


def _height(track: Track) -> float:
    return float(track.box[3] - track.box[1])


def _cut(image: np.ndarray, track: Track) -> Crop:
    crop, transform = cut_crop(image, track.box, track.landmarks)
    return Crop(track, crop, transform, measure_quality(image, track.box, track.landmarks))
