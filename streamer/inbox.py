"""Inbox: the one bounded buffer between threads, and the whole back-pressure policy."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Closed(Exception):
    """The inbox was closed: nothing more is taken in."""


@dataclass(frozen=True, slots=True, eq=False)  # items hold arrays, which cannot be compared
class _Waiting(Generic[Item]):
    item: Item
    number: int
    """In the order of arrival, over all lanes."""
    keep: bool


class Inbox(Generic[Item]):
    """Lanes of items, taken in turn, so that a busy lane does not crowd out a quiet one.

    Each lane has room for `room` items, all together for `total`. Where there is none, a sender that may wait does
    (files: nothing is lost); for one that may not, the lane's oldest gives way, or, where all is full, the oldest of
    any lane (live). What is put with `keep` neither waits nor gives way.
    """

    def __init__(self, *, room: int, total: int) -> None:
        self._room, self._total = room, total
        self._lanes: dict[Hashable, deque[_Waiting[Item]]] = {}
        self._turn: deque[Hashable] = deque()
        self._count = self._arrived = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, lane: Hashable, item: Item, *, wait: bool, keep: bool = False) -> Item | None:
        """Add an item; return the one that gave way to it, or None. Raises Closed once the inbox is closed."""
        with self._changed:
            while wait and not keep and not self._closed and self._is_full(lane):
                self._changed.wait()
            if self._closed:
                raise Closed
            dropped = self._give_way(lane) if not keep and self._is_full(lane) else None
            self._append(lane, _Waiting(item, self._arrived, keep))
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

    def _is_full(self, lane: Hashable) -> bool:
        return self._count >= self._total or len(self._lanes.get(lane, ())) >= self._room

    def _give_way(self, lane: Hashable) -> Item | None:
        """Remove the oldest that may go: of this lane, else of any."""
        own = self._oldest_loose(lane)
        loose = [own] if own else [each for each in map(self._oldest_loose, self._lanes) if each]
        if not loose:
            return None
        oldest, its_lane = min(loose, key=lambda each: each[0].number)
        self._lanes[its_lane].remove(oldest)
        self._count -= 1
        if not self._lanes[its_lane]:
            del self._lanes[its_lane]
            self._turn.remove(its_lane)
        return oldest.item

    def _oldest_loose(self, lane: Hashable) -> tuple[_Waiting[Item], Hashable] | None:
        return next(((each, lane) for each in self._lanes.get(lane, ()) if not each.keep), None)

    def _append(self, lane: Hashable, waiting: _Waiting[Item]) -> None:
        if lane not in self._lanes:
            self._lanes[lane] = deque()
            self._turn.append(lane)
        self._lanes[lane].append(waiting)
        self._count += 1
        self._arrived += 1

    def _next(self) -> Item:
        lane = self._turn.popleft()
        waiting = self._lanes[lane].popleft()
        self._count -= 1
        if self._lanes[lane]:
            self._turn.append(lane)
        else:
            del self._lanes[lane]
        return waiting.item
