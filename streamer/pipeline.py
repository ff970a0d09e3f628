"""Pipeline and Worker: who runs on which thread, and how it ends.

Reading is per camera, watching per frame, identifying per track, publishing per event: four kinds of thread with an
Inbox between each two. Ending is the ordinary end of the stream, from the readers on. A stop does not wait for what is
queued: it is let go and counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from engines.engine import Engine
from engines.load import building, running, settle
from streamer import __version__
from streamer.camera import Camera
from streamer.detector import FaceDetector
from streamer.embedder import FaceEmbedder
from streamer.identify import Identifier, Search
from streamer.inbox import Closed, Inbox
from streamer.metrics import Metrics
from streamer.publisher import EventPublisher
from streamer.restorer import FaceRestorer
from streamer.router import Router
from streamer.selector import CropSelector
from streamer.tracker import FaceTracker
from streamer.types import (
    Building,
    CameraStatus,
    Crop,
    Detections,
    Event,
    FaceAppeared,
    FaceIdentified,
    FaceLeft,
    Frame,
    SystemState,
    SystemStatus,
    Track,
)

logger = logging.getLogger(__name__)

FRAMES_A_BATCH = 8
CROPS_ON_A_CPU = 8
EVENTS_A_BATCH = 8
STATUS_EVERY_S = 5.0
_LOOK_EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class Silence:
    """Takes a frame's place when a camera ends, or gives no picture: its tracks end."""

    camera: str


@dataclass(frozen=True, slots=True)
class Stages:
    """The parts that the pipeline runs; each is used by one thread only."""

    detector: FaceDetector
    trackers: Mapping[str, FaceTracker]
    """By camera."""
    selector: CropSelector
    router: Router
    restorers: Mapping[str, FaceRestorer]
    """By the names that the router may give."""
    embedder: FaceEmbedder | None
    search: Search | None

    @property
    def crops_a_batch(self) -> int:
        """How many crops are identified together, at most: a stop waits for one batch of them."""
        engines = [restorer.engine for restorer in self.restorers.values()]
        on_cpu = not engines or any(engine.backend.endswith("-cpu") for engine in engines)
        return CROPS_ON_A_CPU if on_cpu else max(engine.max_batch for engine in engines)

    @property
    def engines(self) -> dict[str, Engine]:
        """The networks by stage; a second restorer's is `restorer NAME`."""
        engines = {"detector": self.detector.engine}
        for name, restorer in self.restorers.items():
            engines["restorer" if "restorer" not in engines else f"restorer {name}"] = restorer.engine
        if self.embedder is not None:
            engines["embedder"] = self.embedder.engine
        if self.search is not None and self.search.guided is not None:
            engines["guided"] = self.search.guided.engine
        return engines

    def close(self) -> None:
        """Free the networks, end the plans that are being built for them, and close the gallery."""
        for engine in self.engines.values():
            engine.close()
        if self.search is not None:
            self.search.close()


class Worker(threading.Thread):
    """A thread whose exception is not lost: it stops the others and is raised by `Pipeline.run`."""

    def __init__(self, name: str, work: Callable[[], None], stop: threading.Event) -> None:
        super().__init__(name=name)
        self.error: BaseException | None = None
        self._work, self._stop_all = work, stop

    def run(self) -> None:
        try:
            self._work()
        except Closed:
            pass  # the thread behind this one has ended, and says why
        except BaseException as error:  # noqa: BLE001 - nothing is swallowed: `Pipeline.run` raises it
            self.error = error
            self._stop_all.set()


