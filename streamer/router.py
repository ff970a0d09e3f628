"""Which restorer a crop goes to, judged by its quality and side alone: never by a gallery or an embedding.

RestorerRouter knows one restorer, FittedRouter several and what each does to recognition, out of a RouteTable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from streamer.types import Crop, Quality, Route

NONE = "none"

Figure = Literal["face_height_px", "eye_distance_px", "sharpness", "noise", "blockiness", "yaw"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

_TOLD: dict[Figure, str] = {
    "face_height_px": "face {:.0f} px", "eye_distance_px": "eyes {:.0f} px apart", "sharpness": "sharpness {:.2f}",
    "noise": "noise {:.1f}", "blockiness": "blockiness {:.2f}", "yaw": "yaw {:.2f}",
}  # fmt: skip


class RouteError(ValueError):
    """There are no routes for an embedder, or they cannot be read; one line."""


class Router(Protocol):
    """What says where a crop goes."""

    def route(self, crop: Crop) -> Route:
        """Return where the crop goes, with the reason in a sentence."""
        ...


class RestorerRouter:
    """The rule for one restorer: what is large and clean goes out as it is, all else to it."""

    def __init__(
        self,
        restorer: str,
        *,
        max_size: int,
        least_scale: int = 1,
        clean_height_px: float = 64.0,
        clean_noise: float = 4.0,
        clean_blockiness: float = 0.15,
        clean_sharpness: float = 0.45,
    ) -> None:
        """`least_scale` is the restorer's smallest: what would exceed `max_size` even so is not restored.

        Clean is what is at most so noisy and blocky, and at least so sharp.
        An over-compressed H.264 is deblocked, and shows as blur. The bounds tell the two films of carphone apart.
        """
        self._restorer = restorer
        self._max_size = max_size
        self._least_scale = least_scale
        self._clean_height_px = clean_height_px
        self._clean_noise = clean_noise
        self._clean_blockiness = clean_blockiness
        self._clean_sharpness = clean_sharpness

    def route(self, crop: Crop) -> Route:
        """Return where the crop goes, with the reason in a sentence."""
        if self._restorer == NONE:
            return Route(NONE, "no restorer is configured")
        side, quality = max(crop.image.shape[:2]), crop.quality
        least = self._least_scale * side
        if least > self._max_size:
            grown = "" if least == side else f", {least} when restored"
            return Route(NONE, f"the crop is {side} px{grown}, larger than max_size {self._max_size}")
        told = (
            f"face {quality.face_height_px:.0f} px, sharpness {quality.sharpness:.2f}, noise {quality.noise:.1f}, "
            f"blockiness {quality.blockiness:.2f}"
        )
        if quality.face_height_px >= self._clean_height_px and self._is_clean(quality):
            return Route(NONE, f"large and clean: {told}")
        return Route(self._restorer, told)

    def _is_clean(self, quality: Quality) -> bool:
        return (
            quality.noise <= self._clean_noise
            and quality.blockiness <= self._clean_blockiness
            and quality.sharpness >= self._clean_sharpness
        )


class FittedRouter:
    """Sends each crop to the restorer that recognition gains most by, or to none."""

    def __init__(self, table: RouteTable, restorers: Mapping[str, Sequence[int]], *, max_size: int) -> None:
        """`restorers` are those that are loaded, each with its card's scales; no result is larger than `max_size`."""
        self._rows = table.rows
        self._told = tuple(dict.fromkeys(figure for row in table.rows for figure in ("face_height_px", *row.bounds)))
        self._restorers = restorers
        self._max_size = max_size

    def route(self, crop: Crop) -> Route:
        """Return where the crop goes, with the reason in a sentence."""
        side, quality = max(crop.image.shape[:2]), crop.quality
        told = ", ".join(_TOLD[figure].format(getattr(quality, figure)) for figure in self._told)
        row = next((row for row in self._rows if row.holds(quality)), None)
        if row is None:
            return Route(NONE, f"{told}: no restorer was measured on such faces")
        gaining = [name for name in row.routes if name in self._restorers]
        if not gaining:
            return Route(NONE, f"{told}: no restorer is known to gain there")
        for name in gaining:
            if min(self._restorers[name]) * side <= self._max_size:
                return Route(name, f"{told}: {name} gains {row.gains[name]} true accepts there")
        return Route(NONE, f"{told}: restored by {gaining[0]} it would be larger than max_size {self._max_size}")


