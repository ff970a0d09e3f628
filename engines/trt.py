"""TensorRT, on NVIDIA GPUs: full TensorRT 11, TensorRT-RTX, or the lean runtime that loads plans and builds none.

One code for the three; they are optional extras, and nothing of them is imported before it is used. A plan is code that
runs: load only what this installation built.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx

from engines.card import CardError, read_network
from engines.engine import EngineError, checked, one_line
from engines.half import folded, half
from engines.plan import Bucket, Shape
from engines.store import Model

Flavour = Literal["tensorrt", "tensorrt-rtx", "tensorrt-lean"]
Progress = Callable[[str, float], None]
"""Is told what TensorRT does and what share of the building is done, 0..1, from threads of TensorRT; must not raise."""

logger = logging.getLogger(__name__)

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx", "tensorrt-lean": "tensorrt_lean_bindings"}
_EXTRAS = {"tensorrt": "gpu", "tensorrt-rtx": "rtx", "tensorrt-lean": "lean"}
_MOST_SHAPES = 64
"""That an engine keeps contexts and CUDA graphs for: 7 batch sizes of 9 buckets."""


def tensorrt_installed() -> Flavour | None:
    """Return the flavour of TensorRT that can be imported, the one that serves best first, or None."""
    flavours: tuple[Flavour, ...] = get_args(Flavour)
    return next((flavour for flavour in flavours if importlib.util.find_spec(_MODULES[flavour])), None)


def gpu_found() -> bool:
    """Say whether there is an NVIDIA GPU with its driver. Without one TensorRT can crash the process."""
    try:
        return bool(ctypes.CDLL("libcuda.so.1").cuInit(0) == 0)
    except OSError:
        return False


class TensorRtCompiler:
    """Makes and loads TensorRT plans (see engines.plan.Compiler)."""

    mixes = frozenset({"fp16", "bf16"})
    quick = False

    def __init__(
        self,
        flavour: Flavour | None = None,
        *,
        portable: bool = False,
        capabilities: Sequence[str] = (),
        timing_cache: Path | None = None,
        workspace_mb: int = 4096,
        level: int = 3,
        progress: Progress | None = None,
    ) -> None:
        """Take the flavour that is installed, or the one named.

        `portable` plans run in the lean runtime, and in later versions of TensorRT 11. `capabilities`, such as 8.6, are
        of other machines' GPUs, which RTX alone can build for. `timing_cache` is a file in which full TensorRT keeps
        what it measured. `level` is how hard it searches, 0 to 5. Raises EngineError.
        """
        found = flavour or tensorrt_installed()
        if found is None:
            raise EngineError("TensorRT is not installed: pip install 'streamer[gpu]', or rtx or lean in place of gpu")
        if portable and found == "tensorrt-rtx":
            raise EngineError("the lean runtime takes no plan of TensorRT-RTX: make portable ones with full TensorRT")
        if capabilities and found != "tensorrt-rtx":
            raise EngineError("only TensorRT-RTX builds for GPUs of other machines: pip install 'streamer[rtx]'")
        self.backend: str = found
        self._flavour = found
        self._portable = portable or found == "tensorrt-lean"
        self._capabilities = tuple(capabilities)
        self._timing_cache = timing_cache if found == "tensorrt" else None
        self._workspace_mb = workspace_mb
        self._level = level
        self._progress = progress
        self.builds = found != "tensorrt-lean"

    def watch(self, tell: Progress) -> None:
        """Tell what the next build does, and what share of it is behind, 0..1; from threads of TensorRT."""
        self._progress = tell

    def facts(self) -> dict[str, str]:
        """Return what a plan depends on. A portable one: TensorRT's major version and the GPU's capability alone, so
        that another machine, with the lean runtime, finds it. Raises EngineError without a GPU, unless capabilities
        were given."""
        if not self._capabilities:
            _need_gpu()
        version = str(_library(self._flavour).__version__)
        if self._portable:
            return {"plan": "portable", "tensorrt": version.partition(".")[0], "capability": _gpu()["capability"]}
        device = {"capability": ",".join(self._capabilities)} if self._capabilities else _gpu()
        options = f"level {self._level}, workspace {self._workspace_mb} MB, no TF32"
        return {"flavour": self._flavour, "tensorrt": version, **device, "options": options}

    def precisions(self, model: Model) -> tuple[str, ...]:
        """Return fp16, bf16 and fp32; for a network that is itself not fp32 only what it is, called fp32."""
        return ("fp16", "bf16", "fp32") if model.card.precision == "fp32" else ("fp32",)

    def build(
        self,
        model: Model,
        precision: str,
        buckets: Sequence[Bucket],
        *,
        threads: int | None = None,
        keep: frozenset[str] = frozenset(),
    ) -> bytes:
        """Return the plan, with one optimisation profile for each bucket; the nodes named in `keep` stay in fp32.

        Raises EngineError with TensorRT's own words.
        """
        if self._flavour == "tensorrt-lean":
            raise EngineError(
                f"the lean runtime builds no plans: make {model.card.name}'s on a machine with full TensorRT 11 and a "
                "GPU of this kind: streamer engines compile --portable"
            )
        if not self._capabilities:
            _need_gpu()
        trt, log = _library(self._flavour), _log(self._flavour)
        log.said()
        builder = trt.Builder(log)
        builder.max_threads = threads or os.cpu_count() or 1
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, log)
        if not parser.parse(self._graph(model, precision, keep).SerializeToString()):
            raise EngineError(f"{model.card.name} in {precision} cannot be read by TensorRT: {_complaints(parser)}")
        config = self._config(builder)
        for bucket in buckets:
            self._add_profile(builder, config, bucket, model)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(
                f"{model.card.name} in {precision} cannot be built by TensorRT for {_told(buckets)}: {log.said()}"
            )
        self._keep_timings(config)
        return bytes(plan)

    def load(
        self,
        plan: bytes,
        model: Model,
        precision: str,
        buckets: Sequence[Bucket],
        *,
        threads: int | None = None,
        max_batch: int = 64,
        key: str = "",
    ) -> TensorRtEngine:
        """Return an engine that runs what `build` made with the same buckets. Raises EngineError."""
        _need_gpu()
        loaded = TensorRtEngine(
            plan, model, precision, buckets, flavour=self._flavour, portable=self._portable, max_batch=max_batch
        )
        loaded.plan = key
        return loaded

    def _graph(self, model: Model, precision: str, keep: Collection[str]) -> onnx.ModelProto:
        try:
            network = read_network(model.path)
        except CardError as exc:
            raise EngineError(str(exc)) from exc
        if precision == "fp32":
            return folded(network)
        if precision == "fp16":
            return half(network, "fp16", keep)
        if precision != "bf16":
            raise EngineError(f"TensorRT computes in fp16, bf16 or fp32, not in {precision}")
        # RTX 1.7 refuses a deconvolution in bf16: "Could not infer output types for operation".
        rtx = self._flavour == "tensorrt-rtx"
        deconvolutions = {node.name or node.output[0] for node in network.graph.node if node.op_type == "ConvTranspose"}
        return half(network, "bf16", {*keep, *deconvolutions} if rtx else keep)

    def _config(self, builder: Any) -> Any:
        trt = _library(self._flavour)
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self._workspace_mb << 20)
        config.builder_optimization_level = self._level
        config.clear_flag(trt.BuilderFlag.TF32)  # it would not be fp32
        if self._portable:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if self._capabilities:
            config.num_compute_capabilities = len(self._capabilities)
        for index, capability in enumerate(self._capabilities):
            known = trt.ComputeCapability.__members__.get(f"SM{capability.replace('.', '')}")
            if known is None or not config.set_compute_capability(known, index):
                raise EngineError(f"TensorRT-RTX builds for no GPU of compute capability {capability}")
        if self._progress:
            config.progress_monitor = _monitor(trt, self._progress)
        if self._timing_cache:
            self._use_timings(config, self._timing_cache)
        return config

    def _use_timings(self, config: Any, path: Path) -> None:
        try:
            known = path.read_bytes()
        except OSError:
            known = b""
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)

    def _keep_timings(self, config: Any) -> None:
        if self._timing_cache:
            partial = self._timing_cache.with_name(f"{self._timing_cache.name}.{os.getpid()}")
            try:
                partial.write_bytes(bytes(config.get_timing_cache().serialize()))
                partial.replace(self._timing_cache)
            except OSError as exc:
                logger.warning("%s: TensorRT's timings are not kept: %s", self._timing_cache, exc.strerror)

    def _add_profile(self, builder: Any, config: Any, bucket: Bucket, model: Model) -> None:
        profile = builder.create_optimization_profile()
        wrong = f"{model.card.name}: TensorRT takes no profile of {_told([bucket])}"
        try:
            for name, (low, usual, high) in bucket.shapes.items():
                profile.set_shape(name, low, usual, high)
        except (ValueError, TypeError) as exc:
            raise EngineError(f"{wrong}: {one_line(exc)}") from exc
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"{wrong}: {_log(self._flavour).said()}")


@dataclass(frozen=True, slots=True)
class _Buffer:
    """The memory of one input or output, as large as it ever is."""

    device: int
    host: int
    """Pinned: only from such memory a copy runs beside other work."""
    dtype: np.dtype[Any]

    def view(self, shape: Shape) -> np.ndarray:
        """Return the beginning of the host's memory as an array."""
        size = int(np.prod(shape)) * self.dtype.itemsize
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.host))
        return memory.view(self.dtype).reshape(shape)


