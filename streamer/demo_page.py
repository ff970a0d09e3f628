"""What the demo shows: a page with a row for each track, and the clip with the restored faces inset."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import Template

import cv2
import numpy as np

from streamer.wire import FaceHeader

VIDEO_SIZE = (1280, 1012)
_SLOTS, _SLOTS_A_ROW, _SIDE, _GAP, _LABEL = 10, 5, 122, 4, 20
_PICTURE_HEIGHT = 720
_RESTORED, _UNTOUCHED, _PLAIN = (96, 200, 88), (230, 170, 60), (190, 190, 190)
"""Colours of boxes and labels, BGR."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """One identified face beside its original."""

    header: FaceHeader
    crop: np.ndarray
    restored: np.ndarray | None
    """None where the crop goes out as it is."""
    original: np.ndarray
    """The same square out of the pristine scene, as large as `restored`, or as the crop where there is none."""
    seen: float
    """Share of the square that the frame shows; beyond it the crop repeats the frame's edge, and is not judged."""
    psnr: float
    """Of what was published, in dB against the original."""
    bicubic_psnr: float
    """Of the crop enlarged by bicubic interpolation."""

    @property
    def face_px(self) -> float:
        """Height of the face in the frame."""
        return self.header.box[3] - self.header.box[1]


@dataclass(frozen=True, slots=True)
class Row:
    """A track's sightings of one kind: all restored, or all untouched."""

    track: int
    sightings: tuple[Sighting, ...]

    @property
    def restored(self) -> bool:
        """Say which kind."""
        return self.sightings[0].restored is not None

    @property
    def psnr(self) -> float:
        """Mean over the sightings, in dB."""
        return statistics.fmean(sighting.psnr for sighting in self.sightings)

    @property
    def bicubic_psnr(self) -> float:
        """Mean over the sightings, in dB."""
        return statistics.fmean(sighting.bicubic_psnr for sighting in self.sightings)

    @property
    def shown(self) -> Sighting:
        """The sighting of the largest face, of those that are most within the frame."""
        return max(self.sightings, key=lambda sighting: (sighting.seen, sighting.face_px))


@dataclass(slots=True)
class Life:
    """What was heard of one track, in the order of frames."""

    faces: list[FaceHeader] = field(default_factory=list)
    sightings: list[Sighting] = field(default_factory=list)

    def latest(self, frame: int) -> Sighting | None:
        """Return the newest sighting up to a frame."""
        return next((sighting for sighting in reversed(self.sightings) if sighting.header.frame <= frame), None)

    def nearest(self, frame: int) -> FaceHeader | None:
        """Return the event nearest to a frame, or None before the first and after the last."""
        if not self.faces[0].frame <= frame <= self.faces[-1].frame:
            return None
        return min(self.faces, key=lambda face: abs(face.frame - frame))


def bicubic(crop: np.ndarray, side: int) -> np.ndarray:
    """Return the crop enlarged to a side, with nothing but interpolation."""
    return cv2.resize(crop, (side, side), interpolation=cv2.INTER_CUBIC)


# The video


def inset_frames(
    frames: Iterable[np.ndarray], lives: Mapping[int, Life], follow: Callable[[FaceHeader, int], np.ndarray]
) -> Iterator[np.ndarray]:
    """Yield the clip's frames with the tracks' boxes, above crops and restorations side by side.

    `follow` says where the box of an event lies in another frame.
    """
    slots: dict[int, int] = {}
    for frame, image in enumerate(frames):
        present = {track: near for track, life in lives.items() if (near := life.nearest(frame)) is not None}
        _seat(slots, present)
        canvas = np.full((VIDEO_SIZE[1], VIDEO_SIZE[0], 3), 24, np.uint8)
        ratio = _PICTURE_HEIGHT / image.shape[0]
        canvas[:_PICTURE_HEIGHT] = cv2.resize(image, (VIDEO_SIZE[0], _PICTURE_HEIGHT))
        for track, near in present.items():
            sighting = lives[track].latest(frame)
            _draw_box(canvas, follow(near, frame) * ratio, track, _colour(sighting))
            if track in slots and sighting is not None:
                _draw_slot(canvas, slots[track], track, sighting)
        yield canvas


def _seat(slots: dict[int, int], present: Mapping[int, FaceHeader]) -> None:
    """Give each track that is there a slot, and let it keep it."""
    for track in [track for track in slots if track not in present]:
        del slots[track]
    for track in present:
        free = [slot for slot in range(_SLOTS) if slot not in slots.values()]
        if track not in slots and free:
            slots[track] = free[0]


