"""Builds the parts from the config and hands them over: the only place that knows config and stages both."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from engines.card import Family
from engines.engine import Engine, EngineError, ModelError
from engines.load import Backend, Plans, Precision, Proof, load_engine, on_gpu
from engines.rebatch import rebatch
from engines.store import Model, ModelStore, license_notice
from streamer.calibration import Calibration
from streamer.camera import Camera
from streamer.config import GalleryConfig, RestorerConfig, StreamerConfig
from streamer.detector import FaceDetector
from streamer.embedder import FaceEmbedder
from streamer.enrolment import Desk
from streamer.gallery import GalleryError
from streamer.guided import GuidedRestorer
from streamer.identify import Search
from streamer.live_gallery import LiveGallery
from streamer.metrics import Metrics
from streamer.pipeline import Pipeline, Stages
from streamer.publisher import EventPublisher, new_epoch
from streamer.restorer import FaceRestorer
from streamer.router import NONE, FittedRouter, RestorerRouter, Router, RouteTable
from streamer.samples import detector_proof, embedder_proof, guided_proof, input_sides, restorer_proof
from streamer.scoring import Scorer
from streamer.selector import CropSelector
from streamer.tracker import FaceTracker
from streamer.witness import Witness

logger = logging.getLogger(__name__)

AUTO, FALLBACK = "auto", "sgen-small"
"""A config's name for the restorer that helps most, and what it is where nobody measured that."""

_CROPS_ON_A_CPU = 8  # more would gain little
_CROPS_ON_A_GPU = 64
_CAMERAS_A_CORE = 10  # 1080p at 25 frames a second: 9 % of a core for decoding, 1 % for the rest
_GUIDED_A_BATCH = 8  # it runs one by one; with fewer, not all of the seven faces would be compared
_FRAMES_A_BATCH = 4  # a frame on the detector's canvas is 6 MB; what a network makes of it is many times that


@dataclass(frozen=True, slots=True)
class Wanted:
    """A network, what its plans are tuned for and proven on, and how many items it takes at once."""

    model: Model
    proof: Proof | None
    max_batch: int


