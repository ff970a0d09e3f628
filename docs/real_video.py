"""Runs the app over real clips and writes what it made of them: `python docs/real_video.py CLIPS [--check]`.

CLIPS is a folder with the clips. Contact sheets of classroom and corridor (Intel, CC BY 4.0), which may be shown, go to
docs/results/, those of all other clips to out/, which git ignores. carphone_*.mp4, the same film in good quality and
over-compressed, gives figures: the routed output against the raw crop, both judged by the good film.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

from engines.store import default_store
from streamer import wire
from streamer.assembly import Networks
from streamer.camera import Camera
from streamer.client import EventSubscriber
from streamer.geometry import cut_crop
from streamer.quality import measure_quality
from streamer.router import NONE, RestorerRouter
from streamer.types import Crop, Track

ROOT = Path(__file__).resolve().parents[1]
SHOWN = {"classroom", "corridor"}
CELL = 160
COLUMNS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--lpips", type=Path, help="LPIPS as ONNX, for carphone")
    arguments = parser.parse_args()
    for clip in sorted(arguments.clips.glob("*.mp4")):
        name = clip.stem.split("_")[0]
        if name == "carphone":
            continue
        events, summary = run(clip)
        faces = [event for event in events if event.header.kind == "face.identified"]
        folder = ROOT / ("docs/results" if name in SHOWN else "out")
        folder.mkdir(parents=True, exist_ok=True)
        restored = sum("restored" in event.images for event in faces)
        tracks = len({event.header.track for event in faces})
        print(f"{clip.name}: {tracks} tracks, {len(faces)} crops, {restored} restored; {summary}", flush=True)
        if faces:
            cv2.imwrite(str(folder / f"real-{name}.jpg"), sheet(faces), [cv2.IMWRITE_JPEG_QUALITY, 88])
    carphone(arguments.clips, arguments.lpips)


def run(clip: Path) -> tuple[list[wire.WireEvent], str]:
    """Run the app over a clip and return every event and the app's last line."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "camera.yaml"
        endpoint = f"ipc://{folder}/events"
        config.write_text(
            f"cameras:\n  - {{name: clip, url: {clip.resolve()}}}\npublish: {{endpoint: '{endpoint}', wait_for: 1}}\n"
        )
        command = [sys.executable, "-m", "streamer.cli", "--log-level", "error", "run", str(config)]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ) as app:
            with EventSubscriber(endpoint, timeout_s=120) as subscriber:
                events = list(subscriber)
            summary = app.communicate(timeout=60)[0].strip()
    return events, summary


def sheet(faces: list[wire.WireEvent], most: int = 24) -> np.ndarray:
    """Draw up to `most` faces, evenly from all: the crop enlarged by cubic beside its restoration."""
    chosen = [faces[int(index)] for index in np.linspace(0, len(faces) - 1, min(most, len(faces)))]
    cells = [_cell(event) for event in chosen]
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % (COLUMNS // 2))
    rows = [np.concatenate(cells[i : i + COLUMNS // 2], axis=1) for i in range(0, len(cells), COLUMNS // 2)]
    return np.concatenate(rows)


def _cell(event: wire.WireEvent) -> np.ndarray:
    crop = cv2.resize(event.images["crop"], (CELL, CELL), interpolation=cv2.INTER_CUBIC)
    restored = event.images.get("restored")
    beside = (
        np.full_like(crop, 235)
        if restored is None
        else cv2.resize(restored, (CELL, CELL), interpolation=cv2.INTER_AREA)
    )
    cell = np.concatenate([crop, beside], axis=1)
    label = f"track {event.header.track}, {event.header.quality.face_height_px:.0f} px, {event.header.route.restorer}"
    caption = np.full((18, 2 * CELL, 3), 255, np.uint8)
    cv2.putText(caption, label, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (40, 40, 40), 1, cv2.LINE_AA)
    return cv2.copyMakeBorder(np.concatenate([cell, caption]), 0, 4, 0, 8, cv2.BORDER_CONSTANT, value=(255,) * 3)


def carphone(clips: Path, lpips: Path | None) -> None:
    """Print the figures of the two carphone films, as a table."""
    networks = Networks(default_store())
    detector, restorer = networks.detector("centerface"), networks.restorer("sgen-small")
    assert restorer is not None
    router = RestorerRouter("sgen-small", max_size=256)
    good, bad = (list(_frames(clips / f"carphone_qcif_{kind}.mp4")) for kind in ("pristine", "lowbitrate"))
    distance = onnxruntime.InferenceSession(str(lpips)) if lpips else None
    print(
        "\n| film | crops | route | PSNR raw | PSNR routed | LPIPS raw | LPIPS routed |\n|---|---|---|---|---|---|---|"
    )
    for kind, frames in (("pristine", good), ("lowbitrate", bad)):
        rows, routes = [], []
        for frame, truth in list(zip(frames, good, strict=True))[::4]:
            found = detector.detect([frame.image])[0]
            if not len(found):
                continue
            box, landmarks = found.boxes[0], found.landmarks[0]
            image, transform = cut_crop(frame.image, box, landmarks)
            clean, _ = cut_crop(truth.image, box, landmarks)
            track = Track(1, frame.moment, box, landmarks, float(found.scores[0]))
            route = router.route(Crop(track, image, transform, measure_quality(frame.image, box, landmarks)))
            routed = image
            if route.restorer != NONE:
                ((restored, _),) = restorer.restore([image])
                # not by area: even the raw crop, enlarged twice and brought back by area, comes out blurred
                routed = cv2.resize(restored, image.shape[1::-1], interpolation=cv2.INTER_CUBIC)
            routes.append(route.restorer)
            rows.append(
                [
                    _psnr(image, clean),
                    _psnr(routed, clean),
                    _lpips(distance, image, clean),
                    _lpips(distance, routed, clean),
                ]
            )
        share = ", ".join(f"{name} {routes.count(name)}" for name in sorted(set(routes)))
        means = " | ".join(f"{value:.3f}" for value in np.mean(rows, axis=0))
        print(f"| {kind} | {len(rows)} | {share} | {means} |")


def _frames(path: Path):  # type: ignore[no-untyped-def]
    import threading

    return Camera("clip", str(path), stop=threading.Event()).frames()


def _psnr(image: np.ndarray, truth: np.ndarray) -> float:
    error = float(np.mean((image.astype(np.float64) - truth) ** 2))
    return 60.0 if error == 0 else min(60.0, 10 * np.log10(255**2 / error))


def _lpips(session: onnxruntime.InferenceSession | None, image: np.ndarray, truth: np.ndarray) -> float:
    if session is None:
        return float("nan")
    both = [each[..., ::-1].transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1 for each in (image, truth)]
    names = [value.name for value in session.get_inputs()]
    return float(np.ravel(session.run(None, dict(zip(names, both, strict=True)))[0])[0])


if __name__ == "__main__":
    main()
