"""One part of `tests/gpu/run`, in a process of its own: a line of JSON for each thing that it measured, or could not.

    python tests/gpu/measure.py torch-eager --network models/weights/sgen-small.onnx

Each part imports what it needs and nothing else, so that what is missing on a machine costs that part alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

Row = dict[str, Any]
Prepare = Callable[[], Callable[[], object]]
"""Makes what is run again and again."""

WARM_UP = 3
TRIES = 20
STREAMS = (1, 2, 4, 8, 16)
CLIP_WIDTH, CLIP_HEIGHT, CLIP_FRAMES, CLIP_RATE, CLIP_BITS = 1920, 1080, 250, 25, 4_000_000


@dataclass(frozen=True, slots=True)
class Options:
    """What all parts are told."""

    network: Path | None
    size: tuple[int, int]
    """Height and width of a result; a guided restorer has its own."""
    batches: tuple[int, ...]
    rounds: int
    seconds: float
    """Of each round."""
    rehearse: bool
    """Whether what can run on the CPU does so, to see that the script works; its figures mean nothing."""


class Left(Exception):
    """Why a part cannot be run here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--network", type=Path)
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    height, width = (int(side) for side in given.size.split("x"))
    batches = tuple(int(batch) for batch in given.batches.split(","))
    options = Options(given.network, (height, width), batches, given.rounds, given.seconds, given.rehearse)
    try:
        for row in PARTS[given.part](options):
            tell(row)
    except ModuleNotFoundError as exc:
        tell({"skipped": f"{exc.name} is not installed"})
    except Left as exc:
        tell({"skipped": str(exc)})


def tell(row: Row) -> None:
    print(json.dumps(row), flush=True)


# The device


def peak(options: Options) -> Iterator[Row]:
    """What the device can do: a large matrix product in each precision, and a large copy."""
    import torch

    device, wait = torch_device(options)
    side, copied = (512, 64 << 20) if options.rehearse else (8192, 4 << 30)
    for precision, dtype in torch_types(options).items():
        square = torch.randn(side, side, device=device).to(dtype)  # random: on zeros a GPU keeps a higher clock
        yield {"precision": precision, "flops": 2 * side**3 / least(partial(torch.matmul, square, square), wait)}
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield {"bandwidth": 2 * copied / least(partial(target.copy_, source), wait)}


def work(options: Options) -> Iterator[Row]:
    """What a run of the network costs, counted from its ONNX."""
    from engines.card import read_network
    from engines.roofline import count

    model, (height, width) = network_and_input(options)
    for batch in options.batches:
        shapes = {spec.name: (batch, 3, height, width) for spec in model.card.inputs}
        cost = count(read_network(model.path), shapes)
        yield {"batch": batch, "flops": cost.flops, "bytes": cost.bytes}


# Faces a second


def torch_eager(options: Options) -> Iterator[Row]:
    """PyTorch, rebuilt from the ONNX, its faces on the device."""
    import torch

    _, wait = torch_device(options)
    with torch.inference_mode():
        for precision, batch, network, faces in torch_runs(options):
            yield timed("PyTorch eager", precision, batch, partial(partial, network, *faces), wait, options)


def torch_graphs(options: Options) -> Iterator[Row]:
    """The same, captured in a CUDA graph."""
    import torch

    _, wait = torch_device(options)
    if options.rehearse:
        raise Left("CUDA graphs need a GPU: this is a rehearsal on the CPU")

    def captured(network: Callable[..., object], faces: list[Any]) -> Callable[[], object]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                network(*faces)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            network(*faces)
        replay: Callable[[], object] = graph.replay
        return replay

    with torch.inference_mode():
        for precision, batch, network, faces in torch_runs(options):
            capture = partial(captured, network, faces)
            yield timed("PyTorch with CUDA graphs", precision, batch, capture, wait, options)


def onnxruntime_cuda(options: Options) -> Iterator[Row]:
    """ONNX Runtime, fed from the host's memory."""
    from engines.engine import EngineError
    from engines.ort import OnnxEngine, cuda_offered

    if not options.rehearse and not cuda_offered():
        raise Left("this ONNX Runtime has no CUDA provider (onnxruntime-gpu has)")
    model, size = network_and_input(options)
    provider = "cpu" if options.rehearse else "cuda"
    try:
        engine = OnnxEngine(model, provider=provider, max_batch=max(options.batches))
    except EngineError as exc:
        raise Left(str(exc)) from exc
    yield from engine_rows(engine.backend, engine, size, options)


