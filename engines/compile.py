"""ONNX to plan: each precision tried and proven against ONNX Runtime, the best kept; and the process that does so."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import onnx

from engines.card import CardError, NetworkCard, TensorSpec, read_network
from engines.engine import Engine, EngineError
from engines.ort import OnnxEngine
from engines.parity import LEAST_DB, Parity, Sample, compare, first_apart, time_each
from engines.plan import Attempt, Bucket, Compiler, Kept, PlanStore, Record, plan_key
from engines.store import Model

logger = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
"""Told what is done, in a few words, and the share of the whole that is behind, 0 to 1."""
_MOST_KEPT = 3
"""So many times a layer that fails is left in fp32 before the next precision is tried."""
_NICENESS = 10
_PATIENCE_S = 2.0
_INT8_SLACK_DB = 3.0
"""INT8 may be so much further from fp32 than it was where the network was exported."""


@dataclass(frozen=True, slots=True)
class Request:
    """One plan that is wanted."""

    model: Model
    compiler: Compiler
    buckets: tuple[Bucket, ...]
    samples: Callable[[], Sequence[Sample]]
    """Gives what the plan is proven on, from every bucket: asked for only where it is built."""
    max_batch: int
    threads: int | None = None
    precision: str = "auto"
    """auto: the fastest that passes; or the only one to try."""

    @property
    def key(self) -> str:
        """Of the plan. Raises EngineError where the backend cannot run here."""
        compiler = self.compiler
        return plan_key(self.model, compiler.backend, compiler.facts(), self.buckets, self.precision, self.max_batch)

    def load(self, kept: Kept) -> Engine:
        """Return the engine of a plan. Raises EngineError."""
        precision = kept.record.precision
        return self.compiler.load(
            kept.plan, self.model, precision, self.buckets, threads=self.threads, max_batch=self.max_batch,
            key=kept.record.key,
        )  # fmt: skip


def make(request: Request, store: PlanStore, tell: Progress, *, given: Kept | None = None) -> Record:
    """Build the plan, or wait for the process that builds it; return its record.

    `given` is a plan that was compiled elsewhere: it is proven here as one that was built here, and kept only if it
    passes. Raises EngineError where nothing can be kept, or nothing could even be compared.
    """
    key, quick = request.key, request.compiler.quick
    with store.building(key), contextlib.nullcontext() if quick else store.alone():
        if given is None and (kept := store.find(key)):
            return kept.record  # another process has just built it
        began = time.monotonic()
        tell("ONNX Runtime, to compare with", 0.01)
        reference, samples = OnnxEngine(request.model, threads=request.threads), request.samples()
        if not samples:
            raise EngineError("there is nothing to prove its plan on: no face fits what the config allows")
        tried = _tried(request, reference, samples, tell, given)
        tell("timing", 0.95)
        reference_ms, best = _raced(tried, reference, samples)
        if best is None and not any(trial.parity for trial in tried):  # out of memory, say: no verdict on the plan
            raise EngineError(tried[-1].refused)
        record = Record(
            key=key,
            network=request.model.card.name,
            sha256=request.model.sha256,
            backend=request.compiler.backend,
            precision=best.precision if best else "",
            facts=request.compiler.facts(),
            plan_sha256=hashlib.sha256(best.plan).hexdigest() if best else "",
            built_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            build_s=round(time.monotonic() - began, 1),
            reference_ms=round(reference_ms, 3),
            raced=quick,
            attempts=tuple(trial.attempt() for trial in tried),
        )
        if given and best is None:
            return record
        return store.keep(record, best.plan if best else b"").record


@dataclass(slots=True)
class _Trial:
    """One precision, as it is tried."""

    precision: str
    keep: frozenset[str]
    plan: bytes = b""
    engine: Engine | None = None
    """Loaded, if it passed."""
    parity: Parity | None = None
    refused: str = ""
    layer: str | None = None
    """Which is to blame where it fails."""
    ms: float = 0.0

    def attempt(self) -> Attempt:
        worst = self.parity.worst if self.parity and np.isfinite(self.parity.worst) else None
        return Attempt(
            precision=self.precision, kept_fp32=tuple(sorted(self.keep)), refused=self.refused, worst=worst,
            unit=self.parity.unit if self.parity else "", cases=self.parity.cases if self.parity else 0,
            ms=None if self.refused else round(self.ms, 3),
        )  # fmt: skip


def _tried(
    request: Request, reference: Engine, samples: Sequence[Sample], tell: Progress, given: Kept | None
) -> list[_Trial]:
    """Try the precisions, the fastest first, and where a layer fails the same once more with that layer in fp32."""
    wish = given.record.precision if given else request.precision
    precisions = request.compiler.precisions(request.model) if wish == "auto" else (wish,)
    tried: list[_Trial] = []
    for number, precision in enumerate(precisions):
        keep: frozenset[str] = frozenset()
        while True:
            done = number + len(keep) / (_MOST_KEPT + 1)
            step = 0.9 / len(precisions)
            trial = _Trial(precision, keep, plan=given.plan if given else b"")
            begins = 0.05 + done * step
            tell(f"{precision}: compiling", begins)
            request.compiler.watch(partial(_tell_within, tell, precision, begins, 0.25 * step))
            engine = _compiled(trial, request)
            tell(f"{precision}: comparing", 0.05 + (done + 0.25) * step)
            _compared(trial, engine, request, reference, samples, blame=given is None)
            tried.append(trial)
            mixed = precision in request.compiler.mixes
            if trial.layer is None or trial.layer in keep or len(keep) == _MOST_KEPT or not mixed:
                break
            keep |= {trial.layer}
        if not tried[-1].refused and not request.compiler.quick:
            break
    return tried


def _tell_within(tell: Progress, precision: str, begins: float, width: float, what: str, share: float) -> None:
    tell(f"{precision}: {what}", begins + share * width)


def _compiled(trial: _Trial, request: Request) -> Engine | None:
    """Build, unless there is a plan already, and load; None where that fails."""
    compiler, model, precision = request.compiler, request.model, trial.precision
    try:
        trial.plan = trial.plan or compiler.build(
            model, precision, request.buckets, threads=request.threads, keep=trial.keep
        )
        return compiler.load(
            trial.plan, model, precision, request.buckets, threads=request.threads, max_batch=request.max_batch
        )
    except (CardError, EngineError) as exc:
        trial.refused = str(exc)
        return None


def _compared(
    trial: _Trial,
    engine: Engine | None,
    request: Request,
    reference: Engine,
    samples: Sequence[Sample],
    *,
    blame: bool,
) -> None:
    """Keep the engine if it gives what ONNX Runtime gives; else find, with `blame`, the layer that does not."""
    if engine is None:
        return
    try:
        trial.parity = compare(engine, reference, samples, least_db=least_db(request.model.card, trial.precision))
        trial.refused = trial.parity.refused
    except EngineError as exc:
        trial.refused = str(exc)
    if not trial.refused:
        trial.engine = engine
        return
    engine.close()
    trial.layer = _to_blame(request, samples[0], trial.precision, trial.keep) if blame else None
    trial.refused += f"; the first layer apart is {trial.layer}" if trial.layer else ""


def _raced(tried: Sequence[_Trial], reference: Engine, samples: Sequence[Sample]) -> tuple[float, _Trial | None]:
    """Time what passed in turn with ONNX Runtime, about a second each; return its milliseconds, and the fastest."""
    passed = [trial for trial in tried if trial.engine is not None]
    engines = [trial.engine for trial in passed if trial.engine is not None]
    reference_ms, *times = time_each([reference, *engines], samples[len(samples) // 2])
    for trial, engine, ms in zip(passed, engines, times, strict=True):
        trial.ms = ms
        engine.close()
    return reference_ms, min(passed, key=lambda trial: trial.ms, default=None)


def least_db(card: NetworkCard, precision: str) -> float:
    """Return how near to fp32 pictures must come: INT8 as near as it did where the network was exported."""
    measured = card.int8.psnr if precision == "int8" and card.int8 else None
    return LEAST_DB if measured is None else min(LEAST_DB, measured - _INT8_SLACK_DB)


def _to_blame(request: Request, sample: Sample, precision: str, keep: frozenset[str]) -> str | None:
    """Return the first layer whose value is not ONNX Runtime's, None where none can be named."""
    network = read_network(request.model.path)
    compiler, threads = request.compiler, request.threads
    with tempfile.TemporaryDirectory() as folder:
        try:
            open_model, layers = _telling_all(network, request.model, Path(folder) / "open.onnx")
            plan = compiler.build(open_model, precision, request.buckets, threads=threads, keep=keep)
            engine = compiler.load(plan, open_model, precision, request.buckets, threads=threads, max_batch=1)
            value = first_apart(engine, OnnxEngine(open_model, threads=threads), sample, [*layers])
            engine.close()
        except (EngineError, OSError) as exc:
            logger.info("%s: no layer can be named: %s", request.model.card.name, exc)
            return None
    return layers[value] if value else None