class Networks:
    """Finds and loads networks for one run; each one's licence is logged once."""

    def __init__(
        self,
        store: ModelStore,
        *,
        backend: Backend = "auto",
        precision: Precision = "auto",
        threads: int | None = None,
        plans: Plans | None = None,
    ) -> None:
        """Without `plans` every network runs on a backend that needs none."""
        self._store, self._backend, self._precision, self._threads = store, backend, precision, threads
        self._plans = plans
        self.crops_a_batch = _CROPS_ON_A_GPU if on_gpu(backend) else _CROPS_ON_A_CPU
        """How many crops the networks behind the detector take at once."""

    def detector(
        self, model: str, *, size: int = 960, threshold: float | None = None, family: Family | None = None
    ) -> FaceDetector:
        """Load a detector. Raises ModelError or CardError."""
        wanted = self.detector_wanted(model, size=size, family=family)
        return FaceDetector(self._load(wanted), size=size, threshold=threshold)

    def restorer(self, name: str, *, max_size: int = 256, buckets: Sequence[int] | None = None) -> FaceRestorer | None:
        """Load a restorer, or None for "none". Raises as `detector` does."""
        if name == NONE:
            return None
        wanted = self.restorer_wanted(name, max_size=max_size, buckets=buckets)
        return FaceRestorer(self._load(wanted), max_size=max_size, buckets=self._sides(wanted.model, max_size, buckets))

    def guided_restorer(self, name: str) -> GuidedRestorer:
        """Load a restorer that takes a guide. Raises as `detector` does."""
        return GuidedRestorer(self._load(self.guided_wanted(name)))

    def embedder(self, model: str | None) -> FaceEmbedder | None:
        """Load an embedder, or None where none is configured. Raises as `detector` does."""
        return None if model is None else FaceEmbedder(self._load(self.embedder_wanted(model)))

    def routes(self, model: str) -> RouteTable | None:
        """Return the routes that were fitted for an embedder, None where none were.

        Raises ModelError, CardError or RouteError.
        """
        found = self._store.find(model, task="embedding")
        path = self._store.table(found, "routes")
        return None if path is None else RouteTable.read(path, embedder_sha256=found.sha256)

    def calibration(self, model: str, path: Path | None) -> Calibration | None:
        """Return what an embedder's similarities mean, by a file or by what was fitted for it, None where nothing was.

        Raises ModelError, CardError or CalibrationError.
        """
        found = self._store.find(model, task="embedding")
        path = path or self._store.table(found, "calibration")
        return None if path is None else Calibration.read(path, embedder_sha256=found.sha256)

    def detector_wanted(self, model: str, *, size: int = 960, family: Family | None = None) -> Wanted:
        """Find a detector, and what its plans are proven on. Raises ModelError or CardError."""
        found = self._freed(self._store.find(model, task="detection", family=family))
        return Wanted(found, detector_proof(found, size=size, max_batch=_FRAMES_A_BATCH), _FRAMES_A_BATCH)

    def restorer_wanted(self, name: str, *, max_size: int = 256, buckets: Sequence[int] | None = None) -> Wanted:
        """Find a restorer, and what its plans are proven on. Raises as `detector_wanted` does."""
        found = self._store.find(name, task="restoration")
        sides = self._sides(found, max_size, buckets)
        proof = restorer_proof(found, max_size=max_size, sides=sides, max_batch=self.crops_a_batch)
        return Wanted(found, proof, self.crops_a_batch)

    def guided_wanted(self, name: str) -> Wanted:
        """Find a restorer that takes a guide, and what its plans are proven on. Raises as `detector_wanted` does."""
        found = self._store.find(name)
        proof = guided_proof(found, max_batch=_GUIDED_A_BATCH) if found.card.result_size else None
        return Wanted(found, proof, _GUIDED_A_BATCH)

    def embedder_wanted(self, model: str) -> Wanted:
        """Find an embedder, and what its plans are proven on. Raises as `detector_wanted` does."""
        found = self._freed(self._store.find(model, task="embedding"))
        return Wanted(found, embedder_proof(found, max_batch=self.crops_a_batch), self.crops_a_batch)

    def _freed(self, model: Model) -> Model:
        """Return a network that was exported for one image at a time with a free batch axis, where that is exact."""
        try:
            freed = rebatch(model, self._store.cache / "rebatched") if self._plans else None
        except ModelError as exc:
            logger.warning("%s runs for one image at a time: %s", model.card.name, exc)
            return model
        return freed or model

    def _sides(self, model: Model, max_size: int, buckets: Sequence[int] | None) -> Sequence[int] | None:
        """Return the sides that a restorer is fed with: a plan for a GPU has its shapes, whatever the config says."""
        if not (self._plans and on_gpu(self._backend)):
            return buckets
        possible = input_sides(model.card, max_size)
        return sorted({*buckets, possible[-1]}) if buckets else possible

    def _load(self, wanted: Wanted) -> Engine:
        model = wanted.model
        logger.info(license_notice(model))
        # without a plan, which is timed, the faster of the two for this one (CenterFace at 960: 114 against 132 ms)
        detects = model.card.task == "detection" and self._backend == "auto"
        try:
            engine = load_engine(
                model, backend=self._backend, precision=self._precision, threads=self._threads,
                max_batch=wanted.max_batch, plans=self._plans, proof=wanted.proof,
                otherwise="onnxruntime" if detects else None,
            )  # fmt: skip
        except EngineError as exc:  # a file that does not load is the user's to mend
            raise ModelError(str(exc)) from exc
        logger.info("%s runs on %s in %s", model.card.name, engine.backend, engine.precision)
        return engine


def load_stages(config: StreamerConfig, networks: Networks) -> Stages:
    """Load every network of the config, open its gallery and make the stages. Raises what the functions below do."""
    detector = networks.detector(
        config.detector.model,
        size=config.detector.size,
        threshold=config.detector.threshold,
        family=config.detector.family,
    )
    model = embedder_of(config)
    embedder = networks.embedder(model)
    router, restorers = load_restorers(config.restorer, networks, model)
    trackers = {
        camera.name: FaceTracker(
            lost_after=config.tracker.lost_after,
            threshold=detector.threshold,
            weak_threshold=detector.weak_threshold,
            min_hits=config.tracker.min_hits,
            kind=config.tracker.kind,
        )
        for camera in config.cameras
    }
    selector = CropSelector(
        min_size_px=config.selector.min_size_px, retry_s=config.selector.retry_s, margin=config.selector.margin
    )
    search = open_search(config.gallery, networks, model, embedder) if model and embedder else None
    return Stages(detector, trackers, selector, router, restorers, embedder, search)


def embedder_of(config: StreamerConfig) -> str | None:
    """Return the embedder that a config names, or that its gallery's templates were made with; None: there is none.

    Raises GalleryError or VaultError.
    """
    if config.embedder.model is not None or config.gallery.folder is None:
        return config.embedder.model
    with Desk.open(config.gallery.folder) as desk:
        known = desk.gallery.embedder()
    if known is None:
        raise GalleryError(
            f"{config.gallery.folder} holds no templates yet: `streamer enrol` makes some, or set embedder.model"
        )
    return known[0]


