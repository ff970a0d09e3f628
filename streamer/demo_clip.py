"""The demo's clip: real people from the photographs that installed wheels carry, seen by a poor camera; and the truth.

The scene is a pure function of time, drawn through any view. The clip is its view by the camera, with blur, noise and
H.264; the truth behind a crop is its view by the same square, with nothing of these.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

WIDTH, HEIGHT, FPS, SECONDS = 960, 540, 12, 10
FRAMES = FPS * SECONDS
_CRF = "18"
_SEED = 20
_PHOTOS = {
    "group": ("insightface", "data/images/t1.jpg"),
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "gravel": ("skimage", "data/gravel.png"),
}
_RAILS = (118, 232, 366)
"""Upper edges of the three balustrades, in frame pixels; behind each is a row of people."""


class PhotoMissing(RuntimeError):
    """A photograph is not where its wheel carries it."""


@dataclass(frozen=True, slots=True)
class Person:
    """One person in a photograph."""

    photo: str
    face: tuple[int, int, int, int]
    """The box that CenterFace gives, in pixels of the photograph."""
    outline: str
    """Head and shoulders, cut out by hand: points as in SVG, x,y x,y ..."""
    waist: int
    """Down to this y the outline is whole: a balustrade hides what is below."""

    @property
    def centre(self) -> np.ndarray:
        """(2,) of the face, in pixels of the photograph."""
        left, top, right, bottom = self.face
        return np.array([(left + right) / 2, (top + bottom) / 2])


PEOPLE = {
    "left": Person(
        "group",
        (58, 270, 171, 396),
        "50,256 72,240 100,236 130,248 153,272 170,308 184,348 189,392 205,385 228,388 228,412 250,440 "
        "257,470 247,500 232,520 232,600 10,600 2,440 22,432 28,400 21,330 30,290",
        500,
    ),
    "stooping": Person(
        "group",
        (266, 150, 369, 271),
        "268,132 282,115 300,108 330,102 360,107 395,120 414,130 405,150 401,175 401,212 405,229 430,233 "
        "461,242 464,300 458,342 400,384 352,422 300,422 284,380 262,346 266,318 285,296 306,284 322,266 "
        "306,252 292,236 279,208 268,180 264,152",
        345,
    ),
    "smiling": Person(
        "group",
        (464, 262, 575, 415),
        "468,262 474,242 490,228 515,221 545,219 577,227 598,240 606,262 605,285 597,312 590,340 580,354 "
        "566,362 555,388 549,397 565,408 578,435 586,470 594,505 600,560 350,560 342,500 341,465 350,430 "
        "372,408 408,382 456,347 467,338 466,300",
        500,
    ),
    "laughing": Person(
        "group",
        (747, 344, 846, 483),
        "750,330 749,318 765,306 785,296 815,290 845,298 863,313 873,342 873,372 869,394 898,396 904,418 "
        "907,460 914,510 918,570 640,570 652,528 672,498 694,472 716,450 742,436 750,430 748,380",
        525,
    ),
    "standing": Person(
        "group",
        (900, 55, 1015, 206),
        "884,50 898,40 900,28 925,12 965,2 1000,3 1030,18 1049,45 1057,80 1056,115 1050,133 1078,137 1112,141 "
        "1180,152 1210,170 1234,200 1250,236 1182,233 1150,246 1130,275 1122,340 1122,380 890,380 881,330 "
        "879,262 884,226 905,202 929,180 925,164 921,148 918,130 908,106 907,76 902,64",
        330,
    ),
    "blonde": Person(
        "group",
        (1134, 274, 1228, 402),
        "1140,280 1147,262 1162,244 1186,237 1214,244 1238,264 1254,300 1261,340 1262,400 1260,430 1252,438 "
        "1277,460 1278,600 1000,600 987,530 987,488 1010,452 1032,432 1052,432 1066,440 1082,428 1112,425 "
        "1124,418 1126,380 1128,320",
        520,
    ),
    "astronaut": Person(
        "astronaut",
        (175, 47, 274, 181),
        "190,36 208,22 235,16 265,22 288,45 299,80 297,110 284,129 269,136 257,158 254,176 282,196 300,222 "
        "304,240 325,250 342,275 353,310 361,345 364,420 24,420 28,360 44,300 60,250 88,222 114,206 116,186 "
        "134,162 160,150 186,149 182,136 171,127 157,108 154,80 166,52",
        335,
    ),
}


@dataclass(frozen=True, slots=True)
class Walk:
    """One person's way through the picture: straight, with sway, coming nearer or going away."""

    person: str
    row: int
    """0 the farthest; 3 before all balustrades, where the light is good and the lens is sharp."""
    seconds: tuple[float, float]
    x: tuple[float, float]
    """Of the face's centre, at these seconds, in frame pixels."""
    face_px: tuple[float, float]
    """Height of the face at these seconds."""

    def affine(self, time: float) -> np.ndarray | None:
        """Return what takes the photograph to the frame at this time, (2, 3), or None while nobody is there."""
        begin, end = self.seconds
        if not begin <= time < end:
            return None
        part = (time - begin) / (end - begin)
        person = PEOPLE[self.person]
        scale = _between(self.face_px, part) / (person.face[3] - person.face[1])
        step = 2 * np.pi * 0.7 * time + self.x[0]
        waist = HEIGHT + 6 if self.row == len(_RAILS) else _RAILS[self.row] + 3
        place = (
            _between(self.x, part) + 12 * scale * np.sin(step),
            waist - scale * (person.waist - person.centre[1]) + 6 * scale * np.sin(2 * step),
        )
        return _similarity(person.centre, place, scale, np.deg2rad(2.5) * np.sin(step))


