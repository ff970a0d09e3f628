"""Camera: opens a URL or a file with PyAV, yields its frames, and mends itself."""

from __future__ import annotations

import logging
import random
import re
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from streamer.types import CameraState, CameraStatus, Clock, Frame, Moment

OPEN_TIMEOUT_S = 4.0
READ_TIMEOUT_S = 2.5  # libav blocks for twice that: on the first one it hands out the packet its parser held back
STALL_S = 5.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 5.0
FPS_WINDOW_S = 5.0
MISSING_S = 0.5
CLOCK_ERROR_S = 86400.0  # a camera whose clock is a day off has never been set

DECLARES_DURATION = {"mp4", "matroska", "flv"}  # in its header; elsewhere libav estimates it from the file as it is
NO_PICTURE = f"no picture for {STALL_S:g} s"
NO_FRAME = "holds no video frame"
TEXT_CODECS = {"ansi", "bintext", "idf", "xbin"}  # libav draws a text file as video

logger = logging.getLogger(__name__)


class CameraError(ValueError):
    """A camera cannot be reached or a file cannot be played: one line, without secrets."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a camera shows, as its first frame tells."""

    width: int
    height: int
    fps: float
    codec: str
    duration_s: float | None
    """As its container declares it; None where it does not, and of a live camera."""
    live: bool


