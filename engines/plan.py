"""What a plan is: a network compiled for one machine, who makes it, and where it is kept.

A plan is executable code. It is loaded only out of a folder that nobody else can write to, only where everything it
depends on is as it was (its key), only if its bytes are those that were written, and only with a record which says that
it gave what ONNX Runtime gives.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnxruntime
from pydantic import BaseModel, ConfigDict, ValidationError

from engines.engine import Engine, EngineError
from engines.store import Model

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bucket:
    """A range of shapes that a plan is tuned for: the smallest, the usual and the largest shape of each input."""

    shapes: Mapping[str, tuple[Shape, Shape, Shape]]
    """By input, batch axis first, such as {"image": ((1, 3, 256, 256), (8, 3, 256, 256), (64, 3, 256, 256))}."""

    def holds(self, shapes: Mapping[str, Shape]) -> bool:
        """Say whether inputs of these shapes fall into the bucket."""
        return all(self._fits(shape, *self.shapes[name]) for name, shape in shapes.items())

    @staticmethod
    def _fits(shape: Shape, least: Shape, _: Shape, most: Shape) -> bool:
        return len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))


class Compiler(Protocol):
    """Makes and loads the plans of one backend on this machine."""

    backend: str
    """What its engines say they run on: openvino-cpu | tensorrt | tensorrt-rtx | tensorrt-lean."""
    mixes: frozenset[str]
    """Precisions beside which single layers can stay in fp32."""
    builds: bool
    """Whether it can build; else it loads what was built elsewhere."""
    quick: bool
    """Whether compiling takes seconds: all precisions are tried then and the fastest kept, else the first to pass."""

    def facts(self) -> dict[str, str]:
        """Return what a plan depends on beside the network: versions of the software, the device, its driver.

        Plans are loaded only where all of this is equal. Raises EngineError where the backend cannot run here.
        """
        ...

    def watch(self, tell: Callable[[str, float], None]) -> None:
        """Tell what the next build does, and what share of it is behind, where the backend says so."""
        ...

    def precisions(self, model: Model) -> tuple[str, ...]:
        """Return in what precisions the network can be compiled here, the fastest first; fp32 is the last."""
        ...

    def build(
        self,
        model: Model,
        precision: str,
        buckets: Sequence[Bucket],
        *,
        threads: int | None,
        keep: frozenset[str] = frozenset(),
    ) -> bytes:
        """Compile, the nodes named in `keep` in fp32. Raises EngineError with the backend's own words."""
        ...

    def load(
        self,
        plan: bytes,
        model: Model,
        precision: str,
        buckets: Sequence[Bucket],
        *,
        threads: int | None,
        max_batch: int,
        key: str = "",
    ) -> Engine:
        """Return an engine that runs what `build` made with the same buckets, and tells its key. Raises EngineError."""
        ...


class Attempt(BaseModel):
    """One precision that was tried."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    precision: str
    """Of the arithmetic."""
    kept_fp32: tuple[str, ...] = ()
    """Layers that were left in fp32."""
    refused: str = ""
    """Why it is not loaded; empty: it passed."""
    worst: float | None = None
    """The least likeness to ONNX Runtime over all samples, batch sizes and positions, in `unit`."""
    unit: str = ""
    """dB (PSNR) or cosine."""
    cases: int = 0
    """How many results were compared."""
    ms: float | None = None
    """Milliseconds for one sample alone, the median of about a second."""


class Record(BaseModel):
    """What is known of a plan, beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    key: str
    """Of the plan."""
    network: str
    """Its name."""
    sha256: str
    """Of the network's file."""
    backend: str
    """What runs the plan."""
    precision: str
    """Of the plan; empty: nothing passed, and there is none."""
    facts: dict[str, str]
    """What it depends on beside the network."""
    plan_sha256: str = ""
    """Of the plan's bytes."""
    built_at: str
    """RFC 3339, UTC."""
    build_s: float
    """Seconds that it took, with its proof."""
    reference_ms: float | None = None
    """Milliseconds of ONNX Runtime on the processor for the same sample."""
    raced: bool = False
    """Whether the plan runs on the processor too, so that ONNX Runtime may be the better."""
    attempts: tuple[Attempt, ...] = ()
    """All that were tried, in order."""

    @property
    def pays(self) -> bool:
        """Whether there is a plan, and ONNX Runtime was not the faster where both were timed on a processor."""
        chosen = self.chosen
        return chosen is not None and not (self.raced and (chosen.ms or 0.0) > (self.reference_ms or 0.0))

    @property
    def chosen(self) -> Attempt | None:
        """The attempt that became the plan."""
        return next((each for each in self.attempts if each.precision == self.precision and not each.refused), None)


