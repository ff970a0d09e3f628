"""FaceTracker: one camera's detections become tracks, which appear, are seen and leave."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import supervision as sv
from trackers import ByteTrackTracker, CBIoUTracker

from streamer.types import Detections, Moment, Track

TrackerKind = Literal["bytetrack", "cbiou"]

_BUFFER_RATE = 30  # the library counts its budget for lost tracks in frames of this rate, whatever the camera's


@dataclass(frozen=True, slots=True)
class TrackerUpdate:
    """What one frame did to a camera's tracks."""

    tracks: list[Track]
    """Those seen in this frame, by a strong or a weak detection."""
    appeared: list[Track]
    """Those of `tracks` that are new."""
    left: list[Track]
    """Those that ended, as they were last seen."""


class FaceTracker:
    """Follows the faces of one camera over the library `trackers`, counting seconds of the stream.

    Ids begin at 1 and are never given twice. A step back in pts, or a leap longer than `lost_after`, ends all tracks.
    """

    def __init__(
        self,
        *,
        lost_after: float = 1.5,
        threshold: float,
        weak_threshold: float,
        min_hits: int = 2,
        kind: TrackerKind = "bytetrack",
    ) -> None:
        """Detections from `threshold` up begin tracks, those from `weak_threshold` up keep them alive.

        A track appears with its `min_hits`-th detection and ends `lost_after` seconds after its last.
        """
        self._lost_after = lost_after
        self._threshold = threshold
        self._weak_threshold = weak_threshold
        self._min_hits = min_hits
        self._kind = kind
        self._library = self._new_library()
        self._ids = itertools.count(1)
        self._pts = self._clock = -math.inf
        self._open: dict[int, Track] = {}
        """By the library's id, as last seen."""

    def update(self, moment: Moment, detections: Detections) -> TrackerUpdate:
        """Take the detections of the next frame."""
        left = self._keep_time(moment.pts)
        detections = detections[detections.scores >= self._weak_threshold]
        tracks, appeared = [], []
        for key, index in self._follow(detections):
            known = self._open.get(key)
            track = Track(
                id=known.id if known else next(self._ids),
                moment=moment,
                box=detections.boxes[index],
                landmarks=detections.landmarks[index],
                score=float(detections.scores[index]),
            )
            self._open[key] = track
            tracks.append(track)
            if known is None:
                appeared.append(track)
        return TrackerUpdate(tracks, appeared, left + self._take_ended())

    def finish(self) -> list[Track]:
        """End all tracks that are open, and return them as they were last seen."""
        left = list(self._open.values())
        self._open.clear()
        self._library = self._new_library()
        return left

    def _keep_time(self, pts: float) -> list[Track]:
        """Begin anew where time steps back or leaps: the library would give no ids until it caught up."""
        anew = pts < self._pts or pts - self._pts > self._lost_after
        left = self.finish() if anew else []
        # the library warns of a moment that comes twice
        self._clock = pts if anew else max(pts, math.nextafter(self._clock, math.inf))
        self._pts = pts
        return left

    def _follow(self, detections: Detections) -> list[tuple[int, int]]:
        """Return the library's id and the index of each detection that belongs to a track."""
        known = self._library.update(
            sv.Detections(
                xyxy=detections.boxes, confidence=detections.scores, data={"index": np.arange(len(detections))}
            ),
            timestamp=self._clock,
        )
        keys = known.tracker_id
        if keys is None or not len(keys):
            return []
        return sorted((int(key), int(index)) for key, index in zip(keys, known.data["index"], strict=True) if key >= 0)

    def _take_ended(self) -> list[Track]:
        alive = {tracklet.tracker_id for tracklet in self._library.tracks}
        return [self._open.pop(key) for key in sorted(self._open.keys() - alive)]

    def _new_library(self) -> ByteTrackTracker | CBIoUTracker:
        buffer = round(self._lost_after * _BUFFER_RATE)
        if self._kind == "cbiou":
            return CBIoUTracker(
                lost_track_buffer=buffer,
                track_activation_threshold=self._threshold,
                high_conf_det_threshold=self._threshold,
                minimum_consecutive_frames=self._min_hits,
                instant_first_frame_activation=False,
            )
        return ByteTrackTracker(
            lost_track_buffer=buffer,
            track_activation_threshold=self._threshold,
            high_conf_det_threshold=self._threshold,
            minimum_consecutive_frames=self._min_hits,
        )
