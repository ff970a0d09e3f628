"""How fast networks run here: `python -m engines.benchmark sgen-small sisn-small`. The last line is JSON.

Every backend that is installed runs every network at each batch size in turn, round after round, so that a noisy
neighbour disturbs all of them alike; what is told are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from engines.card import CardError, NetworkCard
from engines.engine import Engine, EngineError, ModelError
from engines.ort import OnnxEngine, cuda_offered
from engines.ov import OpenVinoEngine, openvino_installed
from engines.store import Model, default_store


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="+", help="names, paths or URLs")
    parser.add_argument("--size", default="256x256", help="height x width of a result, 256x256 by default")
    parser.add_argument("--batches", default="1,8", help="batch sizes, separated by commas")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    try:
        height, width = (int(side) for side in arguments.size.split("x"))
        batches = [int(batch) for batch in arguments.batches.split(",")]
        if min(height, width, arguments.threads, arguments.rounds, *batches) < 1:
            raise ValueError
    except ValueError:
        parser.exit(2, "--size is HEIGHTxWIDTH, --batches numbers with commas; all numbers are 1 or more\n")
    try:
        models = [default_store().find(name) for name in arguments.networks]
        timings = measure(models, (height, width), batches, threads=arguments.threads, rounds=arguments.rounds)
    except (CardError, EngineError, ModelError) as exc:
        parser.exit(2, f"{exc}\n")
    print(
        f"{platform.processor() or platform.machine()}, {arguments.threads} threads, {arguments.rounds} rounds, medians"
    )
    print(table(timings))
    print(json.dumps([asdict(timing) for timing in timings]))


def measure(
    models: Sequence[Model], result: tuple[int, int], batches: Sequence[int], *, threads: int, rounds: int
) -> list[Timing]:
    """Time every engine at every batch size; `result` is (height, width) of what a restorer gives, or of the input of
    any other network. Raises EngineError."""
    engines = [(model.card, engine) for model in models for engine in _engines(model, threads, max(batches))]
    runs: list[tuple[Timing, Callable[[], object]]] = []
    for card, engine in engines:
        height, width = input_size(card, result)
        for batch in (batch for batch in batches if batch <= engine.max_batch):
            feed = {card.inputs[0].name: _noise(card, batch, height, width)}
            timing = Timing(card.name, engine.backend, engine.precision, batch, height, width, 0.0, 0.0)
            runs.append((timing, lambda engine=engine, feed=feed: engine.run(**feed)))  # type: ignore[misc]
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):
        for taken, (_, run) in zip(seconds, runs, strict=True):
            started = time.perf_counter()
            run()
            if number:  # the first round warms up
                taken.append(time.perf_counter() - started)
    for _, engine in engines:
        engine.close()
    return [_told(timing, statistics.median(taken)) for (timing, _), taken in zip(runs, seconds, strict=True)]


def input_size(card: NetworkCard, result: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of the input that gives a result of that size: padded to the network's multiple, and
    smaller by its scale for a restorer that enlarges by itself."""
    scale = min(card.scales) if card.scales and card.enlarge == "none" else 1
    height, width = (-(-side // (scale * card.size_multiple)) * card.size_multiple for side in result)
    fixed = card.inputs[0].shape[-2:]
    return tuple(f if isinstance(f, int) else s for f, s in zip(fixed, (height, width), strict=True))  # type: ignore[return-value]


def table(timings: Sequence[Timing]) -> str:
    """Return the timings as a Markdown table."""
    head = "| network | backend | precision | input | batch | a second | ms each |\n|---|---|---|---|---|---|---|"
    rows = [
        f"| {t.network} | {t.backend} | {t.precision} | {t.height}×{t.width} | {t.batch} | "
        f"{t.items_per_second:.1f} | {t.ms_per_item:.1f} |"
        for t in timings
    ]
    return "\n".join([head, *rows])


def _engines(model: Model, threads: int, max_batch: int) -> Iterator[Engine]:
    """Every engine that is installed, each in every precision that the processor has."""
    yield OnnxEngine(model, threads=threads, max_batch=max_batch)
    if cuda_offered():
        yield OnnxEngine(model, threads=threads, provider="cuda", max_batch=max_batch)
    if openvino_installed():
        yield OpenVinoEngine(model, threads=threads, max_batch=max_batch)
        best = OpenVinoEngine(model, threads=threads, precision="auto", max_batch=max_batch)
        if best.precision == "bf16":
            yield best


def _noise(card: NetworkCard, batch: int, height: int, width: int) -> np.ndarray:
    pixels = np.random.default_rng(0).uniform(0, 255, (batch, 3, height, width))
    mean, std = (np.array(each).reshape(3, 1, 1) for each in (card.mean, card.std))
    return np.asarray((pixels - mean) / std, np.float32)


def _told(timing: Timing, seconds: float) -> Timing:
    return Timing(
        timing.network, timing.backend, timing.precision, timing.batch, timing.height, timing.width,
        timing.batch / seconds, 1000 * seconds / timing.batch,
    )  # fmt: skip


if __name__ == "__main__":
    main()
