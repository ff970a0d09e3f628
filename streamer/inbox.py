"""Inbox: the one bounded buffer between threads, and the whole back-pressure policy."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Closed(Exception):
    """The inbox was closed: nothing more is taken in."""


class Inbox(Generic[Item]):
    """Lanes of items, taken in turn, so that a busy lane does not crowd out a quiet one.

    Where a lane has no room: with `wait` the sender waits and nothing is lost (files); otherwise the lane's oldest item
    that may be dropped gives way to the newest (live). Items put with `keep` are never dropped and never wait.
    """

    def __init__(self, *, room: int, wait: bool, total: int | None = None) -> None:
        """`room` items a lane; with `wait` also `total` over all lanes, where many short lanes would add up."""
        self._room, self._wait, self._total = room, wait, total
        self._lanes: dict[Hashable, deque[tuple[Item, bool]]] = {}
        self._turn: deque[Hashable] = deque()
        self._count = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, lane: Hashable, item: Item, *, keep: bool = False) -> Item | None:
        """Add an item; return the one that gave way to it, or None. Raises Closed once the inbox is closed."""
        with self._changed:
            while self._wait and not keep and not self._closed and self._full(lane):
                self._changed.wait()
            if self._closed:
                raise Closed
            dropped = None if self._wait or keep else self._give_way(lane)
            self._append(lane, item, keep)
            self._changed.notify_all()
            return dropped

    def take(self, limit: int) -> list[Item]:
        """Wait for one item, then return what waits, at most `limit`, in turn over the lanes; [] when all is over.

        Idle, this is a batch of one and the least latency; busy, full batches and the most throughput.
        """
        with self._changed:
            while not self._count and not self._closed:
                self._changed.wait()
            taken = [self._next() for _ in range(min(limit, self._count))]
            self._changed.notify_all()
            return taken

    def close(self) -> None:
        """End it: senders get Closed, the taker gets what is left, then []."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __len__(self) -> int:
        with self._changed:
            return self._count

    def _full(self, lane: Hashable) -> bool:
        too_many = self._total is not None and self._count >= self._total
        return too_many or len(self._lanes.get(lane, ())) >= self._room

    def _give_way(self, lane: Hashable) -> Item | None:
        waiting = self._lanes.get(lane, deque())
        loose = [index for index, (_, kept) in enumerate(waiting) if not kept]
        if len(loose) < self._room:
            return None
        dropped, _ = waiting[loose[0]]
        del waiting[loose[0]]
        self._count -= 1
        return dropped

    def _append(self, lane: Hashable, item: Item, keep: bool) -> None:
        if lane not in self._lanes:
            self._lanes[lane] = deque()
            self._turn.append(lane)
        self._lanes[lane].append((item, keep))
        self._count += 1

    def _next(self) -> Item:
        lane = self._turn.popleft()
        waiting = self._lanes[lane]
        item, _ = waiting.popleft()
        self._count -= 1
        if waiting:
            self._turn.append(lane)
        else:
            del self._lanes[lane]
        return item
