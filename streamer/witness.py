"""Witness: writes down what each match rests on, before the event goes out."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime

from streamer.audit import AuditError, AuditLog
from streamer.evidence import Evidence, EvidenceError, EvidenceStore, record_match
from streamer.scoring import Scored
from streamer.types import EventName, FaceIdentified

logger = logging.getLogger(__name__)

_PRUNE_EVERY_S = 3600.0


class Witness:
    """Keeps evidence, and tells the audit log. Used by one thread."""

    def __init__(
        self, store: EvidenceStore, log: AuditLog, *, embedder: str, embedder_sha256: str,
        calibration_sha256: str | None,
    ) -> None:  # fmt: skip
        """`embedder` is its name. Evidence that is too old is removed at once, and whenever `prune` is called."""
        self._store, self._log = store, log
        self._embedder, self._embedder_sha256 = embedder, embedder_sha256
        self._calibration_sha256 = calibration_sha256
        self._pruned = -float("inf")
        self.prune()

    def prune(self) -> None:
        """Remove evidence that is too old; looks once an hour, however often it is called."""
        now = time.monotonic()
        if now - self._pruned < _PRUNE_EVERY_S:
            return
        self._pruned = now
        try:
            removed = self._store.prune(datetime.now(UTC))
        except EvidenceError as exc:
            logger.error("old evidence cannot be removed: %s", exc)
            return
        if removed:
            logger.info("removed the evidence of %d matches, which was too old", removed)

    def keep(self, name: EventName, face: FaceIdentified, scored: Scored, gallery_version: int) -> str:
        """Keep what a match rests on; return why that could not be done, or nothing."""
        evidence = Evidence.of(
            face, event=name.id, stream=name.stream, epoch=name.epoch, fused=scored.face.embedding,
            crops=scored.face.crops, embedder=self._embedder, embedder_sha256=self._embedder_sha256,
            gallery_version=gallery_version, calibration_sha256=self._calibration_sha256,
        )  # fmt: skip
        try:
            self._store.keep(evidence)
            record_match(self._log, evidence)
        except (EvidenceError, AuditError) as exc:
            return str(exc)
        assert face.match is not None
        moment, match = face.crop.track.moment, face.match
        logger.info(
            "%s: match of track %d: event %s, identity %s, %.3f by a list of %.3f", moment.camera, face.crop.track.id,
            name.id, match.identity, match.similarity, match.threshold,
        )  # fmt: skip
        return ""
