"""OpenVINO, on CPU. The package is an optional extra: nothing is imported before an engine is made."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Literal

import numpy as np

from engines.engine import EngineError, batch_limit, checked, one_line
from engines.store import Model

if TYPE_CHECKING:
    import openvino

Precision = Literal["auto", "fp32", "bf16"]


class OpenVinoEngine:
    """Runs a network with OpenVINO."""

    backend = "openvino-cpu"

    def __init__(
        self, model: Model, *, threads: int | None = None, precision: Precision = "fp32", max_batch: int = 64
    ) -> None:
        """Compile the network; `auto` means bf16 where the processor has it.

        Raises EngineError if it cannot be compiled, or if bf16 is asked for and the processor has none: OpenVINO would
        take the hint and be three times slower.
        """
        core = _core()
        chosen = _precision(core, precision)
        self.card = model.card
        self.sha256 = model.sha256
        self.precision: str = chosen if chosen == "bf16" else model.card.precision
        self.max_batch = batch_limit(model.card, max_batch)
        self._outputs = [spec.name for spec in model.card.outputs]
        self._request: openvino.InferRequest | None = _compile(core, model, threads, chosen)

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the outputs by name. Raises EngineError."""
        if self._request is None:
            raise EngineError(f"{self.card.name}: the engine is closed")
        feed = checked(inputs, self.card)
        try:
            outputs = self._request.infer(feed, share_inputs=True)
            return {name: outputs[name] for name in self._outputs}
        except (RuntimeError, KeyError) as exc:
            raise EngineError(f"{self.card.name} failed in OpenVINO: {one_line(exc)}") from exc

    def close(self) -> None:
        """Free the compiled network; the engine cannot run after."""
        self._request = None


def openvino_installed() -> bool:
    """Say whether OpenVINO can be imported."""
    return importlib.util.find_spec("openvino") is not None


def _core() -> openvino.Core:
    if not openvino_installed():
        raise EngineError("OpenVINO is not installed: pip install 'streamer[openvino]'")
    import openvino

    return openvino.Core()


def _precision(core: openvino.Core, wish: Precision) -> Literal["fp32", "bf16"]:
    if wish == "fp32":
        return "fp32"
    if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "bf16"
    if wish == "bf16":
        raise EngineError("this processor has no bf16: ask for fp32 or auto")
    return "fp32"


def _compile(
    core: openvino.Core, model: Model, threads: int | None, precision: Literal["fp32", "bf16"]
) -> openvino.InferRequest:
    settings: dict[str, object] = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        # Pinned, the engines of two stages would sit on the same core.
        "ENABLE_CPU_PINNING": False,
    }
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        # The dynamic network, not one for each shape: within a tenth as fast, and nothing stalls at a new size.
        return core.compile_model(model.path, "CPU", settings).create_infer_request()
    except RuntimeError as exc:
        raise EngineError(f"{model.path} cannot be loaded by OpenVINO: {one_line(exc)}") from exc