class TensorRtEngine:
    """Runs a plan. Everything is on one stream of its own: host to device, the network, device to host.

    A batch is padded up to 1, 2, 4 ... 64. Each set of padded shapes has a context of its own, as a CUDA graph must not
    outlive a change of the context that it was captured from; all contexts share one working memory.
    """

    def __init__(
        self,
        plan: bytes,
        model: Model,
        precision: str,
        buckets: Sequence[Bucket],
        *,
        flavour: Flavour,
        portable: bool,
        max_batch: int,
    ) -> None:
        """Load the plan and take the memory for the largest shapes. Raises EngineError."""
        self.card = model.card
        self.sha256 = model.sha256
        self.backend: str = flavour
        self.precision: str = model.card.precision if precision == "fp32" else precision
        self.plan = ""
        self._buckets = tuple(buckets)
        self.max_batch = min(max_batch, max(high[0] for bucket in buckets for _, _, high in bucket.shapes.values()))
        self._trt, self._log = _library(flavour), _log(flavour)
        self._ready: OrderedDict[tuple[int, tuple[Shape, ...]], _Ready] = OrderedDict()
        self._buffers: dict[str, _Buffer] = {}
        cuda = _cuda()
        with ExitStack() as held:
            self._stream = _call(cuda.cudaStreamCreateWithFlags, cuda.cudaStreamNonBlocking)
            held.callback(_call, cuda.cudaStreamDestroy, self._stream)
            self._engine = self._deserialized(plan, portable)
            self._settings = self._runtime_settings(flavour)
            self._take_memory(held)
            held.callback(self._forget)  # first of all, as contexts use the memory
            self._held = held.pop_all()

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the outputs by name; they stay as they are when the engine runs again. Raises EngineError."""
        if self._engine is None:
            raise EngineError(f"{self.card.name}: the engine is closed")
        cuda, kind = _cuda(), _cuda().cudaMemcpyKind
        feed = checked(inputs, self.card)
        n, ready = self._ready_for({name: value.shape for name, value in feed.items()})
        for name, value in feed.items():
            buffer, shape = self._buffers[name], ready.shapes[name]
            padded = buffer.view(shape)
            padded[:n], padded[n:] = value, 0
            _call(
                cuda.cudaMemcpyAsync,
                buffer.device,
                buffer.host,
                padded.nbytes,
                kind.cudaMemcpyHostToDevice,
                self._stream,
            )
        ready.enqueue()
        outputs = {spec.name: self._buffers[spec.name].view(ready.shapes[spec.name]) for spec in self.card.outputs}
        for name, value in outputs.items():
            buffer = self._buffers[name]
            _call(
                cuda.cudaMemcpyAsync,
                buffer.host,
                buffer.device,
                value.nbytes,
                kind.cudaMemcpyDeviceToHost,
                self._stream,
            )
        _call(cuda.cudaStreamSynchronize, self._stream)
        return {name: value.copy() if len(value) == n else value[:n].copy() for name, value in outputs.items()}

    def close(self) -> None:
        """Free the plan, its contexts and graphs, all memory and the stream; the engine cannot run after."""
        self._held.close()

    def _deserialized(self, plan: bytes, portable: bool) -> Any:
        self._log.said()
        runtime = self._trt.Runtime(self._log)
        runtime.engine_host_code_allowed = portable  # such a plan carries its runtime with it
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(f"{self.card.name}: TensorRT cannot load the plan: {self._log.said()}")
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        wanted = {spec.name for spec in (*self.card.inputs, *self.card.outputs)}
        if not wanted <= names or engine.num_optimization_profiles != len(self._buckets):
            raise EngineError(f"{self.card.name}: the plan is of another network, or for other sizes")
        return engine

    def _runtime_settings(self, flavour: Flavour) -> Any:
        trt = self._trt
        settings = self._engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if flavour == "tensorrt-rtx":
            # It compiles kernels while it runs: the contexts share them, and it alone knows when a graph is worth it.
            settings.set_runtime_cache(settings.create_runtime_cache())
            settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._capture = flavour != "tensorrt-rtx"
        return settings

    def _take_memory(self, held: ExitStack) -> None:
        cuda, engine = _cuda(), self._engine
        largest = [self._context(index, self._largest(bucket))[1] for index, bucket in enumerate(self._buckets)]
        for name in largest[0]:
            dtype = np.dtype(self._trt.nptype(engine.get_tensor_dtype(name)))
            size = max(int(np.prod(shapes[name])) for shapes in largest) * dtype.itemsize
            device = _call(cuda.cudaMalloc, size)
            held.callback(_call, cuda.cudaFree, device)
            host = _call(cuda.cudaMallocHost, size)
            held.callback(_call, cuda.cudaFreeHost, host)
            self._buffers[name] = _Buffer(device, host, dtype)
        sizes = (engine.get_device_memory_size_for_profile_v2(index) for index in range(len(self._buckets)))
        self._scratch_size = max(1, *sizes)
        self._scratch = _call(cuda.cudaMalloc, self._scratch_size)
        held.callback(_call, cuda.cudaFree, self._scratch)

    def _largest(self, bucket: Bucket) -> dict[str, Shape]:
        return {
            name: (max(low[0], min(high[0], self.max_batch)), *high[1:])
            for name, (low, _, high) in bucket.shapes.items()
        }

    def _context(self, profile: int, inputs: Mapping[str, Shape]) -> tuple[Any, dict[str, Shape]]:
        """Return a new context for inputs of these shapes, and the shapes of all inputs and outputs."""
        context = self._engine.create_execution_context(self._settings)
        try:
            fits = (
                context is not None
                and context.set_optimization_profile_async(profile, int(self._stream))
                and all(context.set_input_shape(name, shape) for name, shape in inputs.items())
                and not context.infer_shapes()
            )
        except RuntimeError as exc:
            raise EngineError(f"{self.card.name} in TensorRT: {one_line(exc)}") from exc
        if not fits:
            raise EngineError(f"{self.card.name}: TensorRT takes no inputs of {_shapes(inputs)}: {self._log.said()}")
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        shapes = {name: tuple(context.get_tensor_shape(name)) for name in names}
        if unknown := [name for name, shape in shapes.items() if min(shape, default=0) < 0]:
            raise EngineError(f"{self.card.name}: the size of {', '.join(unknown)} depends on what is in the inputs")
        return context, shapes

    def _ready_for(self, given: Mapping[str, Shape]) -> tuple[int, _Ready]:
        """Return how many items are given, and what runs a batch as large or larger."""
        batches = {shape[0] for shape in given.values()}
        n = max(batches)
        if len(batches) > 1 or n > self.max_batch:
            raise EngineError(
                f"{self.card.name} takes up to {self.max_batch} items of each input, not {_shapes(given)}"
            )
        index = next((index for index, bucket in enumerate(self._buckets) if bucket.holds(given)), None)
        if index is None:
            raise EngineError(
                f"{self.card.name}: {_shapes(given)} is in none of the plan's sizes: {_told(self._buckets)}"
            )
        low, _, high = next(iter(self._buckets[index].shapes.values()))
        batch = padded_batch(n, low[0], min(high[0], self.max_batch))
        inputs = {name: (batch, *shape[1:]) for name, shape in given.items()}
        key = (index, tuple(inputs.values()))
        if key not in self._ready:
            if len(self._ready) == _MOST_SHAPES:
                self._ready.popitem(last=False)[1].close()
            self._ready[key] = self._made_ready(index, inputs)
        self._ready.move_to_end(key)
        return n, self._ready[key]

    def _made_ready(self, profile: int, inputs: Mapping[str, Shape]) -> _Ready:
        context, shapes = self._context(profile, inputs)
        context.set_device_memory(self._scratch, self._scratch_size)
        for name, buffer in self._buffers.items():
            if not context.set_tensor_address(name, buffer.device):
                raise EngineError(f"{self.card.name}: TensorRT takes no memory for {name}: {self._log.said()}")
        return _Ready(self.card.name, context, shapes, self._stream, self._log, capture=self._capture)

    def _forget(self) -> None:
        for ready in self._ready.values():
            ready.close()
        self._ready.clear()
        self._settings = self._engine = None


class _Ready:
    """A context for one set of shapes, and from the second run on the CUDA graph of what it enqueues."""

    def __init__(
        self, name: str, context: Any, shapes: dict[str, Shape], stream: Any, log: Any, *, capture: bool
    ) -> None:
        self.shapes = shapes
        """Of the inputs and outputs."""
        self._name = name
        self._context: Any = context
        self._stream = stream
        self._log = log
        self._capture = capture
        self._has_run = False
        self._graph: Any = None

    def enqueue(self) -> None:
        """Put the network on the stream. Raises EngineError."""
        # The first run of new shapes does what must not be in a graph.
        if self._capture and self._has_run and self._graph is None:
            self._graph = self._captured()
        if self._graph is not None:
            _call(_cuda().cudaGraphLaunch, self._graph, self._stream)
        elif not self._context.execute_async_v3(int(self._stream)):
            raise EngineError(f"{self._name} failed in TensorRT: {self._log.said()}")
        self._has_run = True

    def close(self) -> None:
        """Free the graph and the context."""
        if self._graph is not None:
            _call(_cuda().cudaGraphExecDestroy, self._graph)
        self._graph = self._context = None

    def _captured(self) -> Any:
        """Return the graph; None, with a warning, for a network that cannot be captured: it runs without."""
        cuda = _cuda()
        # Thread-local: what other threads do with CUDA meanwhile is none of its business.
        _call(cuda.cudaStreamBeginCapture, self._stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        enqueued = self._context.execute_async_v3(int(self._stream))
        error, graph = cuda.cudaStreamEndCapture(self._stream)
        made = None
        if error == cuda.cudaError_t.cudaSuccess:
            if enqueued:
                error, made = cuda.cudaGraphInstantiate(graph, 0)
            _call(cuda.cudaGraphDestroy, graph)
        if not enqueued or error != cuda.cudaError_t.cudaSuccess:
            self._capture = False
            cuda.cudaGetLastError()  # else the next check of anybody finds it
            logger.warning("%s runs without CUDA graphs: it cannot be captured: %s", self._name, self._log.said())
            return None
        return made


def padded_batch(n: int, least: int, most: int) -> int:
    """Return how large a batch n items are run in: 1, 2, 4 ..., within what the plan takes."""
    return min(max(1 << (n - 1).bit_length(), least), most)


@functools.cache
def _library(flavour: Flavour) -> Any:
    if importlib.util.find_spec(_MODULES[flavour]) is None:
        raise EngineError(f"{flavour} is not installed: pip install 'streamer[{_EXTRAS[flavour]}]'")
    return importlib.import_module(_MODULES[flavour])


def _cuda() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as exc:
        raise EngineError("TensorRT needs cuda-python: pip install 'streamer[gpu]', or rtx or lean") from exc
    return runtime


def _call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """Call a function of CUDA and return what it returns. Raises EngineError with CUDA's own words."""
    error, *results = function(*arguments)
    if error != _cuda().cudaError_t.cudaSuccess:
        words = _cuda().cudaGetErrorString(error)[1]
        raise EngineError(f"CUDA: {function.__name__} failed: {words.decode()}")
    return results[0] if results else None


