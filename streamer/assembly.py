"""Builds the parts from the config and hands them over: the only place that knows config and stages both."""

from __future__ import annotations

import logging
import threading

from engines.card import Family
from engines.engine import Engine, EngineError, ModelError
from engines.load import Backend, load_engine
from engines.store import Model, ModelStore, license_notice
from streamer.camera import Camera
from streamer.config import StreamerConfig
from streamer.detector import FaceDetector
from streamer.embedder import FaceEmbedder
from streamer.guided import GuidedRestorer
from streamer.metrics import Metrics
from streamer.pipeline import Pipeline, Stages
from streamer.publisher import EventPublisher, new_epoch
from streamer.restorer import FaceRestorer
from streamer.router import NONE, RestorerRouter
from streamer.selector import CropSelector
from streamer.tracker import FaceTracker

logger = logging.getLogger(__name__)

_FRAMES_A_BATCH = 4  # a frame on the detector's canvas is 6 MB; what a network makes of it is many times that


class Networks:
    """Finds and loads networks for one run; each one's licence is logged once."""

    def __init__(self, store: ModelStore, *, backend: Backend = "auto", threads: int | None = None) -> None:
        self._store, self._backend, self._threads = store, backend, threads

    def detector(
        self, model: str, *, size: int = 960, threshold: float | None = None, family: Family | None = None
    ) -> FaceDetector:
        """Load a detector. Raises ModelError or CardError."""
        found = self._store.find(model, task="detection", family=family)
        # ONNX Runtime is the faster of the two here (CenterFace at 960: 114 against 132 ms), for restorers the slower
        backend: Backend = "onnxruntime" if self._backend == "auto" else self._backend
        return FaceDetector(self._load(found, backend, max_batch=_FRAMES_A_BATCH), size=size, threshold=threshold)

    def restorer(self, name: str, *, max_size: int = 256) -> FaceRestorer | None:
        """Load a restorer, or None for "none". Raises as `detector` does."""
        if name == NONE:
            return None
        found = self._store.find(name, task="restoration")
        return FaceRestorer(self._load(found, self._backend), max_size=max_size)

    def guided_restorer(self, name: str) -> GuidedRestorer:
        """Load a restorer that takes a guide. Raises as `detector` does."""
        found = self._store.find(name)
        return GuidedRestorer(self._load(found, self._backend))

    def embedder(self, model: str | None) -> FaceEmbedder | None:
        """Load an embedder, or None where none is configured. Raises as `detector` does."""
        if model is None:
            return None
        return FaceEmbedder(self._load(self._store.find(model, task="embedding"), self._backend))

    def _load(self, model: Model, backend: Backend, *, max_batch: int = 64) -> Engine:
        logger.info(license_notice(model))
        try:
            engine = load_engine(model, backend=backend, threads=self._threads, max_batch=max_batch)
        except EngineError as exc:  # a file that does not load is the user's to mend
            raise ModelError(str(exc)) from exc
        logger.info("%s runs on %s in %s", model.card.name, engine.backend, engine.precision)
        return engine


def load_stages(config: StreamerConfig, networks: Networks) -> Stages:
    """Load every network of the config and make the stages. Raises ModelError or CardError."""
    detector = networks.detector(
        config.detector.model,
        size=config.detector.size,
        threshold=config.detector.threshold,
        family=config.detector.family,
    )
    restorer = networks.restorer(config.restorer.name, max_size=config.restorer.max_size)
    embedder = networks.embedder(config.embedder.model)
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
    router = make_router(restorer, max_size=config.restorer.max_size)
    return Stages(detector, trackers, selector, router, restorer, embedder)


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
