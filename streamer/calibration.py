"""What a similarity is worth: likelihood ratios and false match rates, out of a table of `streamer calibrate`."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

SCHEMA: Literal["streamer.calibration/1"] = "streamer.calibration/1"

Kind = Literal["logistic", "isotonic"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Rate = Annotated[float, Field(gt=0, le=1)]


class CalibrationError(ValueError):
    """There is no calibration for an embedder, or none can be read or fitted; one line."""


@dataclass(frozen=True, slots=True)
class Llr:
    """How much likelier a similarity is if both faces are one person's than if they are two persons', in log10."""

    llr: float
    low: float
    high: float
    """Its 95 % interval."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Network(_Part):
    """A network's name and the sha256 of its file."""

    name: str
    sha256: Sha256


class HeightBin(_Part):
    """What similarities mean for faces of about one height. The last five have a number for each of `similarities`."""

    least_px: float = Field(ge=0)
    """Height of a face's box from which on it belongs here, up to the next bin's."""
    mates: int
    """How many probes were compared with a photo of the same person."""
    strangers: int
    """How many comparisons there were with photos of others."""
    people: int
    """How many persons the probes are of."""
    calibrator: Kind
    """By which regression the ratios were fitted."""
    llr_bounds: tuple[float, float]
    """What the data support at most, both ways (ELUB): no ratio lies beyond."""
    llr: tuple[float, ...]
    """Log10 likelihood ratios; they rise."""
    llr_low: tuple[float, ...]
    llr_high: tuple[float, ...]
    """Their 95 % intervals, by redrawing people."""
    strangers_above: tuple[float, ...]
    """The share of strangers that were at least so alike to one photo of somebody else; falls to 0."""
    strangers_above_high: tuple[Rate, ...]
    """The upper 95 % bound of that share; falls, never to 0."""

    @model_validator(mode="after")
    def _check(self) -> HeightBin:
        (least, most), llr = self.llr_bounds, np.array(self.llr)
        columns = (self.llr_low, self.llr_high, self.strangers_above, self.strangers_above_high)
        if any(len(column) != len(llr) for column in columns):
            raise ValueError("the columns are not of one length")
        if not least <= 0 <= most or (llr < least).any() or (llr > most).any():
            raise ValueError("llr lies beyond llr_bounds, or these not round 0")
        if (np.diff(llr) < 0).any() or (llr < self.llr_low).any() or (llr > self.llr_high).any():
            raise ValueError("llr falls somewhere, or lies outside of its interval")
        if any((np.diff(column) > 0).any() for column in (self.strangers_above, self.strangers_above_high)):
            raise ValueError("the share of strangers that are at least so alike rises somewhere")
        if np.greater(self.strangers_above, self.strangers_above_high).any():
            raise ValueError("strangers_above lies above its bound")
        return self


