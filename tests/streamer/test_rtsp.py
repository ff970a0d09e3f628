"""The camera against GStreamer's RTSP server, on loopback."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import pytest
from media import number_in, walk, write_video

from engines.store import default_store
from streamer.assembly import Networks, load_stages, make_cameras, make_pipeline
from streamer.camera import Camera, CameraError
from streamer.client import EventSubscriber
from streamer.config import load_config
from streamer.metrics import Metrics
from streamer.types import CameraStatus, Frame

PYTHON = "/usr/bin/python3"
SERVER = Path(__file__).parents[1] / "rtsp_server.py"
HAS_GSTREAMER = """
import gi
gi.require_version("GstRtspServer", "1.0")
from gi.repository import Gst, GstRtspServer
Gst.init(None)
assert all(Gst.ElementFactory.find(name) for name in ("qtdemux", "h264parse", "rtph264pay", "alawenc"))
"""
PASSWORD = "p@ss:w/rd 4cam"


class Server:
    """One run of the network camera."""

    def __init__(self, clip: Path, port: int, *options: str) -> None:
        self.address = f"127.0.0.1:{port}/cam"
        command = [PYTHON, str(SERVER), str(port), str(clip), *options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._ready = self._process.stdout

    def wait(self) -> Server:
        """Wait until it listens."""
        assert self._ready.readline() == "ready\n"
        return self

    def tell(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._ready.close()


class Watcher:
    """Reads a camera on a thread of its own, as the app does, and remembers what it saw."""

    def __init__(self, url: str, *, transport: str = "tcp") -> None:
        self.stop = threading.Event()
        self.frames: list[Frame] = []
        self.told: list[CameraStatus] = []
        self.camera = Camera("door", url, stop=self.stop, transport=transport, on_status=self.told.append)
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        for frame in self.camera.frames():
            self.frames.append(frame)

    def states(self) -> list[str]:
        return [status.state for status in self.told]

    def wait(self, condition: Callable[[], bool], within_s: float) -> float:
        """Wait until it holds; return how long that took."""
        started = time.monotonic()
        while not condition():
            waited = time.monotonic() - started
            assert waited < within_s, f"not within {within_s} s: {self.told}"
            time.sleep(0.02)
        return time.monotonic() - started

    def see(self, more: int, within_s: float) -> float:
        """Wait until so many more frames have come."""
        enough = len(self.frames) + more
        return self.wait(lambda: len(self.frames) >= enough, within_s)

    def end(self) -> float:
        """Stop it; return how long that took."""
        started = time.monotonic()
        self.stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()
        return time.monotonic() - started


@pytest.fixture(scope="module", autouse=True)
def gstreamer() -> None:
    try:
        subprocess.run([PYTHON, "-c", HAS_GSTREAMER], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("GStreamer's RTSP server is not installed for the system's Python")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("rtsp") / "long.mp4", frames=1500)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def serve(clip: Path, port: int) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*options: str) -> Server:
        servers.append(Server(clip, port, *options))
        return servers[-1].wait()

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def watch() -> Iterator[Callable[..., Watcher]]:
    watchers: list[Watcher] = []

    def start(url: str, **options: str) -> Watcher:
        watchers.append(Watcher(url, **options))
        return watchers[-1]

    yield start
    for watcher in watchers:
        watcher.end()


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_a_camera_is_live_at_once_and_gives_its_frames_in_order(serve, watch, transport: str):
    watcher = watch(f"rtsp://{serve().address}", transport=transport)

    watcher.see(50, within_s=6)

    numbers = [number_in(frame.image) for frame in watcher.frames]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    steps = [b.moment.pts - a.moment.pts for a, b in zip(watcher.frames, watcher.frames[1:], strict=False)]
    assert steps == pytest.approx([0.04] * len(steps), abs=1e-3)
    assert watcher.camera.status().fps == pytest.approx(25, rel=0.2)
    assert watcher.end() < 1
    assert watcher.states() == ["connecting", "live", "ended"]


def test_the_clock_is_the_cameras_own_once_it_told_it(serve, watch):
    watcher = watch(f"rtsp://{serve().address}")

    watcher.wait(lambda: any(frame.moment.clock == "rtcp" for frame in watcher.frames), within_s=8)
    watcher.see(25, within_s=3)

    clocks = [frame.moment.clock for frame in watcher.frames]
    assert clocks[0] == "arrival"
    assert clocks == sorted(clocks)  # arrival, then rtcp for good
    told = [frame.moment for frame in watcher.frames if frame.moment.clock == "rtcp"]
    zeros = [moment.captured_at.timestamp() - moment.pts for moment in told]
    assert max(zeros) - min(zeros) < 0.001
    assert abs((datetime.now(UTC) - told[-1].captured_at).total_seconds()) < 1


def test_a_password_lets_in_and_is_never_told(serve, watch, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    server = serve("--user", "admin", "--password", PASSWORD)
    url = f"rtsp://admin:{quote(PASSWORD, safe='')}@{server.address}"

    found = Camera("door", url, stop=threading.Event()).inspect()
    watcher = watch(url)
    watcher.see(5, within_s=4)
    server.kill()
    watcher.wait(lambda: watcher.states()[-1] == "lost", within_s=4)

    assert (found.width, found.height, found.live, found.duration_s) == (160, 120, True, None)
    said = caplog.text + repr(watcher.told) + repr(watcher.camera)
    assert "4cam" not in said and "admin" not in said


def test_a_wrong_password_is_lost_and_tried_again(serve, watch, caplog: pytest.LogCaptureFixture):
    server = serve("--user", "admin", "--password", PASSWORD)
    url = f"rtsp://admin:wr0ng@{server.address}"

    with pytest.raises(CameraError, match="401") as caught:
        Camera("door", url, stop=threading.Event()).inspect()
    watcher = watch(url)
    watcher.wait(lambda: "lost" in watcher.states(), within_s=4)
    time.sleep(2)
    server.kill()  # seen by a further try only
    watcher.wait(lambda: "refused" in watcher.told[-1].detail, within_s=8)

    assert "401" in watcher.told[1].detail
    assert watcher.end() < 1
    assert watcher.states() == ["connecting", "lost", "lost", "ended"]
    assert "wr0ng" not in caplog.text + repr(watcher.told) + str(caught.value)


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_a_camera_that_goes_and_comes_back_is_live_again(serve, watch, transport: str):
    server = serve()
    watcher = watch(f"rtsp://{server.address}", transport=transport)
    watcher.see(25, within_s=4)

    server.kill()
    watcher.wait(lambda: watcher.states()[-1] == "lost", within_s=6)
    time.sleep(1.5)
    before = len(watcher.frames)
    serve()
    watcher.wait(lambda: watcher.states()[-1] == "live", within_s=10)

    watcher.see(5, within_s=2)
    assert watcher.frames[before].moment.pts < watcher.frames[before - 1].moment.pts
    assert [frame.moment.frame for frame in watcher.frames] == list(range(len(watcher.frames)))
    assert watcher.states()[:3] == ["connecting", "live", "lost"]


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_a_camera_that_freezes_is_stalled_and_mends_itself(serve, watch, transport: str):
    server = serve()
    watcher = watch(f"rtsp://{server.address}", transport=transport)
    watcher.see(25, within_s=4)

    server.tell(signal.SIGSTOP)
    watcher.wait(lambda: watcher.camera.status().state == "stalled", within_s=6)
    assert "stalled" in watcher.states()
    server.tell(signal.SIGCONT)

    watcher.wait(lambda: watcher.states()[-1] == "live", within_s=10)


def test_no_picture_is_a_stall_even_if_sound_goes_on(serve, watch):
    server = serve("--audio")
    watcher = watch(f"rtsp://{server.address}")
    watcher.see(10, within_s=4)

    server.tell(signal.SIGUSR1)

    watcher.wait(lambda: "stalled" in watcher.states(), within_s=6)


def test_the_watchdog_needs_no_reader(serve, watch):
    watcher = watch(f"rtsp://{serve().address}")
    watcher.see(5, within_s=4)

    status = watcher.camera.status(time.monotonic() + 5.5)

    assert (status.state, status.fps) == ("stalled", 0)
    assert status.frame_age_s == pytest.approx(5.5, abs=0.5)
    assert watcher.camera.status().state == "live"


def test_stop_ends_a_frozen_camera_in_a_few_seconds(serve, watch):
    server = serve()
    watcher = watch(f"rtsp://{server.address}")
    watcher.see(5, within_s=4)
    server.tell(signal.SIGSTOP)
    time.sleep(0.3)

    assert watcher.end() < 4
    assert watcher.states()[-1] == "ended"


def test_a_file_beside_a_live_camera_loses_no_frame_and_a_lost_camera_ends_its_tracks(port, tmp_path):
    live = write_video(tmp_path / "live.mp4", walk(60) * 6, rate=12)
    film = write_video(tmp_path / "film.mp4", walk(24), rate=12)
    path = tmp_path / "camera.yaml"
    path.write_text(
        f"cameras:\n  - {{name: door, url: 'rtsp://127.0.0.1:{port}/cam'}}\n  - {{name: film, url: {film}}}\n"
        f"detector: {{size: 448}}\npublish: {{endpoint: 'ipc://{tmp_path}/events', wait_for: 1}}\n"
    )
    config, stop, metrics = load_config(path, {}), threading.Event(), Metrics()
    stages = load_stages(config, Networks(default_store(offline=True), backend="onnxruntime"))
    pipeline = make_pipeline(config, make_cameras(config, stop), stages, metrics=metrics, stop=stop)
    server = Server(live, port).wait()
    running = threading.Thread(target=pipeline.run, args=(60,))
    running.start()

    seen: list[tuple[str, str]] = []
    try:
        with EventSubscriber(config.publish.endpoint, timeout_s=30) as events:
            for event in events:
                seen.append((event.topic, getattr(event.header, "state", event.header.kind)))
                if seen[-1] == ("face/door", "face.identified"):
                    server.kill()
                if {("face/door", "face.left"), ("face/film", "face.left")} <= set(seen):
                    stop.set()
    finally:
        stop.set()
        server.kill()
        running.join(20)

    assert not running.is_alive()
    assert ("face/door", "face.left") in seen
    assert seen.index(("face/door", "face.left")) < seen.index(("system", "stopping"))
    film_told = [state for topic, state in seen if topic == "face/film"]
    assert film_told[0] == "face.appeared"
    assert film_told[-1] == "face.left"
    assert "film" not in metrics.drops()