class Pipeline:
    """Takes cameras to events until all files have ended, or `stop` is set."""

    def __init__(
        self,
        cameras: Sequence[Camera],
        stages: Stages,
        publisher: EventPublisher,
        *,
        metrics: Metrics,
        stop: threading.Event,
        wait_for: int = 0,
        stale_after_s: Mapping[str, float],
    ) -> None:
        """`stop` ends everything early; cameras and publisher look at the same one. `stale_after_s` is by camera."""
        self.metrics = metrics
        self._cameras = {camera.name: camera for camera in cameras}
        self._stages, self._publisher = stages, publisher
        self._identifier = Identifier(
            stages.router, stages.restorers, stages.embedder, stages.search,
            metrics=metrics, name_of=publisher.name_of_identified,
        )  # fmt: skip
        self._stop, self._wait_for, self._stale_after_s = stop, wait_for, stale_after_s
        self._live = any(camera.live for camera in cameras)
        self._frames: Inbox[Frame | Silence] = Inbox(room=1 if self._live else 4, total=4 * len(cameras))
        self._faces: Inbox[FaceAppeared | Crop | FaceLeft] = Inbox(room=2, total=64)
        self._events: Inbox[Event] = Inbox(room=32, total=256)
        self._open_readers = len(cameras)
        self._readers_lock = threading.Lock()
        self._awaited = threading.Event()
        """Set once the subscribers that are waited for are there, or never will be."""

    def run(self, duration_s: float | None = None) -> None:
        """Run to the end, for `duration_s` at most; raises what ended a worker early."""
        ends_at = None if duration_s is None else time.monotonic() + duration_s
        publish = Worker("publish", self._publish, self._stop)
        workers = [
            *(Worker(f"read {each.name}", partial(self._read, each), self._stop) for each in self._cameras.values()),
            Worker("watch", self._watch, self._stop),
            Worker("identify", self._identify, self._stop),
        ]
        publish.start()
        try:
            while not self._awaited.wait(_LOOK_EVERY_S):
                self._look_at_clock(ends_at)
            if not self._stop.is_set():
                self._work(workers, ends_at)
        except BaseException:  # Ctrl-C too: it is raised again, once the threads are told to end
            self._stop.set()
            raise
        finally:
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
            self._events.close()
            publish.join()
        for worker in [*workers, publish]:
            if worker.error is not None:
                raise worker.error

    def _work(self, workers: Sequence[Worker], ends_at: float | None) -> None:
        """Start the workers and report, from outside the decoders, how cameras and box do until all are done."""
        self._report_system("starting")
        for worker in workers:
            worker.start()
        self._report_system("ready")
        reported: dict[str, tuple[str, str]] = {}
        next_report = time.monotonic()
        state: SystemState = "ready"
        while any(worker.is_alive() for worker in workers):
            time.sleep(_LOOK_EVERY_S / 5 if state == "stopping" else _LOOK_EVERY_S)
            self._look_at_clock(ends_at)
            due = time.monotonic() >= next_report
            self._report_cameras(reported, due=due)
            if self._stop.is_set() and state != "stopping":
                state, due = "stopping", True
            if due:
                next_report = time.monotonic() + STATUS_EVERY_S
                self._report_system(state)
        self._report_cameras(reported, due=False)

    def _look_at_clock(self, ends_at: float | None) -> None:
        if ends_at is not None and time.monotonic() >= ends_at:
            self._stop.set()

    # -- threads

    def _read(self, camera: Camera) -> None:
        try:
            for frame in camera.frames():
                self.metrics.count("frames")
                overtaken = self._frames.put(camera.name, frame, wait=not camera.live)
                if isinstance(overtaken, Frame):
                    self.metrics.drop(overtaken.moment.camera, "overtaken")
            self._frames.put(camera.name, Silence(camera.name), wait=False, keep=True)
        finally:
            with self._readers_lock:
                self._open_readers -= 1
                if not self._open_readers:
                    self._frames.close()

    def _watch(self) -> None:
        try:
            while items := self._frames.take(FRAMES_A_BATCH):
                items = [item for item in items if isinstance(item, Silence) or self._wanted(item)]
                found = iter(self._detect([item for item in items if isinstance(item, Frame)]))
                for item in items:
                    if isinstance(item, Silence):
                        self._leave(self._stages.trackers[item.camera].finish())
                    else:
                        self._follow(item, next(found))
            for tracker in self._stages.trackers.values():
                self._leave(tracker.finish())
        finally:
            self._frames.close()
            self._faces.close()

    def _identify(self) -> None:
        try:
            while items := self._faces.take(self._stages.crops_a_batch):
                crops = [item for item in items if isinstance(item, Crop)]
                if self._stop.is_set():
                    for crop in crops:
                        self.metrics.drop(crop.track.moment.camera, "stopping")
                    crops = []
                identified = iter(self._identifier.identify(crops))
                for item in items:
                    if not isinstance(item, Crop):
                        if isinstance(item, FaceLeft):
                            self._identifier.left(item.track)
                        self._emit(item.track.moment.camera, item)
                    elif crops:
                        self._emit(item.track.moment.camera, next(identified))
        finally:
            self._faces.close()

    def _publish(self) -> None:
        try:
            with self._publisher as publisher:
                if not publisher.wait_for_subscribers(self._wait_for):
                    return
                self._awaited.set()
                while events := self._events.take(EVENTS_A_BATCH):
                    for event in events:
                        with self.metrics.stage("publish", 1):
                            sent = publisher.publish(event)
                        self.metrics.count("published" if sent else "unsent")
                publisher.publish(self._system_status("ended"))
                self.metrics.count("published")
        finally:
            self._awaited.set()
            self._events.close()

    # -- what they do

    def _wanted(self, frame: Frame) -> bool:
        """Count and refuse frames that a stop or their age make useless."""
        camera = frame.moment.camera
        if self._stop.is_set():
            self.metrics.drop(camera, "stopping")
            return False
        age = time.monotonic() - frame.decoded_at
        self.metrics.frame_age(camera, age)
        if self._cameras[camera].live and age > self._stale_after_s[camera]:
            self.metrics.drop(camera, "stale")
            return False
        return True

    def _detect(self, frames: Sequence[Frame]) -> list[Detections]:
        if not frames:
            return []
        settle(self._stages.detector.engine)
        with self.metrics.stage("detect", len(frames)):
            return self._stages.detector.detect([frame.image for frame in frames])

    def _follow(self, frame: Frame, detections: Detections) -> None:
        self.metrics.count("detected")
        camera = frame.moment.camera
        with self.metrics.stage("track", 1):
            update = self._stages.trackers[camera].update(frame.moment, detections)
            crops = self._stages.selector.select(frame, update.tracks)
        for track in update.appeared:
            self.metrics.count("faces")
            self._faces.put((camera, track.id), FaceAppeared(track), wait=not self._live, keep=self._live)
        for crop in crops:
            dropped = self._faces.put((camera, crop.track.id), crop, wait=not self._live)
            if dropped is not None:
                self.metrics.drop(dropped.track.moment.camera, "restorer busy")
        self._leave(update.left)

    def _leave(self, tracks: Sequence[Track]) -> None:
        for track in tracks:
            camera = track.moment.camera
            self._stages.selector.forget(camera, track.id)
            self._faces.put((camera, track.id), FaceLeft(track), wait=not self._live, keep=self._live)

    # -- status

    def _report_cameras(self, reported: dict[str, tuple[str, str]], *, due: bool) -> None:
        drops = self.metrics.drops()
        for name, camera in self._cameras.items():
            status = camera.status()
            changed = reported.get(name) != (status.state, status.detail)
            with suppress(Closed):  # somebody failed, and run will say why
                if changed and status.state in ("lost", "stalled"):
                    self._frames.put(name, Silence(name), wait=False, keep=True)
                if changed or due:
                    reported[name] = (status.state, status.detail)
                    self._emit(name, replace(status, drops={**drops.get(name, {}), **status.drops}))

    def _report_system(self, state: SystemState) -> None:
        with suppress(Closed):
            self._emit("", self._system_status(state))

    def _system_status(self, state: SystemState) -> SystemStatus:
        engines, metrics = self._stages.engines, self.metrics
        described = {stage: _described(running(engine)) for stage, engine in engines.items()}
        built = {stage: built for stage, engine in engines.items() if (built := _being_built(engine))}
        return SystemStatus(
            state, __version__, described, metrics.batch_sizes(), metrics.stage_seconds(), metrics.counts(),
            metrics.face_sizes(), built,
        )  # fmt: skip

    def _emit(self, lane: str, event: Event) -> None:
        """Hand an event to the publisher. Live, only identified faces may be dropped; a status never waits."""
        status = isinstance(event, CameraStatus | SystemStatus)
        keep = status or (self._live and not isinstance(event, FaceIdentified))
        dropped = self._events.put(lane, event, wait=not self._live, keep=keep)
        if isinstance(dropped, FaceIdentified):
            self.metrics.drop(dropped.crop.track.moment.camera, "publisher busy")


def _being_built(engine: Engine) -> Building | None:
    known = building(engine)
    return Building(known.step, known.share, known.eta_s) if known else None


def _described(engine: Engine) -> dict[str, str]:
    described = {
        "model": engine.card.name,
        "sha256": engine.sha256,
        "backend": engine.backend,
        "precision": engine.precision,
        "license": engine.card.license,
    }
    return described | ({"plan": engine.plan[:12]} if engine.plan else {})