def _telling_all(network: onnx.ModelProto, model: Model, path: Path) -> tuple[Model, dict[str, str]]:
    """Write the network with every float value as an output; return it, and the layer of each value, in order."""
    inferred = onnx.shape_inference.infer_shapes(network)
    floats = {
        value.name
        for value in [*inferred.graph.value_info, *inferred.graph.output]
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    weights = {tensor.name for tensor in network.graph.initializer}
    fixed = {output for node in network.graph.node if set(node.input) <= weights for output in node.output}
    layers = {
        output: node.name or output
        for node in network.graph.node
        for output in node.output
        if output in floats and output not in fixed
    }
    known = {output.name for output in network.graph.output}
    values = {value.name: value for value in inferred.graph.value_info}
    network.graph.output.extend(values[name] for name in layers if name not in known)
    onnx.save(network, path)
    outputs = tuple(TensorSpec(name=name, layout="", shape=()) for name in layers)
    return Model(path, model.sha256, model.card.model_copy(update={"outputs": outputs})), layers


def told(record: Record) -> list[str]:
    """Return what an operator should know of a plan, a line for each precision that was tried and one for the end."""
    what = f"{record.network} on {record.backend}"
    lines = []
    for attempt in record.attempts:
        kept = f", {len(attempt.kept_fp32)} layers in fp32" if attempt.kept_fp32 else ""
        if attempt.refused:
            lines.append(f"{what} in {attempt.precision}{kept} is refused: {attempt.refused}")
        else:
            lines.append(
                f"{what} in {attempt.precision}{kept} passes: {attempt.worst:.4g} {attempt.unit} at worst of "
                f"{attempt.cases}, {attempt.ms:.1f} ms a sample, ONNX Runtime {record.reference_ms:.1f}"
            )
    if record.precision:
        slower = "" if record.pays else "; ONNX Runtime is the faster here, and runs unless engine.backend insists"
        lines.append(
            f"{what}: the plan is {record.precision}, {record.key[:12]}, made in {record.build_s:.0f} s{slower}"
        )
    else:
        lines.append(f"{what}: no plan, as no precision passed; it stays on ONNX Runtime")
    return lines


# In another process.


@dataclass(frozen=True, slots=True)
class Building:
    """How far a build is."""

    step: str
    """What is being done, such as "int8: compiling"."""
    share: float
    """Of the whole that is behind, 0 to 1."""
    eta_s: float | None
    """Seconds that are left, at the pace so far; None: too early to tell."""


class Build:
    """A plan that is being built in another process. May be asked by any thread."""

    def __init__(self, request: Request, store: PlanStore) -> None:
        """Start the process."""
        self.name, self.backend = request.model.card.name, request.compiler.backend
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._step, self._share = "starting", 0.0
        self._outcome: Record | str | None = None
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit threads that hold locks
        self._news, there = spawn.Pipe(duplex=False)
        self._process = spawn.Process(
            target=_build_apart, args=(request, store.folder, there), name=f"build {self.name}", daemon=True
        )
        self._process.start()
        there.close()
        logger.info("%s: a plan for %s is being built beside the running app", self.name, self.backend)

    def state(self) -> Building | None:
        """Return how far it is; None once it has ended."""
        with self._lock:
            self._listen()
            if self._outcome is not None:
                return None
            left = (time.monotonic() - self._began) * (1 - self._share) / self._share if self._share > 0.1 else None
            return Building(self._step, self._share, left)

    def outcome(self) -> Record | str | None:
        """Return the record once the plan is kept, or in a line why there is none; None while it is being built."""
        with self._lock:
            self._listen()
            return self._outcome

    def stop(self) -> None:
        """End the process if it still builds; what it has not kept is lost."""
        with self._lock:
            if self._process.is_alive():
                self._process.terminate()
                self._process.join(_PATIENCE_S)
                self._process.kill()
            self._process.join(_PATIENCE_S)
            self._outcome = self._outcome or "the app ended before it was built"

    def _listen(self) -> None:
        try:
            while self._outcome is None and self._news.poll():
                what, *more = self._news.recv()
                if what == "ended":
                    (self._outcome,) = more
                    for line in told(self._outcome) if isinstance(self._outcome, Record) else [self._outcome]:
                        logger.info("%s", line)
                    return
                step, self._share = more
                if step != self._step:
                    logger.info("%s: building its plan: %s, %.0f %%", self.name, step, 100 * self._share)
                self._step = step
        except EOFError:
            self._process.join(_PATIENCE_S)
            self._outcome = f"{self.name}: the process that built its plan died (exit {self._process.exitcode})"
            logger.warning("%s; it stays on the fallback", self._outcome)


def _build_apart(request: Request, folder: Path, news: Connection) -> None:
    """What the other process does: build, and send what is to be told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the app's to handle
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    threading.Thread(target=_end_with_the_app, daemon=True).start()
    try:
        ended: Record | str = make(request, PlanStore(folder), lambda what, share: news.send(("tell", what, share)))
    except (EngineError, CardError) as exc:
        ended = f"{request.model.card.name}: no plan: {exc}"
    except BrokenPipeError:  # nobody listens any more: the app has died
        return
    except OSError as exc:
        ended = f"{request.model.card.name}: no plan: {exc.strerror or exc}"
    with contextlib.suppress(OSError):
        news.send(("ended", ended))


def _end_with_the_app() -> None:
    """An app that is killed takes its builds with it, even one that compiles for minutes."""
    app = multiprocessing.parent_process()
    if app is not None:
        app.join()
        os._exit(1)
