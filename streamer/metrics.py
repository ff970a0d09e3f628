"""Counters and timings of one run, in Prometheus' form from the start."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Summary


class Metrics:
    """What a run counts. Any thread may count; each run has its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._counts = Counter("streamer_items", "Things that passed", ["what"], registry=self.registry)
        self._drops = Counter("streamer_drops", "Let go", ["camera", "reason"], registry=self.registry)
        self._seconds = Counter("streamer_stage_seconds", "Time in a stage", ["stage"], registry=self.registry)
        self._ages = Summary("streamer_frame_age_seconds", "When looked at", ["camera"], registry=self.registry)
        self._oldest = Gauge("streamer_frame_age_worst_seconds", "Of them", ["camera"], registry=self.registry)
        self._worst: dict[str, float] = {}
        self._batches = Counter("streamer_batches", "Batches run", ["stage", "size"], registry=self.registry)

        self._sides = Counter("streamer_restored_crops", "Of a side", ["side_px"], registry=self.registry)

    def frame_age(self, camera: str, seconds: float) -> None:
        """Note how old a frame was when it was looked at."""
        self._ages.labels(camera).observe(seconds)
        if seconds > self._worst.get(camera, 0.0):
            self._worst[camera] = seconds
            self._oldest.labels(camera).set(seconds)

    def count(self, what: str, number: int = 1) -> None:
        """Count things that passed: frames, faces, restored, published …"""
        self._counts.labels(what).inc(number)

    def drop(self, camera: str, reason: str, number: int = 1) -> None:
        """Count what was let go."""
        self._drops.labels(camera, reason).inc(number)

    def face_size(self, side: int) -> None:
        """Count a crop that was restored by its longer side, in its own pixels."""
        self._sides.labels(str(side)).inc()

    @contextmanager
    def stage(self, stage: str, size: int) -> Iterator[None]:
        """Time one batch of a stage."""
        started = time.perf_counter()
        yield
        self._seconds.labels(stage).inc(time.perf_counter() - started)
        self._batches.labels(stage, str(size)).inc()

    def counts(self) -> dict[str, int]:
        """Return what passed and, under `drops`, all that was let go."""
        passed = {labels["what"]: int(value) for labels, value in _samples(self._counts)}
        return {**passed, "drops": sum(sum(reasons.values()) for reasons in self.drops().values())}

    def face_sizes(self) -> dict[int, int]:
        """Return how many crops of each side in pixels were restored, the smallest first."""
        return dict(sorted((int(labels["side_px"]), int(value)) for labels, value in _samples(self._sides)))

    def drops(self) -> dict[str, dict[str, int]]:
        """Return what was let go, by camera and reason."""
        result: dict[str, dict[str, int]] = defaultdict(dict)
        for labels, value in _samples(self._drops):
            result[labels["camera"]][labels["reason"]] = int(value)
        return dict(result)

    def frame_ages(self) -> dict[str, tuple[float, float]]:
        """Return mean and worst age, in seconds, of the frames of each camera when they were looked at."""
        sums: dict[str, dict[str, float]] = defaultdict(dict)
        for family in self._ages.collect():
            for sample in family.samples:
                sums[sample.labels["camera"]][sample.name.rsplit("_", 1)[1]] = sample.value
        return {camera: (ages["sum"] / ages["count"], self._worst.get(camera, 0.0)) for camera, ages in sums.items()}

    def stage_seconds(self) -> dict[str, float]:
        """Return the wall seconds spent in each stage."""
        return {labels["stage"]: value for labels, value in _samples(self._seconds)}

    def batch_sizes(self) -> dict[str, dict[int, int]]:
        """Return how many batches of each size each stage ran."""
        result: dict[str, dict[int, int]] = defaultdict(dict)
        for labels, value in _samples(self._batches):
            result[labels["stage"]][int(labels["size"])] = int(value)
        return dict(result)


def _samples(counter: Counter) -> Iterator[tuple[dict[str, str], float]]:
    for family in counter.collect():
        for sample in family.samples:
            if sample.name.endswith("_total"):
                yield sample.labels, sample.value