def load_restorers(
    settings: RestorerConfig, networks: Networks, embedder: str | None
) -> tuple[Router, dict[str, FaceRestorer]]:
    """Load the restorers of a config, and make the router to them. Raises ModelError, CardError or RouteError."""
    names, table = _routed(settings, networks, embedder)
    loaded = [networks.restorer(name, max_size=settings.max_size, buckets=settings.buckets) for name in names]
    restorers = {restorer.engine.card.name: restorer for restorer in loaded if restorer is not None}
    if table is None:
        return make_router(next(iter(restorers.values()), None), max_size=settings.max_size), restorers
    for name, restorer in restorers.items():
        if restorer.engine.sha256 != table.restorers[name]:
            logger.warning("routes were fitted for another %s than this one: what it gains is not known", name)
    scales = {name: restorer.engine.card.scales for name, restorer in restorers.items()}
    return FittedRouter(table, scales, max_size=settings.max_size), restorers


def open_search(settings: GalleryConfig, networks: Networks, model: str, embedder: FaceEmbedder) -> Search | None:
    """Open the gallery of a config, and make what searches it; None where there is none.

    Raises GalleryError, VaultError, CalibrationError, ModelError or CardError.
    """
    if settings.folder is None:
        return None
    engine, calibration = embedder.engine, networks.calibration(model, settings.calibration)
    if calibration is None:
        logger.warning("%s has no calibration: scores carry no likelihood ratio", engine.card.name)
    scorer = Scorer(calibration, short_list_margin=settings.short_list_margin, faces_per_day=settings.faces_per_day)
    guided = None if settings.guided == NONE else networks.guided_restorer(settings.guided)
    with ExitStack() as stack:  # what is refused below leaves no gallery open
        desk = stack.enter_context(Desk.open(settings.folder))
        witness = Witness(
            desk.evidence(keep_days=settings.keep_days), desk.log, embedder=engine.card.name,
            embedder_sha256=engine.sha256, calibration_sha256=calibration.sha256 if calibration else None,
        )  # fmt: skip
        search = Search(LiveGallery(desk.gallery, engine.sha256), scorer, witness, guided)
        stack.pop_all()
    return search


def _routed(
    settings: RestorerConfig, networks: Networks, embedder: str | None
) -> tuple[tuple[str, ...], RouteTable | None]:
    """Return the restorers of a config, and the routes to them; None where it is but one."""
    if settings.name != AUTO:
        return (settings.name,), None
    table = networks.routes(embedder) if embedder else None
    return (table.routed, table) if table else ((FALLBACK,), None)


def wanted(config: StreamerConfig, networks: Networks) -> list[Wanted]:
    """Return the networks that a config names, its gallery's too.

    Raises GalleryError, VaultError, RouteError, ModelError or CardError.
    """
    detector, restorer, gallery, embedder = config.detector, config.restorer, config.gallery, embedder_of(config)
    found = [networks.detector_wanted(detector.model, size=detector.size, family=detector.family)]
    for name in _routed(restorer, networks, embedder)[0]:
        if name != NONE:
            guided = networks.guided_wanted(name)  # `restore --guide` runs its plan
            found.append(
                guided
                if guided.model.card.task == "guided-restoration"
                else networks.restorer_wanted(name, max_size=restorer.max_size, buckets=restorer.buckets)
            )
    if embedder is not None:
        found.append(networks.embedder_wanted(embedder))
    if gallery.folder is not None and gallery.guided != NONE:
        found.append(networks.guided_wanted(gallery.guided))
    return found


def threads_for(config: StreamerConfig) -> int:
    """Return how many threads a network gets on a CPU: the config's, else the cores that decoding leaves."""
    cores = len(os.sched_getaffinity(0))
    return config.engine.threads or max(1, cores - round(len(config.cameras) / _CAMERAS_A_CORE))


def make_router(restorer: FaceRestorer | None, *, max_size: int) -> RestorerRouter:
    """Make the router to the one restorer there is."""
    if restorer is None:
        return RestorerRouter(NONE, max_size=max_size)
    card = restorer.engine.card
    return RestorerRouter(card.name, max_size=max_size, least_scale=min(card.scales))


def make_cameras(config: StreamerConfig, stop: threading.Event) -> list[Camera]:
    """Make the cameras; none is opened yet."""
    return [
        Camera(camera.name, camera.url.get_secret_value(), transport=camera.transport, stop=stop)
        for camera in config.cameras
    ]


def make_pipeline(
    config: StreamerConfig, cameras: list[Camera], stages: Stages, *, metrics: Metrics, stop: threading.Event
) -> Pipeline:
    """Bind the publisher and make the pipeline. Raises PublishError."""
    publisher = EventPublisher(
        config.publish.endpoint,
        stream=config.stream,
        epoch=new_epoch(),
        lossless=not any(camera.live for camera in cameras),
        image_format=config.publish.image_format,
        stop=stop,
    )
    return Pipeline(
        cameras,
        stages,
        publisher,
        metrics=metrics,
        stop=stop,
        wait_for=config.publish.wait_for,
        stale_after_s={camera.name: camera.stale_after_s for camera in config.cameras},
    )