class Camera:
    """One configured source. A live one is read for ever, whatever happens to it; a file once, every frame in order.

    One thread runs `frames`; `status` may be asked by any.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        stop: threading.Event,
        transport: str = "tcp",
        on_status: Callable[[CameraStatus], None] = lambda status: None,
    ) -> None:
        """`stop` ends it; `on_status` is told each change of state, by the thread that runs `frames`."""
        self.name = name
        self._file = _file(url)
        self.live = self._file is None
        self.address = redact(url)
        """The URL without its secrets, for people."""
        self.broken = ""
        """Why a file was not read to its end, in one sentence; empty if it was."""
        self._url = url
        self._transport = transport
        self._stop = stop
        self._on_status = on_status
        self._count = 0
        self._undecodable = 0
        self._told: tuple[CameraState, str] | None = None
        self._decoded_at: deque[float] = deque()
        self._moment: Moment | None = None
        self._lock = threading.Lock()  # over the three above, which `status` reads

    def __repr__(self) -> str:
        return f"<Camera {self.name} {self.address}>"

    def inspect(self) -> Inspection:
        """Open it, decode one frame and close it again. Raises CameraError."""
        try:
            with self._open() as container:
                reading = _Reading(container, self._file)
                if (picture := self._first(reading)) is not None:
                    return _inspection(reading, picture, live=self.live)
                problem = "shows no picture" if self.live else NO_FRAME
        except (av.error.FFmpegError, CameraError) as error:
            problem = _reason(error)
        raise CameraError(f"{self.name}: {self.address}: {problem}")  # outside: libav's own error holds the URL

    def frames(self, wanted: Callable[[float], bool] = lambda pts: True) -> Iterator[Frame]:
        """Yield its frames until the file or the app ends; of a live camera that is never before `stop`.

        Frames whose pts are not `wanted` are decoded and counted but not converted, and not yielded. pts step back when
        a camera was lost and is back, and the frame's size may be another one then.
        """
        try:
            self._turn("connecting")
            yield from self._live_frames(wanted) if self.live else self._file_frames(wanted)
        finally:
            self._turn("ended", self.broken)

    def status(self, now: float | None = None) -> CameraStatus:
        """Return how it does at `now` (monotonic): the watchdog, which no decoder can block.

        `drops` are those of the camera itself.
        """
        now = time.monotonic() if now is None else now
        with self._lock:
            state, detail = self._told or ("connecting", "")
            moment = self._moment
            age = now - self._decoded_at[-1] if self._decoded_at else None
            recent = [at for at in self._decoded_at if at > now - FPS_WINDOW_S]
        if self.live and state == "live" and age is not None and age > STALL_S:
            state, detail = "stalled", NO_PICTURE
        drops = {"undecodable": self._undecodable} if self._undecodable else {}
        return CameraStatus(self.name, state, _rate(recent), age, drops, detail, moment)

    def _live_frames(self, wanted: Callable[[float], bool]) -> Iterator[Frame]:
        failures = 0
        while not self._stop.is_set():
            try:
                for frame in self._connection(wanted):
                    failures = 0
                    yield frame
                problem: tuple[CameraState, str] = "lost", "the camera closed the connection"
            except _Stalled:
                problem = "stalled", NO_PICTURE
            except (av.error.FFmpegError, CameraError) as error:
                problem = "lost", _reason(error)
            if not self._stop.is_set():
                self._turn(*problem)
                self._stop.wait(_wait_s(failures))
                failures += 1

    def _connection(self, wanted: Callable[[float], bool]) -> Iterator[Frame]:
        with self._open() as container:
            try:
                yield from self._read(_Reading(container, self._file), wanted)
            except (av.error.ExitError, av.error.TimeoutError):
                raise _Stalled from None

    def _file_frames(self, wanted: Callable[[float], bool]) -> Iterator[Frame]:
        try:
            with self._open() as container:
                reading = _Reading(container, self._file)
                yield from self._read(reading, wanted)
                self.broken = "" if self._stop.is_set() else reading.fault()
        except (av.error.FFmpegError, CameraError) as error:
            self.broken = _reason(error)

    def _open(self) -> InputContainer:
        # names in the metadata of old files are not always UTF-8
        if self._file:
            return av.open(f"file:{self._file}", metadata_errors="replace")
        options = {}
        if re.match("rtsps?://", self._url, re.IGNORECASE):
            options = {
                "rtsp_transport": self._transport,
                "timeout": str(int(OPEN_TIMEOUT_S * 1e6)),
                "analyzeduration": "0",
                "probesize": "32",
            }
        return av.open(self._url, options=options, timeout=(OPEN_TIMEOUT_S, READ_TIMEOUT_S), metadata_errors="replace")

    def _first(self, reading: _Reading) -> VideoFrame | None:
        deadline = time.monotonic() + STALL_S
        for shot in reading.shots():
            if shot is not None:
                return shot.picture
            if self.live and time.monotonic() > deadline:
                break
        return None

    def _read(self, reading: _Reading, wanted: Callable[[float], bool]) -> Iterator[Frame]:
        quiet_since, undecodable = time.monotonic(), self._undecodable
        for shot in reading.shots():
            if self._stop.is_set():
                return
            if shot is not None:
                if (frame := self._take(shot, wanted)) is not None:
                    yield frame
                quiet_since = time.monotonic()  # not before the yield: a slow taker is no stall
            elif self.live and time.monotonic() - quiet_since > STALL_S:
                raise _Stalled
            self._undecodable = undecodable + reading.undecodable

    def _take(self, shot: _Shot, wanted: Callable[[float], bool]) -> Frame | None:
        now = time.monotonic()
        moment = Moment(self.name, self._count, shot.pts, shot.captured_at, shot.clock)
        self._count += 1
        with self._lock:
            self._moment = moment
            self._decoded_at.append(now)
            while self._decoded_at[0] < now - FPS_WINDOW_S:
                self._decoded_at.popleft()
        self._turn("live")
        return Frame(moment, _image(shot.picture), now) if wanted(shot.pts) else None

    def _turn(self, state: CameraState, detail: str = "") -> None:
        with self._lock:
            if self._told == (state, detail):
                return
            self._told = state, detail
        level = logging.INFO
        if detail:
            level = logging.ERROR if state == "ended" else logging.WARNING  # the first is final, the second is mended
        logger.log(level, "%s: %s (%s)%s", self.name, state, self.address, detail and f": {detail}")
        self._on_status(self.status())


def redact(text: str) -> str:
    """Return the text without the secrets of the URLs in it.

    What may be a password is up to the last @ of the line, as people write them with @, / and spaces in them: rather a
    host too little than a password too much.
    """
    text = re.sub(r"(?i)([\w.%-]*(?:pass|pwd|token|secret|auth|sign|key|credential)[\w.%-]*=)[^&\s]*", r"\1***", text)
    return re.sub(r"(?<=://).*@", "***@", text)


class _Stalled(Exception):
    """Connected, but no picture comes."""


@dataclass(frozen=True, slots=True)
class _Shot:
    picture: VideoFrame
    pts: float
    captured_at: datetime
    clock: Clock


class _Reading:
    """One opened container, from its first packet to its last."""

    def __init__(self, container: InputContainer, file: Path | None) -> None:
        """`file` is None for a live camera."""
        self.container = container
        self.video = _video(container)
        self.video.codec_context.thread_count = 1  # more cost latency, and there are as many readers as cameras
        self.undecodable = 0
        """Packets that could not be decoded, since the first picture."""
        self._live = file is None
        self._zero = _recorded_from(container, file) if file else None
        self._frame_s = 1 / _frame_rate(self.video)
        self._pts: float | None = None
        self._end_s = 0.0
        self._cut = False
        self._error = ""

    def shots(self) -> Iterator[_Shot | None]:
        """Yield the pictures in order, and None after each packet that gives none."""
        try:
            for packet in self._packets():
                self._note(packet)
                yield from self._shots(packet) if packet.stream is self.video else [None]
        except av.error.FFmpegError as error:
            if self._live:
                raise
            self._error = _reason(error)
            yield from self._shots(None)

    def fault(self) -> str:
        """Say, at the end of a file, why that is not its end; empty if it is."""
        declared_s = (self.container.duration or 0) / 1e6
        declares = not DECLARES_DURATION.isdisjoint(self.container.format.name.split(","))
        if self._error:
            return f"breaks off after {self._end_s:.2f} s: {self._error}"
        if declares and declared_s - self._end_s > MISSING_S:
            return f"breaks off after {self._end_s:.2f} of {declared_s:.2f} s"
        if self._cut:
            return f"breaks off within a frame, after {self._end_s:.2f} s"
        if self.undecodable:
            return f"damaged: {self.undecodable} packets could not be decoded"
        return "" if self._pts is not None else NO_FRAME

    def _packets(self) -> Iterator[Packet[Any]]:
        # PyAV's, at the end, over a stream that was not there at the beginning: those that were are drained by then
        with suppress(IndexError):
            yield from self.container.demux()

    def _note(self, packet: Packet[Any]) -> None:
        """Keep what the packet tells of the file's end and of the camera's clock."""
        if packet.stream is self.video and packet.size:
            self._cut = packet.is_corrupt
        if packet.pts is None or packet.is_corrupt:
            return
        second = _float(packet.time_base)
        self._end_s = max(self._end_s, (packet.pts + (packet.duration or 0)) * second)
        # the parser hangs the first time after a sender report on the wrong packet
        if self._live and packet.has_sidedata("prft") and not packet.has_sidedata("rtcp_sr"):
            at = struct.unpack("<qi4x", bytes(packet.get_sidedata("prft")))[0] / 1e6
            self._zero = at - packet.pts * second if abs(at - time.time()) < CLOCK_ERROR_S else None

    def _shots(self, packet: Packet[VideoStream] | None) -> Iterator[_Shot | None]:
        pictures = self._decode(packet)
        for picture in pictures:
            yield self._shot(picture)
        if not pictures:
            yield None

    def _decode(self, packet: Packet[VideoStream] | None) -> list[VideoFrame]:
        try:
            return self.video.decode(packet)
        except av.error.FFmpegError:
            # a recording may well begin between two key frames
            self.undecodable += self._pts is not None
            return []

    def _shot(self, picture: VideoFrame) -> _Shot:
        if picture.pts is not None and picture.time_base is not None:
            self._pts = picture.pts * _float(picture.time_base)
        else:
            self._pts = 0.0 if self._pts is None else self._pts + self._frame_s
        if self._zero is None:
            return _Shot(picture, self._pts, datetime.now(UTC), "arrival")
        captured_at = datetime.fromtimestamp(self._zero + self._pts, UTC)
        return _Shot(picture, self._pts, captured_at, "rtcp" if self._live else "file")


def _file(url: str) -> Path | None:
    """Return the path it names, None of a live camera."""
    if url.startswith("file://"):
        return Path(unquote(url.removeprefix("file://")))
    return None if re.match(r"[a-zA-Z][\w.+-]*://", url) else Path(url)


def _frame_rate(video: VideoStream) -> float:
    """Return its frames in a second, 25 where nothing is known."""
    rate = video.average_rate or video.guessed_rate
    return _float(rate) if rate else 25.0


def _video(container: InputContainer) -> VideoStream:
    """Return the stream to watch. A cover of a piece of music and a drawn text are none."""
    for stream in container.streams.video:
        if stream.disposition & Disposition.attached_pic:
            continue
        if stream.codec_context is None:
            raise CameraError("its video codec is not known here")
        if stream.codec_context.name not in TEXT_CODECS:
            return stream
    raise CameraError("holds no video")


def _inspection(reading: _Reading, picture: VideoFrame, *, live: bool) -> Inspection:
    height, width = _image(picture).shape[:2]
    duration_s = None if live or reading.container.duration is None else reading.container.duration / 1e6
    codec = reading.video.codec_context.name
    return Inspection(width, height, _frame_rate(reading.video), codec, duration_s, live)


def _recorded_from(container: InputContainer, file: Path) -> float:
    """Return the wall clock (Unix) at pts 0 of a file."""
    try:
        created = datetime.fromisoformat(container.metadata.get("creation_time", ""))
    except ValueError:
        length_s = ((container.start_time or 0) + (container.duration or 0)) / 1e6
        return file.stat().st_mtime - length_s
    return (created if created.tzinfo else created.replace(tzinfo=UTC)).timestamp()


def _image(picture: VideoFrame) -> np.ndarray:
    """Return it as HWC uint8 BGR, upright: telephones write films lying, with the turn beside them."""
    image = picture.to_ndarray(format="bgr24", threads=1)
    quarters = round(picture.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, quarters)) if quarters else image


def _reason(error: av.error.FFmpegError | CameraError) -> str:
    """Say what is wrong. Never str(error) of libav's: it holds the URL."""
    if isinstance(error, CameraError):
        return str(error)
    if isinstance(error, av.error.ExitError | av.error.TimeoutError):
        return "no answer in time"
    if isinstance(error, av.error.InvalidDataError):
        return "cannot be read as video"
    return error.strerror or type(error).__name__


def _wait_s(failures: int) -> float:
    longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(failures, 10))
    return longest * random.uniform(0.5, 1)


def _rate(moments: list[float]) -> float:
    """Return how many there are in a second."""
    span = moments[-1] - moments[0] if moments else 0.0
    return (len(moments) - 1) / span if span else 0.0


def _float(ratio: Fraction) -> float:
    """Of a Fraction, or of what PyAV 19 has in its place."""
    return ratio.numerator / ratio.denominator
