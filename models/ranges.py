"""Ranges for INT8: what the activations of a restorer reach on training faces, and what INT8 then costs.

    python -m models.ranges models/weights/sgen-small.onnx --faces ../shared/data/faces_train.tar \\
        --judge ../shared/data/faces_val.tar --embedder ../shared/models/face-reidentification-retail-0095.onnx

Writes the ranges into the file's card if INT8 costs next to nothing on the judging faces, and takes them out of it
otherwise; the weights stay as they are. What is measured is the graph that `python -m engines.int8` makes at run time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError

from models.dataset import FaceTensors, load_faces, load_names
from models.degradation import Shares, draw_damage, generators, surveillance
from models.judges import FaceEmbedder, OnnxRestorer, as_planes, psnr
from models.protocols import Pair

Ranges = dict[str, tuple[float, float]]

MOST_DB = 0.1
MOST_IDENTITY = 0.005
CARD_KEY = "streamer.card"
_ENLARGE = {"nearest": cv2.INTER_NEAREST, "cubic": cv2.INTER_CUBIC}
_SIDES = (128, 192)  # px of the truths
_KEPT = 8000  # values of each tensor that a run leaves behind
_CLIPPED = np.linspace(0.2, 1, 33)  # parts of the range that are tried
# What was dark stays dark, so there is no truth to hold it against; H.264 codes whole batches alike.
_SHARES = Shares(low_light=0, h264=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path, help="ONNX that models.export wrote")
    parser.add_argument("--faces", type=Path, required=True, help="training faces: a tar or a folder")
    parser.add_argument("--judge", type=Path, required=True, help="faces that the network was not trained on")
    parser.add_argument("--embedder", type=Path, required=True, help="face-reidentification-retail-0095.onnx")
    parser.add_argument("--exclude", type=Path, help="names of training faces to leave out")
    parser.add_argument("--calibrate-on", type=int, default=48, metavar="N", help="training faces (default: 48)")
    parser.add_argument("--judge-on", type=int, default=96, metavar="N", help="judging faces (default: 96)")
    arguments = parser.parse_args()
    try:
        said = add_int8(
            arguments.network, arguments.faces, arguments.judge, arguments.embedder, exclude=arguments.exclude,
            calibrate_on=arguments.calibrate_on, judge_on=arguments.judge_on,
        )  # fmt: skip
    except (OSError, ValueError) as exc:
        parser.exit(2, f"{exc}\n")
    print(said)


def add_int8(
    path: Path, faces: Path, judge: Path, embedder: Path, *, exclude: Path | None = None, calibrate_on: int = 48,
    judge_on: int = 96,
) -> str:  # fmt: skip
    """Measure the ranges of a restorer and what INT8 costs it, write them into its card if that is next to nothing.

    The file is replaced at once or not at all. Returns what was measured, in a line. Raises OSError, or ValueError
    where the file is no restorer of one input with our card or the faces do not do.
    """
    network = _read(path)
    card = read_card(network, path)
    names = load_names(exclude) if exclude else frozenset()
    trained = FaceTensors(load_faces(faces, exclude=names), torch.device("cpu"))
    ranges = measure_ranges(
        network, (_feed(network, card, pair) for pair in degraded(trained, card["scales"], calibrate_on, seed=1))
    )
    judged = FaceTensors(load_faces(judge), torch.device("cpu"))
    pairs = list(degraded(judged, card["scales"], judge_on, seed=2))
    told = []
    for skip in ([], ends(network)):
        record = {"ranges": ranges, "skip": skip, **cost(path, network, ranges, skip, pairs, embedder)}
        told.append(
            f"INT8{', first and last layer in float32,' if skip else ''} loses {record['lost_db']:+.3f} dB and "
            f"{record['lost_identity']:+.4f} of identity on {record['faces']} faces, "
            f"{record['psnr']:.1f} dB from float32"
        )
        if record["lost_db"] <= MOST_DB and record["lost_identity"] <= MOST_IDENTITY:
            write_card(path, network, {**card, "int8": record})
            return f"{path}: {'; '.join(told)}: written"
    write_card(path, network, {key: value for key, value in card.items() if key != "int8"})
    return f"{path}: {'; '.join(told)}: too much, not written"


def measure_ranges(network: onnx.ModelProto, feeds: Iterable[Mapping[str, np.ndarray]]) -> Ranges:
    """Return for each tensor that a convolution is given the range that it is best rounded in, [low, high].

    That is the part of what it reaches, 0 within, in which rounding to 8 bits and clipping err least in the mean of
    squares: a few outliers would make the steps coarse for all. `feeds` are inputs by name.
    """
    wanted = list(dict.fromkeys(node.input[0] for node in _convolutions(network)))
    inputs = {value.name for value in network.graph.input}
    shown = onnx.ModelProto()
    shown.CopyFrom(network)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in wanted if name not in inputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    reach = dict.fromkeys(wanted, (0.0, 0.0))
    kept: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
    rng = np.random.default_rng(0)
    for feed in feeds:
        values = {**feed, **dict(zip(names, session.run(names, dict(feed)), strict=True))}
        for name in wanted:
            value = values[name].ravel()
            reach[name] = (min(reach[name][0], float(value.min())), max(reach[name][1], float(value.max())))
            kept[name].append(rng.choice(value, _KEPT) if value.size > _KEPT else value)
    return {name: _best_range(np.concatenate(kept[name]), *reach[name]) for name in wanted}


def ends(network: onnx.ModelProto) -> list[str]:
    """Return the names of the first and the last convolution, as a card's `skip` has them."""
    nodes = _convolutions(network)
    return [node.name or node.output[0] for node in (nodes[0], nodes[-1])]