class Gain(BaseModel):
    """What one restorer does to recognition in one row, as a share of true accepts at 1 % false accepts."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    mean: float = Field(allow_inf_nan=False)
    """True accepts of fused, the crop and its restoration together, less those of the crop alone."""
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)
    """Its 95 % interval, by redrawing people."""
    faces: int
    people: int
    """How many it was measured on."""
    ms: float
    """What restoring one such face takes of one core, in milliseconds, where it was measured."""

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


class RouteRow(BaseModel):
    """Faces that are treated alike."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    bounds: dict[Figure, tuple[float | None, float | None]]
    """By figure of a crop's quality: from the first on and below the second; null: no bound."""
    faces: int
    people: int
    """How many it was fitted on."""
    raw: float
    """True accepts of the crops alone, at 1 % false accepts."""
    gains: dict[str, Gain]
    """Of each restorer that was tried, by name."""
    routes: tuple[str, ...]
    """The first is chosen; each other stands in for those before it where their result would be too large."""

    @model_validator(mode="after")
    def _check(self) -> RouteRow:
        for figure, (low, high) in self.bounds.items():
            if low is not None and high is not None and low >= high:
                raise ValueError(f"{figure}: nothing is from {low:g} on and below {high:g}")
        for name in self.routes:
            if name not in self.gains or self.gains[name].low <= 0:
                raise ValueError(f"{name} is a route, but no gain of it is above zero")
        return self

    def holds(self, quality: Quality) -> bool:
        """Tell whether a crop belongs here; one whose figure is not known (not a number) does not."""
        return all(_within(getattr(quality, figure), *bounds) for figure, bounds in self.bounds.items())


class RouteTable(BaseModel):
    """Which restorer helps one embedder on which faces, fitted by docs/fit_routes.py."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schema_name: Literal["streamer.routes/1"] = Field(alias="schema")
    """What this file is."""
    embedder: str
    embedder_sha256: Sha256
    """Whose recognition was measured: its name, and of its file."""
    restorers: dict[str, Sha256]
    """Those that were tried, each with the sha256 of its file."""
    max_size: int
    """The longest side of a result in pixels, at which they were tried."""
    command: str
    """What made this."""
    fitted_on: date
    data: str
    """What it was fitted on."""
    terms: str
    """Of the data."""
    rows: tuple[RouteRow, ...] = Field(min_length=1)
    """A crop goes by the first that holds; by none: no restorer."""

    @classmethod
    def read(cls, path: Path, *, embedder_sha256: str) -> RouteTable:
        """Read the table of this embedder. Raises RouteError, also where it is another's."""
        try:
            table = cls.model_validate_json(path.read_bytes())
        except OSError as exc:
            raise RouteError(f"there are no routes for this embedder: {path}: {exc.strerror}") from exc
        except ValidationError as exc:
            mistakes = (f"{'.'.join(map(str, error['loc'])) or 'the file'}: {error['msg']}" for error in exc.errors())
            raise RouteError(f"{path} holds no routes: {'; '.join(mistakes)}") from exc
        if table.embedder_sha256 != embedder_sha256:
            raise RouteError(
                f"{path} was fitted for the embedder {table.embedder} (sha256 {table.embedder_sha256[:12]}), "
                f"not for this one (sha256 {embedder_sha256[:12]}): fit it again by docs/fit_routes.py"
            )
        return table

    @property
    def routed(self) -> tuple[str, ...]:
        """The restorers that some row chooses or falls back on: those worth loading."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.routes))


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value < high)
