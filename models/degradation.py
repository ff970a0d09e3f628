"""What cameras and papers do to a face: from clean faces to the low-resolution ones that a restorer gets.

Images are float32 tensors (n, 3, h, w), RGB, 0..255, on any device. What a camera would store comes back in whole grey
levels. A parameter is one number for all images or a tensor (n,) on the CPU. Nothing loops over images but H.264. Call
these outside of autocast: bfloat16 is coarser than a grey level.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SGEN_SIZES = tuple((96 + 16 * z, 128 + 16 * z) for z in range(6))
"""The six (width, height) of SGEN's protocol."""

Kernel = Literal["area", "cubic", "linear", "nearest", "pillow"]
"""OpenCV's four interpolations, and Pillow's bicubic, which is anti-aliased and has a = -0.5."""

SHRINKING: tuple[Kernel, ...] = ("area", "cubic", "linear", "pillow")
"""The kernels by which a camera shrinks; `Damage.kernel` counts in them."""

NoiseKind = Literal["gauss", "uniform"]


@dataclass(frozen=True, slots=True)
class Generators:
    """Where the damage of one batch is drawn from."""

    choices: torch.Generator
    """On the CPU: the parameters, such as sigma and quality."""
    noise: torch.Generator
    """On the images' device: the noise of the pixels."""


def generators(*key: int, device: torch.device | str = "cpu") -> Generators:
    """Return the generators that belong to these whole numbers, 0 or more, such as seed and step."""
    choices, noise = np.random.SeedSequence(key).generate_state(2, np.uint64)
    return Generators(
        torch.Generator().manual_seed(int(choices)), torch.Generator(device=device).manual_seed(int(noise))
    )


# What papers do


def sgen(
    clean: Tensor,
    draws: Generators,
    *,
    sigma: float | tuple[float, float] = 30.0,
    kind: NoiseKind = "gauss",
    factor: int = 4,
) -> Tensor:
    """Return the faces as SGEN's protocol gives them: OpenCV's cubic to 1/factor (no anti-aliasing), noise, 8 bit.

    `sigma` is the standard deviation of Gaussian noise in grey levels, or the range that each image's is drawn from;
    with kind "uniform" noise is drawn from 0 to `sigma` (Table VII).
    """
    low = stored(resize(clean, _shrunk(clean, factor), "cubic"))
    level = _uniform(*sigma, len(clean), draws) if isinstance(sigma, tuple) else sigma
    return uniform_noise(low, draws, level) if kind == "uniform" else sensor_noise(low, draws, level)


def sisn(clean: Tensor, *, scale: int) -> Tensor:
    """Return the faces as SISN gets them: Pillow's anti-aliased bicubic to 1/scale, 8 bit, and nothing else."""
    return stored(resize(clean, _shrunk(clean, scale), "pillow"))


def scgan(
    clean: Tensor,
    draws: Generators,
    *,
    factor: int = 4,
    blur: tuple[float, float] = (0.5, 2.5),
    noise: tuple[float, float] = (1.0, 15.0),
    quality: tuple[int, int] = (40, 95),
) -> Tensor:
    """Return the faces moderately degraded, as half of SCGAN's low side: blur, linear or cubic shrinking, noise, JPEG.

    `blur` is the range of sigma for a clean face 64 px high, and grows with the height; `noise` that of sigma in grey
    levels. The paper's test set has blur 0.5..8, noise 1..25, quality 30..95.
    """
    n, _, height, _ = clean.shape
    sigma = _uniform(*blur, n, draws) * height / 64
    kernel = torch.randint(2, (n,), generator=draws.choices) + SHRINKING.index("cubic")  # or linear, which follows
    low = _shrink(clean, _shrunk(clean, factor), sigma, kernel)
    low = sensor_noise(low, draws, _uniform(*noise, n, draws))
    return jpeg(low, _whole(*quality, n, draws))