def _colour(sighting: Sighting | None) -> tuple[int, int, int]:
    if sighting is None:
        return _PLAIN
    return _UNTOUCHED if sighting.restored is None else _RESTORED


def _draw_box(canvas: np.ndarray, box: np.ndarray, track: int, colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = (round(float(edge)) for edge in box)
    picture = canvas[:_PICTURE_HEIGHT]
    cv2.rectangle(picture, (left, top), (right, bottom), colour, 2, cv2.LINE_AA)
    top = max(top, _LABEL)
    cv2.rectangle(picture, (left - 1, top - _LABEL), (left + 24, top), colour, cv2.FILLED)
    _write(picture, f"#{track}", (left + 3, top - 5), (0, 0, 0))


def _draw_slot(canvas: np.ndarray, slot: int, track: int, sighting: Sighting) -> None:
    width = VIDEO_SIZE[0] // _SLOTS_A_ROW
    left = slot % _SLOTS_A_ROW * width + (width - 2 * _SIDE - _GAP) // 2
    top = _PICTURE_HEIGHT + _GAP + slot // _SLOTS_A_ROW * (_SIDE + _LABEL + _GAP)
    what = "untouched" if sighting.restored is None else f"restored x{len(sighting.restored) // len(sighting.crop)}"
    _write(canvas, f"#{track}  face {sighting.face_px:.0f} px, {what}", (left, top + _LABEL - 6), _colour(sighting))
    top += _LABEL
    published = sighting.crop if sighting.restored is None else sighting.restored
    for image, start, how in (
        (sighting.crop, left, cv2.INTER_NEAREST),
        (published, left + _SIDE + _GAP, cv2.INTER_AREA if len(published) > _SIDE else cv2.INTER_CUBIC),
    ):
        canvas[top : top + _SIDE, start : start + _SIDE] = cv2.resize(image, (_SIDE, _SIDE), interpolation=how)


def _write(image: np.ndarray, text: str, place: tuple[int, int], colour: tuple[int, int, int]) -> None:
    cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.48, colour, 1, cv2.LINE_AA)


# The page


def page(rows: Sequence[Row], frames: Mapping[int, np.ndarray], *, summary: str) -> str:
    """Return the page, whole in itself but for demo.mp4; `frames` are the clip's, by index."""
    restored, untouched = [row for row in rows if row.restored], [row for row in rows if not row.restored]
    gains = [row.psnr - row.bicubic_psnr for row in restored]
    figures = (
        (str(len(restored)), "tracks restored"),
        (_mean(row.psnr for row in restored), "dB restored, mean over tracks"),
        (_mean(row.bicubic_psnr for row in restored), "dB bicubic"),
        (_mean(gains, "+.2f"), "dB gained"),
        (f"{sum(gain > 0 for gain in gains)} of {len(gains)}", "tracks better than bicubic"),
        (str(len(untouched)), "tracks sent untouched"),
    )
    return _PAGE.substitute(
        figures="".join(f"<div><b>{number}</b><span>{what}</span></div>" for number, what in figures),
        restored="".join(_article(row, frames) for row in restored),
        untouched="".join(_article(row, frames) for row in untouched),
        summary=html.escape(summary),
    )


def _article(row: Row, frames: Mapping[int, np.ndarray]) -> str:
    shown = row.shown
    header, route = shown.header, shown.header.route
    pictures = [_figure(_with_box(frames[header.frame], header), f"frame {header.frame}", "wide")]
    pictures.append(_figure(shown.crop, f"crop, {len(shown.crop)} px", "raw"))
    if shown.restored is not None:
        enlarged = bicubic(shown.crop, len(shown.restored))
        pictures.append(_figure(enlarged, f"bicubic <b>{shown.bicubic_psnr:.2f} dB</b>"))
        pictures.append(_figure(shown.restored, f"restored <b>{shown.psnr:.2f} dB</b>", "ours"))
    pictures.append(_figure(shown.original, "the original"))
    return (
        f"<article><h3>Track {row.track} <small>{_measured(row)}</small></h3>"
        f'<div class="row">{"".join(pictures)}</div>'
        f"<p>Route <code>{html.escape(route.restorer if route else '')}</code>: "
        f"{html.escape(route.reason if route else '')}</p></article>"
    )


