"""LiveGallery: the gallery as a run sees it, read anew when it changes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import cv2
import numpy as np

from streamer.gallery import Gallery, GalleryError, Snapshot
from streamer.guided import Guide

logger = logging.getLogger(__name__)

_TELL_EVERY_S = 60.0


class LiveGallery:
    """Who is enrolled, now. Used by one thread.

    It looks for a change between two batches of crops; a batch is searched in one state.
    """

    def __init__(
        self, gallery: Gallery, embedder_sha256: str, *, look_every_s: float = 0.5,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:  # fmt: skip
        """It looks no more often than every `look_every_s`. `clock` is what lists expire by.

        Raises GalleryError where the gallery's templates were made with another embedder, or it cannot be read.
        """
        known = gallery.embedder()
        if known is not None and known[1] != embedder_sha256:
            raise GalleryError(
                f"{gallery.folder}: its templates were made with {known[0]} (sha256 {known[1][:12]}), embedder.model "
                f"has sha256 {embedder_sha256[:12]}; templates of two embedders cannot be compared: "
                "`streamer gallery embed` makes all anew"
            )
        self.gallery = gallery
        self._embedder_sha256, self._look_every_s, self._clock = embedder_sha256, look_every_s, clock
        self._snapshot = gallery.snapshot(embedder_sha256, now=clock())
        self._looked = self._told = -float("inf")
        self._guides: dict[str, Sequence[Guide]] = {}
        logger.info("gallery: %s", _counted(self._snapshot))

    def close(self) -> None:
        """Close the gallery."""
        self.gallery.close()

    def told(self) -> str:
        """Return what to tell of it."""
        return _counted(self._snapshot)

    def current(self) -> Snapshot:
        """Return who is enrolled.

        Where the gallery cannot be read, which is logged, that is who was last, by the lists that have not expired.
        """
        now = time.monotonic()
        if now - self._looked >= self._look_every_s:
            self._looked = now
            try:
                if self._has_changed():
                    self._reload()
            except GalleryError as exc:
                self._tell(f"the gallery cannot be read anew, it is searched as it was: {exc}")
                self._snapshot = self._snapshot.at(self._clock())
        return self._snapshot

    def guides(self, identity: str) -> Sequence[Guide]:
        """Return the photos of an identity, each named by its id; none where they cannot be read, which is logged."""
        known = self._guides.get(identity)
        if known is None:
            try:
                known = [self._guide(photo) for photo in self._snapshot.photos_of(identity)]
            except GalleryError as exc:
                self._tell(f"no guide for a face: {exc}")
                return ()
            self._guides[identity] = known
        return known

    def _has_changed(self) -> bool:
        ends = self._snapshot.expires_at
        return self.gallery.version() != self._snapshot.version or (ends is not None and ends <= self._clock())

    def _reload(self) -> None:
        started = time.monotonic()
        snapshot = self.gallery.snapshot(self._embedder_sha256, now=self._clock(), earlier=self._snapshot)
        known = self.gallery.embedder()
        if known is not None and known[1] != self._embedder_sha256:
            self._tell(f"the gallery's templates are by {known[0]} (sha256 {known[1][:12]}) now: start the app anew")
        self._snapshot = snapshot
        self._guides.clear()  # a photo that was removed may not stay
        logger.info("gallery: %s, read anew in %.2f s", _counted(snapshot), time.monotonic() - started)

    def _guide(self, photo: str) -> Guide:
        found = self.gallery.photo(photo)
        image = cv2.imdecode(np.frombuffer(found.image, np.uint8), cv2.IMREAD_COLOR_BGR)
        if image is None:
            raise GalleryError(f"photo {photo} cannot be decoded")
        return Guide(photo, image, found.landmarks)

    def _tell(self, line: str) -> None:
        """Log a line, once a minute at most."""
        now = time.monotonic()
        if now - self._told >= _TELL_EVERY_S:
            self._told = now
            logger.error(line)


def _counted(snapshot: Snapshot) -> str:
    persons, lists = len(snapshot.identities), len(snapshot.lists)
    return (
        f"{persons} person{'s' * (persons != 1)} with {len(snapshot)} photo{'s' * (len(snapshot) != 1)}, "
        f"{lists} list{'s' * (lists != 1)} in force"
    )