def gfrnet(
    clean: Tensor, draws: Generators, *, scale: float | None = None, kernel: Literal["pillow", "cubic"] = "pillow"
) -> Tensor:
    """Return the faces as GFRNet gets them, at the clean ones' size: blur, bicubic to 1/s, noise, JPEG, bicubic back.

    Each value is drawn from its set in the paper, §5 of our specification: blur {0, 1..3 by 0.1}, s {1..8 by 0.1} or
    `scale`, noise {0..7}, quality {0, 10..40}, where 0 is lossless. The paper does not say which bicubic it means.
    """
    n = len(clean)
    blur, quality = _whole(0, 21, n, draws), _whole(0, 31, n, draws)
    return _gfrnet(
        clean,
        draws,
        blur=torch.where(blur > 0, 0.9 + 0.1 * blur, 0.0),
        scale=torch.full((n,), float(scale)) if scale is not None else 1 + 0.1 * _whole(0, 70, n, draws),
        noise=_whole(0, 7, n, draws),
        quality=torch.where(quality > 0, 9 + quality, 0),
        kernel=kernel,
    )


def _gfrnet(
    clean: Tensor, draws: Generators, *, blur: Tensor, scale: Tensor, noise: Tensor, quality: Tensor, kernel: Kernel
) -> Tensor:
    _, _, height, width = clean.shape
    heights, widths = ((side / scale).round().clamp(min=1).long() for side in (height, width))
    # Images of several sizes share a canvas, each in the upper left corner, its edge replicated.
    rows, columns = int(heights.max()), int(widths.max())
    low = _product(
        clean,
        _weights(kernel, torch.tensor([height]), heights, rows, height) @ _gauss(blur, height),
        _weights(kernel, torch.tensor([width]), widths, columns, width) @ _gauss(blur, width),
        stores_half=kernel == "pillow",
    )
    low = _replicate_edge(sensor_noise(low, draws, noise), heights, widths)
    back = _product(
        jpeg(low, quality),
        _weights(kernel, heights, torch.tensor([height]), height, rows),
        _weights(kernel, widths, torch.tensor([width]), width, columns),
        stores_half=kernel == "pillow",
    )
    return stored(back)


# What cameras do


@dataclass(frozen=True, slots=True)
class Damage:
    """What a batch of n faces suffers from: tensors (n,) on the CPU, in the order in which it happens."""

    motion: Tensor
    """Length of the motion blur in pixels of the low-resolution face; 0: none."""
    angle: Tensor
    """Of the motion, in degrees, counter-clockwise from the row."""
    blur: Tensor
    """Sigma of the defocus in pixels of the low-resolution face; 0: none."""
    kernel: Tensor
    """Which of SHRINKING shrinks it; int64."""
    gain: Tensor
    """Low light: white becomes 255 times this; 1: none."""
    gamma: Tensor
    """Low light: the power of the grey level; 1: none."""
    noise: Tensor
    """Sigma in grey levels, alike in dark and bright."""
    shot: Tensor
    """Sigma in grey levels, at white, of the noise that goes with the root of the signal."""
    grey: Tensor
    """Whether the noise is the same in all three colours, as after chroma denoising; bool."""
    quality: Tensor
    """Of JPEG, 1..100; 0: none; int64."""
    crf: int | None
    """Of H.264, for the whole batch; None: none."""

    @classmethod
    def same(
        cls,
        n: int,
        *,
        motion: float = 0.0,
        angle: float = 0.0,
        blur: float = 0.0,
        kernel: Kernel = "area",
        gain: float = 1.0,
        gamma: float = 1.0,
        noise: float = 0.0,
        shot: float = 0.0,
        grey: bool = False,
        quality: int = 0,
        crf: int | None = None,
    ) -> Damage:
        """Return a damage that is the same for all n faces; by default they are only shrunk."""
        return cls(
            motion=torch.full((n,), float(motion)),
            angle=torch.full((n,), float(angle)),
            blur=torch.full((n,), float(blur)),
            kernel=torch.full((n,), SHRINKING.index(kernel)),
            gain=torch.full((n,), float(gain)),
            gamma=torch.full((n,), float(gamma)),
            noise=torch.full((n,), float(noise)),
            shot=torch.full((n,), float(shot)),
            grey=torch.full((n,), grey),
            quality=torch.full((n,), quality),
            crf=crf,
        )


@dataclass(frozen=True)
class Shares:
    """How often each kind of damage is drawn, from 0 to 1."""

    blur: float = 0.5
    """Faces that are blurred, three in ten of them by motion, before the noise."""
    low_light: float = 0.15
    """Faces in low light."""
    noise: float = 0.85
    """Faces with noise."""
    shot: float = 0.3
    """Noise that depends on the signal; its size at middle grey is drawn as that of other noise."""
    jpeg: float = 0.25
    """Faces that JPEG codes."""
    h264: float = 0.25
    """Batches, then whole, that H.264 codes."""

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: {share} is no share from 0 to 1")
        if self.jpeg + self.h264 > 1:
            raise ValueError(f"jpeg, h264: together {self.jpeg + self.h264:g}, more than all faces")


