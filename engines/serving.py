"""ServingEngine: runs on the fallback at once, and on the plan as soon as that is built and proven."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from engines.card import NetworkCard
from engines.compile import Build, Building
from engines.engine import Engine, EngineError
from engines.plan import Record

logger = logging.getLogger(__name__)


class ServingEngine:
    """An engine whose backend changes when `take_over` is called, and only then.

    It is used by one thread, as any engine; `building` and `current` may be asked by another.
    """

    def __init__(self, fallback: Engine, build: Build, load: Callable[[Record], Engine | None]) -> None:
        """`load` gives the engine of a finished plan, None where the record says that the fallback is better."""
        self.card: NetworkCard = fallback.card
        self.sha256 = fallback.sha256
        self._engine, self._load = fallback, load
        self._build: Build | None = build

    @property
    def backend(self) -> str:
        """Of the engine that ran last, or will run first."""
        return self._engine.backend

    @property
    def precision(self) -> str:
        """Of the engine that ran last, or will run first."""
        return self._engine.precision

    @property
    def plan(self) -> str:
        """Of the engine that ran last, or will run first."""
        return self._engine.plan

    @property
    def max_batch(self) -> int:
        """As the fallback's: plans are made for as much."""
        return self._engine.max_batch

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the outputs by name. Raises EngineError."""
        return self._engine.run(**inputs)

    def building(self) -> Building | None:
        """Return how far the plan is, None where none is being built."""
        build = self._build
        return build.state() if build else None

    def close(self) -> None:
        """Free the engine, and end a build that is not done."""
        if self._build:
            self._build.stop()
        self._engine.close()

    @property
    def current(self) -> Engine:
        """What runs now."""
        return self._engine

    def take_over(self) -> None:
        """Go over to the plan if it is built and proven."""
        build = self._build
        if build is None or (outcome := build.outcome()) is None:
            return
        self._build = None
        build.stop()
        if not isinstance(outcome, Record):
            return
        try:
            engine = self._load(outcome)
        except EngineError as exc:
            logger.warning("%s: its plan does not load: %s; it stays on %s", self.card.name, exc, self.backend)
            return
        if engine is not None:
            before, self._engine = self._engine, engine
            before.close()
            logger.info("%s runs on %s in %s from now on", self.card.name, engine.backend, engine.precision)