def tensorrt(options: Options) -> Iterator[Row]:
    """TensorRT, fed from the host's memory, in each precision."""
    from engines.benchmark import buckets
    from engines.engine import EngineError
    from engines.trt import TensorRtCompiler, gpu_found, tensorrt_installed

    flavour = tensorrt_installed()
    if flavour is None:
        raise Left("TensorRT is not installed: libnvinfer comes with neither torch nor ONNX Runtime")
    if flavour == "tensorrt-lean":
        raise Left("TensorRT's lean runtime builds no plans")
    if not gpu_found():
        raise Left(f"{flavour} is installed, and there is no NVIDIA GPU with a driver")
    model, size = network_and_input(options)
    compiler, tuned = TensorRtCompiler(), buckets(model.card, [size], max(options.batches))
    for precision in compiler.precisions(model):
        try:
            plan = compiler.build(model, precision, tuned)
            engine = compiler.load(plan, model, precision, tuned, max_batch=max(options.batches))
        except EngineError as exc:
            yield {"backend": flavour, "precision": precision, "skipped": first_line(exc)}
            continue
        yield from engine_rows(flavour, engine, size, options)
        engine.close()


def engine_rows(backend: str, engine: Any, size: tuple[int, int], options: Options) -> Iterator[Row]:
    """Time one of our engines, copies to the device and back included."""
    import numpy as np

    rng, names = np.random.default_rng(0), [spec.name for spec in engine.card.inputs]
    for batch in (batch for batch in options.batches if batch <= engine.max_batch):
        feed = {name: rng.uniform(-1, 1, (batch, 3, *size)).astype(np.float32) for name in names}
        run = partial(engine.run, **feed)
        yield timed(backend, engine.precision, batch, lambda run=run: run, lambda: None, options)  # type: ignore[misc]


def network_and_input(options: Options) -> tuple[Any, tuple[int, int]]:
    """Return the network and the (height, width) of an input that gives results of the size asked for."""
    from engines.benchmark import input_size
    from engines.store import Model

    assert options.network is not None, "this part wants a --network"
    model = Model.read(options.network)
    return model, input_size(model.card, options.size)


def torch_runs(options: Options) -> Iterator[tuple[str, int, Callable[..., object], list[Any]]]:
    """Give each precision and batch size with the network and its faces on the device."""
    import onnx
    import torch

    from models.eager import EagerNetwork

    assert options.network is not None, "this part wants a --network"
    device, _ = torch_device(options)
    eager = EagerNetwork(options.network)
    properties = onnx.load(str(options.network)).metadata_props
    card = next(json.loads(entry.value) for entry in properties if entry.key == "streamer.card")
    side = card.get("result_size")
    height, width = eager.input_size(*((side, side) if side else options.size))
    for precision, dtype in torch_types(options).items():
        network = eager.network.to(device, dtype).to(memory_format=torch.channels_last)
        for batch in options.batches:
            shape = (batch, 3, height, width)
            faces = [torch.rand(shape, device=device, dtype=dtype) * 2 - 1 for _ in card["inputs"]]
            yield precision, batch, network, [face.to(memory_format=torch.channels_last) for face in faces]


