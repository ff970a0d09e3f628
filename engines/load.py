"""Chooses what runs a network: a plan that was proven on this machine, else a backend that needs none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from engines.compile import Build, Building, Request, least_db
from engines.engine import Engine, EngineError
from engines.ort import OnnxEngine, cuda_offered
from engines.ov import OpenVinoCompiler, OpenVinoEngine, openvino_installed
from engines.parity import Sample, compare
from engines.plan import Bucket, Compiler, Kept, PlanStore, Record
from engines.serving import ServingEngine
from engines.store import Model, cache_folder
from engines.trt import TensorRtCompiler, gpu_found, tensorrt_installed

Backend = Literal["auto", "onnxruntime", "openvino", "tensorrt"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plans:
    """Where plans are kept, and whether missing ones are built beside the running app."""

    store: PlanStore
    build: bool = True


@dataclass(frozen=True, slots=True)
class Proof:
    """What a network's plans are tuned for and proven on; both are asked for only where a plan is wanted."""

    buckets: Callable[[], Sequence[Bucket]]
    """The shapes that it will be run with."""
    samples: Callable[[], Sequence[Sample]]
    """Real input, from every bucket."""


def load_engine(
    model: Model,
    *,
    backend: Backend = "auto",
    precision: Precision = "auto",
    threads: int | None = None,
    max_batch: int = 64,
    plans: Plans | None = None,
    proof: Proof | None = None,
    otherwise: Backend | None = None,
) -> Engine:
    """Load a network on the best backend there is.

    With `plans` and `proof` that is a plan, for the GPU or for this processor; while it is missing it is built in
    another process, and the engine runs on ONNX Runtime. Without, it is CUDA, then OpenVINO, then ONNX Runtime on the
    CPU, or what `otherwise` names. `onnxruntime` passes OpenVINO and plans over; `openvino` insists on it. Raises
    EngineError.
    """

    def plain(wish: Backend = otherwise or backend) -> Engine:
        return _without_plan(model, "auto" if wish == "tensorrt" else wish, threads, max_batch)

    compiler = make_compiler(backend) if plans and proof else None
    if plans is None or proof is None or compiler is None:
        return plain()
    try:
        request = make_request(model, compiler, proof, precision=precision, threads=threads, max_batch=max_batch)
        kept = plans.store.find(request.key)
        if kept and (engine := _of_plan(request, kept, backend)):
            return engine
    except EngineError as exc:
        logger.warning("%s: no plan: %s", model.card.name, exc)
        return plain()
    if kept:  # nothing passed, or ONNX Runtime is the better here
        return plain("onnxruntime")
    if not plans.build or not compiler.builds:
        command = "compile" if compiler.builds else "add"
        logger.info(
            "%s has no plan for %s here, and none is built now: `streamer engines %s` brings it",
            model.card.name, compiler.backend, command,
        )  # fmt: skip
        return plain()
    # OpenVINO's plans are compared with ONNX Runtime, which serves until they are proven
    fallback = plain("onnxruntime" if compiler.quick and backend == "auto" else backend)

    def load(record: Record) -> Engine | None:
        made = plans.store.find(record.key)
        if made is None:
            raise EngineError("it is not in the store any more")
        return _of_plan(request, made, backend)

    return ServingEngine(fallback, Build(request, plans.store), load)


def default_plans() -> PlanStore:
    """Return the store of this machine's plans."""
    return PlanStore(cache_folder() / "plans")


def make_compiler(backend: Backend = "auto", *, portable: bool = False) -> Compiler | None:
    """Return what makes plans here: TensorRT where there is a GPU, else OpenVINO; None where neither is to be had."""
    if on_gpu(backend):
        return TensorRtCompiler(portable=portable, timing_cache=cache_folder() / "tensorrt.timings")
    if backend == "openvino" or (backend == "auto" and openvino_installed() and not cuda_offered()):
        return OpenVinoCompiler()
    return None


def on_gpu(backend: Backend) -> bool:
    """Say whether networks run from TensorRT plans here."""
    return backend == "tensorrt" or (backend == "auto" and tensorrt_installed() is not None and gpu_found())


def make_request(
    model: Model,
    compiler: Compiler,
    proof: Proof,
    *,
    precision: Precision = "auto",
    threads: int | None,
    max_batch: int,
) -> Request:
    """Return the request for a network's plan, in fp32 where the precision is not to be had.

    Raises EngineError where the backend cannot run here.
    """
    if precision != "auto" and precision not in compiler.precisions(model):
        logger.warning("%s cannot run in %s on %s: it runs in fp32", model.card.name, precision, compiler.backend)
        precision = "fp32"
    return Request(model, compiler, tuple(proof.buckets()), proof.samples, max_batch, threads, precision)


def prove(request: Request, kept: Kept) -> str:
    """Load a plan and compare it with ONNX Runtime; return why it must not be used, empty where it may.

    Raises EngineError where it cannot be compared.
    """
    with closing(request.load(kept)) as engine:
        reference = OnnxEngine(request.model, threads=request.threads)
        least = least_db(request.model.card, kept.record.precision)
        return compare(engine, reference, request.samples(), least_db=least).refused


def settle(engine: Engine) -> Engine:
    """Go over to a plan that is done, where one is being built; return what runs now."""
    if isinstance(engine, ServingEngine):
        engine.take_over()
    return running(engine)


def running(engine: Engine) -> Engine:
    """Return what runs now, which stays the same whatever another thread does."""
    return engine.current if isinstance(engine, ServingEngine) else engine


def building(engine: Engine) -> Building | None:
    """Return how far an engine's plan is, None where none is being built."""
    return engine.building() if isinstance(engine, ServingEngine) else None


def _of_plan(request: Request, kept: Kept, backend: Backend) -> Engine | None:
    """Return the plan's engine, None where there is none or, unless the backend is insisted on, it does not pay.

    Raises EngineError.
    """
    record = kept.record
    wanted = bool(record.precision) and (record.pays or backend != "auto" or request.precision != "auto")
    return request.load(kept) if wanted else None


_Load = Callable[[Model, int | None, int], Engine]


def _without_plan(model: Model, backend: Backend, threads: int | None, max_batch: int) -> Engine:
    *preferred, last = _choices(backend)
    for load in preferred:
        try:
            return load(model, threads, max_batch)
        except EngineError as exc:
            logger.warning("%s: %s; trying the next backend", model.card.name, exc)
    return last(model, threads, max_batch)


def _choices(backend: Backend) -> list[_Load]:
    if backend == "openvino":
        return [_openvino]
    choices: list[_Load] = [_cpu]
    if backend == "auto" and openvino_installed():
        choices.insert(0, _openvino)
    if cuda_offered():
        choices.insert(0, _cuda)
    return choices


def _cuda(model: Model, threads: int | None, max_batch: int) -> Engine:
    return OnnxEngine(model, threads=threads, provider="cuda", max_batch=max_batch)


def _openvino(model: Model, threads: int | None, max_batch: int) -> Engine:
    return OpenVinoEngine(model, threads=threads, max_batch=max_batch)


def _cpu(model: Model, threads: int | None, max_batch: int) -> Engine:
    return OnnxEngine(model, threads=threads, max_batch=max_batch)
