"""Makes the default detector cheaper on a CPU, and says what that costs: `python docs/detector_int8.py CLIPS PHOTOS`.

CLIPS and PHOTOS are folders. The ranges of CenterFace for INT8 are measured on three clips and the photos; then every
box that float32 finds on frames of four other clips must be found by INT8 too. Only if none is lost do the ranges go
into engines/cards/centerface.json. docs/results/detector.md tells boxes and CPU times, all of one run on one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
import cv2
import numpy as np
import onnx
import onnxruntime
import openvino

from engines.card import CARD_KEY, Int8, NetworkCard
from engines.engine import Engine
from engines.int8 import quantised
from engines.ort import OnnxEngine
from engines.ov import OpenVinoEngine
from engines.store import Model, default_store
from models.ranges import ends, measure_ranges
from streamer.detector import FaceDetector
from streamer.types import Detections

ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "engines/cards/centerface.json"
REPORT = ROOT / "docs/results/detector.md"
CALIBRATED = ("arcade_walk_1080p", "retail_ceiling_1080p", "street_crowd_720p")
JUDGED = ("classroom_480x270", "corridor_three_walk_480x270", "carphone_qcif_pristine", "carphone_qcif_lowbitrate")
SAME_BOX = 0.8
"""Least IoU of a box that is found again."""
RUNS = 7


@dataclass(frozen=True, slots=True)
class Found:
    """How the boxes of one way to run compare with those of float32 in ONNX Runtime."""

    boxes: int
    lost: int
    weaker: int
    """Found again, but below the threshold: they keep a track alive and begin none."""
    new: int
    least_iou: float
    most_score: float
    """Largest difference of a score."""


class Recorder:
    """An engine that keeps what it is fed with."""

    def __init__(self, engine: Engine) -> None:
        self.card, self.max_batch = engine.card, 1
        self.feeds: list[dict[str, np.ndarray]] = []
        self._engine = engine

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        self.feeds.append(inputs)
        return self._engine.run(**inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--frames", type=int, default=24, help="of each judged clip (default: 24)")
    arguments = parser.parse_args()
    model = default_store().find("centerface")
    plain = OnnxEngine(model, threads=1)
    recorder = Recorder(plain)
    watching = FaceDetector(recorder, size=960)  # type: ignore[arg-type]
    for image in calibration_images(arguments.clips, arguments.photos):
        watching.detect([image])
    network = onnx.load(model.path)
    ranges = measure_ranges(network, recorder.feeds)
    images = [image for clip in JUDGED for image in frames(arguments.clips / f"{clip}.mp4", arguments.frames)]
    wanted = [FaceDetector(plain, size=960).detect([image])[0] for image in images]
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, Engine] = {
            "ONNX Runtime float32": plain,
            "OpenVINO float32": OpenVinoEngine(model, threads=1),
        }
        records = {}
        for title, skip in (("INT8", []), ("INT8, first and last layers float32", last_layers(network))):
            records[title] = Int8(ranges=ranges, skip=tuple(skip))
            made = written(model, records[title], Path(folder, f"{len(skip)}.onnx"))
            ways[f"OpenVINO {title}"] = OpenVinoEngine(made, threads=1)
        found = {title: compare(engine, images, wanted, model.card) for title, engine in ways.items()}
        times = cpu_times(ways, recorder_feed(images[0], plain))
    kept = next((title for title in records if not found[f"OpenVINO {title}"].lost), None)
    if kept:
        counts = found[f"OpenVINO {kept}"]
        record = records[kept].model_copy(
            update={
                "frames": len(images), "boxes": counts.boxes, "lost_boxes": counts.lost, "new_boxes": counts.new,
            }
        )  # fmt: skip
        write_card(record)
    REPORT.write_text(report(found, times, len(images), len(recorder.feeds), kept))
    print(REPORT.read_text())


def calibration_images(clips: Path, photos: Path, each: int = 8, least: int = 12) -> Iterator[np.ndarray]:
    """Yield frames of the clips that do not judge, and photos; those in `lq` are no such."""
    for clip in CALIBRATED:
        yield from frames(clips / f"{clip}.mp4", each)
    paths = sorted(photos.glob("*.jpg"))
    for path in paths[:: max(1, len(paths) // least)]:
        yield cv2.imread(str(path))


def frames(path: Path, n: int) -> list[np.ndarray]:
    """Return n frames of a clip, evenly from all."""
    with av.open(str(path)) as container:
        count = sum(packet.size > 0 for packet in container.demux(video=0))
    chosen = set(np.linspace(0, count - 1, n).astype(int).tolist())
    with av.open(str(path)) as container:
        decoded = enumerate(container.decode(video=0))
        return [frame.to_ndarray(format="bgr24", threads=1) for index, frame in decoded if index in chosen]


def last_layers(network: onnx.ModelProto) -> list[str]:
    """Return the first convolution, the four heads and the one before them."""
    nodes = [node for node in network.graph.node if node.op_type == "Conv"]
    return [ends(network)[0], *(node.name or node.output[0] for node in nodes[-5:])]


def written(model: Model, record: Int8, path: Path) -> Model:
    """Write the quantised network with its card. The machine at hand may lack VNNI, so weights keep 7 bits."""
    card = model.card.model_copy(update={"int8": record})
    network = quantised(onnx.load(model.path), card, reduce_range=True)
    del network.metadata_props[:]
    network.metadata_props.add(key=CARD_KEY, value=card.model_copy(update={"int8": None}).model_dump_json())
    onnx.save(network, path)
    return replace(Model.read(path), card=card.model_copy(update={"precision": "int8"}))


def compare(engine: Engine, images: list[np.ndarray], wanted: list[Detections], card: NetworkCard) -> Found:
    """Say which boxes of float32 at the threshold are found again, and what is new."""
    detector = FaceDetector(engine, size=960)
    lost = weaker = new = boxes = 0
    ious, differences = [1.0], [0.0]
    for image, all_wanted in zip(images, wanted, strict=True):
        given = detector.detect([image])[0]
        strong = all_wanted[all_wanted.scores >= detector.threshold]
        boxes += len(strong)
        new += int((best_iou(given[given.scores >= detector.threshold], all_wanted)[0] < 0.5).sum())
        values, places = best_iou(strong, given)
        ious += values.tolist()
        lost += int((values < SAME_BOX).sum())
        again = values >= SAME_BOX
        scores = given.scores[places[again]]
        weaker += int((scores < detector.threshold).sum())
        differences += np.abs(scores - strong.scores[again]).tolist()
    return Found(boxes, lost, weaker, new, min(ious), max(differences))


def best_iou(some: Detections, others: Detections) -> tuple[np.ndarray, np.ndarray]:
    """Return for each of `some` the IoU (n,) with the nearest of `others`, and its place; 0 where there is none."""
    if not len(some) or not len(others):
        return np.zeros(len(some)), np.zeros(len(some), int)
    a, b = some.boxes[:, None], others.boxes[None]
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    shared = sides.prod(-1)
    areas = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)
    ious = shared / (areas - shared)
    return ious.max(1), ious.argmax(1)


def recorder_feed(image: np.ndarray, engine: Engine) -> dict[str, np.ndarray]:
    """Return what the network is fed with for an image on the canvas of 960."""
    recorder = Recorder(engine)
    FaceDetector(recorder, size=960).detect([image])  # type: ignore[arg-type]
    return recorder.feeds[0]


def cpu_times(ways: dict[str, Engine], feed: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Return for each way the least and the median CPU time of a run in ms; the ways take turns."""
    times: dict[str, list[float]] = {title: [] for title in ways}
    for _ in range(RUNS + 1):
        for title, engine in ways.items():
            start = time.process_time()
            engine.run(**feed)
            times[title].append((time.process_time() - start) * 1e3)
    return {title: (min(values[1:]), float(np.median(values[1:]))) for title, values in times.items()}


