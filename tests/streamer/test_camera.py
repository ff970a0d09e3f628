from __future__ import annotations

import logging
import os
import socket
import string
import threading
import time
import traceback
import wave
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media import number_in, picture, write_video

from streamer.camera import Camera, CameraError, redact
from streamer.types import CameraStatus, Frame


def camera(source: Path | str, **options: object) -> Camera:
    return Camera("door", str(source), stop=threading.Event(), **options)  # type: ignore[arg-type]


def numbers(frames: list[Frame]) -> list[int]:
    return [number_in(frame.image) for frame in frames]


def cut(source: Path, share: float) -> Path:
    """Keep the beginning of a file, as a full disk or a broken copy does."""
    whole = source.read_bytes()
    target = source.with_name(f"cut_{source.name}")
    target.write_bytes(whole[: int(len(whole) * share)])
    return target


@pytest.mark.parametrize(
    ("suffix", "b_frames"), [("mp4", 0), ("mp4", 2), ("mkv", 2), ("ts", 2), ("h264", 2), ("avi", 0)]
)
def test_a_file_gives_every_frame_once_and_in_order(tmp_path: Path, suffix: str, b_frames: int):
    source = camera(write_video(tmp_path / f"clip.{suffix}", frames=60, b_frames=b_frames))

    frames = list(source.frames())

    assert numbers(frames) == list(range(60))
    assert [frame.moment.frame for frame in frames] == list(range(60))
    steps = np.diff([frame.moment.pts for frame in frames])
    assert steps == pytest.approx(np.full(59, 0.04), abs=1e-3)
    assert source.broken == ""


def test_images_are_contiguous_bgr(tmp_path: Path):
    blue = np.zeros((120, 160, 3), np.uint8)
    blue[:, :, 0] = 200

    frame = next(camera(write_video(tmp_path / "blue.mp4", [blue] * 3)).frames())

    assert frame.image.dtype == np.uint8
    assert frame.image.flags.c_contiguous
    assert np.abs(frame.image.reshape(-1, 3).mean(0) - (200, 0, 0)).max() < 6


@pytest.mark.parametrize(("suffix", "codec", "pixels"), [("mkv", "libx264", "yuv444p"), ("avi", "mjpeg", "yuvj420p")])
def test_odd_sizes_are_read_whole(tmp_path: Path, suffix: str, codec: str, pixels: str):
    path = write_video(tmp_path / f"odd.{suffix}", width=161, height=121, codec=codec, pixel_format=pixels)

    frames = list(camera(path).frames())

    assert frames[7].image.shape == (121, 161, 3)
    assert np.abs(frames[7].image.astype(int) - picture(7, width=161, height=121)).mean() < 12
    assert numbers(frames) == list(range(50))


def test_a_film_that_lies_on_its_side_is_set_upright(tmp_path: Path):
    upright = picture(5)
    lying = np.rot90(upright, -1)

    frame = next(camera(write_video(tmp_path / "lying.mp4", [lying] * 3, rotation=90)).frames())

    assert frame.image.shape == upright.shape
    assert np.abs(frame.image.astype(int) - upright).mean() < 12


def test_unwanted_frames_are_counted_but_not_yielded(tmp_path: Path):
    source = camera(write_video(tmp_path / "clip.mp4", frames=20))

    frames = list(source.frames(lambda pts: pts >= 0.4))

    assert numbers(frames) == list(range(10, 20))
    assert frames[0].moment.frame == 10


def test_captured_at_is_the_creation_time_and_pts(tmp_path: Path):
    created = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)

    frames = list(camera(write_video(tmp_path / "clip.mp4", created=created)).frames())

    assert frames[0].moment.captured_at == created
    assert frames[25].moment.captured_at == created + timedelta(seconds=1)
    assert {frame.moment.clock for frame in frames} == {"file"}


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_without_creation_time_the_last_frame_ends_when_the_file_was_last_written(tmp_path: Path, suffix: str):
    path = write_video(tmp_path / f"clip.{suffix}", frames=50, b_frames=2)
    written = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    os.utime(path, (written.timestamp(), written.timestamp()))

    frames = list(camera(path).frames())

    assert abs(frames[-1].moment.captured_at + timedelta(seconds=0.04) - written) < timedelta(milliseconds=2)


def test_inspect_tells_what_a_file_shows(tmp_path: Path):
    found = camera(write_video(tmp_path / "clip.mp4", frames=50, rate=20)).inspect()

    assert (found.width, found.height, found.fps, found.codec) == (160, 120, 20.0, "h264")
    assert found.duration_s == pytest.approx(2.5)
    assert not found.live


def sound_only(path: Path) -> Path:
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    return path


