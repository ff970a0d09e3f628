"""Identifier: crops to identified faces. It routes, restores, embeds, searches, and last of all draws with guides.

In this order, and nothing flows back: a guided picture is made when everything is decided.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from engines.load import settle
from streamer.embedder import FaceEmbedder
from streamer.gallery import Snapshot
from streamer.geometry import scale_transform, transform_points
from streamer.guided import Guide, GuidedRestorer, best_by_pose
from streamer.metrics import Metrics
from streamer.restorer import FaceRestorer
from streamer.router import NONE, Router
from streamer.scoring import Scored, Scorer
from streamer.types import Crop, Embeddings, EventName, FaceIdentified, GuidedPicture, Restoration, Route, Track

logger = logging.getLogger(__name__)


class Witness(Protocol):
    """Writes down what a match rests on: `streamer.witness.Witness`."""

    def prune(self) -> None:
        """Remove what is too old."""
        ...

    def keep(self, name: EventName, face: FaceIdentified, scored: Scored, gallery_version: int) -> str:
        """Keep what a match rests on; return why that could not be done, or nothing."""
        ...


class Enrolment(Protocol):
    """The gallery as a run sees it: `streamer.live_gallery.LiveGallery`."""

    def current(self) -> Snapshot:
        """Return who is enrolled now."""
        ...

    def guides(self, identity: str) -> Sequence[Guide]:
        """Return the photos of an identity, each named by its id; none where they cannot be had."""
        ...

    def told(self) -> str:
        """Return in words how many are enrolled."""
        ...

    def close(self) -> None:
        """Close the gallery."""
        ...


@dataclass(frozen=True, slots=True)
class Search:
    """What looks for enrolled persons."""

    enrolment: Enrolment
    scorer: Scorer
    witness: Witness
    guided: GuidedRestorer | None = None
    """Draws faces by the photos of who they may be; None: no guided pictures."""

    def close(self) -> None:
        """Close the gallery; the networks are closed with the others."""
        self.enrolment.close()


class Identifier:
    """Identifies crops, a batch at a time. Used by one thread."""

    def __init__(
        self, router: Router, restorers: Mapping[str, FaceRestorer], embedder: FaceEmbedder | None,
        search: Search | None, *, metrics: Metrics, name_of: Callable[[Track], EventName],
    ) -> None:  # fmt: skip
        """`restorers` are those that the router may name. A search needs an embedder; `name_of` says how the event of a
        track's crop is called, by which a match is kept."""
        self.restorers, self.embedder, self.search = restorers, embedder, search
        self.metrics = metrics
        self._router, self._name_of = router, name_of
        self._absent = "no gallery" if embedder else "no embedder is configured"

    def identify(self, crops: Sequence[Crop]) -> list[FaceIdentified]:
        """Return what is known of each crop, in order. Raises EngineError."""
        if not crops:
            return []
        routes = [self._router.route(crop) for crop in crops]
        restorations = self._restored(crops, routes)
        embeddings = self._embedded(crops, restorations)
        identified = [
            FaceIdentified(*each, self._absent) for each in zip(crops, routes, restorations, embeddings, strict=True)
        ]
        if self.search is None:
            return identified
        return self._searched(self.search, identified, [each for each in embeddings if each is not None])

    def left(self, track: Track) -> None:
        """Forget a track that has ended."""
        if self.search is not None:
            self.search.scorer.end(track.moment, track.id)

    def _restored(self, crops: Sequence[Crop], routes: Sequence[Route]) -> list[Restoration | None]:
        restorations: list[Restoration | None] = [None] * len(crops)
        chosen: defaultdict[str, list[int]] = defaultdict(list)
        for index, route in enumerate(routes):
            if route.restorer != NONE:
                chosen[route.restorer].append(index)
        for name, indices in chosen.items():
            for index, restoration in zip(indices, self._restore(name, [crops[i] for i in indices]), strict=True):
                restorations[index] = restoration
        return restorations

    def _restore(self, name: str, crops: Sequence[Crop]) -> Iterator[Restoration]:
        restorer = self.restorers[name]
        engine = settle(restorer.engine)
        before = restorer.pixels_own, restorer.pixels_run
        with self.metrics.stage("restore", len(crops)):
            results = restorer.restore([crop.image for crop in crops])
        self.metrics.count("pixels_own", restorer.pixels_own - before[0])
        self.metrics.count("pixels_run", restorer.pixels_run - before[1])
        self.metrics.count("restored", len(crops))
        for crop, (image, scale) in zip(crops, results, strict=True):
            self.metrics.face_size(max(crop.image.shape[:2]))
            yield Restoration(image, engine.card.name, engine.sha256, scale, engine.backend, engine.precision)

    def _embedded(
        self, crops: Sequence[Crop], restorations: Sequence[Restoration | None]
    ) -> Sequence[Embeddings | None]:
        if self.embedder is None:
            return [None] * len(crops)
        faces = [(crop.image, crop.landmarks) for crop in crops]
        faces += [
            (restoration.image, _enlarged(crop.landmarks, restoration.scale))
            for crop, restoration in zip(crops, restorations, strict=True)
            if restoration is not None
        ]
        embedded = self._embed(self.embedder, faces)
        blind = iter(embedded[len(crops) :])
        return [
            Embeddings(raw, None if restoration is None else next(blind))
            for raw, restoration in zip(embedded, restorations, strict=False)
        ]

    def _embed(self, embedder: FaceEmbedder, faces: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        settle(embedder.engine)
        with self.metrics.stage("embed", len(faces)):
            return embedder.embed(faces)

    def _searched(
        self, search: Search, identified: Sequence[FaceIdentified], embeddings: Sequence[Embeddings]
    ) -> list[FaceIdentified]:
        search.witness.prune()
        enrolled = search.enrolment.current()
        with self.metrics.stage("search", len(identified)):
            scored = search.scorer.score([each.crop for each in identified], embeddings, enrolled)
        decided = [
            self._kept(search, replace(face, scores=each.scores, match=each.match, scores_absent=""), each, enrolled)
            for face, each in zip(identified, scored, strict=True)
        ]
        if search.guided is None:
            return decided
        # when all is decided, and by itself: not even a batch's last digits depend on what is drawn
        return [self._with_guide(search.guided, search.enrolment, face, enrolled) for face in decided]

    def _kept(self, search: Search, face: FaceIdentified, scored: Scored, enrolled: Snapshot) -> FaceIdentified:
        """Keep what a match rests on; a match that cannot be accounted for does not go out."""
        if face.match is None:
            return face
        self.metrics.count("matches")
        why = search.witness.keep(self._name_of(face.crop.track), face, scored, enrolled.version)
        if not why:
            return face
        self.metrics.count("matches_withheld")
        logger.error("a match is withheld, since it could not be recorded: %s", why)
        return replace(face, match=None)

    def _with_guide(
        self, restorer: GuidedRestorer, enrolment: Enrolment, face: FaceIdentified, enrolled: Snapshot
    ) -> FaceIdentified:
        """Draw a face that is near somebody enrolled by the photo of the nearest pose."""
        assert self.embedder is not None and face.scores is not None
        identity = next(iter(face.scores), None)
        guides = enrolment.guides(identity) if identity else ()
        if identity is None or not guides:
            return face
        crop, guide = face.crop, best_by_pose(face.crop.landmarks, guides)
        settle(restorer.engine)
        with self.metrics.stage("guide", 1):
            drawn = restorer.restore(crop.image, crop.landmarks, [guide])[0].restored
        scale = drawn.shape[0] / crop.image.shape[0]
        picture = GuidedPicture(
            drawn, scale_transform(crop.transform, scale), _enlarged(crop.landmarks, scale), guide.image,
            guide.landmarks, identity, guide.name, restorer.engine.card.name, restorer.engine.sha256,
        )  # fmt: skip
        self.metrics.count("guided")
        (embedding,) = self._embed(self.embedder, [(picture.image, picture.landmarks)])
        score = replace(face.scores[identity], guided=enrolled.similarity(embedding, identity))
        return replace(face, guided=picture, scores={**face.scores, identity: score})


def _enlarged(landmarks: np.ndarray, scale: float) -> np.ndarray:
    return transform_points(scale_transform(np.eye(2, 3), scale), landmarks)
