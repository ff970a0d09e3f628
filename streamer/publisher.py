"""The app's end of the wire: the ZeroMQ sockets that events leave through."""

from __future__ import annotations

import logging
import math
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq

from streamer import types, wire
from streamer.connections import Connections

logger = logging.getLogger(__name__)

_FACES = b"face/"
_LIVE_HIGH_WATER = 1000
"""Events that may wait for one subscriber: a minute or more of a busy box, up to 100 MB; then it misses some."""
_LOSSLESS_HIGH_WATER = 100
"""Small, because a subscriber that lags holds the pipeline back: more waiting events would only cost memory."""
_TRY_S = 0.2
_DELIVERY_S = 30.0
_HURRIED_DELIVERY_S = 1.0
_PATIENCE_AFTER_STOP_S = 2.0


class PublishError(ValueError):
    """The endpoint cannot be used; carries one line."""


def new_epoch() -> str:
    """Return a name for this run that sorts by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}"


class EventPublisher:
    """Publishes events to whoever subscribes, and numbers them. Used by one thread once it is made.

    Lossless: a subscriber that lags holds `publish` back until it has caught up, left, or been silent for
    `silent_s`. Otherwise nothing ever does, and who lags by more than the high-water mark misses events.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        stream: str,
        epoch: str,
        lossless: bool,
        stop: threading.Event,
        image_format: wire.ImageFormat = "png",
        silent_s: float = 30.0,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Bind to `endpoint`. `stop` is set by others when the app shall end soon. Raises PublishError."""
        self.published = 0
        """Events sent so far, which is the next one's seq."""
        self._stream = stream
        self._epoch = epoch
        self._lossless = lossless
        self._stop = stop
        self._image_format = image_format
        self._clock = clock
        self._topic_seqs: defaultdict[str, int] = defaultdict(int)
        self._face_subscriptions = 0
        self._give_up_at = math.inf
        self._close_by = math.inf
        _check(endpoint)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = _new_socket(self._context, lossless=lossless)
        self._connections = Connections(self._socket, silent_s=silent_s)
        self._socket.ipv6 = "[" in endpoint
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close(linger_s=0)
            raise PublishError(f"cannot publish at {endpoint}: {zmq.strerror(error.errno or 0)}") from error
        self.endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)
        """As bound: with the port's number where `*` was asked for."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(linger_s=None if error is None else _HURRIED_DELIVERY_S)

    def name_of_identified(self, track: types.Track) -> types.EventName:
        """Return how the face.identified of a track's crop is called."""
        moment = track.moment
        event = wire.event_id(self._stream, self._epoch, moment.camera, track.id, moment.frame, "face.identified")
        return types.EventName(self._stream, self._epoch, event)

    def wait_for_subscribers(self, count: int) -> bool:
        """Wait until `count` subscriptions match faces; False when `stop` is set before."""
        self._look_around()
        if self._face_subscriptions < count:
            logger.info("waiting at %s for %d subscribers to faces", self.endpoint, count)
        while self._face_subscriptions < count and not self._stop.is_set():
            self._socket.poll(round(_TRY_S * 1000))
            self._look_around()
        return self._face_subscriptions >= count

    def publish(self, event: types.Event) -> bool:
        """Send `event`; False when it was not, because `stop` is set while a subscriber holds it back.

        Only what is sent takes a seq.
        """
        topic = wire.topic_of(event)
        parts = wire.encode(
            event,
            stream=self._stream,
            epoch=self._epoch,
            seq=self.published,
            topic_seq=self._topic_seqs[topic],
            published_at=self._clock(),
            image_format=self._image_format,
        )
        if not self._send(parts):
            return False
        self.published += 1
        self._topic_seqs[topic] += 1
        return True

    def close(self, linger_s: float | None = None) -> None:
        """Close the sockets; subscribers have `linger_s` to read what waits for them.

        By default 30 s when lossless, else 1 s; 1 s too from when `stop` is set, even if that happens meanwhile.
        """
        if self._socket.closed:
            return
        if linger_s is None:
            linger_s = _DELIVERY_S if self._lossless else _HURRIED_DELIVERY_S
        self._close_by = time.monotonic() + linger_s
        self._connections.stop_watching()
        self._socket.close(linger=round(linger_s * 1000))
        self._end_context()
        self._connections.close(keep_waiting=self._may_linger)

    def _send(self, parts: list[bytes]) -> bool:
        self._look_around()
        if self._try(parts, zmq.NOBLOCK):
            return True
        while not self._has_given_up():
            if self._try(parts):
                self._connections.all_moved()  # ZeroMQ takes an event only when it has room for everybody
                return True
            self._look_around()
        return False

    def _try(self, parts: list[bytes], flags: int = 0) -> bool:
        try:
            self._socket.send_multipart(parts, flags)
        except zmq.Again:
            return False
        return True

    def _has_given_up(self) -> bool:
        """Say whether `stop` was set so long ago that nobody may hold anything back any more."""
        if self._stop.is_set():
            self._give_up_at = min(self._give_up_at, time.monotonic() + _PATIENCE_AFTER_STOP_S)
        return time.monotonic() >= self._give_up_at

    def _look_around(self) -> None:
        """See who came, left, subscribed or fell silent."""
        self._connections.look()
        while self._socket.poll(0):
            message = self._socket.recv()
            if _matches_faces(message[1:]):
                self._face_subscriptions += {b"\x01": 1, b"\x00": -1}.get(message[:1], 0)

    def _end_context(self) -> None:
        """Wait until ZeroMQ has sent all. It takes no shorter linger any more, but its connections can be broken."""
        ender = threading.Thread(target=self._context.term, name="publish linger")
        ender.start()
        while ender.is_alive():
            ender.join(_TRY_S)
            if not self._may_linger():
                self._connections.let_all_go()

    def _may_linger(self) -> bool:
        """Say whether those who have not read all yet are still waited for."""
        if self._stop.is_set():
            self._close_by = min(self._close_by, time.monotonic() + _HURRIED_DELIVERY_S)
        return time.monotonic() < self._close_by


def _check(endpoint: str) -> None:
    """Refuse what ZeroMQ would bind elsewhere (port 99999), or take from who has it (an ipc socket in use)."""
    transport, _, address = endpoint.partition("://")
    if transport == "tcp":
        port = address.rpartition(":")[2]
        if port != "*" and not (re.fullmatch("[0-9]{1,5}", port) and int(port) < 65536):
            raise PublishError(f"cannot publish at {endpoint}: {port!r} is no port")
    elif transport == "ipc" and Path(address).is_socket() and _is_listened_to(address):
        raise PublishError(f"cannot publish at {endpoint}: Address already in use")


def _is_listened_to(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as visitor:
        return visitor.connect_ex(path) == 0


def _new_socket(context: zmq.Context[zmq.Socket[bytes]], *, lossless: bool) -> zmq.Socket[bytes]:
    publisher = context.socket(zmq.XPUB)
    publisher.set(zmq.XPUB_VERBOSER, 1)  # every subscription is reported, so that they can be counted
    publisher.set(zmq.XPUB_NODROP, int(lossless))
    publisher.set(zmq.SNDHWM, _LOSSLESS_HIGH_WATER if lossless else _LIVE_HIGH_WATER)
    publisher.set(zmq.SNDTIMEO, round(_TRY_S * 1000))
    return publisher


def _matches_faces(prefix: bytes) -> bool:
    return prefix.startswith(_FACES) or _FACES.startswith(prefix)
