"""How fast networks run here: `python -m engines.benchmark --eager`. The last line is JSON.

Every backend that is installed and has its device runs every network at each size and batch size in turn, round after
round, so that a noisy neighbour disturbs all of them alike; what is told are medians over the rounds, and in a line
which backends were left out. On a GPU the copies there and back count. With --eager, PyTorch takes its
turns in a process of its own (`python -m models.eager --serve`), one face at a time, with as many threads; of its two
layouts of memory the faster is told.

How near a run comes to what the processor can do is its share of the roofline: no run is faster than its operations at
the pace of a large float32 matrix product, nor than its inputs, outputs and weights at the pace of a large copy. In
bf16 or INT8 a run may pass it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engines.card import CardError, NetworkCard, read_network
from engines.engine import Engine, EngineError, ModelError, batch_limit
from engines.ort import OnnxEngine, cuda_offered
from engines.ov import OpenVinoCompiler, openvino_installed
from engines.plan import Bucket, Compiler, Shape
from engines.roofline import Device, Work, count
from engines.store import Model, ModelStore, default_store
from engines.trt import TensorRtCompiler, gpu_found, tensorrt_installed

EAGER = "torch-eager"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timing:
    """One engine at one batch size."""

    network: str
    backend: str
    precision: str
    batch: int
    height: int
    width: int
    """Of one input, in pixels."""
    items_per_second: float
    """Median over the rounds."""
    ms_per_item: float
    """The same, turned round."""
    flops: int | None
    """Floating point operations of one run; None where they cannot be counted."""
    bytes: int | None
    """What one run must move at least; None as `flops`."""
    roofline_share: float | None
    """The least time that the processor's roofline allows, over the time taken; None off the CPU too."""
    x_eager: float | None
    """How many times as many items a second as PyTorch eager makes, one at a time; None where it took no part."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="names, paths or URLs; by default every restorer that is here")
    parser.add_argument(
        "--size", action="append", help="height x width of a result, may be given again; 256x256 by default"
    )
    parser.add_argument("--batches", default="1,8", help="batch sizes, separated by commas")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--eager", action="store_true", help="PyTorch takes part, one face at a time")
    arguments = parser.parse_args()
    try:
        sizes = [_size(size) for size in arguments.size or ["256x256"]]
        batches = [int(batch) for batch in arguments.batches.split(",")]
        if min(arguments.threads, arguments.rounds, *batches) < 1:
            raise ValueError
    except ValueError:
        parser.exit(2, "--size is HEIGHTxWIDTH, --batches numbers with commas; all numbers are 1 or more\n")
    threads, rounds = arguments.threads, arguments.rounds
    try:
        store = default_store()
        models = [store.find(name) for name in arguments.networks or restorers(store)]
        if reasons := left_out():
            logger.warning("left out: %s", "; ".join(reasons))
        device = Device.measure(threads)
        timings = measure(models, sizes, batches, threads=threads, rounds=rounds, device=device, eager=arguments.eager)
    except (CardError, EngineError, ModelError) as exc:
        parser.exit(2, f"{exc}\n")
    print(
        f"{platform.processor() or platform.machine()}, {threads} threads, {rounds} rounds, medians; roofline: "
        f"{device.peak_flops / 1e9:.0f} GFLOP/s in float32, {device.bandwidth / 1e9:.1f} GB/s"
    )
    print(table(timings))
    print(json.dumps([asdict(timing) for timing in timings]))


def restorers(store: ModelStore) -> list[str]:
    """Return the names of the restorers that are here."""
    tasks = ("restoration", "guided-restoration")
    return [listing.name for listing in store.list() if listing.task in tasks]


def left_out() -> list[str]:
    """Return which backends take no part here, each with its reason."""
    reasons = {
        "ONNX Runtime CUDA": "" if cuda_offered() else "this ONNX Runtime has no CUDA provider (onnxruntime-gpu has)",
        "OpenVINO": "" if openvino_installed() else "not installed",
        "TensorRT": _without_tensorrt(),
    }
    return [f"{backend}: {reason}" for backend, reason in reasons.items() if reason]


def measure(
    models: Sequence[Model],
    sizes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    *,
    threads: int,
    rounds: int,
    device: Device | None = None,
    eager: bool = False,
) -> list[Timing]:
    """Time every engine at every size and batch size; sizes are (height, width) of what a restorer gives, or of the
    input of any other network. Raises EngineError.

    `device` is the processor, for the share of its roofline. With `eager` PyTorch takes part where it is installed.
    """
    with ExitStack() as opened:
        eagers = _open_eager(models, threads, opened) if eager else {}
        runs: list[_Run] = []
        for model in models:
            inputs = list(dict.fromkeys(input_size(model.card, size) for size in sizes))
            engines = [opened.enter_context(closing(each)) for each in _engines(model, inputs, threads, max(batches))]
            for height, width in inputs:
                if model.path in eagers:
                    runs += _eager_runs(model, height, width, eagers[model.path])
                runs += _engine_runs(model, height, width, engines, batches)
        for number in range(rounds + 1):
            for run in runs:
                seconds = run.once()
                if number:  # the first round warms up
                    run.taken.append(seconds)
    return _timings(runs, device)


def input_size(card: NetworkCard, result: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of the input that gives a result of that size: padded to the network's multiple, and
    smaller by its scale for a restorer that enlarges by itself. A guided restorer has one size of result."""
    if card.result_size:
        result = (card.result_size, card.result_size)
    scale = min(card.scales) if card.scales and card.enlarge == "none" else 1
    height, width = (-(-side // (scale * card.size_multiple)) * card.size_multiple for side in result)
    fixed = card.inputs[0].shape[-2:]
    return tuple(f if isinstance(f, int) else s for f, s in zip(fixed, (height, width), strict=True))  # type: ignore[return-value]


def table(timings: Sequence[Timing]) -> str:
    """Return the timings as a Markdown table."""
    head = (
        "| network | backend | precision | input | batch | a second | ms each | GFLOP each | of the roofline "
        "| x eager |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    rows = [
        f"| {t.network} | {t.backend} | {t.precision} | {t.height}×{t.width} | {t.batch} | "
        f"{t.items_per_second:.1f} | {t.ms_per_item:.1f} | {_gflop_each(t)} | {_percent(t.roofline_share)} | "
        f"{_times(t.x_eager)} |"
        for t in timings
    ]
    return "\n".join([head, *rows])


def buckets(card: NetworkCard, sizes: Sequence[tuple[int, int]], max_batch: int) -> list[Bucket]:
    """Return what plans are tuned for: these sizes (height, width) of the input, each at one item up to the largest
    batch."""
    most = batch_limit(card, max_batch)
    least = most if isinstance(card.inputs[0].shape[0], int) else 1

    def shapes(height: int, width: int) -> tuple[Shape, Shape, Shape]:
        return (least, 3, height, width), (min(8, most), 3, height, width), (most, 3, height, width)

    return [Bucket({spec.name: shapes(*size) for spec in card.inputs}) for size in sizes]


def _engines(model: Model, sizes: Sequence[tuple[int, int]], threads: int, max_batch: int) -> Iterator[Engine]:
    """Every engine that is to be had, each in every precision that the device and the network's card allow."""
    yield OnnxEngine(model, threads=threads, max_batch=max_batch)
    if cuda_offered():
        cuda = partial(OnnxEngine, model, threads=threads, provider="cuda", max_batch=max_batch)
        yield from _opened(f"{model.card.name} on ONNX Runtime CUDA", cuda)
    tuned = buckets(model.card, sizes, max_batch)
    for compiler in _compilers():
        for precision in compiler.precisions(model):
            plan = partial(_of_plan, compiler, model, precision, tuned, threads, max_batch)
            yield from _opened(f"{model.card.name} on {compiler.backend} in {precision}", plan)


def _opened(what: str, opening: Callable[[], Engine]) -> Iterator[Engine]:
    """Yield the engine; where it cannot be had, say why and yield none."""
    try:
        engine = opening()
    except EngineError as exc:
        logger.warning("%s takes no part: %s", what, exc)
    else:
        yield engine


def _of_plan(
    compiler: Compiler, model: Model, precision: str, tuned: Sequence[Bucket], threads: int, max_batch: int
) -> Engine:
    plan = compiler.build(model, precision, tuned, threads=threads)
    return compiler.load(plan, model, precision, tuned, threads=threads, max_batch=max_batch)


def _compilers() -> list[Compiler]:
    found: list[Compiler] = [OpenVinoCompiler()] if openvino_installed() else []
    return found if _without_tensorrt() else [*found, TensorRtCompiler()]


def _without_tensorrt() -> str:
    """Return why TensorRT makes no plans here; empty: it does."""
    flavour = tensorrt_installed()
    if flavour is None:
        return "not installed"
    if not gpu_found():
        return f"there is no NVIDIA GPU with a driver for {flavour} here"
    return "its lean runtime builds no plans" if flavour == "tensorrt-lean" else ""


def _size(text: str) -> tuple[int, int]:
    height, width = (int(side) for side in text.split("x"))
    if min(height, width) < 1:
        raise ValueError(text)
    return height, width


@dataclass(frozen=True, slots=True)
class _Run:
    """One engine with its input, and what it took."""

    model: Model
    backend: str
    precision: str
    batch: int
    height: int
    width: int
    once: Callable[[], float]
    """Runs once and returns the seconds it took."""
    taken: list[float] = field(default_factory=list)
    """Seconds, a round each."""

    @property
    def median(self) -> float:
        return statistics.median(self.taken)

    @property
    def input(self) -> tuple[Path, int, int]:
        """What runs that may be compared have in common."""
        return self.model.path, self.height, self.width


class _Eager:
    """PyTorch in a process of its own, which answers line by line; engines never import it."""

    def __init__(self, models: Sequence[Model], root: Path, threads: int) -> None:
        paths = [str(model.path.resolve()) for model in models]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "models.eager", "--serve", "--threads", str(threads), *paths],
            cwd=root, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def problems(self) -> list[str | None]:
        """Return why each network cannot be run, None where it can; to be asked once, first."""
        problems: list[str | None] = self._answer()
        return problems

    def seconds(self, network: int, height: int, width: int, *, channels_last: bool) -> float:
        """Run a network once on one face and return how long it took. Raises EngineError."""
        asked = {"network": network, "height": height, "width": width, "channels_last": channels_last}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{json.dumps(asked)}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer tells
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        raise EngineError("PyTorch eager ended before its work was done: run `python -m models.eager` to see why")


def _open_eager(models: Sequence[Model], threads: int, opened: ExitStack) -> dict[Path, Callable[..., float]]:
    """Return, by the network's file, what runs it once in PyTorch eager; where it cannot be run, say so."""
    spec = importlib.util.find_spec("models")
    if not spec or not importlib.util.find_spec("torch"):
        logger.warning("PyTorch is not installed, so eager takes no part: pip install 'streamer[train]'")
        return {}
    root = Path((spec.submodule_search_locations or [""])[0]).parent
    child = opened.enter_context(closing(_Eager(models, root, threads)))
    found: dict[Path, Callable[..., float]] = {}
    for number, (model, problem) in enumerate(zip(models, child.problems(), strict=True)):
        if problem:
            logger.warning("%s: eager takes no part: %s", model.card.name, problem)
        else:
            found[model.path] = partial(child.seconds, number)
    return found


def _eager_runs(model: Model, height: int, width: int, seconds: Callable[..., float]) -> Iterator[_Run]:
    """Both layouts of memory take part; the faster is told."""
    for channels_last in (False, True):
        once = partial(seconds, height, width, channels_last=channels_last)
        backend = f"{EAGER}-channels-last" if channels_last else EAGER
        yield _Run(model, backend, "fp32", 1, height, width, once)


def _engine_runs(
    model: Model, height: int, width: int, engines: Sequence[Engine], batches: Sequence[int]
) -> Iterator[_Run]:
    noise = {batch: _noise(model.card, batch, height, width) for batch in batches}
    for engine in engines:
        for batch in (batch for batch in batches if batch <= engine.max_batch):
            once = partial(_seconds, engine, {spec.name: noise[batch] for spec in model.card.inputs})
            yield _Run(model, engine.backend, engine.precision, batch, height, width, once)


def _seconds(engine: Engine, feed: dict[str, np.ndarray]) -> float:
    started = time.perf_counter()
    engine.run(**feed)
    return time.perf_counter() - started


def _timings(runs: Sequence[_Run], device: Device | None) -> list[Timing]:
    eager: dict[object, _Run] = {}  # the faster of the two layouts
    for run in filter(_is_eager, runs):
        eager[run.input] = min(eager.get(run.input, run), run, key=lambda each: each.median)
    told = [run for run in runs if not _is_eager(run) or run is eager[run.input]]
    works: dict[object, Work | None] = {}
    for run in told:
        if (run.input, run.batch) not in works:
            works[run.input, run.batch] = _work(run)
    return [_timing(run, works[run.input, run.batch], device, eager.get(run.input)) for run in told]


def _timing(run: _Run, work: Work | None, device: Device | None, eager: _Run | None) -> Timing:
    on_cpu = _is_eager(run) or run.backend.endswith("-cpu")
    return Timing(
        network=run.model.card.name,
        backend=run.backend,
        precision=run.precision,
        batch=run.batch,
        height=run.height,
        width=run.width,
        items_per_second=run.batch / run.median,
        ms_per_item=1000 * run.median / run.batch,
        flops=work.flops if work else None,
        bytes=work.bytes if work else None,
        roofline_share=device.seconds(work) / run.median if device and work and on_cpu else None,
        x_eager=run.batch * eager.median / run.median if eager else None,
    )


def _is_eager(run: _Run) -> bool:
    return run.backend.startswith(EAGER)


def _work(run: _Run) -> Work | None:
    """Return what a run costs; None, and one line, where a foreign network cannot be followed."""
    shape = (run.batch, 3, run.height, run.width)
    try:
        return count(read_network(run.model.path), {spec.name: shape for spec in run.model.card.inputs})
    except EngineError as exc:
        logger.warning("%s: its operations cannot be counted: %s", run.model.card.name, exc)
        return None


def _gflop_each(timing: Timing) -> str:
    return "-" if timing.flops is None else f"{timing.flops / timing.batch / 1e9:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _times(factor: float | None) -> str:
    return "-" if factor is None else f"{factor:.2f}"


def _noise(card: NetworkCard, batch: int, height: int, width: int) -> np.ndarray:
    pixels = np.random.default_rng(0).uniform(0, 255, (batch, 3, height, width))
    mean, std = (np.array(each).reshape(3, 1, 1) for each in (card.mean, card.std))
    return np.asarray((pixels - mean) / std, np.float32)


if __name__ == "__main__":
    main()