def torch_types(options: Options) -> dict[str, Any]:
    """Return the precisions, the most exact first, as each is made of the one before; on a CPU fp32 alone."""
    import torch

    if options.rehearse:
        return {"fp32": torch.float32}
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def torch_device(options: Options) -> tuple[str, Callable[[], object]]:
    """Return the device and what waits until it is done; no TF32, which would not be fp32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    if options.rehearse:
        torch.set_num_threads(1)
        return "cpu", lambda: None
    if not torch.cuda.is_available():
        raise Left("this PyTorch sees no GPU")
    return "cuda", torch.cuda.synchronize


# Decoding


def nvdec(options: Options) -> Iterator[Row]:
    """Frames a second of one clip, decoded by so many streams at once, each in a thread of its own."""
    import av
    from av.codec.hwaccel import HWAccel

    modes: dict[str, Callable[[], Any]] = {
        "NVDEC, frames stay on the GPU": partial(HWAccel, "cuda", allow_software_fallback=False, is_hw_owned=True),
        "NVDEC, frames come to the host": partial(HWAccel, "cuda", allow_software_fallback=False),
    }
    if options.rehearse:
        modes["software"] = lambda: None
    with TemporaryDirectory() as folder:
        clip = write_clip(Path(folder) / "clip.mp4", frames=25 if options.rehearse else CLIP_FRAMES)
        for mode, accelerated in modes.items():
            for streams in STREAMS[:2] if options.rehearse else STREAMS:
                try:
                    rate = frames_a_second(clip, accelerated, streams, options.rounds * options.seconds)
                except (av.error.FFmpegError, RuntimeError, ValueError) as exc:
                    yield {"mode": mode, "streams": streams, "skipped": f"{type(exc).__name__}: {first_line(exc)}"}
                    break
                yield {"mode": mode, "streams": streams, "rate": rate}


def frames_a_second(clip: Path, accelerated: Callable[[], Any], streams: int, seconds: float) -> float:
    """Return the frames that all streams decode in a second, once each has decoded its first."""
    ready = threading.Barrier(streams)
    with ThreadPoolExecutor(streams) as pool:
        shares = [pool.submit(decode, clip, accelerated, ready, seconds) for _ in range(streams)]
        failed = [error for share in shares if (error := share.exception())]
    for error in failed:
        if not isinstance(error, threading.BrokenBarrierError):  # that is said by those who waited for the one at fault
            raise error
    return sum(share.result() for share in shares)


def decode(clip: Path, accelerated: Callable[[], Any], ready: threading.Barrier, seconds: float) -> float:
    """Return how many frames a second one stream decodes, the clip again and again."""
    import av

    try:
        accel = accelerated()
        with av.open(str(clip), hwaccel=accel) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"  # one stream is one thread
            first = next(container.decode(stream))
            if accel is not None and not stream.codec_context.is_hwaccel:
                raise Left(f"the stream is decoded in software, to {first.format.name}")
            ready.wait(timeout=120)
            began, frames = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                container.seek(0)
                for _ in container.decode(stream):
                    frames += 1
                    if time.perf_counter() - began >= seconds:
                        break
            return frames / (time.perf_counter() - began)
    except BaseException:
        ready.abort()  # nobody shall wait for this one
        raise


def write_clip(path: Path, *, frames: int) -> Path:
    """Write a clip of H.264: a picture that moves behind some noise."""
    import av
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (CLIP_HEIGHT // 20, (CLIP_WIDTH + 8 * frames) // 20, 3), np.uint8)
    scene = cv2.resize(coarse, (CLIP_WIDTH + 8 * frames, CLIP_HEIGHT), interpolation=cv2.INTER_CUBIC)
    noise = rng.integers(0, 12, (CLIP_HEIGHT, CLIP_WIDTH, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=CLIP_RATE, options={"preset": "veryfast", "g": "50"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = CLIP_WIDTH, CLIP_HEIGHT, "yuv420p", CLIP_BITS
        for number in range(frames):
            seen = cv2.add(scene[:, 8 * number : 8 * number + CLIP_WIDTH], np.roll(noise, 7 * number, axis=0))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(seen), format="bgr24")
            frame.pts, frame.time_base = number, Fraction(1, CLIP_RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# Time


def timed(
    backend: str, precision: str, batch: int, prepare: Prepare, wait: Callable[[], object], options: Options
) -> Row:
    """Return the items a second, or why there are none: no memory for so large a batch, say."""
    row = {"backend": backend, "precision": precision, "batch": batch}
    try:
        return {**row, "rate": rate(prepare(), wait, batch, options)}
    except RuntimeError as exc:  # torch's errors, and those of engines
        return {**row, "skipped": first_line(exc)}


def rate(run: Callable[[], object], wait: Callable[[], object], batch: int, options: Options) -> float:
    """Return items a second: the median over the rounds."""
    for _ in range(WARM_UP):
        run()
    wait()
    rates = []
    for _ in range(options.rounds):
        started, runs = time.perf_counter(), 0
        while time.perf_counter() - started < options.seconds:
            run()
            wait()
            runs += 1
        rates.append(batch * runs / (time.perf_counter() - started))
    return statistics.median(rates)


def least(run: Callable[[], object], wait: Callable[[], object]) -> float:
    """Return the seconds of the fastest run."""
    taken = []
    for _ in range(TRIES):
        wait()
        started = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - started)
    return min(taken)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


PARTS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "peak": peak,
    "work": work,
    "torch-eager": torch_eager,
    "torch-graphs": torch_graphs,
    "onnxruntime-cuda": onnxruntime_cuda,
    "tensorrt": tensorrt,
    "nvdec": nvdec,
}


if __name__ == "__main__":
    main()