WALKS = (
    Walk("laughing", 0, (0, 10), (150, 330), (20, 23)),
    Walk("blonde", 0, (0, 10), (800, 640), (22, 19)),
    Walk("left", 1, (0, 10), (90, 220), (22, 25)),
    Walk("standing", 1, (0, 10), (640, 450), (24, 27)),
    Walk("stooping", 1, (0, 10), (840, 720), (25, 22)),
    Walk("smiling", 2, (0, 6.2), (190, -70), (30, 34)),
    Walk("astronaut", 2, (0, 6.6), (560, 1000), (33, 40)),
    Walk("smiling", 3, (3.2, 10), (1050, 640), (70, 78)),
    Walk("astronaut", 3, (4.0, 10), (-90, 300), (80, 92)),
)


def truth(frame: int, transform: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the original of an image of this size (width, height), whose `transform` takes the frame's pixels to its.

    It is the pristine scene: without blur, noise and codec.
    """
    return _to_uint8(_compose(frame / FPS, transform, size, blurred=False)[..., :3])


def within_frame(transform: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return which pixels of such an image the frame shows, (h, w) bool: beyond it a crop repeats the frame's edge."""
    frame = np.full((HEIGHT, WIDTH), 255, np.uint8)
    return np.asarray(cv2.warpAffine(frame, transform, size, flags=cv2.INTER_NEAREST) > 0)


def people(frame: int) -> dict[int, np.ndarray]:
    """Return who is in a frame: index in WALKS -> what takes the photograph to the frame, (2, 3)."""
    affines = {index: walk.affine(frame / FPS) for index, walk in enumerate(WALKS)}
    return {index: affine for index, affine in affines.items() if affine is not None}


def whose(frame: int, box: np.ndarray) -> int | None:
    """Return whose face a box (4,) holds, as an index in WALKS, or None where it is nobody's."""
    centre, size = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]).max()
    for index, affine in people(frame).items():
        face = affine[:, :2] @ PEOPLE[WALKS[index].person].centre + affine[:, 2]
        if np.hypot(*(face - centre)) < size / 2:
            return index
    return None


def camera_frame(frame: int) -> np.ndarray:
    """Return a frame as the camera's sensor gives it, before H.264: blurred and noisy, the same at every call."""
    canvas = _compose(frame / FPS, np.eye(2, 3), (WIDTH, HEIGHT), blurred=True)
    noise = np.random.default_rng((_SEED, frame)).standard_normal((HEIGHT, WIDTH, 3), np.float32)
    return _to_uint8(canvas[..., :3] + canvas[..., 3:] * noise)


def make_clip(path: Path) -> bool:
    """Write the clip, unless it is there already and this very file made it; return whether it was written."""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if path.is_file() and _recipe_of(path) == recipe:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part.mp4")
    write_h264(unfinished, map(camera_frame, range(FRAMES)), size=(WIDTH, HEIGHT), crf=_CRF, comment=recipe)
    unfinished.replace(path)
    return True


