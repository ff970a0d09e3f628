"""The consumer's end of the wire: `for event in EventSubscriber("tcp://127.0.0.1:5556"): ...`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import zmq

from streamer import wire

logger = logging.getLogger(__name__)

_HIGH_WATER = 20
"""Events that wait here. Small: a full queue is read on at its half, and who reads nothing for 30 s is let go."""
_LOOK_EVERY_S = 0.5


class SubscribeError(ValueError):
    """The endpoint cannot be used; carries one line."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Events of one topic that were published and did not come."""

    topic: str
    epoch: str
    first: int
    """topic_seq of the first of them."""
    count: int


def log_gap(gap: Gap) -> None:
    """Tell the operator."""
    last = gap.first + gap.count - 1
    logger.warning("%s: %d events did not come (topic_seq %d to %d)", gap.topic, gap.count, gap.first, last)


class EventSubscriber:
    """The events of one publisher, as they come, until its system.status says ended.

    A topic is compared as a whole (`face/hall` is not `face/hall2`), but for those that end in a slash and the empty
    one, which stand for all that begin so. It reconnects by itself; what was missed meanwhile goes to `on_gap`.
    Used by one thread.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        topics: Sequence[str] = ("",),
        timeout_s: float | None = None,
        on_gap: Callable[[Gap], None] = log_gap,
    ) -> None:
        """Connect to `endpoint`, which need not be there yet. Raises SubscribeError."""
        self.epoch: str | None = None
        """The publisher's run, once an event has come."""
        self._endpoint = endpoint
        self._topics = tuple(topics)
        self._timeout_s = timeout_s
        self._on_gap = on_gap
        self._gaps = _GapFinder()
        self._ended = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set(zmq.RCVHWM, _HIGH_WATER)
        self._socket.ipv6 = "[" in endpoint
        for topic in {*self._topics, wire.SYSTEM_TOPIC}:  # the latter says when it ends
            self._socket.subscribe(topic)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise SubscribeError(f"cannot subscribe at {endpoint}: {zmq.strerror(error.errno or 0)}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[wire.WireEvent]:
        return self

    def __next__(self) -> wire.WireEvent:
        """Wait for the next event.

        Raises TimeoutError where nothing at all comes for `timeout_s`, and WireError on a message that cannot be
        read; one may go on after either.
        """
        while not self._ended:
            event = wire.decode(self._receive())
            self._follow(event.header)
            if self._is_wanted(event.topic):
                return event
        raise StopIteration

    @property
    def missed(self) -> int:
        """Events that were published while we listened and did not come."""
        return self._gaps.missed

    def close(self) -> None:
        """Disconnect."""
        self._socket.close(linger=0)
        self._context.term()

    def _receive(self) -> list[bytes]:
        ends = math.inf if self._timeout_s is None else time.monotonic() + self._timeout_s
        # In turns: a Ctrl-C that comes just before a wait begins does not interrupt it, and is seen after it.
        while not self._socket.poll(round(1000 * min(_LOOK_EVERY_S, max(ends - time.monotonic(), 0)))):
            if time.monotonic() >= ends:
                raise TimeoutError(f"nothing came from {self._endpoint} for {self._timeout_s:g} s")
        return self._socket.recv_multipart()

    def _follow(self, header: wire.Header) -> None:
        if self.epoch not in (None, header.epoch):
            logger.info("%s was started again: epoch %s after %s", header.stream, header.epoch, self.epoch)
        self.epoch = header.epoch
        gap = self._gaps.find(header.topic, header.epoch, header.topic_seq)
        if gap is not None:
            self._on_gap(gap)
        self._ended = isinstance(header, wire.SystemStatusHeader) and header.state == "ended"

    def _is_wanted(self, topic: str) -> bool:
        return any(
            topic == wanted or (topic.startswith(wanted) and wanted[-1:] in ("", "/")) for wanted in self._topics
        )


class _GapFinder:
    """Follows the numbers of each topic.

    In the epoch that we joined, a topic begins for us wherever it is when we first hear of it; in later ones at 0.
    """

    def __init__(self) -> None:
        self.missed = 0
        self._epoch: str | None = None
        self._joined_late = True
        self._next_seqs: dict[str, int] = {}

    def find(self, topic: str, epoch: str, topic_seq: int) -> Gap | None:
        """Note an event; return what is missing before it."""
        if epoch != self._epoch:
            self._joined_late = self._epoch is None
            self._epoch = epoch
            self._next_seqs.clear()
        expected = self._next_seqs.get(topic, topic_seq if self._joined_late else 0)
        self._next_seqs[topic] = topic_seq + 1
        if topic_seq <= expected:
            return None
        self.missed += topic_seq - expected
        return Gap(topic, epoch, expected, topic_seq - expected)