def _need_gpu() -> None:
    if not gpu_found():
        raise EngineError("TensorRT finds no NVIDIA GPU with a driver here")


def _gpu() -> dict[str, str]:
    cuda = _cuda()
    device = _call(cuda.cudaGetDevice)
    properties = _call(cuda.cudaGetDeviceProperties, device)
    return {
        "gpu": properties.name.decode().rstrip("\0"),
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver() or f"CUDA {_call(cuda.cudaDriverGetVersion)}",
    }


def _driver() -> str:
    """Return the version of the kernel's driver, such as 580.95.05; empty where it does not say (WSL)."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", path.read_text()) if path.is_file() else None
    return found[0] if found else ""


@functools.cache  # TensorRT keeps the first that it is given, for all that follows
def _log(flavour: Flavour) -> Any:
    """Return TensorRT's logger: it holds the errors until they are asked for by `said`."""
    trt = _library(flavour)

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self._errors.append(message)
            else:
                logger.debug("TensorRT: %s", message)

        def said(self) -> str:
            errors, self._errors = self._errors, []
            return _words("; ".join(dict.fromkeys(errors))) or "it does not say why"

    return Log()


def _monitor(trt: Any, progress: Progress) -> Any:
    """Return what TensorRT tells of its phases, each a step of the one above."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()
            self._phases: dict[str, tuple[str | None, int, int]] = {}  # name: (the one above, steps, done)
            self._share = 0.0

        def phase_start(self, name: str, above: str | None, steps: int) -> None:
            self._tell(name, above, steps, 0)

        def step_complete(self, name: str, step: int) -> bool:
            above, steps, _ = self._phases.get(name, (None, step + 1, 0))
            self._tell(name, above, steps, step + 1)
            return True  # go on

        def phase_finish(self, name: str) -> None:
            with self._lock:
                self._phases.pop(name, None)

        def _tell(self, name: str, above: str | None, steps: int, done: int) -> None:
            with self._lock:
                self._phases[name] = (above, steps, done)
                share, at = 0.0, name
                while phase := self._phases.get(at):
                    above, steps, done = phase
                    share = min((done + share) / steps, 1.0)
                    at = above or ""
                share = self._share = max(share, self._share)  # a phase may begin again
            progress(name, share)

    return Monitor()


def _complaints(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return _words(
        "; ".join(f"{error.node_operator()} {error.node_name()}: {error.desc()}".strip(" :") for error in errors)
    )


def _words(text: str) -> str:
    """Return what TensorRT says without the places in its source."""
    without = re.sub(r"\.? In \w+ at /[^\s):]*:\d+", "", text)
    return one_line(EngineError(without))


def _told(buckets: Sequence[Bucket]) -> str:
    return ", ".join(
        " and ".join(f"{name} {_size(low)} to {_size(high)}" for name, (low, _, high) in bucket.shapes.items())
        for bucket in buckets
    ) or "no sizes"  # fmt: skip


def _shapes(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {_size(shape)}" for name, shape in shapes.items())


def _size(shape: Shape) -> str:
    return "×".join(map(str, shape))
