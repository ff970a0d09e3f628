"""OpenVINO, on CPU. The package is an optional extra: nothing is imported before an engine is made."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import onnx

from engines.card import read_network
from engines.engine import Engine, EngineError, batch_limit, checked, one_line
from engines.int8 import quantised
from engines.plan import Bucket
from engines.store import Model
from engines.unsplit import unsplit

if TYPE_CHECKING:
    import openvino

Precision = Literal["auto", "fp32", "bf16", "int8"]


class OpenVinoEngine:
    """Runs a network with OpenVINO."""

    backend = "openvino-cpu"

    def __init__(
        self,
        model: Model,
        *,
        threads: int | None = None,
        precision: Precision = "fp32",
        max_batch: int = 64,
        plan: bytes | None = None,
    ) -> None:
        """Compile the network, or load what `OpenVinoCompiler` made of it in this precision; `auto`, for what is
        compiled here, means bf16 where the processor has it.

        Raises EngineError if it cannot be compiled, or if bf16 is asked for and the processor has none: OpenVINO would
        take the hint and be three times slower.
        """
        core = _core()
        chosen = precision if plan else _precision(core, precision)
        self.card = model.card
        self.sha256 = model.sha256
        self.precision: str = model.card.precision if chosen == "fp32" else chosen
        self.max_batch = batch_limit(model.card, max_batch)
        self.plan = ""
        self._outputs = [spec.name for spec in model.card.outputs]
        try:
            compiled = _imported(core, plan, threads) if plan else _compiled(core, str(model.path), threads, chosen)
        except RuntimeError as exc:
            raise EngineError(f"{model.path} cannot be loaded by OpenVINO: {one_line(exc)}") from exc
        self._request: openvino.InferRequest | None = compiled.create_infer_request()

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


class OpenVinoCompiler:
    """Makes and loads OpenVINO's plans for this processor."""

    backend = "openvino-cpu"
    mixes = frozenset({"int8"})
    builds = True
    quick = True

    def watch(self, tell: Callable[[str, float], None]) -> None:
        """OpenVINO compiles in seconds and says nothing meanwhile."""

    def facts(self) -> dict[str, str]:
        """Return the version of OpenVINO, the processor and what it can. Raises EngineError."""
        core = _core()
        import openvino

        return {
            "openvino": openvino.__version__,
            "processor": core.get_property("CPU", "FULL_DEVICE_NAME"),
            "can": " ".join(sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))),
            "flags": " ".join(sorted(_flags())),
        }

    def precisions(self, model: Model) -> tuple[str, ...]:
        """Return int8 where the network's card has ranges for it, bf16 where the processor has it, and fp32."""
        can = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return (
            *(["int8"] if model.card.int8 and "INT8" in can else []),
            *(["bf16"] if "BF16" in can else []),
            "fp32",
        )

    def build(
        self,
        model: Model,
        precision: str,
        buckets: Sequence[Bucket],
        *,
        threads: int | None,
        keep: frozenset[str] = frozenset(),
    ) -> bytes:
        """Compile for all shapes at once: OpenVINO is within a tenth as fast as for each alone. Raises EngineError."""
        if precision not in self.precisions(model):
            raise EngineError(f"OpenVINO has no {precision} for {model.card.name} on this processor")
        network = unsplit(read_network(model.path))
        if precision == "int8":
            network = _int8(model, network, keep)
        try:
            plan: bytes = _compiled(_core(), network.SerializeToString(), threads, precision).export_model().getvalue()
        except RuntimeError as exc:
            raise EngineError(f"{model.card.name} cannot be compiled by OpenVINO: {one_line(exc)}") from exc
        return plan

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
        """Return an engine that runs the plan. Raises EngineError."""
        engine = OpenVinoEngine(
            model, threads=threads, precision=cast(Precision, precision), max_batch=max_batch, plan=plan
        )
        engine.plan = key
        return engine


def _int8(model: Model, network: onnx.ModelProto, keep: frozenset[str]) -> onnx.ModelProto:
    known = model.card.int8
    if known is None:
        raise EngineError(f"{model.card.name} has no INT8 ranges in its card")
    skipped = known.model_copy(update={"skip": (*known.skip, *sorted(keep - set(known.skip)))})
    card = model.card.model_copy(update={"int8": skipped})
    vnni = any("vnni" in flag for flag in _flags())
    return quantised(network, card, reduce_range=not vnni)


def _flags() -> set[str]:
    """Return what /proc/cpuinfo says the processor can, as far as it makes vectors."""
    try:
        known = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return {flag for flag in known.split() if flag.startswith(("avx", "amx"))}


def _precision(core: openvino.Core, wish: Precision) -> Precision:
    if wish == "fp32":
        return "fp32"
    if wish == "int8":
        raise EngineError("int8 runs from a plan: `streamer engines compile` makes it")
    if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "bf16"
    if wish == "bf16":
        raise EngineError("this processor has no bf16: ask for fp32 or auto")
    return "fp32"


def _compiled(core: openvino.Core, network: str | bytes, threads: int | None, precision: str) -> openvino.CompiledModel:
    """Compile the dynamic network, not one for each shape: within a tenth as fast, and nothing stalls at a new size."""
    hint = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
    return core.compile_model(core.read_model(network), "CPU", {**_settings(threads), **hint})


def _imported(core: openvino.Core, plan: bytes, threads: int | None) -> openvino.CompiledModel:
    return core.import_model(plan, "CPU", _settings(threads))


def _settings(threads: int | None) -> dict[str, object]:
    settings: dict[str, object] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        # Pinned, the engines of two stages would sit on the same core.
        "ENABLE_CPU_PINNING": False,
    }
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    return settings