def write_h264(path: Path, frames: Iterable[np.ndarray], *, size: tuple[int, int], crf: str, comment: str = "") -> None:
    """Write BGR frames of one even size (width, height) as an MP4 that browsers play."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": crf, "preset": "veryfast"}
        # said, since a player would take BT.709 for granted above a certain height
        stream.codec_context.colorspace, stream.codec_context.color_range = Colorspace.SMPTE170M, ColorRange.MPEG
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "bgr24")))
        container.mux(stream.encode(None))


def _recipe_of(path: Path) -> str:
    try:
        with av.open(str(path)) as container:
            return container.metadata.get("comment", "")
    except av.error.FFmpegError:
        return ""


@dataclass(frozen=True, slots=True)
class _Layer:
    """A picture with a soft edge, somewhere in the scene."""

    sizes: tuple[np.ndarray, ...]
    """The same at 1, 1/2, 1/4 ... of its size: (h, w, 4) float32, blue, green and red times alpha, and alpha."""
    affine: np.ndarray
    """Pixels of the largest to frame pixels."""
    row: int


_MARGIN = 8
"""Frame pixels by which the backdrop reaches beyond the frame, so that no edge of it shows."""
_BLUR = (0.6, 0.6, 0.65, 0.45)
"""Sigma of the camera's blur by row, in frame pixels."""
_NOISE = (11.0, 11.0, 11.0, 2.0)
"""Sigma by row: those at the back are in the shade, where the camera's gain is high."""


def _compose(time: float, view: np.ndarray, size: tuple[int, int], *, blurred: bool) -> np.ndarray:
    """Return blue, green, red and the noise's sigma, (h, w, 4) float32."""
    canvas = np.zeros((size[1], size[0], 4), np.float32)
    for layer in _layers(time):
        _paste(canvas, layer, view, _BLUR[layer.row] if blurred else 0.0)
    return canvas


def _layers(time: float) -> Iterator[_Layer]:
    """Yield what is in the scene, the farthest first."""
    yield _wall()
    for row in range(len(_RAILS) + 1):
        for walk in WALKS:
            affine = walk.affine(time)
            if walk.row == row and affine is not None:
                sizes, to_photo = _cutout(walk.person)
                yield _Layer(sizes, _chain(affine, to_photo), row)
        if row < len(_RAILS):
            yield _balustrade(row)


def _paste(canvas: np.ndarray, layer: _Layer, view: np.ndarray, blur: float) -> None:
    halvings = _halvings(_scale(_chain(view, layer.affine)), len(layer.sizes))
    image = layer.sizes[halvings]
    place = _chain(_chain(view, layer.affine), _enlarged(2**halvings))
    left, top, right, bottom = _bounds(place, image.shape, canvas.shape)
    if left >= right or top >= bottom:
        return
    place[:, 2] -= left, top

    # what shrinks is smoothed first, else its detail would turn into noise of our own making
    scale = _scale(place)
    sigma = float(np.hypot(blur * _scale(view), 0.5 * np.sqrt(max(0.0, 1 - scale * scale)))) / scale
    if sigma > 0.1:
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    painted = cv2.warpAffine(image, place, (right - left, bottom - top), flags=cv2.INTER_CUBIC)
    alpha = np.clip(painted[..., 3:], 0, 1)
    painted[..., 3:] = alpha * _NOISE[layer.row]
    region = canvas[top:bottom, left:right]
    region *= 1 - alpha
    region += painted


def _scale(affine: np.ndarray) -> float:
    return float(np.hypot(affine[0, 0], affine[1, 0]))


def _halvings(scale: float, sizes: int) -> int:
    return int(np.clip(np.floor(np.log2(1 / scale)), 0, sizes - 1))


def _enlarged(factor: int) -> np.ndarray:
    """Return what takes the pixels of an image to those of the same, `factor` times as large."""
    return np.array([[factor, 0, (factor - 1) / 2], [0, factor, (factor - 1) / 2]])


def _bounds(place: np.ndarray, shape: Sequence[int], canvas: Sequence[int]) -> tuple[int, int, int, int]:
    height, width = shape[:2]
    corners = np.array([(0, 0), (width, 0), (0, height), (width, height)]) @ place[:, :2].T + place[:, 2]
    left, top = np.floor(corners.min(0)).astype(int) - 2
    right, bottom = np.ceil(corners.max(0)).astype(int) + 3
    return max(0, left), max(0, top), min(canvas[1], right), min(canvas[0], bottom)


