"""The app's end of the wire: the ZeroMQ sockets that events leave through."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import logging
import math
import os
import re
import socket
import struct
import sys
import termios
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from streamer import types, wire

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


def is_loopback(endpoint: str) -> bool:
    """Say whether what is sent to `endpoint` stays on this machine."""
    transport, _, address = endpoint.partition("://")
    if transport != "tcp":
        return transport in ("ipc", "inproc")
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
        _check(endpoint)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = _new_socket(self._context, lossless=lossless, silent_s=silent_s)
        self._connections = _Connections(self._socket, silent_s=silent_s)
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
        """Close the sockets; subscribers have `linger_s` to take what waits for them.

        By default 30 s when lossless, else 1 s; 1 s too from when `stop` is set, even if that happens meanwhile.
        """
        if self._socket.closed:
            return
        if linger_s is None:
            linger_s = _DELIVERY_S if self._lossless and not self._stop.is_set() else _HURRIED_DELIVERY_S
        self._connections.stop_watching()
        self._socket.close(linger=round(linger_s * 1000))
        self._end_context()
        self._connections.close()

    def _send(self, parts: list[bytes]) -> bool:
        while True:
            gave_up = time.monotonic() >= self._give_up_at
            try:
                self._socket.send_multipart(parts, zmq.NOBLOCK if gave_up else 0)
            except zmq.Again:
                self._look_around()
                if gave_up:
                    return False
                if self._stop.is_set() and self._give_up_at == math.inf:
                    self._give_up_at = time.monotonic() + _PATIENCE_AFTER_STOP_S
            else:
                self._look_around(all_moved=self._lossless)  # ZeroMQ takes an event only when it has room for everybody
                return True

    def _look_around(self, *, all_moved: bool = False) -> None:
        """See who came, went, subscribed or stands still."""
        self._connections.look(all_moved=all_moved)
        while self._socket.poll(0):
            message = self._socket.recv()
            if _matches_faces(message[1:]):
                self._face_subscriptions += {b"\x01": 1, b"\x00": -1}.get(message[:1], 0)

    def _end_context(self) -> None:
        """Wait until all is delivered or the linger over. A closed socket takes no shorter one, but can be cut off."""
        ender = threading.Thread(target=self._context.term, name="publish linger")
        ender.start()
        hurry_at = math.inf
        while ender.is_alive():
            ender.join(_TRY_S)
            if self._stop.is_set():
                hurry_at = min(hurry_at, time.monotonic() + _HURRIED_DELIVERY_S)
            if time.monotonic() >= hurry_at:
                self._connections.let_all_go()


@dataclass(slots=True)
class _Connection:
    """One subscriber's connection."""

    socket: socket.socket
    """A duplicate of ZeroMQ's: its number cannot be given to another while we hold it."""
    peer: str
    unsent: int
    """Bytes in the kernel's send queue when it last moved."""
    moved_at: float


class _Connections:
    """Follows who is connected, from the socket's monitor, and cuts off those who take nothing for `silent_s`.

    ZMTP heartbeats do so only where a ping can still be sent: behind the full buffers of a frozen subscriber it waits
    with the rest.
    """

    def __init__(self, publisher: zmq.Socket[bytes], *, silent_s: float) -> None:
        self._publisher = publisher
        self._silent_s = silent_s
        self._monitor = publisher.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._by_fd: dict[int, _Connection] = {}

    def look(self, *, all_moved: bool) -> None:
        """See who came, went and stands still; with `all_moved` it is known that nobody does."""
        while self._monitor.poll(0):
            report = recv_monitor_message(self._monitor)
            self._note(report["event"], int(report["value"]))
        now = time.monotonic()
        for fd, connection in list(self._by_fd.items()):
            unsent = _unsent(connection.socket)
            if all_moved or unsent == 0 or unsent != connection.unsent:
                connection.unsent, connection.moved_at = unsent, now
            elif now - connection.moved_at >= self._silent_s:
                self._let_go(fd, f"took nothing for {self._silent_s:.0f} s")

    def let_all_go(self) -> None:
        """Cut everybody off; what waits for them is lost."""
        for fd in list(self._by_fd):
            self._let_go(fd, "did not take the last events in time")

    def stop_watching(self) -> None:
        """Close the monitor, as must be done before its socket; `let_all_go` still works."""
        self._publisher.disable_monitor()
        self._monitor.close(linger=0)

    def close(self) -> None:
        """Give the duplicates back."""
        for connection in self._by_fd.values():
            connection.socket.close()
        self._by_fd.clear()

    def _note(self, event: int, fd: int) -> None:
        gone = self._by_fd.pop(fd, None)
        if gone is not None:
            gone.socket.close()
            logger.info("subscriber %s is gone: it left, or was silent for %.0f s", gone.peer, self._silent_s)
        if event == zmq.EVENT_ACCEPTED:
            self._add(fd)

    def _add(self, fd: int) -> None:
        try:
            duplicate = socket.socket(fileno=os.dup(fd))
        except OSError:  # it was closed before we looked
            return
        self._by_fd[fd] = _Connection(duplicate, _peer(duplicate), 0, time.monotonic())
        logger.info("subscriber %s connected", self._by_fd[fd].peer)

    def _let_go(self, fd: int, why: str) -> None:
        connection = self._by_fd.pop(fd)
        logger.warning("subscriber %s %s and is let go", connection.peer, why)
        with connection.socket, contextlib.suppress(OSError):  # it may have left by itself just now
            connection.socket.shutdown(socket.SHUT_RDWR)


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


def _new_socket(context: zmq.Context[zmq.Socket[bytes]], *, lossless: bool, silent_s: float) -> zmq.Socket[bytes]:
    publisher = context.socket(zmq.XPUB)
    publisher.set(zmq.XPUB_VERBOSER, 1)  # every subscription is reported, so that they can be counted
    publisher.set(zmq.XPUB_NODROP, int(lossless))
    publisher.set(zmq.SNDHWM, _LOSSLESS_HIGH_WATER if lossless else _LIVE_HIGH_WATER)
    publisher.set(zmq.SNDTIMEO, round(_TRY_S * 1000))
    publisher.set(zmq.HEARTBEAT_IVL, round(silent_s * 1000 / 6))
    publisher.set(zmq.HEARTBEAT_TIMEOUT, round(silent_s * 1000 * 5 / 6))
    publisher.set(zmq.HEARTBEAT_TTL, round(silent_s * 1000 * 2))  # so long does a subscriber wait for a dead box
    return publisher


def _matches_faces(prefix: bytes) -> bool:
    return prefix.startswith(_FACES) or _FACES.startswith(prefix)


def _peer(connection: socket.socket) -> str:
    """Return the address of the other end, or of a local socket its process."""
    try:
        if connection.family == socket.AF_UNIX:
            size = struct.calcsize("3i")
            pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
            return f"process {pid}"
        host, port = connection.getpeername()[:2]
    except OSError:  # it has left already
        return "(unknown)"
    return f"{host}:{port}"


def _unsent(connection: socket.socket) -> int:
    """Return the number of bytes that the other end has not taken."""
    queue = fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4)
    return int.from_bytes(queue, sys.byteorder)
