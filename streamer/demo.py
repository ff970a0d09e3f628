"""`python -m streamer.demo`: the app and a real listener on a clip whose truth is known, and a page to look at.

Ends with 0 only if the app did, and enough tracks were restored, received, and better than bicubic on their mean.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np

from streamer import demo_clip
from streamer.client import EventSubscriber
from streamer.demo_page import VIDEO_SIZE, Life, Row, Sighting, bicubic, inset_frames, page
from streamer.geometry import transform_points
from streamer.wire import FaceHeader, WireEvent

LEAST_TRACKS = 6
"""Tracks that have to be restored and received."""
_LOOK_EVERY_S = 1.0


class DemoFailed(RuntimeError):
    """The demo did not show what it is for; carries one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(prog="streamer.demo", description="The app on real people, beside the originals.")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where clip, page and video go (default: demo)")
    out = parser.parse_args(arguments).out
    try:
        summary = run(out)
    except (DemoFailed, demo_clip.PhotoMissing, OSError) as failure:
        print(f"streamer.demo: {failure}", file=sys.stderr)
        return 1
    print(summary)
    print(f"look at {out / 'index.html'}")
    return 0


def run(out: Path) -> str:
    """Make the clip, run the app on it, write the page; return the app's last line.

    Raises DemoFailed, if it can after the page is written, and PhotoMissing.
    """
    clip = out / "clip.mp4"
    started = time.monotonic()
    made = demo_clip.make_clip(clip)
    _say("1/3 the clip: made" if made else "1/3 the clip: made before", started)

    started = time.monotonic()
    summary, events = _listen_to_app(clip)
    _say(f"2/3 the app and its listener: {len(events)} events received", started)

    started = time.monotonic()
    lives = lives_of(events)
    rows = rows_of(lives)
    _write(out, clip, lives, rows, summary)
    _say(f"3/3 the page: {_result(rows)}", started)
    check(rows)
    return summary


def lives_of(events: Iterable[WireEvent]) -> dict[int, Life]:
    """Return what was heard of each track, its faces beside their originals."""
    lives: defaultdict[int, Life] = defaultdict(Life)
    for event in events:
        header = event.header
        if isinstance(header, FaceHeader):
            life = lives[header.track]
            life.faces.append(header)
            if header.kind == "face.identified":
                life.sightings.append(_beside_original(header, event.images["crop"], event.images.get("restored")))
    return dict(sorted(lives.items()))


def rows_of(lives: dict[int, Life]) -> list[Row]:
    """Return a row for each track that was restored, and one for each of which a face went out untouched."""
    rows = []
    for track, life in lives.items():
        for restored in (True, False):
            sightings = tuple(each for each in life.sightings if (each.restored is not None) == restored)
            if sightings:
                rows.append(Row(track, sightings))
    return rows


def follow(face: FaceHeader, frame: int) -> np.ndarray:
    """Return where the box of an event lies in another frame, as the scene moves: (4,)."""
    box = np.array(face.box)
    there = demo_clip.people(frame)
    walk = demo_clip.whose(face.frame, box)
    if walk is None or walk not in there:
        return box
    here = demo_clip.people(face.frame)[walk]
    to_photo = np.linalg.inv(np.vstack([here, [0, 0, 1]]))[:2]
    centre = transform_points(there[walk], transform_points(to_photo, (box[:2] + box[2:]) / 2))
    half = (box[2:] - box[:2]) / 2 * np.hypot(*there[walk][:, 0]) / np.hypot(*here[:, 0])
    return np.concatenate([centre - half, centre + half])


def _beside_original(header: FaceHeader, crop: np.ndarray, restored: np.ndarray | None) -> Sighting:
    published = crop if restored is None else restored
    name = "crop" if restored is None else "restored"
    transform = next(image.transform for image in header.images if image.name == name)
    side = len(published)
    original = demo_clip.truth(header.frame, np.array(transform), (side, side))
    seen = demo_clip.within_frame(np.array(transform), (side, side))
    psnr, bicubic_psnr = (_psnr(image[seen], original[seen]) for image in (published, bicubic(crop, side)))
    return Sighting(header, crop, restored, original, float(seen.mean()), psnr, bicubic_psnr)


def _psnr(pixels: np.ndarray, original: np.ndarray) -> float:
    """Return the PSNR in dB over all three colours."""
    error = np.mean((pixels.astype(np.float64) - original) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def _listen_to_app(clip: Path) -> tuple[str, list[WireEvent]]:
    """Return the app's last line and all that a listener got from it."""
    endpoint = f"tcp://127.0.0.1:{_free_port()}"
    overrides = {"STREAMER__CAMERAS__0__URL": str(clip.resolve()), "STREAMER__PUBLISH__ENDPOINT": endpoint}
    command = [sys.executable, "-m", "streamer.cli", "run", str(_config())]
    with (
        EventSubscriber(endpoint, timeout_s=_LOOK_EVERY_S) as subscriber,
        subprocess.Popen(command, env=os.environ | overrides, stdout=subprocess.PIPE, text=True) as app,
    ):
        events = list(_heard(subscriber, app))
        output, _ = app.communicate()
    if app.returncode != 0:
        raise DemoFailed(f"the app ended with exit code {app.returncode}")
    if subscriber.missed:
        raise DemoFailed(f"{subscriber.missed} events did not reach the listener")
    return output.strip().splitlines()[-1], events


def _heard(subscriber: EventSubscriber, app: subprocess.Popen[str]) -> Iterator[WireEvent]:
    """Yield events until the app says that it ends."""
    while True:
        try:
            yield from subscriber
            return
        except TimeoutError:
            if app.poll() is not None:
                raise DemoFailed(f"the app ended with exit code {app.returncode} and did not say so") from None


def _config() -> Path:
    spec = importlib.util.find_spec("configs")
    if spec is None or not spec.submodule_search_locations:
        raise DemoFailed("the package configs is not installed: pip install the project")
    return Path(spec.submodule_search_locations[0]) / "demo.yaml"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write(out: Path, clip: Path, lives: dict[int, Life], rows: Sequence[Row], summary: str) -> None:
    wanted = {row.shown.header.frame for row in rows}
    stills = {frame: image for frame, image in enumerate(_decoded(clip)) if frame in wanted}
    (out / "index.html").write_text(page(rows, stills, summary=summary), encoding="utf-8")
    demo_clip.write_h264(out / "demo.mp4", inset_frames(_decoded(clip), lives, follow), size=VIDEO_SIZE, crf="25")


def _decoded(clip: Path) -> Iterator[np.ndarray]:
    with av.open(str(clip)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="bgr24", threads=1)


def _result(rows: Sequence[Row]) -> str:
    restored = [row for row in rows if row.restored]
    if not restored:
        return "no track restored"
    ours = statistics.fmean(row.psnr for row in restored)
    bicubics = statistics.fmean(row.bicubic_psnr for row in restored)
    return f"{len(restored)} tracks restored, {ours:.2f} dB on their mean, bicubic {bicubics:.2f}"


def check(rows: Sequence[Row]) -> None:
    """Raise DemoFailed unless enough tracks were restored, and better than bicubic on their mean."""
    gains = [row.psnr - row.bicubic_psnr for row in rows if row.restored]
    if len(gains) < LEAST_TRACKS:
        raise DemoFailed(f"{len(gains)} tracks were restored and received; at least {LEAST_TRACKS} should be")
    if statistics.fmean(gains) <= 0:
        raise DemoFailed(f"the restored tracks are {-statistics.fmean(gains):.2f} dB worse than bicubic on their mean")


def _say(step: str, started: float) -> None:
    print(f"{step}, {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
