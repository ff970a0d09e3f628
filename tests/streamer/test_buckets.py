"""The sides that a restorer's network is best fed with."""

from __future__ import annotations

import itertools
import json
import math
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.card import NetworkCard
from engines.store import default_store
from streamer import types, wire
from streamer.buckets import choose, plan_buckets, plan_lines, read_histogram
from streamer.listen import to_json_line


def pixels(inputs: dict[int, int], sides: tuple[int, ...]) -> int:
    return sum(number * min(each for each in sides if each >= side) ** 2 for side, number in inputs.items())


@settings(max_examples=50, deadline=None)
@given(
    inputs=st.dictionaries(st.integers(1, 24), st.integers(1, 1000), min_size=1, max_size=8),
    count=st.integers(1, 4),
    multiple=st.sampled_from([1, 2, 5]),
)
def test_no_other_choice_of_sides_pads_less(inputs, count, multiple):
    plan = choose(inputs, count, multiple=multiple)

    largest = math.ceil(max(inputs) / multiple) * multiple
    choices = (
        pixels(inputs, (*others, largest))
        for number in range(count)
        for others in itertools.combinations(range(multiple, largest, multiple), number)
    )
    own = sum(number * side**2 for side, number in inputs.items())
    assert len(plan.sides) <= count
    assert list(plan.sides) == sorted(set(plan.sides)) and plan.sides[-1] == largest
    assert all(side % multiple == 0 for side in plan.sides)
    assert plan.expected_waste == pixels(inputs, plan.sides) / own == min(choices) / own
    assert sum(plan.shares) == pytest.approx(1)


def test_with_a_side_for_each_size_nothing_is_wasted_but_for_the_multiple():
    inputs = {16: 5, 30: 2, 64: 1, 99: 0}

    assert choose(inputs, 3).expected_waste == choose(inputs, 1).least_waste == 1
    assert choose(inputs, 9).sides == (16, 30, 64), "no side is there for nobody"
    rounded = choose(inputs, 3, multiple=16)
    assert rounded.sides == (16, 32, 64)
    assert rounded.expected_waste == rounded.least_waste == (5 * 16**2 + 2 * 32**2 + 64**2) / (5 * 256 + 1800 + 4096)


def test_many_sizes_are_planned_for_with_the_shares_that_they_have():
    plan = choose(dict.fromkeys(range(1, 301), 1), 6)

    assert len(plan.sides) == 6 and plan.sides[-1] == 300
    shares = [after - before for before, after in itertools.pairwise((0, *plan.sides))]
    assert plan.shares == tuple(share / 300 for share in shares)


@pytest.mark.parametrize(("inputs", "count"), [({}, 3), ({16: 0}, 3), ({16: 1}, 0)])
def test_without_faces_or_buckets_there_is_nothing_to_choose(inputs, count):
    with pytest.raises(ValueError, match="no face"):
        choose(inputs, count)


def card(name: str) -> NetworkCard:
    return default_store(offline=True).find(name).card


def test_a_network_that_is_fed_with_the_enlarged_crop_gets_sides_of_that():
    crops = {20: 3, 64: 4, 65: 2, 128: 1, 200: 1}  # x4: 80, 256; x2: 130, 256; x1: 200

    plan = plan_buckets(crops, card("sgen-small"), max_size=256, count=9)

    assert plan.sides == (80, 144, 208, 256)
    assert plan.shares == (3 / 11, 2 / 11, 1 / 11, 5 / 11)
    assert plan_buckets(crops, card("sgen-small"), max_size=128, count=9).sides == (80, 128, 208)


def test_a_network_that_enlarges_by_itself_gets_sides_of_the_crops():
    assert plan_buckets({20: 3, 33: 4, 64: 1}, card("sisn-small"), max_size=256, count=9).sides == (20, 33, 64)


def test_a_plan_is_told_in_lines_and_ends_in_what_the_config_takes():
    sgen = card("sgen-small")

    lines = plan_lines(plan_buckets({20: 3, 64: 1}, sgen, max_size=256, count=2), sgen)

    assert lines == [
        "sgen-small is best fed with squares of these sides:",
        "    80 px  75.0% of the crops",
        "   256 px  25.0% of the crops",
        "expected waste: 1.00 pixels run for each of the crops' own (1.00 without buckets)",
        "restorer.buckets: [80, 256]",
    ]


@pytest.fixture
def written(tmp_path):
    def written(text, encoding="utf-8"):
        path = tmp_path / "faces.json"
        path.write_text(text, encoding)
        return path

    return written


def a_status(sizes: dict[int, int]) -> str:
    event = types.SystemStatus("ready", "1", {}, {}, {}, {}, sizes)
    numbering = {"stream": "box", "epoch": "e1", "seq": 7, "topic_seq": 3, "published_at": datetime.now(UTC)}
    return to_json_line(wire.decode(wire.encode(event, **numbering)))


def test_a_histogram_is_read_from_a_plain_object(written):
    assert read_histogram(written('{"64": 12,\n "8": 0, "100": 3}')) == {64: 12, 8: 0, 100: 3}


def test_of_events_the_last_that_counts_faces_is_read(written):
    camera = json.dumps({"kind": "camera.status"})
    lines = [camera, a_status({}), a_status({20: 1}), "", a_status({20: 2, 31: 1}), camera, a_status({})]

    assert read_histogram(written("\n".join(lines) + "\n")) == {20: 2, 31: 1}
    assert read_histogram(written(a_status({5: 1}))) == {5: 1}


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("", "FILE: counts no faces: neither"),
        ("[64, 12]", "FILE: counts no faces: neither"),
        ("{}", "FILE: counts no faces"),
        ('{"64": 0}', "FILE: counts no faces"),
        ('{"wide": 1}', "FILE: wide: should be a valid integer"),
        ('{"0": 1}', "FILE: 0: should be greater than or equal to 1"),
        ('{"99999": 1}', "FILE: 99999: should be less than or equal to 4096"),
        ('{"64": -1}', "FILE: 64: should be greater than or equal to 0"),
        ('{"64": 1.5}', "FILE: 64: should be a valid integer"),
        ('{"64": true}', "FILE: 64: should be a valid integer"),
        ('{\n"64": 12,\n"65": }', "FILE: is not JSON: expected value at line 3 column 7"),
        ('{"kind": "x"}\n{"kind": "system.st', "FILE: line 2: is not JSON: EOF while parsing a string"),
        ('{"kind": "x"}\n{"face_sizes": {"64": "many"}}', "FILE: line 2: face_sizes: 64: should be a valid integer"),
        ('{"kind": "x"}\n{"face_sizes": [64]}', "FILE: line 2: face_sizes: should be a valid dictionary"),
        ('{"kind": "x"}\n{"kind": "system.status"}\n', "FILE: counts no faces: neither"),
        ("[" * 100_000, "FILE: is not JSON: recursion limit exceeded"),
    ],
)
def test_a_file_without_a_histogram_is_told_in_a_line(written, text, mistake):
    path = written(text)

    with pytest.raises(ValueError, match=r".") as caught:
        read_histogram(path)

    assert str(caught.value).replace(str(path), "FILE").startswith(mistake)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_told_in_a_line(written, tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: No such file or directory$"):
        read_histogram(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"faces\.json: is no text in UTF-8$"):
        read_histogram(written('{"ö": 1}', "latin-1"))