def cost(
    path: Path, network: onnx.ModelProto, ranges: Ranges, skip: Sequence[str], pairs: Sequence[Pair], embedder: Path
) -> dict[str, Any]:
    """Return what INT8 loses against float32 on the pairs, as a card has it. Weights have 7 bits, the worst case."""
    card = {**read_card(network, path), "int8": {"ranges": ranges, "skip": list(skip)}}
    judge = FaceEmbedder(embedder)
    with tempfile.TemporaryDirectory() as folder:
        stated, made = Path(folder, "stated.onnx"), Path(folder, "int8.onnx")
        write_card(stated, network, card)
        # What runs is made by engines, which models does not import: a file goes over and a file comes back.
        command = [sys.executable, "-m", "engines.int8", str(stated), str(made), "--reduce-range"]
        root = str(Path(__file__).resolve().parents[1])
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root})
        if done.returncode:
            raise ValueError(f"{path}: {done.stderr.strip().splitlines()[-1]}")
        restored = [_restored(file, pairs) for file in (stated, made)]
    truths, landmarks = [pair.truth for pair in pairs], [pair.landmarks for pair in pairs]
    scores = [np.mean([psnr(image, truth) for image, truth in zip(images, truths, strict=True)]) for images in restored]
    clean = judge.embed(truths, landmarks)
    likeness = [(judge.embed(images, landmarks) * clean).sum(axis=1).mean() for images in restored]
    apart = [np.mean((a.astype(float) - b) ** 2) for a, b in zip(*restored, strict=True)]
    return {
        "faces": len(pairs),
        "lost_db": round(float(scores[0] - scores[1]), 4),
        "lost_identity": round(float(likeness[0] - likeness[1]), 5),
        "psnr": round(float(10 * np.log10(255**2 / max(np.mean(apart), 1e-6))), 2),
    }


def degraded(faces: FaceTensors, scales: Sequence[int], n: int, *, seed: int) -> Iterator[Pair]:
    """Yield n faces as a camera gives them, `scales` in turn, each with its truth: the same ones for the same seed."""
    for number in range(n):
        scale = scales[number % len(scales)]
        side = _SIDES[number // len(scales) % len(_SIDES)]
        clean = faces.crops(np.random.default_rng([seed, number]), 1, side)
        draws = generators(seed, number)
        low = surveillance(clean.images, draw_damage(1, draws, _SHARES), draws, factor=scale)
        yield Pair(_image(low), _image(clean.images), clean.landmarks[0].numpy())


def read_card(network: onnx.ModelProto, path: Path) -> dict[str, Any]:
    """Return the card of a restorer. Raises ValueError if there is none."""
    text = next((entry.value for entry in network.metadata_props if entry.key == CARD_KEY), None)
    card: dict[str, Any] = json.loads(text) if text else {}
    if card.get("task") != "restoration":
        raise ValueError(f"{path} is no restorer that models.export wrote: it has no card that says so")
    return card


def write_card(path: Path, network: onnx.ModelProto, card: Mapping[str, Any]) -> None:
    """Write the network with this card, at once or not at all."""
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    others = [entry for entry in network.metadata_props if entry.key != CARD_KEY]
    del copy.metadata_props[:]
    copy.metadata_props.add(key=CARD_KEY, value=json.dumps(card))
    copy.metadata_props.extend(others)
    partial = path.with_suffix(".partial")
    partial.write_bytes(copy.SerializeToString())
    partial.replace(path)


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(str(path))
    except DecodeError:
        raise ValueError(f"{path} is no ONNX") from None


def _convolutions(network: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in network.graph.node if node.op_type in ("Conv", "ConvTranspose")]


def _feed(network: onnx.ModelProto, card: Mapping[str, Any], pair: Pair) -> dict[str, np.ndarray]:
    """Return the face as the network is given it; sides are whole multiples of what it wants, so nothing is padded."""
    image = pair.low
    if card["enlarge"] != "none":
        image = cv2.resize(image, pair.truth.shape[1::-1], interpolation=_ENLARGE[card["enlarge"]])
    planes = as_planes(image[..., ::-1] if card["color"] == "RGB" else image, card["mean"], card["std"])
    return {network.graph.input[0].name: planes[None]}


def _restored(path: Path, pairs: Sequence[Pair]) -> list[np.ndarray]:
    restorer = OnnxRestorer(path)
    return [restorer.restore(pair.low, _scale(pair)) for pair in pairs]


def _scale(pair: Pair) -> int:
    return round(pair.truth.shape[0] / pair.low.shape[0])


def _image(planes: torch.Tensor) -> np.ndarray:
    image = planes[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return cv2.cvtColor(image, cv2.COLOR_RGB2BGR)


def _best_range(values: np.ndarray, low: float, high: float) -> tuple[float, float]:
    """Return the part of [low, high], of one centre at 0, in which 8 bits err least."""
    if low == high:
        return -1.0, 1.0
    errors = []
    for part in _CLIPPED:
        step = (high - low) * part / 255
        rounded = np.clip(np.rint(values / step), np.rint(low * part / step), np.rint(high * part / step)) * step
        errors.append(float(np.mean((rounded - values) ** 2)))
    part = _CLIPPED[int(np.argmin(errors))]
    return float(f"{low * part:.5g}"), float(f"{high * part:.5g}")


if __name__ == "__main__":
    main()