def draw_damage(n: int, draws: Generators, shares: Shares = Shares()) -> Damage:
    """Draw what surveillance cameras do to n faces."""

    def share(part: float) -> Tensor:
        return torch.rand(n, generator=draws.choices) < part

    blurred = share(shares.blur)
    moved = blurred & share(0.3)
    dark = share(shares.low_light)
    level = torch.where(share(shares.noise), 30 * _uniform(0, 1, n, draws) ** 1.5, 0.0)
    by_signal = torch.where(share(shares.shot), _uniform(0.3, 1, n, draws), 0.0)  # of the variance at middle grey
    crf = int(_whole(18, 42, 1, draws).item()) if torch.rand((), generator=draws.choices) < shares.h264 else None
    by_jpeg = share(shares.jpeg / (1 - shares.h264)) if crf is None else torch.zeros(n, dtype=torch.bool)
    return Damage(
        motion=torch.where(moved, _uniform(1.5, 5, n, draws), 0.0),
        angle=_uniform(0, 180, n, draws),
        blur=torch.where(blurred & ~moved, _uniform(0.2, 1.4, n, draws), 0.0),
        kernel=_whole(0, len(SHRINKING) - 1, n, draws),
        gain=torch.where(dark, _uniform(0.25, 0.8, n, draws), 1.0),
        gamma=torch.where(dark, _uniform(1, 1.4, n, draws), 1.0),
        noise=level * (1 - by_signal).sqrt(),
        shot=level * (2 * by_signal).sqrt(),
        grey=share(0.3),
        quality=torch.where(by_jpeg, _whole(30, 95, n, draws), 0),
        crf=crf,
    )


def surveillance(clean: Tensor, damage: Damage, draws: Generators, *, factor: int) -> Tensor:
    """Return the faces as a camera gives them, at 1/factor: blur, shrink, low light, noise, codec, in this order.

    Low light changes what the face looks like: `low_light(clean, damage.gain, damage.gamma)` is the truth as dark.
    """
    moved = (damage.motion > 0).nonzero().flatten()
    if len(moved):
        here = moved.to(clean.device)
        blurred = motion_blur(clean[here], damage.motion[moved] * factor, damage.angle[moved])
        clean = clean.index_copy(0, here, blurred)
    low = _shrink(clean, _shrunk(clean, factor), damage.blur * factor, damage.kernel)
    low = low_light(low, damage.gain, damage.gamma)
    low = sensor_noise(low, draws, damage.noise, shot=damage.shot, grey=damage.grey)
    low = jpeg(low, damage.quality)
    return low if damage.crf is None else h264(low, draws, crf=damage.crf)


# One damage each


def stored(images: Tensor) -> Tensor:
    """Return the images as 8 bit would hold them: whole grey levels, clipped to 0..255, float32 still."""
    return images.round().clamp(0, 255)


def resize(images: Tensor, size: tuple[int, int], kernel: Kernel) -> Tensor:
    """Return the images at `size` = (width, height), neither rounded nor clipped; `stored` of it is what OpenCV or
    Pillow gives, within 1 grey level.

    Raises ValueError where area would have to enlarge.
    """
    width, height = size
    if kernel == "area" and (height > images.shape[2] or width > images.shape[3]):
        raise ValueError(f"area only shrinks: {images.shape[3]}x{images.shape[2]} cannot become {width}x{height}")
    if size == (images.shape[3], images.shape[2]):
        return images
    rows, columns = _between(kernel, images.shape[2], height), _between(kernel, images.shape[3], width)
    return _product(images, rows, columns, stores_half=kernel == "pillow")