def _measured(row: Row) -> str:
    count = f"{len(row.sightings)} event" + "s" * (len(row.sightings) > 1)
    if not row.restored:
        return f"sent as it is, {row.psnr:.2f} dB over {count}"
    gain = row.psnr - row.bicubic_psnr
    means = f"restored {row.psnr:.2f} dB, bicubic {row.bicubic_psnr:.2f} dB, mean over {count}"
    return f'<em class="{"up" if gain > 0 else "down"}">{gain:+.2f} dB</em> {means}'


def _with_box(frame: np.ndarray, header: FaceHeader) -> np.ndarray:
    image = frame.copy()
    left, top, right, bottom = (round(edge) for edge in header.box)
    cv2.rectangle(image, (left - 3, top - 3), (right + 3, bottom + 3), (60, 220, 255), 2, cv2.LINE_AA)
    return image


def _figure(image: np.ndarray, caption: str, kind: str = "") -> str:
    extension, mime = (".jpg", "jpeg") if kind == "wide" else (".png", "png")
    _, coded = cv2.imencode(extension, image)
    source = f"data:image/{mime};base64,{base64.b64encode(coded.tobytes()).decode()}"
    return f'<figure class="{kind}"><img src="{source}" alt=""><figcaption>{caption}</figcaption></figure>'


def _mean(numbers: Iterable[float], form: str = ".2f") -> str:
    listed = list(numbers)
    return format(statistics.fmean(listed), form) if listed else "-"


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>streamer: the demo</title>
<style>
:root { color-scheme: light dark; --paper: #fafaf8; --ink: #1c1d1f; --soft: #6a6d72; --line: #e2e2dd; --card: #fff;
        --up: #1c7c3c; --down: #b3372c }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e8e8e4; --soft: #9a9da3; --line: #2c2f34;
        --card: #1e2125; --up: #6fd08c; --down: #f08a7e } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 40px 24px 80px }
h1 { font-size: 30px; margin: 0 0 8px; letter-spacing: -.01em }
h2 { font-size: 20px; margin: 48px 0 4px }
h3 { font-size: 16px; margin: 0 0 12px } h3 small { font-weight: 400; color: var(--soft); margin-left: 8px }
p { margin: 8px 0; max-width: 78ch } .soft, article p { color: var(--soft); font-size: 14px }
em { font-style: normal; font-weight: 600 } .up { color: var(--up) } .down { color: var(--down) }
code { font: 13px ui-monospace, monospace }
.figures { display: flex; flex-wrap: wrap; gap: 12px; margin: 24px 0 }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 18px }
.figures b { display: block; font-size: 24px; line-height: 1.2; font-variant-numeric: tabular-nums }
.figures span { color: var(--soft); font-size: 13px }
video { width: 100%; max-width: 1000px; border-radius: 8px; display: block; margin-top: 12px; background: #000 }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 18px; margin: 14px 0 }
.row { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start }
figure { margin: 0; width: 176px } figure.wide { width: 313px }
figure img { width: 100%; aspect-ratio: 1; display: block; border-radius: 4px } figure.wide img { aspect-ratio: 16 / 9 }
figure.raw img { image-rendering: pixelated } figure.ours img { outline: 2px solid var(--up) }
figcaption { font-size: 13px; color: var(--soft); margin-top: 4px } figcaption b { color: var(--ink) }
</style>
</head>
<body>
<main>
<h1>What the camera saw, what was made of it, and what was there</h1>
<p>A clip of seven people, seen by a poor camera: small, blurred, noisy and compressed as H.264. The app found and
followed them, restored them and published them over ZeroMQ; everything below came to a listener as events.</p>
<div class="figures">$figures</div>
<p class="soft"><code>$summary</code></p>
<h2>The clip, with the restored faces inset</h2>
<p class="soft">Below the picture, for each track: the crop as the camera gave it, beside what was published.
Events carry a box now and then; between them the boxes follow the scene's own motion.</p>
<video src="demo.mp4" controls muted loop autoplay playsinline></video>
<h2>Restored</h2>
<p class="soft">PSNR is against the original over all three colours, the mean over a track's events; the pictures are of
the event of the largest face that is wholly in the frame. Bicubic is the crop enlarged by interpolation alone.</p>
$restored
<h2>Untouched</h2>
<p class="soft">Large and clean faces go out as they are: a restorer could only make them worse.</p>
$untouched
<h2>Where the originals come from</h2>
<p class="soft">The clip was drawn from photographs that installed packages carry: insightface's group photo and
scikit-image's astronaut (NASA). So the whole scene is known at any scale, and the original of each crop is the same
square of it, drawn at the size of the restoration, without blur, noise or codec. Neither the app nor the restorer ever
saw these.</p>
</main>
</body>
</html>
""")
