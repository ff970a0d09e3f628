"""Measures a search of the gallery: `OMP_NUM_THREADS=1 python docs/gallery_search.py [TEMPLATES...]`.

By default 100000 and 1000000. Mates (another photo of somebody enrolled) and non-mates are searched, 16 at a time, and
compared with looking at every template. Embeddings are drawn by chance: once alike in all 256 directions, which is the
hardest, and once with the spread that face-reidentification-retail-0095 has on LFW, where 103 directions count. The
processor's time of one thread is told, which other programs hardly change; two threads about halve it. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator

import numpy as np

from streamer.gallery import Snapshot

DIMENSIONS = 256
BATCH = 16
PROBES = 512  # of mates, and as many of non-mates
SPREADS = {"alike in all directions": np.inf, "as retail-0095 on LFW": 52.0}
OTHER_PHOTO = 0.8  # how far two photos of a person lie apart, in units of how far two persons do


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("templates", nargs="*", type=int, default=[100_000, 1_000_000])
    figures = [figure for count in parser.parse_args().templates for figure in measure(count)]
    print(json.dumps(figures))


def measure(count: int) -> Iterator[dict[str, object]]:
    """Yield the figures of each spread, and print them."""
    for spread, scale in SPREADS.items():
        chance = np.random.default_rng(0)
        deviation = np.exp(-np.arange(DIMENSIONS) / scale / 2).astype(np.float32)
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
        figure: dict[str, object] = {
            "templates": count, "spread": spread, "build_s": time.process_time() - began,
            "ms": milliseconds(snapshot, unit(mates)),
            "recall_mates": recall(snapshot, unit(mates)), "recall_non_mates": recall(snapshot, unit(others)),
        }  # fmt: skip
        print(", ".join(f"{name} {value}" for name, value in figure.items()), flush=True)
        yield figure


def milliseconds(snapshot: Snapshot, probes: np.ndarray) -> float:
    """Return the processor's time for a batch, the median of some."""
    seconds = []
    for start in range(0, PROBES, BATCH):
        began = time.process_time()
        snapshot.search(probes[start : start + BATCH])
        seconds.append(time.process_time() - began)
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