def gaussian_blur(images: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the images blurred by a Gaussian of `sigma` pixels, mirrored at the edge as OpenCV's; 0 leaves them."""
    sigma = _each(sigma, images)
    return _product(images, _gauss(sigma, images.shape[2]), _gauss(sigma, images.shape[3]))


def motion_blur(images: Tensor, length: float | Tensor, angle: float | Tensor) -> Tensor:
    """Return the images smeared along a line `length` pixels long, `angle` degrees counter-clockwise from the row."""
    streak = _streak(_each(length, images), _each(angle, images)).to(images.device)
    reach = streak.shape[-1] - 1
    padded = F.pad(images, (reach // 2,) * 4, mode="replicate")
    shape = padded.shape[2:]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(streak, s=shape)[:, None]
    return torch.fft.irfft2(spectrum, s=shape)[..., reach:, reach:]


def low_light(images: Tensor, gain: float | Tensor, gamma: float | Tensor = 1.0) -> Tensor:
    """Return the images darker: 255 · gain · (x / 255)^gamma, clipped but not rounded."""
    power, factor = _spread(gamma, images), 255 * _spread(gain, images)
    return (factor * (images / 255).clamp(0, 1) ** power).clamp(0, 255)


def sensor_noise(
    images: Tensor,
    draws: Generators,
    sigma: float | Tensor,
    *,
    shot: float | Tensor = 0.0,
    grey: bool | Tensor = False,
) -> Tensor:
    """Return the images with Gaussian noise of variance sigma² + shot² · x / 255, in whole grey levels.

    `sigma` and `shot` are in grey levels; where `grey`, all three colours get the same noise.
    """
    noise = torch.randn(images.shape, generator=draws.noise, device=images.device)
    noise = torch.where(_spread(grey, images) > 0, noise[:, :1], noise)
    variance = _spread(sigma, images) ** 2 + _spread(shot, images) ** 2 * images.clamp(0, 255) / 255
    return stored(images + variance.sqrt() * noise)


def uniform_noise(images: Tensor, draws: Generators, top: float | Tensor) -> Tensor:
    """Return the images with noise between 0 and `top` grey levels added, in whole grey levels."""
    noise = torch.rand(images.shape, generator=draws.noise, device=images.device)
    return stored(images + _spread(top, images) * noise)


def jpeg(images: Tensor, quality: float | Tensor) -> Tensor:
    """Return the images after JPEG at this quality, 1..100, as libjpeg codes and decodes it with 4:2:0 chroma.

    Where the quality is 0 an image stays as it is.
    """
    quality = _each(quality, images)
    coded = quality.nonzero().flatten()
    if len(coded) == 0:
        return images
    here = coded.to(images.device)
    tables = _quantisation(quality[coded]).to(images.device)  # (n, 2, 64)
    return images.index_copy(0, here, _through_jpeg(stored(images[here]), tables))


def h264(images: Tensor, draws: Generators, *, crf: int) -> Tensor:
    """Return the images after x264: as one mosaic that moves a little, the last of three frames, over the CPU.

    So the damage is that of predicted frames, not only of still pictures.
    """
    faces = stored(images).to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    n, height, width, _ = faces.shape
    columns = math.isqrt(n - 1) + 1
    rows = -(-n // columns)
    gap = 8
    mosaic = np.full((_even(rows * (height + gap) + gap), _even(columns * (width + gap) + gap), 3), 110, np.uint8)
    places = [(gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)) for i in range(n)]
    for face, (y, x) in zip(faces, places, strict=True):
        mosaic[y : y + height, x : x + width] = face
    steps = [*torch.randint(-2, 3, (2, 2), generator=draws.choices).tolist(), (0, 0)]
    last = _encode_decode([np.roll(mosaic, tuple(step), (0, 1)) for step in steps], crf)
    cut = np.stack([last[y : y + height, x : x + width] for y, x in places])
    return torch.from_numpy(cut).permute(0, 3, 1, 2).to(images.device, torch.float32)


def _encode_decode(frames: list[np.ndarray], crf: int) -> np.ndarray:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(25))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "preset": "veryfast", "bf": "0", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer) as container:
        container.streams.video[0].thread_count = 1
        decoded = list(container.decode(video=0))
    return decoded[-1].to_ndarray(format="rgb24", threads=1)


def _even(value: int) -> int:
    return value + value % 2


# Draws and parameters


def _uniform(low: float, high: float, n: int, draws: Generators) -> Tensor:
    return low + (high - low) * torch.rand(n, generator=draws.choices)


def _whole(low: int, high: int, n: int, draws: Generators) -> Tensor:
    """Whole numbers from `low` to `high`, both included."""
    return torch.randint(low, high + 1, (n,), generator=draws.choices)


def _each(value: float | Tensor, images: Tensor) -> Tensor:
    """The parameter of each image, (n,) float32 on the CPU."""
    return torch.as_tensor(value, dtype=torch.float32, device="cpu").expand(len(images))


def _spread(value: float | Tensor, images: Tensor) -> Tensor:
    """The parameter of each image, (n, 1, 1, 1), beside the images."""
    return _each(value, images).to(images.device)[:, None, None, None]


# Resizing and blur as products with a matrix for the rows and one for the columns, which may differ by image


def _shrunk(images: Tensor, factor: int) -> tuple[int, int]:
    return images.shape[3] // factor, images.shape[2] // factor


def _shrink(images: Tensor, size: tuple[int, int], sigma: Tensor, kernel: Tensor) -> Tensor:
    """Blur and shrink, each image by its own sigma and its own kernel of SHRINKING."""
    width, height = size
    if not sigma.any() and size == (images.shape[3], images.shape[2]):
        return images
    rows, columns = (
        torch.cat([_between(each, old, new) for each in SHRINKING])[kernel] @ _gauss(sigma, old)
        for old, new in ((images.shape[2], height), (images.shape[3], width))
    )
    return _product(images, rows, columns, stores_half=kernel == SHRINKING.index("pillow"))


def _product(images: Tensor, rows: Tensor, columns: Tensor, *, stores_half: bool | Tensor = False) -> Tensor:
    """Return (n, 3, H, W) of images (n, 3, h, w), rows (n or 1, H, h) and columns (n or 1, W, w).

    Pillow stores the half-resized image in 8 bit, which cuts what overshoots.
    """
    half = images @ columns.to(images.device)[:, None].mT
    half = torch.where(_spread(stores_half, images) > 0, stored(half), half)
    return rows.to(images.device)[:, None] @ half


def _between(kernel: Kernel, old: int, new: int) -> Tensor:
    return _weights(kernel, torch.tensor([old]), torch.tensor([new]), new, old)


def _weights(kernel: Kernel, old: Tensor, new: Tensor, rows: int, columns: int) -> Tensor:
    """Return (n, rows, columns): how much of each old pixel is in each new one, for n pairs of sizes.

    Rows from `new` on repeat its last, columns from `old` on are 0.
    """
    old, new = old[:, None, None].double(), new[:, None, None].double()
    scale = old / new
    i = torch.minimum(torch.arange(rows)[:, None], new - 1)  # (n, rows, 1)
    j = torch.arange(columns)
    if kernel == "area":
        weights = (torch.minimum((i + 1) * scale, j + 1) - torch.maximum(i * scale, j)).clamp(min=0)
    elif kernel == "pillow":
        weights = _cubic((j + 0.5 - (i + 0.5) * scale) / scale.clamp(min=1), a=-0.5) * (j < old)
    elif kernel == "nearest":
        weights = ((i * scale).floor() == j).double()
    else:
        at = (i + 0.5) * scale - 0.5
        taps = at.floor() + (torch.tensor([-1, 0, 1, 2]) if kernel == "cubic" else torch.tensor([0, 1]))
        taken = _cubic(at - taps, a=-0.75) if kernel == "cubic" else 1 - (at - taps).abs()  # (n, rows, taps)
        places = torch.minimum(taps.clamp(min=0), old - 1)
        weights = (taken[..., None] * (places[..., None] == j)).sum(dim=2)
    return (weights / weights.sum(dim=2, keepdim=True)).float()


def _cubic(x: Tensor, *, a: float) -> Tensor:
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _gauss(sigma: Tensor, size: int) -> Tensor:
    """Return (n, size, size): a Gaussian round each pixel, mirrored at the first and the last."""
    bell = torch.exp(-(torch.arange(2 * size) ** 2) / (2 * sigma[:, None] ** 2).clamp(min=1e-6))  # (n, 2 size)
    both = torch.cat([bell[:, 1:size].flip(1), bell[:, :size]], dim=1)
    direct = both.unfold(1, size, 1).flip(1)  # [i, j] is bell[|i - j|]
    mirrored = bell.unfold(1, size, 1)[:, :size]  # [i, j] is bell[i + j]: what lies before the first
    j = torch.arange(size)
    weights = direct + mirrored * (j > 0) + mirrored.flip(1, 2) * (j < size - 1)
    return weights / weights.sum(dim=2, keepdim=True)


def _streak(length: Tensor, angle: Tensor) -> Tensor:
    """Return (n, k, k), k odd: a line through the middle, drawn of points that spread on the four pixels round them."""
    reach = math.ceil(float(length.max()) / 2)
    along = length[:, None] * torch.linspace(-0.5, 0.5, 8 * reach + 1)  # (n, points)
    turn = torch.deg2rad(angle)[:, None]
    place = torch.arange(-reach, reach + 1)
    across = (1 - (place - (along * turn.cos())[..., None]).abs()).clamp(min=0)  # (n, points, k)
    down = (1 - (place + (along * turn.sin())[..., None]).abs()).clamp(min=0)
    return down.mT @ across / along.shape[1]


def _replicate_edge(images: Tensor, heights: Tensor, widths: Tensor) -> Tensor:
    """Fill each image beyond its own height and width with its last row and column."""
    y = torch.minimum(torch.arange(images.shape[2]), heights[:, None] - 1).to(images.device)
    x = torch.minimum(torch.arange(images.shape[3]), widths[:, None] - 1).to(images.device)
    return images.take_along_dim(y[:, None, :, None], 2).take_along_dim(x[:, None, None, :], 3)


# JPEG

_LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_CHROMA = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99, *(99,) * 32,
)  # fmt: skip
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def _quantisation(quality: Tensor) -> Tensor:
    """Return libjpeg's tables (n, 2, 64) for luma and chroma: those of T.81's Annex K, scaled."""
    scale = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)
    return ((torch.tensor([_LUMA, _CHROMA]) * scale[:, None, None] + 50) / 100).floor().clamp(1, 255)


