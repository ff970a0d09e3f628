"""What the pipeline costs beyond its stages: `streamer bench`.

Every stage is run alone on the same frames and crops and its CPU seconds are taken; their sum over cores × wall seconds
of the whole pipeline is the share of the machine that does the work itself. Nothing else should run meanwhile.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

from engines.store import ModelStore
from streamer import demo_clip, wire
from streamer.assembly import Networks, load_stages, make_cameras, make_pipeline
from streamer.config import StreamerConfig
from streamer.identify import Identifier
from streamer.metrics import Metrics
from streamer.pipeline import FRAMES_A_BATCH, Stages
from streamer.types import Crop, Detections, EventName, FaceIdentified, Frame

Result = TypeVar("Result")


def bench(store: ModelStore, *, runs: int = 5, clip: Path | None = None) -> Iterator[str]:
    """Yield lines to print: a table of CPU seconds by stage, then JSON with the medians.

    `clip` is played by two cameras; by default the demo's. Raises CameraError where it is no film.
    """
    with tempfile.TemporaryDirectory() as folder:
        if clip is None:
            clip = Path(folder) / "clip.mp4"
            demo_clip.make_clip(clip)
        config = StreamerConfig.model_validate(
            {
                "cameras": [{"name": f"camera{number}", "url": str(clip.resolve())} for number in (1, 2)],
                "publish": {"endpoint": f"ipc://{folder}/events"},
            }
        )
        for camera in make_cameras(config, threading.Event()):
            camera.inspect()
        networks = Networks(store, backend=config.engine.backend)
        results = []
        for number in range(1, runs + 1):
            results.append(_run(config, networks))
            yield f"run {number}/{runs}: " + ", ".join(f"{name} {value:.2f}" for name, value in results[-1].items())
        medians = {name: round(median(result[name] for result in results), 4) for name in results[0]}
        yield json.dumps({"cores": _cores(), "runs": runs, **medians})


def _run(config: StreamerConfig, networks: Networks) -> dict[str, float]:
    alone = _alone(config, load_stages(config, networks))
    stop, metrics = threading.Event(), Metrics()
    stages, cameras = load_stages(config, networks), make_cameras(config, stop)
    pipeline = make_pipeline(config, cameras, stages, metrics=metrics, stop=stop)
    stolen, started = _stolen_s(), time.perf_counter()
    pipeline.run()
    wall = time.perf_counter() - started
    return {
        **alone,
        "wall": wall,
        "stolen": _stolen_s() - stolen,
        "fps": metrics.counts()["frames"] / wall,
        "share": sum(alone.values()) / (_cores() * wall),
    }


def _alone(config: StreamerConfig, stages: Stages) -> dict[str, float]:
    """Return the CPU seconds of each stage, one stage at a time, in batches as the pipeline makes them."""
    seconds: dict[str, float] = defaultdict(float)
    readers = [camera.frames() for camera in make_cameras(config, threading.Event())]
    waiting: list[Crop] = []
    while frames := _timed(seconds, "read", lambda: _next_frames(readers)):
        found = _timed(seconds, "detect", partial(stages.detector.detect, [frame.image for frame in frames]))
        waiting += _timed(seconds, "track", partial(_follow, stages, frames, found))
        while len(waiting) >= stages.crops_a_batch:
            _identify(seconds, stages, waiting[: stages.crops_a_batch])
            del waiting[: stages.crops_a_batch]
    _identify(seconds, stages, waiting)
    return dict(seconds)


def _next_frames(readers: list[Iterator[Frame]]) -> list[Frame]:
    """Return the next frames of each camera, in turn, as many as the pipeline looks at in one go."""
    rounds = [[next(reader, None) for reader in readers] for _ in range(FRAMES_A_BATCH // len(readers))]
    return [frame for frames in rounds for frame in frames if frame is not None]


def _timed(seconds: dict[str, float], stage: str, work: Callable[[], Result]) -> Result:
    started = time.process_time()
    result = work()
    seconds[stage] += time.process_time() - started
    return result


def _follow(stages: Stages, frames: list[Frame], found: list[Detections]) -> list[Crop]:
    crops: list[Crop] = []
    for frame, detections in zip(frames, found, strict=True):
        update = stages.trackers[frame.moment.camera].update(frame.moment, detections)
        crops += stages.selector.select(frame, update.tracks)
    return crops


def _identify(seconds: dict[str, float], stages: Stages, crops: list[Crop]) -> None:
    """Identify and encode a batch of crops."""
    if crops:
        identifier = Identifier(
            stages.router, stages.restorers, stages.embedder, None, metrics=Metrics(),
            name_of=lambda track: EventName("bench", "bench", ""),
        )  # fmt: skip
        events = _timed(seconds, "identify", partial(identifier.identify, crops))
        _timed(seconds, "publish", lambda: [_encode(event) for event in events])


def _encode(event: FaceIdentified) -> list[bytes]:
    now = event.crop.track.moment.captured_at
    return wire.encode(event, stream="bench", epoch="bench", seq=0, topic_seq=0, published_at=now)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _stolen_s() -> float:
    """Return the seconds that the host took from this machine so far, where /proc tells."""
    try:
        ticks = int(Path("/proc/stat").read_text().split("\n", 1)[0].split()[8])
    except (OSError, IndexError, ValueError):
        return float("nan")
    return ticks / os.sysconf("SC_CLK_TCK")
