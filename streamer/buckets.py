"""Size buckets: which sides a restorer's network is best fed with, judged by the faces that it met."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from engines.card import NetworkCard
from streamer.restorer import input_side

Histogram = Mapping[int, int]
"""How many crops, or inputs of a network, there are of each side in pixels."""

_Side = Annotated[int, Field(ge=1, le=4096)]
_HISTOGRAM = TypeAdapter(dict[_Side, Annotated[int, Field(ge=0, strict=True)]])


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """The sides that a network is fed with, and what they cost."""

    sides: tuple[int, ...]
    """In pixels, rising; the last holds every input."""
    shares: tuple[float, ...]
    """Of the inputs, those that each side takes; 1 in all."""
    expected_waste: float
    """Pixels run for each of the inputs' own: 1 where nothing is padded."""
    least_waste: float
    """The same with every input padded to the network's multiple alone."""


def plan_buckets(crops: Histogram, card: NetworkCard, *, max_size: int, count: int) -> BucketPlan:
    """Return the best sides, `count` at most, for a restorer that meets crops of these sides.

    `max_size` is the restorer's, in pixels. Raises ValueError as `choose` does.
    """
    inputs: Counter[int] = Counter()
    for side, number in crops.items():
        inputs[input_side(card, side, max_size)] += number
    return choose(inputs, count, multiple=card.size_multiple)


def choose(inputs: Histogram, count: int, *, multiple: int = 1) -> BucketPlan:
    """Return the sides, multiples of `multiple` and `count` at most, that pad square inputs by the fewest pixels.

    No other choice pads less. Raises ValueError where `count` is less than 1, or there are no inputs.
    """
    if count < 1:
        raise ValueError(f"{count} buckets hold no face; there must be one at least")
    padded: Counter[int] = Counter()
    for side, number in inputs.items():
        padded[math.ceil(side / multiple) * multiple] += number
    sides = sorted(side for side, number in padded.items() if number)
    if not sides:
        raise ValueError("there are no faces to choose by")
    before = [0, *accumulate(padded[side] for side in sides)]
    """Inputs among the first so many sides."""

    ends = _best_ends(sides, before, min(count, len(sides)))
    chosen = [sides[end - 1] for end in ends]
    numbers = [before[end] - before[start] for start, end in zip([0, *ends], ends, strict=False)]
    own = sum(number * side**2 for side, number in inputs.items())
    return BucketPlan(
        sides=tuple(chosen),
        shares=tuple(number / before[-1] for number in numbers),
        expected_waste=sum(number * side**2 for side, number in zip(chosen, numbers, strict=True)) / own,
        least_waste=sum(padded[side] * side**2 for side in sides) / own,
    )


def plan_lines(plan: BucketPlan, card: NetworkCard) -> list[str]:
    """Return a plan as lines for people; the last is what to write into the config."""
    return [
        f"{card.name} is best fed with squares of these sides:",
        *(f"{side:6d} px {share:6.1%} of the crops" for side, share in zip(plan.sides, plan.shares, strict=True)),
        f"expected waste: {plan.expected_waste:.2f} pixels run for each of the crops' own "
        f"({plan.least_waste:.2f} without buckets)",
        f"restorer.buckets: [{', '.join(map(str, plan.sides))}]",
    ]


def read_histogram(path: Path) -> dict[int, int]:
    """Read how many crops there were of each side: {"64": 12, ...}, or events as `streamer listen --json` prints them.

    Of events the last system.status that counts any face is taken. Raises ValueError, one line with the place.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as exc:
        raise ValueError(f"{path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ValueError(f"{path}: is no text in UTF-8") from exc
    try:
        content = from_json(text)
    except ValueError as exc:
        return _last_of(_events(text, path, exc), path)
    if isinstance(content, dict) and "kind" not in content:
        return _checked(content, str(path))
    return _last_of([(str(path), content)], path)


def _best_ends(sides: list[int], before: list[int], count: int) -> list[int]:
    """Return after how many of the sides each bucket ends, so that `count` buckets have the fewest pixels."""
    least: list[float] = [0, *[math.inf] * len(sides)]
    """Pixels of the first so many sides in as many buckets as were looked at."""
    starts: list[list[int]] = []
    for _ in range(count):
        options = [
            min((least[start] + (before[end] - before[start]) * sides[end - 1] ** 2, start) for start in range(end))
            for end in range(1, len(sides) + 1)
        ]
        least = [math.inf, *(pixels for pixels, _ in options)]
        starts.append([0, *(start for _, start in options)])
    ends = [len(sides)]
    for of_bucket in reversed(starts):
        ends.append(of_bucket[ends[-1]])
    return ends[-2::-1]


def _events(text: str, path: Path, whole: ValueError) -> Iterator[tuple[str, object]]:
    """Yield the event of each line with its place; `whole` is why the text is no JSON in one piece."""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield f"{path}: line {number}", from_json(line)
            except ValueError as exc:
                if number == 1:
                    raise ValueError(f"{path}: is not JSON: {whole}") from exc
                raise ValueError(f"{path}: line {number}: is not JSON: {str(exc).partition(' at ')[0]}") from exc


def _last_of(events: Iterable[tuple[str, object]], path: Path) -> dict[int, int]:
    found: dict[int, int] = {}
    for place, event in events:
        sizes = event.get("face_sizes") if isinstance(event, dict) else None
        if sizes:
            found = _checked(sizes, f"{place}: face_sizes")
    if not found:
        raise ValueError(f'{path}: counts no faces: neither {{"64": 12, ...}} nor a system.status with face_sizes')
    return found


def _checked(content: object, place: str) -> dict[int, int]:
    try:
        histogram = _HISTOGRAM.validate_python(content)
    except ValidationError as exc:
        mistake = exc.errors(include_url=False, include_input=False)[0]
        where = f"{place}: {mistake['loc'][0]}" if mistake["loc"] else place
        raise ValueError(f"{where}: {mistake['msg'].replace('Input should', 'should')}") from exc
    if not any(histogram.values()):
        raise ValueError(f"{place}: counts no faces")
    return histogram
