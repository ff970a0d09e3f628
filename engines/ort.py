"""ONNX Runtime, on CPU and CUDA."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Literal

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from engines.engine import EngineError, batch_limit, checked, one_line
from engines.store import Model

Provider = Literal["cpu", "cuda"]

# ONNX Runtime's exceptions share no base but Exception.
_FAILURES = (
    state.EPFail,
    state.EngineError,
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
    RuntimeError,
    ValueError,
)
_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"


class OnnxEngine:
    """Runs a network with ONNX Runtime."""

    def __init__(
        self, model: Model, *, threads: int | None = None, provider: Provider = "cpu", max_batch: int = 64
    ) -> None:
        """Load the network. Raises EngineError if it cannot be, or if CUDA is asked for and does not work."""
        self.card = model.card
        self.sha256 = model.sha256
        self.backend = f"onnxruntime-{provider}"
        self.precision: str = model.card.precision
        self.max_batch = batch_limit(model.card, max_batch)
        self.plan = ""
        self._outputs = [spec.name for spec in model.card.outputs]
        self._session: onnxruntime.InferenceSession | None = _load(model, threads, provider)

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the outputs by name. Raises EngineError."""
        if self._session is None:
            raise EngineError(f"{self.card.name}: the engine is closed")
        feed = checked(inputs, self.card)
        try:
            outputs = self._session.run(self._outputs, feed)
        except _FAILURES as exc:
            raise EngineError(f"{self.card.name} failed in ONNX Runtime: {one_line(exc)}") from exc
        return dict(zip(self._outputs, outputs, strict=True))

    def close(self) -> None:
        """Free the session; the engine cannot run after."""
        self._session = None


def cuda_offered() -> bool:
    """Say whether this build of ONNX Runtime knows CUDA; whether it works shows when a network is loaded."""
    return _CUDA in onnxruntime.get_available_providers()


def _load(model: Model, threads: int | None, provider: Provider) -> onnxruntime.InferenceSession:
    providers = _cuda_providers() if provider == "cuda" else [_CPU]
    try:
        session = onnxruntime.InferenceSession(model.path, _options(threads), providers=providers, enable_fallback=0)
    except _FAILURES as exc:
        raise EngineError(f"{model.path} cannot be loaded by ONNX Runtime: {one_line(exc)}") from exc
    if provider == "cuda" and _CUDA not in session.get_providers():
        raise EngineError("ONNX Runtime cannot use CUDA here: is there a GPU with its driver, CUDA and cuDNN?")
    return session


def _options(threads: int | None) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    # Without a number it would pin its threads, those of every engine to the same cores.
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    options.inter_op_num_threads = 1
    # Spinning threads would take the cores from the decoders.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # What goes wrong is raised; its own log would say it twice.
    options.log_severity_level = 4
    return options


def _cuda_providers() -> list[str | tuple[str, dict[str, str]]]:
    if not cuda_offered():
        raise EngineError("this ONNX Runtime has no CUDA: install onnxruntime-gpu in the place of onnxruntime")
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it misses
        onnxruntime.preload_dlls()
    # An exhaustive search would stall on every new shape; TF32 would not be fp32.
    return [(_CUDA, {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}), _CPU]