def text(path: Path) -> Path:
    path.write_text("cameras: none of them\n" * 200)
    return path


def empty(path: Path) -> Path:
    path.touch()
    return path


def without_index(path: Path) -> Path:
    return cut(write_video(path), 0.6)


def without_frames(path: Path) -> Path:
    return cut(write_video(path), 0.05)


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("missing.mp4", lambda path: path, "No such file"),
        ("folder.mp4", lambda path: path.mkdir() or path, "directory"),
        ("text.mp4", text, "cannot be read as video"),
        ("text.txt", text, "holds no video"),  # libav would draw this one
        ("empty.mp4", empty, "cannot be read as video"),
        ("sound.wav", sound_only, "holds no video"),
        ("cut.mp4", without_index, "cannot be read as video"),
        ("head.mkv", without_frames, "video"),
    ],
)
def test_what_is_no_video_is_refused_in_one_line(tmp_path: Path, name: str, make, says: str):
    path = make(tmp_path / name)

    with pytest.raises(CameraError) as caught:
        camera(path).inspect()

    line = str(caught.value)
    assert says in line and str(path) in line and "\n" not in line
    assert isinstance(caught.value, ValueError)


def test_an_inspection_while_the_app_ends_complains_of_no_good_film(tmp_path: Path):
    stop = threading.Event()
    stop.set()
    path = write_video(tmp_path / "film.mp4", b_frames=2, audio_s=1)  # whose first packet gives no picture

    assert Camera("door", str(path), stop=stop).inspect().width == 160


@pytest.mark.parametrize(("suffix", "options"), [("mkv", {}), ("mp4", {"movflags": "faststart"}), ("flv", {})])
def test_a_file_that_breaks_off_gives_what_it_has_and_says_so(
    tmp_path: Path, suffix: str, options: dict[str, str], caplog: pytest.LogCaptureFixture
):
    source = camera(cut(write_video(tmp_path / f"clip.{suffix}", frames=60, b_frames=2, options=options), 0.6))
    source.inspect()

    with caplog.at_level(logging.WARNING):
        frames = list(source.frames())

    assert len(frames) >= 25
    assert numbers(frames)[:25] == list(range(25))
    assert source.broken.startswith("breaks off")
    assert source.status().detail == source.broken
    assert len(caplog.records) == 1