class Calibration(_Part):
    """What the similarities of one embedder mean."""

    schema_name: Literal["streamer.calibration/1"] = Field(SCHEMA, alias="schema")
    """What this file is."""
    embedder: Network
    restorers: tuple[Network, ...]
    """Those that restored faces for it."""
    routes: dict[str, int]
    """How many faces went to each restorer, and how many to none."""
    data: str
    """What it was fitted on."""
    terms: str
    """Of the data."""
    people: int
    pairs: int
    """How many persons and comparisons it rests on."""
    command: str
    """What made this."""
    fitted_on: date
    streamer: str
    """Version of the app that fitted it."""
    similarities: tuple[Cosine, ...] = Field(min_length=2)
    """The steps of the tables; they rise."""
    bins: tuple[HeightBin, ...] = Field(min_length=1)
    """By the height of the face, rising; the first begins at 0."""
    _sha256: str = PrivateAttr("")

    @model_validator(mode="after")
    def _check(self) -> Calibration:
        edges = [each.least_px for each in self.bins]
        if edges[0] != 0 or not all(low < high for low, high in pairwise(edges)):
            raise ValueError("the bins do not begin at 0, or do not rise")
        if not all(low < high for low, high in pairwise(self.similarities)):
            raise ValueError("similarities do not rise")
        if any(len(each.llr) != len(self.similarities) for each in self.bins):
            raise ValueError("a bin has more or fewer numbers than there are similarities")
        return self

    @classmethod
    def read(cls, path: Path, *, embedder_sha256: str) -> Calibration:
        """Read the table of this embedder. Raises CalibrationError, also where it is another's."""
        try:
            content = path.read_bytes()
            calibration = cls.model_validate_json(content)
        except OSError as exc:
            raise CalibrationError(f"{path}: {exc.strerror}") from exc
        except ValidationError as exc:
            first, *others = exc.errors()
            more = f", and {len(others)} more" if others else ""
            place = ".".join(map(str, first["loc"])) or "the file"
            raise CalibrationError(f"{path} is no calibration: {place}: {first['msg']}{more}") from exc
        if calibration.embedder.sha256 != embedder_sha256:
            raise CalibrationError(
                f"{path} was fitted for the embedder {calibration.embedder.name} (sha256 "
                f"{calibration.embedder.sha256[:12]}), not for this one (sha256 {embedder_sha256[:12]}): "
                "`streamer calibrate` fits one"
            )
        calibration._sha256 = hashlib.sha256(content).hexdigest()
        return calibration

    def write(self, path: Path) -> None:
        """Write the table to a file. Raises CalibrationError."""
        try:
            path.write_text(self._json(), "utf-8")
        except OSError as exc:
            raise CalibrationError(f"{path}: {exc.strerror}") from exc

    @property
    def sha256(self) -> str:
        """Of the file that it was read from, or that `write` would write."""
        return self._sha256 or hashlib.sha256(self._json().encode()).hexdigest()

    def bin(self, face_height_px: float) -> int:
        """Return the number of the bin that a face of this height belongs to."""
        return max(0, bisect_right(self.bins, face_height_px, key=lambda each: each.least_px) - 1)

    def llr(self, similarity: float, face_height_px: float) -> Llr:
        """Return the likelihood ratio of a fused similarity, never beyond what the data support."""
        table = self.bins[self.bin(face_height_px)]
        columns = (table.llr, table.llr_low, table.llr_high)
        return Llr(*(float(np.interp(similarity, self.similarities, column)) for column in columns))

    def false_match_rate(self, similarity: float, face_height_px: float) -> float:
        """Return how likely a stranger's face is at least so alike to one enrolled photo: the upper 95 % bound.

        It is the bound at the next lower step of the table, and never 0.
        """
        return self._rate(similarity, self.bin(face_height_px))

    def expected_false_alarms(self, similarity: float, identities: int, passages_per_day: Mapping[int, float]) -> float:
        """Return at how many passages a day a stranger is at least so alike to somebody enrolled: an upper bound.

        `passages_per_day` is by the number of the bin. Each is one look at a stranger; `identities` have a photo each,
        one of several counts for each of them.
        """
        return sum(
            passages * (1 - (1 - self._rate(similarity, number)) ** identities)
            for number, passages in passages_per_day.items()
        )

    def lines(self) -> list[str]:
        """Return what to tell of it, a line for each bin."""
        ends = [f"to {each.least_px:g} px" for each in self.bins[1:]] + ["px and more"]
        return [
            f"faces of {each.least_px:g} {end}: {each.mates} mates, {each.strangers} comparisons with strangers, "
            f"{each.people} people; log10 ratios from {each.llr_bounds[0]:.1f} to {each.llr_bounds[1]:.1f}"
            for each, end in zip(self.bins, ends, strict=True)
        ]

    def _rate(self, similarity: float, number: int) -> float:
        step = max(0, bisect_right(self.similarities, similarity) - 1)
        return self.bins[number].strangers_above_high[step]

    def _json(self) -> str:
        return self.model_dump_json(by_alias=True) + "\n"