def write_card(record: Int8) -> None:
    known = json.loads(CARD.read_text())
    known["card"]["int8"] = record.model_dump(mode="json", exclude_defaults=True)
    ranges = known["card"]["int8"].pop("ranges")
    lines = ",\n".join(f"        {json.dumps(name)}: {json.dumps(pair)}" for name, pair in ranges.items())
    before, after = json.dumps(known, indent=2).rsplit('"int8": {', 1)
    CARD.write_text(f'{before}"int8": {{\n      "ranges": {{\n{lines}\n      }},{after}\n')


def report(
    found: dict[str, Found], times: dict[str, tuple[float, float]], n: int, calibrated: int, kept: str | None
) -> str:
    base = times["ONNX Runtime float32"][1]
    rows = [
        f"| {title} | {times[title][0]:.0f} | {times[title][1]:.0f} | {base / times[title][1]:.2f} | {f.boxes} | "
        f"{f.lost} | {f.weaker} | {f.new} | {f.least_iou:.3f} | {f.most_score:.3f} |"
        for title, f in found.items()
    ]
    verdict = f"{kept} is in the card." if kept else "Boxes are lost: no ranges are in the card."
    return "\n".join(
        [
            "# The default detector, CenterFace, at canvas 960",
            "",
            f"`python docs/detector_int8.py ../shared/data/videos ../shared/data/photos` on {processor()}, one thread, "
            f"ONNX Runtime {onnxruntime.__version__}, OpenVINO {openvino.__version__.split('-')[0]}. CPU time of one "
            f"run of the network on 960×544, the ways in turn, {RUNS} times each; others used the machine too.",
            "",
            f"Ranges: {calibrated} images, frames of {', '.join(CALIBRATED)} and photos. Judged: {n} frames of "
            f"{', '.join(JUDGED)}. Boxes: what ONNX Runtime float32 finds at 0.5. Lost: no box with an IoU of "
            f"{SAME_BOX} from score 0.4 up, the least that keeps a track alive. Weaker: found again, but below 0.5. "
            "New: at 0.5, where float32 has none at 0.4.",
            "",
            "| way | ms, least | ms, median | times as fast | boxes | lost | weaker | new | least IoU | score, most |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            verdict,
            "",
        ]
    )


def processor() -> str:
    has = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return f"{openvino.Core().get_property('CPU', 'FULL_DEVICE_NAME').strip()} ({platform.machine()}; {', '.join(has)})"


if __name__ == "__main__":
    main()