@dataclass(frozen=True, slots=True)
class Kept:
    """A plan in the store, checked."""

    record: Record
    plan: bytes


def plan_key(
    model: Model, backend: str, facts: Mapping[str, str], buckets: Sequence[Bucket], wish: str, max_batch: int
) -> str:
    """Return the key of a plan: the sha256, in hex, of everything that it, its proof and its record depend on."""
    depends = {
        "onnx": model.sha256,
        "card": model.card.model_dump(mode="json"),  # it may lie beside the file
        "backend": backend,
        "facts": dict(facts),
        "buckets": [bucket.shapes for bucket in buckets],
        "precision": wish,
        "max_batch": max_batch,
        "onnxruntime": onnxruntime.__version__,  # what it is compared with
        "layout": 1,  # of this record and of what is compared: an older one is not trusted
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True, default=dict).encode()).hexdigest()


class PlanStore:
    """Plans in a private folder, one subfolder each, named by its key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: str, *, discard: bool = True) -> Kept | None:
        """Return a plan that may be loaded, or None. One that is damaged is removed, with a warning, unless `discard`
        is False."""
        place = self.folder / key
        if not place.exists():
            return None
        try:
            self._refuse_strangers()
            record = Record.model_validate_json((place / "record.json").read_bytes())
            plan = (place / "plan").read_bytes() if record.precision else b""
        except EngineError as exc:
            logger.warning("%s", exc)
            return None
        except (OSError, ValidationError, ValueError):
            self._discard(place, "its record cannot be read", discard)
            return None
        if record.key != key:
            self._discard(place, "it was made under another key", discard)
            return None
        if record.precision and (record.chosen is None or hashlib.sha256(plan).hexdigest() != record.plan_sha256):
            self._discard(place, "its bytes are not those that passed", discard)
            return None
        return Kept(record, plan)

    def keep(self, record: Record, plan: bytes) -> Kept:
        """Write a plan, whole or not at all, while `building` it. Raises EngineError, as where the disk is full."""
        new = self._unfinished(record.key)
        try:
            new.mkdir()
            _write(new / "plan", plan)
            _write(new / "record.json", record.model_dump_json(indent=1).encode())
            shutil.rmtree(self.folder / record.key, ignore_errors=True)
            new.rename(self.folder / record.key)
        except OSError as exc:
            shutil.rmtree(new, ignore_errors=True)
            raise EngineError(f"the plan cannot be kept in {self.folder}: {exc.strerror}") from exc
        return Kept(record, plan)

    @contextlib.contextmanager
    def building(self, key: str) -> Iterator[None]:
        """Hold the right to build this plan; another process waits until it is done. Raises EngineError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._refuse_strangers()
            lock = (self.folder / f".{key}.lock").open("w")
        except OSError as exc:
            raise EngineError(f"{self.folder}: {exc.strerror}") from exc
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it however the process ends
            shutil.rmtree(self._unfinished(key), ignore_errors=True)  # of a build that was killed
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the right to be the only builder: builds on one GPU would disturb each other's timing."""
        with (self.folder / ".alone.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def held(self) -> list[str]:
        """Return the keys of what lies here."""
        return sorted(path.name for path in self.folder.glob("*") if re.fullmatch("[0-9a-f]{64}", path.name))

    def records(self) -> list[Record]:
        """Return the records of all plans that may be loaded, by network and backend."""
        kept = [found.record for key in self.held() if (found := self.find(key))]
        return sorted(kept, key=lambda record: (record.network, record.backend, record.built_at))

    def remove(self, key: str) -> None:
        """Remove a plan, if it is there."""
        shutil.rmtree(self.folder / key, ignore_errors=True)

    def _unfinished(self, key: str) -> Path:
        return self.folder / f".{key}.new"

    def _refuse_strangers(self) -> None:
        """A plan is executable code: the folder must be ours. Raises EngineError, or OSError."""
        known = self.folder.stat()
        if known.st_uid != os.geteuid():
            raise EngineError(f"{self.folder} belongs to another user: plans in it are not loaded")
        if stat.S_IMODE(known.st_mode) & 0o022:
            raise EngineError(f"{self.folder} can be written to by others: plans in it are not loaded (chmod 700)")

    def _discard(self, place: Path, why: str, discard: bool) -> None:
        logger.warning("plan %s is not loaded: %s", place.name[:12], why)
        if not discard:
            return
        with contextlib.suppress(OSError), (self.folder / f".{place.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # who builds it puts a new one into its place anyway
            shutil.rmtree(place, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