def test_a_file_damaged_in_its_middle_gives_the_rest_and_says_so(tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4", frames=60)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    middle = start + (content.index(b"moov") - start) // 2
    content[middle : middle + 800] = bytes(800)
    path.write_bytes(content)
    source = camera(path)

    frames = list(source.frames())

    assert 40 < len(frames) < 60
    assert number_in(frames[-1].image) == 59
    assert source.broken.startswith("damaged: ")
    assert source.status().drops["undecodable"] > 0


def test_sound_that_outlasts_the_picture_is_no_break(tmp_path: Path):
    source = camera(write_video(tmp_path / "clip.mp4", frames=25, audio_s=4))

    assert len(list(source.frames())) == 25
    assert source.broken == ""


def test_a_recording_whose_sound_begins_later_is_read_whole(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (4, 480, 640, 3), dtype=np.uint8)
    path = write_video(tmp_path / "clip.flv", [*noise] * 9)  # larger than what libav looks at before it begins
    sound = b"\x3e" + bytes(64)
    tag = b"\x08" + len(sound).to_bytes(3, "big") + (1400).to_bytes(3, "big") + bytes(4) + sound
    with path.open("ab") as file:
        file.write(tag + len(tag).to_bytes(4, "big"))
    source = camera(path)

    assert len(list(source.frames())) == 36
    assert source.broken == ""


def test_a_title_that_is_not_utf8_does_no_harm(tmp_path: Path):
    path = write_video(tmp_path / "clip.mkv", frames=5)
    content = path.read_bytes()
    assert content.count(b"Lavf") > 0
    path.write_bytes(content.replace(b"Lavf", b"\xe9\xe8vf"))

    assert len(list(camera(path).frames())) == 5


def test_a_path_may_look_like_a_protocol_and_a_file_url_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_video(tmp_path / "cam:1 day.mp4", frames=3)
    monkeypatch.chdir(tmp_path)

    assert len(list(camera("cam:1 day.mp4").frames())) == 3
    assert len(list(camera(f"file://{quote(str(path))}").frames())) == 3


def test_states_are_told_once_each(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    told: list[CameraStatus] = []
    source = camera(write_video(tmp_path / "clip.mp4"), on_status=told.append)

    with caplog.at_level(logging.INFO):
        list(source.frames())

    assert [status.state for status in told] == ["connecting", "live", "ended"]
    assert len(caplog.records) == 3


def test_stop_ends_a_file_between_two_frames(tmp_path: Path):
    stop = threading.Event()
    source = Camera("door", str(write_video(tmp_path / "clip.mp4")), stop=stop)
    frames = source.frames()
    next(frames)

    stop.set()

    assert len(list(frames)) == 0
    assert source.status().state == "ended"
    assert source.broken == ""


def test_a_file_that_waits_for_its_taker_is_not_stalled(tmp_path: Path):
    source = camera(write_video(tmp_path / "clip.mp4"))
    frames = source.frames()
    next(frames)

    status = source.status(time.monotonic() + 60)

    assert status.state == "live"
    assert status.frame_age_s == pytest.approx(60, abs=1)
    frames.close()


def test_a_url_is_live_and_a_path_is_not():
    for url in ("rtsp://10.0.0.7/stream1", "rtsps://h/x", "http://h/x.ts"):
        assert camera(url).live
    for path in ("clip.mp4", "/a/b.mkv", "file:///a/b.mkv", "a:b.mp4"):
        assert not camera(path).live


@pytest.fixture
def silent_port():
    """Of a server that takes connections and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_camera_that_never_answers_is_lost_and_ends_on_stop(silent_port: int):
    told: list[CameraStatus] = []
    stop = threading.Event()
    source = Camera("door", f"rtsp://127.0.0.1:{silent_port}/x", stop=stop, on_status=told.append)
    reader = threading.Thread(target=lambda: list(source.frames()))
    reader.start()
    time.sleep(0.5)

    stop.set()
    reader.join(6)

    assert not reader.is_alive()
    assert told[0].state == "connecting" and told[-1].state == "ended"


def test_a_live_camera_that_cannot_be_reached_is_refused_by_inspect():
    url = "rtsp://admin:" + "secret" + "@127.0.0.1:1/x"  # in parts: a traceback also quotes this line

    with pytest.raises(CameraError, match="Connection refused") as caught:
        camera(url).inspect()

    assert "secret@" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None


SECRETS = st.text(string.ascii_letters + string.digits + string.punctuation + " é", min_size=1, max_size=12).map(
    lambda secret: f"k4n{secret}4r1"
)


@given(secret=SECRETS)
def test_no_password_survives_redaction(secret: str):
    for url in (
        f"rtsp://admin:{secret}@10.0.0.7:554/stream1?channel=1",
        f"rtsp://admin:{quote(secret, safe='')}@10.0.0.7/stream1",
        f"RTSP://{secret}@10.0.0.7/",
        f"http://10.0.0.7/live?user=a&password={quote(secret, safe='')}&n=1",
        f"http://10.0.0.7/live?access_token={quote(secret, safe='')}",
        f"rtsp://10.0.0.7/user=admin_password={quote(secret, safe='')}_channel=1.sdp",
    ):
        shown = redact(f"door: lost ({url}): no answer")
        assert "k4n" not in shown and "4r1" not in shown
        assert "k4n" not in repr(camera(url)) and "4r1" not in camera(url).address


def test_redaction_leaves_the_rest_readable():
    assert redact("rtsp://admin:a@b/c@10.0.0.7/stream1") == "rtsp://***@10.0.0.7/stream1"
    assert redact("http://h/x?token=abc&n=1 is lost") == "http://h/x?token=***&n=1 is lost"
    assert redact("rtsp://10.0.0.7/stream1: no answer") == "rtsp://10.0.0.7/stream1: no answer"
    assert redact("/videos/clip.mp4") == "/videos/clip.mp4"


class Attentive(logging.Handler):
    """Keeps every log line with its traceback."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logging.Formatter("%(name)s %(message)s").format(record))


@settings(max_examples=15, deadline=None)
@given(secret=SECRETS)
def test_a_camera_that_cannot_be_reached_never_tells_its_password(secret: str):
    logs, told, stop = Attentive(), [], threading.Event()
    root = logging.getLogger()
    level = root.level
    root.addHandler(logs)
    root.setLevel(logging.DEBUG)

    def hear(status: CameraStatus) -> None:
        told.append(status)
        if status.state == "lost":
            stop.set()

    source = Camera("door", f"rtsp://admin:{quote(secret, safe='')}@127.0.0.1:1/x", stop=stop, on_status=hear)
    try:
        list(source.frames())
        with pytest.raises(CameraError) as caught:
            source.inspect()
    finally:
        root.removeHandler(logs)
        root.setLevel(level)

    said = "".join([*logs.lines, repr(told), repr(source), *traceback.format_exception(caught.value)])
    assert [status.state for status in told] == ["connecting", "lost", "ended"]
    assert "k4n" not in said and "4r1" not in said