def _through_jpeg(images: Tensor, tables: Tensor) -> Tensor:
    """Code and decode images of whole grey levels, rounding wherever libjpeg does."""
    height, width = images.shape[2:]
    padded = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
    ycc = _mix(padded, _TO_YCC).round()  # chroma about 0
    luma = _through_dct(ycc[:, :1] - 128, tables[:, :1])
    chroma = _floor_after(F.avg_pool2d(ycc[:, 1:], 2), 1 / 4, 1 / 2)
    chroma = _through_dct(chroma, tables[:, 1:])[..., : (height + 1) // 2, : (width + 1) // 2]
    chroma = _floor_after(F.interpolate(chroma, scale_factor=2, mode="bilinear"), 1 / 2, 7 / 16)
    cut = (luma[..., :height, :width] + 128, chroma[..., :height, :width])
    return stored(_mix(torch.cat(cut, dim=1), _TO_RGB))


def _through_dct(planes: Tensor, tables: Tensor) -> Tensor:
    """Quantise planes (n, c, h, w) about 0, sides multiples of 8, by tables (n, 1, 64)."""
    n, c, h, w = planes.shape
    basis = _dct().to(planes.device)
    blocks = F.pixel_unshuffle(planes, 8).reshape(n, c, 64, -1)
    steps = tables[..., None]
    scaled = (basis @ blocks * 8).round() / (8 * steps)
    levels = scaled.sign() * (scaled.abs() + 0.5).floor()
    back = (basis.T @ (levels * steps) + 0.5 + 1e-4).floor()  # halves are common, and go up
    return F.pixel_shuffle(back.reshape(n, c * 64, h // 8, w // 8), 8).clamp(-128, 127)


def _floor_after(planes: Tensor, even: float, odd: float) -> Tensor:
    """Round down after adding `even` and `odd` to the columns in turn, so that halves go both ways."""
    turns = torch.tensor([even, odd], device=planes.device).repeat(planes.shape[-1] // 2)
    return (planes + turns).floor()


def _dct() -> Tensor:
    """Return (64, 64): the orthonormal DCT of a block of 8x8, both as vectors row by row."""
    k, x = torch.arange(8.0)[:, None], torch.arange(8.0)
    one = torch.cos((2 * x + 1) * k * math.pi / 16) / 2
    one[0] /= math.sqrt(2)
    return torch.kron(one, one)


def _mix(images: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """Return the images in other colours: the matrix times each pixel."""
    mixed = torch.tensor(matrix, device=images.device) @ images.flatten(2)
    return mixed.view(images.shape)
