"""The pipeline over real faces in small films, from the file to a subscriber."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from media import walk, write_video

from engines.engine import EngineError
from engines.store import default_store
from streamer import wire
from streamer.assembly import Networks, load_stages, make_cameras, make_pipeline
from streamer.camera import Camera
from streamer.client import EventSubscriber
from streamer.config import StreamerConfig, load_config
from streamer.metrics import Metrics
from streamer.pipeline import Pipeline
from streamer.publisher import EventPublisher


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("film") / "walk.mp4", walk(24), rate=12)


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., StreamerConfig]:
    def configure(*urls: object, wait_for: int = 1) -> StreamerConfig:
        cameras = "".join(f"  - name: camera{index}\n    url: '{url}'\n" for index, url in enumerate(urls))
        path = tmp_path / "camera.yaml"
        path.write_text(
            f"cameras:\n{cameras}detector:\n  size: 448\nengine:\n  backend: onnxruntime\n"
            f"publish:\n  endpoint: ipc://{tmp_path}/events\n  wait_for: {wait_for}\n"
        )
        return load_config(path, {})

    return configure


def make(config: StreamerConfig) -> tuple[Pipeline, Metrics, list[Camera]]:
    stop, metrics = threading.Event(), Metrics()
    cameras = make_cameras(config, stop)
    stages = load_stages(config, Networks(default_store(offline=True), backend="onnxruntime"))
    return make_pipeline(config, cameras, stages, metrics=metrics, stop=stop), metrics, cameras


def start(config: StreamerConfig, duration_s: float | None = None) -> Metrics:
    """Run the pipeline with nobody listening."""
    pipeline, metrics, _ = make(config)
    pipeline.run(duration_s)
    return metrics


def play(config: StreamerConfig) -> tuple[list[wire.WireEvent], Metrics, list[Camera]]:
    """Run the pipeline to its end and return what a subscriber received."""
    pipeline, metrics, cameras = make(config)
    received: list[wire.WireEvent] = []

    def listen() -> None:
        with EventSubscriber(config.publish.endpoint, timeout_s=30) as events:
            received.extend(events)

    listener = threading.Thread(target=listen)
    listener.start()
    pipeline.run()
    listener.join(30)
    assert not listener.is_alive()
    return received, metrics, cameras


def test_a_file_loses_nothing_from_the_first_frame_to_the_last_event(film, configured):
    received, metrics, _ = play(configured(film))

    counts = metrics.counts()
    assert counts["frames"] == counts["detected"] == 24
    assert counts["drops"] == 0
    assert counts["pixels_run"] >= counts["pixels_own"] > 0
    assert [event.header.seq for event in received] == list(range(counts["published"]))
    kinds = [event.header.kind for event in received if event.topic == "face/camera0"]
    assert kinds[0] == "face.appeared"
    assert kinds[-1] == "face.left"
    assert set(kinds[1:-1]) == {"face.identified"}
    assert received[0].header.kind == received[-1].header.kind == "system.status"
    assert received[-1].header.state == "ended"


def test_the_restored_face_is_the_crop_scale_times_as_large_and_lies_where_it_says(film, configured):
    received, _, _ = play(configured(film))

    identified = [event for event in received if event.header.kind == "face.identified"]
    for event in identified:
        crop, restored = event.images["crop"], event.images["restored"]
        scale = event.header.restoration.scale
        assert restored.shape[0] == scale * crop.shape[0]
        again = cv2.resize(restored, crop.shape[1::-1], interpolation=cv2.INTER_AREA).astype(float)
        assert np.corrcoef(again.ravel(), crop.ravel())[0, 1] > 0.9
        assert event.header.scores is None
        assert event.header.scores_absent == "no embedder is configured"
    assert identified


def test_two_files_share_the_networks_and_keep_their_order(film, configured, tmp_path):
    other = write_video(tmp_path / "other.mp4", walk(9, seed=1), rate=12)

    received, metrics, _ = play(configured(film, other))

    assert metrics.counts()["frames"] == metrics.counts()["detected"] == 33
    for topic in ("face/camera0", "face/camera1"):
        frames = [event.header.frame for event in received if event.topic == topic]
        assert frames == sorted(frames)
        assert frames


def test_the_same_file_gives_the_same_events_twice(film, configured):
    def told(events: list[wire.WireEvent]) -> list[dict[str, object]]:
        changing = {"id", "epoch", "published_at", "seq", "topic_seq"}
        faces = [event for event in events if event.topic.startswith("face/")]
        return [event.header.model_dump(exclude=changing) for event in faces]

    first, second = (told(play(configured(film))[0]) for _ in range(2))

    assert first == second


def test_a_file_that_breaks_off_is_published_as_far_as_it_goes_and_told(film, configured, tmp_path):
    whole = write_video(tmp_path / "whole.mkv", walk(24), rate=12)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])

    received, metrics, (camera,) = play(configured(cut))

    assert 0 < metrics.counts()["frames"] < 24
    assert "breaks off" in camera.broken
    assert received[-1].header.state == "ended"


@pytest.mark.parametrize(
    "part",
    [
        "camera.Camera.frames", "tracker.FaceTracker.update", "restorer.FaceRestorer.restore",
        "publisher.EventPublisher.publish", "camera.Camera.status",
    ],
)  # fmt: skip
def test_what_fails_on_any_thread_ends_all_of_them_and_is_raised(part, film, configured, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise EngineError("the part broke")

    monkeypatch.setattr(f"streamer.{part}", fail)

    with pytest.raises(EngineError, match="the part broke"):
        start(configured(film, wait_for=0))
    names = ("read", "watch", "identify", "publish")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(names)]


def test_ended_is_the_last_event_however_slow_the_subscriber(film, configured, monkeypatch):
    publish = EventPublisher.publish

    def slowly(self: EventPublisher, event: object) -> bool:
        time.sleep(0.1)
        return publish(self, event)

    monkeypatch.setattr(EventPublisher, "publish", slowly)

    received, metrics, _ = play(configured(film, film))

    assert received[-1].header.state == "ended"
    assert len(received) == metrics.counts()["published"]
    assert {event.header.kind for event in received[-3:-1]} & {"face.left", "camera.status"}


def test_a_run_ends_after_its_duration_even_while_it_waits_for_a_subscriber(film, configured):
    started = time.monotonic()

    metrics = start(configured(film, wait_for=1), duration_s=0.5)

    assert time.monotonic() - started < 5
    assert metrics.counts() == {"drops": 0}


@pytest.mark.parametrize("state", ["loading", "waiting for a subscriber", "running", "camera out of reach"])
def test_sigterm_ends_everything_within_ten_seconds_with_exit_code_0(state, tmp_path):
    endless = write_video(tmp_path / "long.mp4", walk(60) * 8, rate=12)
    url = "rtsp://127.0.0.1:9/none" if state == "camera out of reach" else endless
    config = tmp_path / "camera.yaml"
    config.write_text(
        f"cameras:\n  - name: door\n    url: {url}\npublish:\n  endpoint: ipc://{tmp_path}/events\n"
        f"  wait_for: {int(state == 'waiting for a subscriber')}\n"
    )
    command = [sys.executable, "-m", "streamer.cli", "run", "--offline", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ}) as process:
        awaited = {
            "loading": "licence", "waiting for a subscriber": "waiting",
            "running": "live", "camera out of reach": "lost",
        }[state]  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            if awaited in line:
                break
        started = time.monotonic()

        process.send_signal(signal.SIGTERM)
        code = process.wait(20)

        assert code == 0
        assert time.monotonic() - started < 10
