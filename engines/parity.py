"""Whether a compiled network gives what ONNX Runtime gives, at every batch size and at every place in the batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engines.card import NetworkCard
from engines.engine import Engine, EngineError

LEAST_DB = 40.0
"""PSNR that images, maps and points must reach."""
LEAST_COSINE = 0.999
"""What embeddings must reach."""
MOST_APART = 0.1
"""Of a detector: share of an output's span by which a single value may differ, as a face is a few values of a map."""
LARGEST_BATCH = 64
_FLAT = 1e-3
"""Of an output's span: what differs by less may become one value in fp16, as a mask that is open everywhere does."""

Sample = Mapping[str, np.ndarray]
"""One item for each input, the batch axis first and 1."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How near an engine came to ONNX Runtime."""

    worst: float
    """The least likeness found, in `unit`; -inf where something is no number or has one colour."""
    unit: str
    """dB | cosine."""
    cases: int
    """How many results were compared."""
    refused: str
    """Why the engine must not be used; empty: it may."""


def batch_sizes(most: int) -> list[int]:
    """Return 1, 2, 4 ... up to what an engine takes, 64 at most; its largest batch is among them."""
    most = min(most, LARGEST_BATCH)
    powers = [1 << n for n in range(most.bit_length()) if 1 << n < most]
    return [*powers, most]


def compare(engine: Engine, reference: Engine, samples: Sequence[Sample], *, least_db: float = LEAST_DB) -> Parity:
    """Run both on the samples: the engine in batches, the reference one by one.

    Each place in a batch is given a picture of its own, so that two that are mixed up are seen. Raises EngineError.
    """
    card = reference.card
    cosine = card.task == "embedding"
    least, unit = (LEAST_COSINE, "cosine") if cosine else (least_db, "dB")
    worst, cases = np.inf, 0
    sizes = batch_sizes(engine.max_batch)
    for group in _by_shape(samples):
        wanted: list[dict[str, np.ndarray]] = []
        for size in sizes:
            feeds = [_shifted(group[place % len(group)], place) for place in range(size)]
            wanted += [reference.run(**feed) for feed in feeds[len(wanted) :]]
            given = engine.run(**{name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]})
            for place in range(size):
                for number, spec in enumerate(card.outputs):
                    here, truth = given[spec.name], wanted[place][spec.name]
                    here = here[place : place + 1] if size > 1 else here
                    where = f"{spec.name} at place {place + 1} of {size}"
                    span = _span(card, number, truth)
                    if reason := _nonsense(here, truth, span):
                        return Parity(-np.inf, unit, cases, f"{where} {reason}")
                    likeness = _cosine(here, truth) if cosine else _psnr(here, truth, span)
                    worst, cases = min(worst, likeness), cases + 1
                    if likeness < least:
                        return Parity(worst, unit, cases, f"{where} is {likeness:.4g} {unit} like ONNX Runtime's")
                    apart = float(np.abs(here - truth).max()) / max(float(np.ptp(truth)), 1e-9)
                    if card.task == "detection" and apart > MOST_APART:
                        return Parity(worst, unit, cases, f"{where} has a value {apart:.0%} of the span off")
    return Parity(float(worst), unit, cases, "")


def time_each(engines: Sequence[Engine], sample: Sample, *, seconds: float = 1.0) -> list[float]:
    """Return the median milliseconds of each engine for one sample alone, in turn until the time is over.

    Raises EngineError.
    """
    taken: list[list[float]] = [[] for _ in engines]
    for engine in engines:
        engine.run(**sample)  # the first is slow
    ends = time.perf_counter() + seconds * len(engines)
    while not taken[-1] or time.perf_counter() < ends:
        for engine, each in zip(engines, taken, strict=True):
            started = time.perf_counter()
            engine.run(**sample)
            each.append(time.perf_counter() - started)
    return [1000 * statistics.median(each) for each in taken]


def first_apart(engine: Engine, reference: Engine, sample: Sample, names: Sequence[str]) -> str | None:
    """Return the first of these values, in order, that the engine does not give as the reference does: PSNR below the
    floor, by the value's own span. None: all agree. Raises EngineError."""
    given, wanted = engine.run(**sample), reference.run(**sample)
    for name in names:
        here, truth = given[name], wanted[name]
        if not np.isfinite(here).all() or _psnr(here, truth, float(np.ptp(truth))) < LEAST_DB:
            return name
    return None


def _by_shape(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    groups: dict[tuple[tuple[int, ...], ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(tuple(value.shape for value in sample.values()), []).append(sample)
    if not groups:
        raise EngineError("there are no samples to compare by")
    yield from groups.values()


def _shifted(sample: Sample, place: int) -> dict[str, np.ndarray]:
    """Return the sample moved sideways by its place, so that no two places of a batch see the same."""
    return {name: np.roll(value, 3 * place, axis=-1) if value.ndim == 4 else value for name, value in sample.items()}


def _nonsense(here: np.ndarray, truth: np.ndarray, span: float) -> str:
    if here.shape != truth.shape:
        return f"has shape {here.shape}, not {truth.shape}"
    if not np.isfinite(here).all():
        return "holds what is no number"
    if here.size > 1 and np.ptp(here) == 0 and np.ptp(truth) > _FLAT * span:
        return "has one value everywhere"
    return ""


def _span(card: NetworkCard, number: int, truth: np.ndarray) -> float:
    """Return from what to what an output goes: a restorer's picture from black to white, a mask from 0 to 1."""
    guided = card.task == "guided-restoration"
    if guided and card.outputs[number].name == "mask":  # it may be all but the same everywhere
        return 1.0
    if card.output_range and (guided or (card.task == "restoration" and number == 0)):
        return card.output_range[1] - card.output_range[0]
    return float(np.ptp(truth))


def _psnr(here: np.ndarray, truth: np.ndarray, span: float) -> float:
    error = float(np.square(here.astype(np.float64) - truth).mean())
    return float(10 * np.log10(max(span, 1e-9) ** 2 / max(error, 1e-12 * max(span, 1e-9) ** 2)))


def _cosine(here: np.ndarray, truth: np.ndarray) -> float:
    a, b = here.ravel().astype(np.float64), truth.ravel().astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
