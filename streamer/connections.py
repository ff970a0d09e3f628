"""Who is connected to the publisher, and whether they are still alive."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

logger = logging.getLogger(__name__)

_SIOCOUTQNSD = 0x894B
"""Linux: bytes of a TCP send queue that are not sent yet, without those that are not acknowledged yet."""
_LAST_DATA_RECV = 52
"""Offset of tcpi_last_data_recv (u32, ms) in Linux's struct tcp_info."""
_TRY_S = 0.2


@dataclass(slots=True)
class _Connection:
    """One subscriber's connection."""

    socket: socket.socket
    """A duplicate of ZeroMQ's, so that it is not closed, and its number not given to another, before we say so."""
    peer: str
    unsent: int
    """Bytes that waited in the kernel at the last look."""
    alive_at: float
    """When the other end last took or sent something."""


class Connections:
    """Follows the connections of a bound socket, and lets go of subscribers that are silent for `silent_s`.

    ZeroMQ sends the pings, but its own heartbeat timeout will not do. A ping waits behind the events: with all buffers
    full it is never sent, so that a frozen subscriber stays for ever, and one that reads steadily but slowly answers
    too late. So silent is who neither answers nor takes anything that waits for it.
    """

    def __init__(self, bound: zmq.Socket[bytes], *, silent_s: float) -> None:
        self._bound = bound
        self._silent_s = silent_s
        self._monitor = bound.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._by_fd: dict[int, _Connection] = {}
        bound.set(zmq.HEARTBEAT_IVL, round(silent_s * 1000 / 6))
        bound.set(zmq.HEARTBEAT_TIMEOUT, 0)
        bound.set(zmq.HEARTBEAT_TTL, round(silent_s * 1000 * 2))  # so long do they wait for a publisher that is dead

    def look(self) -> None:
        """See who came, left and fell silent. To be called before something is sent, when idle queues are empty."""
        while self._monitor.poll(0):
            report = recv_monitor_message(self._monitor)
            self._note(report["event"], int(report["value"]))
        for fd, connection in list(self._by_fd.items()):
            _see_life(connection)
            if time.monotonic() - connection.alive_at >= self._silent_s:
                self._let_go(fd, f"was silent for {self._silent_s:.0f} s")

    def all_moved(self) -> None:
        """Note that whoever held something back has taken it."""
        for connection in self._by_fd.values():
            connection.alive_at = time.monotonic()

    def stop_watching(self) -> None:
        """Close the monitor, which must be done before its socket is. The connections stay open until `close`."""
        self._bound.disable_monitor()
        self._monitor.close(linger=0)

    def let_all_go(self) -> None:
        """Break all connections; what waits for them is lost."""
        for fd in list(self._by_fd):
            self._let_go(fd, "did not take the last events")

    def close(self, *, keep_waiting: Callable[[], bool]) -> None:
        """Close the connections, each when the other end has read all, or when we do not `keep_waiting`.

        Only the writing half is closed before: ZeroMQ's subscribers throw away what they have not read when they see
        that the whole connection is gone.
        """
        for connection in self._by_fd.values():
            with contextlib.suppress(OSError):  # it may have left by itself just now
                connection.socket.shutdown(socket.SHUT_WR)
        while self._by_fd and keep_waiting():
            self._close_those_that_read_all()
        self.let_all_go()

    def _note(self, event: int, fd: int) -> None:
        gone = self._by_fd.pop(fd, None)
        if gone is not None:
            gone.socket.close()
            logger.info("subscriber %s left", gone.peer)
        if event == zmq.EVENT_ACCEPTED:
            self._add(fd)

    def _add(self, fd: int) -> None:
        try:
            duplicate = socket.socket(fileno=os.dup(fd))
        except OSError:  # it was closed before we looked
            return
        duplicate.setblocking(False)
        self._by_fd[fd] = _Connection(duplicate, _peer(duplicate), 0, time.monotonic())
        logger.info("subscriber %s connected", self._by_fd[fd].peer)

    def _let_go(self, fd: int, why: str) -> None:
        connection = self._by_fd.pop(fd)
        logger.warning("subscriber %s %s and is let go", connection.peer, why)
        with connection.socket, contextlib.suppress(OSError):  # it may have left by itself just now
            connection.socket.shutdown(socket.SHUT_RDWR)

    def _close_those_that_read_all(self) -> None:
        """They close their end then, which shows as the end of what comes from them."""
        poller = select.poll()
        for connection in self._by_fd.values():
            poller.register(connection.socket, select.POLLIN)
        poller.poll(_TRY_S * 1000)
        for fd, connection in list(self._by_fd.items()):
            if _has_ended(connection.socket):
                self._by_fd.pop(fd).socket.close()


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


def _see_life(connection: _Connection) -> None:
    """Note when the other end last took or sent something.

    Over TCP its kernel takes events even while it is frozen, until it has no room; then some wait unsent here. When it
    last answered is known. A local queue holds what the other process itself has not read.
    """
    is_local = connection.socket.family == socket.AF_UNIX
    queue = fcntl.ioctl(connection.socket, termios.TIOCOUTQ if is_local else _SIOCOUTQNSD, b"\0" * 4)
    unsent = int.from_bytes(queue, sys.byteorder)
    if unsent < connection.unsent or (is_local and unsent == 0):
        connection.alive_at = time.monotonic()
    if not is_local:
        connection.alive_at = max(connection.alive_at, time.monotonic() - _heard_ago_s(connection.socket))
    connection.unsent = unsent


def _heard_ago_s(connection: socket.socket) -> float:
    """Return the seconds since the other end of a TCP connection last sent something."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_DATA_RECV + 4)
    (milliseconds,) = struct.unpack_from("I", info, _LAST_DATA_RECV)
    return float(milliseconds) / 1000


def _has_ended(connection: socket.socket) -> bool:
    """Read what came, and say whether the other end has closed."""
    try:
        return connection.recv(4096) == b""
    except BlockingIOError:
        return False
    except OSError:  # reset
        return True