@cache
def _cutout(name: str) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Return a person cut out of the photograph, at several sizes, and what takes the largest's pixels to its own."""
    person = PEOPLE[name]
    photo = read_photo(person.photo)
    outline = np.array([point.split(",") for point in person.outline.split()], np.int32)
    within = cv2.fillPoly(np.zeros(photo.shape[:2], np.float32), [outline], 1.0)
    mask = cv2.GaussianBlur(cv2.erode(within, np.ones((5, 5))), (0, 0), 1.5)
    left, top = np.maximum(outline.min(0) - 8, 0)
    right, bottom = outline.max(0) + 8
    image, alpha = photo[top:bottom, left:right], mask[top:bottom, left:right]
    return _sizes(image, alpha), np.array([[1.0, 0, left], [0, 1, top]])


@cache
def _wall() -> _Layer:
    """A brick wall in the shade, with light from above."""
    bricks = _texture("brick", 0.55, 0, _RAILS[0])
    light = np.linspace(1.1, 0.8, len(bricks), dtype=np.float32)[:, None, None]
    return _backdrop(bricks * light * np.array([0.62, 0.74, 0.9], np.float32), 0, row=0)


@cache
def _balustrade(row: int) -> _Layer:
    """Concrete with a bright rail, down to the next one or the frame's end."""
    top, bottom = (*_RAILS, HEIGHT)[row : row + 2]
    concrete = _texture("gravel", 0.15, top, bottom)
    shade = np.linspace(0.95, 0.7, len(concrete), dtype=np.float32)[:, None, None]
    concrete = concrete * shade * (0.8 + 0.1 * row)
    concrete[:12] = 1.25 * concrete[:12] + 20
    concrete[12:22] *= 0.6
    return _backdrop(concrete, top, row=row + 1)


def _texture(photo: str, contrast: float, top: int, bottom: int) -> np.ndarray:
    """Return a photograph laid out as tiles, at twice the frame's scale and a little beyond its edges."""
    tile = read_photo(photo).swapaxes(0, 1)
    tile = tile.mean((0, 1)) + contrast * (tile - tile.mean((0, 1)))
    rows, columns = 2 * (bottom - top + _MARGIN), 2 * (WIDTH + 2 * _MARGIN)
    tiles = (-(-rows // tile.shape[0]), -(-columns // tile.shape[1]), 1)
    return np.tile(tile, tiles)[:rows, :columns]


def _backdrop(image: np.ndarray, top: int, *, row: int) -> _Layer:
    affine = np.array([[0.5, 0, -_MARGIN], [0, 0.5, top]])
    return _Layer(_sizes(image, np.ones(image.shape[:2], np.float32)), affine, row)


def _sizes(image: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the image with its alpha at 1, 1/2, 1/4 and 1/8 of its size."""
    height, width = (side // 8 * 8 for side in alpha.shape)
    whole = np.dstack([image * alpha[..., None], alpha])[:height, :width].astype(np.float32)
    halves = (cv2.resize(whole, (width >> k, height >> k), interpolation=cv2.INTER_AREA) for k in (1, 2, 3))
    return (whole, *halves)


@cache
def read_photo(name: str) -> np.ndarray:
    """Return a photograph out of its wheel, float32 BGR."""
    package, path = _PHOTOS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise PhotoMissing(f"the demo's people come with the package {package}: pip install it")
    image = cv2.imread(str(Path(spec.origin).parent / path), cv2.IMREAD_COLOR)
    if image is None:
        raise PhotoMissing(f"{package} does not carry {path}: install another version of it")
    return image.astype(np.float32)


def _similarity(point: np.ndarray, place: tuple[float, float], scale: float, angle: float) -> np.ndarray:
    """Return what turns and enlarges, and takes the point to the place, (2, 3) float64."""
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    linear = np.array([[cos, -sin], [sin, cos]])
    return np.column_stack([linear, np.array(place) - linear @ point])


def _chain(second: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return one affine that does the first, then the second, (2, 3)."""
    return np.column_stack([second[:, :2] @ first[:, :2], second[:, :2] @ first[:, 2] + second[:, 2]])


def _to_uint8(values: np.ndarray) -> np.ndarray:
    pixels: np.ndarray = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return pixels


def _between(ends: tuple[float, float], part: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * part
