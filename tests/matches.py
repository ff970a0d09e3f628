"""Faces that were matched, and the evidence of it: tests need neither cameras nor networks for them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from streamer.evidence import Evidence
from streamer.types import Crop, Embeddings, FaceIdentified, Match, Moment, Quality, Restoration, Route, Score, Track

EVENT = "0123456789abcdef" * 2
CAPTURED_AT = datetime(2026, 11, 22, 12, 30, 15, 250_000, tzinfo=UTC)
EMBEDDER = "e" * 64
SISN = "5" * 64
CALIBRATION = "c" * 64
MATCH = Match("a" * 16, "b" * 16, "1" * 16, 0.625, 0.5, 0.0125, ("d" * 16, 0.25))


def unit(*numbers: float) -> np.ndarray:
    vector = np.array(numbers, np.float32)
    return vector / np.linalg.norm(vector)


def matched(
    match: Match = MATCH, *, restored: bool = True, scores: Mapping[str, Score] | None = None, seed: int = 0
) -> FaceIdentified:
    """Return a face of 20 px that was matched, its pictures noise."""
    chance = np.random.default_rng(seed)
    box = np.array([100, 50, 120, 70], np.float32)
    points = np.array([[106, 57], [114, 57], [110, 61], [107, 65], [113, 65]], np.float32)
    track = Track(7, Moment("door-1", 40, 1.6, CAPTURED_AT, "file"), box, points, 0.9)
    quality = Quality(20.0, 8.0, 0.5, 9.75, 0.25, -0.125, 1.5)
    transform = np.column_stack([np.eye(2), [-94.0, -44.0]])
    crop = Crop(track, chance.integers(0, 256, (32, 32, 3), np.uint8), transform, quality)
    larger = chance.integers(0, 256, (128, 128, 3), np.uint8)
    restoration = Restoration(larger, "sisn-small", SISN, 4, "onnxruntime-cpu", "fp32") if restored else None
    route = Route("sisn-small", "face 20 px") if restored else Route("none", "large and clean")
    embeddings = Embeddings(unit(*chance.standard_normal(8)), unit(*chance.standard_normal(8)) if restored else None)
    score = Score(0.5, 0.5625 if restored else None, match.similarity, 0.99, 2.0, 1.5, 2.25)
    return FaceIdentified(crop, route, restoration, embeddings, "", scores or {match.identity: score}, match)


def evidence_of(face: FaceIdentified | None = None, event: str = EVENT, **fields: Any) -> Evidence:
    """Return the evidence of a match; `fields` take the place of what is usual."""
    usual = {
        "stream": "box", "epoch": "20261122T120000-ab", "fused": unit(1, 0, 0, 0, 0, 0, 0, 0), "crops": 3,
        "embedder": "tiny", "embedder_sha256": EMBEDDER, "gallery_version": 4, "calibration_sha256": CALIBRATION,
    }  # fmt: skip
    return Evidence.of(face or matched(), event=event, **{**usual, **fields})
