"""Chooses what runs a network."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from engines.engine import Engine, EngineError
from engines.ort import OnnxEngine, cuda_offered
from engines.ov import OpenVinoEngine, openvino_installed
from engines.store import Model

Backend = Literal["auto", "onnxruntime", "openvino"]

logger = logging.getLogger(__name__)


def load_engine(model: Model, *, backend: Backend = "auto", threads: int | None = None, max_batch: int = 64) -> Engine:
    """Load a network on the best backend there is: CUDA, then OpenVINO, then ONNX Runtime on the CPU.

    `onnxruntime` passes OpenVINO over; `openvino` insists on it. Raises EngineError.
    """
    *preferred, last = _choices(backend)
    for load in preferred:
        try:
            return load(model, threads, max_batch)
        except EngineError as exc:
            logger.warning("%s: %s; trying the next backend", model.card.name, exc)
    return last(model, threads, max_batch)


_Load = Callable[[Model, int | None, int], Engine]


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
