"""Measures a search of the gallery: `python docs/gallery_search.py [TEMPLATES...]`.

By default 100000 and 1000000. Mates (another photo of somebody enrolled) and non-mates are searched, 16 at a time, and
compared with looking at every template. Embeddings are drawn by chance: once alike in all 256 directions, which is the
hardest, and with the spreads that face-reidentification-retail-0095 has on LFW, and the embedder that ships, whose
features are of 128 channels. Told are the processor's time of one thread, which other programs hardly change, and the
time that passes with two. The table goes into docs/results/gallery-search.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from streamer.gallery import EXACT_UP_TO, Snapshot

REPORT = Path(__file__).resolve().parent / "results/gallery-search.md"

DIMENSIONS = 256
BATCH = 16
PROBES = 2048  # of mates, and as many of non-mates
SPREADS = {
    "alike in all directions": (np.inf, DIMENSIONS),
    "as retail-0095 on LFW": (52.0, DIMENSIONS),
    "as embedder on LFW": (42.0, 128),
}
"""The variance falls by e in so many directions, and is nothing from the second number on."""
OTHER_PHOTO = 0.8  # how far two photos of a person lie apart, in units of how far two persons do


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("templates", nargs="*", type=int, default=[100_000, 1_000_000])
    rows = [row for count in parser.parse_args().templates for row in measure(count)]
    REPORT.write_text(
        "# Searching a large gallery\n\n"
        f"`{shlex.join(['python', *sys.argv])}`, {datetime.now(UTC):%Y-%m-%d}, {platform.machine()} ({processor()}, "
        f"{os.cpu_count()} processors, of which two may be one core): milliseconds for {BATCH} faces, medians of "
        f"{PROBES // BATCH}, of one thread and of two; recall@1 against looking at every template, of {PROBES} other "
        f"photos of people enrolled (mates) and of {PROBES} strangers. Up to {EXACT_UP_TO:,} templates every one is "
        "looked at.\n\n"
        "| templates | embeddings | one thread, ms | two threads, ms | recall, mates | recall, strangers | built in |\n"
        "|---|---|---|---|---|---|---|\n" + "".join(rows)
    )
    print(REPORT)


def processor() -> str:
    """Return the processor's name, as far as the system tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def measure(count: int) -> Iterator[str]:
    """Yield a row of the table for each spread, and print it."""
    for spread, (scale, last) in SPREADS.items():
        chance = np.random.default_rng(0)
        deviation = np.exp(-np.arange(DIMENSIONS) / scale / 2).astype(np.float32)
        deviation[last:] = 0
        directions = np.linalg.qr(chance.standard_normal((DIMENSIONS, DIMENSIONS)))[0].astype(np.float32)
        axes = deviation[:, None] * directions
        templates = np.empty((count, DIMENSIONS), np.float32)
        for start in range(0, count, 50_000):
            size = min(50_000, count - start)
            templates[start : start + size] = unit(chance.standard_normal((size, DIMENSIONS), np.float32) @ axes)
        mates = templates[:PROBES] + OTHER_PHOTO * unit(chance.standard_normal((PROBES, DIMENSIONS), np.float32) @ axes)
        others = chance.standard_normal((PROBES, DIMENSIONS), np.float32) @ axes

        began = time.process_time()
        snapshot = Snapshot(templates, range(count), range(count))
        built = time.process_time() - began
        one = milliseconds(snapshot, unit(mates), 1, time.process_time)
        two = milliseconds(snapshot, unit(mates), 2, time.perf_counter)
        row = (
            f"| {count:,} | {spread} | {one:.1f} | {two:.1f} "
            f"| {recall(snapshot, unit(mates)):.4f} | {recall(snapshot, unit(others)):.4f} | {built:.0f} s |\n"
        )
        print(row, end="", flush=True)
        yield row


def milliseconds(snapshot: Snapshot, probes: np.ndarray, threads: int, clock: Callable[[], float]) -> float:
    """Return what a batch takes by the clock, the median of some."""
    seconds = []
    with threadpool_limits(threads):
        for start in range(0, PROBES, BATCH):
            began = clock()
            snapshot.search(probes[start : start + BATCH])
            seconds.append(clock() - began)
    return 1000 * float(np.median(seconds))


def recall(snapshot: Snapshot, probes: np.ndarray) -> float:
    """Return the share of probes whose best candidate is the best of all templates."""
    best, found = np.full(len(probes), -2.0, np.float32), np.zeros(len(probes), int)
    for start in range(0, len(snapshot), 50_000):
        similarities = probes @ snapshot.templates[start : start + 50_000].T
        rows = similarities.argmax(axis=1)
        values = similarities[np.arange(len(probes)), rows]
        found = np.where(values > best, rows + start, found)
        best = np.maximum(best, values)
    hits = [candidates[0].photo == row for candidates, row in zip(snapshot.search(probes, 1), found, strict=True)]
    return float(np.mean(hits))


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


if __name__ == "__main__":
    main()
